"""Curves of a run as PNG, and a page that holds everything itself: pictures, tables, recipe."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

from align_engine import recipe as recipes
from align_engine.errors import visible
from align_engine.recipe.secrets import masked
from align_engine.reports.text import shown
from align_engine.training import metrics

if TYPE_CHECKING:
    from align_engine.training.checkpoint import RunFolder

INK, GRID, COLOURS = "#1c2733", "#e3e8ee", ("#2166ac", "#d6604d", "#4d9221", "#8073ac", "#b8860b")

PANELS: dict[str, tuple[str, tuple[str, ...]]] = {  # file name -> (title, metrics drawn in one picture)
    "reward": ("Reward of the sampled answers", ("reward", "eval_reward")),
    "loss": ("Loss", ("loss", "eval_loss")),
    "accuracies": ("Share of pairs ordered right",
                   ("rewards/accuracies", "eval_rewards/accuracies")),
    "margins": ("Reward margin, chosen minus rejected", ("rewards/margins", "eval_rewards/margins")),
    "rewards": ("Rewards", ("rewards/chosen", "rewards/rejected")),
    "logps": ("Log-probability of the answers", ("logps/chosen", "logps/rejected")),
    "token-accuracy": ("Share of tokens predicted first", ("mean_token_accuracy", "eval_mean_token_accuracy")),
    "entropy": ("Entropy in nats", ("entropy", "eval_entropy")),
    "kl": ("KL divergence from the reference", ("kl", "objective/kl")),
    "clipped": ("Share of clipped tokens", ("clip_ratio/region_mean", "policy/clipfrac_avg")),
    "values": ("Value loss", ("loss/value_avg",)),
    "lengths": ("Length of the sampled answers in tokens", ("completions/mean_length",)),
    "grad-norm": ("Gradient norm", ("grad_norm",)),
    "learning-rate": ("Learning rate", ("learning_rate",)),
    "throughput": ("Tokens per second", ("tokens_per_second",)),
}  # fmt: skip


class Table(NamedTuple):
    """A table of the page; the first column is a label, other columns are to the right unless they hold words."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]

    @property
    def prose(self) -> bool:
        """Whether it holds text that must wrap, rather than numbers to align."""
        return any(len(cell) > 30 for row in self.rows for cell in row if isinstance(cell, str))

    @property
    def words(self) -> list[bool]:
        """Of each column, whether it is aligned to the left: the first, and those with a text that begins as no number
        does."""
        return [
            place == 0 or any(isinstance(cell, str) and cell and cell[0] not in "0123456789+-.±" for cell in cells)
            for place, (_, *cells) in enumerate(zip_longest(self.header, *self.rows))
        ]


class Figure(NamedTuple):
    """A picture of the page."""

    title: str
    png: bytes


def line_chart(
    title: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], x_label: str = "step"
) -> Figure:
    """Curves by name, each (steps, values). A curve of few points is drawn with dots."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context({"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK,
                                "ytick.color": INK}):  # fmt: skip
        canvas = Canvas(figsize=(5.6, 3.3), dpi=144, layout="constrained")
        FigureCanvasAgg(canvas)
        axes = canvas.add_subplot()
        for colour, (name, (x, y)) in zip(COLOURS, curves.items()):
            style = "o-" if len(x) <= 12 else "-"
            axes.plot(x, y, style, color=colour, linewidth=1.7, markersize=4, label=name)
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=x_label == "step", nbins=6))
        axes.grid(color=GRID, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#aab4c0")
        if len(curves) > 1:
            axes.legend(frameon=False, fontsize=9)
        return Figure(title, _png(canvas))


def bar_chart(title: str, bars: dict[str, tuple[float, float]], y_label: str) -> Figure:
    """One bar per name, (height, half of its error bar), with the height written on it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(5.6, 3.3), dpi=144, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    heights, errors = zip(*bars.values())
    drawn = axes.bar(list(bars), heights, yerr=errors if any(errors) else None, color=COLOURS[0], width=0.55, capsize=4)
    if len(bars) > 4:
        axes.tick_params(axis="x", labelrotation=30)
    whole = all(isinstance(height, int) for height in heights)
    axes.bar_label(drawn, fmt="{:,.0f}" if whole else "{:.1f}", padding=4, color=INK, fontweight="bold")
    axes.set_ylim(0, 1.2 * max(*heights, 1e-9))
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#aab4c0")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return Figure(title, _png(canvas))


def scatter_chart(title: str, x: Sequence[float], y: Sequence[float], groups: Sequence[int]) -> Figure:
    """Points in a plane, without scales. Groups 0, 1, ... have a colour each as long as there are some, the rest are
    grey."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(5.6, 4.6), dpi=144, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.add_subplot()
    for group, colour in [(None, "#aab4c0"), *enumerate(COLOURS)]:
        own = [g >= len(COLOURS) if group is None else g == group for g in groups]
        if any(own):
            points = [(a, b) for a, b, mine in zip(x, y, own) if mine]
            axes.scatter(*zip(*points), s=9, color=colour, alpha=0.6, linewidths=0,
                         label="others" if group is None else str(group))  # fmt: skip
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color("#aab4c0")
    axes.legend(frameon=False, fontsize=9, markerscale=2)
    return Figure(title, _png(canvas))


def _png(canvas: Any) -> bytes:
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png")
    return buffer.getvalue()


def curves_of(records: list[dict[str, Any]], names: Sequence[str]) -> dict[str, tuple[list[float], list[float]]]:
    """The recorded points of each named metric; metrics without points, and points that are null, are left out."""
    points = {
        name: [(record["step"], record[name]) for record in records if record.get(name) is not None] for name in names
    }
    return {name: (list(x), list(y)) for name, found in points.items() if found for x, y in [zip(*found)]}


def run_figures(
    records: list[dict[str, Any]], prefix: str = "", panels: Iterable[str] = tuple(PANELS)
) -> dict[str, Figure]:
    """Those of the panels that the records have points for, by file name; `prefix` stands before their titles."""
    drawn = {name: curves_of(records, PANELS[name][1]) for name in panels}
    return {name: line_chart(prefix + PANELS[name][0], curves) for name, curves in drawn.items() if curves}


def page(
    title: str, lead: str, tables: Sequence[Table], figures: Sequence[Figure], details: Sequence[Table] = ()
) -> str:
    """An HTML page that needs no other file. `details` come folded at its end."""
    pictures = [(figure.title, base64.b64encode(figure.png).decode()) for figure in figures]
    template = templates().get_template("report.html.jinja")
    return template.render(title=title, lead=lead, tables=tables, figures=pictures, details=details)


def templates() -> Any:
    """The pages' templates, of this folder."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.PackageLoader("align_engine", "reports"), autoescape=True)
    environment.filters |= {"number": number, "shown": shown, "visible": visible}
    return environment


def number(value: Any) -> str:
    """A value as a reader wants it."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _finite(value: Any) -> Any:
    return "not finite" if value is None else value  # null in metrics.jsonl


def write_report(folder: RunFolder, algorithm: str, recipe: recipes.Recipe) -> None:
    """Write plots/*.png and report.html of a run from its metrics.jsonl."""
    records = metrics.read(folder.metrics)
    figures = run_figures(records)
    with folder.written("plots") as path:
        path.mkdir()
        for name, figure in figures.items():
            (path / f"{name}.png").write_bytes(figure.png)
    training = [record for record in records if "loss" in record or "reward" in record]
    training = training or [{"step": 0}]  # a callback may stop a run before its first step
    first, last = training[0], training[-1]
    names = [name for name in last if name not in ("step", "epoch")]
    numbers = [(name, *(_finite(record.get(name, "")) for record in (first, last))) for name in names]
    tables = [Table("Training", ("metric", f"step {first['step']}", f"step {last['step']}"), numbers)]
    if evaluated := [record for record in records if "eval_loss" in record]:
        rows = [(name, _finite(value)) for name, value in evaluated[-1].items() if name.startswith("eval_")]
        tables.append(Table("Evaluation", ("metric", f"step {evaluated[-1]['step']}"), rows))
    settings = Table("Recipe", ("setting", "value"), list(masked(recipes.flat(recipe)).items()))
    lead = f"{recipe.model.model_name_or_path} on {recipe.data.dataset_name}, {last['step']} steps."
    html = page(f"align {algorithm}: {folder.path.name}", lead, tables, list(figures.values()), [settings])
    with folder.written("report.html") as path:
        path.write_text(html, encoding="utf-8")
