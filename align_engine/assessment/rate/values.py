"""What a mark is in each mode: from the form of a page to numbers by the answers' own order, and back.

| mode | form | value, a number for each answer |
|---|---|---|
| pair | choice: 1, 2 or tie | rank: [1, 2], [2, 1] or [1, 1] |
| mark | choice: ok or no | [1] or [0] |
| score | choice: the score | [score] |
| rank | rank1, rank2, ...: places, equal ones for a tie | dense ranks, 1 is the best |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

COMPARING = ("pair", "rank")  # modes whose values are ranks of answers to one prompt
MOST_RANKED = 9  # answers of an item: a digit's key for each
QUESTIONS = {
    "pair": "Which answer is better?",
    "mark": "Is this answer ok?",
    "score": "How good is this answer?",
    "rank": "Put the answers in order, the best one first.",
}


class NoMark(ValueError):
    """A form that holds no mark; the sentence is for the assessor."""


def read(mode: str, form: Mapping[str, str], shown: Sequence[int], scale: Sequence[int]) -> list[int]:
    """The value of a form, by the answers' own order.

    Args:
        form: its fields.
        shown: numbers of the answers as they stand on the page.
        scale: lowest and highest score.
    Raises:
        NoMark: it holds none.
    """
    choice = form.get("choice", "")
    if mode == "rank":
        places = [form.get(f"rank{place}", "") for place in range(1, len(shown) + 1)]
        allowed = {str(place) for place in range(1, len(shown) + 1)}
        if not allowed.issuperset(places):
            raise NoMark("Give every answer a place; equal places are a tie.")
        return undone(dense([int(place) for place in places]), shown)
    if mode == "score":
        scores = {str(score): score for score in range(scale[0], scale[1] + 1)}
        if choice not in scores:
            raise NoMark(f"Choose a score from {scale[0]} to {scale[1]}.")
        return [scores[choice]]
    known = {"pair": {"1": [1, 2], "2": [2, 1], "tie": [1, 1]}, "mark": {"ok": [1], "no": [0]}}[mode]
    if choice not in known:
        raise NoMark("Choose one of the buttons.")
    return undone(known[choice], shown)


def undone(by_place: Sequence[int], shown: Sequence[int]) -> list[int]:
    """Numbers that stand as on the page, in the answers' own order."""
    found = [0] * len(shown)
    for place, number in enumerate(shown):
        found[number] = by_place[place]
    return found


def dense(ranks: Sequence[float]) -> list[int]:
    """Ranks without gaps: 2, 5, 5 become 1, 2, 2."""
    order = sorted(set(ranks))
    return [order.index(rank) + 1 for rank in ranks]
