"""What an algorithm is: a row of the table in `align_engine.algorithms`. The engine does the rest."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from align_engine.data.batches import Batch
from align_kernels import LossOutput
from align_kernels.arguments import OPTIONS

Kind = Literal["sft", "preference", "unpaired", "prompt"]  # of rows, as align_engine.data.tokenize.prepare names it
Columns = dict[str, Tensor]  # of a rollout, [R, T]


def _as_they_are(rows: Any, recipe: Any) -> Any:
    return rows


def _as_it_is(rows: Any, recipe: Any) -> tuple[Any, str]:
    return recipe, ""


def _nothing(model: Any, recipe: Any, pad_id: int) -> None:
    pass


def _never(recipe: Any) -> bool:
    return False


@dataclass(frozen=True)
class Algorithm:
    """What it learns from, what it counts, and its loss. Recipes are those of the algorithm's own class."""

    name: str
    kind: Kind
    collate: Callable[..., Batch]  # (rows, pad id)
    count: Callable[[Batch, Any], int]  # (batch, recipe) -> units in a batch, which the loss is a mean over
    loss: Callable[..., LossOutput]  # (hidden [B, T, D] or [N, D], the rest by name: see `keywords`)
    named_pairs: bool = False  # of preferences: the loss reads `pairs`, so that a row may have several answers
    # of the rows, once they are tokenised
    rows: Callable[[Any, Any], Any] = _as_they_are  # (rows, recipe) -> rows with what else the loss needs of them
    settle: Callable[[Any, Any], tuple[Any, str]] = _as_it_is  # (rows, recipe) -> recipe that suits them, what to say
    # of the model
    scalar: bool = False  # it has a score head: the loss gets scores [B] in place of hidden states and of a head
    dropout: bool = False  # it stays on in training
    extend_model: Callable[[Any, Any, int], None] = _nothing  # (model, recipe, pad id) adds parts that are trained too
    refers: Callable[[Any], bool] = _never  # (recipe) -> whether batches need ref_logps
    # of a window of micro-batches
    prepare: Callable[[Any, list[Any]], None] | None = None  # (engine, window) fills `shared` of its batches
    made_up: Mapping[str, float] = field(default_factory=dict)  # `shared` of a batch made up to try the loss on
    # of rollouts: (experience, recipe, state of the run) -> columns, metrics. Fixed rows have no advantages
    advantages: Callable[[Any, Any, dict[str, Any]], tuple[Columns, dict[str, Any]]] | None = None
    present_policy: bool = False  # the loss can do without old_logps where the policy has not changed since


@functools.cache
def _names(loss: Callable[..., LossOutput]) -> tuple[tuple[str, ...], bool]:
    """Of the arguments of a loss, and whether it takes the head's one by one."""
    parameters = inspect.signature(loss).parameters.values()
    names = tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
    return names, len(names) < len(parameters)


def keywords(
    loss: Callable[..., LossOutput], head: dict[str, Any], batch: Batch, recipe: Any, num_items: float, **more: Any
) -> dict[str, Any]:
    """What a loss gets beside its hidden states, by the names of its arguments: settings of the recipe's section
    `loss`, tensors of the batch, numbers of its window, `num_items`, `batch`, `recipe`, and `head`, the keywords of the
    head, which `**head` takes one by one. `more` come before all of them."""
    names, spread = _names(loss)
    found = vars(recipe.loss) | vars(batch) | batch.shared
    found |= {"num_items": num_items, "batch": batch, "recipe": recipe, "head": head} | more
    given = {name: found[name] for name in (*names, *OPTIONS.get(loss, ())) if name in found}
    return given | head if spread else given
