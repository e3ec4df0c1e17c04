"""A run of `align rloo` that waits for people: its rollouts on the page, their marks in its file, and on it goes."""

import json
import threading

import pytest
import ratings
import tiny

from align_engine.assessment.rate import tasks
from align_engine.assessment.rate.rollouts import Desk, write
from align_engine.errors import BadInput
from align_engine.recipe import RlooRecipe, check
from align_engine.rollouts import rewards
from align_engine.run import train
from align_engine.training import metrics, stops

ROWS = [
    {"prompt": f"p{i // 3}", "completion": text, "score": None} for i, text in enumerate(("a", "b", "a", "c", "d", "e"))
]


def desk(tmp_path, mode, rows=ROWS, k=1):
    """(desk, the run's file, its project), before anybody has rated."""
    path = tmp_path / "run" / "marks" / "rollout-000000.jsonl"
    path.parent.mkdir(parents=True)
    write(path, rows)
    store = ratings.project(tmp_path / "p", [], mode=mode, k=k, run_dir=str(tmp_path / "run"))
    return Desk(store, tmp_path / "run"), path, store


def scores(path):
    return [json.loads(line)["score"] for line in path.read_text().splitlines()]


def rate_all(store, person, value):
    """`value` tells a mark by the answers' texts, in their own order."""
    while (task := tasks.current(store, person)) is not None:
        texts = [""] * len(task.shown)
        for number, text in zip(task.shown, task.answers):
            texts[number] = text
        tasks.answered(store, person, task.id, task.version, value(texts), "")


@pytest.mark.parametrize(("mode", "value", "wanted"), [
    ("mark", lambda texts: [int(texts[0] in "ac")], [1, 0, 1, 1, 0, 0]),
    ("score", lambda texts: ["edcba".index(texts[0]) + 1], [5, 4, 5, 3, 2, 1]),
    ("rank", lambda texts: [1 + sorted(texts).index(text) for text in texts], [1, 0, 1, 1, 0.5, 0]),
    ("pair", lambda texts: [1, 2] if texts[0] < texts[1] else [2, 1], [1, 0, 1, 1, 0.5, 0]),
])  # fmt: skip
def test_marks_come_back_as_rewards(mode, value, wanted, tmp_path):
    here, path, store = desk(tmp_path, mode)
    here.work()
    assert scores(path) == [None] * 6, "nobody has a link yet"
    anna, boris = ratings.join(store, "anna", "boris")
    here.work()
    assert scores(path) == [None] * 6
    rate_all(store, anna, value)
    here.work()
    assert scores(path) == wanted, "equal completions are rated once"
    assert tasks.current(store, boris) is None
    with pytest.raises(tasks.Refused, match="handed over"):
        tasks.undo(store, anna)
    here.work()  # nothing more


def test_several_people_skips_and_marks_by_hand(tmp_path):
    rows = [dict(ROWS[0], score=7), *ROWS[1:]]
    here, path, store = desk(tmp_path, "score", rows, k=2)
    anna, boris = ratings.join(store, "anna", "boris")
    here.work()
    rate_all(store, anna, lambda texts: None if texts[0] in "bd" else [4])
    here.work()
    assert scores(path)[1:] == [None] * 5
    rate_all(store, boris, lambda texts: None if texts[0] == "d" else [1])
    here.work()
    assert scores(path) == [7, 1, 2.5, 2.5, "skip", 2.5]


def test_damaged_files_wait_and_another_run_is_asked_anew(tmp_path):
    here, path, store = desk(tmp_path, "mark")
    (anna,) = ratings.join(store, "anna")
    here.work()
    whole = path.read_text()
    path.write_text(whole[:-30])
    here.work()
    path.write_text(whole)
    rate_all(store, anna, lambda texts: [1])
    here.work()
    assert scores(path) == [1] * 6
    write(path, [row | {"completion": "new"} for row in ROWS])
    here.work()
    assert scores(path) == [None] * 6 and tasks.current(store, anna).answers == ["new"]


def test_too_many_to_rank(tmp_path):
    here, *_ = desk(tmp_path, "rank", [{"prompt": "p", "completion": str(i), "score": None} for i in range(12)])
    with pytest.raises(BadInput, match="12 different answers"):
        here.work()


def test_waiting_ends_with_the_marks_with_damage_or_with_a_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "SETTLED", 0.02)
    path, said = tmp_path / "rollout-000000.jsonl", []
    write(path, ROWS)

    def later(what):
        thread = threading.Timer(0.2, what)
        thread.start()
        return thread

    timer = later(lambda: write(path, [row | {"score": 1} for row in ROWS]))
    rewards.wait(path, said.append)
    timer.join()
    assert len(said) == 1 and "6 completions wait" in said[0]
    write(path, ROWS)
    timer = later(lambda: path.write_text("{"))
    with pytest.raises(BadInput, match="line 1 is not JSON"):
        rewards.wait(path, said.append)
    timer.join()
    write(path, ROWS)
    monkeypatch.setattr(stops.WISH, "asked", True)
    with stops.breakable(), pytest.raises(stops.StopNow):
        rewards.wait(path, said.append)


def test_wait_for_marks_is_for_people(model, tmp_path):
    recipe = tiny.online(RlooRecipe, model, tmp_path, tmp_path / "run", wait_for_marks=True, reward_funcs=["m:f"])
    with pytest.raises(BadInput, match=r"wait_for_marks.*for reward_funcs human"):
        check(recipe)


def test_a_run_waits_for_people_and_goes_on_by_itself(model, tmp_path, monkeypatch):
    monkeypatch.setattr(rewards, "SETTLED", 0.05)
    prompts = tiny.write_rows(tmp_path / "prompts.jsonl", tiny.prompt_rows(8))
    recipe = tiny.online(RlooRecipe, model, prompts, tmp_path / "run", reward_funcs=["human"], wait_for_marks=True,
                         max_steps=2)  # fmt: skip
    store = ratings.project(tmp_path / "p", [], mode="score", run_dir=str(tmp_path / "run"))
    (anna,) = ratings.join(store, "anna")
    here, over = Desk(store, tmp_path / "run"), threading.Event()

    def people():
        while not over.wait(0.05):
            here.work()
            rate_all(store, anna, lambda texts: [min(5, 1 + len(texts[0].split()))])

    thread = threading.Thread(target=people)
    thread.start()
    try:
        folder = train("rloo", recipe)
    finally:
        over.set()
        thread.join()
    found = metrics.read(folder.metrics)
    assert [record["step"] for record in found] == [1, 2] and folder.final.exists()
    for number, record in enumerate(found):
        given = scores(tmp_path / "run" / "marks" / f"rollout-{number:06d}.jsonl")
        assert record["reward"] == pytest.approx(sum(given) / len(given))
