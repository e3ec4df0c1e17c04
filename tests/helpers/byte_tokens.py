"""A byte-level tokenizer with a chat template, in which one can count tokens by hand."""

from __future__ import annotations

from typing import Any

import datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from align_engine.data.tokenize import prepare

TEMPLATE = (
    "{% if tools %}[{% for tool in tools %}{{ tool.name }}{% endfor %}]{% endif %}{{ mark }}"
    "{% for m in messages %}<|{{ m.role[0] }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|a|>{% endif %}"
)
SPECIAL = ["<|bos|>", "<|end|>", "<|u|>", "<|a|>", "<|s|>"]


def byte_tokenizer(bos: bool = False, merges: tuple[str, ...] = ("b c",), pad: str = "<|end|>") -> Any:
    """One token per byte but for the merges. ASCII text: id = 5 + its place in the alphabet below."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*SPECIAL, *alphabet, *("".join(merge.split()) for merge in merges)]
    core = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [tuple(merge.split()) for merge in merges]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    if bos:
        core.post_processor = processors.TemplateProcessing("<|bos|> $A", "<|bos|> $A $B", [("<|bos|>", 0)])
    core.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|bos|>", eos_token="<|end|>", pad_token=pad)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def tokens(tokenizer: Any, ids: list[int]) -> str:
    """The tokens, a bar between them."""
    return "|".join(tokenizer.convert_ids_to_tokens(ids))


def prepared(rows: list[dict[str, Any]], kind: str, tokenizer: Any = None, **settings: Any) -> tuple[Any, list, dict]:
    tokenizer = tokenizer or byte_tokenizer()
    dataset, report = prepare(datasets.Dataset.from_list(rows), tokenizer, kind, **settings)  # type: ignore[arg-type]
    return tokenizer, dataset.to_list(), report
