"""Memory that the recipes for real models are expected to take on one GPU: `python recipes/memory.py`.

Computed; nothing here has been measured on a GPU. `tests/engine/test_recipe_memory.py` holds the parts that grow with
the model and the batch to measured peaks of small models on a CPU; `rest` is an allowance.

    weights      parameters x bytes of their type (4 bits: 0.5 bytes and 1/64 of 4 bytes for scales, head and embedding
                 in 16 bits)
    trained      trained parameters x (gradient and AdamW's two states, of the parameter's type); fresh adapters are
                 float32 and come on top of the weights
    activations  of N tokens in one forward pass (2 sequences a row for pairs): the layers' inputs, N D L numbers of the
                 weights' type, as that is the type of the residual stream; and at work beside them the larger of
                 a layer    recomputed in the backward pass, N (a D + b F) bytes, see LAYER; the gradient of its largest
                            matrix; its weights in bfloat16, where float32 weights compute in it
                 the head   logits, at most `workspace` bytes; the float32 sum of its gradient, where it is trained;
                            float32 weights that compute in bfloat16 all lie there in bfloat16 too by then
    reference    of online methods with a KL term on all weights: those weights again
    scorer       a reward model's weights, in the type that it was saved in (float32 of a float32 run)
    sampling     keys and values of the completions sampled at a time, their logits, bfloat16 copies of float32 weights;
                 counted where larger than the activations, which are not there meanwhile
    rest         2 GiB: CUDA's context, cuBLAS, what the allocator cannot use

D hidden size, F intermediate size, L layers, V vocabulary. Offline there is no second model: references are precomputed
or adapter-off.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from align_engine import recipe as recipes
from align_engine.recipe import RECIPES, Recipe, RolloutSection

GIB = 2**30
REST = 2 * GIB
WORKSPACE = 2 * GIB  # the planner's on a GPU, where the recipe sets none
# bytes a token of one layer at work, per unit of D and of F: (weights, computed in) -> (a, b)
LAYER = {
    ("float32", "float32"): (36, 24),
    ("float32", "bfloat16"): (34, 14),
    ("bfloat16", "bfloat16"): (24, 14),
    ("bfloat16 with LoRA", "bfloat16"): (36, 14),
    ("bfloat16 with LoRA and dropout", "bfloat16"): (60, 22),
}
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


def parts(name: str, recipe: Recipe, shape: Shape | None = None) -> dict[str, float]:
    """Bytes by part.

    Args:
        name: of the algorithm.
        recipe: with gradient checkpointing.
        shape: of its model. Default None: that of SHAPES.
    """
    model, train = recipe.model, recipe.train
    assert train.gradient_checkpointing, "the formula is that of recomputed layers"
    assert train.optim is None and not train.activation_offloading, "and of AdamW's states, all in one place"
    shape = shape or shape_of(model.model_name_or_path)
    if name == "rm" and not shape.tied:
        shape = shape._replace(tied=True)  # a score head in the LM head's place
    found = {"weights": weights(recipe, shape), "trained": trained(recipe, shape)}
    found["activations"] = activations(name, recipe, shape)
    if rollout := getattr(recipe, "rollout", None):
        found |= online_parts(recipe, rollout, shape)
        found.pop("activations" if found["sampling"] > found["activations"] else "sampling")
    return found | {"rest": REST}


def weights(recipe: Recipe, shape: Shape) -> float:
    if recipe.model.load_in_4bit:
        return shape.embeddings * 2 + shape.blocks * (0.5 + 4 / 64)
    return (shape.embeddings + shape.blocks) * itemsize(recipe)


def itemsize(recipe: Recipe) -> int:
    return {"float32": 4, "bfloat16": 2}[recipe.model.dtype]


def mixed(recipe: Recipe) -> bool:
    """Whether float32 weights compute in bfloat16."""
    return bool(recipe.train.bf16) and recipe.model.dtype == "float32"


def trained(recipe: Recipe, shape: Shape) -> float:
    if recipe.model.use_peft:
        adapters = shape.layers * sum(recipe.model.lora_r * (a + b) for a, b in shape.linears)
        return adapters * (4 + 4 + 8)
    return (shape.embeddings + shape.blocks) * 3 * itemsize(recipe)


def tokens_of(name: str, recipe: Recipe) -> tuple[int, int]:
    """(tokens of one forward pass that is trained, tokens of one sequence)."""
    length = recipe.data.max_length
    if rollout := getattr(recipe, "rollout", None):
        length = (recipe.data.max_prompt_length or length) + rollout.max_completion_length
    return recipe.train.per_device_train_batch_size * (2 if name in ("rm", "dpo", "iterate") else 1) * length, length


def activations(name: str, recipe: Recipe, shape: Shape) -> float:
    model, size = recipe.model, itemsize(recipe)
    tokens, _ = tokens_of(name, recipe)
    kind = model.dtype
    if model.use_peft:
        kind += " with LoRA and dropout" if name == "sft" and model.lora_dropout else " with LoRA"
    a, b = LAYER[kind, "bfloat16" if recipe.train.bf16 else "float32"]
    largest = max(i * o for i, o in shape.linears)
    layer = tokens * (a * shape.hidden + b * shape.intermediate) + largest * size
    if mixed(recipe):
        layer += 2 * (shape.blocks // shape.layers + largest)
    table = shape.vocabulary * shape.hidden
    head = 0.0
    if name != "rm":
        head = min(recipe.kernels.workspace or WORKSPACE, tokens * shape.vocabulary * 4)
        head += 0 if model.use_peft else 4 * table
    if mixed(recipe):
        head += 2 * (shape.blocks + table)
    return tokens * shape.hidden * shape.layers * size + max(layer, head)


def online_parts(recipe: Recipe, rollout: RolloutSection, shape: Shape) -> dict[str, float]:
    """What sampling, scoring and a reference add."""
    values, found = recipes.flat(recipe), {}
    if (values.get("kl_coef") or values.get("beta")) and not recipe.model.use_peft:
        found["reference"] = weights(recipe, shape)
    for scorer in rollout.reward_funcs:
        if ":" not in scorer and scorer != "human":
            other = shape_of(scorer)._replace(tied=True)
            found["scorer"] = (other.embeddings + other.blocks) * (4 if "full" in scorer else 2)
    size = 4 if recipe.model.dtype == "float32" and not recipe.train.bf16 else 2
    per_token = 2 * shape.layers * shape.kv_heads * shape.head_size * size
    rows = rollout.per_device_generation_batch_size
    found["sampling"] = rows * (tokens_of("", recipe)[1] * per_token + 4 * shape.vocabulary)
    if mixed(recipe):
        found["sampling"] += 2 * (shape.blocks + shape.vocabulary * shape.hidden)
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
