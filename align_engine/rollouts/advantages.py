"""From rewards to advantages: pure functions of tensors.

R completions, G for each prompt and side by side (completion i answers prompt i // G), B sequences, T positions.
A reward of NaN means that nobody could score the completion: it takes no part in any mean and its advantage is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

STD_EPSILON = 1e-4  # as TRL and DeepSeekMath's code have it


class Experience(NamedTuple):
    """What advantages are computed from. R completions, groups of equal size side by side; T tokens of the longest."""

    rewards: Tensor  # [R] float64, NaN where nobody could score
    group_size: int
    mask: Tensor  # [R, T] bool, from the left; False throughout where a completion is not to be learnt from
    old_logps: Tensor | None = None  # [R, T] float32, as those below; None: the present policy's, and nobody asked
    ref_logps: Tensor | None = None
    values: Tensor | None = None


def leave_one_out(rewards: Tensor, group_size: int) -> Tensor:
    """r_i - mean of the other rewards of its group (RLOO, arXiv:2402.14740 eq. 8).

    Args:
        rewards: [R] float.
        group_size: G; a completion that is alone in its group, or the only one with a reward, has the advantage 0.
    Returns:
        [R].
    """
    grouped = rewards.view(-1, group_size)
    scored = ~grouped.isnan()
    others = scored.sum(1, keepdim=True) - 1
    baseline = (grouped.nansum(1, keepdim=True) - grouped) / others.clamp(min=1)
    return torch.where(scored & (others > 0), grouped - baseline, 0.0).flatten()


def group_normalised(rewards: Tensor, group_size: int, scale_rewards: str = "group") -> Tensor:
    """(r - mean of its group) / (std + 1e-4), arXiv:2402.03300 section 4.1.2, with Bessel's correction as TRL has it.

    Args:
        rewards: [R] float.
        group_size: G.
        scale_rewards: whose standard deviation: "group" (default), "batch" (arXiv:2508.08221), "none" (2503.20783).
    Returns:
        [R].
    """
    grouped = rewards.view(-1, group_size)
    centred = grouped - grouped.nanmean(1, keepdim=True)
    if scale_rewards == "group":
        centred = centred / (nanstd(grouped) + STD_EPSILON)
    elif scale_rewards == "batch":
        centred = centred / (nanstd(rewards[None]) + STD_EPSILON)
    elif scale_rewards != "none":
        raise ValueError(f"scale_rewards must be group, batch or none, got {scale_rewards!r}")
    return centred.nan_to_num(0.0).flatten()


def nanstd(x: Tensor) -> Tensor:
    """Standard deviation over the last dimension with Bessel's correction, NaN left out; 0 for a single value."""
    count = (~x.isnan()).sum(-1, keepdim=True)
    squares = (x - x.nanmean(-1, keepdim=True)).square().nansum(-1, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def best_versus_worst(rewards: Tensor, group_size: int) -> list[tuple[int, int]]:
    """(best, worst) completion of each group, by their numbers; the first of equals. Groups in which all that have a
    reward have the same one (or fewer than two have any) give no pair."""
    grouped, first = rewards.view(-1, group_size), torch.arange(0, len(rewards), group_size)
    best = first + grouped.nan_to_num(-torch.inf).argmax(1)
    worst = first + grouped.nan_to_num(torch.inf).argmin(1)
    return [pair for pair in zip(best.tolist(), worst.tolist()) if rewards[pair[0]] > rewards[pair[1]]]


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef * kl at every token, and the score at the last one (arXiv:1909.08593 eq. 2).

    Args:
        scores: [B]; kl: [B, T]; mask: [B, T] bool, True on completion tokens, from the left.
    Returns:
        [B, T], 0 outside the mask.
    """
    last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    return torch.where(mask, -kl_coef * kl, 0.0) + torch.where(last, scores[:, None], 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, arXiv:1506.02438 eq. 16; nothing follows a sequence's last token.

    Args:
        rewards, values: [B, T]; mask: [B, T] bool, True on completion tokens, from the left.
    Returns:
        (advantages [B, T], returns [B, T] = advantages + values), 0 outside the mask.
    """
    values, rewards = torch.where(mask, values, 0.0), torch.where(mask, rewards, 0.0)
    advantages, running = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    following = torch.zeros_like(running)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = torch.where(mask[:, t], delta + gamma * lam * running, 0.0)
        advantages[:, t], following = running, values[:, t]
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(x - mean) / std over the mask, unbiased variance + 1e-8; with `shift_mean` False the mean is added again."""
    kept = x[mask]
    if len(kept) < 2:
        return torch.where(mask, x, 0.0)
    mean = kept.mean()
    white = (x - mean) * torch.rsqrt(kept.var() + 1e-8)
    return torch.where(mask, white if shift_mean else white + mean, 0.0)


BASELINES: dict[str, Callable[[Tensor, int], Tensor]] = {  # (rewards [R], G) -> [R]; the last two are REINFORCE
    "leave_one_out": leave_one_out,
    "batch_mean": lambda rewards, group_size: (rewards - rewards.nanmean()).nan_to_num(0.0),
    "none": lambda rewards, group_size: rewards.nan_to_num(0.0),
}
