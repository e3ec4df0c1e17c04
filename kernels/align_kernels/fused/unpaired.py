"""Fused losses of single completions that are marked good or bad."""

from __future__ import annotations

import torch
from torch import Tensor

from align_kernels.arguments import check_call
from align_kernels.fused.core import (
    Fused,
    Items,
    LossOutput,
    check_one_of,
    check_positive,
    check_shape,
    class_metrics,
    of_head,
    output,
    run_loss,
)
from align_kernels.losses.kto import LOSS_TYPES
from align_kernels.sums import float_dtype, scalar


@of_head
def kto_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    kl: float | Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    loss_type: str = "kto",
    num_items: Items = None,
    **head,
) -> LossOutput:
    """Kahneman-Tversky optimisation of single completions marked good or bad (arXiv:2402.01306 eq. 7).

    Args:
        hidden: [B, T, D]; weight: [V, D]; targets: [B, T].
        ref_logps: [B] log-probs of the completions under the reference, summed over tokens.
        desirable: [B] bool.
        kl: the reference point z0, a number, [] or [B]: max(0, mean of log pi - log ref over unrelated completions),
            over all ranks. No gradient flows through it. Not read by "apo_zero_unpaired".
        beta: strength of the tie to the reference, > 0. Default 0.1.
        desirable_weight, undesirable_weight: w_D and w_U. Default 1.0.
        loss_type: "kto" (default), or "apo_zero_unpaired" (arXiv:2408.06266): the same with z0 = 0.
        num_items: the normaliser. Default None: the B sequences of this call.
        **head: every keyword of `linear_logprobs`, and `prob_gate`, a `ProbGate` or its p_hi.

    Returns:
        LossOutput; logps [B]; metrics kl, and for each class means over its own sequences of this call (0 where it has
        none) rewards/*, logps/*, logits/* (over tokens), count/* with * chosen and rejected, rewards/margins, entropy,
        mean_token_accuracy.

    Raises:
        ValueError: an unknown loss_type, beta not above 0, desirable not bool, shapes that do not fit.
    """
    check_call(kto_loss)
    check_one_of("loss_type", loss_type, LOSS_TYPES)
    check_marks(beta, targets, ref_logps, desirable)
    rows = targets.shape[:1]
    kl = scalar(kl, hidden.device, float_dtype(hidden)).detach()
    check_shape("kl", kl, torch.Size(()), rows)
    kl = torch.zeros_like(kl) if loss_type == "apo_zero_unpaired" else kl
    side = {"ref_logps": ref_logps, "desirable": desirable, "kl": kl.expand(rows)}
    hyper = {"beta": beta, "desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    out = run_loss("kto", hyper, hidden, weight, targets, side, num_items, head)
    return marked_output(out, ref_logps, desirable, beta, kl=kl.mean())


@of_head
def bco_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    delta: float | Tensor,
    *,
    beta: float = 0.1,
    weights: Tensor | None = None,
    num_items: Items = None,
    **head,
) -> LossOutput:
    """Binary classifier optimisation (arXiv:2404.04656): a logistic regression of the mark on the reward.

    Args:
        hidden, weight, targets, ref_logps, desirable: as in `kto_loss`.
        delta: the reward shift, a number or []: the running mean, over all ranks, of (rewards/chosen +
            rewards/rejected) / 2, which the metrics give. No gradient flows through it.
        beta: strength of the tie to the reference, > 0. Default 0.1.
        weights: [B] factors, such as the density ratio of undesirable prompts. Default None: 1.
        num_items: the normaliser. Default None: the B sequences of this call.
        **head: every keyword of `linear_logprobs`, and `prob_gate`, a `ProbGate` or its p_hi.

    Returns:
        LossOutput as `kto_loss`, with the metric delta in place of kl.

    Raises:
        ValueError: beta not above 0, desirable not bool, shapes that do not fit.
    """
    check_call(bco_loss)
    check_marks(beta, targets, ref_logps, desirable)
    delta = scalar(delta, hidden.device, float_dtype(hidden)).detach()
    check_shape("delta", delta, torch.Size(()))
    if weights is not None:
        check_shape("weights", weights, targets.shape[:1])
    side = {"ref_logps": ref_logps, "desirable": desirable, "delta": delta, "weights": weights}
    out = run_loss("bco", {"beta": beta}, hidden, weight, targets, side, num_items, head)
    return marked_output(out, ref_logps, desirable, beta, delta=delta)


def check_marks(beta: float, targets: Tensor, ref_logps: Tensor, desirable: Tensor) -> None:
    check_positive(beta=beta)
    if desirable.dtype != torch.bool:
        raise ValueError(f"desirable must be bool, got {desirable.dtype}")
    check_shape("ref_logps", ref_logps, targets.shape[:1])
    check_shape("desirable", desirable, targets.shape[:1])


def marked_output(out: Fused, ref_logps: Tensor, desirable: Tensor, beta: float, **more: Tensor) -> LossOutput:
    logps, others = out.logps.sum(-1), {}
    measured = out.measured | class_metrics(out, desirable, ~desirable)
    measured |= {name: (x, len(desirable)) for name, x in more.items()}
    rewards = beta * (logps - ref_logps.detach())
    for word, inside in (("chosen", desirable), ("rejected", ~desirable)):
        others[f"count/{word}"] = count = inside.sum()
        measured[f"rewards/{word}"] = rewards.where(inside, 0.0).sum() / count.clamp(min=1), count
    others["rewards/margins"] = measured["rewards/chosen"][0] - measured["rewards/rejected"][0]
    return output(out.loss, measured, logps, **others)
