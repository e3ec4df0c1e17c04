"""Bytes and FLOPs of what runs inside it: every storage from its first tensor to its last."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from align_engine.planning.heap import Heap

aten: Any = torch.ops.aten
OTHER = "activations"  # whatever nobody has named
MALLOC = "malloc"  # what a CPU's malloc holds of tensors that were freed
HOST = "on the host"  # in a CPU's memory beside a GPU: not counted


@dataclass
class Phase:
    """A part of a run."""

    name: str
    tensors: int = 0  # bytes at their most
    peak: int = 0  # the same with what malloc keeps of small ones that were freed
    flops: int = 0
    parts: Counter[str] = field(default_factory=Counter)  # bytes at the peak, by part
    most: Counter[str] = field(default_factory=Counter)  # bytes of each part at its own


class Ledger(TorchDispatchMode):
    """A mode that counts. Around fake tensors it answers what only numbers could: a truth is true, a number is 1.

    Args:
        heap: of a CPU's malloc, fresh. Default None: what is freed goes back at once.
    """

    def __init__(self, heap: Heap | None = None) -> None:
        super().__init__()
        self.heap = heap
        self.phases: list[Phase] = []
        self._events: list[tuple[int, int]] = []  # (number of a storage, bytes more or less)
        self._sums: list[tuple[int, int]] = []  # of a backward pass: (place in _events, what is added to)
        self._named: dict[int, str] = {}
        self._numbers: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()
        self._spans: list[tuple[Phase, int, int]] = []
        self._flops = self._next = 0

    def name(self, tensors: Iterable[Tensor], part: str) -> None:
        """These tensors' memory belongs to a part, unless it has one already."""
        for tensor in tensors:
            self._named.setdefault(self._number(tensor), part)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """What happens inside the block is a phase of its own. Phases do not nest."""
        phase, first, flops = Phase(name), len(self._events), self._flops
        yield phase
        phase.flops = self._flops - flops
        self._spans.append((phase, first, len(self._events)))
        self.phases.append(phase)

    def settle(self) -> list[Phase]:
        """The phases, with their peaks and the parts of these. Names that were given late count from the beginning."""
        for place, number in self._sums:  # autograd adds in place to what nobody else holds, but where a mode looks on
            made, *freed = self._events[place : place + 2]
            if freed == [(number, -made[1])]:
                self._events[place : place + 2] = *freed, made
        held: Counter[str] = Counter()
        at = 0

        def go(to: int, phase: Phase | None) -> None:
            nonlocal at
            for number, size in self._events[at:to]:
                if (part := self._named.get(number, OTHER)) == HOST:
                    continue
                held[part] += size
                if self.heap is not None:
                    self.heap.add(number, size) if size > 0 else self.heap.remove(number)
                if phase is not None and size > 0:
                    note(phase)
            at = to

        def note(phase: Phase) -> None:
            tensors, free = sum(held.values()), self.heap.kept if self.heap is not None else 0
            phase.tensors, phase.most = max(phase.tensors, tensors), phase.most | held
            if tensors + free > phase.peak:
                phase.peak, phase.parts = tensors + free, +held + Counter({MALLOC: free})

        for phase, first, end in self._spans:
            go(first, None)
            note(phase)
            go(end, phase)
        return self.phases

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default and type(args[0]) is not Tensor:
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        out = _grouped(*args, **kwargs) if func is aten._grouped_mm.default else func(*args, **(kwargs or {}))
        if func is torch.ops.prim.device.default:
            return out
        self._flops += flops(func, args, kwargs or {}, out)
        if func is aten.add.Tensor and not torch.is_grad_enabled() and torch._C._current_autograd_node() is not None:
            self._sums.append((len(self._events), self._number(args[0])))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._number(tensor)
        return out

    def _number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if (number := self._numbers.get(storage)) is None:
            number, size = self._next, storage.nbytes()
            self._next += 1
            self._numbers[storage] = number
            self._events.append((number, size))
            weakref.finalize(storage, self._events.append, (number, -size)).atexit = False
        return number


def _grouped(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, out_dtype: Any = None, **__: Any) -> Tensor:
    """The shape of a product by groups (of experts), which torch gives for fake tensors in bfloat16 alone."""
    groups = [] if offs is None or a.dim() + b.dim() != 4 else [len(offs)]
    batch = list(a.shape[:-2]) or groups
    return a.new_empty(*batch, a.shape[-2], b.shape[-1], dtype=out_dtype or a.dtype)


def flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Of one operator, as torch's counter has them: a multiply-add is two."""
    if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
        return sdpa_flop_count(*(x.shape for x in args[:3]))
    if func is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return sdpa_backward_flop_count(*(x.shape for x in args[:4]))
    if func is aten._grouped_mm.default:
        a, b = args[0].shape, args[1].shape
        return 2 * math.prod(a) * b[-1]
    formula = flop_registry.get(getattr(func, "overloadpacket", None))
    return formula(*args, **kwargs, out_val=out) if formula is not None else 0
