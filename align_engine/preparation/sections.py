"""The settings of the commands that prepare data. As those of a recipe, they bear names that are unique in a command's
tree, and nothing here imports torch or datasets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field
from typing import Literal

from align_engine.preparation.models import read_models
from align_engine.recipe.recipes import Settings
from align_engine.recipe.sections import Section
from align_engine.recipe.values import Count, Finite, NotNegative, Positive


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


class PairsSection(Section):
    """Pairs."""

    by: Literal["auto", "rank", "score", "label"] = "auto"
    """Column that orders the answers to one prompt: a rank (1 is the best), a score (more is better) or a mark (true or
    false). auto: the first of them that is there; rows that hold chosen and rejected are pairs as they stand."""
    layout: Literal["preference", "several", "unpaired"] = "preference"
    """preference: one row for each pair. several: one row for each tier and all that are worse, with lists of chosen
    and rejected answers, which train as one tree. unpaired: one row for each answer, with its mark."""
    min_gap: NotNegative = 0.0
    """Least difference between the ranks or scores of a pair."""
    margin: NotNegative = 0.0
    """Column `margin`: so much per step between ranks, or per point between scores (0: no column)."""
    max_pairs: Count | None = None
    """Pairs of one prompt at most, drawn at random (None: all)."""
    max_answers: Count | None = None
    """Answers of each tier of a prompt at most, drawn at random (None: all)."""
    desirable: Finite | None = None
    """unpaired: answers up to this rank, or from this score on, are good (None: those of the best tier of prompts that
    have two)."""
    seed: int = 0
    """Of what is drawn."""


class PairsRecipe(Preparation):
    """Pairs of better and worse answers, by the cartesian product of ranked, scored or marked ones."""

    data: MappedInput = field(default_factory=MappedInput)
    pairs: PairsSection = field(default_factory=PairsSection)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        own = self.pairs
        if own.max_pairs and own.layout != "preference":
            yield "max_pairs", f"is not for layout = {own.layout!r}, which holds no single pairs: give max_answers"
        if own.desirable is not None and own.layout != "unpaired":
            yield "desirable", "is for layout = 'unpaired'"
        if own.margin and own.layout == "unpaired":
            yield "margin", "is not for layout = 'unpaired', which has no pairs"
