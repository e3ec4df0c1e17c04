"""Each TRL trainer takes the same twenty steps with `fuse` as without, for fewer FLOPs in the head."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

import peft
import pytest
import trl_runs
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.utils import FusedCausalLMOutput
from trl_runs import V, build, run, same

from align_engine.integrations import trl as ours
from align_engine.integrations.trl import fuse

pytestmark = [  # of transformers, peft and TRL themselves
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
D = 32
LANGUAGE = [kind for kind in trl_runs.KINDS if kind != "reward"]
ADAPTED = [kind for kind in LANGUAGE if kind != "bema"]  # TRL's callback cannot copy an adapted model
OFF_POLICY = ("gmpo", "async_grpo")
LORA = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def plain(trl_model, tmp_path_factory):
    """The twenty steps of each trainer as TRL takes them, run once."""
    runs: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in runs:
            runs[kind] = run(build(kind, trl_model, tmp_path_factory.mktemp("plain")))
        return runs[kind]

    return get


@pytest.mark.parametrize("kind", trl_runs.KINDS)
def test_fused_before(kind, plain, trl_model, tmp_path):
    theirs = plain(kind)
    assert len(theirs[0]) == trl_runs.STEPS
    with fuse():
        trainer = build(kind, trl_model, tmp_path)
    same(run(trainer), theirs)


@pytest.mark.parametrize("kind", LANGUAGE)
def test_fused_after(kind, plain, trl_model, tmp_path):
    trainer = build(kind, trl_model, tmp_path)
    assert fuse(trainer) is trainer
    same(run(trainer), plain(kind))


def test_the_weights_move(plain):
    """Else equal curves would say nothing."""
    for kind in trl_runs.KINDS:
        logs, weights = plain(kind)
        norms = [log["grad_norm"] for log in logs]
        assert sum(norm > 1e-3 for norm in norms) > 5, kind
        assert all(x.isfinite().all() for x in weights.values())


def test_the_trainers_are_all_of_trl():
    """Each trainer whose source, or that of a base, calls the hook takes the steps above or is refused by name."""
    for package in map(importlib.import_module, ("trl.trainer", "trl.experimental")):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name.endswith("_trainer"):
                importlib.import_module(module.name)
    for old_path in ("kto", "distillation"):
        importlib.import_module(f"trl.experimental.{old_path}")
    classes = {kind for kind in derived(_BaseTrainer) if kind.__module__.startswith("trl.")}
    calling = {kind for kind in classes if any(map(calls_hook, kind.__mro__))}
    refused = {kind for kind in classes if ours._why_not(kind)}
    assert calling - refused == {trl_runs.KINDS[kind].find("Trainer") for kind in LANGUAGE}
    assert {kind.__name__ for kind in calling & refused} == {"GKDTrainer", "GOLDTrainer"}
    assert refused == classes - (calling - refused)
    assert {kind.__name__ for kind in refused - calling} == {
        "A2POTrainer", "AsyncDistillationTrainer", "CPOTrainer", "DistillationTrainer", "IWOPDTrainer", "ORPOTrainer",
        "OnlineDPOTrainer", "RewardTrainer", "SDFTTrainer", "SDPOTrainer", "ServerDistillationTrainer", "TPOTrainer",
    }  # fmt: skip


def derived(kind: type) -> set[type]:
    return {kind}.union(*map(derived, kind.__subclasses__())) - {_BaseTrainer}


def calls_hook(kind: type) -> bool:
    if not kind.__module__.startswith("trl."):
        return False
    source = inspect.getsource(kind)
    return "fused_lm_head=True" in source or '"fused_lm_head": True' in source


# -- what the head costs ------------------------------------------------------------------------------------------
def calls(trainer: Any) -> list[tuple[int, str]]:
    """(rows, kind) of each call of the head from here on: kept rows of scored ones, all rows of generating ones."""
    found: list[tuple[int, str]] = []

    def record(model: Any, args: Any, out: Any) -> None:
        if isinstance(out, FusedCausalLMOutput):
            trained = model.get_output_embeddings().weight.requires_grad
            kind = "none" if not out.log_probs.requires_grad else "trained" if trained else "frozen"
            found.append((int(out.label_mask.sum()), kind))
        else:
            found.append((out.logits.shape[0] * out.logits.shape[1], "none"))

    for model in {trainer.model, getattr(trainer, "ref_model", None)} - {None}:
        (model.get_base_model() if isinstance(model, peft.PeftModel) else model).register_forward_hook(record)
    return found


@pytest.mark.parametrize("kind", [*LANGUAGE, *(f"{kind} adapted" for kind in ADAPTED)])
def test_flops_of_the_head(kind, trl_model, tmp_path):
    kind, _, adapter = kind.partition(" ")
    settings = dict(epsilon=50.0) if kind in OFF_POLICY else {}  # rows that are clipped cost no backward
    flops = []
    for fused in (True, False):
        trainer = build(kind, trl_model, tmp_path, peft_config=LORA if adapter else None, max_steps=3, **settings)
        if fused:
            fuse(trainer)
        found = calls(trainer)
        flops.append(trl_runs.head_flops(trainer.train))
    price = {"none": 2, "frozen": 4, "trained": 6}
    head = "frozen" if adapter else "trained"
    kept = sum(price[kind] * rows for rows, kind in found)
    assert {kind for _, kind in found} == {"none", head} or kind in ("sft", "async_grpo")
    assert flops[0] == kept * V * D
    assert flops[1] > 1.5 * flops[0]  # the logits made twice, and on a CPU those of prompt and padding too
