"""Kahneman-Tversky optimisation on summed log-probs of single completions."""

from __future__ import annotations

import torch
from torch import Tensor

from align_kernels.losses.registry import loss


@loss("sequence", side={"ref_logps": "sequence", "desirable": "sequence", "kl": "sequence"})
def kto(
    logps: Tensor,  # (S,)
    *,
    ref_logps: Tensor,  # (S,)
    desirable: Tensor,  # (S,) bool
    kl: Tensor,  # (S,) the reference point z0
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:  # (S,)
    """arXiv:2402.01306 eq. 8, with D = log pi(y|x) - log ref(y|x):

    desirable    w_D (1 - sigma(beta (D - z0)))
    undesirable  w_U (1 - sigma(beta (z0 - D)))
    """
    z = beta * (logps - ref_logps - kl)
    return torch.where(desirable, desirable_weight * torch.sigmoid(-z), undesirable_weight * torch.sigmoid(z)), {}
