"""One process of a vocabulary-parallel run, as `processes.run_ranks` starts it.

Reads `cases.pt` (made by test_parallel.py), writes what this rank computed to `RANK.pt`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from align_kernels import dpo_loss, linear_logprobs, sft_loss

OF_VOCAB = ("weight", "bias", "lora_B")


def local_parts(tensors: dict[str, Tensor], split: list[int], rank: int) -> dict[str, Tensor]:
    return {k: x.split(split)[rank].clone() if k in OF_VOCAB else x.clone() for k, x in tensors.items()}


def call(case: dict[str, Any], t: dict[str, Any], group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Fields or loss, and gradients, of one case on the given tensors."""
    leaves = {k: x.requires_grad_(k in case["train"]) for k, x in t.items()}
    lora = (leaves["lora_A"], leaves["lora_B"], 0.5) if "lora_A" in leaves else None
    head = dict(case["head"], bias=leaves.get("bias"), lora=lora, tp_group=group)
    args = leaves["hidden"], leaves["weight"], case["targets"]
    out: dict[str, Any] = {}
    if case["kind"] == "logprobs":
        result = linear_logprobs(*args, **head)
        out |= result._asdict()
        y = (result.logp * case["g"]).sum() + (result.entropy * case["h"]).sum()
    else:
        result = dpo_loss(*args, case["ref"], **head) if case["kind"] == "dpo" else sft_loss(*args, **head)
        out |= {"loss": result.loss.detach(), "logps": result.logps, **result.metrics}
        y = result.loss
    if case["train"]:
        y.backward()
    grads = {f"d{k}": x.grad for k, x in leaves.items() if k in case["train"]}
    assert all(g is not None for g in grads.values()), grads
    return {k: v.detach() for k, v in (out | grads).items()}


def as_dtensors(case: dict[str, Any], mesh: DeviceMesh, sharded: bool) -> dict[str, Tensor]:
    """hidden and A whole on every rank, what has a vocabulary cut along it (or whole too)."""
    place = {k: Shard(0) if sharded and k in OF_VOCAB else Replicate() for k in case["tensors"]}
    return {k: distribute_tensor(x, mesh, [place[k]]).detach() for k, x in case["tensors"].items()}


def refusals(case: dict[str, Any], mesh: DeviceMesh, group: dist.ProcessGroup) -> dict[str, str]:
    """What is refused, and the words."""
    rank, t = mesh.get_local_rank(), case["tensors"]
    hidden, weight, targets = t["hidden"], t["weight"], case["targets"]
    split = distribute_tensor(weight, mesh, [Shard(0)])
    others = {
        "other targets": dict(targets=torch.where(targets == -100, -100, rank), tp_group=group),
        "another number of targets": dict(targets=targets if rank else torch.full_like(targets, -100), tp_group=group),
        "a target outside": dict(targets=torch.full_like(targets, 10**6), tp_group=group),
        "eager": dict(tp_group=group, impl="eager"),
        "eager dtensor": dict(weight=split, impl="eager"),
        "shard 1": dict(weight=distribute_tensor(weight, mesh, [Shard(1)])),
        "group and dtensor": dict(weight=split, tp_group=group),
        "plain bias": dict(weight=split, bias=t["bias"]),
        "hidden": dict(hidden=distribute_tensor(hidden, mesh, [Shard(0)])),
        "bias alone": dict(bias=distribute_tensor(t["bias"], mesh, [Shard(0)])),
    }
    words = {}
    for name, wrong in others.items():
        try:
            linear_logprobs(**(dict(hidden=hidden, weight=weight, targets=targets) | wrong))
            words[name] = "accepted"
        except ValueError as error:
            words[name] = str(error)
    return words


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    groups = {n: dist.new_group(list(range(n))) for n in (2, world)}
    results: dict[str, Any] = {}
    for name, case in torch.load(folder / "cases.pt", weights_only=False).items():
        n = len(case["split"])
        if rank < n:
            results[name] = call(case, local_parts(case["tensors"], case["split"], rank), groups[n])
        if case["dtensor"]:
            mesh = DeviceMesh("cpu", list(range(world)))
            for kind in ("shard", "replicate"):
                made = call(case, as_dtensors(case, mesh, kind == "shard"), None)
                assert all(isinstance(made[f"d{k}"], DTensor) for k in case["train"])
                whole = {k: x.full_tensor() if isinstance(x, DTensor) else x for k, x in made.items()}
                results[f"{name}, {kind}"] = whole
            if "refusals" not in results:
                results["refusals"] = refusals(case, mesh, groups[world])
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
