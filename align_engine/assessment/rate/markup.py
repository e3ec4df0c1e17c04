"""Answers as HTML that cannot do anything: Markdown without HTML, links and pictures; whatever it holds is shown."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from markdown_it import MarkdownIt
from markupsafe import Markup

LONGEST = 50_000  # characters that are read as Markdown; longer texts are shown as they stand
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # terminals act on them, browsers swallow them
HEADING = re.compile(r"h[1-6]")


@cache
def _parser() -> MarkdownIt:
    """Pages have headings of their own: those of an answer are paragraphs in bold."""
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"])
    parser.disable(["link", "image", "autolink", "reference", "html_block", "html_inline"])

    def demote(state: Any) -> None:
        for token in state.tokens:
            if token.type in ("heading_open", "heading_close"):
                token.attrs, token.tag = {"class": "heading"} if token.nesting == 1 else {}, "p"
            elif token.type in ("fence", "code_block"):
                token.attrSet("dir", "ltr")

    parser.core.ruler.push("demote", demote)
    return parser


def shown(text: str) -> str:
    """A text without what a page cannot hold: control characters and halves of pairs, as Python escapes them."""
    text = CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text.replace("\r\n", "\n"))
    return text.encode("utf-8", "backslashreplace").decode()


def rendered(text: str) -> Markup:
    """A text as HTML: Markdown, or, where it is very long, as it stands."""
    text = shown(text)
    if len(text) > LONGEST:
        return Markup('<pre class="plain">{}</pre>').format(text)
    return Markup(_parser().render(text))  # escapes all that is text in it


def turns(value: Any) -> list[tuple[str | None, Markup]]:
    """A prompt or an answer as (role, HTML) of each message; a text has no role."""
    if isinstance(value, str):
        return [(None, rendered(value))]
    return [(message["role"], _message(message)) for message in value]


def _message(message: dict[str, Any]) -> Markup:
    found = rendered(message.get("content") or "")
    for call in message.get("tool_calls") or ():
        found += Markup("<pre>{}</pre>").format(shown(str(call)))
    return found


def answer(value: Any) -> list[tuple[str | None, Markup]]:
    """An answer: as `turns`, without the role where it is one message of the assistant's."""
    found = turns(value)
    return [(None, found[0][1])] if len(found) == 1 else found
