"""Exponentials in 16 bits, as a GPU keeps them, in every schedule that does: right, and no GEMM in vain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from align_kernels import explain, gemm, linear_logprobs, sft_loss
from align_kernels.schedules import waves
from align_kernels.schedules.request import profiled
from align_kernels.schedules.tiles import TiledHead

from .narrow import as_on_a_gpu, verify_narrow  # noqa: F401 (a fixture)
from .oracle import Case
from .test_logprobs import make, with_rows

pytestmark = pytest.mark.usefixtures("as_on_a_gpu")

BOTH, HIDDEN, WEIGHT = frozenset({"hidden", "weight"}), frozenset({"hidden"}), frozenset({"weight"})
HALF = torch.bfloat16
CASES = {
    "plain": lambda **o: make(dtype=HALF, **o),
    "odd sizes": lambda **o: make((3, 11), 507, 33, dtype=HALF, logit_scale=0.25, **o),
    "bias, temperature per row": lambda **o: with_rows(make(dtype=HALF, bias=True, **o)),
    "negative scale": lambda **o: make(dtype=HALF, logit_scale=-1.5, temperature=0.7, **o),
    "one column": lambda **o: make(V=1, dtype=HALF, **o),
    "all masked": lambda **o: make(masked=1.1, dtype=HALF, **o),
    "wider weight": lambda **o: make(dtype=HALF, weight_dtype=torch.float32, **o),
}
SCHEDULES = [("plain keep", "keep", BOTH), ("plain keep", "keep", WEIGHT), ("online", "online", HIDDEN)]


def plan_of(case: Case, loss: str | None = None, **options):
    t = case.leaves()
    return explain(t["hidden"], t["weight"], case.targets, loss=loss, impl="torch", **case.keywords(t), **options)


@pytest.mark.parametrize("small", [False, True], ids=["", "small tiles"])
@pytest.mark.parametrize(("name", "schedule", "train"), SCHEDULES)
@pytest.mark.parametrize("of", CASES)
def test_log_probs(of: str, name: str, schedule: str, train: frozenset, small: bool):
    case = CASES[of](train=train)
    with profiled("cuda", tile_bytes=2 if small else 1 << 62):
        plan = plan_of(case)
        if of != "wider weight":
            assert (plan.name, plan.schedule) == (name, schedule)
        assert not small or plan.tile_cols == min(64, case.tensors["weight"].shape[0])
        verify_narrow(case, "torch")


@pytest.mark.parametrize("train", [BOTH, HIDDEN])
def test_a_gradient_of_the_entropy_makes_the_logits_again(train: frozenset):
    case = CASES["bias, temperature per row"](train=train)
    for which in ("entropy", "both"):
        verify_narrow(case, "torch", which)


def test_lora():
    verify_narrow(make(dtype=HALF, rank=3), "torch")
    verify_narrow(make(dtype=HALF, rank=3, train=frozenset({"hidden", "weight", "lora_A", "lora_B"})), "torch")


def test_float16_has_too_small_a_range():
    case = make(dtype=torch.float16, train=BOTH)
    assert plan_of(case).name == "keep" and plan_of(make(dtype=torch.float16, train=HIDDEN)).name == "frozen"
    verify_narrow(case, "torch")


@pytest.mark.parametrize("train", [BOTH, WEIGHT, HIDDEN])
def test_a_loss(train: frozenset):
    """Its gradients against float64 log-softmax, by what eager torch errs in bfloat16."""
    case, found = make((60,), 507, 32, dtype=HALF, train=train), []
    assert plan_of(case, "sft").name == ("online" if train == HIDDEN else "plain one pass")
    for dtype in (None, HALF, torch.float64):
        t = case.leaves(dtype)
        if dtype is None:
            loss = sft_loss(t["hidden"], t["weight"], case.targets, impl="torch").loss
        else:
            z = (t["hidden"][case.mask] @ t["weight"].T).to(torch.promote_types(dtype, torch.float32))
            loss = torch.nn.functional.cross_entropy(z, case.targets[case.mask])
        found.append(torch.autograd.grad(loss, [t[name] for name in sorted(train)]))
    for got, eager, true in zip(*found):
        error, allowed = ((x.double() - true).abs().max() for x in (got, eager))
        assert error <= 1.5 * allowed + 2**-8 * true.abs().max()


@pytest.mark.parametrize("name", ["plain keep", "keep", "recompute", "online", "frozen", "plain one pass"])
def test_rows_of_tiles_are_aligned_whatever_the_vocabulary(name: str, monkeypatch: pytest.MonkeyPatch):
    """Every product with logits, exponentials or gradients of 507 columns finds rows at multiples of 64 elements."""
    V, D, seen, multiply = 507, 32, [], gemm.product
    case = make((40,), V, D, dtype=HALF, train=HIDDEN if name in ("online", "frozen") else BOTH)
    case.softcap = 5.0 if name in ("keep", "frozen") else None
    options = dict(workspace=1 << 10) if name == "recompute" else {}

    def product(acc: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
        tiles = [x for x in (acc, a, b) if D not in x.shape]
        assert tiles and all(max(x.stride()) % 64 == 0 for x in tiles)
        seen.append(tiles)
        multiply(acc, a, b, add)

    monkeypatch.setattr(gemm, "product", product)
    assert plan_of(case, "sft" if name == "plain one pass" else None, **options).name == name
    t = case.leaves()
    if name == "plain one pass":
        sft_loss(t["hidden"], t["weight"], case.targets, impl="torch").loss.backward()
        assert len(seen) == 3
    else:
        verify_narrow(case, "torch", **options)
        assert len(seen) >= 2


# -- products -----------------------------------------------------------------------------------------------------
def flops(case: Case, g_entropy: bool = False, **options) -> float:
    """Of forward and backward, over (kept rows) V D."""
    t = case.leaves()
    with FlopCounterMode(display=False) as counter:
        out = linear_logprobs(t["hidden"], t["weight"], case.targets, impl="torch", **options)
        (out.logp.sum() + (out.entropy.sum() if g_entropy else 0.0)).backward()
    (V, D), n = case.tensors["weight"].shape, int(case.mask.sum())
    return counter.get_total_flops() / (n * V * D)


def test_late_gradients_without_recompute():
    """Where float32 logits would not fit, their exponentials do: 6NVD, and 8NVD with a workspace too small for them."""
    case = make((200,), 2048, 16, dtype=HALF, train=BOTH)
    n, V = int(case.mask.sum()), 2048
    workspace = n * V * 3
    assert workspace < n * V * 4
    assert plan_of(case, workspace=workspace).name == "plain keep" and flops(case, workspace=workspace) == 6
    assert plan_of(case, workspace=n * V).name == "recompute" and flops(case, workspace=n * V) == 8
    assert flops(case, g_entropy=True) == 8
    frozen = make((200,), 2048, 16, dtype=HALF, train=HIDDEN)
    assert flops(frozen) == flops(frozen, workspace=1 << 10) == 4


@pytest.mark.parametrize("train", [BOTH, HIDDEN, WEIGHT])
@pytest.mark.parametrize("loss", [None, "sft"])
def test_chunks_of_as_many_rows_as_the_planner_says(loss: str | None, train: frozenset, monkeypatch):
    """And a last one of the rest: nothing is made even."""
    case = make((60,), 207, 16, dtype=HALF, train=train, masked=0.0)
    monkeypatch.setattr(waves, "chunk_rows", lambda *_: 23)
    plan = plan_of(case, loss, workspace=None if loss else 1 << 10)
    assert (plan.chunk_rows, plan.even) == (23, False)
    seen, common = [], TiledHead.linear if plan.name in ("online", "plain one pass") else TiledHead.common

    def spy(tiled, chunk, *columns):
        seen.append(len(chunk.targets))
        return common(tiled, chunk, *columns)

    monkeypatch.setattr(TiledHead, common.__name__, spy)
    if loss is None:
        verify_narrow(case, "torch", workspace=1 << 10)
    else:
        t = case.leaves()
        sft_loss(t["hidden"], t["weight"], case.targets, impl="torch").loss.backward()
    assert seen[0] == 23 and {23, 14} <= set(seen)


@pytest.mark.parametrize("rows", [40, 200, 3000])
def test_what_is_kept_is_within_the_workspace(rows: int):
    case = make((rows,), 2048, 16, dtype=HALF, train=BOTH, masked=0.0)
    for workspace in (rows * 2048 * 3, rows * 2048 * 8):
        made = plan_of(case, workspace=workspace)
        assert made.schedule == "keep" and made.workspace <= workspace
