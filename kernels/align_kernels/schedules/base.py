"""A schedule: what a call does with a chunk before its gradient is known, and what with that gradient.

One class a schedule. Next to its code it says which calls it does not serve (`why_not`) and what memory it takes
(`plan`). `plan.plan` asks the classes of SCHEDULES in order and takes the first that serves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from align_kernels.schedules import aliasing
from align_kernels.schedules.request import Plan, Request
from align_kernels.schedules.tiles import Chunk, Rows, TiledHead
from align_kernels.units import Objective, Span


class Closed(NamedTuple):
    """A group of units, from its hidden states to its gradients."""

    state: Tensor  # (n, 8)
    value: Tensor  # ()
    sums: Tensor  # (M,) of the loss's metrics


class Schedule:
    """The protocol. `forward` and `backward` see one chunk each; the other methods have a default."""

    name: ClassVar[str]  # in SCHEDULES
    schedule: ClassVar[str]  # as a plan says it; several classes may share it
    compact: ClassVar[bool] = False
    keeps: ClassVar[bool] = True  # the logits of a chunk, until its gradient is made
    drops: ClassVar[bool] = True  # rows without a coefficient of their log-prob, when that arrives late
    # (objective, span, dhidden) -> Closed of a schedule that closes a group of units by itself
    close: Callable[[Objective, Span, Tensor | None], Closed] | None = None

    def __init__(self, tiled: TiledHead) -> None:
        self.tiled = tiled
        self.values: Tensor | None = None  # what was saved of all chunks

    # -- the plan --------------------------------------------------------------------------------------------------
    @classmethod
    def why_not(cls, request: Request) -> str | None:
        """None where this schedule serves the call, else the reason."""
        raise NotImplementedError

    @classmethod
    def plan(cls, request: Request) -> Plan:
        """For a call that it serves."""
        raise NotImplementedError

    @classmethod
    def scratch(cls, request: Request) -> int:
        """Bytes a logit of the tile that is needed in addition to the kept logits."""
        return request.gradient_itemsize or request.itemsize

    @classmethod
    def sized(cls, request: Request, chunk: int, passes: int, why: str, *, first: int = 0, saves: bool = False) -> Plan:
        """The plan with chunks of `chunk` rows.

        `first`: rows of a first chunk whose logits lie in dW's memory, 0 where none do; `saves`: what is left of the
        workspace is for what is saved of the chunks.
        """
        r, each = request, cls.scratch(request)
        chunk = max(min(chunk, r.rows), 1)
        kept = chunk * r.row_bytes if cls.keeps else 0
        if first:
            kept = max(aliasing.bytes_outside(r, first), kept if first < r.rows else 0)
            tile = aliasing.tile_columns(r, first)
        else:
            wide = min(r.narrow if cls.keeps else r.profile.tile_bytes, max(r.limit - kept, r.limit // 16))
            tile = r.tile_columns(chunk, wide, each or r.itemsize)
        scratch = (max(first, chunk) * each + r.copied) * tile
        saved = max(r.limit - kept - scratch, 0) if saves else 0
        return Plan(
            cls.schedule, r.backend, r.rows, r.vocab, r.width, chunk, first or chunk, tile, kept + scratch + saved,
            passes, why, cls.name, r.late, compact=cls.compact, aliased=first > 0, even=r.device == "cpu", saved=saved,
            spare=max(r.limit - kept - scratch - saved, 0), own_gemm=r.own_gemm,
        )  # fmt: skip

    # -- the passes ------------------------------------------------------------------------------------------------
    @property
    def group_rows(self) -> tuple[int, int]:
        """Most rows of a group of units, and of the first one."""
        return self.tiled.plan.chunk_rows, self.tiled.plan.first_rows

    def reserve(self, sizes: Sequence[int]) -> None:
        """Groups of these sizes are about to come, one after the other."""

    def begin(self, rows: int) -> None:
        """A group of so many rows begins, and what was saved of the one before is gone."""

    def forward(self, chunk: Chunk) -> tuple[Tensor, Any]:
        """The finished softmax state [n, 8] of a chunk, and what is saved of it for `backward`."""
        raise NotImplementedError

    def backward(self, chunk: Chunk, state: Tensor, saved: Any, g: Tensor, g_entropy: Tensor | None) -> Tensor | None:
        """Add this chunk's share to `tiled.grads` and return its dX [n, D] (None where hidden needs none).

        g, g_entropy [n]: dL/dlogp, dL/dentropy. Rows without a coefficient are dropped before any GEMM.
        """
        rows = Rows(chunk, state, g, g_entropy)
        live = rows.live()
        return self.tiled.whole(self.gradient(rows, live, saved), live, len(g))

    def gradient(self, rows: Rows, live: Tensor | None, saved: Any) -> Tensor | None:
        """`backward` for the `live` rows [m] (None: all n): this rank's dX [m, D]."""
        raise NotImplementedError

    # -- a gradient that arrives after the call has returned -------------------------------------------------------
    def save(self, saved: Any) -> None:
        """Keep what `forward` saved of the next chunk."""

    def packed(self) -> tuple[Tensor, Tensor]:
        """All that was kept in two tensors that autograd can save: values in the dtype of logits, and their layout."""
        values = self.tiled.empty(0, dtype=self.tiled.logits_dtype) if self.values is None else self.values
        return values, self.tiled.kept.new_empty(0)

    def unpacked(self, values: Tensor, layout: Tensor) -> Iterator[Any]:
        """What was saved of each chunk. It may be asked for more than once, and is not written to."""
        while True:
            yield None
