"""Recipes and examples that come with the package: beside it in a checkout, inside it where it is installed."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from align_engine.errors import BadInput

INSIDE = "shipped"  # folder that setup.py lays into the package


def folder(name: str) -> Path:
    """The folder `recipes` or `examples`."""
    package = Path(__file__).parents[1]
    inside = package / INSIDE
    return (inside if inside.is_dir() else package.parent) / name


def recipes() -> dict[str, Path]:
    """The recipes by their names, which end in the command that reads them."""
    return {path.stem: path for path in sorted(folder("recipes").glob("*.yaml"))}


def find(place: str | Path) -> Path:
    """The file of a recipe: `place` itself where it is there, else the recipe that comes with the package under that
    name, with or without `recipes/` before it and `.yaml` behind.

    Raises:
        BadInput: neither, with the nearest name.
    """
    known = recipes()
    if os.path.exists(place):  # False for a path that the system cannot look at
        return Path(place)
    name = str(place).removeprefix("recipes/").removesuffix(".yaml")
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean `{close[0]}`?" if close else "`align recipes` lists those that come with the package"
    raise BadInput(f"recipe {place}: No such file or recipe; {hint}")


def summary(path: Path) -> str:
    """The first line of the comment that a recipe begins with."""
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
