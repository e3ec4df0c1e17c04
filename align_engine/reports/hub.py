"""`--push_to_hub`: the trained model, its tokenizer and its card on the hub, when the run is finished."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from align_engine.errors import BadInput, RunFailed
from align_engine.recipe.secrets import MASK, masked

if TYPE_CHECKING:
    from align_engine.recipe import OutputSection
    from align_engine.training.checkpoint import RunFolder


def check(output: OutputSection) -> None:
    """Refuse, before anything is computed, what could not be pushed.

    Raises:
        BadInput: no name that the hub takes, no token, the hub is off.
    """
    if not output.push_to_hub:
        return
    from huggingface_hub import get_token, is_offline_mode
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = name_of(output)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise BadInput(f"hub_model_id = {name!r}: {error}") from error
    if is_offline_mode():
        raise BadInput("push_to_hub = True: the hub is off (HF_HUB_OFFLINE)")
    if get_token() is None:
        raise BadInput("push_to_hub = True needs a token that may write: in HF_TOKEN, or by `hf auth login`")


def name_of(output: OutputSection) -> str:
    """The repository's name: as given, or that of the run's folder."""
    return output.hub_model_id or Path(output.output_dir).absolute().name


def push(folder: RunFolder, output: OutputSection) -> str:
    """Upload `final`, and return the address of what it has become.

    Raises:
        RunFailed: the hub does not take it, or would show to all what is to be private; the run stays as it is, and the
            same command tries again.
    """
    from huggingface_hub import HfApi, get_token

    api, name = HfApi(), name_of(output)
    try:
        repository = api.create_repo(name, private=output.hub_private_repo, exist_ok=True)
        if output.hub_private_repo and not api.model_info(repository.repo_id).private:
            raise BadInput("it is there already and public: choose another hub_model_id, or make it private")
        done = api.upload_folder(
            repo_id=repository.repo_id, folder_path=folder.final, commit_message="align-engine: a finished run"
        )
    except Exception as error:  # of the network, of rights, of room
        said = masked((str(error).strip() or type(error).__name__).splitlines()[0])
        said = said.replace(get_token() or MASK, MASK)
        raise RunFailed(
            f"the run is finished, with its model in {folder.final}, and was not pushed to the hub as {name!r}: {said} "
            "(the same command tries that again)"
        ) from error
    return str(done)
