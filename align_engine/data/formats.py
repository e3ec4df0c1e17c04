"""The shapes of rows, those of TRL: one normal form for all of them.

| kind of training | columns | standard | conversational |
|---|---|---|---|
| sft | prompt, completion | strings | lists of messages |
| sft | text | string | |
| sft | messages | | list of messages |
| preference | prompt, chosen, rejected | strings | lists of messages |
| unpaired | prompt, completion, label (true, false) | strings | lists of messages |
| unpaired | those of preference: each row becomes two | | |
| preference | chosen, rejected (they share a beginning: the prompt) | strings | lists of messages |
| preference, several answers | those of preference | lists of strings | lists of lists of messages |
| prompt | prompt | string | list of messages |

Of n answers in `chosen` and m in `rejected` (as reward-bench-2 has them) each of the n is preferred to each of the m.
A message is a dict with `role` and `content`, a string or a list of {"type": "text", "text": ...}. Columns that are not
named here are ignored, but for `tools` and `chat_template_kwargs`, which reach the chat template.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import regex

from align_engine.data.json_text import loads
from align_engine.errors import BadInput

Kind = Literal["sft", "preference", "unpaired", "prompt"]
Messages = list[dict[str, Any]]
Text = str | Messages

LAYOUTS: dict[str, tuple[tuple[str, ...], ...]] = {  # the first that fits is taken
    "sft": (("prompt", "completion"), ("messages",), ("text",)),
    "preference": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "unpaired": (("prompt", "completion", "label"),),
    "prompt": (("prompt",),),
}
USERS = {"sft": "align sft", "preference": "align dpo", "unpaired": "align kto", "prompt": "align grpo"}

# what a prompt taken out of two texts never ends inside of: a word of any script, or a sign that is seen as one
WORD = r"[\w\p{M}\u200c\u200d]+(?:['’.,\-‐][\w\p{M}\u200c\u200d]+)*"
UNIT = regex.compile(rf"{WORD}|\X")
TAG = r"<[^\s<>]+>|\[/?[A-Z_]+\]"  # what templates put around the parts of a text
REACH = 256  # characters before a cut that are read for the units about it


def units(tokens: Iterable[str]) -> regex.Pattern[str]:
    """`UNIT`, with a tokenizer's own tokens and tags not to be cut either."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return regex.compile("|".join([*map(regex.escape, longest_first), TAG, UNIT.pattern]))


class BadRow(Exception):
    """One row that cannot be used; its text is the reason, and `kind` says who decides: the recipe's `bad_rows` ("bad")
    or `overlong` ("long"), or nobody ("drop")."""

    def __init__(self, reason: str, kind: str = "bad") -> None:
        super().__init__(reason)
        self.kind = kind


def detect_layout(columns: Sequence[str], kind: Kind) -> tuple[str, ...]:
    """The columns to train on, e.g. ("prompt", "chosen", "rejected"). Raises BadInput where no layout fits."""
    for layout in LAYOUTS[kind]:
        if set(layout) <= set(columns):
            return layout
    wanted = " or ".join(" + ".join(f"'{key}'" for key in layout) for layout in LAYOUTS[kind])
    names = list(dict.fromkeys(key for layout in LAYOUTS[kind] for key in layout))
    for key in (key for key in names if key not in columns):
        if near := difflib.get_close_matches(key, [one for one in columns if one not in names], n=1, cutoff=0.8):
            raise BadInput(f"{kind} data needs the columns {wanted}: is '{near[0]}' meant to be '{key}'?")
    fitting = {other: [len(one) for one in LAYOUTS[other] if set(one) <= set(columns)] for other in LAYOUTS}
    best = max(LAYOUTS, key=lambda other: max(fitting[other], default=0))
    hint = f"; these rows look like {best} data, as {USERS[best]} learns from" if fitting[best] else ""
    if not hint and kind == "preference":
        hint = "; `align pairs --columns prompt=YOURS chosen=YOURS rejected=YOURS` gives yours these names"
    raise BadInput(f"{kind} data needs the columns {wanted}, but there are {sorted(columns)}{hint}")


def is_conversational(value: Any) -> bool:
    """Whether a value is a list of messages (and not a string)."""
    return isinstance(value, list) and len(value) > 0 and isinstance(value[0], dict) and "role" in value[0]


def answers(ids: list[Any]) -> list[list[int]]:
    """The ids of each answer on one side of a tokenised row, which holds those of one, or lists of several."""
    return ids if ids and isinstance(ids[0], list) else [ids]


def has_several(value: Any) -> bool:
    """Whether the `chosen` or the `rejected` of a row is a list of answers (and not one list of messages)."""
    return isinstance(value, list) and len(value) > 0 and isinstance(value[0], str | list)


def normalise(row: dict[str, Any], layout: tuple[str, ...], unit: regex.Pattern[str] = UNIT) -> dict[str, list[Text]]:
    """The row's texts by layout column, checked: one each, or all answers of `chosen` and of `rejected`. The prompt of
    an implicit preference row is taken out: what all texts begin with, up to the end of a `unit`.

    Raises BadRow for a missing value, a wrong type, an empty completion, and a chosen answer that is rejected too.
    """
    held = {key: row.get(key) for key in layout}
    several: dict[str, list[Any]] = {
        key: value or [] for key, value in held.items() if key in ("chosen", "rejected") and has_several(value)
    }
    parts = {key: [_checked(x, key) for x in several.get(key, [value])] for key, value in held.items()}
    chosen, asked = parts.get("chosen", []), parts.get("prompt")
    # the second case: a string prompt beside whole conversations, as in ultrafeedback_binarized
    implicit = bool(chosen) and (asked is None or (is_conversational(chosen[0]) and isinstance(asked[0], str)))
    if implicit:
        parts.pop("prompt", None)
    if any(answer in parts["rejected"] for answer in chosen):
        raise BadRow("'chosen' and 'rejected' have an answer in common" if several else "'chosen' equals 'rejected'")
    texts = [(key, text) for key, texts in parts.items() for text in texts]
    if len({isinstance(text, str) for _, text in texts}) > 1:
        raise BadRow(f"{' and '.join(repr(key) for key in parts)} mix strings and lists of messages")
    for key, text in texts:
        if not text and key != "prompt":
            raise BadRow(f"'{key}' {'holds an empty answer' if key in several else 'is empty'}")
    if implicit:
        parts = _with_prompt(parts, unit)
    prompt = parts["prompt"][0] if "prompt" in parts else ""
    if isinstance(prompt, list) and prompt[-1]["role"] == "system":
        raise BadRow("'prompt' ends with a system message, expected 'user', 'tool' or 'assistant'")
    return parts


def template_arguments(row: dict[str, Any]) -> dict[str, Any]:
    """What else the row hands to the chat template: `tools` (a list, or JSON) and `chat_template_kwargs`."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = loads(tools)
        except ValueError as error:
            raise BadRow(f"'tools' is not JSON ({getattr(error, 'msg', error)})") from error
    extra = row.get("chat_template_kwargs") or {}
    if not isinstance(extra, dict):
        raise BadRow(f"'chat_template_kwargs' is of type {type(extra).__name__}, expected an object")
    if tools is not None and not isinstance(tools, list):
        raise BadRow(f"'tools' is of type {type(tools).__name__}, expected a list")
    extra = {key: value for key, value in extra.items() if value is not None}
    return {"tools": tools or None, **extra}


def _checked(value: Any, key: str) -> Text:
    if value is None:
        raise BadRow(f"'{key}' is missing")
    if isinstance(value, str) and key != "messages":
        return value
    if not isinstance(value, list) or key == "text":
        wanted = {"text": "a string", "messages": "a list of messages"}.get(key, "a string or a list of messages")
        raise BadRow(f"'{key}' is of type {type(value).__name__}, expected {wanted}")
    if not value:
        raise BadRow(f"'{key}' is empty")
    return [_message(message, key) for message in value]


def _message(message: Any, key: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRow(f"'{key}' holds {message!r:.60}, expected messages with 'role' and 'content'")
    content = text_of(message.get("content"))
    # Arrow fills the keys that other messages have with None; templates would print it
    message = {name: value for name, value in {**message, "content": content}.items() if value is not None}
    if content is None and message.get("tool_calls"):
        return {**message, "content": ""}
    if not isinstance(content, str):
        raise BadRow(f"'{key}' holds a message whose content is of type {type(content).__name__}, expected a string")
    if not content and message["role"] == "assistant" and key != "prompt" and not message.get("tool_calls"):
        raise BadRow(f"'{key}' holds an empty answer")
    return message


def text_of(content: Any) -> Any:
    """The text of a message's content that is written as parts, [{"type": "text", "text": ...}, ...]: joined as they
    stand. Content of any other kind, parts that are no text among it, as it is."""
    if not isinstance(content, list) or not content or not all(isinstance(part, dict) for part in content):
        return content
    texts = [part.get("text") for part in content]
    is_text = [part.get("type", "text") == "text" and isinstance(text, str) for part, text in zip(content, texts)]
    return "".join(texts) if all(is_text) else content


def _with_prompt(parts: dict[str, list[Text]], unit: regex.Pattern[str]) -> dict[str, list[Text]]:
    texts = [text for answers in parts.values() for text in answers]
    first, shared, most = texts[0], 0, min(map(len, texts)) - 1  # something must stay of each
    while shared < most and all(text[shared] == first[shared] for text in texts):
        shared += 1
    if isinstance(first, str):
        shared = last_cut([str(text) for text in texts], shared, unit)
        if shared > 1 and first[shared - 1] == " ":  # the space in front of an answer goes with it
            shared -= 1
    if shared <= 0:
        raise BadRow("'chosen' and 'rejected' share no beginning that could be the prompt, and there is no 'prompt'")
    return {"prompt": [first[:shared]], **{key: [text[shared:] for text in answers] for key, answers in parts.items()}}


def last_cut(texts: Sequence[str], most: int, unit: regex.Pattern[str] = UNIT) -> int:
    """The last place, at most `most`, where texts that share `most` characters can be cut: inside no `unit` of any."""
    start, ends = max(texts[0].rfind(" ", 0, max(most - REACH, 0)), 0), []
    for text in texts:
        ends.append(start)
        for found in unit.finditer(text, start):
            if found.end() > most:
                break
            ends[-1] = found.end()
    return min(ends)


def common_prefix(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    low, high = min(texts), max(texts)
    return low[: next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), len(low))]
