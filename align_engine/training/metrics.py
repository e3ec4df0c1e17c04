"""Numbers of a run: (sum, count) pairs, reduced over ranks once, written to file, trackers and screen."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from align_engine.data.json_text import loads
from align_engine.errors import RunFailed
from align_engine.training import samples
from align_engine.training.ranks import gathered
from align_engine.training.screen import Columns

if TYPE_CHECKING:
    from align_kernels import LossOutput


QUANTILES = {"p01": 0.01, "p50": 0.5, "p99": 0.99}


class Sums:
    """Weighted means in the making. Every rank must add the same names (weight 0 where it has no data)."""

    def __init__(self, totals: dict[str, tuple[float, float]] | None = None) -> None:
        self.totals: dict[str, Any] = dict(totals or {})  # name -> (sum, count)
        self.samples: dict[str, list[Tensor]] = {}  # name -> numbers whose spread is asked for

    def add(self, name: str, value: Tensor | float, weight: Tensor | float) -> None:
        """Add a mean `value` over `weight` units. Weight 0 adds nothing, whatever the value. Waits for no device.

        Of a `value` of several numbers `reduced` makes name/min, /mean, /max and QUANTILES, NaN left out.
        """
        if isinstance(value, Tensor) and value.dim():
            self.samples.setdefault(name, []).append(value.detach().flatten() if weight else value.new_empty(0))
            return
        total, count = self.totals.get(name, (0.0, 0.0))
        value = value.detach().double() if isinstance(value, Tensor) else value
        if isinstance(weight, Tensor):
            total = total + (value * weight).where(weight > 0, 0.0)
        elif weight:
            total = total + value * weight
        self.totals[name] = (total, count + weight)

    def merge(self, other: Sums) -> None:
        """Add the sums and counts of another."""
        for name, (total, count) in other.totals.items():
            mine = self.totals.get(name, (0.0, 0.0))
            self.totals[name] = (mine[0] + total, mine[1] + count)

    def reduced(self, accelerator: Any) -> Sums:
        """The same over all ranks, as floats: one collective, and one for each name of which the spread is asked."""
        totals = dict(self.totals)
        for name, parts in self.samples.items():
            totals |= spread(name, torch.cat(gathered([torch.cat(parts).cpu()], accelerator)))
        if not totals:
            return Sums()
        device = accelerator.device
        flat = [torch.as_tensor(x, dtype=torch.float64, device=device) for pair in totals.values() for x in pair]
        pairs = accelerator.reduce(torch.stack(flat), "sum").view(-1, 2).tolist()
        return Sums({name: (pair[0], pair[1]) for name, pair in zip(totals, pairs)})

    def means(self) -> dict[str, float]:
        """name -> sum / count; names without units are left out. A margin of rewards is that of their means."""
        found = {name: total / count for name, (total, count) in self.totals.items() if count}
        if "rewards/chosen" in found and "rewards/rejected" in found:
            found.setdefault("rewards/margins", found["rewards/chosen"] - found["rewards/rejected"])
        return found


def spread(name: str, values: Tensor) -> dict[str, tuple[float, float]]:
    """Least, mean, largest and QUANTILES of numbers on the CPU, as a mean over one unit each: 0 units without any."""
    kept = values[~values.isnan()].double().numpy()
    if not len(kept):
        return dict.fromkeys((f"{name}/{what}" for what in ("min", "mean", "max", *QUANTILES)), (0.0, 0.0))
    found = {"min": kept.min(), "mean": kept.mean(), "max": kept.max()}
    found |= zip(QUANTILES, np.quantile(kept, list(QUANTILES.values())))
    return {f"{name}/{what}": (float(value), 1.0) for what, value in found.items()}


def with_means(out: LossOutput, means: dict[str, Tensor], count: Tensor | int) -> LossOutput:
    """What a loss returned, with further metrics: means over `count` tokens, sequences or pairs, or `count` numbers
    whose spread is asked for."""
    return out._replace(metrics=out.metrics | means, counts=out.counts | dict.fromkeys(means, count))


def peak_memory_mib(device: torch.device) -> float:
    """Most memory used so far: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class Clock:
    """Seconds by phase: `with clock("data"): ...`. Phases do not nest."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.began = device, {}, time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def lap(self) -> tuple[float, dict[str, float]]:
        """Seconds since the last call, and the share of them that each phase took."""
        now = time.perf_counter()
        total = max(now - self.began, 1e-9)
        shares = {f"time/{phase}": spent / total for phase, spent in self.seconds.items()}
        self.seconds, self.began = {}, now
        return total, shares


class Journal:
    """Where the numbers go: a line of metrics.jsonl, accelerate's trackers, columns and a bar on the screen."""

    def __init__(self, path: Path, accelerator: Any, total_steps: int, first_step: int, title: str) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self.path, self.accelerator = path, accelerator
        self.console = Console(quiet=not accelerator.is_main_process)
        self.bar = Progress(console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task(title, total=total_steps, completed=first_step)
        self.columns = Columns(total_steps, self.console.width if self.console.is_terminal else None)
        self.tokens, self.clock = 0.0, Clock(accelerator.device)

    def advance(self, tokens: float) -> None:
        """One step is done, over so many tokens."""
        self.tokens += tokens
        self.bar.advance(self.task)

    def throughput(self) -> dict[str, float]:
        """Tokens per second and the share of time of each phase since the last call, and peak memory."""
        seconds, shares = self.clock.lap()
        rate, self.tokens = self.tokens / seconds, 0.0
        return {"tokens_per_second": rate, "peak_memory_mib": peak_memory_mib(self.accelerator.device), **shares}

    def say(self, text: str) -> None:
        """Show a sentence on the screen."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def warn(self, step: int, text: str) -> None:
        """Say on the screen what may go wrong with the run."""
        self.console.print(f"step {step}: warning: {text}", style="yellow", highlight=False, soft_wrap=True)

    def write(self, step: int, record: dict[str, float]) -> None:
        """Append a line for `step`. The first process alone writes it."""
        self.accelerator.log(record, step=step)
        if not self.accelerator.is_main_process:
            return
        _append(self.path, [{"step": step, **record}])
        for text in self.columns.lines(step, record):
            self.say(text)

    def add_samples(self, step: int, rows: Sequence[dict[str, Any]], shown: Sequence[dict[str, Any]]) -> None:
        """Append rows for `step` to samples.jsonl, and show some on the screen. The first process alone does."""
        if rows and self.accelerator.is_main_process:
            _append(self.path.with_name(samples.FILE), [{"step": step, **row} for row in rows])
            if shown:
                self.console.print(samples.table(f"step {step}", shown))


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    try:
        with path.open("a") as file:
            file.write("".join(map(line, rows)))
    except OSError as error:
        then = "The checkpoints are whole; make room and run the same command again"
        raise RunFailed(f"cannot write {path}: {error.strerror}. {then}") from error


def line(row: dict[str, Any]) -> str:
    """A row of a file of JSON lines. JSON has no NaN and no infinity: numbers that are not finite become null."""
    return json.dumps(_finite(row), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines. Raises ValueError for one that is damaged."""
    return [loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
