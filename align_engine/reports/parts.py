"""A page of several parts, each with its tables, curves and answers, and the same as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from align_engine.errors import visible
from align_engine.reports.curves import Curve, Told
from align_engine.reports.report import Table, number, templates
from align_engine.reports.text import fenced, shown


class Said(NamedTuple):
    """An answer."""

    who: str
    text: str
    note: str = ""  # its score, ...


class Beside(NamedTuple):
    """Answers to one prompt, to be read side by side."""

    prompt: str
    answers: Sequence[Said]

    @property
    def cards(self) -> list[Said]:
        """The answers as they are shown; one that repeats an earlier one says so."""
        found, first = list[Said](), dict[str, str]()
        for one in self.answers:
            same = first.setdefault(one.text, one.who)
            note = one.note if same == one.who else ", ".join(filter(None, (one.note, f"the same as {same}")))
            found.append(Said(one.who, shown(one.text), note))
        return found


class Part(NamedTuple):
    """Part of a page."""

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Curve] = ()
    beside: Sequence[Beside] = ()
    folded: bool = False


def whole_page(title: str, lead: str, parts: Sequence[Part]) -> str:
    """An HTML page that needs no other file."""
    return templates().get_template("parts.html.jinja").render(title=title, lead=lead, parts=parts)


def markdown(title: str, lead: str, parts: Sequence[Part]) -> str:
    """The same, without its pictures, as Markdown."""
    blocks = [f"# {title}", lead]
    for part in parts:
        blocks += [f"## {part.title}", part.text]
        for table in part.tables:
            blocks += [f"### {table.title}" * (table.title != part.title), table_markdown(table)]
        for figure in part.figures:
            lines = [
                (f"- **{told.metric}**: {told.says}", *(f"  - {one}" for one in told.courses)) for told in figure.told
            ]
            blocks += [f"### {figure.title}", "\n".join(text for part in lines for text in part)]
        for count, one in enumerate(part.beside, 1):
            blocks += [f"### Prompt {count}", fenced(shown(one.prompt))]
            for card in one.cards:
                blocks += [f"**{cell(card.who)}**{f' ({cell(card.note)})' if card.note else ''}", fenced(card.text)]
    return visible("\n\n".join(filter(None, blocks))) + "\n"


def _told(told: Told) -> list[str]:
    return [f"- **{told.metric}**: {told.says}", *(f"  - {course}" for course in told.courses)]


def table_markdown(table: Table) -> str:
    """A table as Markdown."""
    rows = [[cell(value) for value in row] for row in (table.header, *table.rows)]
    rows.insert(1, ["---" if table.prose or words else "---:" for words in table.words])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cell(value: Any) -> str:
    """A value inside a line of Markdown."""
    return number(value).replace("|", "\\|").replace("\r", "").replace("\n", "<br>")
