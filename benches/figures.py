"""A run of bench_questions.py as tables: docs/tables.py puts them on docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from compare import GEMMS, Run, read

RESULT = Path(__file__).parent / "results" / "bench.json"
OURS = "align_kernels"
WHATS = ("forward", "gradient", "sft", "dpo", "kto", "ppo-clip", "grpo", "dpo step", "grpo step")
IN_SHORT = "dpo, TinyLlama-1.1B, trained, dense, float32"
QUIET = 0.5  # processes that want a core, at most, where nothing else runs


def table(header: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(list(header)) + "|", *lines[1:], ""])


def groups_of(run: Run, what: str) -> list[str]:
    return [group for group in run.groups if group.split(", ")[0] == what]


def methods_of(run: Run, groups: list[str]) -> list[str]:
    """In the order of their first appearance; ours first, the bare products last."""
    found = dict.fromkeys(method for group in groups for method in [*run.groups[group], *run.cannot.get(group, {})])
    return sorted(found, key=lambda method: (not method.startswith(OURS), method == GEMMS))


def about() -> str:
    """Date, commit, machine, versions and command, a sentence each."""
    run = read(RESULT)
    said = run.about
    there = ", ".join(f"{name} {version}" for name, version in said["versions"].items() if version)
    gone = [name for name, version in said["versions"].items() if not version]
    lines = [
        f"{said['date']}, commit {said['commit'][:7]}, `{said['command']}`",
        f"{said['cpu']['brand_raw']}, {said['cpu']['count']} cores, {said['instructions']}, threads: {said['threads']}",
        f"Python {said['python_version']}, {there}" + (f"; not installed: {', '.join(gone)}" if gone else ""),
    ]
    if said["load_before"] > QUIET:
        lines.append(
            f"**Provisional: others used the machine** ({said['load_before']} processes wanted a core before it began)"
        )
    return "".join(f"- {line}.\n" for line in lines)


def over_ours(what: str) -> str:
    """Rows methods, columns groups: times of ours in the first row, all others over them."""
    run = read(RESULT)
    groups = groups_of(run, what)
    if not groups:
        return "Not in this run.\n"
    rows = []
    for method in methods_of(run, groups):
        row = [method]
        for group in groups:
            figure, ours = run.groups[group].get(method), run.groups[group][OURS]["seconds"]
            if figure is None:
                row.append("-")
            elif method == OURS:
                row.append(f"{1e3 * ours:.0f} ms")
            else:
                row.append(f"{figure['seconds'] / ours:.2f}")
        rows.append(row)
    reasons: dict[tuple[str, str], list[str]] = {}
    for group in groups:
        for method, reason in run.cannot.get(group, {}).items():
            reasons.setdefault((method, reason), []).append(group)
    said = [
        f"- {method}: {reason.replace('<', '&lt;')}" + (f" ({'; '.join(where)})" if len(where) < len(groups) else "")
        for (method, reason), where in reasons.items()
    ]
    header = ("", *(group.partition(", ")[2] for group in groups))
    return table(header, rows) + ("\nCannot run:\n\n" + "\n".join(said) + "\n" if said else "")


def in_short() -> str:
    """The one question of the README: each method's time over ours, memory and FLOPs; the slowest last."""
    methods = read(RESULT).groups[IN_SHORT]
    ours = methods[OURS]["seconds"]
    rows = [
        (
            method,
            f"{figure['seconds'] / ours:.2f}",
            f"{figure['peak_mb']:.0f}",
            f"{figure['nvd']:.0f}" if figure["nvd"] else "",
        )
        for method, figure in sorted(methods.items(), key=lambda item: (item[0] != OURS, item[1]["seconds"]))
        if method != GEMMS
    ]
    return table(("", "time over ours", "peak MB above inputs and gradients", "FLOPs, N V D"), rows)


def everything() -> str:
    """A folded table for each group."""
    run, text = read(RESULT), ""
    for group, methods in run.groups.items():
        rows = []
        for method in methods_of(run, [group]):
            if method not in methods:
                continue
            figure = methods[method]
            number = lambda key, form, f=figure: "" if f.get(key) is None else format(f[key], form)  # noqa: E731
            error = max((figure["errors"] or {"": 0.0}).values())
            rows.append(
                (method, f"{1e3 * figure['seconds']:.1f}", number("share_of_gemms", ".0%"), number("nvd", ".2f"),
                 number("gflop", ".1f"), number("peak_mb", ".0f"), f"{error:.0e}" if error else "")
            )  # fmt: skip
        count = next(iter(methods.values()))["rows"]
        unit = "prompts" if " step" in group else "rows"
        header = ("", "ms", "share of the bare products' rate", "N V D", "GFLOP", "peak MB", "error")
        text += (
            f'<details markdown="1"><summary>{group}: {count} {unit}</summary>\n\n{table(header, rows)}\n</details>\n'
        )
    return text
