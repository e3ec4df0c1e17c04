"""`align plan`: what a run will take, as a table for people or as JSON."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from align_engine.algorithms import ALGORITHMS
from align_engine.errors import BadInput
from align_engine.planning.cards import Card, size
from align_engine.planning.fit import fitted
from align_engine.planning.rehearse import Lengths, Rehearsed, rehearse
from align_engine.recipe import Recipe, RolloutSection
from align_engine.recipe.secrets import masked
from align_engine.training import reference as references

PARTS = ("weights", "reference", "scorers", "gradients", "optimiser", "activations", "head", "keys and values",
         "written", "malloc")  # fmt: skip


def plan(name: str, recipe: Recipe, card: Card, each: Lengths, rollout: RolloutSection | None = None) -> dict[str, Any]:
    """Everything that `show` prints, as JSON values; bytes are whole numbers.

    Args:
        rollout: as `rehearse` has it.
    Raises:
        BadInput: from the configuration.
    """
    found = rehearse(name, recipe, card, each, rollout)
    train, output = recipe.train, recipe.output
    said: dict[str, Any] = {
        "method": name,
        "model": {
            "path": masked(recipe.model.model_name_or_path),
            "parameters": found.parameters,
            "trained": found.trained,
            "types": found.dtypes,
        },
        "rows": {
            "prompt": each.prompt,
            "completion": each.completion,
            "of_a_pass": found.rows,
            "passes_of_a_step": train.gradient_accumulation_steps,
        },
        "card": {"name": card.name, "bytes": card.size, "usable": card.usable, "process": card.base, "gpu": card.gpu},
        "phases": [
            {"name": p.name, "bytes": p.peak, "parts": dict(p.parts), "most": dict(p.most)} for p in found.phases
        ],
        "peak": {"phase": found.peak.name, "bytes": found.peak.peak},
        "fits": found.peak.peak <= card.usable,
        "step": _step(found, recipe),
        "otherwise": dict(_otherwise(name, recipe, card, each, found)),
        "head": [str(one) for one in dict.fromkeys(found.plans)],
        "disk": {"checkpoint": found.checkpoint, "kept": output.save_total_limit},
        "measured": not card.gpu,
    }
    if ALGORITHMS[name].refers(recipe):
        said["reference"] = references.of(recipe)[0]
    said["fit"] = []
    if not said["fits"]:
        try:
            changes = fitted(name, recipe, card, each).changes
            said["fit"] = [{"field": one.field, "value": one.value, "why": one.why} for one in changes]
        except BadInput as error:
            said["fit"], said["refusal"] = None, str(error)
    return said


def _step(found: Rehearsed, recipe: Recipe) -> dict[str, Any]:
    passes = recipe.train.gradient_accumulation_steps
    return {"packed": found.packed, "tokens_read": found.read * passes, "tokens_learnt": found.learnt * passes,
            "flops": found.flops * passes}  # fmt: skip


def _otherwise(
    name: str, recipe: Recipe, card: Card, each: Lengths, found: Rehearsed
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The training step with one switch the other way."""
    for field, value in (("gradient_checkpointing", not recipe.train.gradient_checkpointing),
                         ("packing", "off" if found.packed else "auto")):  # fmt: skip
        other = copy.deepcopy(recipe)
        setattr(other.train, field, value)
        if field == "packing" and value == "off":
            other.train.tokens_per_batch = None
        made = rehearse(name, other, card, each)
        if field == "packing" and made.packed == found.packed:
            yield field, {"value": value, "why_not": made.why_not_packed}
        else:
            yield field, {"value": value, "bytes": made.phases[-1].peak, **_step(made, other)}


def show(said: dict[str, Any]) -> None:
    """Print a plan for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:  # a file has room
        console = Console(width=160)
    for text in heading(said):
        console.print(text, highlight=False, soft_wrap=True)
    held = [part for part in PARTS if any(part in phase["most"] for phase in said["phases"])]
    table = Table("memory, each part at its most", *held, "together")
    for phase in said["phases"]:
        is_peak = phase["name"] == said["peak"]["phase"]
        cells = [size(phase["most"][part]) if part in phase["most"] else "" for part in held]
        table.add_row(phase["name"], *cells, size(phase["bytes"]) + (" *" if is_peak else ""))
    console.print(table)
    for text in sentences(said):
        console.print(text, highlight=False, soft_wrap=True)


def heading(said: dict[str, Any]) -> Iterator[str]:
    """What stands above the table."""
    model, rows = said["model"], said["rows"]
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in model["types"].items())
    trained = f"{model['trained']:,} of {model['parameters']:,} weights trained ({kinds})"
    yield f"{said['method']} of {model['path']}: {trained}"
    reference = f", reference {said['reference']}" if "reference" in said else ""
    yield (
        f"rows of {rows['prompt']} tokens of a prompt and {rows['completion']} of a completion, {rows['of_a_pass']} a "
        f"forward pass, {rows['passes_of_a_step']} passes a step{reference}"
    )


def sentences(said: dict[str, Any]) -> Iterator[str]:
    """What stands below the table."""
    card, step = said["card"], said["step"]
    layout = "packed" if step["packed"] else "padded"
    yield (f"a step reads {step['tokens_read']:,} tokens ({layout}), learns from {step['tokens_learnt']:,} and takes "
           f"{step['flops'] / 1e12:,.2f} TFLOP")  # fmt: skip
    for field, other in said["otherwise"].items():
        value = str(other["value"]).lower()
        if "why_not" in other:
            yield f"--{field} {value} changes nothing: {other['why_not']}"
        else:
            yield (f"--{field} {value}: the training step takes {size(other['bytes'])}, reads {other['tokens_read']:,} "
                   f"tokens, {other['flops'] / 1e12:,.2f} TFLOP")  # fmt: skip
    for one in said["head"]:
        yield f"fused head: {one}"
    yield f"disk: {size(said['disk']['checkpoint'])} a checkpoint ({said['disk']['kept'] or 'all'} kept)"
    free = f"{card['name']}: {size(card['bytes'])}, of which tensors may take {size(card['usable'])}"
    fits = "fits" if said["fits"] else "does not fit"
    yield f"{free}: {fits}" + ("" if said["measured"] else " (predicted: not yet measured on a GPU)")
    if not said["fits"] and said["fit"]:
        yield f"--fit {card['name'] if card['name'] != 'this machine' else 'auto'} would take"
        for one in said["fit"]:
            yield f"  --{one['field']} {one['value']}: {one['why']}"
    if said["fit"] is None:
        yield said["refusal"]


def as_json(said: dict[str, Any]) -> str:
    return json.dumps(said, indent=2)
