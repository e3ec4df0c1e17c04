"""Memory that the recipes for real models are expected to take on one GPU, as `align plan` computes it.

    python recipes/memory.py [--write] [RECIPE ...]     # prints each recipe's lines; --write: puts them into it

Some ten seconds a recipe. Of the models only their configurations are needed, and those stand here. Nothing has been
measured on a GPU; docs/plan.md says what is counted, and what runs on a CPU took beside it.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from align_engine import recipe as recipes
from align_engine.iterate import trained_by
from align_engine.planning import cards
from align_engine.planning.rehearse import Rehearsed, lengths, rehearse
from align_engine.planning.show import PARTS
from align_engine.recipe import RECIPES, Recipe, RolloutSection
from align_engine.rollouts.rewards import is_model

FOLDER = Path(__file__).parent
CARDS = {24: "RTX-4090", 40: "A100-40GB", 80: "A100-80GB"}
LINES = re.compile(r"# expected memory: .*\n# computed .*\n")
QWEN: dict[str, Any] = dict(model_type="qwen2", max_position_embeddings=32768, rope_theta=1e6, rms_norm_eps=1e-6)
EIGHT: dict[str, Any] = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                             num_key_value_heads=8, tie_word_embeddings=False)  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {  # what their config.json says
    "Qwen/Qwen2.5-0.5B-Instruct": QWEN | dict(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True),
    "Qwen/Qwen2.5-7B-Instruct": QWEN | dict(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False),
    "meta-llama/Llama-3.1-8B-Instruct": EIGHT | dict(
        model_type="llama", vocab_size=128256, max_position_embeddings=131072, rope_theta=5e5),
    "mistralai/Mistral-7B-Instruct-v0.3": EIGHT | dict(
        model_type="mistral", vocab_size=32768, max_position_embeddings=32768, rope_theta=1e6, sliding_window=None),
}  # fmt: skip


def configured(name: str, folder: Path, dtype: str = "bfloat16") -> str:
    """A folder with the configuration of a model by its name on the hub, or of what another recipe here trains."""
    if (found := re.fullmatch(r"runs/(.+)/final", name)) is not None:
        _, other = load(FOLDER / f"{found[1]}.yaml")
        assert not other.model.use_peft, "adapters would need a base"
        return configured(other.model.model_name_or_path, folder, other.model.dtype)
    numbers = dict(MODELS[name])
    path = folder / f"{name.replace('/', '-')}-{dtype}"
    AutoConfig.for_model(numbers.pop("model_type"), dtype=dtype, **numbers).save_pretrained(path)
    return str(path)


def rehearsed(name: str, recipe: Recipe, folder: Path, card: cards.Card) -> Rehearsed:
    """What a recipe takes on a card.

    Args:
        folder: for the configurations.
    """
    recipe.model.model_name_or_path = configured(recipe.model.model_name_or_path, folder)
    if (rollout := recipe.section(RolloutSection)) is not None:
        own = [configured(spec, folder) if is_model(spec) else spec for spec in rollout.reward_funcs]
        rollout.reward_funcs = own
    each = lengths(recipe)
    name, trained, sampled = trained_by(name, recipe)
    return rehearse(name, trained, card, each, sampled)


def describe(found: Rehearsed, card: cards.Card) -> str:
    """The lines that a recipe bears."""
    held = found.peak.parts | {"process": card.base}
    parts = {part: held.get(part, 0) / cards.GIB for part in (*PARTS, "process")}
    said = " + ".join(f"{part} {size:.1f}" for part, size in parts.items() if size >= 0.05)
    return (f"# expected memory: {said} = {sum(parts.values()):.1f} GiB ({found.peak.name})\n"
            "# computed by `align plan`, not measured on a GPU\n")  # fmt: skip


def load(path: Path) -> tuple[str, Recipe]:
    """(command, recipe) of a file; its name ends in its command's."""
    name = path.stem.rpartition("-")[2]
    return name, recipes.load(RECIPES[name], path)


def card_of(text: str) -> cards.Card:
    """The card that a recipe says it is for."""
    said = re.search(r"one card of (\d+) GB", text)
    assert said is not None
    return cards.card(CARDS[int(said[1])])


def lines_of(path: Path) -> str:
    """The lines that a recipe should bear; says where it does not fit on its card."""
    card = card_of(path.read_text())
    with tempfile.TemporaryDirectory() as folder:
        found = rehearsed(*load(path), Path(folder), card)
    fits = "" if found.peak.peak <= card.usable else f"# DOES NOT FIT on {card.name}\n"
    return describe(found, card) + fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    real = [path.stem for path in sorted(FOLDER.glob("*.yaml")) if not path.stem.startswith("demo-")]
    parser.add_argument("recipes", nargs="*", default=real, metavar="RECIPE")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    for name in options.recipes:
        path = FOLDER / f"{name}.yaml"
        lines = lines_of(path)
        print(f"{name}\n{lines}", end="", flush=True)
        if options.write:
            path.write_text(LINES.sub(lambda _, lines=lines: lines, path.read_text(), count=1))


if __name__ == "__main__":
    main()
