"""What several losses are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")


def bradley_terry(z: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log sigma(z) - e log sigma(-z): the negative log-likelihood that the first of a pair is preferred, z
    being the difference of their scores and e the share of labels that are wrong."""
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def bounded_exp(x: Tensor, limit: float) -> Tensor:
    """exp(x), and beyond `limit` the tangent there: the gradient stays finite and keeps its sign."""
    return x.clamp(max=limit).exp() * (1 + (x - limit).clamp(min=0))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation (Maechler 2012)."""
    return torch.where(x < -0.6931, torch.log1p(-x.exp()), (-torch.expm1(x)).log())


def rewards_of(scores: Tensor) -> dict[str, Tensor]:
    """The metrics of implicit rewards [2P], one value per pair [P]."""
    chosen, rejected = scores.detach().chunk(2)
    values = (chosen, rejected, (chosen > rejected).to(scores.dtype), chosen - rejected)
    return dict(zip(REWARDS, values))
