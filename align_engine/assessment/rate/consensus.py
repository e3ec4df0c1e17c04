"""What several marks come to: a score for each answer to a prompt, and which of two is better."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from align_engine.assessment.rate.records import Record
from align_engine.assessment.rate.values import COMPARING, dense

REGULARISED = 0.01  # pseudo-comparisons of choix, which keep an answer that always wins finite
EQUAL = 1e-9  # scores that differ by less are a tie


class Votes(NamedTuple):
    """Of two answers."""

    won: float
    lost: float
    tied: float


class Group:
    """A prompt with all answers to it that somebody has marked.

    Attributes:
        texts, abouts: of the answers.
        levels: of each answer, the marks or scores that it got.
        wins: [n, n], how often the one in the row was called better than the one in the column; `ties` likewise.
        comments: of each answer, what was said of the items that it stood in.
    """

    def __init__(self, prompt: Any) -> None:
        self.prompt = prompt
        self.texts: list[Any] = []
        self.abouts: list[dict[str, Any]] = []
        self.levels: list[list[int]] = []
        self.wins, self.ties = np.zeros((0, 0)), np.zeros((0, 0))
        self._numbers: dict[str, int] = {}

    def add(self, record: Record, compares: bool) -> None:
        """Count an item's marks."""
        numbers = [self._number(text, about) for text, about in zip(record.texts, record.abouts)]
        for value in record.values:
            if not compares:
                self.levels[numbers[0]].append(value[0])
            for (i, a), (j, b) in itertools.permutations(zip(numbers, value), 2) if compares else ():
                self.wins[i, j] += a < b
                self.ties[i, j] += a == b

    def _number(self, text: Any, about: dict[str, Any]) -> int:
        key = json.dumps(text, sort_keys=True)
        if key not in self._numbers:
            self._numbers[key] = len(self.texts)
            self.texts.append(text)
            self.abouts.append(about)
            self.levels.append([])
            self.wins, self.ties = (np.pad(table, ((0, 1), (0, 1))) for table in (self.wins, self.ties))
        return self._numbers[key]

    def votes(self, i: int, j: int) -> Votes:
        """Of answer `i` against answer `j`."""
        return Votes(float(self.wins[i, j]), float(self.wins[j, i]), float(self.ties[i, j]))

    def scores(self, method: str) -> list[float | None]:
        """A number for each answer, more is better; None where nobody has marked it.

        Of marks and scores it is the mean. Of comparisons, by majority: the share of the answers it was compared with
        that most people put below it, a tie being half; by bradley_terry: the log-strength, of mean 0.
        """
        if any(self.levels):
            return [float(np.mean(own)) if own else None for own in self.levels]
        met = self.wins + self.wins.T + self.ties
        won = self.wins + self.ties / 2
        if method == "bradley_terry":
            import choix

            strengths = choix.ilsr_pairwise_dense(won, alpha=REGULARISED)
            return [float(strength) if own.any() else None for strength, own in zip(strengths, met)]
        beaten = np.where(met > 0, 0.5 + 0.5 * np.sign(won - won.T), 0.0)
        return [float(row.sum() / count) if (count := (own > 0).sum()) else None for row, own in zip(beaten, met)]

    def shares(self) -> list[float | None]:
        """Rewards: the mean mark or score, or the mean share of the comparisons that an answer won."""
        if any(self.levels):
            return self.scores("majority")
        met = self.wins + self.wins.T + self.ties
        with np.errstate(invalid="ignore"):
            each = np.where(met > 0, (self.wins + self.ties / 2) / met, 0.0)
        return [float(row.sum() / count) if (count := (own > 0).sum()) else None for row, own in zip(each, met)]

    def pairs(self, method: str) -> Iterator[tuple[int, int, Votes]]:
        """(better, worse, votes) of answers that are not equally good; of comparisons by majority those that were
        compared, else all of the prompt."""
        scores = self.scores(method)
        direct = method == "majority" and not any(self.levels)
        for i, j in itertools.combinations(range(len(self.texts)), 2):
            votes = self.votes(i, j)
            a, b = (votes.won, votes.lost) if direct else (scores[i], scores[j])
            if a is None or b is None or abs(a - b) < EQUAL:
                continue
            yield (i, j, votes) if a > b else (j, i, Votes(votes.lost, votes.won, votes.tied))

    def ranks(self, method: str) -> list[int | None]:
        """Of the answers, 1 is the best; None where nobody has marked one."""
        scores = self.scores(method)
        order = iter(dense([-round(score / EQUAL) for score in scores if score is not None]))
        return [next(order) if score is not None else None for score in scores]

    def labels(self, mode: str, method: str, scale: Sequence[int]) -> list[bool | None]:
        """Whether each answer is good: above the middle of the marks, of the scale, or of the comparisons; None at the
        middle, and where nobody has marked it."""
        middle = {"mark": 0.5, "score": sum(scale) / 2}.get(mode, 0.5 if method == "majority" else 0.0)
        return [None if score is None or abs(score - middle) < EQUAL else score > middle
                for score in self.scores(method)]  # fmt: skip


def groups(records: Iterable[Record], mode: str) -> list[Group]:
    """Prompts in the order of the items, gold ones left out."""
    found: dict[str, Group] = {}
    for record in records:
        if not record.gold:
            key = json.dumps([record.source, record.prompt, record.abouts[0].get("group")], sort_keys=True)
            found.setdefault(key, Group(record.prompt)).add(record, mode in COMPARING)
    return list(found.values())
