"""`align strip`: answers without the openings that sway a reward model, and what was taken off beside them.

The column `stripped` holds, for each column of an answer, the words that stood before it: both together are the answer
as it was, to the letter, and `--undo` puts them together. A pair whose answers would become equal stays as it is, or is
left out: all that it teaches is the opening.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from align_engine.data.formats import has_several
from align_engine.data.json_text import loads
from align_engine.errors import BadInput
from align_engine.preparation import folder, report
from align_engine.preparation.edits import without
from align_engine.preparation.sections import MarkersSection, StripRecipe
from align_engine.reports.report import Table

COLUMN, LIMITS = "stripped", "limits.yaml"
ANSWERS = ("completion", "chosen", "rejected")
GATE, CLAMP = (0.5, 0.95), (0.05, 0.95)  # within which limits are suggested
SHOWN = 160  # characters of an example

Row = dict[str, Any]


def run(settings: StripRecipe) -> None:
    """The command.

    Raises:
        BadInput: from the rows and the findings, before anything is written.
    """
    rows = folder.read(settings.data)
    columns = [name for name in ANSWERS if name in rows.column_names]
    if not columns:
        raise BadInput(f"there is none of the columns {', '.join(ANSWERS)}, but {sorted(rows.column_names)}")
    if settings.strip.undo:
        if COLUMN not in rows.column_names:
            raise BadInput(f"undo = True: there is no column {COLUMN!r}, so nothing has been taken off these rows")
        words, made, alike = [], [undone(dict(row)) for row in rows], 0
    else:
        words = openings(settings.found)
        made, alike = all_stripped(map(dict, rows), columns, words, settings.data.bad_rows == "drop")
    if settings.data.dry_run:
        return folder.dry(made)
    facts = {"openings": words, "alike": alike, "bad_rows": settings.data.bad_rows if alike else "error"}
    with folder.opened("strip", settings, rows, facts) as place:
        if place is None:
            return
        place.write_rows(folder.ROWS, made)
        if settings.strip.undo:
            put = sum(bool(row.get(COLUMN)) for row in map(dict, rows))
            report.write(place, "Openings put back", f"{put:,} of {len(made):,} rows.", {"rows": put}, [])
        else:
            write(place, made, columns, alike, settings.data.bad_rows == "drop")


def openings(section: MarkersSection) -> list[str]:
    """Those that the user names, and those that sway the reward model of `align tokens`: none sway it to no avail.

    Raises:
        BadInput: no such findings, or no opening among them.
    """
    found = [" ".join(text.split()) for text in section.markers]
    if section.findings is not None:
        path = Path(section.findings) / "report.json"
        try:
            effects = loads(path.read_bytes())["effects"]
            swaying = [one["name"] for one in effects if one["kind"] == "opening" and one["sways"]]
        except OSError as error:
            raise BadInput(f"findings = {section.findings!r}: there is no {path.name} of `align tokens`") from error
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"findings = {section.findings!r} asked no reward model: give `align tokens` a reward_model, or name "
                "openings as markers"
            ) from error
        if not swaying and not found:
            raise BadInput(f"findings = {section.findings!r}: no opening sways the reward model, so none is taken")
        found += swaying
    return list(dict.fromkeys(filter(None, found)))


def all_stripped(
    rows: Iterable[Row], columns: Sequence[str], words: Sequence[str], drop: bool
) -> tuple[list[Row], int]:
    """Rows without their openings, and how many are pairs whose answers would become equal: as they were, unless they
    are dropped.

    Raises:
        BadInput: several answers in a column; no row is left.
    """
    made, alike = list[Row](), 0
    for row in rows:
        new = stripped(row, columns, words)
        alike += new is None
        if new is not None or not drop:
            made.append(row | {COLUMN: row.get(COLUMN) or {}} if new is None else new)
    if not made:
        raise BadInput(f"without these openings the answers of all {alike} pairs are equal, so no row is left")
    return made, alike


def stripped(row: Row, columns: Sequence[str], words: Sequence[str]) -> Row | None:
    """A row without its openings, and with the column `stripped`; None for a pair whose answers would become equal.

    Raises:
        BadInput: several answers in a column.
    """
    taken, changed = dict(row.get(COLUMN) or {}), dict(row)
    for name in columns:
        if has_several(row[name]):
            raise BadInput(f"column {name!r} holds several answers: take openings off before `align pairs` joins them")
        if (text := answer_text(row[name])) is not None:
            removed, rest = without(text, words)
            if removed:
                changed[name] = _with_text(row[name], rest)
                taken[name] = (taken.get(name) or "") + removed
    if "chosen" in columns and changed["chosen"] == changed["rejected"]:
        return None
    return changed | {COLUMN: taken}


def undone(row: Row) -> Row:
    """A row as it was before `stripped`."""
    for name, removed in (row.pop(COLUMN) or {}).items():
        if removed:
            row[name] = _with_text(row[name], removed + (answer_text(row[name]) or ""))
    return row


def answer_text(answer: Any) -> str | None:
    """The text of an answer: its own, or its last message's; None where it has none."""
    if isinstance(answer, list) and answer and isinstance(answer[-1], dict):
        answer = answer[-1].get("content")
    return answer if isinstance(answer, str) else None


def _with_text(answer: Any, text: str) -> Any:
    return [*answer[:-1], answer[-1] | {"content": text}] if isinstance(answer, list) else text


def limits(begun: dict[str, float]) -> dict[str, float]:
    """A setting of the recipe's section `limits` to begin with, from the share of answers that begin with a swaying
    opening, by column.

    prob_gate is 1 less the largest share: the more answers begin alike, the earlier a probable token is left alone.
    grad_clamp is the smallest share by the largest (of one column: 1 less its share): the pull of a token is limited in
    the measure in which its source has too much of it.
    """
    most, least = max(begun.values()), min(begun.values())
    clamp = least / most if len(begun) > 1 and most else 1 - most
    return {name: round(min(max(value, low), high), 2)
            for name, value, (low, high) in (("grad_clamp", clamp, CLAMP), ("prob_gate", 1 - most, GATE))}  # fmt: skip


def write(place: folder.ResultFolder, rows: Sequence[Row], columns: Sequence[str], alike: int, drop: bool) -> None:
    """limits.yaml and the reports."""
    counted: dict[str, Counter[str]] = {name: Counter() for name in columns}
    for row in rows:
        counted_in = {name: removed for name, removed in row[COLUMN].items() if removed}
        for name, removed in counted_in.items():
            counted[name][removed.strip()] += 1
    begun = {name: some.total() / len(rows) for name, some in counted.items()}
    suggested = limits(begun)
    with place.written(LIMITS) as path:
        lines = [f"  {name}: {value}" for name, value in suggested.items()]
        path.write_text("\n".join(["limits:", *lines]) + "\n", encoding="utf-8")
    total = sum(counted.values(), Counter())
    tables = [
        Table("Taken off", ("words", *columns), [
            (words, *(counted[name][words] for name in columns)) for words, _ in total.most_common(50)
        ]),
        Table("Limits to begin with", ("setting", "value"), list(suggested.items())),
        Table("Examples", ("taken off", "what stays"), list(_examples(rows))),
    ]  # fmt: skip
    lead = ", ".join(f"{share:.1%} of {name}" for name, share in begun.items())
    facts = {"begun": begun, "limits": suggested, "taken": {name: dict(some) for name, some in counted.items()},
             "alike": alike}  # fmt: skip
    lead = f"Of {len(rows):,} rows, openings were taken off {lead}; --undo puts them back."
    if alike:
        way = "and were left out" if drop else "and stay as they were; --bad_rows drop leaves them out"
        lead += f" Without its opening, {alike:,} more would be pairs of two equal answers, {way}."
    report.write(place, "Answers without their openings", lead, facts, [table for table in tables if table.rows])


def _examples(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """One for each thing that was taken off, ten at most."""
    seen = set()
    for row in rows:
        for name, removed in row[COLUMN].items():
            if removed and removed not in seen and len(seen) < 10:
                seen.add(removed)
                yield removed.strip(), (answer_text(row[name]) or "")[:SHOWN]
