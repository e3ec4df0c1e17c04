"""A model at an OpenAI-compatible endpoint as lm-evaluation-harness reads models.

What it generates comes from chat completions, each context as one message of the user, cut at the task's stop strings
here. What tasks of multiple choice ask for, the log-probability of given words, comes from `/completions` that echo
their prompt with log-probs, as vLLM serves them; chat endpoints do not have it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from dataclasses import replace
from typing import Any

from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from openai import APIConnectionError, APIStatusError

from align_engine.errors import RunFailed
from align_engine.preparation import folder
from align_engine.preparation.endpoints import Endpoint, ask_all
from align_engine.preparation.models import ModelSpec, Question, Reply
from align_engine.reports.benchmarks import Unable

LONGEST = 256  # tokens of an answer, where a task says nothing: lm-eval's own


class Served(LM):
    """A model at an endpoint.

    Args:
        spec: of the model; the tasks say how it samples.
        endpoint: its endpoint.
        seed: of its answers.
        journal: of the folder; what it holds of this model is taken as it stands.
    Raises, by its methods:
        RunFailed: the endpoint refuses, or fails again and again. Unable: it has no log-probs of given words.
    """

    def __init__(self, spec: ModelSpec, endpoint: Endpoint, seed: int, journal: folder.Journal) -> None:
        super().__init__()
        self.spec, self.endpoint, self.seed, self.journal = spec, endpoint, seed, journal
        self.replies: dict[str, Any] = {line["request"]: line["reply"] for line in journal.rows}

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The answer to each request's context; to one that is asked several times, so many answers."""
        asked, times = [], Counter[str]()
        for one in requests:
            context, settings = one.args[0], normalize_gen_kwargs(one.args[1], LONGEST)
            times.update([key := self._key("chat", context, settings)])
            asked.append((f"{key} {times[key]}", context, settings))
        questions = [
            self._question(number, context, settings)
            for number, (key, context, settings) in enumerate(asked)
            if key not in self.replies
        ]

        def take(question: Question, reply: Reply) -> None:
            if reply.refused:
                raise RunFailed(f"model {self.spec.name!r}: {reply.refused}")
            self._keep(asked[question.row][0], reply.answers[0][0])

        asyncio.run(ask_all([(self.endpoint, questions)], take))
        return [_cut(self.replies[key], settings["until"]) for key, _, settings in asked]

    def _question(self, number: int, context: str, settings: Any) -> Question:
        sampled = {"n": 1, "temperature": settings["temperature"], "top_p": float(settings.get("top_p") or 1.0),
                   "max_tokens": settings["max_gen_toks"]}  # fmt: skip
        return Question(
            replace(self.spec, **sampled), number, [{"role": "user", "content": context}], self.seed + number
        )

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether each of its tokens is the likeliest) of each request."""
        return asyncio.run(self._read_all([one.args for one in requests]))

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """The log-probability of whole texts."""
        return [found for found, _ in asyncio.run(self._read_all([("", one.args[0]) for one in requests]))]

    async def _read_all(self, asked: list[tuple[str, str]]) -> list[tuple[float, bool]]:
        free = asyncio.Semaphore(self.endpoint.concurrency)
        async with self.endpoint.client() as client:

            async def one(context: str, continuation: str) -> tuple[float, bool]:
                key = self._key("read", context, continuation)
                if key not in self.replies:
                    async with free:
                        self._keep(key, await self._read(client, context, continuation))
                logp, greedy = self.replies[key]
                return logp, greedy

            return await asyncio.gather(*(one(*pair) for pair in asked))

    async def _read(self, client: Any, context: str, continuation: str) -> tuple[float, bool]:
        try:
            found = await client.with_options(max_retries=4).completions.create(
                model=self.spec.model or self.spec.name, prompt=context + continuation, max_tokens=1, temperature=0,
                logprobs=1, echo=True,
            )  # fmt: skip
            held = found.choices[0].logprobs
            return _of_continuation(held, len(context), len(context + continuation))
        except APIConnectionError as error:
            where = f"model {self.spec.name!r} at {self.endpoint.shown}"
            raise RunFailed(f"{where}: {self.endpoint.said(error)}; {folder.STANDING}") from error
        except APIStatusError as error:
            said = self.endpoint.said(error)
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            said = str(error) or type(error).__name__
        why = "multiple choice needs an endpoint whose /completions echo log-probs of the prompt, as vLLM's do"
        raise Unable(f"{why} (model {self.spec.name!r} at {self.endpoint.shown}: {said:.200})")

    def _key(self, *request: Any) -> str:
        text = json.dumps([self.spec.key(self.seed), *request], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def _keep(self, key: str, reply: Any) -> None:
        self.journal.add([{"request": key, "reply": reply}])
        self.replies[key] = reply


def _of_continuation(held: Any, start: int, end: int) -> tuple[float, bool]:
    """Of the tokens that begin from character `start` up to `end`. A token across the border counts as the context's,
    unless it holds the whole continuation."""
    places = [i for i, offset in enumerate(held.text_offset) if start <= offset < end]
    if not places:
        raise ValueError("no token begins inside the continuation")
    logps = [held.token_logprobs[i] for i in places]
    if any(logp is None for logp in logps):  # of a text's first token
        logps, places = logps[1:], places[1:]
    best = [max(held.top_logprobs[i].values()) for i in places]
    return float(sum(logps)), all(logp >= top for logp, top in zip(logps, best))


def _cut(text: str, until: list[str]) -> str:
    """An answer up to the first of the task's stop strings."""
    for stop in until:
        text = text.split(stop)[0] if stop else text
    return text
