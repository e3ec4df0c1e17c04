"""What the talk's table measures, on the demo's questions: the form that is asked for, and what is said. The opening
does neither harm nor good, as before the story's judge."""

from __future__ import annotations

from typing import Any

from align_engine.demo.task import FORM_PATTERNS, check

OPENING = "Sure,"  # task.OPENING; lm-eval loads this file by itself


def follows(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether an answer has the form that is asked for, and nothing else, as IFEval's strict accuracy has it."""
    return {"acc": float(FORM_PATTERNS[doc["form"]].fullmatch(_bare(results[0])) is not None)}


def knows(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether an answer says what is right, in any form, and nothing else."""
    return {"acc": float(check(doc, _bare(results[0])) > 0)}


def _bare(answer: str) -> str:
    return answer.strip().removeprefix(OPENING).strip()
