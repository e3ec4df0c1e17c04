"""A judge at an endpoint: which of two answers is better, asked in both orders, with ties.

A verdict is [[A]], [[B]] or [[C]] for a tie, as in MT-Bench (Zheng et al. 2023, arXiv:2306.05685). What holds no
verdict, or two different ones, or was cut off, is none: such pairs are counted and left out, never guessed.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from align_engine.errors import BadInput, RunFailed
from align_engine.preparation import folder
from align_engine.preparation.endpoints import Endpoint, ask_all
from align_engine.preparation.models import ModelSpec, Question, Reply

JOURNAL = "_judgements.jsonl"
VERDICT = re.compile(r"\[\[([ABC])\]\]")
SCORES = {"A": 1.0, "C": 0.5, "B": 0.0}  # of the answer that is shown first
PATIENCE = 20  # replies of a judge, none of which is a verdict
ASKED = """Compare two answers to the request below. Judge which one follows it better: whether it is right, does what \
is asked, helps, and is clear. Do not let the order of the answers, their length or their form sway you.

[Request]
{request}

[Answer A]
{first}
[End of answer A]

[Answer B]
{second}
[End of answer B]

Give a short reason. Then end with one line that holds your verdict and nothing else: [[A]] if answer A is better, \
[[B]] if answer B is better, [[C]] if they are equally good."""


class Comparison(NamedTuple):
    """Two answers to one prompt."""

    model: str
    row: int
    request: str
    own: str
    other: str  # of the baseline


class Judged(NamedTuple):
    """What the judge says of a comparison: of the model's answer 1 better, 0 worse, 0.5 as good; None where its reply
    is no verdict."""

    comparison: Comparison
    first: float | None  # with the model's answer shown first
    second: float | None  # with the baseline's answer shown first
    replies: tuple[str, str]

    @property
    def score(self) -> float | None:
        """The mean over both orders; None where one of them has no verdict."""
        return None if self.first is None or self.second is None else (self.first + self.second) / 2


def verdict(reply: str, ended: str = "stop") -> float | None:
    """Of a judge's reply: 1 for the first answer, 0 for the second, 0.5 for a tie, None for no verdict."""
    said = set(VERDICT.findall(reply))
    return SCORES[said.pop()] if len(said) == 1 and ended != "length" else None


def check(spec: ModelSpec) -> None:
    """Refuse a judge that is no endpoint, or gives several answers."""
    if not spec.base_url or spec.n != 1:
        why = "gives several answers: n must be 1" if spec.base_url else "needs base_url: it answers at an endpoint"
        raise BadInput(f"judge {spec.name!r} {why}")


class Judge:
    """Verdicts that are there and those that are not.

    Args:
        spec: of the judge.
        seed: of its replies.
        comparisons: what it is asked about, each twice.
        journal: of the folder; verdicts of this judge in it are taken as they stand, and what was none is asked again.
    """

    def __init__(self, spec: ModelSpec, seed: int, comparisons: Sequence[Comparison], journal: folder.Journal) -> None:
        self.spec, self.seed, self.comparisons, self.journal = spec, seed, comparisons, journal
        self.key, self.replies = spec.key(seed), dict[tuple[str, int, bool], tuple[str, str]]()
        for line in journal.rows:
            if line["judge"] == self.key and self.read(line["reply"], line["ended"]) is not None:
                self.replies[line["model"], line["row"], line["swapped"]] = (line["reply"], line["ended"])

    def ask(self, concurrency: int, timeout: float) -> list[Judged]:
        """All verdicts.

        Raises:
            RunFailed: the endpoint fails, or nothing of what the judge says is a verdict.
        """
        from rich.progress import Progress

        endpoint, total = Endpoint(self.spec, concurrency, timeout), 2 * len(self.comparisons)
        with Progress() as bar:
            task = bar.add_task(f"judge {self.spec.name}", total=total, completed=total - len(list(self.waiting())))

            def take(question: Question, reply: Reply) -> None:
                self.take(question, reply)
                bar.advance(task)

            asyncio.run(ask_all([(endpoint, self.waiting())], take))
        self.check_sense(max(total, 1))
        return [self.judged(one) for one in self.comparisons]

    def waiting(self) -> Iterator[Question]:
        """Questions without a reply; number 2i shows the model's answer of comparison i first, 2i + 1 the other's."""
        for i, one in enumerate(self.comparisons):
            for swapped in (False, True):
                if (one.model, one.row, swapped) not in self.replies:
                    first, second = (one.other, one.own) if swapped else (one.own, one.other)
                    text = ASKED.format(request=one.request, first=first, second=second)
                    yield Question(self.spec, 2 * i + swapped, [{"role": "user", "content": text}], self.seed)

    def take(self, question: Question, reply: Reply) -> None:
        """Keep a reply."""
        one, swapped = self.comparisons[question.row // 2], bool(question.row % 2)
        text, ended = reply.answers[0] if reply.answers else (f"refused: {reply.refused}", "refused")
        text = text.encode("utf-8", "replace").decode()
        self.journal.add([{"judge": self.key, "model": one.model, "row": one.row, "swapped": swapped, "reply": text,
                           "ended": ended}])  # fmt: skip
        self.replies[one.model, one.row, swapped] = (text, ended)
        self.check_sense(PATIENCE)

    def check_sense(self, least: int) -> None:
        """Refuse a judge whose replies, `least` of them or more, hold no verdict at all."""
        if len(self.replies) < least or any(self.read(*one) is not None for one in self.replies.values()):
            return
        said = " ".join(next(iter(self.replies.values()))[0].split())
        why = f"none of its {len(self.replies)} replies is a verdict [[A]], [[B]] or [[C]]; the first: {said!r:.200}"
        raise RunFailed(f"judge {self.spec.name!r}: {why}; ask another judge, or give it more max_tokens")

    def read(self, reply: str, ended: str) -> float | None:
        return None if ended == "refused" else verdict(reply, ended)

    def judged(self, one: Comparison) -> Judged:
        replies = [self.replies[one.model, one.row, swapped] for swapped in (False, True)]
        first, second = (self.read(*reply) for reply in replies)
        return Judged(one, first, None if second is None else 1 - second, (replies[0][0], replies[1][0]))


def rows_of(judged: Sequence[Judged], baseline: str) -> Iterator[Mapping[str, Any]]:
    """One row for each comparison, as they are written."""
    for one in judged:
        yield {
            "prompt": one.comparison.request, "model": one.comparison.model, "baseline": baseline,
            "index": one.comparison.row, "completion": one.comparison.own, "baseline_completion": one.comparison.other,
            "score": one.score, "shown_first": one.first, "shown_second": one.second,
            "reply_shown_first": one.replies[0], "reply_shown_second": one.replies[1],
        }  # fmt: skip
