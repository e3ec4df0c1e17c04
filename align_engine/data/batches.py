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

from align_engine.data.formats import answers
from align_engine.data.trees import IGNORE, Trees, pack, rows_at


@dataclass
class Batch:
    """Sequences to read. Of a preference batch those that are chosen in any pair come before those that are rejected:
    B = 2P halves, unless `pairs` says which are paired.

    Of a packed batch `input_ids` and `attention_mask` are [1, S], and T counts the targets of a sequence alone.
    """

    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] int64, 1 = a token, 0 = padding
    targets: Tensor  # [B, T] int64, what `predicting` predicts; -100 outside the completion
    index: Tensor  # [R] int64, number of each row in its source (R = B, or one of all pairs with the same prompt)
    ref_logps: Tensor | None = None  # [B] float32, summed log-probs of the reference, where the rows carry them
    desirable: Tensor | None = None  # [B] bool, the labels of unpaired data
    other: Batch | None = None  # unpaired data: the same prompts, each before a completion that answers another prompt
    shared: dict[str, float] = field(default_factory=dict)  # numbers of the whole window, over all ranks
    pairs: Tensor | None = None  # [2, P] int64, numbers of the chosen and of the rejected sequences; None: halves
    margin: Tensor | None = None  # [P] float32, by how much the chosen answer is better, where the rows say
    trees: Trees | None = None  # the layout of a packed batch
    rows: Tensor | None = None  # [N] int64, of a packed batch: the positions that predict its N targets, in their order
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
        return int(self.trees.reads.sum())

    @property
    def ends(self) -> Tensor:
        """[2, P] numbers of the sequences that are paired: chosen, rejected."""
        halves = torch.arange(len(self.targets), device=self.targets.device) if self.pairs is None else self.pairs
        return halves.view(2, -1)

    def predicting(self, hidden: Tensor) -> Tensor:
        """Of the last hidden states of `input_ids` those that predict the targets: [B, T, D], or [N, D] of a packed
        batch, for the N targets that are not -100."""
        return hidden if self.rows is None else rows_at(hidden, self.rows)

    def spread(self, values: Tensor) -> Tensor:
        """[B, T], 0 where there is no target, from a number for each row that `predicting` gives."""
        if self.rows is None:
            return values
        return values.new_zeros(self.targets.shape).masked_scatter(self.targets != IGNORE, values)


def collate_sft(rows: Sequence[dict[str, Any]], pad_id: int | None) -> Batch:
    """R rows of prompt_ids, completion_ids -> Batch with B = R. Here and below a batch without a pad id is packed.

    Rows with `assistant_masks` (TRL's name, a number for each token of the completion) have targets where it is not 0.
    """
    batch = _batch(rows, pad_id, "completion")
    if "assistant_masks" in rows[0]:  # nothing predicts a sequence's first token
        masks = [torch.tensor(row["assistant_masks"][0 if row["prompt_ids"] else 1 :]) for row in rows]
        there = batch.targets != IGNORE
        _keep(batch, there.masked_scatter(there, torch.cat(masks) != 0))
    return batch


def collate_pairs(rows: Sequence[dict[str, Any]], pad_id: int | None) -> Batch:
    """R rows of prompt_ids, chosen_ids, rejected_ids -> Batch, chosen first: B = 2P with P = R, or all answers of rows
    that have several, each in pairs with all on the other side.

    Rows with `ref_chosen_logps` and `ref_rejected_logps` (TRL's names) fill `ref_logps` [B] in the same order, rows
    with `margin` fill `margin` [P].
    """
    batch = _batch(rows, pad_id, "chosen", "rejected")
    sizes = [[len(answers(row[name])) for row in rows] for name in ("chosen_ids", "rejected_ids")]
    if len(rows) < sum(sizes[0]) or len(rows) < sum(sizes[1]):
        batch.pairs = _every_pair(*sizes)
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
    _keep(batch, ~torch.tensor([bool(row.get("masked")) for row in rows])[:, None])
    return batch


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(n), a function of its arguments alone."""
    return np.random.default_rng([seed, epoch]).permutation(n).tolist()


def split_order(order: Sequence[int], size: int) -> list[list[int]]:
    """Consecutive pieces of `size` row numbers; the last one may be shorter."""
    return [list(order[start : start + size]) for start in range(0, len(order), size)]


def _batch(rows: Sequence[dict[str, Any]], pad_id: int | None, *sides: str) -> Batch:
    """All rows with their first side, then all with their second."""
    sequences = [(row["prompt_ids"], ids) for side in sides for row in rows for ids in answers(row[f"{side}_ids"])]
    index = torch.tensor([row["index"] for row in rows])
    if pad_id is None:
        packed = pack(sequences)
        whole = torch.ones_like(packed.input_ids)
        batch = Batch(packed.input_ids, whole, packed.targets, index, trees=packed.trees)
        _keep(batch, packed.targets != IGNORE)
        return batch
    ids, targets = [], []
    for prompt, completion in sequences:
        whole, begin = [*prompt, *completion], max(len(prompt), 1)
        ids.append(torch.tensor(whole))
        targets.append(torch.tensor([IGNORE] * (begin - 1) + whole[begin:] + [IGNORE]))
    mask = _padded([torch.ones_like(row) for row in ids], 0)
    return Batch(_padded(ids, pad_id), mask, _padded(targets, IGNORE), index)


def _keep(batch: Batch, targets: Tensor) -> None:
    """Have a batch these targets alone, of a mask [B, T] or [B, 1]."""
    batch.targets = batch.targets.where(targets, IGNORE)
    if batch.trees is not None:
        batch.rows = batch.trees.index[batch.targets != IGNORE]


def _padded(rows: list[Tensor], value: int, side: str = "right") -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def _numbers(rows: Sequence[dict[str, Any]], *names: str) -> Tensor | None:
    """The columns one behind the other, float32; None where the rows have none."""
    if names[0] in rows[0]:
        values = [row[name] for name in names for row in rows]
        flat = [one for value in values for one in (value if isinstance(value, list) else [value])]
        return torch.tensor(flat, dtype=torch.float32)


def _every_pair(chosen: list[int], rejected: list[int]) -> Tensor:
    """[2, P] numbers of sequences, the chosen ones of all rows before the rejected ones: in each row all with all."""
    parts, first, second = [], 0, sum(chosen)
    for n, m in zip(chosen, rejected):
        parts.append(torch.cartesian_prod(torch.arange(first, first + n), torch.arange(second, second + m)))
        first, second = first + n, second + m
    return torch.cat(parts).T.contiguous()
