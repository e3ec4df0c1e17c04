"""Scores of a log-ratio D = log(pi / ref) = log u under f-divergences: f'(u), which is 0 where the policies agree.

arXiv:2309.16240. The alpha divergence holds two of the others: alpha = 0 is the forward KL, alpha -> 1 the
reverse KL, whose DPO is the plain one.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from align_kernels.losses.common import bounded_exp

LIMIT = 80.0  # e^80 and its gradient are finite in float32


def alpha_divergence(ratio: Tensor, alpha: float) -> Tensor:
    """(u^(alpha - 1) - 1) / (alpha - 1)"""
    if abs(alpha - 1) < 1e-6:
        return ratio
    return (bounded_exp((alpha - 1) * ratio, LIMIT) - 1) / (alpha - 1)


F_DIVERGENCES = {
    "reverse_kl": lambda ratio, alpha: ratio,
    "forward_kl": lambda ratio, alpha: alpha_divergence(ratio, 0.0),
    "js_divergence": lambda ratio, alpha: math.log(2) + F.logsigmoid(ratio),
    "alpha_divergence": alpha_divergence,
}
