"""What TRL's trainers can be set to holds under `fuse`; what TRL refuses or gets wrong is done right or refused."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    LlamaForCausalLM,
    MixtralConfig,
    RobertaConfig,
)
from trl.trainer import base_trainer, utils
from trl_runs import V, build, run, same

from align_engine.errors import BadInput
from align_engine.integrations import trl as ours
from align_engine.integrations.trl import fuse

pytestmark = [  # of transformers, peft and TRL themselves
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
STEPS = 4
SMALL = dict(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.4, pad_token_id=1,
             bos_token_id=None, eos_token_id=1)  # fmt: skip


def lora(*modules: str, **settings: Any) -> peft.LoraConfig:
    options = dict(r=4, init_lora_weights=False, task_type="CAUSAL_LM", ensure_weight_tying=False) | settings
    return peft.LoraConfig(target_modules=list(modules), **options)


def soft_prompt() -> peft.PromptTuningConfig:
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


def experts() -> Any:
    torch.manual_seed(4)
    return AutoModelForCausalLM.from_config(MixtralConfig(**SMALL, num_local_experts=4, output_router_logits=True))


def capped() -> Any:
    torch.manual_seed(4)
    return AutoModelForCausalLM.from_config(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0))


CASES: dict[str, tuple[str, Any]] = {
    "checkpointing": ("sft", lambda: dict(gradient_checkpointing=True)),
    "reentrant checkpointing": (
        "dpo", lambda: dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=True))),
    "accumulation": ("kto", lambda: dict(gradient_accumulation_steps=3)),
    "adapter, reference by switching it off": ("dpo", lambda: dict(peft_config=lora("q_proj", "down_proj"))),
    "kto adapter": ("kto", lambda: dict(peft_config=lora("q_proj", "down_proj"))),
    "precomputed reference": ("dpo", lambda: dict(precompute_ref_log_probs=True)),
    "soft prompt": ("dpo", lambda: dict(peft_config=soft_prompt())),
    "weighting": ("dpo", lambda: dict(use_weighting=True)),
    "two losses": ("dpo", lambda: dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5], ld_alpha=0.5)),
    "evaluation": ("sft", lambda: dict(eval_strategy="steps", eval_steps=2)),
    "dft": ("sft", lambda: dict(loss_type="dft")),
    "experts": ("sft", lambda: dict(model=experts(), router_aux_loss_coef=0.3)),
    "softcap": ("sft", lambda: dict(model=capped())),
    "bfloat16 autocast": ("sft", lambda: dict(bf16=True)),
    "entropy bonus": ("grpo", lambda: dict(entropy_coef=0.2)),
    "two rounds": ("grpo", lambda: dict(num_iterations=2, epsilon=0.01)),
    "head in float32": ("grpo", lambda: dict(cast_lm_head_to_fp32=True)),
}  # fmt: skip
AFTER = {"adapter, reference by switching it off", "precomputed reference", "soft prompt", "experts", "head in float32"}
LOOSE = {"bfloat16 autocast": (3e-2, 1 / 20)}  # theirs rounds logits to bfloat16: one token in 25 has another argmax


@pytest.mark.parametrize("case", CASES)
def test_options(case, trl_model, tmp_path):
    kind, make = CASES[case]
    theirs = run(build(kind, trl_model, tmp_path, max_steps=STEPS, **make()))
    with fuse():
        results = run(build(kind, trl_model, tmp_path, max_steps=STEPS, **make()))
    same(results, theirs, *LOOSE.get(case, ()))
    if case in AFTER:
        same(run(fuse(build(kind, trl_model, tmp_path, max_steps=STEPS, **make()))), results)


# -- LoRA on the head: TRL refuses --------------------------------------------------------------------------------
def eager_head(model: Any, temperature: float = 1.0, outputs: tuple[str, ...] = (), **_: Any) -> None:
    """TRL's hook from the logits of the model's own forward, in float64."""
    call = model.forward

    @functools.wraps(call)
    def forward(*args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return call(*args, **kwargs)
        labels = labels[:, 1:]
        mask, logits = labels != -100, call(*args, **kwargs).logits[:, :-1].double() / temperature
        logp_all = logits.log_softmax(-1)
        logp = logp_all.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        fields = dict(
            log_probs=logp,
            entropy=-(logp_all.exp() * logp_all).sum(-1),
            log_sum_sq_probs=(2 * logp_all).logsumexp(-1),
            mean_logits=logits.mean(-1),
            is_top1=logits.argmax(-1) == labels,
        )
        zero = {name: x.masked_fill(~mask, 0) for name, x in fields.items()}
        zero = {name: x if x.dtype == torch.bool else x.float() for name, x in zero.items()}
        return utils.FusedCausalLMOutput(label_mask=mask, **zero)

    model.forward = forward


@pytest.mark.parametrize("kind", ["dpo", "sft", "kto", "grpo", "rloo"])
def test_lora_on_the_head(kind, trl_model, tmp_path, monkeypatch):
    settings = dict(peft_config=lora("q_proj", "lm_head"), max_steps=STEPS)
    with pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head` is not supported"):
        build(kind, trl_model, tmp_path, **settings)
    with fuse():
        results = run(build(kind, trl_model, tmp_path, **settings))
    module = importlib.import_module(f"trl.trainer.{kind}_trainer")
    monkeypatch.setattr(module, "add_fused_lm_head", eager_head)
    monkeypatch.setattr(module, "BaseTunerLayer", type("Nothing", (), {}))
    trainer = build(kind, trl_model, tmp_path, **settings)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    theirs = run(trainer)
    same(results, theirs)
    moved = [k for k, v in theirs[1].items() if "lm_head.lora" in k and not torch.equal(v, before[k])]
    assert len(moved) == 2


# -- what is done right -------------------------------------------------------------------------------------------
def scored(model: Any, hook: Any) -> Any:
    ids = torch.randint(0, V, (2, 9), generator=torch.Generator().manual_seed(5))
    hook(model, outputs=("log_probs", "entropy"))
    return model(input_ids=ids, labels=ids, fused_lm_head=True)


def test_bfloat16_keeps_float32_log_probs(trl_model):
    model = LlamaForCausalLM.from_pretrained(trl_model, dtype=torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    hidden = []
    model.lm_head.register_forward_pre_hook(lambda module, given: hidden.append(given[0]))
    out = scored(model, ours.add_fused_lm_head)
    ids = torch.randint(0, V, (2, 9), generator=torch.Generator().manual_seed(5))
    logits = hidden[0].double() @ model.lm_head.weight.double().T
    exact = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert out.log_probs.dtype == torch.float32
    rounded = scored(LlamaForCausalLM.from_pretrained(trl_model, dtype=torch.bfloat16), utils.add_fused_lm_head)
    assert rounded.log_probs.dtype == torch.float32  # of logits in bfloat16
    assert (out.log_probs - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_head_of_several_layers_is_not_cut_short():
    """RoBERTa has a dense layer and a norm before its output embedding: TRL multiplies past them."""
    torch.manual_seed(0)
    config = RobertaConfig(**SMALL | dict(bos_token_id=0), is_decoder=True)
    model, peer = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    peer.load_state_dict(model.state_dict())
    eager = AutoModelForCausalLM.from_config(config).eval()
    eager.load_state_dict(model.state_dict())
    exact = scored(eager, eager_head).log_probs
    torch.testing.assert_close(scored(model, ours.add_fused_lm_head).log_probs, exact, atol=1e-5, rtol=1e-5)
    assert (scored(peer, utils.add_fused_lm_head).log_probs - exact).abs().max() > 0.1


def test_second_path_with_a_warning(trl_model):
    """A model that does something unknown to its logits: whole logits, the same numbers, and a warning."""

    class Squared(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits**2
            return out

    with pytest.warns(UserWarning, match=r"Squared\.forward does not show .* from whole logits"):
        results = scored(Squared.from_pretrained(trl_model), ours.add_fused_lm_head)
    exact = scored(Squared.from_pretrained(trl_model), eager_head)
    for field in ("log_probs", "entropy"):
        torch.testing.assert_close(results[field], exact[field], atol=1e-5, rtol=1e-5)


# -- what is refused, before training -----------------------------------------------------------------------------
def test_a_release_is_taken_by_its_functions_not_by_its_number(monkeypatch, trl_model, tmp_path):
    monkeypatch.setattr(trl, "__version__", "1.99.0")
    trainer = build("sft", trl_model, tmp_path)
    with pytest.warns(UserWarning, match=r"fuse was run with TRL 1\.16, .*, this is 1\.99\.0: compare a few steps"):
        assert fuse(trainer) is trainer

    def hook(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=(), top_k=0):
        raise AssertionError("not to be called")

    refused = r"TRL 1\.16\.0: add_fused_lm_head is another than fuse knows \({}\)"
    monkeypatch.setattr(trl, "__version__", "1.16.0")
    monkeypatch.setattr(utils, "add_fused_lm_head", hook)
    for given in ((), (object(),)):
        with pytest.raises(BadInput, match=refused.format("top_k")):
            fuse(*given)
    monkeypatch.undo()
    output = dataclasses.make_dataclass("FusedCausalLMOutput", [*ours.OUTPUT - {"aux_loss"}, "margins"])
    monkeypatch.setattr(utils, "FusedCausalLMOutput", output)
    with pytest.raises(BadInput, match=refused.format("aux_loss, margins")):
        fuse()
    monkeypatch.delattr(utils, "add_fused_lm_head")
    monkeypatch.delattr(utils, "entropy_from_logits")
    said = r"TRL 1\.16\.0 has no {}: fuse was run with 1\.16, 1\.15, 1\.8; pip install 'trl>=1\.8'"
    with pytest.raises(BadInput, match=said.format("entropy_from_logits")):
        fuse()
    monkeypatch.setattr(utils, "entropy_from_logits", utils.selective_log_softmax, raising=False)
    monkeypatch.delattr(base_trainer, "_BaseTrainer")
    with pytest.raises(BadInput, match=said.format("_BaseTrainer")):
        fuse()


def test_the_extra_allows_the_releases_that_were_run():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (wanted,) = project["optional-dependencies"]["trl"]
    oldest = min(ours.TESTED, key=lambda release: [*map(int, release.split("."))])
    assert wanted == f"trl>={oldest}" and trl.__version__.rsplit(".", 1)[0] in ours.TESTED


def test_refusals(trl_model, tmp_path):
    gkd = type("GKDTrainer", (trl.SFTTrainer,), {})
    with pytest.raises(BadInput, match="GKDTrainer takes its loss from whole logits"):
        fuse(build("sft", trl_model, tmp_path, trainer=gkd))
    cpo = importlib.import_module("trl.experimental.cpo")
    data = Dataset.from_list(tiny.preference_rows(4))
    config = cpo.CPOConfig(str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    given = dict(train_dataset=data, processing_class=AutoTokenizer.from_pretrained(trl_model))
    with fuse():
        with pytest.raises(BadInput, match=r"GKDTrainer takes .* build it outside of the `with fuse"):
            build("sft", trl_model, tmp_path, trainer=gkd)
        with pytest.raises(BadInput, match=r"CPOTrainer does not take .* fuse serves DPO, .* build it outside"):
            cpo.CPOTrainer(str(trl_model), config, **given)
    cpo.CPOTrainer(str(trl_model), config, **given)
    with fuse(), pytest.raises(ValueError, match=r"AsyncGRPOTrainer. does not support a PEFT adapter on .lm_head"):
        build("async_grpo", trl_model, tmp_path, peft_config=lora("lm_head"))
    with fuse():
        for settings, message in ((dict(lora_dropout=0.1), r"lora_dropout = 0\.1"), (dict(use_dora=True), "DoRA")):
            with pytest.raises(BadInput, match=message):
                build("sft", trl_model, tmp_path, peft_config=lora("lm_head", **settings))
    adapted = peft.get_peft_model(LlamaForCausalLM.from_pretrained(trl_model), lora("lm_head")).get_base_model()
    with pytest.raises(BadInput, match="TRL's cast drops the adapter"):
        ours.add_fused_lm_head(adapted, cast_lm_head_to_fp32=True)


def test_a_reward_trainer_stays_as_it_is(trl_model, tmp_path):
    trainer = build("reward", trl_model, tmp_path)
    forward = trainer.model.forward
    assert fuse(trainer) is trainer and trainer.model.forward == forward


def test_fused_once(trl_model, tmp_path):
    with fuse():
        trainer = build("sft", trl_model, tmp_path)
    forward = trainer.model.forward
    assert fuse(trainer).model.forward is forward


def test_a_block_ends(trl_model, monkeypatch):
    names = [f"trl.trainer.{name}_trainer" for name in ours.TRAINERS]
    state = lambda: [(m.add_fused_lm_head, m.BaseTunerLayer) for m in map(importlib.import_module, names)]  # noqa: E731
    before = state()
    late, start = types.ModuleType("trl.late"), base_trainer._BaseTrainer.__init__
    with fuse():
        assert all(hook is ours.add_fused_lm_head for hook, _ in state())
        vars(late)["add_fused_lm_head"] = utils.add_fused_lm_head
        monkeypatch.setitem(sys.modules, "trl.late", late)
        with fuse():
            pass
        assert utils.add_fused_lm_head is ours.add_fused_lm_head
    assert state() == before and utils.add_fused_lm_head is before[0][0]
    assert vars(late)["add_fused_lm_head"] is before[0][0]
    assert base_trainer._BaseTrainer.__init__ is start
    undo = fuse()
    assert utils.add_fused_lm_head is ours.add_fused_lm_head
    undo.close()
    assert state() == before and all(hook is utils.add_fused_lm_head for hook, _ in before)
