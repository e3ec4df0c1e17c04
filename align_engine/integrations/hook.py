"""The LM head inside the model's own forward.

`fused_head` swaps the head's `forward` for a function of the hidden states during one call, so the model runs as it
always does (through DDP, FSDP, adapters, checkpointing) and what the function returns comes back in `.logits`:

    with fused_head(model, lambda hidden, head: dpo_loss(hidden, targets=targets, ref_logps=ref, **head).loss):
        loss = model(input_ids=ids, attention_mask=mask, use_cache=False).logits

Every fact about the head is read from the model, none is guessed: what cannot be read exactly is refused.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from align_engine.errors import BadInput
from align_engine.integrations.logits import read_logits

# (hidden [B, T, D], keywords of linear_logprobs) -> any tensor
HeadFunction = Callable[[Tensor, dict[str, Any]], Tensor]


def causal_model(model: Any) -> Any:
    """The transformers model inside DDP, FSDP, torch.compile and peft wrappers."""
    from accelerate.utils import extract_model_from_parallel
    from peft import PeftModel

    model = extract_model_from_parallel(model, keep_torch_compile=False)
    if not isinstance(model, PeftModel):
        return model
    if (config := model.active_peft_config).is_prompt_learning:
        why = "it adds virtual tokens, so that the head's positions are not those of the targets"
        raise BadInput(f"adapter of type {config.peft_type}: {why}; use LoRA")
    return model.get_base_model()


def head_module(model: Any) -> Any:
    """The output embedding of the model; raises BadInput where it has none."""
    module = model.get_output_embeddings()
    if module is None:
        raise BadInput(f"{type(model).__name__} has no output embedding: not a causal language model")
    return module


def logit_transform(causal: Any) -> dict[str, Any]:
    """What the model does to its logits after the head, as `logit_scale` and `softcap` of linear_logprobs.

    Raises:
        BadInput: something else than these two, quoting it.
    """
    read = read_logits(causal)
    if read.path == "hook":
        return read.transform
    instead = " Call logprobs_from_logits(model(...).logits, targets), which gives the same." * (read.path == "logits")
    raise BadInput(f"{read.why}: the fused loss cannot stand in for the LM head.{instead}")


def head_weights(module: Any) -> dict[str, Any]:
    """The head's tensors as keywords of linear_logprobs: weight [V, D], bias [V] or None, and `lora` (A [r, D],
    B [V, r], scaling) where peft put an adapter on it.

    Raises:
        BadInput: a head whose product is not hidden @ weight.T (+ bias) (+ one plain LoRA), naming what it is.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        trained = [name for name in module.active_adapters if name in module.modules_to_save]
        off = module.disable_adapters or not trained
        return head_weights(module.original_module if off else module.modules_to_save[trained[0]])
    lora = {}
    if isinstance(module, LoraLayer):
        lora, module = _lora(module), module.get_base_layer()
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        kind = type(module).__name__
        raise BadInput(f"the LM head is a {kind}, not a plain linear layer: the fused loss cannot stand in")
    return {"weight": module.weight, "bias": module.bias, **lora}


def _lora(module: Any) -> dict[str, tuple[Tensor, Tensor, float]]:
    names = [name for name in module.active_adapters if name in module.lora_A]
    if module.disable_adapters or module.merged or not names:
        return {}
    name, dropout = names[0], getattr(module.lora_dropout[names[0]], "p", 0.0)
    refused = {
        f"{len(names)} active adapters ({', '.join(names)})": len(names) > 1,
        "DoRA or another LoRA variant": name in module.lora_variant,
        "a LoRA bias": module.lora_B[name].bias is not None,
        f"lora_dropout = {dropout}": module.training and dropout > 0,
    }
    for what, present in refused.items():
        if present:
            raise BadInput(f"LoRA on the LM head with {what}: the fused loss takes one plain one without dropout there")
    return {"lora": (module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])}


@contextlib.contextmanager
def head_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside the block `forward` is what the module does."""
    own = vars(module)
    before = {"forward": own["forward"]} if "forward" in own else {}
    own["forward"] = forward
    try:
        yield
    finally:
        del own["forward"]
        own.update(before)


@contextlib.contextmanager
def hooked_head(causal: Any, fn: HeadFunction) -> Iterator[list[Tensor]]:
    """As `fused_head`, for a bare causal LM; gives the list in which each call of the head leaves what `fn` returns.

    The `.logits` of the calls inside are of no meaning: the model goes on with them as if they were logits.
    """
    module, transform = head_module(causal), logit_transform(causal)
    head_weights(module)
    results: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        # the weights are read here: under FSDP they are whole only inside the call
        result = fn(hidden, {**head_weights(module), **transform})
        carried = result.reshape(1, 1, -1)  # what the module returns must lead to the result: FSDP hooks its gradient
        results.append(carried.view(result.shape))
        return carried

    with head_forward(module, forward):
        yield results


FOR_LOGITS = {  # arguments of a model that are of no use where a function stands in for its LM head
    "labels": "the model would score them on logits that are not made; give them to the function, shifted by one",
    "shift_labels": "the model would score them on logits that are not made; give them to the function",
    "logits_to_keep": "positions would be missing that the function's targets have; mark those as ignored (-100)",
    "num_logits_to_keep": "positions would be missing that the function's targets have; mark those as ignored (-100)",
}


def _check_call(given: dict[str, Any]) -> None:
    for name, why in FOR_LOGITS.items():
        value = given.get(name)
        if value is not None and not (isinstance(value, int) and value == 0):
            raise BadInput(f"{name} was given to a model under fused_head: {why}")
    if given.get("return_dict") is False:
        raise BadInput("return_dict=False was given to a model under fused_head: what the function gives is in .logits")


@contextlib.contextmanager
def fused_head(model: nn.Module, fn: HeadFunction) -> Iterator[None]:
    """For the calls of `model` inside the block, `fn(hidden, head)` stands in for the LM head and all that follows it.

    Args:
        model: a causal LM of transformers, bare or wrapped (DDP, FSDP2, peft LoRA).
        fn: gets hidden [B, T, D] and `head`, the keywords weight, bias, logit_scale, softcap, lora of linear_logprobs;
            whatever tensor it returns is the model's `.logits`.
    Raises:
        BadInput: a head that is not exactly what linear_logprobs computes (see `head_weights`, `logit_transform`); a
            call with an argument that asks for logits: labels, logits_to_keep, return_dict=False.
    """
    causal = causal_model(model)
    call = causal.forward
    with hooked_head(causal, fn) as results:
        names = list(inspect.signature(call).parameters)

        @functools.wraps(call, updated=())
        def forward(*args: Any, **kwargs: Any) -> Any:
            _check_call(dict(zip(names, args)) | kwargs)
            results.clear()
            out = call(*args, **kwargs)
            name = type(causal).__name__
            if isinstance(out, tuple):
                raise BadInput(f"{name} gives a tuple without .logits: set return_dict in its config to True")
            if len(results) != 1:
                raise BadInput(f"{name} called its LM head {len(results)} times in one forward, not once")
            (out.logits,) = results
            return out

        with head_forward(causal, forward):
            yield


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Prove on two tokens that the model does to its logits what `logit_transform` read.

    Raises:
        BadInput: the model changes its logits in a way that the hook does not know, so that losses would be wrong.
    """
    causal = causal_model(model)
    module, transform = head_module(causal), logit_transform(causal)
    weight = head_weights(module)["weight"]
    ids = torch.zeros(1, 2, dtype=torch.long, device=weight.device)
    probe = torch.linspace(-40, 40, 2 * weight.shape[0], device=weight.device).view(1, 2, -1)
    with head_forward(module, lambda hidden: probe.to(hidden.dtype)):
        got = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
    scale, cap = transform.get("logit_scale", 1.0), transform.get("softcap")
    want = probe * scale if cap is None else cap * torch.tanh(probe * scale / cap)
    if got.shape != want.shape or not torch.allclose(got, want, rtol=1e-2, atol=1e-2):
        read = f"read from it: {transform or 'nothing'}"
        raise BadInput(
            f"{type(causal).__name__} changes its logits in a way that the fused loss does not know ({read})"
        )


@torch.no_grad()
def check_causal(model: nn.Module) -> None:
    """Prove on a few tokens that what the model says of a token does not depend on those behind it: encoders of
    transformers (BERT and its like) load as causal language models too, and see the answer that they are asked for.

    Raises:
        BadInput: naming the model.
    """
    causal, training = causal_model(model), model.training
    weight = head_weights(head_module(causal))["weight"]
    ids = torch.arange(16, device=weight.device).view(2, 8) % len(weight)
    ids[1, :4] = ids[0, :4]  # the same beginning
    seen: list[Tensor] = []
    logits = len(weight)
    with head_forward(head_module(causal), lambda h: seen.append(h) or h.new_zeros(*h.shape[:-1], logits)):
        model.eval()
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        model.train(training)
    one, other = seen[0][:, :4].double()
    rounding = 1e-4 if seen[0].dtype in (torch.float32, torch.float64) else 3e-2
    if float((one - other).norm()) > rounding * float(one.norm()):
        raise BadInput(
            f"{type(causal).__name__} sees the tokens that it is asked for: it is no causal language model (of an "
            "encoder that can be one, is_decoder must be true in its config.json)"
        )
