"""Pictures of the assessments' pages."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping
from typing import Any

from numpy.typing import ArrayLike

from align_engine.assessment.intervals import Estimate
from align_engine.reports.report import COLOURS, GRID, INK, Figure

EDGE = "#aab4c0"


def _axes(title: str, height: float = 2.8) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(4.6, height), dpi=175, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    axes.set_title("\n".join(textwrap.wrap(title, 48)), loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(EDGE)
    axes.tick_params(colors=INK, labelsize=9)
    axes.set_axisbelow(True)
    return canvas, axes


def dots(title: str, found: Mapping[str, Estimate], line: tuple[float, str] | None = None) -> Figure:
    """A dot with its interval for each name, the first on top; shares on a scale from 0 to 1.

    Args:
        line: where a dashed line stands, and what it means. Default None: nowhere.
    """
    canvas, axes = _axes(title, 1.3 + 0.36 * max(len(found), 2))
    for place, (_, one) in enumerate(found.items()):
        low, high = one.interval or (one.value, one.value)
        axes.plot([low, high], [place, place], color=COLOURS[0], linewidth=1.7, solid_capstyle="butt")
        axes.plot(one.value, place, "o", color=COLOURS[0], markersize=6)
        axes.annotate(f"{one.value:.3g}", (one.value, place), (0, 6), textcoords="offset points", ha="center",
                      fontsize=8, color=INK)  # fmt: skip
    axes.set_yticks(range(len(found)), [_short(name) for name in found])
    axes.set_ylim(len(found) - 0.4, -0.7)
    if all(0 <= one.value <= 1 for one in found.values()):
        axes.set_xlim(-0.04, 1.04)
    else:
        axes.margins(x=0.12)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    if line is not None:
        axes.axvline(line[0], color=COLOURS[1], linewidth=1.2, linestyle="--", label=line[1])
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return Figure(title, _png(canvas))


def histogram(
    title: str, x_label: str, groups: Mapping[str, ArrayLike], ends: tuple[float, float] | None = None
) -> Figure:
    """How often values occur in each group, as shares of it; `ends` of the scale. Default None: those of the values."""
    import numpy as np

    canvas, axes = _axes(title)
    arrays = {name: np.asarray(values, float) for name, values in groups.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(arrays.values())), 24, ends)
    for colour, (name, values) in zip(COLOURS, arrays.items()):
        weights = np.full(len(values), 1 / max(len(values), 1))
        axes.hist(values, edges, weights=weights, color=colour, alpha=0.55, label=name)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel("share", color=INK)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.legend(frameon=False, fontsize=9)
    return Figure(title, _png(canvas))


def points(title: str, x_label: str, y_label: str, groups: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> Figure:
    """(x, y) of each group."""
    canvas, axes = _axes(title)
    for colour, (name, (x, y)) in zip(COLOURS, groups.items()):
        axes.scatter(x, y, s=12, color=colour, alpha=0.6, linewidths=0, label=name)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.legend(edgecolor="none", fontsize=9)  # on white: there are points below
    return Figure(title, _png(canvas))


def _png(canvas: Any) -> bytes:
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png")
    return buffer.getvalue()


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"...{name[3 - most :]}"
