"""Noise of training mode: turned off where it can be found, and proved to be off.

A preference loss compares two forward passes of one model and a policy's ratio starts at 1: methods that promise to run
without dropout do not bear any noise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from align_engine.errors import BadInput
from align_engine.integrations.hook import causal_model

WORDS = ("drop", "jitter")  # in the names of rates: dropout, attention_dropout, resid_pdrop, layerdrop, jitter_noise
TOKENS = (2, 8)  # rows and positions of the proof
SAME = 2e-2  # of the norm: far above what other kernels round, far below a dropout of 0.01


def disable_dropout(model: nn.Module) -> None:
    """Dropout, layer drop and router jitter off in training mode too: in modules of torch, and where a module, or the
    configuration that it reads, holds the rate as a number. `restored` gives the configuration back for saving."""
    configs: dict[int, Any] = {}
    module: Any
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in _rates(module):
            setattr(module, name, 0.0)
        for held in vars(module).values():
            if hasattr(held, "get_text_config"):  # a configuration of transformers
                configs[id(held)] = held
    for config in configs.values():
        before = vars(model).setdefault("noise_of_config", [])
        for name in _rates(config):
            before.append((config, name, getattr(config, name)))
            setattr(config, name, 0.0)


def _rates(thing: Any) -> list[str]:
    named = [name for name in vars(thing) if any(word in name.lower() for word in WORDS)]
    return [name for name in named if isinstance(vars(thing)[name], float)]


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Inside the block the model's configuration has the rates that `disable_dropout` found: it is saved with them."""
    found = vars(model).get("noise_of_config", ())
    for config, name, value in found:
        setattr(config, name, value)
    try:
        yield
    finally:
        for config, name, _ in found:
            setattr(config, name, 0.0)


@torch.no_grad()
def check(model: nn.Module, forward: Callable[[Tensor, Tensor], Tensor], device: torch.device) -> None:
    """Prove on a few tokens that a model does in training mode what it does in evaluation. Every rank must call it.

    Args:
        model: prepared for training; left in training mode.
        forward: (input_ids, attention_mask) [2, 8] -> numbers that depend on all of the model.
        device: of the model.
    Raises:
        BadInput: it draws random numbers in training mode, or computes something else there.
    """
    ids = torch.arange(TOKENS[0] * TOKENS[1], device=device).view(TOKENS)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return forward(ids, torch.ones_like(ids)).double()

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.eval()
        calm = run(0)
        model.train()
        first = run(0)
        rounding = max(float((run(0) - first).abs().max()) for _ in range(2))  # of kernels whose order of sums varies
        noise = min(float((run(seed) - first).abs().max()) for seed in (1, 2))
    name, cannot = type(causal_model(model)).__name__, "this method compares forward passes and cannot train it"
    if noise > 10 * rounding:
        raise BadInput(f"{name} draws random numbers in training mode, beside the dropout that could be turned off: "
                       f"{cannot}; set its rates to 0 in config.json")  # fmt: skip
    off = float((first - calm).norm() / calm.norm().clamp(min=1e-30))
    eighths = any(weight.dtype == torch.int8 for weight in model.parameters())  # are multiplied otherwise in evaluation
    if off > (3 * SAME if eighths else SAME):
        raise BadInput(f"{name} computes something else in training mode than in evaluation, by {off:.1%}: {cannot}")
