"""Online runs that are killed and run again, accumulated, or shared out over ranks end where the plain one does."""

import random
import signal
from pathlib import Path

import pytest
import tiny
from nursery import alike
from processes import run_on_two
from runs import same_bits
from safetensors.torch import load_file

from align_engine.iterate import iterate
from align_engine.recipe import GrpoRecipe, IterateRecipe, PpoRecipe, RlooRecipe
from align_engine.run import train
from align_engine.training import metrics

KINDS = {"rloo": RlooRecipe, "grpo": GrpoRecipe, "dapo": GrpoRecipe, "ppo": PpoRecipe, "iterate": IterateRecipe}
SETTINGS = {  # a rollout serves four steps, checkpoints fall inside it
    "rloo": dict(beta=0.1, num_iterations=2, steps_per_generation=2),
    "grpo": dict(beta=0.1, num_iterations=2, steps_per_generation=2, loss_type="grpo"),
    "dapo": dict(dynamic_sample=True, reward_funcs=["tiny:coarse_reward"], num_iterations=2, steps_per_generation=2),
    "ppo": dict(kl_target=0.5, kl_horizon=20.0, num_ppo_epochs=2, steps_per_generation=2),
    "iterate": dict(rounds=2, max_steps=20, per_device_train_batch_size=2, method_settings=["beta=0.3"]),
}
CODE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_online_exact as here
for name in sys.argv[1].split():
    here.run(name, *sys.argv[2:4], sys.argv[4] + name, **eval(sys.argv[5]))
"""


def run(name, model, prompts, out, **settings):
    recipe = tiny.online(KINDS[name], model, prompts, out, **SETTINGS[name] | settings)
    return iterate(recipe) if name == "iterate" else train("grpo" if name == "dapo" else name, recipe)


@pytest.fixture
def nursery():
    with alike() as made:
        yield made


@pytest.fixture
def prompts(tmp_path):
    return tiny.write_rows(tmp_path / "prompts.jsonl", tiny.prompt_rows(12))


def weights(folder):
    return load_file(Path(folder) / "final" / "model.safetensors")


STEADY = ("step", "loss", "reward", "grad_norm", "dynamic_sample/prompts", "ratio/p99", "kl", "objective/kl", "kl_coef",
          "loss/value_avg", "pairs")  # fmt: skip


def steady(path):
    return [{name: record[name] for name in STEADY if name in record} for record in metrics.read(path)]


@pytest.mark.parametrize("name", list(KINDS))
def test_killed_and_run_again_ends_with_the_same_bits(name, model, prompts, nursery, tmp_path):
    settings = dict(save_steps=3, logging_steps=1)
    if name != "iterate":
        settings |= dict(max_steps=30, per_device_train_batch_size=4)
    whole = run(name, model, prompts, tmp_path / "whole", **settings)
    cut = tmp_path / f"cut-{name}"
    inner = f"round-{random.randint(1, 2)}/train/" if name == "iterate" else ""
    journal, lines = cut / inner / "metrics.jsonl", random.randint(4, 15)
    child = nursery.start(CODE, name, model, prompts, tmp_path / "cut-", settings, out=tmp_path / "said")
    child.wait_until(lambda: journal.exists() and len(journal.read_text().splitlines()) >= lines)
    child.kill()
    assert child.end() == -signal.SIGKILL, child.said()
    assert not (cut / "final").exists()

    run(name, model, prompts, cut, **settings)
    assert same_bits(whole.final, cut / "final"), f"{inner} killed after {lines} lines"
    for part in ("round-1/train", "round-2/train", ".") if name == "iterate" else (".",):
        assert steady(whole.path / part / "metrics.jsonl") == steady(cut / part / "metrics.jsonl")
    for part in ("round-1", "round-2") if name == "iterate" else (".",):
        assert (whole.path / part / "samples.jsonl").read_text() == (cut / part / "samples.jsonl").read_text() != ""


def test_accumulation_and_processes_equal_one_big_batch(model64, prompts, tmp_path):
    """8 x 1 = 1 x 8 = 2 processes x 4, six steps of two rollouts. Groups of four stand in windows of eight."""
    names = ("rloo", "grpo", "dapo", "ppo", "iterate")
    shared = dict(max_steps=6, learning_rate=1e-4, num_generations=4, dtype="auto")

    def split(batch, steps, passes):
        sizes = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=steps)
        return shared | sizes | dict(steps_per_generation=passes)

    run_on_two(CODE, " ".join(names), model64, prompts, tmp_path / "two-", split(4, 1, 2))
    one = {name: run(name, model64, prompts, tmp_path / f"one-{name}", **split(8, 1, 2)) for name in names}
    many = {name: run(name, model64, prompts, tmp_path / f"many-{name}", **split(1, 8, 16)) for name in names}
    for name in names:
        for other in (many[name].path, tmp_path / f"two-{name}"):
            part = "round-2/train" if name == "iterate" else "."
            a, b = (steady(path / part / "metrics.jsonl") for path in (one[name].path, other))
            for x, y in zip(a, b, strict=True):
                assert x == pytest.approx(y, abs=1e-5, rel=1e-5), (name, other)
                assert x["loss"] == pytest.approx(y["loss"], abs=1e-6), (name, other)
            a, b = weights(one[name].path), weights(other)
            assert max((a[key] - b[key]).abs().max().item() for key in a) < 1e-6, (name, other)
