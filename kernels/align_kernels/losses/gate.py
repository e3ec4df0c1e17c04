"""A limit on the gradient of tokens that are already over-probable."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class ProbGate(NamedTuple):
    """Weight of a token's gradient by its probability p = exp(logp): where p > `p_hi`, g = dL/dlogp is multiplied by

        ((1 - p) / (1 - p_hi)) ** power        0 for power = inf

    The value of the loss is unchanged, so this is the gradient of no scalar. In a loss over sequences the gate acts on
    each token's share of the sum, which itself is unchanged. A fused loss takes it as `prob_gate=`; in a loss of one's
    own, `gate(logps)` are the same log-probs with the gated gradient:

        dpo_loss(hidden, weight, targets, ref_logps, prob_gate=0.95)
        loss = my_loss(ProbGate(0.95, power=2)(logps))

    Args:
        p_hi: the probability above which the gradient is limited, in (0, 1).
        power: how sharply it falls to 0 at p = 1, > 0. Default inf: at once above p_hi.
    """

    p_hi: float
    power: float = math.inf

    def check(self) -> ProbGate:
        if not 0 < self.p_hi < 1:
            raise ValueError(f"prob_gate.p_hi must lie in (0, 1), got {self.p_hi}")
        if not self.power > 0:
            raise ValueError(f"prob_gate.power must be above 0, got {self.power}")
        return self

    def weight(self, logps: Tensor) -> Tensor:
        """The factor of each token's gradient, of the shape of logps."""
        logps = logps.detach()
        over = logps > math.log(self.p_hi)
        if math.isinf(self.power):
            return (~over).to(logps.dtype)
        left = (-torch.expm1(logps) / (1 - self.p_hi)).clamp(min=0) ** self.power
        return torch.where(over, left, 1.0)

    def __call__(self, logps: Tensor) -> Tensor:
        """The same log-probs, whose gradient is multiplied by `weight(logps)`."""
        if not isinstance(logps, Tensor):
            raise TypeError(f"ProbGate: logps must be a tensor, got a {type(logps).__name__}")
        return logps.detach() + self.weight(logps) * (logps - logps.detach())
