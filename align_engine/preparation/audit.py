"""`align audit`: the card of a reward model, or of several beside each other, on pairs that none was trained on.

Accuracy with Wilson's intervals, by source and tier; calibration, for Bradley-Terry's probability sigmoid(score of the
chosen answer - score of the rejected one); what edits sway it; and how often one of them, or the order in which the
answers are asked about, turns its judgement round.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from align_engine import inputs
from align_engine.errors import BadInput
from align_engine.preparation import folder, report
from align_engine.preparation.answers import Answers, pairs_of, scorer
from align_engine.preparation.edits import STYLES, of_marker
from align_engine.preparation.frequent import Marker, count, findings
from align_engine.preparation.sections import AuditRecipe
from align_engine.preparation.strip import openings
from align_engine.preparation.sway import Effect, Pair, Score, bare, effects
from align_engine.preparation.tokens import effects_table, neutral_words
from align_engine.reports.report import Table, line_chart

PARTS = ("chosen_model", "rejected_model", "chosen_tier", "rejected_tier", "chosen_rank", "rejected_rank", "source",
         "tier")  # fmt: skip
BINS = 10  # of calibration
MOST = 30  # values of a column
Z = 1.959964  # of 95 %


class Card(NamedTuple):
    """What is found of one reward model."""

    name: str
    right: np.ndarray  # [P] bool
    margins: np.ndarray  # [P]
    spread: float  # standard deviation of its scores
    effects: list[Effect]
    turned: float  # share of pairs judged otherwise where the rejected answers are asked about first


def run(settings: AuditRecipe) -> None:
    """The command.

    Raises:
        BadInput: from the rows and the reward models, before anything is written.
    """
    asked, rows = settings.audit, folder.read(settings.data)
    if lost := [name for name in asked.by if name not in rows.column_names]:
        raise BadInput(f"by = {lost[0]!r}: there is no such column, but {sorted(rows.column_names)}")
    pairs, origins = pairs_of(
        rows, asked.num_pairs, asked.seed, settings.data.bad_rows, folder.origin(settings.data).rows
    )
    parts = groups(origins, asked.by or [name for name in PARTS if name in rows.column_names])
    if single := [name for name in asked.by if len(parts[name]) == 1]:
        raise BadInput(f"by = {single[0]!r}: it has the same value in all pairs, so there is nothing to part")
    named = settings.found.findings or settings.found.markers
    words = openings(settings.found) if named else []
    scores = {path: scorer(path, asked.trust_remote_code) for path in asked.reward_models}
    if settings.data.dry_run:
        return folder.dry([{"prompt": pair[0], "chosen": pair[1], "rejected": pair[2]} for pair in pairs])
    with folder.opened("audit", settings, rows, inputs.facts(settings), "report.json") as place:
        if place is not None:
            counts = count(Answers(rows, [], "drop"), 1, 2)
            neutral = neutral_words(counts, findings(counts), [])["opening"]
            neutral = [word for word in neutral if word not in words]
            cards = [card(path, score, pairs, words, neutral, asked.seed) for path, score in scores.items()]
            write(place, settings, cards, parts)


def card(
    name: str, score: Score, pairs: Sequence[Pair], words: Sequence[str], neutral: Sequence[str], seed: int
) -> Card:
    """Ask one reward model; about edits, of answers without the openings `words`."""
    prompts, chosen, rejected = map(list, zip(*pairs))
    first = score(prompts * 2, chosen + rejected)
    second = score(prompts * 2, rejected + chosen)
    margins = first[: len(pairs)] - first[len(pairs) :]
    if np.isnan(margins).any():
        raise BadInput(f"{name!r} gives no score for {int(np.isnan(margins).sum())} of {len(pairs)} pairs")
    again = second[len(pairs) :] - second[: len(pairs)]
    edits = [*(of_marker(Marker("opening", text)) for text in words), *STYLES.values()]
    beside = {"opening": [of_marker(Marker("opening", text)) for text in neutral]} if words else {}
    found = effects(edits, beside, bare(pairs, words), score, seed)
    turned = float(np.mean((margins > 0) != (again > 0)))
    return Card(name, margins > 0, margins, float(first.std()), found, turned)


def groups(origins: Sequence[dict[str, Any]], columns: Sequence[str]) -> dict[str, dict[str, list[int]]]:
    """Places of the pairs by the values of columns, the most frequent first."""
    found: dict[str, dict[str, list[int]]] = {}
    for name in columns:
        places = defaultdict(list)
        for i, row in enumerate(origins):
            places[str(row[name])].append(i)
        found[name] = dict(sorted(places.items(), key=lambda pair: -len(pair[1]))[:MOST])
    return found


def wilson(right: float, total: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    share, z2 = right / total, Z * Z / total
    centre, half = share + z2 / 2, Z * math.sqrt(share * (1 - share) / total + z2 / total / 4)
    return max(0.0, (centre - half) / (1 + z2)), min(1.0, (centre + half) / (1 + z2))


class Calibration(NamedTuple):
    """How far confidence can be believed: that of a bin, its accuracy and pairs; and two summaries."""

    confidence: list[float]
    accuracy: list[float]
    pairs: list[int]
    error: float  # expected calibration error: |confidence - accuracy|, weighed by pairs
    brier: float  # mean of (1 - sigmoid(margin))^2


def calibration(margins: np.ndarray) -> Calibration:
    """Of Bradley-Terry's probabilities of what is preferred, [P] margins of chosen over rejected."""
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    held = [bins == i for i in range(BINS) if (bins == i).any()]
    said, right = ([float(values[some].mean()) for some in held] for values in (confidence, margins > 0))
    sizes = [int(some.sum()) for some in held]
    error = float(np.dot(sizes, np.abs(np.subtract(said, right))) / len(margins))
    return Calibration(said, right, sizes, error, float(np.mean((1 / (1 + np.exp(margins))) ** 2)))


def write(
    place: folder.ResultFolder, settings: AuditRecipe, cards: Sequence[Card], parts: dict[str, dict[str, list[int]]]
) -> None:
    """The reports."""
    names, count_ = labels([one.name for one in cards]), len(cards[0].right)
    calibrated = [calibration(one.margins) for one in cards]
    everything = {"": {"all pairs": list(range(count_))}} | parts
    accuracy = {
        (column, value): [(int(one.right[places].sum()), len(places)) for one in cards]
        for column, values in everything.items()
        for value, places in values.items()
    }
    lines = [
        (f"{column} = {value}" if column else value, found[0][1], *(_share(*one) for one in found))
        for (column, value), found in accuracy.items()
    ]
    tables = [
        Table("Pairs ordered right", ("pairs", "number", *names), lines),
        Table("Calibration", ("", *names), [
            ("expected calibration error", *(one.error for one in calibrated)),
            ("Brier score", *(one.brier for one in calibrated)),
            ("standard deviation of the scores", *(one.spread for one in cards)),
        ]),
        _flips(cards, names),
        *(effects_table(f"What sways {name}", one.effects, one.spread) for name, one in zip(names, cards)),
    ]  # fmt: skip
    curves = {name: (found.confidence, found.accuracy) for name, found in zip(names, calibrated)}
    figure = line_chart("Share ordered right, by confidence", curves | {"calibrated": ([0.5, 1.0], [0.5, 1.0])},
                        "confidence")  # fmt: skip
    facts = {
        one.name: {
            "accuracy": [
                {"column": column or None, "value": value, "pairs": found[i][1], "right": found[i][0],
                 "interval": wilson(*found[i])}
                for (column, value), found in accuracy.items()
            ],
            "calibration": calibrated[i]._asdict(), "score_std": one.spread, "turned_by_order_of_asking": one.turned,
            "effects": [_plain(effect) for effect in one.effects],
        }
        for i, one in enumerate(cards)
    }  # fmt: skip
    lead = f"{count_:,} pairs of {settings.data.dataset_name}; {', '.join(one.name for one in cards)}."
    report.write(place, "Card of a reward model", lead, facts, tables, [figure])


def _plain(effect: Effect) -> dict[str, Any]:
    values = {name: None if value != value else value for name, value in effect._asdict().items()}
    return values | {"sways": effect.sways}


def labels(names: Sequence[str]) -> list[str]:
    """Paths without the folders that all of them begin or end with; one path stays as it is."""
    parts = [name.split("/") for name in names]
    for end, rest in ((0, slice(1, None)), (-1, slice(None, -1))):
        while len(parts) > 1 and min(map(len, parts)) > 1 and len({part[end] for part in parts}) == 1:
            parts = [part[rest] for part in parts]
    return ["/".join(part) for part in parts]


def _flips(cards: Sequence[Card], names: Sequence[str]) -> Table:
    lines = [("asking about the rejected answer first", "order", *(f"{one.turned:.1%}" for one in cards))]
    for effect in cards[0].effects:
        flips = [next(other.flips for other in one.effects if other[:2] == effect[:2]) for one in cards]
        lines.append((f"{effect.name} on the rejected answer", effect.kind, *(f"{share:.1%}" for share in flips)))
    return Table("Judgements turned round", ("by", "kind", *names), lines)


def _share(right: int, total: int) -> str:
    low, high = wilson(right, total)
    return f"{right / total:.1%} ({low:.1%} to {high:.1%})"
