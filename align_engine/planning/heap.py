"""What a CPU's malloc keeps of memory that was freed: glibc's, as `training.allocator` sets it.

A freed block joins the free ones beside it. A new one takes the smallest hole that is large enough, else the free end
of the heap. Where neither has room, it is mapped apart from MAPPED bytes on, and goes back to the system when it is
freed; else the heap grows. Its end goes back where TRIMMED bytes are free there; holes below stay, with the pages of
theirs that were written to. (malloc.c of glibc: _int_malloc, _int_memalign, sysmalloc, _int_free.)
"""

from __future__ import annotations

from bisect import bisect_left, insort

from align_engine.training.allocator import LARGE, MAPPED, TRIMMED

PAGE = 4 << 10
PAGES = 512  # of a huge page
HEADER, LEAST, PAD = 16, 32, 128 << 10  # bytes before a block, of the smallest one, and by which the heap grows more
ALIGNED = 64  # bytes: where torch's tensors begin, and from LARGE bytes on at a page


class Heap:
    """Blocks by their numbers, at addresses from 0 on."""

    def __init__(self) -> None:
        self.live = 0  # bytes of the blocks in it
        self.resident = 0  # bytes that were written to once, in pages
        self._top = self._end = 0  # between them the free end
        self._pages = bytearray()  # 1: written to
        self._advised = bytearray()  # 1: may be part of a huge page
        self._blocks: dict[int, tuple[int, int]] = {}  # number -> (begin, size)
        self._holes: list[tuple[int, int]] = []  # (size, begin), ascending
        self._begins: dict[int, int] = {}  # of holes: begin -> size
        self._ends: dict[int, int] = {}  # end -> begin

    @property
    def size(self) -> int:
        """Bytes from its begin to its end."""
        return self._end

    @property
    def kept(self) -> int:
        """Bytes that are resident and hold nothing."""
        return self.resident - self.live

    def add(self, number: int, size: int) -> None:
        """A new block; one that is mapped apart is not kept here."""
        if not size:
            return
        align = PAGE if size >= LARGE else ALIGNED
        wanted = size + HEADER + align + LEAST  # so that an aligned place lies in it, wherever it begins
        if (found := self._room(wanted)) is None:
            return
        begin, room = found
        self.live += size
        first = -(-(begin + HEADER) // align) * align - HEADER
        end = first + HEADER + size
        self._blocks[number] = first, end - first
        self._touch(first // PAGE, -(-end // PAGE), size >= LARGE)
        if first > begin:
            self._open(begin, first - begin)
        self._free(end, begin + room - end)

    def remove(self, number: int) -> None:
        """A block is freed."""
        if (block := self._blocks.pop(number, None)) is None:
            return
        self.live -= block[1] - HEADER
        self._free(*block)
        if self._end - self._top >= TRIMMED:
            self._end = -(-(self._top + PAD) // PAGE) * PAGE
            self.resident -= self._pages.count(1, self._end // PAGE) * PAGE
            del self._pages[self._end // PAGE :], self._advised[self._end // PAGE :]

    def _room(self, wanted: int) -> tuple[int, int] | None:
        """(begin, size) of a place for a block; None where it is mapped apart."""
        place = bisect_left(self._holes, (wanted, 0))
        if place < len(self._holes):
            size, begin = self._holes[place]
            self._close(begin, size)
            return begin, size
        if self._end - self._top < wanted + LEAST:
            if wanted >= MAPPED:
                return None
            self._end = -(-(self._top + wanted + PAD + LEAST) // PAGE) * PAGE
        self._top += wanted
        return self._top - wanted, wanted

    def _free(self, begin: int, size: int) -> None:
        """A hole, with those beside it, or a part of the free end."""
        if (before := self._ends.get(begin)) is not None:
            self._close(before, begin - before)
            begin, size = before, size + begin - before
        if (behind := self._begins.get(begin + size)) is not None:
            self._close(begin + size, behind)
            size += behind
        if begin + size == self._top:
            self._top = begin
        elif size:
            self._open(begin, size)

    def _touch(self, first: int, end: int, advised: bool) -> None:
        """Pages are written to; where a huge page fits among advised ones of which none is there, it comes whole."""
        if (more := -(-end // PAGES) * PAGES - len(self._pages)) > 0:
            self._pages.extend(bytes(more))
            self._advised.extend(bytes(more))
        if advised:
            self._advised[first + 1 : end] = b"\1" * (end - first - 1)
        for huge in range(first // PAGES * PAGES, end, PAGES):
            whole = huge, huge + PAGES
            if not self._pages.count(1, *whole) and self._advised.count(1, *whole) == PAGES:
                self._pages[slice(*whole)] = b"\1" * PAGES
                self.resident += PAGES * PAGE
        self.resident += self._pages.count(0, first, end) * PAGE
        self._pages[first:end] = b"\1" * (end - first)

    def _open(self, begin: int, size: int) -> None:
        insort(self._holes, (size, begin))
        self._begins[begin], self._ends[begin + size] = size, begin

    def _close(self, begin: int, size: int) -> None:
        del self._holes[bisect_left(self._holes, (size, begin))]
        del self._begins[begin], self._ends[begin + size]
