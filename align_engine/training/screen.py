"""Numbers of a run on the screen: columns under a heading."""

from __future__ import annotations

import re
from collections.abc import Mapping

AGAIN = 20  # rows after which the heading is repeated
LONGEST = 16  # characters of a heading
SHOWN = {  # metric -> its heading; a scorer's mean reward stands behind `reward` under the scorer's name
    "reward": "reward",
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "mean_token_accuracy": "token acc.",
    "completions/mean_length": "length",
    "grad_norm": "grad norm",
    "learning_rate": "rate",
    "tokens_per_second": "tokens/s",
}
SCORER = re.compile(r"rewards/(.+)/mean")


class Columns:
    """Rows of numbers, one of each record, an evaluation's among them.

    Args:
        total: steps of the run.
        width: characters of the screen: columns that do not fit are left out, the last first. None: all are shown.
    """

    def __init__(self, total: int, width: int | None = None) -> None:
        self.total, self.width, self.rows = total, width, 0
        self.names: list[str] = []  # of the metrics under the last heading

    def lines(self, step: int, record: Mapping[str, float]) -> list[str]:
        """The row of a record, with the heading before it where it is time for one."""
        evaluated = any(name.startswith("eval_") for name in record)
        values = {name.removeprefix("eval_"): value for name, value in record.items()}
        new = [name for name in self._shown(values) if name not in self.names]
        heading = bool(new) or self.rows % AGAIN == 0
        if new:
            self.names = self._shown({**dict.fromkeys(self.names, 0.0), **values})
        self.rows = 1 if heading else self.rows + 1
        cells = [number(values[name]) if name in values else "" for name in self.names]
        row = self._line("eval" if evaluated else f"{step}/{self.total}", cells)
        return [self._line("step", list(map(head, self.names))), row] if heading else [row]

    def _shown(self, values: Mapping[str, float]) -> list[str]:
        scorers = [name for name in values if SCORER.fullmatch(name)]
        if len(scorers) < 2:  # one is the reward
            scorers = []
        names = [name for name in SHOWN if name in values]
        return [*names[:1], *scorers, *names[1:]] if "reward" in values else names

    def _line(self, label: str, cells: list[str]) -> str:
        found = f"{label:>{2 * len(str(self.total)) + 1}}"
        for name, cell in zip(self.names, cells):
            cell = f"  {cell:>{max(len(head(name)), 9)}}"
            if self.width is not None and len(found) + len(cell) > self.width:
                break
            found += cell
        return found.rstrip()


def number(value: float) -> str:
    """Four digits, and all of a whole part up to a million."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"


def head(name: str) -> str:
    """The heading of a metric; of a long scorer's name its end."""
    scorer = SCORER.fullmatch(name)
    return scorer[1][-LONGEST:] if scorer else SHOWN[name]
