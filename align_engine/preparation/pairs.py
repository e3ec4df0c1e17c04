"""`align pairs`: ranked, scored or marked answers become pairs, by the cartesian product of better and worse ones."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import datasets

from align_engine.data.formats import BadRow, Text
from align_engine.errors import BadInput
from align_engine.preparation import folder, layouts, report
from align_engine.preparation.models import TIERS
from align_engine.preparation.sections import PairsRecipe, PairsSection
from align_engine.reports.report import Table, bar_chart

ORDERS = ("rank", "score", "label")  # columns that order answers; the first that is there is taken
SIDES = ("chosen", "rejected")
SHOWN, LONGEST = 6, 600  # pairs on the page, characters of each text there


class Answer(NamedTuple):
    """One answer to a prompt."""

    text: Text
    order: float  # its rank (1 is the best) or its score
    tier: float  # smaller is better
    row: int
    model: str | None


class Group(NamedTuple):
    """The answers to one prompt, the best first."""

    prompt: Text
    answers: list[Answer]


Pair = tuple[Answer, Answer]  # (chosen, rejected)


def run(settings: PairsRecipe) -> None:
    """Write pairs, or rows that become pairs.

    Raises:
        BadInput: data that cannot be used, an answer in two tiers, no pair at all.
    """
    rows, counts = layouts.read(settings.data), Counter[str]()
    by, groups = grouped(rows, settings, counts)
    groups = [cleaned(group, settings, counts) for group in groups]
    if settings.pairs.encoder:
        groups = list(apart_in_meaning(groups, settings.pairs, counts))
    groups = [limited(group, settings.pairs) for group in groups]
    made = list(LAYOUTS[settings.pairs.layout](groups, by, settings.pairs))
    if not made:
        raise BadInput(f"{settings.data.dataset_name!r} gives no pair: no prompt has answers of two tiers")
    if settings.data.dry_run:
        folder.dry(made)
        return
    with folder.opened("pairs", settings, rows) as place:
        if place is not None:
            place.write_rows(folder.ROWS, made)
            tell(place, settings, by, groups, counts, len(made))


def grouped(rows: datasets.Dataset, settings: PairsRecipe, counts: Counter[str]) -> tuple[str, list[Group]]:
    """What orders the answers, and the answers of each prompt, in the order of the rows.

    Raises:
        BadInput: nothing that orders them; a row that cannot be used.
    """
    by, names = settings.pairs.by, rows.column_names
    if by == "auto":
        by = "pair" if set(SIDES) <= set(names) else next((name for name in ORDERS if name in names), "")
    if by != "pair" and by not in names:
        raise BadInput(
            f"there is no column {by or ' or '.join(ORDERS)} that orders the answers, but {', '.join(names)}: name it, "
            "as --columns rank=COLUMN, score=COLUMN or label=COLUMN"
        )

    def read(row: layouts.Row) -> tuple[layouts.Row, list[tuple[Text, float, float]]]:
        return row, list(answers_of(row, by))

    found: dict[str, Group] = {}
    for index, (row, answers) in layouts.converted(rows, settings.data, read):
        # rows that are pairs already are not mixed with others of their prompt, which nobody has compared
        key = json.dumps([row["prompt"], index if by == "pair" else None], sort_keys=True)
        group = found.setdefault(key, Group(row["prompt"], []))
        model = row.get("model") if isinstance(row.get("model"), str) else None
        group.answers.extend(Answer(text, order, tier, index, model) for text, order, tier in answers)
        counts["answers read"] += len(answers)
    counts["prompts"] = len(found)
    return by, [Group(prompt, sorted(answers, key=lambda one: one.tier)) for prompt, answers in found.values()]


def answers_of(row: dict[str, Any], by: str) -> Iterator[tuple[Text, float, float]]:
    """(text, rank or score, tier) of each answer in a row. Raises BadRow for one that cannot be used."""
    if by == "pair":
        for rank, side in enumerate(SIDES, 1):
            yield layouts.checked(row.get(side), side, row["prompt"]), rank, rank
        return
    text, value = layouts.checked(row.get("completion"), "completion", row["prompt"]), row.get(by)
    if by == "rank" and isinstance(value, str):
        value = TIERS.get(value, int(value) if value.isdecimal() else value)
    wanted = {"rank": "a rank (1 is the best)", "score": "a number", "label": "true or false"}[by]
    if isinstance(value, bool) != (by == "label") or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRow(f"{by!r} is {value!r:.60}, expected {wanted}")
    order = float(2 - value if by == "label" else value)
    yield text, order, -order if by == "score" else order


def cleaned(group: Group, settings: PairsRecipe, counts: Counter[str]) -> Group:
    """Each answer once.

    Raises:
        BadInput: one stands in two tiers, unless bad rows are dropped: it is then in none of them.
    """
    places: dict[str, list[Answer]] = {}
    for one in group.answers:
        places.setdefault(json.dumps(one.text, sort_keys=True), []).append(one)
    kept = []
    for same in places.values():
        if len({one.tier for one in same}) > 1:
            first, last = same[0], same[-1]
            if settings.data.bad_rows == "error":
                named = folder.origin(settings.data).rows(sorted({first.row, last.row}))
                raise BadInput(
                    f"{named}: the same answer to one prompt stands in two tiers "
                    f"({first.order:g} and {last.order:g}): {words(first.text)!r:.80} (--bad_rows "
                    "drop leaves such answers out)"
                )
            counts["answers in two tiers, left out"] += len(same)
            continue
        counts["answers that stood twice"] += len(same) - 1
        kept.append(same[0])
    return Group(group.prompt, kept)


def apart_in_meaning(groups: list[Group], section: PairsSection, counts: Counter[str]) -> Iterator[Group]:
    """Each group without answers that say nearly what a better or an earlier one says.

    Raises:
        BadInput: an encoder that cannot be used.
    """
    from align_engine.preparation.embeddings import load_encoder
    from align_engine.preparation.near import distinct

    encode = load_encoder(section.encoder or "", section.trust_remote_code)
    texts = [[words(one.text) for one in group.answers] for group in groups]
    for group, places in zip(groups, distinct(texts, encode, section.near_threshold)):
        counts["answers nearly the same, left out"] += len(group.answers) - len(places)
        yield Group(group.prompt, [group.answers[i] for i in places])


def limited(group: Group, section: PairsSection) -> Group:
    """At most max_answers of each tier, drawn by the seed and the prompt."""
    if section.max_answers is None:
        return group
    rng, kept = random.Random(f"{section.seed} {json.dumps(group.prompt, sort_keys=True)}"), []
    for tier in sorted({one.tier for one in group.answers}):
        own = [one for one in group.answers if one.tier == tier]
        kept += drawn(own, section.max_answers, rng)
    return Group(group.prompt, kept)


def drawn(items: list[Any], most: int, rng: random.Random) -> list[Any]:
    """At most so many of the items, in their order."""
    return items if len(items) <= most else [items[i] for i in sorted(rng.sample(range(len(items)), most))]


def pairs_of(group: Group, section: PairsSection) -> list[Pair]:
    """Every answer of a tier with every answer of a worse one, by at least min_gap; at most max_pairs of them, drawn by
    the seed and the prompt."""
    found = [(a, b) for a in group.answers for b in group.answers if a.tier < b.tier and apart(a, b, section)]
    rng = random.Random(f"{section.seed} pairs {json.dumps(group.prompt, sort_keys=True)}")
    return drawn(found, section.max_pairs, rng) if section.max_pairs else found


def apart(better: Answer, worse: Answer, section: PairsSection) -> bool:
    """Whether two answers are so far apart that they may be a pair."""
    return worse.tier - better.tier >= section.min_gap


def margin(pair: Pair, section: PairsSection) -> float:
    """Of one pair: so much per step between ranks, or per point between scores."""
    return section.margin * (pair[1].tier - pair[0].tier)


def preference(groups: list[Group], by: str, section: PairsSection) -> Iterator[dict[str, Any]]:
    """One row for each pair."""
    for group in groups:
        for pair in pairs_of(group, section):
            row: dict[str, Any] = {"prompt": group.prompt} | {side: one.text for side, one in zip(SIDES, pair)}
            row |= {f"{side}_{suffix(by)}": order(one, by) for side, one in zip(SIDES, pair)}
            if any(one.model for one in pair):
                row |= {f"{side}_model": one.model for side, one in zip(SIDES, pair)}
            yield row | ({"margin": margin(pair, section)} if section.margin else {})


def several(groups: list[Group], by: str, section: PairsSection) -> Iterator[dict[str, Any]]:
    """One row for each tier and all that are worse: n chosen and m rejected answers, which train as one tree. Each pair
    is in one row; margins are n x m numbers, those of the first chosen answer first."""
    for group in groups:
        for tier in sorted({one.tier for one in group.answers}):
            chosen = [one for one in group.answers if one.tier == tier]
            rejected = [one for one in group.answers if one.tier > tier and apart(chosen[0], one, section)]
            if not rejected:
                continue
            row: dict[str, Any] = {"prompt": group.prompt}
            row |= {side: [one.text for one in own] for side, own in zip(SIDES, (chosen, rejected))}
            for side, own in zip(SIDES, (chosen, rejected)):
                row[f"{side}_{suffix(by)}"] = [order(one, by) for one in own]
            if section.margin:
                row["margin"] = [margin((a, b), section) for a in chosen for b in rejected]
            yield row


def unpaired(groups: list[Group], by: str, section: PairsSection) -> Iterator[dict[str, Any]]:
    """One row for each answer with its mark: desirable are those up to the given rank or from the given score on, by
    default the best tier of each prompt that has two."""
    for group in groups:
        tiers = {one.tier for one in group.answers}
        if section.desirable is None and len(tiers) < 2:
            continue
        limit = section.desirable
        worst = min(tiers, default=0.0) if limit is None else -limit if by == "score" else limit
        for one in group.answers:
            yield {"prompt": group.prompt, "completion": one.text, "label": one.tier <= worst}


LAYOUTS = {"preference": preference, "several": several, "unpaired": unpaired}


def suffix(by: str) -> str:
    """Of the columns that say where an answer stood."""
    return "score" if by == "score" else "rank"


def order(one: Answer, by: str) -> int | float:
    """The rank or the score of an answer, as it is written."""
    return one.order if by == "score" or one.order % 1 else int(one.order)


def words(text: Text) -> str:
    """What an answer says."""
    return text if isinstance(text, str) else str(text[-1]["content"])


def tell(
    place: folder.ResultFolder, settings: PairsRecipe, by: str, groups: list[Group], counts: Counter[str], rows: int
) -> None:
    """Write the report."""
    pairs = [pair for group in groups for pair in pairs_of(group, settings.pairs)]
    between = Counter((a.order, b.order) for a, b in pairs)
    longer = sum(len(words(a.text)) > len(words(b.text)) for a, b in pairs) / max(len(pairs), 1)
    counts["prompts without a pair"] = sum(not pairs_of(group, settings.pairs) for group in groups)
    counts["pairs"], counts["rows"] = len(pairs), rows
    lead = f"{len(pairs):,} pairs of {counts['prompts']:,} prompts, in {rows:,} rows."
    shown = between.most_common(20)
    names = {pair: f"{pair[0]:g} above {pair[1]:g}" for pair, _ in shown}
    tables = [
        Table("Counts", ("what", "how many"), [*counts.items(), ("share whose chosen is longer", longer)]),
        Table(f"Pairs by {suffix(by)}", ("chosen above rejected", "pairs"), [(names[p], n) for p, n in shown]),
        Table("First pairs", ("prompt", *SIDES), [[short(part) for part in one] for one in first(groups, settings)]),
    ]
    facts = {"by": by, **counts, "chosen_is_longer": longer}
    facts["between"] = [{"chosen": a, "rejected": b, "pairs": count} for (a, b), count in between.most_common()]
    figure = bar_chart("Pairs", {names[pair]: (count, 0) for pair, count in shown[:6]}, "pairs")
    report.write(place, "align pairs", lead, facts, tables, [figure] if pairs else [])
    print(f"{lead} Rows in {place.path / folder.ROWS}, report in {place.path / report.NAMES[-1]}")


def first(groups: list[Group], settings: PairsRecipe) -> Iterator[tuple[str, str, str]]:
    """Texts of the first pair of the first prompts that have one."""
    with_pairs = ((group, pairs_of(group, settings.pairs)) for group in groups)
    found = ((group, pairs[0]) for group, pairs in with_pairs if pairs)
    for (group, (chosen, rejected)), _ in zip(found, range(SHOWN)):
        yield words(group.prompt), words(chosen.text), words(rejected.text)


def short(text: str) -> str:
    """Its beginning, where it is long."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
