"""State of a run without pickles: a JSON file for its structure, a safetensors file beside it for its tensors."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from safetensors.torch import load_file, save_file
from torch import Tensor

TENSOR = "__tensor__"  # in the JSON, {TENSOR: name} stands for a tensor


def write(path: Path, state: Any) -> None:
    """Write dicts with string keys, lists, numbers, strings, None and tensors to `path`.json and `path`.safetensors.

    Raises:
        TypeError: something else is in it.
    """
    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().contiguous()
            return {TENSOR: name}
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value

    path.with_suffix(".json").write_text(json.dumps(plain(state)), encoding="utf-8")
    save_file(tensors, path.with_suffix(".safetensors"))


def read(path: Path) -> Any:
    """What `write` wrote; tuples come back as lists."""
    tensors = load_file(path.with_suffix(".safetensors"))

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            return (
                tensors[value[TENSOR]] if value.keys() == {TENSOR} else {k: whole(inner) for k, inner in value.items()}
            )
        return [whole(inner) for inner in value] if isinstance(value, list) else value

    return whole(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))


def random_states() -> dict[str, Any]:
    """The random number generators of Python, numpy and torch, on the CPU and on each GPU."""
    legacy: Any = np.random.get_state()
    kind, keys, *rest = legacy
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
    }
    return states | {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_random_states(states: dict[str, Any]) -> None:
    """Go back to what `random_states` gave."""
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state_all(states["cuda"])


def seed_random_states(*numbers: int) -> None:
    """Begin anew, as a function of the numbers alone."""
    set_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))
