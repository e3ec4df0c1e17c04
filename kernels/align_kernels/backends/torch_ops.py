"""The primitives in plain torch operations: runs on any device and dtype. Signatures are those of `Backend`."""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor

from align_kernels.backends.arguments import RUN, Clamp, Linear, Transform, looked_at
from align_kernels.backends.state import ARGMAX, MAX, SUM, SUM_SQ, SUM_X, TARGET, TOTAL

lists = on_chip = products = losses = multiply = row_sums = None

HEADROOM = 20.0  # how far, in nats, a row's max may rise above the reference of its exponentials


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """None: it serves every device and dtype."""
    return None


def raw_to_logits(z: Tensor, dtype: torch.dtype, of: Transform) -> tuple[Tensor, Tensor | float]:
    """The logits and d(logits)/dz."""
    bias, scale, softcap, temperature = of["bias"], of["scale"], of["softcap"], of["temperature"]
    l = z.to(dtype)
    if bias is not None:
        l = l + bias.to(dtype)
    inverse = 1.0 / (temperature.to(dtype)[:, None] if isinstance(temperature, Tensor) else temperature)
    if softcap is None:
        return l * (scale * inverse), scale * inverse
    u = l * (scale / softcap)
    e = torch.exp(-2 * u.abs())  # the slope 1 - tanh^2 without cancellation
    return softcap * torch.tanh(u) * inverse, 4 * e / (1 + e) ** 2 * (scale * inverse)


def _compute_dtype(z: Tensor) -> torch.dtype:
    return torch.promote_types(z.dtype, torch.float32)


def forward(
    z: Tensor,  # (n, c)
    state: Tensor,  # (n, 8), updated in place
    targets: Tensor,  # (n,) int64
    **transform: Unpack[Transform],
) -> None:
    """Fold one tile of logits into the running state of its rows."""
    offset = transform["offset"]
    if z.shape[1] == 0:
        return
    l, _ = raw_to_logits(z, _compute_dtype(z), transform)
    tile_max, tile_arg = l.max(dim=1)
    # torch.max does not promise the first index among ties
    tile_arg = (l == tile_max[:, None]).int().argmax(dim=1)
    old_max, new_max = state[:, MAX], torch.maximum(state[:, MAX], tile_max.to(state.dtype))
    finite_old = torch.where(old_max == -torch.inf, new_max, old_max)
    shift = torch.where(new_max == -torch.inf, torch.zeros_like(new_max), finite_old - new_max)
    factor = torch.where(old_max == -torch.inf, torch.zeros_like(shift), shift.exp())
    s, a, q = state[:, SUM], state[:, SUM_X], state[:, SUM_SQ]
    base = torch.where(new_max == -torch.inf, torch.zeros_like(new_max), new_max)
    centred = l - base.to(l.dtype)[:, None]
    # the tile's largest term is added in the state's precision: beside 1.0 the rest of a confident row would vanish
    e = centred.exp().scatter_(1, tile_arg[:, None], 0.0)
    peak = tile_max - base
    top = peak.exp()
    state[:, SUM_X] = factor * (a + s * shift) + (top * peak.clamp(min=-1e30) + (e * centred.clamp(min=-1e30)).sum(1))
    state[:, SUM] = factor * s + (top + e.sum(1))
    state[:, SUM_SQ] = factor * factor * q + (top * top + (e * e).sum(1))
    state[:, TOTAL] += l.sum(1)
    here = (targets >= offset) & (targets < offset + z.shape[1])
    column = (targets - offset).clamp(0, z.shape[1] - 1)
    picked = l.gather(1, column[:, None])[:, 0].to(state.dtype)
    state[:, TARGET] = torch.where(here, picked, state[:, TARGET])
    first = tile_max.to(state.dtype) > old_max
    state[:, ARGMAX] = torch.where(first, (tile_arg + offset).to(state.dtype), state[:, ARGMAX])
    state[:, MAX] = new_max


def exponentials(
    z: Tensor,  # (n, c)
    state: Tensor,  # (n, 8), updated in place
    targets: Tensor,  # (n,) int64
    reference: Tensor,  # (n,) updated in place, -inf before the first tile
    *,
    out: Tensor,  # (n, c), may be z
    **linear: Unpack[Linear],
) -> None:
    """`forward` without a softcap, which also writes exp(l - reference), 0 at the target.

    The reference stays within HEADROOM of the row's max so far, so that rows keep one for most of their tiles; what is
    more than 87 below it vanishes.
    """
    offset, transform = linear["offset"], Transform(**linear, softcap=None)
    forward(z, state, targets, **transform)
    if z.shape[1] == 0:
        return
    l, _ = raw_to_logits(z, _compute_dtype(z), transform)
    peak = l.amax(1).to(reference.dtype)
    reference.copy_(torch.where(peak <= reference + HEADROOM, reference, peak))
    base = torch.where(reference == -torch.inf, torch.zeros_like(reference), reference)
    e = (l - base.to(l.dtype)[:, None]).exp()
    here = (targets >= offset) & (targets < offset + z.shape[1])
    column = (targets - offset).clamp(0, z.shape[1] - 1)[:, None]
    e.scatter_(1, column, torch.where(here[:, None], 0.0, e.gather(1, column)))
    out.copy_(e)


def backward(
    z: Tensor,  # (n, c)
    state: Tensor,  # (m, 8), finished over the whole vocabulary
    targets: Tensor,  # (m,) int64
    g_logp: Tensor,  # (m,)
    g_entropy: Tensor | None,  # (m,)
    *,
    clamp: Clamp | None,
    out: Tensor,  # (m, c), may be z
    rows: Tensor | None = None,  # (m,) int64: the rows of z that are taken; None: all n
    **transform: Unpack[Transform],
) -> None:
    """Write dL/dz of some rows of a tile: g (1[v = y] - p), clamped where asked, minus g_H p (l - lse + H)."""
    offset = transform["offset"]
    if z.shape[1] == 0:
        return
    dtype = _compute_dtype(z)
    l, chain = raw_to_logits(z if rows is None else z[rows], dtype, transform)
    log_sum = state[:, SUM].log()
    log_p = (l - state[:, MAX].to(dtype)[:, None]) - log_sum.to(dtype)[:, None]
    p = log_p.exp()
    here = (targets >= offset) & (targets < offset + z.shape[1])
    column = (targets - offset).clamp(0, z.shape[1] - 1)[:, None]
    r = -p
    # 1 - p of the target without cancellation, from the state's precision
    residual = -torch.expm1(state[:, TARGET] - state[:, MAX] - log_sum).to(dtype)[:, None]
    r.scatter_(1, column, torch.where(here[:, None], residual, r.gather(1, column)))
    g = g_logp.to(dtype)[:, None]
    if clamp is None:
        d = g * r
    else:
        limit, prob_above, units = clamp
        clipped = g * r.clamp(-limit, limit) if units == "residual" else (g * r).clamp(-limit, limit)
        d = torch.where(p > prob_above, clipped, g * r) if prob_above else clipped
    if g_entropy is not None:
        entropy = (log_sum - state[:, SUM_X] / state[:, SUM]).to(dtype)[:, None]
        d = d - g_entropy.to(dtype)[:, None] * p * (log_p.clamp(min=-1e30) + entropy)
    out.copy_(d * chain)


def peaks(
    z: Tensor,  # (n, c)
    state: Tensor,  # (n, 8), finished over the whole vocabulary
    targets: Tensor,  # (n,) int64
    rows: Tensor,  # (m,) int64, m >= 1 of the n
    *,
    out: Tensor,  # (c,) float32
    **transform: Unpack[Transform],
) -> None:
    """Write the largest log-prob of each column over some rows."""
    del targets
    t = transform["temperature"]
    if isinstance(t, Tensor):
        transform["temperature"] = t[rows]
    l, _ = raw_to_logits(z[rows], _compute_dtype(z), transform)
    lse = state[rows, MAX] + state[rows, SUM].log()
    out.copy_((l - lse.to(l.dtype)[:, None]).amax(0))


def levels(log_p: Tensor, drop_mass: float, steps: int, last: int) -> Tensor:
    """0 for p >= drop_mass, j for what lies in the j-th of the `steps` in which p halves, last + 1 below the last."""
    below = torch.rsub(log_p, math.log2(drop_mass) * steps, alpha=steps / math.log(2))
    return below.ceil_().clamp_(0, last + 1)


def survey(
    z: Tensor,  # (n, c)
    state: Tensor,  # (n, 8), finished over the whole vocabulary
    targets: Tensor,  # (n,) int64
    rows: Tensor,  # (m,) int64, of the n
    sums: Tensor,  # (m, levels + 2, 3) float64, added to
    *,
    first: int,
    every: int,
    drop_mass: float,
    steps: int,
    sample: Tensor | None = None,  # (m, S) uint8
    **transform: Unpack[Transform],
) -> None:
    """Add number, sum of p and of -p log p by level, of every so many-th run of columns; `sample` takes the levels."""
    del targets
    begin, end = looked_at(first, every), looked_at(first + z.shape[1], every)
    place = torch.arange(begin, end, device=z.device)
    run = place.div(RUN, rounding_mode="floor")
    columns = (run * every + every // 2) * RUN + place % RUN - first
    t, bias = transform["temperature"], transform["bias"]
    transform["temperature"] = t[rows] if isinstance(t, Tensor) else t
    transform["bias"] = None if bias is None else bias[columns]
    l, _ = raw_to_logits(z[rows[:, None], columns], _compute_dtype(z), transform)
    lse = state[rows, MAX] + state[rows, SUM].log()
    log_p = l - lse.to(l.dtype)[:, None]
    level = levels(log_p, drop_mass, steps, sums.shape[1] - 2)
    if sample is not None:
        sample.copy_(level)
    p = log_p.exp()
    for i, x in enumerate((torch.ones_like(p), p, -p * log_p.clamp(min=-1e30))):
        sums[:, :, i].scatter_add_(1, level.long(), x.to(sums.dtype))
