"""How to begin with a method: its recipe, the commands in their order, and the memory that `align plan` computes."""

from __future__ import annotations

import contextlib
import json
import shlex
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from align_engine import recipe as recipes
from align_engine.assessment.guide import Advice, guide
from align_engine.assessment.situation import Situation
from align_engine.errors import BadInput
from align_engine.iterate import trained_by
from align_engine.planning.cards import Card
from align_engine.planning.fit import fitted
from align_engine.planning.rehearse import lengths, rehearse
from align_engine.recipe import RECIPES, Recipe, RolloutSection

ROOT = Path(__file__).parents[2]  # in a checkout the recipes lie there, beside the package
REWARD = {"assessors": "human", "verifier": "my_rewards.py:score", "reward-model": "runs/rm/final"}
SMALLEST = "Qwen2.5-0.5B"  # a reward model's, as the recipes have it


def recipe_of(method: str, billions: float) -> str:
    """The recipe to begin with: a file of the repository."""
    family = next(one["family"] for one in guide()["recipes"] if billions <= one["most"])
    return f"recipes/{family}-{method}.yaml"


def commands(advice: Advice, at: Situation, model: str | None, data: str | None) -> list[str]:
    """What to type, in order; names in capitals, data/ and runs/ are to be filled in or made on the way."""
    model, rows = model or "MODEL", data or "DATA"
    steps, reward, learnt = list[list[str]](), None, rows
    for need in advice.needs:
        if need.word in REWARD:
            reward = REWARD[need.word]
        source = rows
        for step in need.steps:
            if step in ("pairs", "marks"):
                layout = ["--layout", "unpaired"] if step == "marks" else []
                source = f"data/{step}"
                steps.append(["align", "pairs", "--dataset_name", rows, *layout, "--output_dir", source])
                learnt = source if need.word == step else learnt
            else:
                steps.append(["align", "rm", "--recipe", recipe_of("rm", at.billions), "--model_name_or_path", model,
                              "--dataset_name", source, "--output_dir", "runs/rm"])  # fmt: skip
    last = ["align", advice.method, "--recipe", recipe_of(advice.method, at.billions), "--model_name_or_path", model,
            "--dataset_name", learnt]  # fmt: skip
    last += ["--reward_funcs", reward] if reward else []
    return [shlex.join(step) for step in (*steps, [*last, "--output_dir", f"runs/{advice.method}"])]


def memory(
    method: str, at: Situation, model: str | None, serves: set[str], ask: Callable[[str, Recipe, Card], dict[str, Any]]
) -> dict[str, Any]:
    """What is to be said of the memory of the first recipe on this model and device.

    Args:
        model: folder or hub name. Default None: one of the guide's of about that size.
        serves: words of the method's needs.
        ask: `taken`, or `made_to_fit`.
    Returns:
        what `ask` says, or {"why_not": a sentence}.
    """
    path = ROOT / recipe_of(method, at.billions)
    if not path.is_file():
        return {"why_not": f"{path.name} is not beside this installation: it is in the repository"}
    try:
        with shapes() as folder:
            recipe = recipes.load(RECIPES[method], path)
            recipe.model.model_name_or_path = model or str(folder / nearest(at.billions))
            rollout = recipe.section(RolloutSection)
            if rollout is not None:
                rollout.reward_funcs = [str(folder / SMALLEST)] if "reward-model" in serves else ["human"]
            return ask(method, recipe, at.card) | {"model": model or nearest(at.billions)}
    except BadInput as error:
        return {"why_not": str(error)}


def taken(method: str, recipe: Recipe, card: Card) -> dict[str, Any]:
    """The peak, as `align plan` computes it: {"bytes", "phase", "fits"}. Raises BadInput from the configuration."""
    name, recipe, rollout = trained_by(method, recipe)
    peak = rehearse(name, recipe, card, lengths(recipe), rollout).peak
    return {"bytes": peak.peak, "phase": peak.name, "fits": peak.peak <= card.usable, "measured": not card.gpu}


def made_to_fit(method: str, recipe: Recipe, card: Card) -> dict[str, Any]:
    """{"fit": what `--fit` changes}, or {"refusal": why nothing makes it fit}. Raises BadInput from the recipe."""
    name, recipe, _ = trained_by(method, recipe)
    try:
        return {"fit": [str(one) for one in fitted(name, recipe, card, lengths(recipe)).changes]}
    except BadInput as error:
        return {"refusal": str(error)}


def nearest(billions: float) -> str:
    """The guide's model whose size is nearest, by ratio."""
    return min(guide()["models"], key=lambda one: abs(one["billions"] / billions - 1))["name"]


@contextlib.contextmanager
def shapes() -> Iterator[Path]:
    """Inside the block, a folder with the configuration of each of the guide's models under its name."""
    with tempfile.TemporaryDirectory(prefix="align-advise-") as folder:
        for model in guide()["models"]:
            config = {name: value for name, value in model.items() if name not in ("name", "billions")}
            place = Path(folder, model["name"])
            place.mkdir()
            config |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 32768}
            (place / "config.json").write_text(json.dumps(config))
        yield Path(folder)
