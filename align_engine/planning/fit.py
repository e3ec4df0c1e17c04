"""`--fit`: the recipe that fits into a memory, one change after the other, each with its reason.

A change is made where nothing before it was enough, in the order of what it costs: smaller forward passes (of the same
step), recomputed activations, a reference elsewhere, and last what trains another model: LoRA, frozen weights in fewer
bits. Nothing is raised above what was asked for.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

from align_engine.errors import BadInput
from align_engine.models.modelfiles import adapter_base
from align_engine.planning.cards import SHARE, Card, size
from align_engine.planning.ledger import Phase
from align_engine.planning.rehearse import Lengths, Rehearsed, lengths, rehearse
from align_engine.recipe import Recipe, RolloutSection
from align_engine.training import reference as references

SAMPLING = ("prompts read", "sampling")  # phases that per_device_generation_batch_size decides, and no other size
SHORTEST = 32  # max_length below which none is proposed
Fields = dict[str, Any]


class Change(NamedTuple):
    """Of one field, and why."""

    field: str
    value: Any
    why: str

    def __str__(self) -> str:
        return f"--{self.field} {self.value}: {self.why}"


class Fitted(NamedTuple):
    """A recipe that fits."""

    recipe: Recipe
    changes: list[Change]
    rehearsed: Rehearsed


def fitted(name: str, recipe: Recipe, card: Card, each: Lengths | None = None) -> Fitted:
    """The recipe changed so far that the algorithm `name` fits on the card; a function of its arguments alone.

    Args:
        each: tokens of its rows. Default None: `worst`.
    Raises:
        BadInput: nothing that this module knows makes it fit; what would is said.
    """
    search = _Search(name, recipe, card, each or worst(recipe))
    if not search.over(search.found) or search.shrink():
        return search.result()
    for rung in RUNGS:
        if search.climb(rung) and search.shrink():
            return search.result()
    raise BadInput(search.refusal())


def worst(recipe: Recipe) -> Lengths:
    """The lengths of rows that ask for the most memory: prompts of one token, online the longest."""
    return lengths(recipe, None if recipe.section(RolloutSection) else 1)


class _Search:
    """The recipe so far, with what it takes."""

    def __init__(self, name: str, recipe: Recipe, card: Card, each: Lengths) -> None:
        self.name, self.card, self.each = name, card, each
        self.recipe = changed(recipe, {"fit": None})
        self.lasting: list[Change] = []
        self.smaller: list[Change] = []
        self.found = self.least = self.rehearse(self.recipe)
        self.largest = max(self.over(self.found), key=lambda phase: phase.peak, default=None)

    def rehearse(self, recipe: Recipe) -> Rehearsed:
        return rehearse(self.name, recipe, self.card, self.each)

    def over(self, found: Rehearsed, sampling: bool | None = None) -> list[Phase]:
        """The phases that take too much, those of sampling or the others where that is asked."""
        too_large = [phase for phase in found.phases if phase.peak > self.card.usable]
        return [phase for phase in too_large if sampling in (None, phase.name in SAMPLING)]

    def result(self) -> Fitted:
        return Fitted(self.recipe, self.lasting + self.smaller, self.found)

    def climb(self, rung: Rung) -> bool:
        """Take a rung's change; whether there is one."""
        if (change := rung(self.recipe, self.least, self.card)) is None:
            return False
        self.lasting.append(change)
        self.recipe = changed(self.recipe, {change.field: change.value})
        return True

    def shrink(self) -> bool:
        """Make forward passes, and batches of sampling, as small as it takes; whether all phases then fit."""
        passes, batches = [{}, *_passes(self.recipe)], [{}, *_batches(self.recipe)]
        self.least = self.rehearse(changed(self.recipe, passes[-1] | batches[-1]))
        if self.over(self.least):
            return False
        self.found = self.least
        chosen = self._first_that_fits(passes, batches[-1], False)
        chosen |= self._first_that_fits(batches, chosen, True)
        self.recipe = changed(self.recipe, chosen)
        before = self.largest
        assert before is not None
        why = f"the phase {before.name!r} would take {size(before.peak)}, and {size(self.card.usable)} are there"
        self.smaller = [Change(field, value, why) for field, value in chosen.items()]
        return True

    def _first_that_fits(self, steps: list[Fields], others: Fields, sampling: bool) -> Fields:
        """The largest of ever smaller sizes with which phases of a kind fit; the last one does."""
        low, high = 0, len(steps) - 1
        while low < high:
            middle = (low + high) // 2
            found = self.rehearse(changed(self.recipe, others | steps[middle]))
            if self.over(found, sampling):
                low = middle + 1
            else:
                high, self.found = middle, found
        return steps[high]

    def refusal(self) -> str:
        """What a person reads where nothing fits."""
        peak = self.least.peak
        ways = [f"a device of {size((peak.peak + self.card.base) / SHARE)}"]
        if (shorter := self._shorter()) is not None:
            ways.append(f"--max_length {shorter}")
        return (
            f"fit = {self.card.name!r}: {self.name} does not fit. Tensors may take {size(self.card.usable)}, and with "
            f"all that --fit can change the phase {peak.name!r} still takes {size(peak.peak)}. What would fit: "
            f"{' or '.join(ways)}"
        )

    def _shorter(self) -> int | None:
        """The longest half, quarter, ... of max_length that fits with the smallest passes; None where there is none."""
        least = [(sizes(self.recipe) or [{}])[-1] for sizes in (_passes, _batches)]
        recipe, prompt = changed(self.recipe, least[0] | least[1]), self.recipe.data.max_prompt_length or 0
        most = recipe.data.max_length or 0
        while (most := most // 2) >= max(SHORTEST, prompt + 1):
            made = changed(recipe, {"max_length": most})
            if not self.over(rehearse(self.name, made, self.card, worst(made))):
                return most
        return None


# -- sizes, ever smaller -------------------------------------------------------------------------------------------
def _passes(recipe: Recipe) -> list[Fields]:
    """Of forward passes, the step being the same."""
    train, rollout = recipe.train, recipe.section(RolloutSection)
    if train.tokens_per_batch is not None:
        least = recipe.data.max_length or 1  # a row that has more is alone
        halves = (train.tokens_per_batch >> i for i in range(1, train.tokens_per_batch.bit_length()))
        return [{"tokens_per_batch": tokens} for tokens in halves if 2 * tokens > least]
    rows, found = train.per_device_train_batch_size, list[Fields]()
    for smaller in (one for one in range(rows - 1, 0, -1) if rows % one == 0):
        times = rows // smaller
        accumulated = train.gradient_accumulation_steps * times
        found.append({"per_device_train_batch_size": smaller, "gradient_accumulation_steps": accumulated})
        if rollout is not None and rollout.steps_per_generation:
            found[-1]["steps_per_generation"] = rollout.steps_per_generation * times
    return found


def _batches(recipe: Recipe) -> list[Fields]:
    """Of sampling."""
    rollout = recipe.section(RolloutSection)
    rows = 1 if rollout is None else rollout.per_device_generation_batch_size
    return [{"per_device_generation_batch_size": rows >> i} for i in range(1, rows.bit_length())]


# -- rungs: what else may change, in order -------------------------------------------------------------------------
Rung = Callable[[Recipe, Rehearsed, Card], Change | None]  # (recipe, what it takes in the smallest passes, card)


def _recompute(recipe: Recipe, found: Rehearsed, card: Card) -> Change | None:
    if recipe.train.gradient_checkpointing:
        return None
    taken = size(found.step.most["activations"])
    why = f"activations take {taken}: they are computed again in the backward pass, for about a third more time"
    return Change("gradient_checkpointing", True, why)


def _reference(recipe: Recipe, found: Rehearsed, card: Card) -> Change | None:
    if not (held := found.peak.most["reference"]):
        return None
    online, (kind, _) = recipe.section(RolloutSection) is not None, references.of(recipe)
    if kind == "frozen" and not online:
        why = f"a second model takes {size(held)}: its log-probs are computed once, before the first step"
        return Change("reference", "precomputed", why)
    if kind == "frozen" and card.gpu:
        why = f"a second model takes {size(held)}: its layers wait in CPU memory for their turn"
        return Change("reference", "cpu-offload", why)
    return None


def _eight_bits(recipe: Recipe, found: Rehearsed, card: Card) -> Change | None:
    there = importlib.util.find_spec("bitsandbytes") is not None
    if not there or recipe.train.optim not in ("adamw_torch", "adamw_torch_fused"):
        return None
    why = f"the optimiser's states take {size(found.step.most['optimiser'])}: in 8 bits a quarter"
    return Change("optim", "adamw_8bit", why)


def _adapters(recipe: Recipe, found: Rehearsed, card: Card) -> Change | None:
    model = recipe.model
    if model.use_peft or adapter_base(model.model_name_or_path, model.model_revision) is not None:
        return None
    taken, rate = size(found.step.most["gradients"] + found.step.most["optimiser"]), recipe.train.learning_rate
    why = (
        f"gradients and optimiser states of all weights take {taken}: adapters of rank {recipe.model.lora_r} are "
        f"trained in their place (learning_rate stays {rate:g}; adapters usually take ten times as much)"
    )
    return Change("use_peft", True, why)


def _halves(recipe: Recipe, found: Rehearsed, card: Card) -> Change | None:
    if not recipe.model.use_peft or recipe.model.dtype != "float32" or recipe.model.load_in_4bit:
        return None
    why = f"weights take {size(found.step.most['weights'])}: the frozen ones lie in 16 bits, adapters stay float32"
    return Change("dtype", "bfloat16", why)


def _quarters(recipe: Recipe, found: Rehearsed, card: Card) -> Change | None:
    model = recipe.model
    there = importlib.util.find_spec("bitsandbytes") is not None
    if not there or not model.use_peft or model.load_in_4bit or model.load_in_8bit:
        return None
    why = f"weights take {size(found.step.most['weights'])}: the frozen layers lie in 4 bits (NF4)"
    return Change("load_in_4bit", True, why)


RUNGS: tuple[Rung, ...] = (_recompute, _reference, _eight_bits, _adapters, _halves, _quarters)


def changed(recipe: Recipe, fields: Fields) -> Recipe:
    """A copy with other values."""
    made = copy.deepcopy(recipe)
    for section in vars(made).values():
        for name in fields.keys() & vars(section).keys():
            setattr(section, name, fields[name])
    return made
