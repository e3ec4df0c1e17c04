"""`align repair`: measured biases taken out of a reward model's head; nothing is trained.

A reward model scores w.h, h being its hidden state at the last token. An edit of an answer moves h by a vector, whose
mean over a few pairs is the direction of its bias d (of an opening: less the mean of neutral openings). Of all heads
that give these directions no score, the repaired one changes the scores of those pairs' answers least (as LEACE erases
a concept, Belrose et al., arXiv:2306.03819): with their covariance C and directions D as columns, w becomes
w - C^-1 D (D'C^-1 D)^-1 D'w. The mean score of such an edit is then zero (or a neutral word's), whatever the pairs'
labels are. What a model has learnt of nothing but the bias is lost with it, so accuracy and effects are given on other
pairs, before and after.
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
from align_engine.preparation.audit import Card, calibration, card, wilson
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
    pairs, _ = pairs_of(rows, None, asked.seed, settings.data.bad_rows, folder.origin(settings.data).rows)
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
        before, right = card("before", asking(reward), tested, words, neutral, asked.seed), alone(tested, words, reward)
        edits = [*map(_opening, words), *(STYLES[name] for name in asked.styles)]
        measured = bare(measured, words)
        found = directions(edits, [*map(_opening, neutral)], measured, reward, head)
        prompts = [pair[0] for pair in measured]
        hidden = [hidden_of(reward, head, prompts, [pair[side] for pair in measured]) for side in (1, 2)]
        kept = projected(head, found, torch.cat(hidden))
        after = card("after", asking(reward), tested, words, neutral, asked.seed)
        with place.written(FINAL) as path:
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
        shares = right, alone(tested, words, reward)
        write(place, settings, (before, after), shares, [edit.name for edit in edits], kept)


def alone(pairs: Sequence[Pair], words: Sequence[str], reward: Reward) -> float | None:
    """Share of pairs ordered right by what their answers say without openings; None where they all say the same."""
    differ = [(prompt, chosen, rejected) for prompt, chosen, rejected in bare(pairs, words) if chosen != rejected]
    if not differ:
        return None
    prompts, chosen, rejected = map(list, zip(*differ))
    scores = asking(reward)(prompts * 2, chosen + rejected)
    return float((scores[: len(differ)] > scores[len(differ) :]).mean())


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
def projected(head: nn.Linear, found: Tensor, hidden: Tensor) -> float:
    """Take directions out of the head's weight; the share that is left of the spread of its scores.

    Args:
        found: directions [K, D].
        hidden: of answers whose scores are to change least [N, D].
    Raises:
        BadInput: nothing is left.
    """
    from sklearn.covariance import ledoit_wolf

    covariance = torch.from_numpy(ledoit_wolf(hidden.numpy())[0])
    root = torch.linalg.cholesky(covariance)  # C = R R': |R'w| is the spread of the scores
    basis, _ = torch.linalg.qr(torch.linalg.solve_triangular(root, found.T, upper=False))  # [D, K]
    spread = root.T @ head.weight[0].double().cpu()
    left = spread - basis @ (basis.T @ spread)
    kept = float(left.norm() / spread.norm())
    if kept < 1e-6 or found.shape[0] >= found.shape[1]:
        raise BadInput(f"{found.shape[0]} biases span all that the head reads ({found.shape[1]} numbers): name fewer")
    head.weight[0] = torch.linalg.solve_triangular(root.T, left[:, None], upper=True)[:, 0].to(head.weight)
    return kept


def write(
    place: folder.ResultFolder, settings: RepairRecipe, cards: Sequence[Card], alone: Sequence[float | None],
    names: Sequence[str], kept: float,
) -> None:  # fmt: skip
    """The reports.

    Args:
        cards: before and after.
        alone: share of pairs ordered right where the openings are taken off both answers, before and after.
    """
    before, after = cards
    repaired = {one.name: one for one in after.effects}
    lines = [
        (one.name, one.kind, "yes" if one.name in names else "no", one.effect, repaired[one.name].effect,
         f"{one.flips:.1%}", f"{repaired[one.name].flips:.1%}")
        for one in before.effects
    ]  # fmt: skip
    shares = [(int(one.right.sum()), len(one.right)) for one in cards]
    accuracy = [" to ".join(f"{end:.1%}" for end in wilson(*share)) for share in shares]
    calibrated = [calibration(one.margins) for one in cards]
    tables = [
        Table("Effects", ("edit", "kind", "taken out", "before", "after", "flips before", "flips after"), lines),
        Table("Other pairs", ("", "before", "after"), [
            ("ordered right", *(f"{right / total:.1%}" for right, total in shares)),
            ("95 % interval", *accuracy),
            ("ordered right without the openings", *("" if share is None else f"{share:.1%}" for share in alone)),
            ("expected calibration error", *(one.error for one in calibrated)),
            ("standard deviation of the scores", *(one.spread for one in cards)),
        ]),
    ]  # fmt: skip
    details = [effects_table(f"Effects {one.name}", one.effects, one.spread) for one in cards]
    facts = {
        "taken_out": list(names),
        "spread_kept": kept,
        "accuracy": {one.name: right / total for one, (right, total) in zip(cards, shares)},
        "accuracy_without_openings": dict(zip(("before", "after"), alone)),
        "calibration_error": {one.name: found.error for one, found in zip(cards, calibrated)},
        "scores_std": {one.name: one.spread for one in cards},
        "effects": {one.name: {edit.name: edit.effect for edit in one.effects} for one in cards},
    }
    taken = "1 bias was" if len(names) == 1 else f"{len(names)} biases were"
    lead = (
        f"{taken} taken out of the head of {settings.repair.model_name_or_path}, whose scores of answers without "
        f"openings keep {kept:.1%} of their spread; the model is in {FINAL}, and these figures are of "
        f"{len(before.right)} other pairs."
    )
    report.write(place, "A reward model repaired", lead, facts, tables, details=details)
