"""benches/bench_questions.py and what stands around it: its short form, methods that die, comparisons, tables."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import bad_players
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benches"))

import compare  # noqa: E402
import figures  # noqa: E402
import methods  # noqa: E402
import questions  # noqa: E402
import turns  # noqa: E402


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    """The JSON of the short form."""
    out = tmp_path_factory.mktemp("bench") / "bench.json"
    command = [sys.executable, "-m", "pytest", "-q", "benches/bench_questions.py", "--short", "--benchmark-json", out]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no worker's
    done = subprocess.run(command, cwd=ROOT, env=alone | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    return out


def test_the_short_form_has_every_kind_of_question(short):
    run = compare.read(short)
    assert {group.split(", ")[0] for group in run.groups} == set(figures.WHATS)
    for group, found in run.groups.items():
        asked = {*methods.METHODS, methods.TREES if " step" in group else methods.GEMMS}
        assert found.keys() | run.cannot.get(group, {}).keys() == asked, group
        assert {"align_kernels", "eager"} <= found.keys()
        for method, figure in found.items():
            if method == methods.GEMMS:
                assert figure["share_of_gemms"] == 1 and figure["nvd"] == (1 + ("forward" not in group)) * 2 + (
                    2 * ("trained" in group)
                )
            else:
                assert max(figure["errors"].values()) < (1e-2 if "bfloat16" in group else 1e-4), (group, method)
    clamped = run.cannot["dpo, tiny, frozen, dense, float32, clamp 0.1"]
    assert clamped["TRL"] == "CannotRun: it has no clamp"
    assert all(run.cannot[group]["QuACK"] for group in run.groups)
    assert run.about["versions"]["torch"] == torch.__version__ and run.about["threads"] == 1


@pytest.mark.parametrize("clamp", [None, 0.2])
@pytest.mark.parametrize("what", ["gradient", *questions.LOSSES])
def test_the_truth_is_that_of_autograd(what, clamp):
    """In float64, from whole logits; a clamp by hand."""
    question = questions.Question(what, "tiny", 8, trained=True, clamp=clamp)
    b = questions.make(question)
    true = questions.truth(question, b)
    x, w = (t.double().requires_grad_() for t in (b.hidden, b.weight))
    z = x @ w.T
    if clamp is not None:
        z.register_hook(lambda grad: clipped(grad, z, b, clamp))
    kept = b.targets != -100
    logps = z.log_softmax(-1).gather(-1, b.targets.clamp(min=0)[..., None])[..., 0] * kept
    logps.retain_grad()
    value = (logps * b.g).sum() if what == "gradient" else questions.LOSSES[what](logps, doubled(b))
    value.backward()
    torch.testing.assert_close(true.logps, logps.detach())
    torch.testing.assert_close(true.dx, x.grad.flatten(0, 1)[true.rows])
    torch.testing.assert_close(true.dw, w.grad[true.columns])


def doubled(b):
    return b._replace(ref=b.ref.double(), old=b.old.double(), advantages=b.advantages.double(), kl=b.kl.double())


def clipped(grad, z, b, limit):
    """g r with r clipped: g is the gradient of the target's logit over 1 - p of it."""
    onehot = torch.nn.functional.one_hot(b.targets.clamp(min=0), z.shape[-1])
    r = onehot - z.detach().softmax(-1)
    g = (grad * onehot).sum(-1) / (r * onehot).sum(-1)
    return g[..., None] * r.clamp(-limit, limit)


def test_a_method_that_dies_or_hangs_says_so_and_starts_again(monkeypatch):
    player = turns.Player("eager", bad_players.dies)
    for _ in range(2):
        assert player.ask("load")["reason"] == "its process died: SIGABRT (double free or corruption (out))"
    monkeypatch.setattr(turns, "PATIENCE", 0.1)
    player.target = bad_players.hangs
    assert player.ask("load")["reason"] == "no answer within 0 s"
    assert player.process is None


def test_a_race_goes_on_without_the_one_that_died(monkeypatch):
    """One process answers, one dies when it is timed, one cannot from the start."""

    class Scripted:
        def __init__(self, method):
            self.method = method

        def ask(self, order, *given):
            if self.method == "TRL" and order == "time":
                return {"reason": "its process died: SIGSEGV"}
            if self.method == "verl":
                return {"reason": "ModuleNotFoundError: No module named 'verl'"}
            if order == "load":
                return {"errors": {}, "flops": 6}
            return {"seconds": 0.5} | ({"peak_mb": 1.0} if given[0] else {})

        def end(self):
            pass

    question = questions.Question("forward", "tiny", 8)
    monkeypatch.setattr(turns, "players_of", lambda question: ["eager", "TRL", "verl"])
    monkeypatch.setattr(turns, "Player", Scripted)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    found = turns.Race([question], 0.0, short=False).run(question)
    assert found["eager"].seconds == [0.5] * turns.ROUNDS and found["eager"].peak_mb == 1.0
    assert found["TRL"].reason == "its process died: SIGSEGV" and found["verl"].reason.startswith("ModuleNotFound")


def test_rankings_compared(short, tmp_path, capsys, monkeypatch):
    """Another order is found, a slower machine is none, and a method that is gone is named."""
    said = json.loads(short.read_text())
    group = "dpo, tiny, trained, dense, float32"
    one = {b["extra_info"]["method"]: b for b in said["benchmarks"] if b["group"] == group}
    for place, b in enumerate(one.values()):
        b["stats"]["median"] = 2.0**place
    (tmp_path / "old.json").write_text(json.dumps(said))
    slower = copy.deepcopy(said)
    for b in slower["benchmarks"]:
        b["stats"]["median"] *= 3.1
    (tmp_path / "slower.json").write_text(json.dumps(slower))
    one["align_kernels"]["stats"]["median"], one["eager"]["stats"]["median"] = 2.0, 1.0
    said["benchmarks"].remove(one["TRL"])
    said["cannot_run"].append({"group": group, "method": "TRL", "reason": "it is gone"})
    (tmp_path / "new.json").write_text(json.dumps(said))

    def run(new):
        monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path / "old.json"), str(tmp_path / new)])
        return compare.main(), capsys.readouterr().out

    code, out = run("slower.json")
    assert code == 0 and "the same ranking in 10 of 10 groups" in out and "  3.10   1.00" in out
    code, out = run("new.json")
    assert code == 1 and "the same ranking in 9 of 10 groups" in out
    assert out.count("another order: align_kernels was faster than eager, and is slower") == 1
    assert "only in the old run; in the other: it is gone" in out


def test_near_ties_are_no_order():
    assert compare.swapped({"a": 1.0, "b": 1.05}, {"a": 1.0, "b": 0.5}) == []
    assert compare.swapped({"a": 1.0, "b": 1.2}, {"a": 1.0, "b": 0.5}) == [("a", "b")]


def test_tables_of_a_run(short, monkeypatch):
    monkeypatch.setattr(figures, "RESULT", short)
    table = figures.over_ours("dpo")
    run = compare.read(short)
    times = run.groups["dpo, tiny, trained, dense, float32"]
    row = next(line for line in table.splitlines() if line.startswith("| TRL "))
    assert f"{times['TRL']['seconds'] / times['align_kernels']['seconds']:.2f}" in row
    assert "- TRL: CannotRun: it has no clamp (dpo, tiny, frozen, dense, float32, clamp 0.1)" in table
    assert figures.everything().count("<details") == len(run.groups)
