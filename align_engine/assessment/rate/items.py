"""What is rated at a time: a prompt with answers that stand side by side, and how items come into a project."""

from __future__ import annotations

import itertools
import json
import math
import random
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from align_engine.assessment.rate.sections import RateRecipe
from align_engine.assessment.rate.values import MOST_RANKED, dense
from align_engine.errors import BadInput


class Answer(NamedTuple):
    """One answer."""

    text: Any  # a text, or messages
    about: dict[str, Any]  # other columns, which nobody sees who rates
    level: float | None = None  # how good the row calls it; more is better
    side: str | None = None  # chosen or rejected, where it stands in such a column


class Given(NamedTuple):
    """A mark that was given elsewhere."""

    person: str
    value: list[int] | None  # by the answers' order; None: skipped
    comment: str = ""
    seconds: float = 0.0
    at: float = 0.0  # seconds since 1970


class Item(NamedTuple):
    """What is rated at a time."""

    prompt: Any
    answers: list[Answer]
    gold: list[int] | None = None  # the right value, by the answers' order
    marks: Sequence[Given] = ()


def of_group(prompt: Any, answers: Sequence[Answer], mode: str) -> Iterator[Item]:
    """The items that answers to one prompt give; equal answers are one.

    Raises:
        BadInput: too many to rank.
    """
    unique = list({json.dumps(answer.text, sort_keys=True): answer for answer in reversed(answers)}.values())[::-1]
    if mode in ("mark", "score"):
        yield from (Item(prompt, [answer]) for answer in unique)
    elif mode == "pair":
        for one, other in itertools.combinations(unique, 2):
            if one.side is None or one.side != other.side:
                yield Item(prompt, [one, other])
    elif len(unique) > MOST_RANKED:
        raise BadInput(
            f"a prompt has {len(unique)} different answers, and people rank {MOST_RANKED} at most: give mode pair, or "
            "fewer answers"
        )
    elif len(unique) > 1:
        yield Item(prompt, unique)


def as_gold(item: Item, mode: str, scale: Sequence[int]) -> Item:
    """An item with the value that its row calls right.

    Raises:
        BadInput: the row does not tell, or not in this mode.
    """
    levels = [answer.level for answer in item.answers if answer.level is not None]
    if len(levels) < len(item.answers):
        wanted = "chosen and rejected" if mode in ("pair", "rank") else "label" if mode == "mark" else "score"
        raise BadInput(f"gold_name: a row does not tell what is right: it has no {wanted}")
    if mode in ("pair", "rank"):
        return item._replace(gold=dense([-level for level in levels]))
    (level,) = levels
    allowed = (0, 1) if mode == "mark" else range(scale[0], scale[1] + 1)
    if level not in allowed:
        raise BadInput(f"gold_name: {level:g} is no {mode} that can be given: {', '.join(map(str, allowed))}")
    return item._replace(gold=[int(level)])


def drawn(items: list[Item], recipe: RateRecipe) -> list[tuple[Item, int]]:
    """Items in a shuffled order, with the marks that each is to get: k, of those set aside for agreement two at
    least."""
    project, draw = recipe.project, random.Random(recipe.project.seed)
    items = draw.sample(items, min(len(items), project.max_items or len(items)))
    shared = set(draw.sample(range(len(items)), math.ceil(project.overlap * len(items))))
    return [(item, max(project.k, 2) if i in shared else project.k) for i, item in enumerate(items)]


def add(
    db: sqlite3.Connection, items: Iterable[tuple[Item, int]], gold: Sequence[Item] = (), source: str = ""
) -> list[int]:
    """Put items into a project behind those that it has, gold ones spread evenly among them; their numbers, in the
    order that they are given in."""
    items = list(items)
    first = (db.execute("SELECT max(place) FROM item").fetchone()[0] or 0) + 1
    step = len(gold) + 1
    found = [_add(db, item, first + i * step, wanted, source) for i, (item, wanted) in enumerate(items)]
    for i, item in enumerate(gold):
        _add(db, item, first + int((i + 0.5) * len(items) / len(gold)) * step + i + 1, 0, source)
    return found


def _add(db: sqlite3.Connection, item: Item, place: int, wanted: int, source: str) -> int:
    row = db.execute(
        "INSERT INTO item (place, prompt, source, gold, total, wanted) VALUES (?, ?, ?, ?, ?, ?)",
        (place, json.dumps(item.prompt), source, json.dumps(item.gold) if item.gold else None, wanted, wanted),
    )
    assert row.lastrowid is not None
    db.executemany(
        "INSERT INTO answer VALUES (?, ?, ?, ?)",
        [(row.lastrowid, i, json.dumps(one.text), json.dumps(one.about)) for i, one in enumerate(item.answers)],
    )
    for mark in item.marks:
        _mark(db, row.lastrowid, mark, len(item.answers))
    return row.lastrowid


def _mark(db: sqlite3.Connection, item: int, mark: Given, size: int) -> None:
    """A mark of somebody who may have no link."""
    db.execute(
        "INSERT INTO person (name, lead, token, expires, revoked) VALUES (?, 0, ?, 0, 1) ON CONFLICT DO NOTHING",
        (mark.person, secrets.token_hex(32)),
    )
    (person,) = db.execute("SELECT id FROM person WHERE name = ?", (mark.person,)).fetchone()
    state, value = ("skipped", None) if mark.value is None else ("done", json.dumps(mark.value))
    made = db.execute(
        "INSERT INTO task (item, person, shown, state, version, value, comment, begun, ended) "
        "VALUES (?, ?, ?, ?, 1, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        (item, person, json.dumps(list(range(size))), state, value, mark.comment, mark.at - mark.seconds, mark.at),
    )
    if made.rowcount and mark.value is not None:
        db.execute("UPDATE item SET wanted = wanted - 1 WHERE id = ? AND gold IS NULL", (item,))
