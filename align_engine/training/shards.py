"""Weights and optimiser in a checkpoint, through torch's distributed checkpoint: each rank writes its own part, and any
number of processes, however they share the model (one, DDP, FSDP2), reads what any other has written.

The files are safetensors, each with a part's place in its tensor beside it; nothing is pickled.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

FILE, FILES = 2**26, 64  # bytes of a file, about, and how many there are before they become larger
COPIES = 2  # of a file in memory while it is written: safetensors puts it together and hands it over


def write(folder: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Write the trained weights, the buffers and the optimiser's tensors to a folder. Every rank calls this.

    Returns:
        the optimiser's numbers: what `read` needs beside the folder.
    """
    tensors, numbers = state(model, optimizer)
    places = files({name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()})
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=places, save_distributed=True)
    with plainly():
        save(tensors, storage_writer=writer)
    return numbers


def files(sizes: dict[str, int]) -> dict[str, int]:
    """The number of the file, from 1 on, that each tensor of so many bytes lies in."""
    places, before = {}, 0
    room = max(FILE, -(-sum(sizes.values()) // FILES))
    for name, size in sizes.items():
        places[name] = 1 + before // room
        before += size
    return places


def read(folder: Path, model: nn.Module, optimizer: Optimizer, numbers: dict[str, Any]) -> None:
    """Go back to what `write` wrote and gave. Every rank calls this.

    Raises:
        ValueError: the model's tensors are others.
    """
    reader = HuggingFaceStorageReader(str(folder))
    held: dict[str, Any] = reader.read_metadata().state_dict_metadata
    state(model, optimizer)  # FSDP2 cuts again what it has put together, and the optimiser knows the weights again
    get_optimizer_state_dict(model, optimizer)  # makes the optimiser's tensors where it has taken no step
    tensors, _ = state(model, optimizer)
    if absent := [name for name in tensors if name not in held and name.startswith("model.")]:
        raise ValueError(f"{absent[0]} is not in it")
    wanted = {name: tensor for name, tensor in tensors.items() if name in held}
    for name, tensor in wanted.items():
        there = (tuple(held[name].size), held[name].properties.dtype)
        if there != (here := (tuple(tensor.shape), tensor.dtype)):
            raise ValueError(f"{name} is {list(there[0])} of {there[1]} in it, and {list(here[0])} of {here[1]} here")
    with plainly():
        load(wanted, storage_reader=reader)
    known = set(map(id, wanted.values()))
    for name, parameter in trained(model).items():
        own: dict[str, Any] = optimizer.state.get(parameter, {})
        kept = {key: value for key, value in own.items() if known & set(map(id, parts("", value).values()))}
        kept |= numbers["state"].get(name, {})
        if kept:
            optimizer.state[parameter] = kept
        else:  # a weight that had not been reached by any gradient
            optimizer.state.pop(parameter, None)
    for group, was in zip(optimizer.param_groups, numbers["groups"], strict=True):
        for key, value in was.items():
            group[key] = group[key].copy_(value) if isinstance(group.get(key), Tensor) else value


def state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by name, numbers) of a model and its optimiser. Of the weights the trained ones: with LoRA the others
    are read from the model's own folder again. Of tied ones the first name."""
    inner = extract_model_from_parallel(model)
    held = inner.state_dict()  # under FSDP2 this comes first: it cuts again what a forward pass has put together
    parameters, buffers = trained(model), dict(inner.named_buffers())
    tensors = {f"model.{name}": tensor for name, tensor in held.items() if name in parameters or name in buffers}
    numbers: dict[str, Any] = {"state": {}, "groups": []}
    seen = set[int]()  # weights may share a tensor of their state, as bitsandbytes' tables
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                numbers["state"].setdefault(name, {})[key] = value
                continue
            for part, tensor in parts(f"optimizer.{name}.{key}", value).items():
                if id(tensor) not in seen:
                    tensors[part] = tensor
                    seen.add(id(tensor))
    for group in optimizer.param_groups:  # torchao's learning rate is a tensor
        numbers["groups"].append({key: value for key, value in group.items() if type(value) in (int, float, Tensor)})
    return tensors, numbers


def parts(name: str, tensor: Any) -> dict[str, Tensor]:
    """A tensor by its name, or the tensors that it is made of (as quantised states are)."""
    if isinstance(tensor, DTensor) or not hasattr(tensor, "__tensor_flatten__"):
        return {name: tensor}
    names, _ = tensor.__tensor_flatten__()
    return {key: inner for one in names for key, inner in parts(f"{name}.{one}", getattr(tensor, one)).items()}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained weights, each once, by their names in the bare model."""
    named = extract_model_from_parallel(model).named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def whole(tensor: Tensor) -> Tensor:
    """The tensor, put together on the CPU where ranks have cut it. All of them call this."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Inside the block torch's distributed checkpoint does not warn of a process that is alone, and raises the error
    that it met in place of one that holds it."""
    try:
        with warnings.catch_warnings():
            if not dist.is_initialized():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        raise first from error
