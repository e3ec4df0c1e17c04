"""Each kind of reference gives the log-probs of the model that it stands for."""

import peft
import pytest
import tiny
import torch
from runs import cut_off
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from align_engine import metrics, policy
from align_engine import recipe as recipes
from align_engine import reference as references
from align_engine.errors import BadInput
from align_engine.run import train

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # of peft
    pytest.mark.filterwarnings("ignore:.*tie.*:UserWarning"),  # of peft, on adapters of tied heads
]
WATCHED = ("loss", "rewards/chosen", "rewards/margins", "kl", "eval_loss")


def numbers(folder):
    return [{name: record[name] for name in WATCHED if name in record} for record in metrics.read(folder.metrics)]


def runs(algorithm, model, tmp_path, kinds, **settings):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.OFFLINE[algorithm][1](8))
    settings = dict(max_steps=3, learning_rate=1e-2, eval_dataset_name=str(rows), beta=0.5) | settings
    return [
        numbers(train(algorithm, tiny.offline(algorithm, model, rows, tmp_path / kind, reference=kind, **settings)))
        for kind in kinds
    ]


def assert_equal(found):
    for other in found[1:]:
        assert len(other) == len(found[0])
        for a, b in zip(found[0], other):
            assert b == pytest.approx(a, abs=1e-5)


@pytest.mark.parametrize("algorithm", ["dpo", "kto"])
def test_second_copies_and_the_stored_pass_are_one(algorithm, model, other_model, tmp_path):
    kinds = ("frozen", "cpu-offload", "precomputed")
    assert_equal(runs(algorithm, model, tmp_path, kinds, ref_model_name_or_path=str(other_model)))


@pytest.mark.parametrize("algorithm", ["dpo", "kto"])
def test_with_fresh_adapters_four_are_one(algorithm, model, tmp_path):
    settings = dict(use_peft=True, lora_target_modules=["q_proj", "lm_head"], lora_dropout=0.0)
    assert_equal(runs(algorithm, model, tmp_path, ("adapter-off", "adapter-copy", "frozen", "precomputed"), **settings))


def saved_adapter(model, completions, out):
    return train("sft", tiny.sft(model, completions, out, use_peft=True, max_steps=4, learning_rate=5e-2)).final


def test_adapters_that_train_on_have_themselves_as_reference(model, completions, tmp_path, capsys):
    start = saved_adapter(model, completions, tmp_path / "sft")
    found = runs("dpo", start, tmp_path, ("auto", "adapter-copy", "frozen", "precomputed"), use_peft=True)
    assert "reference adapter-copy: the model with its adapters as they were saved" in capsys.readouterr().out
    assert_equal(found)
    assert found[0][0]["loss"] == pytest.approx(0.693147, abs=1e-5), "at first the model is its own reference"
    (off,) = runs("dpo", start, tmp_path, ("adapter-off",), use_peft=True)
    assert abs(off[0]["loss"] - 0.693147) > 1e-3, "the base model is another one"
    saved = tmp_path / "adapter-copy" / "final"
    assert not (saved / "reference").exists()
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(saved)
    before, after = (load_file(path / "adapter_model.safetensors") for path in (start, saved))
    assert before.keys() == after.keys() and not all(before[name].equal(after[name]) for name in before)
    assert list(loaded.peft_config) == ["default"]


def test_adapters_without_use_peft_are_refused(model, completions, pairs, tmp_path):
    start = saved_adapter(model, completions, tmp_path / "sft")
    with pytest.raises(BadInput, match="holds adapters: add --use_peft"):
        train("dpo", tiny.dpo(start, pairs, tmp_path / "run"))


def test_none_is_a_uniform_reference(model, tmp_path):
    ((first, *_),) = runs("dpo", model, tmp_path, ("none",), beta=0.1)
    assert first["loss"] != pytest.approx(0.693147, abs=1e-3)


@pytest.mark.parametrize("lora", [False, True])
def test_ema_follows_and_resumes(lora, model, pairs, tmp_path):
    """With alpha = 1 and every step, the reference is always the model before the step: margins stay 0."""
    settings = dict(use_peft=lora, reference="ema", max_steps=4, ref_model_sync_steps=1, learning_rate=1e-2)
    folder = train("dpo", tiny.dpo(model, pairs, tmp_path / "all", ref_model_mixup_alpha=1.0, **settings))
    assert [record["loss"] for record in metrics.read(folder.metrics)] == pytest.approx([0.693147] * 4, abs=1e-5)
    settings |= dict(save_steps=1, ref_model_sync_steps=2)
    whole = train("dpo", tiny.dpo(model, pairs, tmp_path / "whole", **settings))
    losses = [record["loss"] for record in metrics.read(whole.metrics)]
    assert losses[1] < 0.69 and losses[2] > losses[1]
    recipe = tiny.dpo(model, pairs, tmp_path / "cut", **settings)
    cut_off("dpo", recipe, step=3)
    cut = train("dpo", recipe)
    assert [record["loss"] for record in metrics.read(cut.metrics)] == losses


def test_a_follower_moves_by_alpha():
    reference, own = torch.zeros(3), torch.ones(3)
    for step in range(1, 5):
        references.follow([(reference, own)], 0.25, 2, step)
    assert torch.allclose(reference, torch.full((3,), 0.4375))


def test_offloaded_weights_are_not_on_the_device(model):
    made = AutoModelForCausalLM.from_pretrained(model)
    references.offload(made, torch.device("cpu"))
    kept = {name for name, parameter in made.named_parameters(remove_duplicate=False) if not parameter.is_meta}
    assert kept == {"lm_head.weight"}


def test_what_does_not_fit_together_is_said(model, pairs, tmp_path, monkeypatch):
    for settings, text in (
        ({"reference": "adapter-copy"}, "reference = 'adapter-copy' needs --use_peft"),
        ({"reference": "ema", "ref_model_name_or_path": "x"}, "is another reference than reference = 'ema'"),
        ({"reference": "ema", "ref_model_mixup_alpha": 0.0}, r"ref_model_mixup_alpha = 0.0 must lie in \(0, 1\]"),
        ({"load_in_4bit": True}, "load_in_4bit = True needs --use_peft"),
    ):
        with pytest.raises(BadInput, match=text):
            recipes.check(tiny.dpo(model, pairs, tmp_path / "run", **settings))
    monkeypatch.setattr(policy.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="load_in_4bit = True: bitsandbytes is not installed"):
        train("dpo", tiny.dpo(model, pairs, tmp_path / "run", use_peft=True, load_in_4bit=True))
    assert not (tmp_path / "run").exists()
