"""The memory that a run may take: of a card by its name, of a size that is given, or of this machine."""

from __future__ import annotations

import difflib
import os
import re
from typing import NamedTuple

from align_engine.errors import BadInput

GB, GIB = 10**9, 2**30
UNITS = {"MB": 10**6, "GB": GB, "TB": 10**12, "MIB": 2**20, "GIB": GIB, "TIB": 2**40}
CARDS = {  # GB as the makers print them
    "T4": 16, "V100": 32, "P100": 16, "L4": 24, "L40S": 48, "A10": 24, "A30": 24, "A40": 48, "A100-40GB": 40,
    "A100": 80, "A100-80GB": 80, "A6000": 48, "RTX-3090": 24, "RTX-4090": 24, "RTX-5090": 32, "RTX-6000-Ada": 48,
    "H100": 80, "H100-NVL": 94, "H200": 141, "GH200": 96, "B200": 180, "MI250X": 128, "MI300X": 192,
}  # fmt: skip
SHARE = 0.9  # of a GPU's or a machine's memory: the rest is the system's, and what an allocator cannot use
# measured with benches/bench_plan.py on a CPU; on a GPU CUDA's context and cuBLAS, not yet measured
BASE = {"cpu": int(0.7 * GIB), "cuda": 2 * GIB}


class Card(NamedTuple):
    """A device by its memory."""

    name: str
    size: int  # bytes
    gpu: bool

    @property
    def usable(self) -> int:
        """Bytes that a run's tensors may take."""
        return int(self.size * SHARE) - self.base

    @property
    def base(self) -> int:
        """Bytes that a process takes before its first tensor."""
        return BASE["cuda" if self.gpu else "cpu"]


def card(asked: str | None, field: str = "memory") -> Card:
    """The card of a name (a GPU), of a size (the device that this machine trains on), or None: this machine's.

    Raises:
        BadInput: no such card, or no such size.
    """
    here = machine()
    if asked is None or asked == "auto":
        return here
    if (found := re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B)", asked.strip(), re.IGNORECASE)) and (
        unit := UNITS.get(found[2].upper())
    ):
        if (size := int(float(found[1]) * unit)) * SHARE <= BASE["cuda" if here.gpu else "cpu"]:
            raise BadInput(f"{field} = {asked!r} is less than a process takes before its first tensor")
        return Card(asked, size, here.gpu)
    names = {_plain(name): name for name in CARDS}
    if (name := names.get(_plain(asked))) is not None:
        return Card(name, CARDS[name] * GB, True)
    close = difflib.get_close_matches(_plain(asked), names, n=1)
    meant = f"did you mean {names[close[0]]!r}?" if close else f"one of {', '.join(CARDS)}"
    raise BadInput(f"{field} = {asked!r} is neither a size (24GB, 80GiB) nor a card that is known: {meant}")


def machine() -> Card:
    """What this machine trains on."""
    import torch

    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        return Card(found.name, found.total_memory, True)
    return memory_of_processors()


def memory_of_processors() -> Card:
    """This machine's memory, whatever GPUs it has."""
    return Card("this machine", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), False)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().removeprefix("nvidia").strip())


def size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
