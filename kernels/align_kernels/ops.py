"""The functions of `functions.py` as torch.library operators: opaque to torch.compile, known to fake tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from align_kernels import functions
from align_kernels.functions import decode_settings, encode_settings
from align_kernels.gemm import logits_dtype
from align_kernels.head import Head, Settings
from align_kernels.schedules import Needs, float_dtype
from align_kernels.units import LossCall

# they read sizes and kept rows back from the device, which the capture of a CUDA graph forbids
_TAGS = tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None)
_EXCLUDED = torch._C._dispatch_tls_local_exclude_set()  # the dispatch keys that are off outside of any operator


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
    return functions.logprobs_forward(hidden, weight, targets, bias, temperature, lora_A, lora_B, settings)  # type: ignore


@logprobs_op.register_fake
def _(hidden, weight, targets, bias, temperature, lora_A, lora_B, settings):
    kept = payload = layout = 0
    if any(decode_settings(settings)[1]):
        context = torch.library.get_ctx()
        kept, payload, layout = (context.new_dynamic_size() for _ in range(3))
    head = Head(hidden, weight, targets, bias, temperature, lora_A, lora_B)
    fields = [hidden.new_empty(targets.shape, dtype=float_dtype(hidden)) for _ in range(5)]
    return (
        *fields,
        hidden.new_empty(targets.shape, dtype=torch.bool),
        hidden.new_empty(kept, dtype=torch.int64),
        hidden.new_empty((kept, 8), dtype=torch.float64),
        hidden.new_empty(payload, dtype=logits_dtype(head)),
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
    kept: Tensor,
    state: Tensor,
    payload: Tensor,
    layout: Tensor,
    settings: str,
) -> list[Tensor]:
    return functions.logprobs_backward(
        g_logp, g_entropy, hidden, weight, targets, bias, temperature, lora_A, lora_B,
        kept, state, payload, layout, settings,
    )  # fmt: skip


def _fake_grads(hidden, weight, bias, lora_A, lora_B, settings: str) -> list[Tensor]:
    needs = decode_settings(settings)[1]
    tensors = (hidden, weight, bias, lora_A, lora_B)
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if need and x is not None else hidden.new_empty(0)
        for x, need in zip(tensors, needs)
    ]


@logprobs_backward_op.register_fake
def _(g_logp, g_entropy, hidden, weight, targets, bias, temperature, lora_A, lora_B, *rest):
    return _fake_grads(hidden, weight, bias, lora_A, lora_B, rest[-1])


logprobs_op.register_autograd(
    lambda ctx, *grads: functions.late_backward(ctx, logprobs_backward_op, *grads),
    setup_context=functions.Logprobs.setup_context,
)


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
        *fields, grads = functions.loss_forward(
            hidden, weight, targets, bias, temperature, lora_A, lora_B, side, num_items, loss, settings
        )
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
    scaled = [None if g is None else g * grad for g in functions.needed(ctx.saved_tensors, ctx.settings)]
    dhidden, dweight, dbias, dA, dB = scaled
    return dhidden, dweight, None, dbias, None, dA, dB, [None] * ctx.sides, None, None, None


loss_op.register_autograd(_loss_backward, setup_context=_loss_context)


# -- entry points: the eager call goes through autograd.Function, where modes see every GEMM ----------------------
def _opaque(hidden: Tensor) -> bool:
    return torch.compiler.is_compiling() or is_fake(hidden)


def logprobs(head: Head, settings: Settings, needs: Needs) -> tuple[Tensor, ...]:
    run = logprobs_op if _opaque(head.hidden) else functions.Logprobs.apply
    return run(*head, encode_settings(settings, needs))


def loss(
    head: Head, targets: Tensor, side: list[Tensor], num_items: Tensor, text: str, settings: Settings, needs: Needs
) -> tuple[Tensor, ...]:
    # torch.func must see the gradient made in the backward
    if torch._C._functorch.maybe_current_level() is not None:  # pyright: ignore
        return functions.loss_late(logprobs(head, settings, needs), targets, side, num_items, text, settings)
    tensors, encoded = head._replace(targets=targets), encode_settings(settings, needs)
    if _opaque(head.hidden):
        return loss_op(*tensors, side, num_items, text, encoded)[:6]
    return functions.FusedLoss.apply(*tensors, num_items, text, encoded, *side)
