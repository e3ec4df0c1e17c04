"""The primitives in C++ (`align_kernels._C`), vectorised and threaded, for float32 and bfloat16 on the CPU, and matrix
products for processors on which torch.mm is slow, and over few columns of each row.

Signatures are those of `Backend`; arithmetic is float32 within a tile, the state is float64, and the result does not
depend on the number of threads. Every argument is checked: here what a tensor knows, in C++ what its numbers say.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from align_kernels.backends.arguments import Clamp, Linear, Transform, address, clamped
from align_kernels.backends.cpu import arguments, lists, products
from align_kernels.backends.cpu.arguments import checks, logits, why_not

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

peaks = on_chip = losses = multiply = row_sums = None
survey = lists.survey


def forward(
    z: Tensor,  # (n, c) float32 | bfloat16
    state: Tensor,  # (n, 8) float64, updated in place
    targets: Tensor,  # (n,) int64
    **transform: Unpack[Transform],
) -> None:
    """Fold one tile of logits into the running state of its rows.

    Raises:
        ValueError: naming the value, before anything is written: a tensor of the wrong device, dtype, shape or layout,
            a target outside [0, vocab), a scale that is not finite, a softcap or temperature not finite and > 0.
        RuntimeError: the extension is not built.
    """
    tile = logits(z, targets, **transform)
    checks.state(state, len(z))
    arguments._C.forward(tile, state.data_ptr(), torch.get_num_threads())


def exponentials(
    z: Tensor,  # (n, c) float32 | bfloat16
    state: Tensor,  # (n, 8) float64, updated in place
    targets: Tensor,  # (n,) int64
    reference: Tensor,  # (n,) float32, updated in place, -inf before the first tile
    *,
    out: Tensor,  # (n, c) float32 | bfloat16, may be z
    **linear: Unpack[Linear],
) -> None:
    """`forward` without a softcap, which also writes exp(l - reference), 0 at the target.

    Raises:
        ValueError: as in `forward`, and an `out` that overlaps z without being z.
    """
    tile = logits(z, targets, softcap=None, **linear)
    checks.state(state, len(z))
    checks.tensor("reference", reference, torch.float32, (len(z),))
    arguments._C.exponentials(
        tile, state.data_ptr(), reference.data_ptr(), out.data_ptr(), checks.out(out, (len(z), z.shape[1])),
        out.stride(0), torch.get_num_threads(),
    )  # fmt: skip


def backward(
    z: Tensor,  # (n, c) float32 | bfloat16
    state: Tensor,  # (m, 8) float64, finished over the whole vocabulary
    targets: Tensor,  # (m,) int64
    g_logp: Tensor,  # (m,) float32
    g_entropy: Tensor | None,  # (m,) float32
    *,
    clamp: Clamp | None,
    out: Tensor,  # (m, c) float32 | bfloat16, may be z where all its rows are taken
    rows: Tensor | None = None,  # (m,) int64: the rows of z that are taken; None: all n
    **transform: Unpack[Transform],
) -> None:
    """Write dL/dz of some rows of a tile: g (1[v = y] - p), clamped where asked, minus g_H p (l - lse + H).

    Raises:
        ValueError: as in `forward`, a row outside [0, n), and an `out` that overlaps z without being z.
    """
    tile, (m, c) = logits(z, targets, rows, **transform), checks.taken(z, rows)
    checks.state(state, m)
    checks.coefficients(m, g_logp, g_entropy)
    arguments._C.backward(
        tile, state.data_ptr(), g_logp.data_ptr(), address(g_entropy), *clamped(clamp),
        out.data_ptr(), checks.out(out, (m, c)), out.stride(0), torch.get_num_threads(),
    )  # fmt: skip
