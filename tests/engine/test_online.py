"""Direct RL, GRPO and PPO end to end on a tiny model."""

import pytest
import tiny

from align_engine import metrics
from align_engine.errors import BadInput
from align_engine.recipe import DirectRecipe, GrpoRecipe, PpoRecipe
from align_engine.run import train

KINDS = {"direct": DirectRecipe, "grpo": GrpoRecipe, "ppo": PpoRecipe}


@pytest.fixture
def prompts(tmp_path):
    return tiny.write_rows(tmp_path / "prompts.jsonl", tiny.prompt_rows(12))


@pytest.mark.parametrize("name", list(KINDS))
def test_the_reward_rises(name, model, prompts, tmp_path):
    settings = dict(max_steps=24, per_device_train_batch_size=32, learning_rate=3e-3, lr_scheduler_type="constant")
    if name == "ppo":
        settings |= dict(num_ppo_epochs=2, max_steps=40)
    folder = train(name, tiny.online(KINDS[name], model, prompts, tmp_path / "run", **settings))
    rewards = [record["reward"] for record in metrics.read(folder.metrics) if "reward" in record]
    assert sum(rewards[-2:]) / 2 > rewards[0] + 0.1, rewards


def test_what_cannot_be_is_refused(model, prompts, tmp_path):
    for settings, message in (
        ({"reward_funcs": []}, "reward_funcs = .* is required"),
        ({"reward_funcs": ["tiny:nothing"]}, "tiny has no 'nothing'"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights"),
        ({"num_generations": 3}, "num_generations = 3 does not divide the 8 completions"),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "multiple of gradient_accumulation_steps = 2"),
        ({"loss_type": "sigmoid"}, "loss_type = 'sigmoid' is none of"),
    ):
        with pytest.raises(BadInput, match=message):
            train("grpo", tiny.online(GrpoRecipe, model, prompts, tmp_path / "run", **settings))
