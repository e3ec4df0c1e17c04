"""Each row over its own columns, where the backend has products over lists of them (on a CPU).

A row keeps the columns whose probability reaches its own eps, and its target's. eps is estimated from a sample of the
columns and falls in steps of 2^(1/4) until the exact sums over what is kept hold the bound (compaction.py). The raw
logits of the entries are kept, so that the backward is the backend's own.

Letters: n rows of a chunk, m of them that keep lists, K entries, V columns on this rank, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from align_kernels.backends import ListsOfColumns
from align_kernels.backends import state as states
from align_kernels.backends.arguments import Lists
from align_kernels.schedules.aliasing import Store
from align_kernels.schedules.sharded import total
from align_kernels.schedules.support import LEVELS, STEPS, first_level, suffices, survey
from align_kernels.schedules.tiles import Chunk, Rows, TiledHead

MOST = 0.5  # of the vocabulary: a row that is known to need more runs dense
SLOWER = 4  # times as long as in a dense GEMM takes a product over lists (docs/LOG.md)
PASS = 64  # as long as the products of so many rows takes a pass over W and dW for those that run dense
EVERY = 32  # one run of columns in so many is looked at
LEAST_SAMPLE = 512  # columns, or all that there are
SLACK, LEAST_ROOM = 1.25, 64  # room for entries over those that are expected


class RowLists(NamedTuple):
    """Some rows of a chunk and the columns that each of them takes."""

    rows: Tensor  # (m,) int64
    lists: Lists

    @property
    def size(self) -> int:
        """In logits: a column takes as much room."""
        return 2 * len(self.lists.z)

    def select(self, mask: Tensor) -> RowLists:
        lists = self.lists
        return RowLists(self.rows[mask], lists._replace(begins=lists.begins[mask], ends=lists.ends[mask]))

    def tight(self) -> RowLists:
        """A copy without gaps between the rows' entries."""
        begins, ends, *entries = self.lists
        spans = list(zip(begins.tolist(), ends.tolist()))
        columns, z = (torch.cat([x[:0], *(x[begin:end] for begin, end in spans)]) for x in entries)
        ends = (ends - begins).cumsum(0)
        return RowLists(self.rows, Lists(_begins(ends), ends, columns, z))

    # -- as tensors that autograd can save -------------------------------------------------------------------------
    def values(self) -> Tensor:
        return self.lists.z

    def numbers(self) -> list[Tensor]:
        """Of `tight` lists, int64."""
        columns = self.lists.columns
        pairs = torch.cat((columns, columns.new_zeros(len(columns) % 2))).view(torch.int64)
        return [self.rows, self.lists.ends, pairs]

    @staticmethod
    def again(numbers: Sequence[Tensor], values: Tensor) -> RowLists:
        rows, ends, pairs = numbers
        columns = pairs.view(torch.int32)[: len(values)]
        return RowLists(rows, Lists(_begins(ends), ends, columns, values))

    # -- backward --------------------------------------------------------------------------------------------------
    def products(self, tiled: TiledHead, rows: Rows, consume: bool) -> Tensor | None:
        """Turn the entries into their gradient and multiply: `tiled.grads`, and this rank's dX [m, D]. With `consume`
        the gradient takes their place."""
        chunk, head, needs, grads, own, lists = (
            rows.chunk,
            tiled.head,
            tiled.needs,
            tiled.grads,
            _own(tiled),
            self.lists,
        )
        dz, V = lists.z if consume else torch.empty_like(lists.z), head.weight.shape[0]
        own.backward(
            lists, V, rows.state, chunk.targets, rows.g, rows.g_entropy, clamp=tiled.settings.clamp, out=dz,
            **tiled.common(chunk, 0, V),
        )  # fmt: skip

        def pulled(of: Tensor) -> Tensor:
            out = tiled.zeros(len(self.rows), of.shape[1])
            for first, w in _readable(tiled, of):
                own.pull(out, lists, dz, w, first)
            return out

        dx = pulled(head.weight) if needs.hidden else None
        dxa = None
        if chunk.xa is not None and head.lora_B is not None and (needs.hidden or needs.lora_A):
            dxa = pulled(head.lora_B)
        bias = None if grads.bias is None else grads.bias[:, None]
        ones = tiled.zeros(len(self.rows), 1).fill_(1.0)
        for grad, x in ((grads.weight, chunk.x), (grads.lora_B, chunk.xa), (bias, ones)):
            if grad is not None and x is not None:
                own.push(grad, lists, dz, x, grads.started)
        tiled.add_lora(dx, dxa, chunk.x)
        grads.started = True
        return dx


def _own(tiled: TiledHead) -> ListsOfColumns:
    assert tiled.backend.lists is not None
    return tiled.backend.lists


def _begins(ends: Tensor) -> Tensor:
    """Of lists without gaps."""
    return torch.cat((ends.new_zeros(1), ends))[:-1]


def _readable(tiled: TiledHead, of: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The rows of W or lora_B as `pull` takes them: where they begin, and some of them."""
    if _own(tiled).reads(of):
        yield 0, of
    else:
        for v0, v1 in tiled.tiles():
            yield v0, of[v0:v1].to(tiled.dtype).contiguous()


# -- which columns ------------------------------------------------------------------------------------------------
def choose(
    tiled: TiledHead, chunk: Chunk, state: Tensor, store: Store, rows: Tensor, dense: list[Tensor], room: int,
    *, entropy: bool,
) -> Iterator[RowLists]:  # fmt: skip
    """Lists of some rows [m] of a chunk, whose raw logits are in `store`, those of few columns first, in groups that
    take `room` logits if one row does not take more. Rows that would keep too many are added to `dense`.

    `entropy` bounds the error of the entropy's gradient as well.
    """
    peaked = _may_be_narrow(tiled, state[rows])
    dense.append(rows[~peaked])
    rows = rows[peaked]
    if len(rows) == 0:
        return
    level, needs, mine = _estimate(tiled, chunk, state, store, rows, entropy, EVERY)
    listed, saved = level <= LEVELS, (needs * (SLOWER / tiled.vocab) - 1).clamp_(min=0)  # by running dense, in rows
    if not bool(peaked.all() & listed.all()) or saved.sum() > PASS:
        listed &= saved == 0
    dense.append(rows[~listed])
    order = needs.argsort(stable=True)
    for group in _groups(order[listed[order]], needs, room // 2):
        yield _collect(tiled, chunk, state, store, rows[group], level[group], mine[group], dense, entropy)


def _may_be_narrow(tiled: TiledHead, state: Tensor) -> Tensor:
    """Whether rows [m] with this entropy may do with a share MOST of all columns; never of NaN.

    Where K columns carry all but tau, H <= h(tau) + (1 - tau) log K + tau log V with h(tau) the entropy of a coin.
    """
    V, tau = tiled.vocab, tiled.settings.drop_mass
    least = states.entropy(state) + tau * math.log(tau / V) + (1 - tau) * math.log1p(-tau)
    return least < (1 - tau) * math.log(MOST * V)


def _estimate(
    tiled: TiledHead, chunk: Chunk, state: Tensor, store: Store, rows: Tensor, entropy: bool, every: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows [m], from `every` so many-th run of columns: the level that should do, how many columns it keeps
    (float64), and how many on this rank.

    The level is one beyond the first that fits the sample: most are then right at once.
    """
    V, tau = tiled.head.weight.shape[0], tiled.settings.drop_mass
    every = max(min(every, V // LEAST_SAMPLE), 1)
    sums = survey(tiled, chunk, state, store, rows, every)
    sums *= V / sums[0, :, 0].sum().clamp(min=1.0)
    mine = sums[:, :, 0].cumsum(1)
    count, mass, minus = total(sums, tiled.group).unbind(2)
    level = first_level(mass, minus, states.entropy(state[rows]) if entropy else None, tau) + 1
    at = level.clamp(max=LEVELS + 1)[:, None]
    return level, count.cumsum(1).gather(1, at)[:, 0], mine.gather(1, at)[:, 0]


def _groups(order: Tensor, needs: Tensor, entries: int) -> Iterator[Tensor]:
    """Places of rows, in `order`, whose lists take so many entries together if one does not take more."""
    begin, used, sizes = 0, 0, _rooms(needs[order]).tolist()
    for i, size in enumerate(sizes):
        if used + size > entries and i > begin:
            yield order[begin:i]
            begin, used = i, 0
        used += size
    if begin < len(order):
        yield order[begin:]


def _rooms(needs: Tensor) -> Tensor:
    return (needs.double() * SLACK).long() + LEAST_ROOM


def _collect(
    tiled: TiledHead, chunk: Chunk, state: Tensor, store: Store, rows: Tensor, level: Tensor, needs: Tensor,
    dense: list[Tensor], entropy: bool,
) -> RowLists:  # fmt: skip
    """The lists of rows [m] whose levels and entries on this rank are estimated. Rows for which no level does are added
    to `dense`."""
    n, V, tau, own = len(chunk.targets), tiled.head.weight.shape[0], tiled.settings.drop_mass, _own(tiled)
    pending, rooms = torch.arange(len(rows)), _rooms(needs)
    begins, used = rooms.cumsum(0) - rooms, int(rooms.sum())
    size = used + used // 8  # for those that come again
    ends, columns, z = begins.clone(), tiled.empty(size, dtype=torch.int32), tiled.empty(size, dtype=torch.float32)
    while len(pending):
        some, log_eps = rows[pending], math.log(tau) - level[pending].double() * (math.log(2) / STEPS)
        part, whole, found = chunk.select(some), state[some], torch.zeros_like(pending)
        begin, room = begins[pending], rooms[pending]
        for v0, v1 in tiled.tiles():
            own.keep(
                store.tile(n, v0, v1), state, chunk.targets, some, log_eps.float(),
                Lists(begin, begin + room, columns, z), found, first=v0, **tiled.common(chunk, v0, v1),
            )  # fmt: skip
        ends[pending] = end = begin + torch.minimum(found, room)
        kept = tiled.new_state(len(pending))
        own.forward(Lists(begin, end, columns, z), V, kept, part.targets, **tiled.common(part, 0, V))
        whole_lists = total((found > room).long(), tiled.group) == 0
        again = ~(suffices(tiled, whole, kept, log_eps if entropy else None) & whole_lists)
        pending, found = pending[again], found[again]
        if bool(again.any()):  # a sample misses a few large probabilities: of these rows all columns are looked at
            exact, _, mine = _estimate(tiled, chunk, state, store, rows[pending], entropy, 1)
            level[pending] = torch.maximum(level[pending] + whole_lists[again].long(), exact - 1)
            rooms[pending] = more = torch.maximum(_rooms(mine), _rooms(found))
            begins[pending] = used + more.cumsum(0) - more
            used += int(more.sum())
            if used > len(z):
                columns, z = (torch.cat((x, x.new_empty(used - len(x)))) for x in (columns, z))
            pending = pending[level[pending] <= LEVELS]
    found = level <= LEVELS
    dense.append(rows[~found])
    return RowLists(rows, Lists(begins, ends, columns, z)).select(found)
