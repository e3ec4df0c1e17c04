"""Short names that tell paths apart."""

from __future__ import annotations

from collections.abc import Sequence


def distinct(paths: Sequence[Sequence[str]]) -> list[str]:
    """A name for each path, given by its parts: the last one, with as many of those before it as tell it from the
    others."""

    def shared(i: int, size: int) -> bool:
        return any(path[-size:] == paths[i][-size:] for j, path in enumerate(paths) if j != i)

    found = []
    for i, path in enumerate(paths):
        size = next((size for size in range(1, len(path)) if not shared(i, size)), len(path))
        found.append("/".join(path[-size:]))
    return found
