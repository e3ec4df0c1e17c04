"""The table of algorithms: what each learns from, what it counts, and its loss. The loops do the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from align_engine import online
from align_engine.data import Batch, collate_marks, collate_pairs, collate_rollouts, collate_sft
from align_engine.data.batches import IGNORE
from align_engine.kto import reference_point
from align_engine.recipe import DirectRecipe, DpoRecipe, GrpoRecipe, KtoRecipe, PpoRecipe, Recipe, RmRecipe, SftRecipe
from align_kernels import LossOutput, dpo_loss, kto_loss, reward_loss, sft_loss

Loss = Callable[..., LossOutput]  # (hidden [B, T, D], head, batch, recipe, num_items) -> LossOutput


@dataclass(frozen=True)
class Algorithm:
    """One row of the table."""

    name: str
    recipe: type[Recipe]
    kind: Literal["sft", "preference", "unpaired", "prompt"]  # of rows, as align_engine.data.prepare names it
    collate: Callable[..., Batch]
    unit: str  # what the loss is a mean over
    count: Callable[..., int]  # (batch, recipe) -> units in a batch
    loss: Loss
    reference: bool  # whether batches need ref_logps
    dropout: bool  # whether the model's dropout stays on in training
    prepare: Callable[..., None] | None = None  # (engine, window) fills what a batch has of its whole window
    scalar: bool = False  # the model has a score head: the loss gets scores [B] in place of hidden states
    credit: Callable[..., online.Given] | None = None  # learns from rollouts: (experience, recipe, state) -> columns
    kl: str = ""  # the recipe's weight of a reference for rollouts
    present_policy: bool = False  # the loss can do without old_logps where the policy has not changed since


def _sft(hidden: Tensor, head: dict[str, Any], batch: Batch, recipe: SftRecipe, num_items: float) -> LossOutput:
    return sft_loss(hidden, targets=batch.targets, num_items=num_items, **head)


def _dpo(hidden: Tensor, head: dict[str, Any], batch: Batch, recipe: DpoRecipe, num_items: float) -> LossOutput:
    assert batch.ref_logps is not None, "the table says that batches need a reference"
    return dpo_loss(
        hidden,
        targets=batch.targets,
        ref_logps=batch.ref_logps,
        beta=recipe.loss.beta,
        loss_type=recipe.loss.loss_type,
        label_smoothing=recipe.loss.label_smoothing,
        num_items=num_items,
        **head,
    )


def _kto(hidden: Tensor, head: dict[str, Any], batch: Batch, recipe: KtoRecipe, num_items: float) -> LossOutput:
    assert batch.ref_logps is not None and batch.desirable is not None, "the table says so"
    options = recipe.loss
    out = kto_loss(
        hidden,
        targets=batch.targets,
        ref_logps=batch.ref_logps,
        desirable=batch.desirable,
        kl=batch.shared["kl"],
        beta=options.beta,
        desirable_weight=options.desirable_weight,
        undesirable_weight=options.undesirable_weight,
        num_items=num_items,
        **head,
    )
    # a margin between classes is one of means over the whole window, see Sums.means
    dropped = ("rewards/margins", "count/chosen", "count/rejected")
    return out._replace(metrics={name: value for name, value in out.metrics.items() if name not in dropped})


def _rm(scores: Tensor, head: dict[str, Any], batch: Batch, recipe: RmRecipe, num_items: float) -> LossOutput:
    chosen, rejected = scores.chunk(2)
    center = recipe.loss.center_rewards_coefficient
    return reward_loss(chosen, rejected, margin=batch.margin, center_coef=center, num_items=num_items)


def _tokens(batch: Batch, recipe: Recipe) -> int:
    return batch.num_tokens


def _pairs(batch: Batch, recipe: Recipe) -> int:
    return len(batch.targets) // 2


def _sequences(batch: Batch, recipe: Recipe) -> int:
    return len(batch.targets)


ROWS = (
    #         name   recipe     rows          collate        unit     units    loss  reference dropout
    Algorithm("sft", SftRecipe, "sft",        collate_sft,   "token", _tokens, _sft, False,    True),
    Algorithm("rm",  RmRecipe,  "preference", collate_pairs, "pair",  _pairs,  _rm,  False,    False, scalar=True),
    Algorithm("dpo", DpoRecipe, "preference", collate_pairs, "pair",  _pairs,  _dpo, True,     False),
    Algorithm("kto", KtoRecipe, "unpaired",   collate_marks, "sequence", _sequences, _kto, True, False,
              prepare=reference_point),
    # from rollouts
    Algorithm("direct", DirectRecipe, "prompt", collate_rollouts, "sequence", _sequences, online.direct, False, False,
              credit=online.direct_credit, kl="beta"),
    Algorithm("grpo", GrpoRecipe, "prompt", collate_rollouts, "token or sequence", online.grpo_units, online.grpo,
              False, False, credit=online.grpo_credit, kl="beta", present_policy=True),
    Algorithm("ppo", PpoRecipe, "prompt", collate_rollouts, "token", _tokens, online.ppo, False, False,
              credit=online.ppo_credit, kl="kl_coef"),
)  # fmt: skip
ALGORITHMS = {row.name: row for row in ROWS}


def metric_weight(algorithm: Algorithm, name: str, batch: Batch, units: int) -> int:
    """What a metric of a batch is a mean over: tokens, those of a class or half, rows of a class, or units."""
    if algorithm.credit or name in ("entropy", "mean_token_accuracy"):
        return batch.num_tokens
    word = name.rpartition("/")[2]
    if word not in ("chosen", "rejected") or (batch.desirable is None and not name.startswith("logits/")):
        return units
    rows = (
        batch.desirable if batch.desirable is not None else torch.arange(len(batch.targets)) < len(batch.targets) // 2
    )
    rows = rows if word == "chosen" else ~rows
    return int((batch.targets[rows] != IGNORE).sum() if name.startswith("logits/") else rows.sum())
