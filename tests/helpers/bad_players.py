"""Processes of benches/turns.py that come to no good."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


def dies(pipe: Any, method: str, log: str) -> None:
    pipe.recv()
    Path(log).write_text("double free or corruption (out)\n")
    os.abort()


def hangs(pipe: Any, method: str, log: str) -> None:
    time.sleep(60)
