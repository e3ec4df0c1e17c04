"""README and the pages of docs/: their fenced blocks, and the commands in these."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CURRENT = [path for path in PAGES if path.name != "LOG.md"]  # the log speaks of files as they were
FENCE = re.compile(r"^( *)```(\w*)([^\n]*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
TITLE = re.compile(r'title="([^"]+)"')
COMMAND = re.compile(r"(?:\w+=\S+ |printf .* \| )*(?:align|(?:torchrun|accelerate launch) .*-m align_engine)\s+(.*)")


class Block(NamedTuple):
    """What stands between two fences."""

    language: str
    title: str  # of a file that the reader is to have; "" of none
    code: str
    line: int


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """Those of a page, in their order."""
    text = page.read_text()
    found = []
    for fence in FENCE.finditer(text):
        titled = TITLE.search(fence[3])
        found.append(Block(fence[2], titled[1] if titled else "", fence[4], text.count("\n", 0, fence.start()) + 1))
    return found


def lines(code: str) -> Iterator[str]:
    """The lines of a block of commands, those that go on with a backslash joined, without comments."""
    for line in code.replace("\\\n", " ").splitlines():
        if words := re.split(r"(?:^| )#", line)[0].strip():
            yield words


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """What is given to `align` in a page's blocks: (folder that was entered, [command, flag, value, ...]). `...` stands
    for what was left out."""
    found = []
    for block in blocks(page):
        folder = ""
        for line in lines(block.code) if block.language == "bash" else ():
            if line.startswith("cd "):
                folder = line.removeprefix("cd ")
            if command := COMMAND.match(line):
                found.append((folder, [word for word in shlex.split(command[1]) if word != "..."]))
    return found


def write_files(page: Path, folder: Path) -> None:
    """The files that a page has the reader make."""
    for block in blocks(page):
        if block.title:
            (folder / block.title).write_text(block.code)
