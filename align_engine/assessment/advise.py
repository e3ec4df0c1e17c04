"""`align advise`: the talk's method guide as a program."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from align_engine.assessment import asking
from align_engine.assessment.first_steps import commands, made_to_fit, memory, recipe_of, taken
from align_engine.assessment.guide import GRADES, WORDS, Advice, guide, ranked
from align_engine.assessment.sections import AdviseRecipe, SituationSection
from align_engine.assessment.situation import Situation, situation
from align_engine.errors import BadInput, printable
from align_engine.planning.cards import size
from align_engine.recipe.secrets import masked
from align_engine.run import quiet_libraries
from align_engine.training.checkpoint import SIDE, settle

KIND = "align advise"  # what marks a file as one of ours
PLANNED = 3  # methods whose memory is computed, which takes seconds each


def run(settings: AdviseRecipe) -> None:
    """Print the methods in their order, and how to begin with the first; write the same as JSON.

    Raises:
        BadInput: data, a model or a memory that cannot be read; a file of somebody else's in the place of `json`.
    """
    quiet_libraries()
    if settings == AdviseRecipe() and sys.stdin.isatty():
        settings = asking.asked(settings)
    target = checked(settings.output.json)
    said = advise(settings)
    show(markdown(said))
    if target is not None:
        side = target.with_name(target.name + SIDE)
        try:
            side.write_text(json.dumps(said, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            settle(side, target)
        except OSError as error:
            raise BadInput(f"json = {str(target)!r} cannot be written: {error.strerror or error}") from error


def checked(path: str | None) -> Path | None:
    """Where JSON goes. Raises BadInput where something lies that is no earlier advice."""
    if path is None:
        return None
    target = Path(path)
    if target.exists():
        try:
            ours = json.loads(target.read_text(encoding="utf-8"))["command"] == KIND
        except (OSError, ValueError, KeyError, TypeError):
            ours = False
        if not ours:
            raise BadInput(f"json = {path!r} is there already and no earlier advice: give another name")
    elif not target.parent.is_dir():
        raise BadInput(f"json = {path!r}: there is no folder {str(target.parent)!r}")
    return target


def advise(settings: AdviseRecipe) -> dict[str, Any]:
    """Everything that is said, as JSON values."""
    section = settings.situation
    at = situation(section)
    found = [told(one, at, section) for one in ranked(at.words)]
    with Console(stderr=True).status("") as status:
        done = 0
        while done < PLANNED and not (one := found[done])["missing"]:
            status.update(f"computing the memory of {one['method']}")
            one["memory"] = memory(one["method"], at, section.model_name_or_path, one["needs"], taken)
            if done == 0 and one["memory"].get("fits") is False:
                fit(one, at, section)
            if one["missing"]:  # the next one is the first now
                found.sort(key=lambda one: bool(one["missing"]))
            else:
                done += 1
    for number, one in enumerate(found, 1):
        one["rank"] = number
        del one["needs"]
    return masked({
        "command": KIND,
        "situation": {
            "gpus": at.gpus, "card": {"name": at.card.name, "bytes": at.card.size}, "assessors": at.assessors,
            "have": sorted(at.have), "data": section.dataset_name, "rows": at.rows, "task": at.task,
            "model": section.model_name_or_path,
            "billions": round(at.billions, 3), "words": sorted(at.words),
        },
        "methods": found,
    })  # fmt: skip


def told(advice: Advice, at: Situation, section: SituationSection) -> dict[str, Any]:
    """What is said of one method."""
    model, rule = section.model_name_or_path, guide()["methods"][advice.method]
    needs, possible = {need.word for need in advice.needs}, not advice.missing
    return {
        "method": advice.method, "title": rule["title"], "slide": rule["slide"], "how": rule["how"],
        "data": rule["data"], **{name: rule[name] for name in GRADES},
        "applicability": {"points": advice.points, "word": advice.applicability,
                          "reasons": [one._asdict() for one in advice.reasons]},
        "missing": [" or ".join(guide()["get"][word] for word in need) for need in advice.missing],
        "needs": needs, "recipe": recipe_of(advice.method, at.billions),
        "memory": None,
        "commands": commands(advice, at, model, section.dataset_name) if possible else [],
    }  # fmt: skip


def fit(one: dict[str, Any], at: Situation, section: SituationSection) -> None:
    """Say of a method that does not fit how it can be made to. On one GPU, one that cannot be lacks memory."""
    found = memory(one["method"], at, section.model_name_or_path, one["needs"], made_to_fit)
    one["memory"] |= found
    if "fit" in found:
        one["commands"][-1] += f" --fit {shlex.quote(section.memory or 'auto')}"
    elif at.gpus < 2:
        one["missing"], one["commands"] = [found.get("refusal") or found["why_not"]], []
        one["applicability"]["word"] = "not yet"


def markdown(said: dict[str, Any]) -> str:
    """The same for people."""
    first, rows = said["methods"][0], [["", "method", *GRADES, "applicability", "memory"]]
    rows += [["---"] * len(rows[0]), *(list(row(one)) for one in said["methods"])]
    parts = ["# Which method", sentence(said["situation"]), "\n".join(f"| {' | '.join(line)} |" for line in rows)]
    parts.append("\n".join(f"{one['rank']}. **{one['title']}**: {reason(one)}" for one in said["methods"]))
    if first["missing"]:
        parts.append("Nothing can be done yet with what is there.")
    else:
        parts += [f"## Begin with {first['title']}", first["how"], "\n".join(["```", *first["commands"], "```"])]
        parts.append("\n".join(f"- {note}" for note in notes(first)))
    return "\n\n".join(parts) + "\n"


def sentence(at: dict[str, Any]) -> str:
    """The situation in a line."""
    card = f"{at['gpus']} x {at['card']['name']}" if at["gpus"] else "no GPU"
    people = f"{at['assessors']} assessors" if at["assessors"] else "no assessors"
    rows = f" ({at['rows']:,} rows in {at['data']})" if at["rows"] else ""
    task, held = guide()["tasks"][at["task"]].lower(), ", ".join(at["have"]) or "no data"
    return f"{card}, {people}, {held}{rows}; {task}; {at['billions']:.3g} billion weights."


def row(one: dict[str, Any]) -> Iterator[str]:
    """A method's line of the table."""
    yield from (str(one["rank"]), f"{one['title']} (`{one['method']}`)")
    yield from (WORDS[one[name]["grade"]] for name in GRADES)
    yield one["applicability"]["word"]
    held = one["memory"] or {}
    too_much = "" if held.get("fits", True) else ", more than is there"
    yield size(held["bytes"]) + too_much if "bytes" in held else "not computed" * ("why_not" in held)


def reason(one: dict[str, Any]) -> str:
    """The weightiest, with its source; of a method that something is missing for, that."""
    if one["missing"]:
        return f"lacks {'; and '.join(one['missing'])}"
    found = one["applicability"]["reasons"]
    plain = {"why": f"nothing speaks for it here; its data: {one['data']}", "source": f"talk, slide {one['slide']}"}
    best = found[0] if found else plain
    return f"{best['why']} ({best['source']})"


def notes(one: dict[str, Any]) -> Iterator[str]:
    """What is to be said of the first method's grades and memory."""
    yield from (f"{WORDS[one[name]['grade']]} {name}: {one[name]['why']} ({one[name]['source']})" for name in GRADES)
    held = one["memory"]
    if "why_not" in held:
        yield f"memory not computed: {held['why_not']}"
        return
    taken = f"memory {size(held['bytes'])} with {one['recipe']} on {held['model']}, phase {held['phase']}"
    yield taken + ("" if held["measured"] else " (computed, not yet measured on a GPU)")
    if "fit" in held:
        yield f"that is more than is there: `--fit` changes {'; '.join(held['fit'])}"
    elif not held["fits"]:
        yield "no single GPU holds that: share the weights among them with FSDP2 (recipes/accelerate/fsdp2.yaml)"


def show(text: str) -> None:
    """Markdown as it stands in a file or a pipe, set on a terminal."""
    text = printable(text)
    if not sys.stdout.isatty():
        print(text, end="")
        return
    Console().print(Markdown(text))
