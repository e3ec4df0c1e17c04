"""From tensors to what the extension `align_kernels._cuda` takes: device, dtype and layout of every argument checked.

What device memory says (targets in range) is not read back here: `check_rows` of the caller has looked at it, and a
target outside of the tile is one that lies in another tile.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

try:
    from align_kernels import _cuda

    MISSING = None
except ImportError as error:
    MISSING = (
        f"the extension align_kernels._cuda is not built or fails to load ({error}): reinstall where nvcc is on PATH "
        "or in CUDA_HOME, with FORCE_CUDA=1 if no GPU is in sight there"
    )

DEVICE = "cuda"
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NAMES = "float32, bfloat16 or float16"


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where logits of this device and dtype are served, else the reason in one sentence."""
    if MISSING is not None:
        return MISSING
    if device.type != DEVICE:
        return f"it runs on {DEVICE} devices, not on {device}"
    if dtype not in CODES:
        return f"it serves {NAMES}, not {str(dtype).removeprefix('torch.')}"
    if _cuda.device_count() == 0:
        return "the machine has no GPU, or no driver that is new enough for CUDA 13"
    return None


def guard(x: Tensor) -> AbstractContextManager:
    """The device of `x` is the current one within."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def queue(x: Tensor) -> _cuda.Queue:
    """The current stream of the device of `x`."""
    return _cuda.Queue(x.device.index or 0, torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0)


def logits(
    z: Tensor,  # (n, c)
    targets: Tensor,  # (n,)
    *,
    offset: int,
    vocab: int,
    bias: Tensor | None,  # (c,)
    scale: float,
    softcap: float | None,
    temperature: float | Tensor,  # (n,)
) -> _cuda.Logits:
    if MISSING is not None:
        raise RuntimeError(MISSING)
    code = tile_code("z", z)
    n, c = z.shape
    check("targets", targets, torch.int64, (n,))
    if bias is not None:
        check("bias", bias, torch.float32, (c,))
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be finite and > 0 or None, got {softcap}")
    scalar, rows = 1.0, None
    if isinstance(temperature, Tensor):
        check("temperature", temperature, torch.float32, (n,))
        rows = temperature
    else:
        scalar = temperature
    return _cuda.Logits(
        z.data_ptr(), code, n, c, z.stride(0), targets.data_ptr(), offset, vocab,
        address(bias), scale, softcap or 0.0, scalar, address(rows),
    )  # fmt: skip


def gradient(z: Tensor, out: Tensor, clamp: tuple[float, float, str] | None) -> _cuda.Out:
    limit, prob_above, units = (math.inf, 0.0, "residual") if clamp is None else clamp
    if units not in ("residual", "gradient"):
        raise ValueError(f'clamp units must be "residual" or "gradient", got {units!r}')
    code = tile_code("out", out)
    if out.shape != z.shape:
        raise ValueError(f"out must have z's shape {tuple(z.shape)}, got {tuple(out.shape)}")
    return _cuda.Out(out.data_ptr(), code, out.stride(0), limit, prob_above, units == "residual")


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def tile_code(name: str, x: Tensor) -> int:
    if x.device.type != DEVICE or x.dtype not in CODES:
        raise ValueError(f"{name} must be {NAMES} on a {DEVICE} device, got {x.dtype} on {x.device}")
    if x.dim() != 2 or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(
            f"{name} must be (n, c) with unit column stride, got {tuple(x.shape)} with strides {x.stride()}"
        )
    return CODES[x.dtype]


def check(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if x.device.type != DEVICE or x.dtype != dtype or x.shape != shape or not x.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous {str(dtype).removeprefix('torch.')} tensor {shape} on a {DEVICE} device, "
            f"got {x.dtype} {tuple(x.shape)} with strides {x.stride()} on {x.device}"
        )
