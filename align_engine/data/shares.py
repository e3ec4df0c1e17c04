"""Packed rows shared out among ranks and forward passes, by their tokens.

Ranks wait for each other at the end of a step, so the one with most tokens sets its time. Rows of one prompt read it
once where they share a forward pass, so they stay together, unless one rank would have much more to read than another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

EVEN = 0.01  # of a fair share: what ranks may differ by without further trades


class Weight(NamedTuple):
    """What a row has to read."""

    prompt: bytes | tuple[int, ...]  # equal for rows that share it
    shared: int  # tokens of the prompt
    own: int  # tokens of the completions


class Share:
    """The rows of one rank, by their numbers."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.weights, self.rows, self.prompts, self.tokens = weights, list[int](), Counter[bytes | tuple[int, ...]](), 0

    def add(self, row: int) -> None:
        self.tokens += self.cost(row)
        self.rows.append(row)
        self.prompts[self.weights[row].prompt] += 1

    def remove(self, row: int) -> None:
        self.rows.remove(row)
        self.prompts[self.weights[row].prompt] -= 1
        self.tokens -= self.cost(row)

    def cost(self, row: int, instead_of: int | None = None) -> int:
        """Tokens that a further row adds, where it may come in place of another."""
        prompt, shared, own = self.weights[row]
        gone = instead_of is not None and self.weights[instead_of].prompt == prompt
        return own + shared * (self.prompts[prompt] - gone <= 0)

    def saved(self, row: int) -> int:
        """Tokens that are read no more where a row of it leaves."""
        prompt, shared, own = self.weights[row]
        return own + shared * (self.prompts[prompt] == 1)


def tokens(weights: Sequence[Weight]) -> int:
    """Tokens of rows that share a forward pass."""
    return sum(row.own for row in weights) + sum({row.prompt: row.shared for row in weights}.values())


def balanced(weights: Sequence[Weight], world: int, room: int) -> list[list[int]]:
    """The rows of each rank, by their numbers and in order: as few tokens as can be found for the rank that has most.

    Args:
        room: most rows of a rank.
    """
    prompts: dict[bytes | tuple[int, ...], list[int]] = {}
    for number, row in enumerate(weights):
        prompts.setdefault(row.prompt, []).append(number)
    shares = [Share(weights) for _ in range(world)]
    for group in sorted(prompts.values(), key=lambda group: -tokens([weights[i] for i in group])):
        fits = [share for share in shares if len(share.rows) + len(group) <= room]
        together = min(fits, key=lambda share: share.tokens) if fits else None
        for i in group:
            free = [share for share in shares if len(share.rows) < room]
            (together or min(free, key=lambda share: share.tokens + share.cost(i))).add(i)
    while trade(shares, room):
        pass
    return [sorted(share.rows) for share in shares]


def trade(shares: Sequence[Share], room: int) -> bool:
    """Move a row from the rank that has most tokens to the one that has least, or change it for one of that one's,
    where neither has as many afterwards: whether there is such a trade."""
    most, least = max(shares, key=lambda share: share.tokens), min(shares, key=lambda share: share.tokens)
    best, limit = None, most.tokens
    if most.tokens - least.tokens <= EVEN * most.tokens:
        return False
    for row in most.rows:
        left = most.tokens - most.saved(row)
        for other in (None, *least.rows):
            if other is None and len(least.rows) >= room:
                continue
            here = left + (0 if other is None else most.cost(other, row))
            there = least.tokens + least.cost(row, other) - (0 if other is None else least.saved(other))
            if max(here, there) < limit:
                best, limit = (row, other), max(here, there)
    if best is None:
        return False
    row, other = best
    most.remove(row)
    if other is not None:
        least.remove(other)
        most.add(other)
    least.add(row)
    return True


def cut(weights: Sequence[Weight], most: int) -> Iterator[list[int]]:
    """Consecutive pieces, by the rows' numbers, of at most so many tokens. A row that has more is alone."""
    piece: list[int] = []
    size, prompts = 0, set[bytes | tuple[int, ...]]()
    for number, row in enumerate(weights):
        if piece and size + row.own + row.shared * (row.prompt not in prompts) > most:
            yield piece
            piece, size, prompts = [], 0, set()
        size += row.own + row.shared * (row.prompt not in prompts)
        prompts.add(row.prompt)
        piece.append(number)
    if piece:
        yield piece
