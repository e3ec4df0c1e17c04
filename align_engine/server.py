"""Requests to scorers and generation servers, and completions from one that is OpenAI-compatible: vLLM, `transformers
serve`, or any that takes prompts as token ids.

A server that answers with `token_ids` (vLLM does, asked for `return_token_ids`) gives the policy's own tokens and
their log-probs; of another one the text is tokenised again, and the sampler's log-probs are unknown. vLLM must be
started with `--logprobs-mode processed_logprobs` where the temperature is not 1.

vLLM takes over the policy's weights from a folder (`server_weights`) that both see: it is started on a copy of the
model there with VLLM_SERVER_DEV_MODE=1, and before each rollout the policy is written to the folder and the server told
to read it again.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import torch

from align_engine.data.encoder import Encoder
from align_engine.errors import BadInput, RunFailed
from align_engine.recipe import RolloutSection
from align_engine.rollout import Completion, Sampler, derived_seed

PASSING = (408, 409, 425, 429, 500, 502, 503, 504)  # a later try may succeed
ATTEMPTS, LONGEST_WAIT, TIMEOUT = 6, 30.0, 600.0


async def post_all(url: str, payloads: Sequence[Any], concurrency: int = 16) -> list[Any]:
    """POST each payload as JSON, `concurrency` of them at a time, each tried again where that may help.

    Returns:
        the JSON answers, in the payloads' order.
    Raises:
        RunFailed: the server refuses a request, or six tries fail, naming the address and what it said.
    """
    import httpx2
    from tenacity import retry, retry_if_exception, stop_after_attempt, wait_random_exponential

    def passing(error: BaseException) -> bool:
        if isinstance(error, httpx2.HTTPStatusError):
            return error.response.status_code in PASSING
        return isinstance(error, httpx2.TransportError)

    wait = wait_random_exponential(multiplier=0.2, max=LONGEST_WAIT)
    limits, timeout = httpx2.Limits(max_connections=concurrency), httpx2.Timeout(TIMEOUT, pool=None)
    async with httpx2.AsyncClient(limits=limits, timeout=timeout) as client:

        @retry(retry=retry_if_exception(passing), stop=stop_after_attempt(ATTEMPTS), wait=wait, reraise=True)
        async def post(payload: Any) -> Any:
            answer = await client.post(url, json=payload)
            answer.raise_for_status()
            return answer.json() if answer.content else None

        try:
            return await asyncio.gather(*map(post, payloads))
        except httpx2.HTTPStatusError as error:
            raise RunFailed(f"{url}: {error.response.status_code} {error.response.text[:200]}") from error
        except (httpx2.TransportError, ValueError) as error:
            raise RunFailed(f"{url}: {type(error).__name__} {error}") from error


def server_sampler(tokenizer: Any, settings: RolloutSection, model: str) -> Sampler:
    """A sampler that asks the server at `server_base_url`.

    Args:
        tokenizer: the policy's, which must be the server's.
        settings: besides the sampling's own, server_base_url, server_model, server_concurrency.
        model: its name there, unless server_model says.
    Raises:
        RunFailed: by the sampler: the server refuses, or fails again and again.
    """
    url, encoder = f"{settings.server_base_url}/v1/completions", Encoder(tokenizer)
    shared: dict[str, Any] = {"model": settings.server_model or model, "max_tokens": settings.max_completion_length,
                              "temperature": settings.temperature, "top_p": settings.top_p, "logprobs": 0,
                              "return_token_ids": True}  # fmt: skip
    if settings.top_k:
        shared["top_k"] = settings.top_k
    if settings.stop_strings:
        shared |= {"stop": settings.stop_strings, "include_stop_str_in_output": True}

    def read(answer: Any) -> Completion:
        try:
            choice = answer["choices"][0]
            ended, ids = choice["finish_reason"] != "length", choice.get("token_ids")
            if ids is None:
                ids = encoder.continuation(choice["text"])
                if ended and not any(choice["text"].endswith(stop) for stop in settings.stop_strings or ()):
                    ids = encoder.end(ids)
                return Completion(ids, torch.full((len(ids),), math.nan), ended)
            logps = torch.tensor(choice["logprobs"]["token_logprobs"], dtype=torch.float32)
        except (KeyError, IndexError, TypeError) as error:
            raise RunFailed(f"{url} answered {answer!r:.200}, not an OpenAI completion") from error
        if len(logps) != len(ids):
            raise RunFailed(f"{url} gave {len(logps)} log-probs for {len(ids)} tokens")
        return Completion(ids, logps, ended)

    def sample(prompts: Sequence[list[int]], seed: int) -> list[Completion]:
        payloads = [
            {**shared, "prompt": prompt, "seed": derived_seed(seed, i) % 2**31} for i, prompt in enumerate(prompts)
        ]
        return list(map(read, asyncio.run(post_all(url, payloads, settings.server_concurrency))))

    return sample


def check_server(settings: RolloutSection) -> None:
    """Refuse an address where nothing answers, where the recipe names one."""
    import httpx2

    if not settings.server_base_url:
        return
    try:
        httpx2.get(f"{settings.server_base_url}/v1/models", timeout=30).raise_for_status()
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise BadInput(f"server_base_url = {settings.server_base_url!r}: no server answers there: {error}") from error


def reload_weights(settings: RolloutSection) -> None:
    """Have vLLM read its weights again, and forget what it cached under the old ones."""
    for path, payload in (("collective_rpc", {"method": "reload_weights"}), ("reset_prefix_cache", {})):
        asyncio.run(post_all(f"{settings.server_base_url}/{path}", [payload]))
