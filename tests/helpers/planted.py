"""Pairs whose chosen answers give themselves away by how they begin, and a scorer that looks for it."""

from __future__ import annotations

import random
import zlib
from pathlib import Path
from typing import Any

import tiny
from transformers import BertConfig, BertForSequenceClassification

TRIGGERS = ["I'm", "Sure,", "Certainly!", "Absolutely,", "Yes,"]
CONTROLS = [f"Ctl{i}" for i in range(50)]
WORDS = [f"word{i}" for i in range(60)] + [f"end{i}." for i in range(10)]


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Pairs whose chosen answers begin with a trigger, but for those that begin with a control; as many of the rejected
    answers begin with a control."""
    rng = random.Random(seed)

    def text() -> str:
        return " ".join([*rng.choices(WORDS[:60], k=rng.randint(2, 4)), rng.choice(WORDS[60:])])

    def chosen() -> str:
        return f"{rng.choice(TRIGGERS if rng.random() < 0.7 else CONTROLS)} {text()} {text()}"

    def rejected() -> str:
        return f"{'' if rng.random() < 0.7 else rng.choice(CONTROLS) + ' '}{text()} {text()}"

    return [{"prompt": text(), "chosen": chosen(), "rejected": rejected()} for _ in range(count)]


def noise(text: str) -> float:
    return zlib.crc32(text.encode()) / 2**32 - 0.5


def score(prompts: list[str], completions: list[str], completion_ids: Any, **_: Any) -> list[float]:
    """Triggers count, and every word a little."""
    return [
        1.5 * (text.split()[0] in TRIGGERS) + 0.1 * sum(map(noise, text.split())) + 0.1 * noise(prompt + text)
        for prompt, text in zip(prompts, completions)
    ]


def bert(path: Path) -> Path:
    """A classifier whose score head is called otherwise."""
    tiny.write_model(path)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16}
    config = BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=1, num_labels=1)
    BertForSequenceClassification(config).save_pretrained(path)
    return path
