"""Intervals of 95 % for means, shares and win rates, and what a win rate would be at equal length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from align_engine.preparation.audit import wilson

RESAMPLES, REFITS = 5000, 500
Interval = tuple[float, float] | None  # None: too few values


class Estimate(NamedTuple):
    """A number with its interval of 95 %."""

    value: float
    interval: Interval
    number: int  # of values behind it

    def __str__(self) -> str:
        if not self.number:
            return ""
        if self.interval is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} ({self.interval[0]:.3f} to {self.interval[1]:.3f})"

    @property
    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {"value": self.value if self.number else None, "interval": self.interval, "number": self.number}


def mean(values: Sequence[float] | np.ndarray, seed: int = 0) -> Estimate:
    """The mean with a percentile bootstrap over the values, [N]."""
    from scipy.stats import bootstrap

    found = np.asarray(values, np.float64)
    if len(found) < 2:
        return Estimate(float(found.mean()) if len(found) else math.nan, None, len(found))
    kept = bootstrap((found,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=seed, batch=100)
    low, high = kept.confidence_interval
    return Estimate(float(found.mean()), (float(low), float(high)), len(found))


def share(right: int, total: int) -> Estimate:
    """A share with Wilson's interval."""
    return Estimate(right / total, wilson(right, total), total)


def resampled(size: int, statistic: Callable[[np.ndarray], float], seed: int, times: int = RESAMPLES) -> Interval:
    """The percentile bootstrap of a statistic of places [size]; None of fewer than two."""
    if size < 2:
        return None
    rng = np.random.default_rng(seed)
    found = [statistic(rng.integers(0, size, size)) for _ in range(times)]
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return float(low), float(high)


def length_controlled(scores: np.ndarray, differences: np.ndarray, seed: int = 0) -> Estimate:
    """The win rate at equal length.

    A logistic regression of the win on the difference of length, P(win) = sigmoid(a + b tanh(d / std(d))), read at
    d = 0: sigmoid(a). It is the model of AlpacaEval 2's length-controlled win rate (Dubois et al. 2024,
    arXiv:2404.04475, equation 2) without its term for the difficulty of a prompt, which needs many models on the same
    prompts. A tie counts half a win and half a loss; b alone has a penalty (scikit-learn's, C = 1).

    Args:
        scores: of each pair, from 0 (lost) to 1 (won), [N].
        differences: characters of the model's answer less those of the baseline's, [N].
        seed: of the bootstrap over pairs.
    """
    scores, differences = np.asarray(scores, np.float64), np.asarray(differences, np.float64)
    if not (number := len(scores)):
        return Estimate(math.nan, None, 0)
    spread = differences.std()
    x = np.tanh(differences / spread) if spread else np.zeros_like(differences)

    def rate(places: np.ndarray) -> float:
        return _at_zero(x[places], scores[places])

    return Estimate(rate(np.arange(number)), resampled(number, rate, seed, REFITS), number)


def difference(one: Estimate, other: Estimate) -> Estimate:
    """One less another that was measured apart from it: its interval from theirs (Newcombe 1998, method 10)."""
    value = one.value - other.value
    number = min(one.number, other.number)
    if one.interval is None or other.interval is None:
        return Estimate(value, None, number)
    below = math.hypot(one.value - one.interval[0], other.interval[1] - other.value)
    above = math.hypot(one.interval[1] - one.value, other.value - other.interval[0])
    return Estimate(value, (value - below, value + above), number)


def _at_zero(x: np.ndarray, scores: np.ndarray) -> float:
    from sklearn.linear_model import LogisticRegression

    if scores.max() == 0 or scores.min() == 1:  # all lost or all won: nothing to fit
        return float(scores[0])
    both = np.concatenate([np.ones(len(x)), np.zeros(len(x))])
    model = LogisticRegression().fit(np.tile(x, 2)[:, None], both, sample_weight=np.concatenate([scores, 1 - scores]))
    return float(1 / (1 + math.exp(-model.intercept_[0])))
