"""Sums whose rows are written when they are first reached. Signatures are those of `RowSums`.

No row comes twice, so there are no atomics, and each sum has one order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from align_kernels.backends.arguments import Checks
from align_kernels.backends.triton.arguments import CODES

ADD = dict(BLOCK=1024, num_warps=4)  # columns of a block and warps of a program
FINISH = dict(BLOCK=1024, num_warps=4)


def add(
    sums: Tensor,  # (V, D) float32, of which rows that are not reached hold anything
    reached: Tensor,  # (V,) bool, updated in place
    rows: Tensor,  # (K,) int64, none twice; not checked
    values: Tensor,  # (K, D) float32
) -> None:
    """Add values to rows that are reached, and write them to the others.

    Raises:
        ValueError: a tensor of the wrong device, dtype or shape, or one that is not contiguous.
    """
    on, (V, D), K = Checks(sums.device, CODES), sums.shape, rows.numel()
    on.tensor("sums", sums, torch.float32, (V, D))
    on.tensor("reached", reached, torch.bool, (V,))
    on.tensor("rows", rows, torch.int64, (K,))
    on.tensor("values", values, torch.float32, (K, D))
    if K and D:
        with torch.cuda.device_of(sums):
            _rows().add_rows_kernel[(K,)](sums, reached.view(torch.uint8), rows, values, D, **ADD)


def finish(
    sums: Tensor,  # (V, D) float32
    reached: Tensor,  # (V,) bool
    out: Tensor,  # (V, D) float32 | bfloat16 | float16, may be the sums
) -> None:
    """Write the rows that are reached, and zeros for the others, which are not read.

    Raises:
        ValueError: as in `add`.
    """
    on, (V, D) = Checks(sums.device, CODES), sums.shape
    on.tensor("sums", sums, torch.float32, (V, D))
    on.tensor("reached", reached, torch.bool, (V,))
    on.out(out, (V, D))
    on.tensor("out", out, out.dtype, (V, D))
    if V and D:
        with torch.cuda.device_of(sums):
            same = out.data_ptr() == sums.data_ptr()
            _rows().finish_rows_kernel[(V,)](sums, out, reached.view(torch.uint8), D, SAME=same, **FINISH)


def _rows() -> Any:
    """The kernels, for which Triton is imported at the first launch."""
    from align_kernels.backends.triton import rows

    return rows
