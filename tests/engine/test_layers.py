"""How many files a call passes from the command to the row kernel, and how often `hidden` comes back to one of them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from align_engine.cli import main
from align_kernels import dpo_loss
from align_kernels.backends.cpu import arguments

ROOT = Path(__file__).parents[2]
SOURCES = (ROOT / "align_engine", ROOT / "kernels")
ROWS = ("forward", "exponentials", "backward")  # kernels of the extension that work on rows of logits

pytestmark = pytest.mark.skipif(arguments.MISSING is not None, reason=str(arguments.MISSING))


def frames() -> Iterator[FrameType]:
    """The stack below the caller."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def file_of(frame: FrameType) -> str | None:
    """The file of a frame, None where it is not ours."""
    path = Path(frame.f_code.co_filename)
    return path.relative_to(ROOT).as_posix() if any(map(path.is_relative_to, SOURCES)) else None


class Spy:
    """The extension; who calls its row kernels is written down, the outermost file first."""

    def __init__(self, real: Any) -> None:
        self.real, self.stacks = real, set[tuple[str, ...]]()

    def __getattr__(self, name: str) -> Any:
        if name in ROWS:
            files = [file for frame in frames() if (file := file_of(frame))]
            self.stacks.add(tuple(dict.fromkeys(reversed(files))))
        return getattr(self.real, name)


def test_from_align_dpo_to_the_row_kernel_a_call_passes_nine_files(model, pairs, tmp_path, monkeypatch):
    spy = Spy(arguments._C)
    monkeypatch.setattr(arguments, "_C", spy)
    flags = ["--model_name_or_path", model, "--dataset_name", pairs, "--output_dir", tmp_path / "run"]
    assert main(["dpo", *map(str, flags), "--max_steps", "1", "--impl", "cpu"]) == 0
    first, last = "align_engine/cli.py", "kernels/align_kernels/backends/cpu/__init__.py"
    steps = [stack for stack in spy.stacks if "align_engine/training/engine.py" in stack]
    assert steps and all((stack[0], stack[-1]) == (first, last) for stack in steps)
    for stack in spy.stacks:  # of the steps, of the reference's pass before them, of the loss tried on made-up rows
        assert len(stack) <= 9, "\n".join(stack)


def holds(value: Any, hidden: Tensor) -> bool:
    """Whether a value is hidden, a view of it, or a tuple, list or dict with it."""
    if isinstance(value, Tensor):
        return value.untyped_storage().data_ptr() == hidden.untyped_storage().data_ptr()
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return any(holds(part, hidden) for part in parts)


def test_hidden_comes_back_to_a_file_at_most_twice():
    """Followed from `dpo_loss` to the first call of a backend: hidden stays in a file from where a function of it is
    given the tensor, or gets it back, until one of another file is."""
    hidden, weight = torch.randn(4, 6, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    stays: list[str] = []
    arrived = False

    def follow(frame: FrameType, event: str, value: Any) -> None:
        nonlocal arrived
        file = file_of(frame)
        arrived |= file is not None and "/backends/cpu/" in file
        if file is None or arrived:
            return
        if event == "call":
            given = inspect.getargvalues(frame)
            names = [*given.args, *(name for name in (given.varargs, given.keywords) if name)]
            moved = any(holds(frame.f_locals[name], hidden) for name in names)
        else:
            moved = event == "return" and holds(value, hidden)
            file = next((f for caller in frames() if caller is not frame and (f := file_of(caller))), None)
        if moved and file and stays[-1:] != [file]:
            stays.append(file)

    targets, ref_logps = torch.randint(0, 50, (4, 6)), torch.zeros(4)
    sys.setprofile(follow)
    try:
        dpo_loss(hidden, weight, targets, ref_logps, impl="cpu")
    finally:
        sys.setprofile(None)
    assert arrived and stays[0].endswith("fused/dpo.py") and stays[-1].endswith("schedules/tiles.py")
    assert len(stays) - len(set(stays)) <= 2, "\n".join(stays)
