"""The kernels' tests on another device than the CPU, by environment variables that benches/gpu/checks.py sets.

ALIGN_TEST_DEVICE  where the library runs; inputs are made, and results judged, on the CPU. Default "cpu".
ALIGN_TEST_IMPL    the backend that takes the place of impl="cpu" there. Default "auto".
ALIGN_TEST_SEED    of the random calls. Default 0.
ALIGN_TEST_CALLS   how many random calls. Default 2400.
ALIGN_TEST_POISON  1: memory that is not initialised reads NaN.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

DEVICE = os.environ.get("ALIGN_TEST_DEVICE", "cpu")
IMPL = os.environ.get("ALIGN_TEST_IMPL", "auto")
SEED = int(os.environ.get("ALIGN_TEST_SEED", "0"))
CALLS = int(os.environ.get("ALIGN_TEST_CALLS", "2400"))
PROFILE = DEVICE.split(":")[0]  # of the planner

if os.environ.get("ALIGN_TEST_POISON") == "1":
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


def move(x: Any, device: str) -> Any:
    """Every tensor in x on a device; gradients find their way back."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, dict):
        return {key: move(value, device) for key, value in x.items()}
    if isinstance(x, tuple):
        moved = [move(value, device) for value in x]
        return type(x)(*moved) if hasattr(x, "_fields") else tuple(moved)
    return x


def there(call: Callable) -> Callable:
    """A function of the library, run on DEVICE."""
    if DEVICE == "cpu":
        return call

    @wraps(call)
    def run(*args: Any, **options: Any) -> Any:
        if options.get("impl") == "cpu":
            options["impl"] = IMPL
        return move(call(*move(args, DEVICE), **move(options, DEVICE)), "cpu")

    return run
