"""What a run reads and where it writes: no output may be, or hold, an input; a later call must find the same inputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_engine import fingerprint
from align_engine.errors import BadInput
from align_engine.recipe import flat

if TYPE_CHECKING:
    from align_engine.recipe import Recipe

MODELS = ("model_name_or_path", "ref_model_name_or_path", "value_model_name_or_path")
DATA = ("dataset_name", "eval_dataset_name")
CODE = ("reward_funcs", "callbacks")  # lists: `file.py:name`, folders of models, modules, addresses
OUTPUTS = ("output_dir", "server_weights")


def local_inputs(recipe: Recipe) -> list[tuple[str, Path]]:
    """(field, path) of each file and folder of this machine that the recipe reads."""
    values = flat(recipe)
    named = [(name, values.get(name)) for name in MODELS + DATA]
    named += [
        (name, spec.partition(".py:")[0] + ".py" * (".py:" in spec)) for name in CODE for spec in values.get(name) or ()
    ]
    found = [(name, located(name, value)) for name, value in named if value and "://" not in value]
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


def check_outputs(recipe: Recipe) -> None:
    """Refuse a folder to write to that is, or holds, something that the run reads; changes nothing.

    Raises:
        BadInput: naming both.
    """
    values = flat(recipe)
    outputs = [(name, located(name, values[name])) for name in OUTPUTS if values.get(name)]
    for name, output in outputs:
        for field, path in local_inputs(recipe):
            input_is = f"{field} = {str(path)!r}"
            if _holds(output, path):
                raise BadInput(f"{name} = {str(output)!r} is or holds {input_is}: write to another folder")
            if field in DATA and path.is_dir() and _holds(path, output):
                raise BadInput(f"{name} = {str(output)!r} lies inside the data, {input_is}: write to another folder")
        for other, place in outputs:
            if name != other and _holds(output, place):
                raise BadInput(f"{name} = {str(output)!r} is or holds {other} = {str(place)!r}: give two folders apart")


def _holds(folder: Path, path: Path) -> bool:
    folder, path = folder.resolve(), path.resolve()
    return folder == path or folder in path.parents


def facts(recipe: Recipe) -> dict[str, Any]:
    """Fingerprints of the models and of the code that the run reads, by field: what makes it the same run later."""
    from align_engine import importing, rewards

    values = flat(recipe)
    found: dict[str, Any] = {
        f"files of {name}": fingerprint.of_model(values[name]) for name in MODELS if values.get(name)
    }
    if specs := values.get("reward_funcs"):
        found["files of reward_funcs"] = [rewards.fingerprint(spec) for spec in specs]
    if names := values.get("callbacks"):
        found["files of callbacks"] = [importing.fingerprint(name, "callbacks") for name in names]
    return found
