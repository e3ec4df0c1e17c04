"""Two runs of bench_questions.py side by side: is the ranking the same, and what has changed?

    python benches/compare.py old.json new.json

A line has a method's median seconds in both, their ratio, and that ratio over the one of the bare matrix products (of
all methods, where a group has none): what is left when one machine was slower than the other. Two methods are in order
where their medians are more than a tenth apart; the rankings differ where a pair is in one order in one run and in the
other order in the other. Exit code 1 where one does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

APART = 1.1
GEMMS = "GEMMs alone"


class Run(NamedTuple):
    """What a JSON says."""

    about: dict[str, Any]
    groups: dict[str, dict[str, dict[str, Any]]]  # group: method: seconds, and what extra_info has
    cannot: dict[str, dict[str, str]]  # group: method: reason


def read(path: Path) -> Run:
    said = json.loads(path.read_text())
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for one in said["benchmarks"]:
        more = one["extra_info"]
        groups.setdefault(one["group"], {})[more["method"]] = {**more, "seconds": one["stats"]["median"]}
    cannot: dict[str, dict[str, str]] = {}
    for one in said["cannot_run"]:
        cannot.setdefault(one["group"], {})[one["method"]] = one["reason"]
    about = {"date": said["datetime"][:10], "commit": said["commit_info"]["id"], "command": said["command"]}
    return Run(about | said["machine_info"], groups, cannot)


def swapped(old: dict[str, float], new: dict[str, float]) -> list[tuple[str, str]]:
    """Pairs of methods, the first clearly faster in the old run and the second clearly faster in the new one."""
    found = []
    for one, other in combinations([name for name in old if name in new and name != GEMMS], 2):
        for a, b in ((one, other), (other, one)):
            if old[a] * APART < old[b] and new[b] * APART < new[a]:
                found.append((a, b))
    return found


def compared(old: Run, new: Run) -> tuple[list[str], int]:
    """The lines to print, and how many groups have another ranking."""
    lines, differ = [], 0
    for what in dict.fromkeys([*old.about, *new.about]):
        if old.about.get(what) != new.about.get(what):
            lines.append(f"{what}: {old.about.get(what)} -> {new.about.get(what)}")
    groups = list(dict.fromkeys([*old.groups, *new.groups, *old.cannot, *new.cannot]))
    shared = [group for group in groups if group in old.groups and group in new.groups]
    for group in groups:
        lines += ["", group]
        if group not in shared:
            lines.append(f"  only in the {'old' if group in old.groups else 'new'} run")
            continue
        before, after = ({m: f["seconds"] for m, f in run.groups[group].items()} for run in (old, new))
        both = [method for method in before if method in after]
        drift = statistics.median(after[m] / before[m] for m in ([GEMMS] if GEMMS in both else both))
        for method in dict.fromkeys([*before, *after, *old.cannot.get(group, {}), *new.cannot.get(group, {})]):
            if method in both:
                ratio = after[method] / before[method]
                line = f"{before[method]:9.4f} s {after[method]:9.4f} s {ratio:6.2f} {ratio / drift:6.2f}"
                lines.append(f"  {method:28s} {line}{changed(old.groups[group][method], new.groups[group][method])}")
            elif method in before or method in after:
                where = "old" if method in before else "new"
                run = new if method in before else old
                reason = run.cannot.get(group, {}).get(method, "not asked")
                lines.append(f"  {method:28s} only in the {where} run; in the other: {reason}")
        pairs = swapped(before, after)
        lines += [f"  another order: {a} was faster than {b}, and is slower" for a, b in pairs]
        differ += bool(pairs)
    return [*lines, "", f"the same ranking in {len(shared) - differ} of {len(shared)} groups"], differ


def changed(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Memory and FLOPs that are a tenth apart, errors that are twice as large or half as large."""
    said = []
    for what, limit in (("peak_mb", APART), ("nvd", APART)):
        a, b = old.get(what), new.get(what)
        if a and b and max(a / b, b / a) > limit:
            said.append(f"{what} {a:.3g} -> {b:.3g}")
    a, b = (max((one.get("errors") or {"": 0.0}).values()) for one in (old, new))
    if a and b and max(a / b, b / a) > 2:
        said.append(f"error {a:.1e} -> {b:.1e}")
    return "   " + ", ".join(said) if said else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    args = parser.parse_args()
    lines, differ = compared(read(args.old), read(args.new))
    print("\n".join(lines))
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
