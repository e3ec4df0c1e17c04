"""`align tokens`: words that give a source of answers away, and those that sway a reward model.

The counts are of `frequent`, the effects of `sway`. A reward model is asked about the openings and n-grams that stand
out, about openings that the user names, and about length, order and style; those of markers are measured against
neutral words, which are drawn from the same answers. The openings that stand out are taken off the pairs' answers
first: one behind another would be no opening.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import datasets
import numpy as np

from align_engine import inputs
from align_engine.data.sources import Origin, load_rows
from align_engine.errors import BadInput
from align_engine.preparation import folder, report
from align_engine.preparation.answers import Answers, pairs_of, scorer
from align_engine.preparation.edits import STYLES, Edit, of_marker
from align_engine.preparation.frequent import Counts, Finding, Kind, Marker, count, distinct, findings, stands_out
from align_engine.preparation.sections import SwaySection, TokensRecipe
from align_engine.preparation.sway import Effect, Pair, bare, effects
from align_engine.reports.report import Table

NEUTRAL = 24  # words that a marker is measured against
AVERAGE = 1.5  # |z| of a word that no source prefers
SHOWN = 160  # characters of an example


class Sway(NamedTuple):
    """What a reward model makes of edits."""

    effects: list[Effect]
    spread: float  # standard deviation of its scores of the pairs' answers
    neutral: dict[Kind, list[str]]
    examples: dict[str, tuple[str, float, float]]  # edit -> (answer with it, score without, score with)


def run(settings: TokensRecipe) -> None:
    """The command.

    Raises:
        BadInput: from the rows, the pairs and the reward model, before anything is written.
    """
    asked = settings.tokens
    rows = folder.read(settings.data)
    answers = Answers(rows, asked.source_column, settings.data.bad_rows, folder.origin(settings.data).rows)
    pairs = _pairs(settings, rows)
    score = scorer(settings.sway.reward_model, settings.sway.trust_remote_code) if settings.sway.reward_model else None
    if settings.data.dry_run:
        return folder.dry(map(_line, findings(count(answers, asked.max_words, asked.min_count))))
    with folder.opened("tokens", settings, rows, inputs.facts(settings), "report.json") as place:
        if place is None:
            return
        counts = count(answers, asked.max_words, asked.min_count)
        found = findings(counts)
        telling = distinct([one for one in found if stands_out(one, asked.min_share)])[: asked.top]
        sway = None
        if score is not None:
            sway = swayed(score, pairs, telling, settings.sway, neutral_words(counts, found, telling))
        write(place, settings, counts, found, telling, sway)


def _pairs(settings: TokensRecipe, rows: datasets.Dataset) -> list[Pair]:
    section = settings.sway
    if section.reward_model is None:
        return []
    origin = Origin(section.pairs_name or settings.data.dataset_name, settings.data.dataset_train_split)
    held = load_rows(*origin) if section.pairs_name else rows
    if section.pairs_name is None and not {"chosen", "rejected"} <= set(rows.column_names):
        raise BadInput(
            f"reward_model = {section.reward_model!r}: dataset_name holds no pairs to ask it about (chosen and "
            "rejected); give some as pairs_name"
        )
    with origin.named() if section.pairs_name else nullcontext():
        return pairs_of(held, section.num_pairs, section.seed, settings.data.bad_rows, origin.rows)[0]


def neutral_words(counts: Counts, found: Sequence[Finding], telling: Sequence[Finding]) -> dict[Kind, list[str]]:
    """Frequent words that no source prefers: openings, filled up with words from anywhere; and n-grams."""
    taken = {word for one in telling for word in one.marker.text.split()}
    preferred = {one.marker for one in found if abs(one.z) > AVERAGE}
    order = np.argsort(-counts.found.sum(1), kind="stable")
    words = [counts.markers[i] for i in order if counts.markers[i].length == 1]
    average = [word for word in words if word not in preferred and word.text not in taken]
    ngrams = [word.text for word in average if word.kind == "ngram"]
    openings = [word.text for word in average if word.kind == "opening"]
    return {"opening": list(dict.fromkeys(openings + ngrams))[:NEUTRAL], "ngram": ngrams[:NEUTRAL]}


def swayed(
    score: Any, pairs: list[Pair], telling: Sequence[Finding], section: SwaySection, neutral: dict[Kind, list[str]]
) -> Sway:
    """Ask a reward model about what stands out, the user's markers, length, order and style."""
    markers = [one.marker for one in telling] + [Marker("opening", " ".join(text.split())) for text in section.markers]
    openings = [marker.text for marker in markers if marker.kind == "opening"]
    pairs = bare(pairs, openings)
    edits = [*map(of_marker, dict.fromkeys(markers)), *STYLES.values()]
    beside = {kind: [of_marker(Marker(kind, text)) for text in texts] for kind, texts in neutral.items()}
    found = effects(edits, beside, pairs, score, section.seed)
    prompts = [pair[0] for pair in pairs for _ in (1, 2)]
    held = score(prompts, [text for pair in pairs for text in pair[1:]])
    by_name = {(edit.name, edit.kind): edit for edit in edits}
    examples = {one.name: _example(by_name[one.name, one.kind], pairs, score) for one in found if one.sways}
    return Sway(found, float(np.nanstd(held)), neutral, examples)


def _example(edit: Edit, pairs: list[Pair], score: Any) -> tuple[str, float, float]:
    """An answer with the edit, and its scores without and with it."""
    prompt, (bare, marked) = next(
        (pair[0], both) for pair in pairs for text in pair[1:] if (both := edit.apply(text)) is not None
    )
    without, with_it = score([prompt, prompt], [bare, marked]).tolist()
    return marked, without, with_it


def _line(one: Finding) -> dict[str, Any]:
    numbers = {"count": one.count, "share": one.share, "others": one.others, "z": one.z}
    numbers = {name: None if math.isnan(value) else value for name, value in numbers.items()}
    return {"kind": one.marker.kind, "text": one.marker.text, "source": one.source, **numbers}


def write(
    place: folder.ResultFolder,
    settings: TokensRecipe,
    counts: Counts,
    found: Sequence[Finding],
    telling: Sequence[Finding],
    sway: Sway | None,
) -> None:
    """The reports."""
    facts: dict[str, Any] = {
        "sources": dict(zip(counts.sources, counts.answers.tolist())),
        "telling": [_line(one) for one in telling],
        "first_words": [_line(one) for one in _kind(found, "opening", 1)[: settings.tokens.top]],
    }
    lead = f"{counts.answers.sum():,} answers of {len(counts.sources)} sources ({', '.join(counts.sources)})."
    tables = []
    if sway is not None:
        moved = [one for one in sway.effects if one.sways]
        lead += (
            f" {len(moved)} of {len(sway.effects)} edits sway {settings.sway.reward_model}, whose scores have a "
            f"standard deviation of {sway.spread:.3g}."
        )
        own = {one.marker.text for one in telling}
        beyond = [one.name for one in sway.effects if one.neutral == one.less > 0 and one.name in own and not one.sways]
        if beyond:
            lead += f" Not told from neutral words, but moving it further than each of them: {', '.join(beyond)}."
        facts["reward_model"] = settings.sway.reward_model
        facts["score_std"] = sway.spread
        facts["neutral"] = sway.neutral
        facts["effects"] = [
            {name: None if value != value else value for name, value in one._asdict().items()} | {"sways": one.sways}
            for one in sway.effects
        ]
        tables.append(effects_table("What sways the reward model", sway.effects, sway.spread))
        shown = [(name, text[:SHOWN], *scores) for name, (text, *scores) in sway.examples.items()]
        tables.append(Table("Examples", ("edit", "an answer with it", "score without", "score with"), shown))
    tables += [
        _table("First words", _kind(found, "opening", 1)[: settings.tokens.top]),
        _table("Openings and phrases that stand out", telling),
    ]
    title = "Words that give answers away"
    report.write(place, title, lead, facts, [table for table in tables if table.rows])


def effects_table(title: str, found: Sequence[Effect], spread: float) -> Table:
    """Edits as lines: effects in the score's own units, and in its standard deviations."""
    header = ("edit", "kind", "sways", "effect", "from", "to", "in std", "p, corrected", "chosen", "rejected", "flips",
              "beyond neutral", "pairs")  # fmt: skip
    lines = [
        (one.name, one.kind, "yes" if one.sways else "no", one.effect, one.low, one.high,
         one.effect / spread if spread else math.nan, one.p_holm, one.chosen, one.rejected, f"{one.flips:.1%}",
         f"{one.less} of {one.neutral}" if one.neutral else "", one.pairs)
        for one in found
    ]  # fmt: skip
    return Table(title, header, lines)


def _kind(found: Sequence[Finding], kind: Kind, length: int) -> list[Finding]:
    """Findings of a kind, the most frequent first."""
    some = [one for one in found if (one.marker.kind, one.marker.length) == (kind, length)]
    return sorted(some, key=lambda one: -one.count)


def _table(title: str, found: Sequence[Finding]) -> Table:
    header = ("words", "kind", "source", "answers", "share", "share of the others", "z")
    lines = [
        (one.marker.text, one.marker.kind, one.source, one.count, f"{one.share:.2%}",
         "" if math.isnan(one.others) else f"{one.others:.2%}", "" if math.isnan(one.z) else one.z)
        for one in found
    ]  # fmt: skip
    return Table(title, header, lines)
