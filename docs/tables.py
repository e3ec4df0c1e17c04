"""Fills the tables of docs/ that say what the code says: settings with their defaults, ranges and help; and what
benches/results/bench.json says.

python docs/tables.py            # writes what has changed between the marks <!-- table NAME --> and <!-- end -->
python docs/tables.py --check    # exit code 1 where a page is behind the code
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import griffe

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent / folder) for folder in ("", "kernels", "benches")]

import figures  # noqa: E402

from align_engine.preparation import PREPARATION  # noqa: E402
from align_engine.recipe import RECIPES, fields, flat  # noqa: E402
from align_engine.recipe.values import Field  # noqa: E402
from align_engine.reports import legend  # noqa: E402

REGION = re.compile(r"(<!-- table ([\w -]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
LONGEST = 300  # characters of a cell
SHARED = ("model", "data", "train", "eval", "output", "kernels", "limits", "rollout", "kl", "iteration")


def cell(text: Any) -> str:
    """One cell of a table."""
    return " ".join(str(text).split()).replace("|", r"\|").replace("<", "&lt;")


def table(header: tuple[str, ...], rows: Iterator[tuple[Any, ...]]) -> str:
    lines = ["| " + " | ".join(map(cell, row)) + " |" for row in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:], ""])


def taken(field: Field) -> str:
    """What a setting takes: its choices, its range, or its type."""
    if get_origin(field.kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(field.kind))
    if field.kind is bool:
        return "switch"
    kind = "list" if field.is_list else {int: "whole number", float: "number", str: "text"}[field.kind]
    limits = field.range
    return kind if limits is None or limits.interval == "(-inf, inf)" else f"{kind} in {limits.interval}"


def shown(default: Any) -> str:
    """A default as a recipe has it."""
    if isinstance(default, list):
        return ", ".join(map(str, default))
    return {"None": "none", "True": "true", "False": "false"}.get(str(default), str(default))


@functools.cache
def source(module: str) -> Any:
    return griffe.load(module)


def helps(section: Any) -> dict[str, str]:
    """The help of each field of a section: the text below it in the source, its own or its parents'."""
    found: dict[str, str] = {}
    for kind in reversed(type(section).__mro__[:-1]):
        attributes = source(kind.__module__)[kind.__name__].attributes
        found |= {name: one.docstring.value for name, one in attributes.items() if one.docstring}
    return found


def brief(text: str) -> str:
    """A help that fits a cell: the first sentence of a long one; `align METHOD --help` has it whole."""
    return text if len(text) <= LONGEST else f"{text.partition('. ')[0]}."


def settings(section: Any, kind: Any) -> str:
    """The settings of a section, its own before those that it shares with others."""
    said, known, own = helps(section), fields(kind), vars(type(section))["__annotations__"]
    order = sorted(vars(section).items(), key=lambda item: item[0] not in own)
    rows = ((f"`{name}`", shown(value), taken(known[name][1]), brief(said[name])) for name, value in order)
    return table(("setting", "default", "takes", "meaning"), rows)


def of_method(name: str) -> str:
    """The settings of a method's loss."""
    recipe: Any = RECIPES[name]()
    return settings(recipe.loss, RECIPES[name])


def of_section(name: str) -> str:
    """A section that several methods share."""
    return settings(*first_with(name))


def of_command(name: str) -> str:
    """The settings of a command that prepares data, without those of its input and result."""
    kind: Any = PREPARATION[name]
    sections = [section for part, section in vars(kind()).items() if part not in ("data", "output")]
    header, *rest = (settings(section, kind).splitlines() for section in sections)
    return "\n".join([*header, *(line for lines in rest for line in lines[2:]), ""])


def differing() -> str:
    """Settings of shared sections whose default depends on the method."""
    defaults = {name: flat(kind()) for name, kind in RECIPES.items()}
    rows = []
    for field in dict.fromkeys(name for section in SHARED for name in vars(first_with(section)[0])):
        by_value: dict[str, list[str]] = {}
        for name, values in defaults.items():
            if field in values:
                by_value.setdefault(shown(values[field]), []).append(name)
        if len(by_value) > 1:
            rows.append((f"`{field}`", "; ".join(f"{value}: {', '.join(names)}" for value, names in by_value.items())))
    return table(("setting", "default"), iter(rows))


def first_with(name: str) -> tuple[Any, Any]:
    """A section as the first recipe has it that has one of its name, and that recipe's class."""
    return next((getattr(kind(), name), kind) for kind in RECIPES.values() if hasattr(kind(), name))


TABLES: dict[str, Callable[[], str]] = {
    **{f"loss {name}": lambda name=name: of_method(name) for name in RECIPES if hasattr(RECIPES[name](), "loss")},
    **{f"section {name}": lambda name=name: of_section(name) for name in SHARED},
    **{f"command {name}": lambda name=name: of_command(name) for name in PREPARATION},
    "input of commands": lambda: settings(PREPARATION["pairs"]().data, PREPARATION["pairs"]),
    "result of commands": lambda: settings(PREPARATION["pairs"]().output, PREPARATION["pairs"]),
    "differing defaults": differing,
    "bench about": figures.about,
    **{f"bench {what}": lambda what=what: figures.over_ours(what) for what in figures.WHATS},
    "bench in short": figures.in_short,
    "bench everything": figures.everything,
    "metrics": lambda: legend.markdown().replace("<", "&lt;") + "\n",
}


def filled(text: str) -> str:
    """A page with each of its tables as the code has it now."""
    return REGION.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}{found[4]}", text)


def main(check: bool) -> int:
    pages = [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))]
    behind = {page: new for page in pages if (new := filled(page.read_text())) != page.read_text()}
    for page, new in behind.items():
        if check:
            print(f"{page.relative_to(DOCS.parent)} is behind the code or the figures: python docs/tables.py")
        else:
            page.write_text(new)
    return int(check and bool(behind))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    sys.exit(main(parser.parse_args().check))
