"""Log-probs of answers under a model, kept for all runs that ask for them again: a sweep of betas computes them once.

    $ALIGN_CACHE/reference/<model>/<content>.safetensors       keys [n, 2] int64, logps [n] float64

ALIGN_CACHE is a folder, by default `align` in HF_HOME. A run adds one file of what it has computed; nothing is ever
changed. A key is a hash of prompt and answer, so that any rows which hold them find it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

PARTS = ("keys", "logps")


def folder_of(model: str) -> Path:
    """Where the log-probs under a model of this hash lie."""
    from huggingface_hub.constants import HF_HOME

    home = os.environ.get("ALIGN_CACHE") or Path(HF_HOME) / "align"
    return Path(home).expanduser() / "reference" / model


def keys_of(answers: Iterable[tuple[list[int], list[int]]]) -> np.ndarray:
    """[n, 2] int64, of (prompt ids, completion ids)."""
    digests = (
        hashlib.blake2b(np.array([len(prompt), *prompt, *ids], dtype=np.int32).tobytes(), digest_size=16).digest()
        for prompt, ids in answers
    )
    return np.frombuffer(b"".join(digests), dtype=np.int64).reshape(-1, 2)


def read(folder: Path, keys: np.ndarray) -> np.ndarray:
    """[n] float64: the log-probs of these keys, NaN where the folder has none. Damaged files are passed over."""
    found = np.full(len(keys), np.nan)
    for held, logps in _files(folder):
        order = np.argsort(held[:, 0], kind="stable")
        places = order[np.searchsorted(held[:, 0], keys[:, 0], sorter=order).clip(max=len(order) - 1)]
        known = (held[places] == keys).all(1)
        found[known] = logps[places[known]]
    return found


def add(folder: Path, keys: np.ndarray, logps: np.ndarray) -> None:
    """Keep the log-probs of these keys.

    Raises:
        OSError: what the disk says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.blake2b(keys.tobytes(), digest_size=8).hexdigest()}.safetensors"
    beside = path.with_name(f"{path.name}.{os.getpid()}.align-tmp")
    try:
        save_file({"keys": torch.from_numpy(keys.copy()), "logps": torch.from_numpy(logps.copy())}, beside)
        os.replace(beside, path)
    except SafetensorError as error:  # its own name for a full disk
        raise OSError(str(error)) from error
    finally:
        beside.unlink(missing_ok=True)


def _files(folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np") as file:
                keys, logps = (file.get_tensor(name) for name in PARTS)
        except (OSError, SafetensorError):
            continue
        if keys.dtype == np.int64 and keys.ndim == 2 and keys.shape == (len(logps), 2) and len(keys):
            yield keys, logps
