"""Alignment losses straight from hidden states: the public operators.

Shape letters: B sequences, T positions, P pairs, V vocabulary, D hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from align_kernels import functions, ops
from align_kernels.api import needs_of, read_head
from align_kernels.losses.dpo import LOSS_TYPES
from align_kernels.losses.registry import LOSSES


class LossOutput(NamedTuple):
    """A fused loss: the scalar, TRL's metrics (means over the call), and log-probs.

    `logps` [B, T] per token for token losses, [B] per sequence for the others; it carries no gradient.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    logps: Tensor


def run_loss(
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
    h, settings = read_head(hidden, weight, targets, **head)
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
        fields = ops.loss(h, shaped, sides, items, text, settings, needs_of(h))
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
    return run_loss("sft", {}, hidden, weight, targets, {}, num_items, head)


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
    return run_loss("dpo", hyper, hidden, weight, targets, {"ref_logps": ref_logps.detach()}, num_items, head)
