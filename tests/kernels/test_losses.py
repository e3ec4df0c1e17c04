"""Fused losses against formulas in float64: values, metrics, log-probs and gradients, however the batch is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import check
from devices import PROFILE
from torch import Tensor

from align_kernels import LogitGradClamp, dpo_loss, explain, linear_logprobs, sequence_logprobs, sft_loss
from align_kernels.schedules.request import profiled

from .oracle import Case, loss_truth
from .twins import dpo, grpo, kto, ppo, sft, verify

V, D = 211, 17


# -- batches ------------------------------------------------------------------------------------------------------
def batch(lengths: list[int], *, prompt: int = 3, holes: bool = False, seed: int = 0, **options) -> Case:
    """One sequence per length: a prompt, that many kept tokens, padding. `holes` drops some of them again."""
    rng = torch.Generator().manual_seed(seed)
    B, T = len(lengths), max(lengths, default=0) + prompt
    targets = torch.full((B, T), -100)
    for row, n in enumerate(lengths):
        targets[row, prompt : prompt + n] = torch.randint(0, V, (n,), generator=rng)
    if holes:
        targets[torch.rand(B, T, generator=rng) < 0.4] = -100
    hidden = torch.randn(B, T, D, generator=rng).masked_fill((targets == -100)[..., None], torch.nan)
    tensors = dict(hidden=hidden, weight=torch.randn(V, D, generator=rng) * 0.5)
    if options.pop("bias", False):
        tensors["bias"] = torch.randn(V, generator=rng)
    if rank := options.pop("rank", 0):
        tensors["lora_A"] = torch.randn(rank, D, generator=rng) * 0.3
        tensors["lora_B"] = torch.randn(V, rank, generator=rng)
        options.setdefault("train", frozenset({"hidden", "lora_A", "lora_B"}))
    if dtype := options.pop("dtype", None):
        tensors = {name: x.to(dtype) for name, x in tensors.items()}
    return Case(tensors, targets, **options)


BATCHES: dict[str, Callable[[], Case]] = {
    "even": lambda: batch([9, 9, 9, 9]),
    "nothing masked": lambda: batch([7, 7, 7, 7, 7, 7], prompt=0),
    "pairs of very different length": lambda: batch([41, 2, 1, 13, 1, 30, 40, 2]),
    "holes": lambda: batch([20, 11, 17, 30], holes=True),
    "empty completions": lambda: batch([5, 0, 0, 0, 7, 4]),
    "one pair": lambda: batch([33, 12], prompt=0),
    "all masked": lambda: batch([0, 0, 0, 0]),
    "no sequences": lambda: batch([]),
    "no positions": lambda: batch([0, 0], prompt=0),
    "frozen head": lambda: batch([9, 21, 14, 3], train=frozenset({"hidden"})),
    "frozen hidden": lambda: batch([9, 21, 14, 3], train=frozenset({"weight"})),
    "nothing trained": lambda: batch([9, 21, 14, 3], train=frozenset()),
    "lora": lambda: batch([9, 21, 14, 3], rank=3),
    "every option": lambda: batch([9, 21, 14, 3], rank=2, bias=True, softcap=9.0, logit_scale=1.5, temperature=0.8),
    "clamp": lambda: batch([9, 21, 14, 3], grad_clamp=LogitGradClamp(0.04)),
    "clamp of the gradient": lambda: batch([9, 21, 14, 3], grad_clamp=LogitGradClamp(0.001, 0.01, "gradient")),
    "bfloat16": lambda: batch([9, 21, 14, 3], dtype=torch.bfloat16, bias=True),
}
ROOM = 8 * V * 4  # bytes: keeps the logits of a few rows, fewer than most pairs have
WAYS = {  # impl, workspace, rows per chunk
    "torch": ("torch", None, None),
    "cpu": ("cpu", None, None),
    "cpu, small chunks": ("cpu", None, 16),
    "cpu, small chunks and workspace": ("cpu", ROOM, 4),
    "torch, tiny workspace": ("torch", 1024, 5),
    "eager": ("eager", None, None),
}


@pytest.fixture(params=WAYS.values(), ids=WAYS.keys())
def way(request) -> Iterator[dict[str, Any]]:
    impl, workspace, chunk = request.param
    small = {} if chunk is None else dict(max_rows=chunk, min_rows=4, tile_bytes=chunk * 64 * 4)
    with profiled(PROFILE, **small):
        yield dict(impl=impl, workspace=workspace)


# -- tests --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", BATCHES)
def test_sft(name: str, way: dict):
    case = BATCHES[name]()
    verify(case, sft(case), way)


@pytest.mark.parametrize(
    "hyper",
    [
        {},
        dict(beta=0.5, label_smoothing=0.2),
        dict(loss_type="hinge"),
        dict(loss_type="ipo", beta=0.3),
        dict(loss_type="robust", label_smoothing=0.3),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", BATCHES)
def test_dpo(name: str, hyper: dict, way: dict):
    case = BATCHES[name]()
    verify(case, dpo(case, **hyper), way)


@pytest.mark.parametrize("loss", [kto, ppo, lambda case: ppo(case, 0.1)], ids=["kto", "ppo", "ppo with entropy"])
@pytest.mark.parametrize("name", [name for name in BATCHES if not name.startswith("no ")])
def test_other_losses(name: str, loss: Callable, way: dict):
    case = BATCHES[name]()
    verify(case, loss(case), way)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("hyper", [{}, dict(beta=0.1, delta=1.5), dict(on_policy=True)], ids=str)
@pytest.mark.parametrize("name", ["empty completions", "every option"])
def test_grpo(name: str, hyper: dict, level: str, loss_type: str, way: dict):
    case = BATCHES[name]()
    verify(case, grpo(case, loss_type=loss_type, level=level, **hyper), way)


CUT = ("cpu, small chunks", "cpu, small chunks and workspace", "torch, tiny workspace")


@pytest.mark.parametrize("way", [WAYS[name] for name in CUT], ids=CUT, indirect=True)
def test_chunks_cut_between_pairs(way: dict):
    """The small chunks of the ways above do cut the batch, and a pair too long for the workspace is made again."""
    case = BATCHES["pairs of very different length"]()
    leaves = case.leaves()
    plan = explain(leaves["hidden"], leaves["weight"], case.targets, loss="dpo", **way)
    assert plan.chunk_rows < 43 < plan.rows
    assert plan.schedule == ("recompute" if way["workspace"] else "one pass")


@pytest.mark.parametrize("factor", [0.0, 1.0, -2.5])
@pytest.mark.parametrize("name", ["holes", "lora", "bfloat16"])
def test_upstream_factor(name: str, factor: float, way: dict):
    case = BATCHES[name]()
    verify(case, sft(case), way, factor)
    verify(case, dpo(case), way, factor)


@pytest.mark.parametrize("items", [3, 0.5, torch.tensor(7), torch.tensor(2.5, dtype=torch.float64)], ids=str)
def test_num_items(items: Any, way: dict):
    case = BATCHES["holes"]()
    verify(case, dpo(case, num_items=items), way)
    verify(case, sft(case, num_items=items), way)


def test_micro_batches_add_up_to_one_batch(way: dict):
    """With one normaliser for the window, accumulation equals the whole batch."""
    case = BATCHES["pairs of very different length"]()
    ref = torch.full((8,), -60.0)
    P = 4

    def gradient(pairs: list[int]) -> Tensor:
        rows = torch.tensor(pairs + [p + P for p in pairs])
        weight = case.leaves()["weight"]
        hidden = case.tensors["hidden"][rows]
        dpo_loss(hidden, weight, case.targets[rows], ref[rows], num_items=P, **way).loss.backward()
        assert weight.grad is not None
        return weight.grad

    whole = gradient([0, 1, 2, 3])
    parts = gradient([0]) + gradient([3, 1]) + gradient([2])
    check("accumulated gradient of weight", parts, whole.double())


@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_a_long_completion_is_summed_without_loss(impl: str):
    """The sum of 3000 log-probs of about -6 is known to a unit in the last place of float32, 2e-3."""
    case = batch([3000, 2800], prompt=0)
    value, _ = loss_truth(case, lambda logp, _: (logp.sum(1) * torch.tensor([1.0, -1.0], dtype=logp.dtype)).sum())
    args = case.tensors["hidden"], case.tensors["weight"], case.targets
    out = dpo_loss(*args, torch.zeros(2), beta=1.0, impl=impl)
    assert abs(float(out.metrics["rewards/margins"] - value)) < 2e-3


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_a_second_backward_is_refused(impl: str, retain: bool):
    case = BATCHES["holes"]()
    leaves = case.leaves()
    out = sft_loss(leaves["hidden"], leaves["weight"], case.targets, impl=impl)
    out.loss.backward(retain_graph=retain)
    with pytest.raises(RuntimeError, match=r"handed out already.*Call the loss again"):
        out.loss.backward()


@pytest.mark.parametrize("upstream", ["constant", "dependent"])
@pytest.mark.parametrize("loss", ["sft", "dpo", "linear_logprobs"])
@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_a_double_backward_is_refused(impl: str, loss: str, upstream: str):
    """First gradients may be asked for with create_graph; differentiating them again says what to do."""
    case = BATCHES["even"]()
    case.tensors["hidden"].nan_to_num_()
    leaves = case.leaves()
    args = leaves["hidden"], leaves["weight"], case.targets
    if loss == "sft":
        y = sft_loss(*args, impl=impl).loss
    elif loss == "dpo":
        y = dpo_loss(*args, torch.zeros(4), impl=impl).loss
    else:
        y = linear_logprobs(*args, impl=impl).logp.sum()
    y = y if upstream == "constant" else y**2
    (grad,) = torch.autograd.grad(y, leaves["hidden"], create_graph=True)
    plain = sft_loss(*args, impl="eager").loss  # a penalty is added to a loss: the graph has another way to the leaves
    with pytest.raises(RuntimeError, match=r'differentiate.* twice.*impl="eager"'):
        (plain + grad.pow(2).sum()).backward()


def test_a_double_backward_works_on_the_eager_path():
    case = BATCHES["even"]()
    case.tensors["hidden"].nan_to_num_()
    leaves = {name: x.double() for name, x in case.leaves().items()}
    y = linear_logprobs(leaves["hidden"], leaves["weight"], case.targets, impl="eager").logp.sum()
    (grad,) = torch.autograd.grad(y, leaves["hidden"], create_graph=True)
    (second,) = torch.autograd.grad(grad.pow(2).sum(), leaves["hidden"])
    assert second.abs().max() > 0


WRONG = [
    (dict(targets=torch.zeros(3, 4, dtype=torch.int64), hidden=torch.zeros(3, 4, 5)), r"2P, T.* got shape \(3, 4\)"),
    (dict(targets=torch.zeros(4, dtype=torch.int64), hidden=torch.zeros(4, 5)), r"2P, T.* got shape \(4,\)"),
    (dict(loss_type="sigmoyd"), "loss_type must be one of sigmoid, .*got 'sigmoyd'"),
    (dict(beta=0.0), "beta must be above 0, got 0.0"),
    (dict(beta=float("nan")), "beta must be above 0, got nan"),
    (dict(beta=float("inf")), "beta must be .*got inf"),
    (dict(label_smoothing=0.5), r"label_smoothing must lie in \[0, 0.5\), got 0.5"),
    (dict(label_smoothing=-0.1), "label_smoothing .* got -0.1"),
    (dict(ref_logps=torch.zeros(3)), r"ref_logps must have shape \(4,\), got \(3,\)"),
    (dict(ref_logps=torch.zeros(4, 4)), r"ref_logps must have shape \(4,\), got \(4, 4\)"),
    (dict(targets=torch.full((4, 4), 7)), r"targets must lie in \[0, 7\) or be ignore_index, got 7"),
    (dict(softcap=-2.0), "softcap .* got -2.0"),
    (dict(impl="cutlass"), "got 'cutlass'"),
]


@pytest.mark.parametrize("impl", ["torch", "cpu", "eager"])
@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_arguments_are_named(wrong: dict, message: str, impl: str):
    names: dict = dict(hidden=torch.zeros(4, 4, 5), weight=torch.zeros(7, 5), ref_logps=torch.zeros(4), impl=impl)
    names["targets"] = torch.zeros(4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        dpo_loss(**(names | wrong))


def test_numbers_of_numpy_and_torch_are_numbers():
    case = BATCHES["holes"]()
    args = case.tensors["hidden"], case.tensors["weight"], case.targets, torch.zeros(4)
    plain = dpo_loss(*args, beta=0.5, label_smoothing=0.25).loss
    assert torch.equal(plain, dpo_loss(*args, beta=np.float64(0.5), label_smoothing=np.float32(0.25)).loss)
    assert torch.equal(plain, dpo_loss(*args, beta=torch.tensor(0.5), label_smoothing=0.25).loss)  # type: ignore


# -- sums over sequences ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("average", [False, True])
def test_sequence_logprobs(average: bool):
    case = BATCHES["empty completions"]()
    rng = torch.Generator().manual_seed(1)
    logps = torch.randn(case.targets.shape, generator=rng).requires_grad_()
    g = torch.randn(len(case.targets), generator=rng)
    counts = case.mask.sum(1).clamp(min=1) if average else torch.ones(len(case.targets))
    expected = torch.stack([row[keep].double().sum() for row, keep in zip(logps, case.mask)]) / counts
    rows = sequence_logprobs(logps, case.targets, average=average)
    check("sums", rows, expected)
    (grad,) = torch.autograd.grad(rows, logps, g)
    check("gradient", grad, torch.where(case.mask, (g / counts).double()[:, None], 0.0))

    edges = torch.arange(len(case.targets) + 1) * case.targets.shape[1]
    packed = sequence_logprobs(logps.reshape(-1), case.targets.reshape(-1), cu_seqlens=edges, average=average)
    check("sums of packed rows", packed, expected)

    short = logps[case.mask]
    edges = torch.cat((torch.zeros(1, dtype=torch.int32), case.mask.sum(1).cumsum(0).int()))
    check("sums without targets", sequence_logprobs(short, cu_seqlens=edges, average=average), expected)
    other = case.targets.masked_fill(~case.mask, 9999)
    check("sums", sequence_logprobs(logps, other, average=average, ignore_index=9999), expected)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (dict(targets=torch.zeros(2, 3, dtype=torch.int64)), r"targets \(2, 3\) .* logps \(2, 4\)"),
        (dict(logps=torch.zeros(4)), r"must be \[B, T\] unless cu_seqlens is given, got shape \(4,\)"),
        (
            dict(logps=torch.zeros(4), cu_seqlens=torch.tensor([0, 2, 5])),
            r"\[0\] .. \[5\] for logps of shape \(4,\)",
        ),
        (dict(cu_seqlens=torch.tensor([0, 8])), r"got \[0\] .. \[8\] for logps of shape \(2, 4\)"),
        (dict(logps=torch.zeros(4), cu_seqlens=torch.tensor([1, 2, 5])), r"cu_seqlens must rise from 0 .*got \[1\]"),
        (dict(logps=torch.zeros(4), cu_seqlens=torch.tensor([0, 5, 4])), "cu_seqlens must rise"),
    ],
)
def test_sequence_logprobs_names_what_does_not_fit(names: dict, message: str):
    with pytest.raises(ValueError, match=message):
        sequence_logprobs(**(dict(logps=torch.zeros(2, 4)) | names))
