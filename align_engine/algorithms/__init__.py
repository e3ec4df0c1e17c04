"""The algorithms: one file a family, with its loss call, what it counts, its advantages and its row of the table.

A new one is a file with a row here, and a recipe in `align_engine.recipe`; from outside of the package, `register`.
"""

import inspect

from align_engine.algorithms.grpo import GRPO
from align_engine.algorithms.kto import KTO
from align_engine.algorithms.ppo import PPO
from align_engine.algorithms.preference import CPO, DPO, ORPO, SIMPO
from align_engine.algorithms.reward_model import RM
from align_engine.algorithms.rloo import RLOO
from align_engine.algorithms.sft import SFT
from align_engine.recipe import ALIASES, RECIPES, OnlineRecipe, Recipe
from align_engine.training.algorithm import Algorithm

ALGORITHMS: dict[str, Algorithm] = {row.name: row for row in (SFT, RM, DPO, SIMPO, ORPO, CPO, KTO, RLOO, GRPO, PPO)}
TOOLS = (  # commands that train nothing
    "plan", "recipes", "env", "demo", "generate", "pairs", "tokens", "balance", "strip", "audit", "repair",
    "rate", "ratings", "samples", "report", "advise", "chat", "merge", "eval", "diagnose",
)  # fmt: skip


def register(row: Algorithm, recipe: type[Recipe]) -> None:
    """Serve an algorithm by its name: `align_engine.run.train(name, recipe)`, `align --plugin FILE name`, and, of one
    that learns from pairs, `align iterate --method name`.

    Args:
        row: what it learns from, what it counts, its loss. It has advantages where it learns from its own rollouts.
        recipe: its recipe class, whose docstring begins with its line in `align --help`; an `OnlineRecipe` where the
            row has advantages.

    Raises:
        ValueError: a name that is taken (the same recipe class again, as a reloaded module brings it, is taken); a
            field that two sections of the recipe have; rollouts and recipe that do not go together; a loss without
            `num_items`.
    """
    taken = RECIPES.get(row.name)
    same = taken is not None and (taken.__module__, taken.__qualname__) == (recipe.__module__, recipe.__qualname__)
    if row.name in (*TOOLS, *ALIASES) or (taken is not None and not same):
        raise ValueError(f"the name {row.name!r} of {recipe.__qualname__} is taken by a command: choose another")
    names = [name for section in vars(recipe()).values() for name in vars(section)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{recipe.__qualname__} has the field {twice[0]!r} in two sections: rename one of them")
    if (row.advantages is not None) != issubclass(recipe, OnlineRecipe):
        has, must = ("has", "must") if row.advantages else ("has no", "must not")
        raise ValueError(f"{row.name!r} {has} advantages, so {recipe.__qualname__} {must} be an OnlineRecipe")
    if "num_items" not in inspect.signature(row.loss).parameters:
        raise ValueError(
            f"the loss of {row.name!r} takes no `num_items`: its sum over a forward pass is to be divided by it"
        )
    ALGORITHMS[row.name], RECIPES[row.name] = row, recipe
