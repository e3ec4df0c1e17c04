"""Two processes of one command: joined on a CPU, and ended together with one sentence."""

import json
import time
from types import SimpleNamespace

import pytest
from processes import run_command

from align_engine.errors import BadInput
from align_engine.training import ranks

TROUBLE = """
import os, signal, time
from transformers import TrainerCallback
from align_engine.errors import BadInput

class Trouble(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        kind, _, rank = os.environ["TROUBLE"].partition(" ")
        if os.environ["RANK"] != rank or state.global_step != 2:
            return
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "frozen":
            os.kill(os.getpid(), signal.SIGSTOP)
        if kind == "busy":
            time.sleep(3)
        if kind == "told":
            os.kill(os.getpid(), signal.SIGTERM)
        if kind == "refused":
            raise BadInput("a file that this machine has not")
        if kind == "broken":
            raise KeyError("a key")
"""
THEN = "the run ends here; the same command goes on from the last checkpoint"
ENDED = "has ended without an error of its own (killed, or out of memory)"


@pytest.fixture
def command(model, completions, tmp_path):
    (tmp_path / "trouble.py").write_text(TROUBLE)
    return ["sft", "--model_name_or_path", model, "--dataset_name", completions, "--output_dir", tmp_path / "run",
            "--max_steps", 3, "--callbacks", f"{tmp_path}/trouble.py:Trouble"]  # fmt: skip


def said_once(complaint, sentence):
    """One sentence, and no stacks of Python or C++."""
    lines = [line for line in complaint.splitlines() if line.startswith("align: error: ")]
    assert len(lines) == 1 and sentence in lines[0], complaint
    assert "Traceback" not in complaint and "frame #" not in complaint


def test_ranks_that_a_launcher_starts_on_a_cpu_are_one_run_and_long_work_of_one_is_not_frozen(command, tmp_path):
    command += ["--per_device_train_batch_size", 4]
    codes, said, complaint = run_command(tmp_path, *command, TROUBLE="busy 1", ALIGN_RANKS_TIMEOUT="2")
    assert codes == [0, 0], complaint
    assert said.count("3 steps of 8 rows (2 processes, cpu") == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["identity"]["rows_per_step"] == 8


@pytest.mark.parametrize(("rank", "codes"), [(0, [-9, 1]), (1, [1, -9])])
def test_a_killed_rank_ends_the_other_at_once(rank, codes, command, tmp_path):
    began = time.monotonic()
    found, _, complaint = run_command(tmp_path, *command, TROUBLE=f"killed {rank}")
    assert found == codes and time.monotonic() - began < 40, "before anything can time out"
    said_once(complaint, f"rank {rank} {ENDED}: {THEN}")


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_that_is_told_to_stop_stops_both_after_the_same_step(rank, command, tmp_path):
    codes, _, complaint = run_command(tmp_path, *command, "--max_steps", 5, TROUBLE=f"told {rank}")
    assert codes == [1, 1]
    said_once(complaint, "stopped after step 3; ")
    assert (tmp_path / "run" / "checkpoint-000003").exists() and not (tmp_path / "run" / "final").exists()


@pytest.mark.parametrize(("rank", "codes"), [(0, [-9, 1]), (1, [1, -9])])
def test_a_frozen_rank_ends_both(rank, codes, command, tmp_path):
    found, _, complaint = run_command(tmp_path, *command, TROUBLE=f"frozen {rank}", ALIGN_RANKS_TIMEOUT="2")
    assert found == codes
    said_once(complaint, f"rank {rank} has shown no life for 2 s (stopped, or out of reach): {THEN}")


@pytest.mark.parametrize(
    ("trouble", "code", "sentence"),
    [
        ("refused", 2, "a file that this machine has not"),
        ("broken", 1, "trouble.py line 22): KeyError: 'a key'"),
    ],
)
def test_an_error_of_one_rank_ends_both_with_its_code_and_one_sentence(trouble, code, sentence, command, tmp_path):
    codes, _, complaint = run_command(tmp_path, *command, TROUBLE=f"{trouble} 1")
    assert codes == [code, code]
    said_once(complaint, sentence)


def test_an_error_of_both_ranks_is_said_once(command, tmp_path):
    codes, _, complaint = run_command(tmp_path, *command, "--learning_rat", 1, TROUBLE="no -1")
    assert codes == [2, 2] and not (tmp_path / "run").exists()
    said_once(complaint, "unknown flag `--learning_rat`; did you mean `--learning_rate`?")


def test_a_frozen_rank_is_found_within_a_minute(monkeypatch):
    monkeypatch.delenv("ALIGN_RANKS_TIMEOUT", raising=False)
    assert ranks._limit() <= 60


def test_processes_without_a_meeting_place_are_refused_with_the_command_that_works(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        BadInput, match=r"RANK and MASTER_ADDR and MASTER_PORT not set: .*`torchrun --nproc_per_node 2 -m"
    ):
        ranks.Watch()


def test_processes_that_accelerate_does_not_join_are_refused(monkeypatch):
    class Alone:
        state, device = SimpleNamespace(num_processes=1), "mps"

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="2 processes were launched, and accelerate joins 1 on mps"):
        ranks.check(Alone())
    monkeypatch.setenv("WORLD_SIZE", "1")
    ranks.check(Alone())
