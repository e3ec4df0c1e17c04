"""A random two-layer Llama and a few sequences of token ids: enough to see each example run on a CPU in seconds."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 500


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, pad_token_id=0, eos_token_id=1, bos_token_id=None, **sizes))


def rows(count: int = 32, prompt: int = 8, length: int = 24) -> list[dict[str, torch.Tensor]]:
    """Sequences that count upwards; labels are -100 on the prompt, which the head then never sees."""
    start = torch.randint(2, VOCAB - length, (count, 1), generator=torch.Generator().manual_seed(0))
    ids = start + torch.arange(length)
    labels = torch.where(torch.arange(length) < prompt, -100, ids)
    return [{"input_ids": a, "labels": b} for a, b in zip(ids, labels)]
