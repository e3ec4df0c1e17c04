"""`align balance` at scale: a planted mixture of prompts, embeddings by hashing; time, peak memory, what was found.

    python benches/balance.py [PROMPTS] [FOLDER]

The encoder is a random projection of a prompt's words (384 numbers, as all-MiniLM-L6-v2 has), so that what is measured
is everything but the encoder.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from functools import cache
from pathlib import Path

import numpy as np

TOPICS = {"cats": 0.6, "logic": 0.2, "code": 0.1, "law": 0.06, "sleep": 0.039, "tea": 0.001}  # shares of the prompts
WORDS = 12  # of a prompt: a third of them of its topic alone
WIDTH = 384


@cache
def vector(word: str) -> np.ndarray:
    """Random numbers of a word's own."""
    return np.random.default_rng(zlib.crc32(word.encode())).normal(size=WIDTH).astype(np.float32)


def encode(texts: list[str]) -> np.ndarray:
    """Sums of the words' vectors; the topic's own words weigh more, as a sentence's subject does."""
    return np.stack([sum(vector(word) * (3.0 if "-" in word else 1.0) for word in text.split()) for text in texts])


def write(path: Path, count: int) -> None:
    """Prompts of all topics in random order."""
    rng = np.random.default_rng(0)
    topics = rng.permutation(np.repeat(list(TOPICS), [round(share * count) for share in TOPICS.values()]))
    with path.open("w") as file:
        for topic in topics:
            own = [f"{topic}-{i}" for i in rng.integers(0, 6, WORDS // 3)]
            words = [*own, *(f"w{i}" for i in rng.integers(0, 5000, WORDS - len(own)))]
            file.write(json.dumps({"prompt": " ".join(words), "topic": str(topic)}) + "\n")


def main(count: int, folder: Path) -> None:
    write(folder / "prompts.jsonl", count)
    command = [sys.executable, "-m", "align_engine", "balance", "--dataset_name", str(folder / "prompts.jsonl"),
               "--output_dir", str(folder / "out"), "--encoder", f"{__file__}:encode", "--cap", "100000"]  # fmt: skip
    start = time.monotonic()
    subprocess.run(command, check=True)
    seconds, peak = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    found = json.loads((folder / "out" / "report.json").read_text())
    print(f"{count:,} prompts, {WIDTH} numbers each: {seconds:.0f} s, peak memory {peak:.2f} GiB, "
          f"{found['subclusters']:,} subclusters, {len(found['clusters'])} clusters")  # fmt: skip
    planted = sorted((round(share * count) for share in TOPICS.values()), reverse=True)
    for size, one in zip(planted, found["clusters"]):
        print(f"  planted {size:7,}  found {one['size']:7,}  ({one['size'] / size - 1:+.1%})")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as temporary:
        main(int(arguments[0]) if arguments else 200_000, Path(arguments[1] if len(arguments) > 1 else temporary))
