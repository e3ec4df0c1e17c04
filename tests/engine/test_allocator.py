"""glibc's malloc in a run on a CPU: tuned once, said, off by a flag, and nothing of the numbers changes."""

import os
import platform
import subprocess
import sys

import pytest
import tiny
from nursery import PATHS
from runs import same_bits

from align_engine import cli, iterate
from align_engine.run import train
from align_engine.training import allocator

GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc")
PROBE = """
import ctypes, torch
from align_engine.training import allocator
class Mallinfo2(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Mallinfo2
def mapped(size):  # more than the heap has free
    before = libc.mallinfo2().hblkhd
    held = torch.empty(size << 20, dtype=torch.uint8)
    return libc.mallinfo2().hblkhd - before >= size << 20
if {huge}:
    allocator.ask_for_huge_pages()
torch.empty(20 << 20, dtype=torch.uint8)  # once it is free, glibc takes blocks of this size from its heap
print(mapped(6))
print(allocator.tune())
print(mapped(12))
"""


@GLIBC
@pytest.mark.parametrize("huge", [True, False])
def test_large_blocks_are_mapped_apart(huge):
    around = {name: value for name, value in os.environ.items() if name != allocator.HUGE_PAGES}
    done = subprocess.run([sys.executable, "-c", PROBE.format(huge=huge)], capture_output=True, text=True, check=True,
                          env=around | {"PYTHONPATH": os.pathsep.join(PATHS)})  # fmt: skip
    before, said, after = done.stdout.splitlines()
    assert (before, after) == ("False", "True")
    assert said.startswith("malloc maps blocks from 1 MiB on apart")
    assert said.endswith("in huge pages" if huge else "THP_MEM_ALLOC_ENABLE=1 was not set before torch")


def test_another_libc_is_said_and_left_alone(monkeypatch):
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", None)
    assert allocator.tune() == "memory is given back as this system's malloc does: tune_malloc is for glibc's"


@GLIBC
def test_a_run_says_it_once_and_ends_in_the_same_bits(model, completions, tmp_path, capsys):
    finals, said = {}, {}
    for on in (True, False):
        finals[on] = train("sft", tiny.sft(model, completions, tmp_path / str(on), tune_malloc=on)).final
        said[on] = capsys.readouterr().out.count("malloc maps blocks")
    assert said == {True: 1, False: 0}
    assert same_bits(finals[True], finals[False])


def test_it_may_change_while_a_run_goes_on(model, completions, tmp_path, capsys):
    train("sft", tiny.sft(model, completions, tmp_path / "run"))
    train("sft", tiny.sft(model, completions, tmp_path / "run", tune_malloc=False))
    assert "finished: nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "expected"), [([], "1"), (["--no-tune_malloc"], None)])
def test_the_command_asks_torch_for_huge_pages(flags, expected, monkeypatch):
    monkeypatch.delenv(allocator.HUGE_PAGES, raising=False)
    found = []

    def noted(recipe):
        found.append(os.environ.get(allocator.HUGE_PAGES))

    monkeypatch.setattr(iterate, "runner", lambda name: noted)
    arguments = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", *flags]
    cli.run("sft", arguments, None)
    assert found == [expected]
    monkeypatch.delenv(allocator.HUGE_PAGES, raising=False)


@pytest.mark.parametrize(("flags", "expected"), [([], ["1", "1"]), (["--no_tune_malloc"], ["1", None])])
def test_a_plugin_finds_huge_pages_asked_for(flags, expected, tmp_path, monkeypatch):
    """Its tensors may be torch's first; the recipe is read after it, and may take the request back."""
    monkeypatch.delenv(allocator.HUGE_PAGES, raising=False)
    monkeypatch.setattr(sys, "found", found := [], raising=False)
    note = f"sys.found.append(os.environ.get({allocator.HUGE_PAGES!r}))"
    (tmp_path / "mine.py").write_text(f"import os\nimport sys\n\n{note}\n")
    monkeypatch.setattr(
        iterate, "runner", lambda name: lambda recipe: found.append(os.environ.get(allocator.HUGE_PAGES))
    )
    arguments = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o", *flags]
    assert cli.main(["--plugin", str(tmp_path / "mine.py"), "sft", *arguments]) == 0
    assert found == expected
    monkeypatch.delenv(allocator.HUGE_PAGES, raising=False)


@GLIBC
def test_the_first_tensor_of_a_plugin_lies_in_huge_pages(tmp_path):
    made = f"torch.empty({allocator.LARGE}, dtype=torch.uint8)"
    (tmp_path / "mine.py").write_text(f"import torch\n\nprint({made}.data_ptr() % 4096)\n")
    around = {name: value for name, value in os.environ.items() if name != allocator.HUGE_PAGES}
    command = [sys.executable, "-m", "align_engine", "--plugin", str(tmp_path / "mine.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True,
                          env=around | {"PYTHONPATH": os.pathsep.join(PATHS)})  # fmt: skip
    assert done.stdout.splitlines()[0] == "0"


def test_what_the_environment_says_stays(monkeypatch):
    monkeypatch.setenv(allocator.HUGE_PAGES, "0")
    allocator.ask_for_huge_pages()
    assert os.environ[allocator.HUGE_PAGES] == "0"
