"""The primitives in C++ (`align_kernels._C`), vectorised and threaded, for float32 and bfloat16 on the CPU, and matrix
products for processors on which torch.mm is slow.

Same signatures and state as `torch_ops`; arithmetic is float32 within a tile, the state is float64, and the result does
not depend on the number of threads. Every argument is checked: here what a tensor knows, in C++ what its numbers say.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

try:
    from align_kernels import _C

    _MISSING = None
except ImportError as error:
    _MISSING = (
        f"the extension align_kernels._C is not built or fails to load ({error}): reinstall with a C++17 compiler"
    )

_ADVISED = _MISSING is None and _C.product_advised()
_CODES = {torch.float32: 0, torch.bfloat16: 1}


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where logits of this device and dtype are served, else the reason in one sentence."""
    if _MISSING is not None:
        return _MISSING
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device}"
    if dtype not in _CODES:
        return f"it serves float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


def forward(
    z: Tensor,  # (n, c) float32 | bfloat16
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
        ValueError: naming the value, before anything is written: a tensor of the wrong device, dtype, shape or layout,
            a target outside [0, vocab), a scale that is not finite, a softcap or temperature not finite and > 0.
        RuntimeError: the extension is not built.
    """
    logits = _logits(z, targets, offset, vocab, bias, scale, softcap, temperature)
    _check("state", state, torch.float64, (z.shape[0], 8))
    _C.forward(logits, state.data_ptr(), torch.get_num_threads())


def exponentials(
    z: Tensor,  # (n, c) float32 | bfloat16
    state: Tensor,  # (n, 8) float64, updated in place
    targets: Tensor,  # (n,) int64
    reference: Tensor,  # (n,) float32, updated in place, -inf before the first tile
    *,
    offset: int,
    vocab: int,
    bias: Tensor | None,  # (c,) float32
    scale: float,
    temperature: float | Tensor,  # (n,) float32
    out: Tensor,  # (n, c) float32 | bfloat16, may be z
) -> None:
    """`forward` without a softcap, which also writes exp(l - reference), 0 at the target.

    Raises:
        ValueError: as in `forward`, and an `out` that overlaps z without being z.
    """
    logits = _logits(z, targets, offset, vocab, bias, scale, None, temperature)
    _check("state", state, torch.float64, (z.shape[0], 8))
    _check("reference", reference, torch.float32, (z.shape[0],))
    out_code = _check_out(z, out)
    _C.exponentials(
        logits, state.data_ptr(), reference.data_ptr(), out.data_ptr(), out_code, out.stride(0), torch.get_num_threads()
    )


def backward(
    z: Tensor,  # (n, c) float32 | bfloat16
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
    out: Tensor,  # (n, c) float32 | bfloat16, may be z
) -> None:
    """Write dL/dz of one tile: g (1[v = y] - p), clamped where asked, minus g_H p (l - lse + H).

    Raises:
        ValueError: as in `forward`, and an `out` that overlaps z without being z.
    """
    logits = _logits(z, targets, offset, vocab, bias, scale, softcap, temperature)
    n = z.shape[0]
    _check("state", state, torch.float64, (n, 8))
    _check("g_logp", g_logp, torch.float32, (n,))
    if g_entropy is not None:
        _check("g_entropy", g_entropy, torch.float32, (n,))
    limit, prob_above, units = (math.inf, 0.0, "residual") if clamp is None else clamp
    if units not in ("residual", "gradient"):
        raise ValueError(f'clamp units must be "residual" or "gradient", got {units!r}')
    out_code = _check_out(z, out)
    _C.backward(
        logits,
        state.data_ptr(),
        g_logp.data_ptr(),
        _address(g_entropy),
        limit,
        prob_above,
        units == "residual",
        out.data_ptr(),
        out_code,
        out.stride(0),
        torch.get_num_threads(),
    )


def peaks(
    z: Tensor,  # (n, c) float32 | bfloat16
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
        ValueError: as in `forward`, no row, or one outside [0, n).
    """
    logits = _logits(z, targets, offset, vocab, bias, scale, softcap, temperature)
    _check("state", state, torch.float64, (z.shape[0], 8))
    _check("rows", rows, torch.int64, (rows.numel(),))
    _check("out", out, torch.float32, (z.shape[1],))
    _C.peaks(logits, state.data_ptr(), rows.data_ptr(), len(rows), out.data_ptr(), torch.get_num_threads())


LEAST = 64  # rows, columns and depth of a product that `product` takes


def reads(dtype: torch.dtype) -> bool:
    """Whether `product` takes matrices of this dtype as they lie."""
    return dtype in _CODES


def has_product(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether `product` serves this dtype and sizes, and was measured faster than torch.mm there: on AMD processors
    with AVX2 and without AVX-512."""
    return _ADVISED and dtype == torch.float32 and min(sizes, default=LEAST) >= LEAST


def takes_product(out: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether these are laid out for `product`, and so large that it is faster, or such as torch.mm does not take."""
    sizes = (*out.shape, len(b)) if b.dtype == out.dtype else ()
    return has_product(out.dtype, *sizes) and a.dtype == out.dtype and out.stride(1) == 1


def product(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """out (m, n) float32 (+)= a (m, k) @ b (k, n), each float32 or bfloat16 with any strides.

    torch counts it as any other matrix product (`torch.utils.flop_counter`).

    Raises:
        ValueError: a tensor of the wrong dtype, shape or layout, or a processor without AVX2.
        NotImplementedError: a tensor that is not on the CPU. RuntimeError: the extension is not built.
    """
    torch.ops.align_kernels.product_(out, a, b, add)


_LIBRARY = torch.library.Library("align_kernels", "FRAGMENT")
_LIBRARY.define("product_(Tensor(a!) out, Tensor a, Tensor b, bool add) -> ()")


@torch.library.impl(_LIBRARY, "product_", "CPU")
def _product(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    if _MISSING is not None:
        raise RuntimeError(_MISSING)
    for name, x, dtypes in (("out", out, {torch.float32: 0}), ("a", a, _CODES), ("b", b, _CODES)):
        if x.dtype not in dtypes or x.dim() != 2:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{name} must be a {allowed} matrix, got {x.dtype} {tuple(x.shape)}")
    if out.shape != (a.shape[0], b.shape[1]) or a.shape[1] != b.shape[0]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (out, a, b))
        raise ValueError(f"out (m, n), a (m, k) and b (k, n) do not fit together, got {shapes}")
    if out.shape[1] > 1 and out.stride(1) != 1:
        raise ValueError(f"out must have unit column stride, got strides {out.stride()}")
    (m, n), k = out.shape, a.shape[1]
    _C.product(
        a.data_ptr(), _CODES[a.dtype], a.stride(), b.data_ptr(), _CODES[b.dtype], b.stride(), out.data_ptr(),
        out.stride(0), m, n, k, add, torch.get_num_threads(),
    )  # fmt: skip


@register_flop_formula(torch.ops.align_kernels.product_)
def _product_flops(out: tuple[int, int], a: tuple[int, int], *_: Any, **__: Any) -> int:
    """From the shapes."""
    return 2 * out[0] * out[1] * a[1]


def _logits(
    z: Tensor,
    targets: Tensor,
    offset: int,
    vocab: int,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    temperature: float | Tensor,
) -> _C.Logits:
    if _MISSING is not None:
        raise RuntimeError(_MISSING)
    code = _check_tile("z", z)
    n, c = z.shape
    _check("targets", targets, torch.int64, (n,))
    if bias is not None:
        _check("bias", bias, torch.float32, (c,))
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be finite and > 0 or None, got {softcap}")
    scalar, rows = 1.0, None
    if isinstance(temperature, Tensor):
        _check("temperature", temperature, torch.float32, (n,))
        rows = temperature
    else:
        scalar = temperature
    return _C.Logits(
        z.data_ptr(), code, n, c, z.stride(0), targets.data_ptr(), offset, vocab,
        _address(bias), scale, softcap or 0.0, scalar, _address(rows),
    )  # fmt: skip


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _check_tile(name: str, x: Tensor) -> int:
    """The dtype code of a tile."""
    if x.device.type != "cpu" or x.dtype not in _CODES:
        raise ValueError(f"{name} must be float32 or bfloat16 on the CPU, got {x.dtype} on {x.device}")
    if x.dim() != 2 or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(
            f"{name} must be (n, c) with unit column stride, got {tuple(x.shape)} with strides {x.stride()}"
        )
    return _CODES[x.dtype]


def _check_out(z: Tensor, out: Tensor) -> int:
    """The dtype code of a tile that is written."""
    code = _check_tile("out", out)
    if out.shape != z.shape:
        raise ValueError(f"out must have z's shape {tuple(z.shape)}, got {tuple(out.shape)}")
    return code


def _check(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if x.device.type != "cpu" or x.dtype != dtype or x.shape != shape or not x.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous {str(dtype).removeprefix('torch.')} tensor {shape} on the CPU, "
            f"got {x.dtype} {tuple(x.shape)} with strides {x.stride()} on {x.device}"
        )
