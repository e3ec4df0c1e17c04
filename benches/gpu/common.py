"""One part of the survey at work: its device, its timing, and where its results go.

With `dry` everything is tiny and runs on the CPU, Triton's kernels in its interpreter.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from predicted import prediction
from questions import HEADS

PACKAGES = "torch triton transformers numpy trl peft liger-kernel cut-cross-entropy quack-kernels".split()
DRY_ROWS = 8
ROUNDS = 3


class Setting(NamedTuple):
    """What all parts of a run have in common."""

    dry: bool
    out: Path
    command: str


class Measured(NamedTuple):
    milliseconds: float | None
    peak_mib: float | None = None
    note: str = ""


class Lost(Exception):
    """The device no longer answers: nothing more can be measured in this process."""


def about(dry: bool) -> dict[str, str]:
    """What every result says of its making."""
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    device = "CPU, dry run: no figure means anything" if dry else torch.cuda.get_device_name()
    return dict(
        device=device,
        versions=", ".join(versions),
        python=platform.python_version(),
        cuda=str(torch.version.cuda),
    )


def append(path: Path, row: dict[str, Any]) -> None:
    """One JSON line, on the disk before this returns."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def why(error: BaseException) -> str:
    """A failure in a few words, for a cell of a table."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


class Lab:
    """What a part is given.

    Args:
        setting: of the run.
        part: its name.
        until: when it should have ended, by time.monotonic().
        skip: what ended this part's process before, by name: not tried again.
        announce: told the name of what is about to run, so that the one who watches knows what hangs or dies.
    """

    def __init__(
        self, setting: Setting, part: str, until: float, skip: frozenset[str], announce: Callable[[str], None]
    ) -> None:
        self.setting, self.part, self.until, self.skip, self.announce = setting, part, until, skip, announce
        self.dry, self.out = setting.dry, setting.out
        self.device = torch.device("cpu" if setting.dry else "cuda")
        self.dtype = torch.float32 if setting.dry else torch.bfloat16
        self.about = about(setting.dry)

    def head(self, name: str) -> tuple[int, int]:
        """(D, V) of a head."""
        return HEADS["tiny" if self.dry else name]

    def rows(self, n: int) -> int:
        return DRY_ROWS if self.dry else n

    def record(self, what: str, value: float | None, unit: str, **more: Any) -> None:
        """One result, written at once."""
        row = dict(part=self.part, what=what, value=value, unit=unit)
        row["predicted"] = prediction(self.part, what, self.about["device"])
        row |= {key: entry for key, entry in more.items() if entry not in (None, "")}
        date = datetime.now(UTC).isoformat(timespec="seconds")
        append(self.out / "survey.jsonl", row | dict(date=date, **self.about, command=self.setting.command))

    # -- measuring ------------------------------------------------------------------------------------------------
    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def free(self) -> None:
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def attempt(self, what: str, run: Callable[[], Any]) -> tuple[Any, str]:
        """What `run` returns, or None and why it failed.

        Raises:
            Lost: it took the device with it.
        """
        if what in self.skip:
            return None, "ended its process, not tried again"
        self.announce(what)
        try:
            made = run()
            self.synchronize()
            return made, ""
        except Exception as error:
            reason = why(error)
        try:
            self.synchronize()
        except Exception as error:
            raise Lost(reason) from error
        return None, reason

    def once(self, run: Callable[[], object]) -> float:
        """Milliseconds, by events of the device where it has them."""
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end)
        began = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - began)

    def rate(self, what: str, run: Callable[[], object], work: float, unit: str) -> None:
        """Time `run` and record its rate: `work` is what one millisecond would make one `unit`."""

        def timed() -> float:
            if self.dry:
                return self.once(run)
            run()
            return statistics.median(self.once(run) for _ in range(7))

        ms, reason = self.attempt(what, timed)
        self.record(what, ms and work / ms, unit, ms=ms, note=reason)

    def peak(self, run: Callable[[], object]) -> float | None:
        """MiB that `run` takes beside what is there before; it has run once already."""
        if self.device.type != "cuda":
            return None
        self.free()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def race(self, runs: Mapping[str, Callable[[], object]]) -> dict[str, Measured]:
        """Medians of several methods, one round after the other so that clocks and heat favour none; dry, one run each.

        A method that fails is left out of later rounds, with its reason. Rounds end when the part's time is up.
        """
        times: dict[str, list[float]] = {}
        peaks, notes = {}, {}

        def first(run: Callable[[], object]) -> tuple[float, float | None]:
            began = time.perf_counter()
            run()  # compiles and tunes
            self.synchronize()
            return 1e3 * (time.perf_counter() - began), self.peak(run)

        for name, run in runs.items():
            self.free()
            made, notes[name] = self.attempt(name, lambda run=run: first(run))
            if made is not None:
                times[name], peaks[name] = [made[0]] if self.dry else [], made[1]
        for turn in range(0 if self.dry else ROUNDS):
            if turn and time.monotonic() > self.until:
                break
            for name in list(times):
                took, notes[name] = self.attempt(name, lambda name=name: self.once(runs[name]))
                if notes[name]:
                    del times[name]
                else:
                    times[name].append(took)
        return {
            name: Measured(statistics.median(times[name]), peaks[name])
            if name in times
            else Measured(None, None, notes[name])
            for name in runs
        }
