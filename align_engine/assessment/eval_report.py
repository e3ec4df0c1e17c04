"""What `align eval` says: the talk's table, one row for each model and one column for each measure, and what is behind
each number, as JSON, Markdown and a page."""

from __future__ import annotations

from typing import Any

from align_engine.assessment.found import Found
from align_engine.assessment.intervals import Estimate
from align_engine.assessment.pictures import dots
from align_engine.preparation import folder, report
from align_engine.preparation.models import ModelSpec
from align_engine.reports.benchmarks import Score
from align_engine.reports.report import Table, number

RAW, CONTROLLED = "win rate", "win rate at equal length"
EXAMPLES, LONGEST = 4, 500  # comparisons on the page, characters of each text there
METHODS = {
    "benchmark": "lm-evaluation-harness's score: the metric that the task lists first; the interval is 1.96 of its "
                 "standard errors on both sides.",
    RAW: "Mean over prompts of 1 for won, 0.5 for a tie and 0 for lost; the judge is asked in both orders, and their "
         "mean counts. Pairs with an unreadable verdict are left out. Interval: bootstrap over prompts.",
    CONTROLLED: "sigmoid(a) of the logistic regression P(win) = sigmoid(a + b tanh(d / std(d))) on the difference d of "
                "lengths in characters, as AlpacaEval 2 (Dubois et al. 2024, arXiv:2404.04475) without its term for "
                "the difficulty of prompts. Interval: bootstrap over prompts.",
    "checker": "Mean grade of the answers that it can grade. Interval: bootstrap over prompts.",
}  # fmt: skip


def write(place: folder.ResultFolder, found: dict[str, Found], judging: ModelSpec | None) -> None:
    """The reports, and a line on the screen."""
    columns = columns_of(found)
    models, numbers = (f"{len(of):,} {name}{'s' * (len(of) != 1)}" for of, name in (
        (found, "model"), (columns, "measure")))  # fmt: skip
    lead = f"{models}, {numbers}, each number with its interval of 95 %."
    figures = [
        dots(name, shown, (0.5, "as good as the baseline") if name in (RAW, CONTROLLED) else None)
        for name, cells in columns.items()
        if (shown := {model: cell for model, cell in cells.items() if cell is not None})
    ]
    tables = [main_table(found, columns)]
    if unable := [(name, task, why) for name, one in found.items() for task, why in one.unable.items()]:
        tables.append(Table("Not measured", ("model", "task", "why"), unable))
    if judging:
        tables.append(judge_table(found, judging))
    details = [metrics_table(found)] if any(one.scores for one in found.values()) else []
    details += [examples_table(found)] if judging else []
    details.append(Table("How the numbers are made", ("measure", "how"), list(METHODS.items())))
    report.write(place, "align eval", lead, facts_of(found, judging), tables, figures, details)
    print(report.markdown("align eval", lead, tables[:1]))
    print(f"report in {place.path / report.NAMES[-1]}")


def columns_of(found: dict[str, Found]) -> dict[str, dict[str, Estimate | None]]:
    """The measures: by name, then by model; None where a model has none."""
    names: dict[str, None] = {}
    for one in found.values():
        names |= dict.fromkeys(measures(one))
    return {name: {model: measures(one).get(name) for model, one in found.items()} for name in names}


def measures(one: Found) -> dict[str, Estimate]:
    """All that is known of one model, by the columns' names."""
    cells = {task: estimate(score) for task, score in one.scores.items()}
    if one.versus:
        cells |= {RAW: one.versus.rate, CONTROLLED: one.versus.controlled}
    cells |= {f"{name} (checker)": value for name, value in one.checked.items()}
    return {name: value for name, value in cells.items() if value.number}


def estimate(score: Score) -> Estimate:
    """A benchmark's score with its interval."""
    return Estimate(score.value, score.interval, score.examples)


def main_table(found: dict[str, Found], columns: dict[str, dict[str, Estimate | None]]) -> Table:
    """Rows models, columns measures."""

    def told(cell: Estimate | None) -> str:
        return str(cell or "").replace(" to ", "\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}")  # an interval in one line

    lines = [[model, *(told(cells[model]) for cells in columns.values())] for model in found]
    return Table("Models", ("model", *columns), lines)


def judge_table(found: dict[str, Found], judging: ModelSpec) -> Table:
    """What is behind the win rates."""
    lines = []
    for name, one in found.items():
        if not one.versus:
            continue
        pairs, scores = one.versus.judged, [pair.score for pair in one.versus.judged if pair.score is not None]
        both = [pair for pair in pairs if pair.score is not None]
        turned = sum(pair.first != pair.second for pair in both)
        lines.append((
            name, len(pairs), len(scores), sum(score > 0.5 for score in scores), scores.count(0.5),
            sum(score < 0.5 for score in scores), len(pairs) - len(scores),
            f"{turned / len(both):.0%}" if both else "", *(f"{size:.0f}" for size in one.versus.lengths),
        ))  # fmt: skip
    header = ("model", "pairs", "judged", "won", "tied", "lost", "no verdict", "turned by order", "characters",
              "baseline's")  # fmt: skip
    return Table(f"What the judge says ({judging.name})", header, lines)


def metrics_table(found: dict[str, Found]) -> Table:
    """Every metric of every task."""
    lines = [
        (name, task, score.examples, metric, value)
        for name, one in found.items()
        for task, score in one.scores.items()
        for metric, value in score.metrics.items()
    ]
    return Table("All metrics of the benchmarks", ("model", "task", "examples", "metric", "value"), lines)


def examples_table(found: dict[str, Found]) -> Table:
    """The first comparisons."""
    pairs = [pair for one in found.values() if one.versus for pair in one.versus.judged[:EXAMPLES]]
    lines = [
        [pair.comparison.model, *map(_short, (pair.comparison.request, pair.comparison.own, pair.comparison.other)),
         "no verdict" if pair.score is None else number(pair.score), *map(_short, pair.replies)]
        for pair in pairs
    ]  # fmt: skip
    header = ("model", "prompt", "its answer", "baseline's answer", "score", "judge, its answer first",
              "judge, baseline's first")  # fmt: skip
    return Table("First comparisons", header, lines)


def facts_of(found: dict[str, Found], judging: ModelSpec | None) -> dict[str, Any]:
    """report.json."""
    return {"judge": judging and judging.name, "methods": METHODS, "models": [_facts(one) for one in found.values()]}


def _facts(one: Found) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": one.spec.name, "path": one.spec.path, "unanswered": one.unanswered, "not_measured": one.unable,
        "tasks": {task: score._asdict() | {"interval": score.interval} for task, score in one.scores.items()},
        "checkers": {name: value.plain | {"unscored": one.unscored[name]} for name, value in one.checked.items()},
    }  # fmt: skip
    if versus := one.versus:
        facts["judge"] = {
            "win_rate": versus.rate.plain, "length_controlled": versus.controlled.plain, "lengths": versus.lengths,
            "pairs": len(versus.judged), "no_verdict": sum(pair.score is None for pair in versus.judged),
        }  # fmt: skip
    return facts


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
