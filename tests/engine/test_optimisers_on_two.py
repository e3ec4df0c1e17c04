"""Optimisers on two processes: DDP ends where one process ends, FSDP2 with those that take its shards."""

import pytest
import tiny
from fsdp2 import LAUNCHED
from processes import run_on_two
from runs import same_bits
from transformers import AutoModelForCausalLM

from align_engine.run import train
from align_engine.training import optimiser

SETTINGS = dict(max_steps=2, save_steps=1, dtype="auto", learning_rate=1e-3, weight_decay=0.1,
                gradient_checkpointing=False)  # fmt: skip
SHARDED = [name for name, kind in optimiser.OPTIMISERS.items() if kind.shards and name != "adamw_torch"]
REPLICATED = {"muon": {}, "adafactor": {}, "adamw_8bit": {"optim_args": "min_8bit_size=256"}}
# Newton-Schulz in bfloat16 of a sum in another order
CLOSE = {"muon": 2e-4}


def runs(folder, model, rows, names, more, **environment):
    """Each on one process here, whole and cut off on two."""
    jobs = ["import tiny\nfrom align_engine import run\nfrom runs import cut_off"]
    for name in names:
        settings = SETTINGS | {"optim": name} | more.get(name, {})
        train("sft", tiny.sft(model, rows, folder / "one" / name, per_device_train_batch_size=8, **settings))
        settings["per_device_train_batch_size"] = 4
        for how in ("whole", "cut"):
            made = f"tiny.sft({str(model)!r}, {str(rows)!r}, {str(folder / how / name)!r}, **{settings!r})"
            jobs.append(f"recipe = {made}")
            jobs += ["cut_off('sft', recipe)"] * (how == "cut") + ["run.train('sft', recipe)"]
    run_on_two("\n".join(["import fsdp2; fsdp2.on()" * bool(environment), *jobs]), **environment)


@pytest.fixture(scope="module")
def sharded(model64, tmp_path_factory):
    out = tmp_path_factory.mktemp("sharded")
    runs(out, model64, tiny.write_rows(out / "rows.jsonl", tiny.sft_rows(9)), SHARDED, {}, **LAUNCHED)
    return out


@pytest.fixture(scope="module")
def replicated(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("replicated")
    runs(out, model, tiny.write_rows(out / "rows.jsonl", tiny.sft_rows(9)), REPLICATED, REPLICATED)
    return out


def check(out, name, close):
    a, b = (AutoModelForCausalLM.from_pretrained(out / how / name / "final").state_dict() for how in ("one", "whole"))
    assert a.keys() == b.keys() and max((a[key] - b[key]).abs().max().item() for key in a) < close
    assert same_bits(out / "whole" / name / "final", out / "cut" / name / "final")


@pytest.mark.parametrize("name", SHARDED)
def test_shards_end_where_one_process_ends(name, sharded):
    check(sharded, name, CLOSE.get(name, 1e-9))


@pytest.mark.parametrize("name", REPLICATED)
def test_two_replicas_end_where_one_process_ends(name, replicated):
    check(replicated, name, CLOSE.get(name, 1e-6))
