"""Where rows come from: files, folders and the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets

from align_engine.errors import BadInput

FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def load_rows(path: str | Path, split: str | None = None) -> datasets.Dataset:
    """The rows of a data set.

    `path` is a .jsonl, .json or .parquet file, a folder written by `datasets` (`save_to_disk`), a folder that holds
    such files, or the name of a data set on the hub, `org/name`. `split` defaults to "train" (a data set with a single
    split gives that one).

    Raises BadInput for a path that is not there, an empty file or split, an unknown file type or split, and a file that
    cannot be read, naming the line.
    """
    local = Path(path).expanduser()
    if local.is_file() and local.suffix not in FILE_TYPES:
        raise BadInput(f"'{path}': unknown file type '{local.suffix}', expected one of {', '.join(FILE_TYPES)}")
    if not local.exists() and (local.suffix in FILE_TYPES or not HUB_NAME.fullmatch(str(path))):
        raise BadInput(f"no data at '{path}': not a file, not a folder, and not a hub name like 'org/name'")
    try:
        if local.is_file():
            found = datasets.load_dataset(FILE_TYPES[local.suffix], data_files=str(local))
        elif (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            found = datasets.load_from_disk(str(local))
        else:
            found = datasets.load_dataset(str(local))
    except Exception as error:  # whatever the reader raises: say which line, keep the cause
        reason = _fault(local) or f"cannot be read: {error.__cause__ or error}"
        raise BadInput(f"'{path}' {reason}") from error
    splits = datasets.DatasetDict({"train": found}) if isinstance(found, datasets.Dataset) else found
    wanted = split or (next(iter(splits)) if len(splits) == 1 else "train")
    if wanted not in splits:
        raise BadInput(f"'{path}' has no split '{wanted}'; it has {', '.join(map(str, splits))}")
    if not len(splits[wanted]):
        raise BadInput(f"'{path}' has no rows" + (f" in split '{split}'" if split else ""))
    return splits[wanted]


def _fault(path: Path) -> str | None:
    """What `datasets` does not say: no rows, or the first line of a .jsonl file that is not a JSON object."""
    for state in path.rglob("state.json"):
        if not json.loads(state.read_text(encoding="utf-8"))["_data_files"]:
            return "has no rows"
    if path.suffix != ".jsonl":
        return None
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError as error:
            return f"cannot be read: line {number} is not JSON ({error.msg} at column {error.colno})"
        if not isinstance(row, dict):
            return f"cannot be read: line {number} is a JSON {type(row).__name__}, expected an object"
    return None if any(map(str.strip, lines)) else "is empty"
