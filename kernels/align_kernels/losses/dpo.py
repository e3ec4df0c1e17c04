"""Direct preference optimisation on summed log-probs of pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from align_kernels.losses.registry import loss

LOSS_TYPES = ("sigmoid", "hinge", "ipo", "robust")


@loss(
    "pair",
    side={"ref_logps": "sequence"},
    metrics=("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    lengths=True,
)
def dpo(
    logps: Tensor,  # (2P,) chosen, then rejected
    *,
    ref_logps: Tensor,  # (2P,)
    lengths: Tensor,  # (2P,) tokens of each completion
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:  # (P,)
    """Bradley-Terry on log-ratios. With D = log pi(y|x) - log ref(y|x) and delta = D_w - D_l:

    sigmoid  -(1 - e) log sigma(beta delta) - e log sigma(-beta delta)      arXiv:2305.18290 eq. 7; e > 0: cDPO
    robust   the same over (1 - 2e), with -e in the second term             arXiv:2403.00409 eq. 3
    hinge    max(0, 1 - beta delta)                                         arXiv:2305.10425
    ipo      (D_w / |y_w| - D_l / |y_l| - 1 / (2 beta))^2                   arXiv:2310.12036 eq. 17
    """
    ratio = logps - ref_logps
    chosen, rejected = ratio.chunk(2)
    z = beta * (chosen - rejected)
    e = label_smoothing
    if loss_type == "sigmoid":
        value = -(1 - e) * F.logsigmoid(z) - e * F.logsigmoid(-z)
    elif loss_type == "robust":
        value = (-(1 - e) * F.logsigmoid(z) + e * F.logsigmoid(-z)) / (1 - 2 * e)
    elif loss_type == "hinge":
        value = torch.relu(1 - z)
    else:
        mean_chosen, mean_rejected = (ratio / lengths.clamp(min=1)).chunk(2)
        value = (mean_chosen - mean_rejected - 1 / (2 * beta)) ** 2
    rewards = beta * ratio.detach()
    good, bad = rewards.chunk(2)
    metrics = {
        "rewards/chosen": good,
        "rewards/rejected": bad,
        "rewards/accuracies": (good > bad).to(rewards.dtype),
        "rewards/margins": good - bad,
    }
    return value, metrics
