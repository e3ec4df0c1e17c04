"""Answers of a checkpoint in this process, by the engine's own sampler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import torch
import transformers

from align_engine.data.formats import Text
from align_engine.data.tokenize import check_vocab, prepare
from align_engine.errors import BadInput, Naming, among
from align_engine.models import load
from align_engine.preparation.models import ModelSpec, Reply
from align_engine.recipe import ModelSection, RolloutSection
from align_engine.rollouts.generate import transformers_sampler


def as_read(prompts: list[Any], tokenizer: Any, where: str) -> list[Any]:
    """Prompts, texts or messages, as a tokenizer takes them: where it has no chat template, one message of the user is
    the text that it is.

    Raises:
        BadInput: it has none for a conversation.
    """
    if tokenizer.chat_template is not None:
        return prompts
    chats = [one for one in prompts if isinstance(one, list)]
    if turns := next((one for one in chats if [part["role"] for part in one] != ["user"]), None):
        said = ", ".join(part["role"] for part in turns)
        raise BadInput(f"{where} has no chat template, and a prompt has messages of {said}")
    return [one if isinstance(one, str) else one[0]["content"] for one in prompts]


class Local:
    """A checkpoint and the prompts that it answers.

    Args:
        spec: names its path, and how it samples.
        prompts: by the number of their row, messages or texts, which are taken as they are. Where its tokenizer has no
            chat template, one message of the user is taken as the text that it is.
        named: of those numbers.
    Raises:
        BadInput: no model there, a tokenizer without chat template for a conversation, prompts that are too long.
    """

    def __init__(self, spec: ModelSpec, prompts: dict[int, Text], named: Naming) -> None:
        self.spec, field = spec, f"model {spec.name!r}: path"
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        path = str(spec.path)
        self.tokenizer = load.load_tokenizer(path, field=field)
        texts = as_read(list(prompts.values()), self.tokenizer, f"{field} = {path!r}")
        rows = datasets.Dataset.from_list([{"prompt": one} for one in texts])
        named = among(named, list(prompts))
        kept, _ = prepare(rows, self.tokenizer, "prompt", max_length=None, named=named)
        self.ids = dict(zip(prompts, kept["prompt_ids"][:]))
        model = load.load_model(path, ModelSection(model_name_or_path=path, dtype="auto"))
        check_vocab(kept, load.vocabulary(model), f"model {spec.name!r}", named)
        load.check_pad(model, self.tokenizer)
        load.check_positions(model, max(map(len, self.ids.values())) + spec.max_tokens)
        greedy = spec.temperature == 0
        settings = RolloutSection(max_completion_length=spec.max_tokens, temperature=spec.temperature or 1.0,
                                  top_p=spec.top_p, top_k=1 if greedy else 0)  # fmt: skip
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.sampler = transformers_sampler(model.to(device), self.tokenizer, settings)

    def batches(self, size: int) -> list[list[int]]:
        """All rows in batches of at most `size` answers (one row at least), prompts of like length together."""
        order, rows = sorted(self.ids, key=lambda row: (len(self.ids[row]), row)), max(1, size // self.spec.n)
        return [order[start : start + rows] for start in range(0, len(order), rows)]

    def sample(self, batch: Sequence[int], seed: int) -> list[Reply]:
        """The reply to each row of a batch."""
        count = self.spec.n
        found = self.sampler([self.ids[row] for row in batch for _ in range(count)], seed)
        replies = []
        for number, row in enumerate(batch):
            own = found[number * count : (number + 1) * count]
            texts = [self.tokenizer.decode(one.ids, skip_special_tokens=True) for one in own]
            answers = [(text, "stop" if one.ended else "length") for text, one in zip(texts, own)]
            replies.append(Reply(seed, answers, (len(self.ids[row]), sum(len(one.ids) for one in own))))
        return replies
