"""Device, timing and results of the GPU benchmarks. In dry mode everything is tiny and runs on the CPU."""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

PACKAGES = "torch triton transformers trl peft liger-kernel cut-cross-entropy quack-kernels".split()


class Options(NamedTuple):
    dry: bool
    out: Path
    budget: float  # seconds; what does not fit is written down as not reached
    rounds: int
    choice: str | None  # what of this part, None: all

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.dry else torch.bfloat16


def read_options(description: str | None, choices: tuple[str, ...] = ()) -> Options:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("choice", nargs="?", choices=choices or None, help="what to measure; default: all")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, to prove the scripts")
    parser.add_argument("--out", type=Path, default=Path("benches/results"), help="folder of the results")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        parser.error("no GPU that torch can use: pass --dry to prove the scripts on the CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    return Options(args.dry, args.out, args.budget, 2 if args.dry else args.rounds, args.choice)


# -- measuring ----------------------------------------------------------------------------------------------------
class Measured(NamedTuple):
    milliseconds: float | None
    peak_mib: float | None
    note: str = ""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds, by events of the device where it has them."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    began = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - began)


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def why(error: Exception) -> str:
    """A failure in a few words, for a cell of a table."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text[:160]


def interleaved(runs: Mapping[str, Callable[[], object]], options: Options) -> dict[str, Measured]:
    """Medians of several methods, one round after the other so that clocks and heat favour none.

    A method that fails is left out of later rounds, with its reason.
    """
    device, times, peaks, notes = options.device, {}, {}, {}
    for name, run in runs.items():
        free()
        try:
            before = 0
            run()  # compiles and tunes
            synchronize(device)
            if device.type == "cuda":
                free()
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
                run()
                synchronize(device)
                peaks[name] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
            times[name] = []
        except Exception as error:
            notes[name] = why(error)
    for _ in range(options.rounds):
        for name in list(times):
            try:
                times[name].append(once(runs[name], device))
            except Exception as error:
                notes[name] = why(error)
                del times[name]
    return {
        name: Measured(statistics.median(times[name]), peaks.get(name))
        if name in times
        else Measured(None, None, notes.get(name, "failed"))
        for name in runs
    }


# -- results ------------------------------------------------------------------------------------------------------
def machine(options: Options) -> dict[str, Any]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    device = "CPU, dry run: no figure means anything" if options.dry else torch.cuda.get_device_name()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "command": " ".join(["python", *sys.argv]),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": versions,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table with one column for each key, in the order of their first appearance."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cell = lambda x: "" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x)  # noqa: E731
    lines = ["| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys)]
    lines += ["| " + " | ".join(cell(row.get(key)) for key in keys) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write(options: Options, part: str, rows: list[dict[str, Any]]) -> None:
    """PART.json and PART.md in the results' folder, dry ones under a name of their own."""
    about = machine(options)
    stem = options.out / (f"dry-{part}" if options.dry else part)
    stem.with_suffix(".json").write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    head = f"# {part}\n\n{about['date']}, {about['device']}; {versions}, Python {about['python']}\n\n"
    stem.with_suffix(".md").write_text(head + f"    {about['command']}\n\n" + markdown(rows))
    print(stem.with_suffix(".md").read_text(), flush=True)
