"""Column compaction: the backward over the few columns that carry all but `drop_mass` of a peaked softmax.

After a chunk's forward its raw logits and every row's exact log-sum and entropy are known. Where the backend has
products over lists of columns, each row keeps its own (lists.py). Elsewhere rows that need like numbers of columns
(`support`) form a block; it keeps the columns whose probability reaches eps_t in one of its rows t, and those of its
targets. The eps_t are estimated, and fall in steps of 2^(1/4), those of a block together, until, with tau = drop_mass,
every

    delta_t = 1 - sum of kept p <= tau
    and, where the entropy may need a gradient, sum of dropped p |log p + H| <= tau

so that dX_t errs by at most (|g_t| delta_t + |g_entropy_t| tau) max|w|, times |logit_scale| / temperature. The
raw logits are kept, so that the backward is the backend's own on a narrower vocabulary: clamp, softcap, temperature and
coefficients that arrive late are as exact as on whole rows. What is too flat runs dense.

Letters: n rows of a chunk, m rows of a block, K columns kept, V columns on this rank, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from align_kernels.backends import state as states
from align_kernels.backends.arguments import Transform
from align_kernels.backends.state import SUM
from align_kernels.backends.torch_ops import levels
from align_kernels.schedules.aliasing import Store
from align_kernels.schedules.base import Schedule
from align_kernels.schedules.dense import Frozen, OnePass, gradient, softmax
from align_kernels.schedules.lists import RowLists, choose
from align_kernels.schedules.request import BLOCK_ROWS, BLOCK_ROWS_GPU, MOST_COLUMNS, Plan, Request
from align_kernels.schedules.sharded import total
from align_kernels.schedules.support import LEVELS, STEPS, estimate, suffices
from align_kernels.schedules.tiles import Chunk, Piece, Rows, TiledHead

FLAT = 0.01  # of the vocabulary: BLOCK_ROWS rows whose exp(entropy) is more need nearly every column (docs/LOG.md)
FEW = 16  # rows of a block whose logits are copied to choose its columns
STEP = 1024  # columns of one gather, GEMM and scatter on a CPU
STEP_GPU = 8192  # a guess: launches cost more there; not yet measured


class Block(NamedTuple):
    """Some rows of a chunk and the columns that their backward takes."""

    rows: Tensor  # (m,) int64
    columns: Tensor  # (K,) int64, of this rank
    z: Tensor  # (n, K) raw logits
    taken: Tensor | None = None  # (m,) int64: the rows of z that are these; None: all, m = n

    @property
    def size(self) -> int:
        """In logits."""
        return self.z.numel()

    def select(self, mask: Tensor) -> Block:
        return self._replace(rows=self.rows[mask], taken=mask.nonzero()[:, 0])

    def tight(self) -> Block:
        return self

    # -- as tensors that autograd can save -------------------------------------------------------------------------
    def values(self) -> Tensor:
        return self.z.reshape(-1)

    def numbers(self) -> list[Tensor]:
        """int64."""
        return [self.rows, self.columns]

    @staticmethod
    def again(numbers: Sequence[Tensor], values: Tensor) -> Block:
        rows, columns = numbers
        return Block(rows, columns, values.view(len(rows), len(columns)))

    # -- backward --------------------------------------------------------------------------------------------------
    def products(self, tiled: TiledHead, rows: Rows, consume: bool) -> Tensor | None:
        """Multiply: `tiled.grads`, and this rank's dX [m, D]."""
        del consume  # a tile takes the gradient
        tiled.grads.begin_by_rows()
        targets = _places(_of_rank(tiled, rows.chunk.targets), self.columns, tiled.head.weight.shape[0])
        rows = rows._replace(chunk=replace(rows.chunk, targets=targets))
        return tiled.products(rows, _pieces(tiled, rows.chunk, self))


class Saved(NamedTuple):
    """What is saved of a chunk until its coefficients arrive."""

    blocks: list[Block | RowLists]
    dense: Tensor  # (m,) int64, ascending: rows that take every column
    logits: Store | None  # raw logits of those rows; None: they are made again

    @property
    def size(self) -> int:
        """Logits."""
        return sum(block.size for block in self.blocks) + (0 if self.logits is None else self.logits.own.numel())


# -- which columns ------------------------------------------------------------------------------------------------
def cut(
    tiled: TiledHead, chunk: Chunk, state: Tensor, store: Store, rows: Tensor, dense: list[Tensor], room: int,
    *, entropy: bool,
) -> Iterator[Block] | Iterator[RowLists]:  # fmt: skip
    """The blocks of some rows [m] of a chunk, whose raw logits are in `store`, or their lists, as many at a time as
    take `room` logits. Rows that run dense are added to `dense`.

    `entropy` bounds the error of the entropy's gradient as well.
    """
    if len(rows) == 0:
        return iter(())
    if tiled.backend.lists is not None:
        return choose(tiled, chunk, state, store, rows, dense, room, entropy=entropy)
    return _blocks(tiled, chunk, state, store, rows, dense, entropy)


def _blocks(
    tiled: TiledHead, chunk: Chunk, state: Tensor, store: Store, rows: Tensor, dense: list[Tensor], entropy: bool
) -> Iterator[Block]:
    peaked = states.entropy(state[rows]).exp() < FLAT * tiled.vocab / BLOCK_ROWS  # never of NaN
    if not bool(peaked.all()):
        dense.append(rows[~peaked])
        rows = rows[peaked]
    if len(rows) == 0:
        return
    found = estimate(tiled, chunk, state, store, rows, entropy=entropy)
    order, cuts = found.blocks(BLOCK_ROWS if rows.device.type == "cpu" else BLOCK_ROWS_GPU)
    rows, level = rows[order], found.level[order].double()
    measured = state.clone()
    measured[rows, SUM] *= torch.exp2(level / -STEPS)
    log_eps = math.log(tiled.settings.drop_mass) - level * (math.log(2) / STEPS) if entropy else None
    them = Candidates(
        rows, chunk.select(rows), state[rows], log_eps, tiled.new_state(len(rows)), torch.zeros_like(rows)
    )
    for begin, end, flat in cuts:
        some = them.span(begin, end)
        block = None if flat else _select(tiled, chunk, measured, store, some)
        if block is None:
            dense.append(some.rows)
        else:
            yield block


class Candidates(NamedTuple):
    """Rows that may be compacted, those of a block side by side."""

    rows: Tensor  # (m,) int64, of a chunk
    part: Chunk  # of them
    whole: Tensor  # (m, 8) their state
    log_eps: Tensor | None  # (m,) estimated; None: the entropy has no gradient
    kept: Tensor  # (m, 8) of the columns that are kept so far
    nowhere: Tensor  # (m,) int64: targets that are not asked for

    def span(self, begin: int, end: int) -> Candidates:
        of, log_eps = slice(begin, end), self.log_eps
        log_eps = None if log_eps is None else log_eps[of]
        return Candidates(self.rows[of], self.part.select(of), self.whole[of], log_eps, self.kept[of], self.nowhere[of])


def _select(tiled: TiledHead, chunk: Chunk, measured: Tensor, store: Store, some: Candidates) -> Block | None:
    """The block of some rows [m] of a chunk, in whose state `measured` [n, 8] the p that a row is expected to keep is
    drop_mass. None where it would keep more than MOST_COLUMNS.

    A GPU is waited for twice where what is expected holds, and once more for each step below it.
    """
    n, V, tau = len(chunk.targets), tiled.head.weight.shape[0], tiled.settings.drop_mass
    rows, part, peaks = some.rows, some.part, tiled.backend.peaks
    assert peaks is not None
    peak, z = tiled.empty(V + 1, dtype=torch.float32), None
    if len(rows) <= FEW:  # copied: one call of the backend and not one a tile
        z = _rows(tiled, store, n, rows)
        every = torch.arange(len(rows), device=rows.device)
        peaks(z, measured[rows], part.targets, every, out=peak[:V], **tiled.common(part, 0, V))
    else:
        for v0, v1 in tiled.tiles():
            tile = store.tile(n, v0, v1)
            peaks(tile, measured, chunk.targets, rows, out=peak[v0:v1], **tiled.common(chunk, v0, v1))
    peak.index_fill_(0, _of_rank(tiled, part.targets), torch.inf)
    level, order = levels(peak[:V], tau, STEPS, LEVELS).to(torch.uint8).sort(stable=True)
    ends = torch.searchsorted(level, torch.arange(LEVELS, dtype=torch.uint8, device=level.device), right=True)
    ends = torch.stack((ends, ends))  # of this rank, and of all
    total(ends[1], tiled.group)
    begin, before, segments = 0, 0, []
    for j, (end, of_all) in enumerate(zip(*ends.tolist())):
        if of_all > MOST_COLUMNS * tiled.vocab:
            return None
        if of_all == before:
            continue
        columns = order[begin:end]
        segments.append(_gather(tiled, store, n, rows, columns) if z is None else z.index_select(1, columns))
        common = _common(tiled, part, columns, 0, len(columns))
        tiled.backend.forward(segments[-1], some.kept, some.nowhere, **common)
        log_eps = None if some.log_eps is None else some.log_eps - j * (math.log(2) / STEPS)
        if bool(suffices(tiled, some.whole, some.kept, log_eps).all()):
            return Block(rows, order[:end], segments[0] if len(segments) == 1 else torch.cat(segments, 1))
        begin, before = end, of_all
    return None


def _of_rank(tiled: TiledHead, targets: Tensor) -> Tensor:
    """The columns of this rank that targets [m] are; V for those that another rank has."""
    V = tiled.head.weight.shape[0]
    return targets if tiled.group is None else (targets - tiled.offset).clamp_(-1, V).remainder_(V + 1)


def _rows(tiled: TiledHead, store: Store, n: int, rows: Tensor) -> Tensor:
    """Raw logits [m, V] of some of n rows that lie tile after tile."""
    V, wide = tiled.head.weight.shape[0], tiled.plan.tile_cols
    if wide == V:
        return store.tile(n, 0, V)[rows]
    tiles = V // wide
    whole = store.own[: tiles * n * wide].view(tiles, n, wide).transpose(0, 1)[rows].flatten(1)
    return whole if tiles * wide == V else torch.cat((whole, store.tile(n, tiles * wide, V)[rows]), 1)


def _gather(tiled: TiledHead, store: Store, n: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Raw logits [m, K] from n rows that lie tile after tile."""
    V, wide = tiled.head.weight.shape[0], tiled.plan.tile_cols
    if wide >= V:
        return store.tile(n, 0, V)[rows[:, None], columns]
    first = columns // wide * wide
    width = (V - first).clamp_(max=wide).add_(tiled.step - 1).div_(tiled.step, rounding_mode="floor").mul_(tiled.step)
    return store.own.take(rows[:, None] * width + (first * (n - 1) + columns))


def _common(tiled: TiledHead, part: Chunk, columns: Tensor, begin: int, end: int) -> Transform:
    """What the backend takes for columns begin .. end of a block: a vocabulary of K columns, and one for the rest."""
    bias = None if tiled.bias is None else tiled.bias[columns[begin:end]]
    return {**tiled.common(part, 0, 0), "offset": begin, "vocab": len(columns) + 1, "bias": bias}


# -- backward -----------------------------------------------------------------------------------------------------
def compacted(tiled: TiledHead, rows: Rows, live: Tensor | None, store: Store) -> Tensor | None:
    """`dense.gradient`, each block over its own columns: `tiled.grads`, and this rank's dX [m, D]."""
    index = torch.arange(len(rows.g), device=rows.g.device) if live is None else live
    dense = [index[:0]]
    room = tiled.plan.spare // tiled.logits_dtype.itemsize
    blocks = cut(tiled, rows.chunk, rows.state, store, index, dense, room, entropy=rows.g_entropy is not None)
    dx = _sparse(tiled, rows, blocks, consume=True)
    left = sum(map(len, dense))
    if left == len(index):
        return gradient(tiled, rows, live, store, consume=True)
    if left == 0:
        return dx if dx is None or live is None else dx[live]
    rest = torch.cat(dense).sort().values
    part = gradient(tiled, rows, rest, store, consume=True)
    if dx is None or part is None:
        return None
    dx.index_copy_(0, rest, part)
    return dx if live is None else dx[live]


def from_saved(tiled: TiledHead, rows: Rows, saved: Saved) -> Tensor | None:
    """The same from what `save` kept, for the rows that have a coefficient: this rank's dX [n, D]."""
    active = rows.active()
    dx = _sparse(tiled, rows, _active_blocks(saved, active), consume=False)
    mask = active[saved.dense]
    live = None if bool(mask.all()) else mask.nonzero()[:, 0]
    part = gradient(tiled, rows.select(saved.dense), live, saved.logits, consume=False)
    if dx is None or part is None:
        return None
    return dx.index_copy_(0, saved.dense if live is None else saved.dense[live], part)


def _active_blocks(saved: Saved, active: Tensor) -> Iterator[Block | RowLists]:
    for block in saved.blocks:
        mask = active[block.rows]
        yield block if bool(mask.all()) else block.select(mask)


def _sparse(tiled: TiledHead, rows: Rows, blocks: Iterable[Block | RowLists], consume: bool) -> Tensor | None:
    """This rank's dX [n, D], zero but in compacted blocks."""
    dx = None
    if tiled.needs.hidden:
        dx = torch.zeros(
            rows.chunk.x.shape, dtype=torch.promote_types(tiled.dtype, torch.float32), device=rows.g.device
        )
    for block in blocks:
        if len(block.rows):
            block_dx = block.products(tiled, rows.select(block.rows), consume)
            if dx is not None and block_dx is not None:
                dx.index_copy_(0, block.rows, block_dx)
    return dx


def _pieces(tiled: TiledHead, part: Chunk, block: Block) -> Iterator[Piece]:
    K, m = len(block.columns), len(block.rows)
    step = min(STEP if block.z.device.type == "cpu" else STEP_GPU, tiled.plan.tile_cols)
    for begin in range(0, K, step):
        end = min(begin + step, K)
        z, columns = block.z[:, begin:end], block.columns[begin:end]
        w = tiled.weight(columns) if tiled.needs.hidden else None
        out, common = tiled.scratch(m, end - begin, tiled.dtype), _common(tiled, part, block.columns, begin, end)
        yield Piece(z, out, columns, w, common, block.taken)


def _places(targets: Tensor, columns: Tensor, V: int) -> Tensor:
    """Where each target [m] of `_of_rank` lies among `columns` [K]; K for one that another rank has."""
    place = torch.full((V + 1,), len(columns), device=columns.device)
    return place.index_copy_(0, columns, torch.arange(len(columns), device=columns.device))[targets]


# -- between forward and backward ---------------------------------------------------------------------------------
def save(tiled: TiledHead, chunk: Chunk, state: Tensor, store: Store, room: int, *, alone: bool) -> Saved:
    """What is saved of a chunk until its coefficients arrive, in `room` logits.

    Dense rows that do not fit there are made again; a chunk that is `alone` stays whole.
    """
    n, V = len(chunk.targets), tiled.columns
    every = torch.arange(n, device=state.device)
    blocks, dense, used = [], [every[:0]], 0
    at_once = tiled.plan.saved // tiled.logits_dtype.itemsize // 4
    for block in cut(tiled, chunk, state, store, every, dense, at_once, entropy=True):
        block = block.tight()
        if used + block.size > room:
            dense.append(block.rows)
        else:
            blocks.append(block)
            used += block.size
    rows = torch.cat(dense).sort().values
    fits = used + len(rows) * V <= room
    if not fits and not alone:
        return Saved(blocks, rows, None)
    if not fits or len(rows) == n:
        return Saved([], every, store)
    logits = tiled.store(len(rows))
    for v0, v1 in tiled.tiles():
        torch.index_select(store.tile(n, v0, v1), 0, rows, out=logits.tile(len(rows), v0, v1))
    return Saved(blocks, rows, logits)


def pack(chunks: list[Saved], like: Tensor) -> tuple[Tensor, Tensor]:
    """All of it in two tensors that autograd can save: logits [.] like `like`, and their layout, int64 [.]."""
    values, layout = [], []
    for blocks, dense, logits in chunks:
        if logits is not None:
            values.append(logits.own)
        head, numbers = [len(dense), logits is not None, len(blocks)], []
        for block in blocks:
            values.append(block.values())
            head += [len(values[-1]), *map(len, block.numbers())]
            numbers += block.numbers()
        layout += [dense.new_tensor([len(head), *head]), dense, *numbers]
    one = values[0] if len(values) == 1 else torch.cat(values) if values else like.new_empty(0)
    return one, torch.cat(layout) if layout else like.new_empty(0, dtype=torch.int64)


def unpack(tiled: TiledHead, values: Tensor, layout: Tensor) -> Iterator[Saved]:
    """What `pack` was given, as views."""

    def take(size: int) -> Tensor:
        nonlocal values
        taken, values = values[:size], values[size:]
        return taken

    kind = Block if tiled.backend.lists is None else RowLists
    while len(layout):
        length = int(layout[0])
        (count, has_logits, blocks), rest = layout[1:4].tolist(), layout[4 : 1 + length].view(-1).tolist()
        each = len(rest) // max(blocks, 1)  # numbers that tell the sizes of a block
        heads = [rest[each * i : each * (i + 1)] for i in range(blocks)]
        sizes = [count, *(size for _, *sizes in heads for size in sizes)]
        dense, *parts, layout = layout[1 + length :].split([*sizes, len(layout) - 1 - length - sum(sizes)])
        logits = tiled.stored(take(count * tiled.columns)) if has_logits else None
        found = [kind.again(parts[(each - 1) * i : (each - 1) * (i + 1)], take(heads[i][0])) for i in range(blocks)]
        yield Saved(found, dense, logits)


# -- the schedules ------------------------------------------------------------------------------------------------
class Compaction(Schedule):
    """The columns that carry all but `drop_mass` are saved until g arrives."""

    name = schedule = "compaction"
    compact = True

    @classmethod
    def why_not(cls, request: Request) -> str | None:
        r = request
        if r.drop_mass == 0:
            return "no column is dropped"
        if not r.late and r.largest_unit <= r.room:
            return "g is known while its logits are there"
        if cls.chunk_rows(r) < min(r.rows, r.profile.min_rows // 2):
            return "too few rows of logits fit in the workspace for the GEMMs"
        return None

    @staticmethod
    def chunk_rows(request: Request) -> int:
        """Half for the chunk in flight and half for the blocks that are saved, unless one chunk holds all rows."""
        return request.rows if request.fits else min(request.room // 2, request.profile.max_rows)

    @classmethod
    def plan(cls, request: Request) -> Plan:
        why = f"the columns that carry all but {request.drop_mass:.2g} of a row's probability wait for g"
        return cls.sized(request, cls.chunk_rows(request), request.passes, why, saves=True)

    def __init__(self, tiled: TiledHead) -> None:
        super().__init__(tiled)
        self.saved: list[Saved] = []

    def begin(self, rows: int) -> None:
        self.rows, self.room = rows, self.tiled.plan.saved // self.tiled.logits_dtype.itemsize

    def forward(self, chunk: Chunk) -> tuple[Tensor, Saved]:
        n = len(chunk.targets)
        store = self.tiled.store(n)
        state = softmax(self.tiled, chunk, store)
        saved = save(self.tiled, chunk, state, store, self.room, alone=n == self.rows)
        self.room -= saved.size
        return state, saved

    def backward(self, chunk: Chunk, state: Tensor, saved: Saved, g: Tensor, g_entropy: Tensor | None) -> Tensor | None:
        return self.tiled.whole(from_saved(self.tiled, Rows(chunk, state, g, g_entropy), saved), None, len(g))

    def save(self, saved: Saved) -> None:
        self.saved.append(saved)

    def packed(self) -> tuple[Tensor, Tensor]:
        return pack(self.saved, super().packed()[0])

    def unpacked(self, values: Tensor, layout: Tensor) -> Iterator[Saved]:
        return unpack(self.tiled, values, layout)


class Compacting(Schedule):
    """What turns a schedule over whole rows of logits into one over the columns that carry all but `drop_mass`."""

    compact = True

    @classmethod
    def why_not(cls, request: Request) -> str | None:
        return super().why_not(request) if request.drop_mass > 0 else "no column is dropped"

    @classmethod
    def scratch(cls, request: Request) -> int:
        return Schedule.scratch(request)


class CompactFrozen(Compacting, Frozen):
    """Frozen, over the columns that carry all but `drop_mass`."""

    name = "compact frozen"

    def gradient(self, rows: Rows, live: Tensor | None, saved: Store | None) -> Tensor | None:
        return super().gradient(rows, live, None) if saved is None else compacted(self.tiled, rows, live, saved)


class CompactOnePass(Compacting, OnePass):
    """One pass, over the columns that carry all but `drop_mass`."""

    name = "compact one pass"

    def gradient(self, rows: Rows, live: Tensor | None, saved: Store) -> Tensor | None:
        return compacted(self.tiled, rows, live, saved)
