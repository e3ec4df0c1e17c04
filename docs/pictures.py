"""Draws docs/pictures/*.svg.

python docs/pictures.py            # `make docs-pictures`
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.ticker import NullFormatter

sys.path.insert(0, str(Path(__file__).parents[1] / "benches"))
import figures

OUT = Path(__file__).parent / "pictures"
INK, FAINT, GRID = "#1c2733", "#6b7786", "#d5dbe3"
BLUE, RED, GREEN, VIOLET = "#2166ac", "#d6604d", "#4d9221", "#8073ac"
matplotlib.rcParams |= {
    "svg.hashsalt": "align", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10,
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
}  # fmt: skip


def canvas(width: float, height: float, columns: int = 1, **how: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, **how)


def bare(axes: Any, title: str, width: float, height: float) -> None:
    """Axes without scales, `width` x `height` units."""
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")


def box(axes: Any, x: float, y: float, w: float, h: float, colour: str, text: str = "", **how: Any) -> None:
    options = {"alpha": 0.25, "linewidth": 0} | how
    axes.add_patch(Rectangle((x, y), w, h, facecolor=colour, **options))
    axes.add_patch(Rectangle((x, y), w, h, facecolor="none", edgecolor=colour, linewidth=1.0))
    if text:
        axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=9)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=FAINT, linewidth=1.1))


def head() -> Figure:
    """Eager logits beside tiles."""
    figure, (left, right) = canvas(9, 3.5, 2)
    kept = [row for row in range(12) if row % 6 >= 3]  # of two sequences, prompt first
    for axes, title in ((left, "Eager"), (right, "align_kernels")):
        bare(axes, title, 16, 14.2)
        for row in range(12):
            box(axes, 0, 0.5 + row, 2.2, 0.9, BLUE if row in kept else FAINT, alpha=0.35 if row in kept else 0.1)
        axes.text(1.1, 13.6, "hidden, N x D", ha="center", fontsize=9)
    arrow(left, (2.5, 6.5), (4.1, 6.5))
    box(left, 4.3, 0.5, 8, 11.9, RED, "logits, N x V\nwritten, read, and kept\nfor the gradient", alpha=0.18)
    arrow(left, (12.5, 6.5), (14.1, 6.5))
    left.text(15.2, 6.5, "loss", ha="center", va="center")
    left.text(8.3, 13.6, "prompt and padding too", ha="center", fontsize=9, color=FAINT)
    for place, row in enumerate(kept):
        box(right, 4.3, 3.5 + place, 8, 0.9, BLUE, alpha=0.05)
        right.plot([2.25, 4.25], [0.95 + row, 3.95 + place], color=FAINT, linewidth=0.7)
    box(right, 5.9, 3.5, 1.5, 5.9, GREEN, alpha=0.5)
    right.text(5.9, 2.9, "a tile, in cache, moves along V", fontsize=9)
    arrow(right, (12.5, 6.5), (14.1, 6.5))
    right.text(15.7, 6.5, "loss,\ngradients", ha="center", va="center")
    right.text(4.4, 10.4, "kept rows alone; what waits for the loss\nlies where dW is about to be written", va="top",
               fontsize=9, color=FAINT)  # fmt: skip
    return figure


def schedules() -> Figure:
    """GEMM FLOPs by schedule."""
    figure, axes = canvas(7.5, 3.1)
    parts = {"logits": BLUE, "gradient of hidden": GREEN, "gradient of the head": VIOLET, "logits again": RED}
    bars = {
        "log-probs, no gradient": ("logits",),
        "head frozen": ("logits", "gradient of hidden"),
        "head trained: one pass, or kept": ("logits", "gradient of hidden", "gradient of the head"),
        "head trained, late, too large to keep": tuple(parts),
    }
    for place, pieces in enumerate(bars.values()):
        for start, piece in enumerate(pieces):
            axes.barh(place, 2, left=2 * start, color=parts[piece], height=0.6, edgecolor="white",
                      label=piece if len(pieces) == len(parts) else None)  # fmt: skip
        axes.text(2 * len(pieces) + 0.15, place, f"{2 * len(pieces)} NVD", va="center", fontweight="bold")
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlim(0, 9.2)
    axes.set_xlabel("FLOPs of the matrix products, in units of N V D")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5, ncols=4, loc="lower center", bbox_to_anchor=(0.3, 1.0), columnspacing=1.0)
    return figure


def tree() -> Figure:
    """A padded batch, the packed row of the same, and its attention."""
    figure, (left, right) = canvas(9, 4, 2, width_ratios=(1.25, 1))
    lengths = [("prompt A", 5, (3, 4)), ("prompt B", 3, (4, 2))]
    bare(left, "Padded: 4 rows, 36 places", 20.5, 14)
    row = 0.6
    for name, prompt, answers in lengths:
        for number, answer in enumerate(answers):
            box(left, 0, row, 2 * prompt, 1.3, BLUE, name)
            box(left, 2 * prompt, row, 2 * answer, 1.3, (GREEN, RED)[number], ("chosen", "rejected")[number])
            padding = 9 - prompt - answer
            if padding:
                box(left, 2 * (prompt + answer), row, 2 * padding, 1.3, FAINT, "padding" if padding > 1 else "")
            row += 1.6
    left.text(0, row + 1.4, "Packed: one row, 21 tokens, each prompt once", fontsize=11, fontweight="bold")
    at, scale = 0.0, 18 / 21
    segments = []
    for _, prompt, answers in lengths:
        root = len(segments)
        segments += [(prompt, BLUE, None), (answers[0], GREEN, root), (answers[1], RED, root)]
    for size, colour, _ in segments:
        box(left, at, row + 2.1, size * scale, 1.3, colour)
        at += size * scale
    starts = np.cumsum([0, *(size for size, _, _ in segments)])
    bare(right, "Who sees whom", 21.5, 23.5)
    right.add_patch(Rectangle((0, 0), 21, 21, facecolor=GRID, alpha=0.35))
    for number, (size, colour, parent) in enumerate(segments):
        begin = starts[number]
        for i in range(size):  # to the tokens of its own segment up to itself, and to all of the prompt's
            right.add_patch(Rectangle((begin, begin + i), i + 1, 0.9, facecolor=colour, alpha=0.75))
        if parent is not None:
            prompt, shade, _ = segments[parent]
            right.add_patch(Rectangle((starts[parent], begin), prompt, size - 0.1, facecolor=shade, alpha=0.75))
    right.text(10.5, 22.6, "a token (row) attends to the coloured tokens", ha="center", fontsize=9, color=FAINT)
    return figure


def compaction() -> Figure:
    """The probabilities of a block of rows, and the columns that it keeps."""
    random, mass = np.random.default_rng(3), 2.0**-5
    logits = random.normal(0, 0.7, (16, 60))
    for row in range(16):
        logits[row, random.choice((4, 11, 17, 30, 47, 48, 52), random.integers(1, 4), replace=False)] += 8
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    sizes = (mass / 2**halving for halving in range(9))
    kept = next(columns for eps in sizes if (p * ~(columns := (p >= eps).any(0))).sum(1).max() <= mass)
    figure, axes = canvas(8, 2.9)
    axes.imshow(np.where(kept, p, np.nan) ** 0.5, cmap="Blues", aspect="auto", vmin=0, vmax=0.9)
    axes.imshow(np.where(kept, np.nan, p) ** 0.5, cmap="Greys", aspect="auto", vmin=0, vmax=2.5)
    for column in np.flatnonzero(kept):
        axes.add_patch(Rectangle((column - 0.5, -0.5), 1, 16, facecolor="none", edgecolor=BLUE, linewidth=1.2))
    title = (
        f"A block of 16 rows: {kept.sum()} of 60 columns kept, at most {(p * ~kept).sum(1).max():.1%} of a row left out"
    )
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel("columns of the vocabulary")
    axes.set_ylabel("rows (tokens)")
    axes.set_xticks([])
    axes.set_yticks([])
    return figure


def clamp() -> Figure:
    """The residual under the clamp, and the factor of the gate."""
    figure, (left, right) = canvas(8.5, 3, 2)
    p = np.linspace(0, 1, 401)
    left.plot(p, 1 - p, color=FAINT, linestyle="--", label="target: 1 - p")
    left.plot(p, np.minimum(1 - p, 0.6), color=BLUE, label="clamped at 0.6")
    left.plot(p, -p, color=FAINT, linestyle=":", label="others: 0 - p")
    left.plot(p, np.maximum(-p, -0.6), color=RED, label="clamped at -0.6")
    left.set_title("LogitGradClamp(0.6)", loc="left", fontsize=11, fontweight="bold")
    left.set_ylabel("what a logit receives, by g")
    for power, colour in ((math.inf, BLUE), (1, GREEN), (2, VIOLET)):
        above = np.zeros_like(p) if math.isinf(power) else ((1 - p) / 0.2) ** power
        right.plot(p, np.where(p > 0.8, above, 1.0), color=colour, label=f"power {power}")
    right.set_title("ProbGate(0.8, power)", loc="left", fontsize=11, fontweight="bold")
    right.set_ylabel("factor of a token's gradient")
    for axes in (left, right):
        axes.set_xlabel("probability p")
        axes.grid(color=GRID, linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8.5)
    return figure


def bars(key: Callable[[dict[str, Any]], float | None], label: str, number: str, **scale: Any) -> Figure:
    """A panel for the last group of each question of benches/results/bench.json, a bar for each method."""
    run = figures.read(figures.RESULT)
    groups = [found[-1] for what in figures.WHATS if (found := figures.groups_of(run, what))]
    figure = Figure(figsize=(5.5, 2.1 * len(groups)), layout="constrained")  # narrow, for a phone
    for place, group in enumerate(groups):
        axes = figure.add_subplot(len(groups), 1, place + 1)
        ours = run.groups[group][figures.OURS]
        values = {method: key(one | {"ours": ours}) for method, one in run.groups[group].items()}
        order = sorted((m for m, value in values.items() if value is not None), key=lambda m: values[m])
        for y, method in enumerate(order):
            mine = method.startswith(figures.OURS)
            colour = BLUE if mine else FAINT if method == figures.GEMMS else RED
            axes.barh(y, values[method], color=colour, height=0.65, alpha=0.9 if mine else 0.55)
            axes.text(values[method], y, f" {values[method]:{number}}", va="center", fontsize=8)
        axes.set_yticks(range(len(order)), order, fontsize=8)
        axes.invert_yaxis()
        axes.set(**scale)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params("x", labelsize=8)
        axes.margins(x=0.18)
        axes.set_title(group, loc="left", fontsize=9, fontweight="bold")
        axes.set_xlabel(label, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def bench_time() -> Figure:
    return bars(lambda one: one["seconds"] / one["ours"]["seconds"], "time over that of align_kernels", ".2f")


def bench_memory() -> Figure:
    known = lambda one: max(one["peak_mb"], 1.0) if one["errors"] else None  # noqa: E731
    return bars(known, "peak MB above inputs and gradients", ",.0f", xscale="log")


PICTURES: dict[str, Callable[[], Figure]] = {
    "head": head, "schedules": schedules, "tree": tree, "compaction": compaction, "clamp": clamp,
    "bench_time": bench_time, "bench_memory": bench_memory,
}  # fmt: skip


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        draw().savefig(OUT / f"{name}.svg", metadata={"Date": None})
        print(OUT / f"{name}.svg")
