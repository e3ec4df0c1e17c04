"""Each kind of reference gives the log-probs of the model that it stands for."""

import contextlib
import shutil

import peft
import pytest
import tiny
import torch
from runs import cut_off
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from align_engine import recipe as recipes
from align_engine.data.batches import collate_sft
from align_engine.errors import BadInput
from align_engine.models import load
from align_engine.models.logps import token_logps
from align_engine.run import train
from align_engine.training import metrics
from align_engine.training import reference as references

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
    """-log sigmoid(beta (log pi(chosen) - log pi(rejected))), from the model's own logits."""
    ((first,),) = runs("dpo", model, tmp_path, ("none",), beta=0.1, max_steps=1, per_device_train_batch_size=8,
                       eval_dataset_name=None)  # fmt: skip
    policy, rows = AutoModelForCausalLM.from_pretrained(model), tiny.preference_rows(8)
    chosen, rejected = (
        by_the_logits(policy, collate_sft([{"index": 0, **two} for two in tokens(model, rows, side)], 1)).sum(1)
        for side in ("chosen", "rejected")
    )
    want = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean().item()
    assert first["loss"] == pytest.approx(want, abs=1e-5) and abs(want - 0.693147) > 1e-2


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
        references.follow(lambda: [(reference, own)], 0.25, 2, step)
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
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="load_in_4bit = True: bitsandbytes is not installed"):
        train("dpo", tiny.dpo(model, pairs, tmp_path / "run", use_peft=True, load_in_4bit=True))
    assert not (tmp_path / "run").exists()


def adapted(model, **options):
    """A model with an adapter that is not 0, in evaluation."""
    config = peft.LoraConfig(**dict(r=4, lora_alpha=8, task_type="CAUSAL_LM", init_lora_weights=False) | options)
    made = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return made.eval()


def rows_of_targets():
    ids = torch.arange(3, 23).view(2, 10)
    return collate_sft([{"index": i, "prompt_ids": row[:4], "completion_ids": row[4:]} for i, row in
                        enumerate(ids.tolist())], 1)  # fmt: skip


def by_the_logits(made, batch):
    """Log-probs of the targets from the model's own logits: the oracle, which knows nothing of heads and adapters."""
    with torch.no_grad():
        logits = made(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.double()
    kept = batch.targets != -100
    return logits.log_softmax(-1).gather(-1, batch.targets.clamp(min=0)[..., None])[..., 0].where(kept, 0.0)


@pytest.fixture(scope="session")
def untied(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("untied"), tie_word_embeddings=False)


HEADS = [
    dict(target_modules=["lm_head", "q_proj"]),
    dict(target_modules=["lm_head", "q_proj"], use_rslora=True),
    dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    dict(target_modules=["q_proj", "embed_tokens"]),
]


@pytest.mark.parametrize("options", HEADS)
@pytest.mark.parametrize("state", ["on", "off", "merged"])
def test_log_probs_of_every_adapter_on_the_head_are_those_of_the_models_logits(options, state, untied):
    made, batch = adapted(untied, **options), rows_of_targets()
    on = by_the_logits(made, batch)
    if state == "merged":
        made.merge_adapter()
    how = made.disable_adapter() if state == "off" else contextlib.nullcontext()
    with how:
        want = by_the_logits(made, batch)
        (got,) = token_logps(made, batch, {})
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-5)
    assert torch.allclose(want, on, atol=1e-4) == (state != "off"), "the adapter says something"
    if state == "off":
        torch.testing.assert_close(want, by_the_logits(AutoModelForCausalLM.from_pretrained(untied), batch))


@pytest.mark.parametrize("options", [*HEADS[2:], dict(target_modules=["q_proj"], trainable_token_indices=[1, 5])])
def test_a_saved_adapter_of_any_kind_is_its_own_reference_at_first(options, untied, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(untied, start, ignore=shutil.ignore_patterns("model.safetensors", "config.json"))
    adapted(untied, **options).save_pretrained(start, save_embedding_layers=False)
    ((first,),) = runs("dpo", start, tmp_path, ("auto",), use_peft=True, max_steps=1, eval_dataset_name=None)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize("kind", ["adapter-copy", "adapter-off"])
def test_adapters_with_biases_of_the_base_model_need_another_reference(kind, tmp_path):
    model, start = tiny.write_model(tmp_path / "biased", attention_bias=True), tmp_path / "start"
    shutil.copytree(model, start, ignore=shutil.ignore_patterns("model.safetensors", "config.json"))
    adapted(model, target_modules=["q_proj"], bias="all").save_pretrained(start)
    with pytest.raises(BadInput, match=rf"reference = '{kind}': the adapters train biases.*bias = 'all'"):
        runs("dpo", start, tmp_path, (kind,), use_peft=True, max_steps=1)


def test_a_precomputed_reference_goes_with_its_row_where_others_are_dropped(model, other_model, tmp_path, monkeypatch):
    """Rows 0 and 3 of the file cannot be used: what is kept are rows 1, 2, 4 ..., and each has its own log-prob."""
    good = tiny.preference_rows(6)
    bad = {"prompt": "w1", "chosen": "w2", "rejected": "w2"}
    found = {}
    for name, rows in (("clean", good), ("mixed", [bad, *good[:2], bad, *good[2:]])):
        monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / f"{name}-cache"))
        path = tiny.write_rows(tmp_path / f"{name}.jsonl", rows)
        recipe = tiny.dpo(model, path, tmp_path / name, reference="precomputed", bad_rows="drop", max_steps=1,
                          per_device_train_batch_size=6, ref_model_name_or_path=str(other_model))  # fmt: skip
        folder = train("dpo", recipe)
        found[name] = load_file(folder.path / "reference-train.safetensors")["logps"], numbers(folder)[0]
    assert found["clean"][0].equal(found["mixed"][0])
    assert found["mixed"][1] == pytest.approx(found["clean"][1], abs=1e-6)
    chosen = collate_sft([{"index": 0, **two} for two in tokens(model, good)], 1)
    want = by_the_logits(AutoModelForCausalLM.from_pretrained(other_model), chosen).sum(1)
    torch.testing.assert_close(found["mixed"][0][:6].double(), want, atol=1e-4, rtol=1e-5)


def tokens(model, rows, side="chosen"):
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [{"prompt_ids": tokenizer(row["prompt"])["input_ids"],
             "completion_ids": [*tokenizer(row[side])["input_ids"], 1]} for row in rows]  # fmt: skip


@pytest.mark.parametrize("kind", ["frozen", "precomputed"])
def test_a_reference_with_fewer_positions_is_refused(kind, model, pairs, tmp_path):
    """The policy's are rotary, and have no end."""
    path = tmp_path / "short"
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=8, n_embd=32, n_layer=1, n_head=2)).save_pretrained(path)
    settings = dict(reference=kind, ref_model_name_or_path=str(path))
    with pytest.raises(BadInput, match=r"longest row has \d+ tokens, and the reference .* table of 8 positions"):
        train("dpo", tiny.dpo(model, pairs, tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()
