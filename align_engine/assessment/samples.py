"""`align samples`: answers of several checkpoints to the same prompts, side by side.

What a model draws is a function of its weights, the prompts and the seed; a prompt has the same random numbers with
every model. Answers go into the folder's journal with their scores, batch by batch: a run that is killed goes on with
what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from align_engine import inputs
from align_engine.assessment.report_sections import SamplesRecipe
from align_engine.data.formats import Messages
from align_engine.preparation import folder, layouts, report
from align_engine.preparation.answers import device
from align_engine.preparation.local import Local
from align_engine.preparation.models import ModelSpec
from align_engine.recipe.names import distinct
from align_engine.recipe.secrets import masked
from align_engine.reports.parts import Beside, Part, Said, markdown, whole_page
from align_engine.reports.report import Table, number
from align_engine.reports.text import said
from align_engine.rollouts import rewards as scoring
from align_engine.rollouts.completion import derived_seed

OURS = ("prompt", "completion", "model", "index", "score", "rewards", "tokens", "finish_reason")
Prompts = dict[int, dict[str, Any]]  # rows in TRL's layout, by their number


class Answer(NamedTuple):
    """What a model says to a prompt."""

    text: str
    tokens: int
    ended: bool  # False: cut at max_completion_length
    rewards: list[float | None]  # of each scorer; None: it cannot say

    @property
    def score(self) -> float | None:
        """The sum of its rewards, as training without reward_weights takes it; None where no scorer could say."""
        known = [one for one in self.rewards if one is not None]
        return math.fsum(known) if known else None


class Asked(NamedTuple):
    """What is asked of whom, and what has been said so far."""

    settings: SamplesRecipe
    names: list[str]  # of the models
    prompts: Prompts
    scorers: list[scoring.Reward]
    answers: list[dict[int, Answer]]  # of each model, by the prompt's number


def run(settings: SamplesRecipe) -> None:
    """The command.

    Raises:
        BadInput: models, prompts or scorers that cannot be used. RunFailed: a scorer fails. Stopped: by a signal; what
            has been answered stays.
    """
    rows = layouts.read(settings.data)
    found = layouts.converted(rows, settings.data, dict)
    prompts = dict(islice(found, settings.sampling.num_prompts))
    if settings.data.dry_run:
        folder.dry({"prompt": row["prompt"], "models": settings.asked.model_name_or_path} for row in prompts.values())
        return
    names = distinct([Path(path).parts for path in settings.asked.model_name_or_path])
    with folder.opened("samples", settings, rows, inputs.facts(settings)) as place:
        if place is None:
            return
        scorers = scoring.load_rewards(settings.asked.reward_funcs, device())
        for scorer in scorers:
            if scorer.check is not None:
                scorer.check(row["prompt"] for row in prompts.values())
        asked = Asked(settings, names, prompts, scorers, [{} for _ in names])
        with place.journal() as journal:
            ask(asked, journal)
        write(place, asked, len(rows))


def ask(asked: Asked, journal: folder.Journal) -> None:
    """Have every model answer what the journal does not hold."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    for line in journal.rows:
        asked.answers[line["model"]][line["row"]] = Answer(*(line[name] for name in Answer._fields))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bars:
        for i, name in enumerate(asked.names):
            task = bars.add_task(name, total=len(asked.prompts), completed=len(asked.answers[i]))
            if len(asked.answers[i]) < len(asked.prompts):
                for batch in answered(asked, i):
                    journal.add({"model": i, "row": row, **one._asdict()} for row, one in batch.items())
                    asked.answers[i] |= batch
                    bars.update(task, completed=len(asked.answers[i]))


def answered(asked: Asked, model: int) -> Iterator[dict[int, Answer]]:
    """A model's answers that are not there yet. Batches are cut from all prompts in their order, so that each is what
    it would have been in an unbroken run, and the same for every model."""
    own, prompts = asked.settings.sampling, asked.prompts
    path = asked.settings.asked.model_name_or_path[model]
    spec = ModelSpec(name=asked.names[model], path=path, temperature=own.temperature, top_p=own.top_p,
                     max_tokens=own.max_completion_length)  # fmt: skip
    own_prompts, named = {row: one["prompt"] for row, one in prompts.items()}, folder.origin(asked.settings.data).rows
    local, order = Local(spec, own_prompts, named), list(prompts)
    for number_of_it, start in enumerate(range(0, len(order), own.batch_size)):
        batch = order[start : start + own.batch_size]
        if asked.answers[model].keys() >= {*batch}:
            continue
        found = local.sampler([local.ids[row] for row in batch], derived_seed(own.seed, number_of_it))
        names = dict.fromkeys(name for row in batch for name in prompts[row])
        columns = {name: [prompts[row].get(name) for row in batch] for name in names}
        answers = scoring.answers(columns, [one.ids for one in found], local.tokenizer)
        scores = scoring.score(asked.scorers, answers).tolist() if asked.scorers else [[]] * len(batch)
        texts = [said(one) for one in answers["completions"]]
        yield {
            row: Answer(text, len(one.ids), one.ended, [None if math.isnan(x) else x for x in own_scores])
            for row, text, one, own_scores in zip(batch, texts, found, scores)
        }


def write(place: folder.ResultFolder, asked: Asked, total: int) -> None:
    """The rows and the reports."""
    place.write_rows(folder.ROWS, rows_of(asked))
    of = f" (the first of {total:,} rows)" if len(asked.prompts) < total else ""
    lead = (f"Answers of {len(asked.names)} models to {len(asked.prompts):,} prompts{of}, with the same random numbers "
            f"at temperature {asked.settings.sampling.temperature:g}.")  # fmt: skip
    table, models = totals(asked)
    beside = [
        Beside(said(row["prompt"]), [Said(name, asked.answers[i][index].text, note(asked, asked.answers[i][index]))
                                     for i, name in enumerate(asked.names)])
        for index, row in asked.prompts.items()
    ]  # fmt: skip
    parts = [Part("Models", tables=[table]), Part("Answers", beside=beside)]
    facts = {"models": models, "answers": list(rows_of(asked))}
    title = "Samples side by side"
    report.save(place, masked(facts), markdown(title, lead, parts), whole_page(title, lead, parts))
    print(f"{lead} Side by side in {place.path / report.NAMES[-1]}")


def rows_of(asked: Asked) -> Iterator[dict[str, Any]]:
    """A row for each answer, in the order of the prompts and the models."""
    names = [scorer.name for scorer in asked.scorers]
    for index, row in asked.prompts.items():
        for model, held in zip(asked.names, asked.answers):
            one, chat = held[index], isinstance(row["prompt"], list)
            completion: str | Messages = layouts.answer(one.text, "completion") if chat else one.text
            made = {"prompt": row["prompt"], "completion": completion, "score": one.score,
                    "rewards": dict(zip(names, one.rewards)), "model": model, "index": index, "tokens": one.tokens,
                    "finish_reason": "stop" if one.ended else "length"}  # fmt: skip
            others = {name: value for name, value in row.items() if name not in (*OURS, *layouts.ANSWERS)}
            yield made | others


def note(asked: Asked, one: Answer) -> str:
    """What is said beside an answer: its scores, and whether it was cut."""
    parts = [f"{scorer.name} {'-' if value is None else number(value)}"
             for scorer, value in zip(asked.scorers, one.rewards)]  # fmt: skip
    parts += [f"sum {number(one.score)}"] * (len(parts) > 1 and one.score is not None)
    return ", ".join([*parts, f"{one.tokens:,} tokens"] + ["cut"] * (not one.ended))


def totals(asked: Asked) -> tuple[Table, list[dict[str, Any]]]:
    """Means of each model, as a table and as facts. Answers that a scorer cannot judge are left out of its mean."""
    models = list[dict[str, Any]]()
    for i, (name, path) in enumerate(zip(asked.names, asked.settings.asked.model_name_or_path)):
        answers = list(asked.answers[i].values())
        scores = {scorer.name: mean([one.rewards[k] for one in answers]) for k, scorer in enumerate(asked.scorers)}
        models.append({
            "model": name, "path": path, "rewards": scores, "score": mean([one.score for one in answers]),
            "mean_tokens": mean([one.tokens for one in answers]), "cut": sum(not one.ended for one in answers),
        })  # fmt: skip
    scored = [scorer.name for scorer in asked.scorers]
    header = ("model", *scored, *["sum"] * (len(scored) > 1), "mean tokens", "cut at max_completion_length", "path")
    lines = [
        (one["model"], *one["rewards"].values(), *[one["score"]] * (len(scored) > 1), one["mean_tokens"], one["cut"],
         one["path"])
        for one in models
    ]  # fmt: skip
    shown = [["-" if value is None else value for value in line] for line in lines]
    return Table("Models", header, shown), models


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that are there; None where there is none."""
    known = [one for one in values if one is not None]
    return math.fsum(known) / len(known) if known else None
