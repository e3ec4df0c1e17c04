"""recipes/memory.py: the lines of memory that recipes bear are those of the planner, and each fits on its card.

That the planner computes what a step allocates is `test_plan`'s."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of peft
MEMORY = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "memory.py"))
REAL = [path for path in sorted(MEMORY["FOLDER"].glob("*.yaml")) if not path.stem.startswith("demo-")]


def test_the_configurations_are_those_of_models_of_their_size(tmp_path):
    """Published sizes, in thousands of millions of weights."""
    sizes = {"Qwen2.5-0.5B": 0.49, "Qwen2.5-7B": 7.62, "Llama-3.1-8B": 8.03, "Mistral-7B": 7.25}
    for name in MEMORY["MODELS"]:
        config = AutoConfig.from_pretrained(MEMORY["configured"](name, tmp_path))
        with torch.device("meta"):
            made = AutoModelForCausalLM.from_config(config)
        (wanted,) = (size for known, size in sizes.items() if known in name)
        assert round(sum(p.numel() for p in made.parameters()) / 1e9, 2) == wanted


@pytest.mark.parametrize("name", ["qwen2.5-0.5b-full-iterate", "llama-3.1-8b-qlora-dpo"])
def test_a_recipe_bears_what_the_planner_computes(name):
    path = MEMORY["FOLDER"] / f"{name}.yaml"
    assert MEMORY["lines_of"](path) in path.read_text()


def test_every_recipe_bears_its_lines_and_fits_on_the_smallest_card_that_it_can():
    assert {path.stem.rpartition("-")[2] for path in REAL} == set("sft rm dpo kto rloo grpo ppo iterate".split())
    assert len(REAL) >= 22
    for path in REAL:
        text = path.read_text()
        (lines,) = MEMORY["LINES"].findall(text)
        *parts, total = map(float, re.findall(r"\d+\.\d", lines))
        assert sum(parts) == pytest.approx(total, abs=0.06 * len(parts) + 0.06), path
        card = next(size for size in MEMORY["CARDS"] if total * 2**30 < 0.9 * size * 1e9)
        assert MEMORY["card_of"](text).size == card * 10**9, path
