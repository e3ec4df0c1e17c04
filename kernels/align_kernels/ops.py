"""The functions of `autograd.py` as torch.library operators: opaque to torch.compile, known to fake tensors.

Settings and losses reach an operator as text, since torch.library takes no objects.
"""

from __future__ import annotations

from ast import literal_eval
from functools import lru_cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from align_kernels import autograd, rehearsal
from align_kernels.autograd import TENSORS, Saved, needed
from align_kernels.backends.state import COLUMNS
from align_kernels.gemm import logits_dtype
from align_kernels.head import Head, LogitGradClamp, Needs, Settings, Transform
from align_kernels.sums import float_dtype
from align_kernels.units import LossCall, keep_rows

# they read sizes and kept rows back from the device, which the capture of a CUDA graph forbids
_TAGS = tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None)
_EXCLUDED = torch._C._dispatch_tls_local_exclude_set()  # the dispatch keys that are off outside of any operator


# -- settings as text ---------------------------------------------------------------------------------------------
# repr and literal_eval rather than JSON: torch.compile traces repr of constants
def encode_settings(settings: Settings, needs: Needs) -> str:
    s, t = settings, settings.transform
    return repr(
        (
            (t.logit_scale, t.softcap, t.temperature),
            None if s.clamp is None else (float(s.clamp.limit), float(s.clamp.prob_above), s.clamp.units),
            (s.lora_scaling, s.drop_mass, s.ignore_index, s.impl, s.workspace, s.tp_group, s.every_row),
            (needs.hidden, needs.weight, needs.bias, needs.lora_A, needs.lora_B),
        )
    )


@lru_cache(maxsize=256)
def decode_settings(text: str) -> tuple[Settings, Needs]:
    transform, clamp, rest, needs = literal_eval(text)
    clamp = None if clamp is None else LogitGradClamp(*clamp)
    return Settings(Transform(*transform), clamp, *rest), Needs(*needs)


# -- log-probs ----------------------------------------------------------------------------------------------------
@torch.library.custom_op("align_kernels::logprobs", mutates_args=(), tags=_TAGS)
def logprobs_op(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    settings: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    head = Head(hidden, weight, targets, bias, temperature, lora_A, lora_B)
    fields, saved = autograd.logprobs_forward(head, *decode_settings(settings))
    return (*fields, *saved)  # type: ignore[return-value]


@logprobs_op.register_fake
def _(hidden, weight, targets, bias, temperature, lora_A, lora_B, settings):
    kept = values = layout = 0
    if any(decode_settings(settings)[1]):
        context = torch.library.get_ctx()
        kept, values, layout = (context.new_dynamic_size() for _ in range(3))
    fields = [hidden.new_empty(targets.shape, dtype=float_dtype(hidden)) for _ in range(5)]
    return (
        *fields,
        hidden.new_empty(targets.shape, dtype=torch.bool),
        hidden.new_empty(kept, dtype=torch.int64),
        hidden.new_empty((kept, COLUMNS), dtype=torch.float64),
        hidden.new_empty(values, dtype=logits_dtype(hidden.dtype, weight)),
        hidden.new_empty(layout, dtype=torch.int64),
    )


@torch.library.custom_op("align_kernels::logprobs_backward", mutates_args=(), tags=_TAGS)
def logprobs_backward_op(
    g_logp: Tensor | None,
    g_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    saved: list[Tensor],
    settings: str,
) -> list[Tensor]:
    head = Head(hidden, weight, targets, bias, temperature, lora_A, lora_B)
    return autograd.logprobs_backward(head, Saved(*saved), g_logp, g_entropy, *decode_settings(settings))


def _fake_grads(hidden, weight, bias, lora_A, lora_B, settings: str) -> list[Tensor]:
    needs = decode_settings(settings)[1]
    tensors = (hidden, weight, bias, lora_A, lora_B)
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if need and x is not None else hidden.new_empty(0)
        for x, need in zip(tensors, needs)
    ]


@logprobs_backward_op.register_fake
def _(g_logp, g_entropy, hidden, weight, targets, bias, temperature, lora_A, lora_B, saved, settings):
    return _fake_grads(hidden, weight, bias, lora_A, lora_B, settings)


def _logprobs_backward(ctx, g_logp, g_entropy, *_):
    def run(g_logp, g_entropy, *args):
        head, saved, settings = args[:TENSORS], args[TENSORS:-1], args[-1]
        return logprobs_backward_op(g_logp, g_entropy, *head, list(saved), settings)

    return autograd.late_backward(ctx, run, decode_settings(*ctx.settings)[1], g_logp, g_entropy)


logprobs_op.register_autograd(_logprobs_backward, setup_context=autograd.Logprobs.setup_context)


# -- fused losses -------------------------------------------------------------------------------------------------
@torch.library.custom_op("align_kernels::loss", mutates_args=(), tags=_TAGS)
def loss_op(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    # an operator runs below autograd; the loss's own small derivative needs autograd's dispatch keys back
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), _EXCLUDED), torch.no_grad():
        decoded, flat = decode_settings(settings), targets.reshape(-1)
        if len(hidden) != len(flat):
            flat = flat[keep_rows(flat, decoded[0].ignore_index)]
        head = Head(hidden, weight, flat, bias, temperature, lora_A, lora_B)
        fields, grads = autograd.loss_forward(head, targets, side, num_items, LossCall.decode(loss), *decoded)
    return (*fields, *grads)  # type: ignore[return-value]


@loss_op.register_fake
def _(hidden, weight, targets, bias, temperature, lora_A, lora_B, side, num_items, loss, settings):
    dtype, size = float_dtype(hidden), targets.numel()
    metrics = LossCall.decode(loss).loss.metrics
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(len(metrics), dtype=dtype),
        *(hidden.new_empty(size, dtype=dtype) for _ in range(3)),
        hidden.new_empty(size, dtype=torch.bool),
        *_fake_grads(hidden, weight, bias, lora_A, lora_B, settings),
    )


def _loss_context(ctx, inputs, output):
    ctx.settings, ctx.sides = inputs[-1], len(inputs[7])
    ctx.save_for_backward(*output[6:])


def _loss_backward(ctx, grad, *_):
    needs = decode_settings(ctx.settings)[1]
    scaled = [None if g is None else g * grad for g in needed(ctx.saved_tensors, needs)]
    dhidden, dweight, dbias, dA, dB = scaled
    return dhidden, dweight, None, dbias, None, dA, dB, [None] * ctx.sides, None, None, None


loss_op.register_autograd(_loss_backward, setup_context=_loss_context)


# -- entry points -------------------------------------------------------------------------------------------------
def opaque(hidden: Tensor) -> bool:
    """Whether a call must be one operator."""
    return torch.compiler.is_compiling() or is_fake(hidden)


def _acting() -> rehearsal.Rehearsal | None:
    return None if torch.compiler.is_compiling() else rehearsal.acting()


def logprobs(head: Head, settings: Settings, needs: Needs) -> tuple[Tensor, ...]:
    """What `autograd.Logprobs` returns."""
    if (rehearsed := _acting()) is not None:
        return rehearsed.logprobs(head, settings, needs)
    return logprobs_op(*head, encode_settings(settings, needs))


def loss(
    head: Head,
    targets: Tensor,  # [B, T] or [N], of which the head has all, or those that are kept
    side: list[Tensor],
    num_items: Tensor,
    call: LossCall,
    settings: Settings,
    needs: Needs,
) -> tuple[Tensor, ...]:
    """What `autograd.FusedLoss` returns."""
    if (rehearsed := _acting()) is not None:
        return rehearsed.loss(head, targets, side, call, settings, needs)
    text, encoded = call.encode(), encode_settings(settings, needs)
    return loss_op(*head._replace(targets=targets), side, num_items, text, encoded)[:6]
