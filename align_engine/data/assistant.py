"""Which tokens of a conversation the assistant writes: those that `assistant_only_loss` trains on."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from align_engine.data.formats import BadRow, Messages, common_prefix
from align_engine.errors import BadInput

TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")  # transformers': it and `endgeneration` stand around what is written
Spans = list[tuple[int, int]]  # first character, end
Render = Callable[..., str]


def spans(tokenizer: Any, messages: Messages, arguments: dict[str, Any], render: Render) -> Spans:
    """Where the assistant's messages stand in the text of a conversation, each with what ends it.

    The chat template's `{% generation %}` tags say it. Where it has none, a message begins where the generation prompt
    of the turns before it ends, and ends where the conversation up to and with it does, white space aside.

    Args:
        tokenizer: its chat template is read.
        render: writes messages as a text (`Encoder.render`).
    Raises:
        BadRow: a template without tags that writes a turn differently once others follow.
    """
    template = tokenizer.get_chat_template(None, arguments.get("tools"))
    if TAG.search(template):
        return _tagged(tokenizer, template, messages, arguments)
    whole, found = render(messages, arguments), []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if not number:
            raise BadRow(
                "the conversation begins with the assistant, and the chat template has no {% generation %} tags"
            )
        asked = render(messages[:number], arguments, add_generation_prompt=True)
        written = render(messages[: number + 1], arguments).rstrip()
        start = len(common_prefix([asked, written]))
        if start < len(render(messages[:number], arguments).rstrip()) or not whole.startswith(written):
            raise BadRow(
                "the chat template writes a turn differently once others follow, so that its text does not tell which "
                "tokens are the assistant's: give it {% generation %} tags"
            )
        found.append((start, len(written)))
    return found


def _tagged(tokenizer: Any, template: str, messages: Messages, arguments: dict[str, Any]) -> Spans:
    from transformers.utils.chat_template_utils import render_jinja_template

    found: Any
    _, found = render_jinja_template(
        conversations=[messages], chat_template=template, return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **arguments},
    )  # fmt: skip
    return [(start, end) for start, end in found[0]]


def mask(tokenizer: Any, text: str, where: Spans) -> list[int]:
    """1 for each token of a text that has a character in a span, 0 for the others.

    Raises:
        BadInput: a tokenizer that does not say which characters its tokens stand for.
    """
    if not tokenizer.is_fast:
        raise BadInput(
            f"assistant_only_loss: {type(tokenizer).__name__} does not say which characters its tokens stand for: take "
            "the model's fast tokenizer"
        )
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return [int(any(begin < stop and end > first for first, stop in where)) for begin, end in places]
