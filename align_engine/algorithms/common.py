"""What the algorithms share: what batches count, and metrics of rollouts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from align_engine.data.batches import IGNORE, Batch
from align_engine.training.metrics import with_means
from align_kernels import LossOutput

if TYPE_CHECKING:
    from align_engine.recipe import GrpoLoss


def tokens(batch: Batch, recipe: Any) -> int:
    return batch.num_tokens


def pairs(batch: Batch, recipe: Any) -> int:
    return batch.ends.shape[1]


def sequences(batch: Batch, recipe: Any) -> int:
    return len(batch.targets)


def always(recipe: Any) -> bool:
    return True


def with_ratios(out: LossOutput, batch: Batch, logps: Tensor | None, correction: GrpoLoss | None = None) -> LossOutput:
    """The output with how far policies are apart, raw: before any ratio is clipped or left out.

    `ratio`: of the policy to that before the rollout's first step, where the rollout serves several steps, for each
    token; for each completion where the loss gives their log-probs alone. `sampling/...`: of our log-probs to the
    sampler's for the same weights, over the tokens that have both.

    Args:
        logps: [B, T] ours, unless the batch has them from before the rollout's first step; None: there are none.
        correction: settings of the correction for a foreign sampler. Default None: it is off, ratios are per token.
    """
    kept = batch.targets != IGNORE
    if batch.old_logps is not None and out.logps is not None:
        old = batch.old_logps.where(kept, 0.0)
        whole = out.logps.dim() == 1
        log_ratio = out.logps.detach() - (old.sum(1) if whole else old)
        ratio = log_ratio.exp().where(kept.any(1) if whole else kept, torch.nan)
        out = with_means(out, {"ratio": ratio}, ratio.numel())
    ours = logps if batch.old_logps is None else batch.old_logps
    if ours is None or batch.sampling_logps is None:
        return out
    known = kept & ~batch.sampling_logps.isnan()
    difference = (ours.detach() - batch.sampling_logps).where(known, 0.0)
    mean = difference.abs().sum() / known.sum().clamp(min=1)
    out = with_means(out, {"sampling/sampling_logp_difference/mean": mean}, known.sum())
    ratio = difference.exp().where(known, torch.nan)
    if correction is not None and correction.vllm_importance_sampling_mode.startswith("sequence"):
        ratio = difference.sum(1).exp().where(known.any(1), torch.nan)
    out = with_means(out, {"sampling/importance_sampling_ratio": ratio}, ratio.numel())
    if correction is None:
        return out
    low, high = correction.vllm_importance_sampling_clip_min, correction.vllm_importance_sampling_clip_max
    outside = (ratio < (low or 0.0)) | (ratio > (math.inf if high is None else high))
    count = (~ratio.isnan()).sum()
    share = outside.sum() / count.clamp(min=1)
    return with_means(out, {"sampling/importance_sampling_ratio/clipped": share}, count)
