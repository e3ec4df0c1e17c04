"""Tests in Triton's interpreter: tests/kernels/test_triton_interpreted.py starts the process of its own."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton_interpreter

    triton_interpreter.install()
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # memory that is not written is NaN
