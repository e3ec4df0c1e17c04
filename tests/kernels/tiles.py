"""What the tests of the row kernels share: transforms of a tile's logits, and values that no backend takes."""

from __future__ import annotations

import math
from typing import Any

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


TAKEN = torch.tensor([7, 0, 3, 3, 8])  # of nine rows, in any order
TERMS = [(clamp, entropy) for clamp in (None, (0.03, 0.01, "residual")) for entropy in (False, True)]


def backward_of_some(backend: Any, case: Any, h: Tensor | None, clamp: tuple | None, out: Tensor, common: dict) -> None:
    """The gradient of the rows TAKEN of a case of nine; what lies beside them in z is NaN, and so is not read."""
    state, t = case.state()[TAKEN], common["temperature"]
    case.z[torch.ones(9, dtype=torch.bool).index_fill(0, TAKEN, False)] = torch.nan
    common = common | dict(temperature=t[TAKEN] if isinstance(t, Tensor) else t)
    h = None if h is None else h[TAKEN]
    backend.backward(case.z, state, case.targets[TAKEN], case.g[TAKEN], h, clamp=clamp, out=out, rows=TAKEN, **common)
