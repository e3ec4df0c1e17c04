"""Tiles of logits between two GEMMs: what every schedule is made of.

Letters: n rows of a chunk, c columns of a tile, V vocabulary on this rank, D hidden size, R rank of a LoRA.
Nothing here knows a loss; nothing here is differentiated: `functions.py` wraps it for autograd.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from align_kernels import compaction, exponentials, gemm
from align_kernels.compaction import Held, Piece
from align_kernels.dispatch import BACKENDS, pick
from align_kernels.gemm import gemm_dtype, logits_dtype
from align_kernels.head import Head, Settings
from align_kernels.planner import lent_columns, plan
from align_kernels.sums import add_at

EMPTY_STATE = (-torch.inf, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0)


def float_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums over x: float32, float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


class Needs(NamedTuple):
    """Which tensors of the head need a gradient."""

    hidden: bool
    weight: bool
    bias: bool
    lora_A: bool
    lora_B: bool

    @property
    def head(self) -> bool:
        return self.weight or self.bias or self.lora_A or self.lora_B


class Chunk(NamedTuple):
    """The rows that one GEMM sees."""

    rows: Tensor | slice  # where they lie in the flat batch
    x: Tensor  # (n, D), in the dtype of the GEMMs
    xa: Tensor | None  # (n, R): scaling * x @ A.T
    targets: Tensor  # (n,)
    temperature: Tensor | float

    def select(self, index: Tensor) -> Chunk:
        """The chunk of some of its rows. `rows` no longer apply: the caller scatters."""
        t = self.temperature
        return Chunk(
            slice(0, 0),
            self.x[index],
            None if self.xa is None else self.xa[index],
            self.targets[index],
            t[index] if isinstance(t, Tensor) else t,
        )


class Rows(NamedTuple):
    """Rows of a chunk and their coefficients."""

    chunk: Chunk
    state: Tensor  # (m, 8) finished
    g: Tensor  # (m,) dL/dlogp
    g_entropy: Tensor | None  # (m,) dL/dentropy

    def select(self, index: Tensor) -> Rows:
        h = self.g_entropy
        return Rows(self.chunk.select(index), self.state[index], self.g[index], None if h is None else h[index])


class Lent(NamedTuple):
    """Room for all raw logits of a chunk, tile after tile: the first columns in the memory of a dW still to be written,
    up to its end, the others in `own`."""

    dw: Tensor  # flat
    columns: int
    own: Tensor

    def tile(self, n: int, v0: int, v1: int) -> Tensor:
        place, begin = self.own, n * (v0 - self.columns)
        if v0 < self.columns:
            place, begin = self.dw, len(self.dw) + begin
        return place[begin : begin + n * (v1 - v0)].view(n, v1 - v0)


class Grads:
    """Accumulators of the head's gradients, float32 (float64 for float64 weights), written first, then added to."""

    def __init__(self, run: Runner) -> None:
        def like(x: Tensor | None, needed: bool) -> Tensor | None:
            if x is None or not needed:
                return None
            return run.empty(*x.shape, dtype=float_dtype(x))

        head, needs = run.head, run.needs
        self.head, self.group, self.product = head, run.group, run.product
        self.weight = like(head.weight, needs.weight)
        self.bias = like(head.bias, needs.bias)
        self.lora_A = like(head.lora_A, needs.lora_A)
        self.lora_B = like(head.lora_B, needs.lora_B)
        self.started = False

    def zero(self) -> None:
        """Begin with zeros, for gradients that do not reach every column."""
        if not self.started:
            for grad in (self.weight, self.bias, self.lora_A, self.lora_B):
                if grad is not None:
                    grad.zero_()
            self.started = True

    def add(self, columns: slice | Tensor, dz: Tensor, x: Tensor, xa: Tensor | None) -> None:
        """Add a tile of dL/dz [m, c], with its rows' x [m, D] and xa [m, R]."""
        for grad, b in ((self.weight, x), (self.lora_B, xa)):
            if grad is None or b is None:
                continue
            if isinstance(columns, slice):
                self.product(grad[columns], dz.T, b, add=self.started)
            else:
                rows = grad[columns]  # no column comes twice: no sum in an order of its own, as index_add_ has on a GPU
                self.product(rows, dz.T, b, add=True)
                grad.index_copy_(0, columns, rows)
        if self.bias is not None:
            total = dz.sum(0, dtype=self.bias.dtype)
            self.bias[columns] = self.bias[columns] + total if self.started else total

    def add_rows(self, columns: Tensor, x: Tensor, xa: Tensor | None) -> None:
        """Add one row x [m, D] and xa [m, R] at each of m columns, which may repeat."""
        for grad, rows in ((self.weight, x), (self.lora_B, xa)):
            if grad is not None and rows is not None:
                add_at(grad, columns, rows.to(grad.dtype))

    def add_lora_A(self, dxb: Tensor, x: Tensor) -> None:
        """Add from dL/d(x @ lora_A.T) [m, R]."""
        if self.lora_A is not None:
            da = dxb.T @ x.to(dxb.dtype)
            self.lora_A.copy_(self.lora_A + da if self.started else da)

    def finish(self) -> list[Tensor | None]:
        """The gradients in the dtypes of the tensors they belong to: weight, bias, lora_A, lora_B."""
        self.zero()
        if self.lora_A is not None and self.group is not None:  # the one that every rank has whole
            dist.all_reduce(self.lora_A, group=self.group)
        head, out = self.head, []
        for grad, of in (
            (self.weight, head.weight),
            (self.bias, head.bias),
            (self.lora_A, head.lora_A),
            (self.lora_B, head.lora_B),
        ):
            out.append(None if grad is None or of is None else _narrowed(grad, of.dtype))
        return out


def _narrowed(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """`sums` in a dtype that may be half as wide, on a CPU then in its own memory: no second one, no fresh pages. On a
    GPU the gradient would keep twice its bytes alive until the optimiser's step.

    Blocks double: the elements i .. 2i lie in bytes 4i .. 8i and go to 2i .. 4i, whose own were moved before.
    """
    if sums.device.type != "cpu" or sums.dtype.itemsize != 2 * dtype.itemsize or sums.numel() == 0:
        return sums.to(dtype)
    flat = sums.view(-1)
    out, end = flat.view(dtype)[: len(flat)], min(len(flat), 4096)
    out[:end] = flat[:end].to(dtype)
    while end < len(flat):
        block = slice(end, 2 * end)
        out[block].copy_(flat[block])
        end *= 2
    return out.view(sums.shape)


class Runner:
    """One call: the head's tensors, the plan and the backend, with the scratch that its tiles share."""

    def __init__(
        self,
        head: Head,
        settings: Settings,
        needs: Needs,
        kept: Tensor,
        *,
        late: bool,
        largest_unit: int = 1,
        entropy: bool = False,
        sparse: bool = False,
        by_token: bool = False,
    ) -> None:
        self.head, self.settings, self.needs = head, settings, needs
        self.kept = kept  # (n,) int64: positions of the flat batch that have a target, in the order they are run
        # every position as it lies: rows are views, no copies (pairs are run pair by pair, in another order)
        self.as_it_lies = len(kept) == len(head.targets) and bool((kept.diff() > 0).all())
        self.dtype, self.logits_dtype = gemm_dtype(head), logits_dtype(head)
        self.group = None if settings.tp_group is None else _group(settings.tp_group)
        self.offset, widest, self.vocab = _shard(head.weight.shape[0], head.targets[kept], self.group)
        name = pick(settings.impl, head.weight.device, self.logits_dtype)
        self.backend = BACKENDS[name]
        on_chip, tiles_because = _on_chip(self.backend, head, needs)
        if on_chip:  # no CPU stands behind it whose GEMMs want wider inputs
            self.dtype = head.weight.dtype
        own_gemm = hasattr(self.backend, "has_product") and self.backend.has_product(
            self.dtype, len(kept), widest, head.weight.shape[1]
        )
        self.casts_weight = head.weight.dtype != self.dtype and not (own_gemm and self.backend.reads(head.weight.dtype))
        # an entropy that may be asked for late is made again then
        plain = settings.clamp is None and settings.transform.softcap is None and not (needs.bias or entropy)
        self.plan = plan(
            rows=len(kept),
            vocab=widest,
            width=head.weight.shape[1],
            itemsize=self.logits_dtype.itemsize,
            gradient_itemsize=0 if self.dtype == self.logits_dtype else self.dtype.itemsize,
            weight_itemsize=self.dtype.itemsize if self.casts_weight else 0,
            on_chip=on_chip,
            tiles_because=tiles_because,
            device=head.weight.device.type,
            backend=name,
            own_gemm=own_gemm,
            workspace=settings.workspace,
            needs_input=needs.hidden,
            needs_head=needs.head,
            needs_weight=needs.weight,
            # a kernel of the backend that closes a loss of tokens takes whole rows of logits
            lends=self.logits_dtype == float_dtype(head.weight) and not (by_token and hasattr(self.backend, "losses")),
            late=late,
            plain=plain and self.dtype == self.logits_dtype and hasattr(self.backend, "exponentials"),
            sparse=sparse,
            scale_free=settings.clamp is None or settings.clamp.units == "residual",
            largest_unit=largest_unit,
            drop_mass=settings.drop_mass,
        )
        self._tiles: dict[torch.dtype, Tensor] = {}
        self._w: Tensor | None = None
        self.bias = None if head.bias is None else head.bias.to(torch.promote_types(self.dtype, torch.float32))

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory that is about to be written whole."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.head.weight.device)

    def product(self, acc: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
        """acc (+)= a @ b, by the backend where it says that it is faster."""
        own = self.plan.own_gemm and self.backend.takes_product(acc, a, b)
        (self.backend if own else gemm).product(acc, a, b, add)

    # -- pieces ------------------------------------------------------------------------------------------------
    def chunk(self, begin: int, end: int) -> Chunk:
        """Rows begin .. end of the kept rows."""
        h = self.head
        index: Tensor | slice = self.kept[begin:end]
        if self.as_it_lies:
            index = slice(begin, end)
        x = h.hidden[index].to(self.dtype)
        xa = None
        if h.lora_A is not None:
            xa = x @ h.lora_A.to(self.dtype).T * self.settings.lora_scaling
        temperature = (
            self.settings.transform.temperature if h.temperature is None else h.temperature[index].contiguous()
        )
        return Chunk(index, x, xa, h.targets[index].contiguous(), temperature)

    def chunks(self, begin: int, end: int) -> Iterator[Chunk]:
        """Rows begin .. end in the fewest chunks, all of about one size."""
        count = -(-(end - begin) // self.plan.first_rows)
        for i in range(count):
            yield self.chunk(begin + (end - begin) * i // count, begin + (end - begin) * (i + 1) // count)

    def tiles(self, store: Tensor | Lent | None = None) -> Iterator[tuple[int, int]]:
        """Columns of each tile, none of which lies in two memories of `store`."""
        begin = 0
        for end in (store.columns if isinstance(store, Lent) else 0, self.head.weight.shape[0]):
            for v in range(begin, end, self.plan.tile_cols):
                yield v, min(v + self.plan.tile_cols, end)
            begin = end

    def zeros(self, *shape: int) -> Tensor:
        """A sum in the making: float32, float64 for float64."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        return torch.zeros(shape, dtype=dtype, device=self.head.weight.device)

    def store(self, n: int) -> Tensor:
        """Room for all logits of n rows, tile after tile."""
        return self.empty(n * self.head.weight.shape[0], dtype=self.logits_dtype)

    def store_beside(self, sizes: Sequence[int]) -> Tensor:
        """Room for all logits of any chunk, of `sizes` rows each, but those that dW lends the first its memory for."""
        p, V = self.plan, self.head.weight.shape[0]
        needed = [n * V for n in sizes]
        if p.lends:
            needed[0] -= sizes[0] * lent_columns(sizes[0], V, p.width, p.tile_cols)
        return self.empty(max(needed), dtype=self.logits_dtype)

    def new_state(self, n: int) -> Tensor:
        return torch.tensor(EMPTY_STATE, dtype=torch.float64, device=self.head.weight.device).repeat(n, 1)

    def tile_of(self, store: Tensor | Lent, n: int, v0: int, v1: int) -> Tensor:
        """Logits [n, v1 - v0] of some columns of n rows."""
        if isinstance(store, Lent):
            return store.tile(n, v0, v1)
        return store[n * v0 : n * v1].view(n, v1 - v0)

    def lend(self, store: Tensor, n: int, grads: Grads) -> Tensor | Lent:
        """`store` for n rows, with the memory of dW while nothing stands there."""
        if not self.plan.lends or grads.weight is None or grads.started:
            return store
        V, D = grads.weight.shape
        return Lent(grads.weight.view(-1), lent_columns(n, V, D, self.plan.tile_cols), store)

    def scratch(self, n: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A tile [n, columns] whose memory the next one of this dtype takes."""
        if dtype not in self._tiles:
            self._tiles[dtype] = self.empty(self.plan.first_rows * self.plan.tile_cols, dtype=dtype)
        return self._tiles[dtype][: n * columns].view(n, columns)

    def weight(self, columns: slice | Tensor) -> Tensor:
        """Rows of the weight, in a dtype that `product` takes."""
        w = self.head.weight[columns]
        if not self.casts_weight:
            return w
        if self._w is None:
            self._w = self.empty(self.plan.tile_cols, w.shape[1])
        return self._w[: len(w)].copy_(w)

    def logits(self, chunk: Chunk, w: Tensor, v0: int, v1: int, out: Tensor) -> Tensor:
        """Raw logits of the columns v0 .. v1, whose weight is w [c, D], in `out` [n, c]."""
        self.product(out, chunk.x, w.T, add=False)
        if chunk.xa is not None and self.head.lora_B is not None:
            self.product(out, chunk.xa, self.head.lora_B[v0:v1].to(self.dtype).T, add=True)
        return out

    def common(self, chunk: Chunk, v0: int, v1: int) -> dict:
        """What every primitive but `exponentials` takes; that one serves no softcap."""
        return self.linear(chunk, v0, v1) | dict(softcap=self.settings.transform.softcap)

    def linear(self, chunk: Chunk, v0: int, v1: int) -> dict:
        """The head's transform without its softcap, and where the columns v0 .. v1 stand."""
        return dict(
            offset=self.offset + v0,
            vocab=self.vocab,
            bias=None if self.bias is None else self.bias[v0:v1],
            scale=self.settings.transform.logit_scale,
            temperature=chunk.temperature,
        )

    # -- the two passes ----------------------------------------------------------------------------------------
    def forward(self, chunk: Chunk, store: Tensor | Lent | None = None) -> Tensor:
        """The finished softmax state [n, 8] of a chunk; its raw logits stay in `store` where one is given."""
        n = len(chunk.targets)
        state = self.new_state(n)
        if self.plan.on_chip:
            w = self.head.weight
            self.backend.forward_linear(chunk.x, w, state, chunk.targets, **self.common(chunk, 0, len(w)))
        for v0, v1 in self.tiles(store) if not self.plan.on_chip else ():
            out = self.scratch(n, v1 - v0, self.logits_dtype) if store is None else self.tile_of(store, n, v0, v1)
            z = self.logits(chunk, self.weight(slice(v0, v1)), v0, v1, out)
            self.backend.forward(z, state, chunk.targets, **self.common(chunk, v0, v1))
        return self.merged(state)

    def merged(self, state: Tensor) -> Tensor:
        """The state [n, 8] over all ranks that share the vocabulary."""
        return state if self.group is None else _merge(state, self.group)

    def backward(
        self,
        chunk: Chunk,
        state: Tensor,
        g: Tensor,
        g_entropy: Tensor | None,
        grads: Grads,
        store: Tensor | Lent | None = None,
        consume: bool = False,
        waiting: Held | list[Tensor] | None = None,
    ) -> Tensor | None:
        """Add this chunk's share to `grads` and return its dX [n, D] (None where hidden needs none).

        Rows without a coefficient are dropped before any GEMM. Logits come from `store`, or from what compaction held
        of them, or are made again; with `consume` their gradient may take their place in `store`, which holds
        exponentials where their references are `waiting`.
        """
        rows, active = Rows(chunk, state, g, g_entropy), _active(g, g_entropy)
        live = None if bool(active.all()) else active.nonzero()[:, 0]
        if isinstance(waiting, Held):
            dx = compaction.late_backward(self, rows, active, waiting, grads)
        elif waiting is not None:
            assert store is not None
            dx = exponentials.backward(self, rows, live, store, waiting, grads)
        elif self.plan.compact and isinstance(store, Tensor):
            dx = compaction.backward(self, rows, live, store, consume, grads)
        else:
            dx = self.dense(rows, live, store, consume, grads)
        if dx is None:
            return None
        if self.group is not None:
            dist.all_reduce(dx, group=self.group)
        if live is not None and len(dx) < len(g):
            dx = torch.zeros(len(g), dx.shape[1], dtype=dx.dtype, device=dx.device).index_copy_(0, live, dx)
        return dx

    def dense(
        self, rows: Rows, live: Tensor | None, store: Tensor | Lent | None, consume: bool, grads: Grads
    ) -> Tensor | None:
        """Every column of the `live` rows [m] (None: all n that `store` holds): `grads`, and this rank's dX [m, D]."""
        n = len(rows.g)
        rows = rows if live is None else rows.select(live)
        m = len(rows.g)

        def pieces() -> Iterator[Piece]:
            for v0, v1 in self.tiles(store) if m else ():
                w = self.weight(slice(v0, v1)) if store is None or self.needs.hidden else None
                if store is None:
                    assert w is not None
                    z = self.logits(rows.chunk, w, v0, v1, self.scratch(m, v1 - v0, self.logits_dtype))
                else:
                    z = self.tile_of(store, n, v0, v1)
                    z = z if live is None else z[live]
                in_place = (consume or store is None) and self.dtype == self.logits_dtype
                out = z if in_place else self.scratch(m, v1 - v0, self.dtype)
                yield Piece(z, out, slice(v0, v1), w, self.common(rows.chunk, v0, v1))

        return self.products(rows, pieces(), grads)

    def products(self, rows: Rows, pieces: Iterable[Piece], grads: Grads) -> Tensor | None:
        """Turn raw logits into their gradient, piece by piece, and multiply: `grads` and this rank's dX [m, D]."""
        chunk, m = rows.chunk, len(rows.g)
        h, needs = self.head, self.needs
        dx = self.zeros(m, h.weight.shape[1]) if needs.hidden else None
        dxa = None
        if chunk.xa is not None and (needs.hidden or needs.lora_A):
            dxa = self.zeros(*chunk.xa.shape)
        for z, dz, columns, w, common in pieces:
            if z is not None:
                self.backend.backward(
                    z, rows.state, chunk.targets, rows.g, rows.g_entropy, clamp=self.settings.clamp, out=dz, **common
                )
            if dx is not None:
                assert w is not None
                self.product(dx, dz, w, add=True)
            if dxa is not None and h.lora_B is not None:
                self.product(dxa, dz, h.lora_B[columns].to(self.dtype), add=True)
            grads.add(columns, dz, chunk.x, chunk.xa)
        if dxa is not None and h.lora_A is not None:
            dxa = dxa * self.settings.lora_scaling
            if dx is not None:
                dx += dxa @ h.lora_A.to(dx.dtype)
            grads.add_lora_A(dxa, chunk.x)
        grads.started |= m > 0
        return dx


def _on_chip(backend: ModuleType, head: Head, needs: Needs) -> tuple[float, str]:
    """Bytes of statistics per logit with which the backend makes log-probs and no logits, or 0 and why it does not."""
    if any(needs) or not hasattr(backend, "forward_linear"):
        return 0.0, ""
    reason = "the head has a LoRA" if head.lora_A is not None else backend.why_not_linear(head.hidden, head.weight)
    return (backend.STATISTICS, "") if reason is None else (0.0, reason)


def _active(g: Tensor, g_entropy: Tensor | None) -> Tensor:
    return g != 0 if g_entropy is None else (g != 0) | (g_entropy != 0)


# -- vocabulary-parallel: the weight is sharded along V, hidden and targets are the same on every rank ------------
def _group(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def _shard(columns: int, targets: Tensor, group: dist.ProcessGroup | None) -> tuple[int, int, int]:
    """The first column of this rank, the columns of the widest rank (ranks must take one plan), and of all."""
    if group is None:
        return 0, columns, columns
    rank, checksum = dist.get_rank(group), (targets * torch.arange(1, len(targets) + 1, device=targets.device)).sum()
    shards = torch.zeros(dist.get_world_size(group), 3, dtype=torch.int64, device=targets.device)
    shards[rank] = torch.tensor([columns, len(targets), int(checksum)])
    dist.all_reduce(shards, group=group)
    sizes, rows, checksums = zip(*shards.tolist())
    if len(set(rows)) > 1 or len(set(checksums)) > 1:
        raise ValueError(
            f"the ranks that share the vocabulary hold different targets ({rows} kept): give each of them the same "
            "hidden and targets, or give each the whole weight"
        )
    return sum(sizes[:rank]), max(sizes), sum(sizes)


def _merge(state: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The state of the whole vocabulary from the states of its shards, the same bits on every rank."""
    parts = torch.empty(dist.get_world_size(group), *state.shape, dtype=state.dtype, device=state.device)
    dist.all_gather(list(parts), state, group=group)
    m = parts[:, :, 0].max(0).values
    shift = torch.where(parts[:, :, 1] > 0, parts[:, :, 0] - m, 0.0)
    factor = shift.exp()
    s = parts[:, :, 1]
    first = (parts[:, :, 0] == m).int().argmax(0, keepdim=True)
    argmax = parts[:, :, 6].gather(0, first)[0]
    return torch.stack(
        (
            m,
            (factor * s).sum(0),
            (factor * (parts[:, :, 2] + s * shift)).sum(0),
            (factor * factor * parts[:, :, 3]).sum(0),
            parts[:, :, 4].sum(0),
            parts[:, :, 5].sum(0),
            argmax,
            torch.zeros_like(m),
        ),
        dim=1,
    )
