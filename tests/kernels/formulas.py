"""Every loss written again on whole tensors of log-probs, eagerly: what the fused losses are measured against.

A formula has the name and the arguments of its fused loss, with a `Batch` in place of hidden states, weight and
targets; `METRICS` has what some of them measure beside the loss. In float64 they are the truth. Nothing here is the
package's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Metrics = dict[str, Tensor]


@dataclasses.dataclass
class Batch:
    """What is known of the targets [B, T] under the policy, 0 where one is ignored. Of pairs the chosen half first."""

    logp: Tensor
    entropy: Tensor
    mask: Tensor  # bool
    lssp: Any = None  # log sum p^2
    mean_logit: Any = None
    correct: Any = None  # bool

    @property
    def sums(self) -> Tensor:
        return self.logp.sum(1)

    @property
    def length(self) -> Tensor:
        """[B]"""
        return self.mask.sum(1).clamp(min=1).double()

    @property
    def tokens(self) -> int:
        return max(int(self.mask.sum()), 1)


def ls(x: Tensor) -> Tensor:
    """log sigma"""
    return -torch.nn.functional.softplus(-x)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[: len(x) // 2], x[len(x) // 2 :]


def bradley_terry(z: Tensor, e: float) -> Tensor:
    return -(1 - e) * ls(z) - e * ls(-z)


def mean(x: Tensor, of: Tensor) -> Tensor:
    """Mean of x over the true entries of `of`, 0 where there is none."""
    return x[of].sum() / max(int(of.sum()), 1)


# -- pairs ----------------------------------------------------------------------------------------------------------
def divergent(d: Tensor, kind: str, a: float) -> Tensor:
    """The score of a log-ratio under an f-divergence."""
    if kind == "reverse_kl" or (kind == "alpha_divergence" and a == 1):
        return d
    if kind == "forward_kl":
        return 1 - (-d).exp()
    if kind == "js_divergence":
        return (2 * d.exp() / (1 + d.exp())).log()
    return (d.exp() ** (a - 1) - 1) / (a - 1)


def likelihood(x: Batch, items: float, num_tokens: float | None) -> Tensor:
    """(P,) values that sum, over `items`, to the mean over the chosen tokens."""
    tokens = int(halves(x.mask)[0].sum()) if num_tokens is None else num_tokens
    return -halves(x.sums)[0] * items / max(tokens, 1)


def dpo_loss(
    x: Batch, ref_logps: Tensor, *, beta: float = 0.1, loss_type: str | Sequence[str] = "sigmoid",
    label_smoothing: float = 0.0, loss_weights: Sequence[float] | None = None, average: bool = True,
    f_divergence_type: str = "reverse_kl", f_alpha_divergence_coef: float = 0.5, ld_alpha: float | None = None,
    use_weighting: bool = False, discopop_tau: float = 0.05, dpop_lambda: float = 50.0,
    num_items: float | None = None, num_tokens: float | None = None,
) -> Tensor:  # fmt: skip
    e, items = label_smoothing, max(len(x.mask) // 2, 1) if num_items is None else float(num_items)
    if ld_alpha is None:
        d = x.sums - ref_logps
    else:  # for completions that begin at position 0
        shorter = torch.minimum(*halves(x.mask.sum(1))).repeat(2)
        beyond = torch.arange(x.mask.shape[1]) >= shorter[:, None]
        d = ((x.logp - ref_logps) * torch.ones_like(x.logp).masked_fill(beyond, ld_alpha)).sum(1)
    score = divergent(d, f_divergence_type, f_alpha_divergence_coef)
    (w, l), (s_w, s_l), (m_w, m_l) = halves(d), halves(score), halves(score / x.length)
    z, mix = beta * (s_w - s_l), (beta / discopop_tau * (s_w - s_l)).sigmoid()

    def exo() -> Tensor:
        q = torch.stack((z.sigmoid(), 1 - z.sigmoid()))
        return (q * (q.log() - torch.tensor([[1 - e], [e]], dtype=torch.float64).log())).sum(0)

    def aot() -> Tensor:
        margins = (torch.sub(*halves(values)).sort().values for values in (x.sums, ref_logps))
        return bradley_terry(beta * torch.sub(*margins), e)

    formulas = {
        "sigmoid": lambda: bradley_terry(z, e),
        "sigmoid_norm": lambda: bradley_terry(beta * (m_w - m_l), e),
        "hinge": lambda: (1 - z).clamp(min=0),
        "robust": lambda: (-(1 - e) * ls(z) + e * ls(-z)) / (1 - 2 * e),
        "ipo": lambda: ((m_w - m_l if average else s_w - s_l) - 0.5 / beta) ** 2,
        "exo_pair": exo,
        "nca_pair": lambda: -ls(beta * w) - 0.5 * ls(-beta * w) - 0.5 * ls(-beta * l),
        "bco_pair": lambda: -ls(beta * w) - ls(-beta * l),
        "sppo_hard": lambda: (w - 0.5 / beta) ** 2 + (l + 0.5 / beta) ** 2,
        "aot": aot,
        "aot_unpaired": lambda: bradley_terry(beta * (w.sort().values - l.sort().values), e),
        "apo_zero": lambda: 1 - (beta * w).sigmoid() + (beta * l).sigmoid(),
        "apo_down": lambda: (beta * w).sigmoid() + 1 - (beta * (w - l)).sigmoid(),
        "discopop": lambda: (1 - mix) * -ls(z) + mix * (-z).exp(),
        "dpop": lambda: bradley_terry(beta * (s_w - s_l - dpop_lambda * (-w).clamp(min=0)), e),
        "sft": lambda: likelihood(x, items, num_tokens),
    }
    names = [loss_type] if isinstance(loss_type, str) else loss_type
    each = sum(factor * formulas[name]() for name, factor in zip(names, loss_weights or [1.0] * len(names)))
    if use_weighting:
        each = each * torch.mul(*halves(((x.logp - x.lssp).sum(1) / x.length).exp().detach()))
    return each.sum() / items


def cpo_loss(
    x: Batch, *, beta: float = 0.1, loss_type: str = "sigmoid", label_smoothing: float = 0.0, cpo_alpha: float = 1.0,
    simpo_gamma: float = 0.5, alpha: float = 0.0,
) -> Tensor:  # fmt: skip
    score = x.sums / x.length if loss_type in ("ipo", "simpo") else x.sums
    score = (1 - score.exp() ** -alpha) / alpha if alpha else score
    gap = torch.sub(*halves(score))
    each = {
        "sigmoid": bradley_terry(beta * gap, label_smoothing),
        "hinge": (1 - beta * gap).clamp(min=0),
        "ipo": (gap - 0.5 / beta) ** 2,
        "simpo": bradley_terry(beta * gap - simpo_gamma, label_smoothing),
    }[loss_type]
    return (each + cpo_alpha * likelihood(x, len(gap), None)).sum() / len(gap)


def simpo_loss(x: Batch, **options: Any) -> Tensor:
    return cpo_loss(x, loss_type="simpo", cpo_alpha=0.0, **options)


def orpo_loss(x: Batch, *, beta: float = 0.1) -> Tensor:
    score = (x.sums / x.length).clamp(max=-1e-12)
    odds = score.exp() / -torch.expm1(score)
    each = -beta * ls(torch.div(*halves(odds)).log()) + likelihood(x, len(odds) // 2, None)
    return each.mean()


def slic_loss(x: Batch, *, delta: float = 1.0, nll_coef: float = 1.0) -> Tensor:
    gap = torch.sub(*halves(x.sums))
    return ((delta - gap).clamp(min=0) + nll_coef * likelihood(x, len(gap), None)).mean()


# -- marks ----------------------------------------------------------------------------------------------------------
def kto_loss(
    x: Batch, ref_logps: Tensor, desirable: Tensor, kl: float | Tensor, *, beta: float = 0.1,
    desirable_weight: float = 1.0, undesirable_weight: float = 1.0, loss_type: str = "kto",
) -> Tensor:  # fmt: skip
    z = beta * (x.sums - ref_logps - (kl if loss_type == "kto" else 0.0))
    good, bad = desirable_weight * (1 - z.sigmoid()), undesirable_weight * (1 - (-z).sigmoid())
    return torch.where(desirable, good, bad).sum() / max(len(z), 1)


def bco_loss(
    x: Batch, ref_logps: Tensor, desirable: Tensor, delta: float, *, beta: float = 0.1, weights: Tensor | None = None
) -> Tensor:
    z = beta * (x.sums - ref_logps) - delta
    return ((1.0 if weights is None else weights) * torch.where(desirable, -ls(z), -ls(-z))).mean()


# -- tokens ---------------------------------------------------------------------------------------------------------
def sft_loss(x: Batch, *, loss_type: str = "nll", num_items: float | None = None) -> Tensor:
    each = x.logp if loss_type == "nll" else x.logp.exp().detach() * x.logp
    return -each.sum() / (x.tokens if num_items is None else num_items)


def reinforce_loss(x: Batch, advantages: Tensor) -> Tensor:
    return -(advantages[:, None] * x.logp).sum() / x.tokens


def surrogate(r: Tensor, a: Tensor, low: float, high: float, delta: float | None = None) -> Tensor:
    capped = r if delta is None else r.clamp(max=delta)
    return torch.maximum(-a * capped, -a * r.clamp(1 - low, 1 + high))


def ppo_clip_loss(
    x: Batch, old_logps: Tensor, advantages: Tensor, *, cliprange: float = 0.2, entropy_coef: float = 0.0,
    dual_clip: float | None = None,
) -> Tensor:  # fmt: skip
    each = surrogate((x.logp - old_logps).exp(), advantages, cliprange, cliprange, dual_clip)
    return (each - entropy_coef * x.entropy)[x.mask].sum() / x.tokens


def rloo_loss(
    x: Batch, old_logps: Tensor | None, advantages: Tensor, *, epsilon: float = 0.2, epsilon_high: float = 0.2
) -> Tensor:
    old = x.sums.detach() if old_logps is None else old_logps.double()
    old = old if old.dim() == 1 else old.sum(1)
    return surrogate((x.sums - old).exp(), advantages, epsilon, epsilon_high).mean()


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, cliprange_value: float,
    num_items: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """And the share of tokens that are clipped."""
    near = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    plain, clipped = (values - returns)[mask] ** 2, (near - returns)[mask] ** 2
    loss = 0.5 * torch.maximum(plain, clipped).sum() / (num_items or int(mask.sum()))
    return loss, (clipped > plain).double().mean()


def reward_loss(
    chosen: Tensor, rejected: Tensor, *, margin: Tensor | None, center_coef: float, num_items: float
) -> Tensor:
    gap = chosen - rejected - (0 if margin is None else margin)
    return (-gap.sigmoid().log() + center_coef * (chosen + rejected) ** 2).sum() / num_items


# -- groups ---------------------------------------------------------------------------------------------------------
def ratio_of(x: Batch, old: Tensor | None, level: str) -> Tensor:
    """[B, T], of tokens or of their sequences."""
    log_ratio = torch.where(x.mask, x.logp - (x.logp.detach() if old is None else old), 0.0)
    if level == "sequence":
        log_ratio = (log_ratio.sum(1) / x.length)[:, None].expand(x.mask.shape)
    return log_ratio.exp()


def kl_of(x: Batch, ref: Tensor, estimator: str = "k3") -> Tensor:
    d = x.logp - ref
    return {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() + d - 1}[estimator]


def phi(
    x: Batch, old: Tensor, advantages: Tensor, sampler: Tensor | None, options: dict[str, tuple[float, float]]
) -> Tensor:
    """VESPO's weight of a sequence [B, 1]."""
    w = ((x.logp - old) * x.mask).sum(1).exp().detach()
    if sampler is not None:
        w = w * torch.where(x.mask, sampler.clamp(min=1e-8), 1.0).prod(1)
    w, good = w.clamp(1e-8, math.exp(20)), advantages[:, 0] >= 0
    k, rate = (torch.where(good, *torch.tensor(options[name], dtype=torch.float64)) for name in ("k", "lambda"))
    return (rate.exp() * w**k * (-rate * w).exp())[:, None]


def geometric(x: Batch, old: Tensor, advantages: Tensor, low: float, high: float, keep: Tensor) -> Tensor:
    """The geometric mean of a sequence's ratios, each bounded where it speaks for itself, times -A."""
    r = (x.logp - old).exp()
    above, below = torch.minimum(r, r.clamp(max=math.exp(high))), torch.maximum(r, r.clamp(math.exp(-low)))
    product = torch.where(keep > 0, torch.where(advantages > 0, above, below), 1.0).prod(1, keepdim=True)
    return -advantages * product ** (1 / keep.sum(1, keepdim=True).clamp(min=1))


def sampler_ratio(x: Batch, old: Tensor, sampled: Tensor, mode: str, low: float, high: float) -> Tensor:
    """[B, T]; 1 where the sampler gave no log-prob."""
    difference = torch.where(x.mask, old.double() - sampled, 0.0).nan_to_num(nan=0.0)
    found = (difference.sum(1, keepdim=True) if "sequence" in mode else difference).exp().expand(x.mask.shape)
    return found.clamp(low, high) if "truncate" in mode else torch.where((found < low) | (found > high), 0.0, found)


def grpo_loss(
    x: Batch, old_logps: Tensor | None, advantages: Tensor, *, loss_type: str = "dapo", epsilon: float = 0.2,
    epsilon_high: float | None = None, delta: float | None = None, beta: float = 0.0, ref_logps: Tensor | None = None,
    importance_sampling_level: str = "token", max_completion_length: int = 0, kl_estimator: str = "k3",
    use_bias_correction_kl: bool = True, sapo_temperature_pos: float = 1.0, sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0, vespo_lambda_pos: float = 3.0, vespo_k_neg: float = 3.0, vespo_lambda_neg: float = 2.0,
    entropy_coef: float = 0.0, top_entropy_quantile: float = 1.0, off_policy_mask_threshold: float | None = None,
    sampling_logps: Tensor | None = None, vllm_importance_sampling_mode: str = "sequence_mask",
    vllm_importance_sampling_clip_min: float | None = None, vllm_importance_sampling_clip_max: float = 3.0,
) -> Tensor:  # fmt: skip
    B, mask, high = max(len(x.mask), 1), x.mask, epsilon if epsilon_high is None else epsilon_high
    a = (advantages if advantages.dim() == 2 else advantages[:, None]).expand(mask.shape)
    old, r = x.logp.detach() if old_logps is None else old_logps, ratio_of(x, old_logps, importance_sampling_level)
    keep, sampler = mask.double(), None
    if top_entropy_quantile < 1:
        least = torch.quantile(x.entropy[mask].detach(), 1 - top_entropy_quantile)
        keep = ((x.entropy >= least) & mask).double().detach()
    if sampling_logps is not None:
        bounds = vllm_importance_sampling_clip_min or 0.0, vllm_importance_sampling_clip_max
        sampler = sampler_ratio(x, old, sampling_logps, vllm_importance_sampling_mode, *bounds)
    if loss_type == "cispo":
        each = -r.clamp(max=high).detach() * a * x.logp
    elif loss_type == "sapo":
        tau = torch.where(a > 0, *torch.tensor([sapo_temperature_pos, sapo_temperature_neg], dtype=torch.float64))
        each = -4 / tau * (tau * (r - 1)).sigmoid() * a
    elif loss_type == "vespo":
        options = {"k": (vespo_k_pos, vespo_k_neg), "lambda": (vespo_lambda_pos, vespo_lambda_neg)}
        each = -phi(x, old, a, sampler, options) * a * x.logp
    elif loss_type == "gmpo":
        each = geometric(x, old, a, epsilon, high, keep)
    else:
        each = surrogate(r, a, epsilon, high, delta)
    if loss_type != "gmpo":
        each = each * keep
    if sampler is not None and loss_type != "vespo":
        each = each * sampler
    if off_policy_mask_threshold is not None:
        behaviour = old if sampling_logps is None else sampling_logps
        kl = torch.where(mask, behaviour - x.logp.detach(), 0.0).nan_to_num(nan=0.0).sum(1) / x.length
        each = each * ((a >= 0) | (kl <= off_policy_mask_threshold)[:, None])
    if beta:
        assert ref_logps is not None
        each = each + beta * kl_of(x, ref_logps, kl_estimator) * (r if use_bias_correction_kl else 1.0)
    each = torch.where(mask, each, 0.0)
    if loss_type in ("grpo", "sapo", "gmpo"):
        total = (each.sum(1) / x.length).sum() / B
    else:
        total = each.sum() / {"luspo": B, "dr_grpo": B * max_completion_length}.get(loss_type, x.tokens)
    return total - entropy_coef * (x.entropy * keep).sum() / keep.sum() if entropy_coef else total


# -- metrics --------------------------------------------------------------------------------------------------------
def of_tokens(x: Batch) -> Metrics:
    return {"entropy": mean(x.entropy, x.mask), "mean_token_accuracy": mean(x.correct.double(), x.mask)}


def of_classes(x: Batch, chosen: Tensor) -> Metrics:
    found = of_tokens(x)
    for word, rows in (("chosen", chosen), ("rejected", ~chosen)):
        found[f"logps/{word}"] = mean(x.sums, rows)
        found[f"logits/{word}"] = mean(x.mean_logit, x.mask & rows[:, None])
    return found


def of_dpo(x: Batch, ref_logps: Tensor, *, beta: float = 0.1, **_: Any) -> Metrics:
    w, l = halves(beta * (x.sums - ref_logps))
    every = torch.ones(len(w), dtype=torch.bool)
    rewards = {"chosen": w, "rejected": l, "margins": w - l, "accuracies": (w > l).double()}
    found = of_classes(x, torch.arange(len(x.mask)) < len(w))
    return found | {f"rewards/{word}": mean(values, every) for word, values in rewards.items()}


def of_kto(
    x: Batch, ref_logps: Tensor, desirable: Tensor, kl: float | Tensor, *, beta: float = 0.1, loss_type: str = "kto",
    **_: Any,
) -> Metrics:  # fmt: skip
    kl = kl if loss_type == "kto" else 0.0
    rewards, z0 = beta * (x.sums - ref_logps), torch.as_tensor(kl, dtype=torch.float64).expand(len(x.mask))
    chosen, rejected = mean(rewards, desirable), mean(rewards, ~desirable)
    counts = {"count/chosen": desirable.sum().double(), "count/rejected": (~desirable).sum().double()}
    means = {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}
    return of_classes(x, desirable) | counts | means | {"kl": z0.mean()}


def of_ppo(x: Batch, old_logps: Tensor, advantages: Tensor, *, cliprange: float = 0.2, **_: Any) -> Metrics:
    log_ratio = x.logp - old_logps
    r = log_ratio.exp()
    lost = r.clamp(1 - cliprange, 1 + cliprange) * advantages < r * advantages
    found = {"approxkl_avg": 0.5 * log_ratio**2, "clipfrac_avg": lost.double()}
    found = {f"policy/{name}": mean(each, x.mask) for name, each in found.items()}
    return of_tokens(x) | found | {"val/ratio": mean(r, x.mask)}


def of_grpo(
    x: Batch, old_logps: Tensor | None, advantages: Tensor, *, epsilon: float = 0.2, epsilon_high: float | None = None,
    beta: float = 0.0, ref_logps: Tensor | None = None, importance_sampling_level: str = "token",
    kl_estimator: str = "k3", use_bias_correction_kl: bool = True, **_: Any,
) -> Metrics:  # fmt: skip
    """Of the clipped term."""
    r, a = ratio_of(x, old_logps, importance_sampling_level), advantages
    a = (a if a.dim() == 2 else a[:, None]).expand(x.mask.shape)
    low = (r < 1 - epsilon) & (a < 0)
    high = (r > 1 + (epsilon if epsilon_high is None else epsilon_high)) & (a > 0)
    found = {"low_mean": low, "high_mean": high, "region_mean": low | high}
    out = of_tokens(x) | {f"clip_ratio/{name}": mean(each.double(), x.mask) for name, each in found.items()}
    if not beta or ref_logps is None:
        return out
    return out | {"kl": mean(kl_of(x, ref_logps, kl_estimator) * (r if use_bias_correction_kl else 1.0), x.mask)}


METRICS: dict[str, Callable[..., Metrics]] = {
    "sft_loss": lambda x, **_: of_tokens(x),
    "dpo_loss": of_dpo,
    "kto_loss": of_kto,
    "ppo_clip_loss": of_ppo,
    "grpo_loss": of_grpo,
}
