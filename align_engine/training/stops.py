"""Ctrl-C and SIGTERM: the first one ends the step and has a checkpoint written, a second one ends the process."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from align_engine.errors import AlignError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO = 2.0  # seconds in which launchers of several processes hand on the signal that all have had already


class Stopped(AlignError, RuntimeError):
    """A run that was told to stop, and where it stands."""


class StopNow(Exception):
    """Raised at a place from which a run can go on as it is; see `breakable`."""


class _Wish:
    def __init__(self) -> None:
        self.asked = self.breakable = False


WISH = _Wish()


def asked() -> bool:
    """Whether this process has been told to stop."""
    return WISH.asked


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Inside the block SIGTERM is what Ctrl-C is: a KeyboardInterrupt."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handled({signal.SIGTERM: interrupt}):
        yield


@contextlib.contextmanager
def graceful(say: Callable[[str], None]) -> Iterator[None]:
    """Inside the block a first signal is a wish, which `asked` tells, and a second one ends the process.

    Args:
        say: shows a sentence.
    """
    processes, since = int(os.environ.get("WORLD_SIZE", "1")), 0.0

    def first(number: int, frame: FrameType | None) -> None:
        nonlocal since
        if WISH.asked:
            if time.monotonic() - since > ECHO:
                leave(number)
            return
        WISH.asked, since = True, time.monotonic()
        with contextlib.suppress(RuntimeError):  # the signal has come in the middle of another line
            say(
                f"{signal.Signals(number).name}: stopping after this step, with a checkpoint; once more ends it at once"
            )
        if processes == 1:  # the system's own handler also works while a long operation runs
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)

    def leave(number: int) -> None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    WISH.asked = False
    with _handled(dict.fromkeys(SIGNALS, first)):
        try:
            yield
        finally:
            WISH.asked = False


@contextlib.contextmanager
def breakable() -> Iterator[None]:
    """Inside the block `pause` raises StopNow where the process has been told to stop."""
    WISH.breakable = True
    try:
        yield
    finally:
        WISH.breakable = False


def pause() -> None:
    """A place between two pieces of long work.

    Raises:
        StopNow: inside `breakable`, where the process has been told to stop.
    """
    if WISH.asked and WISH.breakable:
        raise StopNow


@contextlib.contextmanager
def _handled(handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    """Signals can be handled in a process's main thread alone; in others this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
