"""What a call would take, before it is made."""

from __future__ import annotations

from torch import Tensor

from align_kernels.arguments import check_call
from align_kernels.head import read_head
from align_kernels.losses.registry import LOSSES
from align_kernels.schedules.plan import start
from align_kernels.schedules.request import Plan
from align_kernels.units import LossCall, Units, keep_rows


def explain(hidden: Tensor, weight: Tensor, targets: Tensor, *, loss: str | None = None, **head) -> Plan:
    """The plan of `linear_logprobs`, or of a fused loss, for these tensors; nothing is computed.

        print(explain(hidden, weight, targets, loss="dpo"))

    Args:
        hidden: [..., D]; weight: [V, D]; targets: [...], as in the call.
        loss: None for `linear_logprobs`, else a name of `align_kernels.losses.LOSSES` ("sft", "dpo", ...).
        **head: every keyword of `linear_logprobs`.

    Returns:
        Plan: schedule, backend, kept rows, chunk rows, tile columns, workspace bytes, GEMM FLOPs and the reason;
        `str(plan)` says it in words.

    Raises:
        ValueError: what the call itself would refuse; an unknown loss; impl="eager", which has no plan.
    """
    check_call(explain)
    tensors, settings, needs = read_head(hidden, weight, targets, **head)
    if loss is None:
        return start(tensors, settings, needs, keep_rows(tensors.targets, settings.ignore_index)).tiled.plan
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    call = LossCall(LOSSES[loss])
    units = Units(call.loss.unit, targets if targets.dim() == 2 else tensors.targets, settings.ignore_index)
    return start(tensors, settings, needs, units.rows(len(tensors.targets)), call, (), units.largest).tiled.plan
