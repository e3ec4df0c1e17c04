"""The loss of a reward model."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from align_kernels.arguments import check_float, public
from align_kernels.fused.core import Items, LossOutput, check_shape, output
from align_kernels.losses.reward import reward


@public
def reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | None = None,
    center_coef: float = 0.0,
    num_items: Items = None,
) -> LossOutput:
    """Bradley-Terry on scores: -log sigma(r_w - r_l - margin) (arXiv:2307.09288 eq. 2), plus center_coef *
    (r_w + r_l)^2 (arXiv:2312.09244 eq. 2), which pulls the scores towards 0.

    Args:
        chosen, rejected: [P] scores, differentiable.
        margin: [P], how much better the chosen is. Default None: 0.
        center_coef: >= 0; TRL's center_rewards_coefficient. Default 0.0.
        num_items: the normaliser. Default None: the P pairs of this call.

    Returns:
        LossOutput; logps [P] = log sigma(r_w - r_l), the log-prob of each preference; metrics accuracy, margin,
        mean_reward, rewards/chosen, rewards/rejected.

    Raises:
        ValueError: center_coef below 0, shapes that do not fit.
    """
    check_float("chosen", chosen)
    if chosen.dim() != 1:
        raise ValueError(f"chosen must be [P], one score per pair, got shape {tuple(chosen.shape)}")
    check_shape("rejected", rejected, chosen.shape)
    if margin is not None:
        check_shape("margin", margin, chosen.shape)
    if not center_coef >= 0:
        raise ValueError(f"center_coef must not be negative, got {center_coef}")
    gap = 0.0 if margin is None else margin.detach().double()
    value = reward(chosen.double(), rejected.double(), gap, center_coef)
    pairs = max(len(chosen), 1)
    loss = (value.sum() / (pairs if num_items is None else num_items)).to(chosen.dtype)
    w, l = chosen.detach(), rejected.detach()
    measured = {"rewards/chosen": w, "rewards/rejected": l, "margin": w - l, "accuracy": (w > l).to(w.dtype)}
    metrics = {name: x.sum() / pairs for name, x in measured.items()}
    metrics["mean_reward"] = (metrics["rewards/chosen"] + metrics["rewards/rejected"]) / 2
    return output(loss, {name: (mean, len(chosen)) for name, mean in metrics.items()}, F.logsigmoid(w - l))
