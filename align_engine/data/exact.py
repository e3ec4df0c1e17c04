"""Values as they were written: nothing filled in by Arrow, no number off by a digit, no picture or sound decoded."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
from datasets.features.features import register_feature


@dataclass
class ExactJson(datasets.Json):
    """A column of values of any shape, kept as JSON texts. datasets' own Json reads them with ujson, which gets one
    float in five wrong in its last digit, and takes a string that happens to be JSON for what it says."""

    _type: str = field(default="ExactJson", init=False, repr=False)

    def encode_example(self, example_data: Any) -> str | None:
        return None if example_data is None else json.dumps(example_data)

    def decode_example(self, example_data: str | None, token_per_repo_id: Any = None) -> Any:
        return None if example_data is None else json.loads(example_data)


with warnings.catch_warnings(action="ignore"):  # it warns of being experimental
    register_feature(ExactJson, "ExactJson")


def undecoded(rows: datasets.Dataset) -> datasets.Dataset:
    """The same rows, whose pictures, sounds and videos read as dicts of `bytes` and `path`, and whose JSON is exact."""
    for name, feature in rows.features.items():
        if (still := _still(feature)) != feature:
            rows = rows.cast_column(name, still)
    return rows


def media_columns(rows: datasets.Dataset) -> list[str]:
    """Names of the columns that `undecoded` keeps from being decoded."""
    return [name for name, feature in rows.features.items() if getattr(feature, "decode", True) is False]


def as_written(value: Any, feature: Any) -> Any:
    """A value of a column without the keys that Arrow fills with None where other rows have them, at any depth.

    A list's own Nones stay, and so do those inside JSON texts: they were written.
    """
    if isinstance(feature, dict) and isinstance(value, dict):
        return {key: as_written(value[key], part) for key, part in feature.items() if value.get(key) is not None}
    inner = getattr(feature, "feature", None)
    if isinstance(value, list) and (isinstance(inner, dict) or hasattr(inner, "feature")):
        return [as_written(item, inner) for item in value]
    return value


def read(rows: datasets.Dataset, numbers: Sequence[int]) -> dict[str, list[Any]]:
    """The columns of the rows of these numbers, as they were written."""
    return {name: [as_written(v, rows.features[name]) for v in values] for name, values in rows[numbers].items()}


def _still(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {key: _still(part) for key, part in feature.items()}
    if isinstance(feature, datasets.Json):
        return ExactJson()
    if hasattr(feature, "feature"):
        return dataclasses.replace(feature, feature=_still(feature.feature))
    return dataclasses.replace(feature, decode=False) if getattr(feature, "decode", False) else feature
