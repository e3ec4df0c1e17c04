"""Matrix products in C++: of float32 for processors on which torch.mm is slow, of bfloat16 for those with units for it
(AVX512-BF16, AMX), since torch's write no float32 on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from align_kernels.backends.arguments import names_of
from align_kernels.backends.cpu import arguments
from align_kernels.backends.cpu.arguments import CODES

ADVISED = {dtype for dtype, code in CODES.items() if arguments.MISSING is None and arguments._C.product_advised(code)}
LEAST = 64  # rows, columns and depth of a product of float32 that `product` takes


def units() -> str | None:
    """What the processor multiplies bfloat16 with, None where it is widened to float32."""
    return arguments._C.narrow_gemm() if torch.bfloat16 in ADVISED else None


def reads(dtype: torch.dtype) -> bool:
    """Whether `product` takes matrices of this dtype as they lie."""
    return dtype in CODES


def serves(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether `product` serves this dtype and sizes, and was measured faster than torch.mm in float32 there: float32 on
    AMD processors with AVX2 and without AVX-512, bfloat16 of any size where the processor multiplies it."""
    return dtype in ADVISED and (dtype == torch.bfloat16 or min(sizes, default=LEAST) >= LEAST)


def takes(out: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether these are laid out for `product`, and so large that it is faster, or such as torch.mm does not take."""
    if out.dtype != torch.float32 or out.stride(1) != 1 or not {a.dtype, b.dtype} <= CODES.keys():
        return False
    narrow = torch.bfloat16 in (a.dtype, b.dtype)
    return bool(ADVISED) if narrow else serves(torch.float32, *out.shape, len(b))


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
    if arguments.MISSING is not None:
        raise RuntimeError(arguments.MISSING)
    for name, x, dtypes in (("out", out, {torch.float32: 0}), ("a", a, CODES), ("b", b, CODES)):
        if x.dtype not in dtypes or x.dim() != 2:
            raise ValueError(f"{name} must be a {names_of(dtypes)} matrix, got {x.dtype} {tuple(x.shape)}")
    if out.shape != (a.shape[0], b.shape[1]) or a.shape[1] != b.shape[0]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (out, a, b))
        raise ValueError(f"out (m, n), a (m, k) and b (k, n) do not fit together, got {shapes}")
    if out.shape[1] > 1 and out.stride(1) != 1:
        raise ValueError(f"out must have unit column stride, got strides {out.stride()}")
    (m, n), k = out.shape, a.shape[1]
    arguments._C.product(
        a.data_ptr(), CODES[a.dtype], a.stride(), b.data_ptr(), CODES[b.dtype], b.stride(), out.data_ptr(),
        out.stride(0), m, n, k, add, torch.get_num_threads(),
    )  # fmt: skip


@register_flop_formula(torch.ops.align_kernels.product_)
def _product_flops(out: tuple[int, int], a: tuple[int, int], *_: Any, **__: Any) -> int:
    """From the shapes."""
    return 2 * out[0] * out[1] * a[1]
