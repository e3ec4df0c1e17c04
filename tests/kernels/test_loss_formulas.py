"""Every fused loss: value and gradients against its formula in float64, by every backend, however it is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import check
from torch import Tensor

from align_kernels import planner

from .losses_table import MASK, ROWS, TARGETS, Batch, softmax, tensors

WAYS: dict[str, tuple[dict[str, Any], int | None]] = {  # head, rows per chunk
    "eager": (dict(impl="eager"), None),
    "torch": (dict(impl="torch"), None),
    "cpu": (dict(impl="cpu"), None),
    "cpu, cut": (dict(impl="cpu"), 4),
    "torch, cut, made again": (dict(impl="torch", workspace=2048), 4),
}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch) -> dict[str, Any]:
    head, rows = WAYS[request.param]
    if rows is not None:
        small = planner.PROFILES["cpu"]._replace(max_rows=rows, min_rows=2, tile_bytes=rows * 16 * 4)
        monkeypatch.setitem(planner.PROFILES, "cpu", small)
    return head


def truth(formula, factor: float = 1.0) -> tuple[Tensor, list[Tensor], Batch]:
    leaves = {name: x.double().requires_grad_() for name, x in tensors().items()}
    batch = Batch(*softmax(leaves))
    value = factor * formula(batch)
    return value.detach(), list(torch.autograd.grad(value, list(leaves.values()))), batch


@pytest.mark.parametrize("name", ROWS)
def test_value_and_gradients(name: str, way: dict[str, Any]):
    call, formula = ROWS[name]
    leaves = {key: x.requires_grad_() for key, x in tensors().items()}
    leaves["hidden"].data[~MASK] = torch.nan  # what is ignored must not be read
    out = call(leaves["hidden"], leaves["weight"], TARGETS, **way)
    value, grads, _ = truth(formula)
    assert out.loss.dtype == torch.float32 and not out.logps.requires_grad
    check("loss", out.loss.detach(), value, scale=1.0)
    for key, got, expected in zip(leaves, torch.autograd.grad(out.loss, list(leaves.values())), grads):
        if key == "hidden":
            expected = expected * MASK[..., None]
            got = got.where(MASK[..., None], 0.0)
        check(f"gradient of {key}", got, expected, scale=1e-3)
    for metric in out.metrics.values():
        assert metric.shape == () and not metric.requires_grad and metric.isfinite()


@pytest.mark.parametrize("name", ROWS)
def test_float64(name: str):
    """Inputs in float64 are computed in float64: the formula itself to 1e-11."""
    call, formula = ROWS[name]
    leaves = {key: x.double().requires_grad_() for key, x in tensors().items()}
    out = call(leaves["hidden"], leaves["weight"], TARGETS)
    value, grads, _ = truth(formula)
    check("loss", out.loss.detach(), value, scale=1.0)
    for key, got, expected in zip(leaves, torch.autograd.grad(out.loss, list(leaves.values())), grads):
        check(f"gradient of {key}", got, expected, scale=1e-2)
