"""The one rule by which results are judged: the true value in float64, and the error that plain torch makes.

float32 must lie within 2e-5 of the tensor's largest entry, float64 within 1e-11. Where anything is stored in 16 bits a
result may err 1.5 times as much as eager torch errs in the same dtypes, plus one rounding of itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}
UNDERFLOW = 1e-30  # below, float32 may give 0


def largest(x: Tensor) -> float:
    return float(x.detach().abs().max()) if x.numel() else 0.0


def check(name: str, got: Tensor, true: Tensor, eager: Tensor | None = None, *, scale: float = 0.0) -> float:
    """Assert that `got` is as close to `true` as the rule asks; returns the error over what is allowed.

    Args:
        true: float64.
        eager: what eager torch gives in the same dtypes, where anything is stored in 16 bits.
        scale: size of the numbers that the result was made of, where its own largest entry says too little.
    """
    assert got.shape == true.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(true.shape)}"
    assert bool(got.isfinite().all()), f"{name} is not finite"
    error = largest(got.double() - true)
    allowed = RELATIVE[got.dtype] * max(largest(true), scale, UNDERFLOW)
    if eager is not None:
        allowed += 1.5 * largest(eager.double() - true)
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"
    return error / allowed if allowed else 0.0
