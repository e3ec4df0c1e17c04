"""A run that was stopped goes on with another number of processes, and ends where an unbroken one ends."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
from processes import run_on_two
from runs import cut_off, same_bits
from safetensors.torch import load_file

from align_engine import recipe as recipes
from align_engine import run
from align_engine.errors import BadInput
from align_engine.recipe import DpoRecipe, GrpoRecipe
from align_engine.training import metrics
from align_engine.training.checkpoint import RunFolder

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of peft
# name -> (method, its settings, those of one process, those of two)
ONE, TWO = dict(gradient_accumulation_steps=2), dict(gradient_accumulation_steps=1)
METHODS = {
    "dpo": ("dpo", {}, ONE, TWO),
    "kto-packed": ("kto", {"packing": "on"}, dict(per_device_train_batch_size=8), TWO),
    # two steps in two passes over each rollout: every stop but that at 4 lies inside one
    "grpo": ("grpo", dict(num_iterations=2), ONE | {"steps_per_generation": 4}, TWO | {"steps_per_generation": 2}),
}
# by what trains: 1 process, 2 with DDP, F: 2 with FSDP2. A leg: (round, what trains, the step that it stops after)
ROUTES = {
    "1-2": [(0, "1", 3), (1, "2", None)],
    "2-1-2": [(1, "2", 1), (2, "1", 5), (3, "2", None)],
    "1-F": [(0, "1", 2), (1, "F", None)],
    "F-1": [(1, "F", 3), (2, "1", None)],
    "2-F": [(1, "2", 2), (1, "F", None)],
}
RUNS = [*(("dpo", route) for route in ROUTES), ("kto-packed", "2-1-2"), ("grpo", "1-2")]
RANK = """
import sys
sys.path.insert(0, {here!r})
import fsdp2
from test_other_processes import go_on
{plain}
fsdp2.on()
{sharded}
"""


def recipe(name, out, route, processes, **more):
    """Six steps of 8 rows."""
    method, settings, *shared_out = METHODS[name]
    settings = dict(max_steps=6, dtype="auto", learning_rate=1e-4, save_steps=1, per_device_train_batch_size=4,
                    **settings) | shared_out[processes - 1] | more  # fmt: skip
    paths = out / "model", out / f"{name}.jsonl", out / name / route
    return tiny.online(GrpoRecipe, *paths, **settings) if name == "grpo" else tiny.offline(method, *paths, **settings)


def go_on(name, out, route, what, until=None):
    """One leg."""
    made = recipe(name, Path(out), route, 1 if what == "1" else 2)
    if until is None:
        run.train(METHODS[name][0], made)
    else:
        cut_off(METHODS[name][0], made, step=until)


@pytest.fixture(scope="module")
def out(model64, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    shutil.copytree(model64, out / "model")
    for name in METHODS:
        rows = tiny.prompt_rows(7) if name == "grpo" else tiny.OFFLINE[METHODS[name][0]][1](9)
        tiny.write_rows(out / f"{name}.jsonl", rows)
        go_on(name, out, "unbroken", "1")
    for number in range(4):
        legs = [(name, str(out), route, what, until) for name, route in RUNS for turn, what, until in ROUTES[route]
                if turn == number]  # fmt: skip
        if number % 2 == 0:
            for leg in legs:
                go_on(*leg)
        else:
            calls = {what: "\n".join(f"go_on(*{leg!r})" for leg in legs if leg[3] == what) for what in "2F"}
            here = str(Path(__file__).parent)
            run_on_two(RANK.format(here=here, plain=calls["2"], sharded=calls["F"]))
    return out


@pytest.mark.parametrize(("name", "route"), RUNS)
def test_every_route_ends_where_an_unbroken_run_ends(name, route, out):
    a, b = (metrics.read(out / name / way / "metrics.jsonl") for way in ("unbroken", route))
    assert [record["step"] for record in a] == [record["step"] for record in b] == [1, 2, 3, 4, 5, 6]
    for metric in ("loss", "grad_norm", "learning_rate", "num_tokens", "rewards/margins", "reward", "kl", "epoch"):
        want = [record[metric] for record in a if metric in record]
        assert [record[metric] for record in b if metric in record] == pytest.approx(want, abs=1e-9, rel=1e-6), metric
    a, b = (load_file(out / name / way / "final" / "model.safetensors") for way in ("unbroken", route))
    assert a.keys() <= b.keys() and max((a[key] - b[key]).abs().max().item() for key in a) < 1e-9


@pytest.fixture
def stopped(model, pairs, tmp_path):
    """The recipe of a run of 8 rows per step that was stopped after its first one."""
    made = tiny.dpo(model, pairs, tmp_path / "run", save_steps=1, per_device_train_batch_size=4,
                    gradient_accumulation_steps=2)  # fmt: skip
    cut_off("dpo", made)
    return made


def test_other_steps_are_refused_with_the_settings_of_the_same_ones(stopped, tmp_path):
    folder, train = RunFolder(tmp_path / "run", {}), stopped.train
    for size, accumulation, processes, sentence in (
        (4, 1, 1, "8 rows per step, and .* is 4 x 1 x 1 = 4: go on with gradient_accumulation_steps = 2, or"),
        (4, 2, 2, "4 x 2 x 2 = 16: go on with gradient_accumulation_steps = 1, or"),
        (3, 1, 4, "3 x 1 x 4 = 12: go on with per_device_train_batch_size = 2, gradient_accumulation_steps = 1, or"),
        (4, 2, 3, "8 rows per step, which 3 processes cannot share: start 1 or 2 or 4 or 8"),
    ):
        train.per_device_train_batch_size, train.gradient_accumulation_steps = size, accumulation
        with pytest.raises(BadInput, match=sentence):
            run.check_share(folder, stopped, processes)
    train.per_device_train_batch_size, train.gradient_accumulation_steps = 4, 1
    with pytest.raises(BadInput, match="holds a run with 8 rows per step"):
        run.train("dpo", stopped)
    train.per_device_train_batch_size = 8
    run.train("dpo", stopped)  # 8 x 1 takes the steps of 4 x 2


def test_steps_of_a_rollout_are_named_with_the_rows():
    made = GrpoRecipe()
    made.train.per_device_train_batch_size, made.train.gradient_accumulation_steps = 4, 2
    made.rollout.steps_per_generation = 4
    one, two = recipes.identity(made, 2), recipes.identity(made, 1)
    assert (one["rows_per_step"], one["steps_per_rollout"], two["rows_per_step"]) == (16, 2, 8)

    class Held:
        path, record = "run", lambda self: {"identity": one}

    with pytest.raises(BadInput, match="go on with gradient_accumulation_steps = 4, steps_per_generation = 8, or"):
        run.check_share(Held(), made, 1)


@pytest.mark.parametrize("settings", [dict(loss_type="aot"), dict(loss_type="sigmoid,aot_unpaired")])
def test_losses_of_a_forward_pass_keep_it(settings):
    made = DpoRecipe()
    made.loss.loss_type = settings["loss_type"]
    held = recipes.identity(made, 2)
    assert held["processes"] == 2 and held["per_device_train_batch_size"] == 8 and "rows_per_step" not in held


def test_dropout_is_drawn_anew_as_a_function_of_seed_step_and_rank(model, completions, tmp_path, capsys):
    settings = dict(max_steps=4, use_peft=True, lora_dropout=0.3, save_steps=2, learning_rate=1e-2,
                    gradient_accumulation_steps=2, per_device_train_batch_size=4)  # fmt: skip
    for name in ("a", "b"):
        cut_off("sft", tiny.sft(model, completions, tmp_path / name, **settings))
        place = tmp_path / name / "checkpoint-000002" / "state.json"
        text = place.read_text()
        assert '"processes": 1' in text
        place.write_text(text.replace('"processes": 1', '"processes": 2'))
        capsys.readouterr()
        run.train("sft", tiny.sft(model, completions, tmp_path / name, **settings))
        said = capsys.readouterr().out
        assert "checkpoint-000002 is of another number of processes (2): dropout is drawn anew" in said
    assert same_bits(tmp_path / "a" / "final", tmp_path / "b" / "final", "adapter_model.safetensors")


def test_checkpoints_of_earlier_versions_are_refused_with_the_way_out(stopped, tmp_path):
    place = tmp_path / "run" / "run.json"
    record = json.loads(place.read_text())
    record["files"] = {name: size for name, size in record["files"].items() if "/tensors/" not in name}
    place.write_text(json.dumps(record))
    shutil.rmtree(tmp_path / "run" / "checkpoint-000001" / "tensors")
    way = "not read. Delete that folder, and the same command starts afresh"
    with pytest.raises(BadInput, match=f"checkpoint-000001 was written by an earlier version, whose .* {way}"):
        run.train("dpo", stopped)
