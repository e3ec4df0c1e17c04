"""The schedules over whole rows of logits. They differ in what is saved between the forward and the backward."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from align_kernels.schedules import aliasing
from align_kernels.schedules.aliasing import Store
from align_kernels.schedules.base import Schedule
from align_kernels.schedules.request import Plan, Request
from align_kernels.schedules.tiles import Chunk, Piece, Rows, TiledHead
from align_kernels.sums import float_dtype


def softmax(tiled: TiledHead, chunk: Chunk, store: Store | None = None) -> Tensor:
    """The finished softmax state [n, 8] of a chunk; its raw logits stay in `store` where one is given."""
    n = len(chunk.targets)
    state = tiled.new_state(n)
    for v0, v1 in tiled.tiles(store):
        out = tiled.scratch(n, v1 - v0, tiled.logits_dtype) if store is None else store.tile(n, v0, v1)
        z = tiled.logits(chunk, tiled.weight(slice(v0, v1)), v0, v1, out)
        tiled.backend.forward(z, state, chunk.targets, **tiled.common(chunk, v0, v1))
    return tiled.merged(state)


def gradient(tiled: TiledHead, rows: Rows, live: Tensor | None, store: Store | None, consume: bool) -> Tensor | None:
    """Every column of the `live` rows [m] (None: all n that `store` holds): `tiled.grads`, and this rank's dX [m, D].

    Logits come from `store` or are made again; with `consume` their gradient may take their place there, but not that
    of some rows alone: rows are done side by side, and one would be written while another is read.
    """
    n = len(rows.g)
    rows = rows if live is None else rows.select(live)
    m, taken = len(rows.g), None if store is None else live

    def pieces() -> Iterator[Piece]:
        for v0, v1 in tiled.tiles(store) if m else ():
            w = tiled.weight(slice(v0, v1)) if store is None or tiled.needs.hidden else None
            if store is None:
                assert w is not None
                z = tiled.logits(rows.chunk, w, v0, v1, tiled.scratch(m, v1 - v0, tiled.logits_dtype))
            else:
                z = store.tile(n, v0, v1)
            in_place = (consume or store is None) and taken is None and tiled.dtype == tiled.logits_dtype
            out = z if in_place else tiled.scratch(m, v1 - v0, tiled.dtype)
            yield Piece(z, out, slice(v0, v1), w, tiled.common(rows.chunk, v0, v1), taken)

    return tiled.products(rows, pieces())


class Forward(Schedule):
    """Log-probs, and no gradient."""

    name = schedule = "forward"
    keeps = False

    @classmethod
    def why_not(cls, request: Request) -> str | None:
        return "a gradient is needed" if request.trains else None

    @classmethod
    def plan(cls, request: Request) -> Plan:
        r, why = request, "nothing needs a gradient"
        if not r.on_chip:
            why += f"; logits pass through tiles: {r.tiles_because}" if r.tiles_because else ""
            return cls.sized(r, r.passing_rows(cls.scratch(r)), 1, why)
        chunk = max(min(r.rows, r.profile.max_rows, int(r.limit / (r.vocab * r.on_chip + 1))), 1)
        taken = math.ceil(chunk * r.vocab * r.on_chip)
        return Plan(
            cls.schedule, r.backend, r.rows, r.vocab, r.width, chunk, chunk, r.vocab, taken, 1, why, cls.name, r.late,
            on_chip=True,
        )  # fmt: skip

    @classmethod
    def scratch(cls, request: Request) -> int:
        return request.itemsize

    def forward(self, chunk: Chunk) -> tuple[Tensor, None]:
        tiled = self.tiled
        if not tiled.plan.on_chip:
            return softmax(tiled, chunk), None
        chip, w, state = tiled.backend.on_chip, tiled.head.weight, tiled.new_state(len(chunk.targets))
        assert chip is not None
        chip.forward(chunk.x, w, state, chunk.targets, **tiled.common(chunk, 0, len(w)))
        return tiled.merged(state), None


class Keep(Schedule):
    """All logits fit in the workspace and are saved until g arrives: one chunk."""

    name = schedule = "keep"

    @classmethod
    def why_not(cls, request: Request) -> str | None:
        if not request.late:
            return "g is known while its logits are there"
        if not request.fits:
            return f"g arrives later and {request.logits_in_words} do not fit in {request.limit_in_words}"
        return None

    @classmethod
    def plan(cls, request: Request) -> Plan:
        return cls.sized(request, request.rows, request.passes, f"{request.logits_in_words} fit and wait for g")

    def forward(self, chunk: Chunk) -> tuple[Tensor, Store]:
        store = self.tiled.store(len(chunk.targets))
        return softmax(self.tiled, chunk, store), store

    def gradient(self, rows: Rows, live: Tensor | None, saved: Store) -> Tensor | None:
        return gradient(self.tiled, rows, live, saved, consume=False)

    def save(self, saved: Store) -> None:
        self.values = saved.own

    def unpacked(self, values: Tensor, layout: Tensor) -> Iterator[Store]:
        yield self.tiled.stored(values)


class Recompute(Schedule):
    """Nothing is saved: the logits are made again when g is known."""

    name = schedule = "recompute"
    keeps = False

    @classmethod
    def why_not(cls, request: Request) -> str | None:
        return None

    @classmethod
    def plan(cls, request: Request) -> Plan:
        why = Keep.why_not(request) if request.late else OnePass.why_not(request)
        rows = request.passing_rows(cls.scratch(request), logits=2)
        return cls.sized(request, rows, request.passes + 1, str(why))

    @classmethod
    def scratch(cls, request: Request) -> int:
        return request.itemsize + request.gradient_itemsize

    def forward(self, chunk: Chunk) -> tuple[Tensor, None]:
        return softmax(self.tiled, chunk), None

    def gradient(self, rows: Rows, live: Tensor | None, saved: None) -> Tensor | None:
        return gradient(self.tiled, rows, live, None, consume=True)


class OnePass(Schedule):
    """The loss closes inside a chunk: g is known while the logits are there, and their gradient takes their place."""

    name = schedule = "one pass"

    @classmethod
    def why_not(cls, request: Request) -> str | None:
        r = request
        if r.late:
            return "g arrives after the forward has returned"
        _, first = aliasing.chunk_rows(r)
        if first == r.rows > 0 or (r.wide_enough and r.largest_unit <= r.room):
            return None
        cause = f"a unit has {r.largest_unit} rows and" if r.largest_unit > r.room else "too few for the GEMMs:"
        return f"{cause} {r.limit_in_words} keep the logits of {r.room} rows"

    @classmethod
    def plan(cls, request: Request) -> Plan:
        why = "the loss closes inside a chunk, so g is known while its logits are there"
        chunk, first = aliasing.chunk_rows(request)
        return cls.sized(request, chunk, request.passes, why, first=first)

    @classmethod
    def scratch(cls, request: Request) -> int:
        return request.gradient_itemsize

    def reserve(self, sizes: Sequence[int]) -> None:
        self.store = self.tiled.store_beside(sizes, self.kept_dtype) if sizes else None

    @property
    def kept_dtype(self) -> torch.dtype:
        return self.tiled.logits_dtype

    def room(self, n: int) -> Store:
        """For all logits of n rows; that of the chunk before is free again."""
        assert self.store is not None
        return self.tiled.alias(self.store, n)

    def forward(self, chunk: Chunk) -> tuple[Tensor, Store]:
        store = self.room(len(chunk.targets))
        return softmax(self.tiled, chunk, store), store

    def gradient(self, rows: Rows, live: Tensor | None, saved: Store) -> Tensor | None:
        return gradient(self.tiled, rows, live, saved, consume=True)


class Unscaled(Schedule):
    """With a frozen head dX over g is made at once and saved; a gradient of the entropy makes the logits again."""

    drops = False

    def backward(
        self, chunk: Chunk, state: Tensor, saved: Tensor, g: Tensor, g_entropy: Tensor | None
    ) -> Tensor | None:
        if g_entropy is not None:
            return super().backward(chunk, state, None, g, g_entropy)
        return saved * g[:, None] if self.tiled.plan.late else saved.mul_(g[:, None])

    def gradient(self, rows: Rows, live: Tensor | None, saved: Store | None) -> Tensor | None:
        return gradient(self.tiled, rows, live, saved, consume=True)

    def begin(self, rows: int) -> None:
        self.end = 0

    def save(self, saved: Tensor) -> None:
        tiled, width = self.tiled, saved.shape[1]
        values = self.values
        if values is None:
            values = self.values = tiled.empty(len(tiled.kept) * width, dtype=tiled.logits_dtype)
        begin, self.end = self.end, self.end + len(saved)
        values.view(-1, width)[begin : self.end] = saved

    def unpacked(self, values: Tensor, layout: Tensor) -> Iterator[Tensor]:
        rows = values.view(-1, self.tiled.head.hidden.shape[1])
        for begin, end in self.tiled.spans(0, len(rows)):
            yield rows[begin:end]


class Frozen(Unscaled):
    """dX over g from a chunk's logits, any head."""

    name = schedule = "frozen"

    @classmethod
    def why_not(cls, request: Request) -> str | None:
        if request.needs_head:
            return "the head is trained"
        if not request.late:
            return "g is known while its logits are there"
        if not request.scale_free:
            return "a clamp in gradient units needs g"
        return None if request.wide_enough else "too few rows of logits fit in the workspace for the GEMMs"

    @classmethod
    def plan(cls, request: Request) -> Plan:
        why = "the head is frozen, so dX is kept without its factor g"
        return cls.sized(request, request.kept_rows(), request.passes, why)

    @classmethod
    def scratch(cls, request: Request) -> int:
        return request.gradient_itemsize

    def begin(self, rows: int) -> None:
        super().begin(rows)
        self.store = self.tiled.store(min(self.tiled.plan.chunk_rows, rows))

    def forward(self, chunk: Chunk) -> tuple[Tensor, Tensor | None]:
        state = softmax(self.tiled, chunk, self.store)
        one = torch.ones(len(state), dtype=float_dtype(self.tiled.head.hidden), device=state.device)
        return state, self.tiled.whole(self.gradient(Rows(chunk, state, one, None), None, self.store), None, len(one))
