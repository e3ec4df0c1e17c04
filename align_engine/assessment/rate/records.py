"""All that a project holds at one moment: items with their answers and everybody's marks."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from align_engine.assessment.rate.store import Store


class Mark(NamedTuple):
    """What somebody said of an item."""

    person: str
    value: list[int] | None  # by the answers' own order; None: skipped
    shown: list[int]  # numbers of the answers as they stood on the page
    comment: str
    seconds: float  # from the page to the click, at most
    at: float  # seconds since 1970


class Record(NamedTuple):
    """An item."""

    id: int
    prompt: Any
    source: str
    gold: list[int] | None
    total: int  # marks that it is to get
    texts: list[Any]  # of the answers; empty, where they were not asked for
    abouts: list[dict[str, Any]]
    marks: list[Mark]

    @property
    def values(self) -> list[list[int]]:
        """The marks that are none of a skip."""
        return [mark.value for mark in self.marks if mark.value is not None]


def read(store: Store, source: str | None = None, texts: bool = True) -> list[Record]:
    """Every item, in the shuffled order; whoever rates meanwhile is not kept waiting.

    Args:
        source: of these alone.
        texts: with prompts and answers.
    """
    where, given = ("WHERE item.source = ?", (source,)) if source is not None else ("", ())
    with store.apart() as db:
        answers: dict[int, list[Any]] = {}
        for row in db.execute(
            f"SELECT answer.* FROM answer JOIN item ON item.id = item {where} ORDER BY item, number", given
        ) if texts else ():  # fmt: skip
            answers.setdefault(row["item"], []).append((json.loads(row["text"]), json.loads(row["about"])))
        marks: dict[int, list[Mark]] = {}
        for row in db.execute(
            "SELECT task.*, name FROM task JOIN person ON person.id = person JOIN item ON item.id = item "
            f"{where or 'WHERE 1'} AND state IN ('done', 'skipped') ORDER BY task.ended", given
        ):  # fmt: skip
            value = json.loads(row["value"]) if row["value"] else None
            took = row["ended"] - row["begun"]
            shown = json.loads(row["shown"])
            mark = Mark(row["name"], value, shown, row["comment"], took, row["ended"])
            marks.setdefault(row["item"], []).append(mark)
        found = []
        for row in db.execute(f"SELECT * FROM item {where} ORDER BY place", given):
            own = answers.get(row["id"], [])
            prompt = json.loads(row["prompt"]) if texts else None
            gold = json.loads(row["gold"]) if row["gold"] else None
            found.append(Record(row["id"], prompt, row["source"], gold, row["total"], [text for text, _ in own],
                                [about for _, about in own], marks.get(row["id"], [])))  # fmt: skip
        return found
