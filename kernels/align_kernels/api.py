"""Log-probs straight from hidden states.

Shape letters: B sequences, T positions, V vocabulary, D hidden size, R rank of a LoRA.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from align_kernels import ops
from align_kernels.arguments import check_float, public
from align_kernels.dtensor import local, local_head
from align_kernels.eager import logprobs_eager
from align_kernels.head import Head, LogitGradClamp, Settings, Transform, flatten
from align_kernels.schedules.tiles import Needs
from align_kernels.sums import add_at


class LogProbs(NamedTuple):
    """What is known of each position's softmax, float32 (float64 for float64 input); ignored positions read 0."""

    logp: Tensor  # log-prob of the target, differentiable
    entropy: Tensor  # in nats, differentiable
    lse: Tensor  # log sum exp of the logits
    log_sum_sq_probs: Tensor  # log sum p^2
    mean_logit: Tensor
    correct: Tensor  # bool: the target is the first argmax


def read_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    grad_clamp: LogitGradClamp | None = None,
    drop_mass: float = 0.0,
    lora: tuple[Tensor, Tensor, float] | None = None,
    tp_group: torch.distributed.ProcessGroup | None = None,
    impl: str = "auto",
    workspace: int | None = None,
) -> tuple[Head, Settings]:
    """Every keyword of `linear_logprobs`, checked."""
    hidden, targets = local("hidden", hidden), local("targets", targets)
    weight, bias, lora, tp_group = local_head(weight, bias, lora, tp_group)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    head, scalar = flatten(hidden, weight, targets, bias, local("temperature", temperature), lora, ignore_index)
    settings = Settings(
        Transform(float(logit_scale), None if softcap is None else float(softcap), scalar),
        None if grad_clamp is None else LogitGradClamp(*grad_clamp),
        1.0 if lora is None else float(lora[2]),
        float(drop_mass),
        int(ignore_index),
        impl,
        None if workspace is None else int(workspace),
        None if tp_group is None else tp_group.group_name,
    )
    return head, settings.check()


def needs_of(head: Head) -> Needs:
    grad = torch.is_grad_enabled()
    return Needs(
        *(
            grad and x is not None and x.requires_grad
            for x in (head.hidden, head.weight, head.bias, head.lora_A, head.lora_B)
        )
    )


@public(read_head)
def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, **head) -> LogProbs:
    """Log-prob, entropy and more of each target, without ever holding the logits [N, V].

    The same as, but for memory and speed:

        logits = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature
        logp = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]

    Args:
        hidden: [..., D] float.
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
    tensors, settings = read_head(hidden, weight, targets, **head)
    if settings.impl == "eager":
        fields = logprobs_eager(tensors, settings)
    else:
        fields = ops.logprobs(tensors, settings, needs_of(tensors))
    shape = targets.shape
    logp, entropy, *rest = (x.reshape(shape) for x in fields[:6])
    return LogProbs(logp, entropy, *(x.detach() for x in rest))


@public()
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
