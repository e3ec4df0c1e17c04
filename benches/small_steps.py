"""Whole steps of a small model: DPO on pairs and GRPO on groups of samples, forward, backward and AdamW.

All methods read the padded batch; TREES is align_kernels on the same sequences as packed rows, each prompt once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from methods import METHODS, OURS, TREES, value
from questions import HEADS, IGNORE, Batch, Question, off
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from align_engine.data import batches
from align_engine.integrations.hook import fused_head
from align_engine.models.tree_attention import reading

LAYERS = 4
LENGTHS = {"small": (128, {"dpo step": 128, "grpo step": 32}), "tiny": (6, {"dpo step": 5, "grpo step": 4})}
GROUP = {"dpo step": 2, "grpo step": 8}


def rows(question: Question) -> list[dict[str, Any]]:
    """Prompts with two answers, or eight samples, of half to one and a half times a mean length."""
    draw, vocabulary = torch.Generator().manual_seed(0), HEADS[question.head][1]
    prompt, answer = LENGTHS[question.head][0], LENGTHS[question.head][1][question.what]

    def ids(length: int) -> list[int]:
        size = int(torch.randint(length // 2, 3 * length // 2, (), generator=draw))
        return torch.randint(0, vocabulary, (size,), generator=draw).tolist()

    found: list[dict[str, Any]] = []
    for _ in range(question.rows):
        asked, answers = ids(prompt), [ids(answer) for _ in range(GROUP[question.what])]
        if question.what == "dpo step":
            found.append({"prompt_ids": asked, "chosen_ids": answers[0], "rejected_ids": answers[1]})
        else:
            found += [{"prompt_ids": asked, "completion_ids": one} for one in answers]
    return [row | {"index": i} for i, row in enumerate(found)]


class StepWork:
    """A model, its batch and optimiser; `true` is what `exact_grads` found."""

    def __init__(
        self, question: Question, method: str, true: dict[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> None:
        self.true, self.question, self.method = true, question, METHODS[OURS if method == TREES else method]
        d, v = HEADS[question.head]
        torch.manual_seed(0)
        config = Qwen2Config(
            hidden_size=d, intermediate_size=4 * d, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=v, tie_word_embeddings=True,
        )  # fmt: skip
        model: Any = Qwen2ForCausalLM(config)
        self.model = model.to(dtype).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)
        collate = batches.collate_pairs if question.what == "dpo step" else batches.collate_rollouts
        self.batch = collate(rows(question), pad_id=None if method == TREES else 0)
        self.there = self.batch.targets != IGNORE
        rng = torch.Generator().manual_seed(1)
        self.old = 0.5 * torch.randn(int(self.there.sum()), generator=rng) - math.log(v)  # a number a target
        self.advantages = torch.randn(len(self.batch.targets), generator=rng)

    def inputs(self, hidden: Tensor, head: dict[str, Any]) -> Batch:
        s = len(self.batch.targets)
        old = torch.zeros(self.batch.targets.shape).masked_scatter(self.there, self.old)
        return Batch(
            self.batch.predicting(hidden), head["weight"], self.batch.targets, torch.zeros(()), torch.zeros(s), old,
            self.advantages, torch.arange(s) % 2 == 0, torch.zeros(()),
        )  # fmt: skip

    def backward(self) -> None:
        def of(hidden: Tensor, head: dict[str, Any]) -> Tensor:
            return value(self.method, self.question, self.inputs(hidden, head))

        with reading(self.model, self.batch) as inputs, fused_head(self.model, of):
            self.model(**inputs, use_cache=False).logits.backward()

    def run(self) -> None:
        self.backward()
        self.optimizer.step()

    def forget(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def kept_bytes(self) -> int:
        """What a step leaves behind: gradients (AdamW's states are there before it is measured)."""
        return sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)

    def grads(self) -> dict[str, Tensor | None]:
        """Those that are compared."""
        paths = {"dW": "model.embed_tokens.weight", "first layer": "model.layers.0.mlp.up_proj.weight"}
        return {name: self.model.get_parameter(path).grad for name, path in paths.items()}

    def check(self) -> dict[str, float]:
        """Errors of gradients against those in float64."""
        self.backward()
        found = {name: off(grad, self.true[name]) for name, grad in self.grads().items()}
        self.forget()
        return found


def exact_grads(question: Question) -> dict[str, Tensor]:
    """Of the same step from whole logits in float64."""
    exact = StepWork(question, "eager", {}, torch.float64)
    exact.backward()
    return {name: grad for name, grad in exact.grads().items() if grad is not None}
