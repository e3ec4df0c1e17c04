"""The GRPO family."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from align_engine.algorithms.common import with_ratios
from align_engine.data.batches import Batch, collate_rollouts
from align_engine.recipe import GrpoRecipe
from align_engine.rollouts.advantages import Experience, group_normalised
from align_engine.training.algorithm import Algorithm, Columns, keywords
from align_kernels import LossOutput, grpo_loss
from align_kernels.losses.grpo import LOSS_TYPES


def grpo(hidden: Tensor, head: dict[str, Any], batch: Batch, recipe: GrpoRecipe, num_items: float) -> LossOutput:
    """A loss per token, whose mean the recipe's loss_type names."""
    options = recipe.loss
    more = {
        "sampling_logps": batch.sampling_logps if options.vllm_importance_sampling_correction else None,
        "max_completion_length": recipe.rollout.max_completion_length,
        "num_tokens": num_items if options.entropy_coef else None,
        # bnpo is dapo whose batch is one forward pass; here it is the whole window
        "loss_type": "dapo" if options.loss_type == "bnpo" else options.loss_type,
    }
    out = grpo_loss(hidden, **keywords(grpo_loss, head, batch, recipe, num_items, **more))
    return with_ratios(out, batch, out.logps, options if options.vllm_importance_sampling_correction else None)


def units(batch: Batch, recipe: GrpoRecipe) -> int:
    """Tokens, or sequences where the loss is a mean over them."""
    by_sequence = LOSS_TYPES[recipe.loss.loss_type].counts == "sequences"
    return len(batch.targets) if by_sequence else batch.num_tokens


def advantages(found: Experience, recipe: GrpoRecipe, state: dict[str, Any]) -> tuple[Columns, dict[str, Any]]:
    """Rewards normalised within their group."""
    each = group_normalised(found.rewards, found.group_size, recipe.loss.scale_rewards)
    return {"advantages": each[:, None].expand(found.mask.shape)}, {}


GRPO = Algorithm(
    "grpo", "prompt", collate_rollouts, units, grpo, refers=lambda recipe: recipe.loss.beta > 0,
    advantages=advantages, present_policy=True,
)  # fmt: skip
