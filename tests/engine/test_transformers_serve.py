"""A real `transformers serve` process as the server that samples."""

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import time

import httpx2
import pytest
import tiny
from processes import free_port
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_engine.demo.make import make_model, make_tokenizer
from align_engine.recipe import GrpoRecipe, RolloutSection
from align_engine.rollouts.server import kind_of_server, server_sampler
from align_engine.rollouts.source import Prompts
from align_engine.run import train

EOS = 1


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """Folder of a tiny model that says words and <eos> only: texts leave out the rest."""
    path = tiny.write_model(tmp_path_factory.mktemp("policy"))
    model = AutoModelForCausalLM.from_pretrained(path)
    model.generation_config.suppress_tokens = [0, 62, 63]
    model.generation_config.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """Address of a server that loads whatever folder is asked for."""
    with serving(tmp_path_factory) as address:
        yield address


@contextlib.contextmanager
def serving(tmp_path_factory, *folder):
    """Address of a server, pinned to the model in a folder where one is given."""
    port = free_port()
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path_factory.mktemp("hub")), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", *folder]
    log = tmp_path_factory.mktemp("log") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)],
            env=os.environ | offline, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + 200
        while True:
            try:
                httpx2.get(f"{address}/health").raise_for_status()
                break
            except httpx2.TransportError:
                assert process.poll() is None and time.monotonic() < end, log.read_text()
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(20)


def test_it_samples_to_the_token(url, policy):
    tokenizer, most = AutoTokenizer.from_pretrained(policy), 20
    prompts = [[2 + i, 3, 4] for i in range(8)]

    def sample(seed, **settings):
        section = RolloutSection(
            **dict(max_completion_length=most, server_base_url=url, server_concurrency=1) | settings
        )
        return server_sampler(tokenizer, section, str(policy), "transformers")(prompts, seed)

    found = sample(3)
    assert all(one.logps.isnan().all() and len(one.logps) == len(one.ids) for one in found)
    assert {one.ended for one in found} == {True, False}
    for one in found:
        assert one.ended == (one.ids[-1] == EOS) and EOS not in one.ids[:-1] and (one.ended or len(one.ids) == most)
    assert [one.ids for one in sample(3)] == [one.ids for one in found] != [one.ids for one in sample(4)]
    greedy = [one.ids for one in sample(5, top_k=1)]
    assert [one.ids for one in sample(6, top_k=1)] == greedy != [one.ids for one in found]
    last = min(len(one.ids) for one in found if one.ended)
    for one, short in zip(found, sample(3, max_completion_length=last)):  # one ends with its last token
        assert short.ids == one.ids[:last] and short.ended == (one.ended and len(one.ids) <= last)


def test_stop_strings_end_at_the_token_that_completes_them(url, tmp_path):
    tokenizer = make_tokenizer(["some words that people use, and some that they do not"] * 3, vocab_size=300)
    make_model(tokenizer, hidden=32, layers=1).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = RolloutSection(max_completion_length=40, stop_strings=["e", "ou"], server_base_url=url, temperature=2.0)
    found = server_sampler(tokenizer, settings, str(tmp_path), "transformers")(
        [tokenizer("some people")["input_ids"]] * 12, 0
    )
    assert any(one.ended and one.ids[-1] != tokenizer.eos_token_id for one in found)
    for one in found:
        before, text = tokenizer.decode(one.ids[:-1]), tokenizer.decode(one.ids)
        assert "e" not in before and "ou" not in before
        assert one.ended == ("e" in text or "ou" in text or one.ids[-1] == tokenizer.eos_token_id)


@pytest.mark.parametrize("pinned", [False, True])
def test_grpo_hands_it_the_policy_before_each_rollout(pinned, url, policy, tmp_path, tmp_path_factory, monkeypatch):
    """To a server that loads what the requests name, and to one that was started on the folder's model."""
    served, rollouts, answers = tmp_path / "served", [], Prompts.answers
    shutil.copytree(policy, served)

    def kept(prompts, sampler, *where):
        rollouts.append((prompts, where, answers(prompts, sampler, *where)))
        return rollouts[-1][-1]

    monkeypatch.setattr(Prompts, "answers", kept)
    with serving(tmp_path_factory, str(served)) if pinned else contextlib.nullcontext(url) as address:
        recipe = hands_it_the_policy(address, policy, served, tmp_path)
        rollout = dataclasses.replace(recipe.rollout, server_model=str(served))
        prompts, where, found = rollouts[-1]
        named = server_sampler(prompts.tokenizer, rollout, "", "transformers")
        again = answers(prompts, named, *where)
    assert [one.ids for one in again] == [one.ids for one in found], "the last rollout came from the folder's weights"


def hands_it_the_policy(url, policy, served, tmp_path):
    prompts = tiny.write_rows(tmp_path / "prompts.jsonl", tiny.prompt_rows(12))
    assert kind_of_server(url) == "transformers"
    tokenizer, first = AutoTokenizer.from_pretrained(policy), AutoModelForCausalLM.from_pretrained(policy)
    settings = RolloutSection(max_completion_length=8, server_base_url=url, top_k=1)
    ask, prompt = server_sampler(tokenizer, settings, str(served), "transformers"), [[2, 3, 4]]
    before = ask(prompt, 0)[0].ids
    recipe = tiny.online(GrpoRecipe, policy, prompts, tmp_path / "run", server_base_url=url, learning_rate=3e-2,
                         server_weights=str(served), server_concurrency=1)  # fmt: skip
    train("grpo", recipe)
    last = AutoModelForCausalLM.from_pretrained(served)
    assert not last.lm_head.weight.equal(first.lm_head.weight)
    own = last.generate(input_ids=last.dummy_inputs["input_ids"][:0].new_tensor(prompt), max_new_tokens=8)[
        0, 3:
    ].tolist()
    assert ask(prompt, 0)[0].ids == own != before
    return recipe
