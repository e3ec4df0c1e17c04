"""Preparation of data: answers of several models, pairs of them, data sets in balance, words that give answers away.

A command NAME is a tree of settings in `sections`, an entry of the table below (and of `algorithms.TOOLS`, so that no
method takes its name), and a module NAME with `run(settings)`, which works in `folder.opened`. Its results lie in one
folder: rows.jsonl, which every command and every training takes as --dataset_name, and report.json, report.md and
report.html. The folder itself may be given too.
"""

from __future__ import annotations

import importlib
from typing import Any

from align_engine.preparation.sections import Preparation

PREPARATION: dict[str, type[Preparation]] = {}


def run(name: str, settings: Any) -> None:
    """One command of this room.

    Raises:
        BadInput: settings that cannot be used, before anything is read. What the command itself raises.
    """
    from align_engine.inputs import check_outputs
    from align_engine.recipe import check

    settings = check(settings)
    check_outputs(settings)
    importlib.import_module(f"align_engine.preparation.{name}").run(settings)
