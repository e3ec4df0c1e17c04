"""Whether a model is there and whole: its path, its files, and what transformers and peft report of loading them."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from align_engine.data.json_text import loads
from align_engine.errors import BadInput

HUB_SECONDS = 10.0  # to wait for the hub to say whether it has a model
SETTINGS = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer*.json", "added_tokens.json",
            "special_tokens_map.json", "*.index.json")  # fmt: skip
WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors")
NAMED = 3  # tensors that a message names


def check_path(path: str, field: str = "model_name_or_path", revision: str | None = None) -> None:
    """Refuse a path that is no folder of a model here, nor a name in the local cache or on the hub. The hub is asked
    once and for a few seconds.

    Args:
        field: of the recipe, for the message.
        revision: of a hub name. Default None: the newest.
    Raises:
        BadInput: with what is there instead.
    """
    folder, said = Path(path), f"{field} = {path!r}"
    if folder.is_dir():
        if not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
            inside = ", ".join(sorted(entry.name for entry in folder.iterdir())[:3]) or "nothing"
            raise BadInput(f"{said} holds no model: neither config.json nor adapter_config.json, but {inside}")
        return
    if folder.is_file():
        raise BadInput(f"{said} is a file; give the folder that it lies in")
    here = f"{said}: no such folder{_meant(folder)}"
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise BadInput(here)
    if (why := _not_on_hub(path, revision)) is not None:
        raise BadInput(f"{here}, and {why}")


def _meant(folder: Path) -> str:
    if not folder.parent.is_dir():
        return ""
    known = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()]
    close = difflib.get_close_matches(folder.name, known, n=1)
    return f" (did you mean {str(folder.parent / close[0])!r}?)" if close else ""


def _not_on_hub(name: str, revision: str | None) -> str | None:
    """Why a hub name cannot be loaded; None where it can."""
    from huggingface_hub import HfApi, is_offline_mode, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionNotFoundError

    try:
        both = ("config.json", "adapter_config.json")
        if any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in both):
            return None
        if is_offline_mode():
            of_it = "" if revision is None else f" at model_revision = {revision!r}"
            return f"the hub is off (HF_HUB_OFFLINE) and its cache has no model of that name{of_it}"
        HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS)
    except HFValidationError:
        return "it is no name of the hub"
    except RevisionNotFoundError:
        return f"the hub has no model_revision = {revision!r} of it"
    except HfHubHTTPError as error:
        return f"the hub does not give it ({_first_line(error)})"
    except Exception as error:  # of the network, in whatever library the hub's client is built on
        return f"the hub cannot be reached ({_first_line(error)})"
    return None


def check_files(folder: Path) -> None:
    """Refuse a folder in which a configuration is not JSON, a shard is missing, or a file of weights is cut off.

    Raises:
        BadInput: naming the file.
    """
    for pattern in SETTINGS:
        for file in sorted(folder.glob(pattern)):
            content = read_settings(file)
            for shard in sorted(set(content.get("weight_map", {}).values())):
                if not (folder / shard).exists():
                    raise BadInput(f"{file} names {shard}, which is not there: copy or download the model again")
    for pattern in WEIGHTS:
        for file in sorted(folder.glob(pattern)):
            try:
                with safe_open(file, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise _damaged(file, _first_line(error)) from error


def read_settings(file: Path) -> dict[str, Any]:
    """The JSON object in a file; raises BadInput where there is none."""
    try:
        content = loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(file, f"not JSON: {_first_line(error)}") from error
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror}") from error
    if not isinstance(content, dict):
        raise _damaged(file, f"not a JSON object but {type(content).__name__}")
    return content


def _damaged(file: Path, why: str) -> BadInput:
    return BadInput(f"{file} is damaged ({why}): copy, download or save the model again")


def cached_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """A file of a hub name in the local cache, if it is there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def adapter_base(path: str, revision: str | None = None) -> str | None:
    """The base model that saved adapters name, or None for a whole model.

    Args:
        path: a folder, or a hub name, which is looked up in the local cache and on the hub.
        revision: of a hub name. Default None: the newest.
    Raises:
        BadInput: an adapter_config.json that is damaged or names no base model.
    """
    if not (file := _adapter_file(path, revision)).exists():
        return None
    base = read_settings(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise _damaged(file, "it names no base_model_name_or_path")
    return base


def adapter_settings(path: str, revision: str | None = None) -> dict[str, Any]:
    """What saved adapters say of themselves; empty for a whole model. Raises BadInput as `adapter_base`."""
    file = _adapter_file(path, revision)
    return read_settings(file) if file.exists() else {}


def _adapter_file(path: str, revision: str | None) -> Path:
    file = Path(path) / "adapter_config.json"
    if file.parent.exists():
        return file
    return cached_file(path, file.name, revision) or _fetched(path, file.name, revision) or file


@functools.cache
def _fetched(name: str, file: str, revision: str | None) -> Path | None:
    """A small file of a hub name that the cache does not hold; None where the hub has none, or does not answer."""
    from huggingface_hub import hf_hub_download, is_offline_mode

    if is_offline_mode() or cached_file(name, "config.json", revision):  # a whole model
        return None
    try:
        return Path(hf_hub_download(name, file, revision=revision, etag_timeout=HUB_SECONDS))
    except Exception:  # no such name, no such file, no network: told where the model is loaded
        return None


def check_report(path: str, model: Any, report: dict[str, Any], fresh_head: bool = False) -> set[str]:
    """Refuse weights that do not fill a model exactly; tied weights are stored once.

    Args:
        model: of transformers.
        report: what its `from_pretrained(output_loading_info=True)` gives.
        fresh_head: whether the head may be missing, and the head of another task be left over.
    Returns:
        names of the head's tensors that are fresh.
    Raises:
        BadInput: naming the tensors.
    """
    missing, unexpected = set(report["missing_keys"]), set(report["unexpected_keys"])
    heads = {name for name in missing if not name.startswith(f"{model.base_model_prefix}.")} if fresh_head else set()
    if fresh_head:
        unexpected = {name for name in unexpected if name.startswith(f"{model.base_model_prefix}.")}
    mismatched = [f"{name} {tuple(held)} for {tuple(wanted)}" for name, held, wanted in report["mismatched_keys"]]
    parts = {"lacks": missing - heads, "has besides": unexpected, "has another shape of": mismatched}
    wrong = [f"{what} {listed(names)}" for what, names in parts.items() if names]
    wrong += [str(text).strip().splitlines()[0] for text in report["error_msgs"]]
    if wrong:
        saved = getattr(model.config, "architectures", None)
        said = f" (its config.json says {saved[0]})" if saved and saved[0] != type(model).__name__ else ""
        raise BadInput(f"the weights of {path!r} are not those of a {type(model).__name__}{said}: {'; '.join(wrong)}")
    return heads


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many there are."""
    names = sorted(names)
    more = f", ... ({len(names)} tensors)" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
