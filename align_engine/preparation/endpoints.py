"""Answers of OpenAI-compatible endpoints: many requests at a time and no more than allowed, each tried again where that
may help. What has been answered is handed on at once, so that a failure loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

from openai import APIConnectionError, APIStatusError, APITimeoutError, AsyncOpenAI, Omit
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_random_exponential

from align_engine.errors import RunFailed
from align_engine.preparation.models import ModelSpec, Question, Reply, key_of
from align_engine.recipe.secrets import MASK, masked

PASSING = (408, 409, 425, 429)  # and from 500 on: a later try may succeed
ATTEMPTS, LONGEST_WAIT = 8, 60.0
OF_THE_ROW = (400, 413, 422)  # what a server says of a prompt that it cannot take
OPENAI = "api.openai.com"


class Malformed(Exception):
    """An answer that is no chat completion."""


class GivenUp(Exception):
    """Another request has failed for good."""


class Endpoint:
    """One address with its key.

    Args:
        spec: a model there.
        concurrency: requests at a time.
        timeout: seconds that one may take from its first byte to its answer's last.
    Raises:
        BadInput: its key is missing.
    """

    def __init__(self, spec: ModelSpec, concurrency: int, timeout: float) -> None:
        self.key, self.shown, self.timeout = key_of(spec), masked(spec.base_url), timeout
        self.concurrency, self.tries_again = concurrency, 0
        self.host = urlsplit(spec.base_url or "").hostname
        self.address = spec.base_url

    def client(self) -> AsyncOpenAI:
        """A client of this endpoint alone: it is not told what the environment says of OpenAI's own."""
        headers: Any = {"OpenAI-Organization": Omit(), "OpenAI-Project": Omit()}
        return AsyncOpenAI(api_key=self.key or "none", base_url=self.address, timeout=self.timeout, max_retries=0,
                           default_headers=headers)  # fmt: skip

    def said(self, error: Exception) -> str:
        """An error in one sentence, without keys."""
        if isinstance(error, APIStatusError):
            text = f"{error.status_code} {error.response.text[:300]}"
        elif isinstance(error, TimeoutError | APITimeoutError):
            text = f"no answer within {self.timeout:g} seconds"
        elif isinstance(error, APIConnectionError):
            text = f"{type(error.__cause__ or error).__name__} {error.__cause__ or error}"
        else:
            text = str(error)
        text = " ".join(text.split())
        return masked(text.replace(self.key, MASK) if self.key else text)


async def ask_all(
    questions: Iterable[tuple[Endpoint, Iterable[Question]]], answered: Callable[[Question, Reply], None]
) -> None:
    """Ask every endpoint its questions, all endpoints at the same time.

    Args:
        answered: called with each reply, one at a time, in the order in which they come.
    Raises:
        RunFailed: an endpoint refuses, or fails again and again. No further question is asked then, and those that are
            under way are waited for.
    """
    failure, over = list[Exception](), asyncio.Event()

    async def work(endpoint: Endpoint, client: AsyncOpenAI, waiting: Iterator[Question]) -> None:
        for question in waiting:
            if over.is_set():
                return
            try:
                answered(question, await _ask(endpoint, client, question, over))
            except GivenUp:
                return
            except Exception as error:
                failure.append(error)
                over.set()
                return

    async with contextlib.AsyncExitStack() as stack:
        workers = []
        for endpoint, asked in questions:
            client, waiting = await stack.enter_async_context(endpoint.client()), iter(asked)
            workers += [work(endpoint, client, waiting) for _ in range(endpoint.concurrency)]
        await asyncio.gather(*workers)
    if failure:
        raise failure[0]


async def _ask(endpoint: Endpoint, client: AsyncOpenAI, question: Question, over: asyncio.Event) -> Reply:
    """The reply to one question, which is asked again where that may help."""
    pauses = wait_random_exponential(multiplier=0.5, max=LONGEST_WAIT)

    def pause(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        wish = error.response.headers.get("retry-after", "") if isinstance(error, APIStatusError) else ""
        return max(pauses(state), min(float(wish), endpoint.timeout) if wish.isdecimal() else 0.0)

    async def wait(seconds: float) -> None:
        endpoint.tries_again += 1
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), seconds)
            raise GivenUp

    tries = AsyncRetrying(retry=retry_if_exception(_passing), stop=stop_after_attempt(ATTEMPTS), wait=pause,
                          sleep=wait, reraise=True)  # fmt: skip
    spec = question.spec
    try:
        return await tries(_request, endpoint, client, question)
    except APIStatusError as error:
        if error.status_code in OF_THE_ROW:
            return Reply(question.seed, refused=endpoint.said(error))
        raise RunFailed(f"model {spec.name!r} at {endpoint.shown}: {endpoint.said(error)}") from error
    except (APIConnectionError, TimeoutError, Malformed) as error:
        why = f"{ATTEMPTS} tries have failed, the last with: {endpoint.said(error)}"
        raise RunFailed(f"model {spec.name!r} at {endpoint.shown}: {why}") from error


def _passing(error: BaseException) -> bool:
    if isinstance(error, APIStatusError):
        return error.status_code in PASSING or error.status_code >= 500
    return isinstance(error, APIConnectionError | TimeoutError | Malformed)


async def _request(endpoint: Endpoint, client: AsyncOpenAI, question: Question) -> Reply:
    spec = question.spec
    most = "max_completion_tokens" if endpoint.host == OPENAI else "max_tokens"
    body: dict[str, Any] = {"model": spec.model or spec.name, "messages": question.messages, most: spec.max_tokens,
                            "temperature": spec.temperature, "seed": question.seed}  # fmt: skip
    body |= {"top_p": spec.top_p} if spec.top_p != 1 else {}
    body |= {"n": spec.n} if spec.n != 1 else {}
    raw = await asyncio.wait_for(client.chat.completions.with_raw_response.create(**body), endpoint.timeout)
    try:
        content: Any = raw.http_response.json()
        answers = [(one["message"]["content"], one.get("finish_reason") or "") for one in content["choices"]]
        if not all(isinstance(part, str) for answer in answers for part in answer if part is not None):
            raise TypeError
        usage = content.get("usage") or {}
        tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Malformed(f"it answered {raw.http_response.text!r:.200}, which is no chat completion") from error
    if len(answers) != spec.n:
        why = f"it gave {len(answers)} answers where n = {spec.n} were asked for"
        way = "; give such an endpoint n: 1, and the model several times under other names" if spec.n > 1 else ""
        raise RunFailed(f"model {spec.name!r} at {endpoint.shown}: {why}{way}")
    return Reply(question.seed, [(text or "", ended) for text, ended in answers], tokens)
