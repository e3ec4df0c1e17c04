"""The row kernels against plain torch in float64, in the strict interpreter."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from align_kernels.backends import state as states
from align_kernels.backends import torch_ops, triton
from align_kernels.backends.arguments import looked_at
from align_kernels.schedules import support

from ..kernels.test_cpu_extension import Clamp, strided
from ..kernels.tiles import OPTIONS, TAKEN, TERMS, backward_of_some, empty_state

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
CLAMPS = [(0.05, 0.0, "residual"), (0.03, 0.01, "residual"), (0.01, 0.0, "gradient"), (0.02, 0.01, "gradient")]


class Case:
    """Raw logits with everything the primitives take."""

    def __init__(
        self, n, c, *, dtype=torch.float32, spread=4.0, bias=False, scale=1.0, softcap=None, temperature=1.0
    ) -> None:
        rng = torch.Generator().manual_seed(c)
        self.n, self.c, self.dtype = n, c, dtype
        self.z = strided(torch.randn(n, c, generator=rng) * spread, dtype)
        self.targets = torch.randint(0, c, (n,), generator=rng)
        self.bias = torch.randn(c, generator=rng) if bias else None
        self.temperature = torch.rand(n, generator=rng) + 0.5 if temperature == "rows" else temperature
        self.scale, self.softcap = scale, softcap
        self.g, self.h = torch.randn(n, generator=rng), torch.randn(n, generator=rng)

    def common(self, begin=0, end=None) -> dict:
        bias = None if self.bias is None else self.bias[begin:end].contiguous()
        return dict(
            offset=begin, vocab=self.c, bias=bias, scale=self.scale, softcap=self.softcap, temperature=self.temperature
        )

    def state(self, *cuts: int) -> Tensor:
        state = empty_state(self.n)
        for begin, end in itertools.pairwise((0, *cuts, self.c)):
            triton.forward(self.z[:, begin:end], state, self.targets, **self.common(begin, end))
        return state

    def gradient(self, *cuts: int, entropy=True, clamp=None, dtype=None) -> Tensor:
        out = strided(torch.full(self.z.shape, torch.nan), dtype or self.dtype)
        state, h = self.state(), self.h if entropy else None
        for begin, end in itertools.pairwise((0, *cuts, self.c)):
            piece, common = self.z[:, begin:end], self.common(begin, end)
            triton.backward(piece, state, self.targets, self.g, h, clamp=clamp, out=out[:, begin:end], **common)
        return out

    def logits(self, z: Tensor) -> Tensor:
        x = (z if self.bias is None else z + self.bias.double()) * self.scale
        x = x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)
        return x / (self.temperature.double()[:, None] if isinstance(self.temperature, Tensor) else self.temperature)

    def true_gradient(self, *, entropy=True, clamp=None) -> Tensor:
        z = self.z.double().requires_grad_()
        l = self.logits(z)
        clamped = l if clamp is None else Clamp.apply(l, self.g.double(), *clamp)
        total = (self.g.double() * clamped.log_softmax(1).gather(1, self.targets[:, None])[:, 0]).sum()
        if entropy:
            log_p = l.log_softmax(1)
            total = total - (self.h.double()[:, None] * log_p.exp() * log_p).sum()
        return torch.autograd.grad(total, z)[0]


def check_state(case: Case, state: Tensor) -> None:
    l = case.logits(case.z.double())
    m, s, a, q, total, target, argmax, _ = state.unbind(1)
    log_p, size = l.log_softmax(1), 1 + l.abs().amax(1)
    true = dict(
        lse=(m + s.log(), l.logsumexp(1)),
        entropy=(s.log() - a / s, torch.special.entr(log_p.exp()).sum(1)),
        log_sum_sq=(q.log() - 2 * s.log(), (2 * log_p).logsumexp(1)),
        mean=(total / case.c, l.mean(1)),
        target=(target, l.gather(1, case.targets[:, None])[:, 0]),
    )
    for name, (got, expected) in true.items():
        error = ((got - expected).abs() / size).max()
        assert error <= 2e-6, f"{name}: {error:.2e}"
    assert torch.equal(argmax.long(), l.argmax(1))


def check_gradient(case: Case, got: Tensor, expected: Tensor) -> None:
    assert got._base is None or (got._base[:, :2].isnan().all() and got._base[:, -3:].isnan().all()), "wrote beside out"
    size = (1 + case.g.abs() + case.h.abs()).double()[:, None] * expected.abs().amax(1, keepdim=True).clamp(1e-3, 1)
    error = (got.double() - expected).abs() - expected.abs() * ROUNDING[got.dtype]
    tiny = 2e-7 if got.dtype == torch.float16 else 0.0  # its smallest numbers
    assert (error <= 4e-6 * size + tiny).all(), f"{(error / size).max():.2e}"


@pytest.mark.parametrize("c", [1, 63, 123, 507, 2049])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(c: int, dtype: torch.dtype):
    case = Case(3, c, dtype=dtype)
    check_state(case, case.state())
    check_gradient(case, case.gradient(entropy=False), case.true_gradient(entropy=False))


def test_a_large_vocabulary():
    case = Case(2, 50257, dtype=torch.bfloat16)
    check_state(case, case.state())
    check_gradient(case, case.gradient(), case.true_gradient())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(options: dict, dtype: torch.dtype):
    case = Case(3, 507, dtype=dtype, **options)
    check_state(case, case.state())
    check_gradient(case, case.gradient(), case.true_gradient())


@pytest.mark.parametrize("options", [{}, OPTIONS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("clamp", CLAMPS)
def test_clamp(clamp: tuple, options: dict):
    case = Case(5, 123, spread=8.0, **options)
    expected = case.true_gradient(clamp=clamp)
    assert not torch.equal(expected, case.true_gradient()), "the clamp of this case is idle"
    check_gradient(case, case.gradient(clamp=clamp), expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(("clamp", "entropy"), TERMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_some_rows_are_read_where_they_lie(dtype: torch.dtype, clamp: tuple | None, entropy: bool, options: dict):
    case = Case(9, 507, dtype=dtype, **options)
    true = case.true_gradient(entropy=entropy, clamp=clamp)[TAKEN]
    out = strided(torch.full((len(TAKEN), 507), torch.nan), dtype)
    backward_of_some(triton, case, case.h if entropy else None, clamp, out, case.common())
    case.g, case.h = case.g[TAKEN], case.h[TAKEN]
    check_gradient(case, out, true)


def test_bfloat16_gradient_of_float32_logits():
    case = Case(3, 507, **OPTIONS["all"])
    check_gradient(case, case.gradient(dtype=torch.bfloat16), case.true_gradient())


@pytest.mark.parametrize("cuts", [(1,), (500, 501, 1999)])
def test_tiles_equal_one_tile(cuts: tuple):
    case = Case(3, 2500, bias=True, softcap=20.0, temperature="rows")
    check_state(case, case.state(*cuts))
    check_gradient(case, case.gradient(*cuts), case.true_gradient())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_may_be_z(dtype: torch.dtype):
    case = Case(3, 2500, dtype=dtype, softcap=5.0)
    apart, state = case.gradient(), case.state()
    triton.backward(case.z, state, case.targets, case.g, case.h, clamp=None, out=case.z, **case.common())
    assert torch.equal(case.z, apart)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, -0.3, torch.nan])
@pytest.mark.parametrize("n", [0, 1, 4096, 9001])
def test_multiply(n: int, factor: float, dtype: torch.dtype, monkeypatch):
    monkeypatch.setattr(triton, "PROGRAMS", 2)  # the first of them takes more than one block
    x = torch.randn(n, 1, generator=torch.Generator().manual_seed(n)).to(dtype)
    expected = (x.float() * factor).to(dtype)
    triton.multiply(x, torch.tensor(factor))
    torch.testing.assert_close(x, expected, rtol=0, atol=0, equal_nan=True)


def test_a_factor_of_one_reads_and_writes_nothing(monkeypatch):
    monkeypatch.setitem(triton.MULTIPLY, "BLOCK", 1 << 20)
    x = torch.empty(1 << 22)
    poisoned = x.view(torch.int32).fill_(0x7F800001).clone()  # signalling: a product would make them quiet
    triton.multiply(x, torch.tensor(1.0))
    assert torch.equal(x.view(torch.int32), poisoned)


@pytest.mark.parametrize("shape", [(0, 40), (4, 0)])
def test_no_rows_and_no_columns(shape: tuple):
    z, state, g = torch.empty(shape), empty_state(shape[0]), torch.empty(shape[0])
    targets = torch.zeros(shape[0], dtype=torch.int64)
    common = dict(offset=0, vocab=40, bias=None, scale=1.0, softcap=None, temperature=1.0)
    triton.forward(z, state, targets, **common)
    triton.backward(z, state, targets, g, None, clamp=None, out=z, **common)
    assert torch.equal(state, empty_state(shape[0]))


@pytest.mark.parametrize("c", [3, 2100])
def test_large_logits(c: int):
    case = Case(4, c)
    case.z.mul_(1e4 / case.z.abs().amax(1, keepdim=True))
    case.z[1], case.z[2] = -1e4, 1e4
    check_state(case, case.state())
    check_gradient(case, case.gradient(), case.true_gradient())


def test_ties_take_the_first_column():
    case = Case(8, 5000)
    case.z.clamp_(max=2.0)
    first = (case.z == 2.0).int().argmax(1)
    for cuts in ((), (17, 2048, 2100)):
        assert torch.equal(case.state(*cuts)[:, 6].long(), first)
    state = empty_state(8)
    for begin, end in ((2048, 5000), (0, 2048)):  # tiles may come in any order
        triton.forward(case.z[:, begin:end], state, case.targets, **case.common(begin, end))
    assert torch.equal(state[:, 6].long(), first)


@pytest.mark.parametrize("column", [0, 2100])
def test_confident_target_keeps_its_residual(column: int):
    """With p -> 1 the gradient is 1 - p, far below float32's resolution around 1."""
    case = Case(2, 2500, spread=1.0)
    case.z[:, column] = torch.tensor([12.0, 27.0])
    case.targets.fill_(column)
    rest = case.true_gradient(entropy=False)
    rest[:, column] = 0.0
    torch.testing.assert_close(case.gradient(entropy=False).double()[:, column], -rest.sum(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("column", [0, 2050])
def test_nan_is_never_swallowed(column: int, softcap: float | None):
    case = Case(3, 2051, softcap=softcap)
    clean, clean_gradient = case.state(), case.gradient()
    case.z[1, column] = torch.nan
    case.z[2] = torch.nan
    for cuts in ((), (64, 1000)):
        state = case.state(*cuts)
        assert state[1:, :5].isnan().all()
        torch.testing.assert_close(state[0], clean[0], rtol=1e-6, atol=1e-6)
    gradient = case.gradient()
    assert gradient[1:].isnan().all() and torch.equal(gradient[0], clean_gradient[0])


def test_minus_infinity_is_an_absent_column():
    case = Case(3, 3000)
    case.z[:, 100:2500] = -torch.inf
    case.targets.clamp_(max=99)
    log_p = case.z.double().log_softmax(1)
    for cuts in ((), (100, 2500)):
        m, s, a, *_ = case.state(*cuts).unbind(1)
        torch.testing.assert_close(m + s.log(), case.z.double().logsumexp(1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(s.log() - a / s, torch.special.entr(log_p.exp()).sum(1), rtol=1e-6, atol=1e-6)
    assert (case.gradient()[:, 100:2500] == 0).all()


@pytest.mark.parametrize("options", [{}, OPTIONS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("c", [1, 700])
def test_peaks(c: int, dtype: torch.dtype, options: dict):
    case = Case(40, c, dtype=dtype, **options)
    state, rows, out = empty_state(40), torch.arange(39, 0, -3), torch.full((c + 2,), torch.nan)
    torch_ops.forward(case.z.double(), state, case.targets, **case.common())
    triton.peaks(case.z, state, case.targets, rows, out=out[1:-1], **case.common())
    true = case.logits(case.z.double()).log_softmax(1)[rows].amax(0)
    assert (out[1:-1] - true).abs().max() < 2e-5 * true.abs().max().clamp(min=1.0)
    assert out[0].isnan() and out[-1].isnan()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("every", [1, 3])
def test_survey(every: int, options: dict):
    """The levels of the columns that plain torch looks at, and rows take the levels that its exact sums give them, or
    one beside; in tiles, the last of which ends within a run."""
    case, tau = Case(9, 3000, spread=6.0, **options), 2**-6
    rows, S = torch.tensor([7, 0, 4, 2]), looked_at(case.c, every)
    state = empty_state(9)
    torch_ops.forward(case.z.double(), state, case.targets, **case.common())
    found: list[tuple[Tensor, Tensor]] = []
    for backend in (triton, torch_ops):
        sums = torch.zeros(len(rows), support.LEVELS + 2, 3, dtype=torch.float64)
        sample = torch.full((len(rows), S + 5), 255, dtype=torch.uint8)
        for v0, v1 in itertools.pairwise((0, 64, 1600, case.c)):
            levels = sample[:, looked_at(v0, every) : looked_at(v1, every)]
            backend.survey(
                case.z[:, v0:v1], state, case.targets, rows, sums, first=v0, every=every, drop_mass=tau,
                steps=support.STEPS, sample=levels, **case.common(v0, v1),
            )  # fmt: skip
        assert (sample[:, S:] == 255).all() and (sums[:, :, 0].sum(1) == S).all()
        found.append((sums, sample[:, :S].long()))
    (sums, sample), (exact, true) = found
    assert (sample - true).abs().max() <= 1 and (sample != true).float().mean() < 1e-2  # p at a level's edge
    counts = torch.zeros_like(sums[:, :, 0]).scatter_add_(1, sample, torch.ones_like(sample).double())
    assert torch.equal(sums[:, :, 0], counts)
    below = exact[:, -1, 1:]
    torch.testing.assert_close(sums[:, -1, 1:], below, rtol=1e-2, atol=1e-12)
    entropy = states.entropy(state[rows])
    for h in (None, entropy):
        mine, plain = (support.first_level(*(x * every)[:, :, 1:].unbind(2), h, tau) for x in (sums, exact))
        assert (mine - plain).abs().max() <= 1 and (plain < support.LEVELS).any() and (plain > 0).any()


def test_more_levels_than_bins_are_refused():
    case, sums = Case(3, 64), torch.zeros(1, 128, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="less than 128 levels, got 128"):
        triton.survey(case.z, case.state(), case.targets, torch.tensor([1]), sums, first=0, every=1, drop_mass=0.1,
                      steps=4, **case.common())  # fmt: skip


ERRORS = [
    (dict(z=torch.zeros(3, 7).double()), "z must be .*float64"),
    (dict(z=torch.zeros(7, 3).T), "z .*unit column stride"),
    (dict(state=empty_state(2)), r"state .*got .*\(2, 8\)"),
    (dict(state=empty_state(3).float()), "state .*float32"),
    (dict(targets=torch.zeros(3, dtype=torch.int32)), "targets .*int32"),
    (dict(bias=torch.ones(6)), r"bias .*got .*\(6,\)"),
    (dict(temperature=torch.ones(2)), r"temperature .*got .*\(2,\)"),
    (dict(g_logp=torch.zeros(3).double()), "g_logp .*float64"),
    (dict(g_entropy=torch.zeros(4)), r"g_entropy .*\(4,\)"),
    (dict(out=torch.zeros(3, 6)), r"out must have the shape \(3, 7\), got \(3, 6\)"),
    (dict(rows=torch.zeros(3, dtype=torch.int32)), "rows .*int32"),
    (dict(rows=torch.zeros(2, dtype=torch.int64)), r"state .*\(3, 8\)"),
]


@pytest.mark.parametrize(("wrong", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_wrong_arguments_are_named(wrong: dict, message: str):
    right: dict = dict(z=torch.zeros(3, 7), state=empty_state(3), targets=torch.zeros(3, dtype=torch.int64))
    right |= dict(g_logp=torch.zeros(3), g_entropy=None, clamp=None, out=torch.zeros(3, 7))
    right |= dict(offset=0, vocab=7, bias=None, scale=1.0, softcap=None, temperature=1.0)
    with pytest.raises(ValueError, match=message):
        triton.backward(**(right | wrong))


def test_out_must_not_overlap_rows_that_are_read():
    z, state, g = torch.zeros(5, 7), empty_state(3), torch.zeros(3)
    options = dict(offset=0, vocab=7, bias=None, scale=1.0, softcap=None, temperature=1.0, clamp=None)
    for out in (z[:3], z[2:]):
        with pytest.raises(ValueError, match="out must not overlap z where some of its rows are taken"):
            rows = torch.tensor([1, 3, 4])
            triton.backward(z, state, torch.zeros(3, dtype=torch.int64), g, None, out=out, rows=rows, **options)
