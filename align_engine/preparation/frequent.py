"""Words with which one source of answers begins, or which it uses, far more often than the others.

A marker is an opening (the first words of an answer) or an n-gram (words anywhere in it). Words are what blanks part,
as they are written: "Sure," is not "Sure". An answer counts once for each marker, however often it holds it, so that
no long answer makes a marker by itself.

How far a source stands out is the log-odds ratio against all others with an informative Dirichlet prior, in standard
deviations (Monroe, Colaresi and Quinn, "Fightin' Words", Political Analysis 2008, equations 15, 16, 20 and 22): the
prior is what all sources together use, as heavy as PRIOR words, and pulls rare words to zero.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

Kind = Literal["opening", "ngram"]
Texts = Iterable[tuple[str, str]]  # (source, answer); gone through twice

PRIOR = 500.0
BUCKETS = 2**22  # in which n-grams are counted first, by hash: most are too rare to be held by name
OPENING = "\n"  # before an opening while markers are counted: no word holds it
MOSTLY = 0.5  # share of a marker's answers from which on another one stands for it


class Marker(NamedTuple):
    """Words as they stand in answers, one blank between them."""

    kind: Kind
    text: str

    @property
    def length(self) -> int:
        return self.text.count(" ") + 1


class Counts(NamedTuple):
    """Markers of S sources."""

    sources: list[str]  # sorted
    answers: np.ndarray  # [S]
    markers: list[Marker]
    found: np.ndarray  # [W, S]: answers that hold it
    totals: dict[tuple[Kind, int], np.ndarray]  # of a kind and length: all such markers of a source, rare ones too [S]


class Finding(NamedTuple):
    """A marker of a source."""

    marker: Marker
    source: str
    count: int  # answers of the source that hold it
    share: float  # of the source's answers
    others: float  # share of all other sources' answers; NaN where there is one source
    z: float  # log-odds ratio against the others in standard deviations; NaN where there is one source


def count(texts: Texts, longest: int, min_count: int) -> Counts:
    """Count openings and n-grams of 1 to `longest` words.

    Args:
        min_count: markers in fewer answers than this, over all sources, are left out.
    """
    buckets = np.zeros(BUCKETS, np.int64)
    for _, text in texts:
        np.add.at(buckets, [hash(key) % BUCKETS for key in keys_of(text, longest)], 1)
    answers: Counter[str] = Counter()
    totals: defaultdict[tuple[Kind, int], Counter[str]] = defaultdict(Counter)
    found: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for source, text in texts:
        answers[source] += 1
        for key in keys_of(text, longest):
            totals["opening" if key[0] == OPENING else "ngram", key.count(" ") + 1][source] += 1
            if buckets[hash(key) % BUCKETS] >= min_count:  # others may share the bucket
                found[key][source] += 1
    sources = sorted(answers)
    keys = sorted(key for key, counted in found.items() if counted.total() >= min_count)
    return Counts(
        sources,
        np.array([answers[source] for source in sources]),
        [Marker("opening" if key[0] == OPENING else "ngram", key.removeprefix(OPENING)) for key in keys],
        np.array([[found[key][source] for source in sources] for key in keys]).reshape(-1, len(sources)),
        {family: np.array([counted[source] for source in sources]) for family, counted in totals.items()},
    )


def keys_of(text: str, longest: int) -> set[str]:
    """The n-grams of an answer, and its openings with OPENING before them."""
    words = text.split()
    found = {OPENING + " ".join(words[:size]) for size in range(1, min(longest, len(words)) + 1)}
    for size in range(1, longest + 1):
        found.update(map(" ".join, zip(*(words[start:] for start in range(size)))))
    return found


def log_odds(counts: np.ndarray, totals: np.ndarray, all_totals: float) -> np.ndarray:
    """z of each marker in each source against all the others.

    Args:
        counts: [W, S], of markers of one kind and length.
        totals: [S], of all such markers, more than those in `counts`.
        all_totals: their sum.
    Returns:
        [W, S].
    """
    prior = PRIOR * counts.sum(1, keepdims=True) / all_totals  # alpha_w: [W, 1]
    others, other_totals = counts.sum(1, keepdims=True) - counts, all_totals - totals

    def odds(y: np.ndarray, n: np.ndarray) -> np.ndarray:
        return np.log((y + prior) / np.maximum(n + PRIOR - y - prior, prior))

    return (odds(counts, totals) - odds(others, other_totals)) / np.sqrt(1 / (counts + prior) + 1 / (others + prior))


def findings(counts: Counts) -> list[Finding]:
    """Every marker in every source that holds it, those that stand out most first."""
    z = np.full(counts.found.shape, np.nan)
    if len(counts.sources) > 1:
        for (kind, length), totals in counts.totals.items():
            rows = [i for i, marker in enumerate(counts.markers) if (marker.kind, marker.length) == (kind, length)]
            z[rows] = log_odds(counts.found[rows], totals, totals.sum())
    found = []
    for marker, row, line in zip(counts.markers, counts.found, z):
        for i, source in enumerate(counts.sources):
            if row[i]:
                rest = counts.answers.sum() - counts.answers[i]
                others = float((row.sum() - row[i]) / rest) if rest else np.nan
                share = float(row[i] / counts.answers[i])
                found.append(Finding(marker, source, int(row[i]), share, others, float(line[i])))
    return sorted(found, key=lambda one: (-np.nan_to_num(one.z), -one.count, one.marker, one.source))


def stands_out(finding: Finding, min_share: float, min_z: float = 3.0) -> bool:
    """Whether a source holds a marker often, and more often than the others do."""
    return finding.share >= min_share and not finding.z < min_z  # NaN: there is nobody to compare it with


def distinct(found: Sequence[Finding]) -> list[Finding]:
    """One finding of a source for each thing that is said: "I'm", "I'm sorry" and the n-gram "sorry" may be one.

    A marker gives way to a longer one that begins with it (n-grams: that holds it) and stands in at least MOSTLY of its
    answers; else the longer one gives way. So does an n-gram that mostly stands in an opening.
    """
    kept: dict[tuple[str, Marker], Finding] = {}
    for one in sorted(found, key=lambda one: (one.marker.kind == "ngram", one.marker.length)):
        parts = [kept.get((one.source, Marker(one.marker.kind, text))) for text in _parts(one.marker)]
        shorter = [part for part in parts if part]
        openings = [other for (source, marker), other in kept.items()
                    if marker.kind == "opening" != one.marker.kind and source == one.source]  # fmt: skip
        if any(one.count < MOSTLY * part.count for part in shorter):
            continue
        if any(_overlap(one.marker, other.marker) and other.count >= MOSTLY * one.count for other in openings):
            continue
        for part in shorter:
            del kept[part.source, part.marker]
        kept[one.source, one.marker] = one
    return [one for one in found if (one.source, one.marker) in kept]


def _overlap(ngram: Marker, opening: Marker) -> bool:
    """Whether an n-gram lies in an opening, or begins with it."""
    inside, within = f" {ngram.text} ", f" {opening.text} "
    return inside in within or inside.startswith(within)


def _parts(marker: Marker) -> list[str]:
    """The shorter markers of its kind inside a marker."""
    words = marker.text.split(" ")
    sizes = range(1, len(words))
    if marker.kind == "opening":
        return [" ".join(words[:size]) for size in sizes]
    return [" ".join(words[i : i + size]) for size in sizes for i in range(len(words) - size + 1)]
