"""A CPU's memory: blocks that are free go back to the system, and large ones lie in huge pages.

glibc keeps freed blocks, and raises the size from which it maps a block apart to 32 MiB: activations of rows of many
lengths leave holes that nothing fits into, several times what a step needs, and a few bytes that Python puts into a
hole spoil it for the next tensor of its size. Blocks that are mapped apart are given back at once; what that costs in
page faults, huge pages save several times over (benches/bench_cpu_memory.py).
"""

from __future__ import annotations

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
MAPPED, TRIMMED = 1 << 20, 64 << 20  # bytes
LARGE = 2 << 20  # bytes from which torch asks for huge pages
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # torch reads it once, when it gives out the first memory
_asked = False  # whether the environment says it by us


def ask_for_huge_pages() -> None:
    """Before torch's first tensor: have it lay blocks from 2 MiB on in huge pages, where the system gives any. What the
    environment says already stays."""
    global _asked
    _asked = _asked or HUGE_PAGES not in os.environ
    os.environ.setdefault(HUGE_PAGES, "1")


def take_back() -> None:
    """Ask for huge pages no longer. Where torch has given out memory meanwhile, it goes on laying blocks in them."""
    global _asked
    if _asked:
        os.environ.pop(HUGE_PAGES, None)
    _asked = False


def tune() -> str:
    """Set the thresholds of glibc's malloc, for the whole process.

    Returns:
        what was done, and what was not.
    """
    if platform.libc_ver()[0] != "glibc":
        return "memory is given back as this system's malloc does: tune_malloc is for glibc's"
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, MAPPED)
    libc.mallopt(M_TRIM_THRESHOLD, TRIMMED)
    said = f"malloc maps blocks from {MAPPED >> 20} MiB on apart and gives them back when they are free"
    return f"{said}, {'in huge pages' if _huge() else f'without huge pages: {HUGE_PAGES}=1 was not set before torch'}"


def _huge() -> bool:
    """Whether torch lays a large block at the begin of a page."""
    import torch

    return torch.empty(LARGE, dtype=torch.uint8).data_ptr() % 4096 == 0
