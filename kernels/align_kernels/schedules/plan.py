"""Which schedule a call takes, in which chunks, and why."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from align_kernels.head import Head, Needs, Settings
from align_kernels.schedules import SCHEDULES, Schedule
from align_kernels.schedules.device_losses import serves
from align_kernels.schedules.request import Plan, Request
from align_kernels.schedules.tiles import TiledHead
from align_kernels.sums import float_dtype
from align_kernels.units import LossCall


def plan(request: Request) -> Plan:
    """That of the first schedule which serves the call."""
    return next(s for s in SCHEDULES.values() if s.why_not(request) is None).plan(request)


def request_of(tiled: TiledHead, call: LossCall | None, side: Sequence[Tensor], largest_unit: int) -> Request:
    """What a call asks: log-probs (no `call`), or a loss with its side tensors and the rows of its longest unit."""
    head, settings, needs = tiled.head, tiled.settings, tiled.needs
    by_token = call is not None and call.loss.unit == "token"
    # an entropy that may be asked for late is made again then
    entropy = call is not None and call.with_entropy
    same = tiled.dtype == tiled.logits_dtype
    clamp = settings.clamp
    return Request(
        rows=len(tiled.kept),
        vocab=tiled.widest,
        width=head.weight.shape[1],
        itemsize=tiled.logits_dtype.itemsize,
        gradient_itemsize=0 if same else tiled.dtype.itemsize,
        weight_itemsize=tiled.dtype.itemsize if tiled.casts_weight else 0,
        on_chip=tiled.on_chip,
        tiles_because=tiled.tiles_because,
        device=head.weight.device.type,
        backend=tiled.backend_name,
        own_gemm=tiled.own_gemm,
        workspace=settings.workspace,
        **device_of(head.weight.device),
        needs_input=needs.hidden,
        needs_head=needs.head,
        needs_weight=needs.weight,
        # a GPU likes one wide tile better; a kernel that closes a loss of tokens takes whole rows of logits
        may_alias=head.weight.device.type == "cpu"
        and tiled.logits_dtype == float_dtype(head.weight)
        and not (by_token and tiled.backend.losses is not None),
        late=call is None,
        scale_free=clamp is None or clamp.units == "residual",
        # their factors, of rows, ask for the range of float32: that of bfloat16 too, not that of float16
        plain=tiled.backend.exponentials is not None
        and tiled.dtype != torch.float16
        and clamp is None
        and settings.transform.softcap is None
        and not (needs.bias or entropy),
        sparse=call is not None and call.sparse,
        on_device=call is not None
        and by_token
        and tiled.group is None
        and head.weight.dtype == tiled.dtype
        and serves(tiled.backend, call, side),
        largest_unit=largest_unit,
        drop_mass=settings.drop_mass,
    )


def device_of(device: torch.device) -> dict[str, int]:
    """Bytes and multiprocessors of a GPU, nothing of anything else and where no GPU can be asked."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return {}
    found = torch.cuda.get_device_properties(device)
    return dict(memory=found.total_memory, processors=found.multi_processor_count)


def start(
    head: Head,
    settings: Settings,
    needs: Needs,
    kept: Tensor,
    call: LossCall | None = None,
    side: Sequence[Tensor] = (),
    largest_unit: int = 1,
) -> Schedule:
    """The schedule of a call over its `kept` rows."""
    ordered = call is None or call.loss.unit != "pair"
    tiled = TiledHead(
        head, settings, needs, kept, lambda tiled: plan(request_of(tiled, call, side, largest_unit)), ordered
    )
    return SCHEDULES[tiled.plan.name](tiled)
