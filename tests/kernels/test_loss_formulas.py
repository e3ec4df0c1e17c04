"""Every fused loss: value and gradients against its formula in float64, by every backend, however it is cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accuracy import check
from torch import Tensor

import align_kernels as ak
from align_kernels import reward_loss, value_loss
from align_kernels.losses import LOSSES
from align_kernels.schedules.request import profiled

from .losses_table import MARKS, MASK, ROWS, TARGETS, TOKENS, B, Batch, T, normal, softmax, tensors

WAYS: dict[str, tuple[dict[str, Any], int | None]] = {  # head, rows per chunk
    "eager": (dict(impl="eager"), None),
    "torch": (dict(impl="torch"), None),
    "cpu": (dict(impl="cpu"), None),
    "cpu, cut": (dict(impl="cpu"), 4),
    "torch, cut, made again": (dict(impl="torch", workspace=2048), 4),
}


@pytest.fixture(params=WAYS)
def way(request) -> Iterator[dict[str, Any]]:
    head, rows = WAYS[request.param]
    small = {} if rows is None else dict(max_rows=rows, min_rows=2, tile_bytes=rows * 16 * 4)
    with profiled("cpu", **small):
        yield head


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


# -- losses of values and scores ------------------------------------------------------------------------------------
@pytest.mark.parametrize("items", [None, 11])
def test_value_loss(items: float | None):
    values, old, returns = (normal(B, T, seed=s) for s in (20, 21, 22))
    values[~MASK] = old[~MASK] = returns[~MASK] = torch.nan
    out = value_loss(values.requires_grad_(), old, returns, MASK, cliprange_value=0.3, num_items=items)
    twin = values.detach().double().requires_grad_()
    near = old + (twin - old).clamp(-0.3, 0.3)
    each = 0.5 * torch.maximum((twin - returns) ** 2, (near - returns) ** 2)[MASK]
    true = each.sum() / (items or TOKENS)
    check("loss", out.loss.detach(), true.detach())
    got, expected = (torch.autograd.grad(x, y)[0] for x, y in ((out.loss, values), (true, twin)))
    check("gradient", got[MASK], expected[MASK])
    assert not got[~MASK].any()
    clipped = ((near - returns) ** 2 > (twin - returns) ** 2)[MASK].double().mean()
    check("clipped", out.metrics["val/clipfrac_avg"], clipped)


@pytest.mark.parametrize("margin", [None, torch.tensor([0.5, 0.0, 2.0])])
@pytest.mark.parametrize("center", [0.0, 0.01])
def test_reward_loss(center: float, margin: Tensor | None):
    """Bradley-Terry on scores; DPO is the same on log-ratios."""
    w, l = normal(3, seed=1).requires_grad_(), normal(3, seed=2).requires_grad_()
    out = reward_loss(w, l, margin=margin, center_coef=center, num_items=4)
    a, b = w.detach().double().requires_grad_(), l.detach().double().requires_grad_()
    gap = a - b - (0 if margin is None else margin)
    true = (-gap.sigmoid().log() + center * (a + b) ** 2).sum() / 4
    check("loss", out.loss.detach(), true.detach())
    for x, y in zip(torch.autograd.grad(out.loss, (w, l)), torch.autograd.grad(true, (a, b))):
        check("gradient", x, y)
    check("log-probs of the preferences", out.logps, (a - b).sigmoid().log().detach())
    if not center and margin is None:
        dpo, _ = LOSSES["dpo"].fn(torch.cat((w, l)), ref_logps=torch.zeros(6), lengths=torch.ones(6), beta=1.0)
        torch.testing.assert_close(dpo.sum() / 4, out.loss)


ONE = (torch.zeros(2, 1, 2), torch.zeros(3, 2), torch.zeros(2, 1).long())
WRONG = [
    (ak.sft_loss, (), dict(loss_type="dtf"), "loss_type must be one of nll, dft, got 'dtf'"),
    (ak.cpo_loss, (), dict(loss_type="orpo"), "loss_type must be one of sigmoid, .*got 'orpo'"),
    (ak.cpo_loss, (), dict(simpo_gamma=1.0), "simpo_gamma=1.0 is read by loss_type simpo, not by sigmoid"),
    (ak.cpo_loss, (), dict(cpo_alpha=-1.0), "weight of the likelihood must not be negative, got -1.0"),
    (ak.simpo_loss, (), dict(beta=0.0), "beta must be above 0, got 0.0"),
    (ak.orpo_loss, (), dict(nll_targets=ONE[2]), r"nll_targets must have shape \(1, 1\), got \(2, 1\)"),
    (ak.orpo_loss, (), dict(nll_targets=torch.ones(1, 1).long()), "nll_targets must hold the targets of the chosen"),
    (ak.slic_loss, (), dict(delta=0.0), "delta must be above 0, got 0.0"),
    (ak.kto_loss, (torch.zeros(2), MARKS[:2], 0.0), dict(loss_type="bco"), "loss_type must be one of kto, .*got 'bco'"),
    (ak.bco_loss, (torch.zeros(2), MARKS[:2], torch.zeros(2)), {}, r"delta must have shape \(\), got \(2,\)"),
    (ak.ppo_clip_loss, (torch.zeros(2, 1),) * 2, dict(dual_clip=1.0), "dual_clip must be above 1 or None, got 1.0"),
    (ak.reinforce_loss, (torch.zeros(3),), {}, r"advantages must have shape \(2, 1\) or \(2,\), got \(3,\)"),
    (ak.rloo_loss, (torch.zeros(3), torch.zeros(2)), {}, r"old_logps must have shape \(2,\) or \(2, 1\), got \(3,\)"),
    (ak.grpo_loss, (None, torch.zeros(2)), dict(loss_type="sapo", delta=2.0), "delta=2.0 is read by .*not by sapo"),
    (ak.grpo_loss, (None, torch.zeros(2)), dict(top_entropy_quantile=0.0), r"must lie in \(0, 1\], got 0.0"),
    (ak.grpo_loss, (None, torch.zeros(2)), dict(kl_estimator="k4"), "kl_estimator must be one of k1, k2, k3, got 'k4'"),
    (ak.grpo_loss, (None, torch.zeros(2)), dict(loss_type="vespo", importance_sampling_level="sequence"), "vespo"),
    (ak.grpo_loss, (None, torch.zeros(2)), dict(loss_type="gmpo", importance_sampling_level="sequence"), "gmpo weighs"),
    (ak.grpo_loss, (None, torch.zeros(2)), dict(loss_type="gmpo", delta=2.0), "delta=2.0 is read by .*not by gmpo"),
    (ak.grpo_loss, (None, torch.zeros(2)), dict(loss_type="vespo", sampling_logps=ONE[0][..., 0]), "vespo multiplies"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "more", "options", "message"), WRONG)
def test_refuses(call, more: tuple, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        call(*ONE, *more, **options)
