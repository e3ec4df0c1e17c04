"""The extension `align_kernels._cuda`, and what it takes.

What device memory says (targets in range) is not read back here: `check_rows` of the caller has looked at it, and a
target outside of the tile is one that lies in another tile.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Unpack

import torch
from torch import Tensor

from align_kernels.backends.arguments import Checks, Clamp, Transform, clamped, name_of, names_of

try:
    import align_kernels._cuda as _cuda  # `from` would call a missing one a circular import

    MISSING = None
except ImportError as error:
    MISSING = (
        f"the extension align_kernels._cuda is not built or fails to load ({error}): reinstall where nvcc is on PATH "
        "or in CUDA_HOME, with FORCE_CUDA=1 if no GPU is in sight there"
    )

DEVICE = "cuda"
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where logits of this device and dtype are served, else the reason in one sentence."""
    if MISSING is not None:
        return MISSING
    if device.type != DEVICE:
        return f"it runs on {DEVICE} devices, not on {device}"
    if dtype not in CODES:
        return f"it serves {names_of(CODES)}, not {name_of(dtype)}"
    if _cuda.device_count() == 0:
        return "the machine has no GPU, or no driver that is new enough for CUDA 13"
    return None


def checks(name: str, x: Tensor) -> Checks:
    """For tensors on the device of `x`.

    Raises:
        RuntimeError: the extension is not built. ValueError: a device that is not served.
    """
    if MISSING is not None:
        raise RuntimeError(MISSING)
    if x.device.type != DEVICE:
        raise ValueError(f"{name} must be on a {DEVICE} device, got {x.device}")
    return Checks(x.device, CODES)


def guard(x: Tensor) -> AbstractContextManager:
    """The device of `x` is the current one within."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def queue(x: Tensor) -> _cuda.Queue:
    """The current stream of the device of `x`."""
    return _cuda.Queue(x.device.index or 0, torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0)


def logits(
    on: Checks, z: Tensor, targets: Tensor, rows: Tensor | None = None, **transform: Unpack[Transform]
) -> _cuda.Logits:
    return on.logits(_cuda.Logits, z, targets, rows, **transform)


def gradient(on: Checks, shape: tuple[int, int], out: Tensor, clamp: Clamp | None) -> _cuda.Out:
    limits = clamped(clamp)
    return _cuda.Out(out.data_ptr(), on.out(out, shape), out.stride(0), *limits)
