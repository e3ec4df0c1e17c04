"""`forward` of hidden states, whose logits never leave the chip: launches of the kernels in linear.py."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from align_kernels.backends.arguments import Checks, Transform
from align_kernels.backends.triton.arguments import CODES, architecture, head_of

MERGE = dict(BP=64, BN=8, num_warps=4)
PART = 128  # columns of one entry of the statistics, linear.PART
STATISTICS = 20 / PART  # bytes per logit that `forward` takes

# tiles of `forward`, by what shared memory and registers hold (docs/gpu_registers.md)
WIDE = dict(BN=128, BV=256, BD=64, GROUP=16, num_warps=8, num_stages=4)
DEEP = dict(BN=128, BV=128, BD=64, GROUP=16, num_warps=8, num_stages=4)
SMALL = dict(BN=128, BV=128, BD=64, GROUP=16, num_warps=8, num_stages=2)
TILES: dict[int | str, dict] = {80: DEEP, 90: WIDE, 100: DEEP, 103: DEEP}  # any other: SMALL


def why_not(hidden: Tensor, weight: Tensor) -> str | None:
    """None where `forward` serves these tensors, else the reason in a few words."""
    if hidden.dtype != weight.dtype or weight.dtype not in (torch.bfloat16, torch.float16):
        return f"hidden and weight must both be bfloat16 or float16, got {hidden.dtype} and {weight.dtype}"
    # rows whose alignment the compiler knows: others are copied to shared memory element by element
    D, stride = weight.shape[1], weight.stride(0)
    if D == 0 or D % 16 or stride % 16 or weight.stride(1) != 1 or weight.data_ptr() % 16:
        return f"weight must have aligned rows of a multiple of 16 columns, got {D} with strides {weight.stride()}"
    return None


def forward(
    x: Tensor,  # (n, D) bfloat16 | float16
    weight: Tensor,  # (V, D), x's dtype
    state: Tensor,  # (n, 8) float64, updated in place
    targets: Tensor,  # (n,) int64
    **transform: Unpack[Transform],
) -> None:
    """Fold the raw logits x @ weight.T, which are never written, into the running state of their rows.

    Raises:
        ValueError: a tensor of the wrong device, dtype, shape or layout, or what `why_not` says.
    """
    reason = why_not(x, weight)
    if reason is not None:
        raise ValueError(reason)
    if x.stride(1) != 1 or x.stride(0) % 16 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    (n, D), V = x.shape, weight.shape[0]
    on = Checks(x.device, CODES)
    on.state(state, n)
    head, flags = head_of(on, (n, V), targets, transform)
    if not (n and V):
        return
    arch = architecture(x.device)
    tile = TILES.get(arch, SMALL)
    if tile is WIDE and flags["SOFTCAP"]:  # tanh and 256 columns do not fit in the registers
        tile = DEEP
    tiles = -(-V // tile["BV"])
    parts = torch.empty(5, -(-V // PART), n, dtype=torch.float32, device=x.device)
    picked = torch.empty(2, n, dtype=torch.float32, device=x.device)
    offset, tma = transform["offset"], isinstance(arch, int) and arch >= 90
    flags |= dict(NEGATIVE=transform["scale"] < 0, TMA=tma, EVEN=D % tile["BD"] == 0)
    operands = (x, weight)
    if tma:
        operands = (_descriptor(x, tile["BN"], tile["BD"]), _descriptor(weight, tile["BV"], tile["BD"]))
    with torch.cuda.device_of(x):
        _linear().statistics_kernel[(-(-n // tile["BN"]) * tiles,)](
            *operands, parts, picked, targets, *head[:2], n, V, D, x.stride(0), weight.stride(0), offset, *head[2:],
            **flags, **tile,
        )  # fmt: skip
        _linear().merge_kernel[(-(-n // MERGE["BN"]),)](parts, picked, state, targets, n, V, offset, **MERGE)


def _descriptor(x: Tensor, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


def _linear() -> Any:
    from align_kernels.backends.triton import linear

    return linear
