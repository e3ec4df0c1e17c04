"""Runs in other processes that can be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from processes import PATHS

ENV = {"PYTHONPATH": os.pathsep.join(PATHS), "OMP_NUM_THREADS": "1"}
IMPORTS = (
    "import datasets, os, peft, pictures, sys, tiny, torch, transformers.trainer_callback, align_engine.run as run\n"
    "pictures.leave_out()\n"
)


class Nursery:
    """One interpreter that has imported everything; each job is a fork of it, so that a killed run costs no import.

    Jobs run on one thread, and so does this process until `close`: MKL rounds some products otherwise on two.

    Args:
        modules: that it imports besides.
    """

    CODE = (
        "torch.set_num_threads(1)\n"
        "for job in sys.stdin:\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        sys.stdout = open(os.devnull, 'w')\n"
        "        exec(job)\n"
        "        os._exit(0)\n"
        "    print(child, flush=True)\n"
        "    print(os.waitpid(child, 0)[1], flush=True)\n"
    )

    def __init__(self, *modules: str) -> None:
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)
        code = IMPORTS + "".join(f"import {name}\n" for name in modules) + self.CODE
        self.process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | ENV, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip

    def start(self, job: str) -> int:
        """Start the job; its process's number."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(job + "\n")
        self.process.stdin.flush()
        self.child = int(self.process.stdout.readline())
        return self.child

    def wait_until(self, when: Callable[[], bool]) -> None:
        """Wait while the job runs."""
        end = time.monotonic() + 120
        while not when():
            time.sleep(0.002)
            assert time.monotonic() < end and Path(f"/proc/{self.child}").exists(), "the job has ended by itself"

    def end(self) -> int:
        """The status with which the job ends."""
        assert self.process.stdout
        return int(self.process.stdout.readline())

    def kill(self, job: str, when: Callable[[], bool]) -> None:
        """Start the job and kill -9 it as soon as `when()`."""
        child = self.start(job)
        self.wait_until(when)
        os.kill(child, signal.SIGKILL)
        status = self.end()
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "it must not have ended by itself"

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        torch.set_num_threads(self.threads)
