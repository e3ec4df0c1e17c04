"""Losses of pairs: DPO and its family, SimPO, ORPO, CPO."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from align_engine.algorithms.common import always, pairs
from align_engine.data.batches import IGNORE, Batch, collate_pairs
from align_engine.data.windows import Micro
from align_engine.training.algorithm import Algorithm
from align_kernels import cpo_loss, dpo_loss, orpo_loss, simpo_loss

if TYPE_CHECKING:
    from align_engine.training.engine import Engine


def count_chosen(engine: Engine, window: list[Micro]) -> None:
    """Give the batches of a window the tokens of its pairs' chosen completions, as a likelihood beside the loss of
    pairs is a mean over them: this rank's share of those of all ranks."""
    total = engine.total(sum(_chosen(batch) for batch, real in window if real))
    for batch, _ in window:
        batch.shared = {"num_tokens": max(total, 1.0) / engine.accelerator.num_processes}


def _chosen(batch: Batch) -> int:
    return int((batch.targets != IGNORE).sum(1)[batch.ends[0]].sum())


of_pairs: Callable[..., Algorithm] = partial(
    Algorithm, kind="preference", collate=collate_pairs, count=pairs, named_pairs=True
)
with_likelihood: Callable[..., Algorithm] = partial(of_pairs, prepare=count_chosen, made_up={"num_tokens": 2.0})

DPO = with_likelihood("dpo", loss=dpo_loss, refers=always)
SIMPO = of_pairs("simpo", loss=simpo_loss)
ORPO = with_likelihood("orpo", loss=orpo_loss)
CPO = with_likelihood("cpo", loss=cpo_loss)
