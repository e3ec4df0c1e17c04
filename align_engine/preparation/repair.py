"""`align repair`: measured biases taken out of a reward model's head; nothing is trained.

A reward model scores w.h, h being its hidden state at the last token. An edit of an answer moves h by a vector, whose
mean over a few pairs is the direction of its bias d (of an opening: less the mean of neutral openings). The repaired
head is what w has outside of the span of these directions, w - D D'w with an orthonormal D: the mean score of such an
edit is then zero (or a neutral word's), whatever the pairs' labels are. What the directions share with quality is lost
with them, so accuracy and effects are given on other pairs, before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from align_engine import inputs
from align_engine.errors import BadInput
from align_engine.models.modelfiles import adapter_base
from align_engine.models.score_head import score_module
from align_engine.preparation import folder, report
from align_engine.preparation.answers import Answers, asking, device, pairs_of
from align_engine.preparation.audit import Card, card, wilson
from align_engine.preparation.edits import STYLES, Edit, of_marker
from align_engine.preparation.frequent import Marker, count, findings
from align_engine.preparation.sections import RepairRecipe
from align_engine.preparation.strip import openings
from align_engine.preparation.sway import FEWEST, Pair, bare
from align_engine.preparation.tokens import effects_table, neutral_words
from align_engine.reports.report import Table
from align_engine.rollouts.rewards import Reward, load_reward_model, reward_of

FINAL = "final"
TESTED = 500  # other pairs that the result is tested on, at most


def run(settings: RepairRecipe) -> None:
    """The command.

    Raises:
        BadInput: from the rows, the biases and the model, before anything is written.
    """
    asked, rows = settings.repair, folder.read(settings.data)
    if strange := [name for name in asked.styles if name not in STYLES]:
        raise BadInput(f"styles = {strange[0]!r} is none of {', '.join(STYLES)}")
    pairs, _ = pairs_of(rows, None, asked.seed, settings.data.bad_rows)
    pairs = [pairs[i] for i in np.random.default_rng(asked.seed).permutation(len(pairs))]
    measured, tested = pairs[: asked.num_pairs], pairs[asked.num_pairs :][:TESTED]
    if len(tested) < FEWEST:
        raise BadInput(f"num_pairs = {asked.num_pairs}: of {len(pairs)} pairs that leaves {len(tested)} to test on")
    named = settings.found.findings or settings.found.markers
    words = openings(settings.found) if named else []
    model, tokenizer, head = loaded(asked.model_name_or_path, asked.trust_remote_code)
    if settings.data.dry_run:
        return print(f"{len(measured)} pairs to measure {len(words) + len(asked.styles)} biases, {len(tested)} to test")
    with folder.opened("repair", settings, rows, inputs.facts(settings), FINAL) as place:
        if place is None:
            return
        counts = count(Answers(rows, [], "drop"), 1, 2)
        neutral = [word for word in neutral_words(counts, findings(counts), [])["opening"] if word not in words]
        reward = reward_of(asked.model_name_or_path, model, tokenizer)
        before = card("before", asking(reward), tested, words, neutral, asked.seed)
        edits = [*map(_opening, words), *(STYLES[name] for name in asked.styles)]
        found = directions(edits, [*map(_opening, neutral)], bare(measured, words), reward, head)
        kept = projected(head, found)
        after = card("after", asking(reward), tested, words, neutral, asked.seed)
        with place.written(FINAL) as path:
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
        write(place, settings, before, after, [edit.name for edit in edits], kept)


def loaded(path: str, trust_remote_code: bool) -> tuple[Any, Any, nn.Linear]:
    """(model, tokenizer, its head). Raises BadInput for adapters, and for a head that is not linear."""
    if (base := adapter_base(path)) is not None:
        raise BadInput(f"model_name_or_path = {path!r} is an adapter on {base!r}: merge it into a whole model first")
    model, tokenizer = load_reward_model(path, device(), trust_remote_code)
    head = score_module(model)
    if not isinstance(head, nn.Linear) or head.weight.shape[0] != 1:
        raise BadInput(f"model_name_or_path = {path!r}: its score head is no linear layer with one output")
    return model, tokenizer, head


def _opening(text: str) -> Edit:
    return of_marker(Marker("opening", text))


def directions(
    edits: Sequence[Edit], neutral: Sequence[Edit], pairs: Sequence[Pair], reward: Reward, head: nn.Linear
) -> Tensor:
    """The mean shift of the hidden state that each edit brings about, of openings less that of neutral ones: [K, D].

    Raises:
        BadInput: an edit that fewer than FEWEST pairs can show.
    """
    zero = torch.stack([shift(edit, pairs, reward, head) for edit in neutral]).mean(0) if neutral else 0.0
    return torch.stack([shift(edit, pairs, reward, head) - (zero if edit.kind == "opening" else 0.0) for edit in edits])


def shift(edit: Edit, pairs: Sequence[Pair], reward: Reward, head: nn.Linear) -> Tensor:
    """The mean of h with an edit, less h without it: [D] float64."""
    shown = [(pair[0], both) for pair in pairs for text in pair[1:] if (both := edit.apply(text)) is not None]
    if len(shown) < FEWEST:
        raise BadInput(f"{len(shown)} answers can show {edit.name!r}, and {FEWEST} are needed: raise num_pairs")
    prompts = [prompt for prompt, _ in shown]
    bare, marked = (hidden_of(reward, head, prompts, [both[i] for _, both in shown]) for i in (0, 1))
    return (marked - bare).mean(0)


def hidden_of(reward: Reward, head: nn.Linear, prompts: list[Any], texts: list[str]) -> Tensor:
    """What the head reads of each answer: [N, D] float64."""
    read: list[Tensor] = []
    forward: Callable[[Tensor], Tensor] = head.forward

    def reading(input: Tensor) -> Tensor:  # [B, 1, D]: of the last token
        read.append(input[:, 0].double().cpu())
        return forward(input)

    head.forward = reading
    try:
        asking(reward)(prompts, texts)
    finally:
        del head.forward  # the class's own
    return torch.cat(read)


@torch.no_grad()
def projected(head: nn.Linear, found: Tensor) -> float:
    """Take the span of directions [K, D] out of the head's weight; the share of its length that is left.

    Raises:
        BadInput: nothing is left.
    """
    basis, _ = torch.linalg.qr(found.T)  # [D, K]
    weight = head.weight[0].double().cpu()
    left = weight - basis @ (basis.T @ weight)
    kept = float(left.norm() / weight.norm())
    if kept < 1e-6 or found.shape[0] >= found.shape[1]:
        raise BadInput(f"{found.shape[0]} biases span all that the head reads ({found.shape[1]} numbers): name fewer")
    head.weight[0] = left.to(head.weight)
    return kept


def write(
    place: folder.ResultFolder, settings: RepairRecipe, before: Card, after: Card, names: Sequence[str], kept: float
) -> None:
    """The reports."""
    repaired = {one.name: one for one in after.effects}
    lines = [
        (one.name, one.kind, "yes" if one.name in names else "no", one.effect, repaired[one.name].effect,
         f"{one.flips:.1%}", f"{repaired[one.name].flips:.1%}")
        for one in before.effects
    ]  # fmt: skip
    shares = [(int(one.right.sum()), len(one.right)) for one in (before, after)]
    accuracy = [(f"{right / total:.1%}", *(f"{end:.1%}" for end in wilson(right, total))) for right, total in shares]
    tables = [
        Table("Effects", ("edit", "kind", "taken out", "before", "after", "flips before", "flips after"), lines),
        Table("Pairs ordered right", ("", "share", "from", "to"), [
            ("before", *accuracy[0]), ("after", *accuracy[1])
        ]),
    ]  # fmt: skip
    details = [effects_table(f"Effects {one.name}", one.effects, one.spread) for one in (before, after)]
    facts = {
        "taken_out": list(names),
        "weight_kept": kept,
        "accuracy": {one.name: right / total for one, (right, total) in zip((before, after), shares)},
        "effects": {one.name: {edit.name: edit.effect for edit in one.effects} for one in (before, after)},
    }
    lead = (
        f"{len(names)} biases were taken out of the head of {settings.repair.model_name_or_path}, which keeps "
        f"{kept:.1%} of its length; the model is in {FINAL}, and these figures are of {len(before.right)} other pairs."
    )
    report.write(place, "A reward model repaired", lead, facts, tables, details=details)
