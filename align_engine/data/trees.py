"""One packed row for a whole batch, in which sequences with the same prompt share it.

The row is made of segments. A segment goes on from its parent: its tokens see those of its ancestors and, causally, its
own, and nothing else. A prompt that several sequences begin with is one segment, and each of their completions another;
a sequence that is alone with its prompt is a single segment, a root. So a batch that shares nothing is a forest of
roots, and no token of any batch is padding.

Letters: S tokens of the row, K segments, B sequences, T targets of the longest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from align_kernels.sums import take_at

IGNORE = -100  # the target of a position that predicts nothing
Ids = Sequence[int]


class Segment(NamedTuple):
    """Tokens begin .. end - 1 of the row, which go on from the segment numbered `parent` (-1: a root)."""

    begin: int
    end: int
    parent: int


class Place(NamedTuple):
    """Where a sequence lies in the row: its targets are the tokens first .. end - 1."""

    before: int  # the position that predicts the first target
    first: int
    end: int


@dataclass(frozen=True)
class Trees:
    """The layout of a packed row, and where its sequences lie in it."""

    segments: tuple[Segment, ...]  # a parent comes before its children
    position_ids: Tensor  # [1, S] int64, counted from the root
    index: Tensor  # [B, T] int64, the position whose hidden state predicts a target (any position where there is none)
    last: Tensor  # [B] int64, the position of each sequence's last token
    reads: Tensor  # [1, S] int64, how many sequences a token is part of
    # for attention over sequences of several lengths in one call: each segment's queries, and the keys that they see
    cu_queries: Tensor  # [K + 1] int32
    cu_keys: Tensor  # [K + 1] int32
    keys: Tensor  # [sum of keys] int64, positions in the row: those of a segment's ancestors, then its own

    @classmethod
    def of(cls, segments: Sequence[Segment], places: Sequence[Place]) -> Trees:
        """The layout of K segments, one behind the other from 0 on, with B sequences in them."""
        before, first, end = torch.tensor(places).T  # [B] each
        keys: list[Tensor] = []
        for begin, stop, parent in segments:
            own = torch.arange(begin, stop)
            keys.append(torch.cat([keys[parent], own]) if parent >= 0 else own)
        lengths = [segment.end - segment.begin for segment in segments]
        size = segments[-1].end
        steps = torch.arange(max(int((end - first).max()), 1))
        index = (first[:, None] - 1 + steps).clamp(max=size - 1)
        index[:, 0] = before
        last = torch.where(end > first, end - 1, before)
        begins = torch.tensor([segment.begin for segment in segments])
        reads = torch.bincount(torch.searchsorted(begins, last, right=True) - 1, minlength=len(segments))
        for number, segment in reversed(list(enumerate(segments))):
            if segment.parent >= 0:
                reads[segment.parent] += reads[number]
        return cls(
            tuple(segments),
            torch.cat([torch.arange(len(seen) - n, len(seen)) for seen, n in zip(keys, lengths)])[None],
            index,
            last,
            reads.repeat_interleave(torch.tensor(lengths))[None],
            _cumulated(lengths),
            _cumulated([len(seen) for seen in keys]),
            torch.cat(keys),
        )

    def to(self, device: torch.device | str) -> Trees:
        """The same on another device."""
        parts = {one.name: getattr(self, one.name) for one in fields(self)}
        return replace(self, **{name: part.to(device) for name, part in parts.items() if isinstance(part, Tensor)})

    @cached_property
    def lengths(self) -> list[int]:
        """[K] tokens of each segment."""
        return [segment.end - segment.begin for segment in self.segments]

    @cached_property
    def paths(self) -> list[list[int]]:
        """[K] numbers of each segment's ancestors, from the root on, and its own."""
        found: list[list[int]] = []
        for number, segment in enumerate(self.segments):
            found.append([*(found[segment.parent] if segment.parent >= 0 else ()), number])
        return found

    @cached_property
    def longest(self) -> tuple[int, int]:
        """Most tokens of a segment, and of a path."""
        return max(self.lengths), max(sum(self.lengths[i] for i in path) for path in self.paths)


def rows_at(hidden: Tensor, index: Tensor) -> Tensor:
    """Rows of hidden [1, S, D] at positions [...]: [..., D]. A row that is taken twice gets its gradients in one
    order."""
    return take_at(hidden[0], index.flatten()).view(*index.shape, -1)


class Packed(NamedTuple):
    """Sequences in one row."""

    input_ids: Tensor  # [1, S] int64
    targets: Tensor  # [B, T] int64, from the left: the tokens of each sequence that are predicted, -100 behind them
    trees: Trees


def pack(sequences: Sequence[tuple[Ids, Ids]]) -> Packed:
    """B sequences of (prompt, completion) in one row, with each prompt once.

    A completion's tokens are its targets, but for its first one where the prompt is empty: nothing predicts it.
    """
    members: dict[tuple[int, ...], list[int]] = {}  # prompt -> the sequences that begin with it
    for number, (prompt, _) in enumerate(sequences):
        members.setdefault(tuple(prompt), []).append(number)
    row: list[int] = []
    segments: list[Segment] = []

    def add(tokens: Ids, parent: int = -1) -> Segment:
        segments.append(Segment(len(row), len(row) + len(tokens), parent))
        row.extend(tokens)
        return segments[-1]

    places: dict[int, Place] = {}
    for prompt, numbers in members.items():
        parent, root = len(segments), add(prompt) if len(numbers) > 1 and prompt else None
        for number in numbers:
            completion = sequences[number][1]
            if root is not None:
                own = add(completion, parent)
                places[number] = Place(root.end - 1, own.begin, own.end)
            else:
                own = add([*prompt, *completion])
                first = own.begin + max(len(prompt), 1)
                places[number] = Place(first - 1, first, own.end)
    in_order = [places[number] for number in range(len(sequences))]
    trees = Trees.of(segments, in_order)
    targets = torch.full(trees.index.shape, IGNORE)
    for target, place in zip(targets, in_order):
        target[: place.end - place.first] = torch.tensor(row[place.first : place.end])
    return Packed(torch.tensor([row]), targets, trees)


def _cumulated(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
