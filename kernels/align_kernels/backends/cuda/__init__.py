"""The primitives in CUDA (`align_kernels._cuda`), for float32, bfloat16 and float16 logits on an NVIDIA GPU.

Signatures are those of `Backend`; arithmetic is float32 within a row, the state is float64, and results repeat bit for
bit on one stream: no atomics. `losses` fuses the coefficients of some losses into the row pass.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from align_kernels.backends.arguments import Clamp, Transform, address
from align_kernels.backends.cuda import arguments, losses
from align_kernels.backends.cuda.arguments import checks, gradient, guard, logits, queue, why_not

__all__ = [
    "backward",
    "exponentials",
    "forward",
    "lists",
    "losses",
    "multiply",
    "on_chip",
    "peaks",
    "products",
    "row_sums",
    "survey",
    "why_not",
]

exponentials = lists = on_chip = products = multiply = row_sums = survey = None


def forward(
    z: Tensor,  # (n, c) float32 | bfloat16 | float16
    state: Tensor,  # (n, 8) float64, updated in place
    targets: Tensor,  # (n,) int64
    **transform: Unpack[Transform],
) -> None:
    """Fold one tile of logits into the running state of its rows.

    Raises:
        ValueError: naming the value, before anything is queued: a tensor of the wrong device, dtype, shape or layout, a
            scale that is not finite, a softcap or temperature not finite and > 0.
        RuntimeError: the extension is not built, or CUDA reports an error.
    """
    on = checks("z", z)
    tile = logits(on, z, targets, **transform)
    on.state(state, len(z))
    with guard(z):
        arguments._cuda.forward(tile, state.data_ptr(), queue(z))


def backward(
    z: Tensor,  # (n, c) float32 | bfloat16 | float16
    state: Tensor,  # (m, 8) float64, finished over the whole vocabulary
    targets: Tensor,  # (m,) int64
    g_logp: Tensor,  # (m,) float32
    g_entropy: Tensor | None,  # (m,) float32
    *,
    clamp: Clamp | None,
    out: Tensor,  # (m, c) of z's dtype, or 16 bits where z is float32; may be z where all its rows are taken
    rows: Tensor | None = None,  # (m,) int64: the rows of z that are taken, not checked; None: all n
    **transform: Unpack[Transform],
) -> None:
    """Write dL/dz of some rows of a tile: g (1[v = y] - p), clamped where asked, minus g_H p (l - lse + H).

    Raises:
        ValueError: as in `forward`, and an `out` that overlaps z without being z.
        RuntimeError: as in `forward`.
    """
    on = checks("z", z)
    tile, shape = logits(on, z, targets, rows, **transform), on.taken(z, rows)
    on.state(state, shape[0])
    on.coefficients(shape[0], g_logp, g_entropy)
    to = gradient(on, shape, out, clamp)
    with guard(z):
        arguments._cuda.backward(tile, state.data_ptr(), g_logp.data_ptr(), address(g_entropy), to, queue(z))


def peaks(
    z: Tensor,  # (n, c) float32 | bfloat16 | float16
    state: Tensor,  # (n, 8) float64, finished over the whole vocabulary
    targets: Tensor,  # (n,) int64
    rows: Tensor,  # (m,) int64, m >= 1 of the n; not checked
    *,
    out: Tensor,  # (c,) float32
    **transform: Unpack[Transform],
) -> None:
    """Write the largest log-prob of each column over some rows.

    Raises:
        ValueError: as in `forward`, or no row.
        RuntimeError: as in `forward`.
    """
    on = checks("z", z)
    tile = logits(on, z, targets, **transform)
    on.state(state, len(z))
    on.tensor("rows", rows, torch.int64, (rows.numel(),))
    on.tensor("out", out, torch.float32, (z.shape[1],))
    with guard(z):
        arguments._cuda.peaks(tile, state.data_ptr(), rows.data_ptr(), len(rows), out.data_ptr(), queue(z))
