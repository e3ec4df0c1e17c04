"""What the losses must be whatever their formula says: shifts, signs, zero at equality, finite at the limits; the gate
and the clamp on every one of them; and what float64 inside is for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from accuracy import check
from torch import Tensor

import align_kernels as ak
from align_kernels import LogitGradClamp, ProbGate
from align_kernels.losses.common import bounded_exp
from align_kernels.losses.cpo import CPO_LOSSES
from align_kernels.losses.dpo import PAIR_LOSSES
from align_kernels.losses.grpo import LOSS_TYPES as GROUP_TYPES
from align_kernels.losses.kl import KL_ESTIMATORS
from align_kernels.losses.registry import LOSSES

from .formulas import Batch
from .losses_table import MASK, ROWS, TARGETS, batch, tensors

PAIR: dict[str, dict[str, Any]] = {name: dict(loss_type=name) for name in PAIR_LOSSES if name != "sft"}
PAIR["exo_pair"] |= dict(label_smoothing=1e-3)
PAIR |= {f"f {kind}": dict(f_divergence_type=kind) for kind in ("forward_kl", "js_divergence", "alpha_divergence")}
SOLO = {"apo_down", "sppo_hard"}  # losses whose gradient does not raise the chosen answer everywhere


def dpo(w: float | Tensor, l: float | Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Value, and its derivatives by the log-probs of the chosen and of the rejected, of one pair without reference."""
    logps = torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in (w, l)]).requires_grad_()
    fixed = dict(ref_logps=torch.zeros(2).double(), lengths=torch.tensor([3.0, 5.0]).double())
    value, _ = LOSSES["dpo"].fn(logps, **fixed, **{"beta": 0.5} | options)
    (grad,) = torch.autograd.grad(value.sum(), logps)
    return value.detach()[0], grad[0], grad[1]


@pytest.mark.parametrize("name", PAIR)
def test_pairs_at_the_limits(name: str):
    """Log-ratios of +-100 and +-1000 give numbers: no NaN, and no infinite gradient where float32 holds it."""
    for size in (100.0, 1000.0):
        for w in (-size, 0.0, size):
            for l in (-size, 0.0, size):
                value, *grads = dpo(w, l, **PAIR[name])
                assert not value.isnan() and all(g.isfinite() for g in grads), (w, l, value, grads)


@pytest.mark.parametrize("name", PAIR)
def test_pairs_push_the_right_way(name: str):
    """Where the pair is far from learned, the loss raises the chosen over the rejected."""
    for w, l in ((-2.0, 1.5), (-0.5, 0.5), (0.3, 0.0)):
        _, up, down = dpo(w, l, **PAIR[name])
        assert down - up > 0, (w, l)
        if name not in SOLO:
            assert up <= 0 <= down or name in ("nca_pair", "aot_unpaired"), (w, l, up, down)


DELTA = [name for name in PAIR if name not in ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "dpop")]


@pytest.mark.parametrize("name", [n for n in DELTA if n not in ("ipo", "sigmoid_norm", "aot_unpaired")])
def test_shift_invariance(name: str):
    """What reads the difference alone does not see a constant added to both log-ratios."""
    if name.startswith("f "):
        return
    options = PAIR[name]
    value, up, down = dpo(0.4, -0.3, **options)
    assert dpo(7.4, 6.7, **options)[0] == pytest.approx(float(value), abs=1e-12)
    assert float(up + down) == pytest.approx(0.0, abs=1e-12)


def test_equal_policies():
    """Where the policy is its reference: log 2, rewards and divergence scores of 0, ratios of 1, a KL of 0."""
    for kind in ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"):
        value, up, down = dpo(0.0, 0.0, f_divergence_type=kind, f_alpha_divergence_coef=1.7)
        assert float(value) == pytest.approx(math.log(2)) and float(up) == -float(down)
        # f''(1) scales the gradient: 1 for both KLs and the alpha divergence, 1/2 for Jensen-Shannon
        assert float(down) == pytest.approx(0.125 if kind == "js_divergence" else 0.25)
    for kind in ("k1", "k2", "k3"):
        logps = torch.tensor([-1.0, -3.0], dtype=torch.float64, requires_grad=True)
        assert not KL_ESTIMATORS[kind](logps, logps.detach()).any()
        (grad,) = torch.autograd.grad(KL_ESTIMATORS[kind](logps, logps.detach()).sum(), logps)
        assert torch.equal(grad, torch.ones(2).double() if kind == "k1" else torch.zeros(2).double())


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimators_estimate(kind: str):
    """Under samples of pi their mean is the KL (k2: to second order), and never negative for k2 and k3."""
    rng = torch.Generator().manual_seed(0)
    pi, ref = (torch.randn(6, generator=rng, dtype=torch.float64).mul(0.2).log_softmax(0) for _ in range(2))
    each = KL_ESTIMATORS[kind](pi, ref)
    kl = (pi.exp() * (pi - ref)).sum()
    assert float((pi.exp() * each).sum()) == pytest.approx(float(kl), rel=0.1 if kind == "k2" else 1e-12)
    assert kind == "k1" or bool((each >= 0).all())


@pytest.mark.parametrize("loss_type", GROUP_TYPES)
@pytest.mark.parametrize("shift", [-1000.0, -100.0, 0.0, 100.0, 1000.0])
def test_groups_at_the_limits(shift: float, loss_type: str):
    """A policy however far from the one that sampled: finite loss and gradients, in float32 as well."""
    leaves = {name: x.requires_grad_() for name, x in tensors().items()}
    near = batch(tensors()).logp
    options: dict[str, Any] = dict(loss_type=loss_type, max_completion_length=9, epsilon_high=5.0, beta=0.1)
    for old, ref in ((near - shift, near), (near, near + shift)):
        out = ak.grpo_loss(
            leaves["hidden"], leaves["weight"], TARGETS, old, torch.tensor([1.0, -1.0] * 4), ref_logps=ref, **options
        )
        assert out.loss.isfinite()
        for grad in torch.autograd.grad(out.loss, list(leaves.values())):
            assert grad.isfinite().all()


def test_the_tangent_of_an_exponential():
    """Beyond the limit the value goes on rising and the gradient stays: a policy far away is still pulled back."""
    x = torch.tensor([3.0, 20.0, 25.0, 1000.0], dtype=torch.float64, requires_grad=True)
    y = bounded_exp(x, 20.0)
    (grad,) = torch.autograd.grad(y.sum(), x)
    top = math.exp(20)
    assert y.tolist() == pytest.approx([math.exp(3), top, 6 * top, 981 * top])
    assert grad[[0, 2, 3]].tolist() == pytest.approx([math.exp(3), top, top])


@pytest.mark.parametrize("loss_type", CPO_LOSSES)
def test_reference_free_at_the_limits(loss_type: str):
    for size in (0.0, 1.0, 1e3, 1e5):
        for logps in ([-size, 0.0], [0.0, -size]):
            x = torch.tensor(logps, dtype=torch.float64, requires_grad=True)
            lengths = torch.tensor([2.0, 3.0]).double()
            for fn, options in (
                (LOSSES["cpo"].fn, dict(loss_type=loss_type, lengths=lengths)),
                (LOSSES["cpo"].fn, dict(loss_type=loss_type, lengths=lengths, alpha=0.3)),
                (LOSSES["orpo"].fn, dict(completion=x, completion_lengths=lengths)),
                (LOSSES["slic"].fn, {}),
            ):
                value, _ = fn(x, **options)
                (grad,) = torch.autograd.grad(value.sum(), x)
                assert not value.isnan().any() and grad.isfinite().all(), (size, options)


@pytest.mark.parametrize("size", [-1000.0, -100.0, 0.0, 100.0, 1000.0])
def test_marks_and_scores_at_the_limits(size: float):
    x = torch.tensor([size, size], dtype=torch.float64, requires_grad=True)
    marks = dict(ref_logps=torch.zeros(2).double(), desirable=torch.tensor([True, False]))
    for value in (
        LOSSES["kto"].fn(x, **marks)[0],
        LOSSES["bco"].fn(x, **marks, delta=torch.zeros(()))[0],
        LOSSES["rloo"].fn(x, advantages=torch.tensor([1.0, -1.0]), old_logps=torch.zeros(2))[0],
        ak.reward_loss(x[:1], x[1:] * 0.0, center_coef=0.01).loss,
    ):
        (grad,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
        assert value.isfinite().all() and grad.isfinite().all()


def test_the_order_of_pairs_is_free():
    """Every loss of pairs is one of sets of pairs; aot_unpaired does not even see which are paired."""
    x, order = {name: t.double() for name, t in tensors().items()}, torch.tensor([2, 0, 3, 1])
    rows = torch.cat((order, order + 4))
    apart = torch.cat((order, torch.arange(4, 8)))
    ref = torch.linspace(-30, -10, 8).double()
    for name in PAIR:
        run = lambda r, o=PAIR[name]: ak.dpo_loss(x["hidden"][r], x["weight"], TARGETS[r], ref[r], **o).loss  # noqa: E731
        whole = run(torch.arange(8))
        torch.testing.assert_close(run(rows), whole)
        assert torch.allclose(run(apart), whole) == (name in ("aot_unpaired", "nca_pair", "bco_pair") or name in ALONE)


ALONE = {"sppo_hard", "apo_zero"}  # sums over single completions


# -- the gate -------------------------------------------------------------------------------------------------------
class Gated(torch.autograd.Function):
    """Identity on log-probs whose backward is the documented weight."""

    @staticmethod
    def forward(ctx, logp: Tensor, p_hi: float, power: float) -> Tensor:
        ctx.save_for_backward(logp)
        ctx.options = p_hi, power
        return logp.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        (logp,), (p_hi, power) = ctx.saved_tensors, ctx.options
        p = logp.exp()
        weight = torch.zeros_like(p) if math.isinf(power) else ((1 - p) / (1 - p_hi)) ** power
        return torch.where(p > p_hi, grad * weight, grad), None, None


def gated_truth(formula: Callable[[Batch], Tensor], gate: ProbGate) -> tuple[Tensor, list[Tensor]]:
    leaves = {name: x.double().requires_grad_() for name, x in tensors().items()}
    true = batch(leaves)
    plain = formula(true).detach()
    value = formula(replace(true, logp=Gated.apply(true.logp, *gate) * MASK))
    return plain, list(torch.autograd.grad(value, list(leaves.values())))


@pytest.mark.parametrize("gate", [ProbGate(0.02), ProbGate(0.01, 2.0)], ids=str)
@pytest.mark.parametrize("head", [dict(impl="eager"), dict(impl="cpu"), dict(impl="torch", workspace=2048)], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_gate(name: str, head: dict[str, Any], gate: ProbGate):
    """The value is the plain one; the gradient is that of gated log-probs."""
    p = batch(tensors()).logp.exp()[MASK]
    assert 0.1 < float((p > gate.p_hi).float().mean()) < 0.9
    call, formula, _ = ROWS[name]
    leaves = {key: x.requires_grad_() for key, x in tensors().items()}
    out = call(leaves["hidden"], leaves["weight"], TARGETS, prob_gate=gate, **head)
    plain, grads = gated_truth(formula, gate)
    check("loss", out.loss.detach(), plain, scale=1.0)
    for key, got, expected in zip(leaves, torch.autograd.grad(out.loss, list(leaves.values())), grads):
        check(f"gradient of {key}", got, expected, scale=1e-3)


def test_gate_of_log_probs():
    logps = torch.tensor([-0.01, -0.5, -3.0, 0.0], requires_grad=True)
    for gate, expected in ((ProbGate(0.9), [0.0, 1.0, 1.0, 0.0]), (ProbGate(0.9, 1.0), [0.0995, 1.0, 1.0, 0.0])):
        out = gate(logps)
        assert torch.equal(out, logps)
        (grad,) = torch.autograd.grad(out.sum(), logps)
        assert grad.tolist() == pytest.approx(expected, abs=1e-4)
    call = lambda gate: ak.sft_loss(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([1, 2]), prob_gate=gate)  # noqa: E731
    assert call(0.3).loss == call(ProbGate(0.3)).loss == call((0.3, 2.0)).loss
    for wrong, message in (
        (1.0, r"p_hi must lie in \(0, 1\), got 1.0"),
        ((0.5, 0.0), "power must be above 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            call(wrong)


# -- the clamp ------------------------------------------------------------------------------------------------------
class Clamped(torch.autograd.Function):
    """Identity on logits whose backward clips (1[v = y] - p) before g multiplies it, g being handed in."""

    @staticmethod
    def forward(ctx, logits: Tensor, g: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(logits, g)
        ctx.limit = limit
        return logits.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        logits, g = ctx.saved_tensors
        one = torch.nn.functional.one_hot(TARGETS.clamp(min=0), logits.shape[-1]) * MASK[..., None]
        r = (one - logits.softmax(-1)).clamp(-ctx.limit, ctx.limit)
        return g[..., None] * r * MASK[..., None], None, None


@pytest.mark.parametrize("name", [name for name in ROWS if "entropy_coef" not in name])
def test_clamp(name: str):
    """`grad_clamp` bounds the residual of every logit, in every fused loss."""
    call, formula, _ = ROWS[name]
    leaves = {key: x.requires_grad_() for key, x in tensors().items()}
    out = call(leaves["hidden"], leaves["weight"], TARGETS, grad_clamp=LogitGradClamp(0.05))
    twins = {key: x.double().requires_grad_() for key, x in tensors().items()}
    true = batch(twins)
    logp = true.logp.detach().requires_grad_()
    value = formula(replace(true, logp=logp))
    (g,) = torch.autograd.grad(value, logp)
    logits = twins["hidden"] @ twins["weight"].T
    grads = torch.autograd.grad(Clamped.apply(logits, g, 0.05).sum(), list(twins.values()))
    check("loss", out.loss.detach(), value.detach(), scale=1.0)
    for key, got, expected in zip(leaves, torch.autograd.grad(out.loss, list(leaves.values())), grads):
        check(f"gradient of {key}", got, expected, scale=1e-3)


# -- precision ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("impl", ["cpu", "torch"])
def test_sums_of_1e5_keep_their_difference(impl: str):
    """Long answers with log-probs near -1e5 in sum, 0.05 apart from the reference: float32 knows them to 0.008."""
    T, V, D = 4096, 40, 6
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, T, D, generator=rng), torch.randn(V, D, generator=rng) * 12
    targets = torch.randint(0, V, (2, T), generator=rng)
    logp = (hidden.double() @ weight.double().T).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    sums = logp.sum(1)
    assert bool((sums < -0.9e5).all())
    ref = sums - torch.tensor([0.05, 0.0]).double()
    leaf = hidden.clone().requires_grad_()
    out = ak.dpo_loss(leaf, weight, targets, ref, beta=1.0, impl=impl)
    true = math.log1p(math.exp(-0.05))
    error = abs(float(out.loss.detach()) - true)
    assert error < 5e-4
    margin = torch.sub(*(sums.float() - ref.float())).double()
    assert abs(float(torch.nn.functional.softplus(-margin)) - true) > 2 * error


def test_batch_losses_say_so():
    """aot sorts one call's pairs, so the planner sees one unit; the others are cut between pairs."""
    x = tensors()
    assert {n for n, x in PAIR_LOSSES.items() if x.facts.unit == "batch"} == {"aot", "aot_unpaired"}
    for name, unit in (("dpo", "pair"), ("kto", "sequence"), ("grpo", "token"), ("rloo", "sequence"), ("orpo", "pair")):
        assert LOSSES[name].unit == unit
        assert ak.explain(x["hidden"], x["weight"], TARGETS, loss=name).rows == int(MASK.sum())
