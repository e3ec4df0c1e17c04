"""Supervised fine-tuning."""

from __future__ import annotations

from torch import Tensor

from align_kernels.losses.registry import register_loss

LOSS_TYPES = ("nll", "dft")


@register_loss("token")
def sft(logps: Tensor, *, loss_type: str = "nll") -> tuple[Tensor, dict[str, Tensor]]:  # (n,) -> (n,)
    """With p = pi(y_t | x, y_<t) of each token and sg, which stops the gradient:

    nll  -log p            cross-entropy
    dft  -sg(p) log p      dynamic fine-tuning, arXiv:2508.05629
    """
    return -(logps.detach().exp() if loss_type == "dft" else 1.0) * logps, {}
