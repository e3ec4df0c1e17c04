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

Where adapters are trained, vLLM is started on the model below them, with --enable-lora, --max-lora-rank and
VLLM_ALLOW_RUNTIME_LORA_UPDATING=True: the folder then holds the adapter alone, which vLLM is told to load.

The environment variable ALIGN_SERVER_API_KEY, where it is set, is the bearer token of all requests to the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx2
import torch
from tenacity import retry, retry_if_exception, stop_after_attempt, wait_random_exponential

from align_engine.data.encoder import Encoder
from align_engine.errors import BadInput, RunFailed
from align_engine.recipe import RolloutSection
from align_engine.recipe.secrets import check_address, key_header, masked
from align_engine.rollouts.completion import Completion, Sampler, derived_seed, truncated

PASSING = (408, 409, 425, 429, 500, 502, 503, 504)  # a later try may succeed
ATTEMPTS, LONGEST_WAIT = 6, 30.0
PATIENCE = 600.0  # seconds that one request may take
KEY = "ALIGN_SERVER_API_KEY"  # environment variable


def retried(call: Any) -> Any:
    """The same function, plain or async, that tries again where that may help: not where nothing came in time."""

    def passing(error: BaseException) -> bool:
        refused = isinstance(error, httpx2.HTTPStatusError) and error.response.status_code in PASSING
        return refused or (isinstance(error, httpx2.TransportError) and not isinstance(error, httpx2.TimeoutException))

    wait = wait_random_exponential(multiplier=0.2, max=LONGEST_WAIT)
    return retry(retry=retry_if_exception(passing), stop=stop_after_attempt(ATTEMPTS), wait=wait, reraise=True)(call)


async def post_all(
    url: str, payloads: Sequence[Any], key: str, patience: float, concurrency: int = 16, reads: bool = True
) -> list[Any]:
    """POST each payload as JSON, `concurrency` of them at a time, each tried again where that may help.

    Args:
        key: variable of the environment that may hold a bearer token.
        patience: seconds that one request may take from its first byte to its answer's last.
        reads: False: the answer is of no interest, None stands for it.
    Returns:
        the JSON answers, in the payloads' order.
    Raises:
        RunFailed: the server refuses a request, six tries fail, or no answer comes in time, naming the address (its
            secrets masked) and what it said.
    """
    limits, timeout = httpx2.Limits(max_connections=concurrency), httpx2.Timeout(patience, pool=None)
    async with httpx2.AsyncClient(limits=limits, timeout=timeout, headers=key_header(key)) as client:
        free = asyncio.Semaphore(concurrency)

        @retried
        async def post(payload: Any) -> Any:
            async with free:
                answer = (await asyncio.wait_for(client.post(url, json=payload), patience)).raise_for_status()
            return answer.json() if reads and answer.content else None

        try:
            return await asyncio.gather(*map(post, payloads))
        except httpx2.HTTPStatusError as error:
            raise RunFailed(f"{masked(url)}: {error.response.status_code} {error.response.text[:200]}") from error
        except (httpx2.TimeoutException, TimeoutError) as error:
            raise RunFailed(f"{masked(url)}: no answer within {patience:g} seconds") from error
        except (httpx2.TransportError, ValueError, TypeError) as error:
            raise RunFailed(f"{masked(url)}: {type(error).__name__} {masked(str(error))}") from error


def below(base: str, path: str) -> str:
    """The address of `path` on a server; the query of its own address (a key, say) stays behind it."""
    parts = urlsplit(base)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{path}"))


@dataclass(frozen=True)
class Exchange:
    """Tokens as a server takes them, and its answers as tokens."""

    tokenizer: Any
    encoder: Encoder
    settings: RolloutSection
    url: str  # for messages
    kind: str
    vocab_size: int | None

    def as_text(self, prompt: list[int]) -> str:
        text = self.tokenizer.decode(prompt[len(self.encoder.bos) :], clean_up_tokenization_spaces=False)
        if (found := self.tokenizer(text)["input_ids"]) != prompt:
            raise RunFailed(f"{self.url} takes text, but {text!r:.200} is {found!s:.200} to it, not {prompt!s:.200}")
        return text

    def from_text(self, text: str, ended: bool) -> tuple[list[int], bool]:
        """(ids, whether the completion has ended) of a text that the server cut or ended."""
        most, stops = self.settings.max_completion_length, self.settings.stop_strings or []
        ids = self.encoder.continuation(text)

        def stopped(i: int) -> bool:
            return any(stop in self.tokenizer.decode(ids[: i + 1]) for stop in stops)

        last = bisect_left(range(len(ids)), True, key=stopped)
        if last < len(ids):  # the token that completes a stop string
            ids, ended = ids[: last + 1], True
        elif ended:
            ids = self.encoder.end(ids)
        return ids[:most], ended and len(ids) <= most

    def read(self, answer: Any) -> Completion:
        try:
            choice = answer["choices"][0]
            ended = choice["finish_reason"] != "length"
            if self.kind == "vllm":
                ids, logps = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            else:
                ids, ended = self.from_text(choice["text"], ended)
                logps = [math.nan] * len(ids)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise RunFailed(f"{self.url} answered {answer!r:.200}, not an OpenAI completion") from error
        self.check(ids, logps)
        if truncated(self.settings):  # the server's are those of the tokens that it kept, ours of all of them
            logps = [math.nan] * len(ids)
        return Completion(ids, torch.tensor(logps, dtype=torch.float32), ended)

    def check(self, ids: Any, logps: Any) -> None:
        """Raise RunFailed where these are no token ids of the policy with their log-probs."""
        if not isinstance(ids, list) or not isinstance(logps, list) or len(logps) != len(ids):
            raise RunFailed(f"{self.url} gave {ids!r:.60} as token ids and {logps!r:.60} as their log-probs")
        for one in ids:
            if type(one) is not int or one < 0 or one >= (self.vocab_size or math.inf):
                limit = f"the policy's vocabulary of {self.vocab_size}" if self.vocab_size else "every vocabulary"
                raise RunFailed(f"{self.url} gave the token id {one!r:.60}, outside {limit}: it serves another model")
        for one in logps if self.kind == "vllm" else ():
            if type(one) not in (int, float) or not -math.inf < one <= 1e-3:
                raise RunFailed(f"{self.url} gave the log-prob {one!r:.60}")


def server_sampler(
    tokenizer: Any, settings: RolloutSection, model: str, kind: str, vocab_size: int | None = None,
    adapter: Adapter | None = None,
) -> Sampler:  # fmt: skip
    """A sampler that asks the server at `server_base_url`.

    Args:
        tokenizer: the policy's, which must be the server's.
        settings: besides the sampling's own, server_base_url, server_model, server_concurrency.
        model: its name there, unless server_model says, or `transformers serve` is to load server_weights.
        kind: of the server, as kind_of_server says.
        vocab_size: of the policy; a server's ids must lie below it (None: anywhere from 0).
        adapter: that answers in the model's place, by the name that it has there at the time.
    Raises:
        BadInput: the settings ask for what OpenAI's API has not, and the server is no other. RunFailed: by the sampler:
            the server refuses, or fails again and again; it answers with what is no completion; no text gives a
            prompt's tokens.
    """
    address = settings.server_base_url or ""
    for name in ("top_k", "stop_strings", "server_weights"):
        if kind == "openai" and (value := getattr(settings, name)):
            base = masked(address)
            raise BadInput(f"{name} = {value!r} needs vLLM or `transformers serve`, and {base} is neither")
    url, shared = below(address, "v1/completions"), _shared(settings, model, kind)
    exchange = Exchange(tokenizer, Encoder(tokenizer), settings, masked(url), kind, vocab_size)

    def sample(prompts: Sequence[list[int]], seed: int) -> list[Completion]:
        sent = prompts if kind == "vllm" else map(exchange.as_text, prompts)
        named = {} if adapter is None else {"model": adapter.name}
        payloads = [
            {**shared, **named, "prompt": one, "seed": derived_seed(seed, i) % 2**31} for i, one in enumerate(sent)
        ]
        asked = post_all(url, payloads, KEY, PATIENCE, settings.server_concurrency)
        return list(map(exchange.read, asyncio.run(asked)))

    return sample


def _shared(settings: RolloutSection, model: str, kind: str) -> dict[str, Any]:
    """What all requests of a run say."""
    shared: dict[str, Any] = {"model": settings.server_model or model, "max_tokens": settings.max_completion_length,
                              "temperature": settings.temperature, "top_p": settings.top_p}  # fmt: skip
    shared |= {"stop": settings.stop_strings} if settings.stop_strings else {}
    if kind == "vllm":
        shared |= {"logprobs": 0, "return_token_ids": True, "include_stop_str_in_output": True, "top_k": settings.top_k}
    else:
        shared["max_tokens"] += 1  # transformers says "length" of what ends with its last token; this one is cut off
    if kind == "transformers":
        own = {"do_sample": True, "top_k": settings.top_k, "repetition_penalty": 1.0}
        shared["generation_config"] = json.dumps(own)
        shared["model"] = settings.server_model or settings.server_weights or model
    return shared


def check_correction(settings: RolloutSection, kind: str) -> None:
    """Refuse vllm_importance_sampling_correction where the sampler's log-probs cannot be had: from a server that gives
    none, and from vLLM where top_p or top_k leave tokens out. It normalises over the tokens that it kept
    (processed_logprobs), or knows no temperature (raw_logprobs); a ratio to the policy's own log-probs, which are over
    all tokens, would be the share that was kept.

    Raises:
        BadInput: with what to do.
    """
    corrects, url = "vllm_importance_sampling_correction = True", masked(settings.server_base_url)
    if kind != "vllm":
        why = f"needs vLLM's log-probs, and {url}/v1/models does not say that vLLM owns the model"
        raise BadInput(f"{corrects} {why}: set it to false, or give the address of vLLM itself")
    if truncated(settings):
        given = f"top_p = {settings.top_p}, top_k = {settings.top_k}"
        why = "vLLM's log-probs are then those of the tokens that it kept, the policy's those of all tokens"
        raise BadInput(f"{corrects} with {given}: {why}. Set top_p to 1 and top_k to 0, or the correction to false")


def kind_of_server(url: str) -> str:
    """vllm, transformers or openai (any other), as the server at an address shows itself.

    Raises:
        BadInput: no address, or nothing answers there.
    """
    check_address(url, "server_base_url", KEY)

    @retried
    def get(path: str) -> str:
        return httpx2.get(below(url, path), timeout=30, headers=key_header(KEY)).raise_for_status().text

    try:
        with contextlib.suppress(httpx2.HTTPStatusError):  # not every server describes itself
            if '"/load_model"' in get("openapi.json"):
                return "transformers"  # its /v1/models lists what is in the hub's cache, and fails where there is none
        return "vllm" if '"owned_by":"vllm"' in get("v1/models").replace(" ", "") else "openai"
    except httpx2.HTTPStatusError as error:
        said, code = error.response.text[:200], error.response.status_code
        key = f" (a key can be given as the environment variable {KEY})" if code in (401, 403) else ""
        raise BadInput(f"server_base_url = {masked(url)!r}: {code} {said}{key}") from error
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        why = masked(str(error)) or type(error).__name__
        raise BadInput(f"server_base_url = {masked(url)!r}: no server answers there: {why}") from error


def reload_weights(settings: RolloutSection, kind: str) -> None:
    """Have the server read its weights again, and forget what it cached under the old ones."""
    vllm = {"collective_rpc": {"method": "reload_weights"}, "reset_prefix_cache": {}}
    for path, payload in (vllm if kind == "vllm" else {"reset": {}}).items():
        asyncio.run(post_all(below(settings.server_base_url or "", path), [payload], KEY, PATIENCE))


class Adapter:
    """The policy's LoRA on a vLLM server, where its name is made of its weights: no server takes what it has cached
    under other weights for these, and a run that is begun again finds its own."""

    def __init__(self, settings: RolloutSection) -> None:
        self.base, self.name = settings.server_base_url or "", ""

    def load(self, folder: Path) -> None:
        """Have the server load the adapter in a folder that it sees, in place of the one before.

        Raises:
            RunFailed: with what the server says, and how it must have been started.
        """
        found = hashlib.sha256()
        for path in sorted(folder.glob("adapter_*")):
            found.update(path.read_bytes())
        name, there = f"align-{found.hexdigest()[:16]}", self.loaded()
        for old in {self.name, name} & there:
            self.post("unload_lora_adapter", lora_name=old)
        self.post("load_lora_adapter", lora_name=name, lora_path=str(folder))
        self.name = name

    def loaded(self) -> set[str]:
        """Names of what the server has loaded."""
        url = below(self.base, "v1/models")

        @retried
        def get() -> Any:
            return httpx2.get(url, timeout=30, headers=key_header(KEY)).raise_for_status().json()

        try:
            return {one["id"] for one in get()["data"]}
        except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
            raise RunFailed(f"{masked(url)}: {type(error).__name__} {masked(str(error))}") from error

    def post(self, what: str, **payload: str) -> None:
        try:
            asyncio.run(post_all(below(self.base, f"v1/{what}"), [payload], KEY, PATIENCE, reads=False))
        except RunFailed as error:
            how = "--enable-lora, a --max-lora-rank of lora_r at least, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            raise RunFailed(f"{error}: vLLM must run with {how}, and see the folder server_weights") from error
