"""What a run reads and where it writes: no output may be, or hold, an input; a later call must find the same inputs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_engine.errors import BadInput
from align_engine.models import fingerprint
from align_engine.models.modelfiles import adapter_base, cached_file
from align_engine.recipe import flat
from align_engine.training.checkpoint import RECORD

if TYPE_CHECKING:
    from align_engine.recipe import Settings

DATA = ("dataset_name", "eval_dataset_name", "pairs_name", "evaluation", "run")
CODE = (
    "reward_funcs",
    "eval_reward_funcs",
    "checkers",
    "callbacks",
)  # lists: `file.py:name`, folders of models, modules, addresses
REWARDS = ("reward_funcs", "eval_reward_funcs", "checkers")
FOLDERS = ("runs", "results")  # lists: of runs and of results
OUTPUTS = ("output_dir", "server_weights", "json")


def local_inputs(recipe: Settings) -> list[tuple[str, Path]]:
    """(field, path) of each file and folder of this machine that the recipe reads: base models of adapters, and what
    the hub's cache holds of a name, are among them."""
    values = flat(recipe)
    models = list(recipe.models().items())
    if scorers := [(name, spec) for name in REWARDS for spec in values.get(name) or ()]:
        from align_engine.rollouts.rewards import is_model

        models += [(name, spec) for name, spec in scorers if is_model(spec)]
    named = [(name, str(place)) for name, model in models for place in _places(model)]
    named += [(name, values[name]) for name in DATA if values.get(name)]
    named += [(name, place) for name in FOLDERS for place in values.get(name) or ()]
    files = [(name, spec.partition(".py:")) for name in CODE for spec in values.get(name) or ()]
    named += [(name, f"{place}.py") for name, (place, colon, _) in files if colon]
    found = [(name, located(name, value)) for name, value in named if "://" not in value]
    return [(name, path) for name, path in found if path.exists()]


def located(field: str, value: str) -> Path:
    """The path that a field of the recipe names, there or not.

    Raises:
        BadInput: the system cannot look there: too long a name, links in a circle, an unknown ~user, a closed folder.
    """
    try:
        path = Path(value).expanduser()
        path.exists()
        path.resolve()
    except (OSError, RuntimeError) as error:
        raise BadInput(f"{field} = {value!r}: {getattr(error, 'strerror', None) or error}") from error
    return path


def _places(model: str) -> list[Path]:
    """Where a model lies, here or in the hub's cache, and the models that its adapters lie on."""
    found: list[Path] = []
    while (path := Path(model)) not in found:
        found.append(path)
        try:
            here = path.is_dir() or None
            cached = here or cached_file(model, "config.json") or cached_file(model, "adapter_config.json")
            found += [cached.parent] if isinstance(cached, Path) else []
            model = adapter_base(model) or model
        except (OSError, BadInput):  # is told where the model is loaded
            break
    return found


def check_outputs(recipe: Settings) -> None:
    """Refuse a folder to write to that is, or holds, something that the run reads; changes nothing.

    Raises:
        BadInput: naming both.
    """
    values = flat(recipe)
    outputs = [(name, located(name, values[name])) for name in OUTPUTS if values.get(name)]
    inputs = [(field, path, _reached(path)) for field, path in local_inputs(recipe)] if outputs else []
    for name, output in outputs:
        # only in a run of ours are links followed; anything else is refused, or replaced as a whole
        written = _reached(output) if (output / RECORD).exists() else [output.resolve()]
        for field, path, read in inputs:
            input_is = f"{field} = {str(path)!r}"
            if any(_holds(one, other) for one in written for other in read):
                raise BadInput(f"{name} = {str(output)!r} is or holds {input_is}: write to another folder")
            if field in DATA and path.is_dir() and any(_holds(path.resolve(), one) for one in written):
                raise BadInput(f"{name} = {str(output)!r} lies inside the data, {input_is}: write to another folder")
        for other, place in outputs:
            if name != other and any(_holds(one, place.resolve()) for one in written):
                raise BadInput(f"{name} = {str(output)!r} is or holds {other} = {str(place)!r}: give two folders apart")


def _reached(path: Path) -> list[Path]:
    """Where a file or folder lies, and what the links in it lead to."""
    found = [path.resolve()]
    for folder, folders, files in os.walk(path):
        inside = [Path(folder, name) for name in (*folders, *files)]
        found += [one.resolve() for one in inside if one.is_symlink()]
    return found


def _holds(folder: Path, path: Path) -> bool:
    return folder == path or folder in path.parents


def facts(recipe: Settings) -> dict[str, Any]:
    """Fingerprints of the models and of the code that the run reads, by field: what makes it the same run later."""
    from align_engine.rollouts import rewards
    from align_engine.training import importing

    values = flat(recipe)
    found: dict[str, Any] = {
        f"files of {name}": fingerprint.of_model(path, recipe.revision(name)) for name, path in recipe.models().items()
    }
    for name in REWARDS:
        if specs := values.get(name):
            found[f"files of {name}"] = [rewards.fingerprint(spec) for spec in specs]
    if names := [name for name in values.get("eval_tasks") or () if Path(name).is_file()]:
        found["files of eval_tasks"] = list(map(fingerprint.of_file, names))
    if names := values.get("callbacks"):
        found["files of callbacks"] = [importing.fingerprint(name, "callbacks") for name in names]
    if not (kind := type(recipe)).__module__.startswith("align_engine."):
        found["files of the method"] = importing.fingerprint(f"{kind.__module__}:{kind.__qualname__}", "method")
    return found
