"""What the tests of the row kernels share: transforms of a tile's logits, and values that no backend takes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

OPTIONS: dict[str, dict] = {
    "plain": {},
    "bias": dict(bias=True),
    "scale": dict(scale=0.25),
    "negative scale": dict(scale=-1.5),
    "softcap": dict(softcap=3.0),
    "temperature": dict(temperature=0.7),
    "temperature per row": dict(temperature="rows"),
    "all": dict(bias=True, scale=2.0, softcap=30.0, temperature="rows"),
}
# of a tile (3, 7) at the beginning of a vocabulary of 7
WRONG_OPTIONS: list[tuple[dict, str]] = [
    (dict(offset=-1), "offset -1"),
    (dict(vocab=6), "vocab 6"),
    (dict(scale=math.nan), "scale must be finite, got nan"),
    (dict(softcap=0.0), "softcap must be finite and > 0 or None, got 0"),
    (dict(softcap=math.inf), "softcap .* got inf"),
    (dict(temperature=0.0), "temperature must be finite and > 0, got 0"),
    (dict(temperature=torch.ones(2)), r"temperature .*got .*\(2,\)"),
    (dict(bias=torch.ones(7, dtype=torch.bfloat16)), "bias .*bfloat16"),
]


def empty_state(n: int) -> Tensor:
    return torch.tensor([-torch.inf, 0, 0, 0, 0, 0, -1, 0], dtype=torch.float64).repeat(n, 1)


def enlarge(z: Tensor) -> None:
    """Logits as large as a row may have them: of both signs, all at the bottom, all at the top."""
    z.mul_(1e4 / z.abs().amax(1, keepdim=True))
    z[1] = -1e4
    z[2] = 1e4
