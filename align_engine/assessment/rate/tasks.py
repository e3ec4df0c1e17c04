"""Which item an assessor gets, and what becomes of it: marked, skipped, undone. Each call is one transaction.

Every assessor has one open task at most, but for those that undo brings back; so a second tab, a reload and a restart
of the server show the same item. A page carries its task's version, and a form is taken once: sent again it changes
nothing, and one from an older page is refused.
"""

from __future__ import annotations

import json
import random
import sqlite3
import time
from typing import Any, NamedTuple

from align_engine.assessment.rate.people import Person
from align_engine.assessment.rate.store import Store

LAPSE = 1800.0  # seconds after which an open item may be given to somebody else
LONGEST_COMMENT = 5000


class Task(NamedTuple):
    """An item before an assessor."""

    id: int
    version: int
    item: int
    prompt: Any
    answers: list[Any]  # as they stand on the page
    shown: list[int]  # their numbers
    value: list[int] | None  # what was marked before it was undone, by the answers' own order
    comment: str


class Refused(Exception):
    """A click that changes nothing; the sentence is for the assessor."""


def current(store: Store, person: Person) -> Task | None:
    """The task that is before an assessor: the open one, or a new one; None where nothing is left for them."""
    with store.reading() as db:
        if (row := _open(db, person)) is not None:
            return _task(db, row)
    with store.writing() as db:
        row = _open(db, person) or _given(db, person)
        return _task(db, row) if row is not None else None


def answered(store: Store, person: Person, task: int, version: int, value: list[int] | None, comment: str) -> None:
    """Take a mark, or with None a skip.

    Args:
        version: of the page that it comes from.
        value: by the answers' own order.
    Raises:
        Refused: another's task, an older page, or one whose marks have been handed over. The same form again is taken
            for what it is.
    """
    with store.writing() as db:
        row = owned(db, person, task)
        state, held = ("skipped", None) if value is None else ("done", json.dumps(value))
        if row["state"] in ("done", "skipped"):
            if row["version"] == version + 1 and (row["state"], row["value"]) == (state, held):
                return
            raise Refused("This item has been rated already, in another tab or by an earlier click. Undo changes it.")
        if row["version"] != version:
            raise Refused("This page is out of date; the item as it stands now is shown.")
        if row["closed"]:
            raise Refused("The marks of this item have been handed over meanwhile.")
        now = time.time()
        db.execute(
            "UPDATE task SET state = ?, value = ?, comment = ?, ended = ?, version = version + 1 WHERE id = ?",
            (state, held, comment, now, task),
        )
        db.execute("INSERT INTO event (task, at, what, value, comment) VALUES (?, ?, ?, ?, ?)",
                   (task, now, state, held, comment))  # fmt: skip
        if (row["state"] == "lapsed") != (state == "skipped"):  # somebody else is spared it, or has to do it
            _want(db, row["item"], 1 if state == "skipped" else -1)
        if _open(db, person) is None:
            _given(db, person)  # in the same transaction, so that a mark costs one


def undo(store: Store, person: Person) -> None:
    """Open an assessor's last marked or skipped item again.

    Raises:
        Refused: there is none, or its marks have been handed over.
    """
    with store.writing() as db:
        row = db.execute(
            "SELECT task.*, closed FROM task JOIN item ON item.id = item WHERE person = ? AND state IN "
            "('done', 'skipped') ORDER BY ended DESC, task.id DESC LIMIT 1", (person.id,)
        ).fetchone()  # fmt: skip
        if row is None:
            raise Refused("There is nothing to undo.")
        if row["closed"]:
            raise Refused("The marks of the last item have been handed over; they can no longer be undone.")
        now = time.time()
        db.execute("UPDATE task SET state = 'open', begun = ?, version = version + 1 WHERE id = ?", (now, row["id"]))
        db.execute("INSERT INTO event (task, at, what, value, comment) VALUES (?, ?, 'undone', ?, '')",
                   (row["id"], now, row["value"]))  # fmt: skip
        if row["state"] == "skipped":
            _want(db, row["item"], -1)


def shown(store: Store, person: Person, task: int) -> list[int]:
    """Numbers of a task's answers as they stand on its page. Raises Refused for another's task."""
    with store.reading() as db:
        return json.loads(owned(db, person, task)["shown"])


def owned(db: sqlite3.Connection, person: Person, task: int) -> sqlite3.Row:
    """A task of this person's, with `closed` of its item. Raises Refused for another's, or none."""
    row = db.execute(
        "SELECT task.*, closed FROM task JOIN item ON item.id = item WHERE task.id = ? AND person = ?",
        (task, person.id),
    ).fetchone()
    if row is None:
        raise Refused("This item is not yours.")
    return row


def standing(store: Store, person: Person) -> dict[str, int]:
    """How many items an assessor has marked and skipped, and how many more wait for them at most."""
    with store.reading() as db:
        rows = db.execute("SELECT state, count(*) FROM task WHERE person = ? GROUP BY state", (person.id,))
        counts = {state: count for state, count in rows}
        waiting = db.execute("SELECT waiting FROM tally").fetchone()[0]
        mine = db.execute(  # the tasks first: they are few
            f"SELECT count(*) FROM task CROSS JOIN item ON item.id = item WHERE person = ? AND {GIVEN} AND {WANTED}",
            (person.id,),
        ).fetchone()[0]
    return {"done": counts.get("done", 0), "skipped": counts.get("skipped", 0),
            "left": waiting - mine + counts.get("open", 0)}  # fmt: skip


WANTED = "closed = 0 AND (wanted > 0 OR gold IS NOT NULL)"  # the index `waiting` holds these
GIVEN = "state != 'lapsed'"
WAITING = f"{WANTED} AND NOT EXISTS (SELECT 1 FROM task WHERE task.item = item.id AND person = ? AND {GIVEN})"


def _open(db: sqlite3.Connection, person: Person) -> sqlite3.Row | None:
    return db.execute(
        "SELECT task.* FROM task JOIN item ON item.id = item WHERE person = ? AND state = 'open' AND closed = 0 "
        "ORDER BY begun DESC, task.id DESC LIMIT 1", (person.id,)
    ).fetchone()  # fmt: skip


def _given(db: sqlite3.Connection, person: Person) -> sqlite3.Row | None:
    """The next item's task, made or taken up again; items that others left open come last."""
    find = f"SELECT id, gold FROM item WHERE {WAITING} ORDER BY place LIMIT 1"
    item = db.execute(find, (person.id,)).fetchone()
    if item is None and _lapse(db, person):
        item = db.execute(find, (person.id,)).fetchone()
    if item is None:
        return None
    count = db.execute("SELECT count(*) FROM answer WHERE item = ?", (item["id"],)).fetchone()[0]
    shown = random.SystemRandom().sample(range(count), count)
    if item["gold"] is None:
        _want(db, item["id"], -1)
    return db.execute(
        "INSERT INTO task (item, person, shown, begun) VALUES (?, ?, ?, ?) ON CONFLICT (item, person) DO UPDATE SET "
        "state = 'open', version = version + 1, begun = excluded.begun RETURNING *",
        (item["id"], person.id, json.dumps(shown), time.time()),
    ).fetchone()


def _lapse(db: sqlite3.Connection, person: Person) -> bool:
    """Give back what others have left open for long; whether there was any."""
    rows = db.execute(
        "UPDATE task SET state = 'lapsed' WHERE state = 'open' AND begun < ? AND person != ? AND item IN "
        "(SELECT id FROM item WHERE gold IS NULL) RETURNING item",
        (time.time() - LAPSE, person.id),
    ).fetchall()
    for row in rows:
        _want(db, row["item"], 1)
    return bool(rows)


def _want(db: sqlite3.Connection, item: int, more: int) -> None:
    db.execute("UPDATE item SET wanted = wanted + ? WHERE id = ? AND gold IS NULL", (more, item))


def _task(db: sqlite3.Connection, row: sqlite3.Row) -> Task:
    prompt = db.execute("SELECT prompt FROM item WHERE id = ?", (row["item"],)).fetchone()["prompt"]
    texts = db.execute("SELECT text FROM answer WHERE item = ? ORDER BY number", (row["item"],)).fetchall()
    shown = json.loads(row["shown"])
    value = json.loads(row["value"]) if row["value"] else None
    answers = [json.loads(texts[number]["text"]) for number in shown]
    return Task(row["id"], row["version"], row["item"], json.loads(prompt), answers, shown, value, row["comment"])
