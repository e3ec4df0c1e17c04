"""What a call asks of a schedule, what a device likes, and the plan that comes of both.

Rows are cut into chunks, the columns of a chunk into tiles: a tile of logits is made by one GEMM and read by the row
kernel while it is still in cache.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from align_kernels.schedules import waves

MIB = 1 << 20
STEP = 64  # a tile's columns are a multiple of it
BLOCK_ROWS, BLOCK_ROWS_GPU = 128, 2048  # rows of a block that is compacted; on a GPU a guess, not yet measured
MOST_COLUMNS = 0.3  # of the vocabulary that such a block keeps: with more, dense GEMMs are cheaper (docs/LOG.md)


def row_step(device: str) -> int:
    """Elements at multiples of which the rows of a tile of logits begin: a GPU's GEMMs and kernels read 16 bytes at a
    time of aligned rows, whatever V is; a CPU's do not mind."""
    return 1 if device == "cpu" else STEP


class Profile(NamedTuple):
    """What a device likes. Rows per chunk trade the traffic of W and dW against the size of the kept logits; those of a
    GPU are chosen by its waves (waves.py), and `max_rows` is what it may have in narrow tiles."""

    tile_bytes: int  # a tile of logits that stays in cache between the GEMM and the row kernel
    min_rows: int  # below this many rows a chunk, making the logits twice is cheaper than streaming dW again
    max_rows: int  # more rows a chunk gain nothing
    trained_rows: int  # the same where logits are kept: fewer cost a few per cent and halve the memory
    frozen_rows: int  # and with a frozen head, where no dW is streamed
    workspace: int  # default limit in bytes, where the size of the device's memory is not known
    share: float = 0.0  # of that memory, which is the default limit where it is known


PROFILES = {
    "cpu": Profile(
        tile_bytes=8 * MIB, min_rows=96, max_rows=1024, trained_rows=768, frozen_rows=1024, workspace=256 * MIB
    ),
    # estimates until measured: benches/results
    "cuda": Profile(
        tile_bytes=1 << 62,
        min_rows=512,
        max_rows=4096,
        trained_rows=4096,
        frozen_rows=1024,
        workspace=2048 * MIB,
        share=1 / 20,
    ),
}


def profile_of(device: str) -> Profile:
    """Devices other than "cpu" and "cuda" are treated as "cuda"."""
    return PROFILES.get(device, PROFILES["cuda"])


@contextmanager
def profiled(device: str, **fields: float) -> Iterator[Profile]:
    """Within, plans for `device` are made by another profile: its own with some fields replaced."""
    before = PROFILES[device]
    PROFILES[device] = before._replace(**fields)
    try:
        yield PROFILES[device]
    finally:
        PROFILES[device] = before


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What a call asks: its sizes, what needs a gradient, and what is known of that gradient before the call."""

    rows: int  # N kept rows
    vocab: int  # V columns, of the widest rank
    width: int  # D
    itemsize: int  # bytes of one logit as it is kept
    gradient_itemsize: int = 0  # of a logit's gradient; 0: it has the logit's dtype and may take its place
    weight_itemsize: int = 0  # of an element of the weight's copy, made tile by tile; 0: products read it as it lies
    on_chip: float = 0.0  # bytes of statistics per logit of a forward that writes no logits; 0: there is none here
    tiles_because: str = ""  # why there is none, where the backend has one
    device: str  # "cpu" or "cuda"
    backend: str
    own_gemm: bool = False  # the backend's matrix products of this size are faster than torch's on this machine
    workspace: int | None = None  # limit in bytes; None: the device's default
    memory: int = 0  # bytes of the device, 0: not known
    processors: int = 0  # multiprocessors of a GPU, 0: not known
    needs_input: bool  # whether hidden needs a gradient
    needs_head: bool  # and anything of the head: weight, bias, LoRA
    needs_weight: bool  # and the weight; a bias costs no GEMM and a LoRA two of its rank
    may_alias: bool = False  # logits have the dtype in which dW is summed, and are made tile by tile
    late: bool  # g = dL/dlogp arrives after the forward has returned: log-probs handed to any loss
    scale_free: bool = True  # the gradient is g times something that does not depend on g: no clamp in gradient units
    plain: bool = False  # a logit's gradient is its probability times a constant, and the backend has `exponentials`
    sparse: bool = False  # g is often exactly zero, so that a backward which knows g has fewer rows
    on_device: bool = False  # the backend closes this loss of tokens in one kernel between the GEMMs
    largest_unit: int = 1  # rows of the longest token, sequence, pair or batch at which the loss may be cut
    drop_mass: float = 0.0  # probability mass per row that the backward may leave out

    @property
    def trains(self) -> bool:
        return self.needs_input or self.needs_head

    @property
    def passes(self) -> int:
        """GEMMs over (rows, vocab, width) where no logits are made twice."""
        return 1 + self.needs_input + self.needs_weight

    # -- bytes -----------------------------------------------------------------------------------------------------
    @property
    def profile(self) -> Profile:
        return profile_of(self.device)

    @property
    def limit(self) -> int:
        return self.workspace or int(self.memory * self.profile.share) or self.profile.workspace

    @property
    def row_bytes(self) -> int:
        """Of the logits of a row."""
        step = row_step(self.device)
        return max(-(-self.vocab // step) * step * self.itemsize, 1)

    @property
    def sum_itemsize(self) -> int:
        """Of an element of dW in the making: that of logits."""
        return max(self.itemsize, self.gradient_itemsize)

    @property
    def copied(self) -> int:
        """Of the weight's copy, a column."""
        return self.width * self.weight_itemsize

    @property
    def narrow(self) -> int:
        """Of a tile where logits are kept too: narrower, as are the buffers that the GEMM then packs into."""
        return self.profile.tile_bytes // 2

    @property
    def most(self) -> int:
        """For logits that are kept: the rest holds the gradient of a wide tile, or the copy of its weight."""
        share = 4 if self.gradient_itemsize else 8 if self.copied else 0
        return self.limit - (self.limit // share if share else 0)

    @property
    def of_exponentials(self) -> Request:
        """The same call where exponentials are kept, in the dtype of gradients, and logits pass beside them."""
        kept, beside = self.gradient_itemsize, self.itemsize
        return dataclasses.replace(self, itemsize=kept, gradient_itemsize=beside) if kept else self

    # -- rows ------------------------------------------------------------------------------------------------------
    @property
    def room(self) -> int:
        """Rows whose logits may be kept, in addition to a compacted block."""
        most = BLOCK_ROWS if self.device == "cpu" else BLOCK_ROWS_GPU
        block = math.ceil(MOST_COLUMNS * min(most, self.rows)) if self.drop_mass > 0 else 0
        return max(self.most // self.row_bytes - block, 0)

    @property
    def least(self) -> int:
        """Rows of a chunk from which on the GEMMs pay."""
        return self.profile.min_rows if self.needs_head else self.profile.min_rows // 2

    @property
    def wide_enough(self) -> bool:
        return self.room >= min(self.rows, self.least)

    @property
    def fits(self) -> bool:
        """Whether all logits do; the rest of the workspace holds the gradient of a tile."""
        return self.rows * self.row_bytes <= self.limit - self.limit // 16

    def by_waves(self, most: int, logits: int) -> int:
        """Rows of a chunk on a GPU, `most` of them at most, where logits are made so many times."""
        head = waves.Head(self.vocab, self.width, logits, self.needs_input, self.needs_weight, self.processors)
        return waves.chunk_rows(head, self.rows, max(self.least, self.largest_unit), most)

    def passing_rows(self, each: int, logits: int = 1) -> int:
        """Rows of a chunk whose logits pass through a tile of `each` bytes a logit."""
        most = self.profile.max_rows
        return most if self.device == "cpu" else self.by_waves(max(self.limit // (self.vocab * each), most), logits)

    def kept_rows(self, apart: int = 0) -> int:
        """Rows of a chunk whose logits are kept, where `apart` of all rows lie elsewhere."""
        if self.device != "cpu":
            blocks = self.room // BLOCK_ROWS_GPU * BLOCK_ROWS_GPU  # products over few columns know no waves
            return blocks if self.drop_mass > 0 and blocks >= max(self.largest_unit, 1) else self.by_waves(self.room, 1)
        most = self.profile.trained_rows if self.needs_head else self.profile.frozen_rows
        most = max(min(self.profile.max_rows, most), self.largest_unit)
        if self.workspace:  # a limit that was asked for is used whole
            return min(self.room, most)
        # two chunks cost little more than one and take half the memory
        half = -(-(self.rows - apart + self.largest_unit) // 2)
        return min(self.room, max(half, self.largest_unit, self.least), most)

    # -- columns ---------------------------------------------------------------------------------------------------
    def tile_columns(self, rows: int, size: int, each: int) -> int:
        """Columns of a tile of `rows` rows and `each` bytes a logit, beside its weight's copy, in `size` bytes."""
        return max(min(max(size // (rows * each + self.copied) // STEP * STEP, STEP), self.vocab), 1)

    # -- words -----------------------------------------------------------------------------------------------------
    @property
    def logits_in_words(self) -> str:
        return f"{self.rows * self.row_bytes / MIB:.0f} MiB of logits"

    @property
    def limit_in_words(self) -> str:
        return f"{self.limit / MIB:.0f} MiB"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a call takes. `str(plan)` says it in words."""

    schedule: str
    backend: str
    rows: int  # kept rows
    vocab: int  # columns on this rank
    width: int  # D
    chunk_rows: int
    first_rows: int  # of the first chunk, more than chunk_rows where its logits lie in dW's memory
    tile_cols: int
    workspace: int  # bytes that the kept logits, the scratch tile and the copy of its weight take
    passes: int  # GEMMs over (rows, vocab, width)
    why: str
    name: str  # of the class in SCHEDULES: one schedule may have several
    late: bool  # g arrives after the forward has returned
    compact: bool = False  # the backward may take fewer columns: see compaction.py
    aliased: bool = False  # the first chunk's logits lie in dW's memory where they can: see aliasing.py
    even: bool = True  # chunks of about one size, else of chunk_rows and a last one
    saved: int = 0  # bytes of the workspace for compacted blocks that are saved until g arrives
    spare: int = 0  # bytes of the limit beside the workspace
    on_chip: bool = False  # no logits are written: the GEMM leaves only statistics
    own_gemm: bool = False  # the backend multiplies, not torch

    @property
    def gemm_flops(self) -> int:
        return 2 * self.passes * self.rows * self.vocab * self.width

    def __str__(self) -> str:
        tiles = "logits stay on the chip" if self.on_chip else f"tiles of {self.tile_cols} columns"
        sizes = f"{self.chunk_rows} rows"
        chunks = -(-self.rows // self.chunk_rows) if self.rows else 0
        if self.aliased:
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
