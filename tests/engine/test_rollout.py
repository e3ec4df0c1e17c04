"""Completions: token for token what was sampled, by generate or by a server; and what scores them."""

import contextlib
import dataclasses
import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import tiny
import torch
from accelerate import Accelerator
from peft import PeftModel
from processes import run_on_two
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    StopStringCriteria,
)
from transformers.generation.continuous_batching import ContinuousBatchingManager

from align_engine.cli import main
from align_engine.demo.make import make_model, make_tokenizer
from align_engine.errors import BadInput, RunFailed
from align_engine.recipe import GrpoRecipe, RlooRecipe, RolloutSection
from align_engine.rollouts import decode, rewards, source
from align_engine.rollouts.generate import Watch, sample_all, transformers_sampler
from align_engine.rollouts.server import kind_of_server, server_sampler
from align_engine.run import train
from align_engine.training import metrics

EOS = 1  # and the pad token


@pytest.fixture(scope="module")
def loaded(model):
    return AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)


@pytest.fixture
def prompts(tmp_path):
    return tiny.write_rows(tmp_path / "prompts.jsonl", tiny.prompt_rows(12))


def ids_of(tokenizer, count, seed=0):
    return [tokenizer(row["prompt"])["input_ids"] for row in tiny.prompt_rows(count, seed)]


def full_logps(model, prompt, completion, temperature):
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].double()
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


@pytest.fixture(params=["decode", "generate"])
def way(request, monkeypatch):
    """Through which loop a sampler goes."""
    if request.param == "generate":
        monkeypatch.setattr(decode, "why_not", lambda *_: "the test asks for it")


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_ends_and_cuts(temperature, way, loaded):
    """Pad is EOS: what follows an end must not count, and the end itself must."""
    model, tokenizer = loaded
    settings = RolloutSection(max_completion_length=30, temperature=temperature)
    prompts = ids_of(tokenizer, 60)
    found = transformers_sampler(model, tokenizer, settings)(prompts, 3)
    assert {one.ended for one in found} == {True, False}
    for prompt, one in zip(prompts, found):
        assert one.ended == (one.ids[-1] == EOS) and EOS not in one.ids[:-1]
        assert len(one.ids) == 30 or one.ended
        want = full_logps(model, prompt, one.ids, temperature)
        torch.testing.assert_close(one.logps.double(), want.detach(), atol=1e-4, rtol=1e-4)
    assert model.training is False and model.generation_config.max_new_tokens is None


def test_stop_strings_end_at_the_token_that_completes_them(way, loaded):
    tokenizer = make_tokenizer(["some words that people use, and some that they do not"] * 3, vocab_size=300)
    model = make_model(tokenizer, hidden=32, layers=1).eval()
    settings = RolloutSection(max_completion_length=40, stop_strings=["e", "ou"], temperature=2.0)
    prompts = [tokenizer(f"{'a' * i} some people")["input_ids"] for i in range(60)]  # a prompt's own do not count
    found = transformers_sampler(model, tokenizer, settings)(prompts, 0)
    ends = {tokenizer.decode(one.ids)[-1:] for one in found if one.ended and one.ids[-1] != tokenizer.eos_token_id}
    assert len(ends) > 1, "more than one stop must have been met"
    for one in found:
        before = tokenizer.decode(one.ids[:-1])
        assert "e" not in before and "ou" not in before
        last = one.ids[-1] == tokenizer.eos_token_id or any(stop in tokenizer.decode(one.ids) for stop in ("e", "ou"))
        assert one.ended == last and (last or len(one.ids) == 40)
    with pytest.raises(BadInput, match="stop_strings"):
        transformers_sampler(*loaded, settings)


def test_a_stop_string_that_the_prompt_begins_does_not_end_the_completion():
    """Prompt "xa", stop "ab": a first token "b" completes it only together with the prompt's last letter."""
    tokenizer = make_tokenizer(["some words"] * 3, vocab_size=270)
    x, a, b = (tokenizer(letter)["input_ids"][-1] for letter in "xab")
    watch = Watch(2, torch.tensor([tokenizer.eos_token_id]), StopStringCriteria(tokenizer, ["ab"]), 1.0)
    logits = torch.zeros(3, len(tokenizer))
    steps = [[[x, a, b], [x, a, a], [x, a, x]], [[x, a, b, a], [x, a, a, b], [x, a, x, a]]]
    done = []
    for ids in steps:
        watch.before(None, logits)
        done.append(watch(torch.tensor(ids), None).tolist())
    assert done == [[False, False, False], [False, True, False]]


def test_completions_masked_as_cut_off_are_not_trained_on(model, prompts, tmp_path, monkeypatch):
    seen, ended, plain = [], {}, source.Rollouts.batch

    def batch(self, rows):
        seen.append(plain(self, rows))
        for i in rows:
            ended[i] = EOS in self.experience[i]["completion_ids"]
        return seen[-1]

    monkeypatch.setattr(source.Rollouts, "batch", batch)
    recipe = tiny.online(GrpoRecipe, model, prompts, tmp_path / "run", max_steps=1, mask_truncated_completions=True,
                         max_completion_length=30, per_device_train_batch_size=24)  # fmt: skip
    train("grpo", recipe)
    learnt = {int(i): bool((row != -100).any()) for one in seen for i, row in zip(one.index, one.targets)}
    assert learnt == ended and set(ended.values()) == {True, False}


def test_sampling_is_a_function_of_weights_prompts_and_seed(way, loaded):
    model, tokenizer = loaded
    sampler = transformers_sampler(model, tokenizer, RolloutSection(max_completion_length=8))
    prompts, accelerator = ids_of(tokenizer, 9), Accelerator(cpu=True)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = [one.ids for one in sample_all(sampler, prompts, 4, (1, 2), accelerator)]
    assert torch.equal(torch.get_rng_state(), state), "training's random numbers must not be touched"
    torch.rand(7)
    assert [one.ids for one in sample_all(sampler, prompts, 4, (1, 2), accelerator)] == first
    assert [one.ids for one in sample_all(sampler, prompts, 4, (1, 3), accelerator)] != first


def paged(model, tokenizer, **settings):
    return transformers_sampler(model, tokenizer, RolloutSection(use_transformers_continuous_batching=True, **settings))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_continuous_batching_gives_the_models_own_log_probs(attention, model):
    model, tokenizer = (kind.from_pretrained(model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    model.set_attn_implementation(attention)
    prompts = [[2 + i % 60 for i in range(length)] for length in (1, 40, 7)] + ids_of(tokenizer, 20)
    cold = dict(temperature=1e-4, max_completion_length=12)  # nothing is left to chance
    want = transformers_sampler(model, tokenizer, RolloutSection(**cold))(prompts, 0)
    config = model.train().generation_config
    assert [one.ids for one in paged(model, tokenizer, **cold)(prompts, 1)] == [one.ids for one in want]
    found = paged(model, tokenizer, temperature=0.8, max_completion_length=20)(prompts, 3)
    assert model.training and model.generation_config is config and model.config._attn_implementation == attention
    assert {one.ended for one in found} == {True, False} and len({len(one.ids) for one in found}) > 4
    for prompt, one in zip(prompts, found):
        assert one.ended == (one.ids[-1] == EOS) and EOS not in one.ids[:-1]
        assert len(one.ids) == 20 or one.ended
        want = full_logps(model, prompt, one.ids, 0.8)
        torch.testing.assert_close(one.logps.double(), want.detach(), atol=1e-5, rtol=1e-5)


def test_continuous_batching_is_a_function_of_weights_prompts_and_seed(loaded):
    """Two prompts fill what one step takes (1024 tokens of prompts), so that the others must wait for them."""
    model, tokenizer = loaded
    sampler, prompts = paged(model, tokenizer, max_completion_length=8), [[2, 3] * 150, *ids_of(tokenizer, 9)] * 4
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = [one.ids for one in sampler(prompts, 1)]
    assert torch.equal(torch.get_rng_state(), state), "training's random numbers must not be touched"
    torch.rand(7)
    assert [one.ids for one in sampler(prompts, 1)] == first
    assert [one.ids for one in sampler(prompts, 2)] != first


def test_continuous_batching_refuses_what_it_cannot_do(model, prompts, tmp_path, monkeypatch):
    whole, tokenizer = (kind.from_pretrained(model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    for settings, message in (
        ({"top_k": 5}, "top_k = 5 must be 0 with use_transformers_continuous_batching"),
        (
            {"top_p": 0.5, "stop_strings": ["w3"]},
            "top_p = 0.5 must be 1.0 with .* stop_strings = .*'w3'.* must be None",
        ),
        ({"server_base_url": "http://127.0.0.1:9"}, "server_base_url = .* must be None"),
        ({"bf16": True}, "LlamaForCausalLM has float32 weights but bf16 keys"),
    ):
        settings |= {"use_transformers_continuous_batching": True}
        with pytest.raises(BadInput, match=message):
            train("grpo", tiny.online(GrpoRecipe, model, prompts, tmp_path / "run", **settings))
    bloom = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(BadInput, match="BloomForCausalLM has attention without pages"):
        paged(bloom, tokenizer)
    gemma = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2)
    capped = Gemma2ForCausalLM(Gemma2Config(num_hidden_layers=1, head_dim=16, **gemma))
    with pytest.raises(BadInput, match=r"Gemma2ForCausalLM has attn_logit_softcapping = 50\.0"):
        paged(capped, tokenizer)
    mixed = Gemma3ForCausalLM(Gemma3TextConfig(num_hidden_layers=6, head_dim=16, **gemma))
    with pytest.raises(BadInput, match="Gemma3ForCausalLM has layers of several kinds of attention"):
        paged(mixed, tokenizer)
    whole.set_attn_implementation("flex_attention")
    with pytest.raises(BadInput, match="LlamaForCausalLM, attn_implementation = 'flex_attention'"):
        paged(whole, tokenizer)([[2, 3]], 0)
    whole.set_attn_implementation("eager")
    monkeypatch.setattr(whole.config, "layer_types", ["linear_attention"] * 2, raising=False)
    with pytest.raises(BadInput, match="Invalid layer type"):
        paged(whole, tokenizer)([[2, 3]], 0)
    assert whole.config._attn_implementation == "eager", "whatever transformers had made of it"
    monkeypatch.undo()

    def fails(self, *_, **__):
        raise ArithmeticError("not today")

    monkeypatch.setattr(type(whole), "forward", fails)
    with pytest.raises(RunFailed, match="use_transformers_continuous_batching: not today"):
        paged(whole, tokenizer)([[2, 3]], 0)
    assert whole.config._attn_implementation == "eager"
    assert not any("_run_generation_loop" in thread.name for thread in threading.enumerate()), "it must have ended"


@pytest.mark.parametrize(("method", "error"), [("_run_generation_loop", RunFailed), ("add_requests", OSError)])
def test_continuous_batching_that_breaks_off_says_so(method, error, model, monkeypatch):
    """The thread ends without a word, or never starts: no waiting without end, and the model is as it was."""
    whole, tokenizer = (kind.from_pretrained(model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    whole.set_attn_implementation("eager")

    def breaks(*_):
        if method == "add_requests":
            raise OSError("not today")

    monkeypatch.setattr(ContinuousBatchingManager, method, breaks)
    with pytest.raises(error, match="batching: its thread has ended" if error is RunFailed else "not today"):
        paged(whole, tokenizer)([[2, 3]], 0)
    assert whole.config._attn_implementation == "eager"


SHARDED = """
import sys, torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer
from align_engine.errors import BadInput
from align_engine.recipe import RolloutSection
from align_engine.rollouts.completion import derived_seed
from align_engine.rollouts.generate import sample_all, transformers_sampler

accelerator = Accelerator(cpu=True)
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))

prompts, paged = [[5 + i, 7] for i in range(9)], dict(use_transformers_continuous_batching=True)

def sample(size=1, **settings):
    sampler = transformers_sampler(model, tokenizer, RolloutSection(max_completion_length=40, **settings))
    return sample_all(sampler, prompts, size, (1, 4), accelerator)

alone = transformers_sampler(model, tokenizer, RolloutSection(max_completion_length=40, **paged))
second = alone(prompts[5:], derived_seed(1, 4, 1))  # by the first rank too
assert [one.ids for one in sample(5, **paged)[5:]] == [one.ids for one in second], "whatever the rank"

want, mesh = sample(), init_device_mesh("cpu", (2,))
for part in (*model.model.layers, model):
    fully_shard(part, mesh=mesh)
found = sample()
assert len({len(one.ids) for one in found}) > 4
assert [one.ids for one in found] == [one.ids for one in want]
assert all(torch.equal(a.logps, b.logps) for a, b in zip(found, want))
try:
    sample(**paged)
    raise AssertionError("shards must be refused")
except BadInput as error:
    assert "is in shards" in str(error)
"""


def test_a_policy_in_shards_samples_the_same(model):
    """Nine batches for two processes, that end at different steps: each must run on until the other has ended."""
    run_on_two(SHARDED, model)


class Server(ThreadingHTTPServer):
    """Answers as vLLM does, from the tiny model; scores are word counts. Every third request fails first, and each
    address that it describes itself at."""

    def __init__(self, model, tokenizer, token_ids=True, refusal=503):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.token_ids, self.now, self.most = threading.Lock(), token_ids, 0, 0
        self.gets, self.posts, self.failed, self.refusal, self.keys = [], [], set(), refusal, set()
        self.model, self.tokenizer, self.url = model, tokenizer, f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.gets.append(self.path)
        code = 503 if self.server.gets.count(self.path) == 1 else 200
        self.reply(code, {"data": [{"id": "policy", "owned_by": "vllm" if self.server.token_ids else "me"}]})

    def reply(self, code, content):
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        with contextlib.suppress(OSError):  # a client that has heard enough
            self.end_headers()
            self.wfile.write(body)

    def do_POST(self):
        here, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with here.lock:
            here.keys.add(self.headers.get("Authorization"))
            here.posts.append((self.path, body))
            here.now += 1
            here.most = max(here.most, here.now)
            key = json.dumps(body)
            fails = len(here.posts) % 3 == 0 and key not in here.failed
            here.failed |= {key} if fails else set()
        time.sleep(0.005)
        code, content = (here.refusal, {"error": "busy"}) if fails else self.answer(body)
        with here.lock:  # before the reply: after it the client may ask again
            here.now -= 1
        self.reply(code, content)

    def answer(self, body):
        here, path = self.server, self.path.partition("?")[0]
        if path == "/v1/completions":
            assert isinstance(body["prompt"], list if here.token_ids else str)
            prompt = body["prompt"] if here.token_ids else here.tokenizer(body["prompt"])["input_ids"]
            settings = RolloutSection(max_completion_length=body["max_tokens"])
            with here.lock:
                (one,) = transformers_sampler(here.model, here.tokenizer, settings)([prompt], body["seed"])
            choice = {"text": here.tokenizer.decode(one.ids, skip_special_tokens=True),
                      "finish_reason": "stop" if one.ended else "length"}  # fmt: skip
            if here.token_ids:
                choice |= {"token_ids": one.ids, "logprobs": {"token_logprobs": one.logps.tolist()}}
            return 200, {"choices": [choice]}
        if path == "/score":
            return 200, {"scores": [len(text.split()) or None for text in body["completions"]]}
        return (200 if self.path in ("/collective_rpc", "/reset_prefix_cache") else 404), {}


@pytest.fixture
def serve(loaded):
    started = []

    def start(**options):
        started.append(Server(*loaded, **options))
        threading.Thread(target=started[-1].serve_forever, daemon=True).start()
        return started[-1]

    yield start
    for one in started:
        one.shutdown()
        one.server_close()


@pytest.mark.parametrize("token_ids", [True, False])
def test_a_server_samples(token_ids, serve, loaded):
    server, (model, tokenizer) = serve(token_ids=token_ids), loaded
    settings = RolloutSection(max_completion_length=6, server_base_url=server.url, server_concurrency=3)
    prompts = ids_of(tokenizer, 20)
    kind = kind_of_server(server.url)
    assert kind == ("vllm" if token_ids else "openai")
    found = server_sampler(tokenizer, settings, "policy", kind)(prompts, 4)
    assert server.failed, "some requests must have been tried again"
    assert 1 < server.most <= 3
    sent = server.posts[0][1]
    assert (sent["model"], sent["max_tokens"]) == ("policy", 6 if token_ids else 7)
    assert token_ids or sent.keys() == {"model", "max_tokens", "temperature", "top_p", "prompt", "seed"}
    assert {one.ended for one in found} == {True, False}
    for prompt, one in zip(prompts, found):
        assert one.ended == (one.ids[-1] == EOS)
        if token_ids:
            want = full_logps(model, prompt, one.ids, 1.0)
            torch.testing.assert_close(one.logps.double(), want.detach(), atol=1e-4, rtol=1e-4)
        else:
            assert one.logps.isnan().all() and len(one.logps) == len(one.ids)


@pytest.mark.parametrize("code", [408, 409, 425, 429, 500, 502, 503, 504])
def test_what_a_server_refuses_for_the_moment_is_asked_again(code, serve, loaded):
    server = serve(refusal=code)
    settings = RolloutSection(max_completion_length=2, server_base_url=server.url, server_concurrency=1)
    assert len(server_sampler(loaded[1], settings, "policy", "vllm")([[2, 3]] * 4, 4)) == 4
    assert len(server.failed) == 1 and len(server.posts) == 5, "the third request, once more"


@pytest.mark.parametrize("code", [400, 401, 404, 422])
def test_what_a_server_refuses_for_good_is_asked_once(code, serve, loaded):
    server = serve(refusal=code)
    settings = RolloutSection(max_completion_length=2, server_base_url=server.url, server_concurrency=1)
    with pytest.raises(RunFailed, match=f"^{server.url}/v1/completions: {code} .*busy"):
        server_sampler(loaded[1], settings, "policy", "vllm")([[2, 3]] * 4, 4)
    assert len(server.posts) == 3


@pytest.mark.parametrize("kind", ["vllm", "transformers"])
def test_a_server_is_sent_the_sampling_that_the_recipe_asks_for(kind, serve, loaded):
    server, (_, tokenizer) = serve(token_ids=kind == "vllm"), loaded
    settings = RolloutSection(max_completion_length=3, server_base_url=server.url, stop_strings=["w3", "w4 w5"],
                              temperature=0.7, top_p=0.9, top_k=5)  # fmt: skip
    found = server_sampler(tokenizer, settings, "policy", kind)([[2, 3]], 4)
    (_, sent), own = server.posts[0], {"do_sample": True, "top_k": 5, "repetition_penalty": 1.0}
    assert (sent["stop"], sent["temperature"], sent["top_p"]) == (["w3", "w4 w5"], 0.7, 0.9)
    if kind == "vllm":
        assert (sent["top_k"], sent["include_stop_str_in_output"], sent["logprobs"]) == (5, True, 0)
    else:
        assert json.loads(sent["generation_config"]) == own
    assert found[0].logps.isnan().all(), "log-probs of the tokens that a server kept are not the policy's"


def test_truncated_sampling_cannot_be_corrected_for(serve, model, prompts, tmp_path):
    server = serve()
    for settings in (dict(top_p=0.9), dict(top_k=20)):
        recipe = tiny.online(GrpoRecipe, model, prompts, tmp_path / "run", server_base_url=server.url,
                             vllm_importance_sampling_correction=True, **settings)  # fmt: skip
        with pytest.raises(BadInput, match=r"correction = True with top_p = .* top_k to 0, or the correction to false"):
            train("grpo", recipe)
    assert not server.posts and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (dict(token_ids=[5, 64]), r"gave the token id 64, outside the policy's vocabulary of 64"),
        (dict(token_ids=[-1, 5]), r"gave the token id -1, outside"),
        (dict(token_ids=[5, 5.0]), r"gave the token id 5\.0, outside"),
        (dict(token_ids=[5, True]), r"gave the token id True, outside"),
        (dict(token_ids="56"), r"gave '56' as token ids"),
        (dict(token_ids=[5]), r"gave \[5\] as token ids and \[-1\.0, -2\.0\]"),
        (dict(logprobs={"token_logprobs": [-1.0, None]}), "gave the log-prob None"),
        (dict(logprobs={"token_logprobs": [-1.0, 0.5]}), r"gave the log-prob 0\.5"),
        (dict(logprobs={"token_logprobs": [-1.0, float("-inf")]}), "gave the log-prob -inf"),
        (dict(logprobs=None), "not an OpenAI completion"),
    ],
    ids=str,
)
def test_an_answer_that_is_no_completion_of_the_policy_is_named(choice, said, serve, loaded, monkeypatch):
    whole = {"token_ids": [5, 6], "logprobs": {"token_logprobs": [-1.0, -2.0]}, "finish_reason": "stop"}
    monkeypatch.setattr(Handler, "answer", lambda self, body: (200, {"choices": [whole | choice]}))
    server = serve()
    settings = RolloutSection(max_completion_length=4, server_base_url=server.url)
    with pytest.raises(RunFailed, match=f"^{server.url}/v1/completions .*{said}"):
        server_sampler(loaded[1], settings, "policy", "vllm", vocab_size=64)([[2, 3]], 0)


def test_a_server_that_hangs_fails_in_bounded_time(serve, loaded, monkeypatch):
    done = threading.Event()
    monkeypatch.setattr(Handler, "answer", lambda self, body: (done.wait(20), (200, {}))[1])
    monkeypatch.setattr("align_engine.rollouts.server.PATIENCE", 0.3)
    server = serve()
    with pytest.raises(RunFailed, match=r"completions: no answer within 0\.3 seconds"):
        server_sampler(loaded[1], RolloutSection(server_base_url=server.url), "policy", "vllm")([[2, 3]], 0)
    done.set()


def test_the_key_of_a_server_is_used_and_stands_nowhere(serve, model, prompts, tmp_path, capsys, monkeypatch):
    server, tracked = serve(), []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, name, config, **options: tracked.append(str(config)))
    url = server.url.replace("http://", "http://me:hunter2@")
    flags = dict(model_name_or_path=model, dataset_name=prompts, output_dir=tmp_path / "run", max_steps=1,
                 reward_funcs=f"{url}/score?api_key=sesame", server_base_url=f"{url}?api_key=sesame",
                 max_completion_length=4, num_generations=4, per_device_train_batch_size=4)  # fmt: skip
    command = ["grpo", *(str(part) for name, value in flags.items() for part in (f"--{name}", value))]
    assert main(command) == 0
    assert main(command) == 0, "the same command finds the same run"
    said = capsys.readouterr()
    assert "nothing to do" in said.out and server.keys == {"Basic bWU6aHVudGVyMg=="}
    assert {path for path, _ in server.posts} == {"/v1/completions?api_key=sesame", "/score?api_key=sesame"}
    (config,), shown = tracked, url.replace("me:hunter2", "***")
    assert shown in config and f"{shown}/score" in config
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    for secret in ("hunter2", "sesame"):
        assert secret not in said.out + said.err + config and not any(secret.encode() in text for text in written)
    again = ["grpo", "--recipe", str(tmp_path / "run" / "recipe.yaml"), "--output_dir", str(tmp_path / "other")]
    assert main(again) == 2
    assert "its password or key is not kept in files" in capsys.readouterr().err
    monkeypatch.setenv("ALIGN_SERVER_API_KEY", "token")
    settings = RolloutSection(max_completion_length=2, server_base_url=server.url)
    server_sampler(AutoTokenizer.from_pretrained(model), settings, "policy", kind_of_server(server.url))([[2]], 0)
    assert "Bearer token" in server.keys


def test_what_a_server_says_does_not_act_on_the_terminal(serve, model, prompts, tmp_path, capsys, monkeypatch):
    def reply(self, code, content):
        body = json.dumps(content).encode() if code == 200 else b"\x1b[2J\xe2\x80\xaebusy"
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        with contextlib.suppress(OSError):
            self.end_headers()
            self.wfile.write(body)

    monkeypatch.setattr(Handler, "reply", reply)
    server = serve(refusal=400)
    flags = dict(model_name_or_path=model, dataset_name=prompts, output_dir=tmp_path / "run", max_steps=1,
                 reward_funcs="tiny:word_reward", server_base_url=server.url, max_completion_length=4)  # fmt: skip
    assert main(["grpo", *(str(part) for name, value in flags.items() for part in (f"--{name}", value))]) == 1
    said = capsys.readouterr().err
    assert f"{server.url}/v1/completions: 400 \\x1b[2J\\u202ebusy" in said and "\x1b[2J" not in said


def test_grpo_with_a_server_and_importance_sampling(serve, model, prompts, tmp_path, capsys):
    """The policy goes to the server before each rollout and evaluation; at first both agree, then the server here stays
    behind."""
    server, served = serve(), tmp_path / "served"
    recipe = tiny.online(GrpoRecipe, model, prompts, tmp_path / "run", server_base_url=server.url, learning_rate=1e-2,
                         server_weights=str(served), vllm_importance_sampling_correction=True,
                         vllm_importance_sampling_mode="token_truncate", eval_steps=2,
                         eval_dataset_name=str(prompts))  # fmt: skip
    folder = train("grpo", recipe)
    assert f"completions come from {server.url}, which shows itself as vllm" in capsys.readouterr().out
    steps, evaluations = ([r for r in metrics.read(folder.metrics) if name in r] for name in ("reward", "eval_reward"))
    differences = [record["sampling/sampling_logp_difference/mean"] for record in steps]
    assert differences[0] < 1e-5 < 1e-2 < differences[-1]
    resets = [path for path, _ in server.posts].count("/reset_prefix_cache")  # one of them is answered 503
    assert 5 <= len(steps) + len(evaluations) <= resets
    asked = ["/openapi.json"] * 2 + ["/v1/models"] * 2  # by the source of training, and again where that failed
    assert server.gets == [*asked, "/openapi.json", "/v1/models"], "and by the source of evaluation"
    assert AutoModelForCausalLM.from_pretrained(served).num_parameters() > 0


class WithAdapters(Handler):
    """vLLM with --enable-lora: it samples from the adapter that a request names, answers in plain text, and refuses
    names that it has, or has not."""

    loaded: ClassVar[dict[str, object]] = {}
    runtime = True

    def do_GET(self):
        self.reply(200, {"data": [{"id": name, "owned_by": "vllm"} for name in ("base", *self.loaded)]})

    def reply(self, code, content):
        if isinstance(content, str):
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content.encode())
        else:
            super().reply(code, content)

    def answer(self, body):
        here, path = self.server, self.path.removeprefix("/v1/")
        if path == "completions":
            settings = RolloutSection(max_completion_length=body["max_tokens"])
            with here.lock:
                model = self.loaded[body["model"]]
                (one,) = transformers_sampler(model, here.tokenizer, settings)([body["prompt"]], body["seed"])
            choice = {"token_ids": one.ids, "logprobs": {"token_logprobs": one.logps.tolist()}}
            return 200, {"choices": [choice | {"finish_reason": "stop" if one.ended else "length"}]}
        if not self.runtime or path not in ("load_lora_adapter", "unload_lora_adapter"):
            return 404, {"detail": "Not Found"}
        name = body["lora_name"]
        if (name in self.loaded) == (path == "load_lora_adapter"):
            return 400, {"message": f"The lora adapter '{name}' is{' not' * (name not in self.loaded)} loaded"}
        if path == "load_lora_adapter":
            assert not list(Path(body["lora_path"]).glob("model*.safetensors")), "the adapter alone"
            base = AutoModelForCausalLM.from_pretrained(here.model.name_or_path)
            self.loaded[name] = PeftModel.from_pretrained(base, body["lora_path"]).eval()
        else:
            del self.loaded[name]
        return 200, f"Success: {path} {name}"


@pytest.fixture
def serve_adapters(serve, monkeypatch):
    monkeypatch.setattr(WithAdapters, "loaded", {})
    server = serve()
    server.RequestHandlerClass = WithAdapters
    return server


def with_adapters(server, model, prompts, out, served, **settings):
    return tiny.online(GrpoRecipe, model, prompts, out, server_base_url=server.url, server_weights=str(served),
                       **dict(use_peft=True, learning_rate=1e-2, max_steps=3) | settings)  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of peft
def test_a_vllm_server_loads_the_adapter_alone_before_each_rollout(serve_adapters, model, prompts, tmp_path):
    """It samples from what the policy is: log-probs agree at every step. One adapter is loaded at a time."""
    server, served = serve_adapters, tmp_path / "served"
    recipe = with_adapters(server, model, prompts, tmp_path / "run", served, eval_dataset_name=str(prompts),
                           eval_steps=2)  # fmt: skip
    folder = train("grpo", recipe)
    steps = [record for record in metrics.read(folder.metrics) if "reward" in record]
    assert all(record["sampling/sampling_logp_difference/mean"] < 1e-5 for record in steps) and len(steps) == 3
    done = [(path.rpartition("/")[2], body["lora_name"]) for path, body in server.posts if "lora" in path]
    done = [one for i, one in enumerate(done) if done[i - 1 : i] != [one]]  # less what was answered 503
    loads = [name for what, name in done if what == "load_lora_adapter"]
    assert len(loads) == 5 and len(set(loads)) >= 4, "three rollouts and two evaluations, each of new weights"
    assert {body["model"] for path, body in server.posts if path == "/v1/completions"} == set(loads)
    assert len(WithAdapters.loaded) <= 2, "of training, and of evaluation"
    assert (served / "adapter_model.safetensors").exists() and not (served / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of peft
def test_a_server_that_loads_no_adapters_is_named(serve_adapters, serve, model, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(WithAdapters, "runtime", False)
    run = tmp_path / "run"
    with pytest.raises(RunFailed, match=r"v1/load_lora_adapter: 404 .*must run with --enable-lora.*RUNTIME_LORA"):
        train("grpo", with_adapters(serve_adapters, model, prompts, run, tmp_path / "served"))
    other = serve(token_ids=False)
    with pytest.raises(BadInput, match=r"with use_peft: true needs vLLM, which loads adapters, and .* as openai"):
        train("grpo", with_adapters(other, model, prompts, tmp_path / "other", tmp_path / "served"))
    with pytest.raises(BadInput, match="server_model = 'x' is not read with server_weights and use_peft"):
        train("grpo", with_adapters(serve_adapters, model, prompts, run, tmp_path / "served", server_model="x"))


def test_importance_sampling_needs_a_server_with_log_probs(serve, model, prompts, tmp_path):
    server = serve(token_ids=False)
    recipe = tiny.online(GrpoRecipe, model, prompts, tmp_path / "run", server_base_url=server.url,
                         vllm_importance_sampling_correction=True)  # fmt: skip
    with pytest.raises(BadInput, match="vllm_importance_sampling_correction = True needs vLLM's log-probs"):
        train("grpo", recipe)
    assert not server.posts and not (tmp_path / "run").exists()


def test_a_text_server_gets_the_prompts_tokens_exactly_or_nothing(serve, loaded, model):
    server, with_bos = serve(token_ids=False), AutoTokenizer.from_pretrained(model, bos_token="<unk>")
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 0)])
    settings = RolloutSection(max_completion_length=6, server_base_url=server.url)
    sample = server_sampler(with_bos, settings, "policy", kind_of_server(server.url))
    assert len(sample([[0, 5, 1, 7]], 4)) == 1
    assert {body["prompt"] for _, body in server.posts} == {"w3 <eos> w5"}, "the server puts BOS before it"
    with pytest.raises(RunFailed, match=r"'w5' is \[0, 7\] to it, not \[5, 7\]$"):
        sample([[5, 7]], 4)
    with pytest.raises(RunFailed) as refused:
        sample([[5, 7] * 1000], 4)
    assert len(str(refused.value)) < 800, "cut, whatever the prompt's length"
    for name, value in (("top_k", 5), ("stop_strings", ["w3"]), ("server_weights", "somewhere")):
        with pytest.raises(BadInput, match=f"{name} = .* needs vLLM or `transformers serve`"):
            server_sampler(with_bos, dataclasses.replace(settings, **{name: value}), "policy", "openai")


def test_where_nothing_answers_is_refused(model, prompts, tmp_path):
    recipe = tiny.online(GrpoRecipe, model, prompts, tmp_path / "run", server_base_url="http://127.0.0.1:9")
    with pytest.raises(BadInput, match="no server answers"):
        train("grpo", recipe)
    assert not (tmp_path / "run").exists()


# -- rewards --------------------------------------------------------------------------------------------------------
async def later(prompts, completions, **_):
    return [None if text == "b" else 2.0 for text in completions]


def plain(prompts, completions, wanted, **_):
    return [1.0 if text == one else None for text, one in zip(completions, wanted)]


def short(prompts, completions, **_):
    return [0.0]


def answers(*completions):
    count = len(completions)
    return {"prompts": ["p"] * count, "completions": list(completions), "completion_ids": [[2]] * count,
            "wanted": ["a"] * count}  # fmt: skip


def test_functions_are_weighted_and_unscorable_is_nan():
    both = [rewards.Reward("later", later), rewards.Reward("plain", plain)]
    scores = rewards.score(both, answers("a", "b", "c"))
    assert torch.equal(scores.isnan(), torch.tensor([[False, False], [True, True], [False, True]]))
    settings = RolloutSection(reward_weights=[1.0, 10.0], missing_eos_penalty=0.5)
    total = rewards.combine(scores, settings, [True, True, False])
    assert total[[0, 2]].tolist() == [12.0, 1.5] and math.isnan(total[1])


def test_a_function_that_gives_too_little_is_refused():
    with pytest.raises(RunFailed, match=r"'short' gave \[0.0\] for 2 completions"):
        rewards.score([rewards.Reward("short", short)], answers("a", "b"))


def test_an_http_scorer(serve):
    scorer = rewards.load_reward(f"{serve().url}/score", torch.device("cpu"))
    scores = rewards.score([scorer], answers(*["a b c", ""] * 20))
    assert scores[:2, 0].nan_to_num(-1).tolist() == [3.0, -1.0] and len(scores) == 40


def test_a_reward_model_scores_as_it_was_trained(model, pairs, tmp_path):
    from align_engine.recipe import RmRecipe

    folder = train("rm", tiny.recipe(RmRecipe, model, pairs, tmp_path / "rm", max_steps=30, learning_rate=1e-2))
    rows = tiny.preference_rows(8)
    reward = rewards.load_reward(str(folder.final), torch.device("cpu"))
    good, bad = (reward.score([row["prompt"] for row in rows], [row[side] for row in rows]) for side in
                 ("chosen", "rejected"))  # fmt: skip
    accuracy = metrics.read(folder.metrics)[-1]["accuracy"]
    assert sum(a > b for a, b in zip(good, bad)) / 8 == accuracy == 1.0


def test_people_mark_completions_in_a_file(model, prompts, tmp_path):
    recipe = tiny.online(RlooRecipe, model, prompts, tmp_path / "run", reward_funcs=["human"], max_steps=2)
    for number in range(2):
        with pytest.raises(RunFailed, match="8 of 8 completions wait for marks"):
            train("rloo", recipe)
        path = tmp_path / "run" / "marks" / f"rollout-{number:06d}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for i, row in enumerate(rows):
            row["score"] = "skip" if i == 0 else len(row["completion"].split())
        tiny.write_rows(path, rows)
    folder = train("rloo", recipe)
    assert [record["step"] for record in metrics.read(folder.metrics)] == [1, 2] and folder.final.exists()
