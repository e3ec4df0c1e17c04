"""Rows of a chunk on a GPU: as many as keep its multiprocessors busy.

A GEMM is cut into tiles of its result, and the multiprocessors take one tile each, wave after wave: a last wave that is
nearly empty takes as long as a full one. With 1024 rows dX of a head of 3584 features is 112 tiles on 132
multiprocessors. Chunks add what they cost by themselves: launches, and dW read and written again.

The figures are a model of an H100, not measured; what they decide is a number of rows. Letters: n rows of a chunk, V
columns, D features.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

ROWS, COLUMNS = 128, 256  # of a tile of a GEMM's result
PROCESSORS = 132  # of an H100 and an H200
FLOPS = 730e12 / PROCESSORS  # a second of one multiprocessor
BANDWIDTH = 3.0e12  # bytes a second
FLOAT32 = 1.05  # as long as a GEMM of 16 bits takes one whose result is float32
HIDDEN = 0.5  # of the bytes of dW that are read and written again while its GEMM multiplies
LAUNCHES = 60e-6  # seconds a chunk
NEAR = 1.01  # a time that is as good as the best: fewer rows take less memory


class Head(NamedTuple):
    """What is multiplied with every row."""

    vocab: int  # V
    width: int  # D
    logits: int  # times that logits are made
    needs_input: bool
    needs_weight: bool
    processors: int = 0  # 0: not known


def waves(m: int, n: int, processors: int) -> int:
    """Of the tiles of a result [m, n]."""
    return -(-(-(-m // ROWS) * -(-n // COLUMNS)) // processors)


def seconds(head: Head, n: int, first: bool) -> float:
    """The GEMMs of a chunk of n rows, and what it costs by itself."""
    processors = head.processors or PROCESSORS

    def product(m: int, k: int, n: int) -> float:
        return waves(m, n, processors) * ROWS * COLUMNS * 2 * k / FLOPS

    taken = LAUNCHES + head.logits * FLOAT32 * product(n, head.width, head.vocab)
    if head.needs_input:
        taken += product(n, head.vocab, head.width)
    if head.needs_weight:
        taken += product(head.vocab, n, head.width)
        taken += 0.0 if first else (1 - HIDDEN) * 8 * head.vocab * head.width / BANDWIDTH
    return taken


def total(head: Head, rows: int, chunk: int) -> float:
    """Seconds of all rows in chunks of so many, and a last one."""
    whole, rest = divmod(rows, chunk)
    taken = seconds(head, chunk, True) + (whole - 1) * seconds(head, chunk, False) if whole else 0.0
    return taken + (seconds(head, rest, whole == 0) if rest else 0.0)


@lru_cache(maxsize=4096)
def chunk_rows(head: Head, rows: int, least: int, most: int) -> int:
    """Rows of a chunk, from `least` to `most`: the fewest that take about as long as the best."""
    if rows <= least or most <= least:
        return max(min(rows, most), 1)
    some = [*range(math.ceil(least / ROWS) * ROWS, min(most, rows) + 1, ROWS), min(most, rows)]
    times = {n: total(head, rows, n) for n in some}
    best = min(times.values())
    return min(n for n, taken in times.items() if taken <= NEAR * best)
