"""Cut Cross-Entropy 25.1.1, and what its repository has had since: bias, return_lse, shifts of several positions."""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor, nn

from align_kernels.api import linear_logprobs
from align_kernels.arguments import public
from align_kernels.fused import sft_loss

IMPLS = ("cce", "cce_exact", "cce_kahan", "cce_kahan_full", "cce_kahan_full_c", "cce_kahan_full_e",
         "cce_kahan_full_c_full_e", "torch_compile")  # fmt: skip


@public
def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    ignore_index: int | Tensor = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = False,
    filter_eps: float | str | None = "high",
    impl: str | enum.Enum = "cce",
    *,
    bias: Tensor | None = None,
    return_lse: bool = False,
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    vocab_parallel_options: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of `softcap(e @ c.T + bias)`, as `cut_cross_entropy.linear_cross_entropy`.

    Args:
        e: [..., D]; c: [V, D]; targets: [...] int64.
        ignore_index: targets that do not count. Default -100. A tensor in its place is the bias, which later releases
            have there.
        softcap: > 0 or None. Default None.
        reduction: "mean" over the targets that count (default; 0 where none does, the peer returns NaN), "sum", "none".
        shift: position i of e predicts targets[..., i + shift], from 0 to the number of positions; True is 1.
            Default False. Releases after 25.1 take whole numbers too.
        filter_eps: accepted; the peer may leave out gradients below it, the gradients here are exact.
        impl: "cce", one of its presets or "torch_compile", accepted; the planner decides.
        bias: [V]. Default None.
        return_lse: return (loss, log-sum-exp of the logits) as well, both differentiable. Default False.
        accum_*, filter_*: accepted; sums are float32 and the gradients exact.
        vocab_parallel_options: refused: `linear_logprobs(tp_group=...)` takes a head in shards.

    Returns:
        [], or with "none" the shape of targets (`shift` positions less), ignored positions 0. The log-sum-exp has that
        shape with any reduction, and is 0 at ignored positions (the peer's too, where there are any).

    Raises:
        ValueError: an unknown reduction, filter_eps or impl, a shift out of range, vocab_parallel_options; see
            `linear_logprobs`.
    """
    del accum_e_fp32, accum_c_fp32, filter_e_grad, filter_c_grad
    if isinstance(ignore_index, Tensor):
        bias, ignore_index = ignore_index, -100
    if vocab_parallel_options is not None:
        raise ValueError("vocab_parallel_options are not served: linear_logprobs(tp_group=...) takes a head in shards")
    name = impl.name.lower() if isinstance(impl, enum.Enum) else impl
    if name not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if isinstance(filter_eps, str) and filter_eps not in ("auto", "high"):
        raise ValueError(f"filter_eps must be a number, auto, high or None, got {filter_eps!r}")
    if shift:
        length = targets.shape[-1] if targets.dim() else 0
        if not 0 <= shift <= max(length, 1):
            raise ValueError(f"shift must lie in [0, {length}], the positions of targets, got {shift}")
        e, targets = e[..., : max(length - shift, 0), :], targets[..., shift:]
    head: dict[str, Any] = dict(bias=bias, softcap=softcap, ignore_index=ignore_index)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
    if return_lse or reduction == "none":
        out = linear_logprobs(e, c, targets, **head)
        items = (targets != ignore_index).sum().clamp(min=1) if reduction == "mean" else 1
        loss = -out.logp if reduction == "none" else -out.logp.sum() / items
        return (loss, _lse(e, c, targets, out.logp, bias, softcap, ignore_index)) if return_lse else loss
    return sft_loss(e, c, targets, num_items=1.0 if reduction == "sum" else None, **head).loss


def _lse(
    e: Tensor, c: Tensor, targets: Tensor, logp: Tensor, bias: Tensor | None, softcap: float | None, ignore_index: int
) -> Tensor:
    """Log-sum-exp of the logits, [...] and differentiable: the target's logit less its log-prob."""
    kept = targets != ignore_index
    picked = targets.where(kept, 0)
    logit = (e.to(logp.dtype) * c[picked].to(logp.dtype)).sum(-1)
    if bias is not None:
        logit = logit + bias[picked].to(logp.dtype)
    if softcap is not None:
        logit = softcap * torch.tanh(logit / softcap)
    return (logit - logp).where(kept, 0.0)


class LinearCrossEntropy(nn.Module):
    """`cut_cross_entropy.LinearCrossEntropy`: `linear_cross_entropy` with its settings as attributes.

    Args:
        ignore_index, softcap, reduction, shift, filter_eps, impl, return_lse: of `linear_cross_entropy`, whose defaults
            they have.
        accum_*, filter_*: accepted.
    """

    @public
    def __init__(
        self,
        ignore_index: int = -100,
        softcap: float | None = None,
        reduction: str = "mean",
        filter_eps: float | str | None = "high",
        shift: bool | int = False,
        impl: str | enum.Enum = "cce",
        *,
        return_lse: bool = False,
        accum_e_fp32: bool = False,
        accum_c_fp32: bool = False,
        filter_e_grad: bool = True,
        filter_c_grad: bool = True,
    ) -> None:
        super().__init__()
        del accum_e_fp32, accum_c_fp32, filter_e_grad, filter_c_grad
        self.ignore_index, self.softcap, self.reduction = ignore_index, softcap, reduction
        self.filter_eps, self.shift, self.impl, self.return_lse = filter_eps, shift, impl, return_lse

    @public
    def forward(
        self, e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `linear_cross_entropy`: e [..., D], c [V, D], targets [...], bias [V]."""
        return linear_cross_entropy(
            e, c, targets, self.ignore_index, self.softcap, self.reduction, self.shift, self.filter_eps, self.impl,
            bias=bias, return_lse=self.return_lse,
        )  # fmt: skip
