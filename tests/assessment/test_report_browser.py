"""The page of `align report` in Chromium: on a desk and on a phone, by the pointer and by keys."""

import math
import os
from pathlib import Path

import chromium
import pytest

from align_engine import recipe as recipes
from align_engine.cli import main
from align_engine.recipe import GrpoRecipe
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


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with chromium.started(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


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
