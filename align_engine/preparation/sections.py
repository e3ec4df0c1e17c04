"""The settings of the commands that prepare data. As those of a recipe, they bear names that are unique in a command's
tree, and nothing here imports torch or datasets."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from align_engine.recipe.recipes import Settings
from align_engine.recipe.sections import Section


class InputSection(Section):
    """Data."""

    dataset_name: str = ""
    """A .jsonl or .parquet file, a folder written by `datasets` or by these commands, or a hub name."""
    dataset_train_split: str = "train"
    """Split to read, where the dataset has splits."""
    bad_rows: Literal["error", "drop"] = "error"
    """What to do with rows that cannot be used."""
    dry_run: bool = False
    """Print the first rows of the result and write nothing."""


class ResultSection(Section):
    """Output."""

    output_dir: str = ""
    """Folder of the result: rows.jsonl, and report.json, report.md and report.html."""
    overwrite: bool = False
    """Delete the result that output_dir holds and start afresh."""


class Preparation(Settings):
    """What every command that prepares data has."""

    data: InputSection = field(default_factory=InputSection)
    output: ResultSection = field(default_factory=ResultSection)
