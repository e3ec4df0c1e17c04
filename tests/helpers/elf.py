"""How a library is linked, read from its ELF headers (64 bits, little-endian)."""

from __future__ import annotations

import struct

PT_DYNAMIC, PT_GNU_STACK, PT_GNU_RELRO, DT_FLAGS, BIND_NOW, EXECUTABLE = 2, 0x6474E551, 0x6474E552, 30, 8, 1


def unhardened(library: bytes) -> list[str]:
    """What it lacks of: symbols bound at load time, their table read-only then, a stack that does not execute, a guard
    on stack frames."""
    offset, size, count = struct.unpack_from("<Q", library, 32)[0], *struct.unpack_from("<HH", library, 54)
    headers = [struct.unpack_from("<IIQQQQQQ", library, offset + i * size) for i in range(count)]
    segments = {header[0]: header for header in headers}
    _, _, start, _, _, length, _, _ = segments[PT_DYNAMIC]
    tags = dict(struct.unpack_from("<QQ", library, at) for at in range(start, start + length, 16))
    there = {
        "BIND_NOW": tags.get(DT_FLAGS, 0) & BIND_NOW,
        "RELRO": PT_GNU_RELRO in segments,
        "a stack that does not execute": PT_GNU_STACK in segments and not segments[PT_GNU_STACK][1] & EXECUTABLE,
        "a stack protector": b"__stack_chk_fail" in library,
    }
    return [name for name, found in there.items() if not found]
