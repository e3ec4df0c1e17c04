"""Held-out scores: generate answers to prompts, let a checker grade them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from align_engine.data.batches import collate_prompts
from align_engine.data.tokenize import prepare

Checker = Callable[[dict[str, Any], str], float]  # (row, answer) -> grade


class Score(NamedTuple):
    """Grades of a model's answers."""

    mean: float
    grades: list[float]
    answers: list[str]


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """Answers to tokenised prompts, in their order, without special tokens.

    Args:
        model: a causal LM of transformers; evaluated in eval mode and left as it was.
        tokenizer: its tokenizer; the pad token may be the EOS token.
        prompts: token ids of each prompt.
        max_new_tokens: longest answer in tokens.
        batch_size: prompts per forward pass; prompts of like length go together.
        temperature: 0 takes the likeliest token (default), above 0 samples.
        seed: of sampling.
    """
    device = next(model.parameters()).device
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    training, answers = model.training, [""] * len(prompts)
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for places in _by_length(prompts, batch_size):
            ids, mask = collate_prompts([prompts[i] for i in places], tokenizer.pad_token_id)
            out = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                **sampling,
            )
            texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            for i, text in zip(places, texts):
                answers[i] = text
    model.train(training)
    return answers


def _by_length(prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def score(model: Any, tokenizer: Any, rows: Any, check: Checker, **generation: Any) -> Score:
    """Grade a model's answers to held-out prompts.

    Args:
        model, tokenizer: as `generate`.
        rows: a datasets.Dataset with a column `prompt` (text or messages) and whatever `check` reads.
        check: (row, answer) -> grade, usually in [0, 1].
        **generation: max_new_tokens, batch_size, temperature, seed.
    """
    prompts, _ = prepare(rows, tokenizer, "prompt")
    answers = generate(model, tokenizer, prompts["prompt_ids"], **generation)
    asked = [rows[i] for i in prompts["index"]]
    grades = [check(row, answer) for row, answer in zip(asked, answers)]
    return Score(sum(grades) / len(grades), grades, answers)
