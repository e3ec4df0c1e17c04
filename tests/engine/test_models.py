"""Models: what is loaded is whole, what is trained is what was said, what is saved is right."""

import json
import shutil
import time
from types import SimpleNamespace

import peft
import pytest
import tiny
import torch
import transformers
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from align_engine import iterate, run
from align_engine.algorithms import ALGORITHMS
from align_engine.errors import BadInput, RunFailed
from align_engine.models import load, modelfiles, noise, score_head
from align_engine.models.score_head import ValueHead
from align_engine.recipe import (
    RECIPES,
    ModelSection,
    PpoLoss,
    PpoRecipe,
    RmRecipe,
    RolloutSection,
    SftRecipe,
    TrainSection,
)
from align_engine.rollouts.rewards import load_reward
from align_engine.run import train
from align_engine.training import engine, metrics, optimiser
from align_engine.training.checkpoint import RunFolder

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # of peft
    pytest.mark.filterwarnings("ignore:.*tie.*:UserWarning"),  # of peft, on adapters of tied heads
]
PLAIN = ModelSection()


def edited(model, out, edit, file="model.safetensors"):
    """A copy of a model's folder whose tensors are changed."""
    shutil.copytree(model, out)
    tensors = load_file(out / file)
    edit(tensors)
    save_file(tensors, out / file, metadata={"format": "pt"})
    return str(out)


@pytest.fixture(scope="session")
def scored(model, tmp_path_factory):
    """A reward model's folder."""
    path = tmp_path_factory.mktemp("scored")
    shutil.copytree(model, path, dirs_exist_ok=True)
    AutoModelForSequenceClassification.from_pretrained(model, num_labels=1).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def adapter(model, tmp_path_factory):
    """A folder of adapters on two layers of `model`."""
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    path = tmp_path_factory.mktemp("adapter")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(path)
    return path


NORM, QUERY = "model.layers.1.input_layernorm.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda x: x.pop(NORM), f"lacks {NORM}"),
        (lambda x: [x.pop(name) for name in list(x) if "layers.1" in name], r"lacks .*, \.\.\. \(9 tensors\)"),
        (lambda x: x.update(junk=torch.zeros(2)), "has besides junk"),
        (lambda x: x.update({QUERY: torch.zeros(3, 3)}), rf"another shape of {QUERY} \(3, 3\) for \(32, 32\)"),
    ],
)
def test_weights_that_do_not_fill_the_model_are_refused_by_name(edit, said, model, tmp_path):
    with pytest.raises(BadInput, match=said):
        load.load_model(edited(model, tmp_path / "broken", edit), PLAIN)


def test_a_tied_head_is_stored_once_and_an_untied_one_must_be_there(model, tmp_path):
    assert "lm_head.weight" not in load_file(model / "model.safetensors")
    assert load.load_model(str(model), PLAIN).config.tie_word_embeddings
    untied = tiny.write_model(tmp_path / "untied", tie_word_embeddings=False)
    with pytest.raises(BadInput, match=r"lacks lm_head\.weight"):
        load.load_model(edited(untied, tmp_path / "broken", lambda x: x.pop("lm_head.weight")), PLAIN)


def test_models_of_another_class_are_refused_and_rm_alone_makes_a_head(
    model, scored, pairs, completions, tmp_path, capsys
):
    with pytest.raises(BadInput, match=r"config.json says LlamaForSequenceClassification\): has besides score.weight"):
        train("sft", tiny.sft(scored, completions, tmp_path / "sft"))
    with pytest.raises(BadInput, match=r"lacks score.weight"):
        load_reward(str(model), torch.device("cpu"))
    with pytest.raises(BadInput, match=r"lacks score.weight"):
        score_head.load_scalar_model(str(model), PLAIN, 1)
    recipe = tiny.online(PpoRecipe, model, pairs, tmp_path / "ppo", value_model_name_or_path=str(model))
    with pytest.raises(BadInput, match=r"lacks score.weight"):
        train("ppo", recipe)
    train("rm", tiny.recipe(RmRecipe, model, pairs, tmp_path / "rm", max_steps=1))
    assert "hold no score.weight; a fresh head is made" in capsys.readouterr().out
    train("rm", tiny.recipe(RmRecipe, tmp_path / "rm" / "final", pairs, tmp_path / "again", max_steps=1))
    assert "fresh head" not in capsys.readouterr().out


def test_a_head_of_three_labels_is_no_score_head(model, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(model, num_labels=3).save_pretrained(tmp_path / "three")
    with pytest.raises(BadInput, match=r"another shape of score.weight \(3, 32\) for \(1, 32\)"):
        score_head.load_scalar_model(str(tmp_path / "three"), PLAIN, 1, fresh_head=True)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda x: x.pop(sorted(x)[0]), "it lacks .*q_proj.lora_A"),
        (lambda x: x.update(junk=torch.zeros(2)), "it has besides junk"),
        (lambda x: x.update({sorted(x)[0]: torch.zeros(5, 32)}), "size mismatch for .*q_proj.lora_A"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_by_name(edit, said, adapter, tmp_path):
    with pytest.raises(BadInput, match=said):
        load.load_model(edited(adapter, tmp_path / "broken", edit, "adapter_model.safetensors"), PLAIN)
    assert load.load_model(str(adapter), PLAIN).active_adapter == "default"


def test_a_reward_model_in_adapters_brings_its_own_head(model, pairs, tmp_path):
    recipe = tiny.recipe(RmRecipe, model, pairs, tmp_path / "rm", max_steps=1, use_peft=True)
    saved = train("rm", recipe).final
    made = score_head.load_scalar_model(str(saved), PLAIN, 1)
    stored = load_file(saved / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert score_head.score_module(made).modules_to_save["default"].weight.equal(stored)


def cut(path):
    path.write_bytes(path.read_bytes()[:3000])


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("config.json", lambda path: path.write_text("{oops")),
        ("config.json", lambda path: path.write_text("[1]")),
        ("generation_config.json", lambda path: path.write_text("")),
        ("model.safetensors", cut),
        ("model.safetensors", lambda path: path.write_bytes(b"")),
        ("tokenizer.json", lambda path: path.write_bytes(b"\xff{")),
    ],
)
def test_damaged_files_are_named(file, damage, model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    damage(tmp_path / "model" / file)
    with pytest.raises(BadInput, match=rf"{tmp_path}/model/{file} is damaged"):
        load.load_tokenizer(str(tmp_path / "model"))
    with pytest.raises(BadInput, match=rf"{tmp_path}/model/{file} is damaged"):
        load.load_model(str(tmp_path / "model"), PLAIN)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("adapter_config.json", lambda path: path.write_text("{oops")),
        ("adapter_model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-8])),
    ],
)
def test_damaged_files_of_adapters_are_named(file, damage, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "adapter")
    damage(tmp_path / "adapter" / file)
    with pytest.raises(BadInput, match=rf"{tmp_path}/adapter/{file} is damaged"):
        load.load_model(str(tmp_path / "adapter"), PLAIN)


def test_a_missing_shard_and_a_base_that_is_not_there_are_named(model, adapter, tmp_path):
    load.load_model(str(model), PLAIN).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    gone = sorted((tmp_path / "shards").glob("model-*"))[1]
    gone.unlink()
    with pytest.raises(BadInput, match=f"names {gone.name}, which is not there"):
        load.load_model(str(tmp_path / "shards"), PLAIN)
    shutil.copytree(adapter, tmp_path / "adapter")
    for base, said in (
        ("/no/where", "adapter: base_model_name_or_path = '/no/where': no such folder"),
        (None, "names no"),
    ):
        (tmp_path / "adapter" / "adapter_config.json").write_text(
            json.dumps(json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": base})
        )
        with pytest.raises(BadInput, match=said):
            load.load_model(str(tmp_path / "adapter"), PLAIN)


def test_a_mistyped_path_is_refused_at_once(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: True)
    shutil.copytree(model, tmp_path / "runs" / "final")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    start = time.perf_counter()
    for path, said in (
        ("runs/fnal", r"no such folder \(did you mean 'runs/final'\?\), and the hub is off"),
        ("runs/sft/fnal", "no such folder"),
        ("./fnal", "no such folder"),
        ("some-org/some-model", "no such folder, and the hub is off"),
        ("two words", "it is no name of the hub|the hub is off"),
        ("empty", "holds no model: neither config.json nor adapter_config.json, but nothing"),
        ("file", "is a file; give the folder"),
    ):
        with pytest.raises(BadInput, match=said):
            modelfiles.check_path(path)
    modelfiles.check_path("runs/final")
    assert time.perf_counter() - start < 5


def test_an_unreachable_hub_is_one_short_sentence(monkeypatch):
    import huggingface_hub

    def refuse(self, name, revision, timeout):
        assert timeout <= 10 and revision in (None, "main")
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(BadInput, match=r"such folder, and the hub cannot be reached \(Name or service not known\)$"):
        modelfiles.check_path("some-org/some-model")


def test_code_beside_a_model_is_run_by_the_flag_alone(model, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    shutil.copytree(model, tmp_path / "own")
    config = json.loads((model / "config.json").read_text()) | {
        "model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"},
    }  # fmt: skip
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    (tmp_path / "own" / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(BadInput, match=r"needs code of its own that lies beside it.*--trust_remote_code"):
        load.load_model(str(tmp_path / "own"), PLAIN)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    made = load.load_model(str(tmp_path / "own"), ModelSection(trust_remote_code=True))
    assert type(made).__name__ == "Own"


def test_a_float16_checkpoint_is_trained_and_saved_in_float32(model, completions, tmp_path, capsys):
    half = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16)
    shutil.copytree(model, tmp_path / "half")
    half.save_pretrained(tmp_path / "half")
    final = train("sft", tiny.sft(tmp_path / "half", completions, tmp_path / "run", dtype="auto")).final
    assert "are float16: they are held, trained and saved in float32" in capsys.readouterr().out
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in load_file(final / "model.safetensors").values())
    settings = dict(dtype="auto", use_peft=True)
    made = train("sft", tiny.sft(tmp_path / "half", completions, tmp_path / "lora", **settings)).final
    assert "are float16" not in capsys.readouterr().out, "the frozen base may stay as it is"
    assert all(x.dtype == torch.float32 for x in load_file(made / "adapter_model.safetensors").values())


def test_pure_bfloat16_training_says_what_it_loses(model, completions, tmp_path, capsys):
    train("sft", tiny.sft(model, completions, tmp_path / "run", dtype="bfloat16", max_steps=1))
    assert "all weights are held and trained in bfloat16" in capsys.readouterr().out
    train("sft", tiny.sft(model, completions, tmp_path / "lora", dtype="bfloat16", max_steps=1, use_peft=True))
    assert "trained in bfloat16" not in capsys.readouterr().out


def test_weights_that_are_not_finite_are_not_saved(model, completions, tmp_path):
    recipe = tiny.sft(
        model, completions, tmp_path / "run", max_steps=1, save_steps=1, weight_decay=1e30, learning_rate=1e30
    )
    with pytest.raises(
        RunFailed, match=r"trained tensors are infinite or not a number, model.embed_tokens.weight first"
    ):
        train("sft", recipe)
    assert not list((tmp_path / "run").rglob("*.safetensors"))


class Noisy(torch.nn.Module):
    """A layer whose noise no attribute shows."""

    def __init__(self, scale, random):
        super().__init__()
        self.scale, self.random = scale, random

    def forward(self, x):
        if not self.training:
            return x
        return x + self.scale * (torch.randn_like(x) if self.random else torch.ones_like(x))


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (Noisy(1e-4, True), "LlamaForCausalLM draws random numbers in training mode"),
        (Noisy(0.3, False), "LlamaForCausalLM computes something else in training mode than in evaluation"),
    ],
)
def test_noise_is_found_before_the_first_step(layer, said, model, pairs, tmp_path, monkeypatch):
    once = load.load_model

    def load_noisy(*args, **options):
        made = once(*args, **options)
        made.model.norm = torch.nn.Sequential(made.model.norm, layer)
        return made

    monkeypatch.setattr(load, "load_model", load_noisy)
    recipe = tiny.dpo(model, pairs, tmp_path / "run", max_steps=1)
    with pytest.raises(BadInput, match=said):
        train("dpo", recipe)
    assert not (tmp_path / "run" / "run.json").exists()


def test_the_proof_draws_none_of_the_runs_random_numbers(model):
    made = AutoModelForCausalLM.from_pretrained(model).train()
    state = torch.get_rng_state()
    noise.check(made, lambda ids, mask: made(input_ids=ids, attention_mask=mask).logits, torch.device("cpu"))
    assert made.training and state.equal(torch.get_rng_state())


SIZES = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("OPT", dict(ffn_dim=64, word_embed_proj_dim=32, dropout=0.4, attention_dropout=0.4)),
        ("Falcon", dict(hidden_dropout=0.4, attention_dropout=0.4, num_kv_heads=4)),
        ("BioGpt", dict(layerdrop=0.5, intermediate_size=64, activation_dropout=0.4)),
        ("Mixtral", dict(router_jitter_noise=0.3, attention_dropout=0.4, intermediate_size=48, num_key_value_heads=2)),
    ],
)
def test_dropout_held_as_a_number_is_off_and_is_saved_as_it_was(kind, config, tmp_path):
    torch.manual_seed(0)
    made_config = getattr(transformers, f"{kind}Config")(**SIZES | config)
    made = getattr(transformers, f"{kind}ForCausalLM")(made_config)
    ids = torch.arange(5, 29).view(2, 12)
    with torch.no_grad():
        want = made.eval()(input_ids=ids, use_cache=False).logits
        assert not made.train()(input_ids=ids, use_cache=False).logits.allclose(want, atol=1e-4), "it is noisy"
        noise.disable_dropout(made)
        torch.testing.assert_close(made(input_ids=ids, use_cache=False).logits, want, atol=1e-6, rtol=1e-5)
    with noise.restored(made):
        made.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {name: saved[name] for name in config} == config
    torch.testing.assert_close(made(input_ids=ids, use_cache=False).logits, want, atol=1e-6, rtol=1e-5)


def test_the_first_loss_of_experts_is_that_of_transformers(experts, completions, tmp_path):
    settings = dict(max_steps=1, per_device_train_batch_size=8, gradient_checkpointing=False)
    record = metrics.read(train("sft", tiny.sft(experts, completions, tmp_path / "run", **settings)).metrics)[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(experts)
    rows = [json.loads(line) for line in completions.read_text().splitlines()]
    both = [[tokenizer(row[side])["input_ids"] for side in ("prompt", "completion")] for row in rows]
    ids = [prompt + answer + [1] for prompt, answer in both]
    labels = [[-100] * len(prompt) + answer + [1] for prompt, answer in both]
    width = max(map(len, ids))
    with torch.no_grad():
        out = AutoModelForCausalLM.from_pretrained(experts)(
            input_ids=torch.tensor([one + [1] * (width - len(one)) for one in ids]),
            attention_mask=torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in ids]),
            labels=torch.tensor([one + [-100] * (width - len(one)) for one in labels]),
        )
    assert record["loss"] == pytest.approx(out.loss.item(), rel=1e-5)
    assert record["aux_loss"] == pytest.approx(out.aux_loss.item(), rel=1e-5)
    assert out.aux_loss.item() * 0.7 > 0.1 * out.loss.item(), "the term is there to be seen"


@pytest.mark.parametrize("name", ["dpo", "kto", "orpo", "grpo", "ppo"])
def test_the_loss_of_experts_is_added_to_other_losses_and_can_be_turned_off(name, experts, tmp_path):
    online, found = name not in tiny.OFFLINE, []
    made = (tiny.prompt_rows if online else tiny.OFFLINE[name][1])(8)
    rows, settings = tiny.write_rows(tmp_path / "rows.jsonl", made), dict(tiny.ONLINE if online else {}, max_steps=1)
    for coef in (None, 0.0):
        paths = experts, rows, tmp_path / f"{coef}"
        recipe = tiny.recipe(RECIPES[name], *paths, router_aux_loss_coef=coef, **settings)
        found.append(metrics.read(train(name, recipe).metrics)[0])
    first, off = found
    assert "aux_loss" not in off and (name != "dpo" or off["loss"] == pytest.approx(0.693147, abs=1e-5))
    assert first["loss"] == pytest.approx(off["loss"] + 0.7 * first["aux_loss"], rel=1e-5) and first["aux_loss"] > 1


def test_a_load_balancing_loss_that_the_model_has_not_is_refused(model, pairs, tmp_path):
    with pytest.raises(BadInput, match=r"router_aux_loss_coef = 0.1: LlamaForCausalLM has no load-balancing loss"):
        train("dpo", tiny.dpo(model, pairs, tmp_path / "run", router_aux_loss_coef=0.1))


def test_what_is_saved_ends_where_its_tokenizer_ends(model, completions, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    for file in ("config.json", "generation_config.json"):
        content = json.loads((model / file).read_text())
        content["eos_token_id"] = [7, 8] if file == "generation_config.json" else 7
        (tmp_path / "model" / file).write_text(json.dumps(content))
    final = train("sft", tiny.sft(tmp_path / "model", completions, tmp_path / "run", max_steps=1)).final
    assert json.loads((final / "generation_config.json").read_text())["eos_token_id"] == [1, 7, 8]
    assert json.loads((final / "config.json").read_text())["eos_token_id"] == 1


class Alone:
    """The part of an accelerator that merging needs."""

    is_main_process = True

    def wait_for_everyone(self):
        pass


@pytest.mark.parametrize("options", [dict(target_modules=["lm_head", "q_proj"]), dict(target_modules=["embed_tokens"]),
                                     dict(target_modules=["q_proj"], modules_to_save=["lm_head"])])  # fmt: skip
def test_merging_on_a_tied_head_gives_the_adapted_model(options, model, tmp_path):
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **options)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter += torch.randn_like(parameter)
    here = tmp_path / "round-1"
    adapted.eval().save_pretrained(here / "train" / "final", save_embedding_layers=False)
    ids = torch.arange(4, 22).view(2, 9)
    merged = iterate.merge(str(model), here, RunFolder(tmp_path, {}), Alone())
    with torch.no_grad():
        want, got = adapted(input_ids=ids).logits, AutoModelForCausalLM.from_pretrained(merged)(input_ids=ids).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_a_pad_token_without_a_row_is_refused(model, completions, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["a", "b"])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(BadInput, match=r"pad token '\[PAD\]' has the id 64, and the model has embeddings of 64 tokens"):
        train("sft", tiny.sft(tmp_path / "model", completions, tmp_path / "run"))


def test_a_tokenizer_without_pad_and_eos_is_refused(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (tmp_path / "model" / "tokenizer_config.json").write_text(
        json.dumps({name: value for name, value in settings.items() if name not in ("eos_token", "pad_token")})
    )
    with pytest.raises(BadInput, match="has neither an EOS nor a pad token"):
        load.load_tokenizer(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("kind", "more", "most"),
    [
        ("GPT2", {}, 64), ("OPT", dict(ffn_dim=64, word_embed_proj_dim=32), 64), ("GPTJ", dict(rotary_dim=8), 64),
        ("Roberta", dict(is_decoder=True, intermediate_size=64), 62), ("Mpt", dict(max_seq_len=64), 64),
        ("Bart", dict(decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=64), 64),
        ("Llama", dict(intermediate_size=48), None), ("Bloom", {}, None), ("Falcon", {}, None),
    ],
)  # fmt: skip
def test_rows_longer_than_a_table_of_positions_are_refused(kind, more, most):
    """The oracle is the model itself: it runs on `most` tokens, and fails on one more."""
    config = getattr(transformers, f"{kind}Config")
    made = getattr(transformers, f"{kind}ForCausalLM" if kind != "GPT2" else "GPT2LMHeadModel")(config(**SIZES | more))

    def runs(length):
        with torch.no_grad():
            made.eval()(input_ids=torch.full((1, length), 5), attention_mask=torch.ones(1, length), use_cache=False)

    runs(most or 80)
    load.check_positions(made, most or 80)
    if most:
        with pytest.raises((IndexError, RuntimeError)):
            runs(most + 1)
        with pytest.raises(BadInput, match=f"longest row has {most + 1} tokens, and .* table of {most} positions"):
            load.check_positions(made, most + 1)


def test_the_longest_row_is_prompt_and_completion():
    import datasets

    from align_engine.data.windows import Source
    from align_engine.rollouts.source import Rollouts

    columns = {"prompt_ids": [[1] * 9, [1] * 2], "chosen_ids": [[1], [1] * 10], "rejected_ids": [[1] * 4, [1]]}
    source = Source(datasets.Dataset.from_dict(columns), dict, 0, 1)
    assert source.longest() == 13
    sampled = SimpleNamespace(lengths=source.lengths, settings=RolloutSection(max_completion_length=6))
    assert Rollouts.longest(sampled) == 9 + 6


def test_the_critic_has_its_own_learning_rate(model, tmp_path):
    recipe = PpoRecipe(train=TrainSection(learning_rate=3e-6, weight_decay=0.1), loss=PpoLoss(value_learning_rate=2e-4))
    made = AutoModelForCausalLM.from_pretrained(model)
    made.value_head = ValueHead(32, learning_rate=recipe.loss.value_learning_rate)
    apart = {id(parameter) for parameter in made.value_head.parameters()}
    seen = {}
    for group in optimiser.parameter_groups(made, recipe):
        for parameter in group["params"]:
            seen[id(parameter)] = group["lr"], group["weight_decay"]
            assert group["lr"] == (2e-4 if id(parameter) in apart else 3e-6)
            assert group["weight_decay"] == (0.1 if parameter.dim() >= 2 else 0.0)
    assert seen.keys() == {id(parameter) for parameter in made.parameters()}
    made = engine.Engine(made, ALGORITHMS["ppo"], recipe, 4, Accelerator())
    assert made.scheduler.get_last_lr()[0] == 3e-6, "the policy's is logged"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_adamw_takes_no_copy_of_the_weights(device, model):
    """Of all accelerators this one has but what an engine asks of it before the first step."""
    accelerator = SimpleNamespace(device=torch.device(device), prepare=lambda *parts: parts)
    made = engine.Engine(load.load_model(str(model), PLAIN), ALGORITHMS["sft"], SftRecipe(), 4, accelerator)
    assert made.optimizer.defaults["fused"] is True


def test_the_room_that_is_needed_is_said_in_units_of_its_size(model, completions, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2048}))
    with pytest.raises(
        BadInput, match=r"2.0 KiB are free, and the checkpoints and the model need about [1-9]\d* KiB|KiB"
    ):
        train("sft", tiny.sft(model, completions, tmp_path / "run"))
    assert [run.size(x) for x in (5, 1536, 3 * 2**20, 5 * 2**40)] == ["5 bytes", "1.5 KiB", "3.0 MiB", "5120.0 GiB"]


def test_nothing_of_a_plain_recipe_trusts_code():
    assert SftRecipe().model.trust_remote_code is False


def test_a_module_for_adapters_that_is_not_there_is_refused(model, completions, tmp_path):
    recipe = tiny.sft(model, completions, tmp_path / "run", use_peft=True, lora_target_modules=["q_proj", "nobody"])
    with pytest.raises(BadInput, match=r"lora_target_modules = .*: LlamaForCausalLM has no module 'nobody'"):
        train("sft", recipe)
    assert not (tmp_path / "run").exists()


def test_an_encoder_is_no_policy(pairs, tmp_path):
    folder = tiny.write_model(tmp_path / "bert")
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.BertConfig(vocab_size=load.vocab_size(str(folder)), **sizes)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    with pytest.raises(BadInput, match="BertLMHeadModel sees the tokens that it is asked for"):
        train("dpo", tiny.dpo(folder, pairs, tmp_path / "run"))


def test_weights_that_are_no_numbers_are_refused_where_they_are_frozen_too(tmp_path):
    folder = tiny.write_model(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded.get_output_embeddings().weight.data[3, 1] = float("nan")
    loaded.save_pretrained(folder)
    with pytest.raises(BadInput, match=r"infinite or not a number in .*weight"):
        load.load_model(str(folder), ModelSection())


def test_fresh_adapters_have_the_rank_and_scale_of_the_recipe(model):
    """y = x W' + lora_alpha / lora_r x A' B', arXiv:2106.09685 section 4.1."""
    section = ModelSection(lora_r=4, lora_alpha=6, lora_target_modules=["q_proj"])
    layer = (
        load.add_adapters(load.load_model(str(model), PLAIN), section).base_model.model.model.layers[0].self_attn.q_proj
    )
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight.data.normal_()
    x = torch.randn(3, layer.in_features)
    assert A.shape == (4, layer.in_features)
    torch.testing.assert_close(layer.eval()(x), x @ layer.base_layer.weight.T + 6 / 4 * (x @ A.T @ B.T))
