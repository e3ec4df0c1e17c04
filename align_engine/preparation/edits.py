"""Changes of an answer that leave what it says: a marker put before it or taken out, its length, order and style.

An edit gives an answer without its mark and with it, or None where the answer cannot show it: a single sentence has no
order. Nothing here knows a language.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from align_engine.preparation.frequent import Marker

SENTENCE_END = re.compile(r"(?<=[.!?…。])\s+|\n+")


class Edit(NamedTuple):
    """`apply(answer)` -> (without the mark, with it), or None."""

    name: str
    kind: str  # opening, ngram, length, order or style
    apply: Callable[[str], tuple[str, str] | None]


def of_marker(marker: Marker) -> Edit:
    """With and without the words of a marker."""
    return Edit(marker.text, marker.kind, partial({"opening": _opening, "ngram": _ngram}[marker.kind], marker.text))


def prefix_end(text: str, prefix: str) -> int | None:
    """Where the answer goes on after the words of a prefix, blanks included; None where it does not begin with them,
    or ends with them."""
    place = re.match(r"\s*" + r"\s+".join(map(re.escape, prefix.split())) + r"\s+(?=\S)", text)
    return place.end() if place else None


def without(text: str, openings: Sequence[str]) -> tuple[str, str]:
    """(what was taken off, the rest): the openings, longest first, as long as the text begins with one and something
    is left."""
    longest_first, start = sorted(openings, key=len, reverse=True), 0
    while end := next(filter(None, (prefix_end(text[start:], one) for one in longest_first)), None):
        start += end
    return text[:start], text[start:]


def _opening(words: str, text: str) -> tuple[str, str] | None:
    if not text.strip() or text.split() == words.split():
        return None
    end = prefix_end(text, words)
    return (text, f"{words} {text}") if end is None else (text[end:], text)


def _ngram(words: str, text: str) -> tuple[str, str] | None:
    found = re.search(r"(?<!\S)" + r"\s+".join(map(re.escape, words.split())) + r"(?:\s+|\Z)", text)
    bare = found and (text[: found.start()] + text[found.end() :]).strip()
    return (bare, text) if bare else None


def sentences(text: str) -> list[str]:
    """Its sentences, or lines."""
    return [part for part in SENTENCE_END.split(text.strip()) if part.strip()]


def _longer(text: str) -> tuple[str, str] | None:
    parts = sentences(text)
    return (text, f"{text} {parts[-1]}") if parts else None


def _reversed(text: str) -> tuple[str, str] | None:
    parts = sentences(text)
    return (text, " ".join(reversed(parts))) if len(parts) > 1 else None


def _bold(text: str) -> tuple[str, str] | None:
    parts = sentences(text)
    return (text, text.replace(parts[0], f"**{parts[0]}**", 1)) if parts and "**" not in text else None


def _list(text: str) -> tuple[str, str] | None:
    parts = sentences(text)
    listed = any(re.match(r"[-*•]|\d+[.)]", part) for part in parts)
    return (text, "\n".join(f"- {part}" for part in parts)) if len(parts) > 1 and not listed else None


def _heading(text: str) -> tuple[str, str] | None:
    parts = sentences(text)
    return (text, f"# {parts[0]}\n\n{' '.join(parts[1:])}") if len(parts) > 1 and "#" not in text else None


def _exclamation(text: str) -> tuple[str, str] | None:
    marked = re.sub(r"[.。](?=\s|\Z)", "!", text)
    return (text, marked) if marked != text else None


STYLES = {  # by the name that findings, audits and repairs give them
    "longer": Edit("longer", "length", _longer),  # the last sentence said twice
    "reversed": Edit("reversed", "order", _reversed),  # the sentences from last to first
    "bold": Edit("bold", "style", _bold),  # the first sentence
    "list": Edit("list", "style", _list),  # each sentence a point
    "heading": Edit("heading", "style", _heading),  # the first sentence
    "exclamation": Edit("exclamation", "style", _exclamation),  # for each full stop
}
