"""What a tokenizer does to prompts and completions. Prompt ids + completion ids is always the training sequence."""

from __future__ import annotations

from typing import Any

import jinja2

from align_engine.data.formats import BadRow, Messages, Text
from align_engine.errors import BadInput


class Encoder:
    """A tokenizer, and what inspection says about it. Never adds a second BOS or EOS."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, first = tokenizer, tokenizer("a")["input_ids"][:1]
        self.bos = first if first == [tokenizer.bos_token_id] else []  # what it puts before every text: [] or [bos id]
        # whether it puts a space before every text (SentencePiece's dummy prefix)
        self.adds_space = tokenizer.convert_ids_to_tokens(self.ids("a"))[0].startswith("▁")

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def start(self, text: str) -> list[int]:
        """Ids of a text that begins a sequence: exactly one BOS, if the tokenizer uses one."""
        ids = self.ids(text)
        return ids if ids[:1] == self.bos else self.bos + ids

    def continuation(self, text: str) -> list[int]:
        """Ids of a text that goes on after ids that are already fixed."""
        if self.adds_space:
            anchor, ids = self.ids("\n"), self.ids("\n" + text)
            if ids[: len(anchor)] == anchor:
                return ids[len(anchor) :]
        return self.ids(text)

    def end(self, ids: list[int]) -> list[int]:
        """`ids` with exactly one EOS at its end."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise BadInput("the tokenizer has no eos_token: set one, so that the model can learn where to stop")
        return ids if ids[-1:] == [eos] else [*ids, eos]

    def render(self, messages: Messages, arguments: dict[str, Any], **how: bool) -> str:
        if self.tokenizer.chat_template is None:
            raise BadInput("the rows are conversations, but the tokenizer has no chat template: give it one")
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **arguments, **how)
        except jinja2.TemplateError as error:
            raise BadRow(f"the chat template refuses the messages: {error}") from error

    def prompt(self, prompt: Text, arguments: dict[str, Any]) -> list[int]:
        """Ids to generate from."""
        return self.start(prompt) if isinstance(prompt, str) else self.ids(self._rendered_prompt(prompt, arguments))

    def whole(self, text: Text, arguments: dict[str, Any]) -> list[int]:
        """Ids of a text without a prompt."""
        return self.end(self.start(text)) if isinstance(text, str) else self.ids(self.render(text, arguments))

    def split(
        self, prompt: Text, completions: list[Any], arguments: dict[str, Any]
    ) -> tuple[list[int], list[list[int]], list[str]]:
        """(prompt ids, ids of each completion, notes). Prompt ids + completion ids is the training sequence."""
        if isinstance(prompt, str):
            return self.start(prompt), [self.end(self.continuation(text)) for text in completions], []
        text = self._rendered_prompt(prompt, arguments)
        wholes = [self.render([*prompt, *completion], arguments) for completion in completions]
        notes = []
        if not all(whole.startswith(text) for whole in wholes):
            # some templates put more behind the generation prompt (an opened <think>) than in front of an answer
            text, before = _common_prefix([text, *wholes]), self.render(prompt, arguments)
            if not text.startswith(before):
                raise BadRow("the chat template writes the prompt differently once an answer follows")
            notes.append("prompt ends where the chat template's generation prompt and the answers' text part")
        prompt_ids, completion_ids = self.ids(text), []
        for whole in wholes:
            ids = self.ids(whole)
            if ids[: len(prompt_ids)] == prompt_ids:
                completion_ids.append(ids[len(prompt_ids) :])
            else:
                completion_ids.append(self.continuation(whole[len(text) :]))
                notes.append("tokens would merge across the end of the prompt: the answer was tokenised by itself")
        return prompt_ids, completion_ids, notes

    def _rendered_prompt(self, prompt: Messages, arguments: dict[str, Any]) -> str:
        answering = prompt[-1]["role"] == "assistant"  # the completion goes on with this message
        return self.render(prompt, arguments, add_generation_prompt=not answering, continue_final_message=answering)


def _common_prefix(texts: list[str]) -> str:
    low, high = min(texts), max(texts)
    return low[: next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), len(low))]
