"""Who gets which item, and what becomes of a mark: each click once, whatever is clicked twice, late or by others."""

import contextlib
import json
import random
import sqlite3
from collections import Counter

import pytest
import ratings

from align_engine.assessment.rate import people, records, tasks, values
from align_engine.assessment.rate.people import NotLetIn
from align_engine.assessment.rate.store import NAME, SIDE, Store
from align_engine.assessment.rate.tasks import Refused
from align_engine.errors import BadInput, RunFailed

GOOD = [1, 2]


def rate(store, person, value=GOOD):
    """One item; its number, None where nothing is left."""
    task = tasks.current(store, person)
    if task is not None:
        tasks.answered(store, person, task.id, task.version, value, "")
        return task.item


def all_of(store, person):
    return [item for item in iter(lambda: rate(store, person), None)]


@pytest.mark.parametrize(("k", "overlap", "wanted"), [(1, 0.0, {1: 20}), (2, 0.0, {2: 20}), (1, 0.25, {1: 15, 2: 5}),
                                                      (3, 0.5, {3: 20})])  # fmt: skip
def test_each_item_gets_its_marks_and_nobody_sees_one_twice(k, overlap, wanted, tmp_path):
    store = ratings.project(tmp_path, ratings.pairs(20), k=k, overlap=overlap)
    group = ratings.join(store, "anna", "boris", "chloe")
    while any([rate(store, person) is not None for person in group]):
        pass
    found = records.read(store)
    assert Counter(len(record.marks) for record in found) == wanted
    assert all(len({mark.person for mark in record.marks}) == len(record.marks) for record in found)


def test_gold_is_met_by_everybody_among_the_others(tmp_path):
    gold = [one._replace(gold=GOOD, prompt=f"gold {i}") for i, one in enumerate(ratings.pairs(4))]
    store = ratings.project(tmp_path, ratings.pairs(12), gold)
    anna, boris = ratings.join(store, "anna", "boris")
    kinds = {record.id: record.gold for record in records.read(store)}
    seen = [[kinds[item] is not None for item in all_of(store, person)] for person in (anna, boris)]
    assert [sum(one) for one in seen] == [4, 4] and len(seen[0]) == 16
    assert [i for i, is_gold in enumerate(seen[0]) if is_gold] == [2, 6, 10, 14], "spread evenly"


def test_answers_stand_in_an_order_drawn_for_each_and_marks_by_their_own(tmp_path):
    store = ratings.project(tmp_path, ratings.ranked(60, 3), mode="rank", k=2)
    orders = []
    for person in ratings.join(store, "anna", "boris"):
        while (task := tasks.current(store, person)) is not None:
            texts = [int(text.split()[1]) for text in task.answers]
            assert texts == task.shown, "texts stand as the order says"
            orders.append(tuple(texts))
            form = {f"rank{place}": str(number + 1) for place, number in enumerate(texts, 1)}
            value = values.read("rank", form, task.shown, [1, 5])
            tasks.answered(store, person, task.id, task.version, value, "")
    assert len(set(orders)) == 6 and max(Counter(orders).values()) < 50
    assert all(mark.value == [1, 2, 3] for record in records.read(store) for mark in record.marks)


def test_a_second_tab_a_double_click_and_a_late_one(tmp_path):
    store = ratings.project(tmp_path, ratings.pairs(3))
    (anna,) = ratings.join(store, "anna")
    first, second = tasks.current(store, anna), tasks.current(store, anna)
    assert first == second
    tasks.answered(store, anna, first.id, first.version, GOOD, "a")
    tasks.answered(store, anna, first.id, first.version, GOOD, "a")  # again: the same
    with pytest.raises(Refused, match="rated already"):
        tasks.answered(store, anna, first.id, first.version, [2, 1], "")
    with pytest.raises(Refused, match="rated already"):
        tasks.answered(store, anna, first.id, first.version, None, "")
    assert sum(len(record.marks) for record in records.read(store)) == 1
    tasks.undo(store, anna)
    with pytest.raises(Refused, match="out of date"):
        tasks.answered(store, anna, first.id, first.version, GOOD, "")
    again = tasks.current(store, anna)
    assert (again.id, again.value, again.comment) == (first.id, GOOD, "a") and again.version == 2
    tasks.answered(store, anna, again.id, again.version, [2, 1], "")
    assert len(all_of(store, anna)) == 2
    with store.reading() as db:
        said = [tuple(row) for row in db.execute("SELECT what, value FROM event WHERE task = ?", (first.id,))]
    assert said == [("done", "[1, 2]"), ("undone", "[1, 2]"), ("done", "[2, 1]")], "nothing that was said is gone"


def test_undo_goes_back_and_back(tmp_path):
    store = ratings.project(tmp_path, ratings.pairs(4))
    (anna,) = ratings.join(store, "anna")
    with pytest.raises(Refused, match="nothing to undo"):
        tasks.undo(store, anna)
    done = [rate(store, anna), rate(store, anna, None), rate(store, anna)]
    for item in reversed(done):
        tasks.undo(store, anna)
        assert tasks.current(store, anna).item == item
    assert [rate(store, anna) for _ in range(5)][:3] == done and tasks.current(store, anna) is None
    assert tasks.standing(store, anna) == {"done": 4, "skipped": 0, "left": 0}


def test_a_skipped_item_goes_to_somebody_else(tmp_path):
    store = ratings.project(tmp_path, ratings.pairs(2))
    anna, boris = ratings.join(store, "anna", "boris")
    skipped = rate(store, anna, None)
    assert rate(store, anna) != skipped and tasks.current(store, anna) is None
    assert all_of(store, boris) == [skipped]


def test_what_is_left_is_told_by_the_tally(tmp_path):
    """Whatever is done, it counts the items that wait."""
    gold = [one._replace(gold=GOOD, prompt=f"gold {i}") for i, one in enumerate(ratings.pairs(2))]
    store = ratings.project(tmp_path, ratings.pairs(30), gold, k=2)
    rng, names = random.Random(0), ["anna", "boris", "chloe"]
    group, seen = ratings.join(store, *names), set()
    for _ in range(150):
        person = rng.choice(group)
        with contextlib.suppress(Refused):
            match rng.randrange(8):
                case 0:
                    tasks.undo(store, person)
                case 1:
                    rate(store, person, None)
                case 2:
                    with store.writing() as db:
                        db.execute("UPDATE task SET begun = 0 WHERE state = 'open'")  # for long
                case 3:
                    people.revoke(store, person.name)
                case 4:
                    with store.writing() as db:
                        db.execute("UPDATE item SET closed = 1 WHERE id = ?", (rng.randint(1, 32),))
                case _:
                    rate(store, person)
        with store.reading() as db:
            told = db.execute("SELECT waiting FROM tally").fetchone()[0]
            assert told == db.execute(f"SELECT count(*) FROM item WHERE {tasks.WANTED}").fetchone()[0]
        seen.add(told)
    assert len(seen) > 10


def test_a_project_of_version_1_is_brought_up_to_date(tmp_path):
    store = ratings.project(tmp_path, ratings.pairs(5))
    anna, boris = ratings.join(store, "anna", "boris")
    rate(store, anna)
    rate(store, anna)
    with store.writing() as db:  # what it lacked
        left = db.execute(f"SELECT count(*) FROM item WHERE {tasks.WANTED}").fetchone()[0]
        for statement in ("TRIGGER item_made", "TRIGGER item_changed", "TABLE tally"):
            db.execute(f"DROP {statement}")
        db.execute("PRAGMA user_version = 1")
    store.close()
    both = [Store(store.path.parent) for _ in range(2)]
    with both[1].reading() as db:
        assert db.execute("SELECT waiting FROM tally").fetchone()[0] == left > 0
        assert db.execute("PRAGMA user_version").fetchone()[0] == 2
    assert len(all_of(both[0], boris)) == left and sum(len(one.marks) for one in records.read(both[1])) == left + 2
    with both[0].reading() as db:
        assert db.execute("SELECT waiting FROM tally").fetchone()[0] == 0
    with both[0].writing() as db:
        db.execute("PRAGMA user_version = 9")
    with pytest.raises(BadInput, match="of version 9, and this program reads 2"):
        Store(store.path.parent)


def test_anothers_item_is_refused(tmp_path):
    store = ratings.project(tmp_path, ratings.pairs(2))
    anna, boris = ratings.join(store, "anna", "boris")
    task = tasks.current(store, anna)
    for call in (lambda: tasks.answered(store, boris, task.id, 0, GOOD, ""), lambda: tasks.shown(store, boris, task.id),
                 lambda: tasks.shown(store, boris, 999)):  # fmt: skip
        with pytest.raises(Refused, match="not yours"):
            call()
    assert not any(record.marks for record in records.read(store))


def test_what_is_left_open_for_long_is_given_to_others_and_a_late_mark_still_counts(tmp_path):
    store = ratings.project(tmp_path, ratings.pairs(2))
    anna, boris = ratings.join(store, "anna", "boris")
    held = tasks.current(store, anna)
    assert len(all_of(store, boris)) == 1, "the other item alone"
    with store.writing() as db:
        db.execute("UPDATE task SET begun = begun - ? WHERE id = ?", (tasks.LAPSE + 1, held.id))
    taken = tasks.current(store, boris)
    assert taken.item == held.item
    tasks.answered(store, anna, held.id, held.version, GOOD, "")
    tasks.answered(store, boris, taken.id, taken.version, GOOD, "")
    assert sorted(len(record.marks) for record in records.read(store)) == [1, 2]
    assert tasks.current(store, anna) is tasks.current(store, boris) is None


def test_links(tmp_path):
    store = ratings.project(tmp_path, ratings.pairs(2))
    token = people.link(store, "anna", 1)
    anna = people.let_in(store, token)
    assert (anna.name, anna.lead) == ("anna", False)
    raw = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert token.encode() not in raw and people.hashed(token).encode() in raw, "only a hash is kept"
    for wrong in (None, "", "x", token[:-1], f"{token}x", "a" * 10**6, "\ud800", people.hashed(token)):
        with pytest.raises(NotLetIn, match=r"own|not known"):
            people.let_in(store, wrong)
    tasks.current(store, anna)
    people.revoke(store, "anna")
    with pytest.raises(NotLetIn, match="taken back"):
        people.let_in(store, token)
    (boris,) = ratings.join(store, "boris")
    assert len(all_of(store, boris)) == 2, "what was before anna, too"
    newer = people.link(store, "anna", 1)
    assert people.let_in(store, newer) == anna
    with pytest.raises(NotLetIn, match="newer one"):
        people.let_in(store, token)
    with pytest.raises(NotLetIn, match="expired"):
        people.let_in(store, people.link(store, "anna", -1))
    with pytest.raises(BadInput, match="nobody of that name, but anna, boris"):
        people.revoke(store, "zoe")


def test_a_full_disk_loses_nothing_and_takes_no_half(tmp_path):
    store = ratings.project(tmp_path, ratings.pairs(3))
    (anna,) = ratings.join(store, "anna")
    task, comment = tasks.current(store, anna), "c" * 5000
    store.connection.execute(f"PRAGMA max_page_count = {store.connection.execute('PRAGMA page_count').fetchone()[0]}")
    before = records.read(store)
    with pytest.raises(RunFailed, match=r"full.*make room"):
        for _ in range(3):
            tasks.answered(store, anna, task.id, task.version, GOOD, comment)
            task = tasks.current(store, anna)
    kept = records.read(store)
    assert len(kept) == len(before) and tasks.current(store, anna).id == task.id
    store.connection.execute("PRAGMA max_page_count = 100000")
    tasks.answered(store, anna, task.id, task.version, GOOD, comment)
    assert sum(len(record.marks) for record in records.read(store)) == sum(len(one.marks) for one in kept) + 1


def test_files_that_are_no_project(tmp_path):
    with pytest.raises(BadInput, match="makes one"):
        Store(tmp_path)
    (tmp_path / NAME).write_bytes(b"no database, " * 100)
    with pytest.raises(BadInput, match="cannot be read"):
        Store(tmp_path)
    (tmp_path / NAME).unlink()
    with sqlite3.connect(tmp_path / NAME) as db:
        db.execute("PRAGMA user_version = 7")
    with pytest.raises(BadInput, match="version 7"):
        Store(tmp_path)


def test_a_project_is_made_whole_or_not_at_all(tmp_path):
    with pytest.raises(TypeError):
        ratings.project(tmp_path, [*ratings.pairs(3), ratings.pairs(1)[0]._replace(prompt=object())])
    assert not list(tmp_path.iterdir())
    (tmp_path / f"{NAME}{SIDE}").write_text("of a process that was killed")
    assert len(records.read(ratings.project(tmp_path, ratings.pairs(3)))) == 3


@pytest.mark.parametrize(("mode", "form", "shown", "value"), [
    ("pair", {"choice": "1"}, [0, 1], [1, 2]), ("pair", {"choice": "1"}, [1, 0], [2, 1]),
    ("pair", {"choice": "tie"}, [1, 0], [1, 1]), ("mark", {"choice": "ok"}, [0], [1]),
    ("mark", {"choice": "no"}, [0], [0]), ("score", {"choice": "5"}, [0], [5]),
    ("rank", {"rank1": "3", "rank2": "3", "rank3": "1"}, [2, 0, 1], [2, 1, 2]),
    ("pair", {}, [0, 1], None), ("pair", {"choice": "3"}, [0, 1], None), ("score", {"choice": "6"}, [0], None),
    ("score", {"choice": "05"}, [0], None), ("rank", {"rank1": "1"}, [0, 1], None),
    ("rank", {"rank1": "1", "rank2": "9"}, [0, 1], None), ("mark", {"choice": "1; DROP TABLE item"}, [0], None),
])  # fmt: skip
def test_forms_are_read_or_refused(mode, form, shown, value):
    if value is None:
        with pytest.raises(values.NoMark):
            values.read(mode, form, shown, [1, 5])
    else:
        assert values.read(mode, form, shown, [1, 5]) == value


def test_any_text_is_kept(tmp_path):
    texts = ["\ud800 half", "\x00\x1b[31m", "مرحبا بالعالم", "日本語", "\u202eevil", "a" * 10**6]
    found = [one._replace(answers=[one.answers[0]._replace(text=text), one.answers[1]])
             for one, text in zip(ratings.pairs(len(texts)), texts)]  # fmt: skip
    store = ratings.project(tmp_path, found)
    assert sorted(json.dumps(record.texts[0]) for record in records.read(store)) == sorted(map(json.dumps, texts))
