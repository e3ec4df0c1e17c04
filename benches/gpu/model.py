"""Writes docs/gpu_plans.md: what the planner chooses on an H100 and an H200, and how long a model says that it takes.

    PYTHONPATH=kernels python benches/gpu/model.py

Nothing in it is measured. GEMMs take waves of tiles (align_kernels/schedules/waves.py); the kernels between them take
their bytes at the card's bandwidth or their instructions, whichever is longer; dX is read and written again with each
tile but the first, dW once more to become 16 bits, and where the loss is fused once more to meet its upstream gradient.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from align_kernels.schedules import waves
from align_kernels.schedules.plan import plan
from align_kernels.schedules.request import Plan, Request

PAGE = Path(__file__).parents[2] / "docs" / "gpu_plans.md"
HEADS = {
    "Qwen2.5-7B": (152064, 3584),
    "Llama-3-8B": (128256, 4096),
    "Qwen2.5-0.5B": (151936, 896),
    "Gemma-2-2B": (256000, 2304),
}
ROWS = (2048, 8192, 32768)
MODES = ("forward", "frozen", "trained", "late")
THREADS = 128 * 132 * 1.755e9 * 0.75  # instructions a second, at three quarters of the peak
ON_CHIP = (572e12, 610e12)  # FLOP a second of the forward without logits, before and after
MERGE = 0.25e-3


class Card(NamedTuple):
    memory: int  # bytes
    bandwidth: float  # bytes a second


CARDS = {"H100": Card(85 * 10**9, 3.0e12), "H200": Card(150 * 10**9, 4.3e12)}

# schedule, rows of a chunk, of the first one, columns of a tile and GEMMs as they were before exponentials in 16 bits,
# of either card: a workspace of 2 GiB, and a first chunk in the memory of dW
BEFORE = {
    ("Qwen2.5-7B", 2048, "frozen"): ("frozen", 1024, 1024, 152064, 2),
    ("Qwen2.5-7B", 2048, "trained"): ("one pass", 512, 2048, 32768, 3),
    ("Qwen2.5-7B", 2048, "late"): ("keep", 2048, 2048, 152064, 3),
    ("Qwen2.5-7B", 8192, "frozen"): ("frozen", 1024, 1024, 152064, 2),
    ("Qwen2.5-7B", 8192, "trained"): ("one pass", 2278, 5967, 11200, 3),
    ("Qwen2.5-7B", 8192, "late"): ("recompute", 4096, 4096, 87360, 4),
    ("Qwen2.5-7B", 32768, "frozen"): ("frozen", 1024, 1024, 152064, 2),
    ("Qwen2.5-7B", 32768, "trained"): ("one pass", 2647, 5967, 11200, 3),
    ("Qwen2.5-7B", 32768, "late"): ("recompute", 4096, 4096, 87360, 4),
    ("Llama-3-8B", 2048, "frozen"): ("frozen", 1024, 1024, 128256, 2),
    ("Llama-3-8B", 2048, "trained"): ("one pass", 512, 2048, 32768, 3),
    ("Llama-3-8B", 2048, "late"): ("keep", 2048, 2048, 128256, 3),
    ("Llama-3-8B", 8192, "frozen"): ("frozen", 1024, 1024, 128256, 2),
    ("Llama-3-8B", 8192, "trained"): ("one pass", 2016, 6842, 9792, 3),
    ("Llama-3-8B", 8192, "late"): ("recompute", 4096, 4096, 87360, 4),
    ("Llama-3-8B", 32768, "frozen"): ("frozen", 1024, 1024, 128256, 2),
    ("Llama-3-8B", 32768, "trained"): ("one pass", 3139, 6925, 9664, 3),
    ("Llama-3-8B", 32768, "late"): ("recompute", 4096, 4096, 87360, 4),
    ("Qwen2.5-0.5B", 2048, "frozen"): ("frozen", 1024, 1024, 151936, 2),
    ("Qwen2.5-0.5B", 2048, "trained"): ("one pass", 512, 2048, 32768, 3),
    ("Qwen2.5-0.5B", 2048, "late"): ("keep", 2048, 2048, 151936, 3),
    ("Qwen2.5-0.5B", 8192, "frozen"): ("frozen", 1024, 1024, 151936, 2),
    ("Qwen2.5-0.5B", 8192, "trained"): ("one pass", 2650, 3430, 19520, 3),
    ("Qwen2.5-0.5B", 8192, "late"): ("recompute", 4096, 4096, 87360, 4),
    ("Qwen2.5-0.5B", 32768, "frozen"): ("frozen", 1024, 1024, 151936, 2),
    ("Qwen2.5-0.5B", 32768, "trained"): ("one pass", 2650, 3430, 19520, 3),
    ("Qwen2.5-0.5B", 32768, "late"): ("recompute", 4096, 4096, 87360, 4),
    ("Gemma-2-2B", 2048, "frozen"): ("frozen", 1024, 1024, 256000, 2),
    ("Gemma-2-2B", 2048, "trained"): ("one pass", 512, 2048, 32768, 3),
    ("Gemma-2-2B", 2048, "late"): ("recompute", 2048, 2048, 174720, 4),
    ("Gemma-2-2B", 8192, "frozen"): ("frozen", 1024, 1024, 256000, 2),
    ("Gemma-2-2B", 8192, "trained"): ("one pass", 1572, 3713, 18048, 3),
    ("Gemma-2-2B", 8192, "late"): ("recompute", 4096, 4096, 87360, 4),
    ("Gemma-2-2B", 32768, "frozen"): ("frozen", 1024, 1024, 256000, 2),
    ("Gemma-2-2B", 32768, "trained"): ("one pass", 1572, 3713, 18048, 3),
    ("Gemma-2-2B", 32768, "late"): ("recompute", 4096, 4096, 87360, 4),
}


def request(name: str, rows: int, mode: str, card: Card) -> Request:
    (V, D), head = HEADS[name], mode in ("trained", "late")
    return Request(
        rows=rows, vocab=V, width=D, itemsize=4, gradient_itemsize=2, on_chip=20 / 128, device="cuda",
        backend="triton", memory=card.memory, processors=waves.PROCESSORS, needs_input=mode != "forward",
        needs_head=head, needs_weight=head, late=mode in ("late", "frozen"), plain=True,
    )  # fmt: skip


def kernel(logits: int, size: int, instructions: float, card: Card) -> float:
    """Seconds of a row kernel that moves `size` bytes a logit."""
    return logits * max(size / card.bandwidth, instructions / THREADS)


def between(schedule: str, logits: int, card: Card, one_pass: bool) -> float:
    """Seconds of the kernels between the GEMMs."""
    if one_pass and schedule != "recompute":
        return kernel(logits, 6, 13.5, card)
    return kernel(logits, 4, 27, card) + kernel(logits, 6, 35, card)


def milliseconds(
    name: str, rows: int, mode: str, card: Card, made: tuple[str, int, int, int, int], one_pass: bool
) -> float:
    schedule, chunk, first, columns, passes = made
    V, D = HEADS[name]
    if mode == "forward":
        return 1e3 * (2 * rows * V * D / ON_CHIP[one_pass] + MERGE)
    trained = mode in ("trained", "late")
    head = waves.Head(V, D, passes - 1 - trained, True, trained)
    taken = waves.seconds(head, first, True) if first != chunk else 0.0
    taken += waves.total(head, rows - first * (first != chunk), chunk) if rows > first or first == chunk else 0.0
    taken += between(schedule, rows * V, card, one_pass)
    taken += (-(-V // columns) - 1) * 8 * rows * D / card.bandwidth
    if trained:
        taken += (6 + 4 * (mode == "trained")) * V * D / card.bandwidth
    return 1e3 * taken


def of(made: Plan) -> tuple[str, int, int, int, int]:
    return made.schedule, made.chunk_rows, made.first_rows, made.tile_cols, made.passes


def predicted(name: str, rows: int, mode: str, card: str) -> tuple[Plan, float, float]:
    """The plan, its milliseconds, and those of the plan before."""
    made = plan(request(name, rows, mode, CARDS[card]))
    before = BEFORE.get((name, rows, mode), of(made))
    now, then = (milliseconds(name, rows, mode, CARDS[card], *x) for x in ((of(made), True), (before, False)))
    return made, now, then


def page() -> str:
    lines = [
        "# Plans of a GPU",
        "",
        "Written by `make gpu-plans`: what the planner chooses, and how long a model of the card says that it takes.",
        "**Nothing here is measured.** Before: the plans and kernels without exponentials in 16 bits, with 2 GiB of",
        "workspace; now it is a twentieth of the card. GEMMs at 730 TFLOP/s in whole waves of 132 multiprocessors,",
        "row kernels by their bytes (3.0 and 4.3 TB/s) or instructions. Trained: the loss is fused; late: log-probs",
        "whose gradient comes later; chunks of so many rows in tiles of so many columns.",
        "",
        "| head | rows | mode | card | schedule | chunk | waves of dX | tile | workspace, GB | NVD | ms | before |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (_, D) in HEADS.items():
        for rows in ROWS:
            for mode in MODES:
                for card in CARDS:
                    made, now, then = predicted(name, rows, mode, card)
                    tiles = -(-made.chunk_rows // waves.ROWS) * -(-D // waves.COLUMNS) / waves.PROCESSORS
                    cells = [name, rows, mode, card, made.schedule, made.chunk_rows, f"{tiles:.2f}", made.tile_cols]
                    cells += [f"{made.workspace / 1e9:.2f}", 2 * made.passes, f"{now:.1f}", f"{then:.1f}"]
                    lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
