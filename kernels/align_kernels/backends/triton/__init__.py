"""The primitives as Triton kernels, for float32, bfloat16 and float16 on a GPU.

Same signatures and state as `torch_ops`; arithmetic is float32 within a tile, the state is float64. With
TRITON_INTERPRET=1 in the environment they run on CPU tensors in Triton's interpreter, thousands of times slower: that
is how they are tested.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# columns of a block and warps of a program
FORWARD = dict(BLOCK=1024, num_warps=4)
BACKWARD = dict(BLOCK=2048, num_warps=4)
PEAKS = dict(ROWS=8, BLOCK=256, num_warps=4)
MERGE = dict(BP=16, BN=32, num_warps=4)
PART = 128  # columns of one entry of the statistics, linear.PART
STATISTICS = 24 / PART  # bytes per logit that `forward_linear` takes

# tiles of `forward_linear`, by what shared memory and registers hold (docs/gpu_registers.md)
WIDE = dict(BN=128, BV=256, BD=64, GROUP=16, num_warps=8, num_stages=4)
DEEP = dict(BN=128, BV=128, BD=64, GROUP=16, num_warps=8, num_stages=4)
SMALL = dict(BN=128, BV=128, BD=64, GROUP=16, num_warps=8, num_stages=2)
TILES: dict[int | str, dict] = {80: DEEP, 90: WIDE, 100: DEEP, 103: DEEP}  # any other: SMALL


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where logits of this device and dtype are served, else the reason in one sentence."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != ("cpu" if interpreted else "cuda"):
        return f"it runs on a GPU, and on a CPU in Triton's interpreter alone (TRITON_INTERPRET=1), not on {device}"
    if dtype not in DTYPES:
        return f"it serves float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return _missing()


@lru_cache
def _missing() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton is not installed or fails to load ({error}): pip install triton, on Linux"
    return None


def forward(
    z: Tensor,  # (n, c)
    state: Tensor,  # (n, 8) float64, updated in place
    targets: Tensor,  # (n,) int64
    *,
    offset: int,
    vocab: int,
    bias: Tensor | None,  # (c,) float32
    scale: float,
    softcap: float | None,
    temperature: float | Tensor,  # (n,) float32
) -> None:
    """Fold one tile of logits into the running state of its rows.

    Raises:
        ValueError: naming the value: a tensor of the wrong device, dtype, shape or layout.
    """
    del vocab
    _check_tile("z", z, z.device)
    n, c = z.shape
    head, flags = _head(z.device, n, c, state, targets, bias, scale, softcap, temperature)
    if n and c:
        with torch.cuda.device_of(z):
            _rows().forward_kernel[(n,)](
                z, state, targets, *head[:2], z.stride(0), c, offset, *head[2:], **flags, **FORWARD
            )


def backward(
    z: Tensor,  # (n, c)
    state: Tensor,  # (n, 8) float64, finished over the whole vocabulary
    targets: Tensor,  # (n,) int64
    g_logp: Tensor,  # (n,) float32
    g_entropy: Tensor | None,  # (n,) float32
    *,
    offset: int,
    vocab: int,
    bias: Tensor | None,  # (c,) float32
    scale: float,
    softcap: float | None,
    temperature: float | Tensor,  # (n,) float32
    clamp: tuple[float, float, str] | None,  # limit, prob_above, "residual" | "gradient"
    out: Tensor,  # (n, c), may be z
) -> None:
    """Write dL/dz of one tile: g (1[v = y] - p), clamped where asked, minus g_H p (l - lse + H).

    Raises:
        ValueError: as in `forward`.
    """
    del vocab
    _check_tile("z", z, z.device)
    n, c = z.shape
    head, flags = _head(z.device, n, c, state, targets, bias, scale, softcap, temperature)
    _check("g_logp", g_logp, z.device, torch.float32, (n,))
    if g_entropy is not None:
        _check("g_entropy", g_entropy, z.device, torch.float32, (n,))
    _check_tile("out", out, z.device)
    if out.shape != z.shape:
        raise ValueError(f"out must have z's shape {tuple(z.shape)}, got {tuple(out.shape)}")
    limit, above, units = (0.0, 0.0, "residual") if clamp is None else clamp
    flags |= dict(ENTROPY=g_entropy is not None, CLAMP=clamp is not None, RESIDUAL=units == "residual")
    if n and c:
        with torch.cuda.device_of(z):
            _rows().backward_kernel[(n, -(-c // BACKWARD["BLOCK"]))](
                z, out, state, targets, g_logp, g_entropy, *head[:2], z.stride(0), out.stride(0), c, offset, *head[2:],
                limit, above or -1.0, **flags, **BACKWARD,
            )  # fmt: skip


def peaks(
    z: Tensor,  # (n, c)
    state: Tensor,  # (n, 8) float64, finished over the whole vocabulary
    targets: Tensor,  # (n,) int64
    rows: Tensor,  # (m,) int64, m >= 1 of the n
    *,
    offset: int,
    vocab: int,
    bias: Tensor | None,  # (c,) float32
    scale: float,
    softcap: float | None,
    temperature: float | Tensor,  # (n,) float32
    out: Tensor,  # (c,) float32
) -> None:
    """Write the largest log-prob of each column over some rows.

    Raises:
        ValueError: as in `forward`.
    """
    del offset, vocab
    _check_tile("z", z, z.device)
    n, c = z.shape
    head, flags = _head(z.device, n, c, state, targets, bias, scale, softcap, temperature)
    _check("rows", rows, z.device, torch.int64, (rows.numel(),))
    _check("out", out, z.device, torch.float32, (c,))
    if c:
        with torch.cuda.device_of(z):
            _rows().peaks_kernel[(-(-c // PEAKS["BLOCK"]),)](
                z, out, state, rows, *head[:2], z.stride(0), c, len(rows), *head[2:], **flags, **PEAKS
            )


def why_not_linear(hidden: Tensor, weight: Tensor) -> str | None:
    """None where `forward_linear` serves these tensors, else the reason in a few words."""
    if hidden.dtype != weight.dtype or weight.dtype not in (torch.bfloat16, torch.float16):
        return f"hidden and weight must both be bfloat16 or float16, got {hidden.dtype} and {weight.dtype}"
    # rows whose alignment the compiler knows: others are copied to shared memory element by element
    D, stride = weight.shape[1], weight.stride(0)
    if D == 0 or D % 16 or stride % 16 or weight.stride(1) != 1 or weight.data_ptr() % 16:
        return f"weight must have aligned rows of a multiple of 16 columns, got {D} with strides {weight.stride()}"
    return None


def forward_linear(
    x: Tensor,  # (n, D) bfloat16 | float16
    weight: Tensor,  # (V, D), x's dtype
    state: Tensor,  # (n, 8) float64, updated in place
    targets: Tensor,  # (n,) int64
    *,
    offset: int,
    vocab: int,
    bias: Tensor | None,  # (V,) float32
    scale: float,
    softcap: float | None,
    temperature: float | Tensor,  # (n,) float32
) -> None:
    """`forward` of the raw logits x @ weight.T, which are never written.

    Raises:
        ValueError: as in `forward`, or what `why_not_linear` says.
    """
    del vocab
    reason = why_not_linear(x, weight)
    if reason is not None:
        raise ValueError(reason)
    if x.stride(1) != 1 or x.stride(0) % 16 or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    (n, D), V = x.shape, weight.shape[0]
    head, flags = _head(x.device, n, V, state, targets, bias, scale, softcap, temperature)
    if not (n and V):
        return
    arch = architecture(x.device)
    tile = TILES.get(arch, SMALL)
    if tile is WIDE and softcap is not None:  # tanh and 256 columns do not fit in the registers
        tile = DEEP
    tiles = -(-V // tile["BV"])
    parts = torch.empty(6, -(-V // PART), n, dtype=torch.float32, device=x.device)
    picked = torch.empty(n, dtype=torch.float32, device=x.device)
    tma = isinstance(arch, int) and arch >= 90
    flags |= dict(TMA=tma, EVEN=D % tile["BD"] == 0)
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


def _rows() -> Any:
    from align_kernels.backends.triton import rows

    return rows


def _linear() -> Any:
    from align_kernels.backends.triton import linear

    return linear


def _head(
    device: torch.device,
    n: int,
    c: int,
    state: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    temperature: float | Tensor,
) -> tuple[tuple, dict[str, bool]]:
    """What every kernel takes of the head, (bias, temperature, scale, cap, 1 / temperature) and flags."""
    _check("state", state, device, torch.float64, (n, 8))
    _check("targets", targets, device, torch.int64, (n,))
    if bias is not None:
        _check("bias", bias, device, torch.float32, (c,))
    rows, inverse = None, 1.0
    if isinstance(temperature, Tensor):
        _check("temperature", temperature, device, torch.float32, (n,))
        rows = temperature
    else:
        inverse = 1.0 / temperature
    flags = dict(BIAS=bias is not None, SOFTCAP=softcap is not None, ROW_TEMPERATURE=rows is not None)
    return (bias, rows, float(scale), float(softcap or 1.0), inverse), flags


def _check_tile(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device or x.dtype not in DTYPES or x.dim() != 2 or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(
            f"{name} must be (n, c) float32, bfloat16 or float16 on {device} with unit column stride, got "
            f"{tuple(x.shape)} {x.dtype} on {x.device} with strides {x.stride()}"
        )


def _check(name: str, x: Tensor, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if x.device != device or x.dtype != dtype or x.shape != shape or not x.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous {str(dtype).removeprefix('torch.')} tensor {shape} on {device}, got "
            f"{x.dtype} {tuple(x.shape)} with strides {x.stride()} on {x.device}"
        )


def architecture(device: torch.device) -> int | str:
    """The compute capability as a number (90 for sm_90), or the name of an AMD architecture."""
    if device.type == "cpu":  # in the interpreter
        return 90
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return properties.major * 10 + properties.minor
