"""The same Python code in several processes joined by gloo."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nursery import shared

AROUND = "import processes\nexec({code!r})\nprocesses.leave()"
COMMAND = """
import os, sys
from align_engine import cli

cli.main(sys.argv[1:])
os._exit(99)
"""  # which ends a rank itself


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
    with TemporaryDirectory() as folder:
        started = [
            shared().start(AROUND.format(code=code), *arguments, out=Path(folder, rank["RANK"]), **rank | environment)
            for rank in rank_environment(world)
        ]
        try:
            codes = [rank.end() for rank in started]
        finally:
            for rank in started:
                rank.stop()
        assert codes == [0] * world, "\n".join(rank.said() for rank in started)


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


def run_command(folder: Path, *arguments: Any, **environment: str) -> tuple[list[int], str, str]:
    """`align` on two ranks: (their exit codes, what both printed, what both complained); they write in a folder.
    Nothing tells accelerate to take the CPU."""
    out, err = folder / "out.txt", folder / "err.txt"
    started = []
    for rank in rank_environment(2):
        del rank["ACCELERATE_USE_CPU"]
        started.append(shared().start(COMMAND, *arguments, out=out, err=err, **rank | environment))
    return [rank.end() for rank in started], out.read_text(), err.read_text()
