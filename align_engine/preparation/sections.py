"""The settings of the commands that prepare data. As those of a recipe, they bear names that are unique in a command's
tree, and nothing here imports torch or datasets."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from align_engine.preparation.models import read_models
from align_engine.recipe.recipes import Settings
from align_engine.recipe.sections import Section
from align_engine.recipe.values import Count, Positive


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


class MappedInput(InputSection):
    """Data."""

    columns: list[str] | None = None
    """Columns under other names than ours, as NAME=COLUMN: prompt=question completion=answer. The layouts of TRL,
    ShareGPT (conversations) and Alpaca (instruction, input, output) are known by their columns."""


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


class AskedModels(Section):
    """Models that answer, and how they are asked."""

    models: list[str] = field(default_factory=list)
    """YAML files that list models, or models themselves as `name=...,tier=...,base_url=...` (docs/data.md)."""
    server_concurrency: Count = 16
    """Requests that each endpoint has at a time."""
    request_timeout: Positive = 600.0
    """Seconds that one request may take; after it, it is sent again."""
    batch_size: Count = 16
    """Answers that a local checkpoint writes at a time."""
    seed: int = 0
    """Of the answers: each request has a seed of its own, a function of this one, the model's name and the row."""


class GenerateRecipe(Preparation):
    """Answers to prompts from several models of known rank: endpoints, local checkpoints, people."""

    data: MappedInput = field(default_factory=MappedInput)
    ask: AskedModels = field(default_factory=AskedModels)

    def models(self) -> dict[str, str]:
        return {f"models ({one.name})": one.path for one in read_models(self.ask.models) if one.path}
