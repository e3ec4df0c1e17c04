"""Exponentials in the place of logits, for heads whose logits' gradient is their probability times a constant.

Without clamp, softcap, entropy and bias gradient, with r_t = 1 - p_t[y_t] and c = logit_scale / temperature,

    dX_t / g_t = c (r_t W[y_t] - sum over v != y_t of p_t[v] W[v])
    dW[v]      = c (sum over t: y_t = v of g_t r_t x_t - sum over t: y_t != v of p_t[v] g_t x_t)

and p_t[v] = exp(l_t[v] - a_t) exp(a_t - lse_t) for any reference a_t. So the forward writes exp(l - a) over the logits,
with a near the row's largest logit so far, and the backward needs no pass over them: the rest of p, g and c are factors
of rows of X and dX. The sum over v needs no lse either: with a frozen head dX is made tile by tile beside the softmax
("online"), and no logits are kept.

Where GEMMs read 16 bits (on a GPU, bfloat16) the exponentials do too, beside float32 logits that pass through a tile:
half the memory of kept logits, so that twice as many rows can wait for a gradient that arrives late ("keep").

Letters: n rows of a chunk, V columns on this rank, D hidden size, R rank of a LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from align_kernels.backends.state import MAX, SUM, TARGET
from align_kernels.schedules import dense
from align_kernels.schedules.aliasing import Store
from align_kernels.schedules.dense import Keep, OnePass, Unscaled
from align_kernels.schedules.request import Plan, Request
from align_kernels.schedules.tiles import Chunk, Rows, TiledHead
from align_kernels.sums import waits

GATHERED = 256  # rows of W that are copied at a time on a CPU
GATHERED_GPU = 4096  # a guess: launches cost more there; not yet measured

Kept = tuple[Store, list[Tensor]]  # of a chunk: its exponentials, and the reference [n] of each tile


class Factors(NamedTuple):
    """What is left of a chunk's gradient over g, once its softmax is finished."""

    at_target: Tensor  # (n,) c r, 0 where another rank has the target
    lse: Tensor  # (n,) float64
    chain: Tensor | float  # c: (n,) or one for all rows
    places: Tensor  # (n,) int64: the targets' columns on this rank

    def scale(self, reference: Tensor) -> Tensor:
        """-c exp(a - lse) [n] for a reference a [n]."""
        return -(reference - self.lse).exp().to(self.at_target.dtype) * self.chain


class Pull:
    """dX over g in the making: the sums over columns of exp(l - a) times the rows of W, and of lora_B."""

    def __init__(self, tiled: TiledHead, n: int) -> None:
        def zeros(like: Tensor | None) -> Tensor | None:
            return None if like is None else tiled.zeros(n, like.shape[1])

        self.tiled, self.reference = tiled, None
        self.dx, self.dxb = tiled.zeros(n, tiled.head.weight.shape[1]), zeros(tiled.head.lora_B)

    def add(self, e: Tensor, reference: Tensor, w: Tensor, v0: int, v1: int) -> None:
        """A tile of exponentials [n, c], the columns v0 .. v1 with the weight w [c, D]."""
        if self.reference is not None and self.reference is not reference:
            factor = (self.reference - reference).exp().where(self.reference != reference, 1.0)[:, None]
            self.dx *= factor
            if self.dxb is not None:
                self.dxb *= factor
        self.reference = reference
        self.tiled.product(self.dx, e, w, add=True)
        if self.dxb is not None:
            self.tiled.product(self.dxb, e, self.tiled.lora_B(slice(v0, v1)), add=True)

    def finish(self, factors: Factors) -> tuple[Tensor, Tensor | None]:
        """This rank's dX [n, D] over g, and its part through the LoRA [n, R]."""
        head = self.tiled.head
        dx, dxb = self._with_target(self.dx, head.weight, factors), None
        if self.dxb is not None and head.lora_A is not None and head.lora_B is not None:
            dxb = self._with_target(self.dxb, head.lora_B, factors).mul_(self.tiled.settings.lora_scaling)
            dx.addmm_(dxb, head.lora_A.to(dx.dtype))
        return dx, dxb

    def _with_target(self, total: Tensor, w: Tensor, factors: Factors) -> Tensor:
        if self.reference is not None:
            total *= factors.scale(self.reference)[:, None]
        some = GATHERED if total.device.type == "cpu" else GATHERED_GPU
        blocks = (x.split(some) for x in (total, factors.places, factors.at_target[:, None]))
        for part, place, at_target in zip(*blocks):
            part.addcmul_(w[place].to(part.dtype), at_target)
        return total


def factors(tiled: TiledHead, chunk: Chunk, state: Tensor) -> Factors:
    """From the finished state [n, 8] over the whole vocabulary."""
    dtype, t = torch.promote_types(tiled.dtype, torch.float32), chunk.temperature
    chain = tiled.settings.transform.logit_scale / (t.to(dtype) if isinstance(t, Tensor) else t)
    log_sum = state[:, SUM].log()
    residual = -torch.expm1((state[:, TARGET] - state[:, MAX]) - log_sum).to(dtype)
    local, V = chunk.targets - tiled.offset, tiled.head.weight.shape[0]
    here = (local >= 0) & (local < V)
    return Factors((residual * chain).where(here, 0.0), state[:, MAX] + log_sum, chain, local.clamp(0, V - 1))


def forward(tiled: TiledHead, chunk: Chunk, store: Store | None = None) -> tuple[Tensor, list[Tensor], Pull | None]:
    """The finished softmax state [n, 8] of a chunk, and the reference [n] of each tile.

    With a `store` the exponentials stay there; without, dX over g is made beside them. On a CPU a reference that no row
    has left stands in the list again, as the same tensor: asking a GPU would wait for it.
    """
    n, write = len(chunk.targets), tiled.backend.exponentials
    assert write is not None
    state, pull = tiled.new_state(n), Pull(tiled, n) if store is None else None
    reference, references = tiled.zeros(n).fill_(-torch.inf), []
    for v0, v1 in tiled.tiles(store):
        w = tiled.weight(slice(v0, v1))
        e = tiled.scratch(n, v1 - v0, tiled.dtype) if store is None else store.tile(n, v0, v1)
        z = e if tiled.dtype == tiled.logits_dtype else tiled.scratch(n, v1 - v0, tiled.logits_dtype)
        tiled.logits(chunk, w, v0, v1, z)
        write(z, state, chunk.targets, reference, out=e, **tiled.linear(chunk, v0, v1))
        stays = bool(references) and not waits(z) and torch.equal(reference, references[-1])
        references.append(references[-1] if stays else reference.clone())
        if pull is not None:
            pull.add(e, references[-1], w, v0, v1)
    return tiled.merged(state), references, pull


class Online(Unscaled):
    """With a frozen head dX over g is made beside the softmax, and no logits are kept."""

    name = schedule = "online"
    keeps = False

    @classmethod
    def why_not(cls, request: Request) -> str | None:
        if request.needs_head:
            return "the head is trained"
        if not request.plain:
            return "a logit's gradient is more than its probability times a constant"
        if request.drop_mass > 0:
            return "columns are dropped"
        if request.sparse and PlainOnePass.why_not(request) is None:
            return "g is often zero, and known while the logits are there: fewer rows have a gradient"
        return None

    @classmethod
    def plan(cls, request: Request) -> Plan:
        why = "the head is frozen and its logits plain, so dX is made beside the softmax and no logits are kept"
        return cls.sized(request, request.passing_rows(cls.scratch(request)), request.passes, why)

    @classmethod
    def scratch(cls, request: Request) -> int:
        return request.itemsize + request.gradient_itemsize

    def forward(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        tiled = self.tiled
        state, _, pull = forward(tiled, chunk)
        assert pull is not None
        dx, _ = pull.finish(factors(tiled, chunk, state))
        if tiled.group is not None:
            dist.all_reduce(dx, group=tiled.group)
        return state, dx


def gradient(
    tiled: TiledHead, rows: Rows, live: Tensor | None, store: Store, references: Sequence[Tensor]
) -> Tensor | None:
    """`dense.gradient` from the exponentials in `store` and the reference [n] of each tile."""
    n, grads = len(rows.g), tiled.grads
    rows = rows if live is None else rows.select(live)
    chunk, g, needs = rows.chunk, rows.g[:, None], tiled.needs
    left = factors(tiled, chunk, rows.state)
    pull = Pull(tiled, len(g)) if needs.hidden or needs.lora_A else None
    seen, a, x, xa = None, references[0], chunk.x, chunk.xa
    for (v0, v1), reference in zip(tiled.tiles(store), references) if len(g) else ():
        e = store.tile(n, v0, v1)
        if live is not None:
            e = torch.index_select(e, 0, live, out=tiled.tile(len(live), v1 - v0, tiled.dtype))
        if seen is not reference:
            seen, a = reference, reference if live is None else reference[live]
            x, xa = scaled(chunk, left.scale(a)[:, None] * g)
        if pull is not None:
            pull.add(e, a, tiled.weight(slice(v0, v1)), v0, v1)
        grads.add(slice(v0, v1), e, x, xa)
    if len(g):
        grads.add_rows(left.places, *scaled(chunk, left.at_target[:, None] * g))
    dx, dxb = (None, None) if pull is None else pull.finish(left)
    if dxb is not None:
        grads.add_lora_A(dxb * g, chunk.x)
    grads.started |= len(g) > 0
    return dx * g if dx is not None and needs.hidden else None


class PlainOnePass(OnePass):
    """One pass whose logits are plain: their exponentials take their place."""

    name = "plain one pass"

    @classmethod
    def why_not(cls, request: Request) -> str | None:
        if not request.plain:
            return "a logit's gradient is more than its probability times a constant"
        return "columns are dropped" if request.drop_mass > 0 else super().why_not(request.of_exponentials)

    @classmethod
    def plan(cls, request: Request) -> Plan:
        return super().plan(request.of_exponentials)

    @property
    def kept_dtype(self) -> torch.dtype:
        return self.tiled.dtype

    def forward(self, chunk: Chunk) -> tuple[Tensor, Kept]:
        store = self.room(len(chunk.targets))
        state, references, _ = forward(self.tiled, chunk, store)
        return state, (store, references)

    def gradient(self, rows: Rows, live: Tensor | None, saved: Kept) -> Tensor | None:
        return gradient(self.tiled, rows, live, *saved)


class PlainKeep(Keep):
    """The exponentials of all logits fit in the workspace and are saved until g arrives: one chunk.

    A gradient of the entropy makes the logits again.
    """

    name = "plain keep"

    @classmethod
    def why_not(cls, request: Request) -> str | None:
        if not request.plain:
            return "a logit's gradient is more than its probability times a constant"
        if not request.gradient_itemsize:
            return "exponentials take as much room as logits, which serve a gradient of the entropy too"
        if request.drop_mass > 0:
            return "columns are dropped"
        if not request.late:
            return "g is known while its logits are there"
        if request.of_exponentials.rows > request.of_exponentials.room:
            return f"g arrives later and {cls.size(request)} do not fit in {request.limit_in_words} beside a tile"
        return None

    @staticmethod
    def size(request: Request) -> str:
        return request.of_exponentials.logits_in_words.replace("logits", "exponentials")

    @classmethod
    def plan(cls, request: Request) -> Plan:
        r = request.of_exponentials
        return cls.sized(r, r.rows, r.passes, f"{cls.size(request)} fit and wait for g")

    @classmethod
    def scratch(cls, request: Request) -> int:
        """Of exponentials: logits beside them, and their gradient where the entropy has one."""
        return request.itemsize + request.gradient_itemsize

    def memory(self, values: Tensor | None = None) -> tuple[Tensor, Store, Tensor]:
        """`values`, or room for them, in the dtype of logits: exponentials, and the references [tiles, n]."""
        tiled, n = self.tiled, len(self.tiled.kept)
        exact = torch.promote_types(tiled.dtype, torch.float32)
        tiles, of = len(list(tiled.tiles())), tiled.logits_dtype
        first = tiles * n * exact.itemsize // of.itemsize
        if values is None:
            values = tiled.empty(first + -(-n * tiled.columns * tiled.dtype.itemsize // of.itemsize), dtype=of)
        return values, tiled.stored(values[first:].view(tiled.dtype)), values[:first].view(exact).view(tiles, n)

    def forward(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        values, store, references = self.memory()
        state, found, _ = forward(self.tiled, chunk, store)
        torch.stack(found, out=references)
        return state, values

    def gradient(self, rows: Rows, live: Tensor | None, saved: Tensor) -> Tensor | None:
        if rows.g_entropy is not None:
            return dense.gradient(self.tiled, rows, live, None, consume=True)
        _, store, references = self.memory(saved)
        return gradient(self.tiled, rows, live, store, references.unbind())

    def save(self, saved: Tensor) -> None:
        self.values = saved

    def unpacked(self, values: Tensor, layout: Tensor) -> Iterator[Tensor]:
        yield values


def scaled(chunk: Chunk, factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """x [m, D] and xa [m, R] with their rows multiplied, in their dtypes."""
    return (chunk.x * factor).to(chunk.x.dtype), None if chunk.xa is None else (chunk.xa * factor).to(chunk.xa.dtype)
