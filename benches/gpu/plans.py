"""What the planner chooses between, on the 7B head at 8192 rows: workspace and rows per chunk.

With a workspace that holds all logits a gradient that comes late finds them kept, else they are made again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from common import Lab
from heads import made
from questions import Batch, Question

from align_kernels import explain, linear_logprobs, sft_loss
from align_kernels.schedules import waves

GIB = 1 << 30
MODES = {"frozen": ("sft", False), "trained": ("sft", True), "late": ("gradient", True)}


@contextmanager
def chunks_of(rows: int) -> Iterator[None]:
    """Chunks of so many rows, whatever the planner thinks of them."""
    before = waves.chunk_rows
    waves.chunk_rows = lambda head, n, least, most: max(min(rows, n, most), 1)
    try:
        yield
    finally:
        waves.chunk_rows = before


def step(b: Batch, mode: str, workspace: int | None, impl: str) -> None:
    b.forget()
    if mode == "late":
        linear_logprobs(b.hidden, b.weight, b.targets, impl=impl, workspace=workspace).logp.backward(b.g)
    else:
        sft_loss(b.hidden, b.weight, b.targets, impl=impl, workspace=workspace).loss.backward()


def plans(lab: Lab) -> None:
    impl = "torch" if lab.dry else "triton"
    unit = 1 << 12 if lab.dry else GIB
    for mode, (what, trained) in MODES.items():
        _, b = made(lab, Question(what, "Qwen2.5-7B", 8192, trained, dtype="bfloat16"))

        def measure(what: str, workspace: int, chunks: Any = None, b: Batch = b, mode: str = mode) -> None:
            with chunks or nullcontext():
                took = lab.race({what: lambda: step(b, mode, workspace, impl)})[what]
                loss = None if mode == "late" else "sft"
                plan = explain(b.hidden, b.weight, b.targets, loss=loss, impl=impl, workspace=workspace)
            sizes = {"peak MiB": took.peak_mib, "schedule": plan.schedule, "rows a chunk": plan.chunk_rows}
            sizes |= {"columns a tile": plan.tile_cols, "note": took.note}
            lab.record(what, took.milliseconds, "ms", **sizes)

        for size in (2, 4, 8):
            measure(f"{mode}, {size} GiB", size * unit)
        for rows in (1024, 1152, 2048, 2304, 3584, 4096, 8192):
            measure(f"{mode}, {rows} rows a chunk", 8 * unit, chunks_of(rows))
        lab.free()
