"""A model that one talks to: what was said, and its answer as it comes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from transformers import StoppingCriteria, TextIteratorStreamer

from align_engine.assessment.sections import TalkSection
from align_engine.data.formats import Messages
from align_engine.errors import BadInput
from align_engine.models import load
from align_engine.recipe import ModelSection


class Voice:
    """One model in a conversation.

    Args:
        path: folder or hub name of a model or of adapters.
    Attributes:
        messages: what has been said.
    Raises:
        BadInput: no causal language model there; its chat template takes no system prompt.
    """

    def __init__(self, path: str, settings: TalkSection) -> None:
        self.path, self.settings = path, settings
        section = ModelSection(dtype=settings.dtype, trust_remote_code=settings.trust_remote_code)
        self.tokenizer = load.load_tokenizer(path, trust_remote_code=settings.trust_remote_code)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: Any = load.load_model(path, section).to(device).eval()
        self.most: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.reset()
        self.read([*self.messages, {"role": "user", "content": "a"}])

    def reset(self) -> None:
        """Forget what was said, but for the system prompt."""
        system = self.settings.system_prompt
        self.messages: Messages = [] if system is None else [{"role": "system", "content": system}]

    @property
    def templated(self) -> bool:
        """Whether there is a chat template; without one, messages are lines of a text."""
        return self.tokenizer.chat_template is not None

    def read(self, messages: Messages) -> torch.Tensor:
        """Ids of a conversation whose next message is the model's: [1, T].

        Raises:
            BadInput: the template refuses it, or it is longer than the model can read.
        """
        try:
            if self.templated:
                made = self.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
            else:
                made = self.tokenizer("".join(f"{one['content']}\n" for one in messages), return_tensors="pt")
        except Exception as error:  # of a template, which is a program
            raise BadInput(f"the chat template of {self.path!r} refuses this conversation: {error}") from error
        ids = made["input_ids"]
        if self.most is not None and ids.shape[1] >= self.most:
            raise BadInput(f"the conversation has {ids.shape[1]} tokens, and {self.path!r} reads {self.most}: /reset")
        return ids

    def answer(self, text: str) -> Iterator[str]:
        """What the model says to a message, piece by piece; closed early, it stops there, and what was said stays.

        Raises:
            BadInput: as `read`, or what `generate` raises; nothing was said then.
        """
        said, asked = "", [*self.messages, {"role": "user", "content": text}]
        ids = self.read(asked)
        work = _Work(self, ids)
        try:
            for piece in work:
                said += piece
                yield piece
        finally:
            work.end()
            if work.error is None:
                self.messages = [*asked, {"role": "assistant", "content": said}]


class _Work(StoppingCriteria):
    """One call of `generate` in a thread; iterating over it gives its text as it comes."""

    def __init__(self, voice: Voice, ids: torch.Tensor) -> None:
        self.voice, self.ids, self.over = voice, ids, threading.Event()
        self.error: BadInput | None = None
        self.streamer: Any = TextIteratorStreamer(voice.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.thread = threading.Thread(target=self.generate, daemon=True)

    def __iter__(self) -> Iterator[str]:
        self.thread.start()
        yield from (piece for piece in self.streamer if piece)
        self.thread.join()
        if self.error is not None:
            raise self.error

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.full((len(input_ids),), self.over.is_set(), device=input_ids.device)

    def end(self) -> None:
        """Stop where it is, and wait for that."""
        self.over.set()
        if self.thread.ident is not None:
            self.thread.join()

    def generate(self) -> None:
        own, voice = self.voice.settings, self.voice
        ids = self.ids.to(voice.model.device)
        room = own.max_new_tokens if voice.most is None else min(own.max_new_tokens, voice.most - ids.shape[1])
        drawn: dict[str, Any] = {"temperature": own.temperature, "top_p": own.top_p, "top_k": own.top_k}
        try:
            torch.manual_seed(own.seed + len(voice.messages))
            voice.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, streamer=self.streamer,
                stopping_criteria=[self], pad_token_id=voice.tokenizer.pad_token_id, do_sample=own.temperature > 0,
                **(drawn if own.temperature > 0 else {"temperature": None, "top_p": None, "top_k": None}),
            )  # fmt: skip
        except Exception as error:  # of a device's memory, say; raised where the text is read
            self.error = BadInput(f"{voice.path!r} cannot answer: {type(error).__name__}: {error}")
            self.streamer.end()
