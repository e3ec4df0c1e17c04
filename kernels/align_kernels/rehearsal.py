"""Fused heads on fake tensors: a call allocates what its plan says and computes nothing, so that whoever counts
allocations sees those of the real call.

    with FakeTensorMode(), Rehearsal().acting() as rehearsal:
        rehearsal.knows(targets)                    # a real tensor: which rows have a target cannot be read from fakes
        dpo_loss(hidden, weight, targets, ...).loss.backward()
        print(rehearsal.plans)

Letters: N rows, n of them with a target, V vocabulary, D hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from align_kernels.backends.state import COLUMNS
from align_kernels.dispatch import BACKENDS
from align_kernels.head import Head, Needs, Settings
from align_kernels.schedules.plan import plan, request_of
from align_kernels.schedules.request import Plan, Request
from align_kernels.schedules.tiles import TiledHead
from align_kernels.sums import float_dtype
from align_kernels.units import LossCall, Units, keep_rows

_ACTING: ContextVar[Rehearsal | None] = ContextVar("rehearsal", default=None)


def acting() -> Rehearsal | None:
    """The rehearsal that calls are part of, if any."""
    return _ACTING.get()


class Rehearsal:
    """Calls of fused heads that compute nothing.

    Args:
        device: whose plans they take: "cpu", or "cuda" for those of a GPU, on fake tensors of a CPU all the same.
        took: told each tensor that stands for a call's workspace.
        memory: bytes of the GPU, of which a workspace is a share; 0: not known.
    """

    def __init__(
        self, device: str = "cpu", took: Callable[[Tensor], None] = lambda tensor: None, memory: int = 0
    ) -> None:
        self.device, self.took, self.memory = device, took, memory
        self.plans: list[Plan] = []
        self._real: dict[torch.Size, Tensor] = {}

    @contextmanager
    def acting(self) -> Iterator[Rehearsal]:
        """Inside the block calls are part of it."""
        token = _ACTING.set(self)
        try:
            yield self
        finally:
            _ACTING.reset(token)

    def knows(self, targets: Tensor) -> None:
        """Calls with targets of this shape have these, and those with the rows of as many as are not -100 have them."""
        with _disable_current_modes():
            kept = targets[targets != -100]
        self._real |= {kept.shape: kept, targets.shape: targets}

    # -- calls -----------------------------------------------------------------------------------------------------
    def loss(
        self, head: Head, targets: Tensor, side: Sequence[Tensor], call: LossCall, settings: Settings, needs: Needs
    ) -> tuple[Tensor, ...]:
        """loss [], sums of the loss's metrics [M], logp, entropy, mean_logit, correct [N]: `autograd.loss_forward`."""
        real = self._targets(targets)
        with _disable_current_modes():
            units = Units(call.loss.unit, real, settings.ignore_index)
            rows, flat = units.rows(len(head.targets)), real.reshape(-1)
            of_head = flat if len(head.targets) == len(flat) else flat[keep_rows(flat, settings.ignore_index)]
        tiled = self._tiled(head, settings, needs, rows, of_head, call, side, units.largest)
        return Closed.apply(self, tiled, (len(call.loss.metrics), targets.numel()), *head)

    def logprobs(self, head: Head, settings: Settings, needs: Needs) -> tuple[Tensor, ...]:
        """The six fields of log-probs [N] that need no gradient.

        Raises:
            NotImplementedError: for those that need one.
        """
        if any(needs):
            raise NotImplementedError("log-probs with a gradient are not rehearsed: close them in a loss")
        real = self._targets(head.targets)
        with _disable_current_modes():
            kept = keep_rows(real.reshape(-1), settings.ignore_index)
        tiled = self._tiled(head, settings, needs, kept, real, None, (), 1)
        with self._workspace(tiled):
            pass
        size, hidden = len(head.targets), head.hidden
        floats = [hidden.new_empty(size, dtype=float_dtype(hidden)) for _ in range(5)]
        return *floats, hidden.new_empty(size, dtype=torch.bool)

    def sample(
        self, head: Head, settings: Settings, needs: Needs, planned: Callable[[Request], Plan], columns: int
    ) -> tuple[Tensor, ...]:
        """Tokens, log-probs and entropies [N] of `sample.sample_tiled`, whose plan this is.

        Args:
            columns: of the block that is read twice.
        """
        with _disable_current_modes():
            rows = torch.arange(len(head.targets))
        tiled = self._tiled(head, settings, needs, rows, torch.zeros_like(rows), None, (), 1, planned)
        n = tiled.plan.chunk_rows
        with self._workspace(tiled):
            blocks = tiled.empty(2, n, -(-tiled.plan.vocab // columns), COLUMNS, dtype=torch.float64)
            twice = tiled.empty(5, n, columns, dtype=torch.float64)  # their places and logits
            self.took(blocks)
            self.took(twice)
        floats = (head.hidden.new_empty(len(rows), dtype=torch.float64) for _ in range(2))
        return head.hidden.new_empty(len(rows), dtype=torch.int64), *floats

    # -- pieces ----------------------------------------------------------------------------------------------------
    def _targets(self, targets: Tensor) -> Tensor:
        shapes = [shape for shape in self._real if shape == targets.shape or shape.numel() == targets.shape.numel()]
        if not shapes:
            raise ValueError(f"no real targets of shape {tuple(targets.shape)} are known: call knows(targets) before")
        return self._real[shapes[-1]]

    def _tiled(
        self, head: Head, settings: Settings, needs: Needs, kept: Tensor, real: Tensor, call: LossCall | None,
        side: Sequence[Tensor], largest: int, planned: Callable[[Request], Plan] = plan,
    ) -> TiledHead:  # fmt: skip
        def of_device(tiled: TiledHead) -> Plan:
            if self.device == "cpu":
                return planned(request_of(tiled, call, side, largest))
            tiled.backend_name, tiled.backend = "triton", BACKENDS["triton"]
            tiled.dtype = torch.promote_types(head.hidden.dtype, head.weight.dtype)
            tiled.logits_dtype = torch.promote_types(tiled.dtype, torch.float32)
            tiled.own_gemm = tiled.casts_weight = False
            asked = request_of(tiled, call, side, largest)
            return planned(dataclasses.replace(asked, device=self.device, memory=self.memory, may_alias=False))

        with _disable_current_modes():
            ordered = call is None or call.loss.unit != "pair"
            tiled = TiledHead(head._replace(targets=real.reshape(-1)), settings, needs, kept, of_device, ordered)
        self.plans.append(tiled.plan)
        return tiled

    @contextmanager
    def _workspace(self, tiled: TiledHead) -> Iterator[None]:
        """Inside the block what a call holds beside its results is there: the plan's workspace, the softmax states,
        and the rows of a chunk with their gradient."""
        held, (n, size) = tiled.plan, (len(tiled.kept), tiled.head.hidden.shape[1])
        rows = max(held.first_rows, held.chunk_rows)
        made = [tiled.empty(held.workspace, dtype=torch.uint8), tiled.empty(n, COLUMNS, dtype=torch.float64)]
        if not tiled.as_it_lies or tiled.dtype != tiled.head.hidden.dtype:
            made.append(tiled.empty(rows, size))
        if tiled.needs.hidden:
            made += [tiled.empty(rows, size, dtype=float_dtype(tiled.head.hidden)) for _ in range(2)]
        for tensor in made:
            self.took(tensor)
        yield
        made.clear()


class Closed(torch.autograd.Function):
    """A loss that closes in its forward: gradients are there when it returns, and are given away in the backward."""

    @staticmethod
    def forward(ctx: Any, rehearsal: Rehearsal, tiled: TiledHead, sizes: tuple[int, int], *head: Tensor | None) -> Any:
        tensors, needs = Head(*head), tiled.needs  # pyright: ignore[reportArgumentType]
        hidden, dtype, (metrics, size) = tensors.hidden, float_dtype(tensors.hidden), sizes
        grads: list[Tensor | None] = [torch.zeros_like(hidden) if needs.hidden else None]
        with rehearsal._workspace(tiled):
            pairs = zip((tensors.weight, tensors.bias, tensors.lora_A, tensors.lora_B), needs[1:])
            sums = [x.new_empty(x.shape, dtype=float_dtype(x)) if x is not None and n else None for x, n in pairs]
        for total, of in zip(sums, (tensors.weight, tensors.bias, tensors.lora_A, tensors.lora_B)):
            grads.append(None if total is None or of is None else _narrowed(total, of, rehearsal.device))
        ctx.save_for_backward(*grads)
        loss, sums_of_metrics = hidden.new_zeros((), dtype=dtype), hidden.new_empty(metrics, dtype=dtype)
        fields = [hidden.new_empty(size, dtype=dtype) for _ in range(3)]
        rest = (sums_of_metrics, *fields, hidden.new_empty(size, dtype=torch.bool))
        ctx.mark_non_differentiable(*rest)
        return loss, *rest

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Any:
        hidden, weight, bias, lora_A, lora_B = ctx.saved_tensors
        return None, None, None, hidden, weight, None, bias, None, lora_A, lora_B


def _narrowed(sums: Tensor, of: Tensor, device: str) -> Tensor:
    """`tiles.narrowed`: on a CPU the gradient keeps the memory of its sums."""
    if device == "cpu" and sums.dtype.itemsize == 2 * of.dtype.itemsize:
        return sums.view(-1).view(of.dtype)[: sums.numel()].view(of.shape)
    return sums.to(of.dtype)
