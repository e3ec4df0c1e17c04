"""Alignment losses straight from hidden states: the public operators.

Shape letters: B sequences, T positions, P pairs, V vocabulary, D hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from align_kernels import functions, ops
from align_kernels.api import needs_of, read_head
from align_kernels.dtensor import local
from align_kernels.eager import logprobs_eager
from align_kernels.losses.dpo import LOSS_TYPES
from align_kernels.losses.grpo import AVERAGES, token_weights
from align_kernels.losses.registry import LOSSES

LEVELS = {"token": "grpo", "sequence": "gspo"}


class LossOutput(NamedTuple):
    """A fused loss: the scalar, TRL's metrics (means over the call), and log-probs.

    `logps` [B, T] per token for token losses, [B] per sequence for the others; it carries no gradient.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    logps: Tensor


class Fused(NamedTuple):
    """A fused loss before its public face: everything per token, ignored positions 0."""

    loss: Tensor  # []
    metrics: dict[str, Tensor]  # of the loss, entropy, mean_token_accuracy
    logps: Tensor  # [...]
    mean_logit: Tensor  # [...]
    mask: Tensor  # [...] bool


def run_loss(
    name: str,
    hyper: dict,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    side: dict[str, Tensor],
    num_items: float | Tensor | None,
    head: dict,
) -> Fused:
    """The registered loss `name` summed over its units and divided by `num_items` (default: the units of this call)."""
    spec = LOSSES[name]
    hidden, targets = local("hidden", hidden), local("targets", targets)
    if spec.unit != "token" and targets.dim() != 2:
        raise ValueError(f"{name} needs targets [B, T], one row per sequence, got shape {tuple(targets.shape)}")
    h, settings = read_head(hidden, weight, targets, **head)
    dtype = functions.float_dtype(hidden)
    mask = targets != settings.ignore_index
    tokens = mask.sum().clamp(min=1)
    if spec.unit == "token" or spec.tokens:
        counted = tokens
    else:
        counted = torch.tensor(max(targets.shape[0] // (2 if spec.unit == "pair" else 1), 1), device=hidden.device)
    items = torch.as_tensor(counted if num_items is None else num_items, device=hidden.device).to(dtype)
    text = functions.encode_loss(name, hyper)
    sides = [x.detach().to(dtype) if x.is_floating_point() else x for x in side.values()]
    shaped = targets if targets.dim() == 2 else targets.reshape(-1)
    if settings.impl == "eager":
        fields = functions.loss_late(logprobs_eager(h, settings), shaped, sides, items, text, settings)
    else:
        fields = ops.loss(h, shaped, sides, items, text, settings, needs_of(h))
    loss, sums, logp, entropy, mean_logit, correct = fields
    metrics = dict(zip(spec.metrics, sums / counted))
    metrics["entropy"] = entropy.sum() / tokens
    metrics["mean_token_accuracy"] = correct.sum() / tokens
    return Fused(loss, metrics, logp.reshape(targets.shape), mean_logit.reshape(targets.shape), mask)


def class_metrics(out: Fused, chosen: Tensor) -> dict[str, Tensor]:
    """logps and logits of the chosen [B] sequences and of the others: means over sequences, and over tokens."""
    metrics = {}
    for word, rows in (("chosen", chosen), ("rejected", ~chosen)):
        inside = rows[:, None] & out.mask
        metrics[f"logps/{word}"] = out.logps.where(inside, 0.0).sum() / rows.sum().clamp(min=1)
        metrics[f"logits/{word}"] = out.mean_logit.where(inside, 0.0).sum() / inside.sum().clamp(min=1)
    return metrics


def check_shape(name: str, x: Tensor, *shapes: torch.Size) -> None:
    if not any(tuple(x.shape) == tuple(s) for s in shapes):
        wanted = " or ".join(str(tuple(s)) for s in shapes)
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(x.shape)}")


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
    out = run_loss("sft", {}, hidden, weight, targets, {}, num_items, head)
    return LossOutput(out.loss, out.metrics, out.logps)


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
    check_shape("ref_logps", ref_logps, targets.shape[:1])
    hyper = {"beta": beta, "loss_type": loss_type, "label_smoothing": label_smoothing}
    out = run_loss("dpo", hyper, hidden, weight, targets, {"ref_logps": ref_logps}, num_items, head)
    chosen = torch.arange(len(targets), device=targets.device) < len(targets) // 2
    return LossOutput(out.loss, out.metrics | class_metrics(out, chosen), out.logps.sum(-1))


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
    num_items: float | Tensor | None = None,
    **head,
) -> LossOutput:
    """Kahneman-Tversky optimisation of single completions marked good or bad (arXiv:2402.01306 eq. 8).

    Args:
        hidden: [B, T, D]; weight: [V, D]; targets: [B, T].
        ref_logps: [B] log-probs of the completions under the reference, summed over tokens.
        desirable: [B] bool.
        kl: the reference point z0, a number, [] or [B]: max(0, mean of log pi - log ref over unrelated completions),
            over all ranks. No gradient flows through it.
        beta: strength of the tie to the reference, > 0. Default 0.1.
        desirable_weight, undesirable_weight: w_D and w_U. Default 1.0.
        num_items: the normaliser. Default None: the B sequences of this call.
        **head: every keyword of `linear_logprobs`.

    Returns:
        LossOutput; logps [B]; metrics kl, and for each class means over its own sequences of this call (0 where it has
        none) rewards/*, logps/*, logits/* (over tokens), count/* with * chosen and rejected, rewards/margins, entropy,
        mean_token_accuracy.

    Raises:
        ValueError: beta not above 0, desirable not bool, shapes that do not fit.
    """
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    if desirable.dtype != torch.bool:
        raise ValueError(f"desirable must be bool, got {desirable.dtype}")
    rows = targets.shape[:1]
    check_shape("ref_logps", ref_logps, rows)
    check_shape("desirable", desirable, rows)
    kl = torch.as_tensor(kl, dtype=functions.float_dtype(hidden), device=hidden.device).detach()
    check_shape("kl", kl, torch.Size(()), rows)
    side = {"ref_logps": ref_logps, "desirable": desirable, "kl": kl.expand(rows)}
    hyper = {"beta": beta, "desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    out = run_loss("kto", hyper, hidden, weight, targets, side, num_items, head)
    logps = out.logps.sum(-1)
    metrics = out.metrics | class_metrics(out, desirable) | {"kl": kl.mean()}
    rewards = beta * (logps - ref_logps.detach())
    for word, inside in (("chosen", desirable), ("rejected", ~desirable)):
        metrics[f"count/{word}"] = inside.sum()
        metrics[f"rewards/{word}"] = rewards.where(inside, 0.0).sum() / inside.sum().clamp(min=1)
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return LossOutput(out.loss, metrics, logps)


def ppo_clip_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    cliprange: float = 0.2,
    entropy_coef: float = 0.0,
    num_items: float | Tensor | None = None,
    **head,
) -> LossOutput:
    """The clipped surrogate of proximal policy optimisation (arXiv:1707.06347 eq. 7), minus entropy_coef * entropy.

    Args:
        hidden: [..., D]; weight: [V, D]; targets: [...].
        old_logps: [...] log-probs of the tokens under the policy that sampled them.
        advantages: [...].
        cliprange: largest change of the ratio that is rewarded, > 0. Default 0.2.
        entropy_coef: weight of the entropy bonus. Default 0.0: entropy is measured alone.
        num_items: the normaliser. Default None: the kept tokens of this call.
        **head: every keyword of `linear_logprobs`.

    Returns:
        LossOutput; logps [...] per token; metrics policy/approxkl_avg, policy/clipfrac_avg, val/ratio, entropy,
        mean_token_accuracy: means over tokens.

    Raises:
        ValueError: cliprange not above 0, shapes that do not fit.
    """
    if not cliprange > 0:
        raise ValueError(f"cliprange must be above 0, got {cliprange}")
    check_shape("old_logps", old_logps, targets.shape)
    check_shape("advantages", advantages, targets.shape)
    side = {"old_logps": old_logps, "advantages": advantages}
    hyper: dict[str, float] = {"cliprange": cliprange}
    name = "ppo_clip"
    if entropy_coef:
        name, hyper["entropy_coef"] = "ppo_clip_entropy", entropy_coef
    out = run_loss(name, hyper, hidden, weight, targets, side, num_items, head)
    return LossOutput(out.loss, out.metrics, out.logps)


def grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    *,
    loss_type: str = "dapo",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    ref_logps: Tensor | None = None,
    importance_sampling_level: str = "token",
    max_completion_length: int | None = None,
    num_items: float | Tensor | None = None,
    **head,
) -> LossOutput:
    """Group-relative policy optimisation (arXiv:2402.03300): per token, with r = pi / pi_old and d = log ref - log pi,

        l_t = -min(min(r, delta) A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta (exp(d) - d - 1)

    and over the B sequences o of the call, divided by `num_items`:

        loss_type   sum of                                            num_items counts   default
        "grpo"      mean of l_t over each sequence                    sequences          B
        "bnpo"      mean of l_t over all tokens of the call           calls              1
        "dr_grpo"   sum of l_t / max_completion_length, 2503.20783    sequences          B
        "dapo"      l_t, arXiv:2503.14476 eq. 8                       tokens             kept tokens of this call

    Args:
        hidden: [B, T, D]; weight: [V, D]; targets: [B, T].
        old_logps: [B, T] log-probs under the policy that sampled, or None where that is the present policy.
        advantages: [B] or [B, T].
        loss_type: how tokens are averaged, see above. Default "dapo".
        epsilon, epsilon_high: limits of the ratio below and above 1. Defaults 0.2 and None: epsilon.
        delta: the ratio's upper limit before the minimum, for negative advantages. Default None.
        beta: weight of the KL term. Default 0.0: ref_logps is not needed.
        ref_logps: [B, T] log-probs under the reference.
        importance_sampling_level: "token", or "sequence": one ratio exp(mean log r) per sequence (GSPO).
        max_completion_length: needed by "dr_grpo".
        num_items: the normaliser, one for all micro-batches of a window. Default None: see above.
        **head: every keyword of `linear_logprobs`.

    Returns:
        LossOutput; logps [B, T]; metrics kl (beta > 0), clip_ratio/low_mean, clip_ratio/high_mean,
        clip_ratio/region_mean, entropy, mean_token_accuracy: means over tokens.

    Raises:
        ValueError: an unknown loss_type or level, a missing ref_logps or max_completion_length, shapes that do not fit.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    if loss_type not in AVERAGES:
        raise ValueError(f"loss_type must be one of {', '.join(AVERAGES)}, got {loss_type!r}")
    if importance_sampling_level not in LEVELS:
        raise ValueError(f"importance_sampling_level must be token or sequence, got {importance_sampling_level!r}")
    if not (epsilon >= 0 and high >= 0):
        raise ValueError(f"epsilon and epsilon_high must not be negative, got {epsilon} and {high}")
    if delta is not None and not delta > 0:
        raise ValueError(f"delta must be above 0 or None, got {delta}")
    if targets.dim() != 2:
        raise ValueError(f"grpo_loss needs targets [B, T], one row per completion, got shape {tuple(targets.shape)}")
    if beta and ref_logps is None:
        raise ValueError(f"beta={beta} needs ref_logps [B, T]; pass them or beta=0.0")
    check_shape("advantages", advantages, targets.shape, targets.shape[:1])
    unread = advantages.new_zeros(()).expand(targets.shape)
    side = {
        "old_logps": unread if old_logps is None else old_logps,
        "advantages": advantages if advantages.dim() == 2 else advantages[:, None].expand(targets.shape),
        "ref_logps": unread if ref_logps is None else ref_logps,
        "weights": token_weights(loss_type, targets != head.get("ignore_index", -100), max_completion_length),
    }
    for name in ("old_logps", "ref_logps"):
        check_shape(name, side[name], targets.shape)
    if num_items is None and loss_type != "dapo":
        num_items = 1 if loss_type == "bnpo" else max(len(targets), 1)
    hyper = {"epsilon": epsilon, "epsilon_high": high, "delta": delta, "beta": beta, "on_policy": old_logps is None}
    out = run_loss(LEVELS[importance_sampling_level], hyper, hidden, weight, targets, side, num_items, head)
    if not beta:
        del out.metrics["kl"]
    return LossOutput(out.loss, out.metrics, out.logps)
