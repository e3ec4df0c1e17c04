"""Sums: their dtype, and sums by index whose bits do not depend on threads."""

from __future__ import annotations

import torch
from torch import Tensor


def float_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums over x: float32, float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


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
