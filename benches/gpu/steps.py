"""A whole optimiser step of DPO and GRPO on a randomly initialised model: this library's head, TRL's head, eager torch.

The model's body, its data, the optimiser and gradient checkpointing are the same for all; the log-probs of the
reference and of the sampling policy are given. TRL's head is what its trainers call, ChunkedLogProbFunction. A 7B model
whose weights are all trained takes SGD: weights, gradients and AdamW's two states would be 61 GB before any activation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import methods
import torch
from common import Lab
from questions import Batch, Question
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

MODELS = {
    "0.5B": dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
                 intermediate_size=4864, vocab_size=151936, tie_word_embeddings=True),
    "7B": dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
               intermediate_size=18944, vocab_size=152064, tie_word_embeddings=False),
}  # fmt: skip
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=48,
            vocab_size=211, tie_word_embeddings=True)  # fmt: skip
SEQUENCES, LENGTH = 8, 1024


class Step:
    """A model, a batch and an optimiser."""

    def __init__(self, shape: dict[str, Any], lora: bool, adam: bool, lab: Lab) -> None:
        b, t = (4, 12) if lab.dry else (SEQUENCES, LENGTH)
        torch.manual_seed(time.time_ns() % 2**31)
        with lab.device:
            default = torch.get_default_dtype()
            torch.set_default_dtype(lab.dtype)
            self.model: Any = Qwen2ForCausalLM(Qwen2Config(**shape, max_position_embeddings=2 * t))
            torch.set_default_dtype(default)
            self.ids = torch.randint(0, shape["vocab_size"], (b, t))
            self.targets = self.ids.roll(-1, 1)
            self.ref = torch.randn(b) - 10.0 * t
            self.old = torch.randn(b, t) - 10.0
            self.advantages = torch.randn(b)
        self.targets[:, : t // 4] = -100
        self.targets[:, -1] = -100
        if lora:
            from peft import LoraConfig, get_peft_model

            self.model = get_peft_model(self.model, LoraConfig(r=16, target_modules="all-linear", lora_alpha=32))
        base = self.model.get_base_model() if lora else self.model
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
        self.model.train()
        self.body, self.weight = base.model, base.lm_head.weight
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW if adam else torch.optim.SGD
        self.optimizer = optimizer(trained, lr=1e-6, fused=not lab.dry)

    def inputs(self, hidden: Tensor) -> Batch:
        nothing = torch.zeros((), device=hidden.device)
        good = torch.arange(len(self.ids), device=hidden.device) % 2 == 0
        return Batch(
            hidden, self.weight, self.targets, nothing, self.ref, self.old, self.advantages, good, nothing
        )  # fmt: skip

    def run(self, loss: Callable[[Step, Tensor], Tensor]) -> None:
        hidden = self.body(input_ids=self.ids, use_cache=False).last_hidden_state
        loss(self, hidden).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def losses(kind: str, dry: bool) -> dict[str, Callable[[Step, Tensor], Tensor]]:
    own = ("cpu", "torch") if dry else ("triton", "cuda", "torch")
    ways = {f"{methods.OURS}, {impl}": methods.ours(impl) for impl in own}
    ways |= {peer: methods.METHODS[peer] for peer in ("TRL", "eager")}
    question = Question(f"{kind} step", "", SEQUENCES)
    return {key: lambda s, x, m=m: methods.value(m, question, s.inputs(x)) for key, m in ways.items()}


def steps(lab: Lab, model: str, trained: str) -> None:
    adam = trained == "LoRA" or model != "7B"
    made, reason = lab.attempt("model", lambda: Step(TINY if lab.dry else MODELS[model], trained == "LoRA", adam, lab))
    if made is None:
        lab.record("model", None, "", note=reason)
        return
    for kind in ("dpo", "grpo"):
        runs = {f"{kind}, {key}": lambda f=f: made.run(f) for key, f in losses(kind, lab.dry).items()}
        took = lab.race(runs)
        peer = took[f"{kind}, TRL"].milliseconds
        for key, measured in took.items():
            more = {"peak MiB": measured.peak_mib, "note": measured.note}
            if measured.milliseconds and peer:
                more["TRL's time over this"] = peer / measured.milliseconds
            lab.record(key, measured.milliseconds, "ms", optimizer="AdamW" if adam else "SGD", **more)
