"""What runs did, as tables and curves of `align report`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from align_engine.recipe import RECIPES, flat
from align_engine.reports import legend
from align_engine.reports.curves import Curve, Told, curve, styled
from align_engine.reports.history import History, Record, evaluated
from align_engine.reports.report import PANELS, Table, curves_of, number

NOTHING = "-"
PLACES = ("output_dir", "overwrite")  # settings that every run has others of
CONTENTS = ("data", "eval data")  # hashes in a run's identity, besides those of files
CURVES = "Under the pointer, or by the arrow keys, each curve says its numbers."
WARNED = "Metrics out of bounds, by the rules that a run warns by; each is said once."
UNKNOWN = "Of a task that is measured, a callback, or a plugin."
HEADLINE = ("reward", "eval_reward", "loss", "eval_loss", "rewards/accuracies", "eval_rewards/accuracies", "accuracy",
            "eval_accuracy", "mean_token_accuracy", "eval_mean_token_accuracy", "kl", "objective/kl",
            "completions/mean_length")  # fmt: skip
BY_ROUND = ("reward", "rewards/chosen", "rewards/rejected", "pairs", "frac_tied")
LEVEL = 0.1  # share of a curve's height that is no change


class Lines(NamedTuple):
    """Lines of a run's metrics, by steps or by rounds."""

    run: str
    method: str  # that wrote them
    records: list[Record]


def overview(runs: Sequence[History]) -> Table:
    """What each run is, where it stands, and its last numbers."""
    rows: list[tuple[str, list[Any]]] = [
        ("method", [run.method for run in runs]),
        *((name, [text(run.settings.get(setting)) for run in runs]) for name, setting in (
            ("model", "model_name_or_path"), ("data", "dataset_name"), ("scorers", "reward_funcs"))),
        ("state", [run.state for run in runs]),
        ("epochs", [last(run.training, "epoch") for run in runs]),
        ("tokens read", [_whole(last(run.training, "num_tokens")) for run in runs]),
        ("tokens per second, median", [_median(run.training, "tokens_per_second") for run in runs]),
        ("peak memory, MiB", [_whole(last(run.training, "peak_memory_mib")) for run in runs]),
        *((f"last {name}", [last(run.records if run.method == "iterate" else run.training + run.evaluations, name)
                            for run in runs]) for name in HEADLINE),
    ]  # fmt: skip
    return Table("Runs", ("what", *(run.name for run in runs)),
                 [(name, *values) for name, values in rows if any(value != NOTHING for value in values)])  # fmt: skip


def text(value: Any) -> str:
    """A setting in a cell."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or NOTHING
    return NOTHING if value in (None, "") else number(value)


def last(records: Sequence[Record], name: str) -> Any:
    """The last number of a metric."""
    return next((one[name] for one in reversed(records) if one.get(name) is not None), NOTHING)


def _whole(value: Any) -> Any:
    return value if value == NOTHING else round(value)


def _median(records: Sequence[Record], name: str) -> Any:
    found = [one[name] for one in records if one.get(name) is not None]
    return statistics.median(found) if found else NOTHING


def warned(runs: Sequence[History]) -> list[Table]:
    """What is said of metrics out of bounds."""
    rows = [(run.name, step, said) for run in runs for step, said in run.warned()]
    return [Table("Warnings", ("run", "step", "warning"), rows)] if rows else []


def differing(runs: Sequence[History]) -> list[dict[str, Any]]:
    """The settings, and contents of files, that are not the same in all runs: {"setting": name, run: value, ...}."""
    each = [_decided(run) for run in runs]
    names = dict.fromkeys(name for one in each for name in one)
    return [
        {"setting": name} | {run.name: one.get(name) for run, one in zip(runs, each)}
        for name in names
        if len({repr(one.get(name)) for one in each}) > 1
    ]


def _decided(run: History) -> dict[str, Any]:
    """All that decides what a run computes: its method, its settings, and short hashes of what it read."""
    hashes = {name: value for name, value in run.identity.items() if name in CONTENTS or name.startswith("files of ")}
    settings = {name: value for name, value in run.settings.items() if name not in PLACES}
    return {"method": run.method, **settings, **{f"contents: {name}": value for name, value in hashes.items()}}


def differ_text(runs: Sequence[History]) -> str:
    """What the table of differences compares."""
    return "Settings, and contents of what was read." if len(runs) > 1 else "Settings other than the method's defaults."


def differences(runs: Sequence[History]) -> list[Table]:
    """Between the runs; of a single run, between it and its method's defaults."""
    names = [run.name for run in runs]
    if len(runs) > 1:
        rows = [[text(value) for value in one.values()] for one in differing(runs)]
        header = ("setting", *names)
    else:
        usual = flat(RECIPES[runs[0].method]()) if runs[0].method in RECIPES else {}
        rows = [
            [name, text(value), text(usual.get(name))]
            for name, value in runs[0].settings.items()
            if name not in PLACES and value != usual.get(name)
        ]
        header = ("setting", names[0], "default")
    return [Table("What differs", header, rows)] if rows else []


def figures(runs: Sequence[History]) -> list[Curve]:
    """A picture of each group of metrics that any run has."""
    lines = [steps_of(run) for run in runs]
    scorers = dict.fromkeys(name for one in lines for record in one.records for name in record if _of_scorer(name))
    others = dict.fromkeys(name for one in lines for record in one.records for name in record if _of_task(name))
    panels = {**PANELS, "scorers": ("What each scorer says", tuple(scorers)), "tasks": ("Tasks", tuple(others))}
    found = [_figure(title, names, lines, "step") for title, names in panels.values()]
    return [one for one in found if one is not None]


def steps_of(run: History) -> Lines:
    """What a run wrote by the step; of iterate the training of all its rounds."""
    if run.method == "iterate":
        return Lines(run.name, run.rounds[0].method if run.rounds else "", run.training)
    return Lines(run.name, run.method, run.records)


def _of_scorer(name: str) -> bool:
    base = name.removeprefix(legend.HELD_OUT)
    return base.startswith("rewards/") and base.endswith("/mean")


def _of_task(name: str) -> bool:
    return name.startswith(legend.HELD_OUT) and legend.line(name) is None


def rounds(runs: Sequence[History]) -> list[Table]:
    """What each round of an iterative run came to."""
    found = []
    for run in runs:
        trained = {int(one.name.partition("-")[2]): one for one in run.rounds}
        numbers = {one["step"]: one for one in run.records}
        if run.method == "iterate" and (numbers or trained):
            rows = [
                (place, *(numbers.get(place, {}).get(name, NOTHING) for name in BY_ROUND),
                 trained[place].state if place in trained else "samples alone",
                 last(trained[place].training, "loss") if place in trained else NOTHING)
                for place in sorted({*numbers, *trained})
            ]  # fmt: skip
            found.append(Table(run.name, ("round", *BY_ROUND, "training", "last loss"), rows))
    return found


def round_figures(runs: Sequence[History]) -> list[Curve]:
    """Rewards by round."""
    lines = [Lines(run.name, run.method, run.records) for run in runs if run.method == "iterate"]
    panels = {"Reward by round": BY_ROUND[:3], "Pairs by round": BY_ROUND[3:4]}
    found = [_figure(title, names, lines, "round") for title, names in panels.items()]
    return [one for one in found if one is not None]


def _figure(title: str, names: Sequence[str], lines: Sequence[Lines], x_label: str) -> Curve | None:
    held = [(one, name, curves_of(one.records, [name])) for name in names for one in lines]
    found = [(one, name, *points[name]) for one, name, points in held if points]
    told, drawn = list[Told](), list(dict.fromkeys(name for _, name, *_ in found))
    for name in drawn:
        own = [(one, x, y) for one, other, x, y in found if other == name]
        said = dict.fromkeys(legend.line(name, one.method) for one, *_ in own)
        says = " ".join(f"{one.means}. {one.should}" for one in said if one) or UNKNOWN
        if name.removeprefix(legend.HELD_OUT) in drawn[: drawn.index(name)]:
            says = "the same on held-out rows."
        who = [one.run if len(lines) > 1 else "it" for one, *_ in own]
        courses = [course(name, x, y, one.method, run, x_label) for run, (one, x, y) in zip(who, own)]
        told.append(Told(name, says, courses))
    series = styled([(one.run, name, x, y) for one, name, x, y in found])
    return curve(title, series, told, x_label) if found else None


def course(
    name: str, x: Sequence[float], y: Sequence[float], method: str = "", who: str = "it", x_label: str = "step"
) -> str:
    """How a metric went, in words: its first and last number, and whether that is the way that it should go.

    Args:
        method: that wrote it. who: the sentence's subject.
    """
    first = f"{number(float(y[0]))} at {x_label} {x[0]:,}"
    if len(y) < 2:
        return f"{who} is {first}."
    went, said, judged = way(y), legend.line(name, method), ""
    end = f"{number(float(y[-1]))} at {x_label} {x[-1]:,}"
    if went == "level":
        return f"{who} ended about where it began: {first}, {end}."
    if said and said.way in ("up", "down"):
        judged = ", as it should" if went == said.way else f", though it {legend.WORDS[said.way]}"
    return f"{who} {'rose' if went == 'up' else 'fell'} from {first} to {end}{judged}."


def way(y: Sequence[float]) -> str:
    """Which way a curve goes, by its ends and by the means of its first and its last tenth: "up", "down", or "level"
    where these means differ by less than a tenth of the curve's height, or the other way round."""
    part = max(1, len(y) // 10)
    moved, height = statistics.fmean(y[-part:]) - statistics.fmean(y[:part]), max(y) - min(y)
    if abs(moved) <= LEVEL * height or moved * (y[-1] - y[0]) <= 0:
        return "level"
    return "up" if moved > 0 else "down"


def evaluations(runs: Sequence[History]) -> list[Table]:
    """The last evaluation of each run on its held-out rows."""
    ends = {run.name: run.evaluations[-1] for run in runs if run.evaluations}
    names = dict.fromkeys(name for one in ends.values() for name in one if name.startswith(legend.HELD_OUT))
    rows = [(name, *(_number(one.get(name)) for one in ends.values())) for name in names]
    header = ("metric", *(f"{run}, step {one['step']:,}" for run, one in ends.items()))
    return [Table("Held-out rows", header, rows)] if rows else []


def _number(value: Any) -> Any:
    return NOTHING if value is None else value


def metrics(runs: Sequence[History]) -> list[Table]:
    """Every metric with its legend, and how it went in each run."""
    held = [{name: _ends(run, name) for name in _names(run)} for run in runs]
    names = dict.fromkeys(name for one in held for name in one)
    rows = []
    for name in names:
        run = next(run for run, one in zip(runs, held) if name in one)
        said = legend.line(name, _writer(run, name))
        rows.append((name, f"{said.means}. {said.should}" if said else UNKNOWN,
                     *(one.get(name, NOTHING) for one in held)))  # fmt: skip
    return [Table("All metrics", ("metric", "what it is", *(run.name for run in runs)), rows)] if rows else []


def _names(run: History) -> list[str]:
    lines = [*run.records, *(run.training if run.method == "iterate" else ())]
    return [name for name in dict.fromkeys(name for one in lines for name in one) if name != "step"]


def _writer(run: History, name: str) -> str:
    """The method that writes a metric of a run: of iterate that of its rounds, unless the rounds themselves have it."""
    return run.method if any(name in one for one in run.records) else steps_of(run).method


def _ends(run: History, name: str) -> str:
    values = _values(run, name)
    return f"{number(values[0])} to {number(values[-1])}" if values else "not finite"


def _values(run: History, name: str) -> list[float]:
    lines = run.records if any(name in one for one in run.records) else run.training
    return [float(one[name]) for one in lines if one.get(name) is not None]


def recipes_of(runs: Sequence[History]) -> list[Table]:
    """Every setting of every run."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = [(name, *(text(run.settings.get(name)) for run in runs)) for name in names]
    return [Table("Recipes", ("setting", *(run.name for run in runs)), rows)] if rows else []


def facts(run: History) -> dict[str, Any]:
    """What report.json says of a run."""
    found: dict[str, Any] = {
        "name": run.name, "path": str(run.path), "method": run.method, "state": run.state, "finished": run.finished,
        "step": run.step, "steps": run.steps, "warnings": [{"step": step, "text": said} for step, said in run.warned()],
        "settings": run.settings, "metrics": {},
    }  # fmt: skip
    for name in _names(run):
        values, said = _values(run, name), legend.line(name, _writer(run, name))
        found["metrics"][name] = {
            "first": values[0] if values else None, "last": values[-1] if values else None,
            "min": min(values, default=None), "max": max(values, default=None),
            "went": way(values) if values else None, "should": said and said.way, "means": said and said.means,
        }  # fmt: skip
    if run.rounds:
        found["rounds"] = [facts(one) for one in run.rounds]
    found["evaluations"] = len([one for one in run.records if evaluated(one)])
    return found
