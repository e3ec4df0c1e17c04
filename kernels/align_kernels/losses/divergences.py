"""Scores of a log-ratio D = log(pi / ref) = log u under f-divergences: f'(u), which is 0 where the policies agree.

arXiv:2309.16240. The coefficient of the alpha divergence is TRL's, 1 - alpha of the paper: at 0 it is the forward KL
(the paper's alpha = 1), towards 1 the reverse KL (alpha -> 0), whose DPO is the plain one.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from align_kernels.losses.common import bounded_exp

LIMIT = 80.0  # e^80 and its gradient are finite in float32


def alpha_divergence(ratio: Tensor, coef: float) -> Tensor:
    """(u^(coef - 1) - 1) / (coef - 1), the paper's (1 - u^-alpha) / alpha with alpha = 1 - coef."""
    if abs(coef - 1) < 1e-6:
        return ratio
    return (bounded_exp((coef - 1) * ratio, LIMIT) - 1) / (coef - 1)


F_DIVERGENCES = {
    "reverse_kl": lambda ratio, coef: ratio,
    "forward_kl": lambda ratio, coef: alpha_divergence(ratio, 0.0),
    "js_divergence": lambda ratio, coef: math.log(2) + F.logsigmoid(ratio),
    "alpha_divergence": alpha_divergence,
}
