"""RLOO, GRPO and PPO end to end on a tiny model."""

import gc
import json
import shutil

import pytest
import tiny
import torch
from runs import same_bits
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from align_engine.algorithms.ppo import ppo
from align_engine.data.batches import Batch
from align_engine.errors import BadInput
from align_engine.iterate import iterate, kept
from align_engine.models import load
from align_engine.recipe import GrpoRecipe, IterateRecipe, PpoRecipe, RlooRecipe
from align_engine.recipe.sections import PpoLoss
from align_engine.rollouts import source
from align_engine.rollouts.completion import Completion
from align_engine.run import train
from align_engine.training import metrics
from align_engine.training.checkpoint import RunFolder
from align_engine.training.engine import Engine
from align_engine.training.health import warnings
from align_engine.training.stops import Stopped

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of peft
KINDS = {"rloo": RlooRecipe, "grpo": GrpoRecipe, "ppo": PpoRecipe}


HOW = (
    "max_completion_length",
    "use_peft",
    "lora_target_modules",
    "bf16",
    "value_model_name_or_path",
    "gradient_accumulation_steps",
)
PLAIN = {}  # gradient norms of each method with its defaults, by the settings of HOW


@pytest.fixture
def prompts(tmp_path):
    return tiny.write_rows(tmp_path / "prompts.jsonl", tiny.prompt_rows(12))


@pytest.mark.parametrize("name", list(KINDS))
def test_the_reward_rises(name, model, prompts, tmp_path):
    settings = dict(max_steps=24, per_device_train_batch_size=32, learning_rate=3e-3, lr_scheduler_type="constant")
    if name == "ppo":
        settings |= dict(num_ppo_epochs=2, max_steps=40, value_learning_rate=3e-3)
    folder = train(name, tiny.online(KINDS[name], model, prompts, tmp_path / "run", **settings))
    rewards = [record["reward"] for record in metrics.read(folder.metrics) if "reward" in record]
    assert sum(rewards[-2:]) / 2 > rewards[0] + 0.1, rewards


def test_evaluation_samples_held_out_prompts(model, prompts, tmp_path):
    held_out = tiny.write_rows(tmp_path / "held_out.jsonl", tiny.prompt_rows(60, seed=9))
    settings = dict(eval_dataset_name=str(held_out), eval_steps=10, max_steps=20, learning_rate=5e-4,
                    lr_scheduler_type="constant", per_device_train_batch_size=32)  # fmt: skip
    with_it = train("grpo", tiny.online(GrpoRecipe, model, prompts, tmp_path / "run", **settings))
    found = [record for record in metrics.read(with_it.metrics) if "eval_reward" in record]
    assert [record["step"] for record in found] == [10, 20]
    assert 0 <= found[0]["eval_reward"] < found[1]["eval_reward"]
    settings["eval_dataset_name"] = settings["eval_steps"] = None
    without = train("grpo", tiny.online(GrpoRecipe, model, prompts, tmp_path / "without", **settings))
    assert same_bits(with_it.final, without.final), "evaluation must not touch training"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_continuous_batching_stopped_and_run_again_ends_with_the_same_bits(
    dtype, model, prompts, tmp_path, monkeypatch
):
    settings = dict(use_transformers_continuous_batching=True, max_steps=4, save_steps=1, num_iterations=2, dtype=dtype,
                    bf16=dtype == "bfloat16", per_device_generation_batch_size=8, learning_rate=1e-2,
                    vllm_importance_sampling_correction=True)  # fmt: skip
    whole = train("grpo", tiny.online(GrpoRecipe, model, prompts, tmp_path / "whole", **settings))
    records = metrics.read(whole.metrics)
    off = [record["sampling/sampling_logp_difference/mean"] for record in records]
    assert max(off) < (3e-2 if dtype == "bfloat16" else 1e-5), (
        "each rollout is sampled by the policy that it is measured with"
    )
    assert records[0]["loss"] != records[2]["loss"]
    scored, reward = [], tiny.word_reward

    def stops_at_the_second(prompts, completions, **columns):
        scored.append(completions)
        if len(scored) == 2:
            raise KeyboardInterrupt
        return reward(prompts, completions, **columns)

    monkeypatch.setattr(tiny, "word_reward", stops_at_the_second)
    recipe = tiny.online(GrpoRecipe, model, prompts, tmp_path / "cut", **settings)
    with pytest.raises(Stopped):
        train("grpo", recipe)
    cut = train("grpo", recipe)
    assert scored[2] == scored[1] != scored[0]
    assert same_bits(whole.final, cut.final)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("grpo", dict(loss_type="cispo", epsilon_high=5.0, entropy_coef=0.01, grad_clamp=0.5, prob_gate=0.9)),
        (
            "grpo",
            dict(loss_type="sapo", mask_truncated_completions=True, max_completion_length=40, scale_rewards="none"),
        ),
        ("grpo", dict(loss_type="vespo", off_policy_mask_threshold=0.1, num_iterations=2)),
        ("grpo", dict(loss_type="gmpo", epsilon=0.4, num_iterations=2)),
        ("grpo", dict(loss_type="dr_grpo", importance_sampling_level="sequence", top_entropy_quantile=0.5)),
        ("grpo", dict(use_peft=True, beta=0.1, lora_target_modules=["q_proj", "lm_head"])),
        ("rloo", dict(baseline="batch_mean", normalize_advantages=True, beta=0.0, gradient_accumulation_steps=2)),
        (
            "rloo",
            dict(
                mask_truncated_completions=True,
                max_completion_length=40,
                num_iterations=2,
                beta=0.1,
                learning_rate=1e-5,
                prob_gate=0.9,
            ),
        ),
        ("ppo", dict(whiten_rewards=True, kl_estimator="k3", dual_clip=3.0, entropy_coef=0.01, use_peft=True)),
        (
            "ppo",
            dict(missing_eos_penalty=1.0, kl_coef=0.0, grad_clamp=0.5, value_model_name_or_path="MODEL", bf16=True),
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*tie.*:UserWarning")  # of peft, on adapters of tied heads
def test_every_option_trains(name, settings, model, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("align_engine.reports.report.write_report", lambda *_: None)
    if settings.get("value_model_name_or_path") == "MODEL":
        scored = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
        scored.save_pretrained(tmp_path / "scored")
        settings = settings | {"value_model_name_or_path": str(tmp_path / "scored")}
    folder = train(name, tiny.online(KINDS[name], model, prompts, tmp_path / "run", max_steps=3, **settings))
    records = metrics.read(folder.metrics)
    assert len(records) == 3 and all(record["grad_norm"] > 0 for record in records)
    how = {key: value for key, value in settings.items() if key in HOW}
    if (key := (name, *how)) not in PLAIN:
        without = train(name, tiny.online(KINDS[name], model, prompts, tmp_path / "without", max_steps=3, **how))
        PLAIN[key] = [record["grad_norm"] for record in metrics.read(without.metrics)]
    learnt = [record["grad_norm"] for record in records]
    assert learnt != pytest.approx(PLAIN[key], rel=1e-5), "the options must change what is learnt"
    assert not any("value_head" in key for path in folder.final.glob("*.safetensors") for key in load_file(path))


def test_what_cannot_be_is_refused(model, prompts, tmp_path):
    for settings, message in (
        ({"reward_funcs": []}, "reward_funcs = .* is required: a function"),
        ({"reward_funcs": ["tiny:nothing"]}, "has no 'nothing'"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights"),
        ({"num_generations": 3}, "num_generations = 3 does not divide the 8 completions"),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "multiple of gradient_accumulation_steps = 2"),
        ({"loss_type": "grpo", "entropy_coef": 0.1}, "entropy_coef = 0.1 needs a loss_type that counts tokens"),
        ({"server_weights": "somewhere"}, "server_weights = 'somewhere' needs server_base_url"),
        ({"loss_type": "sigmoid"}, "loss_type = 'sigmoid' is none of dapo"),
    ):
        with pytest.raises(BadInput, match=message):
            train("grpo", tiny.online(GrpoRecipe, model, prompts, tmp_path / "run", **settings))


def iterate_recipe(model, prompts, out, **settings):
    settings = dict(rounds=2, per_device_train_batch_size=4, learning_rate=1e-3, max_steps=6, save_steps=2) | settings
    return tiny.online(IterateRecipe, model, prompts, out, **settings)


@pytest.mark.parametrize("reference", ["initial", "previous"])
def test_iterate_keeps_each_rounds_data_scores_and_model(reference, model, prompts, tmp_path):
    settings = dict(reference=reference, method_settings=["beta=0.3", "loss_type=ipo"], grad_clamp=0.5,
                    learning_rate=5e-3)  # fmt: skip
    folder = iterate(iterate_recipe(model, prompts, tmp_path / "run", **settings))
    for number in (1, 2):
        here = folder.path / f"round-{number}"
        samples = [json.loads(line) for line in (here / "samples.jsonl").read_text().splitlines()]
        assert len(samples) == 12 * 4 and any(row["score"] is None for row in samples)
        for pair in map(json.loads, (here / "pairs.jsonl").read_text().splitlines()):
            prompt = " ".join(tiny.WORDS[i - 2] for i in pair["prompt_ids"])
            scores = {row["completion"]: row["score"] for row in samples if row["prompt"] == prompt}
            assert pair["chosen_score"] == scores[pair["chosen"]] > scores[pair["rejected"]] == pair["rejected_score"]
        held = json.loads((here / "train" / "run.json").read_text())["identity"]
        assert (held["beta"], held["loss_type"], held["grad_clamp"]) == (0.3, "ipo", 0.5)
        assert held["ref_model_name_or_path"] == (str(model) if (reference, number) == ("initial", 2) else None)
    records = metrics.read(folder.metrics)
    assert [record["step"] for record in records] == [1, 2]
    assert records[1]["reward"] > records[0]["reward"]
    assert same_bits(folder.path / "round-2" / "train" / "final", folder.final)


def judged_by_length(prompts, completions, **_):
    return [float(len(text.split())) for text in completions]


def test_iterate_pairs_the_best_with_the_worst_of_other_prompts_each_round(model, prompts, tmp_path, monkeypatch):
    """Against plain loops over samples.jsonl: four completions of each of four prompts, three rounds over twelve."""
    monkeypatch.setattr(tiny, "judged_by_length", judged_by_length, raising=False)
    monkeypatch.setattr("align_engine.iterate.train", keeps_the_model(model))
    settings = dict(rounds=3, prompts_per_round=4, reward_funcs=["tiny:judged_by_length"], max_completion_length=12)
    folder, asked = iterate(iterate_recipe(model, prompts, tmp_path / "run", **settings)), []
    for number in (1, 2, 3):
        here = folder.path / f"round-{number}"
        samples = [json.loads(line) for line in (here / "samples.jsonl").read_text().splitlines()]
        pairs = [json.loads(line) for line in (here / "pairs.jsonl").read_text().splitlines()]
        groups, want = [samples[i : i + 4] for i in range(0, 16, 4)], []
        assert all(len({row["prompt"] for row in group}) == 1 for group in groups)
        assert all(row["score"] == len(row["completion"].split()) for row in samples)
        for group in groups:
            scores = [row["score"] for row in group]
            if max(scores) > min(scores):
                best, worst = group[scores.index(max(scores))], group[scores.index(min(scores))]
                want.append((best["completion"], max(scores), worst["completion"], min(scores)))
        got = [(row["chosen"], row["chosen_score"], row["rejected"], row["rejected_score"]) for row in pairs]
        assert got == want and want
        asked += [group[0]["prompt"] for group in groups]
    rows = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    assert sorted(asked) == sorted(rows), "three rounds of four ask each of the twelve once"


def keeps_the_model(model):
    def train(method, recipe):
        shutil.copytree(model, f"{recipe.output.output_dir}/final")

    return train


def test_answers_kept_for_other_prompts_are_not_used_again(tmp_path):
    """A batch under the same seed whose prompts have changed is sampled again; one with the same prompts is not."""
    asked = []

    def sampler(rows, seed):
        asked.append(rows)
        return [Completion([row[0] + 1], torch.zeros(1), True) for row in rows]

    folder = RunFolder(tmp_path / "run", {})
    folder.begin({}, overwrite=False, writes=True)
    sample = kept(sampler, folder, "round-1/answers")
    assert [one.ids for one in sample([[5], [6]], 3)] == [one.ids for one in sample([[5], [6]], 3)] == [[6], [7]]
    assert asked == [[[5], [6]]]
    assert [one.ids for one in sample([[5], [9]], 3)] == [[6], [10]]
    assert [one.ids for one in sample([[5], [9]], 4)] == [[6], [10]]
    assert asked == [[[5], [6]], [[5], [9]], [[5], [9]]]


def test_iterate_samples_each_batch_once_however_often_it_stops(model, prompts, tmp_path, monkeypatch):
    whole = iterate(iterate_recipe(model, prompts, tmp_path / "whole", rounds=1))
    plain, asked = source.transformers_sampler, []

    def stops_at_the_fourth(*arguments):
        sampler = plain(*arguments)

        def sample(rows, seed):
            asked.append(seed)
            if len(asked) == 4:
                raise KeyboardInterrupt
            return sampler(rows, seed)

        return sample

    monkeypatch.setattr(source, "transformers_sampler", stops_at_the_fourth)
    recipe = iterate_recipe(model, prompts, tmp_path / "cut", rounds=1)
    with pytest.raises(Stopped):
        iterate(recipe)
    cut = iterate(recipe)
    assert len(set(asked)) == 12 * 4 // 6 == len(asked) - 1, "batches of six; the fourth is asked for again"
    for name in ("samples.jsonl", "pairs.jsonl"):
        assert (whole.path / "round-1" / name).read_text() == (cut.path / "round-1" / name).read_text()
    assert same_bits(whole.final, cut.final) and not (cut.path / "round-1" / "answers").exists()


def test_a_rounds_model_is_gone_before_another_is_loaded(model, prompts, tmp_path, monkeypatch):
    def engines():
        return sum(type(one) is Engine for one in gc.get_objects())

    def load_model(*arguments, once=load.load_model, **more):
        alive.append(engines())
        return once(*arguments, **more)

    gc.collect()
    alive, before = [], engines()
    monkeypatch.setattr(load, "load_model", load_model)
    settings = dict(use_peft=True, max_steps=2, reference="previous")  # "initial" is a second model, of an engine's
    iterate(iterate_recipe(model, prompts, tmp_path / "run", **settings))
    assert len(alive) == 6 and set(alive) == {before}


def test_iterate_with_lora_goes_on_from_the_merged_model(model, prompts, tmp_path):
    folder = iterate(iterate_recipe(model, prompts, tmp_path / "run", use_peft=True, lora_dropout=0.0, max_steps=2))
    base, merged = (load_file(path / "model.safetensors") for path in (model, folder.final))
    assert base.keys() == merged.keys()
    assert any(not base[name].equal(merged[name]) for name in base)


def test_warnings_of_online_training():
    healthy = {"reward_std": 0.3, "frac_reward_zero_std": 0.2, "clip_ratio/region_mean": 0.1, "objective/kl": 3.0,
               "completions/clipped_ratio": 0.5, "sampling/sampling_logp_difference/mean": 0.01}  # fmt: skip
    ill = {"reward_std": 0.0, "frac_reward_zero_std": 1.0, "clip_ratio/region_mean": 0.95, "objective/kl": 60.0,
           "completions/clipped_ratio": 1.0, "sampling/sampling_logp_difference/mean": 0.5}  # fmt: skip
    assert warnings({}, [], healthy) == []
    assert [text.partition(": ")[0] for text in warnings({}, [], ill)] == [
        "objective/kl", "reward_std", "frac_reward_zero_std", "clip_ratio/region_mean", "completions/clipped_ratio",
        "sampling/sampling_logp_difference/mean",
    ]  # fmt: skip
    assert "95% of the tokens are clipped" in warnings({}, [], ill)[3]


@pytest.mark.parametrize("kind", [GrpoRecipe, IterateRecipe], ids=["grpo", "iterate"])
def test_scorers_read_the_text_of_prompts_that_are_ids(kind, model, tmp_path, monkeypatch):
    seen = []

    def looks(prompts, completions, **_):
        seen.extend(prompts)
        return [float(i) for i in range(len(completions))]

    monkeypatch.setattr(tiny, "looks", looks, raising=False)
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = tiny.prompt_rows(1)[0]["prompt"]
    rows = tiny.write_rows(tmp_path / "ids.jsonl", [{"prompt_ids": tokenizer(text)["input_ids"]}] * 2)
    recipe = tiny.online(kind, model, rows, tmp_path / "run", reward_funcs=["tiny:looks"])
    iterate(recipe) if kind is IterateRecipe else train("grpo", recipe)
    assert set(seen) == {text}


def test_the_value_loss_is_weighed_by_vf_coef():
    """d loss / d v = vf_coef (v - R) / num_items, as long as v is within the clip of what it was."""
    torch.manual_seed(0)
    targets = torch.tensor([[3, 4, -100], [5, -100, -100]])
    hidden, weight, old = torch.randn(2, 3, 8), torch.randn(11, 8), torch.randn(2, 3)
    returns, advantages = torch.randn(2, 3), torch.randn(2, 3)
    values = (old + 0.05).requires_grad_()
    ids = torch.zeros(2, 3, dtype=torch.int64)
    tensors = dict(old_logps=torch.zeros(2, 3), advantages=advantages, values=old, returns=returns)
    batch = Batch(ids, ids + 1, targets, torch.arange(2), **tensors)
    ppo(hidden, {"weight": weight}, batch, PpoRecipe(loss=PpoLoss(vf_coef=0.3)), 5, values).loss.backward()
    wanted = torch.where(targets != -100, 0.3 * (old + 0.05 - returns) / 5, 0.0)
    torch.testing.assert_close(values.grad, wanted)


def test_what_nobody_learns_from_is_asked_in_evaluations(model, prompts, tmp_path):
    (tmp_path / "watch.py").write_text(
        "def words(completions, **_):\n    return [len(text.split()) for text in completions]\n"
        "def twice(completions, **_):\n    return [2 * len(text.split()) for text in completions]\n"
    )
    held_out = tiny.write_rows(tmp_path / "held_out.jsonl", tiny.prompt_rows(7, seed=9))
    watchers = [f"{tmp_path / 'watch.py'}:{name}" for name in ("words", "twice")]
    settings = dict(eval_dataset_name=str(held_out), eval_steps=1, max_steps=2, per_device_train_batch_size=8)
    folder = train("grpo", tiny.online(GrpoRecipe, model, prompts, tmp_path / "run", **settings,
                                       eval_reward_funcs=watchers))  # fmt: skip
    plain = train("grpo", tiny.online(GrpoRecipe, model, prompts, tmp_path / "plain", **settings))
    found = [record for record in metrics.read(folder.metrics) if "eval_reward" in record]
    want = [record for record in metrics.read(plain.metrics) if "eval_reward" in record]
    assert same_bits(folder.final, plain.final), "they must not touch training"
    for record, other in zip(found, want, strict=True):
        added = {name: record.pop(name) for name in list(record) if "words" in name or "twice" in name}
        assert set(added) == {f"eval_rewards/{name}/{what}" for name in ("words", "twice") for what in ("mean", "std")}
        assert added["eval_rewards/twice/mean"] == 2 * added["eval_rewards/words/mean"] > 0
        assert record["eval_reward"] == other["eval_reward"]


@pytest.mark.parametrize(("settings", "said"), [
    ({"eval_reward_funcs": ["human"], "eval_dataset_name": "x.jsonl"}, "takes scorers, not people"),
    ({"eval_reward_funcs": ["a.b:c"]}, "eval_reward_funcs = .* needs eval_dataset_name"),
    ({"eval_reward_funcs": ["a.b:c"], "reward_funcs": ["a.b:c"], "eval_dataset_name": "x"}, "is one of reward_funcs"),
])  # fmt: skip
def test_scorers_of_the_evaluation_that_cannot_be_are_refused(settings, said, model, prompts, tmp_path):
    with pytest.raises(BadInput, match=said):
        train("grpo", tiny.online(GrpoRecipe, model, prompts, tmp_path / "run", **settings))
