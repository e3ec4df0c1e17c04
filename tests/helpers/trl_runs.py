"""Twenty steps of each TRL trainer on a tiny model, the same in every run but for what the test changes."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import tiny
import torch
import trl
from datasets import Dataset
from products import Products
from torch import Tensor
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


class Kind(NamedTuple):
    """A trainer of TRL: where it is, what it trains on, and what it is set to."""

    trainer: str
    rows: Callable[[int], list[dict[str, Any]]]
    settings: Mapping[str, Any] = MappingProxyType({})

    def find(self, what: str) -> Any:
        """Its class ("Trainer") or that of its settings ("Config"), which may be those of its base."""
        path, _, name = f"trl.{self.trainer}".rpartition(".")
        return getattr(importlib.import_module(path), name + what, None) or getattr(trl, name + what)


ONLINE = dict(num_generations=2, max_completion_length=6, beta=0.1)
KINDS = {
    "dpo": Kind("DPO", tiny.preference_rows),
    "sft": Kind("SFT", tiny.sft_rows),
    "kto": Kind("KTO", marked),
    "grpo": Kind("GRPO", prompts, ONLINE | dict(temperature=0.9)),
    "rloo": Kind("RLOO", prompts, ONLINE),
    "reward": Kind("Reward", tiny.preference_rows),
    "gmpo": Kind("experimental.gmpo.GMPO", prompts, ONLINE | dict(num_iterations=2, epsilon=0.05)),
    "old_kto": Kind("experimental.kto.KTO", marked),  # the path it had before it was stable
    "bema": Kind("experimental.bema_for_ref_model.DPO", tiny.preference_rows),
    "async_grpo": Kind("experimental.async_grpo.AsyncGRPO", prompts,
                       dict(temperature=0.9, token_budget=0, max_staleness=100)),
}  # fmt: skip


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append(dict(logs or {}))


def build(kind: str, folder: Path, out: Path, *, model: Any = None, trainer: Any = None, peft_config: Any = None,
          rows: int = 16, **settings: Any) -> Any:  # fmt: skip
    """A trainer of TRL over the model in `folder`, on the CPU, without files or reports."""
    made = KINDS[kind]
    defaults = dict(output_dir=str(out), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-3,
                    logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", bf16=False, disable_tqdm=True,
                    gradient_checkpointing=False, seed=3)  # fmt: skip
    config = made.find("Config")(**{**defaults, **made.settings, **settings})
    kind_of_model = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    options = dict(num_labels=1) if kind == "reward" else {}
    torch.manual_seed(0)
    random.seed(0)
    given = dict(
        model=kind_of_model.from_pretrained(folder, dtype=torch.float32, **options) if model is None else model,
        args=config,
        train_dataset=Dataset.from_list(made.rows(rows)),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Losses()],
    )
    if "eval_strategy" in settings:
        given["eval_dataset"] = Dataset.from_list(made.rows(6))
    if kind in ("grpo", "rloo", "gmpo"):
        given["reward_funcs"] = reward
    elif kind == "bema":
        given["callbacks"].append(bema())
    elif kind == "async_grpo":
        import trl_async

        given |= trl_async.without_server(trl_async.short(rows * config.max_steps, V))
        given["model"] = str(folder)
    if peft_config is not None:
        given["peft_config"] = peft_config
    return (trainer or made.find("Trainer"))(**given)


def bema() -> TrainerCallback:
    """The reference follows the model, every second step, along its bias-corrected average."""
    from trl.experimental.bema_for_ref_model import BEMACallback

    return BEMACallback(update_freq=1, update_ref_model=True, ref_model_update_freq=2)


def run(trainer: Any) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """What it logged at each step, and the weights that it ends with."""
    trainer.train()
    (losses,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, Losses))
    state = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    return [log for log in losses.logs if "loss" in log], {k: v.detach().clone() for k, v in state.items()}


def same(
    ours: tuple[list, dict], theirs: tuple[list, dict], tolerance: float = 1e-4, of_accuracy: float | None = None
) -> None:
    """Every number of every step, but clocks, and every weight; a token accuracy to its own tolerance where given."""
    clocks = ("time", "runtime", "per_second", "perf/")
    assert len(ours[0]) == len(theirs[0]) > 0
    for step, (a, b) in enumerate(zip(ours[0], theirs[0])):
        names = [name for name in b if not any(word in name for word in clocks)]
        if abs(b.get("rewards/margins", 1.0)) < 1e-6:  # the policy is still the reference: the sign of a rounding error
            names = [name for name in names if name != "rewards/accuracies"]
        assert set(names) <= set(a) and "loss" in names
        for name in names:
            allowed = tolerance * max(1.0, abs(b[name]))
            if of_accuracy and name == "mean_token_accuracy":
                allowed = of_accuracy
            assert abs(a[name] - b[name]) <= allowed, f"step {step}, {name}: {a[name]} against {b[name]}"
    assert ours[1].keys() == theirs[1].keys()
    for name, weight in theirs[1].items():
        torch.testing.assert_close(ours[1][name], weight, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def head_flops(work: Callable[[], Any]) -> int:
    with Products(V) as counter:
        work()
    return counter.total()
