"""`align generate` against a server in this process that fails at times: what it loses, and what it has under way.

    python benches/generate_under_failures.py [--answers 20000] [--fails 0.05] [--concurrency 64] [--kills 3]

With kills, the command runs in a process of its own, which is ended by SIGKILL at random moments and started again; its
rows are then those of an unbroken run.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from chat_server import ChatServer, serving

MODELS = 2


def command(server: ChatServer, folder: Path, out: str, concurrency: int) -> list[str]:
    models = [f"name={name},tier={tier},base_url={server.url}" for name, tier in (("a", "best"), ("b", "hard"))]
    places = ["--dataset_name", str(folder / "prompts.jsonl"), "--output_dir", str(folder / out)]
    limit = ["--server_concurrency", str(concurrency)]
    return [sys.executable, "-m", "align_engine", "generate", *places, *limit, "--models", *models]


def run(folder: Path, args: argparse.Namespace, kills: int, out: str) -> Path:
    """One result, and a line of what the server saw."""
    rng, journal = random.Random(args.seed), folder / out / "_journal.jsonl"
    moments = sorted(rng.sample(range(1, args.answers), kills))
    began, cpu = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with serving(fails=args.fails, delay=args.delay, seed=args.seed) as server:
        given = command(server, folder, out, args.concurrency)
        for moment in moments:
            process = subprocess.Popen(given, stdout=subprocess.DEVNULL)
            while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < moment):
                time.sleep(0.02)
            process.kill()
            process.wait()
        subprocess.run(given, check=True, stdout=subprocess.DEVNULL)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    rows = [json.loads(line) for line in (folder / out / "rows.jsonl").open(encoding="utf-8")]
    whole = {(one["index"], one["model"]) for one in rows}
    lost = args.answers - len(whole & {(i, name) for i in range(args.answers // MODELS) for name in "ab"})
    print(f"kills {kills}: {len(rows)} rows, lost {lost}, twice {len(rows) - len(whole)}")
    print(f"  requests {len(server.bodies)}, failed {dict(server.failed)}")
    print(f"  at most {server.most} at a time, limit {args.concurrency}")
    cpu_time, peak = spent.ru_utime - cpu.ru_utime, spent.ru_maxrss / 1024
    print(f"  {time.perf_counter() - began:.0f} s, {cpu_time:.0f} s of CPU, {peak:.0f} MiB", flush=True)
    return folder / out / "rows.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"answers": 20_000, "fails": 0.05, "concurrency": 64, "kills": 3, "delay": 0.01,
                          "seed": 0}.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with (folder / "prompts.jsonl").open("w") as file:
            file.writelines(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(args.answers // MODELS))
        whole = run(folder, args, 0, "whole")
        if args.kills:
            broken = run(folder, args, args.kills, "broken")
            print(f"the same rows, byte for byte: {broken.read_bytes() == whole.read_bytes()}")


if __name__ == "__main__":
    main()
