"""Policy gradients without a critic: REINFORCE on tokens, RLOO on whole sequences.

Both take advantages as they come: r - mean of the others (leave-one-out), r - r(greedy) (ReMax), whitened token returns
(REINFORCE++, whose loss is `ppo_clip`).
"""

from __future__ import annotations

from torch import Tensor

from align_kernels.losses.common import bounded_exp
from align_kernels.losses.ppo import RATIO_LIMIT, clip_surrogate
from align_kernels.losses.registry import register_loss


@register_loss("token", side={"advantages": "token"})
def reinforce(logps: Tensor, *, advantages: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # (n,) -> (n,)
    """-A log pi, Williams 1992: the gradient of `ppo_clip` where the present policy sampled."""
    return -advantages * logps, {}


@register_loss(
    "sequence",
    side={"old_logps": "sequence", "advantages": "sequence"},
    metrics=("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"),
)
def rloo(
    logps: Tensor,  # (S,)
    *,
    advantages: Tensor,  # (S,)
    old_logps: Tensor | None = None,  # (S,); None: the present policy sampled
    epsilon: float = 0.2,
    epsilon_high: float = 0.2,
) -> tuple[Tensor, dict[str, Tensor]]:  # (S,)
    """PPO-clip whose action is the whole sequence, arXiv:2402.14740: R = exp(sum_t log pi - log pi_old)."""
    ratio = bounded_exp(logps - (logps.detach() if old_logps is None else old_logps), RATIO_LIMIT)
    low, high = (ratio < 1 - epsilon) & (advantages < 0), (ratio > 1 + epsilon_high) & (advantages > 0)
    flags = {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low | high}
    value = clip_surrogate(ratio, advantages, epsilon, epsilon_high)
    return value, {name: x.to(value.dtype) for name, x in flags.items()}
