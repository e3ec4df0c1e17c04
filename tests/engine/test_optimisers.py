"""Optimisers by name: the steps of transformers' Trainer, exact resume, and a sentence for what cannot run."""

import copy
from types import SimpleNamespace

import pytest
import tiny
import torch
from runs import cut_off, in_checkpoint, same_bits
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from align_engine.errors import BadInput
from align_engine.recipe import PpoLoss, PpoRecipe, SftRecipe, TrainSection
from align_engine.run import train
from align_engine.training import optimiser, shards

CPU = torch.device("cpu")
HERE = [name for name, kind in optimiser.OPTIMISERS.items() if not kind.gpu and kind.package != "torchao"]
EIGHT_BITS = {"optim_args": "min_8bit_size=256"}  # the tiny model's matrices are below the usual least size


def steps(optimizer, model, count=3):
    """Steps on made up gradients, the same for every optimiser."""
    torch.manual_seed(5)
    for _ in range(count):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape).to(parameter)
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """With matrices that bitsandbytes' optimisers keep 8 bits of."""
    return tiny.write_model(tmp_path_factory.mktemp("wide"), vocab=128, hidden_size=64, intermediate_size=80)


def made(model, recipe):
    mine = AutoModelForCausalLM.from_pretrained(model)
    return steps(optimiser.make(mine, recipe, CPU), mine)


@pytest.mark.parametrize("name", [name for name in HERE if name != "muon"])
def test_a_name_takes_the_steps_of_transformers_trainer(name, wide, tmp_path, monkeypatch):
    import bitsandbytes.optim.optimizer as bnb

    monkeypatch.setattr(bnb.GlobalOptimManager, "_instance", None)  # the Trainer's stays for the whole process
    settings = dict(
        optim=name, learning_rate=1e-2, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6
    )
    found = made(wide, SftRecipe(train=TrainSection(**settings)))  # first: theirs leave traces in that manager
    theirs = AutoModelForCausalLM.from_pretrained(wide)
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to="none", **settings)
    expected = steps(Trainer(theirs, arguments).create_optimizer(), theirs)
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_the_default_is_transformers_own(model, tmp_path):
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to="none", learning_rate=1e-2)
    theirs = AutoModelForCausalLM.from_pretrained(model)
    expected = steps(Trainer(theirs, arguments).create_optimizer(), theirs)
    found = made(model, SftRecipe(train=TrainSection(learning_rate=1e-2)))
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_muon_takes_the_matrices_of_the_body_and_adamw_the_rest(model):
    recipe = SftRecipe(
        train=TrainSection(optim="muon", optim_args="momentum=0.9", learning_rate=1e-2, weight_decay=0.1)
    )
    theirs = AutoModelForCausalLM.from_pretrained(model)
    body = [p for name, p in theirs.named_parameters() if "proj" in name]
    norms = [p for name, p in theirs.named_parameters() if "norm" in name]
    embeddings = [theirs.model.embed_tokens.weight]
    parts = [torch.optim.Muon(body, lr=1e-2, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
             torch.optim.AdamW([{"params": embeddings, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
                               lr=1e-2, fused=True)]  # fmt: skip
    expected = steps(SimpleNamespace(step=lambda: [part.step() for part in parts]), theirs)
    assert len(body) + len(norms) + 1 == len(expected) == 20
    assert all(a.equal(b) for a, b in zip(made(model, recipe), expected, strict=True))


@pytest.mark.parametrize("name", HERE)
def test_a_critic_has_its_learning_rate_and_vectors_no_decay(name, model):
    recipe = PpoRecipe(train=TrainSection(learning_rate=3e-6, weight_decay=0.1, optim=name), loss=PpoLoss())
    mine = AutoModelForCausalLM.from_pretrained(model)
    mine.value_head = tiny_head = optimiser.nn.Linear(32, 1)
    tiny_head.learning_rate = 2e-4
    groups = optimiser.make(mine, recipe, CPU).param_groups
    seen = {id(p): (float(group["lr"]), group["weight_decay"]) for group in groups for p in group["params"]}
    apart = {id(p) for p in tiny_head.parameters()}
    assert seen == {id(p): (2e-4 if id(p) in apart else 3e-6, 0.1 * (p.dim() > 1)) for p in mine.parameters()}


def test_a_state_of_another_type_than_its_weight_is_loaded_as_it_was(model, tmp_path):
    recipe = SftRecipe(train=TrainSection(optim="adafactor"))
    mine = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    optimizer = optimiser.make(mine, recipe, CPU)
    steps(optimizer, mine)
    saved = copy.deepcopy(optimizer.state_dict())
    numbers = shards.write(tmp_path / "tensors", mine, optimizer)
    mine = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    optimizer = optimiser.make(mine, recipe, CPU)
    shards.read(tmp_path / "tensors", mine, optimizer, numbers)
    for was, now in zip(saved["state"].values(), optimizer.state_dict()["state"].values(), strict=True):
        assert was.keys() == now.keys()
        for name, value in was.items():
            same = (
                value.dtype == now[name].dtype and value.equal(now[name])
                if torch.is_tensor(value)
                else value == now[name]
            )
            assert same, name


RESUMED = {
    "adamw_torch_fused": {},
    "adafactor": {"dtype": "bfloat16"},
    "sgd": {"optim_args": "momentum=0.9,nesterov=true"},
    "rmsprop": {},
    "muon": {"dtype": "bfloat16"},
    "adamw_8bit": EIGHT_BITS,
    "ademamix_8bit": EIGHT_BITS,
    "lion_8bit": EIGHT_BITS | {"dtype": "bfloat16"},
    "rmsprop_bnb_8bit": EIGHT_BITS,
}


@pytest.mark.parametrize("name", RESUMED)
def test_cut_off_and_run_again_ends_with_the_same_bits(name, model, completions, tmp_path):
    settings = dict(max_steps=4, save_steps=2, optim=name, learning_rate=1e-2, gradient_checkpointing=False,
                    per_device_train_batch_size=4, weight_decay=0.1, **RESUMED[name])  # fmt: skip
    whole = train("sft", tiny.sft(model, completions, tmp_path / "whole", **settings))
    recipe = tiny.sft(model, completions, tmp_path / "cut", **settings)
    cut_off("sft", recipe)
    cut = train("sft", recipe)
    assert same_bits(whole.final, cut.final) and not same_bits(whole.final, model)


@pytest.mark.parametrize("name", ["adamw_torch_8bit", "adamw_torch_4bit"])
def test_rounding_by_chance_of_bfloat16_goes_on_with_the_same_bits(name, wide, completions, tmp_path, monkeypatch):
    """torchao's states in few bits; their steps are compiled outside of tests, which takes a minute. It is not part of
    the tests' environment: whatever imports peft would import it, and say that its CUDA code is of no use here."""
    pytest.importorskip("torchao")
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    settings = dict(max_steps=4, save_steps=2, optim=name, learning_rate=1e-3, dtype="bfloat16",
                    per_device_train_batch_size=4, optim_args="bf16_stochastic_round=true")  # fmt: skip
    whole = train("sft", tiny.sft(wide, completions, tmp_path / "whole", **settings))
    recipe = tiny.sft(wide, completions, tmp_path / "cut", **settings)
    cut_off("sft", recipe)
    states = in_checkpoint(tmp_path / "cut" / "checkpoint-000002")
    assert any(tensor.dtype == torch.uint8 for key, tensor in states.items() if "exp_avg.codes" in key)
    assert same_bits(whole.final, train("sft", recipe).final)
    settings["optim_args"] = "bf16_stochastic_round=false"
    to_nearest = train("sft", tiny.sft(wide, completions, tmp_path / "nearest", **settings))
    assert not same_bits(whole.final, to_nearest.final)


REFUSED = {
    "adam": ({"optim": "adam"}, "optim = 'adam' is not served; choose one of adamw_torch, "),
    "galore": ({"optim": "galore_adamw"}, "optim = 'galore_adamw' is not served"),
    "paged": ({"optim": "paged_adamw_8bit"}, "between a GPU and the CPU, and this run is on a CPU"),
    "arguments": ({"optim": "sgd", "optim_args": "momentum"}, "optim_args = 'momentum' is not of the form name=value"),
    "foreign": ({"optim": "sgd", "optim_args": "ns_steps=3"}, "optim_args: sgd takes no 'ns_steps', but dampening"),
    "fact": ({"optim_args": "lr=3"}, "adamw_torch_fused takes no 'lr'"),
    "broken": (
        {"optim": "sgd", "optim_args": "nesterov=true"},
        "'sgd' does not run on cpu: Nesterov momentum requires",
    ),
    "beta": ({"adam_beta2": 1.0}, r"adam_beta2 = 1.0 must lie in \[0, 1\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_run_is_refused_before_anything_is_loaded(case, model, completions, tmp_path, monkeypatch):
    settings, said = REFUSED[case]
    monkeypatch.setattr("align_engine.models.load.load_tokenizer", None)
    with pytest.raises(BadInput, match=said):
        train("sft", tiny.sft(model, completions, tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, package in {"adamw_8bit": "bitsandbytes", "adamw_torch_4bit": "torchao"}.items():
        with pytest.raises(BadInput, match=rf"'{name}': {package} is not installed \(pip install {package}\)"):
            optimiser.check(TrainSection(optim=name), CPU, sharded=False)


def test_shards_are_refused_by_name():
    with pytest.raises(BadInput, match="'adamw_8bit' does not take FSDP's shards; choose one of adamw_torch, "):
        optimiser.check(TrainSection(optim="adamw_8bit"), CPU, sharded=True)


def test_the_room_on_disk_is_that_of_the_optimisers_state():
    bytes_per_weight = {"adamw_torch_fused": 8, "adamw_8bit": 2, "sgd": 0, "adafactor": 0, "ademamix": 12, "muon": 4}
    for name, expected in bytes_per_weight.items():
        found = optimiser.state_per_weight(TrainSection(optim=name), CPU)
        assert found == pytest.approx(expected, abs=0.2), name
    assert optimiser._bytes(TwoTensor(torch.ones(8), torch.ones(8))) == 64, "as torchao's states are made of tensors"
