"""Sums of the head's gradients where some tiles reach every column and others only some, in any order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from align_kernels.head import read_head
from align_kernels.schedules import tiles
from align_kernels.schedules.plan import start

N, V, D, R = 5, 37, 20, 2
ORDERS = ("", "d", "b", "bb", "db", "bd", "bbd", "dbd", "bdb")  # d: a tile of every column, b: a block of some


def tiled_head(dtype: torch.dtype, impl: str) -> tiles.TiledHead:
    hidden, weight = torch.zeros(N, D, dtype=dtype), torch.zeros(V, D, dtype=dtype, requires_grad=True)
    bias = torch.zeros(V, dtype=dtype, requires_grad=True)
    lora_A, lora_B = (torch.zeros(*shape, dtype=dtype, requires_grad=True) for shape in ((R, D), (V, R)))
    head, settings, needs = read_head(
        hidden, weight, torch.zeros(N, dtype=torch.int64), bias=bias, lora=(lora_A, lora_B, 1.0), impl=impl,
        drop_mass=0.1,
    )  # fmt: skip
    return start(head, settings, needs, torch.arange(N)).tiled


def verify(order: str, dtype: torch.dtype, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """dW, the bias's and lora_B's against float64; memory that nothing has written yet is NaN."""
    empty = tiles.TiledHead.empty
    monkeypatch.setattr(tiles.TiledHead, "empty", lambda *args, **options: empty(*args, **options).fill_(torch.nan))
    tiled, rng = tiled_head(dtype, impl), torch.Generator().manual_seed(len(order))
    grads, reached = tiled.grads, torch.zeros(V, dtype=torch.bool)
    true = [torch.zeros(*shape, dtype=torch.float64) for shape in ((V, D), (V,), (V, R))]
    for kind in order:
        columns = torch.randperm(V, generator=rng)[:9] if kind == "b" else torch.arange(V)
        dz, x, xa = (torch.randn(N, size, generator=rng).to(tiled.dtype) for size in (len(columns), D, R))
        if kind == "b":
            grads.begin_by_rows()
            grads.add(columns, dz, x, xa)
        else:
            for v0, v1 in ((0, 30), (30, V)):
                grads.add(slice(v0, v1), dz[:, v0:v1], x, xa)
            grads.started = True
        reached[columns] = True
        parts: tuple[Tensor, ...] = dz.double().T @ x.double(), dz.double().sum(0), dz.double().T @ xa.double()
        for total, part in zip(true, parts):
            total[columns] += part
    dw, bias, _, lora_B = grads.finish()
    for found, total in zip((dw, bias, lora_B), true):
        assert found is not None and found.dtype == dtype and not found[~reached].any()
        torch.testing.assert_close(found.double(), total, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ORDERS)
def test_columns_in_any_order(order: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    verify(order, dtype, "torch", monkeypatch)
