"""Proximal policy optimisation: the clipped surrogate and the clipped value loss."""

from __future__ import annotations

import torch
from torch import Tensor

from align_kernels.losses.common import bounded_exp
from align_kernels.losses.registry import register_loss

RATIO_LIMIT = 20.0  # of a log-ratio: beyond, the ratio goes on along its tangent


def clip_surrogate(
    ratio: Tensor, advantages: Tensor, low: float, high: float, delta: float | None = None
) -> Tensor:  # of one shape
    """-min(min(r, delta) A, clip(r, 1 - low, 1 + high) A): arXiv:1707.06347 eq. 7, its clip of two sizes from
    arXiv:2503.14476 eq. 8.

    `delta` above 1 + high bounds the loss where A < 0: dual clip, arXiv:1912.09729, there called c.
    """
    free = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.minimum(free * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


@register_loss(
    "token",
    side={"old_logps": "token", "advantages": "token"},
    metrics=("policy/approxkl_avg", "policy/clipfrac_avg", "val/ratio"),
    needs=("entropy",),
    sparse=True,
)
def ppo_clip(
    logps: Tensor,  # (n,)
    *,
    old_logps: Tensor,  # (n,)
    advantages: Tensor,  # (n,)
    entropy: Tensor | float = 0.0,  # (n,)
    cliprange: float = 0.2,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:  # (n,)
    """`clip_surrogate` of r = pi / pi_old minus entropy_coef * entropy, arXiv:1707.06347 eq. 9."""
    log_ratio = logps - old_logps
    ratio = bounded_exp(log_ratio, RATIO_LIMIT)
    value = clip_surrogate(ratio, advantages, cliprange, cliprange, dual_clip)
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange) * advantages < ratio * advantages
    metrics = {
        "policy/approxkl_avg": 0.5 * log_ratio.detach() ** 2,
        "policy/clipfrac_avg": clipped.to(ratio.dtype),
        "val/ratio": ratio.detach(),
    }
    return value - entropy_coef * entropy, metrics


def clipped_value(values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float) -> Tensor:
    """max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2) / 2 of each token, as OpenAI Baselines' ppo2 has it."""
    clipped = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
