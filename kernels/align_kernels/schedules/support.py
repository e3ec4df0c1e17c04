"""Which rows share a block of columns: those that need like numbers of them to lose no more than `drop_mass`.

A block keeps the columns that any of its rows needs. So rows are ordered by that number and cut into blocks, which
are halved where that saves products: a few rows that need many columns then spoil no others, and run dense where that
is cheaper. (The entropy orders badly: 0.99 on one column and the rest on thousands looks narrow.)

The numbers are estimated from every sixteenth run of columns. What a row drops is many small probabilities, which a
sample tells well; few large ones it misses, and rows that need few columns share blocks anyway. The estimate decides
only which rows go together: the columns of a block are then chosen, and its bound is held, by exact sums.

Letters: m rows, S columns of the sample, V columns on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from align_kernels.backends import state as states
from align_kernels.backends import torch_ops
from align_kernels.backends.state import MAX, SUM
from align_kernels.schedules.aliasing import Store
from align_kernels.schedules.request import MOST_COLUMNS
from align_kernels.schedules.sharded import total
from align_kernels.schedules.tiles import Chunk, TiledHead

RUN = 16  # columns that lie side by side: a cache line of float32
EVERY = 16  # one run in so many
LEAST_SAMPLE = 1024  # columns, or all that there are
LEAST_ROWS = 4  # of a block
EXTRA_ROWS = 16  # as long as the products of so many rows takes the gathering of a block's columns
GAIN = 0.05  # of a block's dense products, that halving it must save
HALVINGS = 20  # of eps, before a row is given up


class Support(NamedTuple):
    """What a sample tells of rows that may be compacted."""

    columns: Tensor  # (m,) estimated number that a row needs
    level: Tensor  # (m,) int64: it keeps p >= drop_mass / 2^level
    sample: Tensor  # (m, S) uint8: from which level on a row keeps a column
    size: int  # of the sample, on all ranks

    group: dist.ProcessGroup | None

    def blocks(self, most: int) -> Iterator[tuple[Tensor, bool]]:
        """All rows in blocks of at most `most`: their places (int64), and whether the block runs dense."""
        for places in self.columns.argsort(stable=True).split(most):
            for block, price in self._halved(places):
                yield block, price == len(block)

    def _halved(self, places: Tensor) -> list[tuple[Tensor, float]]:
        """Blocks, each with the number of dense rows that cost as much."""
        whole, gain = self._price(places), GAIN * len(places)
        if whole > gain and len(places) >= 2 * LEAST_ROWS:
            halves = [block for half in places.tensor_split(2) for block in self._halved(half)]
            if sum(price for _, price in halves) < whole - gain:
                return halves
        return [(places, whole)]

    def _price(self, places: Tensor) -> float:
        kept = (self.sample[places] <= self.level[places].max()).any(0).sum()
        share = int(total(kept, self.group)) / self.size
        return len(places) if share > MOST_COLUMNS else min(share * (len(places) + EXTRA_ROWS), len(places))


def levels(log_p: Tensor, drop_mass: float) -> Tensor:
    """0 for p >= drop_mass, j for p from drop_mass / 2^j to drop_mass / 2^(j - 1), HALVINGS + 1 below all."""
    return (math.log2(drop_mass) - log_p / math.log(2)).ceil_().clamp_(0, HALVINGS + 1)


def _sample(V: int, device: torch.device) -> Tensor:
    """The columns that are looked at, int64 ascending."""
    every = max(min(EVERY, V // LEAST_SAMPLE), 1)
    columns = torch.arange(V, device=device)
    return columns[columns // RUN % every == every // 2]


def estimate(tiled: TiledHead, chunk: Chunk, state: Tensor, store: Store, rows: Tensor, *, entropy: bool) -> Support:
    """Of some rows [m] of a chunk, whose raw logits are in `store`; `entropy` bounds its gradient's error as well."""
    n, V, tau = len(chunk.targets), tiled.head.weight.shape[0], tiled.settings.drop_mass
    some, part, whole = _sample(V, rows.device), chunk.select(rows), state[rows]
    log_sum = (whole[:, MAX] + whole[:, SUM].log()).float()[:, None]
    sums = torch.zeros(3, len(rows), HALVINGS + 2, device=rows.device)  # columns, mass, -sum p log p of each level
    sample = torch.empty(len(rows), len(some), dtype=torch.uint8, device=rows.device)
    for v0, v1 in tiled.tiles():
        begin, end = torch.searchsorted(some, torch.tensor([v0, v1], device=some.device)).tolist()
        columns = some[begin:end]
        common = tiled.common(part, v0, v1)
        common["bias"] = None if tiled.bias is None else tiled.bias[columns]
        z = store.tile(n, v0, v1).index_select(1, columns - v0)[rows]
        log_p = torch_ops.raw_to_logits(z, torch.float32, common)[0] - log_sum
        level = levels(log_p, tau)
        sample[:, begin:end] = level
        p = log_p.exp()
        for i, x in enumerate((torch.ones_like(p), p, -p * log_p)):
            sums[i].scatter_add_(1, level.long(), x)
    size = int(total(torch.tensor(len(some), device=rows.device), tiled.group))
    count, mass, minus = total(sums, tiled.group) * (tiled.vocab / size)
    dropped = mass.flip(1).cumsum(1).flip(1)[:, 1:]  # beyond each level
    fits = dropped <= tau
    if entropy:
        H = states.entropy(whole).float()[:, None]
        eps = math.log(tau) - math.log(2) * torch.arange(HALVINGS + 1, device=rows.device)
        fits &= (minus.flip(1).cumsum(1).flip(1)[:, 1:] - H * dropped <= tau) & (eps + H <= 0)
    level = torch.where(fits.any(1), fits.int().argmax(1), HALVINGS + 1)
    return Support(count.cumsum(1).gather(1, level[:, None])[:, 0], level, sample, size, tiled.group)
