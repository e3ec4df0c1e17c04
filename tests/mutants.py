"""Plausible mistakes, planted one at a time in a copy of the sources: which of them do the tests see?

    python tests/mutants.py [--jobs 2] [--only WORD]

Run by hand: an hour of two cores. Each line says whether some test failed ("seen"), and which the first one was. A
mistake that is not seen calls for a test.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
IMPORTS = ("torch", "datasets", "transformers.trainer", "peft", "accelerate", "pytest", "_pytest.terminal")
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "build", "runs", "*.egg-info", "__pycache__", ".*_cache")


class Mutant(NamedTuple):
    """A mistake: `old` becomes `new` in a file; the tests that should see it."""

    name: str
    file: str
    old: str
    new: str
    tests: str  # files, or node ids, with blanks between


def plant(mutant: Mutant, tree: Path) -> None:
    """Put the mistake into a copy of the sources.

    Raises:
        SystemExit: its place is not there, or not the only one.
    """
    path = tree / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.name}: {mutant.old!r} stands {text.count(mutant.old)} times in {mutant.file}")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def child(tests: str, tree: Path, out: Path) -> None:
    """Run tests on a copy of the sources, in a fork of this process, which has imported what is not ours."""
    import pytest

    class First:
        failed = ""

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.failed and not self.failed:
                self.failed = report.nodeid

        def pytest_collectreport(self, report: pytest.CollectReport) -> None:
            if report.failed and not self.failed:
                self.failed = f"{report.nodeid} (cannot be imported)"

    os.chdir(tree)
    sys.path[:0] = [str(tree / part) for part in (".", "kernels", "tests", "tests/helpers")]
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:4])
    handle = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    first = First()
    quiet = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of plugins that the imports have loaded
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *quiet, *tests.split()], plugins=[first])
    out.write_text(json.dumps({"code": int(code), "first": first.failed}))
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", help="mutants whose name holds this word")
    parser.add_argument("--check", action="store_true", help="only whether each has its place in the sources")
    options = parser.parse_args()
    from mutants_table import MUTANTS

    chosen = [one for one in MUTANTS if options.only in one.name]
    folder = Path(tempfile.mkdtemp(prefix="mutants-"))
    trees = [folder / f"tree-{i}" for i in range(options.jobs)]
    for tree in trees:
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
    for one in chosen:
        plant(one, trees[0])
        shutil.copyfile(ROOT / one.file, trees[0] / one.file)
    if options.check:
        print(f"{len(chosen)} mistakes have their place")
        return
    for name in IMPORTS:
        importlib.import_module(name)
    running: dict[int, tuple[Mutant, Path, Path, float]] = {}
    free, waiting, unseen = list(trees), list(chosen), []
    while waiting or running:
        while waiting and free:
            mutant, tree = waiting.pop(0), free.pop()
            plant(mutant, tree)
            out = folder / f"{len(waiting)}.json"
            pid = os.fork()
            if pid == 0:
                child(mutant.tests, tree, out)
            running[pid] = mutant, tree, out, time.monotonic()
        pid, _ = os.wait()
        mutant, tree, out, began = running.pop(pid)
        shutil.copyfile(ROOT / mutant.file, tree / mutant.file)
        free.append(tree)
        found = json.loads(out.read_text()) if out.exists() else {"code": -1, "first": "the process died"}
        seen = found["code"] in (1, 2) and found["first"]
        unseen += [] if seen else [mutant.name]
        verdict = "seen  " if seen else "UNSEEN"
        print(f"{verdict} {mutant.name}  ({time.monotonic() - began:.0f} s) {found['first']}", flush=True)
    print(f"{len(chosen) - len(unseen)} of {len(chosen)} seen" + "".join(f"\n  not: {name}" for name in unseen))
    shutil.rmtree(folder)
    sys.exit(bool(unseen))


if __name__ == "__main__":
    main()
