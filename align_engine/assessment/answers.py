"""Answers of the models that are looked at: every prompt has one of each, or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets

from align_engine.data.formats import Messages
from align_engine.preparation import folder, generate, layouts
from align_engine.preparation.models import ModelSpec, Question, Reply
from align_engine.preparation.sections import MappedInput

JOURNAL = "_answers.jsonl"


@dataclass
class Asked:
    """Prompts, by the number of their row."""

    prompts: generate.Prompts
    rows: dict[int, dict[str, Any]]  # as they stand, for scorers


def read(section: MappedInput, specs: list[ModelSpec], limit: int | None) -> tuple[datasets.Dataset, Asked]:
    """The prompts of a data set, the first `limit` of them.

    Raises:
        BadInput: rows that cannot be used; a column of answers that is not there.
    """
    rows = layouts.read(section)
    columns = [one.column for one in specs if one.column]
    generate.check_columns(specs, rows)

    def use(row: layouts.Row) -> tuple[generate.Prompt, dict[str, Any]]:
        return generate.read(row, columns), row

    found = dict(islice(layouts.converted(rows, section, use), limit))
    return rows, Asked({i: prompt for i, (prompt, _) in found.items()}, {i: row for i, (_, row) in found.items()})


class Answers(generate.Work):
    """Replies of models that are measured: an empty answer is an answer, and a refused prompt is counted."""

    def take(self, question: Question, reply: Reply) -> None:
        """Keep a reply."""
        reply.answers = [(text.encode("utf-8", "replace").decode(), ended) for text, ended in reply.answers]
        self.keep(question, reply)

    def text(self, spec: ModelSpec, row: int) -> str | None:
        """The first answer of a model to a prompt; None: there is none."""
        found = self.answers(spec, row)
        return found[0][0][-1]["content"] if found else None


def collect(place: folder.ResultFolder, settings: Any, specs: list[ModelSpec], asked: Asked, endpoints: Any) -> Answers:
    """Ask for all answers that the folder's journal does not hold.

    Raises:
        RunFailed: an endpoint refuses, or fails again and again; what has been answered stays.
    """
    with place.journal(JOURNAL) as journal:
        answers = Answers(settings, specs, asked.prompts, journal)
        generate.fill(answers, endpoints)
    return answers


def shown(messages: Messages) -> str:
    """A prompt as text: its only message, or all with their roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{one['role']}: {one['content']}" for one in messages)
