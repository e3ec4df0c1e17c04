"""`align eval`: scores are lm-eval's own, win rates those of a judge that is understood, and nothing is guessed."""

import json
import math
from functools import partial

import chat_server
import datasets
import eval_files
import huggingface_hub
import numpy as np
import pytest
import tiny
import torch
from scipy.optimize import minimize

from align_engine.assessment import eval as evaluation
from align_engine.assessment import intervals, judge
from align_engine.cli import main
from align_engine.preparation import endpoints
from align_engine.reports import benchmarks

LISTED = "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::ResourceWarning"
pytestmark = [pytest.mark.filterwarnings(one) for one in LISTED]  # lm-eval's and its packages'


@pytest.fixture
def align(capsys):
    def run(*arguments):
        code = main([str(one) for one in arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture(autouse=True)
def few_refits(monkeypatch):
    """Intervals of few resamples, but where they are looked at."""
    monkeypatch.setattr(intervals, "REFITS", 20)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return eval_files.write(tmp_path_factory.mktemp("tasks"))


def facts(out):
    return json.loads((out / "report.json").read_text())


def by_name(out):
    return {one["name"]: one for one in facts(out)["models"]}


# benchmarks


def test_scores_are_those_of_lm_evals_own_command(model, other_model, tasks, tmp_path, align):
    import lm_eval
    from lm_eval.tasks import TaskManager

    out = tmp_path / "out"
    command = ["eval", "--models", model, other_model, "--tasks", *tasks, "--output_dir", out]
    code, said, complaint = align(*command)
    assert code == 0, complaint
    found = by_name(out)
    for path in (model, other_model):
        own = lm_eval.simple_evaluate(
            model="hf", model_args={"pretrained": str(path)}, tasks=[str(one) for one in tasks], device="cpu",
            batch_size=16, task_manager=TaskManager(include_defaults=False),
        )["results"]  # fmt: skip
        for name in ("tiny_choice", "tiny_follow"):
            mine = found[str(path)]["tasks"][name]
            wanted = {key: value for key, value in own[name].items() if "," in key and "_stderr," not in key}
            assert mine["metrics"] == pytest.approx(wanted, abs=1e-12) and len(wanted) == 2
            assert mine["stderr"] == pytest.approx(own[name][f"{mine['metric']}_stderr,none"])
            assert mine["value"] == wanted[f"{mine['metric']},none"] and mine["examples"] == 40
    assert found[str(model)]["tasks"]["tiny_choice"]["chance"] == pytest.approx(1 / 3)
    assert found[str(model)]["tasks"] != found[str(other_model)]["tasks"]
    table = (out / "report.md").read_text()
    assert "| model | tiny_choice | tiny_follow |" in table and f"| {model} | " in table
    assert "data:image/png" in (out / "report.html").read_text()
    code, said, _ = align(*command)
    assert code == 0 and "nothing to do" in said


def test_a_task_more_goes_on_in_the_same_folder(model, tasks, tmp_path, align, monkeypatch):
    out = tmp_path / "out"
    assert align("eval", "--models", model, "--tasks", tasks[0], "--output_dir", out)[0] == 0
    asked = []
    measure = benchmarks.measure
    monkeypatch.setattr(
        benchmarks, "measure", lambda lm, task, *more: asked.append(task.asked) or measure(lm, task, *more)
    )
    assert align("eval", "--models", model, "--tasks", *tasks, "--output_dir", out)[0] == 0
    assert asked == [str(tasks[1])] and list(by_name(out)[str(model)]["tasks"]) == ["tiny_choice", "tiny_follow"]
    code, _, complaint = align("eval", "--models", model, "--tasks", *tasks, "--limit", 3, "--output_dir", out)
    assert code == 2 and "limit: None there, 3 now" in complaint


def test_what_is_measured_is_not_measured_again(model, other_model, tasks, tmp_path, align, monkeypatch):
    out = tmp_path / "out"
    assert align("eval", "--models", model, "--tasks", tasks[0], "--output_dir", out)[0] == 0
    read, reader = [], evaluation.reader
    monkeypatch.setattr(evaluation, "reader", lambda spec, *more: read.append(spec.name) or reader(spec, *more))
    assert align("eval", "--models", model, other_model, "--tasks", tasks[0], "--output_dir", out)[0] == 0
    assert read == [str(other_model)] and list(by_name(out)) == [str(model), str(other_model)]


def reads(model_path):
    """An endpoint's log-probs of a prompt's words, by a checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_path), AutoTokenizer.from_pretrained(model_path)

    def read(prompt):
        found = tokenizer(prompt, return_offsets_mapping=True)
        ids = torch.tensor([found["input_ids"]])
        with torch.no_grad():
            logps = model(ids).logits.log_softmax(-1)[0]
        mine = [None, *logps[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()]
        best = [None, *({str(i): value} for i, value in enumerate(logps[:-1].max(1).values.tolist()))]
        return {"tokens": prompt.split(), "text_offset": [start for start, _ in found["offset_mapping"]],
                "token_logprobs": mine, "top_logprobs": best}  # fmt: skip

    return read


def test_an_endpoint_that_serves_a_checkpoint_reaches_its_scores(model, tasks, tmp_path, align):
    with chat_server.serving(reads=reads(model), fails=0.0) as server:
        served = f"name=api,base_url={server.url}"
        code, _, complaint = align(
            "eval", "--models", model, served, "--tasks", *tasks, "--output_dir", tmp_path / "out"
        )
    assert code == 0, complaint
    found = by_name(tmp_path / "out")
    local, api = (found[name]["tasks"] for name in (str(model), "api"))
    assert api["tiny_choice"]["value"] == local["tiny_choice"]["value"]
    answers = [body for body in server.bodies if "messages" in body]
    assert len(answers) == 40 and {body["max_tokens"] for body in answers} == {8}
    assert api["tiny_follow"]["value"] == 0


def test_an_endpoint_without_log_probs_has_an_empty_cell_and_the_reason(model, tasks, tmp_path, align):
    with chat_server.serving() as server:
        code, _, complaint = align("eval", "--models", f"name=api,base_url={server.url}", "--tasks", *tasks,
                                   "--output_dir", tmp_path / "out")  # fmt: skip
    assert code == 0, complaint
    (one,) = facts(tmp_path / "out")["models"]
    assert list(one["tasks"]) == ["tiny_follow"] and "echo log-probs" in one["not_measured"][str(tasks[0])]
    assert "## Not measured" in (tmp_path / "out" / "report.md").read_text()


# a judge and checkers


PROMPTS = [
    {"prompt": f"Say w{i}.", "good": f"w{i} it is", "bad": "no " * (1 + i % 5), "wanted": f"w{i}"} for i in range(30)
]
CHECKER = """def holds(prompts, completions, wanted, **_):
    return [None if word == "w3" else float(word in text.split()) for text, word in zip(completions, wanted)]
"""


def told(body):
    """The request and the two answers that a judge is shown."""
    text = body["messages"][-1]["content"]
    first = text.split("[Answer A]\n")[1].split("\n[End of answer A]")[0]
    second = text.split("[Answer B]\n")[1].split("\n[End of answer B]")[0]
    return text.split("[Request]\n")[1].split("\n\n[Answer A]")[0], first, second


def fair(body, choice):
    """A judge that wants the word it was asked for; it says nothing readable of w7, and ties at w4."""
    request, first, _ = told(body)
    word = request.split()[1].rstrip(".")
    if word == "w7":
        return "I prefer [[A]] or perhaps [[B]]."
    if word == "w4":
        return "Both. [[C]]"
    return f"It says {word}.\n[[{'A' if word in first.split() else 'B'}]]"


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "checks.py").write_text(CHECKER)
    return tiny.write_rows(tmp_path / "prompts.jsonl", PROMPTS)


def judged(align, prompts, out, says, *more):
    with chat_server.serving(says=says) as server:
        done = align(
            "eval", "--models", "name=base,column=bad", "name=good,column=good", "--judge",
            f"name=judge,base_url={server.url}", "--dataset_name", prompts, "--output_dir", out, *more,
        )  # fmt: skip
    return done, server


def test_win_rates_ties_and_what_cannot_be_read(prompts, tmp_path, align):
    out = tmp_path / "out"
    (code, _, complaint), server = judged(align, prompts, out, fair, "--checkers", f"{tmp_path}/checks.py:holds")
    assert code == 0, complaint
    assert len(server.bodies) == 60, "each pair in both orders"
    good = by_name(out)["good"]
    assert good["judge"]["win_rate"]["value"] == pytest.approx((28 + 0.5) / 29)
    assert good["judge"]["win_rate"]["number"] == 29 and good["judge"]["no_verdict"] == 1
    rows = [json.loads(line) for line in (out / "judgements.jsonl").read_text().splitlines()]
    assert [row["score"] for row in rows] == [None if i == 7 else 0.5 if i == 4 else 1.0 for i in range(30)]
    assert by_name(out)["base"]["checkers"]["holds"]["value"] == 0
    assert good["checkers"]["holds"] == {"value": 1.0, "interval": [1.0, 1.0], "number": 29, "unscored": 1}
    assert "| good | 30 | 29 | 28 | 1 | 0 | 1 | 0% |" in (out / "report.md").read_text()


def test_a_judge_that_always_prefers_the_first_answer_says_nothing(prompts, tmp_path, align):
    (code, _, complaint), _ = judged(align, prompts, tmp_path / "out", lambda body, choice: "[[A]]")
    assert code == 0, complaint
    assert by_name(tmp_path / "out")["good"]["judge"]["win_rate"]["value"] == 0.5
    assert "| good | 30 | 30 | 0 | 30 | 0 | 0 | 100% |" in (tmp_path / "out" / "report.md").read_text()


def test_a_judge_that_answers_nonsense_is_one_sentence(prompts, tmp_path, align):
    (code, _, complaint), server = judged(align, prompts, tmp_path / "out", lambda body, choice: "I like tea.")
    assert code == 1 and complaint.count("\n") == 1
    assert "judge 'judge': none of its" in complaint and "'I like tea.'" in complaint
    assert len(server.bodies) < 60, "it is not asked on and on"
    (code, _, complaint), server = judged(align, prompts, tmp_path / "out", fair)
    assert code == 0, complaint
    assert len(server.bodies) == 60, "nonsense is asked again"


def test_verdicts_are_kept(prompts, tmp_path, align, monkeypatch):
    monkeypatch.setattr(endpoints, "ATTEMPTS", 1)
    asked, out = [], tmp_path / "out"

    def stops(body, choice):
        asked.append(body)
        return fair(body, choice) if len(asked) < 20 else 1 / 0

    (code, _, complaint), _ = judged(align, prompts, out, stops)
    kept = (out / "_judgements.jsonl").read_bytes().count(b"\n")
    assert code == 1 and 0 < kept < 20 and complaint.count("\n") == 1
    (code, _, _), server = judged(align, prompts, out, fair)
    assert code == 0 and 60 - kept <= len(server.bodies) <= 60 - kept + 2, "w7 is asked again"
    assert by_name(out)["good"]["judge"]["win_rate"]["number"] == 29


@pytest.mark.parametrize(("reply", "wanted"), [
    ("[[A]]", 1.0), ("so [[B]]", 0.0), ("[[C]]", 0.5), ("[[A]] yes [[A]]", 1.0), ("[[A]] no [[B]]", None), ("A", None),
    ("", None), ("[A]", None), ("[[a]]", None), ("[[D]]", None), ("**[[B]]**", 0.0),
])  # fmt: skip
def test_a_verdict_is_read_or_it_is_none(reply, wanted):
    assert judge.verdict(reply) == wanted
    assert judge.verdict(reply, "length") is None


# statistics


def planted(count, ability, slope, seed=0):
    """Wins by the model of length control, and lengths that favour the model."""
    rng = np.random.default_rng(seed)
    differences = rng.normal(80, 100, count)
    x = np.tanh(differences / differences.std())
    return (rng.random(count) < 1 / (1 + np.exp(-(ability + slope * x)))).astype(float), differences


def test_length_control_takes_out_what_length_alone_wins(monkeypatch):
    monkeypatch.setattr(intervals, "REFITS", 100)
    scores, differences = planted(3000, 0.0, 2.5)
    found = intervals.length_controlled(scores[:1500], differences[:1500])
    assert scores.mean() > 0.65 and found.interval[0] < 0.5 < found.interval[1]
    assert found.value == pytest.approx(0.5, abs=0.04)
    better = intervals.length_controlled(*planted(1500, 1.0, 0.0, 1))
    assert better.value == pytest.approx(1 / (1 + math.exp(-1)), abs=0.04)


def test_length_control_equals_the_likelihood_that_it_states():
    scores, differences = planted(60, 0.4, 1.0, 2)
    scores[::7] = 0.5
    x = np.tanh(differences / differences.std())

    def negative(ab):
        z = ab[0] + ab[1] * x
        return -(scores * -np.logaddexp(0, -z) + (1 - scores) * -np.logaddexp(0, z)).sum() + ab[1] ** 2 / 2

    wanted = 1 / (1 + math.exp(-minimize(negative, [0.0, 0.0], tol=1e-10).x[0]))
    assert intervals.length_controlled(scores, differences).value == pytest.approx(wanted, abs=1e-4)


def test_length_control_of_what_cannot_be_fitted():
    assert intervals.length_controlled(np.ones(5), np.arange(5.0)).value == 1
    assert intervals.length_controlled(np.array([1, 0, 1, 1.0]), np.zeros(4)).value == pytest.approx(0.75, abs=1e-3)
    assert intervals.length_controlled(np.array([]), np.array([])).number == 0


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng, held = np.random.default_rng(0), 0
    for _ in range(60):
        found = intervals.mean(rng.random(80) < 0.6)
        held += found.interval[0] <= 0.6 <= found.interval[1]
    assert held >= 51  # binomial(60, 0.95): less once in 2,000
    one, other = intervals.Estimate(0.5, (0.4, 0.6), 9), intervals.Estimate(0.2, (0.1, 0.4), 9)
    assert intervals.difference(one, other).interval == pytest.approx(
        (0.3 - math.hypot(0.1, 0.2), 0.3 + math.hypot(0.1, 0.1))
    )


# bad input


def test_what_is_not_there_is_one_sentence_before_anything_is_computed(
    model, tasks, prompts, tmp_path, align, monkeypatch
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    broken = tmp_path / "broken.yaml"
    broken.write_text(tasks[0].read_text().replace("choice.jsonl", "gone.jsonl"))
    away = tmp_path / "away.yaml"
    away.write_text("task: away\ndataset_path: nobody/no-such-data\noutput_type: multiple_choice\ntest_split: test\n"
                    "doc_to_text: a\ndoc_to_choice: b\ndoc_to_target: c\n")  # fmt: skip
    base = ("eval", "--models", model, "--output_dir", tmp_path / "out")
    for more, wanted in (
        (("--tasks", broken), "cannot be read"),
        (("--tasks", away), "its data are not on this machine"),
        (("--tasks", tmp_path / "none.yaml"), "there is no such file"),
        ((), "tasks = [] or judge, or checkers: say what to measure"),
        (("--judge", "name=j,base_url=http://127.0.0.1:1/v1"), "dataset_name = '' is required by judge"),
        (
            ("--judge", "name=j,base_url=http://127.0.0.1:1/v1", "--dataset_name", prompts),
            "it compares models, and one",
        ),
        (("--judge", f"name=j,path={model}", "--dataset_name", prompts), "judge 'j' needs base_url"),
        (("--checkers", "nothing.py:at_all", "--dataset_name", prompts), "nothing.py"),
        (("--tasks", tasks[0], "--apply_chat_template"), "has no chat template"),
    ):
        code, _, complaint = align(*base, *more)
        assert code == 2 and complaint.count("\n") == 1 and wanted in complaint, complaint
        assert not (tmp_path / "out").exists()
    code, _, complaint = align(
        "eval", "--models", tmp_path / "no-model", "--tasks", tasks[0], "--output_dir", tmp_path / "out"
    )
    assert code == 2 and "no-model" in complaint


def test_a_name_that_is_nearly_right(model, tasks, tmp_path, align, monkeypatch):
    import lm_eval.tasks

    own = partial(lm_eval.tasks.TaskManager, include_path=str(tasks[0].parent))  # without the thousands of its own
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **_: own(include_defaults=False))
    common = ("eval", "--models", model, "--include_path", tasks[0].parent, "--output_dir", tmp_path / "out", "--tasks")
    code, _, complaint = align(*common, "tiny_choise")
    assert code == 2 and "did you mean 'tiny_choice'?" in complaint
    assert align(*common, "tiny_choice")[0] == 0


# in training


def test_tasks_choose_the_best_checkpoint_and_leave_the_run_as_it_is(model, tasks, completions, tmp_path, align):
    common = ("sft", "--model_name_or_path", model, "--dataset_name", completions, "--max_steps", 6, "--save_steps", 2,
              "--logging_steps", 1, "--learning_rate", "3e-2", "--per_device_train_batch_size", 4)  # fmt: skip
    own = ("--eval_tasks", *tasks, "--eval_tasks_limit", 20, "--eval_steps", 2, "--load_best_model_at_end",
           "--metric_for_best_model", "tiny_choice/acc")  # fmt: skip
    assert align(*common, "--output_dir", tmp_path / "plain")[0] == 0
    code, said, complaint = align(*common, *own, "--output_dir", tmp_path / "run")
    assert code == 0, complaint
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = {one["step"]: one["eval_tiny_choice/acc"] for one in records if "eval_tiny_choice/acc" in one}
    assert list(scores) == [2, 4, 6] and len(set(scores.values())) > 1, scores
    best = max(scores, key=lambda step: (scores[step], -step))
    assert f"the model is that of step {best}" in said
    losses = [[one["loss"] for one in map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines())
               if "loss" in one] for run in ("plain", "run")]  # fmt: skip
    assert losses[0] == losses[1] and len(losses[0]) == 6
    assert align("eval", "--models", tmp_path / "run" / "final", "--tasks", *tasks, "--limit", 20,
                 "--output_dir", tmp_path / "eval")[0] == 0  # fmt: skip
    (after,) = facts(tmp_path / "eval")["models"]
    assert after["tasks"]["tiny_choice"]["value"] == pytest.approx(scores[best])


def test_eval_tasks_that_no_run_can_use(model, tasks, completions, pairs, tmp_path, align):
    for method, rows, more, wanted in (
        (
            "sft",
            completions,
            ("--eval_steps", 2, "--load_best_model_at_end"),
            "needs metric_for_best_model, as TASK/METRIC",
        ),
        ("sft", completions, ("--metric_for_best_model", "tiny_choice/f2"), "task 'tiny_choice' has acc, acc_norm"),
        ("rm", pairs, (), "a reward model writes no answers"),
    ):
        code, _, complaint = align(method, "--model_name_or_path", model, "--dataset_name", rows, "--max_steps", 1,
                                   "--output_dir", tmp_path / "run", "--eval_tasks", tasks[0], *more)  # fmt: skip
        assert code == 2 and wanted in complaint, complaint
        assert not (tmp_path / "run").exists()
