"""The CPU extension's two primitives against float64 torch on whole rows, for every instruction set of this machine."""

from __future__ import annotations

import itertools
import math
import shutil

import pytest
import torch
from torch import Tensor

from align_kernels.backends import cpu

from .tiles import OPTIONS, TAKEN, TERMS, WRONG_OPTIONS, backward_of_some, empty_state, enlarge

MISSING = cpu.why_not(torch.device("cpu"), torch.float32)
if MISSING is not None and not any(map(shutil.which, ("c++", "g++", "clang++"))):
    pytest.skip("no C++ compiler: the optional extension cannot be built here", allow_module_level=True)
assert MISSING is None, MISSING
_C = cpu.arguments._C

SIZES = (1, 7, 63, 123, 507, 2049, 5000)


@pytest.fixture(params=_C.available_isas(), autouse=True)
def isa(request):
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


class Case:
    """One tile with everything the primitives take, and float64 twins of it."""

    def __init__(
        self, n, c, *, dtype=torch.float32, spread=4.0, bias=False, scale=1.0, softcap=None, temperature=1.0, seed=0
    ):
        rng = torch.Generator().manual_seed(seed)
        self.n, self.c = n, c
        self.z = strided(torch.randn(n, c, generator=rng) * spread, dtype)
        self.targets = torch.randint(0, c, (n,), generator=rng)
        self.bias = torch.randn(c, generator=rng) if bias else None
        self.temperature = torch.rand(n, generator=rng) + 0.5 if temperature == "rows" else temperature
        self.scale, self.softcap = scale, softcap
        self.g = torch.randn(n, generator=rng)
        self.g_entropy = torch.randn(n, generator=rng)

    def options(self, begin=0, end=None) -> dict:
        bias = None if self.bias is None else self.bias[begin:end]
        return dict(
            offset=begin, vocab=self.c, bias=bias, scale=self.scale, softcap=self.softcap, temperature=self.temperature
        )

    def state(self, *, cuts=()) -> Tensor:
        state = empty_state(self.n)
        edges = [0, *cuts, self.c]
        for begin, end in itertools.pairwise(edges):
            cpu.forward(self.z[:, begin:end], state, self.targets, **self.options(begin, end))
        return state

    def gradient(self, *, dtype=torch.float32, entropy=False, clamp=None, out=None, begin=0, end=None) -> Tensor:
        z = self.z[:, begin:end]
        out = strided(torch.full(z.shape, torch.nan), dtype) if out is None else out
        g_entropy = self.g_entropy if entropy else None
        options = self.options(begin, end)
        cpu.backward(z, self.state(), self.targets, self.g, g_entropy, clamp=clamp, out=out, **options)
        assert out._base is None or (out._base[:, :2].isnan().all() and out._base[:, -3:].isnan().all()), (
            "wrote beside out"
        )
        return out

    def logits(self, z: Tensor) -> Tensor:  # float64
        x = z if self.bias is None else z + self.bias.double()
        x = x * self.scale
        x = x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)
        return x / (self.temperature.double()[:, None] if isinstance(self.temperature, Tensor) else self.temperature)

    def true_gradient(self, *, entropy=False, clamp=None) -> Tensor:
        z = self.z.double().requires_grad_()
        l = self.logits(z)
        clamped = l if clamp is None else Clamp.apply(l, self.g.double(), *clamp)
        logp = torch.log_softmax(clamped, 1).gather(1, self.targets[:, None])[:, 0]
        loss = (self.g.double() * logp).sum()
        if entropy:
            log_p = torch.log_softmax(l, 1)
            loss = loss - (self.g_entropy.double()[:, None] * log_p.exp() * log_p).sum()
        return torch.autograd.grad(loss, z)[0]


class Clamp(torch.autograd.Function):
    """Identity whose backward is the documented clamp."""

    @staticmethod
    def forward(ctx, logits, g, limit, prob_above, units):
        ctx.save_for_backward(logits.softmax(1), g)
        ctx.rule = limit, prob_above, units
        return logits.clone()

    @staticmethod
    def backward(ctx, grad):
        p, g = ctx.saved_tensors
        limit, prob_above, units = ctx.rule
        clipped = (
            g[:, None] * (grad / g[:, None]).clamp(-limit, limit) if units == "residual" else grad.clamp(-limit, limit)
        )
        return torch.where(p > prob_above, clipped, grad), None, None, None, None


def strided(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x inside a wider buffer of NaN, so that reading or missing a neighbour shows."""
    buffer = torch.full((x.shape[0], x.shape[1] + 5), torch.nan, dtype=dtype)
    view = buffer[:, 2 : 2 + x.shape[1]]
    view.copy_(x)
    return view


def check_state(case: Case, state: Tensor, tolerance: float = 2e-6) -> None:
    l = case.logits(case.z.double())
    m, s, a, q, total, target, argmax, _ = state.unbind(1)
    log_p, size = torch.log_softmax(l, 1), l.abs().amax(1)
    true = {
        "lse": (m + s.log(), l.logsumexp(1), size),
        "entropy": (s.log() - a / s, torch.special.entr(log_p.exp()).sum(1), math.log(case.c) + 1),
        "log sum p^2": (q.log() - 2 * s.log(), (2 * log_p).logsumexp(1), math.log(case.c) + 1),
        "mean": (total / case.c, l.mean(1), size),
        "target": (target, l.gather(1, case.targets[:, None])[:, 0], size),
    }
    for name, (got, expected, scale) in true.items():
        error = (got - expected).abs() / (1 + scale)
        assert error.max() <= tolerance, f"{name}: {error.max():.2e}"
    assert torch.equal(argmax.long(), l.argmax(1))


def check_gradient(case: Case, got: Tensor, expected: Tensor) -> None:
    size = (case.g.abs() + case.g_entropy.abs() + 1).double()[:, None] * expected.abs().amax(1, keepdim=True).clamp(
        max=1, min=1e-3
    )
    rounding = expected.abs() / 256 if got.dtype == torch.bfloat16 else 0.0
    error = (got.double() - expected).abs() - rounding
    assert (error <= 4e-6 * size).all(), f"{(error / size).max():.2e}"


@pytest.mark.parametrize("c", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes(c: int, dtype: torch.dtype):
    case = Case(5, c, dtype=dtype)
    check_state(case, case.state())
    check_gradient(case, case.gradient(dtype=dtype), case.true_gradient())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(options: dict, dtype: torch.dtype):
    case = Case(9, 507, dtype=dtype, **options)
    check_state(case, case.state())
    for entropy in (False, True):
        check_gradient(case, case.gradient(entropy=entropy), case.true_gradient(entropy=entropy))


@pytest.mark.parametrize("options", [{}, OPTIONS["softcap"], OPTIONS["all"]], ids=["plain", "softcap", "all"])
@pytest.mark.parametrize(
    "clamp", [(0.05, 0.0, "residual"), (0.03, 0.01, "residual"), (0.01, 0.0, "gradient"), (0.02, 0.01, "gradient")]
)
def test_clamp(clamp: tuple, options: dict):
    case = Case(33, 123, spread=8.0, **options)
    expected = case.true_gradient(entropy=True, clamp=clamp)
    assert not torch.equal(expected, case.true_gradient(entropy=True)), "the clamp of this case does nothing"
    check_gradient(case, case.gradient(entropy=True, clamp=clamp), expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(("clamp", "entropy"), TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("c", [1, 507, 2049])
def test_some_rows_are_read_where_they_lie(
    c: int, dtype: torch.dtype, clamp: tuple | None, entropy: bool, options: dict
):
    case = Case(9, c, dtype=dtype, **options)
    true = case.true_gradient(entropy=entropy, clamp=clamp)[TAKEN]
    out = strided(torch.full((len(TAKEN), c), torch.nan), dtype)
    backward_of_some(cpu, case, case.g_entropy if entropy else None, clamp, out, case.options())
    assert out._base is not None and out._base[:, :2].isnan().all() and out._base[:, -3:].isnan().all()
    case.g, case.g_entropy = case.g[TAKEN], case.g_entropy[TAKEN]
    check_gradient(case, out, true)


@pytest.mark.parametrize("cuts", [(1,), (500, 501, 1999), (2048, 4096), tuple(range(100, 5000, 700))])
def test_tiles_equal_one_tile(cuts: tuple):
    case = Case(6, 5000, bias=True, softcap=20.0, temperature="rows")
    check_state(case, case.state(cuts=cuts))
    whole, expected = case.gradient(entropy=True), case.true_gradient(entropy=True)
    tiles = [case.gradient(entropy=True, begin=b, end=e) for b, e in zip((0, *cuts), (*cuts, 5000))]
    check_gradient(case, torch.cat(tiles, 1), expected)
    check_gradient(case, whole, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rise", [0.0, 15.0, 60.0, -60.0])
@pytest.mark.parametrize(
    "options", [{}, dict(bias=True), dict(scale=-0.5, temperature="rows")], ids=["plain", "bias", "temperature"]
)
def test_exponentials_times_their_reference_are_probabilities(options: dict, rise: float, dtype: torch.dtype):
    """Over tiles whose logits rise or fall by `rise` each, with a target in any of them, and one row of -inf first."""
    case = Case(7, 5000, dtype=dtype, **options)
    edges = [0, 1, 700, 2048, 4900, 5000]
    for i, (begin, end) in enumerate(itertools.pairwise(edges)):
        case.z[:, begin:end] += rise * i
    case.z[2, :700] = -torch.inf if case.scale > 0 else torch.inf
    case.targets = torch.tensor([0, 1, 4999, 700, 2047, 2500, 4899])
    p = torch.softmax(case.logits(case.z.double()), 1).scatter(1, case.targets[:, None], 0.0)
    lse = case.logits(case.z.double()).logsumexp(1)
    state, expected, reference = empty_state(case.n), case.state(cuts=edges[1:-1]), torch.full((case.n,), -torch.inf)
    for begin, end in itertools.pairwise(edges):
        z = case.z[:, begin:end]
        taken = {k: v for k, v in case.options(begin, end).items() if k != "softcap"}
        cpu.exponentials(z, state, case.targets, reference, out=z, **taken)
        got = z.double() * (reference.double() - lse).exp().nan_to_num(0.0)[:, None]
        tolerance = 2e-5 if dtype == torch.float32 else 2**-8
        assert ((got - p[:, begin:end]).abs() <= tolerance * p[:, begin:end] + 1e-12).all()
    assert case.z._base is not None and case.z._base[:, :2].isnan().all() and case.z._base[:, -3:].isnan().all()
    finite = [0, 1, 3, 4, 5, 6]
    torch.testing.assert_close(state[finite], expected[finite], rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(state[2, :4], expected[2, :4], rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 50000), (3, 20000), (300, 700)])
def test_threads_change_no_bit(shape: tuple):
    case, threads, results = Case(*shape, softcap=9.0), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((case.state(), case.gradient(entropy=True)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0]) and torch.equal(results[0][1], other[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_may_be_z(dtype: torch.dtype):
    case = Case(6, 2500, dtype=dtype, softcap=5.0)
    apart = case.gradient(dtype=dtype)
    assert torch.equal(case.gradient(out=case.z), apart)


def test_no_rows_and_no_columns():
    for n, c in ((0, 40), (4, 0)):
        z, state, g = torch.empty(n, c), empty_state(n), torch.empty(n)
        targets = torch.zeros(n, dtype=torch.int64)
        options = dict(offset=0, vocab=40, bias=None, scale=1.0, softcap=None, temperature=1.0)
        cpu.forward(z, state, targets, **options)
        cpu.backward(z, state, targets, g, None, clamp=None, out=z, **options)
        del options["softcap"]
        cpu.exponentials(z, state, targets, g, out=z, **options)
        assert torch.equal(state, empty_state(n))


@pytest.mark.parametrize("c", [3, 123, 4100])
def test_large_logits(c: int):
    case = Case(8, c)
    enlarge(case.z)
    check_state(case, case.state())
    check_gradient(case, case.gradient(entropy=True), case.true_gradient(entropy=True))


def test_ties_take_the_first_column():
    case = Case(64, 5000)
    case.z.clamp_(max=2.0)
    assert (case.z == 2.0).sum(1).min() > 1
    for cuts in ((), (17, 2048, 2100)):
        assert torch.equal(case.state(cuts=cuts)[:, 6].long(), (case.z == 2.0).int().argmax(1))
    state = empty_state(64)
    for begin, end in ((2048, 5000), (0, 2048)):  # tiles may come in any order
        cpu.forward(case.z[:, begin:end], state, case.targets, **case.options(begin, end))
    assert torch.equal(state[:, 6].long(), (case.z == 2.0).int().argmax(1))
    case.z.fill_(-torch.inf)
    assert (case.state()[:, 6] == 0).all()


@pytest.mark.parametrize("column", [0, 100, 2047, 3000])
@pytest.mark.parametrize("margin", [10.0, 20.0, 28.0])
def test_confident_target_keeps_its_residual(margin: float, column: int):
    """With p -> 1 the gradient is 1 - p, far below float32's resolution around 1."""
    case = Case(4, 3001, spread=1.0)
    case.z[:, column] = margin
    case.targets.fill_(column)
    expected = case.true_gradient()[:, :column].sum(1) + case.true_gradient()[:, column + 1 :].sum(1)
    torch.testing.assert_close(case.gradient().double()[:, column], -expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("column", [0, 60, 2047, 2050])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_is_never_swallowed(column: int, softcap: float | None, dtype: torch.dtype):
    case = Case(4, 2051, dtype=dtype, softcap=softcap)
    clean, clean_gradient = case.state(), case.gradient(dtype=dtype)
    case.z[1, column] = torch.nan
    case.z[2] = torch.nan
    for cuts in ((), (64, 1000)):
        state = case.state(cuts=cuts)
        assert state[1:3, :5].isnan().all()
        torch.testing.assert_close(state[[0, 3]], clean[[0, 3]], rtol=1e-6, atol=1e-6)
    gradient = case.gradient(dtype=dtype)
    assert gradient[1:3].isnan().all()
    assert torch.equal(gradient[[0, 3]], clean_gradient[[0, 3]])


def test_every_nan_survives_rounding_to_bfloat16():
    case = Case(2, 40)
    case.z.view(torch.int32)[0] = -1  # all bits set: adding to its low half would carry into the sign
    assert case.gradient(dtype=torch.bfloat16)[0].isnan().all()


def test_minus_infinity_is_an_absent_column():
    case = Case(4, 3000)
    case.z[:, 100:2500] = -torch.inf
    case.targets.clamp_(max=99)
    for cuts in ((), (100, 2500)):
        m, s, a, *_ = case.state(cuts=cuts).unbind(1)
        log_p = torch.log_softmax(case.z.double(), 1)
        torch.testing.assert_close(m + s.log(), case.z.double().logsumexp(1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(s.log() - a / s, torch.special.entr(log_p.exp()).sum(1), rtol=1e-6, atol=1e-6)
    assert (case.gradient(entropy=True)[:, 100:2500] == 0).all()


def test_exp_is_accurate_to_two_ulp():
    """Seen through the backward: with m = 0, s = 1, g = -1 the gradient is exp(z)."""
    z = torch.linspace(-87.3, 88.0, 200_001)[None]
    case = Case(1, z.shape[1])
    state = torch.tensor([[0.0, 1, 0, 0, 0, 0, 0, 0]], dtype=torch.float64)
    g, out = torch.tensor([-1.0]), torch.empty_like(z)
    targets = torch.tensor([0])

    def exp(z: Tensor) -> Tensor:
        cpu.backward(z, state, targets, g, None, clamp=None, out=out[:, : z.shape[1]], **case.options())
        return out[0, 1 : z.shape[1]].double()

    exact = z[0, 1:].double().exp()
    ulp = torch.exp2(exact.log2().floor() - 23)
    assert ((exp(z) - exact) / ulp).abs().max() <= 2
    assert (exp(torch.tensor([[0.0, -88.0, -1e4, -1e38, -torch.inf]])) == 0).all()


OPTION_ERRORS = [
    *WRONG_OPTIONS,
    (dict(offset=1), "offset 1"),
    (dict(temperature=torch.tensor([1.0, -2.0, 1.0])), "temperature .* got -2 at row 1"),
    (dict(bias=torch.ones(6)), r"bias .*got .*\(6,\)"),
]
TENSOR_ERRORS = [
    (dict(z=torch.zeros(3, 7).double()), "z must be float32 or bfloat16"),
    (dict(z=torch.zeros(7, 3).T), "z .*unit column stride"),
    (dict(z=torch.zeros(1, 7).expand(3, 7)), "z must have a row stride >= its 7 columns, got 0"),
    (dict(state=empty_state(2)), r"state .*got .*\(2, 8\)"),
    (dict(state=empty_state(3).float()), "state .*float32"),
    (dict(state=torch.zeros(8, 3, dtype=torch.float64).T), "state must be a contiguous"),
    (dict(targets=torch.tensor([0, 7, 1])), r"targets must lie in \[0, 7\), got 7 at row 1"),
    (dict(targets=torch.tensor([0, 1, -100])), r"targets must lie in \[0, 7\), got -100 at row 2"),
    (dict(targets=torch.zeros(3, dtype=torch.int32)), "targets .*int32"),
]
BACKWARD_ERRORS = [
    (dict(g_logp=torch.zeros(3).double()), "g_logp .*float64"),
    (dict(g_entropy=torch.zeros(4)), r"g_entropy .*\(4,\)"),
    (dict(clamp=(-1.0, 0.0, "residual")), "clamp limit must be >= 0, got -1"),
    (dict(clamp=(math.nan, 0.0, "residual")), "clamp limit must be >= 0, got nan"),
    (dict(clamp=(1.0, 2.0, "residual")), r"prob_above must lie in \[0, 1\], got 2"),
    (dict(clamp=(1.0, 0.0, "logits")), "clamp units .*'logits'"),
    (dict(out=torch.zeros(3, 8)), r"out must have the shape \(3, 7\), got \(3, 8\)"),
    (dict(rows=torch.zeros(3, dtype=torch.int32)), "rows .*int32"),
    (dict(rows=torch.tensor([0, 3, 1])), r"rows must lie in \[0, 3\), got 3"),
    (dict(rows=torch.tensor([0, -1, 1])), r"rows must lie in \[0, 3\), got -1"),
    (dict(rows=torch.zeros(2, dtype=torch.int64)), r"targets .*\(2,\)"),
    (dict(out=torch.zeros(3, 7, dtype=torch.float16)), "out must be float32 or bfloat16"),
]


@pytest.mark.parametrize(("wrong", "message"), OPTION_ERRORS + TENSOR_ERRORS + BACKWARD_ERRORS)
def test_wrong_arguments_are_named(wrong: dict, message: str):
    names = dict(z=torch.zeros(3, 7), state=empty_state(3), targets=torch.tensor([0, 1, 2]))
    names |= dict(offset=0, vocab=7, bias=None, scale=1.0, softcap=None, temperature=1.0)
    backward = dict(g_logp=torch.zeros(3), g_entropy=None, clamp=None, out=torch.full((3, 7), torch.nan))
    if not wrong.keys() & {*backward, "rows"}:
        state = (names | wrong)["state"]
        before = state.clone()
        with pytest.raises(ValueError, match=message):
            cpu.forward(**(names | wrong))
        assert torch.equal(state, before)
    with pytest.raises(ValueError, match=message):
        cpu.backward(**(names | backward | wrong))
    assert backward["out"].isnan().all()


def test_out_must_not_overlap_z():
    buffer, state, g = torch.zeros(3, 20), empty_state(3), torch.zeros(3)
    options = dict(offset=0, vocab=7, bias=None, scale=1.0, softcap=None, temperature=1.0, clamp=None)
    with pytest.raises(ValueError, match="out must be z itself or not overlap it"):
        cpu.backward(buffer[:, :7], state, torch.zeros(3, dtype=torch.int64), g, None, out=buffer[:, 3:10], **options)
    z, rows = torch.zeros(5, 7), torch.tensor([1, 3, 4])
    for out in (z[:3], z[2:]):
        with pytest.raises(ValueError, match="out must not overlap z where some of its rows are taken"):
            cpu.backward(z, state, torch.zeros(3, dtype=torch.int64), g, None, out=out, rows=rows, **options)


def test_raw_addresses_are_checked():
    z, state, targets = torch.zeros(2, 4), empty_state(2), torch.zeros(2, dtype=torch.int64)

    z_address, state_address = z.data_ptr(), state.data_ptr()

    def call(address=z_address, dtype=0, state_address=state_address, threads=1):
        logits = _C.Logits(address, dtype, 2, 4, 4, targets.data_ptr(), 0, 4, 0, 1.0, 0.0, 1.0, 0)
        _C.forward(logits, state_address, threads)

    call()
    with pytest.raises(ValueError, match="z must not be null"):
        call(address=0)
    with pytest.raises(ValueError, match="z must be aligned to 4 bytes"):
        call(address=z.data_ptr() + 2)
    with pytest.raises(ValueError, match="state must not be null"):
        call(state_address=0)
    with pytest.raises(ValueError, match=r"dtype code must be 0 .* got 7"):
        call(dtype=7)
    with pytest.raises(ValueError, match="threads must be >= 1, got 0"):
        call(threads=0)


def test_isa_is_chosen_by_name(isa: str):
    assert _C.isa() == isa
    with pytest.raises(ValueError, match=r'one of baseline.* got "sse9"'):
        _C.set_isa("sse9")
    assert _C.isa() == isa


def test_why_not_says_what_is_missing():
    device = torch.device("cpu")
    assert cpu.why_not(device, torch.float32) is None and cpu.why_not(device, torch.bfloat16) is None
    assert "float16" in (cpu.why_not(device, torch.float16) or "")
    assert "float64" in (cpu.why_not(device, torch.float64) or "")
    assert "not on cuda" in (cpu.why_not(torch.device("cuda"), torch.float32) or "")
