"""Python objects by name, for recipes."""

from __future__ import annotations

import importlib
import runpy
from types import SimpleNamespace
from typing import Any

from align_engine.errors import BadInput


def load_object(spec: str, field: str) -> Any:
    """The object that `module:name` or `path/to/file.py:name` stands for; `field` of the recipe is for the message.

    Raises:
        BadInput: not of this form, nothing to import there, or no such name in it.
    """
    module, colon, name = spec.rpartition(":")
    if not colon:
        raise BadInput(f"{field}: {spec!r} is not of the form module:name or file.py:name")
    try:
        in_file = module.endswith(".py")
        loaded = SimpleNamespace(**runpy.run_path(module)) if in_file else importlib.import_module(module)
    except (ImportError, FileNotFoundError) as error:
        raise BadInput(f"{field}: cannot import {spec!r}: {error}") from error
    if not hasattr(loaded, name):
        raise BadInput(f"{field}: {module} has no {name!r}")
    return getattr(loaded, name)
