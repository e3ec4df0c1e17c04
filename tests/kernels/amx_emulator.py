"""The products of bfloat16 as a compiler makes them, where the instructions of AMX are trapped and emulated."""

from __future__ import annotations

import ctypes
import subprocess
from ctypes import c_char_p, c_int, c_int64, c_void_p
from pathlib import Path

import pytest
import torch
from torch import Tensor

from .cuda_emulator import COMPILER

SOURCES = Path(__file__).parents[2] / "csrc" / "cpu"
AVX2, AVX512 = "-mavx2 -mfma", "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma"  # as in setup.py
FILES = {
    Path(__file__).with_suffix(".cpp"): AVX2, SOURCES / "gemm.cpp": "", SOURCES / "gemm_avx2.cpp": AVX2,
    SOURCES / "gemm_avx512_bf16.cpp": AVX512, SOURCES / "gemm_amx.cpp": AVX512,
}  # fmt: skip
KNOWN = """#include <immintrin.h>
__attribute__((target("amx-tile,amx-bf16"))) void use() { _tile_dpbf16ps(0, 1, 2); }
"""
FLAGS = "-std=c++17 -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wno-psabi -fPIC -fopenmp"
PLACES = [c_char_p, c_void_p, c_int64 * 2, c_void_p, c_int64 * 2, c_void_p, *4 * [c_int64], c_int]


class Library:
    """`csrc/cpu`'s products and the emulator, by their C names."""

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        self.c.align_product.argtypes = [*PLACES, c_int]
        self.c.align_slice_apart.argtypes = [*PLACES, c_void_p]
        self.c.align_packed.argtypes, self.c.align_packed.restype = [c_char_p, c_int64], c_int64
        self.c.amx_load.argtypes = self.c.amx_store.argtypes = [c_int, c_void_p, c_int64]
        for name in ("align_product", "align_slice_apart", "amx_fault"):
            getattr(self.c, name).restype = c_char_p

    def product(self, gemm: str, out: Tensor, a: Tensor, b: Tensor, add: bool, threads: int = 1) -> None:
        """`align_kernels`' product of two bfloat16 matrices, its arguments unchecked.

        Raises:
            AssertionError: the wrong use of a tile.
        """
        wrong = self.c.align_product(*self._places(gemm, out, a, b, add), threads)
        assert wrong is None, wrong

    def slice_apart(self, gemm: str, out: Tensor, a: Tensor, b: Tensor, add: bool, packed: int) -> None:
        """One slice, of shared memory, in a process of its own; `packed` is an address of `packed(gemm, n)` bytes.

        Raises:
            AssertionError: the process ended by a signal, or the wrong use of a tile.
        """
        wrong = self.c.align_slice_apart(*self._places(gemm, out, a, b, add), packed)
        assert wrong is None, wrong

    def packed(self, gemm: str, n: int) -> int:
        return self.c.align_packed(gemm.encode(), n)

    @staticmethod
    def _places(gemm: str, out: Tensor, a: Tensor, b: Tensor, add: bool) -> tuple:
        assert a.dtype == b.dtype == torch.bfloat16 and out.dtype == torch.float32
        return (
            gemm.encode(), a.data_ptr(), (c_int64 * 2)(*a.stride()), b.data_ptr(), (c_int64 * 2)(*b.stride()),
            out.data_ptr(), out.stride(0), *out.shape, len(b), add,
        )  # fmt: skip


def build(folder: Path) -> Library:
    if COMPILER is None:
        pytest.skip("no C++ compiler to emulate AMX with")
    if subprocess.run([COMPILER, "-fsyntax-only", "-x", "c++", "-"], input=KNOWN, check=False, text=True).returncode:
        pytest.skip(f"{COMPILER} does not know AMX")
    objects = []
    for source, flags in FILES.items():
        objects.append(str(folder / f"{source.stem}.o"))
        command = [COMPILER, *FLAGS.split(), *flags.split(), "-c", str(source), "-o", objects[-1]]
        subprocess.run(command, check=True, timeout=300)
    library = folder / "emulated.so"
    subprocess.run([COMPILER, "-shared", "-fopenmp", *objects, "-o", str(library)], check=True, timeout=300)
    return Library(library)
