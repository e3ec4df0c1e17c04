"""Results of commands, of whatever kind, by their report.json: tables that can stand on another page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from align_engine.data.json_text import loads
from align_engine.errors import BadInput
from align_engine.recipe.names import distinct
from align_engine.reports.report import Table
from align_engine.reports.text import shown
from align_engine.training.checkpoint import RECORD, RunFolder

REPORT = "report.json"
ROWS, COLUMNS, LETTERS, ITEMS = 15, 10, 200, 5  # of a table; characters of a cell; items of a list in a cell
Scalar = (str, int, float, type(None))


class Result(NamedTuple):
    """The folder of a result."""

    path: Path
    command: str  # "" where nobody says
    facts: Any  # what report.json holds
    data: str | None  # the data set that it was made from

    @property
    def title(self) -> str:
        return f"align {self.command}: {self.path.name}" if self.command else self.path.name


def read_result(path: Path) -> Result:
    """The result in a folder.

    Raises:
        BadInput: there is none, or its report is no JSON.
    """
    if not (path / REPORT).is_file():
        raise BadInput(f"{str(path)!r} holds no result: there is no {REPORT} in it")
    try:
        facts = loads((path / REPORT).read_bytes())
    except ValueError as error:
        raise BadInput(f"{path / REPORT} is not readable JSON: {error}") from error
    identity = RunFolder(path, {}).record()["identity"] if (path / RECORD).is_file() else {}
    return Result(path, str(identity.get("command", "")), facts, identity.get("dataset_name"))


def lineage(data: str | None) -> list[Result]:
    """The results that a data set comes from, the first one first: those of the folders that it lies in, and that these
    were made from, as far as they are here."""
    found = list[Result]()
    while data and len(found) < ITEMS * 4:
        place = Path(data).expanduser()
        folder = place if place.is_dir() else place.parent
        known = (folder / REPORT).is_file() and (folder / RECORD).is_file()
        if not known or any(one.path.resolve() == folder.resolve() for one in found):
            break
        found.insert(0, read_result(folder))
        data = found[0].data
    return found


def tables(result: Result) -> list[Table]:
    """What a report.json holds: single values first, then a table for each list of objects."""
    facts = result.facts if isinstance(result.facts, dict) else {"values": result.facts}
    single = [(words(name), _cell(value)) for name, value in facts.items() if _fits(value)]
    found = [Table("Figures", ("what", "value"), single)] if single else []
    for name, value in facts.items():
        if not _fits(value) and (rows := _objects(value)):
            found.append(_table(words(name), rows))
    return found


def comparison(results: Sequence[Result]) -> Table:
    """The numbers of several results of one command, side by side."""
    names = distinct([one.path.absolute().parts for one in results])
    numbers = [dict(_numbers(one.facts)) for one in results]
    keys = [key for key in dict.fromkeys(key for one in numbers for key in one)]
    lines = [(key, *(one.get(key, "-") for one in numbers)) for key in keys[:60]]
    return Table(f"align {results[0].command} side by side", ("figure", *names), lines)


def words(name: str) -> str:
    """A key of JSON as a heading."""
    return name.replace("_", " ")


def _fits(value: Any) -> bool:
    """Whether a value fits into a cell."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(one, Scalar) for one in value)
    return isinstance(value, Scalar)


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        more = f" and {len(value) - ITEMS} more" if len(value) > ITEMS else ""
        return shown(" / ".join(str(_cell(one)) for one in value[:ITEMS]), LETTERS) + more
    if value is None:
        return "-"
    return shown(value, LETTERS) if isinstance(value, str) else value


def _objects(value: Any) -> list[dict[str, Any]]:
    """A list of objects, or an object as one: of objects by their keys, or of values."""
    if isinstance(value, list):
        return [one for one in value if isinstance(one, dict)]
    if not isinstance(value, dict):
        return []
    return [{"": key} | (one if isinstance(one, dict) else {"value": one}) for key, one in value.items()]


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    columns = [key for key in dict.fromkeys(key for row in rows for key in row)
               if any(_fits(row.get(key)) and row.get(key) is not None for row in rows)][:COLUMNS]  # fmt: skip
    first = f" (the first {ROWS} of {len(rows):,})" if len(rows) > ROWS else ""
    lines = [[_cell(row[key]) if _fits(row.get(key)) else "-" for key in columns] for row in rows[:ROWS]]
    return Table(f"{title}{first}", [words(key) for key in columns], lines)


def _numbers(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """(where, number) of every number; objects in a list are named by their first text."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield place, value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _numbers(one, f"{place} {words(key)}".strip())
    elif isinstance(value, list):
        for i, one in enumerate(value):
            label = next((text for text in one.values() if isinstance(text, str)), i) if isinstance(one, dict) else i
            yield from _numbers(one, f"{place} {label}".strip()) if isinstance(one, dict) else ()
