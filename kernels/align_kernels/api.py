"""Log-probs straight from hidden states.

Shape letters: B sequences, T positions, V vocabulary, D hidden size, R rank of a LoRA.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from align_kernels import ops
from align_kernels.arguments import check_call, check_float, public
from align_kernels.autograd import Logprobs
from align_kernels.eager import logprobs_eager
from align_kernels.head import Head, Needs, Settings, any_wrong, read_head
from align_kernels.sums import add_at
from align_kernels.units import spread


class LogProbs(NamedTuple):
    """What is known of each position's softmax, float32 (float64 for float64 input); ignored positions read 0."""

    logp: Tensor  # log-prob of the target, differentiable
    entropy: Tensor  # in nats, differentiable
    lse: Tensor  # log sum exp of the logits
    log_sum_sq_probs: Tensor  # log sum p^2
    mean_logit: Tensor
    correct: Tensor  # bool: the target is the first argmax


def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, **head) -> LogProbs:
    """Log-prob, entropy and more of each target, without ever holding the logits [N, V].

    The same as, but for memory and speed:

        logits = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature
        logp = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]

    Args:
        hidden: [..., D] float, or [N, D]: the rows of the N targets that are not ignored, in their order, where no
            others were gathered.
        weight: [V, D] float, may differ from hidden in dtype. A DTensor placed Replicate() or Shard(0) serves too;
            hidden and targets must then be the same on every rank of its mesh.
        targets: [...] int64, already shifted: position i of hidden predicts targets[i].
        bias: [V]. Default None.
        logit_scale: factor on the raw logits (Cohere; Granite: 1 / logits_scaling). Default 1.0.
        softcap: cap * tanh(logits / cap) (Gemma). Default None.
        temperature: a float or one per position [...]. Default 1.0.
        ignore_index: positions with this target never meet the head and read 0. Default -100.
        grad_clamp: `LogitGradClamp`. Default None.
        drop_mass: probability mass per row that the backward may leave out. Default 0.0: exact.
        lora: (A [R, D], B [V, R], scaling), an update of a frozen weight. Default None.
        tp_group: process group over which weight (bias, lora's B) is sharded along V in the order of its ranks; hidden
            and targets are the same on every rank. Default None.
        impl: "auto", "eager" (whole logits, autograd), "torch", "cpu", "triton", "cuda". A backend asked for by name
            serves or raises.
        workspace: limit in bytes for kept logits and scratch. Default None: by device.

    Returns:
        LogProbs, each field [...].

    Raises:
        ValueError: shapes, dtypes or options that do not fit; a target outside [0, V).
    """
    check_call(linear_logprobs)
    tensors, settings, needs = read_head(hidden, weight, targets, **head)
    if settings.every_row:
        return _of_every_row(tensors, settings, needs, targets.shape)
    found = spread(logprobs(tensors, settings, needs)[:6], targets, settings.ignore_index)
    logp, entropy, *rest = (x.reshape(targets.shape) for x in found)
    return LogProbs(logp, entropy, *(x.detach() for x in rest))


def _of_every_row(head: Head, settings: Settings, needs: Needs, shape: torch.Size) -> LogProbs:
    """Those that have no target pass as rows of zeros with the first one, and read 0."""
    kept = head.targets != settings.ignore_index
    wrong = any_wrong(head.targets, head.temperature, len(head.weight), settings)
    said = f"targets must lie in [0, {len(head.weight)}), temperatures be finite and above 0"
    torch._assert_async(~wrong, said)  # pyright: ignore[reportPrivateImportUsage]
    head = head._replace(
        hidden=head.hidden.where(kept[:, None], 0.0),
        targets=head.targets.where(kept, 0),
        temperature=None if head.temperature is None else head.temperature.where(kept, 1.0),
    )
    logp, entropy, *rest, correct = logprobs(head, settings, needs)[:6]
    fields = [*(x.where(kept, 0.0).reshape(shape) for x in (logp, entropy, *rest)), (correct & kept).reshape(shape)]
    return LogProbs(fields[0], fields[1], *(x.detach() for x in fields[2:]))


def logprobs(head: Head, settings: Settings, needs: Needs) -> tuple[Tensor, ...]:
    """The fields [N] of `LogProbs`: by whole logits, as one operator, or by autograd, where modes see every GEMM."""
    if settings.impl == "eager":
        return logprobs_eager(head, settings)
    if ops.opaque(head.hidden):
        return ops.logprobs(head, settings, needs)
    return Logprobs.apply(*head, settings, needs)


@public
def sequence_logprobs(
    logps: Tensor,
    targets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    average: bool = False,
    ignore_index: int = -100,
) -> Tensor:
    """Sum (or mean) of token log-probs over each sequence.

    Args:
        logps: [B, T] with targets [B, T] of the same shape, or packed [N] with cu_seqlens [B + 1].
        targets: [B, T] int64; ignored positions do not count. May be None for packed input without ignored positions.
        cu_seqlens: [B + 1] int, first 0, last N.
        average: divide by the number of counted tokens (at least 1). Default False.

    Returns:
        [B], in logps' dtype.
    """
    check_float("logps", logps)
    if targets is not None and targets.shape != logps.shape:
        raise ValueError(f"targets {tuple(targets.shape)} must have the shape of logps {tuple(logps.shape)}")
    mask = torch.ones_like(logps, dtype=torch.bool) if targets is None else targets != ignore_index
    values = logps.masked_fill(~mask, 0.0)
    if cu_seqlens is None:
        if logps.dim() != 2:
            raise ValueError(f"logps must be [B, T] unless cu_seqlens is given, got shape {tuple(logps.shape)}")
        total, count = values.sum(-1), mask.sum(-1)
    else:
        edges, lengths = cu_seqlens.tolist(), cu_seqlens.diff()
        if logps.dim() != 1 or edges != sorted(edges) or edges[:1] != [0] or edges[-1] != len(logps):
            raise ValueError(
                f"cu_seqlens must rise from 0 to the length of packed logps [N], got {edges[:1]} .. {edges[-1:]} for "
                f"logps of shape {tuple(logps.shape)}"
            )
        place = torch.repeat_interleave(torch.arange(len(lengths), device=logps.device), lengths)
        total = add_at(values.new_zeros(len(lengths)), place, values)
        count = add_at(torch.zeros_like(lengths, dtype=torch.int64), place, mask.long())
    return total / count.clamp(min=1) if average else total
