"""The CPU extension's matrix product against float64, in every layout, and the schedules that run on it."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from accuracy import check
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from align_kernels import dpo_loss, explain, linear_logprobs
from align_kernels.backends import cpu
from align_kernels.backends.cpu import products

if cpu.why_not(torch.device("cpu"), torch.float32) or "avx2" not in cpu.arguments._C.available_isas():
    pytest.skip("no extension here, or no AVX2", allow_module_level=True)

EPSILON = 2.0**-24


def matrix(rows: int, cols: int, layout: str, rng: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """A view into memory that is NaN elsewhere."""
    shape = (cols, rows) if layout == "columns" else (rows, cols)
    wide = torch.full((shape[0] + 2, shape[1] + 5), torch.nan, dtype=dtype)
    wide[1:-1, 2:-3] = torch.randn(*shape, generator=rng).to(dtype)
    x = wide[1:-1, 2:-3]
    if layout == "strided":
        x = torch.full((rows, 2 * cols), torch.nan, dtype=dtype)[:, ::2].copy_(x)
    return x.T if layout == "columns" else x


FLOATS, NARROW = (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)
MIXED = [FLOATS, (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
GEMMS = cpu.arguments._C.available_narrow_gemms()


@pytest.fixture
def of_bfloat16(request: pytest.FixtureRequest) -> Iterator[None]:
    """What multiplies bfloat16 by bfloat16, named by a parameter."""
    before = cpu.arguments._C.narrow_gemm()
    cpu.arguments._C.set_narrow_gemm(request.param)
    yield
    cpu.arguments._C.set_narrow_gemm(before)


of_each_dtype = pytest.mark.parametrize(
    ("of_bfloat16", "dtypes"), [("avx2", dtypes) for dtypes in MIXED] + [(gemm, NARROW) for gemm in GEMMS],
    indirect=["of_bfloat16"],
)  # fmt: skip


def multiply(
    m: int,
    n: int,
    k: int,
    add: bool,
    a_layout: str = "rows",
    b_layout: str = "rows",
    dtypes: tuple[torch.dtype, torch.dtype] = FLOATS,
    product: Callable[[Tensor, Tensor, Tensor, bool], None] = products.product,
) -> Tensor:
    """The product, checked: error within that of a float32 sum, and nothing written beside `out`."""
    rng = torch.Generator().manual_seed(m + 7 * n + 31 * k)
    a, b = matrix(m, k, a_layout, rng, dtypes[0]), matrix(k, n, b_layout, rng, dtypes[1])
    frame = torch.full((m + 2, n + 9), 7.0)
    out = frame[1:-1, 4:-5]
    out.copy_(torch.randn(m, n, generator=rng) if add else torch.full((m, n), torch.nan))
    start = out.double() if add else torch.zeros(m, n, dtype=torch.float64)
    product(out, a, b, add)
    error = (out.double() - start - a.double() @ b.double()).abs()
    bound = (k + 2) * EPSILON * (a.double().abs() @ b.double().abs() + start.abs())
    assert (error <= bound).all(), float((error / bound).max())
    frame[1:-1, 4:-5] = 7.0
    assert (frame == 7.0).all(), "written beside out"
    return out


def rows_alone(
    dtypes: tuple[torch.dtype, torch.dtype],
    product: Callable[[Tensor, Tensor, Tensor, bool], None] = products.product,
) -> None:
    """Bits of a product's part, from the whole and by itself."""
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*size, generator=rng).to(of) for size, of in zip(((70, 801), (801, 70)), dtypes))
    whole = torch.ones(70, 70)
    product(whole, a, b, True)
    for rows, cols in ((70, 5), (5, 70), (1, 1), (33, 47)):
        part = torch.ones(rows, cols)
        product(part, a[:rows], b[:, :cols], True)
        assert torch.equal(part, whole[:rows, :cols])


EDGES = (1, 5, 6, 7, 15, 16, 17, 97)


@pytest.mark.parametrize("add", [False, True])
@of_each_dtype
@pytest.mark.usefixtures("of_bfloat16")
@pytest.mark.parametrize(("a_layout", "b_layout"), list(itertools.product(("rows", "columns", "strided"), repeat=2)))
def test_layouts_and_edges(a_layout: str, b_layout: str, dtypes: tuple[torch.dtype, torch.dtype], add: bool):
    for m, n in itertools.product(EDGES, (1, 16, 33, 71)):
        multiply(m, n, 37, add, a_layout, b_layout, dtypes)


@pytest.mark.parametrize("shape", [(200, 1100, 400), (100, 2050, 769), (1, 1, 5000), (97, 64, 384), (200, 1030, 1029)])
@pytest.mark.parametrize("layouts", [("rows", "columns"), ("rows", "rows"), ("columns", "rows")])
@of_each_dtype
@pytest.mark.usefixtures("of_bfloat16")
def test_more_than_one_block(
    shape: tuple[int, int, int], layouts: tuple[str, str], dtypes: tuple[torch.dtype, torch.dtype]
):
    multiply(*shape, False, *layouts, dtypes)


@pytest.mark.parametrize("of_bfloat16", ["avx2"], indirect=True)
@pytest.mark.usefixtures("of_bfloat16")
def test_bfloat16_is_read_as_the_float32_that_it_is():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(99, 401, generator=rng).bfloat16(), torch.randn(401, 203, generator=rng).bfloat16()
    b[:4, 7] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0]).bfloat16()
    b[5, 8], b[6, 9] = torch.finfo(torch.bfloat16).max, 2.0**-133  # a denormal
    found, want = torch.empty(99, 203), torch.empty(99, 203)
    products.product(found, a, b, False)
    products.product(want, a.float(), b.float(), False)
    assert torch.equal(found.nan_to_num(-1.0), want.nan_to_num(-1.0)) and found[:, 7].isnan().all()


@of_each_dtype
@pytest.mark.usefixtures("of_bfloat16")
def test_threads_change_no_bit(dtypes: tuple[torch.dtype, torch.dtype]):
    rng, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    a, b = (torch.randn(*size, generator=rng).to(of) for size, of in zip(((250, 600), (600, 700)), dtypes))
    found = []
    try:
        for threads in (1, 2, 3, 7, 16):
            torch.set_num_threads(threads)
            found.append(torch.empty(250, 700))
            products.product(found[-1], a, b, False)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, found[0]) for x in found[1:])


@of_each_dtype
@pytest.mark.usefixtures("of_bfloat16")
def test_the_sums_of_a_row_do_not_depend_on_what_stands_beside_it(dtypes: tuple[torch.dtype, torch.dtype]):
    rows_alone(dtypes)


@of_each_dtype
@pytest.mark.usefixtures("of_bfloat16")
def test_nan_and_infinity_come_through(dtypes: tuple[torch.dtype, torch.dtype]):
    a, b, out = torch.ones(70, 70, dtype=dtypes[0]), torch.ones(70, 70, dtype=dtypes[1]), torch.zeros(70, 70)
    a[3, 60], b[5, 68], b[5, 69] = torch.nan, torch.inf, -torch.inf
    products.product(out, a, b, False)
    want = a.float() @ b.float()
    assert out[3].isnan().all() and torch.equal(out.nan_to_num(-1.0), want.nan_to_num(-1.0))


def test_nothing_to_do():
    out = torch.empty(0, 4)
    products.product(out, torch.empty(0, 3), torch.empty(3, 4), False)
    assert out.shape == (0, 4)
    beyond = torch.arange(24.0).view(4, 6)  # a product of no columns writes none, of those beside it neither
    products.product(beyond[:, 3:3], torch.ones(4, 3), torch.ones(3, 0), True)
    products.product(beyond[2:2], torch.ones(0, 3), torch.ones(3, 6), False)
    assert torch.equal(beyond, torch.arange(24.0).view(4, 6))


@pytest.mark.parametrize(
    ("out", "a", "b", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(5, 3), "do not fit together"),
        (torch.zeros(2, 3), torch.zeros(2, 4).double(), torch.zeros(4, 3), "a must be a float32 or bfloat16 matrix"),
        (torch.zeros(2, 3).bfloat16(), torch.zeros(2, 4), torch.zeros(4, 3), "out must be a float32 matrix"),
        (torch.zeros(3, 2).T, torch.zeros(2, 4), torch.zeros(4, 3), "out must have unit column stride"),
        (torch.zeros(2, 3), torch.zeros(2, 0), torch.zeros(0, 3), "k >= 1"),
    ],
)
def test_wrong_arguments_are_named(out: Tensor, a: Tensor, b: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        products.product(out, a, b, False)


def test_what_multiplies_bfloat16_is_named():
    with pytest.raises(ValueError, match=f'one of {", ".join(GEMMS)} on this machine, got "amx"'):
        cpu.arguments._C.set_narrow_gemm("amx")


# -- in the schedules ---------------------------------------------------------------------------------------------
B, T, V, D = 4, 60, 1000, 96


def losses(own: bool, train: bool, monkeypatch) -> tuple[list[Tensor], int, str]:
    """Gradients, counted FLOPs and the plan of a fused loss and of one on log-probs with a LoRA."""
    monkeypatch.setattr(products, "ADVISED", {torch.float32} if own else set())
    rng = torch.Generator().manual_seed(3)
    hidden = torch.randn(B, T, D, generator=rng).requires_grad_()
    weight = (torch.randn(V, D, generator=rng) * 0.2).requires_grad_(train)
    lora = (torch.randn(4, D, generator=rng).requires_grad_(), torch.randn(V, 4, generator=rng).requires_grad_(), 0.5)
    targets = torch.randint(0, V, (B, T), generator=rng)
    ref, leaves = torch.zeros(B), [hidden, *lora[:2], *([weight] if train else [])]
    with FlopCounterMode(display=False) as counter:
        dpo_loss(hidden, weight, targets, ref, impl="cpu").loss.backward()
        out = linear_logprobs(hidden, weight, targets, lora=lora, impl="cpu")
        (out.logp.mean() + out.entropy.mean()).backward()
    plan = explain(hidden, weight, targets, loss="dpo", impl="cpu")
    return [x.grad for x in leaves if x.grad is not None], counter.get_total_flops(), str(plan)


@pytest.mark.parametrize("train", [True, False])
def test_schedules_on_it_give_the_same_gradients_and_flops(train: bool, monkeypatch):
    calls, product = [], products.product
    monkeypatch.setattr(products, "product", lambda *args: calls.append(args[0].shape) or product(*args))
    found, flops, plan = losses(True, train, monkeypatch)
    assert len(calls) >= 4 and plan.endswith("by align_kernels")
    calls.clear()
    want, want_flops, want_plan = losses(False, train, monkeypatch)
    assert not calls and want_plan.endswith("by torch.mm")
    assert flops == want_flops
    for a, b in zip(found, want, strict=True):
        assert (a - b).abs().max() <= 2e-6 * b.abs().max()


@pytest.mark.parametrize("train", [True, False])
def test_a_bfloat16_weight_is_multiplied_as_it_lies(train: bool, monkeypatch):
    """Also by the few rows that dropping zero coefficients leaves, and the last columns of V = 1000."""

    def grads(own: bool, kept: int) -> list[Tensor]:
        monkeypatch.setattr(products, "ADVISED", {torch.float32} if own else set())
        rng = torch.Generator().manual_seed(5)
        hidden = torch.randn(B * T, D, generator=rng).requires_grad_()
        weight = (torch.randn(V, D, generator=rng) * 0.2).bfloat16().requires_grad_(train)
        targets = torch.randint(0, V, (B * T,), generator=rng)
        out = linear_logprobs(hidden, weight, targets, impl="cpu")
        (out.logp[:kept].sum() + out.entropy[:kept].sum()).backward()
        return [x.grad for x in (hidden, weight) if x.grad is not None]

    read, product = [], products.product
    monkeypatch.setattr(products, "product", lambda *args: read.append(args[2].dtype) or product(*args))
    for kept in (B * T, 3):
        read.clear()
        found = grads(True, kept)
        assert read.count(torch.bfloat16) >= 2  # logits and dX
        for a, b in zip(found, grads(False, kept), strict=True):
            assert (a - b).abs().max() <= (2e-6 if a.dtype == torch.float32 else 2**-8) * b.abs().max()


def test_large_products_are_taken_and_those_of_two_dtypes(monkeypatch):
    monkeypatch.setattr(products, "ADVISED", {torch.float32})
    a, b = torch.zeros(64, 70), torch.zeros(70, 64)
    assert products.takes(torch.zeros(64, 64), a, b)
    assert not products.takes(torch.zeros(64, 64).T, a, b)
    assert not products.takes(torch.zeros(63, 64), a[:63], b)
    assert not products.takes(torch.zeros(64, 64).double(), a.double(), b.double())
    assert products.takes(torch.zeros(63, 64), a[:63], b.bfloat16())  # torch.mm takes no two dtypes
    monkeypatch.setattr(products, "ADVISED", set())
    assert not products.takes(torch.zeros(64, 64), a, b)


def test_of_bfloat16_all_sizes_are_taken(monkeypatch):
    monkeypatch.setattr(products, "ADVISED", {torch.bfloat16})
    a, b = torch.zeros(3, 5).bfloat16(), torch.zeros(5, 2).bfloat16()
    assert products.takes(torch.zeros(3, 2), a, b)
    assert not products.takes(torch.zeros(2, 3).T, a, b)
    assert not products.takes(torch.zeros(3, 2).bfloat16(), a, b)
    assert products.takes(torch.zeros(3, 2), a.float(), b) and products.takes(torch.zeros(3, 2), a, b.float())
    assert not products.takes(torch.zeros(3, 2), a.float(), b.float())
    assert not products.takes(torch.zeros(3, 2), a.half(), b)
    monkeypatch.setattr(products, "ADVISED", set())
    assert not products.takes(torch.zeros(3, 2), a, b)


@pytest.mark.parametrize("name", ["bias", "lora_A", "lora_B"])
def test_a_float32_part_of_a_bfloat16_head_has_a_gradient_of_float32(name: str, monkeypatch):
    """All rows have one target and one coefficient, a sixth: rounded to 16 bits, each would err to the same side."""
    monkeypatch.setattr(products, "ADVISED", {torch.bfloat16})
    rng = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=rng).bfloat16() for n in (6, V))
    targets = torch.full((6,), V - 1)
    sizes = dict(bias=(V,)) if name == "bias" else dict(lora_A=(2, D), lora_B=(V, 2))
    tensors = {key: torch.randn(size, generator=rng) for key, size in sizes.items()}

    def gradient(dtype: torch.dtype | None, impl: str) -> Tensor:
        given = {key: x.to(dtype or x.dtype, copy=True).requires_grad_() for key, x in tensors.items()}
        head = given if name == "bias" else dict(lora=(given["lora_A"], given["lora_B"], 0.5))
        x, w = (x.to(dtype or x.dtype) for x in (hidden, weight))
        out = linear_logprobs(x, w, targets, impl=impl, **head)
        return torch.autograd.grad(out.logp.mean(), given[name])[0]

    check(name, gradient(None, "cpu"), gradient(torch.float64, "eager"))


@pytest.mark.parametrize("named, left", [("default", 1), ("avx2", 2), ("avx512", 3)])
def test_torchs_own_variable_limits_the_instruction_sets(named: str, left: int):
    found = subprocess.run(
        [sys.executable, "-c", "from align_kernels.backends import cpu; print(*cpu.arguments._C.available_isas())"],
        env=os.environ | {"ATEN_CPU_CAPABILITY": named}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.split() == cpu.arguments._C.available_isas()[:left]
