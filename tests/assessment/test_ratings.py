"""What many marks come to, how far people agree, and the rows that they give; against counting by hand and choix."""

import itertools
import json
import random
import threading

import choix
import krippendorff
import numpy as np
import pytest
import ratings
import tiny

from align_engine.assessment import ratings as export
from align_engine.assessment.rate import label_studio, people, records, serve, tasks
from align_engine.assessment.rate.agreement import agreement
from align_engine.assessment.rate.consensus import Group
from align_engine.assessment.rate.items import Answer, Given, Item
from align_engine.assessment.rate.records import Mark, Record
from align_engine.assessment.rate.sections import RatingsRecipe
from align_engine.assessment.rate.store import Store
from align_engine.errors import BadInput


def record(values, texts=("a", "b"), prompt="p", gold=None, **about):
    marks = [Mark(f"p{i}", value, [*range(len(texts))], "", 1.0, 0.0) for i, value in enumerate(values)
             if value != "-"]  # fmt: skip
    return Record(1, prompt, "", gold, 1, list(texts), [dict(about) for _ in texts], marks)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def exported(folder, out, **settings):
    made = RatingsRecipe()
    made.ratings.project_dir, made.output.output_dir = str(folder), str(out)
    for name, value in settings.items():
        setattr(made.output if name == "overwrite" else made.ratings, name, value)
    export.run(made)
    return rows(out / "rows.jsonl") if (out / "rows.jsonl").exists() else None


# -- what marks come to -----------------------------------------------------------------------------------------------
def test_a_majority_of_comparisons():
    group = Group("p")
    group.add(record([[1, 2], [1, 2], [2, 1], [1, 1]], ("a", "b")), True)
    group.add(record([[1, 2], [2, 1]], ("b", "c")), True)
    group.add(record([[2, 1]], ("a", "c")), True)
    assert [(group.texts[i], group.texts[j], tuple(votes)) for i, j, votes in group.pairs("majority")] == [
        ("a", "b", (2, 1, 1)), ("c", "a", (1, 0, 0))], "b and c are tied"  # fmt: skip
    assert group.scores("majority") == [0.5, 0.25, 0.75]
    assert group.ranks("majority") == [2, 3, 1]
    assert group.labels("pair", "majority", [1, 5]) == [None, False, True]
    shares = np.array(group.shares(), dtype=float)
    assert shares == pytest.approx([((2.5 / 4) + 0) / 2, ((1.5 / 4) + 0.5) / 2, (1 + 0.5) / 2])


def test_bradley_terry_is_choixs_fit_with_a_tie_as_half_a_win_each_way():
    draw, group, won = random.Random(0), Group("p"), np.zeros((4, 4))
    texts = ("a", "b", "c", "d")
    for _ in range(60):
        value = [draw.choice([1, 2, 3]) + i for i in range(4)]
        group.add(record([value], texts), True)
        for i, j in itertools.permutations(range(4), 2):
            won[i, j] += (value[i] < value[j]) + 0.5 * (value[i] == value[j])
    data = [pair for i, j in itertools.permutations(range(4), 2) for pair in [(i, j)] * int(2 * won[i, j])]
    wanted = choix.opt_pairwise(4, data)  # another algorithm, on every comparison twice, without regularisation
    found = np.array(group.scores("bradley_terry"), dtype=float)
    assert found == pytest.approx(wanted - wanted.mean(), abs=0.01)
    assert list(group.ranks("bradley_terry")) == [1, 2, 3, 4]
    assert len(list(group.pairs("bradley_terry"))) == 6


def test_marks_and_scores_are_means():
    group = Group("p")
    for text, values in (("a", [[5], [3]]), ("b", [[3]]), ("c", [[1], [4], [4]]), ("d", [])):
        group.add(record(values, (text,)), False)
    assert group.scores("majority") == [4.0, 3.0, 3.0, None] == group.scores("bradley_terry")
    assert group.ranks("majority") == [1, 2, 2, None]
    assert group.labels("score", "majority", [1, 5]) == [True, None, None, None]
    assert [(i, j) for i, j, _ in group.pairs("majority")] == [(0, 1), (0, 2)]


def test_agreement_is_krippendorffs():
    draw = random.Random(1)
    for mode, level, values in (("mark", "nominal", [0, 1]), ("score", "ordinal", [1, 2, 3, 4, 5])):
        found = [[[draw.choice(values)] if draw.random() < 0.8 else "-" for _ in range(4)] for _ in range(30)]
        table = [[row[i][0] if row[i] != "-" else np.nan for row in found] for i in range(4)]
        wanted = krippendorff.alpha(table, level_of_measurement=level)
        assert agreement([record(row, ("a",)) for row in found], mode).alpha == pytest.approx(wanted)
    same = [record([[1, 2, 3], [1, 2, 3]], ("a", "b", "c")), record([[3, 1, 2], [3, 1, 2]], ("a", "b", "c"))]
    found = agreement(same, "rank")
    assert (found.alpha, found.same, found.units) == (1.0, 1.0, 6)
    found = agreement([record([[1, 2], [1, 2] if i else [2, 1]]) for i in range(10)], "pair")
    expected = 2 * 20 * 20 / (40 * 39)  # disagreement by chance, of 40 values: each way, by two people, in ten pairs
    assert found.alpha == pytest.approx(1 - 0.1 / expected) and found.same == 0.9 and found.units == 10
    assert agreement([record([[1, 1], [1, 1]])], "pair").alpha is None
    assert agreement([record([[1, 2]]), record([[1, 2], [1, 2]], gold=[1, 2])], "pair") == (None, None, 0)


# -- rows -------------------------------------------------------------------------------------------------------------
def test_pairs_keep_the_columns_of_their_answers_and_undo_the_order(tmp_path):
    store = ratings.project(tmp_path / "p", ratings.pairs(12), [ratings.pairs(1)[0]._replace(prompt="g", gold=[1, 2])],
                            k=3)  # fmt: skip
    for person in ratings.join(store, "anna", "boris", "chloe"):
        while (task := tasks.current(store, person)) is not None:
            value = [2, 1] if person.name == "chloe" else [1, 2]  # she is outvoted
            tasks.answered(store, person, task.id, task.version, value, "why")
    found = exported(tmp_path / "p", tmp_path / "out")
    assert len(found) == 12, "no gold"
    assert all(row["chosen"].startswith("good") and row["rejected"].startswith("bad") for row in found)
    assert found[0] | {"prompt": 0, "chosen": 0, "rejected": 0} == {
        "prompt": 0, "chosen": 0, "rejected": 0, "votes_chosen": 2, "votes_rejected": 1, "votes_equal": 0,
        "chosen_model": "big", "rejected_model": "small"}  # fmt: skip
    said = json.loads((tmp_path / "out" / "report.json").read_text())
    assert said["marks"] == 39 and said["assessors"]["chloe"]["right"] == 0 and said["assessors"]["anna"]["right"] == 1
    assert said["agreement"]["same"] == pytest.approx(1 / 3)
    each = rows(tmp_path / "out" / "_marks.jsonl")
    assert len(each) == 39 and {row["comment"] for row in each} == {"why"}
    exported(tmp_path / "p", tmp_path / "out")  # finished: nothing to do
    with pytest.raises(BadInput, match="holds another"):
        exported(tmp_path / "p", tmp_path / "out", to="ranks")
    labels = exported(tmp_path / "p", tmp_path / "out", to="marks", overwrite=True)
    assert len(labels) == 24 and all(row["label"] == row["completion"].startswith("good") for row in labels)


@pytest.mark.parametrize(("mode", "to"), [*itertools.product(("pair", "mark", "score", "rank"), export.ROWS)])
def test_every_mode_gives_every_kind_of_rows(mode, to, tmp_path):
    many = [Item(one.prompt, [answer]) for one in ratings.ranked(3, 3) for answer in one.answers]
    store = ratings.project(tmp_path / "p", {"pair": ratings.pairs(3), "rank": ratings.ranked(3, 3)}.get(mode, many),
                            mode=mode)  # fmt: skip
    (anna,) = ratings.join(store, "anna")
    while (task := tasks.current(store, anna)) is not None:
        best = int(task.answers[0].split()[1]) if mode in ("mark", "score") else 0
        value = {"pair": [1, 2], "rank": [1, 2, 3], "mark": [int(best == 0)], "score": [5 - 2 * best]}[mode]
        tasks.answered(store, anna, task.id, task.version, value, "")
    found = exported(tmp_path / "p", tmp_path / "out", to=to)
    wanted = {("pair", "pairs"): 3, ("mark", "pairs"): 6, ("score", "pairs"): 9, ("rank", "pairs"): 9,
              ("score", "marks"): 6, ("rank", "marks"): 6}.get((mode, to), 6 if mode == "pair" else 9)  # fmt: skip
    assert len(found) == wanted
    if to == "pairs":
        assert all(("good" in row["chosen"]) or row["chosen"] < row["rejected"] for row in found)
    else:
        name = {"marks": "label", "scores": "score", "ranks": "rank"}[to]
        best = [row for row in found if row["completion"].startswith(("good", "answer 0"))]
        assert {row[name] for row in best} <= {"label": {True}, "rank": {1}, "score": {1.0, 5.0}}[name]


def test_export_goes_on_while_people_rate(tmp_path):
    store = ratings.project(tmp_path / "p", ratings.pairs(200))
    (anna,) = ratings.join(store, "anna")

    def work():
        while (task := tasks.current(store, anna)) is not None:
            tasks.answered(store, anna, task.id, task.version, [1, 2], "")

    thread = threading.Thread(target=work)
    tasks.answered(store, anna, tasks.current(store, anna).id, 0, [1, 2], "")
    thread.start()
    counts = [len(exported(tmp_path / "p", tmp_path / f"out-{i}")) for i in range(3)]
    thread.join()
    assert counts == sorted(counts) and len(exported(tmp_path / "p", tmp_path / "last")) == 200


def test_nothing_to_export_is_said(tmp_path):
    store = ratings.project(tmp_path / "p", ratings.pairs(2))
    with pytest.raises(BadInput, match="nobody has marked"):
        exported(tmp_path / "p", tmp_path / "out")
    (anna,) = ratings.join(store, "anna")
    tasks.answered(store, anna, tasks.current(store, anna).id, 0, [1, 1], "")
    with pytest.raises(BadInput, match="give no pairs: all are ties"):
        exported(tmp_path / "p", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- data in ----------------------------------------------------------------------------------------------------------
ANSWERS = [{"prompt": f"p{i}", "completion": f"{name} {i}", "model": name, "rank": rank, "label": rank == 1, "score": 9}
           for i in range(3) for rank, name in enumerate(("a", "b", "c"), 1)]  # fmt: skip
PAIRS = [{"prompt": f"p{i % 2}", "chosen": f"c{i}", "rejected": f"r{i}", "chosen_model": "x"} for i in range(3)]


@pytest.mark.parametrize(("data", "mode", "sizes"), [
    (ANSWERS, "pair", [2] * 9), (ANSWERS, "rank", [3] * 3), (ANSWERS, "mark", [1] * 9), (PAIRS, "pair", [2] * 3),
    (PAIRS, "mark", [1] * 6), (PAIRS, "rank", [2] * 3), (tiny.several_rows(4), "rank", None),
    ([*ANSWERS, ANSWERS[0]], "pair", [2] * 9),
])  # fmt: skip
def test_items_of_rows(data, mode, sizes, tmp_path):
    path = tiny.write_rows(tmp_path / "rows.jsonl", data)
    serve.make(ratings.recipe(tmp_path / "p", dataset_name=str(path), mode=mode))
    found = records.read(Store(tmp_path / "p"))
    assert sizes is None or [len(record.texts) for record in found] == sizes
    assert not any({"rank", "label", "score"} & about.keys() for record in found for about in record.abouts)
    if data is PAIRS and mode == "pair":
        assert found[0].abouts == [{"model": "x"}, {}]


@pytest.mark.parametrize(("mode", "data", "gold"), [
    ("pair", PAIRS, [1, 2]), ("mark", PAIRS, None), ("rank", ANSWERS, [1, 2, 3]),
    ("score", [row | {"rank": None, "score": 4} for row in ANSWERS], [4]),
])  # fmt: skip
def test_gold_says_what_is_right(mode, data, gold, tmp_path):
    path = tiny.write_rows(tmp_path / "rows.jsonl", ANSWERS)
    known = tiny.write_rows(tmp_path / "gold.jsonl", data)
    serve.make(ratings.recipe(tmp_path / "p", dataset_name=str(path), gold_name=str(known), mode=mode))
    found = [record.gold for record in records.read(Store(tmp_path / "p")) if record.gold]
    assert all(one == gold for one in found) if gold else sorted(found) == [[0]] * 3 + [[1]] * 3
    assert found


@pytest.mark.parametrize(("data", "settings", "said"), [
    ([{"prompt": "p"}], {}, "prompts without answers.*align generate"),
    ([{"prompt": "p", "completion": "a"}] * 2, {}, "no prompt has two different answers"),
    ([{"prompt": "p", "completion": f"{i}"} for i in range(10)], {"mode": "rank"}, "10 different answers"),
    ([{"prompt": "p", "completion": None}, ANSWERS[0]], {}, "rows.jsonl: row 1, counted from 1: "),
    (ANSWERS, {"gold_name": "x.jsonl"}, "x.jsonl"),
    (ANSWERS, {"guideline": "/no/where.md"}, "guideline"),
    (ANSWERS, {"columns": ["prompt=zzz"]}, "no column 'zzz'"),
])  # fmt: skip
def test_bad_data_is_named_and_leaves_nothing(data, settings, said, tmp_path):
    path = tiny.write_rows(tmp_path / "rows.jsonl", data)
    with pytest.raises(BadInput, match=said):
        serve.make(ratings.recipe(tmp_path / "p", dataset_name=str(path), **settings))
    assert not (tmp_path / "p").exists()


def test_another_project_is_not_gone_on_with(tmp_path):
    path = tiny.write_rows(tmp_path / "rows.jsonl", ANSWERS)
    asked = ratings.recipe(tmp_path / "p", dataset_name=str(path))
    serve.opened(asked).close()
    serve.opened(asked).close()
    serve.opened(ratings.recipe(tmp_path / "p")).close()
    with pytest.raises(BadInput, match="mode: 'pair' there, 'mark' now"):
        serve.opened(ratings.recipe(tmp_path / "p", dataset_name=str(path), mode="mark"))
    with pytest.raises(BadInput, match="k: 1 there, 3 now"):
        serve.opened(ratings.recipe(tmp_path / "p", k=3))
    with pytest.raises(BadInput, match="holds no project yet"):
        serve.opened(ratings.recipe(tmp_path / "q"))


# -- Label Studio -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["pair", "mark", "score", "rank"])
def test_label_studio_and_back(mode, tmp_path):
    values = {"pair": [[1, 2], [2, 1], [1, 1]], "mark": [[0], [1]], "score": [[1], [4], [5]],
              "rank": [[1, 2, 3], [2, 1, 2], [3, 1, 2]]}[mode]  # fmt: skip
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    found = {"pair": ratings.pairs(6), "rank": ratings.ranked(6, 3)}.get(mode, ratings.singles(6))
    found = [one._replace(marks=[Given("anna", values[i % len(values)], "hm", 2.5, 1e9 + i), Given("boris", None)])
             for i, one in enumerate(found)]  # fmt: skip
    found[0] = found[0]._replace(prompt=chat, answers=[Answer([{"role": "assistant", "content": f"x{i}"}], {})
                                                       for i in range(len(found[0].answers))])  # fmt: skip
    found[1] = found[1]._replace(gold=values[0])
    ratings.project(tmp_path / "p", found, mode=mode)
    assert exported(tmp_path / "p", tmp_path / "out", to="label_studio") is None
    path = tmp_path / "out" / "label_studio.json"
    assert label_studio.is_file(str(path))
    control = {"pair": "<Pairwise", "mark": "<Choices", "score": 'maxRating="5"', "rank": '<Bucket name="3"'}[mode]
    assert control in (tmp_path / "out" / "label_studio.xml").read_text()
    serve.make(ratings.recipe(tmp_path / "q", dataset_name=str(path), mode=mode, overlap=0.0))

    def held(folder):
        found = records.read(Store(folder))
        marks = [sorted(json.dumps([*mark[:2], *mark[3:]]) for mark in one.marks) for one in found]
        return sorted(json.dumps([one.prompt, one.texts, one.gold, own]) for one, own in zip(found, marks))

    assert held(tmp_path / "p") == held(tmp_path / "q")
    assert sorted(people.names(Store(tmp_path / "q"))) == ["anna", "boris"]


def test_label_studios_own_export_is_read(tmp_path):
    """As its documentation shows it: numbers for people, an order in one list."""
    result = {"from_name": "rank", "to_name": "l", "type": "ranker", "value": {"ranker": {"rank": ["y", "x"]}}}
    annotation = {"id": 1, "completed_by": 10, "created_at": "2021-03-09T22:16:08.728353Z", "lead_time": 4.288}
    data = {"prompt": "p", "items": [{"id": "x", "body": "one"}, {"id": "y", "title": "two"}]}
    task = {"id": 7, "data": data, "annotations": [annotation | {"result": [result]}], "predictions": []}
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps([task]))
    serve.make(ratings.recipe(tmp_path / "p", dataset_name=str(path), mode="rank"))
    (found,) = records.read(Store(tmp_path / "p"))
    assert found.texts == ["one", "two"] and found.marks[0].value == [2, 1] and found.marks[0].person == "10"
    other = [{"result": [{"type": "choices", "value": {"choices": ["a"]}}]}]
    for broken, said in (
        ({"data": {"prompt": "p"}}, "task 1"),
        (task | {"annotations": other}, "no mark of this mode"),
    ):
        path.write_text(json.dumps([broken]))
        with pytest.raises(BadInput, match=said):
            serve.make(ratings.recipe(tmp_path / "q", dataset_name=str(path), mode="rank"))
