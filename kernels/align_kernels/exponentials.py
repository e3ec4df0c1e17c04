"""Exponentials in the place of logits, for heads whose logits' gradient is their probability times a constant.

Without clamp, softcap, entropy and bias gradient, with r_t = 1 - p_t[y_t] and c = logit_scale / temperature,

    dX_t / g_t = c (r_t W[y_t] - sum over v != y_t of p_t[v] W[v])
    dW[v]      = c (sum over t: y_t = v of g_t r_t x_t - sum over t: y_t != v of p_t[v] g_t x_t)

and p_t[v] = exp(l_t[v] - a_t) exp(a_t - lse_t) for any reference a_t. So the forward writes exp(l - a) over the logits,
with a near the row's largest logit so far, and the backward needs no pass over them: the rest of p, g and c are factors
of rows of X and dX. The sum over v needs no lse either: with a frozen head dX is made tile by tile beside the softmax
("online"), and no logits are kept.

Letters: n rows of a chunk, V columns on this rank, D hidden size, R rank of a LoRA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from align_kernels.schedules import Chunk, Grads, Lent, Rows, Runner


GATHERED = 256  # rows of W that are copied at a time


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

    def __init__(self, run: Runner, n: int) -> None:
        def zeros(like: Tensor | None) -> Tensor | None:
            return None if like is None else run.zeros(n, like.shape[1])

        self.run, self.reference = run, None
        self.dx, self.dxb = run.zeros(n, run.head.weight.shape[1]), zeros(run.head.lora_B)

    def add(self, e: Tensor, reference: Tensor, w: Tensor, v0: int, v1: int) -> None:
        """A tile of exponentials [n, c], the columns v0 .. v1 with the weight w [c, D]."""
        if self.reference is not None and self.reference is not reference:
            factor = (self.reference - reference).exp().where(self.reference != reference, 1.0)[:, None]
            self.dx *= factor
            if self.dxb is not None:
                self.dxb *= factor
        self.reference = reference
        self.run.product(self.dx, e, w, add=True)
        if self.dxb is not None and self.run.head.lora_B is not None:
            self.run.product(self.dxb, e, self.run.head.lora_B[v0:v1].to(e.dtype), add=True)

    def finish(self, factors: Factors) -> tuple[Tensor, Tensor | None]:
        """This rank's dX [n, D] over g, and its part through the LoRA [n, R]."""
        head = self.run.head
        dx, dxb = self._with_target(self.dx, head.weight, factors), None
        if self.dxb is not None and head.lora_A is not None and head.lora_B is not None:
            dxb = self._with_target(self.dxb, head.lora_B, factors).mul_(self.run.settings.lora_scaling)
            dx.addmm_(dxb, head.lora_A.to(dx.dtype))
        return dx, dxb

    def _with_target(self, total: Tensor, w: Tensor, factors: Factors) -> Tensor:
        if self.reference is not None:
            total *= factors.scale(self.reference)[:, None]
        blocks = (x.split(GATHERED) for x in (total, factors.places, factors.at_target[:, None]))
        for part, place, at_target in zip(*blocks):
            part.addcmul_(w[place].to(part.dtype), at_target)
        return total


def factors(run: Runner, chunk: Chunk, state: Tensor) -> Factors:
    """From the finished state [n, 8] over the whole vocabulary."""
    dtype, t = torch.promote_types(run.dtype, torch.float32), chunk.temperature
    chain = run.settings.transform.logit_scale / (t.to(dtype) if isinstance(t, Tensor) else t)
    log_sum = state[:, 1].log()
    residual = -torch.expm1((state[:, 5] - state[:, 0]) - log_sum).to(dtype)
    local, V = chunk.targets - run.offset, run.head.weight.shape[0]
    here = (local >= 0) & (local < V)
    return Factors((residual * chain).where(here, 0.0), state[:, 0] + log_sum, chain, local.clamp(0, V - 1))


def forward(run: Runner, chunk: Chunk, store: Tensor | Lent | None) -> tuple[Tensor, list[Tensor], Pull | None]:
    """The finished softmax state [n, 8] of a chunk, and the reference [n] of each tile.

    With a `store` the exponentials stay there for `backward`; without, dX over g is made beside them.
    """
    n = len(chunk.targets)
    state, pull = run.new_state(n), Pull(run, n) if store is None else None
    reference, references = run.zeros(n).fill_(-torch.inf), []
    for v0, v1 in run.tiles(store):
        w = run.weight(slice(v0, v1))
        z = run.scratch(n, v1 - v0, run.dtype) if store is None else run.tile_of(store, n, v0, v1)
        run.logits(chunk, w, v0, v1, z)
        run.backend.exponentials(z, state, chunk.targets, reference, out=z, **run.linear(chunk, v0, v1))
        moved = not references or not torch.equal(reference, references[-1])
        references.append(reference.clone() if moved else references[-1])
        if pull is not None:
            pull.add(z, references[-1], w, v0, v1)
    return run.merged(state), references, pull


def online(run: Runner, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """The finished state [n, 8] of a chunk and its dX [n, D] over g."""
    state, _, pull = forward(run, chunk, None)
    assert pull is not None
    dx, _ = pull.finish(factors(run, chunk, state))
    if run.group is not None:
        dist.all_reduce(dx, group=run.group)
    return state, dx


def backward(
    run: Runner, rows: Rows, live: Tensor | None, store: Tensor | Lent, references: list[Tensor], grads: Grads
) -> Tensor | None:
    """`Runner.dense` from exponentials: adds to `grads`; this rank's dX [m, D] of the `live` rows (None: all n)."""
    n = len(rows.g)
    rows = rows if live is None else rows.select(live)
    chunk, g, needs = rows.chunk, rows.g[:, None], run.needs
    left = factors(run, chunk, rows.state)
    pull = Pull(run, len(g)) if needs.hidden or needs.lora_A else None
    seen, a, x, xa = None, references[0], chunk.x, chunk.xa
    for (v0, v1), reference in zip(run.tiles(store), references) if len(g) else ():
        e = run.tile_of(store, n, v0, v1)
        if live is not None:
            e = e[live]
        if seen is not reference:
            seen, a = reference, reference if live is None else reference[live]
            x, xa = scaled(chunk, left.scale(a)[:, None] * g)
        if pull is not None:
            pull.add(e, a, run.weight(slice(v0, v1)), v0, v1)
        grads.add(slice(v0, v1), e, x, xa)
    if len(g):
        grads.add_rows(left.places, *scaled(chunk, left.at_target[:, None] * g))
    dx, dxb = (None, None) if pull is None else pull.finish(left)
    if dxb is not None:
        grads.add_lora_A(dxb * g, chunk.x)
    grads.started |= len(g) > 0
    return dx * g if dx is not None and needs.hidden else None


def scaled(chunk: Chunk, factor: Tensor) -> tuple[Tensor, Tensor | None]:
    """x [m, D] and xa [m, R] with their rows multiplied, in their dtypes."""
    return (chunk.x * factor).to(chunk.x.dtype), None if chunk.xa is None else (chunk.xa * factor).to(chunk.xa.dtype)
