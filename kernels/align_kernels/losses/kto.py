"""Losses of single completions that are marked good or bad, on their summed log-probs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from align_kernels.losses.registry import register_loss

LOSS_TYPES = ("kto", "apo_zero_unpaired")


@register_loss("sequence", side={"ref_logps": "sequence", "desirable": "sequence", "kl": "sequence"})
def kto(
    logps: Tensor,  # (S,)
    *,
    ref_logps: Tensor,  # (S,)
    desirable: Tensor,  # (S,) bool
    kl: Tensor | float = 0.0,  # (S,) the reference point z0
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:  # (S,)
    """arXiv:2402.01306 eq. 7, with D = log pi(y|x) - log ref(y|x):

    desirable    w_D (1 - sigma(beta (D - z0)))
    undesirable  w_U (1 - sigma(beta (z0 - D)))

    With z0 = 0 this is apo_zero_unpaired, arXiv:2408.06266 eq. 7 for each half of a pair by itself.
    """
    z = beta * (logps - ref_logps - kl)
    return torch.where(desirable, desirable_weight * torch.sigmoid(-z), undesirable_weight * torch.sigmoid(z)), {}


@register_loss(
    "sequence", side={"ref_logps": "sequence", "desirable": "sequence", "delta": "batch", "weights": "sequence"}
)
def bco(
    logps: Tensor,  # (S,)
    *,
    ref_logps: Tensor,  # (S,)
    desirable: Tensor,  # (S,) bool
    delta: Tensor,  # () the reward shift
    weights: Tensor | float = 1.0,  # (S,)
    beta: float = 0.1,
) -> tuple[Tensor, dict[str, Tensor]]:  # (S,)
    """arXiv:2404.04656 section 4: -w log sigma(beta D - delta) for desirable ones, else -w log sigma(delta - beta D).

    A logistic regression of the mark on the reward beta D, with delta as its threshold.
    """
    z = beta * (logps - ref_logps) - delta
    return -weights * F.logsigmoid(torch.where(desirable, z, -z)), {}
