"""What users of TRL and others are used to write: it runs, or is answered with what serves instead."""

import dataclasses
import importlib
import json
import math
import re
import shlex
from pathlib import Path

import pytest
import tiny
import torch
from command_lines import LINES, between, tables

from align_engine import cli
from align_engine.cli import main
from align_engine.data.formats import normalise
from align_engine.recipe import RECIPES, DpoRecipe, SftRecipe, TrainSection, fields, foreign, shipped, typed
from align_engine.run import run_names
from align_engine.training import optimiser
from align_engine.training.screen import Columns


@pytest.fixture
def align(capsys):
    def run(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


ROOT = Path(__file__).parents[2]
CONFIGS = {"sft": "SFTConfig", "dpo": "DPOConfig", "kto": "KTOConfig", "rm": "RewardConfig", "grpo": "GRPOConfig",
           "rloo": "RLOOConfig", "cpo": "cpo.CPOConfig", "orpo": "orpo.ORPOConfig"}  # fmt: skip
OF_PPO = """exp_name reward_model_path model_adapter_name ref_adapter_name num_ppo_epochs whiten_rewards kl_coef
    kl_estimator cliprange vf_coef cliprange_value gamma lam ds3_gather_for_generation num_mini_batches total_episodes
    local_rollout_forward_batch_size num_sample_generations response_length stop_token stop_token_id temperature
    missing_eos_penalty sft_model_path world_size num_total_batches micro_batch_size local_batch_size batch_size
    local_mini_batch_size mini_batch_size"""  # of the last TRL that had it; those from world_size on it sets itself
SET_BY_TRL = {"world_size", "num_total_batches", "local_batch_size", "batch_size", "local_mini_batch_size",
              "mini_batch_size"}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of TRL's experimental part
def test_no_setting_of_trl_s_is_without_an_answer():
    import trl
    from trl.scripts import grpo, utils

    common = [trl.ScriptArguments, trl.ModelConfig, utils.DatasetMixtureConfig, grpo.GRPOScriptArguments]
    missing = {}
    for name, path in CONFIGS.items():
        module, _, config = path.rpartition(".")
        where = importlib.import_module(f"trl.experimental.{module}") if module else trl
        theirs = {one.name for kind in (*common, getattr(where, config)) for one in dataclasses.fields(kind)}
        if name not in ("grpo", "rloo"):
            theirs -= {"reward_funcs"}  # of online methods
        assert len(theirs) > 130
        missing |= {f"{name}: {one}": "" for one in theirs - known(name)}
    missing |= {f"ppo: {one}": "" for one in {*OF_PPO.split()} - SET_BY_TRL - known("ppo")}
    assert not missing


def known(name):
    return fields(RECIPES[name]).keys() | foreign.RENAMED.keys() | foreign.FOREIGN.keys()


def test_answers_name_settings_that_are_there():
    ours = {field for kind in RECIPES.values() for field in fields(kind)}
    flags = {flag for one in foreign.FOREIGN.values() for flag in re.findall(r"--(\w+)", one.sentence)}
    elsewhere = {"config_file", "revision", "models"}  # of accelerate, hf, align generate
    assert flags - elsewhere <= ours and len(flags) > 30
    assert {*foreign.RENAMED.values()} <= ours
    assert not {name for name in foreign.FOREIGN if name in fields(SftRecipe)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with the splits train and test for each command."""
    root, made = tmp_path_factory.mktemp("data"), {}
    rows = {"sft": tiny.sft_rows, "kto": tiny.label_rows, "grpo": tiny.prompt_rows}
    for name in ("sft", "dpo", "kto", "grpo"):
        (root / name).mkdir()
        for split in ("train", "test"):
            tiny.write_rows(root / name / f"{split}.jsonl", rows.get(name, tiny.preference_rows)(8))
        made[name] = root / name
    return made | dict.fromkeys(("rloo", "ppo"), made["grpo"]) | dict.fromkeys(("cpo", "orpo", "reward"), made["dpo"])


def as_yaml(arguments, path):
    """Flags as lines of YAML; None where flags stand in no pairs."""
    import yaml

    values = {}
    for word in arguments:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            off = name.startswith("no_")
            name = name.removeprefix("no_")
            values[name] = [value] if value else ["false"] if off else []
        else:
            values[name].append(word)
    content = {name: given[0] if len(given) == 1 else given or "true" for name, given in values.items()}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def as_flags(text):
    """Lines of YAML as flags: what is nested as JSON."""
    import yaml

    words = []
    for name, value in yaml.safe_load(text).items():
        values = value if isinstance(value, list) and not any(isinstance(one, dict) for one in value) else [value]
        nested = [json.dumps(one) if isinstance(one, dict | list) else "none" if one is None else one for one in values]
        words += [f"--{name}", *map(str, nested or ["none"])]
    return words


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of peft
@pytest.mark.filterwarnings("ignore:.*quantized.*:UserWarning", "ignore:.*cast.*:UserWarning")  # of bitsandbytes
@pytest.mark.parametrize("line", LINES, ids=lambda line: line.where)
def test_a_command_line_runs_or_is_answered(line, align, model, data, tmp_path):
    own = ["--model_name_or_path", model, "--dataset_name", data[line.command], "--output_dir", tmp_path / "run"]
    if line.is_yaml:
        (tmp_path / "recipe.yaml").write_text(line.text)
        arguments, flags = ["--config", tmp_path / "recipe.yaml"], as_flags(line.text)
        found, theirs = read(line.command, own + flags), read(line.command, own + arguments)
        answered = isinstance(found, str) and all(part in found for part in line.answer)  # the value as it is written
        assert found == theirs or (line.answer and answered)
    else:
        arguments = shlex.split(line.text)
        file = as_yaml(arguments, tmp_path / "recipe.yaml")
        if arguments:
            assert read(line.command, own + arguments) == read(line.command, [*own, "--config", file])
    short = ["--max_steps", "1"] + ["--max_completion_length", "4"] * (line.command in ("grpo", "rloo"))
    code, _, complaint = align(line.command, *own, *arguments, *short)
    assert code == (2 if line.answer else 0), complaint
    for part in line.answer:
        assert part in complaint
    assert (tmp_path / "run" / "final").exists() != bool(line.answer)
    assert "Traceback" not in complaint


def read(command, arguments):
    """The recipe, or what is said of it (without the place)."""
    arguments = list(map(str, arguments))
    path = arguments.pop(place + 1) if (place := (*arguments, "--config").index("--config")) < len(arguments) else None
    arguments = [word for word in arguments if word != "--config"]
    try:
        return cli.read(cli.ALIASES.get(command, command), arguments, path)[0]
    except cli.BadInput as error:
        return str(error).partition(": ")[2]


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ("--use_peft", "use_peft", True),
        ("--use_peft True", "use_peft", True),
        ("--use_peft=false", "use_peft", False),
        ("--no_use_peft", "use_peft", False),
        ("--no-use-peft", "use_peft", False),
        ("--gradient-checkpointing no --use_peft", "gradient_checkpointing", False),
        ("--bf16 null", "bf16", None),
        ("--max_length none", "max_length", None),
        ("--packing", "packing", "on"),
        ("--packing true", "packing", "on"),
        ("--packing=False", "packing", "off"),
        ("--no_packing", "packing", "off"),
        ("--packing auto", "packing", "auto"),
        ("--lora_target_modules all-linear", "lora_target_modules", None),
        ("--lora_target_modules q_proj v_proj", "lora_target_modules", ["q_proj", "v_proj"]),
        ("--lora_target_modules q_proj,v_proj", "lora_target_modules", ["q_proj", "v_proj"]),
        ('--lora_target_modules "q_proj", "v_proj"', "lora_target_modules", ["q_proj", "v_proj"]),
        ("--loss_weights 1.0, 0.5", "loss_weights", [1.0, 0.5]),
        ("--report_to none", "report_to", []),
        ("--report_to wandb tensorboard", "report_to", ["wandb", "tensorboard"]),
        ("--torch_dtype bfloat16", "dtype", "bfloat16"),
        ("--evaluation_strategy epoch", "eval_strategy", "epoch"),
        ('--lr_scheduler_kwargs {"min_lr_rate":0.1}', "lr_scheduler_kwargs", "min_lr_rate=0.1"),
        ("--lr_scheduler_kwargs min_lr_rate=0.1", "lr_scheduler_kwargs", "min_lr_rate=0.1"),
    ],
)
def test_values_as_they_are_written(given, name, value):
    words = [given] if "{" not in given else None
    arguments = shlex.split(words[0]) if words else given.split(" ", 1)
    made, others = cli.read("dpo", arguments, None)
    assert others == [] and {**cli.recipes.flat(made)}[name] == value


def test_lists_of_scorers_and_addresses():
    made, _ = cli.read("grpo", ["--reward_funcs", "a.py:f,b.py:g", "http://host/score?x=1,2"], None)
    assert made.rollout.reward_funcs == ["a.py:f", "b.py:g", "http://host/score?x=1,2"]


def test_answers_come_all_at_once_and_what_changes_nothing_is_said(align, tmp_path):
    code, _, complaint = align("sft", "--tf32", "--fp16", "--dataloader_num_workers", 4, "--do_train", "--help")
    assert code == 2 and "tf32: TF32 is" in complaint and "fp16: float16" in complaint
    code, _, complaint = align("sft", "--dataloader_num_workers", 4, "--do_train", "true", "--fp16=false", "--help")
    assert code == 0 and complaint == "flags: dataloader_num_workers, do_train, fp16 change nothing here\n"
    code, _, complaint = align("sft", "--beta", 1)
    assert code == 2 and "`beta` is a setting of dpo, simpo" in complaint


def test_the_method_s_flags_stand_first_in_the_help_in_one_spelling(align):
    for name, first in (("dpo", "--beta"), ("grpo", "--reward_funcs"), ("sft", "--assistant_only_loss")):
        code, said, _ = align(name, "--help")
        assert code == 0 and said.index(first) < said.index("--model_name_or_path") < said.index("--learning_rate")
        assert {flag for flag in re.findall(r"--[a-z][\w-]+", said) if "-" in flag[2:]} <= {"--no-"}


@pytest.mark.parametrize(("given", "steps"), [(dict(warmup_steps=0.1), 25), (dict(warmup_steps=3), 25),
                                              (dict(warmup_ratio=0.1), 25), ({}, 25)])  # fmt: skip
def test_warmup_is_that_of_transformers(given, steps):
    from transformers import TrainingArguments

    wanted = given.get("warmup_steps", given.get("warmup_ratio", 0))
    theirs = TrainingArguments.get_warmup_steps(type("Arguments", (), {"warmup_steps": wanted})(), steps)
    assert optimiser.warmup(TrainSection(**given), steps) == theirs


def test_arguments_of_a_schedule_reach_it(align, model, pairs, tmp_path):
    train = TrainSection(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs="min_lr_rate=0.25",
                         learning_rate=1.0)  # fmt: skip
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = optimiser.schedule(train, optimizer, 4)
    rates = []
    for _ in range(4):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    cosine = [0.25 + 0.75 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert rates == pytest.approx(cosine)
    for more, wanted in (("", "cannot run"), ("nonsense=1", "lr_scheduler_kwargs = 'nonsense=1'")):
        settings = ["--lr_scheduler_kwargs", more] if more else []
        own = ["--model_name_or_path", model, "--dataset_name", pairs, "--output_dir", tmp_path / "run"]
        code, _, complaint = align("dpo", *own, "--lr_scheduler_type", "cosine_with_min_lr", *settings)
        assert code == 2 and wanted in complaint, complaint


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def checkpoints(run):
    return [int(path.name[-6:]) for path in sorted(run.glob("checkpoint-*"))]


def test_strategies_of_log_evaluation_and_checkpoints(align, model, data, tmp_path):
    """Eight rows in steps of four, three epochs: six steps."""
    own = ["--model_name_or_path", model, "--dataset_name", data["dpo"], "--per_device_train_batch_size", 4,
           "--num_train_epochs", 3]  # fmt: skip

    def run(name, *more):
        code, _, complaint = align("dpo", *own, "--output_dir", tmp_path / name, *more)
        assert code == 0, complaint
        found = lines_of(tmp_path / name) if (tmp_path / name / "metrics.jsonl").exists() else []
        logged = [line["step"] for line in found if "loss" in line]
        return logged, [line["step"] for line in found if "eval_loss" in line], checkpoints(tmp_path / name)

    assert run("epoch", "--logging_strategy", "epoch", "--eval_strategy", "epoch", "--save_strategy", "epoch") == (
        [2, 4, 6], [2, 4, 6], [2, 4, 6])  # fmt: skip
    assert run("steps", "--logging_steps", 4, "--logging_first_step", "--eval_strategy", "steps",
               "--save_strategy", "no") == ([1, 4, 6], [4, 6], [])  # fmt: skip
    logged, evaluated, saved = run("best", "--logging_strategy", "no", "--eval_strategy", "steps", "--eval_steps", 1,
                                   "--save_strategy", "best", "--learning_rate", 1e-3)  # fmt: skip
    losses = [line["eval_loss"] for line in lines_of(tmp_path / "best")]
    better = [step for step in range(1, 7) if losses[step - 1] < min([math.inf, *losses[: step - 1]])]
    assert (logged, evaluated, saved) == ([], [1, 2, 3, 4, 5, 6], better)
    assert run("none", "--dataset_test_split", "test", "--eval_strategy", "no")[1] == []


def test_going_on_only_from_where_it_is_asked(align, model, pairs, tmp_path):
    def run(*more):
        return align("dpo", "--model_name_or_path", model, "--dataset_name", pairs, "--output_dir", tmp_path / "run",
                     "--max_steps", 2, "--save_steps", 1, *more)  # fmt: skip

    code, _, complaint = run("--resume_from_checkpoint")
    assert code == 2 and "holds no run to go on with" in complaint
    assert run("--resume_from_checkpoint", "false")[0] == 0
    record = tmp_path / "run" / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"finished": False}))
    code, _, complaint = run("--resume_from_checkpoint", tmp_path / "run" / "checkpoint-000001")
    assert code == 2 and "delete checkpoint-000002" in complaint
    code, _, complaint = run("--resume_from_checkpoint", tmp_path / "elsewhere" / "checkpoint-000001")
    assert code == 2 and "is no checkpoint of" in complaint
    code, _, complaint = run("--resume_from_checkpoint", "no")
    assert code == 2 and "holds a run" in complaint
    code, said, complaint = run("--resume_from_checkpoint", "--run_name", "mine")
    assert code == 0 and "going on from" in said, complaint
    assert run("--resume_from_checkpoint", tmp_path / "run" / "checkpoint-000002")[0] == 0


def test_names_of_runs_reach_the_trackers_that_have_them():
    import inspect

    from accelerate import tracking

    assert run_names(None) == {}
    names = run_names("mine")
    assert {next(iter(one.values())) for one in names.values()} == {"mine"}
    assert "run_name" in inspect.signature(tracking.MLflowTracker.__init__).parameters
    assert names.keys() <= tracking.LOGGER_TYPE_TO_CLASS.keys()


def test_messages_of_text_parts_are_those_of_texts():
    parts = [{"type": "text", "text": "one ", "image": None}, {"type": "text", "text": "two"}]
    rows = [
        {"prompt": [{"role": "user", "content": content}], "completion": [{"role": "assistant", "content": content}]}
        for content in ("one two", parts)
    ]
    layout = ("prompt", "completion")
    assert normalise(rows[0], layout) == normalise(rows[1], layout)
    rows[1]["prompt"][0]["content"] = [{"type": "image", "image": "x.png"}]
    with pytest.raises(Exception, match="content is of type list, expected a string"):
        normalise(rows[1], layout)


def test_numbers_stand_in_columns():
    table = Columns(200)
    one = {"reward": 0.5, "rewards/right/mean": 0.25, "rewards/right/std": 1.0, "rewards/short/mean": 0.75,
           "loss": 0.6931, "learning_rate": 1e-6, "tokens_per_second": 12345.6, "epoch": 1.0}  # fmt: skip
    heading, row = table.lines(10, one)
    assert heading.split() == ["step", "reward", "right", "short", "loss", "rate", "tokens/s"]
    assert row.split() == ["10/200", "0.5", "0.25", "0.75", "0.6931", "1e-06", "12346"] and len(row) == len(heading)
    (row,) = table.lines(20, {"eval_reward": 0.5, "eval_rewards/short/mean": 0.125})
    assert row.split() == ["eval", "0.5", "0.125"] and row.index("0.125") + 5 == heading.index("short") + 5
    assert len(table.lines(20, {"rewards/accuracies": 1.0})) == 2, "a new column has a new heading"
    assert all(len(line) <= 40 for line in Columns(200, 40).lines(10, one))
    again = Columns(200)
    assert sum(len(again.lines(step, one)) for step in range(41)) == 41 + 3


def test_recipes_are_found_by_name(align, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said, _ = align("recipes")
    assert code == 0 and all(name in said for name in shipped.recipes()) and len(shipped.recipes()) > 30
    code, said, _ = align("recipes", "qwen2.5-7b-lora-dpo")
    assert code == 0 and said == (shipped.folder("recipes") / "qwen2.5-7b-lora-dpo.yaml").read_text()
    for name in ("qwen2.5-7b-lora-dpo", "recipes/qwen2.5-7b-lora-dpo.yaml"):
        code, said, _ = align("dpo", "--recipe", name, "--help")
        assert code == 0 and "default: Qwen/Qwen2.5-7B-Instruct" in said
    code, _, complaint = align("dpo", "--recipe", "qwen2.5-7b-lora-dpa")
    assert code == 2 and "did you mean `qwen2.5-7b-lora-dpo`?" in complaint
    assert (shipped.folder("examples") / "plain_torch.py").is_file()


def test_a_typed_recipe_takes_the_test_split_where_evaluations_are_asked_for():
    made = typed(DpoRecipe(), {"eval": {"eval_strategy": "epoch"}}, "here")
    checked = cli.recipes.check(made, required=())
    assert checked.data.dataset_test_split == "test"


def test_the_page_on_trl_holds_these_tables():
    """`PYTHONPATH=.:kernels python tests/helpers/command_lines.py` writes them."""
    page = (ROOT / "docs" / "from-trl.md").read_text()
    for mark, content in tables().items():
        assert between(page, mark, content) == page, mark
    assert len(LINES) >= 30 and sum(not line.answer for line in LINES) >= 15
