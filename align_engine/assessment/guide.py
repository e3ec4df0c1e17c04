"""The talk's guide to methods, from `guide.yaml`: which of them a situation has the means for, and which suits it best.

A situation is a set of words, as the file has them: {"pairs", "prompts", "chat", "small"}.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

GRADES = ("quality", "complexity", "cost")
WORDS = ("", "low", "medium", "high")  # a grade as a word
PREFERENCES = ("pairs", "ranks", "marks", "scores")
HIGH, MEDIUM = 4, 2  # points of applicability from which it is called so


class Reason(NamedTuple):
    """For or against a method in a situation."""

    points: int
    why: str
    source: str


class Need(NamedTuple):
    """One of the things that a method cannot be done without: what serves for it, and how it is made."""

    word: str
    steps: tuple[str, ...] = ()  # commands that make it of what is there: pairs, marks, rm


class Advice(NamedTuple):
    """What is to be said of one method in one situation."""

    method: str
    needs: tuple[Need, ...]
    missing: tuple[tuple[str, ...], ...]  # of each need that is not met, what would serve
    reasons: tuple[Reason, ...]  # the weightiest first

    @property
    def points(self) -> int:
        """Of applicability."""
        return sum(reason.points for reason in self.reasons)

    @property
    def applicability(self) -> str:
        """In a word."""
        if self.missing:
            return "not yet"
        return WORDS[3 if self.points >= HIGH else 2 if self.points >= MEDIUM else 1]


@functools.cache
def guide() -> dict[str, Any]:
    """The file's contents."""
    import yaml

    return yaml.safe_load(Path(__file__).with_name("guide.yaml").read_text(encoding="utf-8"))


def words(have: set[str], task: str, amounts: Mapping[str, float | None], more: set[str] = frozenset()) -> set[str]:  # type: ignore[assignment]
    """The words of a situation.

    Args:
        have: of `data`. task: of `tasks`.
        amounts: gpus, assessors, and billions of weights (None: not known).
        more: words that are given as they stand: pretrained, best-quality.
    """
    found = have | {task} | more | ({"preferences"} if have & set(PREFERENCES) else set())
    for word, rule in guide()["words"].items():
        amount = amounts[rule["of"]]
        if amount is not None and rule.get("least", amount) <= amount <= rule.get("most", amount):
            found.add(word)
    return found


def ranked(situation: set[str]) -> list[Advice]:
    """Every method, the most applicable first; those that something is missing for last."""
    found = [advice(method, situation) for method in guide()["methods"]]
    cost = {name: method["cost"]["grade"] for name, method in guide()["methods"].items()}
    return sorted(found, key=lambda one: (len(one.missing), -one.points, cost[one.method]))


def advice(method: str, situation: set[str]) -> Advice:
    """On one method."""
    rule = guide()["methods"][method]
    met = [(need, first(need, situation)) for need in rule["needs"]]
    return Advice(
        method,
        tuple(found for _, found in met if found),
        tuple(tuple(need) for need, found in met if found is None),
        tuple(sorted(reasons(rule, situation), key=lambda one: -abs(one.points))),
    )


def first(need: list[str], situation: set[str]) -> Need | None:
    """Of what would serve, the first that is there, or else can be made with the fewest steps."""
    if there := [word for word in need if word in situation]:
        return Need(there[0])
    made = [
        Need(word, tuple(steps))
        for word in need
        for source, steps in guide()["derived"].get(word, {}).items()
        if source in situation
    ]
    return min(made, key=lambda one: len(one.steps), default=None)


def reasons(rule: dict[str, Any], situation: set[str]) -> Iterator[Reason]:
    """Those that hold."""
    for one in rule["applicability"]:
        if all(word.removeprefix("no-") in situation if not word.startswith("no-")
               else word.removeprefix("no-") not in situation for word in one["when"]):  # fmt: skip
            yield Reason(one["points"], one["why"], one["source"])
