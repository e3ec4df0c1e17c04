"""Options of the benches, and what their JSON says of the machine and of methods that cannot run."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("benches", "", "kernels", "tests/helpers")]
PACKAGES = "align-engine torch transformers trl liger-kernel cut-cross-entropy verl quack-kernels numpy".split()
CANNOT_RUN = pytest.StashKey[list[dict[str, str]]]()
LOAD = pytest.StashKey[float]()  # processes that wanted a core before anything was measured


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, default=11.0, help="of bench_questions.py, all of it (default: 11)")
    parser.addoption("--short", action="store_true", help="its short form: each kind of question once, tiny")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CANNOT_RUN], config.stash[LOAD] = [], round(os.getloadavg()[0], 2)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """What figures depend on, and no name of the machine."""
    import torch

    cpu, python = machine_info["cpu"], machine_info["python_version"]
    machine_info.clear()
    machine_info["cpu"] = {key: cpu[key] for key in ("brand_raw", "arch", "count") if key in cpu}
    machine_info |= {"python_version": python, "threads": torch.get_num_threads()}
    machine_info["instructions"] = torch.backends.cpu.get_cpu_capability()
    machine_info["load_before"] = config.stash[LOAD]
    machine_info["versions"] = {}
    for name in PACKAGES:
        try:
            machine_info["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            machine_info["versions"][name] = None


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["cannot_run"] = config.stash[CANNOT_RUN]
    output_json["command"] = f"python -m pytest {' '.join(config.invocation_params.args)}"
    output_json["commit_info"] = {key: output_json["commit_info"].get(key) for key in ("id", "time", "dirty")}


@pytest.fixture
def cannot_run(request: pytest.FixtureRequest) -> list[dict[str, str]]:
    """Group, method and reason of each that cannot; a test adds its own."""
    return request.config.stash[CANNOT_RUN]
