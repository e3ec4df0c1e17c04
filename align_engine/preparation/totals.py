"""What answers cost and what they are like: on the screen while they come, and in the report at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from align_engine.data.formats import Messages
from align_engine.preparation import folder, report
from align_engine.preparation.models import ModelSpec, Reply
from align_engine.reports.report import Table, bar_chart

SHOWN, LONGEST = 6, 600  # prompts on the page, characters of each text there
Show = Callable[[ModelSpec], None]


@dataclass
class Total:
    """Of one model."""

    model: str
    tier: str
    rank: int
    answers: int
    left_out: int
    mean_characters: float
    cut: int  # answers that ended at max_tokens
    prompt_tokens: int
    completion_tokens: int
    cost: float
    reasons: dict[str, int]  # why prompts were left out


def cost(spec: ModelSpec, tokens: Sequence[int]) -> float:
    """Of tokens of prompts and of answers."""
    return (tokens[0] * spec.input_price + tokens[1] * spec.output_price) / 1e6


def tokens_of(replies: Sequence[Reply]) -> tuple[int, int]:
    """Tokens of the prompts and of the answers."""
    return sum(one.tokens[0] for one in replies), sum(one.tokens[1] for one in replies)


def total(spec: ModelSpec, answers: list[tuple[Messages, str]], replies: list[Reply]) -> Total:
    """What a model has answered, each with why it ended, and what the requests said of tokens."""
    tokens, reasons = tokens_of(replies), Counter(one.refused for one in replies if one.refused)
    lengths = [len(answer[-1]["content"]) for answer, _ in answers]
    cut = sum(ended == "length" for _, ended in answers)
    return Total(spec.name, spec.tier, spec.rank, len(answers), reasons.total(), statistics.mean(lengths), cut,
                 *tokens, cost(spec, tokens), dict(reasons.most_common()))  # fmt: skip


@contextlib.contextmanager
def progress(specs: Sequence[ModelSpec], replies: dict[str, dict[int, Reply]], prompts: int) -> Iterator[Show]:
    """Bars of the models that are asked, with tokens and cost so far; what is yielded moves that of a model."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    spent = {one.name: tokens_of(list(replies[one.name].values())) for one in specs}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[spent]}"))  # fmt: skip

    def said(spec: ModelSpec) -> str:
        return f"{sum(spent[spec.name]):,} tokens, cost {cost(spec, spent[spec.name]):.2f}"

    with Progress(*columns) as bars:
        tasks = {one.name: bars.add_task(one.name, total=prompts, completed=len(replies[one.name]), spent=said(one))
                 for one in specs if not one.column}  # fmt: skip

        def show(spec: ModelSpec) -> None:
            last = next(reversed(replies[spec.name].values()))
            spent[spec.name] = (spent[spec.name][0] + last.tokens[0], spent[spec.name][1] + last.tokens[1])
            bars.update(tasks[spec.name], completed=len(replies[spec.name]), spent=said(spec))

        yield show


def tell(place: folder.ResultFolder, found: Sequence[Total], prompts: int, texts: list[list[str]]) -> None:
    """Write the report.

    Args:
        texts: of the first prompts: the prompt and each model's answers.
    """
    answers, price = sum(one.answers for one in found), sum(one.cost for one in found)
    lead = f"{answers:,} answers of {len(found)} models to {prompts:,} prompts, cost {price:.2f}."
    header = ("model", "tier", "rank", "answers", "left out", "mean characters", "cut at max_tokens", "prompt tokens",
              "answer tokens", "cost")  # fmt: skip
    rows = [list(dataclasses.astuple(one)[:-1]) for one in found]
    tables = [Table("Models", header, rows)]
    if left := [(one.model, why, count) for one in found for why, count in one.reasons.items()]:
        tables.append(Table("Left out", ("model", "why", "prompts"), left))
    shown = [[_short(text) for text in row] for row in texts]
    examples = Table("First prompts", ("prompt", *(one.model for one in found)), shown)
    lengths = {one.model: (one.mean_characters, 0.0) for one in found}
    figure = bar_chart("Mean length of the answers", lengths, "characters")
    facts: dict[str, Any] = {"prompts": prompts, "answers": answers, "cost": price}
    facts["models"] = [dataclasses.asdict(one) for one in found]
    report.write(place, "align generate", lead, facts, [*tables, examples], [figure])
    print(f"{lead} Rows in {place.path / folder.ROWS}, report in {place.path / report.NAMES[-1]}")


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
