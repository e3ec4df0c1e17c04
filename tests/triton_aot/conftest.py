"""Ahead-of-time compilation, which needs a process of its own: tests/kernels/test_triton_compiled.py starts it."""

import os

if os.environ.get("ALIGN_TRITON_AOT") != "1":
    collect_ignore_glob = ["test_*.py"]
