"""Where rows come from: files, folders and the hub."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
from datasets import config
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.packaged_modules.json.json import Json

from align_engine.data.builder import Files, JsonLines, Parquet
from align_engine.data.exact import undecoded
from align_engine.data.json_text import loads
from align_engine.errors import BadInput, rows_named

READERS: dict[str, type[Files]] = {".jsonl": JsonLines, ".json": JsonLines, ".parquet": Parquet}
TYPES = f"{', '.join(list(READERS)[:-1])} or {list(READERS)[-1]}"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
NO_DATA = {  # beside the data of a folder
    "dataset_info.json", "dataset_infos.json", "config.json", "run.json", "report.json",
}  # fmt: skip
SPLITS = {  # words in the names of files and folders, as `datasets` has them
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz")
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR, errno.EROFS, errno.EACCES, errno.EPERM}


def load_rows(path: str | Path, split: str | None = None, config: str | None = None) -> datasets.Dataset:
    """The rows of a data set, each value as it was written; pictures, sounds and videos are not decoded.

    `path` is a .jsonl, .json or .parquet file, a folder written by `datasets` (`save_to_disk`), a folder that holds
    such files (splits are told by their names, as `datasets` does: train.jsonl, test/a.parquet; without any such name
    all are "train"), or the name of a data set on the hub, `org/name`. `split` defaults to "train" (a data set with a
    single split gives that one). `config` is the `name` of `datasets.load_dataset`: of a hub name, or of a folder whose
    README describes several.

    Raises BadInput for a path that is not there, an empty file or split, an unknown file type, split or `config`, a
    cache that cannot be written, and a file that cannot be read, naming the line.
    """
    local = Path(path).expanduser()
    if not local.exists() and (local.suffix.lower() in READERS or not HUB_NAME.fullmatch(str(path))):
        raise BadInput(f"no data at '{path}': not a file, not a folder, and not a hub name like 'org/name'")
    try:
        with cache_errors(path):
            rows = _load(path, local, split, config)
    except Exception as error:  # whatever a reader raises: the cause is kept
        known = next((cause for cause in _causes(error) if isinstance(cause, BadInput)), None)
        raise known or BadInput(f"'{path}' cannot be read: {error.__cause__ or error}") from error
    if not len(rows):
        raise BadInput(f"'{path}' has no rows" + (f" in split '{split}'" if split else ""))
    return rows


class Origin(NamedTuple):
    """Where rows come from, as messages say it: what `load_rows` was given."""

    path: str
    split: str | None = None

    def rows(self, where: Sequence[int]) -> str:
        """Rows by their numbers, those of a folder by file and row."""
        return rows_named(where, self._files())

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Have a BadInput of the block begin with the name of the data set."""
        try:
            yield
        except BadInput as error:
            raise BadInput(f"{self.path}: {error}") from error

    def _files(self) -> Iterator[tuple[str, int]]:
        local = Path(self.path).expanduser()
        if not local.is_dir() or not _is_plain(local):
            return
        files, folder = _files(self.path, local), local.resolve()
        for file in map(Path, files[_wanted(self.path, self.split, list(files))]):
            name = file.relative_to(folder) if file.is_relative_to(folder) else file
            yield str(name), READERS[file.suffix.lower()].count(str(file))


def _load(path: str | Path, local: Path, split: str | None, config: str | None) -> datasets.Dataset:
    if local.is_dir() and (damage := _damage(local)):
        raise BadInput(f"'{path}' cannot be read: {damage}")
    saved, plain = _is_saved(local), _is_plain(local)
    if config is not None and (saved or plain):
        raise BadInput(f"dataset_config = {config!r}: '{path}' has no configurations; leave it out")
    if saved:
        found: Any = datasets.load_from_disk(str(local))
        splits = {"train": found} if isinstance(found, datasets.Dataset) else dict(found)
        return undecoded(splits[_wanted(path, split, list(splits))])
    if plain:
        files = _files(path, local)
        return undecoded(_built(files, _wanted(path, split, list(files))))
    builder = datasets.load_dataset_builder(str(local if local.is_dir() else path), config)
    files = builder.config.data_files
    if isinstance(builder, Json) and files:
        return undecoded(_built(files, _wanted(path, split, list(files))))
    builder.download_and_prepare()
    found = builder.as_dataset()
    return undecoded(found[_wanted(path, split, list(found))])


@contextlib.contextmanager
def cache_errors(path: str | Path) -> Iterator[None]:
    """Turn the errors of a cache that cannot be written, whatever wraps them, into a BadInput that names it."""
    try:
        yield
    except Exception as error:
        for cause in _causes(error):
            if isinstance(cause, OSError) and (cause.errno in FULL or "disk space" in str(cause)):
                raise _refusal(path, cause) from error
        raise


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that led to it, which may lead back to it."""
    found, seen = error, set[int]()
    while found is not None and id(found) not in seen:
        yield found
        seen.add(id(found))
        found = found.__cause__ or found.__context__


def _refusal(path: str | Path, error: OSError) -> BadInput:
    cache, why = config.HF_DATASETS_CACHE, error.strerror or str(error)
    place = str(error.filename or cache)
    if error.errno == errno.EACCES and Path(place).exists() and not os.access(place, os.R_OK):
        return BadInput(f"'{path}' cannot be read: {place}: {why}")
    return BadInput(
        f"'{path}': the cache of data at {cache} cannot be written ({why}): make room there, or set HF_DATASETS_CACHE "
        "to a folder on another disk"
    )


def _wanted(path: str | Path, split: str | None, splits: list[str]) -> str:
    wanted = split or (splits[0] if len(splits) == 1 else "train")
    if wanted not in splits:
        raise BadInput(f"'{path}' has no split '{wanted}'; it has {', '.join(map(str, splits))}")
    return wanted


def _files(path: str | Path, local: Path) -> DataFilesDict:
    """The data files of each split: the file itself, or those of a folder, all of one type."""
    if local.is_file():
        if local.suffix.lower() not in READERS:
            way = ": unpack it first" * (local.suffix.lower() in PACKED)
            if local.suffix.lower() == ".csv":  # which has no types
                rows = str(local.with_suffix(".jsonl"))
                way = f": datasets.Dataset.from_csv({str(path)!r}).to_json({rows!r}) writes one"
            raise BadInput(f"'{path}': unknown file type '{local.suffix}', expected {TYPES}{way}")
        return _stamped({"train": [local]})
    hidden = re.compile(r"(^|/)[._]")
    found = [file for file in sorted(_walk(local, set())) if file.is_file() and file.suffix.lower() in READERS]
    found = [
        file for file in found if file.name not in NO_DATA and not hidden.search(file.relative_to(local).as_posix())
    ]
    if not found:
        raise BadInput(f"'{path}' holds no {TYPES} file")
    suffixes = sorted({file.suffix.lower() for file in found})
    if len({READERS[suffix] for suffix in suffixes}) > 1:
        raise BadInput(f"'{path}' holds {' and '.join(suffixes)} files: name one file, or part them into folders")
    splits: dict[str, list[Path]] = {}
    for file in found:
        splits.setdefault(_split(file.relative_to(local)) or "", []).append(file)
    unnamed = splits.pop("", [])
    return _stamped(splits or {"train": unnamed})


def _walk(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """What lies in a folder, behind links too; each folder once."""
    if folder.resolve() not in seen:
        seen.add(folder.resolve())
        for entry in folder.iterdir():
            yield from _walk(entry, seen) if entry.is_dir() else [entry]


def _split(file: Path) -> str | None:
    """The split that a file's name, or else a folder's, speaks of."""
    if shard := re.fullmatch(r"(\w+(?:\.\w+)*)-\d{5,}-of-\d{5,}.*", file.name):
        return shard[1]
    for part in reversed(file.parts):
        for name, words in SPLITS.items():
            if re.search(rf"(^|[-._ 0-9])({'|'.join(words)})([-._ 0-9]|$)", part.lower()):
                return name
    return None


def _stamped(splits: dict[str, list[Path]]) -> DataFilesDict:
    """Files as a builder takes them, no pattern being read into their names; a change of any is another cache."""
    found = {}
    for name, files in splits.items():
        states = [file.stat() for file in files]
        stamps: Any = [tuple(str(n) for n in (one.st_size, one.st_mtime_ns, one.st_ctime_ns)) for one in states]
        found[name] = DataFilesList([str(file.resolve()) for file in files], stamps)
    return DataFilesDict(found)


def _built(files: Any, split: str) -> datasets.Dataset:
    """The rows of one split's files."""
    reader = READERS.get(Path(files[split][0]).suffix.lower(), JsonLines)
    builder = reader(data_files=DataFilesDict({split: files[split]}))
    builder.download_and_prepare()
    found: Any = builder.as_dataset(split=split)
    return found


def _is_saved(local: Path) -> bool:
    """Whether `save_to_disk` has written a folder."""
    return (local / "dataset_dict.json").is_file() or (local / "state.json").is_file()


def _is_plain(local: Path) -> bool:
    """Whether a path is a file of rows, or a folder that holds such files and nothing that says which."""
    return local.is_file() or (local.is_dir() and not _is_saved(local) and not _describes_itself(local))


def _describes_itself(folder: Path) -> bool:
    """Whether a folder's README says which files make up which split, as those of the hub do."""
    readme = folder / "README.md"
    return readme.is_file() and bool(re.match(r"---\n(.*\n)*?configs:", readme.read_text("utf-8", "replace")))


def _damage(folder: Path) -> str | None:
    """What is wrong with a folder that `save_to_disk` wrote; None: nothing, or it is none."""
    if (folder / "dataset_dict.json").is_file():
        parts = [folder / name for name in _json(folder / "dataset_dict.json").get("splits", [])]
    else:
        parts = [folder] if any((folder / name).is_file() for name in ("state.json", "dataset_info.json")) else []
        if not (folder / "state.json").is_file() and not any(folder.glob("*.arrow")):
            return None
    for part in parts:
        _json(part / "dataset_info.json")
        files = _json(part / "state.json").get("_data_files", [])
        if not files:
            return "has no rows"
        for file in (part / one["filename"] for one in files):
            if not file.is_file():
                return f"{file} is missing"
            try:
                with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as stream:
                    for _ in stream:
                        pass
            except (pa.ArrowException, OSError) as error:
                return f"{file} is damaged ({str(error).splitlines()[0]})"
    return None


def _json(file: Path) -> dict[str, Any]:
    """A file of `save_to_disk`."""
    if not file.is_file():
        raise BadInput(f"'{file}' is missing: the folder is not what `save_to_disk` wrote")
    try:
        found = loads(file.read_text(encoding="utf-8"))
        assert isinstance(found, dict)
        return found
    except (ValueError, AssertionError) as error:
        raise BadInput(f"'{file}' is damaged: it is not the JSON that `save_to_disk` wrote") from error
