"""The loss of a reward model, on scores of pairs."""

from __future__ import annotations

from torch import Tensor

from align_kernels.losses.common import bradley_terry


def reward(
    chosen: Tensor,  # (P,)
    rejected: Tensor,  # (P,)
    margin: Tensor | float = 0.0,  # (P,)
    center_coef: float = 0.0,
) -> Tensor:  # (P,)
    """Bradley-Terry on scores: -log sigma(r_w - r_l - margin) (arXiv:2307.09288 eq. 2), plus center_coef *
    (r_w + r_l)^2 (arXiv:2312.09244 eq. 2), which pulls the scores towards 0. DPO is the same on log-ratios."""
    value = bradley_terry(chosen - rejected - margin)
    return value + center_coef * (chosen + rejected) ** 2 if center_coef else value
