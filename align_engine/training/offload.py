"""What autograd saves on a GPU waits in the CPU's memory for the backward pass (TRL's `activation_offloading`)."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

LEAST = 1 << 16  # bytes worth a copy


class Away(NamedTuple):
    """A saved tensor's copy, in pinned memory where it came from a GPU."""

    copy: Tensor


class Offload(saved_tensors_hooks):
    """Inside the block, which is one forward pass, large tensors that are saved on a device leave it; they come back
    when the backward pass asks for them. Weights stay; what is saved several times leaves once. With gradient
    checkpointing these are the inputs of the layers. Copies leave on a stream of their own, beside the computation.

    Args:
        model: its weights stay.
        device: of what leaves.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__(self.pack, self.unpack)
        self.model, self.device = model, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.weights: set[int] = set()
        self.gone: dict[Any, tuple[StorageWeakRef, Away]] = {}  # in this forward pass

    def __enter__(self) -> None:
        self.weights = {weight.untyped_storage().data_ptr() for weight in self.model.parameters()}
        super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.gone.clear()

    def apart(self) -> contextlib.AbstractContextManager[Any]:
        """Inside this block nothing leaves: for a loss, whose backward pass comes at once."""
        return saved_tensors_hooks(lambda saved: saved, lambda saved: saved)

    def pack(self, saved: Tensor) -> Tensor | Away:
        storage = saved.untyped_storage()
        address = storage.data_ptr()
        if saved.device != self.device or saved.nbytes < LEAST or address in self.weights:
            return saved
        key = address, saved.dtype, saved.shape, saved.stride(), saved.storage_offset(), saved._version
        # another tensor may lie at this address by now
        if key not in self.gone or self.gone[key][0].expired():
            self.gone[key] = StorageWeakRef(storage), Away(self._copied(saved))
        return self.gone[key][1]

    def _copied(self, saved: Tensor) -> Tensor:
        copy = torch.empty_like(saved, device="cpu", pin_memory=self.stream is not None)
        if self.stream is None:
            return copy.copy_(saved)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            copy.copy_(saved, non_blocking=True)
        saved.record_stream(self.stream)
        return copy

    def unpack(self, packed: Tensor | Away) -> Tensor:
        if not isinstance(packed, Away):
            return packed
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return packed.copy.to(self.device, non_blocking=True)
