"""Prompts whose completions have one reward give way to the next ones: counted by hand from what was sampled."""

import pytest
import tiny
from transformers import AutoTokenizer

from align_engine.data.windows import endless_order
from align_engine.errors import BadInput
from align_engine.recipe import GrpoRecipe, IterateRecipe, PpoRecipe, RlooRecipe, check
from align_engine.rollouts import source
from align_engine.run import train
from align_engine.training import metrics

GROUP, PROMPTS, SEED = 4, 12, 42


@pytest.fixture
def sampled(monkeypatch):
    """Of each round of sampling: the rows asked, the seeds, the completions; and what each rollout learns from."""
    rounds, learnt, asked = [], [], []
    ask, sample, measure = source.Prompts.asked, source.sample_all, source.Rollouts.measure

    def record_asked(self, place, count):
        asked.append((place, count))
        return ask(self, place, count)

    def record(sampler, prompts, size, seeds, accelerator):
        found = sample(sampler, prompts, size, seeds, accelerator)
        rounds.append((*asked[-1], seeds, found))
        return found

    def learn(self):
        learnt.append([row["completion_ids"] for row in self.experience])
        return measure(self)

    monkeypatch.setattr(source.Prompts, "asked", record_asked)
    monkeypatch.setattr(source, "sample_all", record)
    monkeypatch.setattr(source.Rollouts, "measure", learn)
    return rounds, learnt


@pytest.mark.parametrize(("kind", "most"), [(GrpoRecipe, 3), (GrpoRecipe, 1), (RlooRecipe, 2)])
def test_prompts_without_spread_give_way_to_the_next_ones(kind, most, sampled, model, tmp_path):
    rows = tiny.prompt_rows(PROMPTS)
    data, (rounds, learnt) = tiny.write_rows(tmp_path / "rows.jsonl", rows), sampled
    recipe = tiny.online(kind, model, data, tmp_path / "run", dynamic_sample=True, max_resample_times=most,
                         reward_funcs=["tiny:coarse_reward"], max_steps=8, num_generations=GROUP,
                         per_device_train_batch_size=4 * GROUP)  # fmt: skip
    records = metrics.read(train("grpo" if kind is GrpoRecipe else "rloo", recipe).metrics)
    tokenizer, place, rounds = AutoTokenizer.from_pretrained(model), 0, iter(rounds)
    replaced = stayed = 0
    for number, (record, learns) in enumerate(zip(records, learnt, strict=True)):
        groups, rewards, first = [], [], place
        for again in range(most + 1):
            wanted = 4 - sum(spread for _, spread in groups)
            if not wanted:
                break
            where, count, seeds, found = next(rounds)
            assert (where, count) == (place, wanted), "the next ones of the order"
            assert seeds == ((SEED, 2**31 + again, number) if again else (SEED, number))
            for i in range(count):
                row = rows[endless_order(PROMPTS, SEED, place + i)]
                ids = [one.ids for one in found[i * GROUP : (i + 1) * GROUP]]
                texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
                scores = tiny.coarse_reward([row["prompt"]] * GROUP, texts, [row["wanted"]] * GROUP)
                rewards += scores
                groups.append((ids, len(set(scores)) > 1))
            place += wanted
        left = 4 - sum(spread for _, spread in groups)
        flat = [ids for ids, spread in groups if not spread][:left]
        want = [one for ids, spread in groups if spread or ids in flat for one in ids]
        assert learns == want
        assert record["dynamic_sample/prompts"] == place - first - 4 and record["dynamic_sample/left"] == left
        assert record["reward"] == pytest.approx(sum(rewards) / len(rewards)), "of all that were sampled"
        replaced, stayed = replaced + place - first - 4, stayed + left
    assert next(rounds, None) is None and replaced > 5
    assert stayed > 0 or most > 1


def test_an_epoch_has_as_many_steps_as_without(model, tmp_path):
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.prompt_rows(PROMPTS))
    settings = dict(max_steps=-1, num_train_epochs=1.0, reward_funcs=["tiny:coarse_reward"],
                    per_device_train_batch_size=3 * GROUP, num_generations=GROUP)  # fmt: skip
    ends = [
        metrics.read(train("grpo", tiny.online(GrpoRecipe, model, data, tmp_path / name, **settings, **more)).metrics)
        for name, more in (("off", {}), ("on", {"dynamic_sample": True}))
    ]
    assert [records[-1]["step"] for records in ends] == [4, 4]
    assert "dynamic_sample/prompts" not in ends[0][0]


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        (IterateRecipe, {}, "iterate leaves out prompts whose completions tie"),
        (PpoRecipe, {}, "ppo learns from equal rewards too"),
        (RlooRecipe, dict(baseline="none"), "needs baseline leave_one_out"),
        (GrpoRecipe, dict(num_generations=1), "needs num_generations above 1"),
        (GrpoRecipe, dict(reward_funcs=["human"]), "needs a scorer, not people"),
    ],
)
def test_where_it_makes_no_sense_it_is_refused(kind, settings, said, tmp_path):
    recipe = tiny.online(kind, tmp_path, tmp_path, tmp_path, dynamic_sample=True, **settings)
    with pytest.raises(BadInput, match=f"dynamic_sample = True .*{said}"):
        check(recipe)
