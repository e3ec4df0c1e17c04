"""The public operators with impl="triton", in the strict interpreter."""

from __future__ import annotations

import pytest
import torch
from accuracy import check

from align_kernels import LogitGradClamp, dpo_loss, explain, grpo_loss, linear_logprobs, logprobs_from_logits
from align_kernels.backends import triton

from ..kernels import test_compaction as columns
from ..kernels import test_sample as samples
from ..kernels.test_compaction import small_blocks  # noqa: F401 (a fixture)
from ..kernels.test_logprobs import CASES, TINY, make, verify

SOME = (
    "plain", "bias", "softcap", "lora with bias and trained base", "everything", "strided", "one row", "one column",
    "one feature", "all masked", "no rows", "frozen head", "bias alone", "nothing trained",
)  # fmt: skip


@pytest.mark.parametrize("name", SOME)
def test_options(name: str):
    verify(CASES[name](), "triton", "both")


@pytest.mark.parametrize("name", ["everything", "frozen head"])
def test_recomputed(name: str):
    verify(CASES[name](), "triton", "both", workspace=TINY)


@pytest.mark.parametrize(
    "clamp", [LogitGradClamp(0.3, 0.02), LogitGradClamp(0.05, 0.01, "gradient")], ids=["residual", "gradient"]
)
def test_clamp(clamp: LogitGradClamp):
    case = CASES["everything"]()
    case.grad_clamp = clamp
    verify(case, "triton", "both")


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float32)])
def test_dtypes(dtypes: tuple):
    verify(make((29,), 207, 32, dtype=dtypes[0], weight_dtype=dtypes[1], bias=True), "triton", "both")


@pytest.mark.parametrize("name", ["plain", "everything", "strided", "one column", "no rows", "2049 columns"])
def test_samples(name: str):
    samples.verify(samples.all_kept(CASES[name]()), "triton")


def test_auto_does_not_take_the_interpreter():
    case = make()
    t = case.tensors
    assert explain(t["hidden"], t["weight"], case.targets).backend == "cpu"


def batch() -> dict:
    rng = torch.Generator().manual_seed(5)
    hidden, weight = torch.randn(4, 7, 16, generator=rng), torch.randn(123, 16, generator=rng) * 0.5
    targets = torch.randint(0, 123, (4, 7), generator=rng)
    targets[:, :2], targets[1, 5:] = -100, -100
    return dict(hidden=hidden, weight=weight, targets=targets)


def dpo(hidden, weight, targets, **options):
    return dpo_loss(hidden, weight, targets, torch.tensor([-20.0, -21, -19, -25]).to(hidden), beta=0.3, **options)


def grpo(hidden, weight, targets, **options):
    old = torch.linspace(-6, -3, 28).view(4, 7).to(hidden)
    advantages = torch.tensor([1.0, -1.0, 0.5, 0.0]).to(hidden)
    return grpo_loss(hidden, weight, targets, old, advantages, **options)


@pytest.mark.parametrize("workspace", [None, TINY])
@pytest.mark.parametrize("loss", [dpo, grpo])
def test_losses(loss, workspace: int | None):
    grads = {}
    for impl, dtype in (("triton", torch.float32), ("eager", torch.float64)):
        tensors = batch()
        leaves = [tensors[name].to(dtype).requires_grad_() for name in ("hidden", "weight")]
        options = dict(workspace=workspace) if impl == "triton" else {}
        out = loss(*leaves, tensors["targets"], impl=impl, **options)
        grads[impl] = [out.loss, *torch.autograd.grad(out.loss, leaves)]
    for name, got, true in zip(("loss", "hidden", "weight"), grads["triton"], grads["eager"]):
        check(name, got.detach(), true.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_from_logits(dtype: torch.dtype):
    rng = torch.Generator().manual_seed(3)
    logits, targets = (torch.randn(5, 300, generator=rng) * 3).to(dtype), torch.randint(0, 300, (5,), generator=rng)
    targets[2] = -100
    grads = []
    for impl, x in (("triton", logits), ("eager", logits.double())):
        x = x.clone().requires_grad_()
        out = logprobs_from_logits(x, targets, temperature=0.7, impl=impl)
        grads.append(
            (out.logp.detach(), torch.autograd.grad((out.logp * torch.arange(5)).sum() + out.entropy.sum(), x)[0])
        )
    check("logp", grads[0][0], grads[1][0])
    check("gradient", grads[0][1], grads[1][1])


# -- column compaction --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("shape", "options"), [("heavy", {}), ("mixed", columns.OPTIONS["all"])], ids=["heavy", "mixed, all options"]
)
def test_dropped_mass(shape: str, options: dict, monkeypatch: pytest.MonkeyPatch):
    """The bound on gradients holds; by the same sample, the columns are those that plain torch operations choose."""
    case = columns.make(shape, **options)
    g, h = columns.coefficients(True)
    columns.check_bound(case, g, h, columns.TAU, impl="triton")
    monkeypatch.setattr(triton, "survey", None)
    got = columns.gradients(case, g, h, drop_mass=columns.TAU, impl="triton")
    plain = columns.gradients(case, g, h, drop_mass=columns.TAU, impl="torch")
    exact = columns.gradients(case, g, h, impl="torch")
    for name, grad in plain.items():
        assert not torch.equal(grad, exact[name]), "nothing was dropped"
        check(name, got[name], grad.double(), scale=float(grad.abs().max()))


def test_repeats_bit_for_bit():
    case = make((33,), 207, 16)
    leaves = case.leaves()
    runs = []
    for _ in range(2):
        out = linear_logprobs(leaves["hidden"], leaves["weight"], case.targets, impl="triton")
        runs.append((out.logp, *torch.autograd.grad(out.logp.sum(), [leaves["hidden"], leaves["weight"]])))
    assert all(torch.equal(a, b) for a, b in zip(*runs))
