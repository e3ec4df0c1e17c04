"""Weights of tokens in a policy loss, without gradient: for samples of another policy, for tokens that decide."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Sums = Callable[[Tensor], Tensor]  # (n,) -> (n,): the sum over each token's sequence, at each of its tokens

IS_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def sampler_ratio(
    old_logps: Tensor, sampling_logps: Tensor, mode: str, low: float | None, high: float | None, total: Sums
) -> Tensor:
    """Importance ratio (n,) of the training engine's probabilities over the sampler's, bounded.

    Per token, or the product over a sequence; outside [low, high] it is clipped (`*_truncate`, TIS) or 0 (`*_mask`).
    Tokens whose sampling log-prob is NaN count with a ratio of 1.
    """
    difference = (old_logps.detach() - sampling_logps).nan_to_num(nan=0.0)
    ratio = (total(difference) if mode.startswith("sequence") else difference).exp()
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if mode.endswith("truncate"):
        return ratio.clamp(low, high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


def off_policy_keep(
    logps: Tensor, sampling_logps: Tensor, advantages: Tensor, threshold: float, lengths: Tensor, total: Sums
) -> Tensor:
    """0 at the tokens of sequences of negative advantage whose mean log mu - log pi exceeds the threshold, else 1.

    arXiv:2512.02556 eq. 9. `lengths` (n,) of each token's sequence.
    """
    difference = (sampling_logps - logps.detach()).nan_to_num(nan=0.0)
    return ((advantages >= 0) | (total(difference) / lengths <= threshold)).to(logps.dtype)


def top_entropy(entropy: Tensor, quantile: float) -> Tensor:
    """1 at the tokens (n,) whose entropy is among the top `quantile` of them, else 0, arXiv:2506.01939."""
    if not len(entropy):
        return entropy.detach()
    entropy = entropy.detach()
    return (entropy >= torch.quantile(entropy, 1 - quantile)).to(entropy.dtype)
