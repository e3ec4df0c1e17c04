"""accelerate's FSDP2 ends where one process ends."""

import fsdp2
import pytest
import tiny
import torch
from processes import run_on_two
from runs import same_bits
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from align_engine.run import train
from align_engine.training import metrics

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of peft
RANK = """
import fsdp2, tiny
from align_engine import run
from align_engine.errors import BadInput
from align_engine.recipe import DpoRecipe
from runs import cut_off
try:
    run.make_accelerator(DpoRecipe())
except BadInput as error:
    assert "FSDP is asked for; accelerate takes DistributedType.MULTI_CPU on cpu" in str(error), error
else:
    raise AssertionError("DDP in place of FSDP")
fsdp2.on()

from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

class Sharded(TrainerCallback):
    def on_step_end(self, args, state, control, model, **_):
        assert all(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in model.parameters())

def cut(name, *arguments):
    cut_off(name, tiny.offline(name, *arguments[:3], **arguments[3]))
    whole(name, *arguments)

def whole(name, *arguments):
    run.train(name, tiny.offline(name, *arguments[:3], **arguments[3]), [Sharded])

def quantised(*arguments):
    import os
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # each rank quantises for itself
    run.train("dpo", tiny.dpo(*arguments[:3], **arguments[3]), [Halves])
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"

class Halves(TrainerCallback):
    def on_step_end(self, args, state, control, model, **_):
        bits = [p for name, p in model.named_parameters() if "_proj.base_layer" in name]
        assert bits and all(isinstance(p, DTensor) and 2 * p.to_local().numel() == p.numel() for p in bits)

def refused(name, *arguments):
    try:
        run.train(name, tiny.offline(name, *arguments[:3], use_peft=True, reference="ema"))
    except BadInput as error:
        assert "'ema' does not follow adapters that FSDP2 has cut" in str(error), error
    else:
        raise AssertionError("an adapter in pieces, followed")

"""
RUNS = {"dpo": {}, "dpo-ema": {"reference": "ema", "ref_model_sync_steps": 2}, "dpo-packed": {"packing": "on"}}
QLORA = dict(max_steps=3, learning_rate=1e-2, use_peft=True, load_in_4bit=True)


@pytest.fixture(scope="module")
def runs(model64, tmp_path_factory):
    """9 rows in windows of 8: the second step of each epoch has one row, so that a process has none."""
    out, jobs = tmp_path_factory.mktemp("runs"), []
    rows = tiny.write_rows(out / "rows.jsonl", tiny.preference_rows(9))
    for name, more in RUNS.items():
        settings = dict(max_steps=4, dtype="auto", learning_rate=1e-4, save_steps=2, eval_dataset_name=str(rows),
                        per_device_eval_batch_size=2, **more)  # fmt: skip
        train("dpo", tiny.dpo(model64, rows, out / "one" / name, per_device_train_batch_size=8, **settings))
        settings["per_device_train_batch_size"] = 4
        for how in ("whole", "cut"):
            jobs.append(f"{how}('dpo', {str(model64)!r}, {str(rows)!r}, {str(out / how / name)!r}, {settings!r})")
    wide = tiny.write_model(out / "wide", hidden_size=64, intermediate_size=128)
    train("dpo", tiny.dpo(wide, rows, out / "one" / "qlora", per_device_train_batch_size=8, **QLORA))
    settings = QLORA | dict(per_device_train_batch_size=4)
    jobs.append(f"quantised({str(wide)!r}, {str(rows)!r}, {str(out / 'whole' / 'qlora')!r}, {settings!r})")
    jobs.append(f"refused('dpo', {str(model64)!r}, {str(rows)!r}, {str(out / 'refused')!r})")
    run_on_two(RANK + "\n".join(jobs), **fsdp2.LAUNCHED)
    return out


def final(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "final").state_dict()


@pytest.mark.parametrize("name", RUNS)
def test_shards_equal_one_process(name, runs):
    a, b = (metrics.read(runs / kind / name / "metrics.jsonl") for kind in ("one", "whole"))
    for metric in ("loss", "rewards/margins", "grad_norm", "num_tokens", "eval_loss"):
        want = [record[metric] for record in a if metric in record]
        assert [record[metric] for record in b if metric in record] == pytest.approx(want, abs=1e-9, rel=1e-6), metric
    a, b = final(runs / "one" / name), final(runs / "whole" / name)
    assert a.keys() == b.keys() and max((a[key] - b[key]).abs().max().item() for key in a) < 1e-9


@pytest.mark.parametrize("name", RUNS)
def test_cut_off_and_run_again_ends_with_the_same_bits(name, runs):
    assert same_bits(runs / "whole" / name / "final", runs / "cut" / name / "final")


def test_bytes_of_4_bit_weights_are_cut_and_the_steps_are_those_of_one_process(runs):
    a, b = (metrics.read(runs / kind / "qlora" / "metrics.jsonl") for kind in ("one", "whole"))
    for metric in ("loss", "grad_norm", "rewards/margins"):
        assert [record[metric] for record in b] == pytest.approx([record[metric] for record in a], abs=1e-6, rel=1e-5)
    a, b = (load_file(runs / kind / "qlora" / "final" / "adapter_model.safetensors") for kind in ("one", "whole"))
    assert a.keys() == b.keys()
    apart = torch.cat([(a[key] - b[key]).abs().flatten() for key in a])
    # AdamW's first steps are of the learning rate, 1e-2, whatever the gradient: of one near its eps, rounding decides
    assert apart.max() < 1e-3 and (apart > 1e-5).sum() <= 2
