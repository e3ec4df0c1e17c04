"""Samples of `align report`: what a run wrote first and last, and what checkpoints answer side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from align_engine.reports.history import History, Record
from align_engine.reports.parts import Beside, Part, Said
from align_engine.reports.report import number
from align_engine.reports.results import Result
from align_engine.reports.text import said

SHOWN = 6  # prompts of each run and result


def samples_of(run: History) -> tuple[list[Record], str]:
    """The samples of a run with the step that each is of, and what these steps are. Where evaluations left some, those
    alone: the same prompts are asked with the same random numbers each time."""
    if run.of_rounds:
        return [row | {"step": place} for place, rows in enumerate(run.of_rounds, 1) for row in rows], "round"
    return [row for row in run.samples if row.get("eval")] or run.samples, "step"


def pairs_of(run: History) -> list[tuple[Record, Record]]:
    """(first, last) answers to the prompts that were asked at the most distant steps."""
    first, last = dict[str, Record](), dict[str, Record]()
    for row in samples_of(run)[0]:
        key = json.dumps(row["prompt"], sort_keys=True)
        first.setdefault(key, row)
        if last.get(key, {"step": -1})["step"] < row["step"]:
            last[key] = row
    found = [(first[key], last[key]) for key in first if first[key]["step"] < last[key]["step"]]
    return sorted(found, key=lambda pair: pair[0]["step"] - pair[1]["step"])[:SHOWN]


def ends_of(run: History) -> list[Record]:
    """Samples of the first and of the last step, of different prompts."""
    rows, _ = samples_of(run)
    steps = sorted({row["step"] for row in rows})
    found = list[Record]()
    for step in dict.fromkeys([steps[0], steps[-1]] if steps else []):
        own = {json.dumps(row["prompt"]): row for row in reversed(rows) if row["step"] == step}
        found += list(reversed(own.values()))[: SHOWN // 2]
    return found


def first_and_last(runs: Sequence[History]) -> list[Part]:
    """A part of each run that has samples."""
    parts = []
    for run in runs:
        unit = samples_of(run)[1]
        pairs, title = pairs_of(run), f"Samples of {run.name}, first and last"
        if pairs:
            beside = [Beside(said(a["prompt"]), [_said(a, unit), _said(b, unit)]) for a, b in pairs]
            parts.append(Part(title, "The same prompts, as early and as late as they were asked.", beside=beside))
        elif ends := ends_of(run):
            beside = [Beside(said(row["prompt"]), [_said(row, unit)]) for row in ends]
            told = "No prompt was asked twice: others at the first step than at the last."
            parts.append(Part(title, told, beside=beside))
    return parts


def _said(row: Record, unit: str) -> Said:
    scores = {name: value for name, value in row.get("rewards", {}).items() if value is not None}
    notes = [f"{name} {number(float(value))}" for name, value in scores.items()]
    if row.get("score") is not None and list(scores.values()) != [row["score"]]:
        notes.append(f"score {number(float(row['score']))}")
    return Said(f"{unit} {row['step']:,}", said(row["completion"]), ", ".join(notes))


def side_by_side(found: Sequence[Result]) -> list[Part]:
    """A part of each result of `align samples`."""
    parts = []
    for result in found:
        rows: list[dict[str, Any]] = result.facts["answers"]
        indices = list(dict.fromkeys(row["index"] for row in rows))[:SHOWN]
        beside = [
            Beside(said(own[0]["prompt"]), [Said(row["model"], said(row["completion"]), _note(row)) for row in own])
            for own in ([row for row in rows if row["index"] == index] for index in indices)
        ]
        parts.append(Part(f"Answers side by side: {result.path.name}", beside=beside))
    return parts


def _note(row: dict[str, Any]) -> str:
    return "" if row.get("score") is None else f"score {number(float(row['score']))}"


def facts(run: History) -> list[dict[str, Any]]:
    """What report.json has of a run's samples."""
    return [row for pair in pairs_of(run) for row in pair] or ends_of(run)
