"""The verdict of `align diagnose`, its reasons and what to try first, as JSON, Markdown and a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from align_engine.assessment import answers
from align_engine.assessment.diagnose_settings import BASELINE, MODEL
from align_engine.assessment.signs import Sign
from align_engine.preparation import folder, report
from align_engine.reports.report import Table, number

if TYPE_CHECKING:
    from align_engine.assessment.diagnose_settings import DiagnoseRecipe

MEASURED = 3  # signs that must be absent before preference optimisation is said not to be needed
EXAMPLES, LONGEST = 6, 400
FIRST = {  # what to try first, by sign, the most pressing sign first
    "toxic": ("KTO on answers marked ok or not ok: it learns from marks of single answers, and is most often used for "
              "safety", "align kto"),
    "variance": ("DPO with reference answers as chosen and the model's own as rejected: the two things that this sign "
                 "finds too far apart", "align dpo"),
    "closeness": ("DPO with reference answers as chosen and answers to other prompts, or the model's own, as rejected",
                  "align dpo"),
    "benchmarks": ("Iterative DPO on the model's own answers, ranked by a reward model, or GRPO where the checkers can "
                   "be the reward: the knowledge is there, and the way of answering is trained", "align iterate"),
    "loss": ("GRPO, or iterative DPO, with the judged quality as the reward: it is what the loss does not see",
             "align grpo"),
}  # fmt: skip


class Verdict(NamedTuple):
    """Whether it is needed, why, and what to do about it."""

    needed: str  # "needed", "not needed", "not enough evidence"
    reasons: list[str]
    first: str
    command: str | None


def verdict(found: Sequence[Sign]) -> Verdict:
    """From the five signs."""
    states = {one.name: one.state for one in found}
    present = [one for one in found if one.state == "present"]
    if present:
        name = next(name for name in FIRST if states.get(name) == "present")
        return Verdict("needed", [f"{one.title}. {one.sentence}" for one in present], *FIRST[name])
    absent, unclear = ([one for one in found if one.state == state] for state in ("absent", "unclear"))
    if len(absent) >= MEASURED and not unclear:
        reasons = [one.sentence for one in absent]
        return Verdict(
            "not needed", reasons, "Keep the model as it is, and ask again when prompts or model change", None
        )
    waiting = [f"{one.title}. {one.sentence}" for one in unclear]
    waiting += [f"{one.title}: not measured, {one.sentence}." for one in found if one.state == "not measured"]
    return Verdict("not enough evidence", waiting, "Measure what is missing, or give more prompts", None)


def write(
    place: folder.ResultFolder, settings: DiagnoseRecipe, found: Sequence[Sign], texts: dict[str, list[list[str]]],
    asked: answers.Asked,
) -> None:  # fmt: skip
    """The reports, and the verdict on the screen."""
    said = verdict(found)
    name, count = settings.patient.model_name_or_path, len(asked.prompts)
    lead = f"{name} on {count:,} prompts of {settings.data.dataset_name}. Preference optimisation is {said.needed}."
    if said.needed == "not enough evidence":
        lead = f"{name} on {count:,} prompts of {settings.data.dataset_name}. There is not enough evidence."
    first = f"{said.first}." + " `align advise` weighs all methods." * (said.command is not None)
    tables = [
        Table(f"Preference optimisation: {said.needed}", ("Because",), [(reason,) for reason in said.reasons]),
        Table("What to try first", (said.command or "nothing",), [(first,)]),
        Table("Signs", ("sign", "what it says"), [(f"{one.title}: {one.state}", _said(one)) for one in found]),
        numbers_table(found),
    ]
    figures = [figure for one in found for figure in one.figures]
    limits = [(one.title, f"present where the whole interval lies {one.limit}, absent where none of it does")
              for one in found if one.limit]  # fmt: skip
    details = [Table("Limits", ("sign", "limit"), limits), examples_table(texts, asked)]
    report.write(place, "align diagnose", lead, facts_of(said, found, count), tables, figures, details)
    print(report.markdown("align diagnose", lead, tables[:3]))
    print(f"report in {place.path / report.NAMES[-1]}")


def numbers_table(found: Sequence[Sign]) -> Table:
    """Each number with its interval."""
    lines = [
        (name, number(value.value), " to ".join(map(number, value.interval or ())), value.number)
        for one in found
        for name, value in one.numbers.items()
    ]
    return Table("Numbers", ("number", "value", "95 %", "observations"), lines)


def examples_table(texts: dict[str, list[list[str]]], asked: answers.Asked) -> Table:
    """The first prompts with two answers of each model."""
    prompts = [answers.shown(prompt.messages) for prompt in asked.prompts.values()][:EXAMPLES]
    named = [(name, k) for name in (MODEL, BASELINE) if name in texts for k in range(min(2, len(texts[name][0])))]
    lines = [[_short(prompt), *(_short(texts[name][i][k]) for name, k in named)] for i, prompt in enumerate(prompts)]
    return Table("First answers", ("prompt", *(f"{name}, answer {k + 1}" for name, k in named)), lines)


def facts_of(said: Verdict, found: Sequence[Sign], prompts: int) -> dict[str, Any]:
    """report.json."""
    return {
        "verdict": said.needed, "reasons": said.reasons, "try_first": said.first, "command": said.command,
        "prompts": prompts,
        "signs": [
            {"name": one.name, "title": one.title, "state": one.state, "sentence": one.sentence, "limit": one.limit,
             "numbers": {name: value.plain for name, value in one.numbers.items()}}
            for one in found
        ],
    }  # fmt: skip


def _said(one: Sign) -> str:
    return one.sentence if one.state != "not measured" else f"{one.sentence[:1].upper()}{one.sentence[1:]}."


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
