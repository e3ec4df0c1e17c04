"""Who imports whom: rooms (files and folders of a package's first level), arrows between them, and circles of modules.

    python tests/helpers/imports.py [ROOT]

ROOT is a checkout of this repository (default: this one). Imports inside functions and under TYPE_CHECKING count.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
Arrows = dict[str, set[str]]  # importer -> what it imports


def modules(package: Path) -> dict[str, Path]:
    """Every module of a package by its full name."""
    found = {}
    for file in sorted([*package.rglob("*.py"), *package.rglob("*.pyi")]):
        parts = file.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(file: Path) -> set[str]:
    """Full names of everything that a file imports; of `from a import b` it is `a.b`.

    Raises:
        ValueError: a relative import.
    """
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{file}, line {node.lineno}: a relative import")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def arrows(package: Path) -> Arrows:
    """Of each module, the modules of its package that it imports by name."""
    known = modules(package)
    found: Arrows = {}
    for name, file in known.items():
        targets = {t if t in known else t.rpartition(".")[0] for t in imported(file)}
        found[name] = (targets & known.keys()) - {name}
    compiled = {name for name, file in known.items() if file.suffix == ".pyi"}
    return {name: targets - compiled for name, targets in found.items() if name not in compiled}


def rooms(found: Arrows) -> Arrows:
    """The same between the files and folders of the first level; "" is the package's own file, where it has imports."""
    levels: Arrows = {}
    for name, targets in found.items():
        here = room(name)
        levels.setdefault(here, set()).update({room(target) for target in targets} - {here})
    if not levels.get(""):
        levels.pop("", None)
    return levels


def room(module: str) -> str:
    """The first level below the package; a `python -m` stands apart, as it is imported by nobody."""
    return "__main__" if module.endswith(".__main__") else module.partition(".")[2].partition(".")[0]


def circles(found: Arrows) -> list[list[str]]:
    """Sets of modules that reach each other, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    made: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in sorted(found.get(name, ())):
            if target not in index:
                visit(target)
            if target in stack:
                low[name] = min(low[name], low[target])
        if low[name] == index[name]:
            place = stack.index(name)
            part = stack[place:]
            del stack[place:]
            if len(part) > 1:
                made.append(sorted(part))

    for name in sorted(found):
        if name not in index:
            visit(name)
    return made


def main(root: Path) -> None:
    for package in (root / "align_engine", root / "kernels" / "align_kernels"):
        found = arrows(package)
        levels = rooms(found)
        print(f"{package.name}: {len(levels)} rooms, {sum(map(len, levels.values()))} arrows")
        for circle in circles(found):
            print(f"  circle of modules: {', '.join(circle)}")
        for circle in circles(levels):
            print(f"  circle of rooms: {', '.join(circle)}")
        for name, targets in sorted(levels.items(), key=lambda pair: -len(pair[1])):
            print(f"  {name} -> {', '.join(sorted(targets)) or 'nothing'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
