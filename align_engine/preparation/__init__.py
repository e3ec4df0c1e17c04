"""Preparation of data: answers of several models, pairs of them, data sets in balance, words that give answers away.

A command NAME is a tree of settings in `sections`, an entry of the table below (and of `algorithms.TOOLS`, so that no
method takes its name), and a module NAME with `run(settings)`, which works in `folder.opened`. Its results lie in one
folder: rows.jsonl, which every command and every training takes as --dataset_name, and report.json, report.md and
report.html. The folder itself may be given too.
"""

from __future__ import annotations

import importlib
from typing import Any

from align_engine.errors import BadInput
from align_engine.preparation.sections import (
    AuditRecipe,
    BalanceRecipe,
    GenerateRecipe,
    PairsRecipe,
    Preparation,
    RepairRecipe,
    StripRecipe,
    TokensRecipe,
)

EXTRA = {  # packages of the extra `data`, by the name of their module
    "openai": "openai", "semhash": "semhash", "sentence_transformers": "sentence-transformers",
    "sklearn": "scikit-learn", "scipy": "scipy",
}  # fmt: skip
PREPARATION: dict[str, type[Preparation]] = {
    "generate": GenerateRecipe,
    "pairs": PairsRecipe,
    "balance": BalanceRecipe,
    "tokens": TokensRecipe,
    "strip": StripRecipe,
    "audit": AuditRecipe,
    "repair": RepairRecipe,
}


def run(name: str, settings: Any) -> None:
    """One command of this room.

    Raises:
        BadInput: settings that cannot be used, before anything is read. What the command itself raises.
    """
    from align_engine.inputs import check_outputs
    from align_engine.recipe import check

    settings = check(settings)
    check_outputs(settings)
    try:
        importlib.import_module(f"align_engine.preparation.{name}").run(settings)
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        raise BadInput(f"align {name} needs {EXTRA[error.name]}: pip install 'align-engine[data]'") from error
