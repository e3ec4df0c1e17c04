"""Twenty steps on packed rows in one process, and in two that share them by DDP or FSDP2, or cut the model by tensor
parallelism with a vocabulary-parallel head: are they the same?

    python tests/layouts.py [--steps 20] [--dtype float64] [--methods dpo,kto,grpo]

Run by hand: about two minutes. A line has the largest difference from one process of any step's loss and gradient norm,
and of any weight at the end, beside the largest change that training has made to a weight. In float64 losses and
weights must agree to 1e-7. In float32 one may differ by a part of the learning rate, of which AdamW's first step is
g / (|g| + 1e-8): where a gradient happens to be of that size, its rounding is a good part of it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / part) for part in (".", "kernels", "tests/helpers")]

import tiny  # noqa: E402
import torch  # noqa: E402
from processes import run_on_two  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from align_engine import run  # noqa: E402
from align_engine.recipe import GrpoRecipe, Recipe  # noqa: E402
from align_engine.training import metrics  # noqa: E402

TENSOR_PARALLEL = dict(PARALLELISM_CONFIG_TP_SIZE="2", ACCELERATE_USE_PARALLELISM_CONFIG="true")
# what the ranks do before they train, and the processes of the run that they are
LAYOUTS = {
    "DDP": ("", 2),
    "FSDP2": ("import fsdp2; fsdp2.on()", 2),
    "TP": (f"import fsdp2, os; os.environ |= {TENSOR_PARALLEL!r}; fsdp2.on_no_cpus()", 1),
}


def recipe(method: str, folder: Path, out: str, steps: int, processes: int) -> Recipe:
    """Steps of 16 rows, in several packed forward passes each."""
    settings: dict[str, Any] = dict(
        max_steps=steps, dtype="auto", packing="on", tokens_per_batch=60, save_steps=steps, learning_rate=1e-3,
        per_device_train_batch_size=16 // processes,
    )  # fmt: skip
    paths = folder / "model", folder / f"{method}.jsonl", folder / method / out
    if method == "grpo":
        return tiny.online(GrpoRecipe, *paths, **settings, beta=0.1)
    return tiny.offline(method, *paths, **settings)


def go(methods: list[str], folder: str, out: str, steps: int, processes: int) -> None:
    """Train by each method."""
    for method in methods:
        run.train(method, recipe(method, Path(folder), out, steps, processes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument("--methods", default="dpo,kto,grpo")
    options = parser.parse_args()
    methods = options.methods.split(",")
    folder = Path(tempfile.mkdtemp(prefix="layouts-"))
    tiny.write_model(folder / "model", dtype=getattr(torch, options.dtype), num_key_value_heads=2)
    for method in methods:
        rows = tiny.prompt_rows(40) if method == "grpo" else tiny.OFFLINE[method][1](100)
        tiny.write_rows(folder / f"{method}.jsonl", rows)
    go(methods, str(folder), "one", options.steps, 1)
    for name, (before, processes) in LAYOUTS.items():
        here = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})"
        arguments = (methods, str(folder), name, options.steps, processes)
        run_on_two(f"{here}\n{before}\nimport layouts\nlayouts.go(*{arguments!r})")
    start, worst = load_file(folder / "model" / "model.safetensors"), 0.0
    for method in methods:
        wanted = metrics.read(folder / method / "one" / "metrics.jsonl")
        one = load_file(folder / method / "one" / "final" / "model.safetensors")
        moved = max((one[name] - start[name]).abs().max().item() for name in one)
        for name in LAYOUTS:
            found = metrics.read(folder / method / name / "metrics.jsonl")
            assert len(found) == len(wanted) == options.steps
            off = {key: max(abs(a[key] - b[key]) for a, b in zip(wanted, found)) for key in ("loss", "grad_norm")}
            other = load_file(folder / method / name / "final" / "model.safetensors")
            off["weights"] = max((one[key] - other[key]).abs().max().item() for key in one)
            worst = max(worst, off["loss"], off["weights"])
            numbers = ", ".join(f"{key} {value:.1e}" for key, value in off.items())
            print(f"{method:5}{name:6} {options.steps} steps: {numbers} (weights moved by up to {moved:.1e})")
    sys.exit(worst > {"float64": 1e-7, "float32": 1e-4}[options.dtype])


if __name__ == "__main__":
    main()
