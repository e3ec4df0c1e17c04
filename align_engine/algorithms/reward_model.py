"""Reward models: Bradley-Terry on the scores of pairs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from align_engine.algorithms.common import pairs
from align_engine.data.batches import Batch, collate_pairs
from align_engine.data.tokenize import has_several_answers
from align_engine.errors import BadInput
from align_engine.recipe import RmRecipe
from align_engine.training.algorithm import Algorithm
from align_kernels import LossOutput, reward_loss
from align_kernels.sums import take_at


def bradley_terry(scores: Tensor, head: dict[str, Any], batch: Batch, recipe: RmRecipe, num_items: float) -> LossOutput:
    """The loss of scores [B], over the pairs of the batch."""
    chosen, rejected = (take_at(scores, rows) for rows in batch.ends)
    center = recipe.loss.center_rewards_coefficient
    return reward_loss(chosen, rejected, margin=batch.margin, center_coef=center, num_items=num_items)


def with_margins(rows: Any, recipe: RmRecipe) -> Any:
    """A column `margin` from the ranks of the two answers, rank 1 being the best, where the recipe asks for it."""
    if not (per_rank := recipe.loss.rank_margin):
        return rows
    if missing := {"chosen_rank", "rejected_rank"} - set(rows.column_names):
        raise BadInput(f"rank_margin = {per_rank}: the rows have no column {' and no '.join(sorted(missing))}")
    if "margin" in rows.column_names:
        raise BadInput(f"rank_margin = {per_rank}, and the rows have a column `margin` too: leave one of them out")
    ranks = zip(rows["rejected_rank"][:], rows["chosen_rank"][:])
    if not has_several_answers(rows):
        return rows.add_column("margin", [per_rank * (below - above) for below, above in ranks])
    each = [[per_rank * (b - a) for a in above for b in below] for below, above in ranks]
    return rows.add_column("margin", each)


RM = Algorithm(
    "rm", "preference", collate_pairs, pairs, bradley_terry, scalar=True, rows=with_margins, named_pairs=True
)
