"""The pages of `align report`, `eval` and `diagnose` in Chromium: on a desk, on a phone, by the pointer and by keys."""

import contextlib
import math
import os
from pathlib import Path

import chromium
import numpy as np
import pytest

from align_engine import recipe as recipes
from align_engine.assessment import answers, diagnose_report, eval_report, judge, signs
from align_engine.assessment.diagnose_settings import DiagnoseRecipe
from align_engine.assessment.found import Found, Versus
from align_engine.assessment.intervals import mean
from align_engine.cli import main
from align_engine.preparation import generate
from align_engine.preparation.folder import ResultFolder
from align_engine.preparation.models import ModelSpec
from align_engine.recipe import GrpoRecipe
from align_engine.reports.benchmarks import Score
from align_engine.training.checkpoint import RunFolder

SHOTS = os.environ.get("ALIGN_SCREENSHOTS")  # a folder for pictures of the pages
STEPS = 40
KEYS = {"left": "\ue012", "escape": "\ue00c"}


def write_run(path, beta):
    """A run as its folder would stand, of an invented course."""
    recipe = GrpoRecipe()
    recipe.loss.beta, recipe.rollout.reward_funcs = beta, ["rewards.py:right"]
    folder = RunFolder(path, {"algorithm": "grpo", "steps": STEPS})
    folder.begin({}, False)
    recipes.save(recipe, path / "recipe.yaml")
    lines = [
        {
            "step": step,
            "reward": 1 - math.exp(-step / 20) * (1 + beta),
            "kl": step / 100,
            "loss": 0.1,
            "epoch": step / 10,
        }
        for step in range(1, STEPS + 1)
    ]
    folder.write_rows("metrics.jsonl", lines)
    texts = {1: "No \x1b[31midea <b>at all</b>", STEPS: "الجواب ٤٢، 四十二"}
    folder.write_rows("samples.jsonl", [
        {"step": step, "prompt": "What is six times seven? " * 9, "completion": text, "score": step / STEPS,
         "rewards": {"right": step / STEPS}} for step, text in texts.items()
    ])  # fmt: skip
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    place = tmp_path_factory.mktemp("pages")
    runs = [str(write_run(place / name, beta)) for name, beta in (("plain", 0.0), ("held-back", 0.1))]
    assert main(["report", *runs, "--output_dir", str(place / "out")]) == 0
    return (place / "out" / "report.html").as_uri()


def write_eval(path):
    """The page of `align eval`, of two invented models with a long name and a judge."""
    text = "An answer of some length, in أكثر من لغة. " * 30
    specs = [ModelSpec(name=name, column="c") for name in ("base", "runs/a-long-name/of-a-folder/final")]
    found = {one.name: Found(one) for one in specs}
    for i, one in enumerate(found.values()):
        for task in ("instruction_following", "common_sense"):
            one.scores[task] = Score(
                task, "acc", 0.4 + 0.2 * i, 0.05, 100, 0.25, {"acc,none": 0.4, "acc_norm,none": 0.5}
            )
        one.checked["rewards.py:right"] = mean([0.0, 1.0, 1.0])
        one.unscored["rewards.py:right"] = 2
    comparison = judge.Comparison(specs[1].name, 0, text, text, "no")
    judged = [judge.Judged(comparison, first, 1.0, ("because\n[[A]]", "[[B]]")) for first in (1.0, 0.5)]
    found[specs[1].name].versus = Versus(mean([1.0, 0.5]), mean([1.0, 0.5]), judged, (600.0, 2.0))
    found["base"].unable["hellaswag"] = "multiple choice needs an endpoint whose /completions echo log-probs " * 3
    with folder_of(path, "eval") as place:
        eval_report.write(place, found, ModelSpec(name="judge", base_url="http://127.0.0.1:1/v1"))


def write_diagnosis(path):
    """The page of `align diagnose`, of invented numbers."""
    rng = np.random.default_rng(0)
    found = [
        signs.benchmarks({"facts": mean(rng.random(80))}, {"facts": 0.25}, mean(rng.random(80) / 9), None),
        signs.toxic(rng.random((60, 3)), "toxic", rng.random((60, 1)) / 3, "reference answers"),
        *(signs.missing(name, signs.TITLES[name], "give encoder") for name in ("variance", "closeness")),
        signs.loss(range(20), [1.0] * 20, range(20), rng.random(20), "rewards/judge/mean"),
    ]
    prompt = generate.Prompt([{"role": "user", "content": "What? " * 40}], {}, {})
    asked = answers.Asked(dict.fromkeys(range(3), prompt), {})
    settings = DiagnoseRecipe()
    settings.patient.model_name_or_path, settings.data.dataset_name = "runs/a-long-name/of-a-folder/final", "p.jsonl"
    texts = {"model": [["This. " * 90, "That."]] * 3}
    with folder_of(path, "diagnose") as place:
        diagnose_report.write(place, settings, found, texts, asked)


@contextlib.contextmanager
def folder_of(path, command):
    place = ResultFolder(path, {"command": command})
    with place.locked():
        place.begin({}, False)
        yield place


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with chromium.started(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.mark.parametrize("write", [write_eval, write_diagnosis])
def test_pages_of_eval_and_diagnose_read_well(write, driver, tmp_path):
    write(tmp_path / "out")
    for screen in ("DESKTOP", "PHONE"):
        chromium.size(driver, getattr(chromium, screen))
        driver.get((tmp_path / "out" / "report.html").as_uri())
        driver.execute_script("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert chromium.overflow(driver) <= 0 and chromium.faults(driver) == []
        assert len(driver.find_elements("css selector", ".figures img")) >= 3
        if SHOTS:
            driver.save_screenshot(str(Path(SHOTS) / f"{write.__name__}-{screen.lower()}.png"))


@pytest.mark.parametrize("screen", ["DESKTOP", "PHONE"])
def test_it_reads_well_on_a_screen(screen, driver, page):
    chromium.size(driver, getattr(chromium, screen))
    driver.get(page)
    assert chromium.overflow(driver) <= 0 and chromium.faults(driver) == []
    fetched = "return performance.getEntriesByType('resource').map(one => one.name)"
    assert [name for name in driver.execute_script(fetched) if not name.startswith("data:")] == []
    sizes = "return [...document.querySelectorAll('.plot img')].map(one => [one.naturalWidth, one.clientWidth])"
    drawn = driver.execute_script(sizes)
    assert len(drawn) >= 3 and all(min(pair) > 200 for pair in drawn)
    if SHOTS:
        driver.save_screenshot(str(Path(SHOTS) / f"report-{screen.lower()}.png"))


def test_a_curve_says_its_numbers(driver, page):
    chromium.size(driver, chromium.DESKTOP)
    driver.get(page)
    plot = driver.find_element("css selector", ".plot")
    tip = plot.find_element("css selector", ".tip")
    assert not tip.is_displayed()
    driver.execute_script("arguments[0].focus()", plot)
    last = 1 - math.exp(-2)
    assert tip.is_displayed() and f"step 40\n■ plain: {last:.4g}\n" in tip.text, tip.text
    chromium.press(driver, KEYS["left"])
    assert f"step 39\n■ plain: {1 - math.exp(-39 / 20):.4g}\n■ held-back: " in tip.text
    chromium.press(driver, KEYS["escape"])
    assert not tip.is_displayed()
    move = """const box = arguments[0].getBoundingClientRect();
        arguments[0].dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width * arguments[1]}));"""
    steps = []
    for part in (0.0, 0.5, 1.0):
        driver.execute_script(move, plot, part)
        steps.append(int(tip.text.split("\n")[0].removeprefix("step ")))
    assert steps[0] == 1 and 15 < steps[1] < 26 and steps[2] == 40
