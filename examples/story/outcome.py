"""What the story comes to: numbers of each seed, their means with intervals, and whether they are the talk's."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import task
from scipy import stats

from align_engine.data.json_text import loads
from align_engine.preparation import report
from align_engine.preparation.folder import ResultFolder
from align_engine.reports.report import Table, bar_chart

REWARD_MODELS = ("as it is", "strip", "as it is, repaired", "strip, repaired")  # in the order of the audits
INTERVAL = "mean ± half of the 95 % interval by Student's t, whose degrees of freedom are the seeds less 1"


class Variant(NamedTuple):
    """A way to train the policy."""

    name: str
    folder: str
    reward_model: str
    clamp: bool  # limits on the gradients of the policy


VARIANTS = (
    Variant("as it is", "as-is", "as it is", False),
    Variant("strip", "strip", "strip", False),
    Variant("clamp", "clamp", "as it is", True),
    Variant("strip + clamp", "strip-clamp", "strip", True),
    Variant("repair", "repair", "as it is, repaired", False),
    Variant("all", "all", "strip, repaired", True),
)
MEASURES = {
    "test": "the test set of the pairs",
    "own": "the policy's own answers",
    "last": "its answers in the last round",
    "score": "judge's grade of the policy",
    "opening": f'its answers that begin with "{task.OPENING}"',
}
ADDS = (  # what is asked about -> the variants with it and without
    ("strip", "strip", "as it is"),
    ("clamp", "clamp", "as it is"),
    ("clamp, after strip", "strip + clamp", "strip"),
    ("repair", "repair", "as it is"),
    ("repair, after both", "all", "strip + clamp"),
    ("strip + clamp", "strip + clamp", "as it is"),
    ("all", "all", "as it is"),
)
CLAIMS = (("test", "falls", "does not fall", -1), ("own", "rises", "does not rise", 1))  # the talk's: strip + clamp


def of_seed(here: Path) -> dict[str, dict[str, float]]:
    """Measure -> variant -> per cent; "start" is the policy before its rounds."""
    found: dict[str, dict[str, float]] = {name: {} for name in MEASURES}
    for part in ("test", "own"):
        card = here / f"audit-{part}" / "report.json"
        if not card.exists():  # the judge grades all answers alike
            found[part] = {one.name: math.nan for one in VARIANTS}
            continue
        cards = dict(zip(REWARD_MODELS, loads(card.read_bytes()).values()))
        for one in VARIANTS:
            all_pairs = cards[one.reward_model]["accuracy"][0]
            found[part][one.name] = 100 * all_pairs["right"] / all_pairs["pairs"]
    asked = {row["prompt"][-1]["content"]: row for row in task.read_rows(here / "data" / "prompts.jsonl")}
    heldout = len(task.read_rows(here / "data" / "heldout.jsonl"))  # an empty answer is none, and has no grade
    for name, folder in [("start", "start"), *((one.name, one.folder) for one in VARIANTS)]:
        rows = task.read_rows(here / f"score-{folder}")
        answers = [row["completion"][-1]["content"] for row in rows]
        found["score"][name] = 100 * sum(task.judge(*one) for one in zip(rows, answers)) / heldout
        found["opening"][name] = 100 * float(np.mean([text.startswith(task.OPENING) for text in answers]))
        if name != "start":
            found["last"][name] = last_round(here / f"iterate-{folder}", asked)
    return found


def last_round(run: Path, asked: dict[str, dict[str, Any]]) -> float:
    """Per cent of the pairs of answers to one prompt, graded unlike, that the reward model orders as the judge does."""
    samples = max(run.glob("round-*/samples.jsonl"), key=lambda path: int(path.parent.name.partition("-")[2]))
    groups = defaultdict(list)
    for row in task.read_rows(samples):
        prompt = row["prompt"][-1]["content"]
        groups[prompt].append((task.judge(asked[prompt], row["completion"][-1]["content"]), row["score"]))
    right = [
        (a[0] > b[0]) == (a[1] > b[1])
        for group in groups.values()
        for a, b in itertools.combinations(group, 2)
        if a[0] != b[0]
    ]
    return 100 * float(np.mean(right)) if right else math.nan


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by Student's t; NaN for one value."""
    if len(values) < 2:
        return float(np.mean(values)), math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values)), float(half)


def shown(mean: float, half: float, sign: str = "") -> str:
    """85.1 ± 2.3"""
    return "" if math.isnan(mean) else f"{mean:{sign}.1f}" + ("" if math.isnan(half) else f" ± {half:.1f}")


def write(place: ResultFolder, seeds: Sequence[int]) -> None:
    """report.json, report.md and report.html of all seeds."""
    each = {seed: of_seed(place.path / f"seed-{seed}") for seed in seeds}
    names = ["start", *(one.name for one in VARIANTS)]

    def values(measure: str, name: str) -> list[float]:
        return [one[measure].get(name, math.nan) for one in each.values()]

    def gains(measure: str, name: str, base: str) -> list[float]:
        return [a - b for a, b in zip(values(measure, name), values(measure, base))]

    header = ("per cent", *MEASURES.values())
    means = [[name, *(shown(*interval(values(one, name))) for one in MEASURES)] for name in names]
    adds = {part: {one: interval(gains(one, *two)) for one in MEASURES} for part, *two in ADDS}
    added = [[part, *(shown(*found[one], "+") for one in MEASURES)] for part, found in adds.items()]
    single = [[f"{name}, seed {seed}", *(shown(found[one].get(name, math.nan), math.nan) for one in MEASURES)]
              for name in names for seed, found in each.items()]  # fmt: skip
    verdicts = [verdict(measure, *claim, adds["strip + clamp"][measure]) for measure, *claim in CLAIMS]
    facts = {
        "seeds": list(seeds),
        "interval": INTERVAL,
        "each": {str(seed): found for seed, found in each.items()},
        "mean": {one: {name: interval(values(one, name)) for name in names if name in each[seeds[0]][one]}
                 for one in MEASURES},
        "adds": adds,
        "outcome": verdicts,
    }  # fmt: skip
    several = f"Of {len(seeds)} seeds: {INTERVAL}. " if len(seeds) > 1 else ""
    lead = (
        "Columns 1 to 3: share of pairs that the reward model orders right; 4: greedy answers to held-out prompts. "
        f"{several}A clamp acts on the policy's training: it leaves the reward model, and with it columns 1 and 2, as "
        f"they are. {' '.join(verdicts)}"
    )
    bars = {one: interval(values("own", one)) for one in names[1:] if not math.isnan(values("own", one)[0])}
    heights = {name: (mean, 0.0 if math.isnan(half) else half) for name, (mean, half) in bars.items()}
    figures = [bar_chart("Pairs of the policy's own answers ordered right", heights, "per cent")] if bars else []
    tables = [
        Table("Outcome", header, means),
        Table("What each part adds, seed by seed", ("points", *header[1:]), added),
    ]
    plain = _plain(facts)
    report.write(place, "A reward model and a tell", lead, plain, tables, figures, [Table("Seeds", header, single)])
    print(report.markdown("A reward model and a tell", lead, tables))


def verdict(measure: str, yes: str, no: str, sign: int, gain: tuple[float, float]) -> str:
    """Whether what the talk says of a measure is seen in what strip and clamp add to it."""
    mean, half = gain
    if math.isnan(mean):
        return f"Accuracy on {MEASURES[measure]} cannot be told: the judge grades all of them alike."
    seen = "as the talk says" if sign * mean - half > 0 else "these seeds do not show what the talk says"
    seen = "one seed gives no interval" if math.isnan(half) else seen
    found = f"{shown(mean, half, '+')} points with strip + clamp"
    return f"Accuracy on {MEASURES[measure]} {yes if sign * mean > 0 else no}: {found} ({seen})."


def _plain(value: Any) -> Any:
    """Without NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value
