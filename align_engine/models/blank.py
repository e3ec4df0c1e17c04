"""Models from their configuration alone: every module with its shapes, and no numbers.

with FakeTensorMode(), blank():
    model = load_model(path, section)          # reads config.json, and adapter_config.json of adapters
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from align_engine.recipe import ModelSection

_BLANK: ContextVar[bool] = ContextVar("blank", default=False)


@contextlib.contextmanager
def blank() -> Iterator[None]:
    """Inside the block `load_model` reads no weights. Where tensors then lie is the surrounding mode's business."""
    token, convert = _BLANK.set(True), nn.Module._apply
    nn.Module._apply = _converted  # torch's own exchanges fake tensors in place, which it then refuses to
    try:
        yield
    finally:
        nn.Module._apply = convert
        _BLANK.reset(token)


def wanted() -> bool:
    """Whether models are made without numbers."""
    return _BLANK.get()


def _converted(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, with new parameters in the place of those that `fn` changes."""
    made: dict[int, nn.Parameter] = {}  # tied ones stay tied
    for module in self.modules() if recurse else [self]:
        for name, held in module._parameters.items():
            if held is not None:
                new = fn(held.detach())
                if id(held) not in made:
                    same = (new.dtype, new.device) == (held.dtype, held.device)
                    made[id(held)] = held if same else nn.Parameter(new, held.requires_grad)
                module._parameters[name] = made[id(held)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else fn(buffer)
    return self


def build(path: str, base: str | None, section: ModelSection, kind: Any, options: dict[str, Any]) -> Any:
    """The model that lies at `path`, or the adapter there on the model at `base`.

    Args:
        kind: class of transformers; options: of its configuration, and `attn_implementation`.
    """
    from peft import PeftConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    attention = {name: options[name] for name in ("attn_implementation",) if name in options}
    own = {name: value for name, value in options.items() if name not in attention}
    saved: Any = None if base is None else PeftConfig.from_pretrained(path, revision=section.model_revision)
    revision = section.model_revision if saved is None else saved.revision or "main"
    config = AutoConfig.from_pretrained(
        base or path, trust_remote_code=section.trust_remote_code, revision=revision, **own
    )
    dtype = getattr(config, "dtype", None) if section.dtype in ("auto", None) else getattr(torch, section.dtype)
    model = (kind or AutoModelForCausalLM).from_config(
        config, dtype=dtype or torch.float32, trust_remote_code=section.trust_remote_code, **attention
    )
    if section.load_in_4bit or section.load_in_8bit:
        quantise(model, 4 if section.load_in_4bit else 8)
    if saved is not None:
        saved.inference_mode = not section.use_peft
        model = get_peft_model(model, saved)
    return model


# -- weights in 4 or 8 bits ---------------------------------------------------------------------------------------
class Quantised(nn.Linear):
    """A linear layer whose weight is stored in a few bits, and made whole for each product: what bitsandbytes holds."""

    def __init__(self, layer: nn.Linear, bits: int) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, dtype=layer.weight.dtype)
        one = layer.weight.new_empty(1, 1)
        self.weight = nn.Parameter(one.expand(layer.weight.shape), requires_grad=False)
        self.bias = layer.bias
        numbers = layer.weight.numel()
        # NF4: half a byte, and of each 64 a scale in 8 bits; 8 bits: a float32 scale for each row
        size = numbers // 2 + numbers // 64 if bits == 4 else numbers + 4 * layer.out_features
        self.register_buffer("packed", layer.weight.new_empty(size, dtype=torch.uint8), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        out = _Product.apply(input, self.weight)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class _Product(torch.autograd.Function):
    """x @ w.T with w made whole here and in the backward, which needs no x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.to(x.dtype).clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.weight.to(grad.dtype).clone(memory_format=torch.contiguous_format), None


def quantise(model: Any, bits: int) -> None:
    """Every linear layer but the head in so many bits."""
    heads = {id(model.get_output_embeddings()), id(getattr(model, "score", None))}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and id(child) not in heads:
                setattr(module, name, Quantised(child, bits))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
