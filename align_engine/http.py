"""Requests to scorers and generation servers: many at a time, each tried again where that may help."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from align_engine.errors import RunFailed

PASSING = (408, 409, 425, 429, 500, 502, 503, 504)  # a later try may succeed
ATTEMPTS, LONGEST_WAIT = 6, 30.0


def post_all(url: str, payloads: Sequence[Any], *, concurrency: int, timeout: float = 600.0) -> list[Any]:
    """POST each payload as JSON.

    Args:
        url: where to.
        payloads: one request each.
        concurrency: most requests under way at a time.
        timeout: seconds for one try.
    Returns:
        the JSON answers, in the payloads' order.
    Raises:
        RunFailed: the server refuses a request, or six tries fail, naming the address and what it said.
    """
    return asyncio.run(_post_all(url, payloads, concurrency, timeout))


async def _post_all(url: str, payloads: Sequence[Any], concurrency: int, timeout: float) -> list[Any]:
    import httpx2
    from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

    def passing(error: BaseException) -> bool:
        if isinstance(error, httpx2.HTTPStatusError):
            return error.response.status_code in PASSING
        return isinstance(error, httpx2.TransportError)

    again = AsyncRetrying(
        retry=retry_if_exception(passing),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=0.2, max=LONGEST_WAIT),
        reraise=True,
    )
    slots = asyncio.Semaphore(concurrency)

    async with httpx2.AsyncClient(timeout=timeout) as client:

        async def once(payload: Any) -> Any:
            answer = await client.post(url, json=payload)
            answer.raise_for_status()
            return answer.json() if answer.content else None

        async def one(payload: Any) -> Any:
            async with slots:
                return await again.copy()(once, payload)

        try:
            return await asyncio.gather(*map(one, payloads))
        except httpx2.HTTPStatusError as error:
            raise RunFailed(f"{url}: {error.response.status_code} {error.response.text[:200]}") from error
        except (httpx2.TransportError, ValueError) as error:
            raise RunFailed(f"{url}: {type(error).__name__} {error}") from error
