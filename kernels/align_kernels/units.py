"""Where a batch may be cut, and the derivative of a loss with respect to the log-probs of a piece."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from align_kernels.losses.registry import Loss


def keep_rows(targets: Tensor, ignore_index: int) -> Tensor:
    """Positions that have a target: prompt, padding and ignored rows never meet the head."""
    return (targets != ignore_index).nonzero()[:, 0]


class Units:
    """Where a batch may be cut: kept rows in the order of their units, and the units' sizes."""

    def __init__(self, loss: Loss, targets: Tensor, ignore_index: int) -> None:
        self.loss = loss
        sequences, length = (1, targets.shape[0]) if targets.dim() == 1 else targets.shape
        flat = targets.reshape(-1)
        kept = keep_rows(flat, ignore_index)
        self.sequences = sequences
        sequence = kept // max(length, 1)
        if loss.unit == "pair":
            if sequences % 2:
                raise ValueError(
                    f"pairs need an even number of sequences (chosen half, rejected half), got {sequences}"
                )
            pair = sequence % (sequences // 2)
            order = torch.argsort(pair, stable=True)
            kept, sequence, unit = kept[order], sequence[order], pair[order]
            self.count = sequences // 2
        elif loss.unit == "sequence":
            unit, self.count = sequence, sequences
        elif loss.unit == "batch":
            unit, self.count = torch.zeros_like(sequence), 1
        else:
            unit, self.count = torch.arange(len(kept), device=kept.device), len(kept)
        self.kept, self.sequence = kept, sequence
        # a token is its own unit: sizes are all one and need no count
        self.sizes = None if loss.unit == "token" else torch.bincount(unit, minlength=self.count).tolist()

    @property
    def largest(self) -> int:
        return 1 if self.sizes is None else max(self.sizes, default=0)

    def groups(self, capacity: int) -> Iterator[tuple[int, int, int, int]]:
        """(first unit, end unit, first row, end row): runs of whole units of at most `capacity` rows, or one unit."""
        if self.sizes is None:
            n = len(self.kept)
            count = -(-n // capacity)
            for i in range(count):
                span = n * i // count, n * (i + 1) // count
                yield *span, *span
            return
        first = begin = end = 0
        for unit, size in enumerate(self.sizes):
            if end > begin and end - begin + size > capacity:
                yield first, unit, begin, end
                first, begin = unit, end
            end += size
        if first < self.count:
            yield first, self.count, begin, end

    def segments(self, u0: int, u1: int, r0: int, r1: int) -> tuple[Tensor, Tensor]:
        """The sequences of a group [S] (chosen, then rejected, of a pair) and each row's place among them [n]."""
        device = self.kept.device
        if self.loss.unit == "batch":
            u0, u1 = 0, self.sequences
        ids = torch.arange(u0, u1, device=device)
        if self.loss.unit == "pair":
            half = self.sequences // 2
            ids = torch.cat((ids, ids + half))
        place = torch.zeros(self.sequences, dtype=torch.int64, device=device)
        place[ids] = torch.arange(len(ids), device=device)
        return ids, place[self.sequence[r0:r1]]

    def side(self, level: str, value: Tensor, u0: int, u1: int, rows: Tensor, ids: Tensor | None) -> Tensor:
        if level == "token":
            return value.reshape(-1)[rows]
        if level == "sequence":
            return value[ids]
        return value[u0:u1] if level == "unit" else value


def unit_values(
    units: Units, hyper: dict, side: dict[str, Tensor], span: tuple[int, int, int, int], logp: Tensor, entropy: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each unit of a group (of each row, for losses that keep tokens apart) and its metrics, from the
    log-probs [n] and entropies [n] of its rows."""
    loss, (u0, u1, r0, r1) = units.loss, span
    kwargs, ids, inputs = dict(hyper), None, [logp, entropy]
    if loss.unit != "token":
        ids, place = units.segments(u0, u1, r0, r1)
        if loss.tokens:
            kwargs["sequence"] = place
        else:
            # float64: a float32 running sum over a long completion loses what a loss of its exp sees
            zero = logp.new_zeros(len(ids), dtype=torch.float64)
            inputs = [zero.index_add(0, place, x.double()).to(x.dtype) for x in inputs]
        if loss.lengths:
            kwargs["lengths"] = torch.bincount(place, minlength=len(ids)).to(logp.dtype)
    if loss.entropy:
        kwargs["entropy"] = inputs[1]
    for name, level in loss.side.items():
        kwargs[name] = units.side(level, side[name], u0, u1, units.kept[r0:r1], ids)
    return loss.fn(inputs[0], **kwargs)


def coefficients(
    units: Units,
    hyper: dict,
    side: dict[str, Tensor],
    span: tuple[int, int, int, int],
    logp: Tensor,
    entropy: Tensor,
    scale: Tensor,
    train: bool,
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor | None]:
    """A group's loss, its metrics' sums, and g = dL/dlogp, dL/dentropy of its rows: the one derivative, on n floats."""
    derive = train and len(logp) > 0
    with torch.set_grad_enabled(derive):
        leaves = [logp.detach().requires_grad_(derive), entropy.detach().requires_grad_(derive and units.loss.entropy)]
        values, metrics = unit_values(units, hyper, side, span, *leaves)
        total = values.sum() * scale
        wanted = leaves if units.loss.entropy else leaves[:1]
        found = torch.autograd.grad(total, wanted) if derive else tuple(torch.zeros_like(x) for x in wanted)
    sums = {k: v.detach().sum() for k, v in metrics.items()}
    return total.detach(), sums, found[0], found[1] if units.loss.entropy else None
