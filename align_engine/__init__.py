"""Whole alignment training on fused operators. Modules that have moved into folders are still found where they were."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from align_engine.version import __version__ as __version__

# name of a module as it was -> those that have its contents now
MOVED = {
    "callbacks": ["training.callbacks"],
    "checkpoint": ["training.checkpoint"],
    "credit": ["rollouts.advantages"],
    "engine": ["training.engine"],
    "environment": ["reports.environment"],
    "evals": ["reports.evals"],
    "experience": ["rollouts.source", "rollouts.advantages"],
    "heads": ["models.score_head"],
    "importing": ["training.importing"],
    "kto": ["algorithms.kto"],
    "loops": ["training.loop"],
    "metrics": ["training.metrics"],
    "policy": ["models.load", "models.noise", "models.modelfiles"],
    "reference": ["training.reference", "models.logps"],
    "report": ["reports.report"],
    "rewards": ["rollouts.rewards"],
    "rollout": ["rollouts.generate", "rollouts.completion"],
    "server": ["rollouts.server"],
    "source": ["data.windows"],
    "watch": ["training.health"],
}


class _Moved(MetaPathFinder, Loader):
    """Asked after the finders of files."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == __name__ and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        places = [f"{__name__}.{place}" for place in MOVED[module.__name__.rpartition(".")[2]]]

        def get(name: str) -> Any:
            for place in map(import_module, () if name.startswith("__") else places):
                if hasattr(place, name):
                    return getattr(place, name)
            raise AttributeError(f"{module.__name__} has become {' and '.join(places)}, and {name!r} is not there")

        vars(module)["__getattr__"] = get


sys.meta_path.append(_Moved())
