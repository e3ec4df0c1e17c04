"""Which schedule a call takes, in which chunks, and why.

All schedules run over the same tiles: rows are cut into chunks, the columns of a chunk into tiles; a tile of logits is
made by one GEMM and read by the row kernel while it is still in cache. They differ in what is kept between the forward
and the backward of a chunk:

    forward      log-probs only                                                  2NVD
    online       no gradient for the head, plain logits: dX beside the softmax   4NVD
    frozen       no gradient for the head: dX without its factor g, kept         4NVD
    one pass     the loss closes inside a chunk: g is known while the logits are 6NVD, head frozen 4NVD
    keep         all logits fit in the workspace and wait for g                  6NVD, head frozen 4NVD
    recompute    the logits are made again when g arrives                        8NVD, head frozen 6NVD
    compaction   the columns that carry all but drop_mass wait for g             (2 + 4d)NVD, head frozen (2 + 2d)NVD

`one pass` starts in memory that is there anyway: dW is written column by column, so the logits of its first chunk lie
where the dW of columns to come will stand (`lent_columns`). With as many rows as D nearly all of them do.

With a drop_mass, `frozen` and `one pass` compact the columns too: d is the share that is kept. Rows whose softmax is
too flat for it take every column. Plain logits are those whose gradient is their probability times a constant: no
clamp, softcap, entropy or bias gradient; `one pass` keeps their exponentials (exponentials.py).
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from typing import NamedTuple

from align_kernels.compaction import BLOCK_ROWS, MOST_COLUMNS

MIB = 1 << 20
STEP = 64  # a tile's columns are a multiple of it
LEAST_COLUMNS = 2048  # of a tile of many rows: each tile costs a pass over the chunk's dX


class Profile(NamedTuple):
    """What a device likes. Rows per chunk trade the traffic of W and dW against the size of the kept logits."""

    tile_bytes: int  # a tile of logits that stays in cache between the GEMM and the row kernel
    min_rows: int  # below this many rows a chunk, making the logits twice is cheaper than streaming dW again
    max_rows: int  # more rows a chunk gain nothing
    trained_rows: int  # the same where logits are kept: fewer cost a few per cent and halve the memory
    frozen_rows: int  # and with a frozen head, where no dW is streamed
    workspace: int  # default limit in bytes


PROFILES = {
    "cpu": Profile(
        tile_bytes=8 * MIB, min_rows=96, max_rows=1024, trained_rows=768, frozen_rows=1024, workspace=256 * MIB
    ),
    # estimates until measured: benches/results
    "cuda": Profile(
        tile_bytes=1 << 62, min_rows=512, max_rows=4096, trained_rows=4096, frozen_rows=1024, workspace=2048 * MIB
    ),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a call takes. `str(plan)` says it in words."""

    schedule: str
    backend: str
    rows: int  # kept rows
    vocab: int  # columns on this rank
    width: int  # D
    chunk_rows: int
    first_rows: int  # of the first chunk, more than chunk_rows where dW lends its memory
    tile_cols: int
    workspace: int  # bytes that the kept logits, the scratch tile and the copy of its weight take
    passes: int  # GEMMs over (rows, vocab, width)
    why: str
    compact: bool = False  # the backward may take fewer columns: see compaction.py
    lends: bool = False  # the first chunk's logits lie in dW's memory where they can
    exponentials: bool = False  # take the place of the logits: see exponentials.py
    waiting: int = 0  # bytes of the workspace for compacted blocks that wait for g
    on_chip: bool = False  # no logits are written: the GEMM leaves statistics alone
    own_gemm: bool = False  # the backend multiplies, not torch

    @property
    def gemm_flops(self) -> int:
        return 2 * self.passes * self.rows * self.vocab * self.width

    def __str__(self) -> str:
        tiles = "logits stay on the chip" if self.on_chip else f"tiles of {self.tile_cols} columns"
        sizes = f"{self.chunk_rows} rows"
        chunks = -(-self.rows // self.chunk_rows) if self.rows else 0
        if self.lends:
            sizes = f"{self.first_rows} rows in memory of dW, then {self.chunk_rows}"
            chunks = 1 + -(-max(self.rows - self.first_rows, 0) // self.chunk_rows)
        return (
            f"schedule {self.schedule}: {self.why}\n"
            f"backend {self.backend}, {self.rows} rows x {self.vocab} columns x {self.width}: {chunks} chunk(s) of "
            f"{sizes}, {tiles}\n"
            f"workspace {self.workspace / MIB:.1f} MiB, GEMMs {2 * self.passes}NVD = {self.gemm_flops / 1e9:.1f} GFLOP"
            f" by {'align_kernels' if self.own_gemm else 'torch.mm'}"
            + (", with column compaction less by the share of columns that peaked rows drop" if self.compact else "")
        )


def lent_columns(rows: int, vocab: int, width: int, tile: int) -> int:
    """Columns whose logits [rows, tile] each may lie in the memory of a dW [vocab, width] that is not yet written.

    They end where dW ends. Tiles are read and dW is written in ascending order, so before the tile at column v is read,
    and while its share of dW is written, (v + tile) width <= vocab width - (columns - v) rows must hold; both sides are
    linear in v, which leaves the first tile and the last.
    """
    columns = min((vocab - tile) * width // max(rows, 1), vocab - -(-tile * rows // width))
    return max(columns // STEP * STEP, 0)


def plan(
    *,
    rows: int,
    vocab: int,
    width: int,
    itemsize: int,
    gradient_itemsize: int = 0,
    weight_itemsize: int = 0,
    on_chip: float = 0.0,
    tiles_because: str = "",
    device: str,
    backend: str,
    own_gemm: bool = False,
    workspace: int | None,
    needs_input: bool,
    needs_head: bool,
    needs_weight: bool,
    lends: bool = False,
    late: bool,
    scale_free: bool = True,
    plain: bool = False,
    sparse: bool = False,
    largest_unit: int = 1,
    drop_mass: float = 0.0,
) -> Plan:
    """Pick the schedule.

    Args:
        rows, vocab, width: N kept rows, V columns on this rank, D.
        itemsize: bytes of one logit as it is kept.
        gradient_itemsize: bytes of a logit's gradient, 0 where it has the logit's dtype and may take its place.
        weight_itemsize: bytes an element of the weight's copy, made tile by tile; 0: products read it as it lies.
        on_chip: bytes of statistics per logit of a forward that writes no logits; 0: there is none here.
        tiles_because: why there is none, where the backend has one.
        own_gemm: the backend's matrix products of this size are faster than torch's on this machine.
        device: "cpu" or "cuda" (other devices are treated as "cuda").
        workspace: limit in bytes; None takes the device's default.
        needs_input, needs_head: whether hidden, and anything of the head (weight, bias, LoRA), needs a gradient.
        needs_weight: whether the weight does; a bias costs no GEMM and a LoRA two of its rank.
        lends: logits have the dtype in which dW is summed, and are made tile by tile.
        late: g = dL/dlogp arrives after the forward has returned (log-probs handed to any loss).
        scale_free: the gradient is g times something that does not depend on g (no clamp in gradient units).
        plain: the gradient of a logit is its probability times a constant, and the backend has `exponentials`.
        sparse: g is often exactly zero, so that a backward which knows g has fewer rows.
        largest_unit: rows of the longest token, sequence, pair or batch at which the loss may be cut.
        drop_mass: probability mass per row that the backward may leave out.
    """
    profile = PROFILES.get(device, PROFILES["cuda"])
    limit = workspace or profile.workspace
    per_row = max(vocab * itemsize, 1)

    # beside kept logits the tile is narrower, and with it the buffers that the GEMM packs into
    narrow = profile.tile_bytes // 2
    copied = width * weight_itemsize  # bytes a column

    def tile_of(chunk: int, size: int, each: int) -> int:
        return max(min(max(size // (chunk * each + copied) // STEP * STEP, STEP), vocab), 1)

    def lent_bytes(chunk: int) -> int:
        """Bytes of a tile of a first chunk, of which about two find no room in dW."""
        return min(max(narrow, LEAST_COLUMNS * (chunk * itemsize + copied)), limit // 8)

    def lent_tile(chunk: int) -> int:
        return tile_of(chunk, lent_bytes(chunk), itemsize)

    def outside(chunk: int) -> int:
        """Bytes of a first chunk's logits that dW has no room for."""
        return (vocab - lent_columns(chunk, vocab, width, lent_tile(chunk))) * chunk * itemsize

    def make(schedule: str, chunk: int, passes: int, why: str, first: int = 0) -> Plan:
        """`first`: rows of a first chunk that lies in dW's memory, 0 where none does."""
        chunk = max(min(chunk, rows), 1)
        keeps = schedule in ("one pass", "frozen", "keep", "compaction")
        kept = chunk * per_row if keeps else 0
        if first:
            kept = max(outside(first), kept if first < rows else 0)
        compact = drop_mass > 0 and schedule in ("one pass", "frozen", "compaction")
        if not keeps:
            each = itemsize + (gradient_itemsize if schedule == "recompute" else 0)
        elif gradient_itemsize:
            each = gradient_itemsize
        else:  # the gradient of logits that are there for this pass alone takes their place
            each = 0 if schedule in ("one pass", "frozen") and not compact else itemsize
        wide = min(narrow if keeps else profile.tile_bytes, max(limit - kept, limit // 16))
        tile = lent_tile(first) if first else tile_of(chunk, wide, each or itemsize)
        scratch = (max(first, chunk) * each + copied) * tile
        waiting = max(limit - kept - scratch, 0) if schedule == "compaction" else 0
        kept += scratch + waiting
        early = schedule == "online" or (schedule == "one pass" and plain and drop_mass == 0)
        return Plan(
            schedule, backend, rows, vocab, width, chunk, first or chunk, tile, kept, passes, why,
            compact=compact, lends=first > 0, exponentials=early, waiting=waiting, own_gemm=own_gemm,
        )  # fmt: skip

    if not (needs_input or needs_head):
        why = "nothing needs a gradient" + (f"; logits pass through tiles: {tiles_because}" if tiles_because else "")
        if not on_chip:
            return make("forward", profile.max_rows, 1, why)
        chunk = max(min(rows, profile.max_rows, int(limit / (vocab * on_chip + 1))), 1)
        taken = math.ceil(chunk * vocab * on_chip)
        return Plan("forward", backend, rows, vocab, width, chunk, chunk, vocab, taken, 1, why, on_chip=True)
    once = 1 + needs_input + needs_weight  # GEMMs when no logits are made twice
    beside = math.ceil(MOST_COLUMNS * min(BLOCK_ROWS, rows)) if drop_mass > 0 else 0  # a compacted block, in rows
    # the rest holds the gradient of a wide tile, or the copy of its weight
    most = limit - limit // 4 if gradient_itemsize else limit - limit // 8 if copied else limit
    room = max(most // per_row - beside, 0)  # rows of logits that may be kept
    least = profile.min_rows if needs_head else profile.min_rows // 2
    wide_enough = room >= min(rows, least)
    most_rows = min(profile.max_rows, profile.trained_rows if needs_head else profile.frozen_rows)
    some = max(min(rows, width), 1)
    lends = lends and needs_weight and drop_mass == 0 and lent_columns(some, vocab, width, lent_tile(some)) > 0
    spare = lent_bytes(some)

    def lent_rows(chunk: int) -> int:
        """Rows of a first chunk that dW's memory and that of `chunk` rows of logits hold; 0 where it lends none."""
        taken = min(chunk * per_row + 2 * spare, most)
        return bisect.bisect_right(range(1, rows + 1), taken, key=outside) if lends else 0

    # two chunks cost little more than one and take half the memory; a limit that was asked for is used whole
    rest = rows - lent_rows(0) + largest_unit + (spare // per_row if lends else 0)
    chunk = room if workspace else min(room, max(-(-rest // 2), largest_unit, least))
    chunk = min(chunk, max(most_rows, largest_unit))
    first = lent_rows(chunk)
    size = f"{rows * per_row / MIB:.0f} MiB of logits"
    one_pass = not late and (first == rows > 0 or (wide_enough and largest_unit <= room))
    if plain and not needs_head and drop_mass == 0 and not (sparse and one_pass):
        why = "the head is frozen and its logits plain, so dX is made beside the softmax and no logits are kept"
        return make("online", profile.max_rows, once, why)
    if late and scale_free and wide_enough and not needs_head:
        return make("frozen", chunk, once, "the head is frozen, so dX is kept without its factor g")
    fits = rows * per_row <= limit - limit // 16  # the rest holds the gradient of a tile
    if drop_mass > 0 and (late or largest_unit > room):
        # half for the chunk in flight and half for the blocks that wait, unless one chunk holds all rows
        wait = rows if fits else min(room // 2, profile.max_rows)
        if wait >= min(rows, profile.min_rows // 2):
            why = f"the columns that carry all but {drop_mass:.2g} of a row's probability wait for g"
            return make("compaction", wait, once, why)
    if late and fits:
        return make("keep", rows, once, f"{size} fit and wait for g")
    if late:
        why = f"g arrives later and {size} do not fit in {limit / MIB:.0f} MiB"
        return make("recompute", profile.max_rows, once + 1, why)
    if one_pass:
        why = "the loss closes inside a chunk, so g is known while its logits are there"
        return make("one pass", chunk, once, why, first)
    cause = f"a unit has {largest_unit} rows and" if largest_unit > room else "too few for the GEMMs:"
    why = f"{cause} {limit / MIB:.0f} MiB keep the logits of {room} rows"
    return make("recompute", profile.max_rows, once + 1, why)
