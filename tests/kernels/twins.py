"""Fused losses written again on log-probs of any dtype, and the check of a fused call against them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from accuracy import check
from devices import there
from torch import Tensor
from torch.nn.functional import softplus

from align_kernels import LossOutput, dpo_loss, grpo_loss, kto_loss, linear_logprobs, ppo_clip_loss, sft_loss

from .oracle import Case, Result, judge, loss_truth, near_ties

dpo_loss, grpo_loss, kto_loss, ppo_clip_loss, sft_loss = map(
    there, (dpo_loss, grpo_loss, kto_loss, ppo_clip_loss, sft_loss)
)
linear_logprobs = there(linear_logprobs)


@dataclasses.dataclass
class Twin:
    """A fused loss of a case and its formula."""

    call: Callable[..., LossOutput]  # (hidden, weight, targets, **head)
    formula: Callable[[Tensor, Tensor], Tensor]
    metrics: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    logps: Callable[[Tensor], Tensor]


def mean(x: Tensor, of: Tensor) -> Tensor:
    """Mean of x over the true entries of `of`, 0 where there is none."""
    return x[of].sum() / max(int(of.sum()), 1)


def token_metrics(case: Case, fields: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(
        entropy=mean(fields["entropy"], case.mask), mean_token_accuracy=mean(fields["correct"].double(), case.mask)
    )


def sft(case: Case, num_items: float | None = None) -> Twin:
    items = max(int(case.mask.sum()), 1) if num_items is None else num_items
    return Twin(
        lambda *args, **head: sft_loss(*args, num_items=num_items, **head),
        lambda logp, entropy: -logp.sum() / items,
        lambda fields: token_metrics(case, fields),
        lambda logp: logp,
    )


def class_metrics(case: Case, fields: dict[str, Tensor], chosen: Tensor) -> dict[str, Tensor]:
    metrics = token_metrics(case, fields)
    for word, rows in (("chosen", chosen), ("rejected", ~chosen)):
        metrics[f"logps/{word}"] = mean(fields["logp"].sum(1), rows)
        metrics[f"logits/{word}"] = mean(fields["mean_logit"], case.mask & rows[:, None])
    return metrics


def dpo(case: Case, *, beta=0.1, loss_type="sigmoid", label_smoothing=0.0, num_items: Any = None, seed=5) -> Twin:
    B = len(case.targets)
    P, e = B // 2, label_smoothing
    ref = torch.randn(B, generator=torch.Generator().manual_seed(seed)) * 3 - 5.0 * case.mask.sum(1)
    items = max(P, 1) if num_items is None else float(num_items)
    counts = case.mask.sum(1).clamp(min=1).double()

    def formula(logp: Tensor, entropy: Tensor) -> Tensor:
        ratio = logp.sum(1) - ref.to(logp.dtype)
        z = beta * (ratio[:P] - ratio[P:])
        if loss_type == "hinge":
            return (1 - z).clamp(min=0).sum() / items
        if loss_type == "ipo":
            average = ratio / counts
            return ((average[:P] - average[P:] - 0.5 / beta) ** 2).sum() / items
        good, bad = softplus(-z), softplus(z)
        if loss_type == "robust":
            return ((1 - e) * good - e * bad).sum() / (1 - 2 * e) / items
        return ((1 - e) * good + e * bad).sum() / items

    def metrics(fields: dict[str, Tensor]) -> dict[str, Tensor]:
        rewards = beta * (fields["logp"].sum(1) - ref.to(fields["logp"].dtype))
        every, half = torch.ones(P, dtype=torch.bool), torch.arange(B) < P
        return class_metrics(case, fields, half) | {
            "rewards/chosen": mean(rewards[:P], every),
            "rewards/rejected": mean(rewards[P:], every),
            "rewards/margins": mean(rewards[:P] - rewards[P:], every),
            "rewards/accuracies": mean((rewards[:P] > rewards[P:]).double(), every),
        }

    hyper = dict(beta=beta, loss_type=loss_type, label_smoothing=label_smoothing, num_items=num_items)
    return Twin(lambda *args, **head: dpo_loss(*args, ref, **hyper, **head), formula, metrics, lambda logp: logp.sum(1))


def kto(case: Case) -> Twin:
    B, beta, kl = len(case.targets), 0.2, 0.7
    near = torch.nan_to_num(linear_logprobs(**case.tensors_for_call(), impl="eager").logp).sum(1)
    ref = near + 4 * torch.randn(B, generator=torch.Generator().manual_seed(4))
    good = torch.arange(B) % 3 == 0

    def formula(logp: Tensor, entropy: Tensor) -> Tensor:
        z = beta * (logp.sum(1) - ref - kl)
        return torch.where(good, 1.3 * (1 - torch.sigmoid(z)), 0.6 * (1 - torch.sigmoid(-z))).sum() / max(B, 1)

    def metrics(fields: dict[str, Tensor]) -> dict[str, Tensor]:
        rewards = beta * (fields["logp"].sum(1) - ref)
        chosen, rejected = mean(rewards, good), mean(rewards, ~good)
        return class_metrics(case, fields, good) | {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "count/chosen": good.sum().double(),
            "count/rejected": (~good).sum().double(),
            "kl": torch.tensor(kl if B else torch.nan, dtype=torch.float64),
        }

    weights = dict(desirable_weight=1.3, undesirable_weight=0.6)
    return Twin(
        lambda *args, **head: kto_loss(*args, ref, good, kl, beta=beta, **weights, **head),
        formula,
        metrics,
        lambda logp: logp.sum(1),
    )


def ppo(case: Case, entropy_coef: float = 0.0) -> Twin:
    rng = torch.Generator().manual_seed(3)
    advantages = torch.randn(case.targets.shape, generator=rng)
    with torch.no_grad():
        near = linear_logprobs(**case.tensors_for_call(), impl="eager").logp
    old = near + 0.3 * torch.randn(case.targets.shape, generator=rng)
    items, clip = max(int(case.mask.sum()), 1), 0.2

    def formula(logp: Tensor, entropy: Tensor) -> Tensor:
        ratio = (logp - old).exp()
        gain = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages) + entropy_coef * entropy
        return -gain[case.mask].sum() / items

    def metrics(fields: dict[str, Tensor]) -> dict[str, Tensor]:
        log_ratio = fields["logp"] - old
        ratio = log_ratio.exp()
        lost = ratio.clamp(1 - clip, 1 + clip) * advantages < ratio * advantages
        return token_metrics(case, fields) | {
            "policy/approxkl_avg": mean(0.5 * log_ratio**2, case.mask),
            "policy/clipfrac_avg": mean(lost.double(), case.mask),
            "val/ratio": mean(ratio, case.mask),
        }

    return Twin(
        lambda *args, **head: ppo_clip_loss(*args, old, advantages, cliprange=clip, entropy_coef=entropy_coef, **head),
        formula,
        metrics,
        lambda logp: logp,
    )


def grpo(case: Case, *, loss_type="dapo", level="token", beta=0.0, delta=None, on_policy=False) -> Twin:
    rng = torch.Generator().manual_seed(3)
    B, _ = case.targets.shape
    advantages = torch.randn(B, generator=rng)
    near = linear_logprobs(**case.tensors_for_call(), impl="eager").logp
    old, ref = (near + 0.3 * torch.randn(case.targets.shape, generator=rng) for _ in range(2))
    low, high, longest = 0.2, 0.3, 50
    mask, lengths = case.mask, case.mask.sum(1, keepdim=True).clamp(min=1)

    def ratios(logp: Tensor) -> Tensor:
        log_ratio = torch.where(mask, logp - (logp.detach() if on_policy else old), 0.0)
        if level == "sequence":
            log_ratio = (log_ratio.sum(1, keepdim=True) / lengths).expand(mask.shape)
        return log_ratio.exp()

    def kl(logp: Tensor) -> Tensor:
        return (ref - logp).exp() - (ref - logp) - 1

    def formula(logp: Tensor, entropy: Tensor) -> Tensor:
        ratio, A = ratios(logp), advantages[:, None]
        capped = ratio if delta is None else torch.clamp(ratio, max=delta)
        token = -torch.min(capped * A, ratio.clamp(1 - low, 1 + high) * A) + (beta * kl(logp) if beta else 0.0)
        token = torch.where(mask, token, 0.0)
        if loss_type == "grpo":
            return (token.sum(1) / lengths[:, 0]).sum() / max(B, 1)
        return token.sum() / (max(B, 1) * longest if loss_type == "dr_grpo" else max(int(mask.sum()), 1))

    def metrics(fields: dict[str, Tensor]) -> dict[str, Tensor]:
        ratio, A = ratios(fields["logp"]), advantages[:, None].expand(mask.shape)
        below, above = (ratio < 1 - low) & (A < 0), (ratio > 1 + high) & (A > 0)
        found = {"low_mean": below, "high_mean": above, "region_mean": below | above}
        out = token_metrics(case, fields) | {f"clip_ratio/{k}": mean(v.double(), mask) for k, v in found.items()}
        return out | ({"kl": mean(kl(fields["logp"]), mask)} if beta else {})

    hyper = dict(loss_type=loss_type, importance_sampling_level=level, beta=beta, delta=delta, epsilon=low)
    hyper |= dict(epsilon_high=high, ref_logps=ref, max_completion_length=longest, use_bias_correction_kl=False)
    return Twin(
        lambda *args, **head: grpo_loss(*args, None if on_policy else old, advantages, **hyper, **head),
        formula,
        metrics,
        lambda logp: logp,
    )


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
