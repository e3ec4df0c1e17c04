"""The pages as a browser gets and sends them, and as somebody who means no good does."""

import contextlib
import html
import re
import socket
import threading
from html.parser import HTMLParser

import pytest
import ratings
from fastapi.testclient import TestClient

from align_engine.assessment.rate import markup, pages, people, records, serve, tasks
from align_engine.assessment.rate.items import Answer, Item
from align_engine.assessment.rate.sections import RateRecipe
from align_engine.errors import BadInput
from align_engine.recipe import check

SCRIPT = "<script>document.title = 'broken into'</script><img src=x onerror=alert(1)>"


@pytest.fixture
def served(tmp_path):
    """Makes (store, browser's maker) of a project; a browser is of somebody, by their link."""
    stores = []

    def make(found, gold=(), root="", **settings):
        store = ratings.project(tmp_path / str(len(stores)), found, gold, **settings)
        stores.append(store)
        app = pages.app(store, root_path=root)

        def browser(name=None, **headers):
            client = TestClient(app, headers=headers, raise_server_exceptions=True)
            made = ratings.Browser(client)
            return made.enter(people.link(store, name, 1)) if name else made

        return store, browser

    yield make
    for store in stores:
        store.close()


def marks(store):
    return [mark for record in records.read(store) for mark in record.marks]


@pytest.mark.parametrize(("mode", "found", "form", "value"), [
    ("pair", ratings.pairs(2), {}, [1, 2]), ("mark", ratings.singles(2), {"choice": "ok"}, [1]),
    ("score", ratings.singles(2), {"choice": "4"}, [4]),
    ("rank", ratings.ranked(2, 3), {"rank1": "1", "rank2": "1", "rank3": "2"}, None),
])  # fmt: skip
def test_rating_skipping_undoing_and_commenting(mode, found, form, value, served):
    store, browser = served(found, mode=mode)
    anna = browser("anna")
    form = form or {"choice": anna.good()}
    anna.send(**form, comment="  said & done  ")
    assert anna.status == 200 and "<b>1</b> rated, 1 left" in anna.text
    (mark,) = marks(store)
    assert mark.comment == "said & done" and (mark.value == value or value is None)
    anna.send(choice="skip")
    assert "Nothing left to rate" in anna.text and "1 skipped" in anna.text
    anna.undo().undo()
    assert "said &amp; done</textarea>" in anna.text, "the comment is there again"
    if mode == "rank":
        assert anna.text.count(" selected>") == 3
    else:
        assert anna.text.count("your earlier choice") == 1
    assert len(marks(store)) == 0
    anna.undo()
    assert anna.status == 409 and anna.said == "There is nothing to undo."


def test_nothing_is_seen_without_a_link(served):
    store, browser = served(ratings.pairs(2))
    anna, stranger = browser("anna"), browser()
    for path in ("/", "/lead", "/rate", "/people", "/enter/wrong", "/enter/" + "a" * 300):
        assert stranger.look(path).status == 403 and "good" not in stranger.text and "prompt" not in stranger.text
    for path in ("/docs", "/openapi.json", "/redoc", "/static/../store.py", "/static/x", "/enter/", "/ratings.sqlite"):
        assert stranger.look(path).status == 404
    for path in ("/rate", "/undo", "/people"):
        assert stranger.saw(stranger.client.post(path, data=anna.fields | {"choice": "1"})).status == 403
    assert not marks(store)
    with store.writing() as db:
        db.execute("UPDATE person SET expires = 1")
    assert anna.send(choice="1").status == 403 and "expired" in anna.text
    people.revoke(store, "anna")
    assert anna.look().status == 403 and "taken back" in anna.text
    assert not marks(store)


def test_an_assessor_is_not_the_lead(served):
    store, browser = served(ratings.pairs(2))
    anna, lead = browser("anna"), browser("lead")
    key = anna.field("key")
    assert anna.look("/lead").status == 403 and "leads the rating" in anna.text
    assert anna.saw(anna.client.post("/people", data={"key": key, "what": "add", "name": "eve"})).status == 403
    assert lead.status == 200 and "Progress and agreement" in lead.text
    assert lead.look("/").text.count("Progress and agreement") == 1, "nothing to rate, but to see"
    key = lead.field("key")
    added = lead.saw(lead.client.post("/people", data={"key": key, "what": "add", "name": "boris"}))
    (link,) = re.findall(r'<code class="link">http://testserver(/enter/[\w-]+)</code>', added.text)
    assert browser().look(link).status == 200
    assert link not in lead.look("/lead").text, "it is shown once"
    for form, said in (
        ({"what": "add", "name": "boris"}, "somebody of that name"), ({"what": "add", "name": "lead"}, "somebody"),
        ({"what": "add", "name": "\x1b[31m"}, "printable"), ({"what": "add", "name": "x" * 41}, "printable"),
        ({"what": "revoke", "name": "boris"}, "has ended"), ({"what": "renew", "name": "anna"}, "shown this once"),
    ):  # fmt: skip
        assert said in lead.saw(lead.client.post("/people", data={"key": key} | form)).said
    for form in ({"what": "revoke", "name": "lead"}, {"what": "renew", "name": "zoe"}, {"what": "x"}, {}):
        assert lead.saw(lead.client.post("/people", data={"key": key} | form)).status == 400
    assert browser().look(link).status == 403 and anna.look().status == 403, "taken back, renewed"
    assert people.names(store) == ["anna", "lead", "boris"]


def test_forms_of_others_are_not_taken(served):
    store, browser = served(ratings.pairs(4))
    anna, boris = browser("anna"), browser("boris")
    form = anna.fields | {"choice": "1"}
    for fields, headers in (
        ({name: value for name, value in form.items() if name != "key"}, {}),
        (form | {"key": boris.field("key")}, {}), (form | {"key": "ключ"}, {}),
        (form, {"sec-fetch-site": "cross-site"}), (form, {"sec-fetch-site": "same-site"}),
    ):  # fmt: skip
        assert anna.client.post("/rate", data=fields, headers=headers).status_code == 403
    for url in ("/rate", "/undo"):
        assert anna.client.get(url, params=form, follow_redirects=False).status_code == 303, "a link changes nothing"
    stolen = boris.client.post("/rate", data=form | {"key": boris.field("key")})
    assert stolen.status_code == 409 and "not yours" in stolen.text
    assert not marks(store)
    assert anna.saw(anna.client.post("/rate", data=form)).status == 200
    assert anna.client.post("/rate", data=form).status_code == 200, "the same again is no second mark"
    assert anna.client.post("/rate", data=form | {"choice": "2"}).status_code == 409
    assert len(marks(store)) == 1


@pytest.mark.parametrize(("fields", "status"), [
    ({"choice": ""}, 422), ({"choice": "9"}, 422), ({}, 422), ({"task": "x", "choice": "1"}, 400),
    ({"task": str(2**70), "choice": "1"}, 400), ({"task": "77", "choice": "1"}, 409),
    ({"version": "5", "choice": "1"}, 409), ({"choice": "1", "comment": "c" * 5001}, 413),
    ({"choice": "1", "comment": "c" * 10**6}, 413), ({"version": "1" * 5000, "choice": "1"}, 400),
], ids=str)  # fmt: skip
def test_forms_that_no_page_sends(fields, status, served):
    store, browser = served(ratings.pairs(2))
    anna = browser("anna")
    found = anna.client.post("/rate", data=anna.fields | fields)
    assert found.status_code == status and not marks(store)
    for body in (b"\xff\xfe", b"&".join(b"a=1" for _ in range(60)), b"", b'{"task": 1}'):
        assert anna.client.post("/rate", content=body).status_code in (400, 403)
    assert anna.look().status == 200


def test_two_projects_in_one_browser(served):
    _, first = served(ratings.pairs(2))
    _, second = served(ratings.pairs(2))
    anna = first("anna")
    assert anna.client.cookies.keys() != second("anna").client.cookies.keys()


def test_answers_can_do_nothing_on_the_page(served):
    dangerous = "\n\n".join([
        SCRIPT, "[click](javascript:alert(1))", "![pixel](http://evil.example/x.png)", "<http://evil.example>",
        "[ref]: javascript:alert(1)\n[ref]", "# Heading\n\n<style>body{display:none}</style>",
        f"```html\n{SCRIPT}\n```", f"`{SCRIPT}`", f"| a | {SCRIPT} |\n|---|---|\n| b | </td></table> |",
        "</textarea></form><form action='http://evil.example'>", "\x1b]0;title\x07\x1b[2J\x00", "\u202egnp.exe",
        '```"onmouseover="alert(1)\ncode\n```', "&lt;script&gt;", "{{ 7 * 7 }} {% raw %}",
    ])  # fmt: skip
    _, browser = served([Item(dangerous, [Answer(dangerous, {}), Answer([
        {"role": "assistant", "content": dangerous, "tool_calls": [{"function": SCRIPT}]},
        {"role": SCRIPT, "content": None}], {})])], question=SCRIPT)  # fmt: skip
    anna = browser("anna")
    assert anna.status == 200 and len(anna.answers) == 2
    seen = Seen(anna.text)
    assert seen.tags <= {
        "html", "head", "meta", "title", "link", "script", "body", "header", "span", "b", "progress", "main", "h1",
        "h2", "section", "div", "form", "input", "details", "summary", "textarea", "button", "kbd", "p", "pre", "code",
        "br", "table", "thead", "tbody", "tr", "th", "td",
    }  # fmt: skip
    assert seen.places == ["/static/rate.css", "/static/rate.js", "/rate", "/undo"]
    assert not [name for name in seen.attributes if name.startswith("on") or name == "style"]
    assert not set("\x1b\x00\x07") & set(anna.text) and "\\x1b]0;title\\x07" in anna.text, "shown, not done"
    assert "{{ 7 * 7 }}" in anna.text and html.escape(SCRIPT, quote=False).split(";")[0] in anna.text


class Seen(HTMLParser):
    """Tags of a page, names of their attributes, and where they lead."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.places = set(), set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.places += [value for name, value in attrs if name in ("href", "src", "action", "formaction", "content")
                        and tag != "meta"]  # fmt: skip


def test_every_response_is_sealed(served):
    store, browser = served(ratings.pairs(2))
    anna = browser("anna")
    key = anna.field("key")
    for response in (
        anna.client.get("/"), anna.client.get("/nothing"), browser().client.get("/"),
        anna.client.get("/static/rate.js"), anna.client.post("/rate", data={}),
        anna.client.post("/undo", data={"key": key}), browser("lead").client.get("/lead"),
    ):  # fmt: skip
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert response.headers["x-content-type-options"] == "nosniff" and response.headers["referrer-policy"]
        assert "style=" not in response.text and not re.search(r"<script(?! src)", response.text)
    assert anna.client.get("/").headers["cache-control"] == "no-store"
    response = browser().client.get("/enter/" + people.link(store, "zoe", 1), follow_redirects=False)
    cookie = response.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=lax" in cookie and "secure" not in cookie
    secure = TestClient(pages.app(store), base_url="https://testserver")
    again = secure.get("/enter/" + people.link(store, "zoe", 1), follow_redirects=False)
    assert "secure" in again.headers["set-cookie"].lower()


def test_texts_of_any_script_and_length(served):
    texts = [
        "مرحبا **بالعالم**",
        "שלום",
        "日本語のテキスト",
        "हिन्दी",
        "emoji 👩‍👩‍👧",
        "half \ud800 pair",
        "x" * 10**6 + "END",
    ]
    _, browser = served([Item(f"p{i}", [Answer(text, {})]) for i, text in enumerate(texts)], mode="mark")
    anna, seen = browser("anna"), []
    while "Nothing left" not in anna.text:
        seen.append(anna.answers[0])
        assert 'class="text" dir="auto"' in anna.text
        anna.send(choice="ok")
    wanted = [text.replace("**", "").replace("\ud800", "\\ud800") for text in texts]
    assert sorted(seen) == sorted(wanted), "whole, each of them"


def test_a_guideline_and_conversations(served, tmp_path):
    (tmp_path / "guide.md").write_text("# Rules\n\n- be **fair**")
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    answers = [Answer([{"role": "assistant", "content": text}], {}) for text in ("4", "5")]
    _, browser = served([Item(prompt, answers)], guideline=str(tmp_path / "guide.md"))
    text = browser("anna").text
    assert "<strong>fair</strong>" in text and '<div class="role">system</div>' in text
    assert '<div class="role">assistant</div>' not in text, "an answer is an answer"


def test_behind_a_prefix(served):
    store, browser = served(ratings.pairs(2), root="/team/a")
    for stripped in (False, True):  # by the proxy, or not
        made = browser()
        token = people.link(store, "anna", 1)
        path = f"/enter/{token}" if stripped else f"/team/a/enter/{token}"
        response = made.client.get(path, follow_redirects=False)
        assert response.headers["location"] == "/team/a/" and "Path=/team/a/" in response.headers["set-cookie"]
    text = made.look("/team/a/").text
    assert 'action="/team/a/rate"' in text and 'src="/team/a/static/rate.js"' in text
    fields = made.fields | {"choice": "1"}
    assert made.client.get("/team/a/static/rate.js").status_code == 200
    assert made.client.post("/team/a/rate", data=fields, follow_redirects=False).headers["location"] == "/team/a/"


def test_a_full_disk_is_said_on_the_page(served, capsys):
    store, browser = served(ratings.pairs(5))
    anna = browser("anna")
    pages_now = store.connection.execute("PRAGMA page_count").fetchone()[0]
    store.connection.execute(f"PRAGMA max_page_count = {pages_now}")
    form, statuses = anna.fields, []
    for _ in range(4):
        statuses.append(anna.send(choice="1", comment="c" * 4000).status)
        if statuses[-1] == 507:
            break
        form = anna.fields
    assert statuses[-1] == 507 and "not saved" in anna.text and "full" in capsys.readouterr().out
    store.connection.execute("PRAGMA max_page_count = 100000")
    assert anna.saw(anna.client.post("/rate", data=form | {"choice": "1"})).status == 200, "the same form again"
    assert len(marks(store)) == len(statuses)


def test_many_at_once_lose_and_double_nothing(served):
    store, browser = served(ratings.pairs(60), k=2)
    crowd = [browser(f"person {i}") for i in range(6)]

    def work(one):
        while "Nothing left" not in one.text:
            form = one.fields | {"choice": one.good()}
            one.client.post("/rate", data=form)  # a double click
            one.saw(one.client.post("/rate", data=form))

    threads = [threading.Thread(target=work, args=(one,)) for one in crowd]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    found = records.read(store)
    assert {len(record.marks) for record in found} == {2}
    assert all(mark.value == [1, 2] for record in found for mark in record.marks)
    assert tasks.standing(store, people.let_in(store, people.link(store, "person 0", 1)))["left"] == 0


def test_the_leads_figures(served):
    gold = [one._replace(gold=[1, 2], prompt="gold") for one in ratings.pairs(1)]
    _, browser = served(ratings.pairs(4), gold, k=2)
    for name, choose in (("anna", lambda one: one.good()), ("boris", lambda one: "1")):
        one = browser(name)
        while "Nothing left" not in one.text:
            one.send(choice=choose(one))
    text = re.sub(r"\s+", " ", browser("lead").text)
    assert "4 of 4 items finished" in text and "10</b>marks given, 0 missing" in text
    assert re.search(r'<td dir="auto">anna</td><td>5</td><td>0</td>.*?<td>1 of 1</td>', text)
    assert re.search(r'<td dir="auto">boris</td><td>5</td>.*?<td>100 %</td>', text), "he takes the first one always"


@pytest.mark.parametrize(
    "text", ["", "\r\n", "# " * 1000, "[" * 3000, "*" * 5000, "> " * 500 + "x", "|" * 2000 + "\n" + "|-" * 1000]
)
def test_odd_markdown_is_rendered(text):
    assert markup.rendered(text) is not None


def test_addresses(tmp_path):
    with contextlib.closing(serve.listening("127.0.0.1", 0)) as bound:
        assert bound.proto == socket.IPPROTO_TCP, "else each page waits for 40 ms (Nagle, and delayed acknowledgements)"
        with pytest.raises(BadInput, match="in use; give another --port"):
            serve.listening("127.0.0.1", bound.getsockname()[1])
    with pytest.raises(BadInput, match=r"host = 'no.such.host.invalid'"):
        serve.listening("no.such.host.invalid", 0)


@pytest.mark.parametrize(("settings", "said"), [
    ({"assessors": ["lead"]}, "A name is"), ({"assessors": ["a", "a"]}, "names somebody twice"),
    ({"assessors": ["\x1b[31m"]}, "A name is"), ({"scale": [1, 11]}, "scale"), ({"scale": [3, 3]}, "at most ten steps"),
    ({"scale": [1]}, "lowest and the highest"), ({"root_path": "team"}, "must begin with /"),
    ({"dataset_name": "x", "run_dir": "y"}, "give one of them"), ({"overlap": 2.0}, "overlap"), ({"k": 0}, "k = 0"),
    ({"port": 70000}, "port"), ({"link_days": 0.0}, "link_days"),
], ids=str)  # fmt: skip
def test_settings_that_cannot_be(settings, said, tmp_path):
    with pytest.raises(BadInput, match=said):
        check(ratings.recipe(tmp_path, **settings))
    check(ratings.recipe(tmp_path))
    with pytest.raises(BadInput, match="project_dir = '' is required"):
        check(RateRecipe())
