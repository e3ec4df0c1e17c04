"""Rollouts of a run that learns from people: taken from its folder to the page, and their marks put back.

The run writes `marks/rollout-000000.jsonl` with a null at each `score` and waits (`wait_for_marks`); here its answers
become items, and when enough people have rated them all, the file is written anew with their scores: of marks and
scores the mean, of comparisons the share that an answer has won. Numbers that somebody has put into the file by hand
stay. What nobody could rate is "skip".
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align_engine.assessment.rate import records
from align_engine.assessment.rate.consensus import groups
from align_engine.assessment.rate.items import Answer, Item, add, of_group
from align_engine.assessment.rate.store import SIDE, Store, saying
from align_engine.assessment.rate.values import COMPARING
from align_engine.data.json_text import loads

SKIP = "skip"
Row = dict[str, Any]


class Desk:
    """Between a run and a project.

    Args:
        store: the project.
        folder: of the run.
    """

    def __init__(self, store: Store, folder: str | Path) -> None:
        self.store, self.folder = store, Path(folder) / "marks"
        settings = store.settings()
        self.mode, self.k = settings["mode"], settings["k"]

    def work(self) -> None:
        """Take new rollouts, and hand over those that are rated; a damaged file is left to the run, which names it.

        Raises:
            BadInput: a prompt has more answers than people can rank. RunFailed: the disk is full.
        """
        for path in sorted(self.folder.glob("rollout-*.jsonl")):
            rows = _read(path)
            if any(row["score"] is None for row in rows):
                source = f"{path.name} {_hash([[row['prompt'], row['completion']] for row in rows])}"
                self.take(source, rows)
                self.hand_over(source, rows, path)

    def take(self, source: str, rows: Sequence[Row]) -> None:
        """Make a rollout's answers items, once."""
        with self.store.writing() as db:
            if db.execute("SELECT 1 FROM item WHERE source = ? LIMIT 1", (source,)).fetchone() is None:
                add(db, [(item, self.k) for item in items(rows, self.mode)], source=source)

    def hand_over(self, source: str, rows: Sequence[Row], path: Path) -> None:
        """Put the scores into the file, unless somebody could still rate one of its items."""
        with self.store.writing() as db:
            if db.execute(WAITING, (source, self.k)).fetchone() is not None:
                return
            db.execute("UPDATE item SET closed = 1 WHERE source = ?", (source,))
        found = groups(records.read(self.store, source), self.mode)
        scores = {(group.abouts[0]["group"], _key(text)): score for group in found
                  for text, score in zip(group.texts, group.shares())}  # fmt: skip
        write(path, scored(rows, scores, self.mode))


ACTIVE = "lead = 0 AND revoked = 0 AND expires > unixepoch()"
WAITING = f"""SELECT 1 FROM item WHERE source = ? AND ? > (
    SELECT count(*) FROM task WHERE item = item.id AND state = 'done') AND (
        NOT EXISTS (SELECT 1 FROM person WHERE {ACTIVE}) OR EXISTS (
            SELECT 1 FROM person WHERE {ACTIVE} AND NOT EXISTS (
                SELECT 1 FROM task WHERE task.item = item.id AND person = person.id AND state IN ('done', 'skipped'))))
    LIMIT 1"""


def _read(path: Path) -> list[Row]:
    """The lines of a file of marks; none of one that is half written by an editor, damaged, or gone."""
    with contextlib.suppress(ValueError, OSError):
        rows = [loads(line) for line in path.read_bytes().splitlines() if line.strip()]
        if all(isinstance(row, dict) and {"prompt", "completion", "score"} <= row.keys() for row in rows):
            return rows
    return []


def items(rows: Sequence[Row], mode: str) -> list[Item]:
    """What is rated of a rollout: answers to one prompt stand one behind the other in it."""
    found = []
    for number, group in enumerate(_groups(rows)):
        answers = [Answer(row["completion"], {"group": number}) for row in group]
        found += of_group(group[0]["prompt"], answers, mode)
    return found


def scored(rows: Sequence[Row], scores: dict[tuple[int, str], float | None], mode: str) -> list[Row]:
    """The rows with the scores of (group, answer) where they had none."""
    found = []
    for number, group in enumerate(_groups(rows)):
        alone = mode in COMPARING and len({_key(row["completion"]) for row in group}) == 1
        for row in group:
            score = scores.get((number, _key(row["completion"])), 0.5 if alone else None)  # equal: nobody saw them
            found.append(row | {"score": SKIP if score is None else score} if row["score"] is None else row)
    return found


def write(path: Path, rows: Sequence[Row]) -> None:
    """Replace a file of marks as a whole. Raises RunFailed where the disk is full."""
    side = path.with_name(f"{path.name}{SIDE}")
    with saying(path):
        with side.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(side, path)


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    return [list(group) for _, group in itertools.groupby(rows, key=lambda row: _key(row["prompt"]))]


def _key(text: Any) -> str:
    return json.dumps(text, sort_keys=True)


def _hash(value: Any) -> str:
    return hashlib.sha256(_key(value).encode()).hexdigest()[:16]
