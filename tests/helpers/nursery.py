"""Other processes that cost no imports: forks of one that has imported what they need."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
PATHS = [str(ROOT / part) for part in (".", "kernels", "tests/helpers")]  # of every Python that a test starts
# as it is before the first test: libraries read it when they are imported; `align` sets what torch's C++ code logs
START = os.environ | {"PYTHONPATH": os.pathsep.join(PATHS), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


class Child:
    """A job under way.

    Args:
        nursery: its parent.
        number: of its process, which is kept until `end`.
        out: the file that it writes what it says and complains to.
    """

    def __init__(self, nursery: Nursery, number: int, out: Path) -> None:
        self.nursery, self.number, self.out = nursery, number, out
        self.code: int | None = None  # once it has ended

    def runs(self) -> bool:
        return Path(f"/proc/{self.number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.number, how)

    def wait_until(self, when: Callable[[], bool]) -> None:
        """Wait while the job runs."""
        end = time.monotonic() + 120
        while not when():
            time.sleep(0.002)
            assert time.monotonic() < end and self.runs(), f"the job has ended by itself: {self.said()}"

    def end(self, patience: float = 240.0) -> int:
        """Its exit code, of a signal the negative number; it is killed where it takes longer than so many seconds."""
        end = time.monotonic() + patience
        while self.runs() and time.monotonic() < end:
            time.sleep(0.005)
        if late := self.runs():
            self.kill()
        self.code = self.nursery.ask({"wait": self.number})
        assert not late, f"the job had not ended after {patience:.0f} s: {self.said()}"
        return self.code

    def stop(self) -> None:
        """It ends now, if it has not."""
        if self.code is None:
            self.kill()
            self.end()

    def said(self) -> str:
        return self.out.read_text(errors="replace")[-3000:] if self.out.exists() else ""


class Nursery:
    """One interpreter that has imported everything; each job is a fork of it, with the environment and the folder that
    its caller has. Jobs run on one thread and draw no pictures."""

    CODE = """
import gc, json, os, sys, traceback, types
import accelerate, datasets, peft, torch, transformers.trainer_callback
import align_engine.cli, align_engine.iterate, align_engine.run, pictures, tiny
torch.set_num_threads(1)
pictures.leave_out()

def work(code, arguments, environment, folder, out, err):
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, name in ((1, out), (2, err)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    sys.stdin, sys.argv, main = open(os.devnull), ["-c", *arguments], types.ModuleType("__main__")
    sys.modules["__main__"] = main
    try:
        exec(code, vars(main))
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

gc.collect()
gc.freeze()
for line in sys.stdin:
    job, answer = json.loads(line), None
    if "wait" in job:
        answer = os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1])
    elif "load" in job:
        exec("".join(f"import {name}\\n" for name in job["load"]))
    elif not (answer := os.fork()):
        work(**job)
    print(json.dumps(answer), flush=True)
"""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", self.CODE], text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, env=START, cwd=ROOT)  # fmt: skip

    def ask(self, job: dict) -> int:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def load(self, *modules: str) -> None:
        """Import further modules, for all jobs from now on."""
        self.ask({"load": modules})

    def start(
        self, code: str, *arguments: object, out: Path | None = None, err: Path | None = None, **environment: str
    ) -> Child:
        """Start a job.

        Args:
            code: Python, in a `__main__` of its own.
            arguments: sys.argv[1:].
            out, err: files that get what it says and what it complains. Default None: nowhere, and where `out` goes.
            environment: on top of the caller's.
        """
        out = out or Path(os.devnull)
        surroundings = {"environment": os.environ | environment, "folder": os.getcwd()}
        job = {"code": code, "arguments": list(map(str, arguments)), "out": str(out), "err": str(err or out)}
        return Child(self, self.ask(job | surroundings), out)

    def kill(self, code: str, when: Callable[[], bool]) -> None:
        """Start a job and kill -9 it as soon as `when()`."""
        child = self.start(code)
        child.wait_until(when)
        child.kill()
        assert child.end() == -signal.SIGKILL, "it must not have ended by itself"

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@functools.cache
def shared() -> Nursery:
    """The one of this process."""
    made = Nursery()
    atexit.register(made.close)
    return made


@contextlib.contextmanager
def alike() -> Iterator[Nursery]:
    """It; this process too runs on one thread inside the block: MKL rounds some products otherwise on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield shared()
    finally:
        torch.set_num_threads(threads)
