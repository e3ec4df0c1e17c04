"""What a public function is given wrongly is one sentence with the function's name and the argument's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import align_kernels
from align_kernels import compat
from align_kernels.head import HeadOptions

B, T, D, V = 4, 3, 8, 11
hidden, weight, targets = torch.zeros(B, T, D), torch.zeros(V, D), torch.zeros(B, T, dtype=torch.int64)
HEAD = dict(hidden=hidden, weight=weight, targets=targets)
ROWS, TOKENS, MARKS = torch.zeros(B), torch.zeros(B, T), torch.ones(B, dtype=torch.bool)
SCORES = torch.zeros(B)
CALLS: dict[str, dict[str, Any]] = {
    "bco_loss": HEAD | dict(ref_logps=ROWS, desirable=MARKS, delta=0.0, weights=ROWS),
    "cpo_loss": HEAD,
    "dpo_loss": HEAD | dict(ref_logps=ROWS),
    "explain": HEAD,
    "fused_loss": HEAD | dict(name="sft"),
    "grpo_loss": HEAD | dict(old_logps=TOKENS, advantages=ROWS, ref_logps=TOKENS, sampling_logps=TOKENS, beta=0.1),
    "kto_loss": HEAD | dict(ref_logps=ROWS, desirable=MARKS, kl=0.0),
    "linear_logprobs": HEAD,
    "linear_sample": dict(hidden=hidden, weight=weight, uniforms=TOKENS),
    "logprobs_from_logits": dict(logits=torch.zeros(B, T, V), targets=targets),
    "orpo_loss": HEAD | dict(nll_targets=targets[:2]),
    "ppo_clip_loss": HEAD | dict(old_logps=TOKENS, advantages=TOKENS),
    "reinforce_loss": HEAD | dict(advantages=TOKENS),
    "reward_loss": dict(chosen=SCORES, rejected=SCORES, margin=SCORES),
    "rloo_loss": HEAD | dict(old_logps=ROWS, advantages=ROWS),
    "sequence_logprobs": dict(logps=TOKENS, targets=targets),
    "sft_loss": HEAD,
    "simpo_loss": HEAD,
    "slic_loss": HEAD,
    "value_loss": dict(values=TOKENS, old_values=TOKENS, returns=TOKENS, mask=TOKENS.bool()),
}
FLOATING = {"hidden", "weight", "logits", "logps", "chosen", "values", "uniforms"}  # what a gradient flows to
OF_HEAD = {
    k: "x" for k in ("bias", "lora", "grad_clamp", "tp_group", "workspace", "softcap", "drop_mass", "temperature")
}


def call(name: str, /, **changed: Any) -> Any:
    return getattr(align_kernels, name)(**(CALLS[name] | changed))


def test_every_public_function_is_called_below():
    functions = {name for name in align_kernels.__all__ if inspect.isfunction(getattr(align_kernels, name))}
    assert functions - {"backends_report", "register_backend", "register_loss"} == CALLS.keys()
    for name, given in CALLS.items():
        call(name)
        tensors = {k for k, p in inspect.signature(getattr(align_kernels, name)).parameters.items() if k in given}
        assert tensors == given.keys()


OTHERS: dict[str, tuple[Any, str]] = {
    "module": (nn.Linear(D, V), "Linear of torch: pass its .weight"),
    "numpy": (np.zeros((B, T)), "ndarray of numpy: pass torch.from_numpy"),
    "list": ([0.0], "list of float: pass torch.tensor"),
    "word": ("x", "'x'"),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_tensor_is_named(name: str):
    for key, value in CALLS[name].items():
        if not isinstance(value, Tensor):
            continue
        for other, words in OTHERS.values():
            with pytest.raises(TypeError, match=rf"^{name}\(\): {key} must be a tensor.* got .*{words}"):
                call(name, **{key: other})
        default = inspect.signature(getattr(align_kernels, name)).parameters[key]
        if default.default is inspect.Parameter.empty and "None" not in str(default.annotation):
            with pytest.raises(TypeError, match=rf"^{name}\(\): {key} must be a tensor, got None"):
                call(name, **{key: None})


@pytest.mark.parametrize("name", CALLS)
def test_tensors_that_do_not_fit_are_named(name: str):
    """Another device, whole numbers, one dimension too many: never an error from inside."""
    first = next(iter(CALLS[name]))
    for key, value in CALLS[name].items():
        if not isinstance(value, Tensor):
            continue
        if key != first:
            with pytest.raises(ValueError, match=rf"{key} is on meta, \w+ on cpu: move them to one device"):
                call(name, **{key: value.to("meta")})
        if key in FLOATING:
            with pytest.raises(ValueError, match=f"{key} must be floating point, got torch.int64"):
                call(name, **{key: value.long()})
        with pytest.raises(ValueError, match="|".join(CALLS[name])):
            call(name, **{key: value[None, None, None]})


@pytest.mark.parametrize("name", CALLS)
def test_a_misspelt_keyword_is_named_with_the_nearest(name: str):
    known = list(inspect.signature(getattr(align_kernels, name)).parameters)
    takes_head = "head" in known
    for right in [k for k in known if k != "head"] + (["temperature", "ignore_index", "softcap"] if takes_head else []):
        wrong = right[:-2] + right[-1] + right[-2] if len(right) > 3 and right[-1] != right[-2] else right + "s"
        if wrong in known:
            continue
        with pytest.raises(TypeError, match=rf"^{name}\(\) takes no argument '{wrong}': (did you mean|it takes)"):
            call(name, **{wrong: 1.0})
    with pytest.raises(TypeError, match=rf"^{name}\(\) takes no argument 'q': it takes {known[0]}, "):
        call(name, q=1)
    if takes_head:
        with pytest.raises(
            TypeError, match=rf"^{name}\(\) takes no argument 'tempurature': did you mean temperature\?"
        ):
            call(name, tempurature=1.0)


@pytest.mark.parametrize("name", CALLS)
def test_numbers_and_options_of_another_type_are_named(name: str):
    function = getattr(align_kernels, name)
    wrong = {}
    for key, p in inspect.signature(function).parameters.items():
        if p.annotation in ("float", "int", "bool", "float | None", "int | None", "Items", "float | Tensor"):
            wrong[key] = "x"
        elif p.annotation == "str":
            wrong[key] = None
    if "head" in inspect.signature(function).parameters:
        wrong |= OF_HEAD | dict(impl=None, lora=(weight, weight))
        if name.endswith("_loss"):
            wrong["prob_gate"] = "x"
    for key, value in wrong.items():
        with pytest.raises(TypeError, match=rf"^{name}\(\): {key} must be .* got "):
            call(name, **{key: value})


def test_every_keyword_of_the_head_has_a_type():
    from align_kernels import arguments

    kinds = arguments.hints(align_kernels.linear_logprobs) | arguments.HEAD
    assert kinds.keys() == {"hidden", "weight", "targets", *HeadOptions._fields} and Any not in kinds.values()


COMPAT: dict[str, tuple[Callable, dict[str, Any]]] = {
    "linear_cross_entropy": (compat.cce.linear_cross_entropy, dict(e=hidden, c=weight, targets=targets)),
    "verl": (compat.verl.linear_cross_entropy, dict(hidden=hidden, weight=weight, labels=targets)),
    "selective_log_softmax": (compat.selective_log_softmax, dict(logits=torch.zeros(B, T, V), index=targets)),
    "entropy_from_logits": (compat.entropy_from_logits, dict(logits=torch.zeros(B, T, V))),
    "LigerFusedLinearDPOLoss.forward": (
        compat.LigerFusedLinearDPOLoss(use_ref_model=False).forward,
        dict(lin_weight=weight, _input=hidden, target=targets),
    ),
    "ChunkedLogProbFunction": (
        compat.ChunkedLogProbFunction.apply,
        dict(hidden=hidden[0], weight=weight, bias=None, targets=targets[0], temperature=1.0, chunk_size=1),
    ),
}


@pytest.mark.parametrize("name", COMPAT)
def test_the_peers_signatures_name_what_is_wrong_too(name: str):
    function, given = COMPAT[name]
    function(**given)
    shown = "linear_cross_entropy" if name == "verl" else name
    for key, value in given.items():
        if isinstance(value, Tensor):
            with pytest.raises(TypeError, match=rf"^{shown}\(\): {key} must be a tensor, got a Linear of torch"):
                function(**(given | {key: nn.Linear(D, V)}))
    with pytest.raises(TypeError, match=rf"^{shown}\(\) takes no argument 'tempurature'"):
        function(**given, tempurature=1.0)


def test_a_gate_takes_tensors():
    with pytest.raises(TypeError, match="logps must be a tensor, got a ndarray"):
        align_kernels.ProbGate(0.9)(np.zeros(3))  # type: ignore[arg-type]
