"""The same Python code in several processes joined by gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PATHS = [str(ROOT / part) for part in (".", "kernels", "tests/helpers")]  # of every Python that a test starts
AROUND = "import pictures, processes\npictures.leave_out()\nexec({code!r})\nprocesses.leave()"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def rank_environment(world: int) -> list[dict[str, str]]:
    """What a launcher sets for each rank."""
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
              "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}  # fmt: skip
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def run_on_two(code: str, *arguments: Any, **environment: str) -> None:
    """As `run_ranks`, for two of them."""
    run_ranks(2, code, *arguments, **environment)


def run_ranks(world: int, code: str, *arguments: Any, **environment: str) -> None:
    """`code` gets the arguments as sys.argv[1:]; all processes must end well. Their group is closed for them."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", AROUND.format(code=code), *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(PATHS)} | rank | environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in rank_environment(world)
    ]  # fmt: skip
    try:
        output = [process.communicate(timeout=240)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0] * world, "\n".join(text[-3000:] for text in output)


def leave() -> None:
    """End this rank, once all have come here: the last statement of its code.

    A worker thread of gloo that still holds the tensors of the last collective needs the GIL to free them. Where the
    interpreter is being torn down it gets none: Python 3.11 ends the thread inside a C++ destructor, and the process
    dies of "terminate called without an active exception". Destroying the group waits for the workers only if nothing
    else holds it, and meshes and sharded models do. So the interpreter is not torn down.
    """
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class Ranks:
    """One interpreter that has imported everything; each run of the command is two forks of it, so that ranks that
    fail, die or freeze cost no import. Nothing tells accelerate to take the CPU. torch reads how much its C++ code logs
    when it is imported; `align` sets that before."""

    CODE = """
import datasets, json, os, peft, sys, transformers.trainer_callback
import align_engine.cli, align_engine.training.ranks, align_engine.run
for line in sys.stdin:
    job, ranks = json.loads(line), []
    for environment in job["ranks"]:
        child = os.fork()
        if not child:
            os.environ.update(environment)
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(job[name], os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
            align_engine.cli.main(job["arguments"])
            os._exit(99)
        ranks.append(child)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]), flush=True)
"""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(PATHS), "TORCH_CPP_LOG_LEVEL": "ERROR"}
        self.process = subprocess.Popen([sys.executable, "-c", self.CODE], text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, env=environment)  # fmt: skip

    def run(self, folder: Path, *arguments: Any, **environment: str) -> tuple[list[int], str, str]:
        """(exit codes of the two ranks, what both printed, what both complained); they write in a folder."""
        assert self.process.stdin and self.process.stdout
        ranks = [
            {name: value for name, value in (rank | environment).items() if name != "ACCELERATE_USE_CPU"}
            for rank in rank_environment(2)
        ]
        out, err = folder / "out.txt", folder / "err.txt"
        job = {"ranks": ranks, "arguments": list(map(str, arguments)), "out": str(out), "err": str(err)}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline()), out.read_text(), err.read_text()

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
