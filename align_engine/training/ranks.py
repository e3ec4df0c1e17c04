"""The processes of one run: joined whatever has launched them, and ended together.

    torchrun --nproc_per_node 2 -m align_engine sft ...
    accelerate launch --num_processes 2 -m align_engine sft ...

start a run on two GPUs; torchrun also on two processes of a CPU where there is no GPU (there accelerate's own launcher
starts one process). A rank that fails ends the others with its exit code, and one sentence is printed. A rank that is
killed or frozen ends the others too: each shows every second, in the store of torch's launcher, that it lives. A thread
does so, so that long work (a rollout, an evaluation, tokenising) is life as well. Who shows nothing for
ALIGN_RANKS_TIMEOUT seconds (default 40) is taken for frozen; a process that has ended on the same machine is found at
once. Frozen ones of the same machine are killed: they cannot end themselves.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from align_engine.errors import BadInput, RunFailed

if TYPE_CHECKING:
    from accelerate import Accelerator

JOINING = timedelta(minutes=10)  # between the first rank's start and the last one's


def launched() -> int:
    """Processes that the launcher has started, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def choose_device() -> None:
    """Have accelerate join the processes on a CPU, where there is nothing else.

    Raises:
        BadInput: more processes on this machine than it has GPUs.
    """
    if launched() == 1 or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return
    if not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
        return
    here, devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.accelerator.device_count()
    if here > devices:
        raise BadInput(
            f"{here} processes were launched on a machine with {devices} GPU{'s' if devices > 1 else ''}: launch "
            f"{devices}, or set ACCELERATE_USE_CPU=true"
        )


def check_launcher() -> None:
    """Refuse ways to share a model that accelerate has and this engine has not.

    Raises:
        BadInput: with what does the same.
    """
    from accelerate.utils import parse_flag_from_env

    like = "FSDP2 cuts weights, gradients and the optimiser's state as ZeRO-3 does (recipes/accelerate/fsdp2.yaml)"
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise BadInput(f"accelerate's configuration asks for {name}, which is not served: {like}")
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise BadInput("accelerate's configuration asks for FSDP 1, which is not served: set fsdp_version: 2")


def check(accelerator: Accelerator) -> None:
    """Refuse processes that accelerate has not joined: each would be a run of its own in the same folder."""
    if (joined := accelerator.state.num_processes) != launched():
        raise BadInput(
            f"{launched()} processes were launched, and accelerate joins {joined} on "
            f"{accelerator.device}: start one process, `align ...`, or set ACCELERATE_USE_CPU=true for "
            f"`torchrun --nproc_per_node {launched()} -m align_engine ...`"
        )


def gathered(items: list[Any], accelerator: Accelerator) -> list[Any]:
    """The items of all processes, one process's behind the other's."""
    from accelerate.utils import gather_object

    return gather_object(items) if accelerator.num_processes > 1 else items


class Watch:
    """What a rank shows the others of itself, and sees of them, until `end`.

    Raises:
        BadInput: no launcher has said where the ranks meet. RunFailed: the others do not come.
    """

    def __init__(self) -> None:
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in names if not os.environ.get(name)]:
            raise BadInput(
                f"WORLD_SIZE = {launched()}, but {' and '.join(missing)} not set: launch the processes with "
                f"`torchrun --nproc_per_node {launched()} -m align_engine ...`"
            )
        self.rank = int(os.environ["RANK"])
        limit = _limit()
        self.interval = min(1.0, limit / 10)
        self.limit = round(limit / self.interval)  # in rounds, which stand still while this process is stopped
        self.host = None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0  # of the store; or launcher
        self.peers: list[Peer] = []
        self.round = 0  # exchanges with the store
        self.unheard = 0  # rounds that it has not answered
        self.lost = False  # whether it is gone
        self.ending = threading.Lock()
        try:
            self._join()
        except RuntimeError as error:
            raise RunFailed(f"rank {self.rank} does not reach the others: {str(error).splitlines()[0]}") from error
        for work in (self._exchange, self._judge):
            threading.Thread(target=work, daemon=True).start()

    def _join(self) -> None:
        store, _, world = next(rendezvous("env://", timeout=JOINING))
        self.store = PrefixStore("align", store)
        for name, value in {"life": "0", "left": "", "who": f"{_place()} {os.getpid()} {_born(os.getpid())}"}.items():
            self.store.set(f"{name}/{self.rank}", value)
        others = [rank for rank in range(world) if rank != self.rank]
        self.peers = [Peer(rank, self.store.get(f"who/{rank}").decode()) for rank in others]
        self.keys = [f"{name}/{rank}" for name in ("life", "left") for rank in others]

    def end(self, code: int, sentence: str | None, certain: bool = True) -> None:
        """End this process with `code`, and the others with it where that is not 0.

        Args:
            sentence: why; printed unless another rank has spoken.
            certain: False for an error that may come of another rank's end: such a one is given time to show.
        """
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of a launcher that sees the first process go
        began = self.round
        while not certain and any(not peer.left and peer.changed < began + 2 for peer in self.peers):
            time.sleep(self.interval)  # whoever is gone or has failed is found meanwhile, which ends this process
        with self.ending:
            self._leave(code, sentence)

    def _leave(self, code: int, sentence: str | None) -> None:
        with contextlib.suppress(RuntimeError):  # the store may go at any time
            reached, speaks = not self.lost and self.unheard <= self.limit, bool(sentence)
            if speaks:
                speaks = self.store.add("spoken", 1) == 1 if reached else self._is_first()
            if speaks:
                print(f"align: error: {sentence}", file=sys.stderr, flush=True)
                if reached:
                    self.store.add("failed", code)
                    self._wait(10)  # a launcher ends all that are left when one has ended
            if reached:
                self.store.set(f"left/{self.rank}", "left")
            if self.rank == self.host:  # the store ends with this process
                self._wait(10 if code else self.limit)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _wait(self, rounds: int) -> None:
        """Until the other ranks have left, but no longer than so many rounds."""
        while rounds and any(peer.alive for peer in self.peers):
            time.sleep(self.interval)
            self._look()
            rounds -= 1

    def _is_first(self) -> bool:
        """Whether this is the lowest of the ranks that may speak where the store is gone."""
        return self.rank <= min(
            [peer.rank for peer in self.peers if peer.alive and peer.rank != self.host], default=self.rank
        )

    def _exchange(self) -> None:
        """Show the others that this rank lives, and take note of them."""
        while not self.lost:
            time.sleep(self.interval)
            try:
                self.store.set(f"life/{self.rank}", str(self.round + 1))
                self._look()
                failed = self.store.add("failed", 0)
            except RuntimeError:
                self.lost = True
            else:
                self.round, self.unheard = self.round + 1, 0
                if failed and self.ending.acquire(blocking=False):
                    self._leave(failed, None)

    def _look(self) -> None:
        ended = [peer.ended() for peer in self.peers]  # before what they show is read: who leaves says so first
        shown = self.store.multi_get(self.keys)
        for peer, gone, life, left in zip(self.peers, ended, shown, shown[len(self.peers) :]):
            peer.dead, peer.left = gone and not left, bool(left)
            if life != peer.life:
                peer.life, peer.changed = life, self.round

    def _judge(self) -> None:
        """End this process where another has ended or is frozen."""
        while True:
            time.sleep(self.interval)
            self.unheard += 1
            if found := self._verdict():
                self.end(1, f"{found}: the run ends here; the same command goes on from the last checkpoint")

    def _verdict(self) -> str | None:
        gone = "has ended without an error of its own (killed, or out of memory)"
        silent = f"has shown no life for {self.limit * self.interval:.0f} s (stopped, or out of reach)"
        if self.lost or self.unheard > self.limit:
            for peer in self.peers:
                if peer.rank == self.host:
                    peer.kill()
            host = "the launcher" if self.host is None else f"rank {self.host}"
            return f"{host} {gone if self.lost else silent}"
        for peer in self.peers:
            if peer.dead:
                return f"rank {peer.rank} {gone}"
            if peer.alive and self.round - peer.changed > self.limit:
                peer.kill()
                return f"rank {peer.rank} {silent}"
        return None


class Peer:
    """Another rank, as this one sees it."""

    def __init__(self, rank: int, who: str) -> None:
        self.rank, self.life, self.changed = rank, b"", 0  # what it has shown last, and in which round that was new
        self.left = self.dead = False  # gone as it should be, or otherwise
        place, pid, self.born = who.rsplit(" ", 2)
        self.pid = int(pid) if place == _place() else None  # None: on another machine

    @property
    def alive(self) -> bool:
        """Whether it is expected to show itself."""
        return not (self.left or self.dead)

    def ended(self) -> bool:
        """Whether its process is seen to have ended, on this machine."""
        return self.pid is not None and _born(self.pid) != self.born

    def kill(self) -> None:
        """End its process, if it runs on this machine: one that is stopped cannot do so itself."""
        if self.pid is not None and not self.ended():
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


def _limit() -> float:
    """Seconds without a sign of life that end a run."""
    text = os.environ.get("ALIGN_RANKS_TIMEOUT", "40")
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 0 < limit < 1e6:
        raise BadInput(f"ALIGN_RANKS_TIMEOUT = {text!r} is not a number of seconds above 0")
    return limit


def _born(pid: int) -> str:
    """When a process of this machine has started, in ticks since boot; "ended" where it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "ended"
    return "ended" if fields[0] in ("Z", "X") else fields[19]


def _place() -> str:
    """What processes share that see each other under /proc; of no use to others where there is none."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}-{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"process-{os.getpid()}"
