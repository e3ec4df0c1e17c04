"""`align merge`: adapters in the weights of their base model, as a folder that needs no peft."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from align_engine.assessment.sections import MergeRecipe
from align_engine.errors import BadInput, RunFailed
from align_engine.models import load
from align_engine.models.merging import merged
from align_engine.models.modelfiles import adapter_base, check_path
from align_engine.recipe import ModelSection
from align_engine.reports import card
from align_engine.run import quiet_libraries
from align_engine.training.checkpoint import SIDE, refusal, remove, settle


def run(settings: MergeRecipe) -> None:
    """Merge, and write the model with its tokenizer, beside its place first.

    Raises:
        BadInput: no adapters there; a folder that holds something, or in which another merge writes. RunFailed: the
            disk is full or refuses.
    """
    quiet_libraries()
    asked, target = settings.adapters, Path(settings.output.output_dir).absolute()
    check_path(asked.model_name_or_path)
    base = adapter_base(asked.model_name_or_path)
    if base is None:
        raise BadInput(f"model_name_or_path = {asked.model_name_or_path!r} is a whole model: there is nothing to merge")
    check_free(target)
    lock = FileLock(target.with_name(f".{target.name}.lock{SIDE}"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise BadInput(f"output_dir = {str(target)!r} is in use by another merge; wait for its end") from error
    except OSError as error:
        raise BadInput(f"output_dir = {str(target)!r} cannot be written to: {error.strerror or error}") from error
    try:
        write(
            asked.model_name_or_path, ModelSection(dtype=asked.dtype, trust_remote_code=asked.trust_remote_code), target
        )
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
    print(f"{asked.model_name_or_path} in the weights of {base}: {target}")


def check_free(target: Path) -> None:
    """Refuse a place that holds something."""
    if target.is_file():
        raise BadInput(f"output_dir = {str(target)!r} is a file; give a folder")
    if target.exists() and (inside := sorted(entry.name for entry in target.iterdir())):
        raise BadInput(f"output_dir = {str(target)!r} holds {', '.join(inside[:3])}: give a new or empty folder")


def write(path: str, section: ModelSection, target: Path) -> None:
    """The merged model, whole or not at all."""
    side = target.with_name(f"{target.name}{SIDE}")
    remove(side)
    tokenizer = load.load_tokenizer(path, trust_remote_code=section.trust_remote_code)
    model = merged(path, section, tokenizer)
    try:
        model.save_pretrained(side)
        tokenizer.save_pretrained(side)
        if (said := card.of_merged(path)) is not None:
            (side / card.NAME).write_text(said, encoding="utf-8")
        settle(side, target)
    except Exception as error:
        remove(side)
        if (said := refusal(error)) is None:
            raise
        raise RunFailed(f"cannot write {target}: {said}; the same command starts afresh") from error
