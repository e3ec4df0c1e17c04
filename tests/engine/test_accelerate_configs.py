"""recipes/accelerate: what `accelerate launch` makes of each file, and runs that it starts on two processes of a CPU.

DDP takes the CPU as it is. For the others the ranks say that it is none: accelerate shards over accelerators alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from nursery import PATHS
from processes import free_port, run_on_two
from safetensors.torch import load_file

from align_engine.errors import BadInput
from align_engine.recipe import DpoRecipe
from align_engine.run import make_accelerator, train
from align_engine.training import metrics

FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
WANTED = {
    "ddp": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
    "fsdp2_qlora": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"},
    "tp": {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "8"},
}
SCRIPT = """
import sys
if sys.argv.pop(1) != "ddp":
    import fsdp2
    fsdp2.on_no_cpus()
from align_engine.cli import main
main(sys.argv[1:])
"""


def asked(path: Path, *flags: Any) -> Any:
    """What `accelerate launch` makes of a file and flags."""
    words = ["--config_file", path, "--main_process_port", free_port(), *flags, "x.py"]
    return _validate_launch_command(launch_command_parser().parse_args(list(map(str, words))))[0]


def test_each_file_is_known_here():
    assert NAMES == sorted(WANTED)


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_knows_every_key_and_asks_for_what_the_file_says(name, monkeypatch):
    for word in [word for word in os.environ if word.startswith(("FSDP_", "ACCELERATE_", "PARALLELISM_"))]:
        monkeypatch.delenv(word)
    path = FOLDER / f"{name}.yaml"
    load_config_from_file(str(path))  # refuses unknown keys of the first level
    parser = launch_command_parser()
    known = {action.dest for action in parser._actions}
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    for section in ("fsdp_config", "parallelism_config"):
        assert content.get(section, {}).keys() <= known
    args = asked(path)
    environment = prepare_multi_gpu_env(args)
    assert environment.items() >= WANTED[name].items() and args.num_processes == 8
    assert ("ACCELERATE_USE_FSDP" in environment) == name.startswith("fsdp2")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run of one process."""
    out = tmp_path_factory.mktemp("one")
    model = tiny.write_model(out / "model", dtype=torch.float64, num_key_value_heads=2)
    rows = tiny.write_rows(out / "rows.jsonl", tiny.preference_rows(12))
    settings = dict(dtype="auto", packing="on", max_steps=4, per_device_train_batch_size=8)
    train("dpo", tiny.dpo(model, rows, out / "run", **settings))
    return out


@pytest.mark.parametrize(("name", "rows"), [("ddp", 4), ("fsdp2", 4), ("tp", 8)])
def test_a_run_of_two_processes_takes_the_steps_of_one(name, rows, one, tmp_path):
    """Those of fsdp2 are started by the launcher, the others get the environment that it would give them."""
    flags = ["--num_processes", 2, *(["--parallelism_config_tp_size", 2] if name == "tp" else [])]
    settings = dict(model_name_or_path=one / "model", dataset_name=one / "rows.jsonl", output_dir=tmp_path / "run",
                    dtype="auto", packing="on", max_steps=4, per_device_train_batch_size=rows, learning_rate=1e-3,
                    logging_steps=1, bf16=False)  # fmt: skip
    arguments = [name, "dpo", *(word for key, value in settings.items() for word in (f"--{key}", value))]
    path = FOLDER / f"{name}.yaml"
    if name == "fsdp2":
        (tmp_path / "main.py").write_text(SCRIPT)
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", path, *flags]
        command += ["--main_process_port", free_port(), tmp_path / "main.py", *arguments]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(PATHS), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=240)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    else:
        given = prepare_multi_gpu_env(asked(path, *flags)).items() - os.environ.items()
        run_on_two(SCRIPT, *arguments, **{key: value for key, value in given if not key.startswith("MASTER_")})
    a, b = (metrics.read(folder / "run" / "metrics.jsonl") for folder in (one, tmp_path))
    for metric in ("loss", "grad_norm", "rewards/margins", "num_tokens"):
        want = [record[metric] for record in a]
        assert [record[metric] for record in b] == pytest.approx(want, abs=1e-9, rel=1e-6), metric
    a, b = (load_file(folder / "run" / "final" / "model.safetensors") for folder in (one, tmp_path))
    assert a.keys() <= b.keys() and max((a[key] - b[key]).abs().max().item() for key in a) < 1e-9


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        (dict(ACCELERATE_USE_DEEPSPEED="true"), "asks for DEEPSPEED, which is not served: FSDP2 .* as ZeRO-3 does"),
        (dict(ACCELERATE_USE_MEGATRON_LM="true"), "asks for MEGATRON_LM, which is not served"),
        (dict(ACCELERATE_USE_FSDP="true"), "asks for FSDP 1, which is not served: set fsdp_version: 2"),
        (dict(PARALLELISM_CONFIG_CP_SIZE="2"), "cp_size above 1 is not served"),
        (dict(PARALLELISM_CONFIG_TP_SIZE="2"), "tp_size = 2 of 1 processes"),
    ],
)
def test_what_is_not_served_is_refused(environment, sentence, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=sentence):
        make_accelerator(DpoRecipe())
