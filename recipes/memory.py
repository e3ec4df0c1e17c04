"""Expected memory of the recipes for real models on one GPU: `python recipes/memory.py`.

    weights      parameters x bytes of their type (4 bits: 0.5 bytes and 1/64 of 4 bytes for scales, head and embedding
                 in 16 bits)
    trained      trained parameters x (4 bytes gradient + 8 bytes AdamW), or 2 + 4 where they are bfloat16; fresh
                 adapters are float32 and come on top of the weights; an LM head's gradient is summed up in float32,
                 4 V D bytes more
    activations  N tokens in one forward pass (2 sequences a row for pairs): the layers' inputs, 2 N D L bytes (with
                 gradient checkpointing), and one layer at work, 2 N (12 D + 5 F)
    reference    of online methods with a KL term on all weights: those weights again
    scorer       a reward model's weights, in the type that it was saved in (float32 of a float32 run)
    cache        keys and values of the completions sampled at a time; counted where larger than the activations, which
                 are not there meanwhile
    rest         2 GiB: CUDA's context, logits under the workspace limit, cuBLAS, fragments

D hidden size, F intermediate size, L layers, V vocabulary. Offline there is no second model: references are precomputed
or adapter-off.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from align_engine import recipe as recipes
from align_engine.recipe import RECIPES, Recipe

GIB = 2**30
REST = 2 * GIB
FOLDER = Path(__file__).parent


class Shape(NamedTuple):
    """What a model's config says."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    bias: bool = False  # of the query, key and value projections
    tied: bool = False

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of each linear layer of one block."""
        query, value = self.heads * self.head_size, self.kv_heads * self.head_size
        attention = [(self.hidden, query), (self.hidden, value), (self.hidden, value), (query, self.hidden)]
        return [*attention, *[(self.hidden, self.intermediate)] * 2, (self.intermediate, self.hidden)]

    @property
    def embeddings(self) -> int:
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def blocks(self) -> int:
        bias = (self.heads + 2 * self.kv_heads) * self.head_size * self.bias
        return self.layers * (sum(a * b for a, b in self.linears) + bias + 2 * self.hidden) + self.hidden


SHAPES = {
    "Qwen2.5-0.5B": Shape(151936, 896, 4864, 24, 14, 2, 64, bias=True, tied=True),
    "Qwen2.5-7B": Shape(152064, 3584, 18944, 28, 28, 4, 128, bias=True),
    "Llama-3.1-8B": Shape(128256, 4096, 14336, 32, 32, 8, 128),
    "Mistral-7B": Shape(32768, 4096, 14336, 32, 32, 8, 128),
}


def shape_of(path: str) -> Shape:
    """The shape of a model by its hub name, or by a folder that bears it."""
    return next(shape for known, shape in SHAPES.items() if known.lower() in path.lower())


def parts(name: str, recipe: Recipe) -> dict[str, float]:
    """Bytes by part.

    Args:
        name: of the algorithm.
        recipe: of a model in SHAPES.
    """
    model, train = recipe.model, recipe.train
    path = model.model_name_or_path
    shape = shape_of(path)
    embeddings = shape.embeddings
    if name == "rm" and not shape.tied:
        embeddings //= 2  # a score head in the LM head's place
    size = {"float32": 4, "bfloat16": 2}[model.dtype]
    weights = (embeddings + shape.blocks) * size
    if model.load_in_4bit:
        weights = embeddings * 2 + shape.blocks * (0.5 + 4 / 64)
    if model.use_peft:
        adapters = shape.layers * sum(model.lora_r * (a + b) for a, b in shape.linears)
        trained = adapters * (4 + 4 + 8)
    else:
        trained = (embeddings + shape.blocks) * (12 if size == 4 else 6)
        trained += 4 * shape.vocabulary * shape.hidden * (name != "rm")
    rollout = getattr(recipe, "rollout", None)
    length = recipe.data.max_length
    if rollout:
        length = (recipe.data.max_prompt_length or length) + rollout.max_completion_length
    tokens = train.per_device_train_batch_size * (2 if name in ("rm", "dpo", "iterate") else 1) * length
    inputs = tokens * shape.hidden * shape.layers
    if not train.gradient_checkpointing:
        inputs = tokens * (12 * shape.hidden + 5 * shape.intermediate) * shape.layers
    activations = 2 * (inputs + tokens * (12 * shape.hidden + 5 * shape.intermediate))
    found = {"weights": weights, "trained": trained, "activations": activations}
    if rollout:
        found |= online_parts(recipe, shape, weights, length)
        found.pop("activations" if found["cache"] > activations else "cache")
    return found | {"rest": REST}


def online_parts(recipe: Recipe, shape: Shape, weights: float, length: int) -> dict[str, float]:
    """What sampling, scoring and a reference add."""
    rollout, values, found = recipe.rollout, recipes.flat(recipe), {}
    if (values.get("kl_coef") or values.get("beta")) and not recipe.model.use_peft:
        found["reference"] = weights
    for scorer in rollout.reward_funcs:
        if ":" not in scorer:
            model = shape_of(scorer)
            head = 0 if model.tied else model.embeddings // 2
            found["scorer"] = (model.embeddings - head + model.blocks) * (4 if "full" in scorer else 2)
    size = 4 if recipe.model.dtype == "float32" and not recipe.train.bf16 else 2
    per_token = 2 * shape.layers * shape.kv_heads * shape.head_size * size
    found["cache"] = rollout.per_device_generation_batch_size * length * per_token
    return found


def describe(name: str, recipe: Recipe) -> str:
    """The line that a recipe bears."""
    found = {part: size / GIB for part, size in parts(name, recipe).items()}
    return " + ".join(f"{part} {size:.1f}" for part, size in found.items()) + f" = {sum(found.values()):.1f} GiB"


def load(path: Path) -> tuple[str, Recipe]:
    """(algorithm, recipe) of a file; its name ends in its algorithm's."""
    name = path.stem.rpartition("-")[2]
    return name, recipes.load(RECIPES[name], path)


def main() -> None:
    for path in sorted(FOLDER.glob("*.yaml")):
        if not path.stem.startswith("demo-"):
            print(f"{path.stem:24} {describe(*load(path))}")


if __name__ == "__main__":
    sys.exit(main())
