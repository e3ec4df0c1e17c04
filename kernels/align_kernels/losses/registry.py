"""The table of losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from torch import Tensor

Unit = Literal["token", "sequence", "pair", "batch"]
LOSSES: dict[str, Loss] = {}


class Loss(NamedTuple):
    """A loss with what a schedule must know of it.

    `fn(logps, **side, **hyper) -> (loss per unit, {metric: value per unit})`; with `entropy=True` it also takes
    `entropy=`, at the level of logps, and may be differentiated through it; with `lengths=True` the number of tokens of
    each sequence; with `tokens=True` logps, values and metrics are one per token [n], and `sequence=` [n] says which of
    the sequences a token belongs to. `sparse`: many tokens may have a derivative of exactly zero.
    """

    name: str
    fn: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    unit: Unit
    side: Mapping[str, str] = {}
    metrics: tuple[str, ...] = ()
    entropy: bool = False
    lengths: bool = False
    tokens: bool = False
    sparse: bool = False


def loss(unit: Unit, **traits) -> Callable:
    """Register a pure function as the loss of its name."""

    def register(fn: Callable) -> Callable:
        LOSSES[fn.__name__] = Loss(fn.__name__, fn, unit, **traits)
        return fn

    return register
