"""Logits in the memory of dW: while dW is written column by column, the logits of a first chunk lie where the dW of
columns to come will stand. With as many rows as D nearly all of them do.
"""

from __future__ import annotations

import bisect
from typing import NamedTuple

from torch import Tensor

from align_kernels.schedules.request import STEP, Request

LEAST_COLUMNS = 2048  # of a tile of many rows: each tile costs a pass over the chunk's dX


def aliased_columns(column: int, vocab: int, line: int, tile: int) -> int:
    """Columns whose logits, of `column` bytes each and read `tile` at a time, may lie in the memory of a dW of `vocab`
    lines of `line` bytes that is not yet written.

    They end where dW ends. Tiles are read and dW is written in ascending order, so before the tile at column v is read,
    and while its share of dW is written, (v + tile) line <= vocab line - (columns - v) column must hold; both sides are
    linear in v, which leaves the first tile and the last.
    """
    columns = min((vocab - tile) * line // max(column, 1), vocab - -(-tile * column // line))
    return max(columns // STEP * STEP, 0)


def pitch(columns: int, step: int) -> int:
    """Elements from one row of a tile to the next, where rows begin at multiples of `step`."""
    return -(-columns // step) * step


class Store(NamedTuple):
    """Room for all raw logits of a chunk, tile after tile: the first columns at the end of a dW that is still to be
    written, the others in `own`. Only the last tile may be no multiple of `step` wide."""

    own: Tensor  # flat
    step: int  # at multiples of which rows of a tile begin
    dw: Tensor | None = None  # flat, its bytes as numbers of the same dtype
    columns: int = 0  # of those in dw

    def tile(self, n: int, v0: int, v1: int) -> Tensor:
        """Logits [n, v1 - v0] of some columns of n rows, all in one of the two memories."""
        place, begin, width = self.own, n * (v0 - self.columns), pitch(v1 - v0, self.step)
        if self.dw is not None and v0 < self.columns:
            place, begin = self.dw, len(self.dw) + begin
        return place[begin : begin + n * width].view(n, width)[:, : v1 - v0]


# -- sizes of a first chunk ---------------------------------------------------------------------------------------
def tile_bytes(request: Request, rows: int) -> int:
    """Bytes of a tile of a first chunk; dW has no room for about two such tiles."""
    wide = LEAST_COLUMNS * (rows * request.itemsize + request.copied)
    return min(max(request.narrow, wide), request.limit // 8)


def tile_columns(request: Request, rows: int) -> int:
    return request.tile_columns(rows, tile_bytes(request, rows), request.itemsize)


def _columns(request: Request, rows: int) -> int:
    column, line = rows * request.itemsize, request.width * request.sum_itemsize
    return aliased_columns(column, request.vocab, line, tile_columns(request, rows))


def bytes_outside(request: Request, rows: int) -> int:
    """Bytes of a first chunk's logits that dW has no room for."""
    return (request.vocab - _columns(request, rows)) * rows * request.itemsize


def chunk_rows(request: Request) -> tuple[int, int]:
    """Rows of a chunk, and of the first one, which also has the memory of dW; 0 where it does not."""
    r = request
    some = max(min(r.rows, r.width * r.sum_itemsize // r.itemsize), 1)
    if not (r.may_alias and r.needs_weight and r.drop_mass == 0 and _columns(r, some) > 0):
        return r.kept_rows(), 0
    beside = tile_bytes(r, some)

    def first_rows(chunk: int) -> int:
        """Rows of a first chunk that dW's memory and that of `chunk` rows of logits hold."""
        taken = min(chunk * r.row_bytes + 2 * beside, r.most)
        return bisect.bisect_right(range(1, r.rows + 1), taken, key=lambda rows: bytes_outside(r, rows))

    chunk = r.kept_rows(apart=first_rows(0) - beside // r.row_bytes)
    return chunk, first_rows(chunk)
