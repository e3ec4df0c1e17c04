"""The extension `align_kernels._C`, and what it takes."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from align_kernels.backends.arguments import Checks, Transform, name_of, names_of

try:
    import align_kernels._C as _C  # `from` would call a missing one a circular import

    MISSING = None
except ImportError as error:
    MISSING = f"the extension align_kernels._C is not built or fails to load ({error}): reinstall with a C++17 compiler"

CODES = {torch.float32: 0, torch.bfloat16: 1}
checks = Checks(torch.device("cpu"), CODES)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where logits of this device and dtype are served, else the reason in one sentence."""
    if MISSING is not None:
        return MISSING
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device}"
    if dtype not in CODES:
        return f"it serves {names_of(CODES, 'and')}, not {name_of(dtype)}"
    return None


def logits(z: Tensor, targets: Tensor, rows: Tensor | None = None, **transform: Unpack[Transform]) -> _C.Logits:
    """Raises: RuntimeError without the extension; ValueError, naming the value."""
    if MISSING is not None:
        raise RuntimeError(MISSING)
    return checks.logits(_C.Logits, z, targets, rows, **transform)
