"""The folder of a result: rows in, rows out, written whole or not at all.

run.json          what made it, whether it is finished, and the list of its files
recipe.yaml       the settings, as `--recipe` reads them
rows.jsonl        the result
report.json, report.md, report.html
_journal.jsonl    what a command that takes long has done so far
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets

from align_engine import recipe as recipes
from align_engine.data.fingerprint import content_hash
from align_engine.data.json_text import loads
from align_engine.data.sources import Origin, load_rows
from align_engine.errors import BadInput, printable, shortened
from align_engine.preparation.sections import InputSection
from align_engine.training import stops
from align_engine.training.checkpoint import RunFolder

ROWS, JOURNAL = "rows.jsonl", "_journal.jsonl"
STANDING = "the same command goes on from there"
SHOWN = 3  # rows of a dry run
FREE = ("dry_run", "bad_rows", "server_concurrency", "request_timeout")  # settings that do not change whole results


def read(section: InputSection) -> datasets.Dataset:
    """The rows of a command. Raises BadInput as `load_rows` does."""
    datasets.disable_progress_bars()
    return load_rows(section.dataset_name, section.dataset_train_split, section.dataset_config)


def origin(section: InputSection) -> Origin:
    """Where the rows of a command come from."""
    return Origin(section.dataset_name, section.dataset_train_split)


def dry(rows: Iterable[dict[str, Any]], count: int = SHOWN) -> None:
    """Print the first rows, as they would be written."""
    for row, _ in zip(rows, range(count)):
        print(printable(shortened(json.dumps(row, ensure_ascii=False, indent=1))))


class ResultFolder(RunFolder):
    """The folder of one command's result."""

    product = ROWS

    def standing(self) -> str:
        begun = any(name.startswith("_") for name in self.record()["files"])
        return STANDING if begun else "the same command starts afresh"

    def _standing_quietly(self) -> str:
        return self.standing()

    def write_rows(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Write a file with one JSON object per line, in UTF-8."""
        with self.written(name) as path, path.open("wb") as file:
            file.writelines(map(_line, rows))

    def journal(self, name: str = JOURNAL) -> Journal:
        """What has been done so far; more can be added."""
        return Journal(self.growing(name), self)

    def growing(self, name: str) -> Path:
        """A file of the result that its command writes bit by bit, and knows how to go on with."""
        self._list({name: 0})
        return self.path / name


class Journal:
    """A file of JSON lines that grows: a line is in it whole or not at all, whenever the process is killed.

    Args:
        path: of the file; a last line that was cut is taken out of it.
        folder: says what the disk refuses.
    Attributes:
        rows: what it held when it was opened.
    Raises:
        BadInput: a line in its middle is damaged.
    """

    def __init__(self, path: Path, folder: ResultFolder) -> None:
        self.path, self.folder = path, folder
        self.rows: list[dict[str, Any]] = []
        whole = 0
        for number, text in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else (), 1):
            if not text.endswith(b"\n"):
                break
            try:
                self.rows.append(loads(text))
            except ValueError as error:
                raise BadInput(f"{path} line {number} is damaged: delete that line, and the rest stays") from error
            whole += len(text)
        self.file, self.size = open(path, "ab", buffering=0), whole
        self.file.truncate(whole)

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write rows at its end. Raises RunFailed where the disk is full or refuses."""
        data = b"".join(map(_line, rows))
        try:
            written = 0
            while written < len(data):
                written += self.file.write(data[written:]) or 0
        except BaseException as error:
            self.file.truncate(self.size)  # half a line must not come before others
            if isinstance(error, OSError):
                raise self.folder._failure(self.path, error) from error
            raise
        self.size += len(data)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        """Flush it to the disk."""
        os.fsync(self.file.fileno())
        self.file.close()


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()


@contextlib.contextmanager
def opened(
    name: str,
    settings: Any,
    rows: datasets.Dataset | None,
    facts: dict[str, Any] | None = None,
    product: str = ROWS,
    extent: tuple[str, ...] = ("models",),
) -> Iterator[ResultFolder | None]:
    """The folder of a command's result, inside the block this process's alone; None where it holds the result already,
    which is said. At the block's end the result is finished.

    Args:
        settings: with a section `output` of ResultSection.
        rows: what the command reads (None: no rows), and
        facts: what else decides its result, beside the settings.
        product: the file or folder without which the result is made again.
        extent: settings and facts that a later call may change, to go on from there.
    Raises:
        BadInput: the folder holds something else, or is in use. Stopped: a KeyboardInterrupt ended the block.
    """
    chosen = {field: value for field, value in recipes.identity(settings).items() if field not in FREE}
    identity = {"command": name, **chosen, "rows": rows and content_hash(rows)} | (facts or {})
    folder = ResultFolder(settings.output.output_dir, identity)
    folder.product, folder.extent = product, extent
    overwrite = settings.output.overwrite
    with folder.locked():
        if folder.finished(overwrite):
            print(f"{folder.path} holds this result, finished: nothing to do")
            yield None
            return
        folder.begin({}, overwrite)
        with folder.written("recipe.yaml") as path:
            recipes.save(settings, path)
        try:
            yield folder
        except KeyboardInterrupt as error:
            raise stops.Stopped(f"stopped; {folder.standing()}") from error
        folder.mark(finished=True)
