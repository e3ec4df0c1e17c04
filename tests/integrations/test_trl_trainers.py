"""Each TRL trainer takes the same twenty steps with `fuse` as without, for fewer FLOPs in the head."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import trl_runs
from trl.trainer.utils import FusedCausalLMOutput
from trl_runs import V, build, run, same

from align_engine.integrations.trl import fuse

pytestmark = [  # of transformers, peft and TRL themselves
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
D = 32
LANGUAGE = [kind for kind in trl_runs.KINDS if kind != "reward"]
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


@pytest.mark.parametrize("kind", LANGUAGE)
@pytest.mark.parametrize("adapter", [None, LORA], ids=["trained", "frozen"])
def test_flops_of_the_head(kind, adapter, trl_model, tmp_path):
    flops = []
    for fused in (True, False):
        trainer = build(kind, trl_model, tmp_path, peft_config=adapter, max_steps=3)
        if fused:
            fuse(trainer)
        found = calls(trainer)
        flops.append(trl_runs.head_flops(trainer.train))
    price = {"none": 2, "frozen": 4, "trained": 6}
    kept = sum(price[kind] * rows for rows, kind in found)
    assert {kind for _, kind in found} == {"none", "frozen" if adapter else "trained"} or kind == "sft"
    assert flops[0] == kept * V * D
    assert flops[1] > 1.5 * flops[0]  # the logits made twice, and on a CPU those of prompt and padding too
