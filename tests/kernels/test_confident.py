"""Rows whose target has a probability of 1 - 1e-6 .. 1 - 1e-12: their gradient is 1 - p, which a subtraction in
float32, or a product of logits rounded to float32, would lose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from align_kernels import linear_logprobs, sft_loss
from align_kernels.backends import cpu

MISSING = cpu.why_not(torch.device("cpu"), torch.float32)
ISAS = cpu.arguments._C.available_isas() if MISSING is None else []
V, D, TARGET = 2100, 6, 2050  # more than one block of columns
SCALE, TEMPERATURE = 1.3, 0.7  # no power of two: the product of logit and factor is rounded
LEFT = torch.tensor([1e-6, 1e-8, 1e-10, 1e-12], dtype=torch.float64)  # 1 - p of each row


@pytest.fixture(params=["torch", *ISAS])
def impl(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "torch":
        yield "torch"
        return
    before = cpu.arguments._C.isa()
    cpu.arguments._C.set_isa(request.param)
    yield "cpu"
    cpu.arguments._C.set_isa(before)


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden [4, D] and weight [V, D] with one logit that stands out and all others 0."""
    weight = torch.randn(V, D, generator=torch.Generator().manual_seed(0))
    weight[:, 0] = 0.0
    weight[TARGET, 0] = 1.0
    hidden = torch.zeros(len(LEFT), D)
    hidden[:, 0] = ((V - 1) / LEFT).log() * TEMPERATURE / SCALE
    return hidden, weight, torch.full((len(LEFT),), TARGET)


def truth(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """1 - p, and the gradients of the sum of log-probs, from the other columns' probabilities: no subtraction."""
    x, w = hidden.double(), weight.double()
    others = torch.arange(V) != TARGET
    odds = ((x @ w.T - (x @ w[TARGET])[:, None]) * SCALE / TEMPERATURE).exp()
    p = odds / (1 + odds[:, others].sum(1, keepdim=True))
    left, chain = p[:, others].sum(1), SCALE / TEMPERATURE
    dx = chain * (left[:, None] * w[TARGET] - p[:, others] @ w[others])
    dw = -chain * p.T @ x
    dw[TARGET] = chain * left @ x
    return left, dx, dw


def close(name: str, got: Tensor, true: Tensor, left: Tensor) -> None:
    """Row by row, to the rounding of a logit of 50 in float32, and of 1 + (1 - p) in float64."""
    error = (got.double() - true).norm(dim=-1) / true.norm(dim=-1)
    assert (error < 2e-5 + 3e-16 / left).all(), f"{name}: {error.tolist()}"


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clamp": dict(grad_clamp=(0.9, 0.0, "residual")),
    "made again": dict(workspace=1024),
    "compacted": dict(drop_mass=2.0**-19),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("train", ["hidden", "both"])
@pytest.mark.parametrize("fused", [False, True], ids=["late", "fused"])
def test_one_minus_p(fused: bool, train: str, head: str, impl: str):
    hidden, weight, targets = tensors()
    left, dx, dw = truth(hidden, weight)
    hidden.requires_grad_()
    weight.requires_grad_(train == "both")
    options = dict(logit_scale=SCALE, temperature=TEMPERATURE, impl=impl) | HEADS[head]
    if fused:
        out = sft_loss(hidden, weight, targets, num_items=1.0, **options)
        (-out.loss).backward()
        logp = out.logps
    else:
        logp = linear_logprobs(hidden, weight, targets, **options).logp
        logp.sum().backward()
    close("log-probs", -torch.expm1(logp.detach().double())[:, None], left[:, None], left)
    assert hidden.grad is not None
    if head == "compacted":  # what is left lies in columns that may be dropped, but for the target's own share
        got, share = hidden.grad[:, 0].double(), SCALE / TEMPERATURE * left
        assert ((got / share - 1).abs() < 2e-5 + 3e-16 / left).all()
        return
    close("gradient of hidden", hidden.grad, dx, left)
    if weight.requires_grad:  # sums over the rows, of which the first has the most
        assert weight.grad is not None
        close("gradient of the target's row", weight.grad[TARGET, :1], dw[TARGET, :1], left[0])
        close("gradient of the other rows", weight.grad[:TARGET], dw[:TARGET], left[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_only_column_of_a_vocabulary_is_certain(dtype: torch.dtype, impl: str):
    """V = 1: log-prob and entropy are 0 and so is every gradient, however the logit was rounded."""
    for late in (True, False):
        hidden = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        weight = torch.tensor([[0.3, -1.7, 2.9]], dtype=dtype, requires_grad=True)
        targets = torch.zeros(40, dtype=torch.int64)
        options = dict(logit_scale=1.7, temperature=0.7, impl=impl)
        if late:
            out = linear_logprobs(hidden, weight, targets, **options)
            assert (out.logp == 0).all() and (out.entropy == 0).all()
            (out.logp.sum() + out.entropy.sum()).backward()
        else:
            loss = sft_loss(hidden, weight, targets, **options).loss
            assert loss == 0
            loss.backward()
        assert hidden.grad is not None and weight.grad is not None
        assert (hidden.grad == 0).all() and (weight.grad == 0).all()
