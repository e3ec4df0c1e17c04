"""Texts of models and of data, for pages that people read: any script as it is, and nothing that acts or hides."""

from __future__ import annotations

import re
from typing import Any

from align_engine.errors import visible

LONGEST = 4000  # characters of a text on a page


def shown(text: str, longest: int = LONGEST) -> str:
    """A visible text; of a very long one the beginning, and how much more there is."""
    rest = len(text) - longest
    return visible(text) if rest <= 0 else f"{visible(text[:longest])} ... ({rest:,} more characters)"


def said(prompt: Any) -> str:
    """A prompt or an answer as a text: of messages each turn, after its role where there are several."""
    if not isinstance(prompt, list):
        return str(prompt)
    turns = [(str(one.get("role")), str(one.get("content") or "")) for one in prompt]
    return turns[0][1] if len(turns) == 1 else "\n\n".join(f"{role}: {content}" for role, content in turns)


def fenced(text: str) -> str:
    """`text` as a block of code in Markdown, whatever it holds."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
