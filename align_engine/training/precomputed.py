"""A precomputed reference: the log-probs of all answers that a run will read, from one pass before its first step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast, broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from align_engine.data.batches import split_order
from align_engine.data.formats import answers
from align_engine.data.windows import Source, rows_seen
from align_engine.errors import BadInput
from align_engine.integrations import hook
from align_engine.models.logps import reference_logps
from align_engine.training import reference_cache
from align_engine.training.checkpoint import RunFolder

if TYPE_CHECKING:
    from datasets import Dataset

    from align_engine.training.engine import Engine

SPOT_ROWS = 4
SPOT_TOLERANCE = 1e-2  # of a summed log-prob, relative: far above what batch shapes change, far below another model
NO_MATTER = {"_name_or_path", "transformers_version", "use_cache", "architectures"}  # of a configuration
COLUMNS = ({"chosen_ids": "ref_chosen_logps", "rejected_ids": "ref_rejected_logps"},
           {"completion_ids": "ref_logps", "kl_completion_ids": "ref_KL_logps"})  # fmt: skip


class Answers:
    """Where the answers of rows lie in one row of numbers: those of the first column of ids, then of the second."""

    def __init__(self, rows: Dataset) -> None:
        names = next(names for names in COLUMNS if names.keys() <= set(rows.column_names))
        self.names, self.columns = list(names), list(names.values())  # of ids, of log-probs
        self.several = [hasattr(getattr(rows.features[name], "feature", None), "feature") for name in names]
        counts = [[len(answers(ids)) if many else 1 for ids in rows[name]] if many else [1] * len(rows)
                  for name, many in zip(names, self.several)]  # fmt: skip
        self.counts = np.array(counts)  # [2, rows]
        self.begins = (np.cumsum(self.counts) - self.counts.ravel()).reshape(self.counts.shape)
        self.total = int(self.counts.sum())

    def of(self, rows: list[int]) -> Tensor:
        """Their places, in the order of a batch of these rows."""
        begins, counts = self.begins[:, rows].ravel(), self.counts[:, rows].ravel()
        ends = np.cumsum(counts)
        return torch.from_numpy(np.repeat(begins - (ends - counts), counts) + np.arange(counts.sum()))

    def any(self, these: Tensor) -> np.ndarray:
        """Whether a row has one of these (a mask of all answers)."""
        answers: Any = np.logical_or.reduceat(these.numpy(), self.begins.ravel())
        return answers.reshape(self.begins.shape).any(0)

    def answers(self, rows: Dataset, numbers: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Prompt and completion ids of the answers of some rows, in the order of `of`."""
        for name in self.names:
            for part in split_order(numbers, 1000):
                columns = rows[part]
                for prompt, side in zip(columns["prompt_ids"], columns[name]):
                    yield from ((prompt, ids) for ids in answers(side))

    def added(self, rows: Dataset, numbers: Tensor) -> Dataset:
        """The rows with a column of numbers for each of ids."""
        parts = numbers.split(self.counts.sum(1).tolist())
        for name, several, counts, part in zip(self.columns, self.several, self.counts, parts):
            column: Any = [one.tolist() for one in part.split(counts.tolist())] if several else part.numpy()
            rows = rows.add_column(name, column)
        return rows


def precompute_all(
    engine: Engine, model: nn.Module, source: Source, evaluation: Source | None, steps: int, folder: RunFolder
) -> None:
    """Add the reference's columns to the rows that a run of so many steps sees, and to those of its evaluation.

    Args:
        model: the reference, prepared by accelerate.
    """
    training, stamp = model.training, model_hash(engine, model)
    model.eval()
    for name, part in (("train", source), ("eval", evaluation)):
        if part is not None:
            rows = rows_seen(part, steps) if part is source else list(range(len(part)))
            precompute(engine, model, stamp, part, rows, name, folder)
    model.train(training)


def precompute(
    engine: Engine, model: nn.Module, stamp: str, source: Source, rows: list[int], name: str, folder: RunFolder
) -> None:
    """Add the reference's columns (TRL's names) to the source: from the run's own file where it fits, else from the
    cache of all runs, else computed.

    Args:
        engine: its device, processes and settings of the head.
        model: the reference, prepared by accelerate, in eval mode.
        stamp: its `model_hash`.
        source: rows of pairs or of labelled completions.
        rows: which of them are needed; the others read NaN.
        name: of the run's own file, "reference-<name>.safetensors".
    Raises:
        BadInput: what was kept bears the right hashes, but is not what this model says.
    """
    accelerator, places, cache = engine.accelerator, Answers(source.rows), reference_cache.folder_of(stamp)
    path, whole = folder.path / f"reference-{name}.safetensors", f"{stamp}-{source.fingerprint()}-{len(rows)}"
    keys, here = np.empty((0, 2)), places.of(rows)
    known, origin = torch.full((places.total,), torch.nan, dtype=torch.float64), str(path)
    if accelerator.is_main_process and (stored := _read(path, whole, places.total)) is not None:
        known = stored
    elif accelerator.is_main_process:
        keys, origin = reference_cache.keys_of(places.answers(source.rows, rows)), str(cache)
        known[here] = torch.from_numpy(reference_cache.read(cache, keys))
    (origin,) = broadcast_object_list([origin])
    known: Tensor = broadcast(known.to(accelerator.device)).cpu()  # type: ignore[assignment]
    lacking = places.any(known.isnan())
    spot = [row for row in rows if not lacking[row]][:SPOT_ROWS]
    computed = ask(engine, model, source, sorted({*spot, *(row for row in rows if lacking[row])}), places)
    if not torch.allclose(known[(at := places.of(spot))], computed[at], rtol=SPOT_TOLERANCE, atol=SPOT_TOLERANCE):
        raise BadInput(
            f"{origin} does not hold this model's log-probs (of {len(spot)} rows computed again some differ); delete it"
        )
    new = known[here].isnan()
    found = torch.where(known.isnan(), computed, known)
    if accelerator.is_main_process and origin != str(path):
        with folder.written(path.name) as side:
            save_file({"logps": found}, side, metadata={"fingerprint": whole})
        if new.any():
            keep(engine, cache, keys[new.numpy()], found[here][new].numpy())
    counts = ((int((~new).sum()), f"read from {origin}"), (int(new.sum()), "computed"))
    how_come = " and ".join(f"{count:,} {way}" for count, way in counts if count)
    accelerator.print(f"reference log-probs of {len(rows):,} {name} rows, {len(new):,} answers: {how_come}")
    source.rows = places.added(source.rows, found)


def ask(engine: Engine, model: nn.Module, source: Source, rows: list[int], places: Answers) -> Tensor:
    """The log-probs of the answers of some rows under a model, [places.total] float64; NaN elsewhere."""
    accelerator = engine.accelerator
    table = torch.zeros(places.total, dtype=torch.float64, device=accelerator.device)
    for batch, real in source.share(rows):
        parts = [part.to(accelerator.device) for part in (batch, batch.other) if part is not None]
        logps = torch.cat([reference_logps(model, part, engine.head_options) for part in parts]).double()
        if real:
            table[places.of(batch.index.tolist()).to(table.device)] = logps
    summed: Any = accelerator.reduce(table, "sum")
    found, here = torch.full(table.shape, torch.nan, dtype=torch.float64), places.of(rows)
    found[here] = summed.cpu()[here]
    return found


def keep(engine: Engine, cache: Path, keys: np.ndarray, logps: np.ndarray) -> None:
    """Add log-probs to the cache of all runs; a run can do without it."""
    try:
        reference_cache.add(cache, keys, logps)
    except OSError as error:
        why = error.strerror or error
        engine.accelerator.print(f"warning: the reference is not kept for other runs: {cache}: {why} (set ALIGN_CACHE)")


def model_hash(engine: Engine, model: nn.Module) -> str:
    """16 hexadecimal digits that change with the weights and with whatever else log-probs depend on."""
    inner: Any = engine.accelerator.unwrap_model(model)
    config = {name: x for name, x in hook.causal_model(inner).config.to_dict().items() if name not in NO_MATTER}
    adapters = {name: str(one) for name, one in getattr(inner, "peft_config", {}).items()}
    types = sorted({str(parameter.dtype) for parameter in inner.parameters()})
    asked = (config, adapters, types, engine.accelerator.mixed_precision, engine.head_options["temperature"])
    return hashlib.sha256(f"{weights_fingerprint(inner)} {asked}".encode()).hexdigest()[:16]


def weights_fingerprint(model: nn.Module) -> str:
    """Hash of every tensor's name, shape, sum and first values."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        values = unsharded(tensor.detach()).flatten()
        part = [values.double().sum().item(), *values[:8].double().tolist()]
        digest.update(f"{name}{tuple(tensor.shape)}{part}".encode())
    return digest.hexdigest()[:16]


def unsharded(tensor: Any) -> Tensor:
    """The tensor, put together from all ranks where FSDP2 has cut it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _read(path: Path, stamp: str, total: int) -> Tensor | None:
    """The numbers that a file holds; None where it is not there, of something else, or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            logps = file.get_tensor("logps")
            fits = (file.metadata() or {}).get("fingerprint") == stamp and logps.shape == (total,)
            return logps if fits else None
    except (OSError, SafetensorError):
        return None
