"""Every fused loss: value and gradients against its formula in float64, by every backend, however it is cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accuracy import check, largest
from torch import Tensor

import align_kernels as ak
from align_kernels import reward_loss, value_loss
from align_kernels.losses import LOSSES
from align_kernels.schedules.request import profiled

from . import formulas
from .losses_table import ADV, MARKS, MASK, OLD, ROWS, TARGETS, B, T, V, batch, normal, tensors

EVERY, HEAD_FROZEN = ("hidden", "weight"), ("hidden",)
WAYS: dict[str, tuple[dict[str, Any], int | None, tuple[str, ...]]] = {  # head, rows per chunk, what is trained
    "eager": (dict(impl="eager"), None, EVERY),
    "torch": (dict(impl="torch"), None, EVERY),
    "cpu": (dict(impl="cpu"), None, EVERY),
    "cpu, cut": (dict(impl="cpu"), 4, EVERY),
    "torch, cut, made again": (dict(impl="torch", workspace=2048), 4, EVERY),
    "cpu, a bias": (dict(impl="cpu"), None, (*EVERY, "bias")),
    "cpu, frozen head": (dict(impl="cpu"), None, HEAD_FROZEN),
    "torch, cut, frozen head": (dict(impl="torch"), 4, HEAD_FROZEN),
}


@pytest.fixture(params=WAYS)
def way(request) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
    head, rows, trained = WAYS[request.param]
    small = {} if rows is None else dict(max_rows=rows, min_rows=2, tile_bytes=rows * 16 * 4)
    with profiled("cpu", **small):
        yield head, trained


def inputs(trained: tuple[str, ...], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    made = tensors() | ({"bias": 0.3 * normal(V, seed=2)} if "bias" in trained else {})
    return {key: x.to(dtype).requires_grad_(key in trained) for key, x in made.items()}


@pytest.mark.parametrize("name", ROWS)
def test_value_gradients_and_metrics(name: str, way: tuple[dict[str, Any], tuple[str, ...]]):
    (call, formula, metrics), (head, trained) = ROWS[name], way
    leaves, twins = inputs(trained), inputs(trained, torch.float64)
    leaves["hidden"].data[~MASK] = torch.nan  # what is ignored must not be read
    out = call(leaves["hidden"], leaves["weight"], TARGETS, bias=leaves.get("bias"), **head)
    true = batch(twins)
    value = formula(true)
    assert out.loss.dtype == torch.float32 and not out.logps.requires_grad
    check("loss", out.loss.detach(), value.detach(), scale=1.0)
    grads = (torch.autograd.grad(x, [of[key] for key in trained]) for x, of in ((out.loss, leaves), (value, twins)))
    for key, got, expected in zip(trained, *grads):
        if key == "hidden":
            expected = expected * MASK[..., None]
            got = got.where(MASK[..., None], 0.0)
        check(f"gradient of {key}", got, expected, scale=1e-3)
    for metric in out.metrics.values():
        assert metric.shape == () and not metric.requires_grad and metric.isfinite()
    logps = true.logp.detach() if out.logps.dim() == 2 else true.sums.detach()
    check("logps", out.logps, logps, scale=largest(true.sums))
    expected = {} if metrics is None else metrics(true)
    assert metrics is None or out.metrics.keys() == expected.keys()
    for key, known in expected.items():  # a mean may be smaller than what it is made of
        scale = largest(true.sums) if key.startswith(("logps/", "rewards/", "logits/")) else 0.1
        check(key, out.metrics[key].float(), known.detach().double(), scale=scale)


@pytest.mark.parametrize("name", ROWS)
def test_float64(name: str):
    """Inputs in float64 are computed in float64: the formula itself to 1e-11."""
    call, formula, _ = ROWS[name]
    leaves, twins = inputs(EVERY, torch.float64), inputs(EVERY, torch.float64)
    out, value = call(leaves["hidden"], leaves["weight"], TARGETS), formula(batch(twins))
    check("loss", out.loss.detach(), value.detach(), scale=1.0)
    grads = (torch.autograd.grad(x, list(of.values())) for x, of in ((out.loss, leaves), (value, twins)))
    for key, got, expected in zip(leaves, *grads):
        check(f"gradient of {key}", got, expected, scale=1e-2)


def test_the_metrics_of_clipping_see_something():
    """Neither nothing nor everything is clipped in the rows above."""
    true, near = batch(tensors()), ("level=sequence", "on policy")
    rows = [row for name, row in ROWS.items() if row.metrics is not None and not any(word in name for word in near)]
    shares = [float(x) for row in rows for key, x in row.metrics(true).items() if "clip" in key]
    assert len(shares) > 50 and all(0 < x < 1 for x in shares)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("loss_type", "num_items"), [("grpo", B), ("dr_grpo", B), ("dapo", int(MASK.sum()))])
def test_grpo_pieces_equal_the_whole(loss_type: str, num_items: int, level: str):
    hidden, weight = inputs(EVERY).values()
    options: dict[str, Any] = dict(loss_type=loss_type, importance_sampling_level=level, max_completion_length=9)
    whole = ak.grpo_loss(hidden, weight, TARGETS, OLD, ADV, **options).loss
    options["num_items"] = num_items
    pieces = sum(
        ak.grpo_loss(hidden[r], weight, TARGETS[r], OLD[r], ADV[r], **options).loss
        for r in (slice(0, 3), slice(3, 4), slice(4, 8))
    )
    torch.testing.assert_close(pieces, whole)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (pieces, whole))):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


# -- losses of values and scores ------------------------------------------------------------------------------------
@pytest.mark.parametrize("items", [None, 11])
def test_value_loss(items: float | None):
    values, old, returns = (normal(B, T, seed=s) for s in (20, 21, 22))
    values[~MASK] = old[~MASK] = returns[~MASK] = torch.nan
    out = value_loss(values.requires_grad_(), old, returns, MASK, cliprange_value=0.3, num_items=items)
    twin = values.detach().double().requires_grad_()
    true, clipped = formulas.value_loss(twin, old, returns, MASK, cliprange_value=0.3, num_items=items)
    check("loss", out.loss.detach(), true.detach())
    got, expected = (torch.autograd.grad(x, y)[0] for x, y in ((out.loss, values), (true, twin)))
    check("gradient", got[MASK], expected[MASK])
    assert not got[~MASK].any()
    check("clipped", out.metrics["val/clipfrac_avg"], clipped)


@pytest.mark.parametrize("margin", [None, torch.tensor([0.5, 0.0, 2.0])])
@pytest.mark.parametrize("center", [0.0, 0.01])
def test_reward_loss(center: float, margin: Tensor | None):
    """Bradley-Terry on scores; DPO is the same on log-ratios."""
    w, l = normal(3, seed=1).requires_grad_(), normal(3, seed=2).requires_grad_()
    out = reward_loss(w, l, margin=margin, center_coef=center, num_items=4)
    a, b = w.detach().double().requires_grad_(), l.detach().double().requires_grad_()
    true = formulas.reward_loss(a, b, margin=margin, center_coef=center, num_items=4)
    check("loss", out.loss.detach(), true.detach())
    for x, y in zip(torch.autograd.grad(out.loss, (w, l)), torch.autograd.grad(true, (a, b))):
        check("gradient", x, y)
    check("log-probs of the preferences", out.logps, (a - b).sigmoid().log().detach())
    if not center and margin is None:
        dpo, _ = LOSSES["dpo"].fn(torch.cat((w, l)), ref_logps=torch.zeros(6), lengths=torch.ones(6), beta=1.0)
        torch.testing.assert_close(dpo.sum() / 4, out.loss)


# hidden [2, 1, 2], weight [3, 2], targets [2, 1]
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
    (ak.kto_loss, (torch.zeros(2), MARKS[:2], 0.0), dict(beta=0.0), "beta must be above 0, got 0"),
    (ak.kto_loss, (torch.zeros(2), MARKS[:2].long(), 0.0), {}, "desirable must be bool, got torch"),
    (ak.kto_loss, (torch.zeros(3), MARKS[:2], 0.0), {}, r"ref_logps must have shape \(2,\), got \(3,\)"),
    (ak.kto_loss, (torch.zeros(2), MARKS[:2], torch.zeros(3)), {}, r"kl must have shape \(\) or \(2,\), got \(3,\)"),
    (ak.bco_loss, (torch.zeros(2), MARKS[:2], torch.zeros(2)), {}, r"delta must have shape \(\), got \(2,\)"),
    (ak.ppo_clip_loss, (torch.zeros(2, 1),) * 2, dict(dual_clip=1.0), "dual_clip must be above 1 or None, got 1.0"),
    (ak.ppo_clip_loss, (torch.zeros(2, 1),) * 2, dict(cliprange=0), "cliprange must be above 0, got 0"),
    (ak.ppo_clip_loss, (torch.zeros(2, 1), torch.zeros(2)), {}, r"advantages must have shape \(2, 1\), got \(2,\)"),
    (ak.reinforce_loss, (torch.zeros(3),), {}, r"advantages must have shape \(2, 1\) or \(2,\), got \(3,\)"),
    (ak.rloo_loss, (torch.zeros(3), torch.zeros(2)), {}, r"old_logps must have shape \(2,\) or \(2, 1\), got \(3,\)"),
    (ak.grpo_loss, (None, torch.zeros(2)), dict(loss_type="gspo"),
     "loss_type must be one of grpo, bnpo, dr_grpo, dapo, luspo, .*, got 'gspo'"),
    (ak.grpo_loss, (None, torch.zeros(2)), dict(importance_sampling_level="word"),
     "importance_sampling_level must be .* token, sequence, got 'word'"),
    (ak.grpo_loss, (None, torch.zeros(2)), dict(epsilon=-0.1),
     "epsilon and epsilon_high must not be negative, got -0.1 and -0.1"),
    (ak.grpo_loss, (None, torch.zeros(2)), dict(delta=0.0), "delta must be above 0, got 0.0"),
    (ak.grpo_loss, (None, torch.zeros(2)), dict(beta=0.04), r"beta=0.04 needs ref_logps \[B, T\]"),
    (ak.grpo_loss, (None, torch.zeros(2)), dict(loss_type="dr_grpo"), "needs max_completion_length above 0, got None"),
    (ak.grpo_loss, (torch.zeros(2), torch.zeros(2)), {}, r"old_logps must have shape \(2, 1\), got \(2,\)"),
    (ak.grpo_loss, (None, torch.zeros(3)), {}, r"advantages must have shape \(2, 1\) or \(2,\), got \(3,\)"),
    (ak.grpo_loss, (None, torch.zeros(2)), dict(beta=0.1, ref_logps=torch.zeros(2, 2)),
     r"ref_logps must have shape \(2, 1\), got \(2, 2\)"),
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
