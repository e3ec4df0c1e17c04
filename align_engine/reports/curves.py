"""Curves of runs as SVG pictures, with what a reader needs beside them: their points under the pointer, and words."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from align_engine.reports.report import COLOURS, GRID, INK, number

DASHES = ("solid", "dashed", "dotted", "dashdot")
POINTS = 300  # of a curve, under the pointer
FEW = 12  # points that are drawn as dots


class Series(NamedTuple):
    """One curve."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    dash: str


class Told(NamedTuple):
    """The legend of a metric: what it means, and how it went."""

    metric: str
    says: str
    courses: Sequence[str]


class Curve(NamedTuple):
    """A picture of a page."""

    title: str
    alt: str
    told: Sequence[Told]
    series: Sequence[Series]
    source: str  # of the img
    points: str  # JSON for the script that shows them


def styled(curves: Sequence[tuple[str, str, Sequence[float], Sequence[float]]]) -> list[Series]:
    """(run, metric, x, y) as curves: of one run each metric has a colour; of several each run has one, and each metric
    its dashes."""
    runs, metrics = ([*dict.fromkeys(one[i] for one in curves)] for i in (0, 1))
    found = []
    for run, metric, x, y in curves:
        which, dash = (runs.index(run), metrics.index(metric)) if len(runs) > 1 else (metrics.index(metric), 0)
        name = metric if len(runs) == 1 else run if len(metrics) == 1 else f"{run}, {metric}"
        dash += which // len(COLOURS)
        found.append(Series(name, x, y, COLOURS[which % len(COLOURS)], DASHES[dash % len(DASHES)]))
    return found


def curve(title: str, series: Sequence[Series], told: Sequence[Told], x_label: str = "step") -> Curve:
    """A picture of curves.

    Args:
        told: the picture's legend, and what is read out in its place.
        x_label: what their x is.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "align", "font.family": "sans-serif", "font.size": 10,
                "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}  # fmt: skip
    with matplotlib.rc_context(settings):
        canvas = Figure(figsize=(4.9, 2.9), layout="constrained")
        FigureCanvasSVG(canvas)
        axes = canvas.add_subplot()
        for one in series:
            marker = "o" if len(one.x) <= FEW else ""
            axes.plot(one.x, one.y, color=one.colour, linestyle=one.dash, marker=marker, linewidth=1.7, markersize=4)
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.grid(color=GRID, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#aab4c0")
        canvas.draw_without_rendering()  # settles the layout
        place, (first, last) = axes.get_position(), axes.get_xlim()
        text = io.StringIO()
        canvas.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    source = f"data:image/svg+xml;base64,{base64.b64encode(text.getvalue().encode()).decode()}"
    shown = {"label": x_label, "first": first, "last": last, "left": place.x0, "right": place.x1,
             "series": list(map(_shown, series))}  # fmt: skip
    words = [f"{one.metric}: {text}" for one in told for text in one.courses]
    return Curve(title, f"{title}. {' '.join(words)}", told, series, source, json.dumps(shown))


def _shown(one: Series) -> dict[str, Any]:
    step = max(1, -(-len(one.x) // POINTS))
    places = sorted({*range(0, len(one.x), step), len(one.x) - 1})
    points = [(one.x[i], number(float(one.y[i]))) for i in places]
    return {"name": one.name, "colour": one.colour, "points": points}
