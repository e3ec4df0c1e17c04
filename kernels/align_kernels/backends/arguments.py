"""Checks of a primitive's arguments: what a tensor knows of itself. What its numbers say is checked in C++."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from align_kernels.backends.state import COLUMNS

Clamp = tuple[float, float, str]  # limit, prob_above, "residual" | "gradient"


class Linear(TypedDict):
    """Where a tile's columns stand in the vocabulary, and the head's transform without its softcap."""

    offset: int  # of the tile's first column
    vocab: int  # columns of the whole vocabulary
    bias: Tensor | None  # (c,) float32
    scale: float
    temperature: float | Tensor  # (n,) float32


class Transform(Linear):
    """The same with its softcap."""

    softcap: float | None


class Lists(NamedTuple):
    """Few columns of each of m rows: of row t the entries begins[t] .. ends[t], columns ascending."""

    begins: Tensor  # (m,) int64
    ends: Tensor  # (m,) int64
    columns: Tensor  # (K,) int32, of this rank
    z: Tensor  # (K,) float32 raw logits


RUN = 16  # columns that lie side by side and are looked at together: a cache line of float32


def looked_at(columns: int, every: int) -> int:
    """How many of the first `columns` of a rank `every` so many-th run of them has."""
    whole, rest = divmod(columns, every * RUN)
    return whole * RUN + min(max(rest - every // 2 * RUN, 0), RUN)


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def names_of(dtypes: Mapping[torch.dtype, int], last: str = "or") -> str:
    *most, one = map(name_of, dtypes)
    return f"{', '.join(most)} {last} {one}" if most else one


def reach(x: Tensor) -> tuple[int, int]:
    """The first address of a tile (n, c), and the first behind it."""
    elements = (len(x) - 1) * x.stride(0) + x.shape[1] if x.numel() else 0
    return x.data_ptr(), x.data_ptr() + elements * x.itemsize


def clamped(clamp: Clamp | None) -> tuple[float, float, bool]:
    """limit, prob_above and whether the limit is one of the residual; a limit of inf clamps nothing."""
    limit, prob_above, units = (math.inf, 0.0, "residual") if clamp is None else clamp
    if units not in ("residual", "gradient"):
        raise ValueError(f'clamp units must be "residual" or "gradient", got {units!r}')
    return limit, prob_above, units == "residual"


@dataclasses.dataclass(frozen=True)
class Checks:
    """For one call: all of its tensors lie on one device. Each raises ValueError, naming the argument."""

    device: torch.device
    codes: Mapping[torch.dtype, int]  # the dtypes of tiles, as the extension numbers them

    def tile(self, name: str, x: Tensor) -> int:
        """The code of a tile (n, c)."""
        if x.device != self.device or x.dtype not in self.codes:
            raise ValueError(f"{name} must be {names_of(self.codes)} on {self.device}, got {x.dtype} on {x.device}")
        if x.dim() != 2 or (x.shape[1] > 1 and x.stride(1) != 1):
            raise ValueError(
                f"{name} must be (n, c) with unit column stride, got {tuple(x.shape)} with strides {x.stride()}"
            )
        return self.codes[x.dtype]

    def out(self, out: Tensor, shape: tuple[int, int]) -> int:
        """The code of the tile that is written."""
        code = self.tile("out", out)
        if out.shape != shape:
            raise ValueError(f"out must have the shape {shape}, got {tuple(out.shape)}")
        return code

    def taken(self, z: Tensor, rows: Tensor | None) -> tuple[int, int]:
        """Of a tile, the rows that are taken and the columns: (m, c)."""
        n, c = z.shape
        if rows is None:
            return n, c
        self.tensor("rows", rows, torch.int64, (rows.numel(),))
        return len(rows), c

    def apart(self, z: Tensor, out: Tensor) -> None:
        """Rows of z that are taken are read while others are written."""
        (begin, end), (first, last) = map(reach, (z, out))
        if begin < last and first < end:
            raise ValueError("out must not overlap z where some of its rows are taken")

    def tensor(self, name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        if x.device != self.device or x.dtype != dtype or x.shape != shape or not x.is_contiguous():
            raise ValueError(
                f"{name} must be a contiguous {name_of(dtype)} tensor {shape} on {self.device}, got {x.dtype} "
                f"{tuple(x.shape)} with strides {x.stride()} on {x.device}"
            )

    def state(self, state: Tensor, n: int) -> None:
        self.tensor("state", state, torch.float64, (n, COLUMNS))

    def coefficients(self, n: int, g_logp: Tensor, g_entropy: Tensor | None) -> None:
        self.tensor("g_logp", g_logp, torch.float32, (n,))
        if g_entropy is not None:
            self.tensor("g_entropy", g_entropy, torch.float32, (n,))

    def transform(
        self,
        shape: tuple[int, int],  # of what is taken of the tile, (m, c)
        targets: Tensor,
        transform: Transform,
    ) -> tuple[float, Tensor | None]:
        """The temperature of all rows, and that of each, which replaces it."""
        (m, c), bias, softcap, temperature = shape, transform["bias"], transform["softcap"], transform["temperature"]
        self.tensor("targets", targets, torch.int64, (m,))
        if bias is not None:
            self.tensor("bias", bias, torch.float32, (c,))
        if softcap is not None and not softcap > 0:
            raise ValueError(f"softcap must be finite and > 0 or None, got {softcap}")
        if not isinstance(temperature, Tensor):
            return temperature, None
        self.tensor("temperature", temperature, torch.float32, (m,))
        return 1.0, temperature

    def logits(
        self,
        make: Callable[..., Any],  # csrc's Logits
        z: Tensor,
        targets: Tensor,
        rows: Tensor | None = None,
        **transform: Unpack[Transform],
    ) -> Any:
        """A tile of raw logits, the rows that are taken of it and the head's transform, as an extension takes them."""
        t, code, (m, c) = transform, self.tile("z", z), self.taken(z, rows)
        temperature, of_rows = self.transform((m, c), targets, t)
        tile = make(
            z.data_ptr(), code, m, c, z.stride(0), targets.data_ptr(), t["offset"], t["vocab"],
            address(t["bias"]), t["scale"], t["softcap"] or 0.0, temperature, address(of_rows),
        )  # fmt: skip
        if rows is not None:
            tile.take(rows.data_ptr(), len(z))
        return tile
