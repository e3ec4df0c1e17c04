"""Results of commands, of whatever kind, as their report.md and report.json tell them: for another page to show."""

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
TABLES, ROWS, COLUMNS = 3, 15, 10  # of a result, and of a table
LETTERS, ITEMS = 300, 5  # characters of a cell; items of a list in it
FAR = 20  # results in a row that data may come from
Scalar = (str, int, float, type(None))


class Result(NamedTuple):
    """The folder of a result."""

    path: Path
    command: str  # "" where nobody says
    facts: Any  # what report.json holds
    data: str | None  # the data set that it was made from
    lead: str  # the first sentences of report.md
    tables: list[Table]  # its first ones; without a report.md those that report.json makes

    @property
    def title(self) -> str:
        """Its folder and its command."""
        return f"{self.path.name} (align {self.command})" if self.command else self.path.name


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
    text = path / "report.md"
    lead, tables = told(text.read_text(encoding="utf-8", errors="replace")) if text.is_file() else ("", by_keys(facts))
    command, data = str(identity.get("command", "")), identity.get("dataset_name")
    return Result(path, command, facts, data, lead, tables[:TABLES])


def lineage(data: str | None) -> list[Result]:
    """The results that a data set comes from, the first one first: those of the folders that it lies in, and that these
    were made from, as far as they are here."""
    found = list[Result]()
    while data and len(found) < FAR:
        place = Path(data).expanduser()
        folder = place if place.is_dir() else place.parent
        known = (folder / REPORT).is_file() and (folder / RECORD).is_file()
        if not known or any(one.path.resolve() == folder.resolve() for one in found):
            break
        found.insert(0, read_result(folder))
        data = found[0].data
    return found


def told(text: str) -> tuple[str, list[Table]]:
    """The first paragraph and the tables of Markdown, each under its heading."""
    from markdown_it import MarkdownIt

    lead, title, rows, found = "", "", list[list[str]](), list[Table]()
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for before, token in zip([None, *tokens], tokens):
        if token.type == "inline" and before is not None:
            content = token.content.replace("<br>", "\n")
            if before.type == "heading_open":
                title = content
            elif before.type == "paragraph_open":
                lead = lead or content
            elif before.type in ("th_open", "td_open"):
                rows[-1].append(shown(content, LETTERS))
        elif token.type in ("table_open", "tr_open"):
            rows = [] if token.type == "table_open" else [*rows, []]
        elif token.type == "table_close":
            found.append(_first(title, rows[0], rows[1:]))
    return lead, found


def _first(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """A table of the first rows, and how many there are."""
    more = f" (the first {ROWS} of {len(rows):,})" if len(rows) > ROWS else ""
    return Table(f"{title}{more}", header, rows[:ROWS])


def by_keys(facts: Any) -> list[Table]:
    """What JSON holds: single values first, then a table for each list of objects."""
    facts = facts if isinstance(facts, dict) else {"values": facts}
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
    lines = [[_cell(row[key]) if _fits(row.get(key)) else "-" for key in columns] for row in rows]
    return _first(title, [words(key) for key in columns], lines)


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
