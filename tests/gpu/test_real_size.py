"""The kernels at the size of real heads, where a GPU is: tens of thousands of rows in chunks, offsets beyond 2^31, odd
sizes and dW's memory at its full width. On a CPU the same lines run on small heads of the same kinds.

Truth is float64 on the same device, some rows at a time, and eager torch in the same dtypes measures the rounding.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch
from accuracy import check
from torch import Tensor

from align_kernels import explain, linear_logprobs, sft_loss

# beside each other they would not fit on one GPU
pytestmark = pytest.mark.xdist_group("real size")
GPU = torch.cuda.is_available() and os.environ.get("ALIGN_TEST_DEVICE", "cuda").startswith("cuda")
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32
IMPL = os.environ.get("ALIGN_TEST_IMPL", "auto")
UNIT = 1 << 30 if GPU else 1 << 18  # of workspaces, bytes
BLOCK = 1024  # rows of the truth at a time


class Size(NamedTuple):
    rows: int
    vocab: int
    width: int


SIZES = (
    {
        "Qwen2.5-7B": Size(24_576, 152_064, 3584),  # 3.2e9 logits of kept rows
        "Gemma": Size(10_001, 256_000, 2304),  # 2.2e9
        "GPT-2": Size(20_003, 50_257, 768),  # its rows begin anywhere
        "odd": Size(20_011, 131_101, 1031),  # 2.2e9
    }
    if GPU
    else {
        "Qwen2.5-7B": Size(1400, 600, 28),
        "Gemma": Size(1301, 1000, 18),
        "GPT-2": Size(1500, 393, 6),
        "odd": Size(1251, 1024, 9),
    }
)


class Case:
    """A head with masked rows; the last row and the last column are targets."""

    def __init__(self, size: Size) -> None:
        n, v, d = size
        torch.manual_seed(int(os.environ.get("ALIGN_TEST_SEED", "0")))
        self.hidden = torch.randn(n, d, device=DEVICE).to(DTYPE)
        self.weight = (torch.randn(v, d, device=DEVICE) * (2 * d**-0.5)).to(DTYPE)
        self.targets = torch.randint(0, v, (n,), device=DEVICE)
        self.targets[::7] = -100
        self.targets[-1], self.targets[-2] = v - 1, 0
        self.g, self.h = (torch.randn(n, device=DEVICE) for _ in range(2))
        self.kept = self.targets != -100

    def leaves(self, trained: bool) -> tuple[Tensor, Tensor]:
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_(trained)


def truth(c: Case, g: Tensor | None, h: Tensor | None, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Fields, and gradients of sum(g logp + h entropy); `dtype=None`: eager, in the storage dtype."""
    w = c.weight if dtype is None else c.weight.to(dtype)
    made = {name: torch.zeros(len(c.targets), dtype=torch.float64, device=DEVICE) for name in ("logp", "entropy")}
    wide = torch.float32 if dtype is None else dtype
    made |= dict(hidden=torch.zeros_like(c.hidden, dtype=wide), weight=torch.zeros_like(c.weight, dtype=wide))
    for rows in c.kept.nonzero()[:, 0].split(BLOCK):
        x, here = c.hidden[rows].to(w.dtype), torch.arange(len(rows), device=DEVICE)
        log_p = (x @ w.T).to(wide).log_softmax(1)
        p = log_p.exp()
        made["logp"][rows] = log_p[here, c.targets[rows]].double()
        entropy = -(p * log_p).sum(1)
        made["entropy"][rows] = entropy.double()
        if g is None:
            continue
        dz = -g[rows, None].to(wide) * p
        dz[here, c.targets[rows]] += g[rows].to(wide)
        if h is not None:
            dz -= h[rows, None].to(wide) * p * (log_p + entropy[:, None])
        del p, log_p
        dz = dz.to(w.dtype)
        made["hidden"][rows] = (dz @ w).to(wide)
        made["weight"] += (dz.T @ x).to(wide)
    return made


def judge(c: Case, got: dict[str, Tensor], g: Tensor | None, h: Tensor | None = None) -> None:
    true = truth(c, g, h, torch.float64)
    twin = truth(c, g, h, None) if GPU else None
    for name, x in got.items():
        small = 1.0 if name in ("logp", "entropy") else 0.0
        check(name, x, true[name], None if twin is None else twin[name], scale=small)


@pytest.fixture(params=SIZES)
def case(request):
    if GPU:
        torch.cuda.empty_cache()
    return Case(SIZES[request.param])


def test_log_probs_of_many_chunks(case: Case):
    out = linear_logprobs(case.hidden, case.weight, case.targets, impl=IMPL)
    judge(case, dict(logp=out.logp, entropy=out.entropy), None)


@pytest.mark.parametrize("trained", [False, True])
def test_a_fused_loss_in_many_chunks_whose_first_lies_in_dw(case: Case, trained: bool):
    x, w = case.leaves(trained)
    plan = explain(x, w, case.targets, loss="sft", impl=IMPL, workspace=UNIT)
    assert plan.rows > plan.first_rows, plan
    sft_loss(x, w, case.targets, impl=IMPL, num_items=1.0, workspace=UNIT).loss.backward()
    got = dict(hidden=x.grad, weight=w.grad) if trained else dict(hidden=x.grad)
    judge(case, got, torch.full_like(case.g, -1.0))


def test_a_gradient_that_comes_late_finds_its_logits_made_again(case: Case):
    x, w = case.leaves(True)
    out = linear_logprobs(x, w, case.targets, impl=IMPL, workspace=UNIT)
    (case.g * out.logp + case.h * out.entropy).sum().backward()
    judge(case, dict(logp=out.logp.detach(), hidden=x.grad, weight=w.grad), case.g, case.h)


def test_all_logits_are_kept_where_the_workspace_holds_them(case: Case):
    x, w = case.leaves(True)
    plan = explain(x, w, case.targets, impl=IMPL, workspace=20 * UNIT)
    assert plan.chunk_rows == plan.rows == int(case.kept.sum()), plan  # one buffer, beyond 2^31 logits on a GPU
    out = linear_logprobs(x, w, case.targets, impl=IMPL, workspace=20 * UNIT)
    (case.g * out.logp).sum().backward()
    judge(case, dict(logp=out.logp.detach(), hidden=x.grad, weight=w.grad), case.g)


def test_the_same_bits_twice(case: Case):
    found = []
    for _ in range(2):
        x, w = case.leaves(True)
        sft_loss(x, w, case.targets, impl=IMPL).loss.backward()
        found.append((x.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found))
