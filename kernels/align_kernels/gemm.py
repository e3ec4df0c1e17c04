"""The matrix products of the schedules."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter


def gemm_dtype(hidden: torch.dtype, weight: Tensor, narrow: bool) -> torch.dtype:
    """The dtype that GEMMs read.

    The wider of hidden and weight. torch has no GEMM with narrow inputs and a float32 output for a CPU: where the
    backend has none of its own (`narrow`), 16-bit storage is widened there, tile by tile or where a product packs it.
    """
    dtype = torch.promote_types(hidden, weight.dtype)
    return dtype if narrow or weight.device.type != "cpu" else torch.promote_types(dtype, torch.float32)


def logits_dtype(hidden: torch.dtype, weight: Tensor) -> torch.dtype:
    """The dtype in which logits are kept: float32 at least, where GEMMs of 16-bit inputs can write it."""
    dtype, device = torch.promote_types(hidden, weight.dtype), weight.device
    return torch.promote_types(dtype, torch.float32) if device.type == "cpu" or widens(device) else dtype


def widens(device: torch.device) -> bool:
    """Whether torch has GEMMs of 16-bit inputs with a float32 output: `out_dtype`, with cuBLAS alone."""
    return device.type == "cuda" and torch.version.hip is None and "dtype_out" in torch.ops.aten.addmm.overloads()


def _count_dtype_out() -> None:
    """Let FlopCounterMode count `addmm.dtype_out`: torch hands its formula the dtype where it expects a shape."""
    addmm = torch.ops.aten.addmm
    formula = flop_counter.flop_registry[addmm]

    @wraps(formula)
    def tolerant(*args: Any, **kwargs: Any) -> int:
        return formula(*(x for x in args if not isinstance(x, torch.dtype)), **kwargs)

    flop_counter.flop_registry[addmm] = tolerant


_count_dtype_out()


def product(acc: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """acc (+)= a @ b, the sum in acc's dtype."""
    if a.dtype == acc.dtype:
        torch.addmm(acc, a, b, out=acc) if add else torch.mm(a, b, out=acc)
    elif widens(acc.device):
        mm, addmm = torch.ops.aten.mm.dtype_out, torch.ops.aten.addmm.dtype_out
        addmm(acc, a, b, acc.dtype, out=acc) if add else mm(a, b, acc.dtype, out=acc)
    elif add:
        acc.add_(torch.mm(a, b))
    else:
        acc.copy_(torch.mm(a, b))
