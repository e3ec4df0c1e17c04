"""Rows as prompts and answers: texts to count and to edit, and what asks a reward model about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch

from align_engine.data.formats import BadRow, detect_layout, is_conversational, normalise
from align_engine.errors import BadInput, Naming, rows_named
from align_engine.preparation.sway import Pair, Score
from align_engine.rollouts.rewards import Reward, load_reward, score

CHUNK = 512  # answers that a scorer is given at a time
SIDES = ("chosen", "rejected")
SOURCES = {False: ("model",), True: ("chosen_model", "rejected_model")}  # columns of answers, and of pairs


class Answer(NamedTuple):
    """The last message of a completion, or the completion."""

    prompt: Any  # text or messages, earlier ones of the completion among them
    text: str


class Answers:
    """(source, answer) of every row, from the data set whenever it is gone through.

    Args:
        rows: with the columns prompt and completion, messages or text; or chosen and rejected, which give two answers.
        source_column: columns with an answer's source: one, or with chosen and rejected one of each. Empty: those of
            SOURCES, where they are there; else there is one source, or with chosen and rejected these two.
        bad_rows: "drop" leaves out rows that cannot be used, which "error" refuses.
        named: of rows, by their numbers.
    Raises:
        BadInput: columns that are not there.
    """

    def __init__(
        self, rows: datasets.Dataset, source_column: Sequence[str], bad_rows: str, named: Naming = rows_named
    ) -> None:
        self.rows, self.bad_rows, self.named = rows, bad_rows, named
        self.paired = set(SIDES) <= set(rows.column_names)
        self.layout = detect_layout(rows.column_names, "preference" if self.paired else "sft")
        if lost := [name for name in source_column if name not in rows.column_names]:
            raise BadInput(f"source_column = {lost[0]!r}: there is no such column, but {sorted(rows.column_names)}")
        if len(source_column) not in ({0, 1, 2} if self.paired else {0, 1}):
            wanted = "one column, or two where rows hold chosen and rejected"
            raise BadInput(f"source_column = {list(source_column)}: give {wanted}")
        usual = SOURCES[self.paired]
        source_column = source_column or (usual if set(usual) <= set(rows.column_names) else ())
        self.sources = list(source_column) * (2 if len(source_column) == 1 else 1)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for row, parts in usable(self.rows, self.layout, self.bad_rows, range(len(self.rows)), self.named):
            for side, key in enumerate(SIDES if self.paired else self.layout[-1:]):
                source = str(row[self.sources[side]]) if self.sources else key
                for text in parts[key]:
                    yield source, answer("", text).text


def usable(
    rows: datasets.Dataset, layout: tuple[str, ...], bad_rows: str, places: Sequence[int] | np.ndarray, named: Naming
) -> Iterator[tuple[dict[str, Any], dict[str, list[Any]]]]:
    """Each row at these places, and its parts as `normalise` gives them.

    Raises:
        BadInput: a row that cannot be used, by its number, where `bad_rows` is "error".
    """
    for place, row in zip(places, rows.select(places)):
        assert isinstance(row, dict)
        try:
            yield row, normalise(row, layout)
        except BadRow as error:
            if bad_rows == "error":
                raise BadInput(f"{named([place])}: {error}; mend it, or give --bad_rows drop") from error


def answer(prompt: Any, completion: Any) -> Answer:
    """The answer of a completion, and the prompt that it answers."""
    if not is_conversational(completion):
        return Answer(prompt, completion)
    before = [*(prompt if isinstance(prompt, list) else ()), *completion[:-1]]
    return Answer(before, completion[-1]["content"])


def pairs_of(
    rows: datasets.Dataset, count: int | None, seed: int, bad_rows: str, named: Naming = rows_named
) -> tuple[list[Pair], list[Any]]:
    """Pairs of a data set, those of `count` rows drawn by a seed (None: all), and the row that each comes from. A row
    with several answers gives each chosen with each rejected one.

    Raises:
        BadInput: the rows are no pairs.
    """
    layout = detect_layout(rows.column_names, "preference")
    drawn = np.sort(np.random.default_rng(seed).permutation(len(rows))[:count])
    found, origins = list[Pair](), list[Any]()
    for row, parts in usable(rows, layout, bad_rows, drawn, named):
        answers = [[answer(parts["prompt"][0], text) for text in parts[side]] for side in SIDES]
        for chosen, rejected in product(*answers):
            if chosen.prompt == rejected.prompt:
                found.append((chosen.prompt, chosen.text, rejected.text))
                origins.append(row)
    if not found:
        raise BadInput("no pair is left: their answers differ before the last message, or cannot be used")
    return found, origins


def scorer(spec: str, trust_remote_code: bool = False) -> Score:
    """Scores of answers by a reward model, or by any scorer that `reward_funcs` takes; NaN where it cannot say.

    Raises:
        BadInput: nothing of that name. RunFailed: it fails.
    """
    return asking(load_reward(spec, device(), trust_remote_code))


def device() -> torch.device:
    """Where reward models run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def asking(reward: Reward) -> Score:
    """The scores that a scorer gives."""

    def ask(prompts: list[Any], texts: list[str]) -> np.ndarray:
        if reward.check:
            reward.check(prompts)
        found = []
        for start in range(0, len(prompts), CHUNK):
            asked = list(zip(prompts, texts))[start : start + CHUNK]
            completions = [
                [{"role": "assistant", "content": text}] if is_conversational(prompt) else text
                for prompt, text in asked
            ]
            columns = {"prompts": [prompt for prompt, _ in asked], "completions": completions}
            found.append(score([reward], columns | {"completion_ids": [[]] * len(asked)})[:, 0].numpy())
        return np.concatenate(found)

    return ask
