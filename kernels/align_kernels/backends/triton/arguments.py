"""What the Triton kernels take of tensors and of the head's transform."""

from __future__ import annotations

import os
from functools import lru_cache

import torch
from torch import Tensor

from align_kernels.backends.arguments import Checks, Transform, name_of, names_of

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where logits of this device and dtype are served, else the reason in one sentence."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != ("cpu" if interpreted else "cuda"):
        return f"it runs on a GPU, and on a CPU in Triton's interpreter alone (TRITON_INTERPRET=1), not on {device}"
    if dtype not in CODES:
        return f"it serves {names_of(CODES, 'and')}, not {name_of(dtype)}"
    return _missing()


@lru_cache
def _missing() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton is not installed or fails to load ({error}): pip install triton, on Linux"
    return None


def checks(z: Tensor) -> Checks:
    """For tensors on the device of the tile z."""
    on = Checks(z.device, CODES)
    on.tile("z", z)
    return on


def head_of(
    on: Checks,
    shape: tuple[int, int],  # of the tile, (n, c)
    targets: Tensor,
    transform: Transform,
) -> tuple[tuple, dict[str, bool]]:
    """What every kernel takes of the head, (bias, temperature, scale, cap, 1 / temperature) and flags."""
    bias, softcap, scale = transform["bias"], transform["softcap"], transform["scale"]
    temperature, rows = on.transform(shape, targets, transform)
    flags = dict(BIAS=bias is not None, SOFTCAP=softcap is not None, ROW_TEMPERATURE=rows is not None)
    return (bias, rows, float(scale), float(softcap or 1.0), 1.0 / temperature), flags


def architecture(device: torch.device) -> int | str:
    """The compute capability as a number (90 for sm_90), or the name of an AMD architecture."""
    if device.type == "cpu":  # in the interpreter
        return 90
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return properties.major * 10 + properties.minor
