"""Fused losses of a case beside their formulas (formulas.py), and the check of a call against them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from accuracy import check
from devices import there
from torch import Tensor

import align_kernels
from align_kernels import LossOutput

from . import formulas
from .oracle import Case, Result, judge, loss_truth, near_ties

linear_logprobs = there(align_kernels.linear_logprobs)


@dataclasses.dataclass
class Twin:
    """A fused loss of a case and its formula."""

    call: Callable[..., LossOutput]  # (hidden, weight, targets, **head)
    formula: Callable[[Tensor, Tensor], Tensor]  # (log-probs, entropies)
    metrics: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    logps: Callable[[Tensor], Tensor]


def twin(case: Case, loss: str, *sides: Any, by_token: bool, **options: Any) -> Twin:
    fused, formula = there(getattr(align_kernels, loss)), getattr(formulas, loss)

    def metrics(fields: dict[str, Tensor]) -> dict[str, Tensor]:
        known = {name: fields[name] for name in ("logp", "entropy", "mean_logit", "correct")}
        return formulas.METRICS[loss](formulas.Batch(**known, mask=case.mask), *sides, **options)

    return Twin(
        lambda *args, **head: fused(*args, *sides, **options, **head),
        lambda logp, entropy: formula(formulas.Batch(logp, entropy, case.mask), *sides, **options),
        metrics,
        lambda logp: logp if by_token else logp.sum(1),
    )


def near(case: Case) -> Tensor:
    """Log-probs of the case's own policy [B, T]."""
    with torch.no_grad():
        return torch.nan_to_num(linear_logprobs(**case.tensors_for_call(), impl="eager").logp)


def noise(*shapes: torch.Size, seed: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng) for shape in shapes]


def sft(case: Case, num_items: float | None = None) -> Twin:
    return twin(case, "sft_loss", by_token=True, num_items=num_items)


def dpo(case: Case, *, seed: int = 5, **options: Any) -> Twin:
    (far,) = noise(case.targets.shape[:1], seed=seed)
    return twin(case, "dpo_loss", far * 3 - 5.0 * case.mask.sum(1), by_token=False, **options)


def kto(case: Case) -> Twin:
    rows = case.targets.shape[:1]
    ref, good = near(case).sum(1) + 4 * noise(rows, seed=4)[0], torch.arange(*rows) % 3 == 0
    options = dict(beta=0.2, desirable_weight=1.3, undesirable_weight=0.6)
    return twin(case, "kto_loss", ref, good, 0.7, by_token=False, **options)


def ppo(case: Case, entropy_coef: float = 0.0) -> Twin:
    advantages, other = noise(case.targets.shape, case.targets.shape, seed=3)
    return twin(case, "ppo_clip_loss", near(case) + 0.3 * other, advantages, by_token=True, entropy_coef=entropy_coef)


def grpo(case: Case, *, level: str = "token", on_policy: bool = False, **options: Any) -> Twin:
    shape = case.targets.shape
    advantages, *others = noise(shape[:1], shape, shape, seed=3)
    old, ref = (near(case) + 0.3 * other for other in others)
    options |= dict(importance_sampling_level=level, epsilon=0.2, epsilon_high=0.3, max_completion_length=50)
    options |= dict(ref_logps=ref, use_bias_correction_kl=False)
    return twin(case, "grpo_loss", None if on_policy else old, advantages, by_token=True, **options)


def verify(case: Case, twin: Twin, way: dict[str, Any], factor: float = 1.0) -> dict[str, float]:
    """Check value, metrics, log-probs and gradients of the fused loss times `factor`; errors over what is allowed."""
    leaves = case.leaves()
    out = twin.call(leaves["hidden"], leaves["weight"], case.targets, **case.keywords(leaves), **way)
    value, true = loss_truth(case, lambda *x: factor * twin.formula(*x))
    eager_value, eager = loss_truth(case, lambda *x: factor * twin.formula(*x), None) if case.narrow else (None, None)
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    grads = {}
    if wanted:
        grads = dict(zip(wanted, torch.autograd.grad(factor * out.loss, list(wanted.values()))))
    assert out.loss.shape == () and not out.logps.requires_grad
    assert not any(x.requires_grad for x in out.metrics.values())
    logp = linear_logprobs(**case.tensors_for_call(), **way)
    ratios = judge(case, Result(logp._asdict(), grads), true, eager)
    size = 1.0 + float(true.fields["logp"].sum(-1).abs().amax()) if true.fields["logp"].numel() else 1.0
    ratios["loss"] = check("loss", factor * out.loss.detach(), value, eager_value, scale=size)
    twins = None if eager is None else eager.fields
    for_eager = None if twins is None else twin.logps(twins["logp"])
    check("logps", out.logps, twin.logps(true.fields["logp"]), for_eager, scale=size)
    metrics = twin.metrics(true.fields)
    eager_metrics = None if twins is None else twin.metrics(twins)
    assert set(out.metrics) == set(metrics)
    ties = float(near_ties(case).sum()) / max(int(case.mask.sum()), 1)
    for name, got in out.metrics.items():
        assert got.shape == (), name
        if eager_metrics is not None and ("accura" in name or "clip" in name):
            continue  # counts of comparisons that rounding to bfloat16 may turn around
        if name == "mean_token_accuracy":
            assert abs(float(got - metrics[name])) <= ties + 1e-6, f"{name}: {got}, expected {metrics[name]}"
            continue
        twin_metric = None if eager_metrics is None else eager_metrics[name].double()
        check(name, got.detach().float(), metrics[name].double(), twin_metric, scale=size)
    return ratios
