"""Parts of a survey that go well, fail, hang and die, for tests/kernels/test_gpu_bench.py."""

import os
import time


def well(lab):
    for what in ("first", "second"):
        lab.attempt(what, lambda: None)
        lab.record(what, 1.0, "ms")


def fails(lab):
    lab.record("before", 1.0, "ms")
    raise ValueError("no such head")


def _each(lab, run):
    for what in ("first", "second", "third"):
        made, reason = lab.attempt(what, (lambda: 1.0) if what != "second" else run)
        lab.record(what, made, "ms", note=reason)


def hangs(lab):
    _each(lab, lambda: time.sleep(600))


def dies(lab):
    _each(lab, lambda: os._exit(11))


def loses_the_device(lab):
    def run():
        def gone():
            raise RuntimeError("an illegal memory access was encountered")

        lab.synchronize = gone
        raise ValueError("the kernel")

    _each(lab, run)
