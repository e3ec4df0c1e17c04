"""What `align eval` knows of a model."""

from __future__ import annotations

from dataclasses import dataclass, field

from align_engine.assessment.intervals import Estimate
from align_engine.assessment.judge import Judged
from align_engine.preparation.models import ModelSpec
from align_engine.reports.benchmarks import Score


@dataclass
class Versus:
    """A model before the judge."""

    rate: Estimate
    controlled: Estimate
    judged: list[Judged]
    lengths: tuple[float, float]  # mean characters of its answers, and of the baseline's


@dataclass
class Found:
    """What is known of one model."""

    spec: ModelSpec
    scores: dict[str, Score] = field(default_factory=dict)  # by task
    unable: dict[str, str] = field(default_factory=dict)  # why there is no score, by task
    checked: dict[str, Estimate] = field(default_factory=dict)  # by checker
    unscored: dict[str, int] = field(default_factory=dict)  # answers that a checker cannot grade
    versus: Versus | None = None
    unanswered: int = 0  # prompts
