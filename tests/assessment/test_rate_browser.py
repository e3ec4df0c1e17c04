"""`align rate` in Chromium: from a file over two people at their keyboards to a training, a phone, and bad answers."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import chromium
import pytest
import ratings
import tiny
import uvicorn
from chromium import press, until

from align_engine.assessment.rate import pages, people, records, serve
from align_engine.assessment.rate.items import Answer, Item
from align_engine.assessment.rate.store import Store
from align_engine.recipe import DpoRecipe, KtoRecipe, RlooRecipe
from align_engine.rollouts import rewards
from align_engine.run import train
from align_engine.training import metrics

ROOT = Path(__file__).parents[2]
SHOTS = os.environ.get("ALIGN_SCREENSHOTS")  # a folder for pictures of the pages
LONG = "word " * 600
KEYS = {"escape": "\ue00c", "enter": "\ue007", "backspace": "\ue003"}


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with chromium.started(tmp_path_factory.mktemp("profile")) as driver:
        chromium.size(driver, chromium.DESKTOP)
        yield driver


@pytest.fixture
def served(tmp_path):
    """Makes (store, address) of a project that is served in this process."""
    with contextlib.ExitStack() as stack:

        def make(found, **settings):
            store = ratings.project(tmp_path / "p", found, **settings)
            stack.enter_context(serve.handing(store))
            bound = serve.listening("127.0.0.1", 0)
            server = uvicorn.Server(uvicorn.Config(pages.app(store), log_level="error", lifespan="off"))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
            thread.start()

            def stop():
                server.should_exit = True
                thread.join()
                bound.close()
                store.close()

            stack.callback(stop)
            return store, f"http://127.0.0.1:{bound.getsockname()[1]}"

        yield make


def enter(driver, store, address, name):
    driver.delete_all_cookies()
    driver.get(f"{address}/enter/{people.link(store, name, 1)}")


def standing(driver):
    """(task, version) of the page, once it is there whole; ("", "") where nothing is left."""
    script = """if (document.readyState !== 'complete') return null;
        const field = name => document.querySelector(`input[name=${name}]`)?.value || '';
        return document.querySelector('main') && [field('task'), field('version')];"""
    return tuple(until(lambda: driver.execute_script(script), "the page"))


def by_key(driver, *keys):
    """Press keys, and wait for the page that they bring."""
    before = standing(driver)
    press(driver, *keys)
    until(lambda: standing(driver) != before, f"another item after {keys}")


def texts(driver):
    return driver.execute_script("return [...document.querySelectorAll('.answer .text')].map(e => e.innerText.trim())")


def shot(driver, name):
    """Pictures for whoever looks at the pages."""
    if SHOTS:
        for screen, size in (("desktop", chromium.DESKTOP), ("phone", chromium.PHONE)):
            chromium.size(driver, size)
            driver.save_screenshot(str(Path(SHOTS) / f"{name}-{screen}.png"))
        chromium.size(driver, chromium.DESKTOP)


@pytest.fixture
def command(tmp_path):
    """Starts `align rate`: (process, what it has printed up to the last line)."""
    started = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-m", "align_engine", "rate", *map(str, arguments)], text=True, cwd=ROOT,
            stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        )  # fmt: skip
        started.append(process)
        said = ""
        while not said.endswith("goes on.\n"):
            line = process.stdout.readline()
            assert line, f"align rate has ended: {said}"
            said += line
        return process, said

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_from_a_file_to_a_training(driver, command, model, tmp_path):
    """The lead makes a project, two assessors rate 40 items each by keyboard alone, the server is killed in between,
    agreement is shown, and `align dpo` and `align kto` learn what they said."""
    rows = [{"prompt": f"{one['prompt']} w{i}", "completion": one[side]}
            for i, one in enumerate(tiny.preference_rows(40)) for side in ("chosen", "rejected")]  # fmt: skip
    data, project = tiny.write_rows(tmp_path / "answers.jsonl", rows), tmp_path / "project"
    process, said = command("--dataset_name", data, "--project_dir", project, "--assessors", "anna", "борис",
                            "--k", 2, "--port", 0)  # fmt: skip
    links = dict(re.findall(r"^  (\w+): (http\S+)$", said, re.M))
    assert list(links) == ["lead", "anna", "борис"] and "40 items (mode pair)" in said
    port = re.search(r":(\d+)/enter", said)[1]
    for name in ("anna", "борис"):
        driver.delete_all_cookies()
        driver.get(links[name])
        for number in range(40):
            if name == "anna" and number == 20:
                process.send_signal(signal.SIGKILL)
                process.wait()
                press(driver, "1")  # nobody there
                until(lambda: driver.execute_script("return !document.querySelector('input[name=task]')"), "an error")
                process, said = command("--project_dir", project, "--port", port)
                assert "enter" not in said, "links are shown once"
                driver.get(f"http://127.0.0.1:{port}/")
            good = [text.startswith("w1") for text in texts(driver)].index(True) + 1
            wrong = name == "борис" and number < 4
            by_key(driver, str(3 - good if wrong else good))
        assert "Nothing left to rate" in driver.page_source
    driver.delete_all_cookies()
    driver.get(links["lead"])
    text = driver.execute_script("return document.body.innerText")
    assert "40 of 40 items finished" in text and "80\nmarks given, 0 missing" in text and "90 %" in text
    alpha = float(re.search(r"([\d.]+)\nKrippendorff", text)[1])
    assert alpha == 0.8
    shot(driver, "lead")
    assert chromium.faults(driver) == []
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    found = [mark for record in records.read(Store(project)) for mark in record.marks]
    assert len(found) == 80, "none lost, none twice"

    from align_engine.assessment import ratings as export
    from align_engine.assessment.rate.sections import RatingsRecipe

    for to, kind, method in (("pairs", DpoRecipe, "dpo"), ("marks", KtoRecipe, "kto")):
        asked = RatingsRecipe()
        asked.ratings.project_dir, asked.ratings.to, asked.output.output_dir = str(project), to, str(tmp_path / to)
        export.run(asked)
        recipe = tiny.recipe(kind, model, tmp_path / to, tmp_path / method, max_steps=20, learning_rate=3e-3)
        folder = train(method, recipe)
        last = metrics.read(folder.metrics)[-1]
        assert last["rewards/chosen"] > last["rewards/rejected"], "it has learnt what people prefer"
    assert len((tmp_path / "pairs" / "rows.jsonl").read_text().splitlines()) == 36, "four ties"


SHOWN = [
    Item("Напиши функцию, которая складывает два числа.", [
        Answer("Конечно:\n\n```python\ndef add(a: int, b: int) -> int:\n    return a + b\n```\n\n- **да**", {}),
        Answer("`lambda a, b: a + b` " + LONG, {})]),
    Item("اكتب جملة قصيرة عن البحر.", [
        Answer("البحر **أزرق** وواسع.\n\n1. موج\n2. ريح", {}), Answer("שלום, הים כחול", {})]),
    Item("请比较两种排序算法。", [
        Answer("| 算法 | 时间 |\n|---|---|\n| 归并 | O(n log n) |", {}),
        Answer("# 标题\n\n快速排序 " + "x" * 500, {})]),
]  # fmt: skip


def test_texts_of_any_script_on_a_desktop_and_a_phone(driver, served):
    store, address = served(SHOWN, guideline=str(ROOT / "LICENSE"))
    enter(driver, store, address, "anna")
    for number in range(3):
        right = driver.execute_script("""return [...document.querySelectorAll('.prompt p, .answer p')].filter(
            e => getComputedStyle(e).direction === 'rtl' || getComputedStyle(e.closest('.text')).direction === 'rtl')
            .map(e => e.innerText)""")
        assert all(re.search("[\u0590-\u06ff]", text) for text in right)
        assert bool(right) == bool(re.search("[\u0590-\u06ff]", " ".join(texts(driver))))
        shot(driver, f"pair-{number}")
        for screen in (chromium.DESKTOP, chromium.PHONE):
            chromium.size(driver, screen)
            assert chromium.overflow(driver) <= 0
            bar = driver.execute_script("const b = document.querySelector('.bar').getBoundingClientRect();"
                                        "return [b.top, b.bottom, window.innerHeight]")  # fmt: skip
            assert bar[0] < bar[2] and bar[1] <= bar[2] + 1, "the buttons are in sight"
        small = driver.execute_script("return [...document.querySelectorAll('button')].filter("
                                      "b => b.getBoundingClientRect().height < 40).length")  # fmt: skip
        assert small == 0, "a thumb finds them"
        assert chromium.faults(driver) == []
        before = standing(driver)
        driver.find_element("css selector", "button[value='1']").click()
        until(lambda before=before: standing(driver) != before)
    chromium.size(driver, chromium.DESKTOP)


@pytest.mark.parametrize(("mode", "found", "keys", "value"), [
    ("mark", ratings.singles(3), ["0"], [0]), ("score", ratings.singles(3), ["4"], [4]),
    ("pair", ratings.pairs(3), ["0"], [1, 1]),
    ("rank", ratings.ranked(3, 3), ["1", "2", KEYS["backspace"], "3", "=", "2", KEYS["enter"]], None),
])  # fmt: skip
def test_every_mode_by_keyboard_alone(mode, found, keys, value, driver, served):
    store, address = served(found, mode=mode)
    enter(driver, store, address, "anna")
    press(driver, "c")
    press(driver, "1", "s", "u", " ö")  # these are words now
    press(driver, KEYS["escape"])
    shot(driver, mode)
    assert chromium.faults(driver) == []
    by_key(driver, *keys)
    (mark,) = [mark for record in records.read(store) for mark in record.marks]
    assert mark.comment == "1su ö"
    wanted = [[1, 2, 2][[0, 2, 1].index(mark.shown.index(number))] for number in range(3)] if mode == "rank" else value
    assert mark.value == wanted, "the first on the page before the third, which is tied with the second"
    by_key(driver, "u")
    assert driver.execute_script("return document.querySelector('textarea').value") == "1su ö"
    by_key(driver, "s")
    by_key(driver, "s")
    by_key(driver, *keys)
    assert standing(driver) == ("", "") and "2 skipped" in driver.page_source
    assert chromium.faults(driver) == []
    by_key(driver, "u")
    assert sum(mark.value is not None for record in records.read(store) for mark in record.marks) == 0


def test_a_run_of_rloo_waits_for_people_and_goes_on_by_itself(driver, served, model, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "EVERY", 0.1)
    monkeypatch.setattr(rewards, "SETTLED", 0.05)
    store, address = served([], mode="score", run_dir=str(tmp_path / "run"))
    enter(driver, store, address, "anna")
    assert "Nothing left to rate" in driver.page_source
    prompts = tiny.write_rows(tmp_path / "prompts.jsonl", tiny.prompt_rows(4))
    recipe = tiny.online(RlooRecipe, model, prompts, tmp_path / "run", reward_funcs=["human"], wait_for_marks=True,
                         max_steps=2)  # fmt: skip
    run = threading.Thread(target=train, args=("rloo", recipe))
    run.start()
    while run.is_alive():
        if standing(driver) == ("", ""):
            driver.get(address)  # as the page does by itself, every five seconds
        else:
            by_key(driver, str(1 + len(texts(driver)[0]) % 5))
    run.join()
    found = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in found] == [1, 2] and (tmp_path / "run" / "final").is_dir()
    for number, record in enumerate(found):
        rows = (tmp_path / "run" / "marks" / f"rollout-{number:06d}.jsonl").read_text().splitlines()
        given = [json.loads(row) for row in rows]
        assert all(row["score"] == 1 + len(row["completion"]) % 5 for row in given if row["completion"])
        assert record["reward"] == pytest.approx(sum(row["score"] for row in given) / len(given))


def test_answers_do_nothing_and_two_tabs_agree(driver, served):
    script = "<script>document.title = 'in'</script><img src=x onerror=\"document.title = 'in'\">"
    bad = Item(script, [Answer(f"{i} {script} [l](javascript:document.title='in') \x1b[2J", {}) for i in range(2)])
    store, address = served([bad, *ratings.pairs(2)], question=script)
    enter(driver, store, address, "anna")
    first = driver.current_window_handle
    for _ in range(3):
        assert driver.title != "in" and driver.execute_script("return document.images.length") == 0
        driver.switch_to.new_window("tab")
        driver.get(address)
        before = standing(driver)
        driver.switch_to.window(first)
        assert standing(driver) == before, "both tabs show the same"
        by_key(driver, "1")
        driver.switch_to.window(driver.window_handles[-1])
        by_key(driver, "2")  # of a page that is out of date
        assert "rated already" in driver.page_source
        driver.close()
        driver.switch_to.window(first)
    assert [mark.value[mark.shown[0]] for record in records.read(store) for mark in record.marks] == [1, 1, 1]
    assert "No entry" not in driver.page_source
    driver.delete_all_cookies()
    driver.get(address)
    assert "opens with a link" in driver.page_source and not driver.find_elements("css selector", "main a")
    assert chromium.faults(driver) == []
    shot(driver, "message")
