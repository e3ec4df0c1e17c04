"""`align generate`: answers to prompts from several models of known rank.

Every reply goes into the folder's journal when it comes, so a run that is killed goes on with what is missing. What a
checkpoint or an endpoint answers depends on (settings, seed, row) alone, so the rows of an interrupted run are those of
an unbroken one, as far as an endpoint keeps to its seeds.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import datasets

from align_engine.data.formats import Messages
from align_engine.errors import BadInput, RunFailed
from align_engine.models import fingerprint
from align_engine.preparation import folder, layouts, totals
from align_engine.preparation.endpoints import Endpoint, ask_all
from align_engine.preparation.models import ModelSpec, Question, Reply, read_models
from align_engine.preparation.sections import GenerateRecipe

Asking = Any  # settings with a section `ask` of AskedModels, and a section `data`
Place = tuple[str | None, str | None]  # of an endpoint: its address, and the variable that holds its key
SETTINGS = ("temperature", "top_p", "max_tokens")
OURS = ("prompt", "completion", "model", "tier", "rank", "index", "choice", "seed", *SETTINGS, "finish_reason")


class Prompt(NamedTuple):
    """What is asked."""

    messages: Messages
    more: dict[str, Any]  # its row's other columns
    held: dict[str, Messages]  # answers that the row holds already, by column


Prompts = dict[int, Prompt]  # by the number of their row


def run(settings: GenerateRecipe) -> None:
    """Ask every model for its answers to every prompt.

    Raises:
        BadInput: settings, models, keys or data that cannot be used. RunFailed: an endpoint refuses, or fails again and
            again; what has been answered stays. Stopped: by a signal.
    """
    rows, specs = layouts.read(settings.data), read_models(settings.ask.models)
    check_columns(specs, rows)
    columns = [one.column for one in specs if one.column]
    prompts = dict(layouts.converted(rows, settings.data, lambda row: read(row, columns)))
    if settings.data.dry_run:
        folder.dry(asked(specs, prompts, settings.ask.seed))
        return
    endpoints = endpoints_of(specs, settings)
    facts = facts_of(specs)
    with folder.opened("generate", settings, rows, facts) as place:
        if place is None:
            return
        with place.journal() as journal:
            work = Work(settings, specs, prompts, journal)
            fill(work, endpoints)
        finish(place, work)


def check_columns(specs: Iterable[ModelSpec], rows: datasets.Dataset) -> None:
    """Refuse people whose answers stand in no column."""
    for spec in specs:
        if spec.column and spec.column not in {*rows.column_names, "completion"}:
            known = ", ".join(rows.column_names)
            raise BadInput(f"model {spec.name!r}: there is no column {spec.column!r}, but {known}")


def read(row: layouts.Row, columns: Iterable[str]) -> Prompt:
    """The prompt of a row, with the answers that stand in some columns. Raises BadRow for one that is no answer."""
    more = {name: value for name, value in row.items() if name not in (*OURS, *layouts.ANSWERS)}
    messages = layouts.as_messages(row["prompt"])
    held = {name: layouts.checked(row[name], name, messages) for name in columns if row.get(name)}
    return Prompt(messages, more, {name: layouts.answer(text, name) for name, text in held.items()})


def facts_of(specs: Iterable[ModelSpec]) -> dict[str, Any]:
    """What decides the answers of models, for the identity of a result."""
    specs = list(specs)
    facts: dict[str, Any] = {"models": sorted(one.name for one in specs)}
    facts |= {f"model {one.name}": one.settings for one in specs}
    return facts | {f"files of model {one.name}": fingerprint.of_model(one.path) for one in specs if one.path}


def fill(work: Work, endpoints: dict[Place, Endpoint]) -> None:
    """Ask for all replies that are missing."""
    with totals.progress(work.specs, work.replies, len(work.prompts)) as work.show:
        asyncio.run(ask_all(work.questions(endpoints), work.take))
        for spec in work.specs:
            if spec.path and (waiting := work.missing(spec)):
                checkpoint(spec, work, waiting)


def endpoints_of(specs: Iterable[ModelSpec], settings: Asking) -> dict[Place, Endpoint]:
    """The endpoints that are asked. Raises BadInput where a key is missing."""
    own = settings.ask
    by_place = {(one.base_url, one.api_key_env): one for one in specs if one.base_url}
    return {place: Endpoint(one, own.server_concurrency, own.request_timeout) for place, one in by_place.items()}


def seed_of(spec: ModelSpec, row: int, seed: int) -> int:
    """Of one request."""
    return int(hashlib.sha256(f"{seed} {row} {spec.name}".encode()).hexdigest()[:8], 16) % 2**31


def asked(specs: list[ModelSpec], prompts: Prompts, seed: int) -> Iterator[dict[str, Any]]:
    """What a dry run shows of each prompt."""
    for row, prompt in prompts.items():
        models = [{"model": one.name, "tier": one.tier, "n": one.n, "seed": seed_of(one, row, seed)} for one in specs]
        yield {"prompt": prompt.messages, "asked": models}


class Work:
    """Replies that are there and those that are not.

    Args:
        journal: of the folder; replies of these models under this seed in it are taken as they stand.
    """

    def __init__(self, settings: Asking, specs: list[ModelSpec], prompts: Prompts, journal: folder.Journal) -> None:
        self.settings, self.specs, self.prompts, self.journal = settings, specs, prompts, journal
        self.keys = {one.name: one.key(settings.ask.seed) for one in specs}
        self.replies: dict[str, dict[int, Reply]] = {one.name: {} for one in specs}
        self.show: totals.Show = lambda spec: None
        for line in journal.rows:
            name, row = line["model"], line["row"]
            if line["key"] == self.keys.get(name) and row in prompts:
                answers, tokens = [(text, ended) for text, ended in line["answers"]], line["tokens"]
                self.replies[name][row] = Reply(line["seed"], answers, (tokens[0], tokens[1]), line["refused"])

    def missing(self, spec: ModelSpec) -> set[int]:
        """Rows without a reply."""
        return self.prompts.keys() - self.replies[spec.name].keys()

    def questions(self, endpoints: dict[Place, Endpoint]) -> list[tuple[Endpoint, Iterator[Question]]]:
        """What is to be asked, by endpoint; models at the same one take turns, row by row."""

        def waiting(specs: list[ModelSpec]) -> Iterator[Question]:
            for row, prompt in self.prompts.items():
                for spec in specs:
                    if row not in self.replies[spec.name]:
                        seed = seed_of(spec, row, self.settings.ask.seed)
                        yield Question(spec, row, prompt.messages, seed)

        at = {place: [one for one in self.specs if (one.base_url, one.api_key_env) == place] for place in endpoints}
        return [(endpoint, waiting(at[place])) for place, endpoint in endpoints.items()]

    def take(self, question: Question, reply: Reply) -> None:
        """Keep a reply.

        Raises:
            RunFailed: there is no answer to this prompt, or an empty one, and such are not dropped.
        """
        reply = checked(reply)
        if reply.refused and self.settings.data.bad_rows == "error":
            way = "--bad_rows drop leaves such answers out"
            where = f"model {question.spec.name!r}, {folder.origin(self.settings.data).rows([question.row])}"
            raise RunFailed(f"{where}: {reply.refused} ({way}); {folder.STANDING}")
        self.keep(question, reply)

    def keep(self, question: Question, reply: Reply) -> None:
        """Write a reply to the journal."""
        spec, row = question.spec, question.row
        self.journal.add([{"model": spec.name, "key": self.keys[spec.name], "row": row, **vars(reply)}])
        self.replies[spec.name][row] = reply
        self.show(spec)

    def answers(self, spec: ModelSpec, row: int) -> list[tuple[Messages, str]]:
        """Those of a model to a row, as messages, and why each ended."""
        if spec.column:
            held = self.prompts[row].held.get(spec.column)
            return [(held, "")] if held else []
        found = self.replies[spec.name][row]
        return [(layouts.answer(text, spec.name), ended) for text, ended in found.answers]

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each answer, in the order of the prompts, the models and the answers."""
        for index, prompt in self.prompts.items():
            for spec in self.specs:
                reply = self.replies[spec.name].get(index)
                settings = {name: getattr(spec, name) if reply else None for name in SETTINGS}
                for choice, (answer, ended) in enumerate(self.answers(spec, index)):
                    yield {
                        "prompt": prompt.messages, "completion": answer, "model": spec.name, "tier": spec.tier,
                        "rank": spec.rank, "index": index, "choice": choice, "seed": reply.seed if reply else None,
                        **settings, "finish_reason": ended or None, **prompt.more,
                    }  # fmt: skip


def checked(reply: Reply) -> Reply:
    """The same, refused where an answer is empty or is no text that a file can hold."""
    for text, _ in reply.answers:
        if not text.strip():
            return Reply(reply.seed, tokens=reply.tokens, refused="it gave an empty answer")
        if any("\ud800" <= character <= "\udfff" for character in text):
            return Reply(reply.seed, tokens=reply.tokens, refused="its answer holds half of a surrogate pair: no text")
    return reply


def checkpoint(spec: ModelSpec, work: Work, waiting: set[int]) -> None:
    """The answers of a checkpoint in this process. Batches are cut from all rows, so that each is what it would have
    been in an unbroken run."""
    from align_engine.preparation.local import Local

    named = folder.origin(work.settings.data).rows
    local = Local(spec, {row: prompt.messages for row, prompt in work.prompts.items()}, named)
    for batch in local.batches(work.settings.ask.batch_size):
        if not waiting.isdisjoint(batch):
            for row, reply in zip(batch, local.sample(batch, seed_of(spec, batch[0], work.settings.ask.seed))):
                if row in waiting:
                    work.take(Question(spec, row, [], reply.seed), reply)


def finish(place: folder.ResultFolder, work: Work) -> None:
    """Write the rows and what is to be said of them.

    Raises:
        RunFailed: a model has not answered anything.
    """
    found = []
    for spec in work.specs:
        answers = [answer for row in work.prompts for answer in work.answers(spec, row)]
        if not answers:
            raise RunFailed(f"model {spec.name!r} has given no answer that can be used")
        found.append(totals.total(spec, answers, list(work.replies[spec.name].values())))
    place.write_rows(folder.ROWS, work.rows())
    examples = list(work.prompts)[: totals.SHOWN]
    texts = [[work.prompts[row].messages[-1]["content"],
              *("\n\n".join(one[-1]["content"] for one, _ in work.answers(spec, row)) for spec in work.specs)]
             for row in examples]  # fmt: skip
    totals.tell(place, found, len(work.prompts), texts)
