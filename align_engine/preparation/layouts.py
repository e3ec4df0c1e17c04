"""Rows of other layouts as those of TRL: prompt, and completion or chosen and rejected.

| layout | columns | becomes |
|---|---|---|
| TRL | prompt, completion, chosen, rejected | as it stands |
| messages | messages: role, content | prompt: all before the last answer; completion: that answer |
| ShareGPT | conversations: from, value; system | the same |
| Alpaca | instruction, input, output; system, history | prompt: messages; completion: output |

`chosen` and `rejected` may stand beside the last three, as texts or single messages: the prompt is then all the
messages. Other columns stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import datasets

from align_engine.data.formats import BadRow, Messages, Text, is_conversational, text_of
from align_engine.errors import BadInput
from align_engine.preparation import folder
from align_engine.preparation.sections import MappedInput

Row = dict[str, Any]
T = TypeVar("T")
ROLES = {  # of ShareGPT's kin
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip
ANSWERS = ("completion", "chosen", "rejected")


def read(section: MappedInput) -> datasets.Dataset:
    """The rows of a data set, its columns under the names that `columns` gives them.

    Raises:
        BadInput: as `load_rows`; a column that is not there; no layout that fits.
    """
    rows = folder.read(section)
    for pair in section.columns or ():
        ours, equals, theirs = pair.partition("=")
        if not equals or not ours or not theirs:
            raise BadInput(f"columns = {pair!r} is not of the form NAME=COLUMN, as prompt=question is")
        if theirs not in rows.column_names:
            raise BadInput(f"columns = {pair!r}: there is no column {theirs!r}, but {', '.join(rows.column_names)}")
        if ours != theirs:
            rows = rows.remove_columns([ours] if ours in rows.column_names else []).rename_column(theirs, ours)
    layout(rows.column_names)
    return rows


def layout(columns: Iterable[str]) -> Callable[[Row], Row]:
    """What makes rows with these columns TRL's. Raises BadInput where no layout fits."""
    for name, convert in LAYOUTS.items():
        if name in columns:
            return convert
    raise BadInput(
        f"there is none of the columns {', '.join(LAYOUTS)}, but {', '.join(sorted(columns))}: name the one that holds "
        "the prompts, --columns prompt=COLUMN"
    )


def converted(rows: datasets.Dataset, section: MappedInput, use: Callable[[Row], T]) -> Iterator[tuple[int, T]]:
    """(number, what `use` makes of it) of each row of `read(section)` in TRL's layout.

    Raises:
        BadInput: a row that cannot be used, by its number, unless they are dropped: of those `use` raises BadRow.
    """
    convert = layout(rows.column_names)
    row: Any
    for index, row in enumerate(rows):
        try:
            made = convert(row)
            _check(made)
            found = use(made)
        except BadRow as error:
            if section.bad_rows == "error":
                named = folder.origin(section).rows([index])
                raise BadInput(f"{named}: {error} (--bad_rows drop leaves such rows out)") from None
            continue
        yield index, found


def as_messages(prompt: str | Messages) -> Messages:
    """A prompt as messages: a text is what the user says."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def checked(value: Any, column: str, prompt: Text) -> Text:
    """An answer as its prompt is: a text, or messages. Raises BadRow for one that is missing, empty or of no kind."""
    if value is None:
        raise BadRow(f"'{column}' is missing")
    if isinstance(value, str) and isinstance(prompt, list):
        value = answer(value, column)
    if not isinstance(value, str | list):
        raise BadRow(f"'{column}' is of type {type(value).__name__}, expected a text or a list of messages")
    if isinstance(value, list):
        value = [_message(one, column) for one in value]
        if isinstance(prompt, str):
            raise BadRow(f"'prompt' and '{column}' mix strings and lists of messages")
    if not value or (isinstance(value, list) and not (value[-1]["content"] or value[-1].get("tool_calls"))):
        raise BadRow(f"'{column}' is empty")
    return value


def _check(row: Row) -> None:
    if not row["prompt"] or (not isinstance(row["prompt"], str) and not is_conversational(row["prompt"])):
        raise BadRow("'prompt' is empty" if not row["prompt"] else "'prompt' is neither a text nor a list of messages")
    if isinstance(row["prompt"], list):
        row["prompt"] = [_message(one, "prompt") for one in row["prompt"]]
        if row["prompt"][-1]["role"] == "system":
            raise BadRow("'prompt' ends with a system message, expected 'user', 'tool' or 'assistant'")


def _message(message: Any, column: str) -> dict[str, str]:
    """One message with role and content; None, with which Arrow fills keys, is left out."""
    if not isinstance(message, dict):
        raise BadRow(f"'{column}' holds {message!r:.60}, expected messages")
    if "from" in message and "value" in message:
        message = {"role": message["from"], "content": message["value"]}
    role, content = message.get("role"), text_of(message.get("content"))
    if role not in ROLES:
        raise BadRow(f"'{column}' holds a message from {role!r:.60}, expected one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise BadRow(f"'{column}' holds a message whose content is of type {type(content).__name__}, expected a text")
    kept = {key: value for key, value in message.items() if value is not None}
    return kept | {"role": ROLES[role], "content": content}


def answer(value: Any, column: str) -> Messages:
    """An answer as messages, whether it is a text, one message or a list of them."""
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    return [_message(one, column) for one in (value if isinstance(value, list) else [value])]


def _conversation(column: str) -> Callable[[Row], Row]:
    def convert(row: Row) -> Row:
        if not isinstance(row[column], list) or not row[column]:
            raise BadRow(f"'{column}' is no list of messages")
        messages = [_message(one, column) for one in row[column]]
        if system := row.get("system"):
            messages.insert(0, {"role": "system", "content": system})
        return _with_answers(row, messages, {column, "system"})

    return convert


def _alpaca(row: Row) -> Row:
    if not isinstance(row["instruction"], str) or not row["instruction"]:
        raise BadRow("'instruction' is no text, or empty")
    messages: Messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for turn in row.get("history") or ():
        if not isinstance(turn, list) or len(turn) != 2:
            raise BadRow(f"'history' holds {turn!r:.60}, expected pairs of a question and its answer")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    asked = "\n".join(filter(None, (row["instruction"], row.get("input"))))
    messages.append({"role": "user", "content": asked})
    if row.get("output"):
        messages += answer(row["output"], "output")
    return _with_answers(row, messages, {"instruction", "input", "output", "system", "history"})


def _with_answers(row: Row, messages: Messages, used: set[str]) -> Row:
    """The row of a conversation whose last message may be the answer."""
    made = {key: value for key, value in row.items() if key not in used}
    for column in ANSWERS:
        if made.get(column) is not None:
            made[column] = answer(made[column], column)
    last = messages[-1]["role"] == "assistant" and not any(made.get(column) for column in ANSWERS)
    return {"prompt": messages[:-1] if last else messages} | ({"completion": messages[-1:]} if last else {}) | made


LAYOUTS: dict[str, Callable[[Row], Row]] = {  # by the column that tells it; the first that is there
    "prompt": dict, "messages": _conversation("messages"), "conversations": _conversation("conversations"),
    "instruction": _alpaca,
}  # fmt: skip
