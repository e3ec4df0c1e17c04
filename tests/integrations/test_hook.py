"""The head inside the model's own forward gives what the model's logits give."""

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig, Qwen2Config

from align_engine.errors import BadInput
from align_engine.integrations import hook
from align_engine.models import load
from align_kernels import linear_logprobs

pytestmark = [  # of peft, on transformers' new names and on adapters of tied heads
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie.*:UserWarning"),
]

SMALL = dict(vocab_size=101, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.4,
             pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
CONFIGS = {
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=False),
    "qwen2-tied": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "llama": LlamaConfig(**SMALL),
    "gemma2-softcap": Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0),
    "cohere-scale": CohereConfig(**SMALL, logit_scale=0.3),
    "granite-scaling": GraniteConfig(**SMALL, logits_scaling=4.0),
}
ADAPTERS = {"full": None, "lora": ["q_proj", "down_proj"], "lora-on-head": ["q_proj", "lm_head"]}


def make(name, adapter=None, **lora):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    if adapter:
        settings = dict(r=4, target_modules=adapter, init_lora_weights=False, task_type="CAUSAL_LM",
                        ensure_weight_tying=False) | lora  # fmt: skip
        model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    return model


def inputs():
    ids = torch.randint(3, 101, (3, 9), generator=torch.Generator().manual_seed(1))
    targets = torch.cat([ids[:, 1:], torch.full((3, 1), -100)], 1)
    targets[0, :4] = -100
    return ids, targets


def oracle(model, ids, targets):
    """Log-probs from the model's own logits."""
    logits = model(input_ids=ids, use_cache=False).logits.double()
    picked = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return torch.where(targets == -100, 0.0, picked)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_and_gradients_equal_the_models_own(name, adapter):
    model = make(name, ADAPTERS[adapter])
    hook.check_head(model)
    ids, targets = inputs()
    with hook.fused_head(model, lambda hidden, head: linear_logprobs(hidden, targets=targets, **head).logp):
        logp = model(input_ids=ids, use_cache=False).logits
    expected = oracle(model, ids, targets)
    torch.testing.assert_close(logp.double(), expected, atol=2e-5, rtol=2e-5)

    weights = torch.randn(logp.shape, generator=torch.Generator().manual_seed(2))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    got = torch.autograd.grad((logp * weights).sum(), list(trained.values()))
    want = torch.autograd.grad((expected * weights).sum(), list(trained.values()))
    for n, a, b in zip(trained, got, want):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=lambda text, n=n: f"{n}: {text}")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_is_left_as_it_was(name):
    model = make(name)
    ids, targets = inputs()
    before = oracle(model, ids, targets)
    with pytest.raises(ZeroDivisionError):
        with hook.fused_head(model, lambda hidden, head: hidden / (1 // 0)):
            model(input_ids=ids, use_cache=False)
    assert torch.equal(oracle(model, ids, targets), before)
    assert "forward" not in vars(model.get_output_embeddings())


def test_adapter_off_is_the_base_model():
    model = make("llama", ["q_proj", "lm_head"])
    ids, targets = inputs()
    with model.disable_adapter():
        with hook.fused_head(model, lambda hidden, head: linear_logprobs(hidden, targets=targets, **head).logp):
            got = model(input_ids=ids, use_cache=False).logits
        expected = oracle(model, ids, targets)
    torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=2e-5)
    assert (expected - oracle(model, ids, targets)).abs().max() > 0.1


def scored(model, ids, targets):
    with hook.fused_head(model, lambda hidden, head: linear_logprobs(hidden, targets=targets, **head).logp):
        return model(input_ids=ids, use_cache=False).logits.double()


@pytest.mark.parametrize(
    "settings", [dict(use_rslora=True), dict(lora_alpha=32), dict(alpha_pattern={"lm_head": 5})], ids=str
)
def test_the_adapters_scaling_is_pefts(settings):
    """Of rank-stabilised LoRA too, alpha / sqrt(r)."""
    model, (ids, targets) = make("llama", ["q_proj", "lm_head"], **settings), inputs()
    found, plain = oracle(model, ids, targets), oracle(make("llama", ["q_proj", "lm_head"]), ids, targets)
    torch.testing.assert_close(scored(model, ids, targets), found, atol=2e-5, rtol=2e-5)
    assert (found - plain).abs().max() > 0.1


@pytest.mark.parametrize("merged", [["default"], None], ids=["merged", "merged and taken out again"])
def test_a_merged_adapter_counts_once(merged):
    model, (ids, targets) = make("llama", ["q_proj", "lm_head"]), inputs()
    before = oracle(model, ids, targets)
    model.merge_adapter()
    if merged is None:
        model.unmerge_adapter()
    torch.testing.assert_close(scored(model, ids, targets), oracle(model, ids, targets), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(scored(model, ids, targets), before, atol=1e-4, rtol=1e-4)


def test_a_saved_head_is_off_with_its_adapter():
    """Under disable_adapter() the head is that of before, not the one trained in its place."""
    model, (ids, targets) = make("llama", ["q_proj"], modules_to_save=["lm_head"]), inputs()
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    on = oracle(model, ids, targets)
    with model.disable_adapter():
        off = oracle(model, ids, targets)
        torch.testing.assert_close(scored(model, ids, targets), off, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(scored(model, ids, targets), on, atol=2e-5, rtol=2e-5)
    assert (on - off).abs().max() > 0.1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(labels=inputs()[0]), r"^labels was given .* give them to the function, shifted by one"),
        (dict(shift_labels=inputs()[0]), "^shift_labels was given"),
        (dict(logits_to_keep=3), r"^logits_to_keep was given .* mark those as ignored \(-100\)"),
        (dict(logits_to_keep=torch.arange(3)), "^logits_to_keep was given"),
        (dict(num_logits_to_keep=3), "^num_logits_to_keep was given"),
        (dict(return_dict=False), "^return_dict=False was given"),
    ],
    ids=str,
)
def test_arguments_that_ask_for_logits_are_refused(given, message):
    model, (ids, targets) = make("llama"), inputs()
    fn = lambda hidden, head: linear_logprobs(hidden, targets=targets, **head).logp  # noqa: E731
    with hook.fused_head(model, fn), pytest.raises(BadInput, match=message):
        model(input_ids=ids, **given)
    with hook.fused_head(model, fn):  # what changes nothing is taken
        assert model(input_ids=ids, labels=None, logits_to_keep=0, return_dict=True).logits.shape == targets.shape


def test_modules_to_save_on_the_head():
    model = make("llama", ["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    ids, targets = inputs()
    with hook.fused_head(model, lambda hidden, head: linear_logprobs(hidden, targets=targets, **head).logp):
        got = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got.double(), oracle(model, ids, targets), atol=2e-5, rtol=2e-5)


def test_what_cannot_be_read_exactly_is_refused():
    with pytest.raises(BadInput, match="DoRA"):
        hook.check_head(make("llama", ["lm_head"], use_dora=True))
    with pytest.raises(BadInput, match=r"lora_dropout = 0\.1"):
        hook.check_head(make("llama", ["lm_head"], lora_dropout=0.1).train())

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = make("llama")
    model.lm_head = Doubled(16, 101, bias=False)
    with pytest.raises(BadInput, match="Doubled"):
        hook.check_head(model)


def test_virtual_tokens_are_refused():
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(BadInput, match=r"PROMPT_TUNING: it adds virtual tokens, so that .* not those of the targets"):
        hook.check_head(peft.get_peft_model(make("llama"), prompt))


def test_an_unknown_transformation_of_the_logits_is_refused():
    model = make("llama")
    forward = type(model).forward

    class Shifted(type(model)):
        def forward(self, *args, **kwargs):
            out = forward(self, *args, **kwargs)
            out.logits = out.logits + 1
            return out

    model.__class__ = Shifted
    with pytest.raises(
        BadInput, match=r"Shifted.forward does not show what becomes of its lm_head: .* Call logprobs_from_logits"
    ):
        hook.check_head(model)


def test_dropout_can_be_turned_off():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, attention_dropout=0.5)).train()
    ids, targets = inputs()
    assert not torch.equal(oracle(model, ids, targets), oracle(model, ids, targets))
    load.disable_dropout(model)
    assert torch.equal(oracle(model, ids, targets), oracle(model, ids, targets))
