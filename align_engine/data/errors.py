"""The errors of bad data."""

from __future__ import annotations

from align_engine.errors import BadInput


class DataError(BadInput):
    """Rows that cannot be trained on. The message names the rows, the keys and how many there are.

    `counts` maps each reason to its number of rows (empty where the trouble is not with single rows).
    """

    def __init__(self, message: str, counts: dict[str, int] | None = None):
        super().__init__(message)
        self.counts = dict(counts or {})


class DataNotFound(DataError, FileNotFoundError):
    """No data under the name that was given."""
