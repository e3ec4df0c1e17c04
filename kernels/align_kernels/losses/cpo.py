"""Preference losses that need no reference, on the summed log-probs of pairs.

Each adds the negative log-likelihood of the chosen tokens, `nll_weight` times its sum over them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from align_kernels.losses.common import REWARDS, bounded_exp, bradley_terry, log1mexp, rewards_of
from align_kernels.losses.family import Family, Smoothing
from align_kernels.losses.registry import register_loss

LIMIT = 80.0  # of an exponent: see divergences
CERTAIN = -1e-12  # a mean log-prob that ORPO's odds treat as a certainty


class Facts(NamedTuple):
    """What is to be known of a member of CPO's family beside its options."""

    averaged: bool = False  # it scores a completion by its mean log-prob, not by the sum


CPO_LOSSES = Family(Facts)


# -- of z = beta (r_w - r_l), (P,) -> (P,) -------------------------------------------------------------------------
@CPO_LOSSES.add()
def sigmoid(z: Tensor, *, label_smoothing: Smoothing = 0.0) -> Tensor:
    """-log sigma(z), arXiv:2401.08417 eq. 3."""
    return bradley_terry(z, label_smoothing)


@CPO_LOSSES.add()
def hinge(z: Tensor) -> Tensor:
    """max(0, 1 - z), arXiv:2305.10425 section 2."""
    return torch.relu(1 - z)


@CPO_LOSSES.add(averaged=True)
def ipo(z: Tensor, *, beta: float) -> Tensor:
    """(r_w - r_l - 1 / (2 beta))^2, arXiv:2310.12036 eq. 17."""
    return (z / beta - 1 / (2 * beta)) ** 2


@CPO_LOSSES.add(averaged=True)
def simpo(z: Tensor, *, label_smoothing: Smoothing = 0.0, simpo_gamma: float = 0.5) -> Tensor:
    """-log sigma(z - gamma), arXiv:2405.14734 eq. 6."""
    return bradley_terry(z - simpo_gamma, label_smoothing)


# -- the losses ---------------------------------------------------------------------------------------------------


def nll(logps: Tensor, weight: Tensor | None) -> Tensor | float:
    return 0.0 if weight is None else -weight * logps.chunk(2)[0]


@register_loss("pair", side={"nll_weight": "batch"}, metrics=REWARDS, needs=("lengths",), family=CPO_LOSSES)
def cpo(
    logps: Tensor,  # (2P,) chosen, then rejected
    *,
    lengths: Tensor,  # (2P,)
    nll_weight: Tensor | None = None,  # ()
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    alpha: float = 0.0,
    **options,
) -> tuple[Tensor, dict[str, Tensor]]:  # (P,)
    """DPO with a uniform reference: a member of `CPO_LOSSES` on z = beta (r_w - r_l) with r = log pi(y|x), or
    log pi(y|x) / |y| of those that are averaged.

    alpha is not 0: r = (1 - exp(-alpha r)) / alpha in its place, AlphaPO (arXiv:2501.03884).
    """
    score = logps / lengths.clamp(min=1) if CPO_LOSSES[loss_type].facts.averaged else logps
    if alpha:
        score = (1 - bounded_exp(-alpha * score, LIMIT)) / alpha
    z = beta * torch.sub(*score.chunk(2))
    value = CPO_LOSSES(loss_type, z, beta=beta, **options)
    return value + nll(logps, nll_weight), rewards_of(beta * score)


@register_loss(
    "pair",
    side={"nll_weight": "batch", "completion": "sum", "completion_lengths": "sequence"},
    metrics=(*REWARDS, "log_odds_ratio", "log_odds_chosen"),
)
def orpo(
    logps: Tensor,  # (2P,) of every token that the likelihood counts
    *,
    completion: Tensor,  # (2P,) of the completions alone
    completion_lengths: Tensor,  # (2P,)
    nll_weight: Tensor | None = None,  # ()
    beta: float = 0.1,
) -> tuple[Tensor, dict[str, Tensor]]:  # (P,)
    """NLL - beta log sigma(log odds(y_w) - log odds(y_l)), odds = p / (1 - p) of the mean log-prob, arXiv:2403.07691
    eq. 6 and 7. A completion of probability 1 has odds of 1e12."""
    score = (completion / completion_lengths.clamp(min=1)).clamp(max=CERTAIN)
    log_odds = torch.sub(*(score - log1mexp(score)).chunk(2))
    ratio = F.logsigmoid(log_odds)
    metrics = {"log_odds_ratio": ratio.detach(), "log_odds_chosen": log_odds.detach()}
    return -beta * ratio + nll(logps, nll_weight), rewards_of(beta * score) | metrics


@register_loss("pair", metrics=REWARDS, side={"nll_weight": "batch"})
def slic(
    logps: Tensor,  # (2P,)
    *,
    nll_weight: Tensor | None = None,  # ()
    delta: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:  # (P,)
    """max(0, delta - log pi(y_w|x) + log pi(y_l|x)) + NLL, arXiv:2305.10425 section 2 with the chosen as target: delta
    times the hinge of CPO at beta = 1 / delta."""
    return torch.relu(delta - torch.sub(*logps.chunk(2))) + nll(logps, nll_weight), rewards_of(logps)
