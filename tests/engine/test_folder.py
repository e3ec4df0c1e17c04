"""What a run may write over and delete: its own files, and nothing else."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiny
from runs import cut_off, same_bits

from align_engine import inputs
from align_engine.errors import BadInput, RunFailed
from align_engine.iterate import iterate
from align_engine.recipe import GrpoRecipe, IterateRecipe
from align_engine.rollouts.server_weights import ServerWeights
from align_engine.run import train
from align_engine.training import metrics
from align_engine.training.checkpoint import LIST_LOCK, LOCK, RECORD, RunFolder
from align_engine.training.stops import Stopped

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of peft


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def begun(tmp_path):
    folder = RunFolder(tmp_path / "run", {"seed": 1})
    folder.begin({}, overwrite=False)
    return folder


def write(folder: RunFolder, name: str, **files: str) -> None:
    """A folder of this name with these files in it, as the engine writes one."""
    with folder.written(name) as path:
        path.mkdir()
        for file, text in files.items():
            (path / file).write_text(text)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_without_a_record_is_refused(overwrite, tmp_path):
    for name in ("final/model.bin", "plots/mine.png", "checkpoint-000001/weights", "metrics.jsonl"):
        path = tmp_path / "home" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(BadInput, match=r"no run of ours \(checkpoint-000001, final, metrics\.jsonl, \.\.\.\)"):
        RunFolder(tmp_path / "home", {}).finished(overwrite)
    assert contents(tmp_path) == before


def test_overwriting_deletes_what_is_on_the_list_and_nothing_else(begun):
    write(begun, "final", model="weights")
    write(begun, "checkpoint-000002", a="1", b="2")
    inner = begun.adopt("round-1/train")
    inner.begin({}, overwrite=False)
    write(inner, "final", model="weights")
    mine = {"my.tmp": b"1", "thesis.txt": b"2", "checkpoint-best/model": b"3", "final_old/model": b"4"}
    for name, data in mine.items():
        (begun.path / name).parent.mkdir(exist_ok=True)
        (begun.path / name).write_bytes(data)
    again = RunFolder(begun.path, {"seed": 2})
    assert not again.finished(overwrite=True)
    again.begin({}, overwrite=True)
    assert {name: data for name, data in contents(begun.path).items() if name not in (RECORD, LIST_LOCK)} == mine
    assert not (begun.path / "round-1").exists() and not (begun.path / "final").exists()


def test_overwriting_refuses_to_delete_what_people_put_into_the_runs_folders(begun):
    write(begun, "final", model="weights")
    (begun.path / "final" / "notes.txt").write_text("mine")
    before = contents(begun.path)
    with pytest.raises(BadInput, match=r"final/notes\.txt, which this run did not write: move it away first"):
        begun.finished(overwrite=True)
    assert contents(begun.path) == before
    (begun.path / "final" / "notes.txt").unlink()
    begun.write_rows("marks/rollout-000000.jsonl", [{"completion": "a", "score": None}])
    assert not begun.finished(overwrite=True)
    (begun.path / "marks/rollout-000000.jsonl").write_text('{"completion": "a", "score": 3}\n')
    with pytest.raises(BadInput, match="where people have put marks"):
        begun.finished(overwrite=True)


def test_somebody_elses_file_at_a_place_of_the_run_stays(begun):
    (begun.path / "final").mkdir()
    (begun.path / "final" / "model.bin").write_text("mine")
    with pytest.raises(RunFailed, match=r"final/model\.bin is not this run's.*move it away"):
        write(begun, "final", model="weights")
    with pytest.raises(BadInput, match=r"final/model\.bin is not this run's"):
        begun.begin({}, overwrite=False)
    assert contents(begun.path / "final") == {"model.bin": b"mine"}


def test_checkpoints_go_by_number_and_foreign_names_are_ignored(begun):
    for step in (2, 999_999, 1_000_000, 10_000_000):
        write(begun, begun.checkpoint(step).name, weights=str(step))
    for name in ("checkpoint-best", "checkpoint-000003", "checkpoint-99999999"):
        shutil.copytree(begun.checkpoint(2), begun.path / name)
    (begun.path / "checkpoint-x.txt").write_text("mine")
    steps = [2, 999_999, 1_000_000, 10_000_000]
    assert begun.checkpoints() == [begun.checkpoint(step) for step in steps]
    (begun.checkpoint(999_999) / "notes.txt").write_text("mine")
    begun.keep(1, best=2)
    assert begun.checkpoints() == [begun.checkpoint(step) for step in (2, 999_999, 10_000_000)]
    assert (begun.path / "checkpoint-best/weights").exists() and (begun.path / "checkpoint-000003/weights").exists()
    begun.keep(1)
    assert (begun.checkpoint(999_999) / "notes.txt").exists() and not begun.checkpoint(2).exists()


def test_a_checkpoint_moved_to_another_disk_goes_with_its_link(begun, tmp_path):
    for step in (1, 2, 3):
        write(begun, begun.checkpoint(step).name, weights=str(step))
    for step in (1, 2):
        shutil.move(begun.checkpoint(step), tmp_path / f"moved-{step}")
        begun.checkpoint(step).symlink_to(tmp_path / f"moved-{step}")
    (tmp_path / "moved-2" / "weights").write_text("mine")  # what lies there now is not this run's
    begun.keep(1)
    assert not os.path.lexists(begun.checkpoint(1)) and not (tmp_path / "moved-1").exists()
    assert (begun.checkpoint(2) / "weights").read_text() == "mine" and begun.checkpoint(2).is_symlink()
    assert begun.checkpoints() == [begun.checkpoint(2), begun.checkpoint(3)]


def test_a_linked_final_is_followed(begun, tmp_path):
    (tmp_path / "disk").mkdir()
    (begun.path / "final").symlink_to(tmp_path / "disk" / "model")
    write(begun, "final", model="first")
    write(begun, "final", model="second")
    assert (tmp_path / "disk" / "model" / "model").read_text() == "second" and (begun.path / "final").is_symlink()
    begun.begin({}, overwrite=True)
    assert not (tmp_path / "disk" / "model" / "model").exists() and (begun.path / "final").is_symlink()


def test_an_error_of_the_disk_is_told_as_it_is(begun, tmp_path):
    (begun.path / "final").symlink_to(tmp_path / "file" / "model")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(RunFailed, match=r"cannot write .*final: Not a directory\. .*Mend that and run"):
        write(begun, "final", model="weights")


def test_every_byte_is_on_the_disk_before_the_name_is(begun, monkeypatch):
    calls, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: (calls.append(os.readlink(f"/proc/self/fd/{handle}")), sync(handle))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(f"{a} -> {b}"), replace(a, b)))
    write(begun, "final", model="weights")
    side, target = str(begun.side("final")), str(begun.final)
    named = calls.index(f"{side} -> {target}")
    assert calls.index(f"{side}/model") < named and calls.index(side) < named
    assert str(begun.path) in calls[named:]


def test_what_bore_the_name_goes_after_the_new_one_is_there(begun, monkeypatch):
    from align_engine.training import checkpoint

    write(begun, "final", model="first")
    remove = checkpoint.remove

    def watched(path):
        if path.is_dir() and ".old" in path.name:
            assert (begun.final / "model").read_text() == "second"
        remove(path)

    monkeypatch.setattr(checkpoint, "remove", watched)
    write(begun, "final", model="second")


def test_a_second_process_is_refused_while_the_first_one_works(begun):
    code = "import sys; from align_engine.training.checkpoint import RunFolder\n"
    code += "with RunFolder(sys.argv[1], {}).locked(): pass"
    with begun.locked():
        found = subprocess.run([sys.executable, "-c", code, begun.path], capture_output=True, text=True)
    assert "BadInput" in found.stderr and "is in use by another run" in found.stderr
    with begun.locked():
        assert (begun.path / RECORD).exists()


def test_a_refused_run_leaves_no_folder_behind(tmp_path):
    with pytest.raises(BadInput), RunFolder(tmp_path / "a" / "run", {}).locked():
        raise BadInput("no such model")
    assert not (tmp_path / "a" / "run").exists()


DAMAGE = {
    "a record that is no JSON": (RECORD, b"{", r"run\.json is not a record of a run"),
    "a record of something else": (RECORD, b'{"mine": 1}', r"run\.json is not a record of a run"),
    "metrics that are no JSON": ("metrics.jsonl", b"nonsense\n{}\n", r"metrics\.jsonl line 1 is no record of a step"),
    "metrics that are no text": ("metrics.jsonl", b"\xff\xfe\n\n", r"metrics\.jsonl line 1 is no record of a step"),
    "a checkpoint cut short": ("checkpoint-000002/state.safetensors", b"x", r"Delete .*goes on from checkpoint-000001"),
    "a cut file that still reads": ("checkpoint-000002/state.json", b"{}", r"state\.json has 2 bytes, but \d+ were"),
    "a checkpoint of other bytes": ("checkpoint-000002/state.json", None, r"000002 is damaged: .*Delete that folder"),
    "no random states": ("checkpoint-000002/random-0.json", "gone", r"random-0\.json is missing\. Delete that folder"),
    "unreadable random states": ("checkpoint-000002/random-0.json", None, r"000002 is damaged: .*Delete that folder"),
}  # fmt: skip


@pytest.fixture(scope="module")
def stopped(model, tmp_path_factory):
    """A run that was cut off after its second step."""
    folder = tmp_path_factory.mktemp("stopped")
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.sft_rows(8))
    cut_off("sft", tiny.sft(model, rows, folder / "run", save_steps=1), step=2)
    return folder


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_told_by_the_file_and_the_way_out(case, stopped, model, tmp_path):
    name, data, sentence = DAMAGE[case]
    shutil.copytree(stopped / "run", tmp_path / "run")
    path = tmp_path / "run" / name
    if data == "gone":
        path.unlink()
    else:
        path.write_bytes(b"?" * path.stat().st_size if data is None else data)
    before = contents(tmp_path / "run")
    with pytest.raises(BadInput, match=sentence):
        train("sft", tiny.sft(model, stopped / "rows.jsonl", tmp_path / "run", save_steps=1))
    after = contents(tmp_path / "run")
    assert {name: after[name] for name in before if name not in (RECORD, "recipe.yaml")} == {
        name: data for name, data in before.items() if name not in (RECORD, "recipe.yaml")
    }


def test_no_checkpoint_holds_a_pickle_that_is_run(stopped, model, tmp_path):
    shutil.copytree(stopped / "run", tmp_path / "run")
    place = tmp_path / "run" / "checkpoint-000002"
    assert not list(place.glob("*.pkl"))
    bomb = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    for name in ("custom_checkpoint_0.pkl", "random_states_0.pkl", "scheduler.bin", "sampler.bin"):
        (place / name).write_bytes(bomb)
    recipe = tiny.sft(model, stopped / "rows.jsonl", tmp_path / "run", save_steps=1)
    train("sft", recipe)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_does_not_grow_with_what_was_logged(model, completions, tmp_path):
    folder = train("sft", tiny.sft(model, completions, tmp_path / "run", max_steps=40, save_steps=20))
    first, last = ((folder.checkpoint(step) / "state.json").stat().st_size for step in (20, 40))
    assert len(metrics.read(folder.metrics)) == 40
    assert abs(last - first) < 40  # digits


def test_callbacks_see_the_whole_log_after_a_resume(stopped, model, tmp_path):
    from transformers import TrainerCallback

    class Seen(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            self.steps = [entry["step"] for entry in state.log_history]

    shutil.copytree(stopped / "run", tmp_path / "run")
    seen = Seen()
    train("sft", tiny.sft(model, stopped / "rows.jsonl", tmp_path / "run", save_steps=1), callbacks=[seen])
    assert seen.steps == [1, 2]


def test_what_is_logged_and_kept_may_change_on_the_way(stopped, model, tmp_path):
    rows = stopped / "rows.jsonl"
    whole = train("sft", tiny.sft(model, rows, tmp_path / "whole"))
    shutil.copytree(stopped / "run", tmp_path / "run")
    other = dict(save_steps=2, logging_steps=3, save_total_limit=1, dataset_num_proc=1)
    assert same_bits(whole.final, train("sft", tiny.sft(model, rows, tmp_path / "run", **other)).final)


def test_a_finished_run_goes_on_where_its_schedule_allows_it(model, completions, tmp_path):
    steady = dict(lr_scheduler_type="constant")
    whole = train("sft", tiny.sft(model, completions, tmp_path / "whole", max_steps=5, **steady))
    train("sft", tiny.sft(model, completions, tmp_path / "run", max_steps=2, **steady))
    folder = train("sft", tiny.sft(model, completions, tmp_path / "run", max_steps=5, **steady))
    assert same_bits(whole.final, folder.final)
    assert [row["step"] for row in metrics.read(folder.metrics)] == [1, 2, 3, 4, 5]
    with pytest.raises(BadInput, match="of which 5 are done already: more than 4"):
        train("sft", tiny.sft(model, completions, tmp_path / "run", max_steps=4, **steady))
    train("sft", tiny.sft(model, completions, tmp_path / "falling", max_steps=2))
    with pytest.raises(BadInput, match=r"'linear' depend.*start another run from its model .*falling/final"):
        train("sft", tiny.sft(model, completions, tmp_path / "falling", max_steps=5))


CHANGES = {
    "the model": ("sft", {}, lambda at: tiny.write_model(at["model"], seed=7), "files of model_name_or_path"),
    "the base of LoRA": ("sft", {"use_peft": True}, lambda at: tiny.write_model(at["model"], seed=7), "files of model"),
    "the reference": ("dpo", {"ref_model_name_or_path": "ref"}, lambda at: tiny.write_model(at["ref"], seed=7),
        "files of ref_model"),
    "the data": ("dpo", {}, lambda at: tiny.write_rows(at["rows"], tiny.preference_rows(8, seed=3)), "data"),
}  # fmt: skip


def test_code_that_a_run_loads_is_part_of_it(model, tmp_path):
    sources = {
        "rewards.py": "from helper import f\n",
        "helper.py": "def f(completions, **_): return [0.0] * len(completions)\n",
        "watch.py": "from transformers import TrainerCallback\nclass W(TrainerCallback): pass\n",
        "apart.py": "x = 1\n",
    }
    for name, text in sources.items():
        (tmp_path / name).write_text(text)
    code = dict(reward_funcs=[f"{tmp_path / 'rewards.py'}:f"], callbacks=[f"{tmp_path / 'watch.py'}:W"])
    recipe = tiny.online(GrpoRecipe, model, tmp_path / "rows.jsonl", tmp_path / "run", **code)
    before = inputs.facts(recipe)
    for name, field in {"rewards.py": "reward_funcs", "helper.py": "reward_funcs", "watch.py": "callbacks"}.items():
        (tmp_path / name).write_text(sources[name] + "y = 2\n")
        after = inputs.facts(recipe)
        assert [key for key in before if before[key] != after[key]] == [f"files of {field}"]
        (tmp_path / name).write_text(sources[name])
    (tmp_path / "apart.py").write_text("x = 2\n")
    assert inputs.facts(recipe) == before


@pytest.mark.parametrize(("kind", "call"), [(GrpoRecipe, partial(train, "grpo")), (IterateRecipe, iterate)])
def test_a_column_that_scorers_read_is_part_of_the_run(kind, call, model, tmp_path):
    rows, path = tiny.prompt_rows(8), tmp_path / "prompts.jsonl"
    tiny.write_rows(path, rows)
    settings = dict(max_steps=2, per_device_train_batch_size=4)
    recipe = tiny.online(kind, model, path, tmp_path / "run", **settings)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("align_engine.rollouts.generate.stops.pause", Mock(side_effect=KeyboardInterrupt))
        call(recipe)
    tiny.write_rows(path, [rows[0] | {"wanted": "w59"}, *rows[1:]])
    with pytest.raises(BadInput, match=r"another run \(data"):
        call(recipe)


@pytest.mark.parametrize("case", CHANGES)
def test_what_changed_at_the_same_path_is_another_run(case, tmp_path):
    name, settings, change, named = CHANGES[case]
    at = {"model": tiny.write_model(tmp_path / "model"), "ref": tiny.write_model(tmp_path / "ref", seed=1)}
    at["rows"] = tiny.write_rows(tmp_path / "rows.jsonl", tiny.OFFLINE[name][1](8))
    settings = {key: str(at[value]) if value in at else value for key, value in settings.items()}
    recipe = tiny.offline(name, at["model"], at["rows"], tmp_path / "run", save_steps=1, **settings)
    cut_off(name, recipe, step=1)
    change(at)
    with pytest.raises(BadInput, match=rf"another run \({named}"):
        train(name, recipe)


def test_no_output_is_or_holds_an_input(model, completions, tmp_path):
    folder = tmp_path / "all"
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.sft_rows(4))
    (folder / "data").mkdir(parents=True)
    shutil.copytree(model, folder / "model")
    rewards = folder / "rewards.py"
    rewards.write_text("def f(completions, **_): return [0.0 for _ in completions]\n")
    (tmp_path / "link").symlink_to(folder)
    before = contents(tmp_path)
    for out in (folder, folder / "model", tmp_path / "link", tmp_path):
        with pytest.raises(BadInput, match=r"output_dir = .* is or holds model_name_or_path"):
            train("sft", tiny.sft(folder / "model", data, out, overwrite=True))
    with pytest.raises(BadInput, match="is or holds dataset_name"):
        train("sft", tiny.sft(model, data, tmp_path, overwrite=True))
    with pytest.raises(BadInput, match="lies inside the data"):
        inputs.check_outputs(tiny.sft(model, folder / "data", folder / "data" / "run"))
    online = dict(reward_funcs=[f"{rewards}:f"], server_base_url="http://127.0.0.1:9")
    with pytest.raises(BadInput, match="is or holds reward_funcs"):
        inputs.check_outputs(tiny.online(GrpoRecipe, model, data, folder, **online))
    for policy, served, named in (
        (folder / "model", folder / "model", r"server_weights = .* is or holds model_name_or_path"),
        (model, tmp_path / "o" / "w", r"output_dir = .* is or holds server_weights"),
    ):
        with pytest.raises(BadInput, match=named):
            recipe = tiny.online(GrpoRecipe, policy, data, tmp_path / "o", server_weights=str(served), **online)
            inputs.check_outputs(recipe)
    assert contents(tmp_path) == before


def test_server_weights_replace_a_copy_of_the_model_or_what_they_wrote(model, tmp_path):
    other = tiny.write_model(tmp_path / "other", seed=5)
    weights = ServerWeights(str(tmp_path / "served"), str(model))
    shutil.copytree(model, tmp_path / "served")
    weights.check()
    weights.copy(other)
    weights.check()
    assert same_bits(tmp_path / "served", other)
    weights.copy(model)
    assert same_bits(tmp_path / "served", model)
    for name in ("notes.txt", "sub/notes.txt"):
        path = tmp_path / "served" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        with pytest.raises(BadInput, match=f"holds '{name.partition('/')[0]}'"):
            weights.check()
        with pytest.raises(RunFailed, match="is not this run's: move it away"):
            weights.copy(other)
        assert path.read_text() == "mine" and same_bits(tmp_path / "served", model)
        shutil.rmtree(path.parent) if "/" in name else path.unlink()
    with pytest.raises(BadInput, match="neither this program's nor of a copy"):
        ServerWeights(str(other), str(model)).check()


def test_the_record_holds_what_the_folder_holds(stopped):
    files = json.loads((stopped / "run" / RECORD).read_text())["files"]
    there = {name for name in contents(stopped / "run") if name not in (RECORD, LOCK, LIST_LOCK)}
    assert set(files) == there


def test_links_lead_to_inputs_too(begun, model, completions, tmp_path):
    place = tmp_path / "disk" / "model"
    place.parent.mkdir()
    (begun.path / "final").symlink_to(place)
    write(begun, "final", model="weights")
    shutil.copytree(model, place, dirs_exist_ok=True)
    with pytest.raises(BadInput, match=r"output_dir = .* is or holds model_name_or_path"):
        inputs.check_outputs(tiny.sft(place, completions, begun.path, overwrite=True))
    (tmp_path / "linked").mkdir()
    write(begun, "checkpoint-000001", config="{}")
    (tmp_path / "linked" / "config.json").symlink_to(begun.path / "checkpoint-000001" / "config")
    with pytest.raises(BadInput, match=r"output_dir = .* is or holds model_name_or_path"):
        inputs.check_outputs(tiny.sft(tmp_path / "linked", completions, begun.path, overwrite=True))


def test_a_link_in_place_of_an_input_or_an_output_is_seen_through(model, completions, tmp_path):
    shutil.copytree(model, tmp_path / "work" / "model")
    (tmp_path / "alias").symlink_to(tmp_path / "work" / "model")
    (tmp_path / "there").symlink_to(tmp_path / "work")
    for policy, out in (("alias", "work"), ("alias", "there"), ("work/model", "there"), ("there/model", "work")):
        with pytest.raises(BadInput, match=r"output_dir = .* is or holds model_name_or_path"):
            inputs.check_outputs(tiny.sft(tmp_path / policy, completions, tmp_path / out, overwrite=True))


def test_the_base_of_adapters_is_an_input(begun, model, completions, tmp_path):
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    (adapters / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(begun.path / "final")}))
    shutil.copytree(model, begun.path / "final")
    with pytest.raises(BadInput, match=r"output_dir = .* is or holds model_name_or_path"):
        inputs.check_outputs(tiny.sft(adapters, completions, begun.path, overwrite=True))


def test_a_link_that_leads_to_something_else_now_is_not_followed(begun, tmp_path):
    write(begun, "final", model="ours")
    shutil.move(begun.path / "final", tmp_path / "moved")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model").write_text("mine")
    (begun.path / "final").symlink_to(tmp_path / "mine")
    with pytest.raises(BadInput, match="final, which this run did not write"):
        begun.finished(overwrite=True)
    with pytest.raises(RunFailed, match="final is not this run's"):
        write(begun, "final", model="new")
    assert (tmp_path / "mine" / "model").read_text() == "mine"
    (begun.path / "final").unlink()
    (begun.path / "final").symlink_to(tmp_path / "moved")
    write(begun, "final", model="new")
    assert (tmp_path / "moved" / "model").read_text() == "new"


@pytest.mark.parametrize("name", ["final/../../mine", "../mine", "{}/mine"])
def test_a_list_that_names_what_lies_outside_is_no_list(name, begun, tmp_path):
    (tmp_path / "mine").write_text("mine")
    write(begun, "final", model="ours")
    record = json.loads((begun.path / RECORD).read_text())
    record["files"][name.format(tmp_path)] = 4
    (begun.path / RECORD).write_text(json.dumps(record))
    with pytest.raises(BadInput, match="not a record of a run"):
        begun.finished(overwrite=True)
    with pytest.raises(BadInput, match="not a record of a run"):
        begun.delete()
    assert (tmp_path / "mine").exists()


def test_the_folder_stays_where_it_is_when_the_current_one_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = RunFolder("run", {})
    folder.begin({}, overwrite=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write(folder, "final", model="weights")
    assert (tmp_path / "run" / "final" / "model").exists() and not list((tmp_path / "elsewhere").iterdir())


def test_ranks_that_write_at_one_time_are_all_on_the_list(begun):
    """As ranks of `iterate` keep their answers; in forks, for threads would share a lock."""
    children = []
    for rank in range(3):
        children.append(os.fork())
        if not children[-1]:
            code = 1
            with contextlib.suppress(Exception):
                for number in range(40):
                    begun.write_rows(f"answers/{rank}-{number}.jsonl", [{"ids": [rank]}])
                code = 0
            os._exit(code)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert begun.record()["files"].keys() == {
        f"answers/{rank}-{number}.jsonl" for rank in range(3) for number in range(40)
    }
    begun.discard("answers")
    assert begun.record()["files"] == {} and not (begun.path / "answers").exists()
