"""Which edits of answers sway a reward model: its score with and without each, in both answers of real pairs.

Any words put before an answer move its score. So those of a marker are measured against neutral words in the same
place: the effect is what the marker adds beyond them, and their spread is part of its error. Edits of length, order and
style have nothing beside them; their effect is measured against zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from align_engine.errors import BadInput
from align_engine.preparation.edits import Edit, without

Score = Callable[[list[Any], list[str]], np.ndarray]  # prompts, answers -> [N]
Pair = tuple[Any, str, str]  # prompt (text or messages), chosen, rejected

REPLICATES = 2000  # of the bootstrap
FEWEST = 5  # pairs that an edit is measured on, and neutral words
ALPHA = 0.05


class Effect(NamedTuple):
    """What an edit does to a reward model's score, in its own units."""

    name: str
    kind: str
    pairs: int  # whose answers can show it
    effect: float  # beyond neutral words, where the kind has such
    low: float  # 95 % of the bootstrap
    high: float
    raw: float  # with, less without
    chosen: float  # the same on one side
    rejected: float
    flips: float  # share of the pairs ordered right without it that the rejected answer's mark turns round
    p: float
    p_holm: float  # corrected for all edits of the call
    less: int = 0  # neutral words that move the score less far,
    neutral: int = 0  # of so many

    @property
    def sways(self) -> bool:
        return self.p_holm < ALPHA and not self.low <= 0 <= self.high


class Measured(NamedTuple):
    """Scores of one edit: [P] each, NaN where an answer cannot show it."""

    chosen_bare: np.ndarray
    chosen_marked: np.ndarray
    rejected_bare: np.ndarray
    rejected_marked: np.ndarray

    @property
    def change(self) -> np.ndarray:
        """With, less without: the mean of both sides [pairs that have one]."""
        both = np.stack([self.chosen_marked - self.chosen_bare, self.rejected_marked - self.rejected_bare])
        seen = ~np.isnan(both)
        return (np.where(seen, both, 0).sum(0) / np.maximum(seen.sum(0), 1))[seen.any(0)]


def bare(pairs: Sequence[Pair], openings: Sequence[str]) -> list[Pair]:
    """Pairs whose answers begin with none of the openings."""
    return [
        (prompt, without(chosen, openings)[1], without(rejected, openings)[1]) for prompt, chosen, rejected in pairs
    ]


def measure(edits: Sequence[Edit], pairs: Sequence[Pair], score: Score) -> list[Measured]:
    """Score the pairs without and with each edit; what is scored once is not scored again."""
    known: dict[tuple[int, str], float] = {}
    found = []
    for edit in edits:
        shown = [[edit.apply(text) for text in pair[1:]] for pair in pairs]
        asked = [(i, text) for i, sides in enumerate(shown) for both in sides if both for text in both]
        new = [one for one in dict.fromkeys(asked) if one not in known]
        if new:
            scored = score([pairs[i][0] for i, _ in new], [text for _, text in new])
            known |= dict(zip(new, np.asarray(scored, np.float64).tolist()))
        columns = [
            [known[i, both[mark]] if (both := sides[side]) else np.nan for i, sides in enumerate(shown)]
            for side in (0, 1)
            for mark in (0, 1)
        ]
        found.append(Measured(*map(np.array, columns)))
    return found


def effects(
    edits: Sequence[Edit],
    neutral: Mapping[str, Sequence[Edit]],
    pairs: Sequence[Pair],
    score: Score,
    seed: int = 0,
) -> list[Effect]:
    """Effects of edits, those that sway most first; edits that fewer than FEWEST pairs can show are left out.

    Args:
        neutral: by kind of edit, those to measure it against.
        score: a reward model.
    Raises:
        BadInput: fewer than FEWEST neutral ones of a kind.
    """
    rng = np.random.default_rng(seed)
    beside: dict[str, np.ndarray] = {}
    for kind, some in neutral.items():
        if any(edit.kind == kind for edit in edits):
            means = [one.change.mean() for one in measure(some, pairs, score) if len(one.change) >= FEWEST]
            if len(means) < FEWEST:
                raise BadInput(
                    f"{len(means)} neutral words to measure each {kind} against, and {FEWEST} are needed: give more "
                    "answers, or more pairs"
                )
            beside[kind] = np.array(means)
    measured = [(edit, one) for edit, one in zip(edits, measure(edits, pairs, score)) if len(one.change) >= FEWEST]
    found = [_effect(edit, one, beside.get(edit.kind), rng) for edit, one in measured]
    corrected = holm([one.p for one in found])
    found = [one._replace(p_holm=p) for one, p in zip(found, corrected)]
    return sorted(found, key=lambda one: (not one.sways, -abs(one.effect)))


def _effect(edit: Edit, one: Measured, beside: np.ndarray | None, rng: np.random.Generator) -> Effect:
    from scipy import stats

    change, zero, spread, freedom, less = one.change, 0.0, 0.0, len(one.change) - 1, 0
    resampled = bootstrap_means(change, rng)
    if beside is not None:
        size = len(beside)
        zero, freedom = beside.mean(), size - 1
        spread = float(beside.std(ddof=1) * np.sqrt(1 + 1 / size))  # of a neutral word that is not among them
        resampled = resampled + spread * rng.standard_t(freedom, REPLICATES)
        less = int(np.sum(np.abs(beside) < abs(change.mean())))
    effect = change.mean() - zero
    error = float(np.hypot(change.std(ddof=1) / np.sqrt(len(change)), spread))
    p = float(2 * stats.t.sf(abs(effect) / error, freedom)) if error > 1e-12 else float(abs(effect) < 1e-12)
    low, high = np.quantile(resampled - zero, [ALPHA / 2, 1 - ALPHA / 2])
    right = one.chosen_bare > one.rejected_bare
    turned = right & (one.rejected_marked >= one.chosen_bare)
    return Effect(
        edit.name, edit.kind, len(change), float(effect), float(low), float(high), float(change.mean()),
        _mean(one.chosen_marked - one.chosen_bare), _mean(one.rejected_marked - one.rejected_bare),
        float(turned.sum() / max(right.sum(), 1)), p, p, less, 0 if beside is None else len(beside),
    )  # fmt: skip


def bootstrap_means(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means of REPLICATES samples drawn with replacement: [REPLICATES]."""
    size = len(values)
    return np.array([values[rng.integers(0, size, size)].mean() for _ in range(REPLICATES)])


def holm(p: Sequence[float]) -> list[float]:
    """p corrected for their number (Holm, "A simple sequentially rejective multiple test procedure", 1979)."""
    order = np.argsort(p, kind="stable")
    steps = np.minimum(np.array(p)[order] * np.arange(len(p), 0, -1), 1.0)
    corrected = np.empty(len(p))
    corrected[order] = np.maximum.accumulate(steps) if len(p) else steps
    return corrected.tolist()


def _mean(values: np.ndarray) -> float:
    seen = values[~np.isnan(values)]
    return float(seen.mean()) if len(seen) else float("nan")
