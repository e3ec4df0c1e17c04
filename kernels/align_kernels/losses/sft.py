"""Supervised fine-tuning."""

from __future__ import annotations

from torch import Tensor

from align_kernels.losses.registry import loss


@loss("token")
def sft(logps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # (n,) -> (n,)
    """L = -log pi(y_t | x, y_<t), the cross-entropy of each token."""
    return -logps, {}
