"""Where rows come from: files, folders and the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
from datasets.exceptions import DatasetNotFoundError

from align_engine.data.errors import DataError, DataNotFound

FILE_TYPES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\[\]:%+-]+)?")


def load_rows(path: str | Path, split: str | None = None) -> datasets.Dataset:
    """The rows of a data set.

    `path` is a .jsonl, .json or .parquet file, a folder written by `datasets` (`save_to_disk`), a folder that holds
    such files, or the name of a data set on the hub, `org/name` or `org/name:split`. `split` defaults to "train"
    (a data set with a single split gives that one).

    Raises DataNotFound (a FileNotFoundError) for a path that is not there; DataError (a ValueError) for an empty file
    or split, an unknown file type or split, and a file that cannot be read, naming the line.
    """
    local = Path(path).expanduser()
    if local.is_file():
        rows = _from_file(local, split)
    elif local.is_dir():
        rows = _from_folder(local, split)
    elif HUB_NAME.fullmatch(str(path)) and local.suffix not in FILE_TYPES:
        rows = _from_hub(str(path), split)
    else:
        raise DataNotFound(f"no data at '{path}': not a file, not a folder, and not a hub name like 'org/name:split'")
    if len(rows) == 0:
        raise DataError(f"'{path}' has no rows" + (f" in split '{split}'" if split else ""))
    return rows


def _from_file(path: Path, split: str | None) -> datasets.Dataset:
    if path.suffix not in FILE_TYPES:
        raise DataError(f"'{path}': unknown file type '{path.suffix}', expected one of {', '.join(FILE_TYPES)}")
    if split not in (None, "train"):
        raise DataError(f"'{path}' is one file and has no split '{split}'; leave the split out")
    if path.stat().st_size == 0 or (path.suffix != ".parquet" and _is_blank(path)):
        raise DataError(f"'{path}' is empty")
    try:
        return datasets.load_dataset(FILE_TYPES[path.suffix], data_files=str(path), split="train")
    except Exception as error:  # whatever the reader raises: say which line, keep the cause
        raise DataError(f"'{path}' cannot be read: {_diagnosis(path) or error.__cause__ or error}") from error


def _is_blank(path: Path) -> bool:
    with path.open(encoding="utf-8") as lines:
        return not any(line.strip() for line in lines)


def _diagnosis(path: Path) -> str | None:
    """The first line of a .jsonl file that is not a JSON object."""
    if path.suffix != ".jsonl":
        return None
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                return f"line {number} is not JSON ({error.msg} at column {error.colno})"
            if not isinstance(row, dict):
                return f"line {number} is a JSON {type(row).__name__}, expected an object"
    return None


def _from_folder(path: Path, split: str | None) -> datasets.Dataset:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        for state in path.rglob("state.json"):
            if not json.loads(state.read_text(encoding="utf-8"))["_data_files"]:  # `datasets` cannot load it
                raise DataError(f"'{state.parent}' has no rows")
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            return _pick_split(saved, split, str(path))
        if split not in (None, "train"):
            raise DataError(f"'{path}' holds one data set without splits, there is no split '{split}'")
        return saved
    files = [file for file in path.rglob("*") if file.suffix in FILE_TYPES]
    if not files:
        raise DataNotFound(f"'{path}' holds neither a saved data set nor {', '.join(FILE_TYPES)} files")
    for file in files:
        if file.stat().st_size == 0:
            raise DataError(f"'{file}' is empty")
    return _pick_split(datasets.load_dataset(str(path)), split, str(path))


def _from_hub(name: str, split: str | None) -> datasets.Dataset:
    name, _, own_split = name.partition(":")
    if own_split and split and own_split != split:
        raise DataError(f"'{name}:{own_split}' and split '{split}' name two splits")
    wanted = split or own_split
    try:
        if wanted:
            return datasets.load_dataset(name, split=wanted)
        return _pick_split(datasets.load_dataset(name), None, name)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise DataNotFound(f"no data at '{name}': no such file or folder here, and the hub says: {error}") from error


def _pick_split(splits: datasets.DatasetDict, split: str | None, name: str) -> datasets.Dataset:
    wanted = split or (next(iter(splits)) if len(splits) == 1 else "train")
    if wanted not in splits:
        raise DataError(f"'{name}' has no split '{wanted}'; it has {', '.join(map(str, splits))}")
    return splits[wanted]
