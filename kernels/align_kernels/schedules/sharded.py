"""Vocabulary-parallel: the weight is sharded along V, hidden and targets are the same on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from align_kernels.backends.state import ARGMAX, MAX, SUM, SUM_SQ, SUM_X, TARGET, TOTAL


def group_of(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def shard(columns: int, targets: Tensor, group: dist.ProcessGroup | None) -> tuple[int, int, int]:
    """The first column of this rank, the columns of the widest rank (ranks must take one plan), and of all."""
    if group is None:
        return 0, columns, columns
    rank, checksum = dist.get_rank(group), (targets * torch.arange(1, len(targets) + 1, device=targets.device)).sum()
    shards = torch.zeros(dist.get_world_size(group), 3, dtype=torch.int64, device=targets.device)
    shards[rank] = torch.tensor([columns, len(targets), int(checksum)])
    dist.all_reduce(shards, group=group)
    sizes, rows, checksums = zip(*shards.tolist())
    if len(set(rows)) > 1 or len(set(checksums)) > 1:
        raise ValueError(
            f"the ranks that share the vocabulary hold different targets ({rows} kept): give each of them the same "
            "hidden and targets, or give each the whole weight"
        )
    return sum(sizes[:rank]), max(sizes), sum(sizes)


def total(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`x`, added in place over the ranks that share the vocabulary: they take one decision."""
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


def merge(state: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The state of the whole vocabulary from the states of its shards, the same bits on every rank."""
    parts = torch.empty(dist.get_world_size(group), *state.shape, dtype=state.dtype, device=state.device)
    dist.all_gather(list(parts), state, group=group)
    maxima, s = parts[:, :, MAX], parts[:, :, SUM]
    m = maxima.max(0).values
    shift = torch.where(s > 0, maxima - m, 0.0)
    factor = shift.exp()
    first = (maxima == m).int().argmax(0, keepdim=True)
    merged = torch.zeros_like(state)
    merged[:, MAX] = m
    merged[:, SUM] = (factor * s).sum(0)
    merged[:, SUM_X] = (factor * (parts[:, :, SUM_X] + s * shift)).sum(0)
    merged[:, SUM_SQ] = (factor * factor * parts[:, :, SUM_SQ]).sum(0)
    merged[:, TOTAL] = parts[:, :, TOTAL].sum(0)
    merged[:, TARGET] = parts[:, :, TARGET].sum(0)
    merged[:, ARGMAX] = parts[:, :, ARGMAX].gather(0, first)[0]
    return merged
