"""`align eval`: what several models reach in benchmarks, before a judge, and by checkers, in one table.

Every task of every model, every answer and every verdict goes into a journal of the folder as soon as it is there, so
a command that is killed goes on with what is missing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch

from align_engine.assessment import answers, eval_report, judge
from align_engine.assessment.eval_settings import EvalRecipe, judge_of
from align_engine.assessment.found import Found, Versus
from align_engine.assessment.intervals import length_controlled, mean
from align_engine.errors import BadInput
from align_engine.models import load
from align_engine.models.fingerprint import of_file
from align_engine.models.modelfiles import check_path
from align_engine.preparation import folder, generate
from align_engine.preparation.endpoints import Endpoint
from align_engine.preparation.models import ModelSpec
from align_engine.recipe import ModelSection
from align_engine.reports import benchmarks
from align_engine.reports.benchmarks import Benchmark, Score
from align_engine.rollouts import rewards
from align_engine.run import quiet_libraries

TASKS, REQUESTS = "_tasks.jsonl", "_requests.jsonl"
EXTENT = ("models", "tasks", "checkers", "files of checkers", "judge", "judge settings")


class Plan(NamedTuple):
    """All that a call needs, loaded and found to be there."""

    specs: list[ModelSpec]
    judging: ModelSpec | None
    tasks: list[Benchmark]
    checkers: list[rewards.Reward]
    rows: datasets.Dataset | None
    asked: answers.Asked
    endpoints: dict[generate.Place, Endpoint]


def run(settings: EvalRecipe) -> None:
    """The command.

    Raises:
        BadInput: settings, models, tasks, data or scorers that cannot be used, before anything is computed. RunFailed:
            a model, an endpoint, a task or a judge fails; what has been measured stays. Stopped: by a signal.
    """
    quiet_libraries()
    plan = made(settings)
    if settings.data.dry_run:
        return folder.dry(generate.asked(plan.specs, plan.asked.prompts, settings.ask.seed))
    facts = generate.facts_of(plan.specs) | {"judge settings": plan.judging and plan.judging.settings}
    facts["files of checkers"] = list(map(rewards.fingerprint, settings.judging.checkers))
    facts |= {f"task {name}": of_file(name) for name in settings.benchmarks.tasks if benchmarks.is_file(name)}
    with folder.opened("eval", settings, plan.rows, facts, "report.json", EXTENT) as place:
        if place is None:
            return
        found = {spec.name: Found(spec) for spec in plan.specs}
        measure(place, settings, found, plan)
        if plan.asked.prompts:
            answered = answers.collect(place, settings, plan.specs, plan.asked, plan.endpoints)
            place.write_rows("answers.jsonl", answered.rows())
            check_answers(found, plan.checkers, answered, plan.asked)
            if plan.judging:
                compare(place, settings, plan.judging, found, answered)
        eval_report.write(place, found, plan.judging)


def made(settings: EvalRecipe) -> Plan:
    """What the settings ask for. Raises BadInput for what is not there, or does not go together."""
    own, specs = settings.judging, settings.specs()
    for spec in specs:
        if spec.path:
            check_path(spec.path, f"model {spec.name!r}: path")
            if settings.benchmarks.apply_chat_template and settings.benchmarks.tasks:
                check_template(spec)
    judging = judge_of([own.judge]) if own.judge else None
    if judging:
        judge.check(judging)
        baseline_of(own.baseline, specs)
    tasks, checkers = load_tasks(settings), rewards.load_rewards(own.checkers, device())
    rows, asked = None, answers.Asked({}, {})
    if settings.data.dataset_name:
        rows, asked = answers.read(settings.data, specs, settings.benchmarks.limit)
    elif people := [one.name for one in specs if one.column]:
        raise BadInput(f"model {people[0]!r}: a column needs dataset_name, the data that hold it")
    endpoints = generate.endpoints_of([*specs, judging] if judging else specs, settings)
    return Plan(specs, judging, tasks, checkers, rows, asked, endpoints)


def device() -> torch.device:
    """Where models run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def baseline_of(name: str | None, specs: Sequence[ModelSpec]) -> ModelSpec:
    """The model that others are compared with. Raises BadInput where there is none."""
    if len(specs) < 2:
        raise BadInput("judge: it compares models, and one is given; name another, or a column of answers, in models")
    names = [one.name for one in specs]
    if name is not None and name not in names:
        raise BadInput(f"baseline = {name!r} is none of the models: {', '.join(names)}")
    return specs[names.index(name) if name else 0]


def load_tasks(settings: EvalRecipe) -> list[Benchmark]:
    """The tasks with their data. Raises BadInput where one cannot be had."""
    own = settings.benchmarks
    found = benchmarks.load(own.tasks, own.include_path, own.num_fewshot)
    unsafe = [one.asked for one in found for task in one.loaded["tasks"].values() if getattr(task, "UNSAFE_CODE", 0)]
    if unsafe and not own.confirm_run_unsafe_code:
        raise BadInput(f"task {unsafe[0]!r} runs code that the model writes: give --confirm_run_unsafe_code")
    return found


def measure(place: folder.ResultFolder, settings: EvalRecipe, found: dict[str, Found], plan: Plan) -> None:
    """The scores of all models that can be asked, in all tasks, those of the journal as they stand."""
    own = settings.benchmarks
    with place.journal(TASKS) as journal, place.journal(REQUESTS) as requests:
        for line in journal.rows:
            if (one := found.get(line["model"])) and line["asked"] in own.tasks:
                keep(one, line)
        done = {(line["model"], line["asked"]) for line in journal.rows}
        for name, one in found.items():
            waiting = [task for task in plan.tasks if (name, task.asked) not in done]
            if not waiting or one.spec.column:
                continue
            chat = own.apply_chat_template and not one.spec.base_url
            with reader(one.spec, settings.ask, plan.endpoints, requests) as lm:
                for task in waiting:
                    print(f"{name}: {task.asked}")
                    try:
                        scores = benchmarks.measure(lm, task, own.limit, chat, own.confirm_run_unsafe_code)
                    except benchmarks.Unable as error:
                        one.unable[task.asked] = str(error)
                        continue
                    line = {"model": name, "asked": task.asked, "scores": [each._asdict() for each in scores]}
                    journal.add([line])
                    keep(one, line)


def keep(one: Found, line: dict[str, Any]) -> None:
    """What a line of the journal says of a model."""
    for score_ in line["scores"]:
        one.scores[score_["task"]] = Score(**score_)


def check_template(spec: ModelSpec) -> None:
    """Refuse a checkpoint without a chat template."""
    where = f"model {spec.name!r}: path"
    if load.load_tokenizer(str(spec.path), field=where).chat_template is None:
        raise BadInput(f"apply_chat_template: {where} = {spec.path!r} has no chat template")


@contextlib.contextmanager
def reader(
    spec: ModelSpec, ask: Any, endpoints: dict[generate.Place, Endpoint], requests: folder.Journal
) -> Iterator[Any]:
    """A model as lm-eval reads it, in memory inside the block alone.

    Args:
        ask: settings with batch_size and seed.
        requests: journal of what an endpoint has answered.
    Raises:
        BadInput: there is no such model.
    """
    if spec.base_url:
        from align_engine.assessment.served import Served

        yield Served(spec, endpoints[spec.base_url, spec.api_key_env], ask.seed, requests)
        return
    path = str(spec.path)
    tokenizer = load.load_tokenizer(path, field=f"model {spec.name!r}: path")
    model = load.load_model(path, ModelSection(model_name_or_path=path, dtype="auto")).to(device())
    yield benchmarks.of_model(model, tokenizer, ask.batch_size)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_answers(
    found: dict[str, Found], checkers: list[rewards.Reward], answered: answers.Answers, asked: answers.Asked
) -> None:
    """The mean grade of each checker; a prompt without an answer has none."""
    for one in found.values():
        texts = {row: text for row in asked.prompts if (text := answered.text(one.spec, row)) is not None}
        one.unanswered = len(asked.prompts) - len(texts)
        if checkers and texts:
            grades = rewards.score(checkers, columns_of(asked, texts)).numpy()
            for checker, column in zip(checkers, grades.T):
                there = column[~np.isnan(column)]
                one.checked[checker.name] = mean(there)
                one.unscored[checker.name] = len(column) - len(there)


def columns_of(asked: answers.Asked, texts: dict[int, str]) -> dict[str, list[Any]]:
    """Answers as scorers see them: the data's columns, and prompts and completions as the data have prompts."""
    rows = [asked.rows[row] for row in texts]
    said: list[Any] = [
        text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
        for row, text in zip(rows, texts.values())
    ]
    others = {name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "completion")}
    ids: list[list[int]] = [[] for _ in rows]
    return others | {"prompts": [row["prompt"] for row in rows], "completions": said, "completion_ids": ids}


def compare(
    place: folder.ResultFolder, settings: EvalRecipe, judging: ModelSpec, found: dict[str, Found],
    answered: answers.Answers,
) -> None:  # fmt: skip
    """Ask the judge about every model but the baseline."""
    base = baseline_of(settings.judging.baseline, [one.spec for one in found.values()])
    comparisons = []
    for name, one in found.items():
        for row, prompt in answered.prompts.items():
            own, other = answered.text(one.spec, row), answered.text(base, row)
            if name != base.name and own is not None and other is not None:
                comparisons.append(judge.Comparison(name, row, answers.shown(prompt.messages), own, other))
    if not comparisons:
        raise BadInput(f"judge: no prompt has an answer of {base.name!r}, the baseline, and of another model")
    with place.journal(judge.JOURNAL) as journal:
        asking = judge.Judge(judging, settings.ask.seed, comparisons, journal)
        judged = asking.ask(settings.ask.server_concurrency, settings.ask.request_timeout)
    place.write_rows("judgements.jsonl", map(dict, judge.rows_of(judged, base.name)))
    for name, one in found.items():
        if mine := [pair for pair in judged if pair.comparison.model == name]:
            one.versus = versus(mine)


def versus(judged: list[judge.Judged]) -> Versus:
    """Win rates, raw and at equal length, of the pairs that have a verdict in both orders."""
    kept = [(pair.score, pair.comparison) for pair in judged if pair.score is not None]
    scores = np.array([score_ for score_, _ in kept])
    own, other = (np.array([len(text) for text in texts], float) for texts in (
        [pair.own for _, pair in kept], [pair.other for _, pair in kept]))  # fmt: skip
    sizes = (float(own.mean()), float(other.mean())) if kept else (0.0, 0.0)
    return Versus(mean(scores), length_controlled(scores, own - other), judged, sizes)
