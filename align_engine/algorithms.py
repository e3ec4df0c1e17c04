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
from align_engine.errors import BadInput
from align_engine.kto import reference_point
from align_engine.recipe import (
    CpoRecipe,
    DirectRecipe,
    DpoRecipe,
    GrpoRecipe,
    KtoRecipe,
    OrpoRecipe,
    PpoRecipe,
    Recipe,
    RmRecipe,
    SftRecipe,
    SimpoRecipe,
)
from align_kernels import LossOutput, cpo_loss, dpo_loss, kto_loss, orpo_loss, reward_loss, sft_loss, simpo_loss

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
    options = recipe.loss
    return dpo_loss(
        hidden,
        targets=batch.targets,
        ref_logps=batch.ref_logps,
        beta=options.beta,
        loss_type=options.loss_type.split(","),
        loss_weights=options.loss_weights,
        label_smoothing=options.label_smoothing,
        f_divergence_type=options.f_divergence_type,
        f_alpha_divergence_coef=options.f_alpha_divergence_coef,
        use_weighting=options.use_weighting,
        num_items=num_items,
        num_tokens=batch.shared["chosen_tokens"],
        **head,
    )


def _reference_free(fused: Loss) -> Loss:
    """A loss of pairs whose settings are all that its recipe's loss section holds."""

    def loss(hidden: Tensor, head: dict[str, Any], batch: Batch, recipe: Any, num_items: float) -> LossOutput:
        tokens = {} if fused is simpo_loss else {"num_tokens": batch.shared["chosen_tokens"]}
        return fused(hidden, targets=batch.targets, num_items=num_items, **vars(recipe.loss), **tokens, **head)

    return loss


def _kto(hidden: Tensor, head: dict[str, Any], batch: Batch, recipe: KtoRecipe, num_items: float) -> LossOutput:
    assert batch.ref_logps is not None and batch.desirable is not None, "the table says so"
    options = recipe.loss
    out = kto_loss(
        hidden,
        targets=batch.targets,
        ref_logps=batch.ref_logps,
        desirable=batch.desirable,
        kl=batch.shared["kl"],
        loss_type=options.loss_type,
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


def _chosen(batch: Batch) -> int:
    return int((batch.targets[: len(batch.targets) // 2] != IGNORE).sum())


def _count_chosen(engine: Any, window: list[Any]) -> None:
    """Give the batches of a window the tokens of its chosen completions, as a likelihood beside the loss of pairs is a
    mean over them: this rank's share of those of all ranks."""
    total = engine.total(sum(_chosen(batch) for batch, real in window if real))
    for batch, _ in window:
        batch.shared = {"chosen_tokens": max(total, 1.0) / engine.accelerator.num_processes}


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
    Algorithm("dpo", DpoRecipe, "preference", collate_pairs, "pair",  _pairs,  _dpo, True,     False, _count_chosen),
    Algorithm("simpo", SimpoRecipe, "preference", collate_pairs, "pair", _pairs, _reference_free(simpo_loss), False,
              False),
    Algorithm("orpo", OrpoRecipe, "preference", collate_pairs, "pair", _pairs, _reference_free(orpo_loss), False, False,
              _count_chosen),
    Algorithm("cpo", CpoRecipe, "preference", collate_pairs, "pair", _pairs, _reference_free(cpo_loss), False, False,
              _count_chosen),
    Algorithm("kto", KtoRecipe, "unpaired",   collate_marks, "sequence", _sequences, _kto, True, False,
              prepare=reference_point),
    # from rollouts
    Algorithm("direct", DirectRecipe, "prompt", collate_rollouts, "sequence", _sequences, online.direct, False, False,
              credit=online.direct_credit, kl="beta", present_policy=True),
    Algorithm("grpo", GrpoRecipe, "prompt", collate_rollouts, "token or sequence", online.grpo_units, online.grpo,
              False, False, credit=online.grpo_credit, kl="beta", present_policy=True),
    Algorithm("ppo", PpoRecipe, "prompt", collate_rollouts, "token", _tokens, online.ppo, False, False,
              credit=online.ppo_credit, kl="kl_coef"),
)  # fmt: skip
ALGORITHMS = {row.name: row for row in ROWS}


def metric_weight(algorithm: Algorithm, name: str, batch: Batch, units: int) -> int:
    """What a metric of a batch is a mean over: tokens, those of a class or half, rows of a class, or units."""
    if algorithm.credit and algorithm.unit == "sequence" and name.startswith("clip_ratio/"):
        return units
    if algorithm.credit or name in ("entropy", "mean_token_accuracy"):
        return batch.num_tokens
    if name == "nll_loss":
        return _chosen(batch)
    word = name.rpartition("/")[2]
    if word not in ("chosen", "rejected") or (batch.desirable is None and not name.startswith("logits/")):
        return units
    rows = (
        batch.desirable if batch.desirable is not None else torch.arange(len(batch.targets)) < len(batch.targets) // 2
    )
    rows = rows if word == "chosen" else ~rows
    return int((batch.targets[rows] != IGNORE).sum() if name.startswith("logits/") else rows.sum())


def check_loss(algorithm: Algorithm, recipe: Recipe) -> None:
    """Refuse settings of the loss that do not fit together, by one call of it on two rows made up.

    Raises:
        BadInput: with what the loss says.
    """
    if algorithm.credit or algorithm.scalar:
        return
    one, two = [1], [2, 1]
    row = {"index": 0, "prompt_ids": one, "chosen_ids": one, "rejected_ids": two, "completion_ids": one, "label": True,
           "kl_completion_ids": two, "ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0, "ref_logps": 0.0}  # fmt: skip
    batch = algorithm.collate([row, row], pad_id=0)
    batch.shared = {"chosen_tokens": 2.0, "kl": 0.0}
    try:
        algorithm.loss(torch.zeros(*batch.targets.shape, 4), {"weight": torch.zeros(3, 4)}, batch, recipe, 2.0)
    except ValueError as error:
        raise BadInput(str(error)) from error
