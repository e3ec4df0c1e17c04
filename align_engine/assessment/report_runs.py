"""What runs did, as tables and curves of `align report`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from align_engine.recipe import RECIPES, flat
from align_engine.reports import legend
from align_engine.reports.curves import Curve, curve, styled
from align_engine.reports.history import History, Record, evaluated
from align_engine.reports.report import PANELS, Table, curves_of, number

NOTHING = "-"
PLACES = ("output_dir", "overwrite")  # settings that every run has others of
CONTENTS = ("data", "eval data")  # hashes in a run's identity, besides those of files
CURVES = "Under the pointer, or by the arrow keys, each curve says its numbers."
WARNED = "Metrics out of bounds, by the rules that a run warns by; each is said once."
HEADLINE = ("reward", "eval_reward", "loss", "eval_loss", "rewards/accuracies", "eval_rewards/accuracies", "accuracy",
            "eval_accuracy", "mean_token_accuracy", "eval_mean_token_accuracy", "kl", "objective/kl",
            "completions/mean_length")  # fmt: skip
BY_ROUND = ("reward", "rewards/chosen", "rewards/rejected", "pairs", "frac_tied")
LEVEL = 0.1  # share of a curve's height that is no change


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
    return Table("Runs", ("", *(run.name for run in runs)),
                 [(name, *values) for name, values in rows if any(value != NOTHING for value in values)])  # fmt: skip


def text(value: Any) -> str:
    """A setting in a cell."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or NOTHING
    return NOTHING if value is None else number(value)


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
    scorers = dict.fromkeys(name for run in runs for one in _steps(run) for name in one if _of_scorer(name))
    panels = {**PANELS, "scorers": ("What each scorer says", tuple(scorers))}
    found = [_figure(title, names, runs, [_steps(run) for run in runs], "step") for title, names in panels.values()]
    return [one for one in found if one is not None]


def _steps(run: History) -> list[Record]:
    return run.training if run.method == "iterate" else run.records


def _of_scorer(name: str) -> bool:
    base = name.removeprefix(legend.HELD_OUT)
    return base.startswith("rewards/") and base.endswith("/mean")


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
    several = [run for run in runs if run.method == "iterate"]
    records = [run.records for run in several]
    panels = {"Reward by round": BY_ROUND[:3], "Pairs by round": BY_ROUND[3:4]}
    found = [_figure(title, names, several, records, "round") for title, names in panels.items()]
    return [one for one in found if one is not None]


def _figure(
    title: str, names: Sequence[str], runs: Sequence[History], records: Sequence[list[Record]], x_label: str
) -> Curve | None:
    found = [
        (run, name, *points)
        for name in names
        for run, held in zip(runs, records)
        for points in curves_of(held, [name]).values()
    ]
    if not found:
        return None
    words = []
    for name in dict.fromkeys(name for _, name, *_ in found):
        own = [(run, x, y) for run, one, x, y in found if one == name]
        lines = {said for run, *_ in own for said in [legend.line(name, run.method)]}
        words += [f"{name}: {said.means}. {said.should}" for said in lines if said]
        words += [course(run if len(runs) > 1 else None, name, x, y, x_label) for run, x, y in own]
    return curve(title, styled([(run.name, name, x, y) for run, name, x, y in found]), words, x_label)


def course(run: History | None, name: str, x: Sequence[float], y: Sequence[float], x_label: str = "step") -> str:
    """How a metric went, in words: its first and last number, and whether that is the way that it should go. `run`: to
    be named, where there are several."""
    who = f"{run.name}, {name}" if run else name
    if len(y) < 2:
        return f"{who} is {number(float(y[0]))} at {x_label} {x[0]:,}."
    went, said = way(y), legend.line(name, run.method if run else "")
    judged = ""
    if said and said.way in ("up", "down") and went != "level":
        judged = ", as it should" if went == said.way else f", though it {said.should.partition('.')[0].lower()}"
    moved = {"up": "rose", "down": "fell", "level": "stayed about level,"}[went]
    first, end = number(float(y[0])), number(float(y[-1]))
    return f"{who} {moved} from {first} at {x_label} {x[0]:,} to {end} at {x_label} {x[-1]:,}{judged}."


def way(y: Sequence[float]) -> str:
    """Which way a curve goes, by the means of its first and its last tenth: "up", "down", or "level" where they differ
    by less than a tenth of its height."""
    part = max(1, len(y) // 10)
    moved, height = statistics.fmean(y[-part:]) - statistics.fmean(y[:part]), max(y) - min(y)
    return "level" if abs(moved) <= LEVEL * height else "up" if moved > 0 else "down"


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
        said = legend.line(name, run.method)
        rows.append((name, f"{said.means}. {said.should}" if said else "Of a callback, a plugin or tasks.",
                     *(one.get(name, NOTHING) for one in held)))  # fmt: skip
    return [Table("All metrics", ("metric", "what it is", *(run.name for run in runs)), rows)] if rows else []


def _names(run: History) -> list[str]:
    lines = [*run.records, *(run.training if run.method == "iterate" else ())]
    return [name for name in dict.fromkeys(name for one in lines for name in one) if name != "step"]


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
        values, said = _values(run, name), legend.line(name, run.method)
        found["metrics"][name] = {
            "first": values[0] if values else None, "last": values[-1] if values else None,
            "min": min(values, default=None), "max": max(values, default=None),
            "went": way(values) if values else None, "should": said and said.way, "means": said and said.means,
        }  # fmt: skip
    if run.rounds:
        found["rounds"] = [facts(one) for one in run.rounds]
    found["evaluations"] = len([one for one in run.records if evaluated(one)])
    return found
