"""Preference losses that need no reference, on the summed log-probs of pairs.

Each adds the negative log-likelihood of the chosen tokens, `nll_weight` times its sum over them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from align_kernels.losses.common import REWARDS, bounded_exp, bradley_terry, log1mexp, rewards_of
from align_kernels.losses.registry import register_loss

LIMIT = 80.0  # of an exponent: see divergences
CERTAIN = -1e-12  # a mean log-prob that ORPO's odds treat as a certainty

# z = beta (r_w - r_l) -> (P,)
CPO_LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": lambda z, beta, e, gamma: bradley_terry(z, e),
    "hinge": lambda z, beta, e, gamma: torch.relu(1 - z),
    "ipo": lambda z, beta, e, gamma: (z / beta - 1 / (2 * beta)) ** 2,
    "simpo": lambda z, beta, e, gamma: bradley_terry(z - gamma, e),
}
AVERAGED = {"ipo", "simpo"}  # score a completion by its mean log-prob, the others by the sum
SMOOTHED = {"sigmoid", "simpo"}
PAIR: dict = dict(side={"nll_weight": "batch"}, needs=("lengths",))


def nll(logps: Tensor, weight: Tensor | None) -> Tensor | float:
    return 0.0 if weight is None else -weight * logps.chunk(2)[0]


@register_loss("pair", metrics=REWARDS, **PAIR)
def cpo(
    logps: Tensor,  # (2P,) chosen, then rejected
    *,
    lengths: Tensor,  # (2P,)
    nll_weight: Tensor | None = None,  # ()
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.5,
    alpha: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:  # (P,)
    """DPO with a uniform reference: Bradley-Terry on log-probs. With z = beta (r_w - r_l):

    sigmoid  -log sigma(z)                                r = log pi(y|x)            arXiv:2401.08417 eq. 3
    simpo    -log sigma(z - gamma)                        r = log pi(y|x) / |y|      arXiv:2405.14734 eq. 6
    hinge    max(0, 1 - z)                                r = log pi(y|x)            arXiv:2305.10425 section 2
    ipo      (r_w - r_l - 1 / (2 beta))^2                 r = log pi(y|x) / |y|      arXiv:2310.12036 eq. 17

    alpha is not 0: r = (1 - exp(-alpha r)) / alpha in its place, AlphaPO (arXiv:2501.03884).
    """
    score = logps / lengths.clamp(min=1) if loss_type in AVERAGED else logps
    if alpha:
        score = (1 - bounded_exp(-alpha * score, LIMIT)) / alpha
    z = beta * torch.sub(*score.chunk(2))
    value = CPO_LOSSES[loss_type](z, beta, label_smoothing, simpo_gamma)
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
