"""The CUDA kernels compiled for GPUs that are not here: registers, spills, shared memory and instructions a logit.

`make gpu-registers` writes them beside Triton's (triton_compile.py).
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

from triton_instructions import Code, disassembled, parsed

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "csrc" / "cuda" / "kernels.cu"
FIGURES = Path(__file__).parent / "cuda_registers.json"  # as triton_registers.json
WARPS = {"token_loss": 20}  # of a block, others 14
DTYPES = {"float": "float32", "Bf16": "bfloat16", "F16": "float16"}
Figures = dict[str, dict[str, str]]  # of each target, kernel and what it is for: the columns of the page
PACKS = 2  # that a thread takes on its way around the loop over a row


class Resources(NamedTuple):
    registers: int
    spilled: int  # bytes
    shared: int  # bytes, static


def constant(name: str) -> Any:
    """A list that setup.py defines."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"setup.py does not define {name}")


def nvcc() -> str | None:
    """nvcc of CUDA_HOME, of PATH, or of the dev extra's wheels."""
    wheel = next((Path(p) / "nvidia/cu13/bin" for p in sys.path if (Path(p) / "nvidia/cu13/bin/nvcc").exists()), None)
    places = [Path(os.environ["CUDA_HOME"]) / "bin"] if "CUDA_HOME" in os.environ else []
    for place in (*places, os.environ.get("PATH", ""), wheel):
        found = shutil.which("nvcc", path=str(place)) if place else None
        if found:
            return found
    return None


def release(compiler: str) -> str:
    """As in "13.0"."""
    return re.findall(r"release ([\d.]+)", subprocess.check_output([compiler, "--version"], text=True))[0]


def compiled(compiler: str, arch: str, cubin: Path, source: Path = SOURCE) -> dict[str, Resources]:
    """What every kernel takes, by its mangled name, compiled for "90"; their code is left in `cubin`."""
    flags = [flag for flag in constant("NVCC_FLAGS") if flag not in ("-Xfatbin", "-compress-all")]
    command = [compiler, "-cubin", f"-arch=sm_{arch}", *flags, "-Xptxas", "-v", "-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return resources(done.stderr)


def resources(log: str) -> dict[str, Resources]:
    """From what ptxas says."""
    found, name, spills = {}, "", 0
    for line in log.splitlines():
        if match := re.search(r"Function properties for (\w+)", line):
            name = match[1]
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills = int(match[1]) + int(match[2])
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found[name] = Resources(int(match[1]), spills, int(shared[1]) if shared else 0)
    return found


def title(demangled: str) -> str:
    """The kernel and what it is for, as in "backward | float32 to bfloat16, plain"."""
    found = re.search(r"::(\w+)_kernel(?:<(.*)>)?\(", demangled)
    assert found is not None, demangled
    kernel, arguments = found[1], found[2] or ""
    types = [DTYPES[name] for name in re.findall(r"\b(float|Bf16|F16)\b", arguments)]
    if not types:
        return f"{kernel} | all losses"
    plain, bare = ([word == "true" for word in re.findall(r"\b(true|false)\b", arguments)] + [True, True])[:2]
    words = [" to ".join(dict.fromkeys(types)), "plain" if plain else "any head" if bare else "all options"]
    return f"{kernel} | {', '.join(words + ['clamp and entropy'] * (plain and not bare))}"


def code_of(cubin: Path) -> dict[str, str]:
    """The assembly of each kernel, by its mangled name."""
    found, name = {}, ""
    for line in disassembled(cubin.read_bytes()).splitlines():
        if match := re.match(r"\s*\.section\s+(\S+?),", line):
            name = match[1].removeprefix(".text.") if match[1].startswith(".text.") else ""
        elif name:
            found.setdefault(name, []).append(line)
    return {name: "\n".join(lines) for name, lines in found.items()}


def written(before: bool) -> dict[str, dict[str, Figures]]:
    """The figures of FIGURES with those of the sources as they are, of each release of nvcc: before and now, by target.
    With `before` these are what later ones are compared with. Without nvcc nothing is new."""
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    if (compiler := nvcc()) is None:
        return known
    now = {}
    for arch in constant("CUDA_ARCHS"):
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernels.cubin"
            now[f"sm_{arch}"] = figures(compiled(compiler, arch, cubin), cubin)
    of = release(compiler)
    known[of] = {"before": now if before else known.get(of, {}).get("before", now), "now": now}
    FIGURES.write_text(json.dumps(known, indent=1) + "\n")
    return known


def around(code: Code, exponentials: int) -> int:
    """Instructions of the shortest way around the loop with the most exponentials on which so many of them are made: a
    way on which a thread finds no logits left is shorter. 0 where there is none."""
    made = [int("MUFU.EX2" in word) for word in code.words]
    backwards = [(sum(made[j : i + 1]), j, i) for i, goes in enumerate(code.after) for j in goes if j < i]
    if not backwards or max(backwards)[0] < exponentials:
        return 0
    _, begin, end = max(backwards)
    queue, seen = deque([(begin, made[begin], 1)]), {(begin, made[begin])}
    while queue:
        i, count, length = queue.popleft()
        if i == end and count == exponentials:
            return length
        for j in code.after[i]:
            place = j, count + made[j]
            if begin <= j <= end and place[1] <= exponentials and place not in seen:
                seen.add(place)
                queue.append((*place, length + 1))
    return 0


def a_logit(title: str, text: str) -> float:
    """Of the kernels that read each logit once, of plain heads, whose exponentials are one a logit and, forward, one a
    pack for its maximum; 0 for others."""
    kernel, what = title.split(" | ")
    if kernel not in ("forward", "backward") or "plain" not in what:
        return 0.0
    pack = 4 if what.startswith("float32") else 8
    return round(around(parsed(text), PACKS * (pack + (kernel == "forward"))) / (PACKS * pack), 1)


def figures(made: dict[str, Resources], cubin: Path) -> dict[str, str]:
    """Warps, registers, spilled and shared bytes and instructions a logit of every kernel but those of float16, which
    are as those of bfloat16."""
    names = subprocess.run(["c++filt"], input="\n".join(made), capture_output=True, text=True, check=True).stdout
    titles, code = dict(zip(made, map(title, names.splitlines()))), code_of(cubin)
    return {
        titles[name]: f"{WARPS.get(titles[name].split()[0], 14)} {r.registers} {r.spilled} {r.shared} "
        f"{a_logit(titles[name], code[name]):g}"
        for name, r in sorted(made.items(), key=lambda item: titles[item[0]])
        if "float16" not in titles[name].replace("bfloat16", "")
    }
