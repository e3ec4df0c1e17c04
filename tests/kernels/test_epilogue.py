"""benches/gpu/epilogue.py, an experiment: exponentials and their sums from a GEMM's epilogue, emulated in torch, in the
place of the forward of exponentials in 16 bits. Every loss, against float64, by what eager torch errs in bfloat16."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import check, largest
from torch import Tensor

from align_kernels import explain
from align_kernels.backends.state import read

from .losses_table import MASK, ROWS, TARGETS, batch, batch_of, tensors
from .narrow import as_on_a_gpu, verify_narrow  # noqa: F401 (a fixture)
from .test_narrow import BOTH, CASES, HIDDEN, SCHEDULES, plan_of

HALF = torch.bfloat16
ENTROPY = ("entropy_coef", "top_entropy_quantile")  # these losses have, or may have, a gradient of the entropy


@pytest.fixture
def epilogue(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benches" / "gpu"))
    return importlib.import_module("epilogue")


@pytest.fixture
def launches(epilogue, as_on_a_gpu):  # noqa: F811
    """Rows of each launch of the emulated epilogue, through which every call goes."""
    seen: list[int] = []

    def launch(x: Tensor, *more: Any) -> Any:
        seen.append(len(x))
        return epilogue.emulated(x, *more)

    with epilogue.through(launch):
        yield seen


# -- through the public operators ----------------------------------------------------------------------------------
def inputs(trained: tuple[str, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """The table's tensors rounded to bfloat16, in any dtype."""
    return {key: x.to(HALF).to(dtype).requires_grad_(key in trained) for key, x in tensors().items()}


@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",)], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", ROWS)
def test_losses(name: str, trained: tuple[str, ...], launches: list[int]):
    call, formula, metrics = ROWS[name]
    leaves, exact, eager = (inputs(trained, dtype) for dtype in (HALF, torch.float64, HALF))
    out = call(leaves["hidden"], leaves["weight"], TARGETS, impl="torch")
    grads = torch.autograd.grad(out.loss, [leaves[key] for key in trained])
    assert sum(launches) > 0 or any(word in name for word in ENTROPY)
    true = batch(exact)
    twin = batch_of((eager["hidden"] @ eager["weight"].T).float())
    values = formula(true), formula(twin)
    check("loss", out.loss.detach(), values[0].detach(), values[1].detach(), scale=1.0)
    expected = (torch.autograd.grad(x, [of[key] for key in trained]) for x, of in zip(values, (exact, eager)))
    for key, got, wanted, errs in zip(trained, grads, *expected):
        if key == "hidden":
            got, wanted, errs = (x * MASK[..., None] for x in (got, wanted, errs))
        check(f"gradient of {key}", got, wanted, errs, scale=1e-3)
    known, found = ({} if metrics is None else metrics(x) for x in (true, twin))
    for key, value in known.items():
        if "accura" not in key and "clip" not in key:  # counts of comparisons that rounding may turn around
            scale = largest(true.sums) if key.startswith(("logps/", "rewards/", "logits/")) else 1.0
            check(key, out.metrics[key].float(), value.detach().double(), found[key].detach().double(), scale=scale)


@pytest.mark.parametrize(("name", "schedule", "train"), SCHEDULES)
@pytest.mark.parametrize("of", [of for of in CASES if "bias" not in of])
def test_log_probs(of: str, name: str, schedule: str, train: frozenset, launches: list[int]):
    case = CASES[of](train=train)
    plan = plan_of(case)
    assert of == "wider weight" or (plan.name, plan.tile_cols) == (name, plan.vocab)
    verify_narrow(case, "torch")
    assert sum(launches) >= plan.rows * (of != "wider weight")


@pytest.mark.parametrize("factor", [0.5, 3.0, 8.0, 40.0])
@pytest.mark.parametrize("train", [BOTH, HIDDEN], ids=["trained", "frozen"])
def test_rows_whose_reference_is_too_small_are_done_again(train: frozenset, factor: float, launches: list[int]):
    """Logits up to hundreds of nats above the target's: bfloat16 and float32 have no exp(100)."""
    case = CASES["odd sizes"](train=train)
    case.tensors["weight"] = case.tensors["weight"] * factor
    z = (case.tensors["hidden"][case.mask].double() @ case.tensors["weight"].double().T) * case.logit_scale
    rise = z.amax(1) - z.gather(1, case.targets[case.mask][:, None])[:, 0]
    verify_narrow(case, "torch")
    assert launches == [len(rise)] + [int((rise > 30).sum())] * bool((rise > 30).any())


def test_a_bias_is_refused(launches: list[int]):
    with pytest.raises(NotImplementedError, match="serves no bias"):
        verify_narrow(CASES["bias, temperature per row"](train=BOTH), "torch")


def test_nothing_is_left_behind(epilogue, as_on_a_gpu):  # noqa: F811
    case = CASES["plain"](train=HIDDEN)
    before = plan_of(case)
    with epilogue.through(epilogue.emulated):
        assert plan_of(case) != before
    assert plan_of(case) == before


def test_it_is_no_backend():
    """Until a GPU has shown it right and fast."""
    x, w = torch.zeros(2, 4, dtype=HALF), torch.zeros(7, 4, dtype=HALF)
    for name in ("cute", "epilogue"):
        with pytest.raises(ValueError, match=f"impl must be one of .*got '{name}'"):
            explain(x, w, torch.zeros(2, dtype=torch.int64), impl=name)


# -- a launch and its host -----------------------------------------------------------------------------------------
def head(n: int, V: int, D: int = 24, spread: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x, w = torch.randn(n, D, generator=rng), torch.randn(V, D, generator=rng) * spread
    return x.to(HALF), w.to(HALF), torch.randint(0, V, (n,), generator=rng)


def test_sums_are_added_as_threads_add_them(epilogue):
    """Four threads to a row, each with two neighbouring columns of every eight, in turn; then they exchange sums."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((40, 2, 192)).astype(np.float32) for _ in range(2))
    got = epilogue.folded(torch.from_numpy(a), torch.from_numpy(b))
    for row, tile in itertools.product(range(40), range(2)):
        lanes = [np.float32(0)] * 4
        for column in range(192):
            lane = column // 2 % 4
            product = float(a[row, tile, column]) * float(b[row, tile, column])  # exact in float64
            lanes[lane] = np.float32(product + float(lanes[lane]))
        assert got[row, tile].item() == (lanes[0] + lanes[2]) + (lanes[1] + lanes[3])


@pytest.mark.parametrize("V", [1, 191, 192, 193, 1000])
def test_statistics(V: int, epilogue):
    x, w, targets = head(40, V)
    chain = torch.rand(40) + 0.5
    out = torch.full((40, V), torch.nan, dtype=HALF)
    state, reference = epilogue.softmax(epilogue.emulated, x, w, targets, chain, out)
    l = (x.double() @ w.double().T) * chain.double()[:, None]
    log_p, here = l.log_softmax(1), targets[:, None]
    p = log_p.exp().scatter(1, here, 0.0)
    got = out.double() * (reference.double() - l.logsumexp(1)).exp()[:, None]
    assert ((got - p).abs() <= 2**-8 * p + 1e-12).all()
    expected = dict(
        logp=log_p.gather(1, here)[:, 0], entropy=torch.special.entr(log_p.exp()).sum(1), lse=l.logsumexp(1),
        log_sum_sq=(2 * log_p).logsumexp(1), mean=l.mean(1),
    )  # fmt: skip
    fields = read(state, targets, V)
    for (name, true), found in zip(expected.items(), fields):
        assert ((found - true).abs() / (1 + l.abs().amax(1))).max() <= 2e-6, name
    assert torch.equal(fields[-1], l.argmax(1) == targets)
    without, same = epilogue.softmax(epilogue.emulated, x, w, targets, chain, None)
    assert torch.equal(without, state) and torch.equal(same, reference)


def test_a_confident_target_keeps_its_residual(epilogue):
    x, w, targets = head(3, 700)
    w[:, 0], x[:, 0] = 0.0, torch.tensor([12.0, 27.0, 60.0], dtype=HALF)
    w[500, 0], targets[:] = 1.0, 500
    state, _ = epilogue.softmax(epilogue.emulated, x, w, targets, torch.ones(3), None)
    l = x.double() @ w.double().T
    rest = (l - l[:, 500:501]).exp().scatter(1, targets[:, None], 0.0).sum(1)
    got = (state[:, 1] - (state[:, 5] - state[:, 0]).exp()) / (state[:, 5] - state[:, 0]).exp()
    torch.testing.assert_close(got[:2], rest[:2], rtol=2e-5, atol=0)


def test_ties_with_an_earlier_tile(epilogue):
    """Equal columns of W: the first of the largest is the target, or stands in a tile before its own.

    Within its own tile the sums do not tell.
    """
    x, w, _ = head(4, 600)
    w[[5, 6, 200, 500]] = 100 * x[:1].mean(0, keepdim=True).to(HALF).sign()
    x[:] = w[5] / 100
    targets = torch.tensor([6, 200, 500, 7])
    state, _ = epilogue.softmax(epilogue.emulated, x, w, targets, torch.full((4,), 0.01), None)
    assert (state[:, 6] == targets).tolist() == [True, False, False, False]


@pytest.mark.parametrize("columns", [60, 600])
def test_peaked_rows_multiply_their_largest_columns(columns: int, epilogue, as_on_a_gpu):  # noqa: F811
    """Off by no more than rounding and the probability of the columns that are left out."""
    n, V, block = 40, 600, 16
    x, w, targets = head(n, V)
    targets %= 30
    x = (0.3 * x + 9 * w[targets] / w[targets].float().square().sum(1, keepdim=True)).to(HALF)
    g = torch.rand(n) + 0.5
    p = (x.double() @ w.double().T).softmax(1)
    dz = g.double()[:, None] * (torch.nn.functional.one_hot(targets, V) - p)
    left = torch.empty(n, 1, dtype=torch.float64)
    for rows in range(0, n, block):
        small = p[rows : rows + block].amax(0).argsort(descending=True)[columns:]
        left[rows : rows + block] = 1.1 * p[rows : rows + block, small].sum(1, keepdim=True)
    assert bool((left > 0).any()) == (columns < V)
    found = epilogue.peaked(epilogue.emulated, x, w, targets, g, columns, block)
    for got, true, lost in zip(found, (dz @ w.double(), dz.T @ x.double()), (left * w.abs().max(), left.max())):
        assert ((got - true).abs() <= 2**-8 * true.abs().max() + lost * 3).all()


def test_nan_and_infinity_stay_in_their_row(epilogue):
    x, w, targets = head(5, 400)
    x[1, 0], x[3, 0] = torch.nan, torch.inf
    out = torch.empty(5, 400, dtype=HALF)
    state, reference = epilogue.softmax(epilogue.emulated, x, w, targets, torch.ones(5), out)
    for row, well in itertools.product(range(5), (False, True)):
        if well == (row not in (1, 3)):
            found = state[row, :5].isfinite().all() and reference[row].isfinite() and out[row].isfinite().all()
            assert bool(found) == well
