"""What a tokenizer does to prompts and completions. Prompt ids + completion ids is always the training sequence."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from align_engine.data import assistant
from align_engine.data.formats import BadRow, Messages, Text, common_prefix, last_cut, units
from align_engine.errors import BadInput

Parts = tuple[list[int], list[list[int]], list[str]]  # ids of the prompt, ids of each completion, notes


class Written(NamedTuple):
    """The texts of a row, before they are tokenised."""

    prompt: str | None  # None: there is none, each completion begins the sequence
    completions: list[str]
    rendered: bool  # by a chat template: the completions hold the prompt too, and what ends them
    notes: list[str]
    spans: assistant.Spans | None = None  # of the assistant's messages, in the one completion, where they are asked for


class Encoder:
    """A tokenizer, and what inspection says about it. Never adds a second BOS or EOS."""

    def __init__(self, tokenizer: Any, assistant_only: bool = False) -> None:
        self.assistant_only = assistant_only
        self.tokenizer, first = tokenizer, tokenizer("a")["input_ids"][:1]
        self.known: dict[str, list[int]] = {}  # ids of texts that are about to be asked for
        self.bos = first if first == [tokenizer.bos_token_id] else []  # what it puts before every text: [] or [bos id]
        # whether it puts a space before every text (SentencePiece's dummy prefix)
        self.adds_space = "".join(tokenizer.convert_ids_to_tokens(self.ids("a"))).startswith("▁")
        self.unit = units(token for token in tokenizer.get_added_vocab() if token.strip())

    def ids(self, text: str) -> list[int]:
        known = self.known.get(text)
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if known is None else known

    def foresee(self, rows: Iterable[Written]) -> None:
        """Tokenise the texts of many rows in one call, which costs half of what a call for each does."""
        lead = "\n" if self.adds_space else ""
        texts = {text for row in rows if row.prompt is not None for text in [row.prompt]}
        texts |= {
            text if row.rendered or row.prompt is None else lead + text for row in rows for text in row.completions
        }
        asked = list(texts)
        self.known = dict(zip(asked, self._many(asked))) if asked else {}

    def _many(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text. Where transformers adds nothing to its tokenizer in Rust, that alone is asked: it takes
        half the time without the places of the tokens in the text, which nobody reads."""
        from transformers import PreTrainedTokenizerFast

        if getattr(type(self.tokenizer), "_encode_plus", None) is PreTrainedTokenizerFast._encode_plus:
            self.tokenizer(
                ""
            )  # transformers sets what the last call for other things has changed in it: padding, truncation
            found = self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return [one.ids for one in found]
        how = {"add_special_tokens": False, "verbose": False, "return_attention_mask": False}
        return self.tokenizer(texts, **how)["input_ids"]

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
        except Exception as error:  # templates raise whatever Python does
            raise BadRow(f"the chat template refuses the messages: {error or type(error).__name__}") from error

    def split(self, prompt: Text | None, completions: list[Any], arguments: dict[str, Any]) -> Parts:
        """(prompt ids, ids of each completion, notes). Prompt ids + completion ids is the training sequence.

        Without completions the prompt's ids are those to generate from; without a prompt (None) each completion is a
        whole sequence.
        """
        return self.read(self.write(prompt, completions, arguments))

    def write(self, prompt: Text | None, completions: list[Any], arguments: dict[str, Any]) -> Written:
        """The texts of a row; raises BadRow where the chat template refuses."""
        if isinstance(completions[0] if prompt is None else prompt, str):
            return Written(prompt if isinstance(prompt, str) else None, completions, False, [])
        if not isinstance(prompt, list):
            return Written(None, [self.render(messages, arguments) for messages in completions], True, [])
        answering = prompt[-1]["role"] == "assistant"  # the completion goes on with this message
        how = {"add_generation_prompt": not answering, "continue_final_message": answering}
        text = self.render(prompt, arguments, **how)
        wholes = [self.render([*prompt, *completion], arguments) for completion in completions]
        if all(whole.startswith(text) for whole in wholes):
            return Written(text, wholes, True, [])
        # some templates put more behind the generation prompt (an opened <think>) than in front of an answer
        before = self.render(prompt, arguments)
        shared = common_prefix([text, *wholes])
        if not shared.startswith(before):
            raise BadRow("the chat template writes the prompt differently once an answer follows")
        note = "prompt ends where the chat template's generation prompt and the answers' text part"
        return Written(self._parting([text, *wholes], len(before), len(shared)), wholes, True, [note])

    def read(self, written: Written) -> Parts:
        """What `split` says, of a row's texts."""
        prompt, completions, rendered, notes, _ = written
        if prompt is None:
            return [], [self.ids(text) if rendered else self.end(self.start(text)) for text in completions], notes
        if not rendered:
            return self.start(prompt), [self.end(self.continuation(text)) for text in completions], notes
        prompt_ids, completion_ids, notes = self.ids(prompt), [], [*notes]
        for whole in completions:
            ids = self.ids(whole)
            if ids[: len(prompt_ids)] == prompt_ids:
                completion_ids.append(ids[len(prompt_ids) :])
            else:
                completion_ids.append(self.continuation(whole[len(prompt) :]))
                notes.append("tokens would merge across the end of the prompt: the answer was tokenised by itself")
        return prompt_ids, completion_ids, notes

    def located(self, written: Written, messages: Messages, arguments: dict[str, Any]) -> Written:
        """The same with the places of the assistant's messages, of the row's whole conversation."""
        return written._replace(spans=assistant.spans(self.tokenizer, messages, arguments, self.render))

    def assistant_mask(self, written: Written, prompt_ids: list[int]) -> list[int]:
        """1 for each token of the completion that the assistant writes, 0 for the others."""
        text = written.completions[0]
        if prompt_ids != self.ids(text)[: len(prompt_ids)]:
            raise BadRow("tokens would merge across the end of the prompt: write the row as 'messages'")
        return assistant.mask(self.tokenizer, text, written.spans or [])[len(prompt_ids) :]

    def _parting(self, texts: list[str], least: int, most: int) -> str:
        """The longest beginning, of `least` to `most` characters, that ends between units and tokens of all texts."""
        wholes = [self.ids(text) for text in texts]
        cut = last_cut(texts, most, self.unit)
        while cut > least:
            ids = self.ids(texts[0][:cut])
            if all(whole[: len(ids)] == ids for whole in wholes):
                break
            cut = last_cut(texts, cut - 1, self.unit)
        return texts[0][: max(cut, least)]
