"""The CUDA kernels' source, emulated on the CPU, against float64 torch on whole rows."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from align_kernels.backends import cuda, torch_ops

from .tiles import OPTIONS, TAKEN, TERMS, WRONG_OPTIONS, backward_of_some, empty_state, enlarge

pytestmark = pytest.mark.usefixtures("emulator")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


class Case:
    """One tile with everything the primitives take; `shift` moves its first address off a 16-byte boundary."""

    def __init__(
        self, n, c, *, dtype=torch.float32, spread=4.0, bias=False, scale=1.0, softcap=None, temperature=1.0, shift=2
    ):
        rng = torch.Generator().manual_seed(n * 7919 + c)
        self.n, self.c = n, c
        self.z = inside(torch.randn(n, c, generator=rng) * spread, dtype, shift)
        self.targets = torch.randint(0, c, (n,), generator=rng)
        self.bias = torch.randn(c, generator=rng) if bias else None
        self.temperature = torch.rand(n, generator=rng) + 0.5 if temperature == "rows" else temperature
        self.scale, self.softcap = scale, softcap
        self.g, self.h = torch.randn(n, generator=rng), torch.randn(n, generator=rng)

    def options(self, begin=0, end=None, wide=False) -> dict:
        widen = lambda x: x.double() if wide and isinstance(x, Tensor) else x  # noqa: E731
        bias = None if self.bias is None else widen(self.bias[begin:end])
        return dict(
            offset=begin, vocab=self.c, bias=bias, scale=self.scale, softcap=self.softcap,
            temperature=widen(self.temperature),
        )  # fmt: skip

    def state(self, *cuts: int) -> Tensor:
        state = empty_state(self.n)
        for begin, end in itertools.pairwise([0, *cuts, self.c]):
            cuda.forward(self.z[:, begin:end], state, self.targets, **self.options(begin, end))
        return state

    def true_state(self) -> Tensor:
        state = empty_state(self.n)
        torch_ops.forward(self.z.double(), state, self.targets, **self.options(wide=True))
        return state

    def gradient(self, *, dtype=None, entropy=False, clamp=None, out=None, begin=0, end=None) -> Tensor:
        z = self.z[:, begin:end]
        out = inside(torch.full(z.shape, torch.nan), dtype or z.dtype, 5) if out is None else out
        cuda.backward(
            z, self.state(), self.targets, self.g, self.h if entropy else None, clamp=clamp, out=out,
            **self.options(begin, end),
        )  # fmt: skip
        untouched(out)
        return out

    def true_gradient(self, *, entropy=False, clamp=None) -> Tensor:
        out = torch.empty(self.n, self.c, dtype=torch.float64)
        torch_ops.backward(
            self.z.double(), self.true_state(), self.targets, self.g.double(), self.h.double() if entropy else None,
            clamp=clamp, out=out, **self.options(wide=True),
        )  # fmt: skip
        return out


def inside(x: Tensor, dtype: torch.dtype, shift: int) -> Tensor:
    """x inside a wider buffer of NaN, so that reading or writing a neighbour shows."""
    buffer = torch.full((x.shape[0], x.shape[1] + 8), torch.nan, dtype=dtype)
    view = buffer[:, shift : shift + x.shape[1]]
    view.copy_(x)
    return view


def untouched(view: Tensor) -> None:
    buffer, shift = view._base, view.storage_offset()
    assert buffer is not None and buffer[:, :shift].isnan().all() and buffer[:, shift + view.shape[1] :].isnan().all()


def check_state(case: Case, state: Tensor, tolerance: float = 1e-6) -> None:
    true = case.true_state()
    size = 1 + true[:, [0, 5]].abs().amax(1) + true[:, 4].abs() / case.c
    values = {
        "lse": lambda s: s[:, 0] + s[:, 1].log(),
        "entropy": lambda s: s[:, 1].log() - s[:, 2] / s[:, 1],
        "log sum p^2": lambda s: s[:, 3].log() - 2 * s[:, 1].log(),
        "mean": lambda s: s[:, 4] / case.c,
        "target": lambda s: s[:, 5],
        "logp": lambda s: s[:, 5] - s[:, 0] - s[:, 1].log(),
    }
    for name, value in values.items():
        error = (value(state) - value(true)).abs() / size
        assert error.max() <= tolerance, f"{name}: {error.max():.2e}"
    assert torch.equal(state[:, 6], true[:, 6])


def check_gradient(case: Case, got: Tensor, true: Tensor, least: float = 1e-3) -> None:
    factor = (1 + case.g.abs() + case.h.abs()).double()[:, None]
    size = factor * true.abs().amax(1, keepdim=True).clamp(max=1, min=least)
    tiny = 2.0**-24 if got.dtype == torch.float16 else 0.0  # its subnormal numbers
    error = (got.double() - true).abs() - true.abs() * ROUNDING[got.dtype] - tiny
    assert (error <= 4e-6 * size).all(), f"{(error / size).max():.2e}"


@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("c", [1, 2, 7, 63, 123, 507, 4099, 9001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(c: int, dtype: torch.dtype, shift: int):
    """Rows of odd length at odd addresses: every one begins elsewhere beside a boundary of 16 bytes."""
    case = Case(5, c, dtype=dtype, shift=shift)
    check_state(case, case.state())
    check_gradient(case, case.gradient(), case.true_gradient())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_options(options: dict, dtype: torch.dtype):
    case = Case(6, 1507, dtype=dtype, **options)
    check_state(case, case.state())
    for entropy in (False, True):
        check_gradient(case, case.gradient(entropy=entropy), case.true_gradient(entropy=entropy))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_may_be_narrower_than_its_logits(dtype: torch.dtype):
    case = Case(5, 1031, temperature="rows")
    check_gradient(case, case.gradient(dtype=dtype, entropy=True), case.true_gradient(entropy=True))


@pytest.mark.parametrize("options", [{}, OPTIONS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize(
    "clamp", [(0.05, 0.0, "residual"), (0.03, 0.01, "residual"), (0.01, 0.0, "gradient"), (0.02, 0.01, "gradient")]
)
def test_clamp(clamp: tuple, options: dict):
    case = Case(17, 123, spread=8.0, **options)
    true = case.true_gradient(entropy=True, clamp=clamp)
    assert not torch.equal(true, case.true_gradient(entropy=True)), "the clamp of this case does nothing"
    check_gradient(case, case.gradient(entropy=True, clamp=clamp), true)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(("clamp", "entropy"), TERMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [1, 1507])
def test_some_rows_are_read_where_they_lie(
    c: int, dtype: torch.dtype, clamp: tuple | None, entropy: bool, options: dict
):
    case = Case(9, c, dtype=dtype, **options)
    true = case.true_gradient(entropy=entropy, clamp=clamp)[TAKEN]
    out = inside(torch.full((len(TAKEN), c), torch.nan), dtype, 5)
    backward_of_some(cuda, case, case.h if entropy else None, clamp, out, case.options())
    untouched(out)
    case.g, case.h = case.g[TAKEN], case.h[TAKEN]
    check_gradient(case, out, true)


@pytest.mark.parametrize("cuts", [(1,), (500, 501, 1999), tuple(range(100, 5000, 700))])
def test_tiles_equal_one_tile(cuts: tuple):
    case = Case(4, 5000, bias=True, softcap=20.0, temperature="rows")
    check_state(case, case.state(*cuts))
    true = case.true_gradient(entropy=True)
    tiles = [case.gradient(entropy=True, begin=b, end=e) for b, e in zip((0, *cuts), (*cuts, 5000))]
    check_gradient(case, torch.cat(tiles, 1), true)


def test_ties_take_the_first_column():
    case = Case(16, 6000)
    case.z.clamp_(max=2.0)
    assert (case.z == 2.0).sum(1).min() > 1
    first = (case.z == 2.0).int().argmax(1)
    for cuts in ((), (17, 2048, 2100)):
        assert torch.equal(case.state(*cuts)[:, 6].long(), first)
    state = empty_state(16)
    for begin, end in ((2048, 6000), (0, 2048)):  # tiles may come in any order
        cuda.forward(case.z[:, begin:end], state, case.targets, **case.options(begin, end))
    assert torch.equal(state[:, 6].long(), first)
    case.z.fill_(-torch.inf)
    assert (case.state()[:, 6] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, OPTIONS["softcap"]], ids=["plain", "softcap"])
def test_out_may_be_z(dtype: torch.dtype, options: dict):
    case = Case(4, 2501, dtype=dtype, **options)
    apart = case.gradient()
    assert torch.equal(case.gradient(out=case.z), apart)


@pytest.mark.parametrize("column", [0, 100, 3000])
@pytest.mark.parametrize("margin", [10.0, 20.0, 28.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_confident_target_keeps_its_residual(margin: float, column: int, temperature: float):
    """With p -> 1 the gradient is 1 - p, far below float32's resolution around 1."""
    case = Case(4, 3001, spread=1.0, temperature=temperature)
    case.z[:, column] = margin * temperature
    case.targets.fill_(column)
    true = case.true_gradient()[:, column]
    torch.testing.assert_close(case.gradient().double()[:, column], true, rtol=1e-5, atol=0)


@pytest.mark.parametrize("column", [0, 60, 2047, 2050])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_nan_is_never_swallowed(column: int, value: float, softcap: float | None):
    if softcap is not None and value == torch.inf:
        value = torch.nan  # a capped infinity is finite
    case = Case(4, 2051, softcap=softcap)
    clean, clean_gradient = case.state(), case.gradient()
    case.z[1, column] = value
    case.z[2] = value
    for cuts in ((), (64, 1000)):
        state = case.state(*cuts)
        assert state[1:3, :3].isnan().all()
        torch.testing.assert_close(state[[0, 3]], clean[[0, 3]], rtol=1e-6, atol=1e-6)
    gradient = case.gradient(clamp=(0.1, 0.0, "residual"), entropy=True)
    assert gradient[1:3].isnan().all()
    assert torch.equal(case.gradient()[[0, 3]], clean_gradient[[0, 3]])


def test_minus_infinity_is_an_absent_column():
    case = Case(4, 3000)
    case.z[:, 100:2500] = -torch.inf
    case.targets.clamp_(max=99)
    true = torch.log_softmax(case.z.double(), 1)
    for cuts in ((), (100, 2500)):
        m, s, a, *_ = case.state(*cuts).unbind(1)
        torch.testing.assert_close(m + s.log(), case.z.double().logsumexp(1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(s.log() - a / s, torch.special.entr(true.exp()).sum(1), rtol=1e-6, atol=1e-6)
    assert (case.gradient(entropy=True)[:, 100:2500] == 0).all()


@pytest.mark.parametrize("c", [3, 123, 4100])
def test_large_logits(c: int):
    case = Case(8, c)
    enlarge(case.z)
    check_state(case, case.state())
    check_gradient(case, case.gradient(entropy=True), case.true_gradient(entropy=True))


def test_no_rows_and_no_columns():
    for n, c in ((0, 40), (4, 0)):
        z, state, g = torch.empty(n, c), empty_state(n), torch.empty(n)
        targets = torch.zeros(n, dtype=torch.int64)
        options = dict(offset=0, vocab=40, bias=None, scale=1.0, softcap=None, temperature=1.0)
        cuda.forward(z, state, targets, **options)
        cuda.backward(z, state, targets, g, None, clamp=None, out=z, **options)
        assert torch.equal(state, empty_state(n))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_peaks(options: dict, dtype: torch.dtype):
    case = Case(7, 1100, dtype=dtype, **options)
    rows = torch.tensor([5, 0, 3])
    case.z[3, 7] = -math.copysign(torch.inf, case.scale)
    case.z[1] = torch.nan  # a row that is not asked for
    got, true = torch.full((1100,), torch.nan), torch.empty(1100, dtype=torch.float64)
    cuda.peaks(case.z, case.state(), case.targets, rows, out=got, **case.options())
    torch_ops.peaks(case.z.double(), case.true_state(), case.targets, rows, out=true, **case.options(wide=True))
    torch.testing.assert_close(got.double(), true, rtol=0, atol=2e-5)
    case.z[5, 9] = torch.nan
    cuda.peaks(case.z, case.state(), case.targets, rows, out=got, **case.options())
    assert got.isnan().all()


ERRORS = [
    *WRONG_OPTIONS,
    (dict(z=torch.zeros(3, 7).double()), "z must be float32, bfloat16 or float16"),
    (dict(z=torch.zeros(7, 3).T), "z .*unit column stride"),
    (dict(z=torch.zeros(1, 7).expand(3, 7)), "z must have a row stride >= its 7 columns, got 0"),
    (dict(state=empty_state(2)), r"state .*got .*\(2, 8\)"),
    (dict(targets=torch.zeros(3, dtype=torch.int32)), "targets .*int32"),
    (dict(g_logp=torch.zeros(3).double()), "g_logp .*float64"),
    (dict(g_entropy=torch.zeros(4)), r"g_entropy .*\(4,\)"),
    (dict(clamp=(-1.0, 0.0, "residual")), "clamp limit must be >= 0, got -1"),
    (dict(clamp=(1.0, 2.0, "residual")), r"prob_above must lie in \[0, 1\], got 2"),
    (dict(clamp=(1.0, 0.0, "logits")), "clamp units .*'logits'"),
    (dict(out=torch.zeros(3, 8)), r"out must have the shape \(3, 7\), got \(3, 8\)"),
    (dict(rows=torch.zeros(3, dtype=torch.int32)), "rows .*int32"),
    (dict(rows=torch.zeros(2, dtype=torch.int64)), r"targets .*\(2,\)"),
    (dict(z=torch.zeros(3, 7).half(), out=torch.zeros(3, 7)), "out must have z's dtype or 16 bits"),
]


@pytest.mark.parametrize(("wrong", "message"), ERRORS)
def test_wrong_arguments_are_named(wrong: dict, message: str):
    names = dict(z=torch.zeros(3, 7), state=empty_state(3), targets=torch.tensor([0, 1, 2]))
    names |= dict(offset=0, vocab=7, bias=None, scale=1.0, softcap=None, temperature=1.0)
    backward = dict(g_logp=torch.zeros(3), g_entropy=None, clamp=None, out=torch.full((3, 7), torch.nan))
    with pytest.raises(ValueError, match=message):
        cuda.backward(**(names | backward | wrong))
    assert backward["out"].isnan().all()


def test_out_must_not_overlap_z():
    buffer, state, g = torch.zeros(3, 20), empty_state(3), torch.zeros(3)
    options = dict(offset=0, vocab=7, bias=None, scale=1.0, softcap=None, temperature=1.0, clamp=None)
    with pytest.raises(ValueError, match="out must be z itself or not overlap it"):
        cuda.backward(buffer[:, :7], state, torch.zeros(3, dtype=torch.int64), g, None, out=buffer[:, 3:10], **options)
    z, rows = torch.zeros(5, 7), torch.tensor([1, 3, 4])
    for out in (z[:3], z[2:]):
        with pytest.raises(ValueError, match="out must not overlap z where some of its rows are taken"):
            cuda.backward(z, state, torch.zeros(3, dtype=torch.int64), g, None, out=out, rows=rows, **options)
