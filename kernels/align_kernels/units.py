"""Where a batch may be cut, and the value and derivative of a loss with respect to the log-probs of a piece."""

from __future__ import annotations

import dataclasses
from ast import literal_eval
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from align_kernels.backends.state import read
from align_kernels.losses.gate import ProbGate
from align_kernels.losses.registry import PAIRED, Level, Loss, Unit, find
from align_kernels.sums import add_at, positions, read_back, take_at


def keep_rows(targets: Tensor, ignore_index: int) -> Tensor:
    """Positions that have a target: prompt, padding and ignored rows never meet the head."""
    return read_rows(targets != ignore_index)[0]


def read_rows(mask: Tensor, *numbers: Tensor) -> tuple[Tensor, list[int]]:
    """Where the mask [N] is true, and whole numbers of the device, for which it is waited once."""
    count, *rest = read_back(torch.cat([x.reshape(-1).long() for x in (mask.sum(), *numbers)]))
    return positions(mask, count), rest


def spread(values: Sequence[Tensor], targets: Tensor, ignore_index: int) -> list[Tensor]:
    """Numbers of all targets [M], from those of a head's rows: [M] already, or [N] of those that are kept."""
    flat = targets.reshape(-1)
    if len(values[0]) == len(flat):
        return list(values)
    return [x.new_zeros(len(flat)).masked_scatter(flat != ignore_index, x) for x in values]


class LossCall(NamedTuple):
    """A loss as it is called. Beside its tensors it travels as text through torch.library, which takes no objects."""

    loss: Loss  # with the unit of this call
    hyper: Mapping[str, Any] = {}
    gate: ProbGate | None = None
    given: tuple[str, ...] = ()  # the side tensors of this call; `PAIRED` among them says who is paired with whom

    @property
    def with_entropy(self) -> bool:
        """Whether the loss is differentiated through entropies too."""
        return "entropy" in self.loss.needs and bool(self.hyper.get("entropy_coef"))

    @property
    def sparse(self) -> bool:
        return self.loss.sparse or self.gate is not None

    def paired(self, side: Sequence[Tensor]) -> Tensor | None:
        """[2, P] the sequences that are paired, where they are not halves."""
        return dict(zip(self.given, side)).get(PAIRED)

    def plain(self) -> LossCall:
        """With hyper-parameters that are words, flags, None and finite floats.

        Raises:
            ValueError: one that is not finite.
        """
        gate = None if self.gate is None else ProbGate(float(self.gate.p_hi), float(self.gate.power))
        return self._replace(hyper={name: plain(name, value) for name, value in self.hyper.items()}, gate=gate)

    def encode(self) -> str:
        """As text, of a call that is `plain`."""
        # repr and literal_eval rather than JSON: torch.compile traces repr of constants
        gate = None if self.gate is None else (self.gate.p_hi, str(self.gate.power))
        return repr((self.loss.name, self.loss.unit, dict(self.hyper), gate, self.given))

    @staticmethod
    def decode(text: str) -> LossCall:
        name, unit, hyper, gate, given = literal_eval(text)
        gate = None if gate is None else ProbGate(*map(float, gate))
        return LossCall(find(name)._replace(unit=unit), hyper, gate, given)


def plain(name: str, value: Any) -> Any:
    """A hyper-parameter: words, flags and None as they are, tuples of such, anything else as a finite float."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, tuple | list):
        return tuple(plain(name, x) for x in value)
    value = float(value)
    if not isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def cut(begin: int, end: int, size: int, even: bool) -> Iterator[tuple[int, int]]:
    """The fewest pieces of at most `size` that hold begin .. end: of about one size, or of `size` and a last one."""
    count = -(-(end - begin) // size)
    for i in range(count):
        if even:
            yield begin + (end - begin) * i // count, begin + (end - begin) * (i + 1) // count
        else:
            yield begin + size * i, min(begin + size * (i + 1), end)


Span = tuple[int, int, int, int]  # of a group of units: first unit, end unit, first row, end row


class Units:
    """Where a batch may be cut: kept rows in the order of their units, and the units' sizes."""

    def __init__(
        self, unit: Unit, targets: Tensor, ignore_index: int, pairs: Tensor | None = None, wrong: Tensor | None = None
    ) -> None:
        """`wrong`: a bool of the device that is read with the sizes."""
        self.unit, self.pairs, self.tied = unit, pairs, None
        sequences, length = (1, targets.shape[0]) if targets.dim() == 1 else targets.shape
        mask = targets.reshape(sequences, length) != ignore_index
        self.sequences, self.size = sequences, targets.numel()
        # rows of each unit; a token is its own unit, whose sizes are all one and need no count
        sizes = mask.sum(1)
        if unit == "pair":
            if pairs is not None:
                self.tied = tied(pairs, sequences)
                self.count = int(self.tied.max()) + 1 if sequences else 0
                sizes = add_at(sizes.new_zeros(self.count), self.tied, sizes)
            elif sequences % 2:
                raise ValueError(
                    f"pairs need an even number of sequences (chosen half, rejected half), got {sequences}"
                )
            else:
                self.count = sequences // 2
                sizes = sizes.view(2, self.count).sum(0)
        elif unit == "sequence":
            self.count = sequences
        elif unit == "batch":
            self.count, sizes = 1, sizes.sum(0, keepdim=True)
        else:
            sizes = sizes[:0]
        flag = sizes.new_zeros(1) if wrong is None else wrong
        kept, (found, *counts) = read_rows(mask.reshape(-1), flag, sizes)
        self.wrong, self.sizes = bool(found), None if unit == "token" else counts
        sequence, order = kept // max(length, 1), torch.arange(len(kept), device=kept.device)
        if unit == "token":
            self.count = len(kept)
        elif unit == "pair":
            pair = sequence % max(self.count, 1) if self.tied is None else self.tied[sequence]
            order = torch.argsort(pair, stable=True)
            kept, sequence = kept[order], sequence[order]
        self.kept, self.order, self.sequence = kept, order, sequence

    def rows(self, size: int) -> Tensor:
        """Where the kept rows lie in a head of so many: one for every position, or for those that are kept alone."""
        return self.kept if size == self.size else self.order

    @property
    def largest(self) -> int:
        return 1 if self.sizes is None else max(self.sizes, default=0)

    def groups(self, capacity: int, most: int, even: bool) -> Iterator[Span]:
        """(first unit, end unit, first row, end row): runs of whole units, or one unit. The first has at most `most`
        rows, the others `capacity`; `even`: groups of tokens are of about one size."""
        if self.sizes is None:
            n = len(self.kept)
            begin = min(n, most) if most > capacity else 0
            if begin:
                yield 0, begin, 0, begin
            for span in cut(begin, n, capacity, even):
                yield *span, *span
            return
        first = begin = end = 0
        for unit, size in enumerate(self.sizes):
            if end > begin and end - begin + size > most:
                yield first, unit, begin, end
                first, begin, most = unit, end, capacity
            end += size
        if first < self.count:
            yield first, self.count, begin, end

    def segments(self, u0: int, u1: int, r0: int, r1: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """The sequences of a group [S] (chosen, then rejected, of halves), each row's place among them [n], and where
        pairs are named the places of the chosen and of the rejected of the group's pairs [2P]."""
        device, ends = self.kept.device, self.pairs
        if self.unit == "batch":
            u0, u1 = 0, self.sequences
        ids = torch.arange(u0, u1, device=device)
        if self.tied is not None and ends is not None:
            inside = (self.tied >= u0) & (self.tied < u1)
            ids, ends = inside.nonzero()[:, 0], ends[:, inside[ends[0]]]
        elif self.unit == "pair":
            half = self.sequences // 2
            ids = torch.cat((ids, ids + half))
        place = torch.zeros(self.sequences, dtype=torch.int64, device=device)
        place[ids] = torch.arange(len(ids), device=device)
        return ids, place[self.sequence[r0:r1]], None if ends is None else place[ends.reshape(-1)]


def tied(pairs: Tensor, sequences: int) -> Tensor:
    """[S] the unit of each sequence: those that pairs tie together, through others too, are closed in one."""
    first, before = torch.arange(sequences, device=pairs.device), None
    while before is None or not first.equal(before):
        before, low = first, torch.minimum(*first[pairs])
        first = first.scatter_reduce(0, pairs.reshape(-1), low.repeat(2), "amin")
    return first.unique(return_inverse=True)[1]


class Fields(NamedTuple):
    """What a loss may read of its rows, [n] each."""

    logp: Tensor
    entropy: Tensor
    log_sum_sq_probs: Tensor

    @staticmethod
    def of(fields: tuple[Tensor, ...]) -> Fields:
        """From the fields of log-probs, in float64: what a sum of 1e5 loses in float32, a loss of its exp sees."""
        logp, entropy, _, log_sum_sq_probs = fields[:4]
        return Fields(logp.double(), entropy.double(), log_sum_sq_probs.double())


class Coefficients(NamedTuple):
    """The loss of a group of units and its derivative."""

    value: Tensor  # ()
    sums: Tensor  # (M,) of the loss's metrics
    g: Tensor  # (n,) dL/dlogp
    g_entropy: Tensor | None  # (n,) dL/dentropy


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of a call over its units: `scale` times the sum of its values."""

    call: LossCall
    units: Units
    side: Sequence[Tensor]  # of call.given
    scale: Tensor  # () float64
    derive: bool  # whether anything needs a gradient

    def values(self, span: Span, fields: Fields) -> tuple[Tensor, dict[str, Tensor]]:
        """The values of a group's loss and of its metrics, float64."""
        (u0, u1, r0, r1), call, units = span, self.call, self.units
        loss = call.loss
        logp = fields.logp if call.gate is None else call.gate(fields.logp)
        entropy = fields.entropy if call.with_entropy else fields.entropy.detach()
        found = {"logps": logp, "entropy": entropy, "log_sum_sq_probs": fields.log_sum_sq_probs.detach()}
        ids, place, ends = units.segments(u0, u1, r0, r1) if loss.unit != "token" else (None, None, None)

        def total(x: Tensor) -> Tensor:
            assert ids is not None and place is not None
            return paired(add_at(x.new_zeros(len(ids)), place, x))

        def paired(x: Tensor) -> Tensor:
            return x if ends is None else take_at(x, ends)

        if place is not None:
            if loss.per != "token":
                found = {name: total(x) for name, x in found.items()}
            found |= {"lengths": total(torch.ones_like(logp)), "sequence": place}

        def pick(level: Level, value: Tensor) -> Tensor:
            if level in ("token", "sum"):
                value = value.reshape(-1)[units.kept[r0:r1]]
            elif level == "sequence":
                value = paired(value[ids])
            value = value.double() if value.is_floating_point() else value
            return total(value * logp) if level == "sum" else value

        given = {name: value for name, value in zip(call.given, self.side) if name != PAIRED}
        kwargs = {name: found[name] for name in loss.needs if name in found}
        kwargs |= {name: pick(loss.side[name], value) for name, value in given.items()}
        return loss.fn(found["logps"], **kwargs, **call.hyper)

    def sums(self, metrics: dict[str, Tensor], like: Tensor) -> Tensor:
        """[M], in the order of the loss; 0 for what this call does not measure."""
        names = self.call.loss.metrics
        sums = [metrics[name].detach().sum() if name in metrics else like.new_zeros(()) for name in names]
        return torch.stack(sums) if sums else like.detach().new_zeros(0)

    def coefficients(self, span: Span, state: Tensor, targets: Tensor, vocab: int) -> Coefficients:
        """Of a group from its rows' finished state [n, 8] and targets [n]: the one derivative, on n floats of
        float64."""
        fields = Fields.of(read(state, targets, vocab))
        derive, bonus = self.derive and len(targets) > 0, self.call.with_entropy
        with torch.set_grad_enabled(derive):
            logp = fields.logp.detach().requires_grad_(derive)
            entropy = fields.entropy.detach().requires_grad_(derive and bonus)
            values, metrics = self.values(span, fields._replace(logp=logp, entropy=entropy))
            total = values.sum() * self.scale
            wanted = [logp, entropy] if bonus else [logp]
            if derive:
                found = torch.autograd.grad(total, wanted, materialize_grads=True)
            else:
                found = [torch.zeros_like(x) for x in wanted]
        return Coefficients(total.detach(), self.sums(metrics, total), found[0], found[1] if bonus else None)


def loss_late(
    fields: Sequence[Tensor], targets: Tensor, side: list[Tensor], num_items: Tensor, call: LossCall, ignore_index: int
) -> tuple[Tensor, ...]:
    """What `autograd.FusedLoss` returns, from the fields of a head's log-probs, by autograd."""
    fields = spread(fields, targets, ignore_index)
    units = Units(call.loss.unit, targets, ignore_index, call.paired(side))
    logp, entropy, _, _, mean_logit, correct = fields[:6]
    objective = Objective(call, units, side, 1.0 / num_items, derive=True)
    rows = Fields.of(tuple(x[units.kept] for x in fields[:4]))
    values, metrics = objective.values((0, units.count, 0, len(units.kept)), rows)
    sums = objective.sums(metrics, values).to(logp.dtype)
    total = (values.sum() / num_items).to(logp.dtype)
    return total, sums, logp.detach(), entropy.detach(), mean_logit, correct
