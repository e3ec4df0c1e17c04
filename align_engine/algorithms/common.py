"""What the algorithms share: what batches count, and a metric of rollouts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from align_engine.data.batches import IGNORE, Batch
from align_engine.training.metrics import with_means
from align_kernels import LossOutput


def tokens(batch: Batch, recipe: Any) -> int:
    return batch.num_tokens


def pairs(batch: Batch, recipe: Any) -> int:
    return len(batch.targets) // 2


def sequences(batch: Batch, recipe: Any) -> int:
    return len(batch.targets)


def always(recipe: Any) -> bool:
    return True


def with_mismatch(out: LossOutput, batch: Batch, logps: Tensor | None) -> LossOutput:
    """The output with how far the sampler's log-probs are from ours of the same weights (`logps`, unless the batch has
    them from before the rollout's first step): the mean of |difference| over the tokens that have both."""
    ours = logps if batch.old_logps is None else batch.old_logps
    if ours is None or batch.sampling_logps is None:
        return out
    known = (batch.targets != IGNORE) & ~batch.sampling_logps.isnan()
    difference = (ours.detach() - batch.sampling_logps).where(known, 0.0).abs().sum() / known.sum().clamp(min=1)
    return with_means(out, {"sampling/sampling_logp_difference/mean": difference}, known.sum())
