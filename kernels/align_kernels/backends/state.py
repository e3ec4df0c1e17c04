"""The running softmax state of a row: a row of the float64 tensor [n, 8] that all backends share (csrc's `State`).

Below, l are the logits seen so far and m is the largest of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX = 0  # m; NaN once a NaN was seen
SUM = 1  # sum of exp(l - m)
SUM_X = 2  # sum of exp(l - m) (l - m)
SUM_SQ = 3  # sum of exp(l - m)^2
TOTAL = 4  # sum of l
TARGET = 5  # the target's logit
ARGMAX = 6  # first index of the max over the whole vocabulary, -1 before any column; made on a chip that writes no
#             logits, the target's index where that is the first max, else another one near it, in order
COLUMNS = 8  # the last one is unused


def empty(n: int, device: torch.device) -> Tensor:
    """The state [n, 8] of rows of which nothing is seen yet."""
    state = torch.zeros(n, COLUMNS, dtype=torch.float64, device=device)
    state[:, MAX].fill_(-torch.inf)  # filled there: a copy from the CPU would wait for the device
    state[:, ARGMAX].fill_(-1.0)
    return state


def entropy(state: Tensor) -> Tensor:
    """[n], in nats, of a finished state [n, 8]."""
    return state[:, SUM].log() - state[:, SUM_X] / state[:, SUM]


def read(state: Tensor, targets: Tensor, vocab: int) -> tuple[Tensor, ...]:
    """logp, entropy, lse, log_sum_sq_probs, mean_logit [n] of a finished state, in its precision, and correct [n]."""
    m, s, a, q, total, target, argmax = state[:, : COLUMNS - 1].unbind(1)
    log_s = s.log()
    return (target - m) - log_s, log_s - a / s, m + log_s, q.log() - 2 * log_s, total / vocab, argmax == targets
