"""What the fused losses share: the call of a registered loss, and its metrics.

Shape letters: B sequences, T positions, P pairs, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from align_kernels import ops
from align_kernels.api import logprobs
from align_kernels.arguments import takes
from align_kernels.autograd import FusedLoss
from align_kernels.dtensor import local
from align_kernels.head import read_head
from align_kernels.losses.family import Family, Function
from align_kernels.losses.gate import ProbGate
from align_kernels.losses.registry import PAIRED, Unit, find
from align_kernels.sums import scalar
from align_kernels.units import LossCall, loss_late

Items = float | Tensor | None
Count = Tensor | int  # tokens, sequences or pairs
Measured = dict[str, tuple[Tensor, Count]]  # name -> (mean, what it is a mean over)
GATE = {"prob_gate": ProbGate | float | None}
of_head = takes(GATE)  # a fused loss and its `**head`


def of_family(family: Family) -> Callable[[Function], Function]:
    """A fused loss whose `**head` takes the options of a family too, those that its signature does not name."""
    return takes(ChainMap(GATE, family.kinds))


def options_of(family: Family, names: Iterable[str], head: dict[str, Any], **given: Any) -> dict[str, Any]:
    """The options of a call of these members, checked: those given, and those in `head`, from where they are taken."""
    given |= {name: head.pop(name) for name in family.kinds if name in head}
    family.check(names, given)
    return given


class LossOutput(NamedTuple):
    """A fused loss: the scalar, TRL's metrics (means over the call), log-probs, and what each metric is a mean over.

    `logps` [B, T] per token for token losses, [B] per sequence for the others; it carries no gradient. `counts` holds
    the tokens, sequences or pairs of each metric, so that means of several calls are sum(mean * count) / sum(count);
    a metric without one (a difference of means, a number of rows) is not a mean.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    logps: Tensor
    counts: dict[str, Tensor | int]


class Fused(NamedTuple):
    """A fused loss before its public face: everything per token, ignored positions 0."""

    loss: Tensor  # []
    measured: Measured  # of the loss, entropy, mean_token_accuracy
    logps: Tensor  # [...]
    mean_logit: Tensor  # [...]
    mask: Tensor  # [...] bool


def run_loss(
    name: str,
    hyper: dict[str, Any],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    side: Mapping[str, Tensor | None],
    num_items: Items,
    head: dict[str, Any],
    *,
    unit: Unit | None = None,
) -> Fused:
    """The registered loss `name` summed and divided by `num_items` (default: its tokens, sequences or pairs in this
    call). `side` may hold `PAIRED`, `head` holds the keywords of `linear_logprobs`, and `prob_gate`; `unit` asks for a
    coarser unit."""
    spec = find(name)
    spec = spec._replace(unit=unit or spec.unit)
    head = dict(head)
    gate = read_gate(head.pop("prob_gate", None))
    targets = local("targets", targets)
    if spec.unit != "token" and targets.dim() != 2:
        raise ValueError(f"{name} needs targets [B, T], one row per sequence, got shape {tuple(targets.shape)}")
    tensors, settings, needs = read_head(hidden, weight, targets, **head)
    if settings.every_row:
        raise ValueError(
            f"{name} looks at the number of rows that have a target, which the capture of a CUDA graph forbids: "
            "capture linear_logprobs, and the loss of its log-probs"
        )
    mask = targets != settings.ignore_index
    tokens = mask.sum()
    count = tokens if spec.per == "token" else len(targets)
    if spec.per == "pair":
        paired = side.get(PAIRED)
        count = len(targets) // 2 if paired is None else paired.shape[1]
    counted = scalar(count, targets.device).clamp(min=1)
    items = scalar(counted if num_items is None else num_items, targets.device).double()
    given = {key: x.detach() for key, x in side.items() if x is not None}
    call = LossCall(spec, spec.read(hyper), gate, tuple(given)).plain()
    sides = list(given.values())
    shaped = targets if targets.dim() == 2 else targets.reshape(-1)
    # torch.func must see the gradient made in the backward
    transformed = torch._C._functorch.maybe_current_level() is not None  # pyright: ignore
    if settings.impl == "eager" or transformed:
        fields = loss_late(logprobs(tensors, settings, needs), shaped, sides, items, call, settings.ignore_index)
    elif ops.opaque(tensors.hidden):
        fields = ops.loss(tensors, shaped, sides, items, call, settings, needs)
    else:
        fields = FusedLoss.apply(*tensors, shaped, items, call, settings, needs, *sides)
    loss, sums, logp, entropy, mean_logit, correct = fields
    measured: Measured = {name: (mean, count) for name, mean in zip(spec.metrics, sums / counted)}
    for name, x in (("entropy", entropy), ("mean_token_accuracy", correct)):
        measured[name] = x.sum() / tokens.clamp(min=1), tokens
    return Fused(loss, measured, logp.reshape(targets.shape), mean_logit.reshape(targets.shape), mask)


def output(loss: Tensor, measured: Measured, logps: Tensor, **others: Tensor) -> LossOutput:
    """What a fused loss returns; `others` are metrics that are no means."""
    means = {name: mean for name, (mean, _) in measured.items()}
    return LossOutput(loss, means | others, logps, {name: count for name, (_, count) in measured.items()})


def read_gate(gate: ProbGate | float | None) -> ProbGate | None:
    if gate is None:
        return None
    return (ProbGate(*gate) if isinstance(gate, tuple) else ProbGate(float(gate))).check()


def kept(targets: Tensor, head: dict[str, Any]) -> Tensor:
    """The mask of the targets that are not ignored."""
    return local("targets", targets) != head.get("ignore_index", -100)


def share(num_items: Items, units: int, counted: Tensor | int, num_counted: Items) -> Tensor:
    """Weight of something that is a mean over `num_counted` (default: those `counted` in this call) beside a loss that
    is a mean over `num_items` (default: its `units` in this call)."""
    items, of = (scalar(own if x is None else x) for x, own in ((num_items, units), (num_counted, counted)))
    return items.double() / of.double().clamp(min=1)


def ends_of(targets: Tensor, pairs: Tensor | None) -> Tensor:
    """[2, P] the sequences that are paired: as named, or the first half of targets [2P, T] with the second."""
    return torch.arange(len(targets), device=targets.device).view(2, -1) if pairs is None else pairs


def class_metrics(out: Fused, chosen: Tensor, rejected: Tensor) -> Measured:
    """logps and logits of sequences that count so many times [B]: means over sequences, and over tokens."""
    measured: Measured = {}
    for word, times in (("chosen", chosen), ("rejected", rejected)):
        inside, times = (times > 0)[:, None] & out.mask, times.long()
        sums = ((x.where(inside, 0.0).sum(1) * times).sum() for x in (out.logps, out.mean_logit))
        sequences, tokens = times.sum(), (inside.sum(1) * times).sum()
        for name, total, count in zip(("logps", "logits"), sums, (sequences, tokens)):
            measured[f"{name}/{word}"] = total / count.clamp(min=1), count
    return measured


def pair_output(out: Fused, pairs: Tensor | None, **more: tuple[Tensor, Count]) -> LossOutput:
    """What a loss of pairs returns."""
    none = torch.zeros(len(out.mask), dtype=torch.int64, device=out.mask.device)
    times = (none.index_add(0, rows, torch.ones_like(rows)) for rows in ends_of(out.mask, pairs))
    return output(out.loss, out.measured | class_metrics(out, *times) | more, out.logps.sum(-1))


# -- checks -------------------------------------------------------------------------------------------------------
def check_shape(name: str, x: Tensor, *shapes: torch.Size) -> None:
    if not any(tuple(x.shape) == tuple(s) for s in shapes):
        wanted = " or ".join(str(tuple(s)) for s in shapes)
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(x.shape)}")


def check_pairs(name: str, targets: Tensor, pairs: Tensor | None = None) -> None:
    shape = tuple(targets.shape)
    if pairs is None:
        if len(shape) != 2 or shape[0] % 2:
            raise ValueError(f"{name} needs targets [2P, T], chosen half then rejected half, got shape {shape}")
        return
    if len(shape) != 2:
        raise ValueError(f"{name} needs targets [B, T], one row per sequence, got shape {shape}")
    if pairs.dtype != torch.int64 or pairs.dim() != 2 or len(pairs) != 2:
        got = f"{pairs.dtype} of shape {tuple(pairs.shape)}"
        raise ValueError(f"pairs must be int64 [2, P], numbers of the chosen and of the rejected sequences, got {got}")
    if not torch.compiler.is_compiling() and bool(((pairs < 0) | (pairs >= shape[0])).any()):
        raise ValueError(f"pairs must lie in [0, {shape[0]}), the number of sequences, got {pairs.tolist()}")


def check_one_of(name: str, value: Any, known: Any) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def check_positive(**values: float | None) -> None:
    """Above 0, or None where that is a value."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
