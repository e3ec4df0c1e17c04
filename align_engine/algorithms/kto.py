"""KTO: labelled completions, a mismatched one for each prompt, the reference point z0, the balance of classes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch

from align_engine.algorithms.common import always, sequences
from align_engine.data.batches import collate_labels, epoch_order
from align_engine.data.windows import Micro
from align_engine.errors import BadInput
from align_engine.models.logps import reference_logps
from align_engine.recipe import KtoRecipe
from align_engine.training.algorithm import Algorithm
from align_kernels import kto_loss

if TYPE_CHECKING:
    from align_engine.training.engine import Engine

NAME = "kl_completion_ids"
LEAST, MOST = 1.0, 4 / 3  # w_D n_D / (w_U n_U), arXiv:2402.01306 section 4.2


def with_mismatched(rows: datasets.Dataset, recipe: KtoRecipe) -> datasets.Dataset:
    """Add the column `kl_completion_ids`: for each row a completion that answers another prompt.

    It is the completion before it in a permutation of the rows, or the next before that whose prompt differs: a
    function of the row, whatever the batches. One that does not fit behind the prompt is cut at its end.

    Raises:
        BadInput: all rows have one prompt.
    """
    prompts = [hash(tuple(ids)) for ids in rows["prompt_ids"]]
    order, max_length = epoch_order(len(rows), recipe.train.seed, 0), recipe.data.max_length
    if len(set(prompts)) < 2:
        raise BadInput("kto needs rows of at least two prompts: its reference point reads answers to other prompts")
    chosen, last = np.zeros(len(order), dtype=np.int64), -1
    for here, before in 2 * list(zip(order, [order[-1], *order])):  # the second time round there is one before each
        last = before if prompts[here] != prompts[before] else last
        chosen[here] = last
    mismatched = rows.select(chosen).select_columns("completion_ids").rename_column("completion_ids", NAME)

    def cut(rows: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        pairs = zip(rows["prompt_ids"], rows[NAME])
        return {NAME: [ids[: max_length and max(max_length - len(prompt), 1)] for prompt, ids in pairs]}

    both = datasets.concatenate_datasets([rows, mismatched.flatten_indices()], axis=1)
    return both.map(cut, batched=True, desc="Completions of other prompts")


def reference_point(engine: Engine, window: list[Micro]) -> None:
    """Give the batches of a window z0 = max(0, mean of log pi - log ref over the mismatched completions of all ranks).

    apo_zero_unpaired has z0 = 0, and none of them is read.
    """
    recipe: Any = engine.recipe
    total = torch.zeros(2, dtype=torch.float64, device=engine.accelerator.device)
    live = engine.reference
    for batch, real in window if recipe.loss.loss_type != "apo_zero_unpaired" else []:
        other: Any = batch.other
        other = other.to(engine.accelerator.device)
        ref = other.ref_logps if live is None else live(other)
        ratio = reference_logps(engine.model, other, engine.head_options).double() - ref
        total += real * torch.stack([ratio.sum(), torch.full_like(ratio, 1.0).sum()])
    summed: Any = engine.accelerator.reduce(total, "sum")
    for batch, _ in window:
        batch.shared = {"kl": max(summed[0].item() / max(summed[1].item(), 1.0), 0.0)}


def class_weights(rows: datasets.Dataset, recipe: KtoRecipe) -> tuple[KtoRecipe, str]:
    """The recipe with the weights to train with, and the sentence that says how the classes stand."""
    loss, labels = recipe.loss, np.asarray(rows["label"][:], dtype=bool)
    good, bad = int(labels.sum()), int((~labels).sum())
    said = f"{good:,} desirable and {bad:,} undesirable rows"
    if not good or not bad:
        return recipe, f"warning: {said}: one class alone says only what to raise or what to lower"
    ratio = loss.desirable_weight * good / (loss.undesirable_weight * bad)
    if LEAST <= ratio <= MOST:
        return recipe, f"{said}, weighed {ratio:.3g} to 1: in [1, 1.33], as the paper advises"
    if not loss.balance_classes:
        way = "set desirable_weight and undesirable_weight, or balance_classes"
        return recipe, f"warning: {said}, weighed {ratio:.3g} to 1, outside [1, 1.33]: {way}"
    good, bad = max(LEAST / ratio, 1.0) * loss.desirable_weight, max(ratio / MOST, 1.0) * loss.undesirable_weight
    loss = dataclasses.replace(loss, desirable_weight=good, undesirable_weight=bad)
    weights = f"desirable_weight {loss.desirable_weight:.4g}, undesirable_weight {loss.undesirable_weight:.4g}"
    return dataclasses.replace(recipe, loss=loss), f"{said}, weighed {ratio:.3g} to 1: balanced with {weights}"


KTO = Algorithm(
    "kto", "unpaired", collate_labels, sequences, kto_loss, refers=always, rows=with_mismatched,
    settle=class_weights, prepare=reference_point, made_up={"kl": 0.0},
)  # fmt: skip
