"""benches/gpu/survey.py on the CPU: its order in dry mode, its budget, and what it does with parts that break."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = ROOT / "benches" / "gpu"


@pytest.fixture
def survey(monkeypatch):
    """The module, with all that its processes import on the path."""
    monkeypatch.setattr(
        sys,
        "path",
        [str(CODE), *(str(ROOT / folder) for folder in ("benches", "", "kernels", "tests/helpers")), *sys.path],
    )
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setitem(sys.modules, "survey", None)
    del sys.modules["survey"]
    return importlib.import_module("survey")


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "survey.jsonl").read_text().splitlines()]


def command(*args: str) -> subprocess.CompletedProcess:
    env = os.environ | dict(OMP_NUM_THREADS="1")
    call = [sys.executable, str(CODE / "survey.py"), *args]
    return subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_a_dry_run_of_some_parts(tmp_path: Path):
    forward, late = "forward, Qwen2.5-7B, dense, bfloat16", "gradient, Qwen2.5-7B, trained, dense, bfloat16"
    dpo = "dpo, Qwen2.5-0.5B, trained, dense, bfloat16, clamp 0.1"
    parts = ["right", "gemms", forward, late, dpo]
    done = command("--dry", "--out", str(tmp_path), "--parts", *parts)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = lines(tmp_path)
    assert list(dict.fromkeys(row["part"] for row in rows)) == parts
    measured = [row for row in rows if row["what"] != "the whole part"]
    for row in measured:
        assert row["device"].startswith("CPU, dry run") and row["versions"].startswith("torch ") and row["date"], row
        assert row["command"].endswith(" ".join(["--parts", *parts]))
    right = [row for row in measured if row["unit"] == "of the allowed error"]
    assert len(right) == 2 * 3 * 4 * 2 - 2 * 3 and all(0 <= row["value"] <= 1 for row in right), right
    found = {(row["part"], row["what"]): row for row in measured}
    for impl in ("triton", "torch", "cpu"):
        assert found[forward, f"align_kernels, {impl}"]["error of log p"] < 1e-5
        for part in (late, dpo):
            row = found[part, f"align_kernels, {impl}"]
            assert row["value"] > 0 and row["error of dX"] < 1e-5 and row["error of dW"] < 1e-5, row
    assert found[late, "align_kernels, triton"]["predicted"] == 41.6
    assert found[dpo, "TRL"]["note"] == "CannotRun: it has no clamp"  # the reason stands in its line
    table = (tmp_path / "survey.md").read_text()
    assert all(f"\n## {part}\n" in table for part in parts) and table in done.stdout
    assert len(list(tmp_path.iterdir())) <= 8


def test_a_dry_run_of_the_epilogue(tmp_path: Path):
    """Its emulation stands for the kernel, which its first line says, and every line has its prediction."""
    done = command("--dry", "--out", str(tmp_path), "--parts", "epilogue", "--carry", str(tmp_path / "nothing"))
    assert done.returncode == 0, done.stderr[-3000:]
    first, *rows = [row for row in lines(tmp_path) if row["what"] != "the whole part"]
    assert first["what"] == "launches" and first["note"].startswith("its emulation: no figure below is the kernel's; ")
    assert not [row for row in rows if "note" in row], rows
    right = [row for row in rows if row["unit"] == "of the allowed error"]
    assert len(right) == 1 + 1 + 2 + 2 and all(0 <= row["value"] <= 1 for row in right), right
    raced = {row["what"]: row["predicted"] for row in rows if row["unit"] == "ms"}
    modes = dict(forward=12.4, frozen=25, trained=37, late=38.5, peaked=17)
    assert {what: ms for what, ms in raced.items() if "epilogue" in what} == {
        f"{m}, epilogue": x for m, x in modes.items()
    }
    assert all(raced[f"{mode}, row kernel"] for mode in modes)


def test_parts_bear_the_names_of_the_questions(survey):
    """Those of benches/questions.py, but for the rows, which are others on a GPU; each once."""
    asked = importlib.import_module("questions").Question
    parts = [part for part in survey.PARTS if part.call == "heads:race"]
    assert all(part.name.startswith(asked(**part.options).name) for part in parts) and len(parts) > 15
    assert len({part.name for part in survey.PARTS}) == len(survey.PARTS)


def run(survey, folder: Path, *calls: str) -> list[dict]:
    parts = [survey.Part(call, f"survey_parts:{call}", 5.0, 0.0) for call in calls]
    survey.Survey(folder, 200.0, True, "test", parts).run()
    survey.table(folder)
    return [row for row in lines(folder) if row["what"] != "the whole part"]


def said(rows: list[dict], part: str) -> list[tuple]:
    return [(row["what"], row.get("value"), row.get("note", "")) for row in rows if row["part"] == part]


def test_a_part_that_breaks_ends_alone(survey, tmp_path: Path):
    rows = run(survey, tmp_path, "fails", "dies", "loses_the_device", "well")
    assert said(rows, "fails") == [("before", 1.0, ""), (None, None, "ValueError: no such head")]
    for part, reason in (
        ("dies", "the process died (11)"),
        ("loses_the_device", "the device is lost: ValueError: the kernel"),
    ):
        assert said(rows, part) == [
            ("first", 1.0, ""),
            ("second", None, reason),
            ("first", 1.0, ""),  # it runs again without its culprit
            ("second", None, "ended its process, not tried again"),
            ("third", 1.0, ""),
        ]
    assert said(rows, "well") == [("first", 1.0, ""), ("second", 1.0, "")]


def test_what_hangs_is_ended_and_the_budget_kept(survey, tmp_path: Path):
    parts = [
        survey.Part("too long", "survey_parts:well", 1.0, 1e3),
        survey.Part("hangs", "survey_parts:hangs", 2 / survey.DRY_PATIENCE, 0.0),
        survey.Part("hangs again", "survey_parts:hangs", 1e3, 0.0),
        survey.Part("never", "survey_parts:well", 1.0, 0.1),
    ]
    made = survey.Survey(tmp_path, 120.0, True, "test", parts)
    note = made.note

    def watch(part, text, what=None, **more):
        """From here on three seconds are left."""
        note(part, text, what, **more)
        if part.name == "hangs" and what == "the whole part" and len(said(lines(tmp_path), "hangs")) > 5:
            made.until = time.monotonic() + 3.0

    made.note = watch
    made.run()
    assert time.monotonic() - made.until < 2.0
    rows = [row for row in lines(tmp_path) if row["what"] != "the whole part"]
    assert said(rows, "too long")[0][2].startswith("left out: takes about 1000 s")
    assert said(rows, "hangs") == [
        ("first", 1.0, ""),
        ("second", None, "ended after 2 s"),
        ("first", 1.0, ""),
        ("second", None, "ended its process, not tried again"),
        ("third", 1.0, ""),
    ]
    assert said(rows, "hangs again")[:2] == [("first", 1.0, ""), ("second", None, "ended after 3 s")]
    assert said(rows, "never")[0][2].startswith("left out")


def test_the_tests_for_a_gpu_need_torch_alone(survey):
    checks = importlib.import_module("checks")
    absent = (
        "align_engine datasets httpx2 tenacity tyro omegaconf trl liger_kernel cut_cross_entropy transformers".split()
    )
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({absent})); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    )
    call = [sys.executable, "-c", program, *checks.FLAGS, "--collect-only", *checks.TESTS]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert all(name in done.stdout for name in checks.TESTS)


def test_what_ncu_says_is_read(survey):
    checks = importlib.import_module("checks")
    text = (
        '==PROF== Connected\n"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","7","forward_kernel(float *, int)","gpu__time_duration.sum","ns","1,234"\n'
        '"0","7","forward_kernel(float *, int)","launch__registers_per_thread","register/thread","69"\n'
        '"1","7","forward_kernel(float *, int)","gpu__time_duration.sum","ns","99"\n'
    )
    assert checks.profiled(text) == {"forward_kernel": {"duration": 1234.0, "registers": 69.0}}


def test_what_pytest_says_is_read(survey):
    outcome = importlib.import_module("checks").outcome
    assert outcome("...\n==== 2 failed, 31 passed, 1 error in 4.20s ====\n") == {"failed": 2, "passed": 31, "error": 1}
    assert outcome("7 passed in 70.01s (0:01:10)\n") == {"passed": 7}
    assert outcome("7 passed\nstopped after 3 s\n") == {}


def test_without_a_gpu_nothing_is_measured(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, str(CODE / "survey.py"), "--out", str(tmp_path)],
        env=os.environ | dict(PATH=str(tmp_path)), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "no GPU on this machine: pass --dry" in done.stderr
    assert not list(tmp_path.iterdir())
