"""The folder of a run: what lies in it, and how nothing in it is ever half written.

    run.json              what the run is: algorithm, recipe, data, number of processes; and whether it has finished
    recipe.yaml           the whole recipe, as `--recipe` reads it
    metrics.jsonl         one line per logged step
    reference-*.safetensors   log-probs of a precomputed reference
    checkpoint-000050/    everything needed to go on after step 50
    final/                the trained model and its tokenizer
    report.html, plots/   the curves
    marks/                completions for people to score
    round-1/              samples, pairs and model of a round (see align_engine.iterate)

Folders and files are written under a name that ends in `.tmp`, flushed to the disk and renamed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from align_engine.errors import BadInput, RunFailed

OWN = ("run.json", "recipe.yaml", "metrics.jsonl", "reference-*", "checkpoint-*", "final*", "report.html", "plots",
       "round-*", "marks")  # fmt: skip


class RunFolder:
    """One output folder.

    Args:
        path: the folder; made when the run begins.
        identity: whatever must be equal for a later call to be the same run, as a flat dict of JSON values.
    """

    def __init__(self, path: str | Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = Path(path), identity
        self.metrics, self.final = self.path / "metrics.jsonl", self.path / "final"

    def finished(self, overwrite: bool) -> bool:
        """Whether the folder holds this run already, finished. Changes nothing.

        Raises:
            BadInput: the folder holds foreign files, or another run, naming what differs; not with `overwrite`.
        """
        if self.path.is_file():
            raise BadInput(f"output_dir = {str(self.path)!r} is a file")
        names = sorted(entry.name for entry in self.path.iterdir()) if self.path.exists() else []
        if overwrite or not names:
            return False
        if "run.json" not in names:
            raise BadInput(
                f"output_dir = {str(self.path)!r} holds files that are no run of ours ({', '.join(names[:3])}"
                f"{', ...' if len(names) > 3 else ''}); give an empty or new folder"
            )
        held, mine = json.loads((self.path / "run.json").read_text()), json.loads(json.dumps(self.identity))
        there = {name: value for name, value in held["identity"].items() if name in mine}
        changed = [f"{name}: {was!r} there, {mine[name]!r} now" for name, was in there.items() if was != mine[name]]
        if changed:
            raise BadInput(
                f"output_dir = {str(self.path)!r} holds another run ({'; '.join(changed)}); give another folder, or "
                "--overwrite to delete that run"
            )
        return held["finished"]

    def begin(self, facts: dict[str, Any], overwrite: bool) -> None:
        """Make the folder, or check that `facts` (found while loading, e.g. the data's hash) still hold in it.

        Raises:
            BadInput: as `finished`.
        """
        self.identity |= facts
        new = overwrite or not (self.path / "run.json").exists()
        if not new:
            self.finished(overwrite=False)
        for pattern in OWN if overwrite else ("*.tmp",):
            for entry in self.path.glob(pattern):
                remove(entry)
        if new:
            self.path.mkdir(parents=True, exist_ok=True)
            self.mark(finished=False)

    def mark(self, finished: bool) -> None:
        """Say of the run what it is, and whether it has finished."""
        with self.written("run.json") as path:
            path.write_text(json.dumps({"finished": finished, "identity": self.identity}, indent=2))

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self.path.glob("checkpoint-*") if path.suffix != ".tmp")

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of a step."""
        return self.path / f"checkpoint-{step:06d}"

    def keep(self, limit: int | None, best: int | None = None) -> None:
        """Delete all but the latest `limit` checkpoints and the one of step `best`."""
        for path in self.checkpoints()[:-limit] if limit else []:
            if best is None or path != self.checkpoint(best):
                shutil.rmtree(path)

    @contextlib.contextmanager
    def written(self, name: str) -> Iterator[Path]:
        """A path to write a file or a folder to; afterwards it bears `name`, whole and on the disk, or not at all.

        Raises:
            RunFailed: the disk is full or refuses; what bore `name` before is untouched.
        """
        target, side = self.path / name, self.path / f"{name}.tmp"
        remove(side)
        try:
            yield side
            settle(side, target)
        except Exception as error:
            reason = refusal(error)
            if reason is None:
                raise
            remove(side)
            left = [path.name for path in self.checkpoints()]
            raise RunFailed(
                f"cannot write {target}: {reason}. Nothing earlier was touched"
                + (f"; the last checkpoint is {left[-1]}. " if left else ". ")
                + "Make room and run the same command again: it goes on from there"
            ) from error

    def write_rows(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Write a file with one JSON object per line."""
        with self.written(name) as path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def truncate_metrics(self, step: int, *more: dict[str, Any]) -> None:
        """Drop the lines after `step` (and a last line cut by a crash), and add others."""
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        self.write_rows("metrics.jsonl", [*(row for row in rows if row["step"] <= step), *more])


def refusal(error: Exception) -> str | None:
    """What the disk said, None for another error: torch.save and safetensors wrap it in errors of their own."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    marks = ("SafetensorError", "PytorchStreamWriter", "unexpected pos", "No space left", "I/O error", "File too large")
    ours = isinstance(error, OSError) or any(mark in f"{type(error).__name__} {error}" for mark in marks)
    return str(error).splitlines()[0] if ours else None


def remove(path: Path) -> None:
    """Delete a file or folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def settle(side: Path, target: Path) -> None:
    """Flush what lies at `side` to the disk and give it the name `target`."""
    for path in [*side.rglob("*"), side]:
        _sync(path)
    old = target.with_name(f"{target.name}.old.tmp")
    if target.is_dir():  # a folder that holds something cannot be replaced
        remove(old)
        os.replace(target, old)
    os.replace(side, target)
    remove(old)
    _sync(target.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
