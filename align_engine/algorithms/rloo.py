"""REINFORCE with a leave-one-out baseline (RLOO): the policy gradient of whole completions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from align_engine.algorithms.common import sequences, with_ratios
from align_engine.data.batches import IGNORE, Batch, collate_rollouts
from align_engine.recipe import RlooRecipe
from align_engine.rollouts.advantages import BASELINES, STD_EPSILON, Experience, nanstd
from align_engine.training.algorithm import Algorithm, Columns, keywords
from align_kernels import LossOutput, rloo_loss


def rloo(hidden: Tensor, head: dict[str, Any], batch: Batch, recipe: RlooRecipe, num_items: float) -> LossOutput:
    """The policy gradient of whole completions; their ratio is clipped where a rollout serves several steps."""
    assert batch.advantages is not None
    first = (batch.targets != IGNORE).int().argmax(1, keepdim=True)
    each = batch.advantages.gather(1, first)[:, 0]
    out = rloo_loss(hidden, **keywords(rloo_loss, head, batch, recipe, num_items, advantages=each))
    return with_ratios(out, batch, batch.old_logps)


def advantages(found: Experience, recipe: RlooRecipe, state: dict[str, Any]) -> tuple[Columns, dict[str, Any]]:
    """Rewards less beta times the KL estimate of each sequence (arXiv:2402.14740 eq. 3), less the baseline."""
    options, kl = recipe.loss, torch.zeros(len(found.rewards))
    if found.ref_logps is not None:
        assert found.old_logps is not None
        kl = (found.old_logps - found.ref_logps).where(found.mask, 0.0).sum(1)
    advantages = BASELINES[options.baseline](found.rewards - options.beta * kl, found.group_size)
    metrics = {"kl": kl.mean()} if found.ref_logps is not None else {}
    if options.normalize_advantages:
        scored = advantages.where(~found.rewards.isnan(), math.nan)
        advantages = ((scored - scored.nanmean()) / (nanstd(scored) + STD_EPSILON)).nan_to_num(0.0)
    return {"advantages": advantages[:, None].expand(found.mask.shape)}, metrics


RLOO = Algorithm(
    "rloo", "prompt", collate_rollouts, sequences, rloo, refers=lambda recipe: recipe.loss.beta > 0,
    advantages=advantages, present_policy=True,
)  # fmt: skip
