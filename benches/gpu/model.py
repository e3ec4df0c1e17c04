"""Writes docs/gpu_plans.md: what the planner chooses on an H100 and an H200, and how long a model says that it takes.

    PYTHONPATH=kernels python benches/gpu/model.py

Nothing in it is measured. GEMMs take waves of tiles (align_kernels/schedules/waves.py); the kernels between them take
their bytes at the card's bandwidth or their instructions, whichever is longer; dX is read and written again with each
tile but the first, dW once more to become 16 bits, and where the loss is fused once more to meet its upstream gradient.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

from align_kernels.schedules import waves
from align_kernels.schedules.plan import plan
from align_kernels.schedules.request import BLOCK_ROWS_GPU, Plan, Request

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
CLOCK = 1.755e9
# cycles of a tile of the forward without logits: a column of D, an instruction a logit of its epilogue, its filling.
# A multiprocessor at its peak takes 16 a column; so many make 572 TFLOP/s of the epilogue before, as was estimated
A_COLUMN, AN_INSTRUCTION, FILLING = 23.3, 413, 1500
EPILOGUE = (23.8, 11.9)  # instructions a logit, before and after (gpu_registers.md)
# seconds a chunk of 4096 rows: programs of 32 rows were fewer than multiprocessors, and waited for their loads in turn;
# those of 8 read 24 bytes for each 128 logits of a row at the card's bandwidth
MERGE = 0.125e-3


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


def forward(rows: int, V: int, D: int, card: Card, now: bool) -> dict[str, float]:
    """Seconds of each part of the forward without logits."""
    tiles = -(-rows // waves.ROWS) * -(-V // waves.COLUMNS)
    rounds = -(-tiles // waves.PROCESSORS) / CLOCK
    chunks = -(-rows // 4096)
    return {
        "matrix product": rounds * (A_COLUMN * D + FILLING),
        "its epilogue": rounds * AN_INSTRUCTION * EPILOGUE[now],
        "merge": rows * V / 128 * 24 / card.bandwidth if now else chunks * MERGE,
    }


PEAKED = 0.05  # of the columns of a block, which rows that are peaked keep
LAUNCH, WAIT = 5e-6, 20e-6  # seconds
# times a block that is compacted, and a chunk beside its blocks (tests/kernels/test_block_launches.py)
LAUNCHED, WAITED = 42, 2
LAUNCHED_A_CHUNK, WAITED_A_CHUNK = 72, 2
CUT = 0.11e-3  # seconds in which a CPU cuts the rows of two blocks from each other (docs/LOG.md)


def chunks_of(name: str, rows: int, card: Card) -> list[int]:
    """Rows of each chunk of a trained head with `drop_mass`."""
    size = plan(dataclasses.replace(request(name, rows, "trained", card), drop_mass=2**-8)).chunk_rows
    return [min(size, rows - begin) for begin in range(0, rows, size)]


def product(rows: int, V: int, D: int) -> float:
    """Seconds of one GEMM over all logits, every multiprocessor busy."""
    return 2 * rows * V * D / (waves.FLOPS * waves.PROCESSORS)


def peaked(name: str, rows: int, card: Card) -> dict[str, float]:
    """Seconds of each part of a trained head whose rows keep PEAKED of their columns, in blocks of BLOCK_ROWS_GPU."""
    V, D = HEADS[name]
    chunks = chunks_of(name, rows, card)
    blocks = sum(-(-size // BLOCK_ROWS_GPU) for size in chunks)
    return {
        "logits": waves.FLOAT32 * product(rows, V, D),
        "their softmax": kernel(rows * V, 4, 27, card),
        "columns looked at": kernel(rows * V, 4, 20, card),
        # then its levels put in order, compared and folded into pieces
        "a sample of them": kernel(rows * V // 16, 5, 66, card) + rows * V / 16 * 5 / card.bandwidth,
        # 27 bytes of its sector of 32, where columns lie at random; written, read by the exact sums and by the gradient
        "logits gathered": PEAKED * rows * V * (27 + 4 + 4 + 6) / card.bandwidth,
        "products over the columns": 2 * PEAKED * product(rows, V, D),
        # W read, written and read; rows of dW written, read, and written where they belong
        "columns gathered": blocks * PEAKED * V * D * (3 * 2 + 3 * 4) / card.bandwidth,
        # a sum is read by the next block that reaches it, or when it is narrowed
        "dW added to and narrowed": (blocks * PEAKED * 4 + 2) * V * D / card.bandwidth,
        "launches and waits": blocks * (LAUNCHED * LAUNCH + WAITED * WAIT)
        + len(chunks) * (LAUNCHED_A_CHUNK * LAUNCH + WAITED_A_CHUNK * WAIT),
        "rows cut into blocks": blocks / 2 * CUT,
    }


def milliseconds(
    name: str, rows: int, mode: str, card: Card, made: tuple[str, int, int, int, int], one_pass: bool
) -> float:
    schedule, chunk, first, columns, passes = made
    V, D = HEADS[name]
    if mode == "forward":
        return 1e3 * sum(forward(rows, V, D, card, one_pass).values())
    trained = mode in ("trained", "late")
    head = waves.Head(V, D, passes - 1 - trained, True, trained)
    taken = waves.seconds(head, first, True) if first != chunk else 0.0
    taken += waves.total(head, rows - first * (first != chunk), chunk) if rows > first or first == chunk else 0.0
    taken += between(schedule, rows * V, card, one_pass)
    taken += (-(-V // columns) - 1) * 8 * rows * D / card.bandwidth
    if trained:
        taken += (6 if one_pass else 6 + 4 * (mode == "trained")) * V * D / card.bandwidth  # an upstream gradient of 1
    return 1e3 * taken


def of(made: Plan) -> tuple[str, int, int, int, int]:
    return made.schedule, made.chunk_rows, made.first_rows, made.tile_cols, made.passes


def predicted(name: str, rows: int, mode: str, card: str) -> tuple[Plan, float, float]:
    """The plan, its milliseconds, and those of the plan before."""
    made = plan(request(name, rows, mode, CARDS[card]))
    before = BEFORE.get((name, rows, mode), of(made))
    now, then = (milliseconds(name, rows, mode, CARDS[card], *x) for x in ((of(made), True), (before, False)))
    return made, now, then


# -- with an epilogue of our own (epilogue.py) ---------------------------------------------------------------------
TILE = 192  # columns of its tiles
SUMS = 6 * 4  # bytes that it leaves of a row and tile
CHOOSING = 16  # launches a block whose columns are chosen on the device: as many as it keeps is a constant
WITH_EPILOGUE = (*MODES, "peaked")  # peaked: a trained head whose rows keep PEAKED of their columns


def with_epilogue(rows: int, V: int, D: int, card: Card, mode: str) -> dict[str, float]:
    """Seconds of each part. The epilogue of a tile takes place beside the product of another."""
    rounds = -(-(-(-rows // waves.ROWS) * -(-V // TILE)) // waves.PROCESSORS)
    in_waves = lambda m, k, n: 2 * k * waves.waves(m, n, waves.PROCESSORS) * waves.ROWS * waves.COLUMNS / waves.FLOPS  # noqa: E731
    parts = {
        "exponentials and their sums": 2 * D * rounds * waves.ROWS * TILE / waves.FLOPS,
        "references, sums read": (4 * rows * D + 2 * SUMS * rows * V / TILE) / card.bandwidth,
    }
    if mode == "peaked":
        blocks = -(-rows // BLOCK_ROWS_GPU)
        parts["columns looked at"] = 2 * rows * V / card.bandwidth
        parts["products over the columns"] = 2 * PEAKED * product(rows, V, D)
        # W read, written and read; dW written, read, read, added to and written
        parts["columns gathered"] = blocks * PEAKED * V * D * (3 * 2 + 5 * 4) / card.bandwidth
        parts["dW cleared and narrowed"] = (4 + 6) * V * D / card.bandwidth
        parts["launches"] = blocks * CHOOSING * LAUNCH
    if mode in ("frozen", "trained", "late"):
        parts["dX"] = in_waves(rows, V, D)
    if mode in ("trained", "late"):
        parts |= {"dW": in_waves(V, rows, D), "dW narrowed": 6 * V * D / card.bandwidth}
    return parts


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
    return "\n".join([*lines, *parts("Qwen2.5-7B", 8192), *experiment("Qwen2.5-7B", 8192)]) + "\n"


def experiment(name: str, rows: int) -> list[str]:
    """The same call with the epilogue, part by part, and all of it beside what is shipped."""
    sizes = rows, *HEADS[name]
    of = {mode: with_epilogue(*sizes, CARDS["H100"], mode) for mode in WITH_EPILOGUE}
    shipped = {mode: predicted(name, rows, mode, "H100")[1] for mode in MODES}
    shipped["peaked"] = 1e3 * sum(peaked(name, rows, CARDS["H100"]).values())
    lines = {part: [f"{1e3 * of[mode][part]:.2f}" if part in of[mode] else "" for mode in of]
             for part in dict.fromkeys(part for parts in of.values() for part in parts)}  # fmt: skip
    for card in CARDS:
        all_of = [1e3 * sum(with_epilogue(*sizes, CARDS[card], mode).values()) for mode in of]
        lines[f"all, {card}"] = [f"{ms:.1f}" for ms in all_of]
    lines["without it, H100"] = [f"{shipped[mode]:.1f}" for mode in of]
    return [
        "",
        "## With an epilogue of our own",
        "",
        f"{name}, {rows} rows, milliseconds on an H100: an experiment (`benches/gpu/epilogue.py`) that no backend has,",
        "in which the product itself writes exponentials in 16 bits, their sums and the target's logit.",
        "",
        f"| part | {' | '.join(of)} |",
        f"|---{'|---' * len(of)}|",
        *(f"| {part} | {' | '.join(cells)} |" for part, cells in lines.items()),
    ]


def parts(name: str, rows: int) -> list[str]:
    """What the goals of a forward and of peaked rows meet, part by part."""
    lines = [
        "",
        "## Part by part",
        "",
        f"{name}, {rows} rows, milliseconds. Peaked: a trained head with `drop_mass`, whose",
    ]
    lines += [f"blocks of {BLOCK_ROWS_GPU} rows keep {PEAKED:.0%} of the columns."]
    for title, terms in (("forward", lambda card: forward(rows, *HEADS[name], card, True)),
                         ("peaked", lambda card: peaked(name, rows, card))):  # fmt: skip
        of = {card: terms(CARDS[card]) for card in CARDS}
        lines += ["", f"| {title} | {' | '.join(CARDS)} |", "|---|---|---|"]
        for part in of["H100"]:
            lines.append(f"| {part} | {' | '.join(f'{1e3 * of[card][part]:.2f}' for card in CARDS)} |")
        lines.append(f"| all | {' | '.join(f'{1e3 * sum(of[card].values()):.1f}' for card in CARDS)} |")
    return lines


if __name__ == "__main__":
    PAGE.write_text(page())
