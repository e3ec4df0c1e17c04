"""Recipes from YAML: sections or not, what is refused, what identifies a run."""

import re
import runpy
from pathlib import Path

import pytest

from align_engine import recipe as recipes
from align_engine.errors import BadInput
from align_engine.recipe import RECIPES, DpoRecipe, SftRecipe, flat


def read(tmp_path, text, kind=DpoRecipe):
    (tmp_path / "r.yaml").write_text(text)
    return recipes.load(kind, tmp_path / "r.yaml")


def test_names_are_unique_so_that_flags_need_no_prefix():
    for kind in (SftRecipe, DpoRecipe):
        assert len(flat(kind())) == sum(len(vars(section)) for section in vars(kind()).values())


def test_sections_and_bare_names_are_the_same(tmp_path):
    nested = read(
        tmp_path, "loss: {beta: 0.3}\ntrain: {learning_rate: 1e-4, bf16: true}\noutput:\n  report_to: [tensorboard]"
    )
    bare = read(tmp_path, "beta: 0.3\nlearning_rate: 1e-4\nbf16: true\nreport_to: [tensorboard]")
    assert nested == bare
    assert (bare.loss.beta, bare.train.learning_rate, bare.output.report_to) == (0.3, 1e-4, ["tensorboard"])


def test_defaults_are_those_of_trl():
    sft, dpo = flat(SftRecipe()), flat(DpoRecipe())
    assert (sft["learning_rate"], dpo["learning_rate"], dpo["beta"], dpo["loss_type"]) == (2e-5, 1e-6, 0.1, "sigmoid")
    shared = {"per_device_train_batch_size": 8, "num_train_epochs": 3.0, "max_steps": -1, "max_length": 1024,
              "logging_steps": 10, "save_steps": 500, "gradient_checkpointing": True, "lr_scheduler_type": "linear",
              "max_grad_norm": 1.0, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "seed": 42}  # fmt: skip
    assert {name: dpo[name] for name in shared} == shared == {name: sft[name] for name in shared}


def test_a_saved_recipe_reads_back(tmp_path):
    made = read(tmp_path, "beta: 0.3\nlora_target_modules: [q_proj]\nmodel_name_or_path: m")
    recipes.save(made, tmp_path / "again.yaml")
    assert recipes.load(DpoRecipe, tmp_path / "again.yaml") == made


def test_all_that_is_wrong_is_said_at_once():
    made = DpoRecipe()
    made.loss.beta, made.train.max_steps, made.data.max_prompt_length = 0.0, 0, 2000
    with pytest.raises(BadInput) as caught:
        recipes.check(made)
    for text in ("model_name_or_path = '' is required", "beta = 0.0 must be above 0", "max_steps = 0", "2000"):
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"), [("max_length", 1), ("max_prompt_length", 0), ("overlong", "cut"), ("bad_rows", "x")]
)
def test_a_recipe_made_in_python_is_held_to_the_same(name, value):
    made = DpoRecipe()
    setattr(made.data, name, value)
    with pytest.raises(BadInput, match=f"{name}.*{value}"):
        recipes.check(made)


@pytest.mark.parametrize("kind", [kind for name, kind in RECIPES.items() if name != "rm"])
def test_limits_of_gradients_are_numbers_that_limit(kind):
    made = kind()
    made.limits.grad_clamp, made.limits.prob_gate = 0.0, 1.0
    with pytest.raises(BadInput) as caught:
        recipes.check(made)
    for text in ("grad_clamp = 0.0 must be above 0", "prob_gate = 1.0 must lie in (0, 1)"):
        assert text in str(caught.value)
    assert not hasattr(RECIPES["rm"](), "limits"), "scores have no logits"


def test_where_a_run_writes_does_not_change_what_it_is():
    one, two = DpoRecipe(), DpoRecipe()
    two.output.output_dir, two.output.overwrite = "elsewhere", True
    assert recipes.identity(one) == recipes.identity(two)
    two.loss.beta = 0.2
    assert recipes.identity(one) != recipes.identity(two)


FOLDER = Path(__file__).parents[2] / "recipes"


def test_real_models_fit_on_their_cards():
    """The line on memory is what recipes/memory.py computes; published sizes of the models stand beside it."""
    memory = runpy.run_path(str(FOLDER / "memory.py"))
    sizes = {name: round((shape.embeddings + shape.blocks) / 1e9, 2) for name, shape in memory["SHAPES"].items()}
    assert sizes == {"Qwen2.5-0.5B": 0.49, "Qwen2.5-7B": 7.62, "Llama-3.1-8B": 8.03, "Mistral-7B": 7.25}
    real = [path for path in FOLDER.glob("*.yaml") if not path.stem.startswith("demo-")]
    assert {path.stem.rpartition("-")[2] for path in real} == {"sft", "rm", "dpo", "kto", "grpo", "ppo", "iterate"}
    assert len(real) >= 22
    for path in real:
        line = memory["describe"](*memory["load"](path))
        text = path.read_text()
        assert f"# expected memory: {line} (recipes/memory.py)" in text, path
        card, need = (float(re.search(found, text)[1]) for found in (r"card of (\d+) GB", r"= ([\d.]+) GiB"))
        assert need < 0.9 * card * 1e9 / 2**30, path


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_of_the_repository_are_whole(path):
    """A recipe's name ends in its algorithm's."""
    recipes.check(recipes.load(RECIPES[path.stem.rpartition("-")[2]], path))
