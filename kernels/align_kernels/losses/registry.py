"""The table of losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from torch import Tensor

Unit = Literal["token", "sequence", "pair", "batch"]
Level = Literal["token", "sum", "sequence", "batch"]
LOSSES: dict[str, Loss] = {}


class Loss(NamedTuple):
    """A loss with what a schedule must know of it.

    `fn(logps, **needs, **side, **hyper) -> (values, {metric: values})`, one value per `per`: a token, a sequence or a
    pair. A loss per token reads log-probs of tokens [n]; the others read their sums over sequences [S], of pairs the
    chosen half before the rejected half.
    """

    name: str
    fn: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    per: Unit
    unit: Unit  # the smallest piece of a batch at which its values are closed; a call may ask for a coarser one
    # tensors of the call, each at a level; those that a call leaves out are not passed on
    #     token     one per token [n]
    #     sum       a weight per token: the loss reads the sum of weight * log-prob of each sequence [S]
    #     sequence  one per sequence [S]
    #     batch     as it is
    side: Mapping[str, Level] = {}
    metrics: tuple[str, ...] = ()
    # what is made from the batch
    #     lengths           [S] tokens of each sequence (of a loss per token: where its unit is coarser than a token)
    #     sequence          [n] which of the sequences a token belongs to (likewise)
    #     entropy           at the level of logps; differentiated where the hyper-parameter entropy_coef is not 0
    #     log_sum_sq_probs  at the level of logps, log sum p^2, without gradient
    needs: tuple[str, ...] = ()
    sparse: bool = False  # many tokens may have a derivative of exactly zero


def loss(per: Unit, *, unit: Unit | None = None, **traits) -> Callable:
    """Register a pure function as the loss of its name.

    Raises:
        ValueError: a name that another function has; the same one again, as a reloaded module brings it, is taken.
    """

    def register(fn: Callable) -> Callable:
        taken = LOSSES.get(fn.__name__)
        if taken is not None and _place(taken.fn) != _place(fn):
            raise ValueError(
                f"the loss name {fn.__name__!r} is taken by {'.'.join(_place(taken.fn))}: give {'.'.join(_place(fn))} "
                "another name"
            )
        LOSSES[fn.__name__] = Loss(fn.__name__, fn, per, unit or per, **traits)
        return fn

    return register


def _place(fn: Callable) -> tuple[str, str]:
    return fn.__module__, fn.__qualname__
