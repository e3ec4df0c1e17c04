"""The operators for autograd: log-probs whose gradient arrives late, and losses that close inside a group of units.

Each is a pure function of tensors and settings. Eager calls go through a `torch.autograd.Function`, so that modes such
as `FlopCounterMode` see every GEMM; under `torch.compile` and with fake tensors the same functions run as
`torch.library` operators (`ops.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import NamedTuple

import torch
from torch import Tensor

from align_kernels.backends.state import read
from align_kernels.dispatch import BACKENDS, pick
from align_kernels.gemm import logits_dtype
from align_kernels.head import Head, Needs, Settings, any_wrong, check_rows
from align_kernels.schedules.base import Closed, Schedule
from align_kernels.schedules.device_losses import on_device
from align_kernels.schedules.plan import start
from align_kernels.sums import float_dtype, read_back, waits
from align_kernels.units import LossCall, Objective, Span, Units, read_rows

TENSORS = len(Head._fields)  # of a head, None where it has none


# -- shared pieces ------------------------------------------------------------------------------------------------
def scatter(values: Tensor, kept: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """[size], 0 where nothing was kept."""
    return torch.zeros(size, dtype=dtype, device=values.device).index_copy_(0, kept, values.to(dtype))


def _zeros_like(hidden: Tensor, needed: bool) -> Tensor | None:
    return torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needed else None


def _dense(grads: Sequence[Tensor | None], hidden: Tensor) -> list[Tensor]:
    """An empty tensor where there is none."""
    return [hidden.new_empty(0) if x is None else x for x in grads]


def needed(grads: Sequence[Tensor], needs: Needs) -> list[Tensor | None]:
    return [grad if need else None for grad, need in zip(grads, needs)]


def live_rows(sizes: list[int], g: Tensor, h: Tensor | None, *, asked: bool) -> list[int]:
    """How many rows of chunks of these sizes have a coefficient, of g and h [n]; where it is not `asked` for, every row
    of a GPU counts as one, as looking would wait for it."""
    if not sizes or (waits(g) and not asked):
        return sizes
    active = g != 0 if h is None else (g != 0) | (h != 0)
    return read_back(torch.stack([part.sum() for part in active.split(sizes)]))


TWICE = 'cannot differentiate a fused operator twice: pass impl="eager" where second derivatives are needed'


def first_order(backward: Callable) -> Callable:
    """A backward that must not be differentiated.

    torch's own `once_differentiable` takes the first gradient for a constant where the upstream gradient is one.
    """

    @wraps(backward)
    def run(ctx, *upstream):
        with torch.no_grad():
            grads = backward(ctx, *upstream)
        if not torch.is_grad_enabled():
            return grads
        refuse = torch._C._functions.DelayedError(TWICE.encode(), len(grads))  # pyright: ignore
        return refuse(*(None if x is None else x.detach().requires_grad_() for x in grads))

    return run


def without_autocast(run: Callable) -> Callable:
    """Autocast rounds the inputs at the door (`head.read_head`); inside, dtypes are as they are written."""

    @wraps(run)
    def plain(head: Head, *args):
        with torch.autocast(head.hidden.device.type, enabled=False):
            return run(head, *args)

    return plain


# -- log-probs, their gradient arriving late ----------------------------------------------------------------------
class Saved(NamedTuple):
    """What the backward of log-probs needs in addition to the head; empty where nothing needs a gradient."""

    kept: Tensor  # (n,) int64
    state: Tensor  # (n, 8)
    values: Tensor  # of the schedule
    layout: Tensor  # int64, of `values`


@without_autocast
def logprobs_forward(head: Head, settings: Settings, needs: Needs) -> tuple[tuple[Tensor, ...], Saved]:
    """The six fields [N], and what is saved for the backward."""
    hidden, targets = head.hidden, head.targets
    if settings.every_row:  # checked on the device
        kept, bad = torch.arange(len(targets), device=targets.device), 0
    else:
        wrong = any_wrong(targets, head.temperature, len(head.weight), settings)
        kept, (bad,) = read_rows(targets != settings.ignore_index, wrong)
    schedule = start(head, settings, needs, kept)
    tiled, states = schedule.tiled, []
    if bad:
        check_rows(targets[kept], None if head.temperature is None else head.temperature[kept], tiled.vocab)
    schedule.begin(len(kept))
    for chunk in tiled.chunks(0, len(kept)):
        state, saved = schedule.forward(chunk)
        schedule.save(saved)
        states.append(state)
    state = torch.cat(states) if states else tiled.new_state(0)
    values = read(state, targets[kept], tiled.vocab)
    dtypes = [float_dtype(hidden)] * 5 + [torch.bool]
    fields = tuple(scatter(v, kept, len(targets), d) for v, d in zip(values, dtypes))
    if not any(needs):
        kept, state = kept.new_empty(0), tiled.new_state(0)
    return fields, Saved(kept, state, *schedule.packed())


@without_autocast
def logprobs_backward(
    head: Head, saved: Saved, g_logp: Tensor | None, g_entropy: Tensor | None, settings: Settings, needs: Needs
) -> list[Tensor]:
    """Gradients of hidden, weight, bias, lora_A, lora_B; an empty tensor where none is needed."""
    hidden, count = head.hidden, len(saved.kept)
    schedule = start(head, settings, needs, saved.kept)
    tiled, dhidden = schedule.tiled, _zeros_like(hidden, needs.hidden)
    of_chunks = schedule.unpacked(saved.values, saved.layout)
    if g_logp is None:
        g = torch.zeros(count, dtype=float_dtype(hidden), device=hidden.device)
    else:
        g = g_logp[saved.kept]
    h = None if g_entropy is None else g_entropy[saved.kept]
    spans = list(tiled.spans(0, count))
    asked = not settings.every_row and (schedule.drops or h is not None)
    live = live_rows([end - begin for begin, end in spans], g, h, asked=asked)
    for (begin, end), some in zip(spans, live):
        chunk, state, part = tiled.chunk(begin, end).with_live(some), saved.state[begin:end], None
        if h is not None:
            part = h[begin:end]
        tiled.scatter(schedule.backward(chunk, state, next(of_chunks), g[begin:end], part), chunk, dhidden)
    return _dense((dhidden, *tiled.grads.finish()), hidden)


# -- losses that close inside a group of units --------------------------------------------------------------------
@without_autocast
def loss_forward(
    head: Head, targets: Tensor, side: Sequence[Tensor], num_items: Tensor, call: LossCall, settings: Settings,
    needs: Needs,
) -> tuple[tuple[Tensor, ...], list[Tensor]]:  # fmt: skip
    """loss [], sums of the loss's metrics [M], logp, entropy, mean_logit, correct of each target; and five gradients.

    `targets` [B, T] or [N], of which the head has all, or those that are kept. A gradient that is not needed is an
    empty tensor.
    """
    hidden = head.hidden
    wrong = any_wrong(targets.reshape(-1), head.temperature, len(head.weight), settings)
    units = Units(call.loss.unit, targets, settings.ignore_index, call.paired(side), wrong)
    kept, dhidden = units.rows(len(head.targets)), _zeros_like(hidden, needs.hidden)
    schedule = start(head, settings, needs, kept, call, side, units.largest)
    tiled = schedule.tiled
    if units.wrong:
        check_rows(head.targets[kept], None if head.temperature is None else head.temperature[kept], tiled.vocab)
    objective = on_device(Objective(call, units, side, 1.0 / num_items, any(needs)), tiled.backend)
    spans = list(units.groups(*schedule.group_rows, tiled.plan.even))
    schedule.reserve([end - begin for _, _, begin, end in spans])
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    sums = torch.zeros(len(call.loss.metrics), dtype=torch.float64, device=hidden.device)
    states = []
    closing = schedule.close or partial(close, schedule)
    for span in spans:
        closed = closing(objective, span, dhidden)
        states.append(closed.state)
        total += closed.value
        sums += closed.sums
    state = torch.cat(states) if states else tiled.new_state(0)
    logp, entropy, _, _, mean_logit, correct = read(state, head.targets[kept], tiled.vocab)
    dtype = float_dtype(hidden)
    fields = (
        scatter(v, units.kept, units.size, d)
        for v, d in ((logp, dtype), (entropy, dtype), (mean_logit, dtype), (correct, torch.bool))
    )
    return (total.to(dtype), sums.to(dtype), *fields), _dense((dhidden, *tiled.grads.finish()), hidden)


def close(schedule: Schedule, objective: Objective, span: Span, dhidden: Tensor | None) -> Closed:
    """A group of units from its hidden states to its gradients; all that it made is freed with it."""
    tiled, (_, _, begin, end) = schedule.tiled, span
    schedule.begin(end - begin)
    chunks = list(tiled.chunks(begin, end))
    done = [schedule.forward(chunk) for chunk in chunks]
    state = torch.cat([part for part, _ in done]) if done else tiled.new_state(0)
    targets = tiled.head.targets[tiled.kept[begin:end]]
    value, sums, g, g_entropy = objective.coefficients(span, state, targets, tiled.vocab)
    dtype = float_dtype(tiled.head.hidden)
    g, g_entropy = g.to(dtype), None if g_entropy is None else g_entropy.to(dtype)
    begin = 0
    sizes = [len(part) for part, _ in done] if objective.derive else []
    live = live_rows(sizes, g, g_entropy, asked=objective.call.sparse)
    for chunk, some, (part, saved) in zip(chunks, live, done):
        rows = slice(begin, begin + len(part))
        h = None if g_entropy is None else g_entropy[rows].contiguous()
        dx = schedule.backward(chunk.with_live(some), part, saved, g[rows].contiguous(), h)
        tiled.scatter(dx, chunk, dhidden)
        del dx  # not beside that of the next chunk
        begin = rows.stop
    return Closed(state, value, sums)


# -- autograd -----------------------------------------------------------------------------------------------------
class Logprobs(torch.autograd.Function):
    """`logprobs_forward` and `logprobs_backward` as one differentiable function of the head's tensors.

    Returns the fields, then what is saved."""

    @staticmethod
    def forward(*args):
        *tensors, settings, needs = args
        fields, saved = logprobs_forward(Head(*tensors), settings, needs)
        return *fields, *saved

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.settings = inputs[TENSORS:]
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*inputs[:TENSORS], *output[6:])

    @staticmethod
    def backward(ctx, g_logp, g_entropy, *_):
        return late_backward(ctx, LogprobsBackward.apply, ctx.settings[1], g_logp, g_entropy)


class LogprobsBackward(torch.autograd.Function):
    """`logprobs_backward`, a function of its own so that torch.func sees through it."""

    @staticmethod
    def forward(g_logp, g_entropy, *args):
        *tensors, settings, needs = args
        head, saved = Head(*tensors[:TENSORS]), Saved(*tensors[TENSORS:])
        return tuple(logprobs_backward(head, saved, g_logp, g_entropy, settings, needs))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(TWICE)


def late_backward(
    ctx, run: Callable[..., Sequence[Tensor]], needs: Needs, g_logp: Tensor | None, g_entropy: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of the head's tensors and of the settings after them."""
    if g_logp is None and g_entropy is None:
        return (None,) * (TENSORS + len(ctx.settings))
    grads = run(g_logp, g_entropy, *ctx.saved_tensors, *ctx.settings)
    dhidden, dweight, dbias, dA, dB = needed(grads, needs)
    return dhidden, dweight, None, dbias, None, dA, dB, *(None for _ in ctx.settings)


class FusedLoss(torch.autograd.Function):
    """`loss_forward`, whose gradients are computed in the forward and given away once."""

    @staticmethod
    def forward(ctx, *args):
        (*tensors, targets, num_items, call, settings, needs), side = args[: TENSORS + 5], args[TENSORS + 5 :]
        (total, *rest), grads = loss_forward(Head(*tensors), targets, side, num_items, call, settings, needs)
        ctx.mark_non_differentiable(*rest)
        ctx.save_for_backward(*grads)
        ctx.needs, ctx.others, ctx.spent = needs, len(args) - TENSORS, False
        hidden, weight = tensors[:2]
        backend = BACKENDS[pick(settings.impl, weight.device, logits_dtype(hidden.dtype, weight))]
        ctx.multiply = backend.multiply or Tensor.mul_
        return total, *rest

    @staticmethod
    @first_order
    def backward(ctx, grad, *_):
        if ctx.spent:
            raise RuntimeError(
                "the gradients of this fused loss were handed out already: they are computed in the forward and given "
                "away once. Call the loss again instead of running backward through it twice."
            )
        ctx.spent = True
        # a factor of one, the usual case, must not cost a pass over dW; reading it is free only on a CPU
        grads = needed(ctx.saved_tensors, ctx.needs)
        if waits(grad) or grad.item() != 1.0:
            for g in grads:
                if g is not None:
                    ctx.multiply(g, grad)
        dhidden, dweight, dbias, dA, dB = grads
        return dhidden, dweight, None, dbias, None, dA, dB, *(None,) * ctx.others
