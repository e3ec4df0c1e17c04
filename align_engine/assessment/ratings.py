"""`align ratings`: what the assessors said, as rows for a training, with their agreement.

Gold items are left out. `_marks.jsonl` beside the rows holds every single mark: who, what, in which order the answers
stood, the comment and the time.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import datasets

from align_engine.assessment.rate import label_studio
from align_engine.assessment.rate.consensus import Group, groups
from align_engine.assessment.rate.overview import Overview, overview
from align_engine.assessment.rate.records import Record, read
from align_engine.assessment.rate.sections import RatingsRecipe
from align_engine.assessment.rate.store import Store
from align_engine.errors import BadInput
from align_engine.preparation import folder, report
from align_engine.reports.report import Table

MARKS, TASKS, INTERFACE = "_marks.jsonl", "label_studio.json", "label_studio.xml"
Row = dict[str, Any]


def run(settings: RatingsRecipe) -> None:
    """The command.

    Raises:
        BadInput: no project, or nothing in it that makes a row, before anything is written.
    """
    store = Store(settings.ratings.project_dir)
    try:
        held, records = store.settings(), read(store)
    finally:
        store.close()
    to, mode = settings.ratings.to, held["mode"]
    marks = list(each_mark(records))
    if not marks:
        raise BadInput(f"project_dir = {settings.ratings.project_dir!r}: nobody has marked anything yet")
    found = groups(records, mode)
    rows = [] if to == "label_studio" else [row for group in found for row in ROWS[to](group, settings, held)]
    if not rows and to != "label_studio":
        raise BadInput(f"the {len(marks)} marks give no {to}: all are ties, skips or gold items; try another --to")
    product = TASKS if to == "label_studio" else folder.ROWS
    with folder.opened("ratings", settings, datasets.Dataset.from_list(marks), product=product) as place:
        if place is None:
            return
        place.write_rows(MARKS, marks)
        if to == "label_studio":
            write_tasks(place, records, held)
        else:
            place.write_rows(folder.ROWS, rows)
        tell(place, overview(records, mode), found, len(rows), settings, held)


def each_mark(records: Sequence[Record]) -> Iterator[Row]:
    """Every mark and skip."""
    for record in records:
        for mark in record.marks:
            yield {
                "item": record.id, "assessor": mark.person, "value": mark.value, "shown": mark.shown,
                "gold": record.gold, "comment": mark.comment, "seconds": round(mark.seconds, 3),
                "at": round(mark.at, 3),
            }  # fmt: skip


def pairs(group: Group, settings: RatingsRecipe, held: dict[str, Any]) -> Iterator[Row]:
    """Pairs of a prompt: with the votes of those who compared the two, and the columns of both answers."""
    for better, worse, votes in group.pairs(settings.ratings.method):
        row = {"prompt": group.prompt, "chosen": group.texts[better], "rejected": group.texts[worse]}
        row |= {"votes_chosen": int(votes.won), "votes_rejected": int(votes.lost), "votes_equal": int(votes.tied)}
        for side, number in (("chosen", better), ("rejected", worse)):
            row |= {f"{side}_{name}": value for name, value in group.abouts[number].items()}
        yield row


def _each(group: Group, values: Sequence[Any], name: str) -> Iterator[Row]:
    """A row for each answer that has a value."""
    for i, value in enumerate(values):
        if value is not None:
            about = {key: one for key, one in group.abouts[i].items() if key not in ("prompt", "completion")}
            yield about | {"prompt": group.prompt, "completion": group.texts[i], name: value}


ROWS: dict[str, Callable[[Group, RatingsRecipe, dict[str, Any]], Iterator[Row]]] = {
    "pairs": pairs,
    "marks": lambda group, settings, held: _each(
        group, group.labels(held["mode"], settings.ratings.method, held["scale"]), "label"
    ),
    "scores": lambda group, settings, held: _each(group, group.scores(settings.ratings.method), "score"),
    "ranks": lambda group, settings, held: _each(group, group.ranks(settings.ratings.method), "rank"),
}


def write_tasks(place: folder.ResultFolder, records: Sequence[Record], held: dict[str, Any]) -> None:
    """Label Studio's tasks and interface."""
    people = sorted({mark.person for record in records for mark in record.marks})
    tasks = list(label_studio.tasks(records, held["mode"], people))
    interface = label_studio.interface(held["mode"], held["scale"], max(len(one.texts) for one in records))
    for name, text in ((INTERFACE, interface), (TASKS, json.dumps(tasks, ensure_ascii=False, indent=1))):
        with place.written(name) as path:
            path.write_text(text, encoding="utf-8")


def tell(
    place: folder.ResultFolder, seen: Overview, found: Sequence[Group], count: int, settings: RatingsRecipe,
    held: dict[str, Any],
) -> None:  # fmt: skip
    """The reports."""
    to, mode, agreed = settings.ratings.to, held["mode"], seen.agreement
    ties = sum(_tied(group) for group in found) if to == "pairs" else 0
    facts = {
        "to": to, "rows": count, "ties_left_out": ties, "mode": mode, "method": settings.ratings.method,
        **{name: getattr(seen, name) for name in ("items", "finished", "gold", "marks", "missing")},
        "agreement": agreed._asdict(), "assessors": {name: doing._asdict() for name, doing in seen.people.items()},
    }  # fmt: skip
    tables = [
        Table("Ratings", ("", "value"), [
            ("rows", count), ("ties left out", ties), ("items", seen.items), ("items finished", seen.finished),
            ("gold items", seen.gold), ("marks", seen.marks), ("marks missing", seen.missing),
        ]),
        Table("Agreement", ("", "value"), [
            ("Krippendorff's alpha", "too little to tell" if agreed.alpha is None else agreed.alpha),
            ("share of equal pairs of marks", "none" if agreed.same is None else agreed.same),
            ("units marked by several", agreed.units),
        ]),
        Table("Assessors", ("name", "marks", "skipped", "gold right", "gold", "as others", "others", "took the first",
                            "seconds"), [
            (name, one.marks, one.skipped, one.right, one.gold, one.same, one.others,
             "" if one.first is None else round(one.first, 3), "" if one.seconds is None else round(one.seconds, 1))
            for name, one in seen.people.items()
        ]),
    ]  # fmt: skip
    what = "tasks of Label Studio" if to == "label_studio" else f"{to} by {settings.ratings.method.replace('_', '-')}"
    lead = f"{seen.marks:,} marks of {len(seen.people)} assessors on {seen.items:,} items, as {what}."
    report.write(place, "Ratings", lead, facts, tables)


def _tied(group: Group) -> int:
    """Answers that people compared and found equal."""
    compared = [group.votes(i, j) for i, j in itertools.combinations(range(len(group.texts)), 2)]
    return sum(bool(sum(votes) and votes.won == votes.lost) for votes in compared)
