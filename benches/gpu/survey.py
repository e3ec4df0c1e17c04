"""Everything that needs a GPU, in the order of its worth, within a budget of seconds.

    python benches/gpu/survey.py --prepare [--python PYTHON] [--carry build/gpu]
    python benches/gpu/survey.py [--seconds 570] [--parts NAME ...] [--out FOLDER] [--carry build/gpu] [--dry]

--prepare  where nvcc and a package index are: builds the extensions for PYTHON (default: the one that runs; it needs
           torch, setuptools and pybind11) and unpacks the peers into the folder that is carried to the GPU
--seconds  a part that would not fit any more is left out, one that takes too long is ended, and each says so
--parts    these alone: what broke the last time
--dry      the whole order on the CPU, with tiny shapes and Triton's kernels in its interpreter, to prove the scripts

The GPU's machine needs torch, triton and transformers, pytest with pytest-xdist for the part `tests` and peft for the
last ones, and nothing is installed there. Each result is one line of OUT/survey.jsonl as soon as it is known; the table
of all, OUT/survey.md, is written last, with logs at most eight files. A part runs in a process beside this one, and
what hangs or dies is named and left out when its part runs again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
CLOSING = 4.0  # seconds for the table
TRIES = 3  # of a part whose process ended
PATIENCE, DRY_PATIENCE = 3, 30  # times its seconds, after which a part is ended
COMMON = ("date", "device", "versions", "python", "cuda", "command")  # of every line, said once in the table


class Part(NamedTuple):
    name: str
    call: str  # module:function, called with a Lab
    seconds: float  # on an H100, estimated
    dry: float  # on one core, measured
    options: dict[str, Any] | None = None


def head(
    what: str, name: str, seconds: float, trained: bool = False, softmax: str = "dense", rows: int = 8192,
    clamp: float | None = None,
) -> Part:  # fmt: skip
    """A question of ../questions.py, by its name there."""
    asked = dict(what=what, head=name, rows=rows, trained=trained, softmax=softmax, dtype="bfloat16", clamp=clamp)
    said = [what, name] + ["trained" if trained else "frozen"] * (what != "forward") + [softmax, "bfloat16"]
    said += [f"clamp {clamp}"] * (clamp is not None) + [f"{rows} rows"] * (rows != 8192)
    return Part(", ".join(said), "heads:race", seconds, 2, asked)


SMALL, SEVEN, LLAMA, GEMMA = "Qwen2.5-0.5B", "Qwen2.5-7B", "Llama-3-8B", "Gemma-2-2B"
PARTS = (
    Part("right", "right:calls", 25, 8),
    Part("gemms", "gemms:gemms", 20, 1),
    head("forward", SEVEN, 15),
    head("sft", SEVEN, 15),
    head("sft", SEVEN, 20, trained=True),
    head("gradient", SEVEN, 15, trained=True),
    Part("row kernels", "rows:rows", 40, 5),
    Part("planner", "plans:plans", 40, 3),
    Part("epilogue", "epilogue_race:race", 60, 10),
    Part("waiting", "waits:waits", 6, 2),
    Part("graph", "waits:graph", 10, 2),
    Part("tests", "checks:tests", 170, 25),
    Part("sanitizer", "checks:sanitizer", 50, 6),
    Part("profile", "checks:profile", 30, 6),
    head("sft", SMALL, 12, trained=True),
    head("sft", SMALL, 12),
    head("sft", LLAMA, 12, trained=True),
    head("forward", LLAMA, 10),
    head("sft", SEVEN, 10, trained=True, rows=2048),
    head("sft", SEVEN, 12, trained=True, softmax="peaked"),
    Part("step 0.5B", "steps:steps", 40, 4, dict(model="0.5B", trained="LoRA")),
    Part("step 7B", "steps:steps", 60, 4, dict(model="7B", trained="LoRA")),
    Part("step 7B, all trained", "steps:steps", 60, 4, dict(model="7B", trained="all")),
    *(head(what, SMALL, 12, trained=True) for what in ("dpo", "grpo", "kto", "ppo-clip")),
    head("dpo", SMALL, 12, trained=True, clamp=0.1),
    *(head(what, SEVEN, 20) for what in ("dpo", "grpo")),
    *(head(what, GEMMA, 12, trained=what == "sft") for what in ("forward", "sft")),
)


# -- the process that measures ------------------------------------------------------------------------------------
def work(pipe: Connection, setting: tuple[bool, Path, str], paths: list[str]) -> None:
    """Carry out the parts that come through the pipe, until None comes."""
    os.setsid()  # what a part starts ends with it
    sys.path[:] = paths
    log = os.open(setting[1] / "survey.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if setting[0]:
        os.environ["TRITON_INTERPRET"] = "1"
        importlib.import_module("triton_interpreter").install()
    from common import Lab, Lost, Setting, why

    pipe.send(("ready", ""))
    while (order := pipe.recv()) is not None:
        part, seconds, skip = order
        print(f"== {part.name}", flush=True)
        module, function = part.call.split(":")
        try:
            lab = Lab(
                Setting(*setting), part.name, time.monotonic() + seconds, skip, lambda what: pipe.send(("at", what))
            )
            getattr(importlib.import_module(module), function)(lab, **(part.options or {}))
            pipe.send(("done", ""))
        except Lost as error:
            pipe.send(("lost", str(error)))
            os._exit(1)
        except Exception as error:
            pipe.send(("done", why(error)))


# -- the process that watches -------------------------------------------------------------------------------------
class Survey:
    """A run of some parts within a budget."""

    def __init__(self, out: Path, seconds: float, dry: bool, command: str, parts: Sequence[Part] = PARTS) -> None:
        self.out, self.dry, self.command, self.parts = out, dry, command, parts
        self.until = time.monotonic() + seconds - CLOSING
        self.worker: Any = None
        self.pipe: Any = None

    def left(self) -> float:
        return self.until - time.monotonic()

    def run(self) -> None:
        for part in self.parts:
            skip: frozenset[str] = frozenset()
            for _ in range(TRIES):
                needs = part.dry if self.dry else part.seconds
                if needs > self.left():
                    self.note(part, f"left out: takes about {needs:.0f} s and {max(self.left(), 0):.0f} are left")
                    break
                began = time.monotonic()
                culprit, reason = self.carry_out(part, skip)
                self.note(part, "", "the whole part", value=time.monotonic() - began, unit="s", predicted=needs)
                if reason:
                    self.note(part, reason, culprit)
                if culprit is None or culprit in skip:
                    break
                skip |= {culprit}
        self.end()

    def carry_out(self, part: Part, skip: frozenset[str]) -> tuple[str | None, str]:
        """Run a part; what its process was at when it had to be ended, or None, and why."""
        if self.worker is None and not self.start():
            return None, "its process did not start"
        limit = min(self.left(), part.seconds * (DRY_PATIENCE if self.dry else PATIENCE))
        until, at = time.monotonic() + limit, part.name
        worker: Any = self.worker
        try:
            self.pipe.send((part, limit, skip))
            while self.pipe.poll(max(until - time.monotonic(), 0)):
                kind, text = self.pipe.recv()
                if kind == "at":
                    at = text
                elif kind == "lost":
                    self.end()
                    return at, f"the device is lost: {text}"
                else:
                    return None, text
            reason = f"ended after {limit:.0f} s"
        except (EOFError, OSError):
            worker.join(1)
            reason = f"the process died ({worker.exitcode})"
        self.end()
        return at, reason

    def start(self) -> bool:
        """Whether a process that measures is there in time."""
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        setting = (self.dry, self.out, self.command)
        self.worker = context.Process(target=work, args=(other, setting, list(sys.path)), daemon=False)
        self.worker.start()
        other.close()
        try:
            if self.pipe.poll(max(self.left(), 0)) and self.pipe.recv()[0] == "ready":
                return True
        except (EOFError, OSError):
            pass
        self.end()
        return False

    def end(self) -> None:
        if self.worker is None:
            return
        try:
            os.killpg(self.worker.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self.worker.kill()  # it has not begun
        self.worker.join()
        self.pipe.close()
        self.worker = None

    def note(self, part: Part, text: str, what: str | None = None, **more: Any) -> None:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        row = dict(part=part.name, what=what, **more, note=text, date=date, command=self.command)
        with (self.out / "survey.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


# -- the table ----------------------------------------------------------------------------------------------------
def markdown(rows: list[dict[str, Any]]) -> str:
    """A table with one column for each key, in the order of their first appearance."""
    keys = list(dict.fromkeys(key for row in rows for key, entry in row.items() if entry is not None))
    cell = lambda x: "" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x).replace("|", "/")  # noqa: E731
    lines = ["| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys)]
    lines += ["| " + " | ".join(cell(row.get(key)) for key in keys) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def table(out: Path) -> str:
    """OUT/survey.md from OUT/survey.jsonl: one table a part."""
    rows = [json.loads(line) for line in (out / "survey.jsonl").read_text().splitlines()]
    known = next((row for row in rows if "device" in row), rows[0] if rows else {})
    text = "# Survey\n\n" + "".join(f"    {key}: {known[key]}\n" for key in COMMON if key in known)
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [{k: v for k, v in row.items() if k not in ("part", *COMMON)} for row in rows if row["part"] == part]
        text += f"\n## {part}\n\n{markdown(own)}"
    (out / "survey.md").write_text(text)
    return text


# -- entry --------------------------------------------------------------------------------------------------------
def lay_out(carry: Path) -> None:
    """Extensions that were carried to their places, and all that is imported onto the path, of children too."""
    for built in (carry / "extensions" / "align_kernels").glob("*.so"):
        if f"-{sys.version_info.major}{sys.version_info.minor}-" in built.name:
            shutil.copy2(built, ROOT / "kernels" / "align_kernels" / built.name)
    paths = [str(ROOT / folder) for folder in ("benches/gpu", "benches", "", "kernels", "tests/helpers")] + [
        str(carry / "peers")
    ]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ |= dict(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", ALIGN_CARRIED=str(carry))


def main() -> None:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="fill the folder that is carried to the GPU")
    parser.add_argument("--python", default=sys.executable, help="whose extensions --prepare builds")
    parser.add_argument("--carry", type=Path, default=ROOT / "build" / "gpu", help="that folder")
    parser.add_argument("--seconds", type=float, default=570.0, help="for everything")
    parser.add_argument("--parts", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--out", type=Path, default=ROOT / "benches" / "results", help="folder of the results")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, to prove the scripts")
    args = parser.parse_args()
    lay_out(args.carry.resolve())
    if args.prepare:
        importlib.import_module("prepare").prepare(args.carry.resolve(), args.python)
        return
    if not args.dry and shutil.which("nvidia-smi") is None and not Path("/dev/nvidia0").exists():
        parser.error("no GPU on this machine: pass --dry to prove the scripts on the CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    parts = [part for part in PARTS if args.parts is None or part.name in args.parts]
    command = " ".join(["python", *sys.argv])
    Survey(args.out.resolve(), args.seconds, args.dry, command, parts).run()
    print(table(args.out))


if __name__ == "__main__":
    main()
