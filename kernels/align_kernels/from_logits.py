"""Log-probs for callers that hold logits: the same two primitives, without a GEMM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from align_kernels.api import LogProbs
from align_kernels.arguments import check_float, public
from align_kernels.autograd import first_order
from align_kernels.backends import state as states
from align_kernels.dispatch import BACKENDS, pick
from align_kernels.eager import logprobs_of
from align_kernels.head import LogitGradClamp, Settings, Transform, check_rows
from align_kernels.schedules.request import profile_of
from align_kernels.sums import float_dtype


def _tiles(logits: Tensor) -> Iterator[tuple[int, int]]:
    rows, vocab = logits.shape
    columns = max(profile_of(logits.device.type).tile_bytes // max(rows * logits.itemsize, 1), 1024)
    for begin in range(0, vocab, columns):
        yield begin, min(begin + columns, vocab)


class FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, temperature: Tensor | float, settings: Settings):
        ctx.set_materialize_grads(False)
        backend = BACKENDS[pick(settings.impl, logits.device, logits.dtype)]
        mask = targets != settings.ignore_index
        labels = targets.masked_fill(~mask, 0)
        state = states.empty(len(labels), logits.device)
        ctx.call = call = dict[str, Any](
            vocab=logits.shape[1], bias=None, scale=1.0, softcap=None, temperature=temperature
        )
        for begin, end in _tiles(logits):
            backend.forward(logits[:, begin:end], state, labels, offset=begin, **call)
        *values, correct = states.read(state, labels, logits.shape[1])
        fields = [v.masked_fill(~mask, 0.0).to(float_dtype(logits)) for v in values] + [correct & mask]
        ctx.mark_non_differentiable(*fields[2:])
        ctx.save_for_backward(logits, labels, mask, state)
        ctx.backend, ctx.clamp = backend, settings.clamp
        return tuple(fields)

    @staticmethod
    @first_order
    def backward(ctx, g_logp: Tensor | None, g_entropy: Tensor | None, *_):
        logits, labels, mask, state = ctx.saved_tensors
        if g_logp is None and g_entropy is None:
            return None, None, None, None
        zero = torch.zeros(len(labels), dtype=float_dtype(logits), device=logits.device)
        g = zero if g_logp is None else g_logp.masked_fill(~mask, 0.0)
        h = None if g_entropy is None else g_entropy.masked_fill(~mask, 0.0)
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for begin, end in _tiles(logits):
            z, dz = logits[:, begin:end], out[:, begin:end]
            ctx.backend.backward(z, state, labels, g, h, offset=begin, clamp=ctx.clamp, out=dz, **ctx.call)
        return out, None, None, None


@public
def logprobs_from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    grad_clamp: LogitGradClamp | None = None,
    impl: str = "auto",
) -> LogProbs:
    """Log-prob, entropy and more of each target from logits, in one pass and without a float32 copy of them.

    Args:
        logits: [..., V] float; targets: [...] int64, already shifted.
        temperature: a float or one per position [...]. Default 1.0.
        ignore_index: positions with this target read 0 and receive no gradient. Default -100.
        grad_clamp: `LogitGradClamp`. Default None.
        impl: "auto", "eager", "torch", "cpu", "triton", "cuda"; see `linear_logprobs`.

    Returns:
        LogProbs, each field [...]; logp and entropy are differentiable.

    Raises:
        ValueError: shapes or options that do not fit; a target outside [0, V).
    """
    if logits.dim() < 1 or targets.shape != logits.shape[:-1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets must be int64 with the leading shape of logits {tuple(logits.shape)}, got {targets.dtype} "
            f"{tuple(targets.shape)}"
        )
    check_float("logits", logits)
    per_row = isinstance(temperature, Tensor)
    if per_row and temperature.shape != targets.shape:
        raise ValueError(f"temperature must be a float or one per position, got shape {tuple(temperature.shape)}")
    if per_row and temperature.requires_grad:
        raise ValueError("temperature carries no gradient: pass temperature.detach()")
    scalar = 1.0 if per_row else float(temperature)
    clamp = None if grad_clamp is None else LogitGradClamp(*grad_clamp)
    settings = Settings(Transform(temperature=scalar), clamp, ignore_index=ignore_index, impl=impl).check()
    flat, labels = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    divisor = temperature.reshape(-1).to(float_dtype(flat)) if per_row else scalar
    if not torch.compiler.is_compiling():
        kept = labels != ignore_index
        check_rows(labels[kept], divisor[kept] if isinstance(divisor, Tensor) else None, flat.shape[1])
    if impl == "eager" or torch.compiler.is_compiling():
        scaled = flat.to(float_dtype(flat)) / (divisor[:, None] if isinstance(divisor, Tensor) else divisor)
        fields = logprobs_of(scaled, labels, settings)
    else:
        flat = flat if flat.stride(1) == 1 and flat.stride(0) >= flat.shape[1] else flat.contiguous()
        fields = FromLogits.apply(flat, labels, divisor, settings)
    return LogProbs(*(x.reshape(targets.shape) for x in fields))
