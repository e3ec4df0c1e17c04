"""DTensors at the door of a call: what is replicated becomes local, a weight sharded along V a process group."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup


def is_dtensor(x: Any) -> bool:
    return isinstance(x, Tensor) and hasattr(x, "placements")


def local(name: str, x: Any) -> Any:
    """`x`, or the local part of a DTensor that every rank has whole."""
    if not is_dtensor(x):
        return x
    if not all(p.is_replicate() for p in x.placements):
        raise ValueError(
            f"{name} is a DTensor placed {x.placements}: pass {name}.full_tensor(), or {name}.to_local() where each "
            "rank's part is a batch of its own"
        )
    return x.to_local()


def local_head(
    weight: Any,  # a tensor or DTensor, as bias and lora's may be
    bias: Any,
    lora: Any,
    tp_group: ProcessGroup | None,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor, float] | None, ProcessGroup | None]:
    """The head's local tensors, and the group over which a weight placed `Shard(0)` is cut.

    hidden and targets must be the same on every rank of that group. Gradients come back as DTensors placed alike.

    Raises:
        ValueError: another placement, with what to do instead.
    """
    of_vocab = {"bias": bias, "lora's B": None if lora is None else lora[1]}
    if is_dtensor(weight):
        dims = [dim for dim, p in enumerate(weight.placements) if not p.is_replicate()]
        if len(dims) > 1 or any(not weight.placements[dim].is_shard(0) for dim in dims):
            raise ValueError(
                f"weight is a DTensor placed {weight.placements}, and Replicate() and one Shard(0) are served: call "
                "weight.redistribute(placements=...) or weight.full_tensor(), or call from inside the forward of the "
                "module that FSDP wraps, where the weight is whole"
            )
        if tp_group is not None:
            raise ValueError("weight is a DTensor, whose placement says how it is cut: leave tp_group out")
        for name, x in of_vocab.items():
            if x is not None and (not is_dtensor(x) or tuple(x.placements) != tuple(weight.placements)):
                placed = x.placements if is_dtensor(x) else "as a plain tensor"
                raise ValueError(f"weight is placed {weight.placements} and {name} {placed}: place both alike")
        tp_group = weight.device_mesh.get_group(dims[0]) if dims else None
        weight, *parts = (x if x is None else x.to_local() for x in (weight, *of_vocab.values()))
    else:
        parts = [local(name, x) for name, x in of_vocab.items()]
    if lora is not None:
        lora = (local("lora's A", lora[0]), parts[1], lora[2])
    return weight, parts[0], lora, tp_group
