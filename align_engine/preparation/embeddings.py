"""Embeddings of texts, kept on the disk: computed once, read in batches, gone on with after an interruption."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align_engine.errors import BadInput
from align_engine.models.modelfiles import check_path
from align_engine.preparation.clusters import unit
from align_engine.rollouts.rewards import is_function
from align_engine.training.importing import load_object

Encode = Callable[[list[str]], Any]  # -> [n, D], of any numbers

ALIKE = 0.999  # mean cosine from which on an encoder tells nothing apart
BATCH = 1024  # texts encoded, and embeddings read, at a time

STRANGERS = (  # texts that have nothing in common
    "How long do I boil an egg?", "def add(a, b): return a + b", "The French Revolution began in 1789.",
    "My knee hurts when I climb stairs.", "Прогноз погоды на завтра: дождь со снегом.", "x^2 - 5x + 6 = 0",
    "Напиши поздравление бабушке с юбилеем.", "Who won the chess championship last year?",
    "Как открыть расчётный счёт в банке?", "The guitar is out of tune.", "Почему у кошки мокрый нос?",
    "Translate 'good night' into Japanese.", "Сколько планет в Солнечной системе?", "Cheap flights to Lisbon in May",
    "Составь договор аренды квартиры.", "Once upon a time there was a dragon.",
)  # fmt: skip


def strangers(encode: Encode) -> float:
    """The mean cosine of texts that have nothing in common, 0 at least: an encoder may give any two texts 0.7.

    Raises:
        BadInput: it tells none of them from another.
    """
    found = unit(np.asarray(encode(list(STRANGERS)), np.float32))
    pairs = np.triu_indices(len(found), 1)
    mean = max(0.0, float((found @ found.T)[pairs].mean()))
    if mean > ALIKE:
        raise BadInput(
            f"the encoder gives texts that have nothing in common one embedding (cosine {mean:.4f} of "
            f"{STRANGERS[0]!r}, {STRANGERS[1]!r} and others), so it tells no topics apart: give another encoder"
        )
    return mean


def load_encoder(spec: str, trust_remote_code: bool = False) -> Encode:
    """What turns texts into embeddings.

    Args:
        spec: the folder or hub name of a sentence-transformers model, or of an encoder of transformers, whose hidden
            states are averaged; or module:function or file.py:function, which gives one row of numbers a text.
        trust_remote_code: run code that lies beside the model. Default False: refuse it.
    Raises:
        BadInput: nothing of that name.
    """
    if is_function(spec):
        return load_object(spec, "encoder")
    if not (Path(spec) / "modules.json").exists():
        check_path(spec, "encoder")
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(spec, trust_remote_code=trust_remote_code)
    except Exception as error:
        code = "it needs code of its own that lies beside it: read that, then give --trust_remote_code"
        reason = code if "trust_remote_code" in str(error) else " ".join(str(error).split())
        raise BadInput(f"cannot load the encoder {spec!r}: {reason:.300}") from error
    return lambda texts: model.encode(texts, batch_size=64, show_progress_bar=False)


class Embeddings:
    """A file of float16 rows of length 1, in the order of the texts. It grows by whole batches; what an interruption
    has cut is computed again.

    Args:
        path: of the file.
        count: texts there are in the end.
    """

    def __init__(self, path: Path, count: int) -> None:
        self.path, self.count, self.width = path, count, 0

    def fill(self, texts: Callable[[int, int], Sequence[str]], encode: Encode, say: Callable[[int], None]) -> None:
        """Compute what is missing.

        Args:
            texts: those from one place to another.
            say: is told how many there are.
        Raises:
            BadInput: the encoder gives no embedding of a text.
        """
        self.width = self._encoded(encode, ["a"]).shape[1]
        with self.path.open("ab") as file:
            done = min(file.tell() // (2 * self.width) // BATCH * BATCH, self.count)
            whole = self.count if file.tell() == 2 * self.width * self.count else done
            file.truncate(2 * self.width * whole)
            for start in range(whole, self.count, BATCH):
                found = self._encoded(encode, list(texts(start, min(start + BATCH, self.count))))
                file.write(found.astype(np.float16).tobytes())
                file.flush()
                say(start + len(found))

    def _encoded(self, encode: Encode, texts: list[str]) -> np.ndarray:
        found = np.asarray(encode(texts), np.float32)
        if found.ndim != 2 or len(found) != len(texts) or (self.width and found.shape[1] != self.width):
            raise BadInput(f"the encoder gives {found.shape} numbers for {len(texts)} texts, expected a row for each")
        length = np.linalg.norm(found, axis=1)
        if len(bad := np.flatnonzero(~((length > 1e-6) & np.isfinite(length)))):
            text = texts[bad[0]]
            raise BadInput(
                f"the encoder gives no embedding of {text!r:.60} (its numbers are zero, infinite or none); "
                "take such rows out"
            )
        return unit(found)

    def batches(self) -> Iterator[np.ndarray]:
        """All of them: [n, D] float32 each."""
        with self.path.open("rb") as file:
            for start in range(0, self.count, BATCH):
                size = min(BATCH, self.count - start)
                found = np.fromfile(file, np.float16, size * self.width).reshape(size, self.width)
                yield found.astype(np.float32)

    def some(self, places: Sequence[int] | np.ndarray) -> np.ndarray:
        """Those at some places, which rise: [n, D] float32."""
        held = np.memmap(self.path, np.float16, "r", shape=(self.count, self.width))
        return np.asarray(held[places], np.float32)
