"""Products of bfloat16 by AMX and AVX512-BF16 as they are compiled, against float64. AMX may be emulated."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import shutil
import struct
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from align_kernels.backends import cpu

from . import amx_emulator
from .amx_emulator import Library
from .test_product import NARROW, multiply, rows_alone

_C = cpu.arguments._C
if "avx512" not in _C.available_isas():
    pytest.skip("no AVX-512, by which numbers are packed", allow_module_level=True)

GEMMS = ["amx_bf16", *(name for name in _C.available_narrow_gemms() if name == "avx512_bf16")]
LAYOUTS = list(itertools.product(("rows", "columns", "strided"), repeat=2))
EDGES = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Library:
    return amx_emulator.build(tmp_path_factory.mktemp("amx"))


@pytest.fixture(params=GEMMS)
def gemm(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def product(library: Library, gemm: str) -> Callable[..., None]:
    return partial(library.product, gemm)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("a_layout", "b_layout"), LAYOUTS)
def test_layouts_and_edges(product: Callable[..., None], a_layout: str, b_layout: str, add: bool):
    depths = itertools.cycle(EDGES)
    for m, n in itertools.product(EDGES, repeat=2):
        multiply(m, n, next(depths), add, a_layout, b_layout, NARROW, product)


@pytest.mark.parametrize("shape", [(200, 1100, 400), (65, 2050, 769), (1, 1, 5000), (129, 64, 384), (33, 1030, 1029)])
@pytest.mark.parametrize("layouts", [("rows", "columns"), ("rows", "rows"), ("columns", "rows")])
def test_more_than_one_block(product: Callable[..., None], shape: tuple[int, int, int], layouts: tuple[str, str]):
    multiply(*shape, False, *layouts, NARROW, product)


def test_the_sums_of_a_row_do_not_depend_on_what_stands_beside_it(product: Callable[..., None]):
    rows_alone(NARROW, product)


def test_threads_change_no_bit(product: Callable[..., None]):
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(250, 401, generator=rng).bfloat16(), torch.randn(401, 300, generator=rng).bfloat16()
    found = []
    for threads in (1, 2, 3, 7, 16):
        found.append(torch.full((250, 300), torch.nan))
        product(found[-1], a, b, False, threads)
    assert all(torch.equal(x, found[0]) for x in found[1:])


def test_denormals_are_zero_and_the_rest_comes_through(product: Callable[..., None]):
    a, b, out = torch.ones(40, 70).bfloat16(), torch.ones(70, 40).bfloat16(), torch.empty(40, 40)
    a[3, 60], b[5, 38], b[5, 39], b[:, 7], b[:, 8] = torch.nan, torch.inf, -torch.inf, 2.0**-127, 2.0**-126
    product(out, a, b, False)
    want = a.float() @ b.float()
    want[:, 7] = want[:, 7] * 0.0
    assert out[3].isnan().all() and torch.equal(out.nan_to_num(-1.0), want.nan_to_num(-1.0))


# -- memory -------------------------------------------------------------------------------------------------------
class Fenced:
    """Shared memory between two pages that end whoever touches them."""

    def __init__(self, size: int, at_the_end: bool) -> None:
        page = mmap.PAGESIZE
        self.inner = -(-size // page) * page
        self.memory = mmap.mmap(-1, self.inner + 2 * page)
        self.begin = page + (self.inner - size if at_the_end else 0)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.address = start + self.begin
        libc = ctypes.CDLL(None, use_errno=True)
        for fence in (start, start + page + self.inner):
            assert libc.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(page), 0) == 0, ctypes.get_errno()


def fenced(x: Tensor, layout: str, at_the_end: bool) -> Tensor:
    """A copy whose first number follows a forbidden page, or whose last one stands before it."""
    rows, cols = x.shape
    strides = {"rows": (cols, 1), "columns": (1, rows), "strided": (2 * cols + 1, 2)}[layout]
    count = (rows - 1) * strides[0] + (cols - 1) * strides[1] + 1
    place = Fenced(count * x.element_size(), at_the_end)
    flat = torch.frombuffer(place.memory, dtype=x.dtype, count=count, offset=place.begin)
    return flat.fill_(torch.nan).as_strided((rows, cols), strides).copy_(x)


@pytest.mark.parametrize("gemm", ["avx2", *GEMMS])
@pytest.mark.parametrize("at_the_end", [False, True])
@pytest.mark.parametrize(("a_layout", "b_layout"), LAYOUTS)
def test_nothing_is_touched_beside_the_matrices_and_packed(
    library: Library, gemm: str, a_layout: str, b_layout: str, at_the_end: bool
):
    for m, n, k in ((1, 1, 1), (3, 5, 385), (14, 16, 2), (15, 17, 31), (33, 63, 65), (65, 1030, 33), (129, 5, 385)):
        rng = torch.Generator().manual_seed(m)
        a, b = torch.randn(m, k, generator=rng).bfloat16(), torch.randn(k, n, generator=rng).bfloat16()
        out = fenced(torch.zeros(m, n), "rows", at_the_end)
        place = Fenced(library.packed(gemm, n), at_the_end)
        library.slice_apart(
            gemm, out, fenced(a, a_layout, at_the_end), fenced(b, b_layout, at_the_end), True, place.address
        )
        error = (out.double() - a.double() @ b.double()).abs()
        assert (error <= (k + 2) * 2.0**-24 * (a.double().abs() @ b.double().abs())).all()


def test_a_forbidden_page_is_forbidden(library: Library, gemm: str):
    """What the test above counts on."""
    out, b, place = torch.zeros(1, 1), torch.zeros(4, 1).bfloat16(), Fenced(library.packed(gemm, 1), True)
    four = Fenced(8, True)
    beyond = torch.frombuffer(four.memory, dtype=torch.bfloat16, count=4, offset=four.begin + 2).view(1, 4)
    with pytest.raises(AssertionError, match="Segmentation fault"):
        library.slice_apart(gemm, out, beyond, b, False, place.address)


# -- tiles --------------------------------------------------------------------------------------------------------
def config(*tiles: tuple[int, int], palette: int = 1, reserved: int = 0) -> bytes:
    """Of tiles of some rows and bytes of a row."""
    rows, row_bytes = ([tile[i] for tile in tiles] + [0] * (16 - len(tiles)) for i in (0, 1))
    return struct.pack("<16B16H16B", palette, 0, reserved, *13 * [0], *row_bytes, *rows)


@pytest.mark.parametrize("before", [bytes(64), config((3, 8), (16, 64), (1, 4))], ids=["none", "three"])
def test_the_callers_tiles_are_configured_again_after_a_product(library: Library, before: bytes):
    found = ctypes.create_string_buffer(64)
    library.c.align_load_config(before)
    out = torch.empty(40, 40)
    library.product("amx_bf16", out, torch.ones(40, 40).bfloat16(), torch.ones(40, 40).bfloat16(), False)
    library.c.align_store_config(found)
    library.c.align_load_config(bytes(64))
    assert found.raw == before and (out == 40.0).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (config((1, 4), palette=2), "palette"),
        (config((1, 4), reserved=1), "reserved"),
        (config(*9 * [(1, 4)]), "reserved"),
        (config((17, 4)), "size"),
        (config((1, 65)), "size"),
        (config((1, 0)), "size"),
        (config((0, 4)), "size"),
    ],
    ids=["palette 2", "byte 2", "nine tiles", "17 rows", "65 bytes", "no bytes", "no rows"],
)
def test_the_emulator_takes_no_wrong_configuration(library: Library, wrong: bytes, message: str):
    c, found = library.c, ctypes.create_string_buffer(64)
    for right in (config((16, 64)), config(), bytes(64)):
        c.amx_load_config(right)
        c.amx_store_config(found)
        assert c.amx_fault() is None and found.raw == right
    c.amx_load_config(wrong)
    assert message in c.amx_fault().decode()


def test_the_emulator_takes_no_wrong_tile(library: Library):
    c, memory = library.c, torch.zeros(16, 16)

    def fault(act: Callable[..., None], *args: int) -> str:
        act(*args)
        return (c.amx_fault() or b"none").decode()

    c.amx_load_config(bytes(64))
    for act, args in (
        (c.amx_zero, (0,)), (c.amx_load, (0, memory.data_ptr(), 64)), (c.amx_store, (0, memory.data_ptr(), 64)),
        (c.amx_multiply, (0, 1, 2)),
    ):  # fmt: skip
        assert fault(act, *args) == "tiles are not configured"
    c.amx_load_config(config((2, 12), (2, 8), (2, 12), (3, 12), (2, 6), (2, 6)))
    assert fault(c.amx_zero, 6) == fault(c.amx_multiply, 0, 1, 6) == "a tile that is not configured"
    assert fault(c.amx_multiply, 0, 1, 2) == "none"
    assert fault(c.amx_multiply, 0, 0, 2) == fault(c.amx_multiply, 0, 2, 2) == "one tile twice"
    for c_a_b in ((3, 1, 2), (0, 1, 3), (0, 2, 1), (4, 1, 5)):
        assert fault(c.amx_multiply, *c_a_b) == "tiles that do not fit together"
    c.amx_load_config(bytes(64))


def test_the_emulator_multiplies_as_the_manual_says(library: Library):
    """A [rows, 2 pairs], B [pairs, columns, 2], C [rows, columns]."""
    c, rows, pairs, columns = library.c, 5, 3, 7
    rng = torch.Generator().manual_seed(0)
    a = torch.randint(-9, 9, (rows, 2 * pairs), generator=rng).bfloat16()
    b = torch.randint(-9, 9, (2 * pairs, columns), generator=rng).bfloat16()
    start = torch.randint(-99, 99, (rows, columns), generator=rng).float()
    c.amx_load_config(config((rows, 4 * columns), (rows, 4 * pairs), (pairs, 4 * columns)))

    def tile(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
        by_pairs, found = b.view(pairs, 2, columns).transpose(1, 2).contiguous(), torch.full((rows, 16), 7.0)
        for i, x in enumerate((start, a, by_pairs)):
            c.amx_load(i, x.data_ptr(), x.stride(0) * x.element_size())
        c.amx_multiply(0, 1, 2)
        c.amx_store(0, found.data_ptr(), 64)
        assert c.amx_fault() is None and (found[:, columns:] == 7.0).all()
        return found[:, :columns]

    assert torch.equal(tile(a, b, start), start + a.float() @ b.float())
    # C is added to their sum: 2^-24 is nothing beside 1, six of them are
    ones = torch.ones_like(a)
    assert (tile(ones, torch.full_like(b, 2.0**-24), torch.ones_like(start)) == 1 + 6 * 2.0**-24).all()
    # even and odd ones apart: 1 is nothing beside 2^24
    far = torch.tensor([2.0**24, 1, 0, 1, -(2.0**24), 1]).bfloat16()[:, None].expand(-1, columns)
    assert (tile(ones, far, start * 0) == 3.0).all()
    # denormal C, factors and sums are zero
    assert torch.equal(tile(a * 0, b, start * 0 + 2.0**-127), start * 0)
    assert torch.equal(tile(ones * 2.0**-127, ones.T[:, :1].expand(-1, columns) * 2.0**120, start), start)
    assert torch.equal(tile(ones * 2.0**-70, ones.T[:, :1].expand(-1, columns) * 2.0**-60, start * 0), start * 0)
    less = torch.tensor([-(2.0**-63), 0, 0, 0, 0, 0]).bfloat16().expand(rows, -1).contiguous()
    assert torch.equal(tile(less, torch.full_like(b, 2.0**-63), start * 0 + 1.5 * 2.0**-126), start * 0)
    c.amx_load_config(bytes(64))


# -- what is shipped ----------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("library")  # or a compiler that does not know AMX
def test_the_extension_has_the_instructions():
    if shutil.which("objdump") is None:
        pytest.skip("no objdump")
    code = subprocess.run(["objdump", "-d", str(Path(_C.__file__))], check=True, capture_output=True, text=True).stdout
    for instruction in ("tdpbf16ps", "tileloadd", "tilestored", "ldtilecfg", "sttilecfg", "vdpbf16ps"):
        assert f"\t{instruction} " in code, instruction
