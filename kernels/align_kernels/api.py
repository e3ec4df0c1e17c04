"""Log-probs and losses straight from hidden states: the public operators.

Shape letters: B sequences, T positions, P pairs, V vocabulary, D hidden size, R rank of a LoRA.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from align_kernels import functions, ops
from align_kernels.eager import logprobs_eager
from align_kernels.head import Head, LogitGradClamp, Settings, Transform, flatten
from align_kernels.losses.dpo import LOSS_TYPES
from align_kernels.losses.registry import LOSSES
from align_kernels.schedules import Needs


class LogProbs(NamedTuple):
    """What is known of each position's softmax, float32 (float64 for float64 input); ignored positions read 0."""

    logp: Tensor  # log-prob of the target, differentiable
    entropy: Tensor  # in nats, differentiable
    lse: Tensor  # log sum exp of the logits
    log_sum_sq_probs: Tensor  # log sum p^2
    mean_logit: Tensor
    correct: Tensor  # bool: the target is the first argmax


class LossOutput(NamedTuple):
    """A fused loss: the scalar, TRL's metrics (means over the call), and log-probs.

    `logps` [B, T] per token for token losses, [B] per sequence for the others; it carries no gradient.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    logps: Tensor


def _head(
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
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    head, scalar = flatten(hidden, weight, targets, bias, temperature, lora, ignore_index)
    settings = Settings(
        Transform(float(logit_scale), None if softcap is None else float(softcap), scalar),
        None if grad_clamp is None else LogitGradClamp(*grad_clamp),
        1.0 if lora is None else float(lora[2]),
        float(drop_mass),
        ignore_index,
        impl,
        workspace,
        None if tp_group is None else tp_group.group_name,
    )
    return head, settings.check()


def _needs(head: Head) -> Needs:
    grad = torch.is_grad_enabled()
    return Needs(
        *(
            grad and x is not None and x.requires_grad
            for x in (head.hidden, head.weight, head.bias, head.lora_A, head.lora_B)
        )
    )


def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, **head) -> LogProbs:
    """Log-prob, entropy and more of each target, without ever holding the logits [N, V].

    The same as, but for memory and speed:

        logits = softcap(logit_scale * (hidden @ weight.T + bias)) / temperature
        logp = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]

    Args:
        hidden: [..., D] float.
        weight: [V, D] float, may differ from hidden in dtype.
        targets: [...] int64, already shifted: position i of hidden predicts targets[i].
        bias: [V]. Default None.
        logit_scale: factor on the raw logits (Cohere; Granite: 1 / logits_scaling). Default 1.0.
        softcap: cap * tanh(logits / cap) (Gemma). Default None.
        temperature: a float or one per position [...]. Default 1.0.
        ignore_index: positions with this target never meet the head and read 0. Default -100.
        grad_clamp: `LogitGradClamp`. Default None.
        drop_mass: probability mass per row that the backward may leave out. Default 0.0: exact.
        lora: (A [R, D], B [V, R], scaling), an update of a frozen weight. Default None.
        tp_group: process group over which weight is sharded along V. Default None.
        impl: "auto", "eager" (whole logits, autograd), "torch", "cpu". A backend asked for by name serves or raises.
        workspace: limit in bytes for kept logits and scratch. Default None: by device.

    Returns:
        LogProbs, each field [...].

    Raises:
        ValueError: shapes, dtypes or options that do not fit; a target outside [0, V).
    """
    h, settings = _head(hidden, weight, targets, **head)
    if settings.impl == "eager":
        fields = logprobs_eager(h, settings)
    else:
        fields = ops.logprobs(h, settings, _needs(h))
    shape = targets.shape
    logp, entropy, *rest = (x.reshape(shape) for x in fields[:6])
    return LogProbs(logp, entropy, *(x.detach() for x in rest))


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
    if targets is not None and targets.shape != logps.shape:
        raise ValueError(f"targets {tuple(targets.shape)} must have the shape of logps {tuple(logps.shape)}")
    mask = torch.ones_like(logps, dtype=torch.bool) if targets is None else targets != ignore_index
    values = logps.masked_fill(~mask, 0.0)
    if cu_seqlens is None:
        if logps.dim() != 2:
            raise ValueError(f"logps must be [B, T] unless cu_seqlens is given, got shape {tuple(logps.shape)}")
        total, count = values.sum(-1), mask.sum(-1)
    else:
        lengths = cu_seqlens.diff()
        if logps.dim() != 1 or int(lengths.sum()) != len(logps):
            raise ValueError(f"cu_seqlens covers {int(lengths.sum())} tokens, logps has shape {tuple(logps.shape)}")
        place = torch.repeat_interleave(torch.arange(len(lengths), device=logps.device), lengths)
        total = values.new_zeros(len(lengths)).index_add(0, place, values)
        count = torch.zeros_like(lengths, dtype=torch.int64).index_add(0, place, mask.long())
    return total / count.clamp(min=1) if average else total


# -- fused losses -------------------------------------------------------------------------------------------------
def _loss(
    name: str,
    hyper: dict,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    side: dict[str, Tensor],
    num_items,
    head: dict,
) -> LossOutput:
    spec = LOSSES[name]
    if spec.unit != "token" and targets.dim() != 2:
        raise ValueError(f"{name} needs targets [B, T], one row per sequence, got shape {tuple(targets.shape)}")
    h, settings = _head(hidden, weight, targets, **head)
    tokens = (targets != settings.ignore_index).sum()
    units = tokens if spec.unit == "token" else targets.shape[0] // (2 if spec.unit == "pair" else 1)
    counted = torch.as_tensor(units, device=hidden.device).clamp(min=1)
    items = torch.as_tensor(counted if num_items is None else num_items, device=hidden.device)
    items = items.to(functions.float_dtype(hidden))
    text, sides = repr((name, hyper)), list(side.values())
    shaped = targets if targets.dim() == 2 else targets.reshape(-1)
    if settings.impl == "eager":
        fields = functions.loss_eager(h, shaped, sides, items, text, settings)
    else:
        fields = ops.loss(h, shaped, sides, items, text, settings, _needs(h))
    total, sums, logp, entropy, mean_logit, correct = fields
    mask = targets != settings.ignore_index
    tokens = tokens.clamp(min=1)
    metrics = dict(zip(spec.metrics, sums / counted))
    metrics["entropy"] = entropy.sum() / tokens
    metrics["mean_token_accuracy"] = correct.sum() / tokens
    logps = logp.reshape(targets.shape)
    if spec.unit == "pair":
        logps = logps.sum(-1)
        chosen, rejected = logps.chunk(2)
        logit, count = mean_logit.reshape(targets.shape).sum(-1), mask.sum(-1)
        metrics["logps/chosen"], metrics["logps/rejected"] = chosen.mean(), rejected.mean()
        for half, word in enumerate(("chosen", "rejected")):
            metrics[f"logits/{word}"] = logit.chunk(2)[half].sum() / count.chunk(2)[half].sum().clamp(min=1)
    elif spec.unit != "token":
        logps = logps.sum(-1)
    return LossOutput(total, metrics, logps)


def sft_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, num_items: float | Tensor | None = None, **head
) -> LossOutput:
    """Cross-entropy of the targets, summed over tokens and divided by `num_items` (default: this call's tokens).

    Args:
        hidden: [..., D]; weight: [V, D]; targets: [...] int64, already shifted, -100 where ignored.
        num_items: the normaliser, one for all micro-batches of a window. Default None: the kept tokens of this call.
        **head: every keyword of `linear_logprobs`.

    Returns:
        LossOutput; logps [...] per token; metrics entropy, mean_token_accuracy.
    """
    return _loss("sft", {}, hidden, weight, targets, {}, num_items, head)


def dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_logps: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    num_items: float | Tensor | None = None,
    **head,
) -> LossOutput:
    """Direct preference optimisation (arXiv:2305.18290 eq. 7 and its family, see `align_kernels.losses.dpo`).

    Args:
        hidden: [2P, T, D], the first half chosen, the second rejected; weight: [V, D]; targets: [2P, T].
        ref_logps: [2P] log-probs of the completions under the reference, summed over tokens.
        beta: strength of the tie to the reference, > 0. Default 0.1.
        loss_type: "sigmoid" (default), "hinge", "ipo", "robust".
        label_smoothing: share of wrong labels assumed, in [0, 0.5). Default 0.0.
        num_items: the normaliser. Default None: the P pairs of this call.
        **head: every keyword of `linear_logprobs`.

    Returns:
        LossOutput; logps [2P]; metrics rewards/chosen, rewards/rejected, rewards/accuracies, rewards/margins,
        logps/chosen, logps/rejected, logits/chosen, logits/rejected, entropy, mean_token_accuracy.

    Raises:
        ValueError: an odd number of sequences, an unknown loss_type, beta or label_smoothing out of range.
    """
    if targets.dim() != 2 or targets.shape[0] % 2:
        raise ValueError(
            f"dpo_loss needs targets [2P, T], chosen half then rejected half, got shape {tuple(targets.shape)}"
        )
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {loss_type!r}")
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")
    if ref_logps.shape != targets.shape[:1]:
        raise ValueError(
            f"ref_logps must have shape ({targets.shape[0]},), one sum per sequence, got {tuple(ref_logps.shape)}"
        )
    hyper = {"beta": beta, "loss_type": loss_type, "label_smoothing": label_smoothing}
    return _loss("dpo", hyper, hidden, weight, targets, {"ref_logps": ref_logps.detach()}, num_items, head)
