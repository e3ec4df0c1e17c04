"""A copy of a model with TRL's fused forward answers with its own weights, and a forward that others put on the model
is taken with it or refused by name before training."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import types
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from transformers import LlamaForCausalLM
from trl.models import create_reference_model
from trl_runs import V, build

from align_engine.errors import BadInput
from align_engine.integrations import trl as ours
from align_engine.integrations.trl import fuse

pytestmark = [  # of transformers, peft and TRL themselves
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
IDS = torch.randint(0, V, (2, 9), generator=torch.Generator().manual_seed(5))


def fused(folder: Any, **settings: Any) -> Any:
    model = LlamaForCausalLM.from_pretrained(folder)
    ours.add_fused_lm_head(model, **settings)
    return model


def scores(model: Any) -> Tensor:
    return model(input_ids=IDS, labels=IDS, fused_lm_head=True).log_probs.float()


def exact(model: Any, temperature: float = 1.0) -> Tensor:
    """From the logits of the same model."""
    logits = model(input_ids=IDS).logits[:, :-1].double() / temperature
    return logits.log_softmax(-1).gather(-1, IDS[:, 1:, None])[..., 0].float()


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def stored(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "deepcopy twice": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "pickle": pickled,
    "torch.save": stored,
    "average": lambda model: AveragedModel(model).module,
    "reference": create_reference_model,
}


def check_apart(model: Any, other: Any, temperature: float = 1.0) -> None:
    before, loose = scores(model), dict(atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(scores(other), before)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert not other(input_ids=IDS).logits.any()
    torch.testing.assert_close(scores(other), torch.full_like(before, -torch.tensor(float(V)).log()), **loose)
    assert torch.equal(scores(model), before)
    torch.testing.assert_close(before, exact(model, temperature), **loose)


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_has_weights_of_its_own(way: str, trl_model):
    model = fused(trl_model, temperature=0.7)
    check_apart(model, WAYS[way](model), 0.7)


def test_a_shallow_copy_shares_its_weights(trl_model):
    model = fused(trl_model)
    other = copy.copy(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert torch.equal(scores(other), scores(model))


@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "autocast"])
def test_a_copy_of_a_trainers_model(mixed: bool, trl_model, tmp_path):
    """TRL's own hook leaves the plain forward of a copy with the original; fuse takes it off, inside autocast too."""
    trainer = build("sft", trl_model, tmp_path, bf16=mixed, max_steps=1)
    if mixed:
        trainer.train()  # accelerate puts autocast around the forward
    model = fuse(trainer).model
    other = copy.deepcopy(model)
    assert model(input_ids=IDS).logits.dtype == torch.float32
    before = scores(model)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert not other(input_ids=IDS).logits.any()
    torch.testing.assert_close(scores(other), torch.full_like(before, -torch.tensor(float(V)).log()))
    torch.testing.assert_close(before, exact(model), atol=0.1 if mixed else 2e-5, rtol=0)
    if mixed:
        found = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        torch.testing.assert_close(scores(found), exact(found), atol=2e-5, rtol=2e-5)


def test_an_adapter_put_on_afterwards(trl_model):
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False,
                               task_type="CAUSAL_LM", ensure_weight_tying=False)  # fmt: skip
    model = peft.get_peft_model(fused(trl_model), settings)
    torch.testing.assert_close(scores(model), exact(model), atol=2e-5, rtol=2e-5)
    check_apart(model, copy.deepcopy(model))


def test_fused_again_it_has_one_forward(trl_model):
    model = fused(trl_model, temperature=0.5)
    ours.add_fused_lm_head(model, temperature=2.0)
    assert model.forward.__func__.own is None
    torch.testing.assert_close(scores(model), exact(model, 2.0), atol=2e-5, rtol=2e-5)


# -- a forward that others put there ------------------------------------------------------------------------------
def by_lambda(model: Any) -> None:
    call = model.forward
    model.forward = lambda *args, **kwargs: call(*args, **kwargs)


def by_partial(model: Any) -> None:
    model.forward = functools.partial(model.forward)


def by_function(model: Any) -> None:
    call = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    model.forward = forward


def by_wrapper(model: Any) -> None:
    call = model.forward
    model.forward = functools.wraps(call)(lambda *args, **kwargs: call(*args, **kwargs))


def by_method(model: Any) -> None:
    model.forward = types.MethodType(lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs), model)


def by_class(model: Any) -> None:
    call = type(model).forward
    model.__class__ = type("Mine", (type(model),), {"forward": lambda self, *a, **k: call(self, *a, **k)})


def doubled(model: Any) -> None:
    call = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = call(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    model.forward = forward


@pytest.mark.parametrize("patch", [by_lambda, by_partial, by_function, by_wrapper, by_method, by_class, doubled])
def test_a_forward_of_others_is_taken_with_it(patch: Callable, trl_model):
    model = LlamaForCausalLM.from_pretrained(trl_model)
    patch(model)
    expected = exact(model)
    ours.add_fused_lm_head(model)
    found = scores(model)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    found.sum().backward()
    assert model.lm_head.weight.grad.any()
    assert model.generate(IDS, max_new_tokens=1, do_sample=False).shape == (2, 10)


def narrow(model: Any) -> None:
    call = model.forward
    model.forward = lambda input_ids, attention_mask: call(input_ids=input_ids, attention_mask=attention_mask)


def hidden_change(model: Any) -> None:
    call = model.forward

    @functools.wraps(call)
    def forward(*args: Any, **kwargs: Any) -> Any:
        out = call(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    model.forward = forward


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        (narrow, r"LlamaForCausalLM.forward was replaced by narrow\..*lambda.*use_cache.* give it \*\*kwargs"),
        (hidden_change, "LlamaForCausalLM changes its logits in a way that the fused loss does not know"),
    ],
)
def test_a_forward_that_cannot_be_taken_is_refused(patch: Callable, message: str, trl_model):
    model = LlamaForCausalLM.from_pretrained(trl_model)
    patch(model)
    with pytest.raises(BadInput, match=message):
        ours.add_fused_lm_head(model)
