"""Any registered loss, one's own too, on the path of the others."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from align_kernels.arguments import check_call, check_float
from align_kernels.dtensor import local
from align_kernels.fused.core import (
    Items,
    LossOutput,
    check_one_of,
    check_pairs,
    check_shape,
    of_head,
    output,
    pair_output,
    run_loss,
)
from align_kernels.losses.registry import LOSSES, PAIRED, Loss


@of_head
def fused_loss(
    name: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    side: Mapping[str, Tensor | None] | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    pairs: Tensor | None = None,
    num_items: Items = None,
    **head,
) -> LossOutput:
    """A loss of `register_loss` from hidden states, summed and divided by `num_items`: no logits, and one pass where
    its unit fits in a chunk.

        fused_loss("mine", hidden, weight, targets, {"ref_logps": ref_logps}, {"beta": 0.1}).loss.backward()

    Args:
        name: of the function that was registered.
        hidden: [..., D]; weight: [V, D]; targets: [...] int64, already shifted, -100 where ignored. A loss of sequences
            or pairs, or whose unit is one, takes [B, T, D] and [B, T], of pairs the chosen half first.
        side: its tensors by name: [...] like targets at the levels "token" and "sum", [B] at "sequence", any shape at
            "batch". They carry no gradient. None, or left out: the function's default. Default None: no tensors.
        options: its options by name: words, True or False, None, finite numbers (passed as float) and lists of such.
            Default None: the function's own.
        pairs: [2, P] int64, of a loss of pairs: numbers of the chosen and of the rejected sequence of each pair among
            the B of hidden and targets; one that is in several meets the head once. Default None: halves.
        num_items: the normaliser, one for all micro-batches of a window. Default None: the kept tokens, the sequences
            or the pairs of this call.
        **head: every keyword of `linear_logprobs`, and `prob_gate`, a `ProbGate` or its p_hi.

    Returns:
        LossOutput; logps [...] of a loss per token, else [B]; metrics those that the loss names, entropy,
        mean_token_accuracy, and of pairs logps/chosen, logps/rejected, logits/chosen, logits/rejected.

    Raises:
        ValueError: an unknown loss; a tensor of another shape or device than its level says; an option that is not
            finite; what `linear_logprobs` refuses.
        TypeError: a tensor or an option that the loss does not take, or lacks.
    """
    check_call(fused_loss)
    check_one_of("name", name, LOSSES)
    loss, given = LOSSES[name], {key: local(key, x) for key, x in (side or {}).items() if x is not None}
    if not torch.compiler.is_compiling():
        check_arguments(loss, given, options or {})
    for key, x in given.items():
        level = loss.side[key]
        if level != "batch":
            check_shape(key, x, targets.shape[:1] if level == "sequence" else targets.shape)
        if x.device != hidden.device:
            raise ValueError(f"{key} is on {x.device}, hidden on {hidden.device}: move them to one device")
        if level == "sum":
            check_float(key, x)
    if pairs is not None:
        check_named(loss, targets, pairs)
        given[PAIRED] = pairs
    out = run_loss(name, dict(options or {}), hidden, weight, targets, given, num_items, head)
    if loss.per == "pair":
        return pair_output(out, pairs)
    return output(out.loss, out.measured, out.logps if loss.per == "token" else out.logps.sum(-1))


def check_named(loss: Loss, targets: Tensor, pairs: Tensor) -> None:
    """Refuse pairs by number for a loss that is of no pairs, or reads tokens by the order of halves."""
    check_pairs(loss.name, targets, pairs)
    by_token = [key for key, level in loss.side.items() if level == "token"] + ["sequence"] * ("sequence" in loss.needs)
    if loss.per != "pair" or by_token:
        why = f"it reads {by_token[0]!r} of single tokens" if by_token else f"it is a loss per {loss.per}"
        raise ValueError(f"loss {loss.name!r} takes no pairs: {why}")


def check_arguments(loss: Loss, side: Mapping[str, Tensor], options: Mapping[str, Any]) -> None:
    """Refuse tensors and options that a loss does not take, and the lack of those that it has no default for."""
    known, rest = loss.keywords
    own = [key for key in known if key not in loss.side and key not in loss.needs]
    more = [key for key in options if key not in known] if rest else []
    for what, given, names in (("tensor", side, list(loss.side)), ("option", options, own + more)):
        for key in given:
            if key not in names:
                said = f"it takes {', '.join(names)}" if names else f"it has no {what}s"
                raise TypeError(f"loss {loss.name!r} takes no {what} {key!r}: {said}")
    empty = inspect.Parameter.empty
    lacks = [key for key, default in known.items() if default is empty and key not in {*loss.needs, *side, *options}]
    if lacks:
        raise TypeError(f"loss {loss.name!r} needs {', '.join(lacks)}")
