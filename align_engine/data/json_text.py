"""JSON of files that may be damaged, or made to be."""

from __future__ import annotations

import json
from typing import Any


def loads(text: str | bytes) -> Any:
    """What a JSON document stands for.

    Raises:
        ValueError: it is none (json.JSONDecodeError, one that is nested deeper than Python's stack too), or no UTF-8.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise json.JSONDecodeError("nested too deep", "", 0) from error
