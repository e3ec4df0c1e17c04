"""Losses whose coefficients the backend finds on the device, where it knows them (`backend.losses`).

Only `losses` defines a loss; a backend that serves one gives the same values and derivatives with fewer
launches. A loss of single tokens takes one kernel between the GEMMs, from raw logits to their gradient; its rows
without a derivative stay in the GEMMs, as nothing is read back to find them. A loss of sequences or pairs takes one
kernel between the statistics and the gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from align_kernels.backends import Backend, Losses
from align_kernels.schedules.base import Closed
from align_kernels.schedules.dense import OnePass
from align_kernels.schedules.request import Request
from align_kernels.schedules.tiles import Piece, Rows
from align_kernels.units import Coefficients, LossCall, Objective, Span


def serves(backend: Backend, call: LossCall, side: Sequence[Tensor]) -> bool:
    """Whether the backend knows this call's loss whole, and float32 holds its side tensors: those of sequences are sums
    over thousands of tokens, for which a caller may have chosen float64."""
    losses = backend.losses
    if losses is None or call.gate is not None or call.loss.unit == "batch":
        return False
    narrow = all(not x.is_floating_point() or x.dtype.itemsize <= 4 for x in side)
    return (narrow or call.loss.unit == "token") and losses.serves(call.loss.name, call.hyper, call.given)


class OnePassOfTokens(OnePass):
    """One pass of a loss of single tokens, closed by one kernel."""

    name = "one pass of tokens"

    @classmethod
    def why_not(cls, request: Request) -> str | None:
        if not request.on_device:
            return "the backend has no kernel for a loss of tokens, or not for this one"
        return "columns are dropped" if request.drop_mass > 0 else super().why_not(request)

    @property
    def group_rows(self) -> tuple[int, int]:
        """Where the gradient is narrower than its logits, both lie in the workspace."""
        tiled, itemsize = self.tiled, self.tiled.logits_dtype.itemsize
        beside = 0 if tiled.dtype == tiled.logits_dtype else tiled.dtype.itemsize
        rows = max(tiled.plan.chunk_rows * itemsize // (itemsize + beside), 1)
        return rows, rows

    def close(self, objective: Objective, span: Span, dhidden: Tensor | None) -> Closed:
        tiled, call = self.tiled, objective.call
        chunk, w = tiled.chunk(span[2], span[3]), tiled.head.weight
        n, V = len(chunk.targets), len(w)
        z = tiled.logits(chunk, w, 0, V, self.room(n).tile(n, 0, V))
        out = z if tiled.dtype == tiled.logits_dtype else tiled.tile(n, V, tiled.dtype)
        state, common = tiled.new_state(n), tiled.common(chunk, 0, V)
        rows = objective.units.kept[span[2] : span[3]]
        picked = {name: x.reshape(-1)[rows].float() for name, x in zip(call.given, objective.side)}
        losses = tiled.backend.losses
        assert losses is not None
        made = losses.token_loss(
            call.loss.name, call.hyper, z, state, chunk.targets, picked, objective.scale,
            clamp=tiled.settings.clamp, out=out, **common,
        )  # fmt: skip
        piece = Piece(None, out, slice(0, V), w, common)
        tiled.scatter(tiled.products(Rows(chunk, state, made.values, None), [piece]), chunk, dhidden)
        return Closed(state, made.values.double().sum() * objective.scale, metric_sums(call, made.metrics))


@dataclasses.dataclass(frozen=True)
class DeviceObjective(Objective):
    """A loss of sequences or pairs whose coefficients one kernel finds."""

    losses: Losses

    def coefficients(self, span: Span, state: Tensor, targets: Tensor, vocab: int) -> Coefficients:
        ids, place, _ = self.units.segments(*span)
        picked = {
            name: x[ids].float() if x.is_floating_point() else x[ids].contiguous()
            for name, x in zip(self.call.given, self.side)
        }
        made = self.losses.unit_loss(
            self.call.loss.name, self.call.hyper, state, place.contiguous(), span[1] - span[0], picked, self.scale
        )
        sums = metric_sums(self.call, made.metrics)
        return Coefficients(made.values.double().sum() * self.scale, sums, made.g, None)


def on_device(objective: Objective, backend: Backend) -> Objective:
    """The same objective, with its coefficients from the backend where that has them."""
    o, losses = objective, backend.losses
    if losses is None or not o.derive or o.call.loss.unit == "token" or not serves(backend, o.call, o.side):
        return o
    return DeviceObjective(o.call, o.units, o.side, o.scale, o.derive, losses)


def metric_sums(call: LossCall, metrics: Tensor) -> Tensor:
    """[M] from metrics [., n] in the order of the loss; those that the backend does not have are not measured."""
    sums = torch.zeros(len(call.loss.metrics), dtype=torch.float64, device=metrics.device)
    known = metrics[: len(sums)].double().sum(1)
    sums[: len(known)] = known
    return sums
