"""Short hashes of the files that a run reads, so that a later call can tell whether they are still the same.

Names, sizes and contents count; where a folder lies and when it was written do not. Small files are hashed whole, of
large ones the blocks at a fixed stride, so that a model of 100 GB takes seconds. In safetensors the beginning of every
tensor is one of the blocks: a change of one small tensor between large ones is seen.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

from align_engine.data.json_text import loads
from align_engine.errors import BadInput
from align_engine.models.modelfiles import adapter_base, adapter_settings

WHOLE = 2**23  # bytes of the largest file that is hashed whole
STRIDE, BLOCK = 2**22, 2**12  # bytes between the blocks of larger ones, and of each block
PARTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf",  # weights
         ".json", ".jinja", ".py", ".model", ".txt", ".tiktoken"}  # configurations, code and vocabularies  # fmt: skip


def of_file(path: str | Path) -> str:
    """Hash of a file's size and contents: 16 hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    path, digest = Path(path), hashlib.sha256()
    size = path.stat().st_size
    digest.update(f"{size} ".encode())
    with path.open("rb") as file:
        if size <= WHOLE:
            digest.update(file.read())
        else:
            starts = {*range(0, size, STRIDE), size - BLOCK, *(_tensors(file) if path.suffix == ".safetensors" else ())}
            for start in sorted(starts):
                file.seek(start)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]


def of_model(path: str | Path, revision: str | None = None) -> str:
    """Hash of a model's weights, configuration, code and tokenizer, and of the model below a folder of adapters.

    Args:
        path: a folder, or a hub name, of which the commit in the local cache counts (fetched where there is none).
        revision: of a hub name. Default None: the newest.
    Raises:
        BadInput: there is no such model, or a file of it cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        commit, base = _commit(str(path), revision), _base(str(path), revision)
        return hashlib.sha256(f"{commit}{base}".encode()).hexdigest()[:16] if base else commit[:16]
    inside = [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]
    files = [file for file in sorted(inside) if file.suffix in PARTS and file.is_file()]
    digest = hashlib.sha256()
    try:
        for file in files:
            digest.update(f"{file.name} {of_file(file)}\n".encode())
    except OSError as error:
        raise BadInput(f"cannot read the model in {folder}: {error}") from error
    if base := _base(str(folder), None):
        digest.update(base.encode())
    return digest.hexdigest()[:16]


def _base(path: str, revision: str | None) -> str:
    """Hash of the model that adapters lie on; empty of a whole model."""
    base = adapter_base(path, revision)
    return "" if base is None else of_model(base, adapter_settings(path, revision).get("revision"))


def _tensors(file: BinaryIO) -> list[int]:
    """Where the tensors of a safetensors file begin, in bytes; nowhere in a file that is none."""
    length = int.from_bytes(file.read(8), "little")
    try:
        header = loads(file.read(min(length, 100_000_000)))  # the format's own limit
        return [8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def _commit(name: str, revision: str | None) -> str:
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        found = cached_file(name, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
        found = found or cached_file(name, "adapter_config.json", revision=revision)
    except OSError as error:
        raise BadInput(f"no model at {name!r}: {str(error).splitlines()[0]}") from error
    commit = extract_commit_hash(found, None)
    if commit is None:
        raise BadInput(f"no model at {name!r}: its commit is not known")
    return commit
