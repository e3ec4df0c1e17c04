"""A fuzz of the command line: broken recipes, flags, rows, models, code, run folders and paths.

    python tests/cli/fuzz.py --count 500 --seed 0 --log fuzz.jsonl
    python tests/cli/fuzz.py --seed 0 --only 17        # one case again, with its message, and a traceback if it has one

Every case ends with exit code 0, or in a sentence with exit code 2 (1 where the run itself failed). A fault is anything
else: a traceback, Python's own words for an error, no end, a file of the user that is not what it was.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import io
import json
import logging
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[up] / part) for up, part in ((1, "helpers"), (2, ""), (2, "kernels"))]

from cases import KINDS, METHODS, MINE, Bench, Case

LIMIT = 60  # seconds of a case
PYTHON_ERROR = re.compile(r"[\w.]*(Error|Exception|Exit|Interrupt|Warning|Iteration)\b( in \S+, line \d+)?(:|$)")


class Result(NamedTuple):
    """How a case ended."""

    code: int | None  # None: not at all
    message: str  # on the error stream; on the other one where there is none
    faults: list[str]
    seconds: float
    trace: str  # of an error that left the command


def numbered(count: int) -> list[tuple[int, str]]:
    """(number, kind) of so many cases: the kinds in turn."""
    names = list(KINDS)
    return [(number, names[number % len(names)]) for number in range(count)]


def fuzz(bench: Bench, seed: int, which: list[tuple[int, str]], place: Path) -> Iterator[tuple[int, str, Case, Result]]:
    """Each case, a function of its number and the seed, with its result; the inputs of one at a time lie in `place`."""
    import datasets.config

    from align_engine.reports import report

    logging.disable()
    try:
        with (
            mock.patch.object(datasets.config, "HF_DATASETS_CACHE", place / "cache"),
            mock.patch.object(report, "line_chart", lambda title, _: report.Figure(title, b"")),  # half of a run's time
        ):
            for number, name in which:
                here = place / str(number)
                here.mkdir(parents=True)
                case = KINDS[name](random.Random(f"{seed} {number}"), bench, here)
                yield number, name, case, attempt(case, bench, here)
                shutil.rmtree(here)
    finally:
        logging.disable(logging.NOTSET)


def attempt(case: Case, bench: Bench, place: Path) -> Result:
    """Run a case in this process, and judge its end."""
    from align_engine import cli

    (place / "home").mkdir()
    before, whole = contents(place), stamps(bench.path)
    written = io.BytesIO(), io.BytesIO()
    out, said = map(
        io.TextIOWrapper, written, ("utf-8",) * 2, ("strict", "backslashreplace")
    )  # as Python's own two are
    code, trace, began = None, "", time.perf_counter()
    with surroundings(place), contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        try:
            code = cli.main(case.arguments)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        except BaseException:  # it would be a traceback on the terminal
            trace = traceback.format_exc()
    seconds = time.perf_counter() - began
    for stream in (out, said):
        stream.flush()
    message, after = (written[1].getvalue() or written[0].getvalue()).decode(), contents(place)
    faults = judged(code, message, trace) + sorted(changes(before, after, code))
    faults += ["another case's inputs were changed"] * (stamps(bench.path) != whole)
    trained = case.arguments and case.arguments[0] in METHODS and not {"-h", "--help"} & {*case.arguments}
    faults += ["exit code 0 without a model"] * bool(code == 0 and trained and not list(place.rglob("final")))
    return Result(code, message, faults, seconds, trace)


class DoesNotEnd(BaseException):
    """A case that does not end."""


@contextlib.contextmanager
def surroundings(place: Path) -> Iterator[None]:
    """The folder that a command works in, its home, nothing to read and an end to its time; as before afterwards."""

    def hang(*_: Any) -> None:
        raise DoesNotEnd

    home, stdin, path, handler = os.environ.get("HOME", ""), sys.stdin, sys.path[:], signal.signal(signal.SIGALRM, hang)
    signal.alarm(LIMIT)
    try:
        with contextlib.chdir(place), warnings.catch_warnings():
            warnings.simplefilter("default")
            os.environ["HOME"], sys.stdin = str(place / "home"), io.StringIO()
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        os.environ["HOME"], sys.stdin, sys.path[:] = home, stdin, path


def judged(code: int | None, message: str, trace: str) -> list[str]:
    """What is wrong with an exit code and with what stands on the error stream."""
    if DoesNotEnd.__name__ in trace + message:
        return ["no end"]
    if trace or "Traceback" in message:
        return ["traceback"]
    if code not in (0, 1, 2):
        return [f"exit code {code}"]
    if code == 0 or (code == 2 and message.startswith("usage: align")):
        return []
    sentence = message.rpartition("align: error: ")[2].strip()
    return [
        fault
        for fault, found in {
            "no message": not sentence,
            "Python's own words": PYTHON_ERROR.match(sentence) or "--debug" in sentence,
            "a long message": len(sentence) > 2000 or sentence.count("\n") > 40,
            "an address in memory": re.search(r" at 0x[0-9a-f]{6,}", sentence),
            "control characters": re.search(r"[\x00-\x08\x0b-\x1f\x7f]", sentence),
        }.items()
        if found
    ]


def contents(place: Path) -> dict[str, str]:
    """What lies at each path below a folder; of files a hash."""

    def what(path: Path) -> str:
        if path.is_symlink():
            return f"a link to {os.readlink(path)}"
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"

    return {str(path.relative_to(place)): what(path) for path in place.rglob("*")}


def stamps(place: Path) -> set[tuple[str, int, int]]:
    """Path, time and size of each file below a folder."""
    return {(str(path), path.lstat().st_mtime_ns, path.lstat().st_size) for path in place.rglob("*") if path.is_file()}


def changes(before: dict[str, str], after: dict[str, str], code: int | None) -> Iterator[str]:
    """What became of the user's files: all of them outside a run's folder, `MINE` inside it; and what a command left
    that refused its input."""
    mine = {name for name in before if not name.startswith("out/") or name.removeprefix("out/") in MINE}
    for name in mine - {"home"}:
        if after.get(name) != before[name]:
            yield f"{name} was {'changed' if name in after else 'deleted'}"
    own = ("out/", "home/")  # a run's folder, and what libraries keep of their own
    if code == 2 and (
        left := [
            name for name in after.keys() - before.keys() if not name.startswith(own) and "__pycache__" not in name
        ]
    ):
        yield f"{min(left)} was left behind"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", default=[], help="numbers of cases")
    parser.add_argument("--kind", choices=list(KINDS), help="cases of this kind alone")
    parser.add_argument("--log", type=Path, default=os.devnull, help="a file of JSON lines, one for each case")
    options = parser.parse_args()
    which = numbered(max([options.count - 1, *options.only]) + 1)
    which = [(number, name) for number, name in which if not options.only or number in options.only]
    which = [(number, name) for number, name in which if options.kind in (None, name)]
    ends: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in KINDS}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, open(options.log, "w") as log:
        bench = Bench(Path(folder) / "bench")
        for number, name, case, result in fuzz(bench, options.seed, which, Path(folder) / "cases"):
            ends[name][f"exit {result.code}"] += 1
            ends[name]["faults"] += bool(result.faults)
            row = {"number": number, "kind": name, **case._asdict(), **result._asdict()}
            print(json.dumps(row), file=log, flush=True)
            if result.faults or options.only:
                print(f"{number} {name}: {case.what!r:.150}: {', '.join(result.faults) or 'as it should be'}")
                print(
                    f"  exit {result.code}, {result.seconds:.1f} s: {result.message.strip()}{result.trace}", flush=True
                )
    for name, found in ends.items():
        print(f"{name:8} {dict(sorted(found.items()))}")
    total = sum(ends.values(), collections.Counter[str]())
    seconds = time.perf_counter() - began
    print(f"{len(which)} cases of seed {options.seed} in {seconds:.0f} s: {dict(sorted(total.items()))}")
    return int(total["faults"] > 0)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
