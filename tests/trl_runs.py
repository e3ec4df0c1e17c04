"""Twenty steps of each TRL trainer on a tiny model, the same in every run but for what the test changes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
import trl
from datasets import Dataset
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

V = 67  # no other size of the model is a multiple of it
STEPS = 20


def prompts(count: int) -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"]} for row in tiny.preference_rows(count)]


def marked(count: int) -> list[dict[str, Any]]:
    return [{**row, "label": i % 3 > 0} for i, row in enumerate(tiny.sft_rows(count))]


def reward(completions: list[str], **_: Any) -> list[float]:
    """Something that differs between completions, as no group without advantage has a gradient."""
    return [sum(map(ord, text)) % 7 + len(text) / 10 for text in completions]


# kind -> (trainer, its config, rows, settings)
KINDS: dict[str, tuple[str, Callable[[int], list[dict[str, Any]]], dict[str, Any]]] = {
    "dpo": ("DPO", tiny.preference_rows, {}),
    "sft": ("SFT", tiny.sft_rows, {}),
    "kto": ("KTO", marked, {}),
    "grpo": ("GRPO", prompts, dict(num_generations=2, max_completion_length=6, beta=0.1, temperature=0.9)),
    "rloo": ("RLOO", prompts, dict(num_generations=2, max_completion_length=6, beta=0.1)),
    "reward": ("Reward", tiny.preference_rows, {}),
}


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(dict(logs or {}))


def build(kind: str, folder: Path, out: Path, *, model: Any = None, trainer: Any = None, peft_config: Any = None,
          rows: int = 16, **settings: Any) -> Any:  # fmt: skip
    """A trainer of TRL over the model in `folder`, on the CPU, without files or reports."""
    name, make, own = KINDS[kind]
    defaults = dict(output_dir=str(out), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-3,
                    logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", bf16=False, disable_tqdm=True,
                    gradient_checkpointing=False, seed=3)  # fmt: skip
    config = getattr(trl, f"{name}Config")(**defaults | own | settings)
    kind_of_model = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    options = dict(num_labels=1) if kind == "reward" else {}
    torch.manual_seed(0)
    random.seed(0)
    given = dict(
        model=kind_of_model.from_pretrained(folder, dtype=torch.float32, **options) if model is None else model,
        args=config,
        train_dataset=Dataset.from_list(make(rows)),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Losses()],
    )
    if "eval_strategy" in settings:
        given["eval_dataset"] = Dataset.from_list(make(6))
    if kind in ("grpo", "rloo"):
        given["reward_funcs"] = reward
    if peft_config is not None:
        given["peft_config"] = peft_config
    return (trainer or getattr(trl, f"{name}Trainer"))(**given)


def run(trainer: Any) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """What it logged at each step, and the weights that it ends with."""
    trainer.train()
    (losses,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, Losses))
    state = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    return [log for log in losses.logs if "loss" in log], {k: v.detach().clone() for k, v in state.items()}


def same(ours: tuple[list, dict], theirs: tuple[list, dict], tolerance: float = 1e-4) -> None:
    """Every number of every step, but clocks, and every weight."""
    clocks = ("time", "runtime", "per_second")
    assert len(ours[0]) == len(theirs[0]) > 0
    for step, (a, b) in enumerate(zip(ours[0], theirs[0])):
        names = [name for name in b if not any(word in name for word in clocks)]
        assert set(names) <= set(a) and "loss" in names
        for name in names:
            allowed = tolerance * max(1.0, abs(b[name]))
            assert abs(a[name] - b[name]) <= allowed, f"step {step}, {name}: {a[name]} against {b[name]}"
    assert ours[1].keys() == theirs[1].keys()
    for name, weight in theirs[1].items():
        torch.testing.assert_close(ours[1][name], weight, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def head_flops(work: Callable[[], Any]) -> int:
    """FLOPs of the matrix products that have V as one of their sizes."""

    def product(*shapes: Any, **_: Any) -> int:
        a, b = shapes[-2:]
        return 2 * math.prod(a) * b[-1] if V in (*a, *b) else 0

    ops = torch.ops.aten
    products = (ops.mm, ops.addmm, ops.addmm_, ops.bmm)
    counter = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(products, product))
    with counter:
        work()
    found = counter.get_flop_counts()["Global"]
    return sum(found.get(op, 0) for op in products)
