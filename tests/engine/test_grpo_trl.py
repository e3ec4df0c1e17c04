"""TRL's GRPOTrainer on the same model, prompts and completions: the same losses and metrics for 20 steps."""

import pytest
import tiny
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_engine.data.windows import endless_order
from align_engine.recipe import GrpoRecipe
from align_engine.rollouts import source
from align_engine.run import train
from align_engine.training import metrics

STEPS, SEED, BATCH, GROUP = 20, 42, 8, 4
NAMES = ("loss", "grad_norm", "reward", "reward_std", "frac_reward_zero_std", "entropy", "completions/mean_length",
         "completions/clipped_ratio", "clip_ratio/low_mean", "clip_ratio/high_mean")  # fmt: skip
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),  # of TRL
    pytest.mark.filterwarnings("ignore:.*rollout_func.*:UserWarning"),
]


@pytest.mark.parametrize(
    "settings",
    [
        dict(loss_type="dapo", beta=0.0, num_iterations=1),
        dict(loss_type="grpo", beta=0.05, num_iterations=2, scale_rewards="batch", epsilon_high=0.28),
    ],
    ids=["dapo", "grpo-kl-2"],
)
def test_grpo(settings, model, tmp_path, monkeypatch):
    """Our completions are handed to TRL, which scores them and learns from them by itself."""
    rows, passes, recorded = tiny.prompt_rows(12), settings["num_iterations"], []
    data, sample_all = tiny.write_rows(tmp_path / "rows.jsonl", rows), source.sample_all

    def record(sampler, prompts, *arguments):
        found = sample_all(sampler, prompts, *arguments)
        recorded.append({"prompt_ids": prompts, "completion_ids": [one.ids for one in found], "logprobs": None})
        return found

    monkeypatch.setattr(source, "sample_all", record)
    recipe = tiny.online(GrpoRecipe, model, data, tmp_path / "ours", max_steps=STEPS, num_generations=GROUP, **settings)
    ours = metrics.read(train("grpo", recipe).metrics)

    config = trl.GRPOConfig(
        output_dir=str(tmp_path / "trl"), max_steps=STEPS, learning_rate=1e-3, logging_steps=1, report_to=[],
        use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
        shuffle_dataset=False, per_device_train_batch_size=BATCH, num_generations=GROUP, max_completion_length=6,
        temperature=1.0, **settings,
    )  # fmt: skip
    prompts = [rows[endless_order(12, SEED, place)] for place in range(STEPS // passes * BATCH // GROUP)]
    waiting = iter(recorded)
    trainer = trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        reward_funcs=tiny.word_reward,
        args=config,
        train_dataset=Dataset.from_list(prompts),
        processing_class=AutoTokenizer.from_pretrained(model),
        rollout_func=lambda prompts, trainer: next(waiting),
    )
    trainer.train()
    theirs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(theirs) == STEPS and next(waiting, None) is None
    for name in NAMES + (("kl",) if settings["beta"] else ()):
        want = [log[name] for log, mine in zip(theirs, ours) if name in mine]
        got = [mine[name] for mine in ours if name in mine]
        assert len(got) >= STEPS // passes
        assert got == pytest.approx(want, abs=1e-4, rel=1e-4), name
    assert max(abs(log["loss"]) for log in ours) > 0.05, "the case must not be trivial"
