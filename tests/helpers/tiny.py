"""A model, a tokenizer and data that train in milliseconds, and the recipe that goes with them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from align_engine.recipe import (
    CpoRecipe,
    DpoRecipe,
    KtoRecipe,
    OrpoRecipe,
    Recipe,
    RmRecipe,
    SftRecipe,
    SimpoRecipe,
    flat,
)

WORDS = [f"w{i}" for i in range(60)]


def write_model(
    path: Path,
    seed: int = 0,
    vocab: int = 64,
    dtype: torch.dtype = torch.float32,
    words: Sequence[str] = WORDS,
    **config: Any,
) -> Path:
    """A Llama of 64 tokens with its tokenizer; pad equals eos, as many tokenizers have it."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", "<eos>", *words])}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    ).save_pretrained(path)
    torch.manual_seed(seed)
    settings = dict(vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2, bos_token_id=None,
                    eos_token_id=1, pad_token_id=1, tie_word_embeddings=True)  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **config})).to(dtype)
    model.save_pretrained(path)
    return path


def write_experts(path: Path, model: Path) -> Path:
    """A mixture of four experts whose config asks for the load-balancing loss, with the tokenizer of `model`."""
    shutil.copytree(model, path, dirs_exist_ok=True)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
        num_key_value_heads=2, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2,
        router_aux_loss_coef=0.7, output_router_logits=True, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(path)
    return path


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sentence(rng: random.Random, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def preference_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [
        {"prompt": sentence(rng, 6), "chosen": f"w1 {sentence(rng, 5)}", "rejected": f"w2 {sentence(rng, 9)}"}
        for _ in range(count)
    ]


def several_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts with one to three answers on each side."""
    rng = random.Random(seed)
    sides = (("chosen", "w1", 5), ("rejected", "w2", 9))
    return [
        {"prompt": sentence(rng, 6)}
        | {side: [f"{word} w{i} {sentence(rng, most)}" for i in range(rng.randint(1, 3))] for side, word, most in sides}
        for _ in range(count)
    ]


def each_pair(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A row of one chosen and one rejected answer for each pair of such rows."""
    return [
        {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}
        for row in rows
        for chosen in row["chosen"]
        for rejected in row["rejected"]
    ]


def sft_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in preference_rows(count, seed)]


def label_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Every prompt twice, a third of the answers good."""
    rows = preference_rows(count, seed)
    return [
        {"prompt": rows[i // 2]["prompt"], "completion": row["rejected" if i % 3 else "chosen"], "label": i % 3 == 0}
        for i, row in enumerate(rows)
    ]


def recipe(kind: type[Recipe], model: Path, rows: Path, out: Path, **settings: Any) -> Recipe:
    """A small recipe; `settings` are fields by their bare names."""
    made = kind()
    settings = dict(model_name_or_path=str(model), dataset_name=str(rows), output_dir=str(out), max_steps=3,
                    learning_rate=1e-3, logging_steps=1, bf16=False) | settings  # fmt: skip
    unknown = set(settings) - set(flat(made))
    assert not unknown, unknown
    for section in vars(made).values():
        for name in set(vars(section)) & set(settings):
            setattr(section, name, settings[name])
    return made


def dpo(*paths: Path, **settings: Any) -> DpoRecipe:
    return recipe(DpoRecipe, *paths, **settings)


def sft(*paths: Path, **settings: Any) -> SftRecipe:
    return recipe(SftRecipe, *paths, **settings)


def prompt_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [{"prompt": sentence(rng, 6), "wanted": rng.choice(WORDS)} for _ in range(count)]


def word_reward(prompts: list[str], completions: list[str], wanted: list[str], **_: Any) -> list[float | None]:
    """Share of the completion's words that are the wanted one's neighbours; some are left unscored."""
    found: list[float | None] = []
    for text, word in zip(completions, wanted):
        words = text.split()
        near = sum(abs(int(one[1:]) - int(word[1:])) < 20 for one in words if one[0] == "w")
        found.append(None if text.endswith("w7") else near / max(len(words), 1))
    return found


def coarse_reward(prompts: list[str], completions: list[str], wanted: list[str], **_: Any) -> list[float]:
    """Whether the completion's first word is near the wanted one: of few completions, often all or none."""
    first = [(text.split() or ["w-100"])[0] for text in completions]
    return [float(one[0] == "w" and abs(int(one[1:]) - int(word[1:])) < 8) for one, word in zip(first, wanted)]


ONLINE = {"reward_funcs": ["tiny:word_reward"], "max_completion_length": 6, "num_generations": 4, "temperature": 1.0,
          "per_device_generation_batch_size": 6, "gradient_checkpointing": False}  # fmt: skip


def online(kind: type[Recipe], *paths: Path, **settings: Any) -> Recipe:
    return recipe(kind, *paths, **(ONLINE | settings))


OFFLINE = {
    "sft": (SftRecipe, sft_rows),
    "rm": (RmRecipe, preference_rows),
    "dpo": (DpoRecipe, preference_rows),
    "simpo": (SimpoRecipe, preference_rows),
    "orpo": (OrpoRecipe, preference_rows),
    "cpo": (CpoRecipe, preference_rows),
    "kto": (KtoRecipe, label_rows),
}

WITH_REFERENCE = ("dpo", "kto")


def offline(name: str, model: Path, rows: Path, out: Path, **settings: Any) -> Recipe:
    """A small recipe for any algorithm that learns from fixed rows."""
    return recipe(OFFLINE[name][0], model, rows, out, **settings)
