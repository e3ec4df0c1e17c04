"""The forward of a model that gives TRL log-probs: what `fuse` puts behind `add_fused_lm_head`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from align_engine.errors import BadInput
from align_engine.integrations import hook
from align_engine.integrations.hook import head_module, head_weights, hooked_head
from align_engine.integrations.logits import read_logits
from align_engine.integrations.trl_forward import ReplacedForward
from align_kernels import linear_logprobs, logprobs_from_logits
from align_kernels.api import LogProbs


def layers(forward: Any) -> Iterator[Any]:
    """The functions of a forward, from the outermost to that of the class."""
    while forward is not None:
        function = getattr(forward, "__func__", forward)
        yield function
        forward = getattr(function, "__wrapped__", None) or getattr(function, "replaced", None)


def settings_of(function: Any) -> dict[str, Any] | None:
    """What TRL's hook was made with; None for any other function."""
    code = getattr(function, "__code__", None)
    if code is None or "cast_lm_head_to_fp32" not in code.co_freevars:
        return None
    cells = dict(zip(code.co_freevars, function.__closure__))
    return {name: cells[name].cell_contents for name in ("temperature", "cast_lm_head_to_fp32", "outputs")}


def check_head(model: Any, cast_lm_head_to_fp32: bool) -> str:
    """How the log-probs of this bare causal LM are made: "hook", or "logits" with a warning.

    Raises:
        BadInput: it has no LM head that can be taken, or a forward of its own that cannot be called as that of its
            class, naming what is in the way.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    read, own = read_logits(model), beneath(model)
    if read.path == "none":
        raise BadInput(f"{read.why}: it gives no log-probs of one next token")
    if own is not None:
        _check_own(model, own)
    if read.path == "logits":
        warnings.warn(f"{read.why}: its log-probs are made from whole logits, as large as ever", stacklevel=3)
        return read.path
    head = head_module(model)
    if cast_lm_head_to_fp32 and isinstance(head, BaseTunerLayer):
        raise BadInput("cast_lm_head_to_fp32 = True with an adapter on the LM head: TRL's cast drops the adapter")
    training = head.training
    head_weights(head.train())  # as it will be: dropout counts
    head.train(training)
    if own is not None:  # a wrapper may change more than the source below it shows
        hook.check_head(model)
    return read.path


def _check_own(model: Any, own: Any) -> None:
    """Refuse a forward that others put on the instance and that cannot be called as the class's own is."""
    try:
        inspect.signature(own).bind(input_ids=None, attention_mask=None, use_cache=False)
    except TypeError as error:
        name = getattr(own, "__qualname__", None) or type(own).__name__
        raise BadInput(
            f"{type(model).__name__}.forward was replaced by {name}, which cannot be called with input_ids, "
            f"attention_mask and use_cache ({error}): give it **kwargs, or put it there after training"
        ) from error


def add_fused_lm_head(
    model: Any, temperature: float = 1.0, cast_lm_head_to_fp32: bool = False, outputs: tuple[str, ...] = ()
) -> None:
    """TRL's `add_fused_lm_head`: afterwards `model(..., labels=labels, fused_lm_head=True)` gives log-probs.

    Args:
        model: a bare causal LM; under peft, the base model.
        temperature: the logits are divided by it. Default 1.0.
        cast_lm_head_to_fp32: the head in float32, outside autocast (the weight is cast by TRL). Default False.
        outputs: accepted; every field of TRL's FusedCausalLMOutput is there, float32, 0 where the label is -100.

    Raises:
        BadInput: see `check_head`.
    """
    del outputs
    path = check_head(model, cast_lm_head_to_fp32)
    model.forward = Bound(FusedForward(type(model), beneath(model), path, temperature, cast_lm_head_to_fp32), model)


def beneath(model: Any) -> Any:
    """What stands in place of the class's forward below TRL's hook or ours, None where nothing does."""
    forward: Any = vars(model).get("forward")
    while forward is not None:
        function = getattr(forward, "__func__", forward)
        if isinstance(function, FusedForward):
            forward = function.own
        elif settings_of(function):
            cells = dict(zip(function.__code__.co_freevars, function.__closure__))
            forward = cells["original_forward"].cell_contents
        else:
            break
    is_method = getattr(forward, "__self__", None) is model
    return None if is_method and getattr(forward, "__func__", None) is type(model).forward else forward


class Bound:
    """A method whose function is an object: unlike a closure, and unlike `types.MethodType`, it is copied and pickled
    with its model, and bound to the copy."""

    def __init__(self, function: Any, model: Any) -> None:
        self.__func__, self.__self__ = function, model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:  # `generate` reads it
        signature = self.__func__.__signature__
        return signature.replace(parameters=list(signature.parameters.values())[1:])


class FusedForward(ReplacedForward):
    """The forward of a model that gives log-probs where it is asked for them."""

    def __init__(self, kind: type, own: Any, path: str, temperature: float, cast_lm_head_to_fp32: bool) -> None:
        super().__init__(kind, own)
        self.path = path
        self.temperature, self.cast_lm_head_to_fp32 = temperature, cast_lm_head_to_fp32

    def score(self, head: dict[str, Any], hidden: Tensor, targets: Tensor) -> LogProbs:
        options: dict[str, Any] = dict(targets=targets, temperature=self.temperature, **head)
        if not self.cast_lm_head_to_fp32:
            return linear_logprobs(hidden, **options)
        with torch.autocast(hidden.device.type, enabled=False):
            return linear_logprobs(hidden.float(), **options)

    def run(self, model: Any, targets: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, LogProbs]:
        if self.path == "logits":
            out = self.plain(model, *args, **kwargs)
            return out, logprobs_from_logits(out.logits, targets, temperature=self.temperature)
        found: list[LogProbs] = []

        def fn(hidden: Tensor, head: dict[str, Any]) -> Tensor:
            found.append(self.score(head, hidden, targets.to(hidden.device)))
            return found[0].logp

        with hooked_head(model, fn) as results:
            out = self.plain(model, *args, **kwargs)
        (logp,), (fields,) = results, found
        return out, fields._replace(logp=logp)

    def __call__(
        self,
        model: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        from trl.trainer.utils import FusedCausalLMOutput

        if not fused_lm_head:
            given = dict(labels=labels, shift_labels=shift_labels, num_items_in_batch=num_items_in_batch)
            return self.plain(model, *args, **{name: x for name, x in given.items() if x is not None}, **kwargs)
        targets, length = shift_labels, None
        if targets is None:
            if labels is None:
                raise BadInput("fused_lm_head=True scores labels: pass labels, or shift_labels")
            targets, length = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100), -1
        out, fields = self.run(model, targets, *args, **kwargs | {"use_cache": False})
        logp, entropy, _, log_sum_sq_probs, mean_logits, is_top1 = (x[:, :length] for x in fields)
        mask = targets.to(logp.device)[:, :length] != -100
        loss = -logp.sum() / (mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        aux_loss = getattr(out, "aux_loss", None)
        if aux_loss is not None:
            loss = loss + getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux_loss
        return FusedCausalLMOutput(
            loss=loss,
            log_probs=logp,
            entropy=entropy,
            log_sum_sq_probs=log_sum_sq_probs,
            mean_logits=mean_logits,
            is_top1=is_top1,
            label_mask=mask,
            aux_loss=aux_loss,
        )
