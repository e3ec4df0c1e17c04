"""The tiled head of one call: what every schedule is made of.

Letters: n rows of a chunk, m of them, c columns of a tile, V vocabulary on this rank, D hidden size, R rank of a LoRA.
Nothing here knows a loss or a schedule, and nothing here is differentiated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from align_kernels import gemm
from align_kernels.backends import Backend, Products
from align_kernels.backends import state as states
from align_kernels.backends.arguments import Linear, Transform
from align_kernels.dispatch import BACKENDS, pick
from align_kernels.gemm import gemm_dtype, logits_dtype
from align_kernels.head import Head, Needs, Settings
from align_kernels.schedules import sharded
from align_kernels.schedules.aliasing import Store, aliased_columns, pitch
from align_kernels.schedules.request import Plan, row_step
from align_kernels.sums import add_at, float_dtype, positions, read_back
from align_kernels.units import cut


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """The rows that one GEMM sees."""

    rows: Tensor | slice  # where they lie in the flat batch
    targets: Tensor  # (n,)
    temperature: Tensor | float
    inputs: Callable[[], tuple[Tensor, Tensor | None]]  # makes x and xa: a gradient that is there already needs neither
    live: int | None = None  # rows with a coefficient, where that is known

    @cached_property
    def _inputs(self) -> tuple[Tensor, Tensor | None]:
        return self.inputs()

    @property
    def x(self) -> Tensor:  # (n, D), in the dtype that GEMMs read
        return self._inputs[0]

    @property
    def xa(self) -> Tensor | None:  # (n, R): scaling * x @ A.T, in the dtype of a LoRA's products
        return self._inputs[1]

    def with_live(self, live: int) -> Chunk:
        """The same chunk, with the number of its rows that have a coefficient."""
        return dataclasses.replace(self, live=live, inputs=lambda: self._inputs)

    def select(self, index: Tensor | slice) -> Chunk:
        """The chunk of some of its rows. `rows` no longer apply: the caller scatters."""

        def inputs() -> tuple[Tensor, Tensor | None]:
            return self.x[index], None if self.xa is None else self.xa[index]

        t = self.temperature
        return Chunk(slice(0, 0), self.targets[index], t[index] if isinstance(t, Tensor) else t, inputs)


class Rows(NamedTuple):
    """Rows of a chunk and their coefficients."""

    chunk: Chunk
    state: Tensor  # (m, 8) finished
    g: Tensor  # (m,) dL/dlogp
    g_entropy: Tensor | None  # (m,) dL/dentropy

    def select(self, index: Tensor) -> Rows:
        h = self.g_entropy
        return Rows(self.chunk.select(index), self.state[index], self.g[index], None if h is None else h[index])

    def active(self) -> Tensor:
        """Whether a row has a coefficient: bool (m,)."""
        return self.g != 0 if self.g_entropy is None else (self.g != 0) | (self.g_entropy != 0)

    def live(self) -> Tensor | None:
        """Those that have, int64, ascending; None: all."""
        if self.chunk.live == len(self.g):
            return None
        active = self.active()
        (count,) = read_back(active.sum()[None]) if self.chunk.live is None else (self.chunk.live,)
        return None if count == len(active) else positions(active, count)


class Piece(NamedTuple):
    """A tile of raw logits on its way to its gradient."""

    z: Tensor | None  # (n, c); None: `out` holds their gradient already
    out: Tensor  # (m, c) for their gradient, may be z where all its rows are taken
    columns: slice | Tensor  # (c,) of this rank
    w: Tensor | None  # (c, D) their weight; None where hidden needs no gradient
    common: Transform  # of these columns
    rows: Tensor | None = None  # (m,) int64: the rows of z that are taken; None: all


class Grads:
    """Accumulators of the head's gradients, float32 (float64 for float64 weights), written first, then added to.

    Where gradients reach only some columns, each row of dW is written when it is first reached, and those that none
    reaches are neither written nor read before the end.
    """

    def __init__(self, tiled: TiledHead) -> None:
        def like(x: Tensor | None, needed: bool) -> Tensor | None:
            if x is None or not needed:
                return None
            return tiled.empty(*x.shape, dtype=float_dtype(x))

        head, needs = tiled.head, tiled.needs
        self.head, self.group, self.product, self.own = head, tiled.group, tiled.product, tiled.backend.row_sums
        self.weight = like(head.weight, needs.weight)
        self.bias = like(head.bias, needs.bias)
        self.lora_A = like(head.lora_A, needs.lora_A)
        self.lora_B = like(head.lora_B, needs.lora_B)
        self.started = False
        self.reached: Tensor | None = None  # (V,) bool: rows of dW that are written; None: all, or none yet

    def begin_by_rows(self) -> None:
        """Gradients that do not reach every column are about to be added."""
        if self.weight is not None and self.reached is None:
            self.reached = torch.full(self.weight.shape[:1], self.started, device=self.weight.device)
        if not self.started:
            for grad in (self.bias, self.lora_A, self.lora_B):
                if grad is not None:
                    grad.zero_()
            self.started = True

    def add(self, columns: slice | Tensor, dz: Tensor, x: Tensor, xa: Tensor | None) -> None:
        """Add a tile of dL/dz [m, c], with its rows' x [m, D] and xa [m, R]. Columns in a tensor [c] are unique, and
        come after `begin_by_rows`."""
        self._add_to_weight(columns, dz, x)
        if self.lora_B is not None and xa is not None:
            if isinstance(columns, slice):
                self.product(self.lora_B[columns], dz.T, xa, add=self.started)
            else:
                rows = self.lora_B[columns]
                self.product(rows, dz.T, xa, add=True)
                self.lora_B.index_copy_(0, columns, rows)
        if self.bias is not None:
            total = dz.sum(0, dtype=self.bias.dtype)
            self.bias[columns] = self.bias[columns] + total if self.started else total

    def _add_to_weight(self, columns: slice | Tensor, dz: Tensor, x: Tensor) -> None:
        dw = self.weight
        if dw is None:
            return
        if isinstance(columns, slice):
            self._write_all_rows()
            self.product(dw[columns], dz.T, x, add=self.started)
            return
        # no column comes twice: each sum has one order, which index_add_ has not on a GPU
        rows, reached = dw.new_empty(len(columns), dw.shape[1]), self.reached
        assert reached is not None
        self.product(rows, dz.T, x, add=False)
        if self.own is not None:
            self.own.add(dw, reached, columns, rows)
        else:
            rows += dw[columns].where(reached[columns][:, None], 0.0)  # memory that is not written holds anything
            dw.index_copy_(0, columns, rows)
            reached.index_fill_(0, columns, True)

    def _write_all_rows(self) -> None:
        """Zeros in the rows of dW that nothing has reached."""
        if self.weight is not None and self.reached is not None:
            if self.own is not None:
                self.own.finish(self.weight, self.reached, self.weight)
            else:
                self.weight.masked_fill_(~self.reached[:, None], 0.0)
            self.reached = None

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
        if not self.started:
            self.begin_by_rows()
        if self.lora_A is not None and self.group is not None:  # the one that every rank has whole
            dist.all_reduce(self.lora_A, group=self.group)
        head, out = self.head, [self._finished_weight()]
        for grad, of in ((self.bias, head.bias), (self.lora_A, head.lora_A), (self.lora_B, head.lora_B)):
            out.append(None if grad is None or of is None else narrowed(grad, of.dtype))
        return out

    def _finished_weight(self) -> Tensor | None:
        dw, dtype = self.weight, self.head.weight.dtype
        if dw is None:
            return None
        if self.own is None or self.reached is None or dw.dtype == dtype:
            self._write_all_rows()
            return narrowed(dw, dtype)
        out = torch.empty_like(dw, dtype=dtype)
        self.own.finish(dw, self.reached, out)
        return out


def narrowed(sums: Tensor, dtype: torch.dtype) -> Tensor:
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


class TiledHead:
    """One call: the head's tensors, the plan and the backend, with the memory that its tiles share."""

    def __init__(
        self, head: Head, settings: Settings, needs: Needs, kept: Tensor, plan: Callable[[TiledHead], Plan],
        ordered: bool = True,
    ) -> None:  # fmt: skip
        self.head, self.settings, self.needs = head, settings, needs
        self.kept = kept  # (n,) int64: positions of the flat batch that have a target, in the order they are run
        # every position as it lies: rows are views, no copies (pairs are run pair by pair, in another order)
        self.as_it_lies = ordered and len(kept) == len(head.targets)
        dtypes = head.hidden.dtype, head.weight
        self.logits_dtype = logits_dtype(*dtypes)
        self.group = None if settings.tp_group is None else sharded.group_of(settings.tp_group)
        self.offset, self.widest, self.vocab = sharded.shard(head.weight.shape[0], head.targets[kept], self.group)
        self.backend_name = pick(settings.impl, head.weight.device, self.logits_dtype)
        self.backend = BACKENDS[self.backend_name]
        own = self.backend.products
        # a float32 LoRA, or such a bias, asks for gradients in float32
        read = (head.hidden, head.weight, head.lora_A, head.lora_B, head.bias if needs.bias else None)
        narrow = own is not None and all(own.serves(x.dtype) for x in read if x is not None)
        self.dtype = gemm_dtype(*dtypes, narrow)
        self.on_chip, self.tiles_because = _on_chip(self.backend, head, needs)
        if self.on_chip:  # no CPU stands behind it whose GEMMs want wider inputs
            self.dtype = head.weight.dtype
        if own is not None and not own.serves(self.dtype, len(kept), self.widest, head.weight.shape[1]):
            own = None
        self.own_gemm, self.product = own is not None, partial(_product, own)
        # a CPU's products of few columns are no slower in float32, nor are those of two dtypes
        self.lora_dtype = self.dtype if own is None else torch.promote_types(self.dtype, torch.float32)
        self.casts_weight = head.weight.dtype != self.dtype and not (own is not None and own.reads(head.weight.dtype))
        self.plan = plan(self)
        self.step = row_step(head.weight.device.type)
        self.bias = None if head.bias is None else head.bias.to(torch.promote_types(self.dtype, torch.float32))
        self._scratch: dict[torch.dtype, Tensor] = {}
        self._weight: Tensor | None = None

    @cached_property
    def grads(self) -> Grads:
        """The sums of the head's gradients, made when the first is added."""
        return Grads(self)

    # -- memory ----------------------------------------------------------------------------------------------------
    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory that is about to be written whole."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.head.weight.device)

    def zeros(self, *shape: int) -> Tensor:
        """A sum in the making: float32, float64 for float64."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        return torch.zeros(shape, dtype=dtype, device=self.head.weight.device)

    def new_state(self, n: int) -> Tensor:
        return states.empty(n, self.head.weight.device)

    def store(self, n: int) -> Store:
        """Room for all logits of n rows, tile after tile."""
        return self.stored(self.empty(n * self.columns, dtype=self.logits_dtype))

    def stored(self, own: Tensor) -> Store:
        """All logits of a chunk that are kept in `own`, flat."""
        return Store(own, self.step)

    @property
    def columns(self) -> int:
        """Of a row of this rank's logits in a store."""
        return pitch(self.head.weight.shape[0], self.step)

    def store_beside(self, sizes: Sequence[int], dtype: torch.dtype) -> Store:
        """Room for all logits of any chunk, of `sizes` rows each, but those of the first that lie in dW's memory."""
        needed = [n * self.columns for n in sizes]
        if self.plan.aliased:
            needed[0] -= sizes[0] * self._aliased(sizes[0], dtype)
        return self.stored(self.empty(max(needed), dtype=dtype))

    def alias(self, store: Store, n: int) -> Store:
        """`store` for n rows, with the memory of dW while nothing stands there."""
        if not self.plan.aliased or self.grads.weight is None or self.grads.started:
            return store
        dtype = store.own.dtype
        return Store(store.own, self.step, self.grads.weight.view(-1).view(dtype), self._aliased(n, dtype))

    def _aliased(self, n: int, dtype: torch.dtype) -> int:
        """Columns of n rows of `dtype` that lie in dW's memory."""
        w = self.head.weight
        line = w.shape[1] * float_dtype(w).itemsize
        return aliased_columns(n * dtype.itemsize, w.shape[0], line, self.plan.tile_cols)

    def tile(self, n: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A tile [n, columns] of its own, about to be written whole."""
        width = pitch(columns, self.step)
        return self.empty(n, width, dtype=dtype)[:, :columns]

    def scratch(self, n: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A tile [n, columns] whose memory the next one of this dtype takes."""
        if dtype not in self._scratch:
            self._scratch[dtype] = self.empty(self.plan.first_rows * pitch(self.plan.tile_cols, self.step), dtype=dtype)
        width = pitch(columns, self.step)
        return self._scratch[dtype][: n * width].view(n, width)[:, :columns]

    # -- chunks, tiles and their products --------------------------------------------------------------------------
    def chunk(self, begin: int, end: int) -> Chunk:
        """Rows begin .. end of the kept rows."""
        head = self.head
        index = slice(begin, end) if self.as_it_lies else self.kept[begin:end]

        def inputs() -> tuple[Tensor, Tensor | None]:
            x = head.hidden[index].to(self.dtype)
            if head.lora_A is None:
                return x, None
            of = self.lora_dtype
            return x, x.to(of) @ head.lora_A.to(of).T * self.settings.lora_scaling

        t = head.temperature
        temperature = self.settings.transform.temperature if t is None else t[index].contiguous()
        return Chunk(index, head.targets[index].contiguous(), temperature, inputs)

    def spans(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """The first row and the end of each of the fewest chunks that hold begin .. end."""
        return cut(begin, end, self.plan.first_rows, self.plan.even)

    def chunks(self, begin: int, end: int) -> Iterator[Chunk]:
        return (self.chunk(*span) for span in self.spans(begin, end))

    def tiles(self, store: Store | None = None) -> Iterator[tuple[int, int]]:
        """Columns of each tile, none of which lies in two memories of `store`."""
        begin = 0
        for end in (0 if store is None else store.columns, self.head.weight.shape[0]):
            for v in range(begin, end, self.plan.tile_cols):
                yield v, min(v + self.plan.tile_cols, end)
            begin = end

    def weight(self, columns: slice | Tensor) -> Tensor:
        """Rows of the weight, in a dtype that `product` takes."""
        w = self.head.weight[columns]
        if not self.casts_weight:
            return w
        if self._weight is None:
            self._weight = self.empty(self.plan.tile_cols, w.shape[1])
        return self._weight[: len(w)].copy_(w)

    def lora_B(self, columns: slice | Tensor) -> Tensor:
        """Rows of a LoRA's B, in the dtype of xa."""
        assert self.head.lora_B is not None
        return self.head.lora_B[columns].to(self.lora_dtype)

    def logits(self, chunk: Chunk, w: Tensor, v0: int, v1: int, out: Tensor) -> Tensor:
        """Raw logits of the columns v0 .. v1, whose weight is w [c, D], in `out` [n, c]."""
        self.product(out, chunk.x, w.T, add=False)
        if chunk.xa is not None:
            self.product(out, chunk.xa, self.lora_B(slice(v0, v1)).T, add=True)
        return out

    def common(self, chunk: Chunk, v0: int, v1: int) -> Transform:
        """What every primitive but `exponentials` takes; that one serves no softcap."""
        return {**self.linear(chunk, v0, v1), "softcap": self.settings.transform.softcap}

    def linear(self, chunk: Chunk, v0: int, v1: int) -> Linear:
        """The head's transform without its softcap, and where the columns v0 .. v1 stand."""
        return Linear(
            offset=self.offset + v0,
            vocab=self.vocab,
            bias=None if self.bias is None else self.bias[v0:v1],
            scale=self.settings.transform.logit_scale,
            temperature=chunk.temperature,
        )

    # -- sums over ranks, gradients --------------------------------------------------------------------------------
    def merged(self, state: Tensor) -> Tensor:
        """The state [n, 8] over all ranks that share the vocabulary."""
        return state if self.group is None else sharded.merge(state, self.group)

    def products(self, rows: Rows, pieces: Iterable[Piece]) -> Tensor | None:
        """Turn raw logits into their gradient, tile by tile, and multiply: `grads`, and this rank's dX [m, D]."""
        chunk, m, grads = rows.chunk, len(rows.g), self.grads
        head, needs = self.head, self.needs
        dx = self.zeros(m, head.weight.shape[1]) if needs.hidden else None
        dxa = None
        if chunk.xa is not None and (needs.hidden or needs.lora_A):
            dxa = self.zeros(*chunk.xa.shape)
        for z, dz, columns, w, common, taken in pieces:
            if z is not None:
                self.backend.backward(
                    z, rows.state, chunk.targets, rows.g, rows.g_entropy, clamp=self.settings.clamp, out=dz,
                    rows=taken, **common,
                )  # fmt: skip
            if dx is not None:
                assert w is not None
                self.product(dx, dz, w, add=True)
            if dxa is not None:
                self.product(dxa, dz, self.lora_B(columns), add=True)
            grads.add(columns, dz, chunk.x, chunk.xa)
        self.add_lora(dx, dxa, chunk.x)
        grads.started |= m > 0
        return dx

    def add_lora(self, dx: Tensor | None, dxa: Tensor | None, x: Tensor) -> None:
        """Add what passes through a LoRA's A: to dX [m, D] and to `grads`, from dL/d(xa) [m, R] and x [m, D]."""
        if dxa is not None and self.head.lora_A is not None:
            dxa = dxa * self.settings.lora_scaling
            if dx is not None:
                dx += dxa @ self.head.lora_A.to(dx.dtype)
            self.grads.add_lora_A(dxa, x)

    def whole(self, dx: Tensor | None, live: Tensor | None, n: int) -> Tensor | None:
        """dX [n, D] over all ranks, from this rank's dX of the `live` rows [m] (None: all n)."""
        if dx is None:
            return None
        if self.group is not None:
            dist.all_reduce(dx, group=self.group)
        if live is not None and len(dx) < n:
            dx = torch.zeros(n, dx.shape[1], dtype=dx.dtype, device=dx.device).index_copy_(0, live, dx)
        return dx

    def scatter(self, dx: Tensor | None, chunk: Chunk, out: Tensor | None) -> None:
        """Write the dX [n, D] of a chunk to where its rows lie in `out` [N, D]."""
        if dx is None or out is None:
            return
        if isinstance(chunk.rows, slice):
            out[chunk.rows] = dx.to(out.dtype)
        else:
            out.index_copy_(0, chunk.rows, dx.to(out.dtype))


def _product(own: Products | None, acc: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """acc (+)= a @ b, by the backend's own where that says that it is faster."""
    if own is not None and own.takes(acc, a, b):
        own.product(acc, a, b, add)
    else:
        gemm.product(acc, a, b, add)


def _on_chip(backend: Backend, head: Head, needs: Needs) -> tuple[float, str]:
    """Bytes of statistics per logit with which the backend makes log-probs and no logits, or 0 and why it does not."""
    chip = backend.on_chip
    if any(needs) or chip is None:
        return 0.0, ""
    reason = "the head has a LoRA" if head.lora_A is not None else chip.why_not(head.hidden, head.weight)
    return (chip.STATISTICS, "") if reason is None else (0.0, reason)
