"""Liger's kernels in a model's body: what is asked of Liger, and the sentences where it cannot serve. Its kernels need
a GPU; that they run there is not yet measured."""

import inspect
import types

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from align_engine.errors import BadInput
from align_engine.models import load
from align_engine.recipe import ModelSection
from align_engine.run import check_device, train

liger = pytest.importorskip("liger_kernel.transformers.monkey_patch")
ASKED = ModelSection(use_liger_kernel=True)


@pytest.fixture
def calls(monkeypatch):
    """What Liger's own function for Llama is called with, in its place."""
    found = []

    def apply(rope=True, cross_entropy=True, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None):
        found.append((rope, cross_entropy, fused_linear_cross_entropy, rms_norm, swiglu, type(model).__name__))

    monkeypatch.setitem(liger.MODEL_TYPE_TO_APPLY_LIGER_FN, "llama", apply)
    return found


def test_the_body_is_ligers_and_the_loss_is_not(calls, model):
    load.load_model(str(model), ASKED)
    assert calls == [(True, False, False, True, True, "LlamaForCausalLM")]
    load.load_model(str(model), ModelSection())
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of peft
def test_adapters_get_it_in_their_base(calls, model, tmp_path):
    made = load.add_adapters(load.load_model(str(model), ModelSection()), ModelSection())
    made.save_pretrained(tmp_path / "adapter")
    load.load_model(str(tmp_path / "adapter"), ModelSection(use_liger_kernel=True, use_peft=True))
    assert [call[-1] for call in calls] == ["LlamaForCausalLM"]


def test_every_function_of_liger_takes_the_keywords():
    """Those without a loss apart."""
    takes = {kind: inspect.signature(apply).parameters for kind, apply in liger.MODEL_TYPE_TO_APPLY_LIGER_FN.items()}
    assert len(takes) > 40 and all("model" in taken for taken in takes.values())
    lacking = {
        kind for kind, taken in takes.items() if not {"cross_entropy", "fused_linear_cross_entropy"} <= taken.keys()
    }
    assert lacking == {"pixtral"}


def test_ligers_own_function_leaves_head_and_forward(model, monkeypatch):
    from transformers.models.llama import modeling_llama

    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # Liger changes them for the whole process
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    plain, made = (AutoModelForCausalLM.from_pretrained(model) for _ in range(2))
    load.apply_liger(str(model), made)
    assert isinstance(made.forward, types.MethodType) and made.forward.__func__ is plain.forward.__func__
    assert made.lm_head.forward.__func__ is plain.lm_head.forward.__func__
    for part in (made.model.norm, made.model.layers[0].input_layernorm, made.model.layers[1].mlp):
        assert "liger" in part.forward.__func__.__module__
    assert all(a.equal(b) for a, b in zip(made.parameters(), plain.parameters(), strict=True))


def test_a_model_that_liger_does_not_know_is_refused(model):
    made = AutoModelForCausalLM.from_pretrained(model)
    made.config.model_type = "gpt2"
    with pytest.raises(BadInput, match=r"model 'here': Liger has no kernels for models of type 'gpt2'"):
        load.apply_liger("here", made)


def test_without_a_gpu_or_liger_it_is_refused(model, completions, tmp_path, monkeypatch):
    recipe = tiny.sft(model, completions, tmp_path / "run", use_liger_kernel=True)
    with pytest.raises(BadInput, match="use_liger_kernel = True: Liger's kernels need a GPU, and this run is on a CPU"):
        train("sft", recipe)
    assert not (tmp_path / "run").exists()
    check_device(recipe, torch.device("cuda"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInput, match="liger_kernel is not installed"):
        check_device(recipe, torch.device("cuda"))
