"""Estimates of KL(pi || ref) from the log-probs of tokens that pi sampled (Schulman 2020, kl-approx)."""

from __future__ import annotations

from torch import Tensor

from align_kernels.losses.common import bounded_exp
from align_kernels.losses.ppo import RATIO_LIMIT


def k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """log pi - log ref: unbiased, of either sign. As a loss its gradient has mean 0: it belongs into rewards."""
    return logps - ref_logps


def k2(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """(log pi - log ref)^2 / 2: biased, and its gradient is that of the KL."""
    return 0.5 * (logps - ref_logps) ** 2


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = log ref - log pi: unbiased and never negative, arXiv:2402.03300 eq. 4."""
    d = ref_logps - logps
    return bounded_exp(d, RATIO_LIMIT) - 1 - d


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
