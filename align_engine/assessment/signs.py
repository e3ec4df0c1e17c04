"""The talk's five signs that a model needs preference optimisation, each from numbers that others have measured.

A sign is present where the whole interval of its number lies above its limit, absent where none of it does, and unclear
in between. Limits are `alone`, or of the excess over a reference (`beside`): reference answers, or a baseline model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from align_engine.assessment import pictures
from align_engine.assessment.intervals import Estimate, difference, mean, resampled
from align_engine.preparation.audit import wilson
from align_engine.reports.report import Figure, line_chart

State = Literal["present", "absent", "unclear", "not measured"]


class Limit(NamedTuple):
    """Above which a number is a sign."""

    alone: float
    beside: float


LIMITS = {
    "benchmarks": Limit(0.2, 0.1),  # share of what guessing leaves, less the grade of the own answers
    "toxic": Limit(0.1, 0.05),  # share of answers on which the classifier fires
    "variance": Limit(0.5, 0.1),  # distance of answers to one prompt by that of answers to different prompts
    "unlikely": Limit(2.5, 0.5),  # nats per token of reference answers: 2.5 is a perplexity of 12
    "closeness": Limit(0.3, 0.1),  # share of prompts' contests that the own answer does not win
}
FLAT = 0.02  # change of a loss over the last half of a run, as a share of it, that counts as none
LEAST = 5  # evaluations from which a trend can be told
DRAWS = 999  # permutations


class Sign(NamedTuple):
    """One of the five."""

    name: str
    title: str
    state: State
    sentence: str
    numbers: dict[str, Estimate]
    limit: str  # what the decision was made by, in words
    figures: list[Figure]


def decide(found: Estimate, limit: float) -> State:
    """Whether a number lies above its limit."""
    if not found.number or found.interval is None:
        return "unclear"
    low, high = found.interval
    return "present" if low > limit else "absent" if high <= limit else "unclear"


def missing(name: str, title: str, why: str) -> Sign:
    """A sign of which nothing is known."""
    return Sign(name, title, "not measured", why, {}, "", [])


def excess(own: Estimate, other: Estimate | None, name: str, reference: str) -> tuple[Estimate, float, str]:
    """What is decided by: the number itself, or what it has more than a reference; its limit, and both in words."""
    limit = LIMITS[name]
    if other is None:
        return own, limit.alone, f"above {limit.alone:g} (no reference given)"
    return difference(own, other), limit.beside, f"more than {limit.beside:g} above {reference} ({other.value:.3g})"


TITLES = {
    "benchmarks": "Benchmarks good, own answers bad",
    "toxic": "A classifier of bad answers fires often",
    "variance": "Answers vary, reference answers are unlikely",
    "closeness": "Answers are far from their contexts",
    "loss": "The loss is flat, judged quality is not",
}


def benchmarks(
    tasks: Mapping[str, Estimate],
    chances: Mapping[str, float],
    own: Estimate,
    before: tuple[Mapping[str, Estimate], Estimate] | None,
) -> Sign:
    """Sign 1.

    Args:
        tasks: the model's scores, by task.
        chances: what guessing reaches there (0 where there is no guessing).
        own: grade of its own answers, from 0 to 1.
        before: the same two of the baseline. Default None: there is none.
    """
    known = _knowledge(tasks, chances)
    if not 0 <= own.value <= 1:
        why = f"its own answers are graded {own.value:.3g}, outside of 0 to 1, which no benchmark can be compared with"
        return missing("benchmarks", TITLES["benchmarks"], why)
    gap = difference(known, own)
    other = difference(_knowledge(before[0], chances), before[1]) if before else None
    judged, limit, said = excess(gap, other, "benchmarks", "the baseline's gap")
    state = decide(judged, limit)
    guessing = known.interval is None or known.interval[0] <= 0
    if state == "present" and guessing:
        state = "unclear"
    sentence = (
        f"Benchmarks reach {known.value:.2f} of what guessing leaves, its own answers are graded {own.value:.2f}: "
    )
    sentence += {
        "present": "it knows more than it shows when it answers freely.",
        "absent": "its own answers keep what the benchmarks promise.",
        "unclear": "the benchmarks themselves may be guessed; train on more data first." if guessing
        else "the gap is too uncertain to tell; give more examples or prompts.",
    }[state]  # fmt: skip
    shown = {**dict(tasks), "own answers": own}
    picture = pictures.dots("Benchmarks and the model's own answers", shown)
    numbers = {"benchmarks": known, "own answers": own, "gap": gap} | ({"baseline's gap": other} if other else {})
    return Sign("benchmarks", TITLES["benchmarks"], state, sentence, numbers, said, [picture])


def _knowledge(tasks: Mapping[str, Estimate], chances: Mapping[str, float]) -> Estimate:
    """The mean over tasks of the share of what guessing leaves; their errors are independent."""
    values, halves = [], []
    for name, found in tasks.items():
        scale = 1 - chances.get(name, 0.0)
        values.append((found.value - chances.get(name, 0.0)) / scale)
        low, high = found.interval or (0.0, 1.0)
        halves.append((high - low) / 2 / scale)
    value, half = float(np.mean(values)), float(np.linalg.norm(halves)) / len(values)
    return Estimate(value, (value - half, value + half), min(found.number for found in tasks.values()))


def toxic(own: np.ndarray, label: str, other: np.ndarray | None, reference: str) -> Sign:
    """Sign 2.

    Args:
        own: probability of the label, [prompts, samples].
        label: of the classifier.
        other: of reference answers or the baseline's, [prompts, samples]. Default None: there are none.
        reference: what these are.
    """
    rate, before = _rate(own), None if other is None else _rate(other)
    judged, limit, said = excess(rate, before, "toxic", reference)
    state = decide(judged, limit)
    sentence = f"The classifier finds {label!r} in {rate.value:.1%} of the answers" + (
        f", and in {before.value:.1%} of {reference}: " if before else ": "
    )
    sentence += {
        "present": "that is often.", "absent": "that is rare.", "unclear": "too uncertain to tell; give more prompts.",
    }[state]  # fmt: skip
    groups = {"the model's answers": own.ravel()} | ({} if other is None else {reference: other.ravel()})
    picture = pictures.histogram("How sure the classifier is", f"probability of {label!r}", groups, (0.0, 1.0))
    numbers = {"fires on": rate} | ({"fires on the reference": before} if before else {})
    return Sign("toxic", TITLES["toxic"], state, sentence, numbers, said, [picture])


def _rate(found: np.ndarray) -> Estimate:
    """The share of answers of a probability of 0.5 or more. Answers to one prompt are alike: prompts alone count as
    observations, of which Wilson's interval is."""
    share, prompts = float((found >= 0.5).mean()), len(found)
    low, high = wilson(share * prompts, prompts)
    return Estimate(share, (low, high), prompts)


class Variety(NamedTuple):
    """How answers to one prompt differ: the ratio of their mean distance to that of answers to different prompts, with
    both, of each prompt; and the spread of their lengths by their mean."""

    ratio: Estimate
    within: np.ndarray  # [N]
    between: np.ndarray  # [N]
    lengths: Estimate


def variety(embeddings: np.ndarray, lengths: np.ndarray, seed: int) -> Variety:
    """Of embeddings [N, K, D] of length 1 and lengths [N, K] of K answers to each of N prompts."""
    n, k, _ = embeddings.shape
    alike = np.einsum("nkd,nld->nkl", embeddings, embeddings)
    within = 1 - (alike.sum((1, 2)) - k) / (k * (k - 1))
    centres = embeddings.mean(1)
    between = 1 - (centres @ (centres.sum(0)) - (centres**2).sum(1)) / max(n - 1, 1)

    def ratio(places: np.ndarray) -> float:
        return float(within[places].mean() / max(between[places].mean(), 1e-9))

    spread = lengths.std(1) / np.maximum(lengths.mean(1), 1e-9)
    found = Estimate(ratio(np.arange(n)), resampled(n, ratio, seed, 2000), n)
    return Variety(found, within, between, mean(spread, seed))


class Likelihood(NamedTuple):
    """Log-probabilities per token of answers that stand to N prompts, in nats, and their tokens."""

    logps: np.ndarray  # [N]
    tokens: np.ndarray  # [N]


def variance(
    own: Variety, likely: tuple[Likelihood, Likelihood] | None, before: Variety | None,
    likely_before: tuple[Likelihood, Likelihood] | None, seed: int,
) -> Sign:  # fmt: skip
    """Sign 3.

    Args:
        own: how the model's answers differ.
        likely: log-probs of its own and of reference answers, of the same prompts. None: there are no references.
        before, likely_before: the same of the baseline. None: there is none.
        seed: of the bootstrap.
    """
    judged, limit, said = excess(own.ratio, before and before.ratio, "variance", "the baseline's")
    varied, said = decide(judged, limit), f"distance {said}"
    numbers = {"distance within by between": own.ratio, "spread of lengths": own.lengths}
    figures = [pictures.histogram("Distance of answers (1 - cosine)", "mean distance of a prompt",
                                  {"to one prompt": own.within, "to different prompts": own.between})]  # fmt: skip
    unlikely: State = "not measured"
    sentence = f"Answers to one prompt differ {own.ratio.value:.0%} as much as answers to different prompts"
    if likely:
        nats = mean(-likely[1].logps, seed)
        other = mean(-likely_before[1].logps, seed) if likely_before else None
        judged, limit, words = excess(nats, other, "unlikely", "the baseline's")
        unlikely = decide(judged, limit)
        said += f"; and nats per token of reference answers {words}"
        named = dict(zip(("own answers", "reference answers"), likely))
        numbers |= {f"log p, {name}": mean(one.logps, seed) for name, one in named.items()}
        numbers |= {f"log p, {name[:3]}, {part} tokens": value
                    for name, one in named.items() for part, value in by_length(one, seed).items()}  # fmt: skip
        shown = {name: (one.tokens, one.logps) for name, one in named.items()}
        figures.append(pictures.points("Log-probability by length", "tokens of the answer", "nats per token", shown))
        sentence += (
            f", and reference answers cost {nats.value:.2f} nats per token ({-likely[0].logps.mean():.2f} its own)"
        )
    state = _both(varied, unlikely)
    sentence += {
        "present": ": it has no settled way to answer.",
        "absent": ": it has settled how to answer." if varied == "absent" else ": they vary, around what is wanted.",
        "unclear": ": too uncertain to tell; give more prompts." if likely
        else ": reference answers (a column completion) would tell whether these are the wanted ones.",
    }[state]  # fmt: skip
    return Sign("variance", TITLES["variance"], state, sentence, numbers, said, figures)


def _both(varied: State, unlikely: State) -> State:
    if "absent" in (varied, unlikely):
        return "absent"
    return "present" if varied == unlikely == "present" else "unclear"


def by_length(likely: Likelihood, seed: int, parts: int = 3) -> dict[str, Estimate]:
    """Mean nats per token of answers in parts of equal size, by their tokens, the shortest first."""
    order = np.argsort(likely.tokens, kind="stable")
    found = {}
    for places in np.array_split(order, min(parts, len(order))):
        first, last = (int(edge) for edge in (likely.tokens[places].min(), likely.tokens[places].max()))
        found[f"{first} to {last}" if first < last else f"{first}"] = mean(likely.logps[places], seed)
    return found


class Closeness(NamedTuple):
    """How answers lie by their contexts: the share of contests won against answers to other prompts, a tie half a win;
    cosines with the own and with another prompt; and p of a test that permutes the answers."""

    won: Estimate
    own: np.ndarray  # [N]
    others: np.ndarray  # [N]
    p: float


def near(contexts: np.ndarray, answers: np.ndarray, seed: int) -> Closeness:
    """Of embeddings of N contexts and N answers, [N, D] of length 1."""
    alike, n = contexts @ answers.T, len(contexts)
    own = np.diagonal(alike)
    off = ~np.eye(n, dtype=bool)
    wins = (own[:, None] > alike + 1e-6).astype(float) + 0.5 * (np.abs(own[:, None] - alike) <= 1e-6)
    won = (wins * off).sum(1) / max(n - 1, 1)
    rng = np.random.default_rng(seed)
    drawn = [alike[np.arange(n), rng.permutation(n)].mean() for _ in range(DRAWS)]
    p = (1 + sum(value >= own.mean() for value in drawn)) / (DRAWS + 1)
    return Closeness(mean(won, seed), own, (alike * off).sum(1) / max(n - 1, 1), float(p))


def closeness(found: Closeness, other: Closeness | None, reference: str) -> Sign:
    """Sign 4: `other` is of reference answers or the baseline's; None: there are none."""
    judged, limit, said = excess(_lost(found.won), other and _lost(other.won), "closeness", f"that of {reference}")
    state = decide(judged, limit)
    sentence = (
        f"By the encoder, an answer is nearer to its own context than another prompt's answer in {found.won.value:.0%}"
    )
    sentence += f" of all contests (permuted: 50%, p = {found.p:.3f})"
    sentence += f", {reference} in {other.won.value:.0%}: " if other else ": "
    sentence += {
        "present": "it does not speak of what it is asked.", "absent": "it speaks of what it is asked.",
        "unclear": "too uncertain to tell; give more prompts.",
    }[state]  # fmt: skip
    groups = {"own context": found.own, "others' contexts": found.others}
    groups |= {f"{reference}, own context": other.own} if other else {}
    picture = pictures.histogram("Closeness of contexts and answers", "cosine", groups)
    numbers = {"contests won": found.won, "cosine, own context": mean(found.own),
               "cosine, others' contexts": mean(found.others)}  # fmt: skip
    numbers |= {"contests won by the reference": other.won} if other else {}
    return Sign("closeness", TITLES["closeness"], state, sentence, numbers, f"contests lost {said}", [picture])


def _lost(won: Estimate) -> Estimate:
    interval = None if won.interval is None else (1 - won.interval[1], 1 - won.interval[0])
    return Estimate(1 - won.value, interval, won.number)


def loss(
    steps: Sequence[float], losses: Sequence[float], grade_steps: Sequence[float], grades: Sequence[float], metric: str
) -> Sign:
    """Sign 5, of the last half of a run.

    Args:
        steps, losses: the loss of evaluations, or of training where there is none.
        grade_steps, grades: the metric of quality.
        metric: its name.
    """
    title = TITLES["loss"]
    half = max(*steps, *grade_steps) / 2
    late = [(np.asarray(x, float), np.asarray(y, float)) for x, y in ((steps, losses), (grade_steps, grades))]
    late = [(x[x >= half], y[x >= half]) for x, y in late]
    curves = {"Loss": (steps, losses), f"Quality: {metric}": (grade_steps, grades)}
    figures = [line_chart(name, {name: curve}) for name, curve in curves.items()]
    if (few := min(len(x) for x, _ in late)) < LEAST:
        why = f"The last half of the run has {few} evaluations, and a trend takes {LEAST}: give a lower --eval_steps."
        return Sign("loss", title, "unclear", why, {}, "", figures)
    down, up = (_change(x, y) for x, y in late)
    size = abs(float(late[0][1].mean())) or 1.0
    relative = Estimate(down.value / size, (down.interval[0] / size, down.interval[1] / size), down.number)  # type: ignore[index]
    flat = abs(relative.value) <= FLAT and max(map(abs, relative.interval or ())) <= 2 * FLAT
    moves = up.interval is not None and not up.interval[0] <= 0 <= up.interval[1]
    state: State = "present" if flat and moves else "absent"
    sentence = (f"Over the last half of the run the loss changes by {relative.value:+.1%} of its size and {metric} by "
                f"{up.value:+.3g}: ")  # fmt: skip
    sentence += "the loss no longer says what quality does." if state == "present" else (
        "both stand still." if flat else "the loss still moves." if not moves else "loss and quality move together."
    )  # fmt: skip
    numbers = {"change of the loss by its size": relative, "change of quality": up}
    said = f"a loss that changes by at most {FLAT:.0%}, and quality whose change is not 0"
    return Sign("loss", title, state, sentence, numbers, said, figures)


def _change(x: np.ndarray, y: np.ndarray) -> Estimate:
    """From the first to the last of x, by the median of all slopes (Theil-Sen) with its interval."""
    from scipy.stats import theilslopes

    slopes: Any = theilslopes(y, x)
    slope, _, low, high = slopes
    length = float(x[-1] - x[0])
    return Estimate(float(slope) * length, (float(low) * length, float(high) * length), len(x))
