"""Column compaction: the backward over the few columns that carry all but `drop_mass` of a peaked softmax.

After a chunk's forward its raw logits and every row's exact log-sum and entropy are known. The rows, ordered by
entropy, are cut into blocks; a block keeps the columns whose probability reaches eps in one of its rows, and those of
its targets. eps is the largest of tau, tau / 2, tau / 4, ... (tau = drop_mass) with, for every row t,

    delta_t = 1 - sum of kept p <= tau
    and, where the entropy may need a gradient, sum of dropped p |log p + H| <= tau

so that dX_t errs by at most (|g_t| delta_t + |g_entropy_t| tau) max|w|, times |logit_scale| / temperature. Kept are the
raw logits, so that the backward is the backend's own on a narrower vocabulary: clamp, softcap, temperature and
coefficients that arrive late are as exact as on whole rows. A block whose softmax is too flat runs dense.

Letters: n rows of a chunk, m rows of a block, K columns kept, V columns on this rank, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from align_kernels.schedules import Chunk, Grads, Rows, Runner

BLOCK_ROWS = 128
MOST_COLUMNS = 0.3  # of the vocabulary: with more, dense GEMMs are cheaper (docs/LOG.md)
FLAT = 0.01  # of the vocabulary: measured blocks whose exp(entropy) sum to more kept nearly every column (docs/LOG.md)
PROBES = 8  # rows of a block that are tried first
HALVINGS = 20  # of eps, before a block is given up
STEP = 1024  # columns of one gather, GEMM and scatter on a CPU
STEP_GPU = 8192  # a guess: launches cost more there; not yet measured
ROUNDING = 2.0**-20  # of a probability mass in float32; a smaller drop_mass keeps every column


class Piece(NamedTuple):
    """Raw logits of some columns."""

    z: Tensor | None  # (m, c); None: `out` holds their gradient already
    out: Tensor  # (m, c) for their gradient, may be z
    columns: slice | Tensor  # (c,) of this rank
    w: Tensor | None  # (c, D) their weight; None where hidden needs no gradient
    common: dict  # what the backend takes beside


class Block(NamedTuple):
    """Some rows of a chunk and the columns that their backward takes."""

    rows: Tensor  # (m,) int64
    columns: Tensor  # (K,) int64, of this rank
    z: Tensor  # (m, K) raw logits


class Held(NamedTuple):
    """What is kept of a chunk until its coefficients arrive."""

    blocks: list[Block]
    dense: Tensor  # (m,) int64, ascending: rows that take every column
    logits: Tensor | None  # raw logits of those rows, tile after tile; None: they are made again


# -- which columns ------------------------------------------------------------------------------------------------
def cut(
    run: Runner, chunk: Chunk, state: Tensor, store: Tensor, rows: Tensor, *, entropy: bool
) -> Iterator[Block | Tensor]:
    """Some rows [m] of a chunk, whose raw logits lie in `store`, as blocks, or as rows alone where they run dense.

    `entropy` bounds the error of the entropy's gradient as well.
    """
    if len(rows) == 0:
        return
    heights, order = _entropy(state[rows]).sort()  # NaN comes last, and is never below anything
    count = -(-len(rows) // BLOCK_ROWS)
    support = torch.stack([h.exp().sum() for h in heights.tensor_split(count)])
    for piece, size in zip(rows[order].tensor_split(count), support.tolist()):
        block = _select(run, chunk, state, store, piece, entropy) if size < FLAT * run.vocab else None
        yield piece if block is None else block


def _select(run: Runner, chunk: Chunk, state: Tensor, store: Tensor, rows: Tensor, entropy: bool) -> Block | None:
    """The block of these rows, None where it would keep more than MOST_COLUMNS."""
    n, V, tau = len(chunk.targets), run.head.weight.shape[0], run.settings.drop_mass
    peak = run.empty(V, dtype=torch.float32)
    for v0, v1 in run.tiles():
        z = run.tile_of(store, n, v0, v1)
        run.backend.peaks(z, state, chunk.targets, rows, out=peak[v0:v1], **run.common(chunk, v0, v1))
    target = chunk.targets[rows] - run.offset
    peak[target[(target >= 0) & (target < V)]] = 0.0
    # level 0 holds the peaks from tau on, level j those from tau / 2^j to tau / 2^(j - 1)
    level = (math.log2(tau) - peak / math.log(2)).ceil_().clamp_(0, HALVINGS + 1).to(torch.int16)
    sizes = torch.bincount(level, minlength=HALVINGS + 2)[:-1].cumsum(0)
    depth = int((_sum(sizes.clone(), run) <= MOST_COLUMNS * run.vocab).sum())
    columns = (level < depth).nonzero()[:, 0]
    columns = columns[level[columns].sort(stable=True).indices]

    ends = sizes[:depth].tolist()

    def fold(rows: Tensor, begin: int, end: int, kept: Tensor) -> Tensor:
        """Add columns begin .. end to the states of some rows; their raw logits."""
        part = chunk.select(rows)
        z = _gather(run, store, n, rows, columns[begin:end])
        run.backend.forward(z, kept, torch.zeros_like(rows), **_common(run, part, columns, begin, end))
        return z

    # a few rows tell for less whether there is a chance, and from which eps on
    begin, start = 0, len(ends)
    few = rows[:: max(len(rows) // PROBES, 1)]
    kept = run.new_state(len(few))
    for j, end in enumerate(ends):
        fold(few, begin, end, kept)
        begin = end
        if _suffices(run, state[few], kept, tau, tau / 2**j, entropy):
            start = j
            break
    begin, kept, segments = 0, run.new_state(len(rows)), []
    for j in range(start, len(ends)):
        segments.append(fold(rows, begin, ends[j], kept))
        begin = ends[j]
        if _suffices(run, state[rows], kept, tau, tau / 2**j, entropy):
            return Block(rows, columns[:begin].clone(), torch.cat(segments, 1))
    return None


def _suffices(run: Runner, whole: Tensor, kept: Tensor, tau: float, eps: float, entropy: bool) -> bool:
    """Whether the columns that were folded into `kept` [m, 8], all with peaks from eps on, are enough for every row."""
    m, s, a = kept[:, :3].unbind(1)
    log_p = torch.where(s > 0, m - whole[:, 0] - whole[:, 1].log(), -torch.inf)
    share = log_p.exp()
    minus = torch.where(s > 0, (a + s * log_p) * share, 0.0)
    mass, minus_entropy = _sum(torch.stack((s * share, minus)), run)
    delta = 1.0 - mass
    fits = delta <= tau - ROUNDING
    if entropy:
        # every dropped p lies below eps: with eps <= exp(-H) all terms p (log p + H) have one sign
        H = _entropy(whole)
        dropped = H + minus_entropy - H * delta
        fits &= (dropped <= tau - ROUNDING * (1.0 + H)) & (math.log(eps) + H <= 0)
    return bool(fits.all())


def _entropy(state: Tensor) -> Tensor:
    return state[:, 1].log() - state[:, 2] / state[:, 1]


def _sum(x: Tensor, run: Runner) -> Tensor:
    """Over the ranks that share the vocabulary: they take one decision."""
    if run.group is not None:
        dist.all_reduce(x, group=run.group)
    return x


def _gather(run: Runner, store: Tensor, n: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Raw logits [m, K] from n rows that lie tile after tile."""
    V, wide = run.head.weight.shape[0], run.plan.tile_cols
    first = columns // wide * wide
    width = (V - first).clamp_(max=wide)
    return store.take(rows[:, None] * width + (first * (n - 1) + columns))


def _common(run: Runner, part: Chunk, columns: Tensor, begin: int, end: int) -> dict:
    """What the backend takes for columns begin .. end of a block: a vocabulary of K columns, and one for the rest."""
    bias = None if run.bias is None else run.bias[columns[begin:end]]
    return run.common(part, 0, 0) | dict(offset=begin, vocab=len(columns) + 1, bias=bias)


# -- backward -----------------------------------------------------------------------------------------------------
def backward(run: Runner, rows: Rows, live: Tensor | None, store: Tensor, consume: bool, grads: Grads) -> Tensor | None:
    """`Runner.dense`, each block over its own columns: this rank's dX [m, D]."""
    index = torch.arange(len(rows.g), device=rows.g.device) if live is None else live
    blocks = cut(run, rows.chunk, rows.state, store, index, entropy=rows.g_entropy is not None)
    dx, dense = _sparse(run, rows, blocks, grads)
    if len(dense) == len(index):
        return run.dense(rows, live, store, consume, grads)
    part = run.dense(rows, dense, store, consume, grads)
    if dx is None or part is None:
        return None
    dx.index_copy_(0, dense, part)
    return dx if live is None else dx[live]


def late_backward(run: Runner, rows: Rows, active: Tensor, held: Held, grads: Grads) -> Tensor | None:
    """The same from what `hold` kept, for the rows that are `active` [n]: this rank's dX [n, D]."""
    dx, _ = _sparse(run, rows, _active_blocks(held, active), grads)
    mask = active[held.dense]
    live = None if bool(mask.all()) else mask.nonzero()[:, 0]
    part = run.dense(rows.select(held.dense), live, held.logits, False, grads)
    if dx is None or part is None:
        return None
    return dx.index_copy_(0, held.dense if live is None else held.dense[live], part)


def _active_blocks(held: Held, active: Tensor) -> Iterator[Block]:
    for block in held.blocks:
        mask = active[block.rows]
        yield block if bool(mask.all()) else Block(block.rows[mask], block.columns, block.z[mask])


def _sparse(run: Runner, rows: Rows, blocks: Iterable[Block | Tensor], grads: Grads) -> tuple[Tensor | None, Tensor]:
    """This rank's dX [n, D], zero but in compacted blocks, and the rows that are left, ascending."""
    dx, dense = None, [rows.chunk.targets.new_empty(0)]
    if run.needs.hidden:
        dx = torch.zeros(rows.chunk.x.shape, dtype=torch.promote_types(run.dtype, torch.float32), device=rows.g.device)
    for block in blocks:
        if isinstance(block, Tensor):
            dense.append(block)
        elif len(block.rows):
            grads.zero()
            part = rows.select(block.rows)
            targets = _places(part.chunk.targets - run.offset, block.columns, run.head.weight.shape[0])
            part = part._replace(chunk=part.chunk._replace(targets=targets))
            block_dx = run.products(part, _pieces(run, part.chunk, block), grads)
            if dx is not None and block_dx is not None:
                dx.index_copy_(0, block.rows, block_dx)
    return dx, torch.cat(dense).sort().values


def _pieces(run: Runner, part: Chunk, block: Block) -> Iterator[Piece]:
    K, m = len(block.columns), len(block.rows)
    step = min(STEP if block.z.device.type == "cpu" else STEP_GPU, run.plan.tile_cols)
    for begin in range(0, K, step):
        end = min(begin + step, K)
        z, columns = block.z[:, begin:end], block.columns[begin:end]
        w = run.weight(columns) if run.needs.hidden else None
        yield Piece(
            z, run.scratch(m, end - begin, run.dtype), columns, w, _common(run, part, block.columns, begin, end)
        )


def _places(targets: Tensor, columns: Tensor, V: int) -> Tensor:
    """Where each target [m] lies among `columns` [K]; K for one that another rank has."""
    place = torch.full((V + 1,), len(columns), device=columns.device)
    place[columns] = torch.arange(len(columns), device=columns.device)
    return place[targets.where((targets >= 0) & (targets < V), V)]


# -- between forward and backward ---------------------------------------------------------------------------------
def hold(run: Runner, chunk: Chunk, state: Tensor, store: Tensor, waiting: list[Held], *, alone: bool) -> Held:
    """What is kept of a chunk until its coefficients arrive, beside the chunks that are `waiting` already.

    Where the workspace is too small for its dense rows they are made again; a chunk that is `alone` stays whole.
    """
    room = run.plan.waiting // run.logits_dtype.itemsize - sum(map(_size, waiting))
    n, V = len(chunk.targets), run.head.weight.shape[0]
    every = torch.arange(n, device=store.device)
    blocks, dense, used = [], [every[:0]], 0
    for block in cut(run, chunk, state, store, every, entropy=True):
        if isinstance(block, Tensor):
            dense.append(block)
        elif used + block.z.numel() > room:
            dense.append(block.rows)
        else:
            blocks.append(block)
            used += block.z.numel()
    rows = torch.cat(dense).sort().values
    fits = used + len(rows) * V <= room
    if not fits and not alone:
        return Held(blocks, rows, None)
    if not fits or len(rows) == n:
        return Held([], every, store)
    logits = run.store(len(rows))
    for v0, v1 in run.tiles():
        torch.index_select(run.tile_of(store, n, v0, v1), 0, rows, out=run.tile_of(logits, len(rows), v0, v1))
    return Held(blocks, rows, logits)


def _size(held: Held) -> int:
    return sum(b.z.numel() for b in held.blocks) + (0 if held.logits is None else held.logits.numel())


def pack(chunks: list[Held], like: Tensor) -> tuple[Tensor, Tensor]:
    """All of it in two tensors that autograd can save: logits [.] like `like`, and their layout, int64 [.]."""
    values, layout = [], []
    for blocks, dense, logits in chunks:
        if logits is not None:
            values.append(logits)
        head = [len(dense), logits is not None, len(blocks)]
        for block in blocks:
            head += [len(block.rows), len(block.columns)]
            values.append(block.z.reshape(-1))
        numbers = dense.new_tensor([len(head), *head])
        layout += [numbers, dense, *(x for block in blocks for x in (block.rows, block.columns))]
    one = values[0] if len(values) == 1 else torch.cat(values) if values else like.new_empty(0)
    return one, torch.cat(layout) if layout else like.new_empty(0, dtype=torch.int64)


def unpack(values: Tensor, layout: Tensor, V: int) -> Iterator[Held]:
    """What `pack` was given, as views."""

    def take(size: int) -> Tensor:
        nonlocal values
        taken, values = values[:size], values[size:]
        return taken

    while len(layout):
        length = int(layout[0])
        (count, has_logits, _), pairs = layout[1:4].tolist(), layout[4 : 1 + length].tolist()
        sizes = [count, *pairs]
        parts = layout[1 + length :].split([*sizes, len(layout) - 1 - length - sum(sizes)])
        dense, layout = parts[0], parts[-1]
        logits = take(count * V) if has_logits else None
        index = list(zip(parts[1:-1:2], parts[2:-1:2]))
        blocks = [Block(rows, columns, take(len(rows) * len(columns)).view(len(rows), -1)) for rows, columns in index]
        yield Held(blocks, dense, logits)
