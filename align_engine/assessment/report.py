"""`align report`: one page on a run, or on several side by side.

Everything is read from the runs' folders as they stand: of a run that goes on, or was stopped or killed, the page says
what is there. The same command writes it anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align_engine import recipe as recipes
from align_engine.assessment import report_answers, report_runs
from align_engine.assessment.report_sections import ReportRecipe
from align_engine.preparation import PREPARATION, folder, report
from align_engine.recipe.names import distinct
from align_engine.recipe.secrets import masked
from align_engine.reports import results
from align_engine.reports.history import History, read_run
from align_engine.reports.parts import Part, markdown, whole_page
from align_engine.reports.report import Table
from align_engine.reports.results import Result


def run(settings: ReportRecipe) -> None:
    """The command.

    Raises:
        BadInput: a folder that holds no run, or no result; output_dir holds something else.
    """
    asked = settings.reported
    paths = [Path(one).absolute() for one in asked.runs]
    runs = [read_run(path, name) for path, name in zip(paths, distinct([path.parts for path in paths]))]
    given = [results.read_result(Path(one)) for one in asked.results]
    place = folder.ResultFolder(settings.output.output_dir, {"command": "report", **recipes.identity(settings)})
    with place.locked():
        place.finished(settings.output.overwrite)
        place.begin({}, settings.output.overwrite)
        with place.written("recipe.yaml") as path:
            recipes.save(settings, path)
        write(place, runs, given)
        place.mark(finished=True)


def write(place: folder.ResultFolder, runs: Sequence[History], given: Sequence[Result]) -> None:
    """The reports."""
    traced = {one.path.resolve(): one for run in runs for one in results.lineage(run.settings.get("dataset_name"))}
    others = [one for one in given if one.path.resolve() not in traced]
    of_data = [*traced.values(), *(one for one in others if one.command in PREPARATION)]
    rest = [one for one in others if one.command not in PREPARATION and one.command != "samples"]
    asked = [one for one in others if one.command == "samples"]
    parts = [
        Part("Runs", tables=[report_runs.overview(runs)]),
        Part("Warnings", report_runs.WARNED, tables=report_runs.warned(runs)),
        Part("What differs", report_runs.differ_text(runs), tables=report_runs.differences(runs)),
        Part("Curves", report_runs.CURVES, figures=report_runs.figures(runs)),
        Part("Rounds", tables=report_runs.rounds(runs), figures=report_runs.round_figures(runs)),
        *report_answers.first_and_last(runs),
        *report_answers.side_by_side(asked),
        *(Part(f"Data: {one.title}", one.lead, tables=one.tables) for one in of_data),
        Part("Evaluation", tables=[*report_runs.evaluations(runs), *compared(rest)]),
        *(Part(f"Findings: {one.title}", one.lead, tables=one.tables) for one in rest),
        Part("All metrics", tables=report_runs.metrics(runs), folded=True),
        Part("Recipes", tables=report_runs.recipes_of(runs), folded=True),
    ]
    parts = [part for part in parts if part.tables or part.figures or part.beside]
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs side by side"
    lead = "; ".join(f"{run.name} ({run.method}): {run.state}" for run in runs) + "."
    facts: dict[str, Any] = {
        "runs": [report_runs.facts(run) | {"samples": report_answers.facts(run)} for run in runs],
        "differences": report_runs.differing(runs),
        "results": [{"path": str(one.path), "command": one.command} for one in (*of_data, *asked, *rest)],
    }
    title, lead, parts = masked(title), masked(lead), [_masked(part) for part in parts]
    report.save(place, masked(facts), markdown(title, lead, parts), whole_page(title, lead, parts))
    print(f"{lead} Page: {place.path / report.NAMES[-1]}")


def compared(found: Sequence[Result]) -> list[Table]:
    """Where there are several results of one command, their numbers side by side."""
    kinds = dict.fromkeys(one.command for one in found if one.command)
    groups = [[one for one in found if one.command == kind] for kind in kinds]
    return [results.comparison(group) for group in groups if len(group) > 1]


def _masked(part: Part) -> Part:
    tables = [table._replace(rows=masked([list(row) for row in table.rows])) for table in part.tables]
    return part._replace(text=masked(part.text), tables=tables)
