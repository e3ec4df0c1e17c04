"""What is declared, what a source distribution and a wheel hold, and how the extensions are linked."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import elf
import pytest
import setuptools

import align_engine
import align_kernels
from align_engine.recipe import shipped

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SHIPPED = ("align_engine", "kernels/align_kernels")


def named(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~\[; ]", text)[0].lower().replace("_", "-") for text in requirements}


def imported(folder: Path) -> set[str]:
    """Distributions of what the files of a folder import, the standard library and this project left out."""
    names = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(str(node.module).split(".")[0])
    owners = importlib.metadata.packages_distributions()
    foreign = names - set(sys.stdlib_module_names) - {"align_engine", "align_kernels"}
    return {owners.get(name, [name])[0].lower().replace("_", "-") for name in foreign}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    needed, extras = named(PROJECT["project"]["dependencies"]), PROJECT["project"]["optional-dependencies"]
    found = set().union(*(imported(ROOT / folder) for folder in SHIPPED))
    optional = {"triton": "triton", "trl": "trl", "liger-kernel": "liger"}  # and the extra of each
    commands = named([part for extra in ("data", "eval", "rate") for part in extras[extra]])
    assert found - needed - commands == optional.keys()
    assert needed - found == set()
    assert all(part in named(extras[extra]) for part, extra in optional.items())


def test_the_operators_alone_need_torch_alone():
    """The distribution align-kernels: what its files import, but for what they do without, is what it declares."""
    alone = tomllib.loads((ROOT / "packaging" / "align-kernels.toml").read_text())["project"]
    assert named(alone["dependencies"]) == {"torch"}
    assert imported(ROOT / "kernels" / "align_kernels") == {"torch", "triton"}
    for key in ("requires-python", "license", "authors"):
        assert alone[key] == PROJECT["project"][key]
    assert align_engine.__version__ == align_kernels.__version__


def test_a_wheel_holds_recipes_examples_and_types(given, tmp_path):
    distribution = setuptools.Distribution({"packages": []})
    build = given["cmdclass"]["build_py"](distribution)
    build.build_lib, build.editable_mode, build.packages, build.py_modules = str(tmp_path), False, [], []
    build.data_files = []
    (tmp_path / "align_engine").mkdir()
    build.run()
    held = tmp_path / "align_engine" / shipped.INSIDE
    assert {path.stem for path in (held / "recipes").glob("*.yaml")} == shipped.recipes().keys()
    assert (held / "examples" / "plain_torch.py").is_file() and (
        held / "recipes" / "accelerate" / "fsdp2.yaml"
    ).is_file()
    assert all((ROOT / folder / "py.typed").exists() for folder in SHIPPED)
    assert {"py.typed"} <= {*PROJECT["tool"]["setuptools"]["package-data"]["align_engine"]}


def test_one_floor_of_python_everywhere():
    floor = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + floor.replace(".", "")
    assert PROJECT["tool"]["pyright"]["pythonVersion"] == floor
    assert f"Python {floor} or later" in (ROOT / "README.md").read_text()


def test_a_source_distribution_holds_the_repository(tmp_path):
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)],
        cwd=ROOT, check=True, capture_output=True, env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    listed = set((tmp_path / "align_engine.egg-info" / "SOURCES.txt").read_text().split())
    wanted = {
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "SECURITY.md",
        "packaging/align-kernels.toml",
        "README.md",
        "LICENSE",
        "Makefile",
        "mkdocs.yml",
        "constraints.txt",
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
    }
    for folder in (*SHIPPED, "csrc", "tests", "benches", "recipes", "examples", "docs"):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        wanted |= {path.relative_to(ROOT).as_posix() for path in files if path.suffix not in (".so", ".pyc")}
    assert wanted - listed == set()
    assert not {name for name in listed if name.endswith((".so", ".pyc"))}


@pytest.fixture
def given(monkeypatch):
    """What setup.py gives to setuptools."""
    taken = {}
    monkeypatch.setattr(setuptools, "setup", taken.update)
    monkeypatch.chdir(ROOT)
    exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), {"__name__": "setup"})
    return taken


def test_extensions_are_compiled_with_what_hardens_them(given):
    for extension in given["ext_modules"]:
        assert {"-fstack-protector-strong", "-D_FORTIFY_SOURCE=2"} <= {*extension.extra_compile_args}, extension.name


def test_a_build_drops_the_cuda_extension_of_an_earlier_one_and_keeps_its_stub(tmp_path, given):
    package = tmp_path / "align_kernels"
    package.mkdir()
    stale = "_cuda" + sysconfig.get_config_var("EXT_SUFFIX")
    for name in (stale, "_cuda.pyi", "_C.pyi"):
        (package / name).touch()
    build = given["cmdclass"]["build_ext"](setuptools.Distribution())
    build.build_lib = str(tmp_path)
    build.run()
    assert {path.name for path in package.iterdir()} == {"_cuda.pyi", "_C.pyi"}


@pytest.mark.skipif(sys.platform != "linux", reason="the flags are those of ELF")
def test_extensions_are_linked_with_what_hardens_them():
    for library in (ROOT / "kernels" / "align_kernels").glob("_*.so"):
        assert elf.unhardened(library.read_bytes()) == [], library.name
