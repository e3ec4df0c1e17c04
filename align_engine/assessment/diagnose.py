"""`align diagnose`: does a model need preference optimisation? The talk's five signs, and a verdict with its reasons.

Answers go into a journal of the folder as they come; all else is computed from them, so a command that is killed goes
on with the answers that are missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from align_engine import inputs
from align_engine.assessment import answers, diagnose_report, signs
from align_engine.assessment.diagnose_settings import BASELINE, MODEL, DiagnoseRecipe
from align_engine.assessment.eval import columns_of, device, reader
from align_engine.assessment.intervals import Estimate, mean
from align_engine.assessment.measure import classifier, embedded, likelihoods
from align_engine.assessment.signs import TITLES, Likelihood, Sign, missing
from align_engine.data.json_text import loads
from align_engine.errors import BadInput, among
from align_engine.models.fingerprint import of_file
from align_engine.models.modelfiles import check_path
from align_engine.preparation import folder, generate, layouts
from align_engine.preparation.embeddings import load_encoder
from align_engine.preparation.models import ModelSpec
from align_engine.reports import benchmarks
from align_engine.reports.report import curves_of
from align_engine.rollouts import rewards
from align_engine.run import quiet_libraries
from align_engine.training import metrics

REFERENCE = "reference answers"
FEW = 8  # prompts below which nothing is said


class Case(NamedTuple):
    """What the signs are told from."""

    settings: DiagnoseRecipe
    place: folder.ResultFolder
    specs: dict[str, ModelSpec]  # the model, and the baseline
    asked: answers.Asked
    texts: dict[str, list[list[str]]]  # of each of them: the answers to each prompt
    references: list[str] | None  # an answer to each prompt


class Tools(NamedTuple):
    """What is loaded before anything is computed."""

    tasks: list[benchmarks.Benchmark]
    checkers: list[rewards.Reward]
    classify: tuple[Callable[[list[str]], np.ndarray], str] | None
    encode: Callable[[list[str]], Any] | None
    evaluated: dict[str, Any] | None  # of the model, by an earlier `align eval`
    curves: tuple[Any, ...] | None  # of a run


def run(settings: DiagnoseRecipe) -> None:
    """The command.

    Raises:
        BadInput: settings, models or data that cannot be used, before anything is computed. RunFailed: a model, an
            endpoint or a scorer fails; the answers stay. Stopped: by a signal.
    """
    quiet_libraries()
    specs = {one.name: one for one in settings.specs()}
    for spec in specs.values():
        if spec.path:
            check_path(spec.path, "model_name_or_path" if spec.name == MODEL else BASELINE)
    rows, asked = answers.read(settings.data, list(specs.values()), settings.data.num_prompts)
    if len(asked.prompts) < FEW:
        raise BadInput(f"dataset_name: {len(asked.prompts)} prompts are too few, at least {FEW} are needed (100 serve)")
    tools = load_tools(settings)
    endpoints = generate.endpoints_of(specs.values(), settings)
    if settings.data.dry_run:
        return folder.dry(generate.asked(list(specs.values()), asked.prompts, settings.ask.seed))
    facts = generate.facts_of(specs.values()) | inputs.facts(settings)
    facts |= {f"task {name}": of_file(name) for name in settings.signs.tasks if benchmarks.is_file(name)}
    facts |= {
        "evaluated": tools.evaluated,
        "curves": tools.curves and hashlib.sha256(json.dumps(tools.curves).encode()).hexdigest(),
    }
    with folder.opened("diagnose", settings, rows, facts, "report.json", ()) as place:
        if place is None:
            return
        answered = answers.collect(place, settings, list(specs.values()), asked, endpoints)
        place.write_rows("answers.jsonl", answered.rows())
        case = Case(settings, place, specs, asked, texts_of(answered, specs), references(asked))
        found = [
            benchmark_sign(case, tools), toxic_sign(case, tools), *encoder_signs(case, tools), loss_sign(tools),
        ]  # fmt: skip
        diagnose_report.write(place, settings, found, case.texts, asked)


def load_tools(settings: DiagnoseRecipe) -> Tools:
    """All that the signs need, loaded. Raises BadInput for what is not there."""
    own = settings.signs
    tasks = benchmarks.load(own.tasks)
    checkers = rewards.load_rewards(own.checkers, device())
    classify = classifier(own.classifier, own.label) if own.classifier else None
    encode = load_encoder(own.encoder, own.trust_remote_code) if own.encoder else None
    evaluated = read_evaluation(own.evaluation, settings) if own.evaluation else None
    curves = read_run(own.run, own.quality) if own.run else None
    if not any((tasks, checkers, classify, encode, evaluated, curves)):
        raise BadInput("give at least one of evaluation, tasks, classifier, encoder and run: nothing is measured else")
    return Tools(tasks, checkers, classify, encode, evaluated, curves)


def texts_of(answered: answers.Answers, specs: dict[str, ModelSpec]) -> dict[str, list[list[str]]]:
    """The answers of each model to each prompt; a prompt without one has an empty answer."""
    return {
        name: [[one[-1]["content"] for one, _ in answered.answers(spec, row)] or [""] * spec.n
               for row in answered.prompts]
        for name, spec in specs.items()
    }  # fmt: skip


def references(asked: answers.Asked) -> list[str] | None:
    """The column completion, where every prompt has one."""
    found = [row.get("completion") for row in asked.rows.values()]
    if not all(found):
        return None
    return [layouts.answer(one, "completion")[-1]["content"] for one in found]


def prompts_of(case: Case) -> list[str]:
    """The prompts as texts."""
    return [answers.shown(prompt.messages) for prompt in case.asked.prompts.values()]


# sign 1


def benchmark_sign(case: Case, tools: Tools) -> Sign:
    """Benchmarks beside the model's own answers."""
    if tools.evaluated:
        tasks, chances, own = tools.evaluated["tasks"], tools.evaluated["chances"], tools.evaluated["own"]
        before = tools.evaluated["before"]
        scores = {name: Estimate(*one) for name, one in tasks.items()}
        known = before and ({name: Estimate(*one) for name, one in before[0].items()}, Estimate(*before[1]))
        return signs.benchmarks(scores, chances, Estimate(*own), known)
    if not tools.tasks:
        why = "give evaluation, or tasks and checkers"
        return missing("benchmarks", TITLES["benchmarks"], why)
    found = {name: scored(case, tools, spec) for name, spec in case.specs.items() if not spec.column}
    graded = {name: grade(case, tools, name) for name in found}
    before = (estimates(found[BASELINE]), graded[BASELINE]) if BASELINE in found else None
    chances = {one.task: one.chance or 0.0 for one in found[MODEL]}
    return signs.benchmarks(estimates(found[MODEL]), chances, graded[MODEL], before)


def scored(case: Case, tools: Tools, spec: ModelSpec) -> list[benchmarks.Score]:
    """A model's benchmarks."""
    endpoints = generate.endpoints_of(case.specs.values(), case.settings)
    with case.place.journal("_requests.jsonl") as requests:
        with reader(spec, case.settings.ask, endpoints, requests) as lm:
            limit = case.settings.signs.limit
            return [score for task in tools.tasks for score in benchmarks.measure(lm, task, limit)]


def estimates(scores: list[benchmarks.Score]) -> dict[str, Estimate]:
    """Scores by task."""
    return {one.task: Estimate(one.value, one.interval, one.examples) for one in scores}


def grade(case: Case, tools: Tools, name: str) -> Estimate:
    """What the checkers say of a model's own answers: the mean over checkers and samples, of each prompt."""
    rows = list(case.asked.prompts)
    grades = []
    for k in range(case.specs[name].n):
        texts = {row: found[k] for row, found in zip(rows, case.texts[name])}
        grades.append(rewards.score(tools.checkers, columns_of(case.asked, texts)).numpy())
    whole = np.concatenate(grades, 1)  # [prompts, samples x checkers]
    return mean(np.nanmean(whole[~np.isnan(whole).all(1)], 1), case.settings.ask.seed)


def read_evaluation(path: str, settings: DiagnoseRecipe) -> dict[str, Any]:
    """What an `align eval` found of this model, and of the baseline.

    Raises:
        BadInput: no result there; the model is not in it, or without benchmarks or without a grade of its answers.
    """
    file = Path(path).expanduser() / "report.json"
    try:
        held = {one["path"] or one["name"]: one for one in loads(file.read_text(encoding="utf-8"))["models"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"evaluation = {path!r} holds no result of align eval") from error
    name, base = settings.patient.model_name_or_path, settings.patient.baseline
    if name not in held:
        raise BadInput(f"evaluation = {path!r} has no model {name!r}, but {', '.join(held)}")
    tasks, own = _evaluated(held[name], path)
    chances = {task: one["chance"] or 0.0 for task, one in held[name]["tasks"].items()}
    before = _evaluated(held[base], path) if base in held else None
    return {"tasks": tasks, "chances": chances, "own": own, "before": before}


def _evaluated(one: dict[str, Any], path: str) -> tuple[dict[str, Any], Any]:
    tasks = {task: (score["value"], score["interval"], score["examples"]) for task, score in one["tasks"].items()}
    grades = [value for value in one["checkers"].values() if value["value"] is not None]
    if judged := one.get("judge"):
        grades += [judged["win_rate"]] * (not grades and judged["win_rate"]["value"] is not None)
    if not tasks or not grades:
        lacks = "benchmarks" if not tasks else "checkers or win rate, which grade its own answers"
        raise BadInput(f"evaluation = {path!r} has of {one['name']!r} no {lacks}")
    low, high = (float(np.mean([(value["interval"] or (0.0, 1.0))[side] for value in grades])) for side in (0, 1))
    value = float(np.mean([value["value"] for value in grades]))
    return tasks, (value, (low, high), min(value["number"] for value in grades))


# sign 2


def toxic_sign(case: Case, tools: Tools) -> Sign:
    """A classifier on the answers."""
    if not tools.classify:
        return missing("toxic", TITLES["toxic"], "give classifier")
    ask, label = tools.classify

    def asked(texts: list[list[str]]) -> np.ndarray:
        return ask([text for row in texts for text in row]).reshape(len(texts), -1)

    own, other, said = asked(case.texts[MODEL]), None, REFERENCE
    if case.references:
        other = asked([[text] for text in case.references])
    elif BASELINE in case.texts:
        other, said = asked(case.texts[BASELINE]), "the baseline's answers"
    return signs.toxic(own, label, other, said)


# signs 3 and 4


def encoder_signs(case: Case, tools: Tools) -> tuple[Sign, Sign]:
    """How answers to one prompt vary, and how close they are to it."""
    if not tools.encode:
        return tuple(missing(name, TITLES[name], "give encoder") for name in ("variance", "closeness"))  # type: ignore
    encode = partial(embedded, tools.encode)
    found = {name: encoded(encode, texts) for name, texts in case.texts.items()}
    return variance_sign(case, found), closeness_sign(case, encode, found)


def encoded(encode: Callable[[list[str]], np.ndarray], texts: list[list[str]]) -> np.ndarray:
    """[N, K, D] of N lists of K texts."""
    flat = encode([text for row in texts for text in row])
    return flat.reshape(len(texts), -1, flat.shape[1])


def variance_sign(case: Case, found: dict[str, np.ndarray]) -> Sign:
    """Distances of answers to one prompt, and log-probs of reference answers."""
    if found[MODEL].shape[1] < 2:
        return missing("variance", TITLES["variance"], "a column holds one answer to each prompt, which do not vary")
    seed, varied, likely = case.settings.ask.seed, {}, {}
    for name, texts in case.texts.items():
        lengths = np.array([[len(text) for text in row] for row in texts], float)
        if found[name].shape[1] > 1:
            varied[name] = signs.variety(found[name], lengths, seed)
        if case.references and case.specs[name].path:
            likely[name] = likelihood(case, name)
    return signs.variance(varied[MODEL], likely.get(MODEL), varied.get(BASELINE), likely.get(BASELINE), seed)


def likelihood(case: Case, name: str) -> tuple[Likelihood, Likelihood]:
    """Log-probs of a checkpoint's own answers, the first to each prompt, and of the reference answers."""
    prompts = [prompt.messages for prompt in case.asked.prompts.values()]
    own, path = [row[0] for row in case.texts[name]], str(case.specs[name].path)
    named = among(folder.origin(case.settings.data).rows, list(case.asked.prompts))
    first, second = likelihoods(path, prompts, [own, case.references or []], case.settings.ask.batch_size, named)
    return first, second


def closeness_sign(case: Case, encode: Callable[[list[str]], np.ndarray], found: dict[str, np.ndarray]) -> Sign:
    """Contexts and answers."""
    contexts, seed = encode(prompts_of(case)), case.settings.ask.seed
    own, other, said = signs.near(contexts, found[MODEL][:, 0], seed), None, REFERENCE
    if case.references:
        other = signs.near(contexts, encode(case.references), seed)
    elif BASELINE in found:
        other, said = signs.near(contexts, found[BASELINE][:, 0], seed), "the baseline's answers"
    return signs.closeness(own, other, said)


# sign 5


def loss_sign(tools: Tools) -> Sign:
    """The loss of a run beside its quality."""
    if not tools.curves:
        return missing("loss", TITLES["loss"], "give run, a training with eval_reward_funcs or eval_tasks")
    return signs.loss(*tools.curves)


def read_run(path: str, quality: str | None) -> tuple[Any, ...]:
    """Steps and losses, steps and values of quality, and its name, of a run's log.

    Raises:
        BadInput: no run there; no quality beside the loss.
    """
    file = Path(path).expanduser() / "metrics.jsonl"
    try:
        records = metrics.read(file)
    except (OSError, ValueError) as error:
        raise BadInput(f"run = {path!r} holds no readable metrics.jsonl of a training") from error
    names = dict.fromkeys(name for record in records for name in record if name.startswith("eval_"))
    known = [name for name in names if "/mean" in name and "rewards/" in name] or [
        name for name in names if "/" in name and not name.startswith("eval_rewards/") and "logps" not in name
    ]
    wanted = f"eval_{quality.removeprefix('eval_')}" if quality else next(iter(known), None)
    if wanted not in names:
        there = ", ".join(name.removeprefix("eval_") for name in names) or "no evaluation"
        asked = f"quality = {quality!r} is not measured there" if quality else "it has no metric of quality"
        raise BadInput(
            f"run = {path!r}: {asked} ({there}); train with --eval_steps and eval_reward_funcs or eval_tasks"
        )
    curves = curves_of(records, ("eval_loss", "loss", wanted))
    losses = curves.get("eval_loss") or curves.get("loss")
    if not losses or wanted not in curves:
        raise BadInput(f"run = {path!r} has no {'loss' if wanted in curves else wanted} in its log")
    return (*losses, *curves[wanted], wanted.removeprefix("eval_"))
