"""A hash of what rows hold, whatever files, chunks and caches they lie in."""

from __future__ import annotations

import hashlib
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute

pc: Any = pyarrow.compute
PART = 1000  # rows hashed at a time


def content_hash(rows: datasets.Dataset) -> str:
    """16 hexadecimal digits that change with any value, null, row or column name; nothing is decoded."""
    digest = hashlib.sha256(repr(sorted(rows.column_names)).encode())
    part: Any
    for part in rows.with_format("arrow").iter(batch_size=PART):
        for name in sorted(part.column_names):
            _update(digest, part[name].combine_chunks())
    return digest.hexdigest()[:16]


def _update(digest: Any, array: Any) -> None:
    """Add the values of an Arrow array, but for what lies hidden under its nulls."""
    kind, types = array.type, pa.types
    if isinstance(array, pa.ExtensionArray):
        return _update(digest, array.storage)
    if types.is_dictionary(kind):
        return _update(digest, array.dictionary_decode())
    digest.update(np.asarray(array.is_valid()).tobytes())
    if types.is_struct(kind):
        for field in array.flatten():
            _update(digest, field)
        return None
    array = array.drop_null()
    if types.is_nested(kind):  # lists of every sort
        digest.update(np.asarray(pc.list_value_length(array), dtype=np.int64).tobytes())
        _update(digest, array.flatten())
    elif types.is_primitive(kind):
        digest.update(np.asarray(array).tobytes())
    elif types.is_null(kind):
        pass
    else:
        values = [value if isinstance(value, bytes) else str(value).encode() for value in array.to_pylist()]
        digest.update(np.array([len(value) for value in values], dtype=np.int64).tobytes())
        digest.update(b"".join(values))
