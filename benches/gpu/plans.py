"""What the planner chooses between, on the 7B head at 8192 rows: workspace, rows per chunk, logits in dW's memory.

With a workspace that holds all logits a gradient that comes late finds them kept, else they are made again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from common import Lab
from heads import made
from questions import Batch, Question

from align_kernels import explain, linear_logprobs, sft_loss
from align_kernels.schedules import aliasing
from align_kernels.schedules.request import profiled

GIB = 1 << 30
MODES = {"frozen": ("sft", False), "trained": ("sft", True), "late": ("gradient", True)}


@contextmanager
def planned(device: str, aliases: bool = True, **fields: Any) -> Iterator[None]:
    """Another profile of the device, and no logits in memory of dW."""
    columns = aliasing.aliased_columns
    if not aliases:
        aliasing.aliased_columns = lambda *_: 0
    try:
        with profiled(device, **fields):
            yield
    finally:
        aliasing.aliased_columns = columns


def step(b: Batch, mode: str, workspace: int | None, impl: str) -> None:
    b.forget()
    if mode == "late":
        linear_logprobs(b.hidden, b.weight, b.targets, impl=impl, workspace=workspace).logp.backward(b.g)
    else:
        sft_loss(b.hidden, b.weight, b.targets, impl=impl, workspace=workspace).loss.backward()


def plans(lab: Lab) -> None:
    impl, device = "torch" if lab.dry else "triton", lab.device.type
    unit = 1 << 12 if lab.dry else GIB
    for mode, (what, trained) in MODES.items():
        _, b = made(lab, Question(what, "Qwen2.5-7B", 8192, trained, dtype="bfloat16"))

        def measure(what: str, workspace: int | None = None, profile: Any = (), b: Batch = b, mode: str = mode) -> None:
            with planned(device, **dict(profile)):
                took = lab.race({what: lambda: step(b, mode, workspace, impl)})[what]
                loss = None if mode == "late" else "sft"
                plan = explain(b.hidden, b.weight, b.targets, loss=loss, impl=impl, workspace=workspace)
            sizes = {"peak MiB": took.peak_mib, "schedule": plan.schedule, "rows a chunk": plan.chunk_rows}
            sizes |= {"columns a tile": plan.tile_cols, "note": took.note}
            lab.record(what, took.milliseconds, "ms", **sizes)

        for size in (2, 4, 8):
            measure(f"{mode}, {size} GiB", size * unit)
        for rows in (1024, 1152, 2048, 2304, 4096, 8192):
            chunks = dict(max_rows=rows, trained_rows=rows, frozen_rows=rows, workspace=8 * unit)
            measure(f"{mode}, {rows} rows a chunk", profile=chunks)
        if mode == "trained":
            measure(f"{mode}, not aliased", profile=dict(aliases=False))
        lab.free()
