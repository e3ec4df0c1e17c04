"""The questions of ../questions.py about LM heads: time beside peers and bare GEMMs, peak memory and errors.

The GEMMs are those that the answer needs, 4096 rows at a time. Errors are against float64, over the largest true value.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import methods
import questions
from common import Lab
from methods import OURS, Method
from questions import Batch, Question
from torch import Tensor

from align_kernels import linear_logprobs
from align_kernels.backends import triton

CHUNK = 4096


@contextmanager
def through_tiles() -> Iterator[None]:
    """The Triton backend without its forward that writes no logits."""
    before = triton.on_chip.why_not
    triton.on_chip.why_not = lambda hidden, weight: "tiles are measured"
    try:
        yield
    finally:
        triton.on_chip.why_not = before


def tiles(b: Batch) -> Tensor:
    with through_tiles():
        return linear_logprobs(b.hidden, b.weight, b.targets, impl="triton").logp


def known(question: Question, dry: bool) -> dict[str, Method]:
    """Every way to answer: the library's backends by name, and the peers that are written for a GPU or run anywhere."""
    own = ("triton", "torch", "cpu") if dry else ("triton", "cuda", "torch")
    found = {f"{OURS}, {impl}": methods.ours(impl) for impl in own}
    if question.what == "forward":
        found[f"{OURS}, triton through tiles"] = Method(tiles)
    if not dry:
        found["Liger CuTe"] = Method(methods.liger_cute)
    for_a_gpu = ("Liger", "Cut Cross-Entropy", "torch.compile")  # or too slow to compile in a trial
    peers = {name: method for name, method in methods.METHODS.items() if name != OURS}
    return found | {name: method for name, method in peers.items() if not (dry and name in for_a_gpu)}


def made(lab: Lab, question: Question) -> tuple[Question, Batch]:
    """The question as this device asks it, and its inputs."""
    if lab.dry:
        question = Question(
            question.what, "tiny", lab.rows(question.rows), question.trained, question.softmax, clamp=question.clamp
        )
    batch = questions.make(question, lab.device, time.time_ns() % 2**31)
    return question, batch.to_train(question)


def gemms(question: Question, b: Batch) -> None:
    w = b.weight.detach()
    for rows in b.hidden.detach()[b.targets != questions.IGNORE].split(CHUNK):
        methods.products(rows, w, question.products)


def race(lab: Lab, **asked: Any) -> None:
    question, b = made(lab, Question(**asked))
    ways = known(question, lab.dry)

    def run(method: Method) -> Tensor:
        b.forget()
        return methods.answer(method, question, b)

    took = lab.race({methods.GEMMS: lambda: gemms(question, b), **{key: lambda m=m: run(m) for key, m in ways.items()}})
    bare = took[methods.GEMMS].milliseconds
    b.forget()
    lab.free()
    true, _ = lab.attempt("float64", lambda: questions.truth(question, b))
    for key, measured in took.items():
        more = {"peak MiB": measured.peak_mib, "note": measured.note}
        if measured.milliseconds and bare:
            more["share of bare GEMMs"] = bare / measured.milliseconds
        if measured.milliseconds and key in ways and true is not None:
            errors, reason = lab.attempt(key, lambda m=ways[key]: questions.errors(question, b, run(m), true))
            more |= {f"error of {what}": error for what, error in (errors or {}).items()} or {"note": reason}
        lab.record(key, measured.milliseconds, "ms", rows=question.rows, **more)
