"""Cut Cross-Entropy 25.1.1."""

from __future__ import annotations

import enum
from typing import Any

from torch import Tensor

from align_kernels.api import linear_logprobs
from align_kernels.arguments import public
from align_kernels.fused import sft_loss


@public
def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = False,
    filter_eps: float | str | None = "high",
    impl: str | enum.Enum = "cce",
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of `softcap(e @ c.T + bias)`, as `cut_cross_entropy.linear_cross_entropy`.

    Args:
        e: [..., D]; c: [V, D]; targets: [...] int64.
        ignore_index: targets that do not count. Default -100.
        softcap: > 0 or None. Default None.
        reduction: "mean" over the targets that count (default; 0 where none does, the peer returns NaN), "sum", "none".
        shift: position i of e predicts targets[..., i + shift], from 0 to the number of positions; True is 1.
            Default False. Releases after 25.1 take whole numbers too.
        filter_eps: accepted; the peer may leave out gradients below it, the gradients here are exact.
        impl: "cce" or "torch_compile", accepted; the planner decides.
        bias: [V]. Default None. Later releases of the peer have it.

    Returns:
        [], or with "none" the shape of targets (`shift` positions less), ignored positions 0.

    Raises:
        ValueError: an unknown reduction, filter_eps or impl, a shift out of range; see `linear_logprobs`.
    """
    name = impl.name.lower() if isinstance(impl, enum.Enum) else impl
    if name not in ("cce", "torch_compile"):
        raise ValueError(f"impl must be cce or torch_compile, got {impl!r}")
    if isinstance(filter_eps, str) and filter_eps not in ("auto", "high"):
        raise ValueError(f"filter_eps must be a number, auto, high or None, got {filter_eps!r}")
    if shift:
        length = targets.shape[-1] if targets.dim() else 0
        if not 0 <= shift <= max(length, 1):
            raise ValueError(f"shift must lie in [0, {length}], the positions of targets, got {shift}")
        e, targets = e[..., : max(length - shift, 0), :], targets[..., shift:]
    head: dict[str, Any] = dict(bias=bias, softcap=softcap, ignore_index=ignore_index)
    if reduction == "none":
        return -linear_logprobs(e, c, targets, **head).logp
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
    return sft_loss(e, c, targets, num_items=1.0 if reduction == "sum" else None, **head).loss
