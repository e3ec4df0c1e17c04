"""Code of the user's by name: files beside other modules of theirs, and errors that say where they are."""

import dataclasses
import pickle
import sys

import pytest
import tiny
from transformers import TrainerCallback

from align_engine.cli import main
from align_engine.errors import BadInput, RunFailed
from align_engine.run import train
from align_engine.training import importing
from align_engine.training.importing import foreign, load_object


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder of the user's, which is the current one."""
    monkeypatch.chdir(tmp_path)
    before, path = set(sys.modules), list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


FILES = {
    "my_helper": "def size(text):\n    return float(len(text))\n",
    "my_late": "def size(text):\n    return 7.0\n",
    "my_rewards": "from my_helper import size\ndef f(text):\n    return size(text)\n"
    "def late(text):\n    from my_late import size\n    return size(text)\n",
    "scores": "from __future__ import annotations\nimport dataclasses, logging\n"
    "@dataclasses.dataclass\nclass Score:\n    value: float = 1.0\ndef f(text):\n    return Score(2.0)\n",
    "rewards": "def f(text):\n    return 3.0\n",
}


def write(project, names):
    for name in names:
        (project / f"{name}.py").write_text(FILES[name])


@pytest.mark.parametrize("spec", ["my_rewards.py:f", "my_rewards:f", "./my_rewards.py:f"])
def test_a_file_or_a_module_of_the_current_folder_imports_what_lies_beside_it(spec, project):
    write(project, ["my_helper", "my_rewards", "my_late"])
    assert load_object(spec, "reward_funcs")("four") == 4.0
    assert load_object(spec.replace(":f", ":late"), "reward_funcs")("four") == 7.0


def test_a_file_elsewhere_imports_what_lies_beside_it(project, monkeypatch):
    write(project, ["my_helper", "my_rewards"])
    (project / "other").mkdir()
    monkeypatch.chdir(project / "other")
    assert load_object(f"{project}/my_rewards.py:f", "reward_funcs")("four") == 4.0


def test_a_file_may_be_called_as_a_module_of_ours_or_of_pythons(project):
    """Classes of such a file are found again by dataclasses and pickle."""
    write(project, ["rewards", "scores"])
    ours, pythons = sys.modules["align_engine.rollouts.rewards"], sys.modules["dataclasses"]
    (project / "json.py").write_text("def f(text):\n    return 5.0\n")
    assert load_object("rewards.py:f", "reward_funcs")("x") == 3.0
    assert load_object("json.py:f", "reward_funcs")("x") == 5.0
    score = load_object("scores.py:f", "reward_funcs")("x")
    assert dataclasses.asdict(score) == {"value": 2.0} and pickle.loads(pickle.dumps(score)) == score
    assert sys.modules["align_engine.rollouts.rewards"] is ours and sys.modules["dataclasses"] is pythons
    assert sys.modules["json"].dumps([1]) == "[1]"


def test_a_file_is_run_once_for_each_of_its_states(project):
    (project / "mine.py").write_text("made = []\ndef f():\n    made.append(1)\n    return len(made)\n")
    assert [load_object("mine.py:f", "reward_funcs")() for _ in range(2)] == [1, 2]
    (project / "mine.py").write_text("def f():\n    return 'new'\n")
    assert load_object("mine.py:f", "reward_funcs")() == "new"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\n\nimport sys\nsys.exit(0)\n", "(mine.py line 4): SystemExit: 0"),
        ("def f(:\n    pass\n", "(mine.py line 1): SyntaxError: invalid syntax"),
        ("\nx = nothing\n", "(mine.py line 2): NameError: name 'nothing' is not defined"),
        ("import no_such_thing\n", "(mine.py line 1): ModuleNotFoundError: No module named 'no_such_thing'"),
        ("import my_broken\n", "(my_broken.py line 3): ZeroDivisionError: division by zero"),
        ("class E(BaseException): pass\nraise E\n", "(mine.py line 2): E: no message"),
    ],
)
@pytest.mark.parametrize("spec", ["mine.py:f", "mine:f"])
def test_an_error_at_import_names_scorer_file_and_line(spec, text, said, project):
    (project / "my_broken.py").write_text("\n\n1 / 0\n")
    (project / "mine.py").write_text(text)
    with pytest.raises(BadInput) as error:
        load_object(spec, "reward_funcs")
    assert str(error.value) == f"reward_funcs: cannot import {spec!r} {said}"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("mine.py", "'mine.py' names no function of the file: say mine.py:NAME; it has f, g, C"),
        ("mine.py:", "'mine.py:' names no function of the file: say mine.py:NAME; it has f, g, C"),
        ("mine.py:h", "mine.py has no 'h'; it has f, g, C"),
        ("nowhere.py:f", "cannot import 'nowhere.py:f': no such file"),
        ("nowhere:f", "cannot import 'nowhere:f': No module named 'nowhere'"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(spec, said, project):
    (project / "mine.py").write_text("def f(): pass\nasync def g(): pass\nclass C: pass\ndef _own(): pass\n")
    with pytest.raises(BadInput) as error:
        load_object(spec, "reward_funcs")
    assert str(error.value) == f"reward_funcs: {said}"


def test_the_command_exits_2_for_a_broken_file_and_1_for_a_function_that_leaves(model, project, capsys):
    rows = tiny.write_rows(project / "prompts.jsonl", tiny.prompt_rows(4))
    flags = dict(model_name_or_path=model, dataset_name=rows, max_steps=1, max_completion_length=2, num_generations=2,
                 per_device_train_batch_size=2)  # fmt: skip
    (project / "mine.py").write_text("import sys\ndef leaves(**_):\n    sys.exit(0)\n")
    (project / "broken.py").write_text("import sys\nsys.exit(0)\n")
    for spec, want, said in (
        ("mine.py", 2, "say mine.py:NAME; it has leaves"),
        ("broken.py:f", 2, "cannot import 'broken.py:f' (broken.py line 2): SystemExit: 0"),
        ("mine.py:leaves", 1, "reward 'leaves' (mine.py line 3): SystemExit: 0"),
    ):
        given = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
        assert main(["grpo", *given, "--output_dir", str(project / "run"), "--reward_funcs", spec]) == want
        complaint = capsys.readouterr().err
        assert f"align: error: {'reward_funcs: ' if want == 2 else ''}" in complaint and said in complaint
        assert "model_name_or_path" not in complaint and (project / "run").exists() == (want == 1)


class Leaves(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        sys.exit(0)


class Spoils(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics, **_):
        metrics.clear()

    def on_log(self, args, state, control, logs, **_):
        logs.clear()


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError


@pytest.mark.parametrize("error", [StopIteration(), StopAsyncIteration(), GeneratorExit(), SystemExit(0), Mute()])
def test_no_error_of_foreign_code_gets_through(error):
    with (
        pytest.raises(RunFailed, match=f"a reward.*{type(error).__name__}: (no message|0)"),
        foreign("a reward", RunFailed),
    ):
        raise error


def test_what_a_callback_raises_is_a_failure_with_its_name(model, completions, tmp_path):
    recipe = tiny.sft(model, completions, tmp_path / "run", max_steps=1)
    with pytest.raises(
        RunFailed, match=r"^callback Leaves.on_step_end \(.*test_importing.py line \d+\): SystemExit: 0$"
    ):
        train("sft", recipe, [Leaves])


def test_a_callback_that_empties_its_numbers_takes_none_from_the_run(model, completions, tmp_path, monkeypatch):
    monkeypatch.setattr("align_engine.reports.report.write_report", lambda *_: None)
    settings = dict(max_steps=2, eval_steps=1, eval_dataset_name=str(completions), load_best_model_at_end=True)
    folder = train("sft", tiny.sft(model, completions, tmp_path / "run", **settings), [Spoils()])
    assert folder.metrics.read_text().count("eval_loss") == 2


def test_what_a_package_imports_from_itself_is_part_of_a_scorer(project, monkeypatch):
    monkeypatch.syspath_prepend(str(project))
    (project / "mypack" / "deep").mkdir(parents=True)
    files = {"score": "from mypack.far import a\nfrom .near import b\ndef f(**_): return [a + b]\n", "__init__": "",
             "far": "a = 1\n", "near": "b = 1\n"}  # fmt: skip
    for name, text in files.items():
        (project / "mypack" / f"{name}.py").write_text(text)
    seen = {importing.fingerprint("mypack.score:f", "reward_funcs")}
    for name in ("far", "near"):
        (project / "mypack" / f"{name}.py").write_text("a = b = 2\n")
        seen.add(importing.fingerprint("mypack.score:f", "reward_funcs"))
    assert len(seen) == 3
