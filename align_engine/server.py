"""Requests to scorers and generation servers, and completions from one that is OpenAI-compatible.

vLLM takes the prompts' tokens and gives the policy's own, with their log-probs. It must be started with
`--logprobs-mode processed_logprobs` where the temperature is not 1. Any other server takes text: prompts are sent that
its tokenizer turns into exactly their tokens, answers are tokenised again, and the sampler's log-probs are unknown.

`transformers serve` decodes greedily, or with top_k = 50, unless a field of its own says otherwise. It seeds its whole
process: answers can be repeated with server_concurrency = 1 only.

vLLM and `transformers serve` take over the policy's weights from a folder (`server_weights`) that both see: they are
started on a copy of the model there, vLLM with VLLM_SERVER_DEV_MODE=1, `transformers serve` without
`--continuous-batching`, which would go on with its first weights. Before each rollout the policy is written to the
folder and the server told to read it again. `transformers serve` may also be started without a model: it loads what
the requests name, which is that folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import httpx2
import torch
from tenacity import retry, retry_if_exception, stop_after_attempt, wait_random_exponential

from align_engine.data.encoder import Encoder
from align_engine.errors import BadInput, RunFailed
from align_engine.recipe import RolloutSection
from align_engine.rollout import Completion, Sampler, derived_seed

PASSING = (408, 409, 425, 429, 500, 502, 503, 504)  # a later try may succeed
ATTEMPTS, LONGEST_WAIT, TIMEOUT = 6, 30.0, 600.0


def retried(call: Any) -> Any:
    """The same function, plain or async, that tries again where that may help."""

    def passing(error: BaseException) -> bool:
        refused = isinstance(error, httpx2.HTTPStatusError) and error.response.status_code in PASSING
        return refused or isinstance(error, httpx2.TransportError)

    wait = wait_random_exponential(multiplier=0.2, max=LONGEST_WAIT)
    return retry(retry=retry_if_exception(passing), stop=stop_after_attempt(ATTEMPTS), wait=wait, reraise=True)(call)


async def post_all(url: str, payloads: Sequence[Any], concurrency: int = 16) -> list[Any]:
    """POST each payload as JSON, `concurrency` of them at a time, each tried again where that may help.

    Returns:
        the JSON answers, in the payloads' order.
    Raises:
        RunFailed: the server refuses a request, or six tries fail, naming the address and what it said.
    """
    limits, timeout = httpx2.Limits(max_connections=concurrency), httpx2.Timeout(TIMEOUT, pool=None)
    async with httpx2.AsyncClient(limits=limits, timeout=timeout) as client:

        @retried
        async def post(payload: Any) -> Any:
            answer = (await client.post(url, json=payload)).raise_for_status()
            return answer.json() if answer.content else None

        try:
            return await asyncio.gather(*map(post, payloads))
        except httpx2.HTTPStatusError as error:
            raise RunFailed(f"{url}: {error.response.status_code} {error.response.text[:200]}") from error
        except (httpx2.TransportError, ValueError) as error:
            raise RunFailed(f"{url}: {type(error).__name__} {error}") from error


def server_sampler(tokenizer: Any, settings: RolloutSection, model: str, kind: str) -> Sampler:
    """A sampler that asks the server at `server_base_url`.

    Args:
        tokenizer: the policy's, which must be the server's.
        settings: besides the sampling's own, server_base_url, server_model, server_concurrency.
        model: its name there, unless server_model says, or `transformers serve` is to load server_weights.
        kind: of the server, as kind_of_server says.
    Raises:
        BadInput: the settings ask for what OpenAI's API has not, and the server is no other. RunFailed: by the sampler:
            the server refuses, or fails again and again; no text gives a prompt's tokens.
    """
    base, most, stops = settings.server_base_url, settings.max_completion_length, settings.stop_strings or []
    for name in ("top_k", "stop_strings", "server_weights"):
        if kind == "openai" and (value := getattr(settings, name)):
            raise BadInput(f"{name} = {value!r} needs vLLM or `transformers serve`, and {base} is neither")
    url, encoder = f"{base}/v1/completions", Encoder(tokenizer)
    shared: dict[str, Any] = {"model": settings.server_model or model, "max_tokens": most,
                              "temperature": settings.temperature, "top_p": settings.top_p}  # fmt: skip
    shared |= {"stop": stops} if stops else {}
    if kind == "vllm":
        shared |= {"logprobs": 0, "return_token_ids": True, "include_stop_str_in_output": True, "top_k": settings.top_k}
    else:
        shared["max_tokens"] += 1  # transformers says "length" of what ends with its last token; this one is cut off
    if kind == "transformers":
        own = {"do_sample": True, "top_k": settings.top_k, "repetition_penalty": 1.0}
        shared["generation_config"] = json.dumps(own)
        shared["model"] = settings.server_model or settings.server_weights or model

    def as_text(prompt: list[int]) -> str:
        text = tokenizer.decode(prompt[len(encoder.bos) :], clean_up_tokenization_spaces=False)
        if (found := tokenizer(text)["input_ids"]) != prompt:
            raise RunFailed(f"{url} takes text, but {text!r:.200} is {found!s:.200} to it, not {prompt!s:.200}")
        return text

    def from_text(text: str, ended: bool) -> tuple[list[int], bool]:
        ids, stopped = encoder.continuation(text), lambda text: any(stop in text for stop in stops)
        last = bisect_left(range(len(ids)), True, key=lambda i: stopped(tokenizer.decode(ids[: i + 1])))
        if last < len(ids):  # the token that completes a stop string
            ids, ended = ids[: last + 1], True
        elif ended:
            ids = encoder.end(ids)
        return ids[:most], ended and len(ids) <= most

    def read(answer: Any) -> Completion:
        try:
            choice = answer["choices"][0]
            ended = choice["finish_reason"] != "length"
            if kind == "vllm":
                ids, logps = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            else:
                ids, ended = from_text(choice["text"], ended)
                logps = [math.nan] * len(ids)
        except (KeyError, IndexError, TypeError) as error:
            raise RunFailed(f"{url} answered {answer!r:.200}, not an OpenAI completion") from error
        if len(logps) != len(ids):
            raise RunFailed(f"{url} gave {len(logps)} log-probs for {len(ids)} tokens")
        return Completion(ids, torch.tensor(logps, dtype=torch.float32), ended)

    def sample(prompts: Sequence[list[int]], seed: int) -> list[Completion]:
        sent = prompts if kind == "vllm" else map(as_text, prompts)
        payloads = [{**shared, "prompt": one, "seed": derived_seed(seed, i) % 2**31} for i, one in enumerate(sent)]
        return list(map(read, asyncio.run(post_all(url, payloads, settings.server_concurrency))))

    return sample


def kind_of_server(url: str) -> str:
    """vllm, transformers or openai (any other), as the server at an address shows itself.

    Raises:
        BadInput: nothing answers there.
    """

    @retried
    def get(path: str) -> str:
        return httpx2.get(f"{url}/{path}", timeout=30).raise_for_status().text

    try:
        with contextlib.suppress(httpx2.HTTPStatusError):  # not every server describes itself
            if '"/load_model"' in get("openapi.json"):
                return "transformers"  # its /v1/models lists what is in the hub's cache, and fails where there is none
        return "vllm" if '"owned_by":"vllm"' in get("v1/models").replace(" ", "") else "openai"
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise BadInput(f"server_base_url = {url!r}: no server answers there: {error}") from error


def reload_weights(settings: RolloutSection, kind: str) -> None:
    """Have the server read its weights again, and forget what it cached under the old ones."""
    vllm = {"collective_rpc": {"method": "reload_weights"}, "reset_prefix_cache": {}}
    for path, payload in (vllm if kind == "vllm" else {"reset": {}}).items():
        asyncio.run(post_all(f"{settings.server_base_url}/{path}", [payload]))
