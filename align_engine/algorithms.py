"""The table of algorithms: what each learns from, what it counts, and its loss. The loops do the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from align_engine import online
from align_engine.data.batches import IGNORE, Batch, collate_marks, collate_pairs, collate_rollouts, collate_sft
from align_engine.errors import BadInput
from align_engine.kto import reference_point
from align_engine.recipe import Recipe, ReferenceFields, RmRecipe, flat
from align_kernels import LossOutput, cpo_loss, dpo_loss, kto_loss, orpo_loss, reward_loss, sft_loss, simpo_loss
from align_kernels.head import LogitGradClamp

Loss = Callable[..., LossOutput]  # (hidden [B, T, D], head, batch, recipe, num_items) -> LossOutput
NOT_OF_THE_LOSS = ReferenceFields.__dataclass_fields__.keys() - {"beta"} | {"balance_classes"}


@dataclass(frozen=True)
class Algorithm:
    """One row of the table."""

    name: str
    kind: Literal["sft", "preference", "unpaired", "prompt"]  # of rows, as align_engine.data.prepare names it
    collate: Callable[..., Batch]
    count: Callable[..., int]  # (batch, recipe) -> units in a batch, which the loss is a mean over
    loss: Loss
    prepare: Callable[..., None] | None = None  # (engine, window) fills what a batch has of its whole window
    reference: bool = False  # whether batches need ref_logps
    dropout: bool = False  # whether the model's dropout stays on in training
    scalar: bool = False  # the model has a score head: the loss gets scores [B] in place of hidden states
    credit: Callable[..., online.Given] | None = None  # learns from rollouts: (experience, recipe, state) -> columns
    kl: str = ""  # the recipe's weight of a reference for rollouts
    present_policy: bool = False  # the loss can do without old_logps where the policy has not changed since

    def refers(self, recipe: Recipe) -> bool:
        """Whether the loss has a reference: always, or where the weight of its KL term is not 0."""
        return self.reference or bool(flat(recipe).get(self.kl))


def _fused(fused: Loss, *parts: str) -> Loss:
    """A loss of the kernels whose settings are the fields of its recipe's section `loss`; `parts` are those of the
    batch that it takes beside the targets and the numbers of the whole window."""

    def loss(hidden: Tensor, head: dict[str, Any], batch: Batch, recipe: Any, num_items: float) -> LossOutput:
        given = {name: getattr(batch, name) for name in parts} | batch.shared
        settings = vars(recipe.loss) if hasattr(recipe, "loss") else {}
        options = {name: value for name, value in settings.items() if name not in NOT_OF_THE_LOSS}
        return fused(hidden, targets=batch.targets, num_items=num_items, **options, **given, **head)

    return loss


def gradient_limits(recipe: Any) -> dict[str, Any]:
    """The section `limits` as keywords of every fused loss."""
    clamp = recipe.limits.grad_clamp
    return {"prob_gate": recipe.limits.prob_gate, "grad_clamp": None if clamp is None else LogitGradClamp(clamp)}


def _dpo(hidden: Tensor, *, loss_type: str, **more: Any) -> LossOutput:
    return dpo_loss(hidden, loss_type=loss_type.split(","), **more)


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
        batch.shared = {"num_tokens": max(total, 1.0) / engine.accelerator.num_processes}


def _tokens(batch: Batch, recipe: Recipe) -> int:
    return batch.num_tokens


def _pairs(batch: Batch, recipe: Recipe) -> int:
    return len(batch.targets) // 2


def _sequences(batch: Batch, recipe: Recipe) -> int:
    return len(batch.targets)


# kind, collate, units of each sort of rows
TEXTS = ("sft", collate_sft, _tokens)
PAIRS = ("preference", collate_pairs, _pairs)
MARKS = ("unpaired", collate_marks, _sequences)
ROWS = (
    #         name     rows    loss                                    numbers of the whole window
    Algorithm("sft",   *TEXTS, _fused(sft_loss),                       dropout=True),
    Algorithm("rm",    *PAIRS, _rm,                                    scalar=True),
    Algorithm("dpo",   *PAIRS, _fused(_dpo, "ref_logps"),              _count_chosen, reference=True),
    Algorithm("simpo", *PAIRS, _fused(simpo_loss)),
    Algorithm("orpo",  *PAIRS, _fused(orpo_loss),                      _count_chosen),
    Algorithm("cpo",   *PAIRS, _fused(cpo_loss),                       _count_chosen),
    Algorithm("kto",   *MARKS, _fused(kto_loss, "ref_logps", "desirable"), reference_point, reference=True),
    # from rollouts
    Algorithm("direct", "prompt", collate_rollouts, _sequences, online.direct, credit=online.direct_credit, kl="beta",
              present_policy=True),
    Algorithm("grpo", "prompt", collate_rollouts, online.grpo_units, online.grpo, credit=online.grpo_credit, kl="beta",
              present_policy=True),
    Algorithm("ppo", "prompt", collate_rollouts, _tokens, online.ppo, credit=online.ppo_credit, kl="kl_coef"),
)  # fmt: skip
ALGORITHMS = {row.name: row for row in ROWS}


def check_loss(algorithm: Algorithm, recipe: Recipe) -> None:
    """Refuse settings of the loss that do not fit together, by one call of it on two rows made up.

    Raises:
        BadInput: with what the loss says.
    """
    if algorithm.credit or algorithm.scalar:
        return
    row = {"index": 0, "prompt_ids": [1], "completion_ids": [1], "kl_completion_ids": [2, 1], "label": True,
           "chosen_ids": [1], "rejected_ids": [2, 1], "ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0,
           "ref_logps": 0.0}  # fmt: skip
    batch = algorithm.collate([row, row], pad_id=0)
    batch.shared = {_count_chosen: {"num_tokens": 2.0}, reference_point: {"kl": 0.0}}.get(algorithm.prepare, {})
    try:
        algorithm.loss(torch.zeros(*batch.targets.shape, 4), {"weight": torch.zeros(3, 4)}, batch, recipe, 2.0)
    except ValueError as error:
        raise BadInput(str(error)) from error
