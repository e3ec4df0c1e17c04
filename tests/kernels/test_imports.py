"""What imports what: the kernels need torch and numpy alone, and the folder `kernels` is in nobody's way."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kernels" / "align_kernels"


def python(code: str, *paths: Path, cwd: Path) -> str:
    """What a fresh interpreter prints; `paths` come before its own packages."""
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(map(str, paths)), OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- a bare interpreter -------------------------------------------------------------------------------------------
BARE = """
    import sys
    # torch and numpy with what they require; everything else is as if it were not installed
    ALLOWED = set("torch torchgen numpy typing_extensions sympy mpmath networkx jinja2 markupsafe".split())
    ALLOWED |= set(sys.stdlib_module_names) | {"filelock", "fsspec", "align_kernels"}

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] not in ALLOWED or name in BLOCKED:
                raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)

    sys.meta_path.insert(0, Blocker())
    import torch
    import align_kernels
    from align_kernels import linear_logprobs, dpo_loss, sft_loss, explain, backends_report

    hidden, weight = torch.randn(4, 6, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(0, 50, (4, 6))
"""


def bare(code: str, *blocked: str, cwd: Path) -> str:
    return python(
        f"BLOCKED = {set(blocked)!r}\n" + textwrap.dedent(BARE) + textwrap.dedent(code), PACKAGE.parent, cwd=cwd
    )


def test_torch_and_numpy_are_enough(tmp_path: Path):
    out = bare(
        """
        import importlib, pkgutil
        for module in pkgutil.walk_packages(align_kernels.__path__, "align_kernels."):
            if not module.name.startswith("align_kernels.backends.triton."):  # imported at the first launch
                importlib.import_module(module.name)
        out = linear_logprobs(hidden, weight, targets)
        (out.logp.sum() + out.entropy.sum()).backward()
        dpo_loss(hidden, weight, targets, torch.zeros(4)).loss.backward()
        assert hidden.grad.isfinite().all()
        # what any interpreter starts with (editable installs, coverage) is not ours
        print(sorted({name.split(".")[0] for name in sys.modules} & {"transformers", "triton", "accelerate", "peft"}))
        """,
        cwd=tmp_path,
    )
    assert out.strip() == "[]"


def test_without_the_extension(tmp_path: Path):
    out = bare(
        """
        assert explain(hidden, weight, targets).backend == "torch"
        loss = sft_loss(hidden, weight, targets)
        loss.loss.backward()
        eager = torch.nn.functional.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten())
        torch.testing.assert_close(loss.loss, eager)
        status = [s for s in backends_report() if s.name == "cpu"]
        assert status and not any(s.available for s in status)
        print(status[0].why_not)
        try:
            linear_logprobs(hidden, weight, targets, impl="cpu")
        except ValueError as error:
            print(error)
        """,
        "align_kernels._C",
        cwd=tmp_path,
    )
    report, refusal = out.strip().splitlines()
    assert report.startswith("the extension align_kernels._C is not built or fails to load") and "compiler" in report
    assert refusal == f'impl="cpu" cannot serve torch.float32 on cpu: {report}'


# -- direction ----------------------------------------------------------------------------------------------------
def imports(file: Path) -> set[str]:
    """Everything that a file imports, by its full name."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def offenders(folder: str, forbidden: tuple[str, ...], allowed: tuple[str, ...] = ()) -> list[str]:
    """Files of a folder that import something below a forbidden name, unless below an allowed one."""
    below = lambda name, tops: any(name == top or name.startswith(top + ".") for top in tops)  # noqa: E731
    files = sorted((PACKAGE / folder).rglob("*.py"))
    assert files
    return [
        f"{file.relative_to(PACKAGE)} imports {name}"
        for file in files
        for name in sorted(imports(file))
        if below(name, forbidden) and not below(name, allowed)
    ]


def test_kernels_never_import_the_engine():
    assert not offenders(".", ("align_engine",))


def test_nothing_but_torch_numpy_and_the_standard_library():
    tops = {name.split(".")[0] for file in PACKAGE.rglob("*.py") for name in imports(file)}
    assert tops - set(sys.stdlib_module_names) <= {"torch", "numpy", "align_kernels", "triton"}


def test_losses_import_torch_each_other_and_sums_alone():
    assert not offenders("losses", ("align_kernels",), ("align_kernels.losses", "align_kernels.sums"))
    assert {name.split(".")[0] for name in imports(PACKAGE / "sums.py")} == {"__future__", "torch"}
    tops = {name.split(".")[0] for file in (PACKAGE / "losses").glob("*.py") for name in imports(file)}
    assert tops - set(sys.stdlib_module_names) == {"torch", "align_kernels"}


def test_backends_import_neither_each_other_nor_anything_above():
    shared = ("align_kernels.backends.arguments", "align_kernels.backends.state")
    built = {"cpu": ("align_kernels._C",), "cuda": ("align_kernels._cuda",), "triton": ()}
    for name, extension in built.items():
        own = f"align_kernels.backends.{name}"
        assert not offenders(f"backends/{name}", ("align_kernels",), (own, *extension, *shared))
    for file in (PACKAGE / "backends").glob("*.py"):
        assert not [n for n in imports(file) if n.startswith("align_kernels") and not n.startswith(shared)], file


# the rooms from top to bottom; those of one line do not import each other
ROOMS = """
compat
__init__
explain fused from_logits
api sample
ops
autograd rehearsal
schedules.plan
schedules
schedules.compaction schedules.device_losses schedules.exponentials
schedules.lists
schedules.dense schedules.support
schedules.base
schedules.tiles
schedules.aliasing schedules.sharded
schedules.request
schedules.waves
units dispatch
eager gemm arguments
head
dtensor
backends losses
sums
"""


def modules() -> dict[str, Path]:
    """The files of the package by their names within it: `api`, `schedules`, `schedules.plan`."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        *folders, name = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(folders if name == "__init__" and folders else [*folders, name])] = file
    return found


def arrows() -> dict[str, set[str]]:
    """What each module of the package imports of it."""
    known = modules()

    def module(name: str) -> str:
        parts = name.split(".")[1:]
        return next((n for k in range(len(parts), 0, -1) if (n := ".".join(parts[:k])) in known), "__init__")

    own = {name: {x for x in imports(file) if x.split(".")[0] == "align_kernels"} for name, file in known.items()}
    built = {"align_kernels._C", "align_kernels._cuda"}
    return {name: {module(x) for x in found - built} - {name} for name, found in own.items()}


def test_imports_run_one_way():
    """Every module stands in a room, and imports from rooms below it or from its own folder alone."""
    floors = {room: floor for floor, line in enumerate(ROOMS.split("\n")) for room in line.split()}
    room = {
        name: next(r for r in (name, name.rpartition(".")[0], name.split(".")[0]) if r in floors) for name in modules()
    }
    assert set(room.values()) == set(floors)
    assert not [
        f"{name} imports {other}"
        for name, others in arrows().items()
        for other in others
        if room[other] != room[name] and floors[room[other]] <= floors[room[name]]
    ]


def test_no_import_runs_in_a_circle():
    TopologicalSorter(arrows()).prepare()


# -- the folder's name --------------------------------------------------------------------------------------------
LOAD = """
    import warnings
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=1))
    import kernels
    print(getattr(kernels, "__file__", None))
"""


def test_transformers_imports_beside_the_source_root(tmp_path: Path):
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert python(LOAD, ROOT, cwd=ROOT).strip() == "None"  # a namespace: nothing to find in it


def test_the_package_of_that_name_is_found_first(tmp_path: Path):
    """An installed `kernels` is what transformers sees, even with the repo root before it on the path."""
    package, info = tmp_path / "kernels", tmp_path / "kernels-0.18.2.dist-info"
    package.mkdir()
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    (package / "__init__.py").write_text(
        "class Anything:\n"
        "    def __init__(self, *args, **kwargs): pass\n"
        "def decorator(*args, **kwargs):\n"
        "    return lambda x: x\n"
        "def __getattr__(name):\n"
        "    if name.startswith('__'): raise AttributeError(name)\n"
        "    return decorator if name[0].islower() else Anything\n"
    )
    assert python(LOAD, ROOT, tmp_path, cwd=ROOT).strip() == str(package / "__init__.py")
