"""Sums: their dtype, and sums by index whose bits do not depend on threads."""

from __future__ import annotations

import torch
from torch import Tensor


def float_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums over x: float32, float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def scalar(x: float | Tensor, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """A number as a tensor [] of a device, filled there: a copy from the CPU would wait. A tensor as it is, moved."""
    if isinstance(x, Tensor):
        return x.to(device=device or x.device, dtype=dtype or x.dtype)
    return torch.full((), x, device=device, dtype=dtype)


def waits(x: Tensor) -> bool:
    """Whether to look at a number of x is to wait for a device; on a CPU it is there."""
    return x.device.type != "cpu"


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on a device: nothing of it can be looked at."""
    if torch.compiler.is_compiling() or device.type != "cuda" or not torch.cuda.is_initialized():
        return False
    return torch.cuda.is_current_stream_capturing()


def read_back(numbers: Tensor) -> list[int]:
    """Whole numbers [n] of a device, for which the CPU waits until all that was queued is done: once a call."""
    return numbers.tolist()


def positions(mask: Tensor, count: int) -> Tensor:
    """Where a mask [n] of `count` trues is true, int64 ascending, without waiting for the device."""
    place = torch.where(mask, mask.cumsum(0) - 1, count)
    everywhere = torch.arange(len(mask), device=mask.device)
    return everywhere.new_empty(count + 1).scatter_(0, place, everywhere)[:count]


def add_at(out: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """Add x [n, ...] to out [m, ...] at index [n] (int64, any order and repeats), in place; returns `out`.

    Each element has one order of summation: a CPU's threads race in `index_put_`, and a GPU's in `index_add_`.
    """
    if out.device.type == "cpu":
        return out.index_add_(0, index, x)
    return out.index_put_((index,), x, accumulate=True)


def take_at(x: Tensor, index: Tensor) -> Tensor:
    """x [m, ...] at index [n] (int64, any order and repeats), whose gradient is summed in one order: on a CPU's threads
    that of indexing races, on a GPU that of index_select."""
    return x.index_select(0, index) if x.device.type == "cpu" else x[index]
