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
from operator import add
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from align_kernels.backends import state as states
from align_kernels.backends import torch_ops
from align_kernels.backends.arguments import looked_at
from align_kernels.backends.state import MAX, SUM, SUM_X
from align_kernels.schedules.aliasing import Store
from align_kernels.schedules.request import MOST_COLUMNS
from align_kernels.schedules.sharded import total
from align_kernels.schedules.tiles import Chunk, TiledHead

EVERY = 16  # one run in so many
LEAST_SAMPLE = 1024  # columns, or all that there are
EACH, EACH_GPU = 0.1, 90  # as long as the products of so many rows takes a block by itself: estimated
EXTRA_ROWS = 16  # as long as the products of so many rows takes the gathering of a block's columns, on a CPU
EXTRA_ROWS_GPU = 1300  # 22 bytes a weight at 3 TB/s beside products at 730 TFLOP/s: estimated
PIECES, PIECES_GPU = 128, 16  # in which a block's rows may be cut, where it has as many
STEPS = 4  # levels in which a probability halves
LEVELS = 20 * STEPS  # before a row is given up
ROUNDING = 2.0**-20  # of a probability mass in float32; a smaller drop_mass keeps every column


class Support(NamedTuple):
    """What a sample tells of rows that may be compacted."""

    columns: Tensor  # (m,) estimated number that a row needs
    level: Tensor  # (m,) int64: it keeps p >= drop_mass / 2^(level / STEPS)
    sample: Tensor  # (m, S) uint8: from which level on a row keeps a column
    size: Tensor  # () of the sample, on all ranks
    group: dist.ProcessGroup | None

    def blocks(self, most: int) -> tuple[Tensor, list[tuple[int, int, bool]]]:
        """All rows in an order (places, int64), and its cuts into blocks of at most `most`: begin, end and whether the
        block runs dense."""
        cpu, cuts, first = self.columns.device.type == "cpu", [], 0
        pieces, *apart = (PIECES, EACH, EXTRA_ROWS) if cpu else (PIECES_GPU, EACH_GPU, EXTRA_ROWS_GPU)
        piece, order = max(most // pieces, 1), self.columns.argsort(stable=True)
        groups = order.split(2 * most)
        shares = [self._shares(places, piece) for places in groups]
        read = torch.cat([x.view(-1) for x in shares]).cpu().split([x.numel() for x in shares])
        for places, flat, of in zip(groups, read, shares):
            ends = [*range(piece, len(places), piece), len(places)]
            found = cheapest(flat.view_as(of), ends, most, *apart)
            cuts += [(first + begin, first + end, dense) for begin, end, dense in found]
            first += len(places)
        return order, cuts

    def _shares(self, places: Tensor, piece: int) -> Tensor:
        """[m, m]: the share of columns that pieces i .. j of the rows together need, at [j, i]."""
        needed = self.sample[places] <= self.level[places][:, None]
        m = -(-len(places) // piece)
        if missing := m * piece - len(places):
            needed = F.pad(needed, (0, 0, 0, missing))
        needed = needed.view(m, piece, -1).any(1)
        number = torch.arange(1, m + 1, device=places.device)[:, None]
        last = torch.where(needed, number, 0).cummax(0).values  # of the rows so far that need a column
        place = (last + (number - 1) * (m + 1)).view(-1)
        counts = place.new_zeros(m * (m + 1)).scatter_add_(0, place, torch.ones_like(place)).view(m, m + 1)
        return total(counts.flip(1).cumsum(1).flip(1)[:, 1:].double(), self.group) / self.size


def cheapest(shares: Tensor, ends: list[int], most: int, each: float, extra: float) -> list[tuple[int, int, bool]]:
    """Pieces of rows, with these `ends`, put together into blocks of at most `most` rows whose products cost the least,
    where a block costs as much as `each` rows and its columns as `extra`: begin, end and whether it runs dense.
    `shares` [m, m], of a CPU, holds the share of columns of pieces i .. j at [j, i]."""
    edges = torch.tensor([0, *ends], dtype=torch.float64)
    sizes = edges[1:, None] - edges[:-1]
    price = torch.where(shares > MOST_COLUMNS, sizes, torch.minimum(each + shares * (sizes + extra), sizes))
    dense, price = price == sizes, torch.where(sizes > most, torch.inf, price)
    best, first = [0.0], []
    for row in price.tolist():
        prices = list(map(add, best, row))
        best.append(min(prices))
        first.append(prices.index(best[-1]))
    cuts, j = [], len(ends)
    while j:
        i = first[j - 1]
        cuts.append((int(edges[i]), ends[j - 1], bool(dense[j - 1, i])))
        j = i
    return cuts[::-1]


def first_level(mass: Tensor, minus: Tensor, entropy: Tensor | None, tau: float) -> Tensor:
    """The first level at which a row drops no more than tau, LEVELS + 1 where none is, from the mass and the sum of
    -p log p [m, LEVELS + 2] of each; `entropy` [m], where the error of its gradient is bounded too."""

    def beyond(x: Tensor) -> Tensor:
        return x.flip(1).cumsum(1).flip(1)[:, 1:]

    dropped = beyond(mass)
    fits = dropped <= tau
    if entropy is not None:
        H, eps = entropy[:, None], math.log(tau) - math.log(2) / STEPS * torch.arange(LEVELS + 1, device=mass.device)
        fits &= (beyond(minus) - H * dropped <= tau) & (eps + H <= 0)
    return torch.where(fits.any(1), fits.int().argmax(1), LEVELS + 1)


def suffices(tiled: TiledHead, whole: Tensor, kept: Tensor, log_eps: Tensor | None) -> Tensor:
    """Whether the columns that were folded into `kept` [m, 8] are enough for a row: bool [m]. They are all whose log p
    reaches log_eps [m]; None where the entropy has no gradient."""
    log_s, tau = kept[:, SUM].log(), tiled.settings.drop_mass
    log_mass = (kept[:, MAX] + log_s) - (whole[:, MAX] + whole[:, SUM].log())
    mass, least = log_mass.exp(), 1.0 - tau + ROUNDING
    if log_eps is None:
        return total(mass, tiled.group) >= least
    log_p = log_mass - log_s  # of the largest that is kept
    p_log_p = torch.where(kept[:, SUM] > 0, log_p.exp() * kept[:, SUM_X] + mass * log_p, 0.0)
    mass, p_log_p = total(torch.stack((mass, p_log_p)), tiled.group)
    # every dropped p lies below eps: with eps <= exp(-H) all terms p (log p + H) have one sign
    H = states.entropy(whole)
    dropped = H + p_log_p - H * (1.0 - mass)
    return (mass >= least) & (dropped <= tau - ROUNDING * (1.0 + H)) & (log_eps + H <= 0)


def survey(
    tiled: TiledHead, chunk: Chunk, state: Tensor, store: Store, rows: Tensor, every: int, sample: Tensor | None = None
) -> Tensor:
    """[m, LEVELS + 2, 3] float64: number, sum of p and sum of -p log p of the columns of each level of some rows [m],
    in every so many-th run of columns. `sample` [m, S] uint8 takes their levels."""
    n, given = len(chunk.targets), {}
    sums = torch.zeros(len(rows), LEVELS + 2, 3, dtype=torch.float64, device=rows.device)
    own = tiled.backend.survey or torch_ops.survey
    for v0, v1 in tiled.tiles():
        if sample is not None:
            given["sample"] = sample[:, looked_at(v0, every) : looked_at(v1, every)]
        own(
            store.tile(n, v0, v1), state, chunk.targets, rows, sums, first=v0, every=every,
            drop_mass=tiled.settings.drop_mass, steps=STEPS, **given, **tiled.common(chunk, v0, v1),
        )  # fmt: skip
    return sums


def estimate(tiled: TiledHead, chunk: Chunk, state: Tensor, store: Store, rows: Tensor, *, entropy: bool) -> Support:
    """Of some rows [m] of a chunk, whose raw logits are in `store`; `entropy` bounds its gradient's error as well."""
    V, tau = tiled.head.weight.shape[0], tiled.settings.drop_mass
    every = max(min(EVERY, V // LEAST_SAMPLE), 1)
    sample = torch.empty(len(rows), looked_at(V, every), dtype=torch.uint8, device=rows.device)
    sums = total(survey(tiled, chunk, state, store, rows, every, sample), tiled.group)
    size = sums[0, :, 0].sum()
    count, mass, minus = (sums * (tiled.vocab / size)).unbind(2)
    level = first_level(mass, minus, states.entropy(state[rows]) if entropy else None, tau)
    return Support(count.cumsum(1).gather(1, level[:, None])[:, 0], level, sample, size, tiled.group)
