"""Data: from files to token ids to padded batches."""

from align_engine.data.batches import (
    Batch,
    collate_marks,
    collate_pairs,
    collate_prompts,
    collate_rollouts,
    collate_sft,
    epoch_order,
    split_order,
)
from align_engine.data.errors import DataError, DataNotFound
from align_engine.data.sources import load_rows
from align_engine.data.tokenize import check_vocab, describe, prepare

__all__ = [
    "Batch",
    "DataError",
    "DataNotFound",
    "check_vocab",
    "collate_marks",
    "collate_pairs",
    "collate_prompts",
    "collate_rollouts",
    "collate_sft",
    "describe",
    "epoch_order",
    "load_rows",
    "prepare",
    "split_order",
]
