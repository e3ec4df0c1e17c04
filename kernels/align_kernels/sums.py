"""Sums by index whose bits do not depend on threads."""

from __future__ import annotations

from torch import Tensor


def add_at(out: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """Add x [n, ...] to out [m, ...] at index [n] (int64, any order and repeats), in place; returns `out`.

    Each element has one order of summation: a CPU's threads race in `index_put_`, and a GPU's in `index_add_`.
    """
    if out.device.type == "cpu":
        return out.index_add_(0, index, x)
    return out.index_put_((index,), x, accumulate=True)
