"""An epilogue of our own, as an experiment: the GEMM writes exponentials and their sums in the place of logits.

Let z be the accumulators of x @ w.T, l = chain z the logits, and r one reference a row, known before: the target's
logit, from a dot product of its row. In base 2 (factor = chain log2(e), shift = r log2(e), u = factor z - shift) the
epilogue of a tile of 128 x TILE writes

    out     bfloat16 2^u = exp(l - r)          and of each row and tile in float32, s, a and q beside the target
    s       sum of 2^u                         log-probs, so every loss
    a       sum of 2^u u                       entropy: policy losses, their metrics
    q       sum of (2^u)^2                     log_sum_sq_probs: WPO's weights
    top     largest u                          whether the target is the largest; whether the reference was too small
    total   sum of z                           mean_logit: what preference losses log
    own     u of the target                    log-probs; FAR in tiles where it does not stand

One reference scales a whole row, so dX and dW stay plain products of `out` (align_kernels/schedules/exponentials.py).
A row whose largest logit lies more than HEADROOM above its reference is done again, over its largest logit.

`Launch` is what makes them: the kernel (epilogue_kernel.py), or `emulated`, which the tests put in its place. Not
served: a bias, a LoRA, a vocabulary on several ranks, V that is no multiple of TILE (in the kernel).

Letters: n rows of a chunk, V columns, D hidden size, T tiles of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from align_kernels import gemm
from align_kernels.backends.state import ARGMAX, MAX, SUM, SUM_SQ, SUM_X, TARGET, TOTAL, read
from align_kernels.schedules import exponentials
from align_kernels.schedules.aliasing import Store
from align_kernels.schedules.exponentials import Online, Pull
from align_kernels.schedules.request import Request
from align_kernels.schedules.tiles import Chunk, TiledHead
from align_kernels.sums import add_at

TILE = 192  # columns
LANES = 4  # threads that share a row of a tile: each has two neighbouring columns of every eight
HEADROOM = 30.0  # nats: 2^u squared, summed over any vocabulary, is finite in float32
LOG2E = 1 / math.log(2)
FAR = -1e30  # u of a column that is not there


class Sums(NamedTuple):
    """What a launch leaves beside `out`, float32."""

    s: Tensor  # (n, T)
    a: Tensor  # (n, T)
    q: Tensor  # (n, T)
    top: Tensor  # (n, T)
    total: Tensor  # (n, T)
    own: Tensor  # (n, T)


class Launch(Protocol):
    def __call__(
        self,
        x: Tensor,  # (n, D) bfloat16
        w: Tensor,  # (V, D) bfloat16
        targets: Tensor,  # (n,) int64
        factor: Tensor,  # (n,) float32
        shift: Tensor,  # (n,) float32
        out: Tensor | None,  # (n, V) bfloat16; None: nothing is written but the sums
    ) -> Sums: ...


# -- what the kernel does, in torch --------------------------------------------------------------------------------
def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a b + c in float32, rounded once."""
    return (a.double() * b.double() + c.double()).float()


def folded(a: Tensor, b: Tensor) -> Tensor:
    """Sums of a b over the columns of each tile, (n, T) of (n, T, TILE), in the order in which threads add."""
    a, b = (x.unflatten(2, (-1, LANES, 2)).movedim(3, 4).flatten(2, 3) for x in (a, b))  # a thread's columns in turn
    sums = torch.zeros_like(a[:, :, 0])
    for i in range(a.shape[2]):
        sums = fma(a[:, :, i], b[:, :, i], sums)
    sums = sums[..., :2] + sums[..., 2:]  # the other half of the four
    return sums[..., 0] + sums[..., 1]


def emulated(x: Tensor, w: Tensor, targets: Tensor, factor: Tensor, shift: Tensor, out: Tensor | None) -> Sums:
    """A launch on any device. A last tile that is not whole has columns that are not there.

    Not seen: the last bits of ex2.approx (2 ulp), and the order in which tensor cores add.
    """
    z = x.float() @ w.float().T
    n, columns = z.shape
    u = fma(z, factor[:, None], -shift[:, None])
    e = torch.exp2(u).scatter(1, targets[:, None], 0.0)
    if out is not None:
        out.copy_(e)
    missing, pad = -columns % TILE, torch.nn.functional.pad
    e, z = (pad(x, (0, missing)).view(n, -1, TILE) for x in (e, z))
    u = pad(u, (0, missing), value=FAR).view(n, -1, TILE)
    one, place = torch.ones(()).expand_as(u), (targets // TILE)[:, None]
    own = torch.full_like(u[:, :, 0], FAR).scatter(1, place, u.flatten(1).gather(1, targets[:, None]))
    return Sums(folded(e, one), folded(e, u), folded(e, e), u.amax(2), folded(z, one), own)


# -- the host's side -----------------------------------------------------------------------------------------------
def softmax(
    launch: Launch, x: Tensor, w: Tensor, targets: Tensor, chain: Tensor, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The state [n, 8] of rows over the whole vocabulary, and the reference [n] of their exponentials."""
    factor = chain * LOG2E
    near = torch.bmm(x[:, None], w[targets][:, :, None])[:, 0, 0]  # rounded to x's dtype: near is enough
    shift = torch.nan_to_num(factor * near, 0.0, 0.0, 0.0)
    sums = launch(x, w, targets, factor, shift, out)
    top = sums.top.amax(1)
    again = (~(top <= HEADROOM * LOG2E)).nonzero()[:, 0]  # a wait for the device: the experiment's, not the library's
    if len(again):
        shift[again] += top[again]
        part = None if out is None else out.new_empty(len(again), out.shape[1])
        for whole, rows in zip(sums, launch(x[again], w, targets[again], factor[again], shift[again], part)):
            whole[again] = rows
        if out is not None:
            out[again] = part
    return state_of(sums, targets, factor, shift), shift / LOG2E


def state_of(sums: Sums, targets: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
    """The state [n, 8] of the backends, over each row's largest logit."""
    s, a, q, total = (x.double().sum(1) for x in (sums.s, sums.a, sums.q, sums.total))
    own, top = (x.amax(1).double() for x in (sums.own, sums.top))
    own, top, r = ((x + shift.double()) / LOG2E for x in (own, top, torch.zeros_like(own)))
    rise, fall = r - top, own - top
    f, e = rise.exp(), fall.exp()
    state = torch.zeros(len(targets), 8, dtype=torch.float64, device=targets.device)
    state[:, MAX] = top
    state[:, SUM] = f * s + e
    state[:, SUM_X] = f * (a / LOG2E + s * rise) + e * fall
    state[:, SUM_SQ] = f * f * q + e * e
    state[:, TOTAL] = factor.double() / LOG2E * total
    state[:, TARGET] = own
    state[:, ARGMAX] = torch.where(first_of_the_largest(sums, targets), targets, targets == 0)
    return state


def first_of_the_largest(sums: Sums, targets: Tensor) -> Tensor:
    """Whether no logit is above the target's, and no equal one stands in a tile before its own: bool (n,)."""
    own = sums.own.amax(1, keepdim=True)
    before = torch.arange(sums.top.shape[1], device=targets.device) < (targets // TILE)[:, None]
    return ~((sums.top > own) | ((sums.top == own) & before)).any(1)


def log_probs(launch: Launch, x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """Of rows with a plain head, (n,) float64; nothing is written but sums."""
    state, _ = softmax(launch, x, w, targets, torch.ones(len(x), device=x.device), None)
    return read(state, targets, w.shape[0])[0]


def largest(e: Tensor, scale: Tensor) -> Tensor:
    """Of each column of e [n, c] whose rows are multiplied by scale [n]."""
    return (e * scale[:, None].to(e.dtype)).amax(0)


def peaked(
    launch: Launch, x: Tensor, w: Tensor, targets: Tensor, g: Tensor, columns: int, block: int, largest=largest
) -> tuple[Tensor, Tensor]:
    """dX (n, D) and dW (V, D), float32, of sum(g logp), where each block of rows multiplies so many columns, those of
    its largest probabilities. Their number is a constant: nothing is read back."""
    single = dict(dtype=torch.float32, device=x.device)
    dx, dw = torch.empty(x.shape, **single), torch.zeros(w.shape, **single)
    for x0, dx0, y, g0 in zip(*(t.split(block) for t in (x, dx, targets, g))):
        e = torch.empty(len(x0), w.shape[0], dtype=x.dtype, device=x.device)
        state, reference = softmax(launch, x0, w, y, torch.ones_like(g0), e)
        log_sum = state[:, SUM].log()
        scale = (reference - (state[:, MAX] + log_sum)).exp().float()
        residual = -torch.expm1(state[:, TARGET] - state[:, MAX] - log_sum).float() * g0
        kept = largest(e, scale).topk(columns).indices
        e, sums = e.index_select(1, kept), torch.empty(columns, x.shape[1], **single)
        gemm.product(dx0, e, w[kept], add=False)
        dx0.mul_(-(g0 * scale)[:, None]).addcmul_(w[y].float(), residual[:, None])
        gemm.product(sums, e.T, (x0 * -(g0 * scale)[:, None]).to(x.dtype), add=False)
        dw.index_add_(0, kept, sums)
        add_at(dw, y, x0 * residual[:, None])
    return dx, dw


# -- in the place of exponentials.forward ----------------------------------------------------------------------------
def forward(
    launch: Launch, tiled: TiledHead, chunk: Chunk, store: Store | None = None
) -> tuple[Tensor, list[Tensor], Pull | None]:
    """`exponentials.forward`, of all columns in one launch."""
    if tiled.bias is not None or chunk.xa is not None or tiled.group is not None:
        raise NotImplementedError("the epilogue serves no bias, no LoRA and no vocabulary on several ranks")
    n, columns = len(chunk.targets), tiled.head.weight.shape[0]
    w = tiled.weight(slice(0, columns))
    e = tiled.scratch(n, columns, tiled.dtype) if store is None else store.tile(n, 0, columns)
    chain = tiled.settings.transform.logit_scale / torch.as_tensor(chunk.temperature, device=w.device)
    state, reference = softmax(launch, chunk.x, w, chunk.targets, chain.float().expand(n), e)
    pull = Pull(tiled, n) if store is None else None
    if pull is not None:
        pull.add(e, reference, w, 0, columns)
    return state, [reference], pull


@contextmanager
def through(launch: Launch) -> Iterator[None]:
    """Within, every call whose logits are plain goes through the epilogue, planned without room for logits."""
    before = exponentials.forward, Request.tile_columns, vars(Online)["scratch"]
    whole = lambda request, rows, size, each: max(request.vocab, 1)  # noqa: E731
    narrow = classmethod(lambda cls, request: request.gradient_itemsize or request.itemsize)
    try:
        exponentials.forward, Request.tile_columns = partial(forward, launch), whole
        Online.scratch = narrow  # type: ignore[assignment]
        yield
    finally:
        exponentials.forward, Request.tile_columns, Online.scratch = before
