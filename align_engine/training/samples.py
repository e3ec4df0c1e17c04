"""Completions that a run shows: some of each logged step, in a file and, where it is asked for, on the screen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from align_engine.errors import visible

if TYPE_CHECKING:
    from rich.table import Table

FILE = "samples.jsonl"
KEPT = 16  # completions of a logged step at most
LETTERS = 600  # of a text on the screen
T = TypeVar("T")


def some(rows: Sequence[T], count: int | None = KEPT) -> list[T]:
    """`count` rows at most (None: all), evenly spread: of a rollout's prompts as many as there is room for."""
    return list(rows[:: max(1, math.ceil(len(rows) / count))] if count else rows)


def table(title: str, rows: Iterable[dict[str, Any]]) -> Table:
    """Rows of samples.jsonl for the terminal: a prompt, its completion, what each scorer says, the reward."""
    from rich.table import Table
    from rich.text import Text

    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row["rewards"]))
    made = Table("prompt", "completion", title=title, title_justify="left", show_lines=True)
    for name in (*names, "score"):
        made.add_column(Text(name), justify="right")
    for row in rows:
        scores = [*(row["rewards"].get(name) for name in names), row["score"]]
        texts = [*map(_text, (row["prompt"], row["completion"])), *map(_number, scores)]
        made.add_row(*map(Text, texts))
    return made


def _text(value: Any) -> str:
    if isinstance(value, list):
        value = "\n".join(f"{one.get('role')}: {one.get('content')}" for one in value)
    value = str(value)
    return visible(value if len(value) <= LETTERS else f"{value[:LETTERS]} ...")


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4g}"
