"""The forward that writes no logits against plain torch in float64, in the strict interpreter."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from align_kernels import explain, linear_logprobs
from align_kernels.backends import triton

from ..kernels.oracle import Case, judge, truth
from ..kernels.test_logprobs import make, with_rows
from ..kernels.tiles import OPTIONS, empty_state

ARCHITECTURES = {"tensor descriptors": 90, "pointers": 80, "AMD": "gfx942"}


@pytest.fixture(params=ARCHITECTURES.values(), ids=ARCHITECTURES)
def architecture(request, monkeypatch):
    monkeypatch.setattr(triton.on_chip, "architecture", lambda device: request.param)
    return request.param


class Head:
    def __init__(
        self, n, V, D, dtype=torch.bfloat16, *, bias=False, scale=1.0, softcap=None, temperature=1.0, offset=0
    ) -> None:
        rng = torch.Generator().manual_seed(V)
        self.x, self.w = (torch.randn(k, D, generator=rng).to(dtype) for k in (n, V))
        self.targets = torch.randint(0, V + 2 * offset, (n,), generator=rng)
        self.common = dict(
            offset=offset,
            vocab=V + 2 * offset,
            bias=torch.randn(V, generator=rng) if bias else None,
            scale=scale,
            softcap=softcap,
            temperature=torch.rand(n, generator=rng) + 0.5 if temperature == "rows" else temperature,
        )
        self.targets[::3] = self.logits().argmax(1)[::3] + offset

    def state(self, *cuts: int) -> Tensor:
        """Folded from shards of the vocabulary that end at the cuts."""
        state, c, V = empty_state(len(self.x)), self.common, len(self.w)
        for begin, end in itertools.pairwise((0, *cuts, V)):
            bias = None if c["bias"] is None else c["bias"][begin:end]
            common = c | dict(offset=c["offset"] + begin, bias=bias)
            triton.on_chip.forward(self.x, self.w[begin:end], state, self.targets, **common)
        return state

    def logits(self) -> Tensor:
        c, x = self.common, self.x.double() @ self.w.double().T
        x = (x if c["bias"] is None else x + c["bias"].double()) * c["scale"]
        x = x if c["softcap"] is None else c["softcap"] * torch.tanh(x / c["softcap"])
        t = c["temperature"]
        return x / (t.double()[:, None] if isinstance(t, Tensor) else t)


def check(head: Head, state: Tensor) -> None:
    l, offset = head.logits(), head.common["offset"]
    m, s, a, q, total, target, argmax, _ = state.unbind(1)
    log_p, size = l.log_softmax(1), 1 + l.abs().amax(1)
    local = head.targets - offset
    here = (local >= 0) & (local < l.shape[1])
    true = dict(
        lse=(m + s.log(), l.logsumexp(1)),
        entropy=(s.log() - a / s, torch.special.entr(log_p.exp()).sum(1)),
        log_sum_sq=(q.log() - 2 * s.log(), (2 * log_p).logsumexp(1)),
        mean=(total / l.shape[1], l.mean(1)),
        target=(target, l.gather(1, local.clamp(0, l.shape[1] - 1)[:, None])[:, 0].where(here, 0.0)),
    )
    for name, (got, expected) in true.items():
        error = ((got - expected).abs() / size).max()
        assert error <= 4e-6, f"{name}: {error:.2e}"
    first = l.argmax(1)
    assert torch.equal(argmax == head.targets, first == local), "correct"
    assert torch.equal((argmax.long() - offset) // 128, first // 128), "the part of the maximum"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, OPTIONS["negative scale"], OPTIONS["all"]], ids=["plain", "negative", "all"])
@pytest.mark.parametrize("shape", [(1, 1, 16), (5, 63, 80), (130, 507, 64), (3, 2049, 144)], ids=str)
def test_statistics(shape: tuple, options: dict, dtype: torch.dtype, architecture):
    head = Head(*shape, dtype, **options)
    check(head, head.state())


def test_row_tiles_share_columns(architecture):
    """More row tiles than one group: every tile of the grid is taken once."""
    head = Head(17 * 128 + 1, 300, 16)
    check(head, head.state())


def test_a_shard_of_the_vocabulary():
    head = Head(40, 300, 32, offset=200)
    assert 0 < ((head.targets >= 200) & (head.targets < 500)).sum() < 40
    check(head, head.state())


def test_a_second_shard_is_folded_into_the_first():
    whole = Head(9, 400, 32, bias=True)
    check(whole, whole.state(256))


def test_no_rows():
    head = Head(0, 63, 16)
    assert head.state().shape == (0, 8)


@pytest.mark.parametrize("cuts", [(), (128, 512)], ids=["whole", "shards"])
def test_large_logits_and_ties(cuts: tuple, architecture):
    """Logits of +-1e4 that are exact; many columns share the maximum, in one part and in several: only the first of
    them is the target's."""
    head = Head(6, 700, 16)
    head.x.zero_()[:, 0] = torch.tensor([1.0, 1.0, -1.0, 100.0, -100.0, 0.0])
    head.w.zero_()[:, 0] = (torch.arange(700) % 101 - 50).to(head.w.dtype) * 2
    for target in (0, 99, 100, 101, 201, 699):
        head.targets.fill_(target)
        state = head.state(*cuts)
        check(head, state)
        assert (state[:, 6] == target).tolist() == [target == first for first in (100, 100, 0, 100, 0, 0)]


def test_nan_and_minus_infinity(architecture):
    head = Head(4, 600, 16, bias=True)
    head.common["bias"][:300] = -torch.inf  # whole parts of the vocabulary, and a piece of one
    head.targets[:] = 400
    head.x[1, 3] = torch.nan
    state, l = head.state(), head.logits()
    assert state[1, :5].isnan().all()
    m, s, a, *_ = state[[0, 2, 3]].unbind(1)
    log_p = l[[0, 2, 3]].log_softmax(1)
    torch.testing.assert_close(m + s.log(), l[[0, 2, 3]].logsumexp(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(s.log() - a / s, torch.special.entr(log_p.exp()).sum(1), rtol=1e-5, atol=1e-5)
    assert (state[:, 4].isnan() | (state[:, 4] == -torch.inf)).all()


# -- through the public operator ----------------------------------------------------------------------------------
def on_chip(case: Case, **options):
    leaves = case.leaves()
    args = (leaves["hidden"], leaves["weight"], case.targets)
    plan = explain(*args, impl="triton", **case.keywords(leaves), **options)
    return linear_logprobs(*args, impl="triton", **case.keywords(leaves), **options), plan


@pytest.mark.parametrize("workspace", [None, 1 << 10])
def test_log_probs_without_gradient(workspace: int | None, architecture):
    case = with_rows(make((3, 50), 507, 48, dtype=torch.bfloat16, bias=True, softcap=9.0, train=frozenset()))
    out, plan = on_chip(case, workspace=workspace)
    assert plan.on_chip and "logits stay on the chip" in str(plan)
    judge_fields(case, out)


def judge_fields(case: Case, out) -> None:
    from ..kernels.oracle import Result

    zero = torch.zeros(case.targets.shape)
    judge(case, Result(out._asdict(), {}), truth(case, zero, None), truth(case, zero, None, None))
    assert not any(x[~case.mask].any() for x in out)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (make(rank=2, D=16, dtype=torch.bfloat16, train=frozenset()), "the head has a LoRA"),
        (make(D=16, train=frozenset()), "must both be bfloat16 or float16, got torch.float32"),
        (make(D=24, dtype=torch.bfloat16, train=frozenset()), "a multiple of 16 columns, got 24"),
    ],
    ids=["lora", "float32", "D = 24"],
)
def test_a_head_that_takes_tiles(case: Case, reason: str):
    out, plan = on_chip(case)
    assert not plan.on_chip and reason in plan.why and "pass through tiles" in plan.why
    judge_fields(case, out)


def test_a_head_that_needs_a_gradient_keeps_its_schedule():
    _, plan = on_chip(make(D=16, dtype=torch.bfloat16))
    assert not plan.on_chip and plan.schedule != "forward"
