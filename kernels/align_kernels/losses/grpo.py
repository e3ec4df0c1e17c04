"""Group-relative policy optimisation: PPO's clipped ratio, its advantages normalised within the answers to a prompt.

How tokens are averaged is a weight per token, an input of the loss: see `token_weights`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from align_kernels.losses.registry import loss

SIDE = {"old_logps": "token", "advantages": "token", "ref_logps": "token", "weights": "token"}
AVERAGES = ("grpo", "bnpo", "dr_grpo", "dapo")
METRICS = ("kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = log ref - log pi: an estimate of KL(pi || ref) that is never negative."""
    d = ref_logps - logps
    return torch.expm1(d) - d


def clipped_with_kl(
    log_ratio: Tensor,  # (n,)
    logps: Tensor,  # (n,)
    *,
    advantages: Tensor,  # (n,)
    ref_logps: Tensor,  # (n,), not read where beta is 0
    weights: Tensor,  # (n,)
    epsilon: float,
    epsilon_high: float,
    delta: float | None,
    beta: float,
) -> tuple[Tensor, dict[str, Tensor]]:  # (n,)
    """w (-min(min(r, delta) A, clip(r, 1 - e, 1 + e_high) A) + beta k3)."""
    ratio = log_ratio.exp()
    free = ratio if delta is None else ratio.clamp(max=delta)
    value = -torch.minimum(free * advantages, ratio.clamp(1 - epsilon, 1 + epsilon_high) * advantages)
    kl = torch.zeros_like(value)
    if beta:
        kl = k3(logps, ref_logps)
        value = value + beta * kl
    low = (ratio < 1 - epsilon) & (advantages < 0)
    high = (ratio > 1 + epsilon_high) & (advantages > 0)
    measured = (kl.detach(), *(x.to(ratio.dtype) for x in (low, high, low | high)))
    return weights * value, dict(zip(METRICS, measured))


@loss("token", side=SIDE, metrics=METRICS, sparse=True)
def grpo(
    logps: Tensor,  # (n,)
    *,
    old_logps: Tensor,  # (n,), not read where on_policy
    on_policy: bool = False,  # the sampling policy is the present one: ratio 1, gradient of the log-prob
    **rest,
) -> tuple[Tensor, dict[str, Tensor]]:  # (n,)
    """One ratio per token, arXiv:2402.03300 eq. 3 and 4."""
    return clipped_with_kl(logps - (logps.detach() if on_policy else old_logps), logps, **rest)


@loss("sequence", side=SIDE, metrics=METRICS, tokens=True, lengths=True, sparse=True)
def gspo(
    logps: Tensor,  # (n,)
    *,
    sequence: Tensor,  # (n,) which of the S sequences a token belongs to
    lengths: Tensor,  # (S,)
    old_logps: Tensor,  # (n,), not read where on_policy
    on_policy: bool = False,
    **rest,
) -> tuple[Tensor, dict[str, Tensor]]:  # (n,)
    """One ratio per sequence, exp of its mean log-ratio, arXiv:2507.18071 eq. 7."""
    log_ratio = logps - (logps.detach() if on_policy else old_logps)
    mean = torch.zeros_like(lengths).index_add(0, sequence, log_ratio) / lengths.clamp(min=1)
    return clipped_with_kl(mean[sequence], logps, **rest)


def token_weights(loss_type: str, mask: Tensor, max_completion_length: int | None) -> Tensor:
    """What a token's loss counts in the sum that `num_items` divides, (B, T)."""
    one = torch.ones((), device=mask.device)
    if loss_type == "grpo":
        one = one / mask.sum(1, keepdim=True).clamp(min=1)
    elif loss_type == "bnpo":
        one = one / mask.sum().clamp(min=1)
    elif loss_type == "dr_grpo":
        if not max_completion_length or max_completion_length <= 0:
            raise ValueError(f'loss_type="dr_grpo" needs max_completion_length above 0, got {max_completion_length}')
        one = one / max_completion_length
    return one.expand(mask.shape)
