"""`fuse` beside the unfused trainers in other releases of TRL; by hand: it installs them.

    python tests/trl_window.py [RELEASE ...] [--at FOLDER] [--json FILE]       # default: 1.16.0 1.15.0 1.8.0
    python tests/trl_window.py --write     # the table of docs/from-trl.md, from benches/results/trl_window.json

Each release takes an environment of its own in FOLDER (default: a temporary folder, deleted), which shares all packages
of this one but TRL. Twenty steps of DPO, KTO, GRPO, RLOO and SFT are run without `fuse`, with `fuse()` before the
trainer is built, and with `fuse(trainer)` after: every number that is logged and every weight must agree within 1e-4.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RELEASES = ("1.16.0", "1.15.0", "1.8.0")
KINDS = ("dpo", "kto", "grpo", "rloo", "sft")
RESULT = ROOT / "benches" / "results" / "trl_window.json"


def environment(place: Path, release: str) -> Path:
    """The Python of an environment that has this release and shares everything else with this one."""
    python = place / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        packages = next(place.glob("lib/python*/site-packages"))
        shared = sysconfig.get_path("purelib")
        (packages / "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n")
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--ignore-installed"]
        subprocess.run([python, "-m", "pip", "install", *options, f"trl=={release}"], check=True)
    return python


def needs_a_gpu() -> bool:
    """Whether the unfused trainers of this environment's TRL run in Triton alone: here in its interpreter."""
    import importlib.util

    folder = Path(importlib.util.find_spec("trl").origin).parent  # type: ignore[union-attr,arg-type]
    source = (folder / "trainer" / "utils.py").read_text()
    return "add_fused_lm_head" in source and "_use_triton" not in source


def compare(out: Path) -> dict[str, dict[str, str]]:
    """In this environment's TRL: kind -> how fused -> "" where it agrees, else what does not."""
    sys.path[:0] = [str(ROOT / "tests" / "helpers")]
    import warnings

    warnings.simplefilter("ignore")
    import tiny
    import trl_runs

    from align_engine.integrations.trl import fuse

    model, found = tiny.write_model(out / "model", vocab=trl_runs.V), {}
    for kind in KINDS:
        theirs = trl_runs.run(trl_runs.build(kind, model, out / kind))
        found[kind] = {"steps": str(len(theirs[0]))}
        for how in ("before", "after"):
            try:
                if how == "before":
                    with fuse():
                        trainer = trl_runs.build(kind, model, out / kind)
                        ours = trl_runs.run(trainer)
                else:
                    ours = trl_runs.run(fuse(trl_runs.build(kind, model, out / kind)))
                trl_runs.same(ours, theirs)
                found[kind][how] = ""
            except Exception as error:  # said in the table, whatever it is
                found[kind][how] = f"{type(error).__name__}: {error}"[:300]
    return found


def table(report: dict[str, dict[str, Any]]) -> str:
    """The report as Markdown, a line of each release."""
    lines = [f"| TRL | {' | '.join(kind.upper() for kind in KINDS)} |", "|---" * (len(KINDS) + 1) + "|"]
    for release, found in report.items():
        cells = [found.get(kind) for kind in KINDS]
        said = [
            "cannot run" if one is None else "agrees" if not (one["before"] or one["after"]) else "differs"
            for one in cells
        ]
        lines.append(f"| {release} | {' | '.join(said)} |")
    return "\n".join(lines)


def main() -> int:
    """Run each release and say what agrees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*", default=RELEASES)
    parser.add_argument("--at", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        if needs_a_gpu():
            os.environ["TRITON_INTERPRET"] = "1"
        import trl

        found = {"trl": trl.__version__, **compare(options.inside)}
        (options.inside / "found.json").write_text(json.dumps(found))
        return 0
    if options.write:
        page = ROOT / "docs" / "from-trl.md"
        sys.path[:0] = [str(ROOT / "tests" / "helpers")]
        from command_lines import between

        page.write_text(between(page.read_text(), "window", table(json.loads(RESULT.read_text()))))
        return 0
    report, failed = {}, False
    with tempfile.TemporaryDirectory() as temporary:
        for release in options.releases:
            place = (options.at or Path(temporary)).resolve() / f"trl-{release}"
            python = environment(place, release)
            env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "CI": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
            with tempfile.TemporaryDirectory() as out:
                command = [python, __file__, "--inside", out]
                done = subprocess.run(command, env=env, capture_output=True, text=True)
                file = Path(out) / "found.json"
                said = (done.stderr.strip().splitlines() or [""])[-1]
                report[release] = json.loads(file.read_text()) if file.exists() else {"cannot run": {"": said}}
            for kind, how in report[release].items():
                if isinstance(how, dict):
                    wrong = {name: why for name, why in how.items() if name != "steps" and why}
                    failed |= bool(wrong)
                    print(f"TRL {release}, {kind}: {wrong or 'agrees over ' + how['steps'] + ' steps'}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
