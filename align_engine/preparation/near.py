"""Answers that say nearly the same, by the cosine of their embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
from semhash import SemHash

from align_engine.errors import BadInput
from align_engine.preparation.embeddings import BATCH, Encode


def distinct(groups: Sequence[Sequence[str]], encode: Encode, threshold: float) -> Iterator[list[int]]:
    """The places of the texts of each group that are left: none is as close to an earlier one of them as `threshold`.

    Raises:
        BadInput: the encoder gives no embedding of a text.
    """
    waiting = iter(groups)
    while part := list(islice(waiting, BATCH)):  # of all their texts at once: encoders are quicker at many
        found = np.asarray(encode([text for group in part for text in group]), np.float32)
        if found.ndim != 2 or len(found) != sum(map(len, part)) or not np.isfinite(found).all():
            raise BadInput(f"the encoder gives numbers of shape {found.shape} for {sum(map(len, part))} texts, or none")
        ends = np.cumsum([len(group) for group in part])
        for group, vectors in zip(part, np.split(found, ends[:-1])):
            yield _left(vectors, threshold) if len(group) > 1 else list(range(len(group)))


def _left(vectors: np.ndarray, threshold: float) -> list[int]:
    places: list[Any] = [str(i) for i in range(len(vectors))]
    unused: Any = SimpleNamespace(encode=None)  # the embeddings are there
    hashed = SemHash.from_embeddings(vectors, places, unused, ann_backend="basic")
    return sorted(int(place) for place in hashed.self_deduplicate(threshold).selected)
