"""What a command says of its result: the same as JSON, as Markdown, and as one page that needs no other file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from align_engine.errors import visible
from align_engine.preparation.folder import ResultFolder
from align_engine.recipe.secrets import masked
from align_engine.reports.parts import table_markdown
from align_engine.reports.report import Figure, Table, page

NAMES = ("report.json", "report.md", "report.html")


def write(
    folder: ResultFolder,
    title: str,
    lead: str,
    facts: dict[str, Any],
    tables: Sequence[Table],
    figures: Sequence[Figure] = (),
    details: Sequence[Table] = (),
) -> None:
    """Write report.json, report.md and report.html of a result. Secrets of addresses are masked.

    Args:
        title, lead: heading and first sentence.
        facts: what report.json holds.
        tables, figures: of the page; the Markdown has the tables.
        details: tables that come folded at the page's end, and last in the Markdown.
    """
    title, lead, facts = masked(title), masked(lead), masked(facts)
    tables, details = ([_masked(table) for table in part] for part in (tables, details))
    save(folder, facts, markdown(title, lead, [*tables, *details]), page(title, lead, tables, figures, details))


def save(folder: ResultFolder, facts: dict[str, Any], *texts: str) -> None:
    """Write report.json, and report.md and report.html of these texts."""
    for name, text in zip(NAMES, (json.dumps(facts, ensure_ascii=False, indent=1) + "\n", *texts)):
        with folder.written(name) as path:
            path.write_text(text, encoding="utf-8")


def markdown(title: str, lead: str, tables: Sequence[Table]) -> str:
    """Heading, first sentence and tables as Markdown."""
    parts = [f"# {title}", lead]
    for table in tables:
        parts += [f"## {table.title}", table_markdown(table)]
    return visible("\n\n".join(parts)) + "\n"


def _masked(table: Table) -> Table:
    return table._replace(rows=masked([list(row) for row in table.rows]))
