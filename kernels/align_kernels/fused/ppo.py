"""Fused policy gradients with a critic, or with advantages from elsewhere: PPO, REINFORCE, RLOO."""

from __future__ import annotations

from torch import Tensor

from align_kernels.arguments import check_call, check_float, public
from align_kernels.fused.core import Items, LossOutput, check_positive, check_shape, kept, of_head, output, run_loss
from align_kernels.losses.ppo import clipped_value


@of_head
def ppo_clip_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    cliprange: float = 0.2,
    entropy_coef: float = 0.0,
    dual_clip: float | None = None,
    num_items: Items = None,
    **head,
) -> LossOutput:
    """The clipped surrogate of proximal policy optimisation (arXiv:1707.06347 eq. 7), minus entropy_coef * entropy.

    Args:
        hidden: [..., D]; weight: [V, D]; targets: [...].
        old_logps: [...] log-probs of the tokens under the policy that sampled them.
        advantages: [...].
        cliprange: largest change of the ratio that is rewarded, > 0. Default 0.2.
        entropy_coef: weight of the entropy bonus. Default 0.0: entropy is measured alone.
        dual_clip: c > 1: where the advantage is negative the loss is at most -c A (arXiv:1912.09729).
            Default None: unbounded.
        num_items: the normaliser. Default None: the kept tokens of this call.
        **head: every keyword of `linear_logprobs`, and `prob_gate`, a `ProbGate` or its p_hi.

    Returns:
        LossOutput; logps [...] per token; metrics policy/approxkl_avg, policy/clipfrac_avg, val/ratio, entropy,
        mean_token_accuracy: means over tokens.

    Raises:
        ValueError: cliprange not above 0, dual_clip not above 1, shapes that do not fit.
    """
    check_call(ppo_clip_loss)
    check_positive(cliprange=cliprange)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1 or None, got {dual_clip}")
    check_shape("old_logps", old_logps, targets.shape)
    check_shape("advantages", advantages, targets.shape)
    side = {"old_logps": old_logps, "advantages": advantages}
    hyper = {"cliprange": cliprange, "entropy_coef": entropy_coef, "dual_clip": dual_clip}
    out = run_loss("ppo_clip", hyper, hidden, weight, targets, side, num_items, head)
    return output(out.loss, out.measured, out.logps)


@public
def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    cliprange_value: float = 0.2,
    num_items: Items = None,
) -> LossOutput:
    """The clipped loss of a value head: the sum over tokens of max((v - R)^2, (clip(v, v_old +- c) - R)^2) / 2.

    The clip is that of OpenAI Baselines' ppo2, and of TRL; the paper of PPO (arXiv:1707.06347) has none.

    Args:
        values: [...] of the value head, differentiable. old_values: [...] as they were when the tokens were sampled.
        returns: [...]. mask: [...] bool, the tokens that count.
        cliprange_value: c > 0. Default 0.2.
        num_items: the normaliser. Default None: the tokens of this call.

    Returns:
        LossOutput; logps are the values, without gradient; metrics val/clipfrac_avg, a mean over tokens.

    Raises:
        ValueError: cliprange_value not above 0, shapes that do not fit.
    """
    check_positive(cliprange_value=cliprange_value)
    check_float("values", values)
    for name, x in (("old_values", old_values), ("returns", returns), ("mask", mask)):
        check_shape(name, x, values.shape)
    keep = mask.bool()
    v, old, target = (x.where(keep, 0.0) for x in (values, old_values.detach(), returns.detach()))
    tokens = keep.sum()
    value = clipped_value(v, old, target, cliprange_value)
    loss = value.sum() / (tokens.clamp(min=1) if num_items is None else num_items)
    clipped = value.detach() > 0.5 * (v.detach() - target) ** 2
    return output(loss, {"val/clipfrac_avg": (clipped.sum() / tokens.clamp(min=1), tokens)}, values.detach())


@of_head
def reinforce_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor, *, num_items: Items = None, **head
) -> LossOutput:
    """REINFORCE: -A log pi of each token that the present policy sampled.

    With A = r - mean of the other answers' r this is RLOO on fresh samples, with A = r - r(greedy) ReMax.

    Args:
        hidden: [..., D]; weight: [V, D]; targets: [...]. advantages: [...], or [B] for targets [B, T].
        num_items: the normaliser. Default None: the kept tokens of this call.
        **head: every keyword of `linear_logprobs`, and `prob_gate`, a `ProbGate` or its p_hi.

    Returns:
        LossOutput; logps [...] per token; metrics entropy, mean_token_accuracy.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_call(reinforce_loss)
    side: dict[str, Tensor | None] = {"advantages": per_token("advantages", advantages, targets)}
    out = run_loss("reinforce", {}, hidden, weight, targets, side, num_items, head)
    return output(out.loss, out.measured, out.logps)


@of_head
def rloo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    num_items: Items = None,
    **head,
) -> LossOutput:
    """REINFORCE leave-one-out as TRL trains it: PPO-clip whose action is the whole completion (arXiv:2402.14740).

    Args:
        hidden: [B, T, D]; weight: [V, D]; targets: [B, T].
        old_logps: [B] sums, or [B, T], under the policy that sampled, or None where that is the present policy.
        advantages: [B], a reward minus the mean of the others' of its group.
        epsilon, epsilon_high: limits of the ratio below and above 1. Defaults 0.2 and None: epsilon.
        num_items: the normaliser. Default None: the B sequences of this call.
        **head: every keyword of `linear_logprobs`, and `prob_gate`, a `ProbGate` or its p_hi.

    Returns:
        LossOutput; logps [B]; metrics clip_ratio/low_mean, clip_ratio/high_mean, clip_ratio/region_mean (means over
        sequences), entropy, mean_token_accuracy.

    Raises:
        ValueError: a negative epsilon, shapes that do not fit.
    """
    check_call(rloo_loss)
    high = check_epsilon(epsilon, epsilon_high)
    check_shape("advantages", advantages, targets.shape[:1])
    if old_logps is not None:
        check_shape("old_logps", old_logps, targets.shape[:1], targets.shape)
        old_logps = old_logps.double()
        if old_logps.dim() == 2:
            old_logps = old_logps.where(kept(targets, head), 0.0).sum(1)
    hyper = {"epsilon": epsilon, "epsilon_high": high}
    side = {"advantages": advantages, "old_logps": old_logps}
    out = run_loss("rloo", hyper, hidden, weight, targets, side, num_items, head)
    return output(out.loss, out.measured, out.logps.sum(-1))


def check_epsilon(epsilon: float, epsilon_high: float | None) -> float:
    high = epsilon if epsilon_high is None else epsilon_high
    if not (epsilon >= 0 and high >= 0):
        raise ValueError(f"epsilon and epsilon_high must not be negative, got {epsilon} and {high}")
    return high


def per_token(name: str, x: Tensor, targets: Tensor) -> Tensor:
    """One value per token, from such or from one per sequence."""
    check_shape(name, x, targets.shape, *([targets.shape[:1]] if targets.dim() == 2 else []))
    return x if x.dim() == targets.dim() else x[:, None].expand(targets.shape)
