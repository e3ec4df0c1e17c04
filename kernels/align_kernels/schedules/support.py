"""Which rows share a block of columns: those whose blocks together cost the least.

A block keeps the columns that any of its rows needs to lose no more than `drop_mass`. So rows are ordered by the number
of columns that they need, and cut where the products of all blocks come to the least: a few rows that need many columns
then spoil no others, and run dense where that is cheaper. (The entropy orders badly: 0.99 on one column and the rest on
thousands looks narrow.)

What a row needs is estimated from every sixteenth run of columns. What a row drops is many small probabilities, which a
sample tells well; few large ones it misses, and rows that need few columns share blocks anyway. The estimate decides
which rows go together and with which columns a block begins; its bound is then held by exact sums.

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
from align_kernels.backends.state import MAX, SUM, SUM_X
from align_kernels.schedules.aliasing import Store
from align_kernels.schedules.request import MOST_COLUMNS
from align_kernels.schedules.sharded import total
from align_kernels.schedules.tiles import Chunk, TiledHead

RUN = 16  # columns that lie side by side: a cache line of float32
EVERY = 16  # one run in so many
LEAST_SAMPLE = 1024  # columns, or all that there are
EACH, EACH_GPU = 0.1, 150  # as long as the products of so many rows takes a block by itself: estimated
EXTRA_ROWS = 16  # as long as the products of so many rows takes the gathering of a block's columns, on a CPU
EXTRA_ROWS_GPU = 1600  # 26 bytes a weight at 3 TB/s beside products at 730 TFLOP/s: estimated
PIECES = 128  # in which a block's rows may be cut, where it has as many
STEPS = 4  # levels in which a probability halves
LEVELS = 20 * STEPS  # before a row is given up
ROUNDING = 2.0**-20  # of a probability mass in float32; a smaller drop_mass keeps every column


class Support(NamedTuple):
    """What a sample tells of rows that may be compacted."""

    columns: Tensor  # (m,) estimated number that a row needs
    level: Tensor  # (m,) int64: it keeps p >= drop_mass / 2^(level / STEPS)
    sample: Tensor  # (m, S) uint8: from which level on a row keeps a column
    size: int  # of the sample, on all ranks
    group: dist.ProcessGroup | None

    def blocks(self, most: int) -> Iterator[tuple[Tensor, bool]]:
        """All rows in blocks of at most `most`: their places (int64), and whether the block runs dense."""
        cpu, piece = self.columns.device.type == "cpu", max(most // PIECES, 1)
        apart = (EACH, EXTRA_ROWS) if cpu else (EACH_GPU, EXTRA_ROWS_GPU)
        for places in self.columns.argsort(stable=True).split(2 * most):
            ends = [*range(piece, len(places), piece), len(places)]
            for begin, end, dense in cheapest(self._shares(places, piece), ends, most, *apart):
                yield places[begin:end], dense

    def _shares(self, places: Tensor, piece: int) -> Tensor:
        """[m, m]: the share of columns that pieces i .. j of the rows together need, at [j, i]."""
        needed = self.sample[places] <= self.level[places][:, None]
        if piece > 1:
            needed = torch.stack([part.any(0) for part in needed.split(piece)])
        m = len(needed)
        number = torch.arange(1, m + 1, device=places.device)[:, None]
        last = torch.where(needed, number, 0).cummax(0).values  # of the rows so far that need a column
        counts = torch.bincount((last + (number - 1) * (m + 1)).view(-1), minlength=m * (m + 1)).view(m, m + 1)
        return total(counts.flip(1).cumsum(1).flip(1)[:, 1:].double(), self.group) / self.size


def cheapest(shares: Tensor, ends: list[int], most: int, each: float, extra: int) -> list[tuple[int, int, bool]]:
    """Pieces of rows, with these `ends`, put together into blocks of at most `most` rows whose products cost the least,
    where a block costs as much as `each` rows and its columns as `extra`: begin, end and whether it runs dense.
    `shares` [m, m] holds the share of columns of pieces i .. j at [j, i]."""
    edges = torch.tensor([0, *ends], dtype=torch.float64)
    shares, sizes = shares.cpu(), edges[1:, None] - edges[:-1]
    price = torch.where(shares > MOST_COLUMNS, sizes, torch.minimum(each + shares * (sizes + extra), sizes))
    dense, price = price == sizes, torch.where(sizes > most, torch.inf, price)
    best, first = torch.zeros(len(edges), dtype=torch.float64), []
    for j in range(len(ends)):
        best[j + 1], place = (best[: j + 1] + price[j, : j + 1]).min(0)
        first.append(int(place))
    cuts, j = [], len(ends)
    while j:
        i = first[j - 1]
        cuts.append((int(edges[i]), ends[j - 1], bool(dense[j - 1, i])))
        j = i
    return cuts[::-1]


def levels(log_p: Tensor, drop_mass: float) -> Tensor:
    """0 for p >= drop_mass, j for what lies in the j-th of the STEPS in which p halves, LEVELS + 1 below all."""
    return ((math.log2(drop_mass) - log_p / math.log(2)) * STEPS).ceil_().clamp_(0, LEVELS + 1)


def first_level(mass: Tensor, minus: Tensor, entropy: Tensor | None, tau: float) -> Tensor:
    """The first level at which a row drops no more than tau, LEVELS + 1 where none is, from the mass and the sum of
    -p log p [m, LEVELS + 2] of each; `entropy` [m], where the error of its gradient is bounded too."""
    dropped, minus = (x.flip(1).cumsum(1).flip(1)[:, 1:] for x in (mass, minus))  # beyond each level
    fits = dropped <= tau
    if entropy is not None:
        H, eps = entropy[:, None], math.log(tau) - math.log(2) / STEPS * torch.arange(LEVELS + 1, device=mass.device)
        fits &= (minus - H * dropped <= tau) & (eps + H <= 0)
    return torch.where(fits.any(1), fits.int().argmax(1), LEVELS + 1)


def suffices(tiled: TiledHead, whole: Tensor, kept: Tensor, tau: float, eps: Tensor, entropy: bool) -> Tensor:
    """Whether the columns that were folded into `kept` [m, 8], all whose p reaches eps [m] in a row, are enough for
    it: bool [m]."""
    m, s, a = (kept[:, column] for column in (MAX, SUM, SUM_X))
    log_p = torch.where(s > 0, m - whole[:, MAX] - whole[:, SUM].log(), -torch.inf)
    share = log_p.exp()
    minus = torch.where(s > 0, (a + s * log_p) * share, 0.0)
    mass, minus_entropy = total(torch.stack((s * share, minus)), tiled.group)
    delta = 1.0 - mass
    fits = delta <= tau - ROUNDING
    if entropy:
        # every dropped p lies below eps: with eps <= exp(-H) all terms p (log p + H) have one sign
        H = states.entropy(whole)
        dropped = H + minus_entropy - H * delta
        fits &= (dropped <= tau - ROUNDING * (1.0 + H)) & (eps.log() + H <= 0)
    return fits


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
    sums = torch.zeros(3, len(rows), LEVELS + 2, device=rows.device)  # columns, mass, -sum p log p of each level
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
    level = first_level(mass, minus, states.entropy(whole).float() if entropy else None, tau)
    return Support(count.cumsum(1).gather(1, level[:, None])[:, 0], level, sample, size, tiled.group)
