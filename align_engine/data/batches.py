"""From tokenised rows to tensors: padded, or packed into one row (`align_engine.data.trees`).

B sequences, P pairs, R rows, T positions. Padding is on the right and known by `attention_mask` alone: the pad id may
be the EOS id, or any other. Nothing here depends on earlier batches or on the order of sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from align_engine.data.trees import IGNORE, Trees, pack, rows_at


@dataclass
class Batch:
    """Sequences to read. In a preference batch B = 2P: the first half is chosen, the second half rejected.

    Of a packed batch `input_ids` and `attention_mask` are [1, S], and T counts the targets of a sequence alone.
    """

    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] int64, 1 = a token, 0 = padding
    targets: Tensor  # [B, T] int64, what `predicting` predicts; -100 outside the completion
    index: Tensor  # [R] int64, number of each row in its source (R = B, or P for pairs)
    ref_logps: Tensor | None = None  # [B] float32, summed log-probs of the reference, where the rows carry them
    desirable: Tensor | None = None  # [B] bool, the labels of unpaired data
    other: Batch | None = None  # unpaired data: the same prompts, each before a completion that answers another prompt
    shared: dict[str, float] = field(default_factory=dict)  # numbers of the whole window, over all ranks
    margin: Tensor | None = None  # [P] float32, by how much the chosen answer is better, where the rows say
    trees: Trees | None = None  # the layout of a packed batch
    # of rollouts, [B, T] with a number for each target and 0 elsewhere; there ref_logps has that shape too
    sampling_logps: Tensor | None = None  # of the sampler
    old_logps: Tensor | None = None  # of the policy before this rollout's first step (None: that is the present one)
    advantages: Tensor | None = None
    values: Tensor | None = None  # of the value head before this rollout's first step
    returns: Tensor | None = None  # what the value head learns

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        movable = (Tensor, Batch, Trees)
        parts: dict[str, Any] = {name: part for name, part in vars(self).items() if isinstance(part, movable)}
        return replace(self, **{name: part.to(device) for name, part in parts.items()})

    @property
    def num_tokens(self) -> int:
        """Completion tokens: how many positions are trained on."""
        return int((self.targets != IGNORE).sum())

    @property
    def num_read(self) -> int:
        """Tokens of all sequences, each with its prompt."""
        if self.trees is None:
            return int(self.attention_mask.sum())
        return int((self.trees.position_ids[0, self.trees.last] + 1).sum())

    def predicting(self, hidden: Tensor) -> Tensor:
        """Of the last hidden states of `input_ids` those that predict the targets: [B, T, D]."""
        return hidden if self.trees is None else rows_at(hidden, self.trees.index)


def collate_sft(rows: Sequence[dict[str, Any]], pad_id: int | None) -> Batch:
    """R rows of prompt_ids, completion_ids -> Batch with B = R. Here and below a batch without a pad id is packed.

    Rows with `assistant_masks` (TRL's name, a number for each token of the completion) have targets where it is not 0.
    """
    batch = _batch(rows, pad_id, "completion")
    if "assistant_masks" in rows[0]:  # nothing predicts a sequence's first token
        masks = [torch.tensor(row["assistant_masks"][0 if row["prompt_ids"] else 1 :]) for row in rows]
        there = batch.targets != IGNORE
        batch.targets[there] = batch.targets[there].where(torch.cat(masks) != 0, IGNORE)
    return batch


def collate_pairs(rows: Sequence[dict[str, Any]], pad_id: int | None) -> Batch:
    """P rows of prompt_ids, chosen_ids, rejected_ids -> Batch with B = 2P, chosen first.

    Rows with `ref_chosen_logps` and `ref_rejected_logps` (TRL's names) fill `ref_logps` [2P] in the same order, rows
    with `margin` fill `margin` [P].
    """
    batch = _batch(rows, pad_id, "chosen", "rejected")
    batch.ref_logps = _numbers(rows, "ref_chosen_logps", "ref_rejected_logps")
    batch.margin = _numbers(rows, "margin")
    return batch


def collate_labels(rows: Sequence[dict[str, Any]], pad_id: int | None) -> Batch:
    """R rows of prompt_ids, completion_ids, label, kl_completion_ids -> Batch with B = R, labels and `other`.

    Rows with `ref_logps` and `ref_KL_logps` (TRL's names) fill `ref_logps` [B] of the batch and of `other`.
    """
    batch, other = _batch(rows, pad_id, "completion"), _batch(rows, pad_id, "kl_completion")
    batch.ref_logps, other.ref_logps = _numbers(rows, "ref_logps"), _numbers(rows, "ref_KL_logps")
    batch.desirable, batch.other = torch.tensor([bool(row["label"]) for row in rows]), other
    return batch


def collate_prompts(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Prompt ids -> (input_ids [B, T], attention_mask [B, T]), int64, padded on the left for generation."""
    ids = [torch.tensor(prompt) for prompt in prompts]
    return _padded(ids, pad_id, "left"), _padded([torch.ones_like(row) for row in ids], 0, "left")


TOKEN_COLUMNS = ("ref_logps", "sampling_logps", "old_logps", "advantages", "values", "returns")


def collate_rollouts(rows: Sequence[dict[str, Any]], pad_id: int | None) -> Batch:
    """B rows of prompt_ids, completion_ids and any of TOKEN_COLUMNS (tensors, a number per completion token) -> Batch.

    Rows that are `masked` have no targets.
    """
    batch = collate_sft(rows, pad_id)
    for name in TOKEN_COLUMNS:
        if name in rows[0]:
            values = torch.cat([row[name] for row in rows])
            column = torch.zeros(batch.targets.shape, dtype=values.dtype)
            column[batch.targets != IGNORE] = values
            setattr(batch, name, column)
    batch.targets[torch.tensor([bool(row.get("masked")) for row in rows])] = IGNORE
    return batch


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(n), a function of its arguments alone."""
    return np.random.default_rng([seed, epoch]).permutation(n).tolist()


def split_order(order: Sequence[int], size: int) -> list[list[int]]:
    """Consecutive pieces of `size` row numbers; the last one may be shorter."""
    return [list(order[start : start + size]) for start in range(0, len(order), size)]


def _batch(rows: Sequence[dict[str, Any]], pad_id: int | None, *sides: str) -> Batch:
    """All rows with their first side, then all with their second."""
    sequences = [(row["prompt_ids"], row[f"{side}_ids"]) for side in sides for row in rows]
    index = torch.tensor([row["index"] for row in rows])
    if pad_id is None:
        packed = pack(sequences)
        whole = torch.ones_like(packed.input_ids)
        return Batch(packed.input_ids, whole, packed.targets, index, trees=packed.trees)
    ids, targets = [], []
    for prompt, completion in sequences:
        whole, begin = [*prompt, *completion], max(len(prompt), 1)
        ids.append(torch.tensor(whole))
        targets.append(torch.tensor([IGNORE] * (begin - 1) + whole[begin:] + [IGNORE]))
    mask = _padded([torch.ones_like(row) for row in ids], 0)
    return Batch(_padded(ids, pad_id), mask, _padded(targets, IGNORE), index)


def _padded(rows: list[Tensor], value: int, side: str = "right") -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def _numbers(rows: Sequence[dict[str, Any]], *names: str) -> Tensor | None:
    """The columns one behind the other, float32; None where the rows have none."""
    if names[0] in rows[0]:
        return torch.tensor([row[name] for name in names for row in rows], dtype=torch.float32)
