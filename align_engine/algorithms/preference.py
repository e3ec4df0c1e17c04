"""Losses of pairs: DPO and its family, SimPO, ORPO, CPO."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from align_engine.algorithms.common import always, call, fused, pairs
from align_engine.data.batches import IGNORE, Batch, collate_pairs
from align_engine.data.windows import Micro
from align_engine.recipe import DpoRecipe
from align_engine.training.algorithm import Algorithm
from align_kernels import LossOutput, cpo_loss, dpo_loss, orpo_loss, simpo_loss

if TYPE_CHECKING:
    from align_engine.training.engine import Engine


def dpo(hidden: Tensor, head: dict[str, Any], batch: Batch, recipe: DpoRecipe, num_items: float) -> LossOutput:
    """One loss, or the weighted sum of several."""
    types = recipe.loss.loss_type.split(",")
    return call(dpo_loss, hidden, head, batch, recipe, num_items, loss_type=types)


def count_chosen(engine: Engine, window: list[Micro]) -> None:
    """Give the batches of a window the tokens of its chosen completions, as a likelihood beside the loss of pairs is a
    mean over them: this rank's share of those of all ranks."""
    total = engine.total(sum(_chosen(batch) for batch, real in window if real))
    for batch, _ in window:
        batch.shared = {"num_tokens": max(total, 1.0) / engine.accelerator.num_processes}


def _chosen(batch: Batch) -> int:
    return int((batch.targets[: len(batch.targets) // 2] != IGNORE).sum())


of_pairs: Callable[..., Algorithm] = partial(Algorithm, kind="preference", collate=collate_pairs, count=pairs)
with_likelihood: Callable[..., Algorithm] = partial(of_pairs, prepare=count_chosen, made_up={"num_tokens": 2.0})

DPO = with_likelihood("dpo", loss=dpo, refers=always)
SIMPO = of_pairs("simpo", loss=fused(simpo_loss))
ORPO = with_likelihood("orpo", loss=fused(orpo_loss))
CPO = with_likelihood("cpo", loss=fused(cpo_loss))
