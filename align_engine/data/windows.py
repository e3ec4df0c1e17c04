"""Rows in the order of training, as a pure function of (seed, step): nothing to save, nothing to replay on resume.

A window is what one optimiser step sees: per_device_train_batch_size x gradient_accumulation_steps x processes rows of
the epoch's permutation. It does not depend on how those three, or tokens_per_batch, share it out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow.compute

from align_engine.data.batches import Batch, epoch_order, split_order
from align_engine.data.fingerprint import content_hash
from align_engine.data.shares import Weight, balanced, cut

if TYPE_CHECKING:
    from datasets import Dataset

    from align_engine.data.sources import Origin

pc: Any = pyarrow.compute
TRIED = 8  # rows that a layout is tried on
READ = 1000  # rows that are shared out at a time
READ_TOGETHER = (("completion", "chosen", "rejected"), ("kl_completion",))  # completions of a row in one forward pass
Clock = Callable[[str], AbstractContextManager[None]]  # of a phase's seconds


class Micro(NamedTuple):
    """One forward pass. A rank without rows repeats one with `real` False, so that all run the same collectives."""

    batch: Batch
    real: bool


class Source:
    """Tokenised rows, cut for one rank.

    Args:
        rows: what `align_engine.data.tokenize.prepare` returns.
        collate: rows, pad id -> Batch.
        pad_id: id to pad with (masks alone say what is padding).
        batch_size: rows of one forward pass on one device.
        accumulation: forward passes per optimiser step.
        rank, world: this process, and how many there are.
        seed: of the epochs' permutations.
    """

    origin: Origin  # of the rows, for messages

    def __init__(
        self, rows: Dataset, collate: Callable[..., Batch], pad_id: int, batch_size: int, accumulation: int = 1,
        rank: int = 0, world: int = 1, seed: int = 0,
    ) -> None:  # fmt: skip
        self.rows, self.collate, self.pad_id = rows, collate, pad_id
        self.packed = False  # each forward pass reads one row without padding
        self.tokens_per_batch: int | None = None  # most tokens of a packed one; None: so many rows
        self.batch_size, self.rank, self.world, self.seed = batch_size, rank, world, seed
        self.window_size = batch_size * accumulation * world
        self.steps_per_epoch = math.ceil(len(rows) / self.window_size)
        self.samples: list[dict[str, Any]] = []  # what the policy wrote last, some of it: rows of samples.jsonl
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def __len__(self) -> int:
        return len(self.rows)

    def window_rows(self, step: int) -> list[int]:
        """Numbers of the rows that optimiser step `step` (from 0) sees, over all ranks."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, split_order(epoch_order(len(self.rows), self.seed, epoch), self.window_size)
        return self._epoch[1][place]

    def prepare(self, step: int, clock: Clock) -> None:
        """Have the rows that step `step` learns from: fixed ones are there."""

    def window(self, step: int) -> list[Micro]:
        """This rank's share of a window. Packed ones have the rows of a prompt side by side, so that they share it."""
        rows = self.window_rows(step)
        return list(self.share(sorted(rows) if self.packed else rows))

    def share(self, rows: list[int]) -> Iterator[Micro]:
        """This rank's forward passes over `rows`; every rank yields equally many."""
        turn = self.batch_size * self.world
        by_tokens = self.tokens_per_batch is not None or (self.packed and self.world > 1)
        for piece in split_order(rows, max(READ // turn, 1) * turn if by_tokens else turn):
            for parts in self.by_tokens(piece) if by_tokens else [np.array_split(piece, self.world)]:
                mine = [int(row) for row in parts[self.rank]]
                other = next(part for part in parts if len(part))
                yield Micro(self.batch(mine or [int(other[0])]), bool(mine))

    def by_tokens(self, rows: list[int]) -> Iterator[Sequence[list[int]]]:
        """Packed forward passes over `rows`, one of each rank at a time; the ranks read about equally many tokens."""
        weights, most = self.weights(rows), self.tokens_per_batch
        room = len(rows) if most else math.ceil(len(rows) / (self.batch_size * self.world)) * self.batch_size
        passes: list[list[list[int]]] = []
        for share in balanced(weights, self.world, room):
            pieces = cut([weights[i] for i in share], most) if most else split_order(range(len(share)), self.batch_size)
            passes.append([[rows[share[i]] for i in piece] for piece in pieces])
        return zip_longest(*passes, fillvalue=list[int]())

    def weights(self, rows: list[int]) -> list[Weight]:
        """What each of the rows has to read."""
        table: Any = self.rows.with_format("arrow")[rows]
        names = [f"{side}_ids" for sides in READ_TOGETHER for side in sides]
        own = {name: _lengths(table[name], np.add) for name in names if name in table.column_names}
        together = [sum(own[f"{side}_ids"] for side in sides if f"{side}_ids" in own) for sides in READ_TOGETHER]
        prompts = [np.asarray(prompt.values) for prompt in table["prompt_ids"]]
        most = np.maximum(*np.broadcast_arrays(*together))
        return [Weight(prompt.tobytes(), len(prompt), int(size)) for prompt, size in zip(prompts, most)]

    def batch(self, rows: list[int]) -> Batch:
        """The rows of these numbers, collated."""
        return self.collate(self.records(rows), pad_id=None if self.packed else self.pad_id)

    def records(self, rows: list[int]) -> list[dict[str, Any]]:
        """The rows of these numbers, as dicts; their `index` is that number, and no longer that of the file."""
        columns = self.rows[rows] | {"index": rows}
        return [dict(zip(columns, values)) for values in zip(*columns.values())]

    def trial(self) -> list[dict[str, Any]]:
        """Some of the first step's rows, to try a layout on: the same on all ranks."""
        return self.records(sorted(self.window_rows(0))[: min(self.batch_size, TRIED)])

    def start(self, engine: Any, learns: bool) -> None:
        """Know the engine, and whether it learns from these rows or is evaluated on them. Fixed rows need neither."""

    def evaluate(self, engine: Any) -> dict[str, float]:
        """Loss and metrics of an engine over all rows, named with eval_ in front."""
        return engine.evaluate(self)

    def longest(self) -> int:
        """Tokens of the longest row, prompt and completion together."""
        prompts, *completions = self.lengths()
        return max(pc.max(pc.add(prompts, lengths)).as_py() for lengths in completions)

    def lengths(self) -> list[Any]:
        """Tokens in each row's prompt, and in each of its completions; of several answers in the longest."""
        table: Any = self.rows.with_format("arrow")[:]
        names = sorted((name for name in table.column_names if name.endswith("_ids")), key=lambda x: x != "prompt_ids")
        return [pyarrow.array(_lengths(table[name], np.maximum)) for name in names]

    def fingerprint(self) -> str:
        """Hash of what is learnt from: the token ids of all rows, and the numbers that they carry."""
        return content_hash(self.rows.remove_columns("index"))


def _lengths(column: Any, of_several: np.ufunc) -> np.ndarray:
    """Tokens of each row's ids; of several answers their sum, or whatever else is made of them."""
    ids = column.combine_chunks()
    counts = np.asarray(pc.list_value_length(ids))
    if not pyarrow.types.is_list(ids.type.value_type):
        return counts
    inner = np.asarray(pc.list_value_length(pc.list_flatten(ids)))
    return of_several.reduceat(inner, np.cumsum(counts) - counts)


def endless_order(n: int, seed: int, place: int) -> int:
    """The number at `place` of an endless row of permutations of range(n)."""
    return int(_permutation(n, seed, place // n)[place % n])


@lru_cache(maxsize=2)  # places are asked one after the other: this epoch's, and the next one's at its end
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.array(epoch_order(n, seed, epoch))


def total_steps(source: Source, epochs: float, max_steps: int) -> int:
    """Optimiser steps of a run, as transformers counts them."""
    return max_steps if max_steps > 0 else max(math.ceil(epochs * source.steps_per_epoch), 1)


def rows_seen(source: Source, steps: int) -> list[int]:
    """Numbers of the rows that the first `steps` steps see, each once, in order."""
    if steps >= source.steps_per_epoch:
        return list(range(len(source)))
    return sorted({row for step in range(steps) for row in source.window_rows(step)})
