"""How far assessors agree: Krippendorff's alpha, and how each of them does on gold items and beside the others."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from align_engine.assessment.rate.records import Record
from align_engine.assessment.rate.values import COMPARING


class Agreement(NamedTuple):
    """Of all items that several people have marked."""

    alpha: float | None  # 1: they agree always; 0: as often as by chance. None: too little to tell
    same: float | None  # share of pairs of marks that say the same
    units: int  # comparisons or answers that it rests on


class Doing(NamedTuple):
    """How one assessor does."""

    marks: int
    skipped: int
    gold: int  # gold items
    right: int  # of these, as they should be
    others: int  # marks of others on the same items
    same: int  # of these, that say the same
    first: float | None  # share of the choices that took the answer which stood first (of pairs: 0.5 is no leaning)
    seconds: float | None  # median of an item's time


def agreement(records: Sequence[Record], mode: str) -> Agreement:
    """Krippendorff's alpha (krippendorff.alpha; Krippendorff 2011), gold items left out.

    Of pairs and ranks a unit is two answers, and a mark says that one is better, or neither: ordinal. Each unit counts
    in both directions, as it means nothing which of the two is named first: where data have the better one first,
    people would else seem to agree by chance. Scores are ordinal, ok or not nominal.
    """
    import krippendorff

    units = [unit for record in records if not record.gold for unit in _units(record, mode)]
    units = [unit for unit in units if len(unit) > 1]
    people = sorted({name for unit in units for name in unit})
    pairs = [a == b for unit in units for a, b in itertools.combinations(unit.values(), 2)]
    same = sum(pairs) / len(pairs) if pairs else None
    data = np.array([[unit.get(name, np.nan) for unit in units] for name in people], dtype=float)
    data = np.hstack([data, -data]) if mode in COMPARING else data
    if len(np.unique(data[~np.isnan(data)])) < 2:
        return Agreement(None, same, len(units))
    level: Any = "nominal" if mode == "mark" else "ordinal"
    return Agreement(float(krippendorff.alpha(data, level_of_measurement=level)), same, len(units))


def _units(record: Record, mode: str) -> Iterator[dict[str, float]]:
    """What can be compared between people: name -> value."""
    marks = [(mark.person, mark.value) for mark in record.marks if mark.value is not None]
    if mode not in COMPARING:
        yield {name: float(value[0]) for name, value in marks}
        return
    size = len(marks[0][1]) if marks else 0
    for i, j in itertools.combinations(range(size), 2):
        yield {name: float(np.sign(value[j] - value[i])) for name, value in marks}


def people(records: Iterable[Record], mode: str) -> dict[str, Doing]:
    """Everybody who has marked or skipped something."""
    found: dict[str, dict[str, Any]] = defaultdict(
        lambda: dict(marks=0, skipped=0, gold=0, right=0, others=0, same=0, firsts=[], seconds=[])
    )
    for record in records:
        for mark in record.marks:
            own = found[mark.person]
            own["skipped" if mark.value is None else "marks"] += 1
            if mark.value is None:
                continue
            own["seconds"].append(mark.seconds)
            others = [one.value for one in record.marks if one.person != mark.person and one.value is not None]
            own["others"] += len(others)
            own["same"] += sum(value == mark.value for value in others)
            if record.gold:
                own["gold"] += 1
                own["right"] += mark.value == record.gold
            if mode in COMPARING and mark.value.count(1) == 1:
                own["firsts"].append(mark.value[mark.shown[0]] == 1)
    return {name: _doing(**own) for name, own in sorted(found.items())}


def _doing(firsts: list[bool], seconds: list[float], **counts: int) -> Doing:
    first = sum(firsts) / len(firsts) if firsts else None
    return Doing(**counts, first=first, seconds=statistics.median(seconds) if seconds else None)
