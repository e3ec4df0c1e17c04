"""The folder that a generation server reads its weights from: the policy is put there before each rollout.

It bears a list of what this program wrote into it. Nothing else is ever replaced: a folder that is there already must
be empty, bear that list, or be a copy of the model that the run starts from (which a server must be started on).
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from align_engine.data.json_text import loads
from align_engine.errors import BadInput, RunFailed
from align_engine.training.checkpoint import SIDE, remove, settle

LIST = "align-files.json"


class ServerWeights:
    """The folder at `path`, for a run that starts from the model `start` (a folder or hub name)."""

    def __init__(self, path: str, start: str) -> None:
        self.path, self.start = Path(path).expanduser(), start

    def check(self) -> None:
        """Raise BadInput where the folder holds what is not ours to replace."""
        if foreign := self._foreign():
            raise BadInput(
                f"server_weights = {str(self.path)!r} holds {foreign[0].name!r}, neither this program's nor of a copy "
                f"of {self.start!r}: give a folder of its own, new or with a copy of that model"
            )

    def _foreign(self) -> list[Path]:
        if not self.path.exists():
            return []
        if not self.path.is_dir():
            return [self.path]
        entries = sorted(self.path.iterdir())
        record = self.path / LIST
        if record.exists():
            try:
                own = {LIST, *loads(record.read_text(encoding="utf-8"))}
            except (OSError, ValueError, TypeError):
                return [record]
            return [path for path in entries if path.name not in own or path.is_dir()]
        return [path for path in entries if not _same(path, _folder(self.start) / path.name)]

    @contextlib.contextmanager
    def written(self) -> Iterator[Path]:
        """A path to write a model to, which takes the folder's place afterwards.

        Raises:
            RunFailed: something that is not ours has come into the folder, or the disk refuses.
        """
        target = self.path.resolve()
        side = target.with_name(f"{target.name}{SIDE}")
        remove(side)
        try:
            side.mkdir(parents=True)
            yield side
            (side / LIST).write_text(json.dumps(sorted(path.name for path in side.iterdir())), encoding="utf-8")
            if foreign := self._foreign():
                raise RunFailed(f"server_weights = {str(self.path)!r}: {foreign[0]} is not this run's: move it away")
            settle(side, target)
        except OSError as error:
            remove(side)
            raise RunFailed(
                f"server_weights = {str(self.path)!r}: cannot write there: {error.strerror or error}"
            ) from error

    def copy(self, model: str | Path) -> None:
        """Put a saved model there."""
        with self.written() as side:
            shutil.copytree(_folder(str(model)), side, dirs_exist_ok=True)


def _folder(model: str) -> Path:
    """Where the files of a model lie: its folder, or the hub's cache."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, local_files_only=True))


def _same(a: Path, b: Path) -> bool:
    return a.is_file() and b.is_file() and filecmp.cmp(a, b, shallow=False)
