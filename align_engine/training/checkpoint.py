"""The folder of a run: what lies in it, and how nothing in it is ever half written, and nothing of anybody else's lost.

    run.json              what the run is (algorithm, recipe, models, data), whether it has finished, and the list of
                          all files that it has written
    recipe.yaml           the whole recipe, as `--recipe` reads it
    metrics.jsonl         one line per logged step
    samples.jsonl         of an online method: some completions of each logged step, with their rewards
    reference-*.safetensors   log-probs of a precomputed reference
    checkpoint-000050/    everything needed to go on after step 50
    final/                the trained model and its tokenizer
    report.html, plots/   the curves
    marks/                completions for people to score
    round-1/              samples, pairs and model of a round (see align_engine.iterate)

Folders and files are written beside their place, under a name that ends in `.align-tmp`, flushed to the disk and
renamed.
Only files on the list are ever replaced or deleted.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_engine.data.json_text import loads
from align_engine.errors import BadInput, RunFailed
from align_engine.models.fingerprint import of_file
from align_engine.recipe import ALIASES
from align_engine.training.metrics import line

if TYPE_CHECKING:
    from filelock import BaseFileLock

RECORD, SIDE = "run.json", ".align-tmp"
LOCK, LIST_LOCK = ".align.lock", ".align-list.lock"  # of the folder, for a run; of the record, for a change by one rank
EXTENT = ("max_steps", "num_train_epochs", "steps")  # how long a run goes on: a later call may say more
CHECKPOINT = re.compile(r"checkpoint-(\d{6,})")
MARKS = "marks"  # filled in by people


class RunFolder:
    """One output folder.

    Args:
        path: the folder; made when the run begins.
        identity: whatever must be equal for a later call to be the same run, as a flat dict of JSON values.
    """

    product = "final"  # the file or folder that a finished run has made
    extent: tuple[str, ...] = EXTENT  # parts of the identity that a later call may change, to go on from there

    def __init__(self, path: str | Path, identity: dict[str, Any]) -> None:
        # other people's code may change the current folder while the run goes on
        self.path, self.identity = Path(path).absolute(), identity
        self.metrics, self.final = self.path / "metrics.jsonl", self.path / "final"

    # what the folder holds

    def record(self) -> dict[str, Any]:
        """What run.json says: "finished", "identity", "files": a dict from path to the size as it was written (of a run
        inside this one, whose name ends in "/", 0), and "folders": a dict from a folder to a hash of what was written.

        Raises:
            BadInput: it is damaged, or no record of a run.
        """
        path = self.path / RECORD
        if not path.exists():
            return {"finished": False, "identity": {}, "files": {}, "folders": {}}
        try:
            held = loads(path.read_text(encoding="utf-8"))
            folders = held.get("folders", {})
            if not all(isinstance(one, dict) for one in (held["files"], held["identity"], folders)):
                raise ValueError
            if any(name.startswith("/") or ".." in Path(name).parts for name in held["files"]):
                raise ValueError  # what is on the list may be deleted: it lies inside
            finished = bool(held["finished"])
            return {"finished": finished, "identity": held["identity"], "files": held["files"], "folders": folders}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(
                f"{path} is not a record of a run that this version can read, so the run cannot go on there; give "
                "another output_dir, or move this folder away"
            ) from error

    def finished(self, overwrite: bool) -> bool:
        """Whether the folder holds this run already, finished. Changes nothing.

        Raises:
            BadInput: the folder holds foreign files, or another run, naming what differs (with `overwrite` that may
                be, but for files of somebody else's inside the run's own folders).
        """
        if self.path.exists() and not self.path.is_dir():
            raise BadInput(f"output_dir = {str(self.path)!r} is a file; give a folder")
        try:
            entries = self.path.iterdir() if self.path.exists() else ()
            names = sorted({entry.name for entry in entries if not _prepared(entry)} - {LOCK, LIST_LOCK})
        except OSError as error:
            raise BadInput(f"output_dir = {str(self.path)!r} cannot be read: {error.strerror}") from error
        if not names:
            return False
        if RECORD not in names:
            raise BadInput(
                f"output_dir = {str(self.path)!r} holds files that are no run of ours ({', '.join(names[:3])}"
                f"{', ...' if len(names) > 3 else ''}); give an empty or new folder"
            )
        held = self.record()
        if overwrite:
            self._check_deletable()
            return False
        self._check_identity(held["identity"])
        now = {name: self.identity[name] for name in self.extent if name in self.identity}
        extended = any(held["identity"].get(name) != value for name, value in now.items())
        return held["finished"] and not extended and not self._damaged(self.product)

    def _check_identity(self, held: dict[str, Any]) -> None:
        mine = json.loads(json.dumps(self.identity))
        there = {name: value for name, value in held.items() if name in mine and name not in self.extent}
        if "algorithm" in there:
            there["algorithm"] = ALIASES.get(there["algorithm"], there["algorithm"])
        changed = [f"{name}: {was!r} there, {mine[name]!r} now" for name, was in there.items() if was != mine[name]]
        if changed:
            raise BadInput(
                f"output_dir = {str(self.path)!r} holds another run ({'; '.join(changed)}); give another folder, or "
                "--overwrite to delete that run"
            )

    def _check_deletable(self) -> None:
        """Refuse to delete what people have put into the run's own folders."""
        if strays := self._strays():
            raise BadInput(
                f"--overwrite would delete {strays[0]}, which this run did not write"
                f"{f' (nor {len(strays) - 1} more files)' if len(strays) > 1 else ''}: move it away first"
            )
        for path in sorted((self.path / MARKS).glob("*.jsonl")):
            if re.search(r'"score": *[^n\s]', path.read_text(encoding="utf-8", errors="replace")):
                raise BadInput(f"--overwrite would delete {path}, where people have put marks: move it away first")

    def _strays(self) -> list[Path]:
        """Files inside the run's own folders that are not on its list."""
        files = self.record()["files"]
        nested = [self.path / name for name in files if name.endswith("/")]
        own = {self.path / name for name in files}
        found = [path for part in nested for path in RunFolder(part, {})._strays()]
        for top in sorted({name.partition("/")[0] for name in files if "/" in name}):
            if self._replaced(top):
                found.append(self.path / top)
                continue
            for path in _files(self.path / top):
                if path not in own and not path.name.endswith(SIDE) and not any(one in path.parents for one in nested):
                    found.append(path)
        return found

    def _damaged(self, name: str) -> str | None:
        """What is wrong with a file or folder of ours, None where all of it is there in its size."""
        files = self.record()["files"].items()
        listed = {path: size for path, size in files if path == name or path.startswith(f"{name}/")}
        for path, size in listed.items():
            place = self.path / path
            if not place.is_file():
                return f"{path} is missing"
            if place.stat().st_size != size:
                return f"{path} has {place.stat().st_size} bytes, but {size} were written"
        return None if listed else f"{name} is missing"

    # the life of a run

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Inside the block this process alone works in the folder, which is made where there is none.

        Raises:
            BadInput: another process does, or the folder cannot be written to.
        """
        from filelock import FileLock, Timeout

        new = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / LOCK)
            lock.acquire(timeout=0)
        except Timeout as error:
            raise BadInput(
                f"output_dir = {str(self.path)!r} is in use by another run; wait for its end, or give another folder"
            ) from error
        except (OSError, NotImplementedError) as error:
            reason = getattr(error, "strerror", None) or error
            raise BadInput(f"output_dir = {str(self.path)!r} cannot be written to: {reason}") from error
        began = (self.path / RECORD).exists()
        try:
            yield
        except BadInput:
            if not began and self.record()["files"].keys() <= {"recipe.yaml"}:
                self.delete()  # refused before anything was computed
            raise
        finally:
            if not (self.path / RECORD).exists():  # refused before it began: leave things as they were
                (self.path / LOCK).unlink(missing_ok=True)
                (self.path / LIST_LOCK).unlink(missing_ok=True)
                if new:
                    with contextlib.suppress(OSError):
                        self.path.rmdir()
            lock.release()

    def begin(self, facts: dict[str, Any], overwrite: bool, writes: bool = True) -> None:
        """Start the run's record, or check that `facts` (found while loading, e.g. the data's hash) still hold in it.

        Args:
            writes: whether this process writes in the folder: one does, the others come after it.
        Raises:
            BadInput: as `finished`; a place of the run is taken by somebody else's file.
        """
        self.identity |= facts
        if overwrite and writes:
            self.delete()
        if (self.path / RECORD).exists():
            self._check_identity(self.record()["identity"])
        if not writes:
            return
        for name in ("recipe.yaml", "metrics.jsonl", "final", "report.html", "plots"):
            self._check_place(name, BadInput)
        for path in self.path.rglob(f"*{SIDE}"):
            remove(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.mark(finished=False)

    def mark(self, finished: bool) -> None:
        """Say of the run what it is, and whether it has finished."""
        with self._changing():
            self._save(self.record() | {"finished": finished, "identity": self.identity})

    def _changing(self) -> BaseFileLock:
        """Inside the block no other rank of the run changes the record."""
        from filelock import FileLock

        return FileLock(self.path / LIST_LOCK)

    def _save(self, record: dict[str, Any]) -> None:
        side = self.side(RECORD)
        try:
            side.write_text(json.dumps(record, indent=1), encoding="utf-8")
            settle(side, self.path / RECORD)
        except OSError as error:
            raise self._failure(self.path / RECORD, error) from error

    def delete(self) -> None:
        """Delete the files on the run's list, the folders that are empty without them, and the record at last."""
        files = self.record()["files"]
        for name in files:
            path = self.path / name
            if name.endswith("/"):
                RunFolder(path, {}).delete()
            else:
                path.unlink(missing_ok=True)
        folders = {parent for name in files for parent in (self.path / name.rstrip("/")).parents}
        folders |= {self.path / name for name in files if name.endswith("/")}
        for folder in sorted(folders, key=lambda one: len(one.parts), reverse=True):
            if self.path in folder.parents and folder.is_dir() and not folder.is_symlink():
                for lock in (LOCK, LIST_LOCK):
                    (folder / lock).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    folder.rmdir()
        (self.path / RECORD).unlink(missing_ok=True)
        (self.path / LIST_LOCK).unlink(missing_ok=True)

    def adopt(self, name: str) -> RunFolder:
        """A run of its own inside this one, which goes with it."""
        self._list({f"{name}/": 0})
        return RunFolder(self.path / name, {})

    # checkpoints

    def checkpoints(self) -> list[Path]:
        """Checkpoints of this run, oldest first; other people's folders of such names are not among them."""
        names = {name.partition("/")[0] for name in self.record()["files"]}
        found = {int(match[1]): self.path / match[0] for match in map(CHECKPOINT.fullmatch, names) if match}
        return [found[step] for step in sorted(found) if found[step].is_dir()]

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of a step."""
        return self.path / f"checkpoint-{step:06d}"

    def keep(self, limit: int | None, best: int | None = None) -> None:
        """Delete all but the latest `limit` checkpoints, that of step `best`, and those with foreign files in them."""
        for path in self.checkpoints()[:-limit] if limit else []:
            if (best is None or path != self.checkpoint(best)) and not self._foreign(path.name):
                self.discard(path.name)

    def check_whole(self, path: Path) -> None:
        """Raise BadInput where a checkpoint lacks something, naming the file and the way out."""
        if damage := self._damaged(path.name):
            raise BadInput(self.without(path, f"is damaged: {damage}"))

    def without(self, path: Path, what: str) -> str:
        """The sentence for a checkpoint that cannot be read, and what is the matter with it."""
        others = [one.name for one in self.checkpoints() if one != path]
        then = f"goes on from {others[-1]}" if others else "starts afresh"
        return f"{path} {what}. Delete that folder, and the same command {then}"

    def standing(self) -> str:
        """Where a later call would go on, as the end of a sentence."""
        left = self.checkpoints()
        if left:
            return f"the same command goes on from {left[-1].name}"
        if any(name.startswith("round-") for name in self.record()["files"]):
            return "the same command goes on inside its last round"
        return "no checkpoint had been written, so the same command starts afresh"

    # writing

    def side(self, name: str) -> Path:
        """Where something is written before it bears its name."""
        target = self._target(name)
        return target.with_name(f"{target.name}{SIDE}")

    def _target(self, name: str) -> Path:
        path = self.path / name
        return path.resolve() if path.is_symlink() else path

    def _foreign(self, name: str) -> list[Path]:
        """Files at a place of ours that are not on the list."""
        listed = {self.path / path for path in self.record()["files"]}
        place = self.path / name
        if self._replaced(name):
            return [place]
        return [path for path in (_files(place) if place.is_dir() else [place]) if path.exists() and path not in listed]

    def _replaced(self, name: str) -> bool:
        """Whether a folder's name is a link, and leads to something else than what this run has written."""
        place, written = self.path / name, self.record()["folders"].get(name)
        return place.is_symlink() and place.is_dir() and any(_files(place)) and _hash(place) != written

    def _check_place(self, name: str, kind: type[Exception]) -> None:
        if foreign := self._foreign(name):
            raise kind(f"{foreign[0]} is not this run's, and lies where the run writes {name}: move it away")

    @contextlib.contextmanager
    def written(self, name: str) -> Iterator[Path]:
        """A path to write a file or a folder to; afterwards it bears `name`, whole and on the disk, or not at all.

        Raises:
            RunFailed: the disk is full or refuses, or what bears `name` is not ours; it is untouched then.
        """
        side = self.side(name)
        self._check_place(name, RunFailed)
        try:
            remove(side)
            side.parent.mkdir(parents=True, exist_ok=True)
            yield side
            inside = {f"{name}/{path.relative_to(side)}": path.stat().st_size for path in _files(side)}
            files, folder = (inside, _hash(side)) if side.is_dir() else ({name: side.stat().st_size}, None)
            self._list(files, instead_of=name, folder=folder)
            settle(side, self._target(name))
        except Exception as error:
            if refusal(error) is None:
                raise
            with contextlib.suppress(OSError):
                remove(side)
            raise self._failure(self.path / name, error) from error

    def _list(self, files: dict[str, int], instead_of: str | None = None, folder: str | None = None) -> None:
        """Put files on the list, in place of those under a name, and the hash of the folder that they are, if they are
        one. The record of a run that has not begun is not kept."""
        if not (self.path / RECORD).exists():
            return
        with self._changing():
            record = self.record()
            gone = f"{instead_of}/"
            record["files"] = {
                name: size for name, size in record["files"].items() if not name.startswith(gone)
            } | files
            if instead_of is not None:
                record["folders"] = {name: one for name, one in record["folders"].items() if name != instead_of}
                record["folders"] |= {instead_of: folder} if folder else {}
            self._save(record)

    def discard(self, name: str) -> None:
        """Delete a file or folder of ours."""
        path, side = self.path / name, self.side(name)
        if path.exists() and not self._foreign(name):
            os.replace(self._target(name), side)
            remove(side)
            path.unlink(missing_ok=True)  # a link
            self._list({}, instead_of=name)

    def _failure(self, target: Path, error: Exception) -> RunFailed:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        way = "Make room" if full or not isinstance(error, OSError) else "Mend that"
        reason = refusal(error) or str(error)
        return RunFailed(
            f"cannot write {target}: {reason}. Nothing earlier was touched. {way} and run the same command again: "
            f"{self._standing_quietly()}"
        )

    def _standing_quietly(self) -> str:
        with contextlib.suppress(BadInput):
            left = self.checkpoints()
            return f"the last checkpoint is {left[-1].name}" if left else "there is no checkpoint yet"
        return "its record is damaged"

    def write_rows(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Write a file with one JSON object per line."""
        with self.written(name) as path:
            path.write_text("".join(map(line, rows)), encoding="utf-8")

    def truncate_metrics(self, step: int, *more: dict[str, Any]) -> list[dict[str, Any]]:
        """Drop the lines after `step` (and a last line cut by a crash), and add others; the lines that stay.

        Raises:
            BadInput: a line that is no record of a step.
        """
        return self.truncate("metrics.jsonl", step, *more)

    def truncate(self, name: str, step: int, *more: dict[str, Any]) -> list[dict[str, Any]]:
        """The same of any file whose lines bear their step."""
        path = self.path / name
        kept = [row for row in read_metrics(path) if row["step"] <= step] if path.exists() else []
        kept += more
        self.write_rows(name, kept)
        return kept


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last one that a crash has cut is left out.

    Raises:
        BadInput: a line that is no record of a step, by its number.
    """
    lines = path.read_bytes().split(b"\n")
    rows: list[dict[str, Any]] = []
    for number, text in enumerate(lines, 1):
        try:
            row = loads(text)
            _ = row["step"] + 0
        except (ValueError, KeyError, TypeError, IndexError) as error:
            if number == len(lines):  # without a line's end: a crash has cut it, or nothing follows
                break
            raise BadInput(f"{path} line {number} is no record of a step: mend or delete that line") from error
        rows.append(row)
    return rows


def refusal(error: Exception) -> str | None:
    """What the disk said, None for another error: torch.save and safetensors wrap it in errors of their own."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    marks = ("SafetensorError", "PytorchStreamWriter", "unexpected pos", "No space left", "I/O error", "File too large")
    ours = isinstance(error, OSError) or any(mark in f"{type(error).__name__} {error}" for mark in marks)
    return str(error).splitlines()[0] if ours else None


def remove(path: Path) -> None:
    """Delete a file or folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def settle(side: Path, target: Path) -> None:
    """Flush what lies at `side` to the disk and give it the name `target`, in place of what bore it."""
    for path in [*side.rglob("*"), side]:
        _sync(path)
    old = target.with_name(f"{target.name}.old{SIDE}")
    if target.is_dir():  # a folder that holds something cannot be replaced
        remove(old)
        os.replace(target, old)
    os.replace(side, target)
    _sync(target.parent)
    remove(old)


def _files(place: Path) -> list[Path]:
    return sorted(path for path in place.rglob("*") if path.is_file() or path.is_symlink())


def _prepared(entry: Path) -> bool:
    """Whether an entry is `final` as a link to a place where nothing lies yet: where somebody wants the model to be."""
    return entry.name == "final" and entry.is_symlink() and not entry.is_file() and not _files(entry)


def _hash(folder: Path) -> str:
    """Of the names and contents of a folder's files."""
    lines = [f"{path.relative_to(folder)} {of_file(path)}\n" for path in _files(folder) if path.is_file()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
