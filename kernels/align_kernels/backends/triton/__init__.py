"""The primitives as Triton kernels, for float32, bfloat16 and float16 on a GPU.

Signatures are those of `Backend`; arithmetic is float32 within a tile, the state is float64. With TRITON_INTERPRET=1 in
the environment they run on CPU tensors in Triton's interpreter, thousands of times slower: that is how they are tested.
"""

from __future__ import annotations

import math
from typing import Any, Unpack

import torch
from torch import Tensor

from align_kernels.backends.arguments import RUN, Clamp, Linear, Transform, looked_at
from align_kernels.backends.triton import on_chip, row_sums
from align_kernels.backends.triton.arguments import checks, head_of, why_not

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

lists = products = losses = None

# columns of a block and warps of a program
FORWARD = dict(BLOCK=1024, num_warps=4)
BACKWARD = dict(BLOCK=2048, num_warps=4)
EXPONENTIALS = dict(BLOCK=128, U=16, num_warps=4)
NARROW = EXPONENTIALS | dict(
    U=8
)  # of 16-bit logits: as many instructions and half the registers, which Triton 3.6 spills
PEAKS = dict(ROWS=8, BLOCK=256, num_warps=4)
SURVEY = dict(BINS=128, BLOCK=1024, num_warps=4)  # BINS: levels at most
MULTIPLY = dict(BLOCK=2048, num_warps=4)
PROGRAMS = 1024  # of `multiply`, at most: so many end at once where there is nothing to do


def forward(
    z: Tensor,  # (n, c)
    state: Tensor,  # (n, 8) float64, updated in place
    targets: Tensor,  # (n,) int64
    **transform: Unpack[Transform],
) -> None:
    """Fold one tile of logits into the running state of its rows.

    Raises:
        ValueError: naming the value: a tensor of the wrong device, dtype, shape or layout.
    """
    on, (n, c) = checks(z), z.shape
    on.state(state, n)
    head, flags = head_of(on, (n, c), targets, transform)
    if n and c:
        with torch.cuda.device_of(z):
            _rows().forward_kernel[(n,)](
                z, state, targets, *head[:2], z.stride(0), c, transform["offset"], *head[2:], **flags, **FORWARD
            )


HEADROOM = 30.0  # nats: sums of exp(2 * 30) over any vocabulary are finite in float32


def exponentials(
    z: Tensor,  # (n, c)
    state: Tensor,  # (n, 8) float64, updated in place
    targets: Tensor,  # (n,) int64
    reference: Tensor,  # (n,) float32, updated in place, -inf before the first tile
    *,
    out: Tensor,  # (n, c) float32 | bfloat16, may be z
    **linear: Unpack[Linear],
) -> None:
    """`forward` without a softcap, which also writes exp(l - reference), 0 at the target, and reads each logit once.

    A row takes for its reference the largest of its first logits and of its target's, and keeps it while its maximum
    is less than HEADROOM above it; else it is done again. What is more than 87 below the reference vanishes.

    Raises:
        ValueError: as in `forward`, or an `out` of float16, whose range is too small.
    """
    on, (n, c), transform = checks(z), z.shape, Transform(**linear, softcap=None)
    on.state(state, n)
    head, flags = head_of(on, (n, c), targets, transform)
    on.tensor("reference", reference, torch.float32, (n,))
    on.out(out, (n, c))
    if out.dtype == torch.float16:
        raise ValueError("out must be float32 or bfloat16, got torch.float16, whose range is too small")
    del flags["SOFTCAP"]
    bias, temperature, scale, _, inverse = head
    tile = EXPONENTIALS if z.dtype == torch.float32 else NARROW
    look = c if out.data_ptr() == z.data_ptr() else min(c, tile["BLOCK"] * tile["U"])
    if n and c:
        with torch.cuda.device_of(z):
            _rows().exponentials_kernel[(n,)](
                z, out, state, targets, reference, bias, temperature, z.stride(0), out.stride(0), c, look,
                transform["offset"], scale, inverse, HEADROOM, **flags, **tile,
            )  # fmt: skip


def backward(
    z: Tensor,  # (n, c)
    state: Tensor,  # (m, 8) float64, finished over the whole vocabulary
    targets: Tensor,  # (m,) int64
    g_logp: Tensor,  # (m,) float32
    g_entropy: Tensor | None,  # (m,) float32
    *,
    clamp: Clamp | None,
    out: Tensor,  # (m, c), may be z where all its rows are taken
    rows: Tensor | None = None,  # (m,) int64: the rows of z that are taken, not checked; None: all n
    **transform: Unpack[Transform],
) -> None:
    """Write dL/dz of some rows of a tile: g (1[v = y] - p), clamped where asked, minus g_H p (l - lse + H).

    Raises:
        ValueError: as in `forward`, and an `out` beside `rows` that overlaps z.
    """
    on = checks(z)
    m, c = on.taken(z, rows)
    on.state(state, m)
    head, flags = head_of(on, (m, c), targets, transform)
    on.coefficients(m, g_logp, g_entropy)
    on.out(out, (m, c))
    if rows is not None:
        on.apart(z, out)
    limit, above, units = (0.0, 0.0, "residual") if clamp is None else clamp
    flags |= dict(ENTROPY=g_entropy is not None, CLAMP=clamp is not None, RESIDUAL=units == "residual")
    if m and c:
        with torch.cuda.device_of(z):
            _rows().backward_kernel[(m, -(-c // BACKWARD["BLOCK"]))](
                z, out, rows, state, targets, g_logp, g_entropy, *head[:2], z.stride(0), out.stride(0), c,
                transform["offset"], *head[2:], limit, above or -1.0, ROWS=rows is not None, **flags, **BACKWARD,
            )  # fmt: skip


def peaks(
    z: Tensor,  # (n, c)
    state: Tensor,  # (n, 8) float64, finished over the whole vocabulary
    targets: Tensor,  # (n,) int64
    rows: Tensor,  # (m,) int64, m >= 1 of the n
    *,
    out: Tensor,  # (c,) float32
    **transform: Unpack[Transform],
) -> None:
    """Write the largest log-prob of each column over some rows.

    Raises:
        ValueError: as in `forward`.
    """
    on, (n, c) = checks(z), z.shape
    on.state(state, n)
    head, flags = head_of(on, (n, c), targets, transform)
    on.tensor("rows", rows, torch.int64, (rows.numel(),))
    on.tensor("out", out, torch.float32, (c,))
    if c:
        with torch.cuda.device_of(z):
            _rows().peaks_kernel[(-(-c // PEAKS["BLOCK"]),)](
                z, out, state, rows, *head[:2], z.stride(0), c, len(rows), *head[2:], **flags, **PEAKS
            )


def survey(
    z: Tensor,  # (n, c)
    state: Tensor,  # (n, 8) float64, finished over the whole vocabulary
    targets: Tensor,  # (n,) int64
    rows: Tensor,  # (m,) int64, of the n; not checked
    sums: Tensor,  # (m, levels + 2, 3) float64, added to
    *,
    first: int,
    every: int,
    drop_mass: float,
    steps: int,
    sample: Tensor | None = None,  # (m, S) uint8, rows apart
    **transform: Unpack[Transform],
) -> None:
    """Add number, sum of p and of -p log p by level, of every so many-th run of columns; `sample` takes the levels.

    Columns of a level are counted, and p taken for that in its middle; of the last level p is summed, of the first
    nothing but the number.

    Raises:
        ValueError: as in `forward`, or more levels than BINS.
    """
    on, (n, c), m, levels = checks(z), z.shape, rows.numel(), sums.shape[1] - 2
    on.state(state, n)
    head, flags = head_of(on, (n, c), targets, transform)
    on.tensor("rows", rows, torch.int64, (m,))
    on.tensor("sums", sums, torch.float64, (m, levels + 2, 3))
    if levels + 2 >= SURVEY["BINS"]:
        raise ValueError(f"sums must have less than {SURVEY['BINS']} levels, got {levels + 2}")
    begin, end = looked_at(first, every), looked_at(first + c, every)
    if sample is not None and (sample.shape != (m, end - begin) or sample.dtype != torch.uint8):
        raise ValueError(f"sample must be uint8 {(m, end - begin)}, got {sample.dtype} {tuple(sample.shape)}")
    lead = (begin // RUN * every + every // 2) * RUN - first  # the first column that is looked at
    if m and end > begin:
        with torch.cuda.device_of(z):
            _rows().survey_kernel[(m,)](
                z, sums, sample, state, rows, *head[:2], z.stride(0), 0 if sample is None else sample.stride(0),
                end - begin, lead, every * RUN, levels, math.log2(drop_mass), float(steps), *head[2:],
                SAMPLE=sample is not None, **flags, RUN=RUN, **SURVEY,
            )  # fmt: skip


def multiply(x: Tensor, factor: Tensor) -> None:
    """x times the number `factor` [] of its device, in place; where that is 1 nothing else is read or written.

    Raises:
        ValueError: a tensor of the wrong device or dtype, or one that is not contiguous.
    """
    on = checks(x.view(-1)[None])
    on.tensor("x", x, x.dtype, tuple(x.shape))
    on.tensor("factor", factor, torch.float32, ())
    if n := x.numel():
        with torch.cuda.device_of(x):
            grid = min(-(-n // MULTIPLY["BLOCK"]), PROGRAMS)
            _rows().multiply_kernel[(grid,)](x, factor, n, **MULTIPLY)


def _rows() -> Any:
    """The kernels, for which Triton is imported at the first launch."""
    from align_kernels.backends.triton import rows

    return rows
