"""What a sampler gives, and what it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from align_engine.recipe import RolloutSection


@dataclass
class Completion:
    """What the policy answered."""

    ids: list[int]  # up to and with the EOS token, or the token that completes a stop string
    logps: Tensor  # [len(ids)] float32: the sampler's own log-probs at its temperature; NaN where it gave none
    ended: bool  # False: cut at max_completion_length


Sampler = Callable[[Sequence[list[int]], int], list[Completion]]  # (prompts' ids, seed) -> one completion for each


def truncated(settings: RolloutSection) -> bool:
    """Whether completions are drawn from a part of the vocabulary only."""
    return settings.top_p < 1 or settings.top_k > 0


def derived_seed(*numbers: int) -> int:
    """A seed that is a function of the numbers alone."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
