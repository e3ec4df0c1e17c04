"""What a GPU is asked for each block of rows that is compacted: launches, and waits for what it says. The model of
benches/gpu/model.py counts with these numbers."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from align_kernels import gemm, sft_loss
from align_kernels.backends import torch_ops
from align_kernels.dispatch import BACKENDS
from align_kernels.schedules import compaction, support
from align_kernels.schedules import request as planning

from .narrow import as_on_a_gpu
from .test_compaction import TAU, make
from .test_no_waiting import WAITING

gpu = as_on_a_gpu

aten = torch.ops.aten
FREE = {  # of a tensor's shape, or memory without contents
    aten.view, aten._unsafe_view, aten.slice, aten.select, aten.unsqueeze, aten.expand, aten.t, aten.transpose,
    aten.detach, aten.alias, aten.unbind, aten.split, aten.split_with_sizes, aten.empty, aten.empty_like,
    aten.new_empty, aten.as_strided, aten.permute, aten.squeeze, aten.view_as, aten.empty_strided, aten.reshape,
    aten.promote_types, aten.scalar_tensor,
}  # fmt: skip
SEVERAL = {aten.sort: 6, aten.cumsum: 2, aten.cummax: 2}  # kernels of one operation


class Count(TorchDispatchMode):
    """Launches and waits, as they would be on a GPU."""

    launches = waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket
        masks = [x for x in args[1] if x is not None and x.dtype == torch.bool] if packet is aten.index else []
        self.waits += packet in WAITING or len(masks) > 0
        self.launches += 0 if packet in FREE else SEVERAL.get(packet, 1)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def count(gpu: None, monkeypatch: pytest.MonkeyPatch) -> Count:
    """A backend of one launch a primitive, in which each block takes the first columns that it tries."""
    seen = Count()

    def one(run: Any, launches: int = 1) -> Any:
        def counted(*args: Any, **options: Any) -> Any:
            seen.launches += launches
            with _disable_current_modes():
                return run(*args, **options)

        return counted

    def waiting(run: Any) -> Any:
        def counted(x: Tensor) -> Any:
            of_a_gpu = torch._C._len_torch_dispatch_stack() > 0  # else it is a number of the CPU's own
            seen.waits += of_a_gpu
            seen.launches += of_a_gpu
            return run(x)

        return counted

    def add(sums: Tensor, reached: Tensor, rows: Tensor, values: Tensor) -> None:
        sums[rows] = values + sums[rows].where(reached[rows][:, None], 0.0)
        reached[rows] = True

    def finish(sums: Tensor, reached: Tensor, out: Tensor) -> None:
        out.copy_(sums.where(reached[:, None], 0.0))

    primitives = {name: one(getattr(torch_ops, name)) for name in ("forward", "backward", "peaks", "survey")}
    row_sums = SimpleNamespace(add=one(add), finish=one(finish))
    backend = SimpleNamespace(**vars(torch_ops) | primitives | {"row_sums": row_sums})
    monkeypatch.setitem(BACKENDS, "torch", backend)
    monkeypatch.setattr(gemm, "product", one(gemm.product))
    monkeypatch.setattr(support, "cheapest", one(support.cheapest, 0))
    asked, yes = compaction.suffices, one(torch.ones_like, 0)
    monkeypatch.setattr(compaction, "suffices", lambda *args: yes(asked(*args)))
    for name in ("tolist", "cpu"):
        monkeypatch.setattr(Tensor, name, waiting(getattr(Tensor, name)))
    return seen


def counted(count: Count, rows: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int, int]:
    """Launches, waits and blocks of a chunk of a fused loss whose blocks have at most so many rows."""
    blocks, found, select, chunk = 0, (0, 0), compaction._select, compaction.compacted

    def selected(*args: Any) -> Any:
        nonlocal blocks
        blocks += 1
        block = select(*args)
        assert block is not None
        return block

    def compacted(*args: Any) -> Any:
        nonlocal found
        before = count.launches, count.waits
        dx = chunk(*args)
        found = count.launches - before[0], count.waits - before[1]
        return dx

    with monkeypatch.context() as patch:
        for module in (compaction, planning):
            patch.setattr(module, "BLOCK_ROWS", rows)
        patch.setattr(compaction, "_select", selected)
        patch.setattr(compaction, "compacted", compacted)
        patch.setattr(compaction, "FLAT", 0.1)
        patch.setattr(compaction, "FEW", 0)
        patch.setattr(compaction, "STEP", compaction.STEP_GPU)
        patch.setattr(support, "EACH", 20.0)  # blocks as large as they may be
        case = make("heavy", dtype=torch.bfloat16)
        leaves = case.leaves()
        with count:
            sft_loss(leaves["hidden"], leaves["weight"], case.targets, drop_mass=TAU, impl="torch").loss.backward()
    return *found, blocks


def test_launches_and_waits_of_a_block(count: Count, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benches" / "gpu"))
    model = importlib.import_module("model")
    one, two = counted(count, 150, monkeypatch), counted(count, 75, monkeypatch)
    assert (one[2], two[2]) == (1, 2)
    of_a_block = two[0] - one[0], two[1] - one[1]
    assert of_a_block == (model.LAUNCHED, model.WAITED)
    assert (one[0] - of_a_block[0], one[1] - of_a_block[1]) == (model.LAUNCHED_A_CHUNK, model.WAITED_A_CHUNK)
