"""Rows of .jsonl and .json files, each value as it was written.

datasets' own reader takes the columns' types from the first 10 MB and refuses what comes after with other keys, and
Arrow fills the keys that other rows have with None. Here the types are those of the whole file, and a column that holds
objects, or values of several types, is kept as JSON texts.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from align_engine.data.exact import ExactJson
from align_engine.errors import BadInput

PART = 1000  # rows held at a time
JSON = pa.json_()


def columns(files: list[str]) -> datasets.Features:
    """The columns of all rows of the files.

    Raises:
        BadInput: as `rows_of`; a file without a row.
    """
    kinds: dict[str, pa.DataType] = {}
    for file in files:
        empty = True
        for rows in parts(file):
            empty = False
            for name in dict.fromkeys(name for row in rows for name in row):
                known = kinds.get(name, pa.null())
                kinds[name] = known if known == JSON else _both(known, _kind([row.get(name) for row in rows]))
        if empty:
            raise BadInput(f"'{file}' is empty")
    if not kinds:
        raise BadInput(f"'{files[0]}' has no columns: its objects are empty")
    plain = {name: kind for name, kind in kinds.items() if kind != JSON}
    features = datasets.Features.from_arrow_schema(pa.schema(plain))
    return datasets.Features({name: features.get(name) or ExactJson() for name in kinds})


def parts(file: str) -> Iterator[list[dict[str, Any]]]:
    """The rows of a file, some at a time."""
    rows = rows_of(file)
    while part := list(islice(rows, PART)):
        yield part


def rows_of(file: str) -> Iterator[dict[str, Any]]:
    """The rows of a file; lines without a text are passed over.

    Raises:
        BadInput: naming the file and the line, where it is not JSON, no object, or not UTF-8.
    """
    first = True
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            if first and line.lstrip().startswith(b"["):
                yield from _list(file)
                return
            first, row = False, _parsed(file, line, number)
            if not isinstance(row, dict):
                raise _refusal(file, f"line {number} is a JSON {type(row).__name__}, expected an object")
            yield row


def _list(file: str) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(_parsed(file, Path(file).read_bytes().removeprefix(codecs.BOM_UTF8), 1), 1):
        if not isinstance(row, dict):
            raise _refusal(file, f"item {number} of its list is a JSON {type(row).__name__}, expected an object")
        yield row


def _parsed(file: str, raw: bytes, line: int) -> Any:
    """What JSON that begins at `line` stands for."""
    try:
        text = raw.decode("utf-8").rstrip()
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        if error.msg == "Extra data" and raw.lstrip().startswith(b"["):
            raise _refusal(file, "line 1 is a JSON list, expected an object") from error
        why = f"line {line} is not JSON ({error.msg} at column {error.colno})"
        hint = "; a .json file holds one list of objects, or one object per line" * file.lower().endswith(".json")
        raise _refusal(file, why + hint) from error
    except UnicodeDecodeError as error:
        line += raw[: error.start].count(b"\n")
        why = f"line {line} is not UTF-8 (byte 0x{raw[error.start]:02x}): save the file as UTF-8"
        raise _refusal(file, why) from error
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise _refusal(file, f"line {line} holds {half}, half of a surrogate pair: no character") from error
    except RecursionError as error:
        raise _refusal(file, f"line {line} is nested too deep (no more than about 1,000 levels)") from error


def _refusal(file: str, why: str) -> BadInput:
    return BadInput(f"'{file}' cannot be read: {why}")


def _kind(values: list[Any]) -> pa.DataType:
    """Arrow's type of the values; JSON where they have none in common, or are or hold objects."""
    if any(isinstance(value, dict) for value in values):
        return JSON
    try:
        kind = inner = pa.array(values).type
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return JSON
    while pa.types.is_list(inner):
        inner = inner.value_type
    return JSON if pa.types.is_struct(inner) else kind


def _both(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """The type that holds the values of both."""
    try:
        return pa.unify_schemas([pa.schema({"": one}), pa.schema({"": other})], promote_options="permissive")[0].type
    except pa.ArrowException:
        return JSON


def array(values: list[Any], kind: pa.DataType) -> pa.Array:
    """The values as a column of a type that `columns` gave."""
    if kind != JSON:
        return pa.array(values).cast(kind, safe=False)  # unsafe: whole numbers beyond 2^53 among fractions
    texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    return pa.ExtensionArray.from_storage(JSON, pa.array(texts, pa.string()))
