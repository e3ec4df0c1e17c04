"""Rows without a coefficient are left out, and the logits of the others are read where they lie: no schedule that keeps
logits copies them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from align_kernels import LogitGradClamp, explain, grpo_loss, linear_logprobs
from align_kernels.backends.state import COLUMNS
from align_kernels.schedules.request import profiled

from . import test_compaction as columns
from .oracle import Case, judge, run, truth
from .test_compaction import small_blocks  # noqa: F401 (a fixture)
from .test_logprobs import make, upstream, with_rows

aten = torch.ops.aten
COPIES = {
    aten.index, aten.index_select, aten.gather, aten.take, aten.masked_select, aten.clone, aten.copy_, aten._to_copy,
    aten.cat, aten.embedding,
}  # fmt: skip
D, RANK, T = 19, 5, 9


class Watch(TorchDispatchMode):
    """Counts the elements of matrices that an operation copies, but of states and of inputs of these `widths`."""

    copied = 0

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.widths = *widths, COLUMNS

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket in COPIES and made.dim() == 2 and made.shape[1] not in self.widths:
            self.copied += made.numel()
        return made


@pytest.fixture(autouse=True)
def small_tiles():
    with profiled("cpu", tile_bytes=64 * 37 * 4):
        yield


@pytest.fixture(params=["cpu", "cuda"])
def impl(request) -> str:
    if request.param == "cuda":
        request.getfixturevalue("emulator")
    return request.param


LATE: dict[str, Callable[[], Case]] = {
    "plain": make,
    "everything": lambda: with_rows(make(bias=True, rank=RANK, logit_scale=1.5, softcap=9.0)),
    "clamp": lambda: make(grad_clamp=LogitGradClamp(0.05, 0.01)),
    "frozen head": lambda: make(softcap=5.0, train=frozenset({"hidden"})),
    "bfloat16": lambda: make(dtype=torch.bfloat16),
}


def late(case: Case, impl: str, which: str) -> int:
    """Elements of logits that the gradient of log-probs copies where some of it is zero."""
    g, h = upstream(case, which)
    if h is not None:
        h = torch.where(g == 0, 0.0, h)
    assert 0 < (g == 0)[case.mask].sum() < case.mask.sum()
    with Watch(D, RANK) as watch:
        got = run(case, g, h, impl=impl)
    judge(case, got, truth(case, g, h), truth(case, g, h, None) if case.narrow else None)
    return watch.copied


@pytest.mark.parametrize("which", ["logp", "both"])
@pytest.mark.parametrize("name", LATE)
def test_logits_that_wait_for_their_gradient(name: str, which: str, impl: str):
    case = LATE[name]()
    t = case.leaves()
    plan = explain(t["hidden"], t["weight"], case.targets, impl=impl, **case.keywords(t))
    assert plan.schedule == ("frozen" if name == "frozen head" else "keep") and plan.tile_cols < 123
    live = 0
    if plan.name == "plain keep":  # what is kept is read by products alone: a gathering of 16 bits is the only pass
        g, h = upstream(case, which)
        live = int((g != 0)[case.mask].sum()) * 123 if h is None else 0
    assert late(case, impl, which) == live


def test_a_copy_is_seen():
    """Plain torch operations make one."""
    assert late(make(), "torch", "logp") > 0


def closed(impl: str, dtype: torch.dtype, **options) -> list[Tensor]:
    """A loss whose second sequence has no coefficient, and its gradients."""
    rng = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(4, T, D, generator=rng), torch.randn(123, D, generator=rng)
    targets, old = torch.randint(0, 123, (4, T), generator=rng), torch.randn(4, T, generator=rng) - 5
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
    out = grpo_loss(
        *leaves, targets, old.to(dtype), torch.tensor([1.0, 0.0, -1.0, 0.5]), importance_sampling_level="sequence",
        softcap=9.0, impl=impl, **options,
    )  # fmt: skip
    return [out.loss.detach(), *torch.autograd.grad(out.loss, leaves)]


@pytest.mark.parametrize("workspace", [None, 20 * 123 * 4], ids=["", "small workspace"])
def test_a_loss_that_closes_over_its_logits(workspace: int | None, impl: str):
    with Watch(D, T) as watch:
        got = closed(impl, torch.float32, workspace=workspace)
    assert watch.copied == 0
    for mine, true in zip(got, closed("eager", torch.float64)):
        torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", ["heavy", "mixed"])
def test_compacted_blocks(shape: str, impl: str):
    """The gradient takes the columns that were kept of the rows that have one."""
    case = columns.make(shape, softcap=40.0)
    g, _ = columns.coefficients(False)
    leaves = case.leaves()
    options = dict(impl=impl, drop_mass=columns.TAU, **case.keywords(leaves))
    out = linear_logprobs(leaves["hidden"], leaves["weight"], case.targets, **options)
    with Watch(columns.D) as watch:
        torch.autograd.grad(out.logp, list(leaves.values()), g)
    assert watch.copied == 0
    columns.check_bound(case, g, None, columns.TAU, impl=impl)
