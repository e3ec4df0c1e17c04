"""Exponentials in one pass against plain torch in float64, in the strict interpreter: as a kernel, and in schedules."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from align_kernels import explain
from align_kernels.backends import triton

from ..kernels.narrow import (
    as_on_a_gpu,  # noqa: F401 (a fixture)
    verify_narrow,
)
from ..kernels.test_logprobs import make, with_rows
from ..kernels.tiles import OPTIONS, empty_state
from .test_rows import Case

LINEAR = {name: options for name, options in OPTIONS.items() if "softcap" not in options}
LINEAR["bias, scale, temperature per row"] = dict(bias=True, scale=-2.0, temperature="rows")
DTYPES = [  # of logits and of exponentials; z itself where they are the same
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
]


def run(case: Case, dtype: torch.dtype, *cuts: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """The state, the reference of each tile, and exp(l - lse) as the exponentials have it."""
    state, reference, references = empty_state(case.n), torch.full((case.n,), -torch.inf), []
    lse = case.logits(case.z.double()).logsumexp(1)
    p = torch.empty(case.n, case.c, dtype=torch.float64)
    for begin, end in itertools.pairwise((0, *cuts, case.c)):
        z, linear = case.z[:, begin:end].clone(), case.common(begin, end)
        del linear["softcap"]
        around = torch.full((case.n, end - begin + 7), torch.nan, dtype=dtype)
        out = z if dtype == z.dtype else around[:, 2 : 2 + end - begin]
        triton.exponentials(z, state, case.targets, reference, out=out, **linear)
        assert around[:, :2].isnan().all() and around[:, 2 + end - begin :].isnan().all(), "wrote beside out"
        references.append(reference.clone())
        p[:, begin:end] = out.double() * (reference.double() - lse).exp()[:, None]
    return state, references, p


def check(case: Case, dtype: torch.dtype, *cuts: int) -> list[Tensor]:
    state, references, p = run(case, dtype, *cuts)
    l = case.logits(case.z.double())
    true = l.softmax(1).scatter(1, case.targets[:, None], 0.0)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
    assert ((p - true).abs() <= rounding * true + 1e-12).all()
    m, s, a, q, total, target, argmax, _ = state.unbind(1)
    size, log_p = 1 + l.abs().amax(1), l.log_softmax(1)
    picked = l.gather(1, case.targets[:, None])[:, 0]
    fields = dict(
        logp=((target - m) - s.log(), picked - l.logsumexp(1)),
        entropy=(s.log() - a / s, torch.special.entr(log_p.exp()).sum(1)),
        log_sum_sq=(q.log() - 2 * s.log(), (2 * log_p).logsumexp(1)),
        mean=(total / case.c, l.mean(1)),
        maximum=(m, l.amax(1)),
    )
    for name, (got, expected) in fields.items():
        error = ((got - expected).abs() / size).max()
        assert error <= 2e-6, f"{name}: {error:.2e}"
    assert torch.equal(argmax == case.targets, l.argmax(1) == case.targets), "correct"
    return references


@pytest.mark.parametrize("c", [1, 63, 1024, 2049])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_sizes(c: int, dtypes: tuple):
    case = Case(4, c, dtype=dtypes[0])
    case.targets[0] = case.z[0].argmax()
    check(case, dtypes[1])


@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=str)
@pytest.mark.parametrize("options", LINEAR.values(), ids=LINEAR.keys())
def test_options(options: dict, dtypes: tuple):
    case = Case(3, 1507, dtype=dtypes[0], **options)
    check(case, dtypes[1])
    check(case, dtypes[1], 64, 1200)


@pytest.mark.parametrize("rise", [25.0, 100.0, 1000.0, -100.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_that_rises_above_its_reference_is_done_again(dtype: torch.dtype, rise: float):
    """Within a tile and from tile to tile: float32 has no exp(100), and no sum of exp(50) squared."""
    case = Case(3, 3000, scale=0.5)
    case.z[:, 2000:] += rise * torch.tensor([2.0, 2.0, 0.0])[:, None]
    case.targets = torch.tensor([2500, 3, 7])
    for cuts in ((), (100, 1500, 2500)):
        last = check(case, dtype, *cuts)[-1]
        assert (case.logits(case.z.double()).amax(1) - last <= triton.HEADROOM + 1e-3).all()


@pytest.mark.parametrize("column", [0, 1030])
def test_a_confident_target_keeps_its_residual(column: int):
    case = Case(2, 2500, spread=1.0)
    case.z[:, column] = torch.tensor([12.0, 27.0])
    case.targets.fill_(column)
    state, _, _ = run(case, torch.bfloat16)
    log_p = case.z.double().log_softmax(1)
    rest = log_p.exp().scatter(1, case.targets[:, None], 0.0).sum(1)
    got = -torch.expm1(state[:, 5] - state[:, 0] - state[:, 1].log())
    torch.testing.assert_close(got, rest, rtol=2e-5, atol=0)


def test_ties():
    """The target is the first of the largest logits, or has one before it: in its block of columns, or in another."""
    case = Case(6, 3000)
    case.z[:, [5, 700, 701, 2900]] = 30.0
    case.targets = torch.tensor([5, 700, 701, 2900, 4, 0])
    for cuts in ((), (5,), (6,), (700, 2900)):
        state, _, _ = run(case, torch.bfloat16, *cuts)
        assert (state[:, 6] == case.targets).tolist() == [True, False, False, False, False, False]
    case.z[:] = 1.0
    state, _, _ = run(case, torch.bfloat16)
    assert (state[:, 6] == case.targets).tolist() == [False] * 5 + [True]


@pytest.mark.parametrize("cuts", [(), (1500,)])
def test_absent_columns_and_nan(cuts: tuple):
    case = Case(4, 3000)
    case.z[0, :2500] = -torch.inf
    case.z[1, 100:] = -torch.inf
    case.z[2, 1700] = torch.nan
    case.z[3, 40] = torch.inf
    case.targets = torch.tensor([2600, 7, 9, 11])
    state, _, p = run(case, torch.bfloat16, *cuts)
    true = case.z.double().softmax(1).scatter(1, case.targets[:, None], 0.0)
    assert ((p - true)[:2].abs() <= 2**-8 * true[:2] + 1e-12).all()
    m, s, a, *_ = state[:2].unbind(1)
    torch.testing.assert_close(m + s.log(), case.z[:2].double().logsumexp(1), rtol=2e-6, atol=2e-6)
    log_p = case.z[:2].double().log_softmax(1)
    torch.testing.assert_close(s.log() - a / s, torch.special.entr(log_p.exp()).sum(1), rtol=5e-6, atol=5e-6)
    assert state[2, :5].isnan().all() and state[3, 1].isnan()


def test_no_rows_no_columns_and_what_is_refused():
    linear = dict(offset=0, vocab=40, bias=None, scale=1.0, temperature=1.0)
    for shape in ((0, 40), (4, 0)):
        z, state, targets = torch.empty(shape), empty_state(shape[0]), torch.zeros(shape[0], dtype=torch.int64)
        triton.exponentials(z, state, targets, torch.zeros(shape[0]), out=z, **linear)
        assert torch.equal(state, empty_state(shape[0]))
    z, state, targets = torch.empty(3, 40), empty_state(3), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="float16, whose range is too small"):
        triton.exponentials(z, state, targets, torch.zeros(3), out=z.half(), **linear)
    with pytest.raises(ValueError, match=r"reference .*float64"):
        triton.exponentials(z, state, targets, torch.zeros(3).double(), out=z, **linear)


# -- through the public operator ----------------------------------------------------------------------------------
@pytest.mark.parametrize("train", [{"hidden"}, {"hidden", "weight"}], ids=["online", "keep"])
def test_log_probs_of_a_16_bit_head(train: set, as_on_a_gpu):  # noqa: F811
    case = with_rows(make((3, 9), 207, 32, dtype=torch.bfloat16, bias=True, train=frozenset(train)))
    t = case.leaves()
    plan = explain(t["hidden"], t["weight"], case.targets, impl="triton", **case.keywords(t))
    assert plan.name == ("plain keep" if "weight" in train else "online")
    verify_narrow(case, "triton")
