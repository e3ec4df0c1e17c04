"""What `align advise` has to go by: its settings, the data that they name, the machine, the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from align_engine.assessment.guide import guide, words
from align_engine.assessment.sections import SituationSection
from align_engine.data.formats import LAYOUTS
from align_engine.data.sources import load_rows
from align_engine.errors import BadInput
from align_engine.models import blank, load
from align_engine.planning import cards
from align_engine.planning.cards import Card
from align_engine.recipe import ModelSection

# the guide's words: of layouts, and of columns beside `completion`, as `align pairs` has them
KINDS = {"preference": "pairs", "unpaired": "marks", "sft": "answers", "prompt": "prompts"}
ORDERED = {"rank": "ranks", "score": "scores"}
SIZE = 7.0  # billions of weights, where nothing says


@dataclass(frozen=True)
class Situation:
    """All that is known."""

    gpus: int
    card: Card  # one of the GPUs, or this machine
    assessors: int
    have: frozenset[str]
    rows: int | None  # of the data that was looked at
    task: str
    billions: float
    more: frozenset[str]

    @property
    def words(self) -> set[str]:
        """Of the guide."""
        amounts = {"gpus": self.gpus, "assessors": self.assessors, "billions": self.billions}
        return words(set(self.have), self.task, amounts, set(self.more))


def situation(section: SituationSection) -> Situation:
    """As the settings have it, completed by what data, machine and model say.

    Raises:
        BadInput: data or a model that cannot be read, GPUs of unknown memory.
    """
    gpus, card = device(section.gpus, section.memory)
    held, rows = looked_at(section)
    have: set[str] = {*section.have, *held}
    more = {"pretrained": section.pretrained, "best-quality": section.best_quality}
    return Situation(
        gpus, card, section.assessors, frozenset(with_prompts(have)), rows, section.task, billions(section),
        frozenset(word for word, said in more.items() if said),
    )  # fmt: skip


def looked_at(section: SituationSection) -> tuple[set[str], int | None]:
    """(What the data set holds, its rows); nothing where none is named. Raises BadInput as `kinds`."""
    if not section.dataset_name:
        return set(), None
    found = load_rows(section.dataset_name)
    return kinds(found), len(found)


def device(gpus: int | None, memory: str | None) -> tuple[int, Card]:
    """(GPUs, one of them): as given, else as this machine has them."""
    here = torch.cuda.device_count()
    card = cards.memory_of_processors() if memory is None and gpus == 0 else cards.card(memory)
    if gpus is None:
        gpus = here or int(memory is not None and card.gpu)
    if gpus and memory is None and not here:
        raise BadInput(f"gpus = {gpus} needs memory, of one of them: a size (24GB) or a card by its name")
    if card.gpu and not gpus and memory is not None:
        raise BadInput(f"memory = {memory!r} is of a GPU, and gpus = 0")
    return gpus, card._replace(gpu=gpus > 0)


def kinds(rows: Any) -> set[str]:
    """What a data set holds, by its columns; each layout is TRL's.

    Raises:
        BadInput: nothing that a method learns from.
    """
    columns = set(rows.column_names)
    found = {KINDS[kind] for kind, layouts in LAYOUTS.items() for layout in layouts if columns >= set(layout)}
    if "marks" in found:  # not all of the answers are good ones
        found.discard("answers")
    if {"prompt", "completion"} <= columns and (ordered := {ORDERED[name] for name in ORDERED if name in columns}):
        found = (found - {"answers"}) | ordered
    if "pairs" in found and "chosen_rank" in columns:
        found.add("ranks")
    if "solution" in columns:  # what trl.rewards' functions compare answers with
        found.add("verifier")
    if not found:
        wanted = "; ".join(" + ".join(layout) for layouts in LAYOUTS.values() for layout in layouts)
        raise BadInput(f"dataset_name: {sorted(columns)} are columns of no layout that a method learns from: {wanted}")
    return found


def with_prompts(have: set[str]) -> set[str]:
    """Prompts too, where answers to some are there."""
    return have | ({"prompts"} if have & set(guide()["derived"]["prompts"]) else set())


def billions(section: SituationSection) -> float:
    """Of weights. Of a model its configuration says.

    Raises:
        BadInput: there is none.
    """
    if not section.model_name_or_path:
        return section.model_size or SIZE
    asked = ModelSection(model_name_or_path=section.model_name_or_path)
    with torch.device("meta"), blank.blank():
        model: Any = load.load_model(section.model_name_or_path, asked)
    return sum(parameter.numel() for parameter in model.parameters()) / 1e9


CHECKS: dict[str, Callable[[SituationSection], Any]] = {  # what a field names is there and can be read, or BadInput
    "memory": lambda section: device(section.gpus, section.memory),
    "dataset_name": looked_at,
    "model_name_or_path": billions,
}
