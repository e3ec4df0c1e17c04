"""The command line: what it prints, how it exits, and every bad input in one clear message."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import align_engine
from align_engine import cli
from align_engine.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def align(capsys):
    """Run a command in this process: (exit code, what it printed, what it complained)."""

    def run(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # of the flag parser
            code = stop.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def flags(model, rows, out, **more):
    given = dict(model_name_or_path=model, dataset_name=rows, output_dir=out, max_steps=2) | more
    return [part for name, value in given.items() for part in (f"--{name}", value)]


def test_sft_then_dpo_then_again(align, model, completions, pairs, tmp_path):
    code, said, complaint = align("sft", *flags(model, completions, tmp_path / "sft"))
    assert code == 0, complaint
    assert "8 of 8 rows kept" in said
    code, said, _ = align("dpo", *flags(tmp_path / "sft" / "final", pairs, tmp_path / "dpo"))
    assert code == 0
    assert "reference precomputed" in said
    names = {path.name for path in (tmp_path / "dpo").iterdir()}
    assert names >= {"run.json", "recipe.yaml", "metrics.jsonl", "checkpoint-000002", "final", "report.html", "plots"}
    assert not [name for name in names if name.endswith(".tmp")]
    code, said, _ = align("dpo", *flags(tmp_path / "sft" / "final", pairs, tmp_path / "dpo"))
    assert code == 0 and "nothing to do" in said


def test_recipe_file_flags_override_and_the_saved_recipe_repeats_the_run(align, model, pairs, tmp_path):
    (tmp_path / "r.yaml").write_text(
        f"model_name_or_path: {model}\ntrain:\n  max_steps: 2\n  learning_rate: 1e-4\nbeta: 0.5\n"
    )
    code, _, complaint = align("dpo", "--recipe", tmp_path / "r.yaml", "--dataset-name", pairs,
                               "--output_dir", tmp_path / "run", "--beta", "0.25")  # fmt: skip
    assert code == 0, complaint
    saved = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]
    assert (saved["beta"], saved["learning_rate"], saved["max_steps"]) == (0.25, 1e-4, 2)
    code, said, _ = align("dpo", "--recipe", tmp_path / "run" / "recipe.yaml")
    assert code == 0 and "nothing to do" in said


def test_direct_is_another_name_of_rloo_and_goes_on_with_its_runs(align, model, tmp_path):
    rows, recipe = tiny.write_rows(tmp_path / "rows.jsonl", tiny.prompt_rows(4)), tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model_name_or_path: {model}\ndataset_name: {rows}\noutput_dir: {tmp_path / 'run'}\nmax_steps: 2\n"
        "rollout: {reward_funcs: [tiny:word_reward], max_completion_length: 4}\nlr_scheduler_type: constant\n"
    )
    code, said, complaint = align("direct", "--recipe", recipe)
    assert code == 0 and "rloo: " in said, complaint
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["identity"]["algorithm"] == "rloo"
    record["identity"]["algorithm"] = "direct"  # as runs were called before
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    for name in ("rloo", "direct"):
        code, said, complaint = align(name, "--recipe", recipe)
        assert code == 0 and "nothing to do" in said, complaint
    code, said, complaint = align("direct", "--recipe", recipe, "--max_steps", 3)
    assert code == 0 and "going on from" in said and "3/3" in said, complaint
    assert align("direct", "--help") == align("rloo", "--help")


BAD = {  # name: (command, changes of the flags, what the message must hold)
    "empty file": ("dpo", {"rows": ""}, ["rows.jsonl", "empty"]),
    "no such file": ("dpo", {"dataset_name": "nowhere.jsonl"}, ["nowhere.jsonl"]),
    "row without chosen": ("dpo", {"rows": [{"prompt": "w1", "chosen": None, "rejected": "w2"}]}, ["chosen", "row"]),
    "no chosen at all": (
        "dpo", {"good": [], "rows": [{"prompt": "w1", "completion": "w2"}]}, ["chosen", "rejected", "sft"]),
    "chosen equals rejected": (
        "dpo", {"rows": [{"prompt": "w1", "chosen": "w2", "rejected": "w2"}]},
        ["'chosen' equals 'rejected'", "row 3, counted from 1"]),
    "prompt longer than the limit": (
        "dpo", {"rows": [{"prompt": "w1 " * 30, "chosen": "w2", "rejected": "w3"}], "max_length": 20,
                "overlong": "error"}, ["longer than max_length=20", "row 3, counted from 1"]),
    "vocabulary smaller than a target": ("dpo", {"vocab": 40}, ["token id", "vocabulary of 40"]),
    "no model": ("sft", {"model_name_or_path": "./nowhere/model"}, ["./nowhere/model", "no such folder"]),
    "unknown flag": ("dpo", {"learning_rat": 1}, ["--learning_rat", "--learning_rate"]),
    "flag of another algorithm": ("sft", {"beta": 1}, ["--beta"]),
    "value of the wrong type": ("dpo", {"max_steps": "many"}, ["max_steps = 'many' is not a whole number"]),
    "value out of range": ("dpo", {"beta": -1, "warmup_ratio": 2}, ["beta = -1", "warmup_ratio = 2", "[0, 1]"]),
    "unknown backend": ("dpo", {"impl": "warp"}, ["impl", "warp"]),
    "unknown loss": ("dpo", {"loss_type": "sigmoyd"}, ["loss_type", "sigmoyd", "sigmoid"]),
    "unknown schedule": ("dpo", {"lr_scheduler_type": "cosinus"}, ["lr_scheduler_type", "cosinus", "cosine"]),
    "adapter-off without adapters": ("dpo", {"reference": "adapter-off"}, ["adapter-off", "use_peft"]),
    "two references": (
        "dpo", {"reference": "adapter-off", "use_peft": None, "ref_model_name_or_path": "a/b"}, ["a/b", "adapter-off"]),
    "dropout on an adapted head": (
        "sft", {"good": [{"prompt": "w1", "completion": "w2"}], "use_peft": None, "lora_target_modules": "lm_head"},
        ["lora_dropout = 0.05"]),
    "unknown module": ("dpo", {"lora_target_modules": "qq_proj", "use_peft": None}, ["qq_proj"]),
    "unknown tracker": ("dpo", {"report_to": "paper"}, ["report_to", "paper"]),
    "missing tracker": ("dpo", {"report_to": "wandb"}, ["report_to", "wandb"]),
    "output is a file": ("dpo", {"output_dir": __file__}, ["output_dir", "is a file"]),
}  # fmt: skip


@pytest.mark.parametrize("command", ["dpo", "kto"])
@pytest.mark.parametrize("fault", [{"rejected": "w50"}, {"chosen": ""}], ids=["token", "empty"])
def test_a_row_is_named_by_its_data_set_and_file(command, fault, align, tmp_path):
    """A fault in the second row of a folder's second file, of the data to train on and of those to evaluate on."""
    model = tiny.write_model(tmp_path / "model", vocab=45)
    good = [{"prompt": f"w{i}", "chosen": "w2", "rejected": "w3"} for i in range(3)]
    for name, second in (("good", {}), ("bad", fault)):
        (tmp_path / name).mkdir()
        tiny.write_rows(tmp_path / name / "a.jsonl", good)
        tiny.write_rows(tmp_path / name / "b.jsonl", [good[0], good[1] | second, good[2]])
    for data, held in (("bad", "good"), ("good", "bad")):
        more = dict(eval_dataset_name=tmp_path / held, eval_strategy="steps")
        code, _, complaint = align(command, *flags(model, tmp_path / data, tmp_path / "run", **more))
        assert code == 2 and "row 2 of b.jsonl, counted from 1" in complaint
        assert f"error: {tmp_path / 'bad'}: " in complaint


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of peft
@pytest.mark.filterwarnings("ignore:.*tie.*:UserWarning")  # of peft, on adapters of tied heads
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_exit_code_2(case, align, model, tmp_path):
    command, changes, wanted = BAD[case]
    changes = dict(changes)
    good = changes.pop("good", [{"prompt": "w1", "chosen": "w2", "rejected": "w3"}] * 2)
    extra = changes.pop("rows", [])
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [] if extra == "" else good + extra)
    if "vocab" in changes:
        rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.preference_rows(8))
        model = tiny.write_model(tmp_path / "small", vocab=changes.pop("vocab"))
    arguments = flags(model, rows, tmp_path / "run", **changes)
    code, _, complaint = align(command, *[part for part in arguments if part is not None])
    assert code == 2, complaint
    for text in wanted:
        assert text in complaint.replace("\n│", "").replace("  ", " "), complaint
    assert "Traceback" not in complaint
    assert not (tmp_path / "run").exists(), "nothing may be written before the input is checked"


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("learning_rat: 1", "unknown key `learning_rat`; did you mean `learning_rate`?"),
        ("train:\n  betta: 1", "unknown key `betta`; did you mean `beta`?"),
        ("train:\n  beta: 1", "`beta` belongs under `loss`"),
        ("max_steps: many", "max_steps"),
        ("reference: frozn", "reference"),
        ("a: [", "not readable YAML"),
        ("- 1\n- 2", "no `name: value` lines"),
    ],
)
def test_bad_recipe_files(content, wanted, align, tmp_path):
    (tmp_path / "r.yaml").write_text(content)
    code, _, complaint = align("dpo", "--recipe", tmp_path / "r.yaml")
    assert code == 2
    assert wanted in complaint and "r.yaml" in complaint and "Traceback" not in complaint


def test_no_recipe_file_no_command_no_argument(align):
    assert "No such file" in align("dpo", "--recipe", "nowhere.yaml")[2]
    code, _, complaint = align("dop")
    assert code == 2 and "did you mean 'dpo'" in complaint
    code, said, _ = align()
    assert code == 2 and "usage: align" in said
    assert align("--help")[0] == 0


def test_another_run_in_the_folder(align, model, pairs, tmp_path):
    assert align("dpo", *flags(model, pairs, tmp_path / "run"))[0] == 0
    code, _, complaint = align("dpo", *flags(model, pairs, tmp_path / "run", seed=1))
    assert code == 2 and "seed: 42 there, 1 now" in complaint and "--overwrite" in complaint


def test_a_run_that_fails_exits_1_and_debug_shows_where(align, model, pairs, tmp_path):
    arguments = flags(model, pairs, tmp_path / "run", learning_rate=1e30, max_grad_norm=0, max_steps=5)
    code, _, complaint = align("dpo", *arguments)
    assert code == 1 and "step 2: the loss is" in complaint and "Traceback" not in complaint
    from align_engine.errors import RunFailed

    with pytest.raises(RunFailed):
        main(["dpo", *map(str, arguments), "--debug"])


def test_ctrl_c_exits_1_with_one_sentence(align, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupted)
    code, said, complaint = align("sft")
    assert (code, said) == (1, "")
    assert complaint == "align: error: stopped before the run began; the same command starts it\n"


SCORES = """
import sys

def breaks(prompts, **_):
    return {}["nothing"]

def leaves(prompts, **_):
    sys.exit(0)
"""


@pytest.mark.parametrize("place", [0, 1, 3])
def test_an_unexpected_error_exits_1_and_says_type_and_place_and_debug_stands_anywhere(place, align, monkeypatch):
    def broken(*_):
        raise KeyError("a key of our own")

    monkeypatch.setattr(cli.recipes, "check", broken)
    code, said, complaint = align("sft", "--output_dir", "x")
    assert (code, said) == (1, "")
    assert complaint.startswith("align: error: KeyError in test_cli.py, line ") and "'a key of our own'" in complaint
    assert complaint.count("\n") == 1 and "Traceback" not in complaint
    arguments = ["sft", "--output_dir", "x"]
    with pytest.raises(KeyError):
        main([*arguments[:place], "--debug", *arguments[place:]])


def test_a_run_cannot_be_left_with_success_by_sys_exit(align, model, tmp_path):
    rows = tiny.write_rows(tmp_path / "prompts.jsonl", tiny.prompt_rows(8))
    (tmp_path / "scores.py").write_text(SCORES)
    for name in ("leaves", "breaks"):
        code, _, complaint = align("grpo", *flags(model, rows, tmp_path / name), "--max_completion_length", 4,
                                   "--reward_funcs", f"{tmp_path}/scores.py:{name}")  # fmt: skip
        assert code == 1 and complaint.count("align: error") == 1, complaint
        assert "scores.py" in complaint or "sys.exit(0)" in complaint
        assert not (tmp_path / name / "final").exists()


def test_the_version_is_that_of_the_package(align):
    assert align("--version") == (0, f"align-engine {align_engine.__version__}\n", "")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of peft
def test_values_as_trl_s_users_write_them_train(align, model, completions, tmp_path):
    """What is not on its way through recipes alone: no limit of length, every linear layer."""
    arguments = flags(model, completions, tmp_path / "run", max_length="None", lora_target_modules="all-linear",
                      report_to="none", use_peft="true", bf16="false")  # fmt: skip
    code, _, complaint = align("sft", *arguments)
    assert code == 0, complaint
    adapter = json.loads((tmp_path / "run" / "final" / "adapter_config.json").read_text())
    layers = {name.rpartition(".")[2] for name in adapter["target_modules"]}
    assert layers == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}
    assert "max_length: null" in (tmp_path / "run" / "recipe.yaml").read_text()


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_rollout_of_which_nothing_is_learnt_is_a_step_of_loss_0(name, align, model, tmp_path):
    rows = tiny.write_rows(tmp_path / "prompts.jsonl", tiny.prompt_rows(8))
    code, said, complaint = align(name, *flags(model, rows, tmp_path / "run"), "--max_completion_length", 1,
                                  "--reward_funcs", "tiny:word_reward", "--mask_truncated_completions",
                                  "--logging_steps", 1)  # fmt: skip
    assert code == 0, complaint
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["loss"], line["grad_norm"]) for line in lines] == [(0.0, 0.0)] * 2
    assert "100% of the completions are cut off" in said


def test_full_disk_exits_1(align, model, pairs, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        code, _, complaint = align("dpo", *flags(model, pairs, tmp_path / "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    assert "cannot write" in complaint and "File too large" in complaint and "Make room" in complaint


def test_help_names_every_flag_with_a_sentence(align):
    from align_engine.recipe import DpoRecipe, flat

    code, said, _ = align("dpo", "--help")
    assert code == 0
    for name in flat(DpoRecipe()):
        assert f"--{name}" in said
    assert said.count("(required)") == 3


def test_help_shows_addresses_without_their_secrets(align, tmp_path):
    (tmp_path / "r.yaml").write_text("server_base_url: http://me:pw1@a/v1?key=pw2\n")
    code, said, _ = align("grpo", "--recipe", tmp_path / "r.yaml", "--reward_funcs", "http://b/s?key=pw3", "--help")
    assert code == 0 and "http://***@a/v1?key=***" in said and "http://b/s?key=***" in said
    assert not any(secret in said for secret in ("pw1", "pw2", "pw3"))


def test_env_says_which_backend_serves_and_why_not(align):
    code, said, _ = align("env", "--json")
    facts = json.loads(said)
    assert code == 0
    assert facts["packages"]["torch"]
    assert facts["devices"][0].startswith("cpu")
    for status in facts["backends"]:
        assert status["available"] != bool(status["why_not"])
    code, said, _ = align("env")
    assert code == 0 and "taken by auto" in said


def test_the_command_starts_without_torch():
    """`align --help` and flag errors must not wait for torch."""
    code = (
        "import sys; from align_engine.cli import main; main(['--help']);"
        "\ntry: main(['dpo', '--nonsense'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    done = subprocess.run([sys.executable, "-m", "align_engine"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "usage: align" in done.stdout


def test_no_library_speaks_first():
    """Of the packages that runs import, one names on a CPU what it does without."""
    code = "import align_engine.cli, align_engine.run, bitsandbytes"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and not done.stdout
