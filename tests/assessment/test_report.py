"""`align report`: every number against the run's own files; stopped, killed and unbegun runs have a page too."""

import base64
import html
import json
import re
from pathlib import Path

import pytest
import tiny
from runs import cut_off

from align_engine.assessment import report_answers, report_runs
from align_engine.cli import main
from align_engine.iterate import iterate
from align_engine.preparation.report import markdown
from align_engine.recipe import GrpoRecipe, IterateRecipe, PpoRecipe, RlooRecipe
from align_engine.reports import legend, results
from align_engine.reports.history import read_run
from align_engine.reports.report import Table
from align_engine.run import train
from align_engine.training import metrics
from align_kernels.losses import registry

METRICS = Path(__file__).parents[2] / "docs" / "metrics.md"
SHORT = dict(max_steps=2, per_device_train_batch_size=4)
ONLINE = {  # what makes the online methods write all that they can
    "rloo": (RlooRecipe, [dict(beta=0.1, num_iterations=2)]),
    "ppo": (PpoRecipe, [dict(kl_target=0.5)]),
    "grpo": (GrpoRecipe, [
        dict(beta=0.1, num_iterations=2, dynamic_sample=True, vllm_importance_sampling_correction=True),
        dict(loss_type="cispo", epsilon_high=5.0), dict(loss_type="vespo"), dict(loss_type="gmpo"),
    ]),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def pair_runs(place):
    """Two runs of dpo with other betas, the second stopped at its sixth step."""
    model = tiny.write_model(place / "model")
    rows = tiny.write_rows(place / "pairs.jsonl", tiny.preference_rows(12))
    settings = dict(eval_dataset_name=str(rows), eval_steps=4, max_steps=8, save_steps=3, per_device_train_batch_size=4)
    train("dpo", tiny.dpo(model, rows, place / "a" / "run", **settings))
    cut_off("dpo", tiny.dpo(model, rows, place / "b" / "run", beta=0.4, **settings), step=6)
    with (place / "b" / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    return [place / "a" / "run", place / "b" / "run"]


@pytest.fixture(scope="module")
def online_run(place):
    model = tiny.write_model(place / "model")
    rows = tiny.write_rows(place / "prompts.jsonl", tiny.prompt_rows(6))
    settings = dict(max_steps=6, eval_dataset_name=str(rows), eval_steps=2, num_generations=2, learning_rate=5e-2)
    return train("grpo", tiny.online(GrpoRecipe, model, rows, place / "grpo", **settings)).path


def align(*arguments):
    return main(["report", *map(str, arguments)])


def read(out):
    return json.loads((out / "report.json").read_text()), (out / "report.html").read_text("utf-8")


def points(page):
    """Of each picture, the points under the pointer, by curve."""
    found = [json.loads(html.unescape(text)) for text in re.findall(r'data-points="([^"]*)"', page)]
    return [{one["name"]: one["points"] for one in figure["series"]} for figure in found]


def test_two_runs_side_by_side_say_what_their_files_say(pair_runs, tmp_path):
    out = tmp_path / "out"
    assert align(*pair_runs, "--output_dir", out) == 0
    facts, page = read(out)
    assert [run["name"] for run in facts["runs"]] == ["a/run", "b/run"]
    for told, path in zip(facts["runs"], pair_runs):
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().split("\n") if line.endswith("}")]
        for name in ("loss", "rewards/margins", "eval_loss"):
            values = [line[name] for line in lines if name in line]
            said = told["metrics"][name]
            assert (said["first"], said["last"]) == (values[0], values[-1])
            assert (said["min"], said["max"]) == (min(values), max(values))
        assert told["evaluations"] == sum("eval_loss" in line for line in lines)
    assert facts["runs"][0]["finished"] and facts["runs"][0]["state"] == "finished after step 8"
    state = "not finished: logged up to step 6 of 8, last checkpoint checkpoint-000006"
    assert facts["runs"][1]["state"] == state and state in page
    assert facts["differences"] == [{"setting": "beta", "a/run": 0.1, "b/run": 0.4}]
    (loss,) = [one for one in points(page) if "a/run, loss" in one]
    assert [step for step, _ in loss["b/run, loss"]] == [1, 2, 3, 4, 5, 6]
    assert loss["a/run, loss"][0] == [1, "0.6931"], "ln 2 before the first step"
    assert "a/run fell from 0.6931 at step 1" in page and "as it should" in page


def test_a_page_needs_nothing_from_outside_and_reads_without_its_pictures(pair_runs, tmp_path):
    assert align(*pair_runs, "--output_dir", tmp_path / "out") == 0
    _, page = read(tmp_path / "out")
    assert not re.search(r'(src|href)="(?!data:|#)', page) and "@import" not in page and "url(" not in page
    images = re.findall(r'<img alt="([^"]*)" src="data:image/svg\+xml;base64,([^"]*)"', page)
    assert len(images) == page.count("<img") > 6
    for alt, picture in images:
        assert len(alt) > 60, "the words say what the picture shows"
        assert base64.b64decode(picture).decode().lstrip().startswith("<?xml")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## Curves" in text and legend.LEGEND["rewards/margins"].means in text and "<img" not in text


def test_samples_first_and_last_are_of_the_same_prompts(online_run, tmp_path):
    assert align(online_run, "--output_dir", tmp_path / "out") == 0
    facts, page = read(tmp_path / "out")
    rows = [row for row in metrics.read(online_run / "samples.jsonl") if row.get("eval")]
    told = facts["runs"][0]["samples"]
    assert len(told) == 12
    for first, last in zip(told[::2], told[1::2]):
        own = [row for row in rows if row["prompt"] == first["prompt"]]
        assert (first, last) == (own[0], own[-1]) and (first["step"], last["step"]) == (2, 6)
    assert page.count("<article") == 12 and "word_reward" in page


def test_without_a_prompt_asked_twice_both_ends_are_shown(tmp_path, online_run):
    rows = [{"step": step, "prompt": f"w{step}", "completion": "w1", "score": 1.0, "rewards": {}} for step in (1, 2, 3)]
    run = read_run(online_run, "run")._replace(samples=rows)
    assert [row["step"] for row in report_answers.ends_of(run)] == [1, 3] and not report_answers.pairs_of(run)
    (part,) = report_answers.first_and_last([run])
    assert [one.answers[0].who for one in part.beside] == ["step 1", "step 3"]


def test_rounds_of_iterate(place, tmp_path):
    model = tiny.write_model(place / "model")
    rows = tiny.write_rows(place / "asked.jsonl", tiny.prompt_rows(6))
    recipe = tiny.online(IterateRecipe, model, rows, place / "iterate", rounds=2, max_steps=3)
    run = iterate(recipe).path
    assert align(run, "--output_dir", tmp_path / "out") == 0
    facts, page = read(tmp_path / "out")
    (told,), lines = facts["runs"], metrics.read(run / "metrics.jsonl")
    assert told["state"] == "finished after round 2" and len(told["rounds"]) == 2
    assert told["metrics"]["reward"]["last"] == lines[1]["reward"]
    told_of = told["metrics"]
    assert told_of["rewards/rejected"]["should"] == "up", "the rounds' worst answers get better too"
    assert told_of["logps/rejected"]["should"] == "down" and "<b>rewards/rejected</b>: Mean implicit" in page
    (loss,) = [one for one in points(page) if set(one) == {"loss"}]
    assert [step for step, _ in loss["loss"]] == [1, 2, 3, 4, 5, 6], "one round behind the other"
    (reward,) = [one for one in points(page) if "reward" in one]
    assert [step for step, _ in reward["reward"]] == [1, 2]
    assert told["samples"][0]["step"] == 1 and told["samples"][1]["step"] == 2


def test_a_run_that_has_logged_nothing_yet_has_a_page(pair_runs, tmp_path):
    run = tmp_path / "young"
    run.mkdir()
    for name in ("run.json", "recipe.yaml"):
        (run / name).write_text((pair_runs[1] / name).read_text())
    assert align(run, "--output_dir", tmp_path / "out") == 0
    facts, page = read(tmp_path / "out")
    assert facts["runs"][0]["state"] == "not finished: nothing logged yet" and "beta" in page


def test_measured_tasks_and_metrics_of_plugins_have_their_curves(pair_runs, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("run.json", "recipe.yaml"):
        (run / name).write_text((pair_runs[0] / name).read_text())
    lines = [{"step": step, "eval_ifeval/acc": step / 8, "mine": None} for step in (4, 8)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert align(run, "--output_dir", tmp_path / "out") == 0
    facts, page = read(tmp_path / "out")
    assert {"eval_ifeval/acc": [[4, "0.5"], [8, "1"]]} in points(page) and report_runs.UNKNOWN in page
    assert facts["runs"][0]["metrics"]["mine"]["last"] is None and "not finite" in page


def test_the_same_command_writes_it_anew(pair_runs, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    for name in ("run.json", "recipe.yaml", "metrics.jsonl"):
        (run / name).write_text((pair_runs[0] / name).read_text())
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text[: len(text) // 2])
    assert align(run, "--output_dir", out) == 0
    before = read(out)[0]["runs"][0]["step"]
    (run / "metrics.jsonl").write_text(text)
    assert align(run, "--output_dir", out) == 0 and before < read(out)[0]["runs"][0]["step"] == 8


def test_what_a_run_learnt_from_is_traced(place, tmp_path):
    ranked = [{"prompt": f"w{i}", "completion": f"w{j} w1", "rank": j} for i in range(6) for j in (1, 2)]
    rows = tiny.write_rows(tmp_path / "ranked.jsonl", ranked)
    assert main(["pairs", "--dataset_name", str(rows), "--output_dir", str(tmp_path / "pairs")]) == 0
    train("dpo", tiny.dpo(tiny.write_model(place / "model"), tmp_path / "pairs", tmp_path / "run"))
    given = tmp_path / "scores"
    given.mkdir()
    found = [{"task": "ifeval", "score": 0.25}, {"task": "logic", "score": 0.5}]
    (given / "report.json").write_text(json.dumps({"lead": "\x1b[2J<b>", "tasks": found, "deep": {"a": {"x": 1}}}))
    assert align(tmp_path / "run", "--with", given, "--output_dir", tmp_path / "out") == 0
    facts, page = read(tmp_path / "out")
    assert [one["command"] for one in facts["results"]] == ["pairs", ""]
    assert "Data: pairs (align pairs)" in page and "ifeval" in page
    lead = (tmp_path / "pairs" / "report.md").read_text().split("\n\n")[1]
    assert lead in html.unescape(page) and page.index("<td>ifeval</td>") > page.index("Findings: scores")
    assert r"\x1b[2J&lt;b&gt;" in page and "\x1b" not in page


def test_results_of_one_command_stand_side_by_side(tmp_path):
    found = []
    for name, score in (("sft", 0.25), ("dpo", 0.5)):
        facts = {"tasks": [{"task": "ifeval", "score": score, "n": 40}], "mean": score, "model": name}
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(facts))
        found.append(results.read_result(tmp_path / name))
    table = results.comparison(found)
    assert list(table.header) == ["figure", "sft", "dpo"]
    assert [tuple(row) for row in table.rows] == [
        ("tasks ifeval score", 0.25, 0.5), ("tasks ifeval n", 40, 40), ("mean", 0.25, 0.5),
    ]  # fmt: skip
    figures, tasks = found[0].tables
    assert figures.rows == [("mean", 0.25), ("model", "sft")] and tasks.rows == [["ifeval", 0.25, 40]]


def test_markdown_is_told_again():
    tables = [Table("Models | and more", ("model", "rate"), [("a|b", 0.25), ("two\nlines", 7)]),
              Table("Many", ("n",), [(i,) for i in range(40)])]  # fmt: skip
    lead, found = results.told(markdown("A title", "All in all.\nIt is so.", tables))
    assert lead == "All in all.\nIt is so."
    assert found[0] == Table("Models | and more", ["model", "rate"], [["a|b", "0.25"], ["two\nlines", "7"]])
    assert found[1].title == "Many (the first 15 of 40)" and len(found[1].rows) == 15
    assert results.told("") == ("", []) and results.told("# One\n\n| a |\n") == ("| a |", [])


@pytest.mark.parametrize(
    ("y", "way"),
    [([1, 2, 3], "up"), ([3.0, 1.0, 2.0], "down"), ([1.0, 5.0, 1.2], "level"), ([2, 2], "level"),
     ([0.5] * 9 + [9] + [0.5] * 10, "level"), (list(range(40, 0, -1)), "down"),
     ([5] + [0] * 10 + [4] * 9, "level")],
)  # fmt: skip
def test_which_way_a_curve_goes(y, way):
    assert report_runs.way(y) == way


def test_a_course_that_is_not_as_it_should_be_says_so():
    said = report_runs.course("rewards/accuracies", [1, 9], [0.75, 0.5])
    assert said == "it fell from 0.75 at step 1 to 0.5 at step 9, though it should rise."
    assert report_runs.course("grad_norm", [1, 2], [1.0, 9.0]).endswith("to 9 at step 2.")
    said = [report_runs.course("loss", [1, 2], [1.0, 2.0], method, "a/run") for method in ("dpo", "grpo")]
    assert said[0] == "a/run rose from 1 at step 1 to 2 at step 2, though it should fall."
    assert said[1] == "a/run rose from 1 at step 1 to 2 at step 2.", "its height says nothing"
    said = report_runs.course("kl", [1, 2, 3], [1.0, 5.0, 1.1], x_label="round")
    assert said == "it ended about where it began: 1 at round 1, 1.1 at round 3."
    assert report_runs.course("kl", [4], [2.0]) == "it is 2 at step 4."


def test_refusals_write_nothing(pair_runs, place, tmp_path, capsys):
    def said(*arguments):
        assert align(*arguments, "--output_dir", tmp_path / "out") == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "runs = [] is required" in said()
    assert "holds no run: there is no run.json" in said(place)
    assert "names a run twice" in said(pair_runs[0], pair_runs[0])
    assert "there is no report.json" in said(pair_runs[0], "--with", place)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "report.json").write_text("{")
    assert "is not readable JSON" in said(pair_runs[0], "--with", broken)
    assert align(pair_runs[0], "--output_dir", pair_runs[0]) == 2
    assert "is or holds runs" in capsys.readouterr().err
    assert align(pair_runs[0], "--output_dir", tmp_path / "made") == 0
    assert "the result of align report: give it as --with" in said(tmp_path / "made")


def written(folder):
    return {name for path in folder.rglob("metrics.jsonl") for line in metrics.read(path) for name in line} - {"step"}


@pytest.mark.parametrize("method", [*tiny.OFFLINE, *ONLINE, "iterate"])
def test_every_metric_that_a_method_writes_has_its_line(method, place, tmp_path):
    model = tiny.write_model(place / "model")
    if method in tiny.OFFLINE:
        rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.OFFLINE[method][1](4))
        kinds = [{}, {"loss_type": "apo_zero_unpaired"}] if method == "kto" else [{}]
        for i, more in enumerate(kinds):
            settings = SHORT | dict(eval_dataset_name=str(rows)) | more
            train(method, tiny.offline(method, model, rows, tmp_path / f"{i}", **settings))
    elif method == "iterate":
        rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.prompt_rows(4))
        iterate(tiny.online(IterateRecipe, model, rows, tmp_path / "0", rounds=1, **SHORT))
    else:
        rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.prompt_rows(4))
        for i, more in enumerate(ONLINE[method][1]):
            settings = SHORT | dict(eval_dataset_name=str(rows), num_generations=2) | more
            train(method, tiny.online(ONLINE[method][0], model, rows, tmp_path / f"{i}", **settings))
    found = written(tmp_path)
    assert len(found) > 10 and [name for name in sorted(found) if legend.line(name, method) is None] == []


def test_every_metric_that_a_loss_returns_has_its_line():
    registered = {**registry.LOSSES, **registry.UNLISTED}
    names = {name for loss in registered.values() if loss.fn.__module__.startswith("align_kernels.losses.")
             for name in loss.metrics}  # fmt: skip
    assert len(names) > 10 and {name for name in names if legend.line(name) is None} == set()
    assert legend.line("my_metric") is None and legend.line("eval_my_metric") is None
    said = legend.line("eval_loss", "dpo")
    assert said and said.means.startswith("On held-out rows: what the optimiser")
    assert legend.line("rewards/my/scorer/mean") is legend.LEGEND["rewards/*/mean"]
    assert legend.line("rewards/chosen", "rm") is legend.OF_METHOD["rm"]["rewards/chosen"]


def test_the_docs_hold_the_legend():
    assert legend.markdown().replace("<", "&lt;") in METRICS.read_text()
