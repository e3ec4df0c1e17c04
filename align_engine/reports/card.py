"""The model card of a run, README.md in `final`: data, method, recipe, figures, and the licence of the base model."""

from __future__ import annotations

import contextlib
import inspect
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_engine import recipe as recipes
from align_engine.data.sources import HUB_NAME
from align_engine.models.modelfiles import HUB_SECONDS, adapter_base, adapter_settings, cached_file, read_settings
from align_engine.recipe import RolloutSection
from align_engine.recipe.secrets import masked
from align_engine.reports.report import number
from align_engine.training import metrics

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

    from align_engine.training.checkpoint import RunFolder

NAME = "README.md"
TEMPLATE = Path(__file__).with_name("card.md.jinja")
NOT_SAID = ("output_dir", "overwrite", "push_to_hub", "hub_model_id", "hub_private_repo")  # of where, not of what


def card(folder: RunFolder, command: str, recipe: recipes.Recipe) -> str:
    """The card of a run whose metrics are written, as Markdown with a header that the hub reads."""
    from huggingface_hub import ModelCard

    model, rollout = recipe.model, recipe.section(RolloutSection)
    below = _read(model.model_name_or_path, model.model_revision)
    licence, where = licence_of(model.model_name_or_path, model.model_revision, below)
    base = _on_hub(model.model_name_or_path) or (below.data.get("base_model") if below else None)
    records = metrics.read(folder.metrics) if folder.metrics.exists() else []
    figures = {name: value for one in records for name, value in one.items() if name not in ("step", "epoch")}
    plain = recipes.flat(type(recipe)())
    own = {name: value for name, value in recipes.flat(recipe).items() if value != plain[name]}
    header = _header(command, recipe, base, licence, below.data if below else None)
    made = ModelCard.from_template(
        header, template_path=str(TEMPLATE), title=folder.path.name, command=command,
        method=(inspect.getdoc(type(recipe)) or "").partition("\n")[0], version=metadata.version("align-engine"),
        steps=records[-1]["step"] if records else 0, model=masked(model.model_name_or_path),
        revision=model.model_revision, data=_data(recipe.data),
        scorers=", ".join(masked(rollout.reward_funcs)) if rollout else "",
        licence=f"{licence}, as {where} says" if licence else "of the base model, which does not say: look there",
        recipe=_yaml(masked({name: value for name, value in own.items() if name not in NOT_SAID})),
        figures=[(name, number(value)) for name, value in figures.items()],
        evaluated=any(name.startswith("eval_") for name in figures),
    )  # fmt: skip
    return str(made)


def of_merged(path: str) -> str | None:
    """The card of adapters as that of the model that they have become part of; None where they have none."""
    if (found := _read(path)) is None:
        return None
    found.data.library_name = "transformers"
    return str(found)


def licence_of(path: str, revision: str = "main", card: Any = None) -> tuple[str | None, str]:
    """(the licence that a model's card or configuration names, where it says so); of adapters, their base's.

    Args:
        path: folder or hub name. card: its model card, where it has been read.
    """
    if (base := adapter_base(path, revision)) is not None:
        return licence_of(base, adapter_settings(path, revision).get("revision") or "main", _read(base))
    if card is not None and isinstance(card.data.get("license"), str):
        return card.data["license"], f"the card of {path}"
    config = Path(path, "config.json") if Path(path).is_dir() else cached_file(path, "config.json", revision)
    found = read_settings(config).get("license") if config and config.exists() else None
    return (found, f"the config.json of {path}") if isinstance(found, str) and found else (None, "")


def _header(command: str, recipe: recipes.Recipe, base: Any, licence: str | None, below: Any) -> ModelCardData:
    """What the hub reads."""
    from huggingface_hub import ModelCardData

    named = {name: below.get(name) for name in ("license_name", "license_link")} if below and licence == "other" else {}
    scalar = command == "rm"
    return ModelCardData(
        base_model=base, datasets=_on_hub(recipe.data.dataset_name), license=licence, **named,
        library_name="peft" if recipe.model.use_peft and command != "iterate" else "transformers",
        pipeline_tag="text-classification" if scalar else "text-generation", tags=["align-engine", command],
    )  # fmt: skip


def _data(data: Any) -> str:
    parts = [masked(data.dataset_name), data.dataset_config and f"configuration {data.dataset_config}",
             f"split {data.dataset_train_split}"]  # fmt: skip
    held_out = data.eval_dataset_name or (data.dataset_test_split and data.dataset_name)
    parts.append(held_out and f"evaluated on {masked(held_out)}")
    return ", ".join(part for part in parts if part)


def _on_hub(name: str) -> str | None:
    """The name, where it is one of the hub and nothing that lies here."""
    return name if HUB_NAME.fullmatch(name) and not Path(name).exists() else None


def _read(path: str, revision: str = "main") -> Any:
    """The card of a folder or hub name; None where there is none that can be read."""
    from huggingface_hub import ModelCard, hf_hub_download, is_offline_mode

    file = Path(path, NAME) if Path(path).is_dir() else cached_file(path, NAME, revision)
    with contextlib.suppress(Exception):  # of the network, of a header that is no YAML: a run is not lost over a card
        if file is None and not is_offline_mode():
            file = Path(hf_hub_download(path, NAME, revision=revision, etag_timeout=HUB_SECONDS))
        if file is not None and file.is_file():
            return ModelCard.load(file, ignore_metadata_errors=True)
    return None


def _yaml(values: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
