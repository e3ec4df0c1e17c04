"""Proximal policy optimisation, the clipped surrogate."""

from __future__ import annotations

import torch
from torch import Tensor

from align_kernels.losses.registry import loss

SIDE = {"old_logps": "token", "advantages": "token"}
METRICS = ("policy/approxkl_avg", "policy/clipfrac_avg", "val/ratio")


@loss("token", side=SIDE, metrics=METRICS, sparse=True)
def ppo_clip(
    logps: Tensor,  # (n,)
    *,
    old_logps: Tensor,  # (n,)
    advantages: Tensor,  # (n,)
    cliprange: float = 0.2,
) -> tuple[Tensor, dict[str, Tensor]]:  # (n,)
    """-min(r A, clip(r, 1 - e, 1 + e) A) with r = pi / pi_old, arXiv:1707.06347 eq. 7."""
    log_ratio = logps - old_logps
    ratio = log_ratio.exp()
    free, clipped = ratio * advantages, ratio.clamp(1 - cliprange, 1 + cliprange) * advantages
    metrics = {
        "policy/approxkl_avg": 0.5 * log_ratio.detach() ** 2,
        "policy/clipfrac_avg": (clipped < free).to(ratio.dtype),
        "val/ratio": ratio.detach(),
    }
    return -torch.minimum(free, clipped), metrics


@loss("token", side=SIDE, metrics=METRICS, entropy=True, sparse=True)
def ppo_clip_entropy(
    logps: Tensor,  # (n,)
    *,
    entropy: Tensor,  # (n,)
    entropy_coef: float,
    old_logps: Tensor,  # (n,)
    advantages: Tensor,  # (n,)
    cliprange: float = 0.2,
) -> tuple[Tensor, dict[str, Tensor]]:  # (n,)
    """`ppo_clip` with the entropy bonus of arXiv:1707.06347 eq. 9: minus c H."""
    value, metrics = ppo_clip(logps, old_logps=old_logps, advantages=advantages, cliprange=cliprange)
    return value - entropy_coef * entropy, metrics
