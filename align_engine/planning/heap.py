"""What a CPU's malloc keeps of memory that was freed: glibc's, as `training.allocator` sets it.

Blocks from MAPPED bytes on are mapped apart, and go back to the system when they are freed. Smaller ones lie in a heap:
a freed block joins the free ones beside it, a new one takes the smallest that is large enough, else the heap grows. Its
end goes back where TRIMMED bytes are free there; holes below stay, with the pages of theirs that were written to. Where
a tensor must begin at a multiple of 2 MiB, holes of its own size are too small for it.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from align_engine.training.allocator import MAPPED, TRIMMED

PAGE = 16 << 10  # larger than the system's, as fewer are quicker to count
HEADER, LEAST = 16, 32  # bytes before a block, and of the smallest one
ALIGNED, HUGE = 64, 2 << 20  # torch's tensors begin at multiples of the one, from the other on at multiples of that


class Heap:
    """Blocks by their numbers, at addresses from 0 on."""

    def __init__(self) -> None:
        self.live = 0  # bytes of blocks that are there
        self.resident = 0  # bytes that were written to once, in pages
        self._end = 0
        self._pages = bytearray()  # 1: written to
        self._blocks: dict[int, tuple[int, int]] = {}  # number -> (begin, size)
        self._holes: list[tuple[int, int]] = []  # (size, begin), ascending
        self._begins: dict[int, int] = {}  # of holes: begin -> size
        self._ends: dict[int, int] = {}  # end -> begin

    @property
    def kept(self) -> int:
        """Bytes that are resident and hold nothing."""
        return self.resident - self.live

    def add(self, number: int, size: int) -> None:
        """A new block; one that is mapped apart does not come here."""
        if not 0 < size < MAPPED:
            return
        self.live += size
        align = HUGE if size >= HUGE else ALIGNED
        wanted = size + HEADER + align + LEAST  # so that an aligned place lies in it, wherever it begins
        place = bisect_left(self._holes, (wanted, 0))
        if place < len(self._holes):
            room, begin = self._holes[place]
            self._close(begin, room)
        else:
            begin, room = self._end, wanted
            self._end += wanted
        first = -(-(begin + HEADER) // align) * align - HEADER
        end = first + HEADER + size
        self._blocks[number] = first, end - first
        self._touch(first // PAGE, -(-end // PAGE))
        if first > begin:
            self._open(begin, first - begin)
        if end < begin + room:
            if begin + room == self._end:
                self._end = end
            else:
                self._open(end, begin + room - end)

    def remove(self, number: int) -> None:
        """A block is freed."""
        if (block := self._blocks.pop(number, None)) is None:
            return
        begin, size = block
        self.live -= size - HEADER
        if (before := self._ends.get(begin)) is not None:
            self._close(before, begin - before)
            begin, size = before, size + begin - before
        if (behind := self._begins.get(begin + size)) is not None:
            self._close(begin + size, behind)
            size += behind
        if begin + size < self._end:
            self._open(begin, size)
            return
        self._end = begin
        pages = -(-begin // PAGE)
        if (len(self._pages) - pages) * PAGE >= TRIMMED:
            self.resident -= sum(self._pages[pages:]) * PAGE
            del self._pages[pages:]

    def _touch(self, first: int, end: int) -> None:
        if end > len(self._pages):
            self._pages.extend(bytes(end - len(self._pages)))
        self.resident += self._pages.count(0, first, end) * PAGE
        self._pages[first:end] = b"\1" * (end - first)

    def _open(self, begin: int, size: int) -> None:
        insort(self._holes, (size, begin))
        self._begins[begin], self._ends[begin + size] = size, begin

    def _close(self, begin: int, size: int) -> None:
        del self._holes[bisect_left(self._holes, (size, begin))]
        del self._begins[begin], self._ends[begin + size]
