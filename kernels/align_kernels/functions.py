"""The schedules for autograd: log-probs whose gradient arrives late, and losses that close inside a chunk.

Each is a pure function of tensors and two strings, the settings and the loss with its hyper-parameters. Eager calls go
through a `torch.autograd.Function`, so that modes such as `FlopCounterMode` see every GEMM; under `torch.compile` and
with fake tensors the same functions run as `torch.library` operators.
"""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

from align_kernels import accelerated, compaction, exponentials
from align_kernels.head import Head, LogitGradClamp, Settings, Transform, check_rows
from align_kernels.schedules import Chunk, Grads, Lent, Needs, Runner, float_dtype
from align_kernels.units import Fields, LossCall, Units, coefficients, keep_rows, sum_metrics, unit_values


# -- settings as text ---------------------------------------------------------------------------------------------
# repr and literal_eval rather than JSON: torch.compile traces repr of constants
def encode_settings(settings: Settings, needs: Needs) -> str:
    s, t = settings, settings.transform
    return repr(
        (
            (t.logit_scale, t.softcap, t.temperature),
            None if s.clamp is None else (float(s.clamp.limit), float(s.clamp.prob_above), s.clamp.units),
            (s.lora_scaling, s.drop_mass, s.ignore_index, s.impl, s.workspace, s.tp_group),
            (needs.hidden, needs.weight, needs.bias, needs.lora_A, needs.lora_B),
        )
    )


@lru_cache(maxsize=256)
def decode_settings(text: str) -> tuple[Settings, Needs]:
    transform, clamp, rest, needs = literal_eval(text)
    clamp = None if clamp is None else LogitGradClamp(*clamp)
    return Settings(Transform(*transform), clamp, *rest), Needs(*needs)


# -- shared pieces ------------------------------------------------------------------------------------------------
def read_state(state: Tensor, targets: Tensor, vocab: int) -> tuple[Tensor, ...]:
    """logp, entropy, lse, log_sum_sq_probs, mean_logit [n] in the state's precision, and correct [n]."""
    m, s, a, q, total, target, argmax = state[:, :7].unbind(1)
    log_s = s.log()
    return (target - m) - log_s, log_s - a / s, m + log_s, q.log() - 2 * log_s, total / vocab, argmax == targets


def scatter(values: Tensor, kept: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(size, dtype=dtype, device=values.device).index_copy_(0, kept, values.to(dtype))


def scatter_rows(rows: Tensor, chunk: Chunk, out: Tensor) -> None:
    if isinstance(chunk.rows, slice):
        out[chunk.rows] = rows.to(out.dtype)
    else:
        out.index_copy_(0, chunk.rows, rows.to(out.dtype))


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(0)


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
    """Autocast rounds the inputs at the door (`api.read_head`); inside, dtypes are as they are written."""

    @wraps(run)
    def plain(*args):
        device = next(x for x in args if isinstance(x, Tensor)).device.type
        with torch.autocast(device, enabled=False):
            return run(*args)

    return plain


EARLY = ("online", "frozen")  # schedules that have dX over g before g


# -- log-probs, their gradient arriving late ----------------------------------------------------------------------
@without_autocast
def logprobs_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    settings: str,
) -> tuple[Tensor, ...]:
    """The six fields [N], then what the backward needs: kept rows, their states, and logits or unscaled dX, with the
    layout of compacted logits."""
    head = Head(hidden, weight, targets, bias, temperature, lora_A, lora_B)
    options, needs = decode_settings(settings)
    kept = keep_rows(targets, options.ignore_index)
    run = Runner(head, options, needs, kept, late=True)
    check_rows(targets[kept], None if temperature is None else temperature[kept], run.vocab)
    states, held = [], []
    payload, store = hidden.new_empty(0, dtype=run.logits_dtype), None
    if run.plan.schedule in EARLY:
        payload = hidden.new_empty(len(kept) * hidden.shape[1], dtype=run.logits_dtype)
    if run.plan.schedule == "frozen":
        store = run.store(min(run.plan.chunk_rows, len(kept)))
    begin = 0
    for chunk in run.chunks(0, len(kept)):
        n = len(chunk.targets)
        if run.plan.schedule in ("keep", "compaction"):
            store = run.store(n)
        if run.plan.schedule == "online":
            state, dx = exponentials.online(run, chunk)
        else:
            state, dx = run.forward(chunk, store), None
        states.append(state)
        if run.plan.schedule == "frozen":
            one = torch.ones(n, dtype=float_dtype(hidden), device=hidden.device)
            dx = run.backward(chunk, state, one, None, Grads(run), store, consume=True)
        if dx is not None:
            payload.view(-1, hidden.shape[1])[begin : begin + n] = dx
        elif run.plan.schedule == "compaction":
            assert store is not None
            held.append(compaction.hold(run, chunk, state, store, held, alone=n == len(kept)))
        elif store is not None:  # "keep" has one chunk
            payload = store
        begin += n
    state = torch.cat(states) if states else torch.zeros(0, 8, dtype=torch.float64, device=hidden.device)
    layout = kept.new_empty(0)
    if held:
        payload, layout = compaction.pack(held, payload)
    values = read_state(state, targets[kept], run.vocab)
    dtypes = [float_dtype(hidden)] * 5 + [torch.bool]
    fields = [scatter(v, kept, len(targets), d) for v, d in zip(values, dtypes)]
    if not (needs.hidden or needs.head):
        kept, state = kept.new_empty(0), state.new_empty(0, 8)
    return (*fields, kept, state, payload, layout)


@without_autocast
def logprobs_backward(
    g_logp: Tensor | None,
    g_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    kept: Tensor,
    state: Tensor,
    payload: Tensor,
    layout: Tensor,
    settings: str,
) -> list[Tensor]:
    """Gradients of hidden, weight, bias, lora_A, lora_B; an empty tensor where none is needed."""
    head = Head(hidden, weight, targets, bias, temperature, lora_A, lora_B)
    options, needs = decode_settings(settings)
    run = Runner(head, options, needs, kept, late=True)
    grads = Grads(run)
    dhidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needs.hidden else None
    if run.plan.schedule in EARLY and g_entropy is None:
        assert dhidden is not None
        if g_logp is not None:
            n = run.plan.chunk_rows
            for rows, dx in zip(kept.split(n), payload.view(-1, hidden.shape[1]).split(n)):
                dhidden.index_copy_(0, rows, (dx * g_logp[rows][:, None]).to(hidden.dtype))
    else:
        store = payload if run.plan.schedule == "keep" else None
        held = compaction.unpack(payload, layout, len(weight))
        begin = 0
        for chunk in run.chunks(0, len(kept)):
            n = len(chunk.targets)
            g = (
                torch.zeros(n, dtype=float_dtype(hidden), device=hidden.device)
                if g_logp is None
                else g_logp[chunk.rows].contiguous()
            )
            h = None if g_entropy is None else g_entropy[chunk.rows].contiguous()
            dx = run.backward(chunk, state[begin : begin + n], g, h, grads, store, waiting=next(held, None))
            if dhidden is not None and dx is not None:
                scatter_rows(dx, chunk, dhidden)
            begin += n
    return [_empty(hidden) if x is None else x for x in (dhidden, *grads.finish())]


# -- losses that close inside a chunk -----------------------------------------------------------------------------
def loss_runner(head: Head, settings: Settings, needs: Needs, units: Units, call: LossCall) -> Runner:
    traits: dict[str, Any] = dict(largest_unit=units.largest, entropy=call.with_entropy, sparse=call.sparse)
    traits["by_token"] = call.loss.unit == "token"
    return Runner(head, settings, needs, units.kept, late=False, **traits)


def _first_pass(
    run: Runner, chunk: Chunk, store: Tensor | Lent | None, waiting: list, *, alone: bool, train: bool
) -> tuple[Tensor, Any]:
    """The finished softmax state [n, 8] of a chunk, and what its schedule keeps beside `store` until g is known.

    `waiting` has what is kept of the group's chunks before; `alone`: there are no others.
    """
    if run.plan.schedule == "compaction":
        room = run.store(len(chunk.targets))
        state = run.forward(chunk, room)
        return state, compaction.hold(run, chunk, state, room, waiting, alone=alone)
    if run.plan.schedule == "online":
        return exponentials.online(run, chunk)
    if run.plan.exponentials and train:
        return exponentials.forward(run, chunk, store)[:2]
    return run.forward(chunk, store), None


@without_autocast
def loss_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    side: list[Tensor],
    num_items: Tensor,
    loss: str,
    settings: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """loss [], sums of the loss's metrics [M], logp, entropy, mean_logit, correct [N], and five gradients.

    `hidden` [N, D], `targets` [B, T] or [N]; a gradient that is not needed is an empty tensor.
    """
    call = LossCall.decode(loss)
    options, needs = decode_settings(settings)
    head = Head(hidden, weight, targets.reshape(-1), bias, temperature, lora_A, lora_B)
    units = Units(call.loss.unit, targets, options.ignore_index)
    kept = units.kept
    run = loss_runner(head, options, needs, units, call)
    check_rows(head.targets[kept], None if temperature is None else temperature[kept], run.vocab)
    train = needs.hidden or needs.head
    grads = Grads(run)
    dhidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if needs.hidden else None
    dtype = float_dtype(hidden)
    by_token = accelerated.takes_tokens(run, call, side, train)
    by_unit = train and call.loss.unit != "token" and accelerated.serves(run, call, side)
    capacity = accelerated.capacity(run) if by_token else run.plan.chunk_rows
    spans = list(units.groups(capacity, capacity if by_token else run.plan.first_rows))
    store = None
    if run.plan.schedule == "one pass" and spans:
        store = run.store_beside([end - begin for _, _, begin, end in spans])
    scale = 1.0 / num_items
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    sums = torch.zeros(len(call.loss.metrics), dtype=torch.float64, device=hidden.device)
    states = []

    def close(span: tuple[int, int, int, int]) -> None:
        """A group of units from its hidden states to its gradients; all that it made is freed with it."""
        nonlocal total, sums
        chunks = [] if span[2] == span[3] else list(run.chunks(span[2], span[3]))
        logits = None if store is None or len(chunks) != 1 else run.lend(store, span[3] - span[2], grads)
        parts, waiting = [], []
        for chunk in chunks:
            part, wait = _first_pass(run, chunk, logits, waiting, alone=len(chunks) == 1, train=train)
            parts.append(part)
            waiting.append(wait)
        states.extend(parts)
        state = torch.cat(parts) if parts else torch.zeros(0, 8, dtype=torch.float64, device=hidden.device)
        fields = Fields.of(read_state(state, head.targets[kept[span[2] : span[3]]], run.vocab))
        if by_unit:
            value, measured, g = accelerated.coefficients(run, units, call, side, span, state, scale)
            g_entropy = None
        else:
            value, measured, g, g_entropy = coefficients(units, call, side, span, fields, scale, train)
        g, g_entropy = g.to(dtype), None if g_entropy is None else g_entropy.to(dtype)
        total += value
        sums += measured
        begin = 0
        for chunk, part, wait in zip(chunks, parts, waiting) if train else ():
            end = begin + len(part)
            if run.plan.schedule == "online":
                dx = wait.mul_(g[begin:end, None])
            else:
                h = None if g_entropy is None else g_entropy[begin:end].contiguous()
                dx = run.backward(chunk, part, g[begin:end].contiguous(), h, grads, logits, consume=True, waiting=wait)
            if dhidden is not None and dx is not None:
                scatter_rows(dx, chunk, dhidden)
            begin = end

    def close_tokens(span: tuple[int, int, int, int]) -> None:
        """The same in one kernel between the GEMMs."""
        nonlocal total, sums
        assert store is not None
        made = accelerated.tokens(run, units, call, side, span, store, scale, grads)
        states.append(made.state)
        total += made.value
        sums += made.sums
        if dhidden is not None and made.dx is not None:
            scatter_rows(made.dx, run.chunk(span[2], span[3]), dhidden)

    for span in spans:
        close_tokens(span) if by_token else close(span)
    state = torch.cat(states) if states else torch.zeros(0, 8, dtype=torch.float64, device=hidden.device)
    logp, entropy, _, _, mean_logit, correct = read_state(state, head.targets[kept], run.vocab)
    size = len(head.targets)
    fields = [
        scatter(v, kept, size, d)
        for v, d in ((logp, dtype), (entropy, dtype), (mean_logit, dtype), (correct, torch.bool))
    ]
    found = [_empty(hidden) if x is None else x for x in (dhidden, *grads.finish())]
    return total.to(dtype), sums.to(dtype), fields[0], fields[1], fields[2], fields[3], found


# -- autograd -----------------------------------------------------------------------------------------------------
class Logprobs(torch.autograd.Function):
    """`logprobs_forward` and `logprobs_backward` as one differentiable function of the head's tensors."""

    @staticmethod
    def forward(hidden, weight, targets, bias, temperature, lora_A, lora_B, settings):
        return logprobs_forward(hidden, weight, targets, bias, temperature, lora_A, lora_B, settings)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.settings = inputs[-1]
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*inputs[:-1], *output[6:])

    @staticmethod
    def backward(ctx, g_logp, g_entropy, *_):
        return late_backward(ctx, LogprobsBackward.apply, g_logp, g_entropy)


class LogprobsBackward(torch.autograd.Function):
    """`logprobs_backward`, a function of its own so that torch.func sees through it."""

    @staticmethod
    def forward(*args):
        return tuple(logprobs_backward(*args))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(TWICE)


def late_backward(ctx, run: Callable[..., Sequence[Tensor]], g_logp: Tensor | None, g_entropy: Tensor | None, *_):
    if g_logp is None and g_entropy is None:
        return (None,) * 8
    dhidden, dweight, dbias, dA, dB = needed(run(g_logp, g_entropy, *ctx.saved_tensors, ctx.settings), ctx.settings)
    return dhidden, dweight, None, dbias, None, dA, dB, None


class FusedLoss(torch.autograd.Function):
    """`loss_forward`, whose gradients are computed in the forward and given away once."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, temperature, lora_A, lora_B, num_items, loss, settings, *side):
        total, *rest, grads = loss_forward(
            hidden, weight, targets, bias, temperature, lora_A, lora_B, list(side), num_items, loss, settings
        )
        ctx.mark_non_differentiable(*rest)
        ctx.save_for_backward(*grads)
        ctx.settings, ctx.sides, ctx.spent = settings, len(side), False
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
        # a factor of one, the usual case, must not cost a pass over dW; reading it is free on a CPU alone
        same = grad.device.type == "cpu" and grad.item() == 1.0
        dhidden, dweight, dbias, dA, dB = (
            g if g is None or same else g.mul_(grad) for g in needed(ctx.saved_tensors, ctx.settings)
        )
        return dhidden, dweight, None, dbias, None, dA, dB, None, None, None, *(None,) * ctx.sides


def needed(grads: Sequence[Tensor], settings: str) -> list[Tensor | None]:
    return [grad if needed else None for grad, needed in zip(grads, decode_settings(settings)[1])]


# -- entry points -------------------------------------------------------------------------------------------------
def loss_late(
    fields: Sequence[Tensor], targets: Tensor, side: list[Tensor], num_items: Tensor, text: str, settings: Settings
) -> tuple[Tensor, ...]:
    """What `loss` returns, from the fields of log-probs, by autograd."""
    call = LossCall.decode(text)
    units = Units(call.loss.unit, targets, settings.ignore_index)
    logp, entropy, _, _, mean_logit, correct = fields[:6]
    span = (0, units.count, 0, len(units.kept))
    rows = Fields.of(tuple(x[units.kept] for x in fields[:4]))
    values, metrics = unit_values(units, call, side, span, rows)
    sums = sum_metrics(call, metrics, values).to(logp.dtype)
    total = (values.sum() / num_items).to(logp.dtype)
    return total, sums, logp.detach(), entropy.detach(), mean_logit, correct
