"""Triton's interpreter made right and strict. `install()` once, in a process with TRITON_INTERPRET=1.

Right: the stock interpreter multiplies bfloat16 dots and arithmetic as raw bits and truncates where a GPU rounds.
Strict: a pointer outside every argument, an address that one program stores and another touches, and a dependence on
the order of programs are silent there. Here the first two raise, and programs run in a shuffled order.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
Grid = interpreter.GridExecutor


class BoundsError(AssertionError): ...


class RaceError(AssertionError): ...


# -- bfloat16 -----------------------------------------------------------------------------------------------------
def widen(bits: np.ndarray) -> np.ndarray:
    """float32 of bfloat16's bits, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    high = bits >> np.uint32(16)
    rounded = (bits + np.uint32(0x7FFF) + (high & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), high | np.uint32(0x40), rounded).astype(np.uint16)


def is_narrow(x) -> bool:
    return x.dtype.scalar == tl.bfloat16


def wide(x):
    return Handle(widen(x.data), tl.float32) if is_narrow(x) else x


def cast(stock: Callable) -> Callable:
    def run(self, x, dtype, *rest):
        if is_narrow(x) == (dtype.scalar == tl.bfloat16):
            return x if is_narrow(x) else stock(self, x, dtype, *rest)
        if is_narrow(x):
            x = wide(x)
            return x if dtype.scalar == tl.float32 else stock(self, x, dtype, *rest)
        return Handle(narrow(x.data.astype(np.float32)), tl.bfloat16)

    return run


def dot(stock: Callable) -> Callable:
    return lambda self, a, b, *rest: stock(self, wide(a), wide(b), *rest)


def binary(stock: Callable) -> Callable:
    def run(self, a, b, op):
        if not is_narrow(a):
            return stock(self, a, b, op)
        out = op(widen(a.data), widen(b.data))
        return Handle(out if out.dtype == np.bool_ else narrow(out), tl.bfloat16)

    return run


def unary(stock: Callable) -> Callable:
    return lambda self, x, op: Handle(narrow(op(widen(x.data))), tl.bfloat16) if is_narrow(x) else stock(self, x, op)


# -- bounds and races ---------------------------------------------------------------------------------------------
class Launch:
    """What one kernel launch may touch, and what each of its programs has touched."""

    def __init__(self, tensors: Iterator[torch.Tensor]) -> None:
        spans = []
        for x in tensors:
            if x.numel():
                last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))
                spans.append((x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()))
        merged: list[list[int]] = []
        for begin, end in sorted(spans):  # two arguments may be one piece of memory
            if merged and begin <= merged[-1][1]:
                merged[-1][1] = max(end, merged[-1][1])
            else:
                merged.append([begin, end])
        self.begins, self.ends = np.array(merged, dtype=np.uint64).reshape(-1, 2).T
        self.program, self.order = -1, np.zeros(0, np.int64)
        self.loads: list[tuple[int, np.ndarray]] = []
        self.stores: list[tuple[int, np.ndarray]] = []

    def touch(self, log: list, pointers: np.ndarray, mask: Any, size: int) -> None:
        pointers = np.broadcast_to(pointers, np.shape(mask))[np.asarray(mask).astype(bool)]
        if pointers.size == 0:
            return
        place = np.searchsorted(self.begins, pointers, side="right") - 1
        outside = (place < 0) | (pointers + np.uint64(size) > self.ends[place])
        if outside.any():
            raise BoundsError(f"{outside.sum()} of {pointers.size} pointers lie outside every argument")
        log.append((self.program, pointers))

    def check_races(self, name: str) -> None:
        pointers, programs = self._log(self.stores)
        order = np.argsort(pointers, kind="stable")
        pointers, programs = pointers[order], programs[order]
        if ((pointers[1:] == pointers[:-1]) & (programs[1:] != programs[:-1])).any():
            raise RaceError(f"{name}: an address is stored by two programs")
        read, readers = self._log(self.loads)
        if len(pointers):
            place = np.minimum(np.searchsorted(pointers, read), len(pointers) - 1)
            if ((pointers[place] == read) & (programs[place] != readers)).any():
                raise RaceError(f"{name}: an address is stored by one program and loaded by another")

    @staticmethod
    def _log(log: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        if not log:
            return np.zeros(0, np.uint64), np.zeros(0, np.int64)
        return np.concatenate([p for _, p in log]), np.concatenate([np.full(p.size, i) for i, p in log])


current: Launch | None = None


def tensors_of(values) -> Iterator[torch.Tensor]:
    for x in values:
        x = getattr(x, "base", x) if not isinstance(x, torch.Tensor) else x  # a tensor descriptor's
        if isinstance(x, torch.Tensor):
            yield x


def launch(stock: Callable) -> Callable:
    def run(self, *args, **keywords):
        global current
        current = Launch(tensors_of([*args, *keywords.values()]))
        try:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)  # tl.max of nothing but NaN
                stock(self, *args, **keywords)
            current.check_races(self.fn.__name__)
        finally:
            current = None

    return run


def place(stock: Callable) -> Callable:
    def run(self, *index):
        assert current is not None
        grid = self.grid_dim
        flat = int(np.ravel_multi_index(index, grid))
        if len(current.order) == 0:
            current.order = np.random.default_rng(7).permutation(int(np.prod(grid)))
        current.program = int(current.order[flat])
        stock(self, *map(int, np.unravel_index(current.program, grid)))

    return run


def load(stock: Callable) -> Callable:
    def run(self, pointers, mask, *rest, **options):
        assert current is not None
        current.touch(current.loads, pointers.data, _array(mask), pointers.get_element_ty().primitive_bitwidth // 8)
        return stock(self, pointers, mask, *rest, **options)

    return run


def store(stock: Callable) -> Callable:
    def run(self, pointers, value, mask, *rest):
        assert current is not None
        current.touch(current.stores, pointers.data, _array(mask), pointers.get_element_ty().primitive_bitwidth // 8)
        return stock(self, pointers, value, mask, *rest)

    return run


def _array(mask) -> np.ndarray:
    return mask if isinstance(mask, np.ndarray) else mask.data  # a descriptor passes a bare array


def refuse(name: str) -> Callable:
    def run(*_):
        raise AssertionError(f"{name}: no kernel of this project uses atomics, and races through them are not checked")

    return run


def install() -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before triton is imported"
    for name, patch in dict(
        create_dot=dot,
        cast_impl=cast,
        create_fp_to_fp=cast,
        binary_op=binary,
        unary_op=unary,
        create_masked_load=load,
        create_masked_store=store,
        set_grid_idx=place,
    ).items():
        setattr(Builder, name, patch(getattr(Builder, name)))
    for name in ("create_atomic_rmw", "create_atomic_cas"):
        setattr(Builder, name, refuse(name))
    Grid.__call__ = launch(Grid.__call__)
