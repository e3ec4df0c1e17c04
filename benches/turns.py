"""Methods that take turns, each in a process of its own: one that dies or hangs takes nothing with it.

A question's inputs lie in one file in memory, which all processes read. A process first answers the question, which
compiles, is compared with float64 and counted; then once a round, all in turn, so that a machine whose speed drifts
moves all alike. Memory is the process's own high-water mark in the first round.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from methods import GEMMS, METHODS, TREES, answer, gemms
from questions import Batch, Question, Truth, errors, make, truth, weight_of

PATIENCE = 600.0  # seconds for one answer of a method
ROUNDS = 3  # at least
MOST_ROUNDS = 25
ENVIRONMENT = {  # threads that wait sleep, since another process is at work then; one core compiles
    "OMP_WAIT_POLICY": "passive",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "HF_HUB_OFFLINE": "1",
}


class Figure(NamedTuple):
    """What was found of a method, or why it cannot run."""

    seconds: list[float]
    peak_mb: float | None = None
    flops: int | None = None
    errors: dict[str, float] | None = None
    reason: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def mapped(path: str | Path) -> Any:
    """What `torch.save` put there, its tensors read where they lie."""
    return torch.load(path, mmap=True, weights_only=True)


# -- the process that measures ------------------------------------------------------------------------------------
class HeadWork:
    """A question about a head, and one method."""

    def __init__(self, question: Question, method: str, paths: dict[str, str]) -> None:
        weight, batch, true = (mapped(paths[name]) for name in ("weight", "batch", "true"))
        self.b, self.true = Batch(**batch, weight=weight).to_train(question), Truth(*true)
        self.question, self.method = question, method
        for tensor in (self.b.hidden, self.b.weight):
            tensor.detach().sum()  # inputs are in memory before that is measured

    def run(self) -> Any:
        if self.method == GEMMS:
            return gemms(self.question, self.b)
        return answer(METHODS[self.method], self.question, self.b)

    def forget(self) -> None:
        self.b.forget()

    def kept_bytes(self) -> int:
        return sum(x.grad.nbytes for x in (self.b.hidden, self.b.weight) if x.grad is not None)

    def check(self) -> dict[str, float] | None:
        out = self.run()
        found = None if self.method == GEMMS else errors(self.question, self.b, out, self.true)
        self.forget()
        return found


def work_of(question: Question, method: str, paths: dict[str, str]) -> Any:
    if not question.a_step:
        return HeadWork(question, method, paths)
    from small_steps import StepWork

    return StepWork(question, method, mapped(paths["true"]))


def checked(work: Any, compiled: bool) -> dict[str, Any]:
    """Errors, and FLOPs of the matrix products; of compiled code those of the code as it is written."""
    from products import Products

    if not compiled:
        with Products() as counter:
            found = work.check()
    else:
        found = work.check()
        with torch.compiler.set_stance("force_eager"), Products() as counter:
            work.run()
        work.forget()
    return {"errors": found, "flops": counter.total()}


def peak_kib() -> int:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def timed(work: Any, measure_peak: bool) -> dict[str, float]:
    before = 0
    if measure_peak:
        ctypes.CDLL(None).malloc_trim(0)  # else an answer fits into what others have freed
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_kib()
    began = time.perf_counter()
    work.run()
    found = {"seconds": time.perf_counter() - began}
    if measure_peak:
        found["peak_mb"] = ((peak_kib() - before) * 1024 - work.kept_bytes()) / 1e6
    work.forget()
    return found


class Worker:
    """One method, in this process."""

    def __init__(self, method: str) -> None:
        self.method, self.work = method, None

    def ask(self, order: str, *given: Any) -> dict[str, Any]:
        """What "load" (a question, the paths of its inputs) or "time" (whether memory is measured) finds; where it
        cannot, the `reason`."""
        try:
            if order == "time":
                return timed(self.work, *given)
            self.work = None  # before there is another
            self.work = work_of(given[0], self.method, given[1])
            return checked(self.work, self.method in METHODS and METHODS[self.method].compiled)
        except Exception as error:
            self.work = None
            return {"reason": " ".join(f"{type(error).__name__}: {error}".split())[:200]}

    def end(self) -> None:
        pass


def play(pipe: Connection, method: str, log: str) -> None:
    """Carry out the orders that come through the pipe."""
    with Path(log).open("a") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    torch._dynamo.config.recompile_limit = 256  # beyond it compiled code would give way to eager, silently
    worker = Worker(method)
    while True:
        pipe.send(worker.ask(*pipe.recv()))


# -- the process that watches -------------------------------------------------------------------------------------
def in_memory(name: str) -> Path:
    """A file that other processes of this user can open, gone with this process at the latest."""
    return Path(f"/proc/{os.getpid()}/fd/{os.memfd_create(name)}")


class Player:
    """One method in a process of its own, started when it is first needed and again after it has died."""

    def __init__(self, method: str, target: Callable[..., None] = play) -> None:
        self.method, self.target = method, target
        self.process: Any = None
        self.log = in_memory("log")

    def ask(self, *order: Any) -> dict[str, Any]:
        """Its reply; one with a `reason` where it has none."""
        if self.process is None:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["torch"])  # imported once
            self.pipe, other = context.Pipe()
            self.process = context.Process(target=self.target, args=(other, self.method, str(self.log)), daemon=True)
            self.process.start()
            other.close()
        try:
            self.pipe.send(order)
            if self.pipe.poll(PATIENCE):
                return self.pipe.recv()
            reason = f"no answer within {PATIENCE:.0f} s"
        except (EOFError, OSError):
            self.process.join(10)
            code = self.process.exitcode
            name = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
            last = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()][-1:]
            reason = f"its process died: {name}" + (f" ({last[0][:100]})" if last else "")
        self.end()
        return {"reason": reason}

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None
            self.log.write_text("")


def players_of(question: Question) -> list[str]:
    return [*METHODS, TREES if question.a_step else GEMMS]


class Inputs:
    """Of one question at a time, with its answer in float64; the weight of every head that was asked for stays."""

    def __init__(self) -> None:
        self.files: dict[str, Path] = {}

    def keep(self, name: str, value: Any) -> None:
        """Put it in memory, in place of what had this name."""
        self.drop(name)
        self.files[name] = in_memory(name)
        torch.save(value, self.files[name])

    def drop(self, name: str) -> None:
        if name in self.files:
            os.close(int(self.files.pop(name).name))

    def of(self, question: Question) -> dict[str, str]:
        """Paths that every process can open."""
        head = f"{question.head}, {question.dtype}"
        if question.a_step:
            from small_steps import exact_grads

            self.keep("true", exact_grads(question))
            return {"true": str(self.files["true"])}
        if head not in self.files:
            self.keep(head, weight_of(question))
        batch = make(question, weight=mapped(self.files[head]))
        self.keep("batch", {name: value for name, value in batch._asdict().items() if name != "weight"})
        self.keep("true", tuple(truth(question, batch)))
        return {name: str(self.files[key]) for name, key in (("weight", head), ("batch", "batch"), ("true", "true"))}

    def end(self) -> None:
        for name in list(self.files):
            self.drop(name)


class Race:
    """All questions within some minutes: each gets its share of what is left, and ROUNDS rounds whatever they take.

    Short, it is one round of each in this process, and nothing is compiled.
    """

    def __init__(self, questions: list[Question], minutes: float, short: bool) -> None:
        self.left, self.short = list(questions), short
        self.until = time.monotonic() + 60 * minutes
        self.players: dict[str, Player | Worker] = {}
        self.inputs = Inputs()
        os.environ |= {"TORCH_COMPILE_DISABLE": "1"} if short else ENVIRONMENT

    def player(self, method: str) -> Player | Worker:
        if method not in self.players:
            self.players[method] = Worker(method) if self.short else Player(method)
        return self.players[method]

    def load(self, question: Question, paths: dict[str, str]) -> list[tuple[str, dict[str, Any]]]:
        """The first answer of each method, which nothing times: as many at once as there are threads."""
        methods = players_of(question)
        players = [self.player(method) for method in methods]
        with ThreadPoolExecutor(1 if self.short else torch.get_num_threads()) as pool:
            return list(zip(methods, pool.map(lambda player: player.ask("load", question, paths), players)))

    def run(self, question: Question) -> dict[str, Figure]:
        until = time.monotonic() + (self.until - time.monotonic()) / max(len(self.left), 1)
        self.left = [other for other in self.left if other != question]
        paths = self.inputs.of(question)
        found = {method: {"seconds": []} | reply for method, reply in self.load(question, paths)}
        for turn in range(1 if self.short else MOST_ROUNDS):
            began = time.monotonic()
            for method, figure in found.items():
                if "reason" not in figure:
                    reply = self.player(method).ask("time", turn == 0)
                    figure["seconds"] += [reply.pop("seconds")] if "seconds" in reply else []
                    figure |= reply
            now = time.monotonic()
            if turn + 1 >= ROUNDS and 2 * now - began > until:
                break
        return {method: Figure(**figure) for method, figure in found.items()}

    def end(self) -> None:
        for one in (*self.players.values(), self.inputs):
            one.end()
