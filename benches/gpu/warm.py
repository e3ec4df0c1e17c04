"""Compiles a share of the kernels that the survey will launch, on small tensors: python -m warm I OF.

Triton keeps them by dtype, options and divisibility of sizes, so that few rows and a narrow head stand for many.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import heads
import methods
import questions
import torch
from common import Lab, Setting
from questions import Question
from rows import Tile, variants


def warm(i: int, of: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Setting(False, Path(folder), ""), "warm", float("inf"), frozenset(), lambda what: None)
        lab.head = lambda name: (64, 152064)  # type: ignore[method-assign]
        questions.HEADS["warm"] = (64, 152064)
        torch.manual_seed(i)
        todo = []
        for what in ("forward", "sft", "gradient"):
            question, b = heads.made(lab, Question(what, "warm", 64, what != "forward", dtype="bfloat16"))
            todo += [
                (key, lambda m=m, q=question, b=b: methods.answer(m, q, b))
                for key, m in heads.known(question, False).items()
                if "CuTe" not in key
            ]
        tile = Tile(lab, 64)
        todo += variants(tile)
        for what, run in todo[i::of]:
            _, reason = lab.attempt(what, run)
            if reason:
                print(f"warming {what}: {reason}", flush=True)


if __name__ == "__main__":
    warm(int(sys.argv[1]), int(sys.argv[2]))
