"""Tokens drawn in the pass of the LM head: those of a whole forward pass of each row alone and its uniform numbers."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from processes import run_on_two
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    TrainerCallback,
)

from align_engine.demo.make import make_model, make_tokenizer
from align_engine.errors import RunFailed
from align_engine.iterate import iterate
from align_engine.recipe import GrpoRecipe, IterateRecipe, RolloutSection
from align_engine.rollouts import decode
from align_engine.rollouts.generate import transformers_sampler
from align_engine.run import train
from align_engine.training import metrics

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1,
             head_dim=16, max_position_embeddings=64, initializer_range=0.2, bos_token_id=None, eos_token_id=1,
             pad_token_id=1)  # fmt: skip
MODELS = {
    "softcap and a window": lambda: Gemma2ForCausalLM(
        Gemma2Config(num_hidden_layers=2, sliding_window=4, final_logit_softcapping=5.0, **SMALL)
    ),
    "experts": lambda: MixtralForCausalLM(
        MixtralConfig(num_hidden_layers=2, num_local_experts=4, output_router_logits=True, **SMALL)
    ),
    "distances instead of positions": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2, eos_token_id=1, pad_token_id=1)
    ),
    "linear attention": lambda: Qwen3NextForCausalLM(
        Qwen3NextConfig(
            num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], linear_num_value_heads=2,
            linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16, **SMALL,
        )
    ),
    "states in its layers": lambda: RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(num_hidden_layers=3, lru_width=32, attention_window_size=8, **SMALL)
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def loaded(model):
    return AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)


def groups_of(tokenizer, count, size, seed=0):
    """Prompts of several lengths, each `size` times."""
    rows = tiny.prompt_rows(count, seed)
    return [tokenizer(row["prompt"])["input_ids"] for row in rows for _ in range(size)]


@torch.no_grad()
def drawn(model, prompts, found, seed, most, temperature):
    """Of each completion, the tokens that its uniform numbers stand for and their log-probs, from float64 sums."""
    uniforms = torch.rand(most, len(prompts), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    model.eval()
    for i, (prompt, one) in enumerate(zip(prompts, found)):
        logits = model(input_ids=torch.tensor([prompt + one.ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        log_p = (logits.double() / temperature).log_softmax(-1)
        sums = log_p.exp().cumsum(-1)
        tokens = (sums <= uniforms[: len(one.ids), i, None] * sums[:, -1:]).sum(-1)
        yield tokens.tolist(), log_p.gather(1, tokens[:, None])[:, 0]


def check(model, prompts, found, seed, most, temperature=1.0):
    for (tokens, logps), one in zip(drawn(model, prompts, found, seed, most, temperature), found):
        assert one.ids == tokens
        torch.testing.assert_close(one.logps.double(), logps, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tokens_are_those_that_the_uniform_numbers_stand_for(temperature, loaded):
    """Rows that share prompts of several lengths, and end at different steps."""
    model, tokenizer = loaded
    prompts, said = groups_of(tokenizer, 10, 4), []
    settings = RolloutSection(max_completion_length=30, temperature=temperature)
    found = transformers_sampler(model.train(), tokenizer, settings, said.append)(prompts, 3)
    assert said == ["completions are drawn in the pass of the LM head, each prompt read once"]
    assert model.training and model.generation_config.max_new_tokens is None
    assert {one.ended for one in found} == {True, False} and len({len(one.ids) for one in found}) > 5
    assert all(one.ended == (one.ids[-1] == 1) and 1 not in one.ids[:-1] for one in found)
    check(model, prompts, found, 3, 30, temperature)


@pytest.mark.parametrize("name", MODELS)
def test_models_of_many_kinds(name, loaded):
    torch.manual_seed(1)
    model, (_, tokenizer) = MODELS[name]().eval(), loaded
    prompts, settings = groups_of(tokenizer, 5, 3), RolloutSection(max_completion_length=14)
    if name in ("linear attention", "states in its layers"):
        prompts = [[5 + i, 9, 12, 7, 3] for i in range(3) for _ in range(3)]  # their padding is not inert
    found = transformers_sampler(model, tokenizer, settings)(prompts, 3)
    assert len({tuple(one.ids) for one in found}) == len(found)
    check(model, prompts, found, 3, 14)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of peft
def test_adapters_also_on_the_head(model, loaded):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, tie_word_embeddings=False)
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], lora_dropout=0.3, init_lora_weights=False)
    policy, said = get_peft_model(base, config).train(), []
    prompts, settings = groups_of(loaded[1], 5, 3), RolloutSection(max_completion_length=14)
    found = transformers_sampler(policy, loaded[1], settings, said.append)(prompts, 3)
    assert "in the pass of the LM head" in said[0] and policy.training
    assert all(module.training for module in policy.modules())
    check(policy, prompts, found, 3, 14)


class Types(TrainerCallback):
    """Of what an adapter's first product gives, while completions are sampled and in training."""

    def on_train_begin(self, args, state, control, model, **_):
        self.found = {True: set(), False: set()}
        part = next(module for name, module in model.named_modules() if name.endswith("q_proj.lora_A.default"))
        part.register_forward_hook(lambda module, given, out: self.found[module.training].add((out.dtype, out.dim())))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of peft
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_adapters_are_sampled_from_in_the_precision_that_they_are_trained_in(dtype, model, tmp_path):
    """Their calls go past accelerate's autocast, which is around peft's model and not the one inside."""
    prompts = tiny.write_rows(tmp_path / "prompts.jsonl", tiny.prompt_rows(6))
    settings = dict(max_steps=2, use_peft=True, dtype=dtype, bf16=True, learning_rate=1e-2, beta=0.1)
    types = Types()
    folder = train("grpo", tiny.online(GrpoRecipe, model, prompts, tmp_path / "run", **settings), [types])
    assert {kind for kind, _ in types.found[False]} == {kind for kind, _ in types.found[True]} == {torch.bfloat16}
    for record in metrics.read(folder.metrics):
        for name in ("min", "max"):
            assert abs(record[f"sampling/importance_sampling_ratio/{name}"] - 1) < 0.2


def test_stop_strings_end_at_the_token_that_completes_them():
    tokenizer = make_tokenizer(["some words that people use, and some that they do not"] * 3, vocab_size=300)
    model = make_model(tokenizer, hidden=32, layers=1).eval()
    settings = RolloutSection(max_completion_length=40, stop_strings=["e", "ou"], temperature=2.0)
    prompts = [tokenizer(f"{'a' * (i // 4)} some people")["input_ids"] for i in range(60)]  # whose own do not count
    found = transformers_sampler(model, tokenizer, settings)(prompts, 0)
    for one in found:
        before, text = tokenizer.decode(one.ids[:-1]), tokenizer.decode(one.ids)
        assert not any(stop in before for stop in ("e", "ou"))
        assert one.ended == (one.ids[-1] == tokenizer.eos_token_id or any(stop in text for stop in ("e", "ou")))
    assert len({len(one.ids) for one in found if one.ended}) > 5
    check(model, prompts, found, 0, 40, 2.0)


def test_prompts_are_read_once_and_ended_rows_leave(loaded):
    model, tokenizer = loaded
    prompts, read = groups_of(tokenizer, 6, 5), []
    watch = model.register_forward_pre_hook(
        lambda module, args, given: read.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    found = transformers_sampler(model, tokenizer, RolloutSection(max_completion_length=30))(prompts, 3)
    watch.remove()
    assert read[0] == (len({tuple(prompt) for prompt in prompts}), max(map(len, prompts)))
    assert read[1][1] == 1 and len(read) == max(len(one.ids) for one in found)
    for step, (rows, _) in enumerate(read[1:], 1):
        going = sum(len(one.ids) > step for one in found)
        assert going <= rows and 8 * going > 7 * rows - 8, "at most an eighth of the rows has ended"


def test_what_it_cannot_do_goes_by_generate(loaded):
    model, tokenizer = loaded
    for settings, why in ((dict(top_k=5), "top_p = 1.0, top_k = 5"), (dict(top_p=0.9), "top_p = 0.9, top_k = 0")):
        said = []
        settings = RolloutSection(max_completion_length=4, **settings)
        found = transformers_sampler(model, tokenizer, settings, said.append)([[5, 6], [7]], 0)
        assert said == [f"completions are drawn by transformers' generate: {why}"] and len(found) == 2


def test_a_head_that_is_not_read_goes_by_generate(loaded):
    model, tokenizer = loaded
    with torch.no_grad():
        odd = type(model)(model.config)
        odd.load_state_dict(model.state_dict())
    odd.lm_head = torch.nn.Sequential(odd.lm_head)
    assert decode.why_not(odd, RolloutSection()) is not None
    found = transformers_sampler(odd, tokenizer, RolloutSection(max_completion_length=4))([[5, 6], [7]], 0)
    assert len(found) == 2


def test_a_policy_whose_logits_are_no_numbers_fails(loaded):
    model, tokenizer = loaded
    broken = type(model)(model.config)
    torch.nn.init.constant_(broken.model.norm.weight, torch.nan)
    with pytest.raises(RunFailed, match="the log-prob NaN: its logits are not numbers"):
        transformers_sampler(broken, tokenizer, RolloutSection(max_completion_length=4))([[5, 6], [7]], 0)


CUT = """
import os, sys, tiny, torch
import fsdp2
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from align_engine.iterate import iterate
from align_engine.models.load import load_model
from align_engine.recipe import IterateRecipe, ModelSection, RolloutSection
from align_engine.rollouts.generate import transformers_sampler

fsdp2.on_no_cpus()
rounds = tiny.online(IterateRecipe, *sys.argv[1:4], **eval(sys.argv[4]))
iterate(rounds)
tokenizer, settings = AutoTokenizer.from_pretrained(sys.argv[1]), RolloutSection(max_completion_length=20)
prompts, said = [[5 + i // 3, 7] for i in range(9)], []
want = transformers_sampler(AutoModelForCausalLM.from_pretrained(sys.argv[1]), tokenizer, settings)(prompts, 3)
cut = load_model(sys.argv[1], ModelSection())
assert isinstance(cut.lm_head.weight, DTensor) and cut.lm_head.weight.to_local().shape[0] == 32
found = transformers_sampler(cut, tokenizer, settings, said.append)(prompts, 3)
assert "in the pass of the LM head" in said[0]
assert [one.ids for one in found] == [one.ids for one in want]
for a, b in zip(found, want):
    torch.testing.assert_close(a.logps, b.logps, atol=1e-5, rtol=1e-5)
"""


def test_ranks_that_cut_the_model_among_themselves_draw_the_same_and_go_through_the_same_rounds(tmp_path):
    path = tiny.write_model(tmp_path / "model", num_key_value_heads=2, dtype=torch.float64)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.prompt_rows(8))
    settings = dict(rounds=2, per_device_train_batch_size=4, max_steps=2, dtype="auto")
    tensor_parallel = dict(PARALLELISM_CONFIG_TP_SIZE="2", ACCELERATE_USE_PARALLELISM_CONFIG="true")
    run_on_two(CUT, path, rows, tmp_path / "two", settings, **tensor_parallel)
    iterate(tiny.online(IterateRecipe, path, rows, tmp_path / "one", **settings))
    for name in ("round-1/pairs.jsonl", "round-2/pairs.jsonl"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()
    one, two = (load_file(tmp_path / kind / "final" / "model.safetensors") for kind in ("one", "two"))
    assert one.keys() <= two.keys() and max((one[key] - two[key]).abs().max().item() for key in one) < 1e-9


def test_the_log_says_how_completions_are_drawn(model, tmp_path, capsys):
    prompts = tiny.write_rows(tmp_path / "prompts.jsonl", tiny.prompt_rows(6))
    recipe = tiny.online(GrpoRecipe, model, prompts, tmp_path / "run", max_steps=1, eval_dataset_name=str(prompts),
                         eval_steps=1)  # fmt: skip
    train("grpo", recipe)
    assert capsys.readouterr().out.count("completions are drawn in the pass of the LM head") == 1
