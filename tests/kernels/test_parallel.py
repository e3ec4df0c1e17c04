"""A weight sharded along V over 2 and 3 processes (gloo) gives what one process gives."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import largest
from processes import run_ranks
from torch import Tensor

from align_kernels import LogitGradClamp, dpo_loss, linear_logprobs, sft_loss

V, D, WORLD = 203, 16, 3
SPLITS = {
    "halves": [102, 101],
    "uneven": [150, 53],
    "thirds": [68, 68, 67],
    "very uneven": [1, 200, 2],
    "none": [120, 0, 83],
}


@dataclasses.dataclass
class Call:
    kind: str = "logprobs"
    bias: bool = False
    rank: int = 0
    train: tuple[str, ...] = ("hidden", "weight")
    workspace: int | None = None
    head: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: bool = False  # one temperature per row
    size: float = 1.0
    zero: bool = False  # most coefficients are zero
    dtensor: bool = False

    def case(self, split: list[int]) -> dict[str, Any]:
        rng = torch.Generator().manual_seed(0)
        targets = torch.randint(0, V, (4, 9), generator=rng)
        targets[0, :4] = targets[1, 6:] = targets[3, 1:8] = -100
        targets[2, 3], targets[2, 4] = V - 1, 0
        tensors = dict(hidden=torch.randn(4, 9, D, generator=rng), weight=torch.randn(V, D, generator=rng) * self.size)
        if self.bias:
            tensors["bias"] = torch.randn(V, generator=rng)
        if self.rank:
            tensors["lora_A"] = torch.randn(self.rank, D, generator=rng) * 0.3
            tensors["lora_B"] = torch.randn(V, self.rank, generator=rng)
        if self.size > 1:  # whole numbers: logits without rounding
            tensors = {k: x.round() for k, x in tensors.items()}
        g, h = torch.randn(2, 4, 9, generator=rng)
        if self.zero:
            g, h = g.where(g > 1, 0.0), torch.zeros_like(h)
        head = dict(self.head, workspace=self.workspace)
        if self.rows:
            head["temperature"] = torch.rand(4, 9, generator=rng) + 0.5
        return dict(
            kind=self.kind, tensors=tensors, targets=targets, head=head, train=self.train, split=split, g=g, h=h,
            ref=torch.linspace(-40.0, -20.0, 4), dtensor=self.dtensor,
        )  # fmt: skip


EVERY = ("hidden", "weight", "bias", "lora_A", "lora_B")
CALLS = {
    "keep": Call(bias=True, train=("hidden", "weight", "bias"), dtensor=True),
    "recompute": Call(
        workspace=1000, bias=True, rank=3, rows=True, train=EVERY, head=dict(softcap=9.0, logit_scale=1.5)
    ),
    "frozen": Call(train=("hidden",)),
    "forward": Call(train=()),
    "lora": Call(rank=4, train=("hidden", "lora_A", "lora_B"), head=dict(impl="torch")),
    "clamp": Call(head=dict(grad_clamp=LogitGradClamp(0.05))),
    "dropped rows": Call(zero=True, workspace=1000),
    "large logits": Call(size=30.0, head=dict(impl="torch")),
    "sft": Call("sft", bias=True, train=("hidden", "weight", "bias")),
    "dpo": Call("dpo", bias=True, rank=2, train=EVERY, head=dict(softcap=9.0), dtensor=True),
    "dpo, long units": Call("dpo", workspace=1000),
    "dpo, frozen": Call("dpo", train=("hidden",), rows=True),
}


def alone(case: dict[str, Any]) -> dict[str, Tensor]:
    """The same in one process, in float64."""
    leaves = {k: x.double().requires_grad_(k in case["train"]) for k, x in case["tensors"].items()}
    lora = (leaves["lora_A"], leaves["lora_B"], 0.5) if "lora_A" in leaves else None
    head = case["head"] | dict(bias=leaves.get("bias"), lora=lora, impl="eager", workspace=None)
    args = leaves["hidden"], leaves["weight"], case["targets"]
    if case["kind"] == "logprobs":
        result = linear_logprobs(*args, **head)
        out = result._asdict()
        y = (result.logp * case["g"]).sum() + (result.entropy * case["h"]).sum()
    else:
        result = dpo_loss(*args, case["ref"], **head) if case["kind"] == "dpo" else sft_loss(*args, **head)
        out = {"loss": result.loss.detach(), "logps": result.logps, **result.metrics}
        y = result.loss
    if case["train"]:
        y.backward()
    return {k: v.detach() for k, v in out.items()} | {f"d{k}": leaves[k].grad for k in case["train"]}


NAMES = [(name, cut) for name in CALLS for cut in SPLITS if cut in ("uneven", "very uneven") or name in ("keep", "dpo")]


@pytest.fixture(scope="module")
def cases() -> dict[str, dict]:
    return {f"{name}, {cut}": CALLS[name].case(SPLITS[cut]) for name, cut in NAMES}


@pytest.fixture(scope="module")
def results(cases, tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
    """What each rank computed, all cases in one run of three processes."""
    folder = tmp_path_factory.mktemp("parallel")
    torch.save(cases, folder / "cases.pt")
    run_ranks(WORLD, Path(__file__).with_name("parallel_worker.py").read_text(), folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def close(name: str, got: Tensor, true: Tensor) -> None:
    """To 1e-6 of the largest entry, or of 1 where that is smaller."""
    assert got.shape == true.shape, name
    error = largest(got.double() - true.double()) / max(largest(true.double()), 1.0)
    assert error <= 1e-6, f"{name}: {error:.2e}"


@pytest.mark.parametrize(("name", "cut"), NAMES)
def test_ranks_equal_one_process(name: str, cut: str, cases: dict, results: list):
    case = cases[f"{name}, {cut}"]
    true, ranks = alone(case), [r[f"{name}, {cut}"] for r in results[: len(case["split"])]]
    for key, expected in true.items():
        parts = [rank[key] for rank in ranks]
        if key in ("dweight", "dbias", "dlora_B"):
            assert [len(part) for part in parts] == case["split"]
            close(key, torch.cat(parts), expected)
            continue
        assert all(torch.equal(part, parts[0]) for part in parts[1:]), f"ranks differ in {key}"
        close(key, parts[0], expected)


@pytest.mark.parametrize("kind", ["shard", "replicate"])
@pytest.mark.parametrize("name", ["keep", "dpo"])
def test_dtensors(name: str, kind: str, cases: dict, results: list):
    true = alone(cases[f"{name}, uneven"])
    for rank in results:
        for key, expected in true.items():
            close(key, rank[f"{name}, uneven, {kind}"][key], expected)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other targets", "ranks that share the vocabulary hold different targets .*same hidden and targets"),
        ("another number of targets", r"hold different targets \(\(0, \d+, \d+\) kept\)"),
        ("a target outside", "got 1000000"),
        ("eager", 'impl="eager" .*cannot serve a tp_group: pass impl="auto"'),
        ("eager dtensor", 'impl="eager" .*cannot serve a tp_group'),
        ("shard 1", r"weight is a DTensor placed .*Shard\(dim=1\).*redistribute"),
        ("group and dtensor", "leave tp_group out"),
        ("plain bias", "bias as a plain tensor: place both alike"),
        ("hidden", r"hidden is a DTensor placed .*pass hidden.full_tensor\(\), or hidden.to_local\(\)"),
        ("bias alone", r"bias is a DTensor placed .*pass bias.full_tensor\(\)"),
    ],
)
def test_refusals_say_what_to_do(name: str, words: str, results: list):
    for rank in results:
        with pytest.raises(ValueError, match=words):
            raise ValueError(rank["refusals"][name])
