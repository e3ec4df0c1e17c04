"""Answers of a model or adapter to prompts, and their mean score: what the examples compare models by."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(folder: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a model's folder or hub name, or of an adapter's folder."""
    kind = AutoPeftModelForCausalLM if (Path(folder) / "adapter_config.json").exists() else AutoModelForCausalLM
    return kind.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def answers(folder: str, prompts: list[list[dict[str, str]]], max_new_tokens: int = 64) -> list[str]:
    """The likeliest answer to each prompt, through the chat template."""
    model, tokenizer = load(folder)
    said = []
    for prompt in prompts:
        written = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(written, add_special_tokens=False, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        said.append(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return said


def compare(folders: list[str], rows_file: str, score: Callable[..., list[float]]) -> dict[str, float]:
    """Print the first answers of each model and its mean score on the rows of a file; returns the means."""
    rows = [json.loads(line) for line in Path(rows_file).read_text().splitlines()]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    means = {}
    for folder in folders:
        said = answers(folder, [row["prompt"] for row in rows])
        completions = [[{"role": "assistant", "content": text}] for text in said]
        scores = score([row["prompt"] for row in rows], completions, **columns)
        means[folder] = sum(scores) / len(scores)
        print(f"{folder}: {means[folder]:.3f} on {len(rows)} prompts")
        for row, text in list(zip(rows, said))[:3]:
            print(f"  {row['prompt'][-1]['content']!r} -> {text!r}")
    return means
