"""`align generate`: every answer that was asked for, once, whatever fails or is killed on the way."""

import json
import os
import random
import subprocess
import sys
import time

import chat_server
import pytest
import tiny

from align_engine.cli import main
from align_engine.data.sources import load_rows
from align_engine.errors import rows_named
from align_engine.preparation import endpoints, generate, local
from align_engine.preparation.models import read_models

SECRET = "sk-very-secret-5"


@pytest.fixture
def rows(tmp_path):
    made = [{"prompt": f"w{i} w{i % 7}", "wanted": f"w{i} w1" if i % 2 else None, "topic": i % 3} for i in range(24)]
    return tiny.write_rows(tmp_path / "prompts.jsonl", made)


def spec(name, tier, **more):
    return ",".join(f"{key}={value}" for key, value in dict(name=name, tier=tier, **more).items())


def flags(rows, out, *models, **more):
    given = dict(dataset_name=rows, output_dir=out, **more)
    return ["generate", *(str(part) for name, value in given.items() for part in (f"--{name}", value)),
            "--models", *map(str, models)]  # fmt: skip


@pytest.fixture
def align(capsys):
    def run(*arguments):
        code = main(list(arguments))
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def made(out):
    return [json.loads(line) for line in (out / "rows.jsonl").read_text("utf-8").splitlines()]


def test_answers_of_endpoints_checkpoints_and_people(rows, tmp_path, align):
    model = tiny.write_model(tmp_path / "model")
    with chat_server.serving() as server:
        listed = tmp_path / "tiers.yaml"
        listed.write_text(
            f"models:\n- {{name: big, tier: best, base_url: {server.url}, model: big-405b, n: 2, temperature: 0.5,"
            f" max_tokens: 9, input_price: 100, output_price: 1000}}\n"
            f"- {{name: easy, tier: easy, path: {model}, max_tokens: 6, n: 3}}\n"
        )
        out = tmp_path / "out"
        hard, people = spec("hard", 3, base_url=server.url), spec("people", "truth", column="wanted")
        code, said, complaint = align(*flags(rows, out, listed, hard, people, batch_size=8, bad_rows="drop"))
    assert code == 0, complaint
    found = made(out)
    bodies = {(body["model"], body["messages"][-1]["content"]): body for body in server.bodies}
    for i, row in enumerate(load_rows(rows)):
        own = [one for one in found if one["index"] == i]
        assert all(one["prompt"] == [{"role": "user", "content": row["prompt"]}] for one in own)
        assert all(one["topic"] == i % 3 and one["wanted"] == row["wanted"] for one in own)
        names = ["big"] * 2 + ["easy"] * 3 + ["hard"] + ["people"] * (i % 2)
        assert [one["model"] for one in own] in (names, [one for one in names if one != "easy"])
        for one in own:
            (said_by,) = one["completion"]
            assert said_by["role"] == "assistant"
            if one["model"] in ("big", "hard"):
                body = bodies["big-405b" if one["model"] == "big" else "hard", row["prompt"]]
                assert said_by["content"] == chat_server.answer(body, one["choice"])
                assert body["seed"] == one["seed"] and body["temperature"] == one["temperature"]
                assert body["max_tokens"] == one["max_tokens"] and body.get("n", 1) == 1 + (one["model"] == "big")
            if one["model"] == "people":
                assert said_by["content"] == row["wanted"] and one["seed"] is None
    assert {one["model"]: (one["tier"], one["rank"]) for one in found} == {
        "big": ("best", 2), "easy": ("easy", 4), "hard": ("3", 3), "people": ("truth", 1)
    }  # fmt: skip
    assert len({one["seed"] for one in found if one["model"] == "big"}) == 24
    facts = json.loads((out / "report.json").read_text())
    big = facts["models"][0]
    assert (big["answers"], big["prompt_tokens"], big["completion_tokens"]) == (48, 48, 480)
    assert facts["cost"] == big["cost"] == pytest.approx((48 * 100 + 480 * 1000) / 1e6)
    assert facts["answers"] == len(found) and "cost 0.48" in said
    assert "report.html" in said and "big-405b says" in (out / "report.html").read_text()
    code, said, _ = align(*flags(rows, out, listed, hard, people, batch_size=8, bad_rows="drop"))
    assert code == 0 and "nothing to do" in said and len(server.bodies) == 48


def test_killed_three_times_it_ends_with_the_same_rows(rows, tmp_path):
    rng, journal = random.Random(time.time_ns()), tmp_path / "out" / "_journal.jsonl"

    def arguments(url, out):
        return flags(rows, out, spec("big", "best", base_url=url, n=2), server_concurrency=3)

    with chat_server.serving() as server:
        assert main(arguments(server.url, tmp_path / "whole")) == 0
    with chat_server.serving(fails=0.1, delay=0.02) as server:
        command = [sys.executable, "-m", "align_engine", *arguments(server.url, tmp_path / "out")]
        for kill in range(3):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            wanted = rng.randrange(1 + 7 * kill, 7 * (kill + 1))
            while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < wanted):
                time.sleep(0.01)
            process.kill()
            process.wait()
            assert not (tmp_path / "out" / "rows.jsonl").exists()
            with journal.open("ab") as file:
                file.write(b'{"model": "big", "row": 3, "answ' * (kill % 2))  # what a kill within a write leaves
        subprocess.run(command, check=True, capture_output=True)
    for name in ("rows.jsonl", "report.json", "report.md", "report.html"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    again = server.asked.total() - 24 - server.failed["cut"]
    assert len(server.asked) == 24 and again <= 3 * 3, "what was under way at a kill, and no more"


def test_many_answers_under_failures_and_a_limit(tmp_path, align):
    rows = tiny.write_rows(tmp_path / "many.jsonl", [{"prompt": f"question {i}"} for i in range(400)])
    with chat_server.serving(fails=0.05, delay=0.002) as server:
        models = [spec(name, tier, base_url=server.url) for name, tier in (("a", "best"), ("b", "hard"))]
        code, _, complaint = align(*flags(rows, tmp_path / "out", *models, server_concurrency=12))
    assert code == 0, complaint
    found = made(tmp_path / "out")
    assert [(one["index"], one["model"]) for one in found] == [(i, name) for i in range(400) for name in "ab"]
    assert server.most <= 12 and server.failed.total() > 10
    assert len(server.asked) == 800 and server.asked.total() - 800 <= server.failed["cut"]


def test_a_failure_for_good_is_one_sentence_and_the_same_command_goes_on(rows, tmp_path, align, monkeypatch):
    monkeypatch.setattr(endpoints, "ATTEMPTS", 2)
    monkeypatch.setenv("MY_KEY", SECRET)
    out = tmp_path / "out"

    def asked(url, **more):
        return align(*flags(rows, out, spec("big", "best", base_url=url, api_key_env="MY_KEY", n=2), **more))

    with chat_server.serving(key="another") as server:
        code, said, complaint = asked(server.url)
    assert code == 1 and "401" in complaint and "Incorrect API key provided: Bearer ***" in complaint
    code, said, complaint = asked(server.url, request_timeout=5)  # nobody listens there now
    assert code == 1 and "2 tries have failed, the last with" in complaint and "***" not in complaint
    with chat_server.serving(delay=0.5) as server:
        code, said, complaint = asked(server.url, request_timeout=0.1)
    assert code == 1 and "no answer within 0.1 seconds" in complaint
    with chat_server.serving(choices=1) as server:
        code, said, complaint = asked(server.url)
    assert code == 1 and "it gave 1 answers where n = 2 were asked for; give such an endpoint n: 1" in complaint
    with chat_server.serving(fails=1.0) as server:
        code, said, complaint = asked(server.url)
    assert code == 1 and "model 'big' at http://127.0.0.1" in complaint
    assert not (out / "rows.jsonl").exists() and (out / "_journal.jsonl").read_bytes() == b""
    with chat_server.serving(empty="w5") as server:
        code, said, complaint = asked(server.url)
        assert (
            code == 1
            and "row 6, counted from 1: it gave an empty answer (--bad_rows drop leaves such answers out)" in complaint
        )
        before = len(server.bodies)
        code, said, complaint = asked(server.url, bad_rows="drop")
    assert code == 0, complaint
    assert len(server.bodies) - before < 24, "what had been answered was not asked again"
    assert {one["index"] for one in made(out)} == set(range(24)) - {5, 12, 19}
    assert json.loads((out / "report.json").read_text())["models"][0]["reasons"] == {"it gave an empty answer": 3}
    assert server.headers[0]["authorization"] == f"Bearer {SECRET}"
    assert not any(SECRET in file.read_text("utf-8") for file in out.iterdir() if file.is_file())
    assert SECRET not in said + complaint


def test_a_prompt_that_an_endpoint_refuses(tmp_path, align):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": "w1"}, {"prompt": "w2 " * chat_server.LIMIT}])
    with chat_server.serving() as server:
        asked = flags(rows, tmp_path / "out", spec("big", "best", base_url=server.url))
        code, _, complaint = align(*asked)
        assert code == 1 and "row 2, counted from 1: 400" in complaint and "the prompt is too long" in complaint
        code, _, complaint = align(*asked, "--bad_rows", "drop")
    assert code == 0, complaint
    assert [one["index"] for one in made(tmp_path / "out")] == [0]


def test_a_further_model_is_asked_alone(rows, tmp_path, align):
    with chat_server.serving() as server:
        models = [spec(name, tier, base_url=server.url) for name, tier in (("a", "best"), ("b", "hard"))]
        assert align(*flags(rows, tmp_path / "out", models[0]))[0] == 0
        assert align(*flags(rows, tmp_path / "out", *models))[0] == 0
        assert len(server.bodies) == 48 and len(made(tmp_path / "out")) == 48
        changed = spec("a", "best", base_url=server.url, temperature=0.3)
        code, _, complaint = align(*flags(rows, tmp_path / "out", changed))
    assert code == 2 and "holds another run (model a: " in complaint and "'temperature': 0.3" in complaint


def test_a_batch_that_was_half_answered_is_what_it_would_have_been(rows, tmp_path, align):
    easy = spec("easy", "easy", path=tiny.write_model(tmp_path / "model"), max_tokens=6, n=2)
    options = dict(batch_size=8, bad_rows="drop")
    assert align(*flags(rows, tmp_path / "whole", easy, **options))[0] == 0
    assert align(*flags(rows, tmp_path / "out", easy, **options))[0] == 0
    for name in ("rows.jsonl", "run.json"):
        (tmp_path / "out" / name).write_text(
            (tmp_path / "out" / name).read_text().replace('"finished": true', '"finished": false')
        )
    journal = tmp_path / "out" / "_journal.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:7:3]))
    assert align(*flags(rows, tmp_path / "out", easy, **options))[0] == 0
    assert made(tmp_path / "out") == made(tmp_path / "whole")
    texts = {one["completion"][0]["content"] for one in made(tmp_path / "whole")}
    assert len(texts) > 20


def test_a_checkpoint_with_a_chat_template_and_greedy(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tiny.write_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = "{% for m in messages %}w0 {{ m.content }} {% endfor %}w9"
    tokenizer.save_pretrained(path)
    (model,) = read_models([spec("easy", "easy", path=path, temperature=0, max_tokens=5)])
    prompts = {3: [{"role": "system", "content": "w7"}, {"role": "user", "content": "w1"}]}
    (reply,) = local.Local(model, prompts, rows_named).sample([3], 0)
    ids = tokenizer("w0 w7 w0 w1 w9", return_tensors="pt")["input_ids"]
    own = AutoModelForCausalLM.from_pretrained(path).generate(ids, do_sample=False, max_new_tokens=5)
    assert reply.answers[0][0] == tokenizer.decode(own[0, 5:], skip_special_tokens=True) and reply.tokens[0] == 5


def test_a_prompt_that_a_checkpoint_cannot_read_is_named_by_its_row(tmp_path, align):
    """Though rows before it are left out."""
    model = tiny.write_model(tmp_path / "model", vocab=45)
    small = spec("small", "easy", path=model, max_tokens=2)
    prompts = [{"prompt": "w1"}, {"prompt": ""}, {"prompt": "w2"}, {"prompt": "w50"}]
    rows = tiny.write_rows(tmp_path / "rows.jsonl", prompts)
    said = "in 'prompt_ids' of row 4, counted from 1, is outside model 'small''s vocabulary of 45"
    code, _, complaint = align(*flags(rows, tmp_path / "out", small, bad_rows="drop"))
    assert code == 2 and said in complaint
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.content == 'w50' %}{{ raise_exception('not w50') }}{% endif %}w1{% endfor %}"
    )
    code, _, complaint = align(*flags(rows, tmp_path / "other", small, bad_rows="drop"))
    assert code == 2 and "refuses the messages: not w50 (row 4, counted from 1)" in complaint


MODELS = {  # what is wrong: (flags or the lines of a YAML file, what is said)
    "no name": ("tier=best,base_url=http://x", "a model needs a name"),
    "no tier": ("name=a,base_url=http://x", "tier = '' is none of truth, best, hard, easy"),
    "a tier of 0": ("name=a,tier=0,base_url=http://x", "tier = '0'"),
    "no place": ("name=a,tier=best", "none is given"),
    "two places": ("name=a,tier=best,path=x,base_url=http://x", "base_url and path are given"),
    "an unknown key": ("name=a,tier=best,base_urk=http://x", "did you mean `base_url`?"),
    "a key itself": (f"name=a,tier=best,base_url=http://x,api_key={SECRET}", "did you mean `api_key_env`?"),
    "a key as its variable": (f"name=a,tier=best,base_url=http://x,api_key_env={SECRET}", "must be the name of a var"),
    "a missing key": ("name=a,tier=best,base_url=http://x,api_key_env=NOT_THERE", "NOT_THERE holds no key: export it"),
    "no address": ("name=a,tier=best,base_url=localhost:8000", "is not of the form http://host:port"),
    "a number": ("name=a,tier=best,base_url=http://x,temperature=hot", "temperature is not a number"),
    "a range": ("name=a,tier=best,base_url=http://x,top_p=2", "top_p = 2.0 must lie in (0, 1]"),
    "twice": ("name=a,name=b,tier=best", "name stands twice"),
    "a column": ("name=a,tier=truth,column=nowhere", "no column 'nowhere', but prompt, wanted, topic"),
    "no file": ("nowhere.yaml", "cannot be read: No such file"),
    "no list": ("models: 5", "holds no list of models"),
    "no YAML": ("models: [", "is not readable YAML: line"),
    "one name": ("[{name: a, tier: 1, column: wanted}, {name: a, tier: 2, column: wanted}]", "have the name 'a'"),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_models_that_cannot_be_asked(case, rows, tmp_path, align):
    given, wanted = MODELS[case]
    if "=" not in given and not given.endswith(".yaml"):
        (tmp_path / "tiers.yaml").write_text(given)
        given = tmp_path / "tiers.yaml"
    code, said, complaint = align(*flags(rows, tmp_path / "out", given))
    assert code == 2 and wanted in complaint and complaint.count("\n") == 1, complaint
    assert SECRET not in said + complaint and not (tmp_path / "out").exists()


def test_a_column_that_holds_no_answers(rows, tmp_path, align):
    people = spec("people", "truth", column="topic")
    code, _, complaint = align(*flags(rows, tmp_path / "out", people))
    assert (
        code == 2
        and "row 2, counted from 1: 'topic' is of type int, expected a text or a list of messages" in complaint
    )


def test_a_prompt_column_that_is_not_there(tmp_path, align):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [{"question": "w1"}])
    asked = flags(rows, tmp_path / "out", spec("a", "best", base_url="http://127.0.0.1:9"))
    code, _, complaint = align(*asked)
    assert code == 2 and "name the one that holds the prompts, --columns prompt=COLUMN" in complaint
    code, said, _ = align(*asked, "--columns", "prompt=question", "--dry_run")
    assert code == 0 and '"content": "w1"' in said and not (tmp_path / "out").exists()


def test_a_dry_run_asks_nobody(rows, tmp_path, align):
    code, said, _ = align(
        *flags(rows, tmp_path / "out", spec("a", "best", base_url="http://nowhere", n=4)), "--dry_run"
    )
    assert code == 0 and not (tmp_path / "out").exists()
    (one,) = read_models([spec("a", "best", base_url="http://nowhere")])
    assert f'"seed": {generate.seed_of(one, 2, 0)}' in said and said.count('"prompt"') == 3 and '"n": 4' in said


def test_an_address_with_a_password_is_used_and_not_written(rows, tmp_path, align):
    with chat_server.serving() as server:
        url = server.url.replace("http://", "http://me:hidden5@")
        code, _, complaint = align(*flags(rows, tmp_path / "out", spec("a", "best", base_url=url)))
    assert code == 0, complaint
    assert not any("hidden5" in file.read_text() for file in (tmp_path / "out").iterdir() if file.is_file())
    code, _, complaint = align("generate", "--recipe", str(tmp_path / "out" / "recipe.yaml"), "--overwrite")
    assert code == 2 and "its password or key is not kept in files" in complaint


def test_the_environment_of_openai_is_not_sent_elsewhere(rows, tmp_path, align, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9")
    with chat_server.serving() as server:
        assert align(*flags(rows, tmp_path / "out", spec("a", "best", base_url=server.url)))[0] == 0
    assert not any(SECRET in value for headers in server.headers for value in headers.values())
    assert os.environ["OPENAI_API_KEY"] == SECRET
