"""Fused supervised fine-tuning."""

from __future__ import annotations

from torch import Tensor

from align_kernels.arguments import check_call
from align_kernels.fused.core import Items, LossOutput, check_one_of, of_head, output, run_loss
from align_kernels.losses.sft import LOSS_TYPES


@of_head
def sft_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, loss_type: str = "nll", num_items: Items = None, **head
) -> LossOutput:
    """Cross-entropy of the targets, summed over tokens and divided by `num_items` (default: this call's tokens).

    Args:
        hidden: [..., D]; weight: [V, D]; targets: [...] int64, already shifted, -100 where ignored.
        loss_type: "nll" (default), or "dft": each token weighted with its own probability (arXiv:2508.05629).
        num_items: the normaliser, one for all micro-batches of a window. Default None: the kept tokens of this call.
        **head: every keyword of `linear_logprobs`, and `prob_gate`, a `ProbGate` or its p_hi.

    Returns:
        LossOutput; logps [...] per token; metrics entropy, mean_token_accuracy.

    Raises:
        ValueError: an unknown loss_type.
    """
    check_call(sft_loss)
    check_one_of("loss_type", loss_type, LOSS_TYPES)
    out = run_loss("sft", {"loss_type": loss_type}, hidden, weight, targets, {}, num_items, head)
    return output(out.loss, out.measured, out.logps)
