"""Losses whose coefficients the backend finds on the device, where it knows them (`backend.losses`).

What a loss is stands in `losses` alone; a backend that serves one gives the same values and derivatives with fewer
launches. A loss of single tokens takes one kernel between the GEMMs, from raw logits to their gradient; its rows
without a derivative stay in the GEMMs, as nothing is read back to find them. A loss of sequences or pairs takes one
kernel between the statistics and the gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from align_kernels.compaction import Piece
from align_kernels.schedules import Grads, Rows, Runner
from align_kernels.units import LossCall, Units

Span = tuple[int, int, int, int]


class Closed(NamedTuple):
    """A group of units that are tokens, from its hidden states to its gradients."""

    state: Tensor  # (n, 8)
    value: Tensor  # ()
    sums: Tensor  # (M,) of the metrics
    dx: Tensor | None  # (n, D)


def serves(run: Runner, call: LossCall, side: list[Tensor]) -> bool:
    """Whether the backend knows this call's loss whole, and float32 holds its side tensors: those of sequences are sums
    over thousands of tokens, of which float64 keeps more."""
    losses = getattr(run.backend, "losses", None)
    if losses is None or call.gate is not None or call.loss.unit == "batch":
        return False
    narrow = all(not x.is_floating_point() or x.dtype.itemsize <= 4 for x in side)
    return (narrow or call.loss.unit == "token") and losses.serves(call.loss.name, call.hyper, call.given)


def takes_tokens(run: Runner, call: LossCall, side: list[Tensor], train: bool) -> bool:
    """Whether `tokens` closes this call's groups."""
    return (
        train
        and call.loss.unit == "token"
        and run.plan.schedule == "one pass"
        and not run.plan.compact
        and run.group is None
        and run.head.weight.dtype == run.dtype
        and serves(run, call, side)
    )


def capacity(run: Runner) -> int:
    """Rows of a group of tokens: where the gradient is narrower than its logits, both lie in the workspace."""
    beside = 0 if run.dtype == run.logits_dtype else run.dtype.itemsize
    return max(run.plan.chunk_rows * run.logits_dtype.itemsize // (run.logits_dtype.itemsize + beside), 1)


def tokens(
    run: Runner,
    units: Units,
    call: LossCall,
    side: list[Tensor],
    span: Span,
    store: Tensor,
    scale: Tensor,
    grads: Grads,
) -> Closed:
    """Close a group of tokens: logits in `store`, one kernel, and the GEMMs of the gradients."""
    chunk, V = run.chunk(span[2], span[3]), run.head.weight.shape[0]
    n, w = len(chunk.targets), run.head.weight
    z = run.logits(chunk, w, 0, V, run.tile_of(store, n, 0, V))
    out = z if run.dtype == run.logits_dtype else run.empty(n, V)
    state, common = run.new_state(n), run.common(chunk, 0, V)
    rows = units.kept[span[2] : span[3]]
    picked = {name: x.reshape(-1)[rows].float() for name, x in zip(call.given, side)}
    made = run.backend.losses.token_loss(
        call.loss.name, call.hyper, z, state, chunk.targets, picked, scale,
        clamp=run.settings.clamp, out=out, **common,
    )  # fmt: skip
    piece = Piece(None, out, slice(0, V), w, common)
    dx = run.products(Rows(chunk, state, made.values, None), [piece], grads)
    return Closed(state, made.values.double().sum() * scale, metric_sums(call, made.metrics), dx)


def coefficients(
    run: Runner, units: Units, call: LossCall, side: list[Tensor], span: Span, state: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A group's loss, its metrics' sums [M] and g = dL/dlogp of its rows, of a loss of sequences or pairs."""
    ids, place = units.segments(*span)
    picked = {
        name: x[ids].float() if x.is_floating_point() else x[ids].contiguous() for name, x in zip(call.given, side)
    }
    made = run.backend.losses.unit_loss(
        call.loss.name, call.hyper, state, place.contiguous(), span[1] - span[0], picked, scale
    )
    return made.values.double().sum() * scale, metric_sums(call, made.metrics), made.g


def metric_sums(call: LossCall, metrics: Tensor) -> Tensor:
    """[M] from metrics [., n] in the order of the loss; those that the backend does not have are not measured."""
    sums = torch.zeros(len(call.loss.metrics), dtype=torch.float64, device=metrics.device)
    known = metrics[: len(sums)].double().sum(1)
    sums[: len(known)] = known
    return sums
