"""Group-relative policy optimisation: PPO's clipped ratio, its advantages normalised within the answers to a prompt.

A loss type is a policy term and an average over tokens. The average is a weight per token, an input of the loss: see
`token_weights`. With one ratio per sequence the clipped term is GSPO.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from align_kernels.losses.common import bounded_exp
from align_kernels.losses.corrections import Sums, off_policy_keep, sampler_ratio, top_entropy
from align_kernels.losses.family import Family, Positive
from align_kernels.losses.kl import KL_ESTIMATORS
from align_kernels.losses.ppo import RATIO_LIMIT, clip_surrogate
from align_kernels.losses.registry import register_loss
from align_kernels.sums import add_at

Value = tuple[Tensor, dict[str, Tensor]]  # (n,) each
LEAST_RATIO = math.log(1e-8)  # of VESPO's weights
CLIPPED = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")


class Policy(NamedTuple):
    """Tokens, and how likely they are beside the policy that sampled them: (n,) each."""

    logps: Tensor
    log_ratio: Tensor  # log pi - log pi_old of each token
    ratio: Tensor  # pi / pi_old of each token, or of its sequence
    advantages: Tensor
    total: Sums
    sampler: Tensor | None  # importance ratio of the training engine over a foreign sampler
    keep: Tensor | None  # 0 at tokens that the term leaves out


class Facts(NamedTuple):
    """What is to be known of a term beside its options."""

    metrics: tuple[str, ...] = ()
    by_sequence: bool = False  # it is one of whole sequences


TERMS = Family(Facts)


def either(condition: Tensor, yes: float, no: float) -> Tensor:
    """One of two numbers by a condition, in float64: of numbers alone `torch.where` makes float32."""
    return torch.full(condition.shape, no, dtype=torch.float64, device=condition.device).masked_fill(condition, yes)


# -- policy terms ---------------------------------------------------------------------------------------------------
@TERMS.add(metrics=CLIPPED)
def clip(p: Policy, *, epsilon: float = 0.2, epsilon_high: float = 0.2, delta: Positive | None = None) -> Value:
    """PPO-clip, arXiv:2402.03300 eq. 3; with a ratio per sequence GSPO, arXiv:2507.18071 eq. 5 and 7."""
    value = clip_surrogate(p.ratio, p.advantages, epsilon, epsilon_high, delta)
    return value, clipped(p, p.ratio < 1 - epsilon, p.ratio > 1 + epsilon_high)


def clipped(p: Policy, low: Tensor, high: Tensor) -> dict[str, Tensor]:
    low, high = low & (p.advantages < 0), high & (p.advantages > 0)
    return {name: x.to(p.logps.dtype) for name, x in zip(CLIPPED, (low, high, low | high))}


@TERMS.add(metrics=("cispo_clip_ratio",))
def cispo(p: Policy, *, epsilon_high: float = 0.2) -> Value:
    """-sg(min(r, epsilon_high)) A log pi, arXiv:2506.13585: every token keeps its gradient."""
    value = -p.ratio.detach().clamp(max=epsilon_high) * p.advantages * p.logps
    clipped = (p.ratio > epsilon_high) & (p.advantages > 0)
    return value, {"cispo_clip_ratio": clipped.to(value.dtype)}


@TERMS.add()
def sapo(p: Policy, *, sapo_temperature_pos: Positive = 1.0, sapo_temperature_neg: Positive = 1.05) -> Value:
    """-(4 / tau) sigma(tau (r - 1)) A with tau by the sign of A: a soft gate for the clip, arXiv:2511.20347."""
    tau = either(p.advantages > 0, sapo_temperature_pos, sapo_temperature_neg)
    return -(tau * (p.ratio - 1)).sigmoid() * 4 / tau * p.advantages, {}


@TERMS.add(metrics=("vespo/phi_seq_mean",), by_sequence=True)
def vespo(
    p: Policy,
    *,
    vespo_k_pos: float = 2.0,  # k and lambda where A >= 0
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,  # elsewhere
    vespo_lambda_neg: float = 2.0,
) -> Value:
    """-sg(phi(w)) A log pi, phi(w) = exp(lambda) w^k exp(-lambda w) of the sequence's ratio w, arXiv:2602.10693.

    The correction for a foreign sampler is part of w.
    """
    log_w = p.total(p.log_ratio.detach().clamp(-RATIO_LIMIT, RATIO_LIMIT))
    if p.sampler is not None:
        log_w = log_w + p.total(p.sampler.log().clamp(LEAST_RATIO, RATIO_LIMIT))
    log_w, good = log_w.clamp(LEAST_RATIO, RATIO_LIMIT), p.advantages >= 0
    k, rate = either(good, vespo_k_pos, vespo_k_neg), either(good, vespo_lambda_pos, vespo_lambda_neg)
    rate = rate.clamp(min=1e-4)
    phi = (rate + k * log_w - rate * log_w.exp()).exp()
    return -phi * p.advantages * p.logps, {"vespo/phi_seq_mean": phi}


@TERMS.add(metrics=CLIPPED, by_sequence=True)
def gmpo(p: Policy, *, epsilon: float = 0.2, epsilon_high: float = 0.2) -> Value:
    """-A exp(mean_t c) of a sequence, c = min(log r, epsilon_high) where A > 0, else max(log r, -epsilon): the clipped
    ratios' geometric mean, arXiv:2507.20673. The tokens of a sequence are those that `keep` leaves."""
    bounded = torch.where(p.advantages > 0, p.log_ratio.clamp(max=epsilon_high), p.log_ratio.clamp(min=-epsilon))
    keep = torch.ones_like(bounded) if p.keep is None else p.keep
    mean = p.total(bounded * keep) / p.total(keep).clamp(min=1)
    flags = clipped(p, p.log_ratio < -epsilon, p.log_ratio > epsilon_high)
    return -bounded_exp(mean, RATIO_LIMIT) * p.advantages, flags


class LossType(NamedTuple):
    term: str
    average: str  # see token_weights
    counts: str  # what num_items counts


LOSS_TYPES = {
    "grpo": LossType("clip", "sequence mean", "sequences"),
    "bnpo": LossType("clip", "token mean", "calls"),
    "dr_grpo": LossType("clip", "constant", "sequences"),
    "dapo": LossType("clip", "sum", "tokens"),
    "luspo": LossType("clip", "sum", "sequences"),
    "cispo": LossType("cispo", "sum", "tokens"),
    "sapo": LossType("sapo", "sequence mean", "sequences"),
    "vespo": LossType("vespo", "sum", "tokens"),
    "gmpo": LossType("gmpo", "sequence mean", "sequences"),
}


def token_weights(loss_type: str, mask: Tensor, max_completion_length: int | None) -> Tensor:
    """What a token's loss counts in the sum that `num_items` divides, (B, T)."""
    one = torch.ones((), dtype=torch.float64, device=mask.device)
    average = LOSS_TYPES[loss_type].average
    if average == "sequence mean":
        one = one / mask.sum(1, keepdim=True).clamp(min=1)
    elif average == "token mean":
        one = one / mask.sum().clamp(min=1)
    elif average == "constant":
        if not max_completion_length or max_completion_length <= 0:
            raise ValueError(f"{loss_type} needs max_completion_length above 0, got {max_completion_length}")
        one = one / max_completion_length
    return one.expand(mask.shape)


# -- the loss -------------------------------------------------------------------------------------------------------
@register_loss(
    "token",
    side={
        "old_logps": "token",
        "advantages": "token",
        "ref_logps": "token",
        "sampling_logps": "token",
        "weights": "token",
        "entropy_weight": "batch",
    },
    metrics=tuple(dict.fromkeys(("kl", *(name for term in TERMS.values() for name in term.facts.metrics)))),
    needs=("entropy", "sequence", "lengths"),
    sparse=True,
    family=TERMS,
    by="term",
)
def grpo(
    logps: Tensor,  # (n,)
    *,
    advantages: Tensor,  # (n,)
    weights: Tensor,  # (n,)
    old_logps: Tensor | None = None,  # (n,); None: the present policy sampled, ratio 1, gradient of the log-prob
    ref_logps: Tensor | None = None,  # (n,), read where beta is not 0
    sampling_logps: Tensor | None = None,  # (n,) as a foreign sampler gave them
    entropy: Tensor | None = None,  # (n,)
    entropy_weight: Tensor | None = None,  # () weight of a token's entropy
    sequence: Tensor | None = None,  # (n,) which of the S sequences a token belongs to
    lengths: Tensor | None = None,  # (S,)
    term: str = "clip",
    level: str = "token",
    beta: float = 0.0,
    kl_estimator: str = "k3",
    use_bias_correction_kl: bool = False,
    off_policy_mask_threshold: float | None = None,
    top_entropy_quantile: float = 1.0,
    entropy_coef: float = 0.0,
    vllm_importance_sampling_mode: str = "sequence_mask",
    vllm_importance_sampling_clip_min: float | None = None,
    vllm_importance_sampling_clip_max: float | None = 3.0,
    **options,
) -> Value:
    """weight * (keep * sampler * term + beta * KL) - entropy_coef * entropy of each token, see `TERMS`."""

    def total(x: Tensor) -> Tensor:
        assert sequence is not None and lengths is not None
        return add_at(torch.zeros_like(lengths), sequence, x)[sequence]

    def length() -> Tensor:
        assert sequence is not None and lengths is not None
        return lengths[sequence]

    old = logps.detach() if old_logps is None else old_logps
    log_ratio = logps - old
    ratio = bounded_exp(total(log_ratio) / length() if level == "sequence" else log_ratio, RATIO_LIMIT)
    sampler = keep = None
    if top_entropy_quantile < 1:
        assert entropy is not None
        keep = top_entropy(entropy, top_entropy_quantile)
    if sampling_logps is not None:
        bounds = vllm_importance_sampling_clip_min, vllm_importance_sampling_clip_max
        sampler = sampler_ratio(old, sampling_logps, vllm_importance_sampling_mode, *bounds, total)
    policy = Policy(logps, log_ratio, ratio, advantages, total, sampler, keep)
    value, metrics = TERMS(term, policy, **options)
    if off_policy_mask_threshold is not None:
        behaviour = old if sampling_logps is None else sampling_logps
        value = value * off_policy_keep(logps, behaviour, advantages, off_policy_mask_threshold, length(), total)
    if keep is not None and term != "gmpo":
        value = value * keep
    if sampler is not None and term != "vespo":
        value = value * sampler
    kl = torch.zeros_like(logps)
    if beta:
        assert ref_logps is not None
        kl = KL_ESTIMATORS[kl_estimator](logps, ref_logps)
        kl = kl * ratio if use_bias_correction_kl else kl
        value = value + beta * kl
    value = weights * value
    if entropy_coef:
        assert entropy is not None and entropy_weight is not None
        bonus = entropy_weight * entropy
        if keep is not None:  # a mean over the tokens that are kept
            bonus = bonus * keep * (len(keep) / keep.sum().clamp(min=1))
        value = value - entropy_coef * bonus
    return value, {"kl": kl.detach()} | metrics
