"""Scorers are not our code: they get copies, may give any kind of number, and their failures bear their name."""

import asyncio
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoTokenizer

from align_engine.errors import BadInput, RunFailed
from align_engine.recipe import GrpoRecipe, RmRecipe, RolloutSection
from align_engine.reports.report import curves_of
from align_engine.rollouts import rewards
from align_engine.rollouts.rewards import Reward, load_reward, load_rewards, score
from align_engine.run import train
from align_engine.training import metrics
from align_engine.training.checkpoint import RunFolder

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("align_engine.reports.report.write_report", lambda *_: None)


def answers(count=2):
    return {"prompts": [[{"role": "user", "content": "q"}]] * count, "completions": [f"a{i}" for i in range(count)],
            "completion_ids": [[2, 3]] * count, "facts": [{"all": [{"n": 1}]}] * count}  # fmt: skip


def giving(values, count=2):
    return score([Reward("odd", lambda **_: values)], answers(count))[:, 0].tolist()


# -- arguments ------------------------------------------------------------------------------------------------------
def spoils(prompts, completions, completion_ids, facts, **_):
    for prompt, ids, fact in zip(prompts, completion_ids, facts):
        prompt[0]["content"] = "spoilt"
        prompt.append({"role": "user", "content": "more"})
        ids.clear()
        fact["all"][0]["n"] = 99
    completions.reverse()
    return [0.0] * len(prompts)


def test_each_function_has_copies_of_its_own():
    seen = []

    def looks(**columns):
        seen.append(columns)
        return [0.0, 0.0]

    given = answers()
    score([Reward("spoils", spoils), Reward("looks", looks), Reward("spoils again", spoils)], given)
    assert given == answers() and seen == [answers()]


def test_arrays_and_other_objects_are_copied_too():
    given = answers() | {"array": [np.zeros(3), np.zeros(3)], "bytes": [bytearray(b"a"), bytearray(b"b")]}

    def fills(array, bytes, **_):
        array[0][:], bytes[0][:] = 5, b"zzz"
        return [0.0, 0.0]

    score([Reward("fills", fills)], given)
    assert not given["array"][0].any() and given["bytes"][0] == b"a"


def test_a_function_that_spoils_its_arguments_does_not_change_the_training(model, tmp_path, monkeypatch):
    rows = tiny.write_rows(tmp_path / "prompts.jsonl", tiny.prompt_rows(8))
    plain, found = tiny.word_reward, {}

    def spoiling(prompts, completions, wanted, completion_ids, **_):
        said = plain(prompts, completions, wanted)
        for ids in completion_ids:
            ids[:] = [5] * len(ids)
        prompts[:], completions[:], wanted[:] = [], [], []
        return said

    for name, function in (("plain", plain), ("spoiling", spoiling)):
        monkeypatch.setattr(tiny, "word_reward", function)
        folder = train("grpo", tiny.online(GrpoRecipe, model, rows, tmp_path / name, max_steps=2))
        found[name] = [(record["loss"], record["grad_norm"]) for record in metrics.read(folder.metrics)]
    assert found["plain"] == found["spoiling"]


# -- what they give -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "values",
    [
        [0.5, True],
        (np.float32(0.5), np.int64(1)),
        [np.float16(0.5), np.bool_(True)],
        [torch.tensor(0.5), np.array(1)],
        [torch.tensor(0.5, dtype=torch.bfloat16), torch.tensor(1)],
        torch.tensor([0.5, 1.0], requires_grad=True),
        torch.tensor([0.5, 1.0], dtype=torch.bfloat16),
        np.array([0.5, 1.0], dtype=np.float32),
    ],
    ids=repr,
)
def test_numbers_of_every_kind_are_taken(values):
    assert giving(values) == [0.5, 1.0]


@pytest.mark.parametrize("missing", [None, float("nan"), np.float32("nan"), torch.tensor(float("nan"))], ids=repr)
def test_none_and_nan_say_that_a_completion_cannot_be_scored(missing):
    assert np.isnan(giving([missing, 2.0])).tolist() == [True, False]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([0.5], r"'odd' gave \[0.5\] for 2 completions"),
        ([0.5, 1.0, 2.0], "for 2 completions"),
        (0.5, "gave 0.5 for 2 completions"),
        (None, "gave None for 2 completions"),
        ("ab", "gave 'ab' for 2 completions"),
        ({0: 0.5, 1: 1.0}, "for 2 completions"),
        (torch.tensor(0.5), "for 2 completions"),
        (np.zeros((2, 1)), r"gave \[0.0\] for completion 1 of 2"),
        ([0.5, "1.0"], "gave '1.0' for completion 2 of 2"),
        ([0.5, [1.0]], r"gave \[1.0\] for completion 2 of 2"),
        ([0.5, 1j], "gave 1j for completion 2 of 2"),
        ([0.5, torch.zeros(1)], r"gave tensor\(\[0.\]\) for completion 2 of 2"),
    ],
    ids=repr,
)
def test_what_is_not_one_number_for_each_is_refused(values, said):
    with pytest.raises(RunFailed, match=rf"{said}.*one number \(or None\) for each$") as error:
        giving(values)
    assert str(error.value).startswith("reward 'odd' gave") and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "value", [float("inf"), -float("inf"), np.float32("inf"), torch.tensor(float("-inf")), 1e300, 10**400], ids=str
)
def test_what_is_not_finite_is_refused_by_the_functions_name(value):
    with pytest.raises(RunFailed, match=r"^reward 'odd' gave .* for completion 2 of 2: rewards are finite"):
        giving([0.5, value])


def test_weights_that_are_not_finite_are_refused_before_the_run(model, tmp_path):
    rows = tiny.write_rows(tmp_path / "prompts.jsonl", tiny.prompt_rows(4))
    for weight in ("nan", "inf", "-inf"):
        recipe = tiny.online(GrpoRecipe, model, rows, tmp_path / "run", reward_weights=[float(weight)])
        with pytest.raises(BadInput, match=rf"reward_weights = \[{weight}\] must be a finite number"):
            train("grpo", recipe)
    with pytest.raises(RunFailed, match=r"rewards times reward_weights = \[1e\+200\] exceed 1e\+18"):
        rewards.combine(torch.tensor([[1e5]], dtype=torch.float64), RolloutSection(reward_weights=[1e200]), [True])


def test_the_sum_is_weighted_and_the_penalty_falls_on_what_was_cut_off():
    scores = torch.tensor([[1.0, 2.0], [float("nan"), 3.0], [4.0, float("nan")]], dtype=torch.float64)
    settings = RolloutSection(reward_weights=[10.0, -1.0], missing_eos_penalty=0.5)
    assert rewards.combine(scores, settings, [True, False, False]).tolist() == [8.0, -3.5, 39.5]
    assert rewards.combine(scores, RolloutSection(), [True, False, True]).tolist() == [3.0, 3.0, 4.0]


def test_ranks_score_whole_groups_each():
    class Rank:
        num_processes = 2

        def __init__(self, process_index):
            self.process_index, self.state = process_index, self

    seen = []

    def numbers(completions, **_):
        seen.append(completions)
        return [float(text[1:]) for text in completions]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accelerate.utils.gather_object", lambda mine: mine)
        parts = [
            rewards.score_over_ranks([Reward("n", numbers)], answers(6), 2, Rank(rank))[:, 0].tolist()
            for rank in range(2)
        ]
        assert parts == [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0]] and seen[1] == ["a4", "a5"]
        rewards.score_over_ranks([Reward("n", numbers)], answers(2), 2, Rank(1))
        assert len(seen) == 2, "a rank without a group asks nobody"


def test_a_metric_that_is_not_finite_stays_json(tmp_path):
    folder = RunFolder(tmp_path, {})
    folder.truncate_metrics(0, {"step": 1, "reward": float("inf"), "kl": float("nan"), "loss": 0.5, "deep": [1e999]})
    text = folder.metrics.read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found == {"step": 1, "reward": None, "kl": None, "loss": 0.5, "deep": [None]}
    assert text == metrics.line({"step": 1, "reward": float("inf"), "kl": float("nan"), "loss": 0.5, "deep": [1e999]})
    points = curves_of([*metrics.read(folder.metrics), {"step": 2, "reward": 1.0}], ["reward", "kl"])
    assert points == {"reward": ([2], [1.0])}, "a report is drawn without them"


# -- what they raise ------------------------------------------------------------------------------------------------
FAILS = """
import sys

def helper(text):
    return 1 / 0

def divides(completions, **_):
    return [helper(text) for text in completions]

def leaves(completions, **_):
    sys.exit(0)

async def later(completions, **_):
    raise SystemExit

class Odd(BaseException):
    pass

class Object:
    def __call__(self, completions, **_):
        raise Odd("not\\nnow")

called = Object()

def parses(completions, **_):
    compile("1 +", "<completion>", "eval")
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("divides", "line 5): ZeroDivisionError: division by zero"),
        ("leaves", "line 11): SystemExit: 0"),
        ("later", "line 14): SystemExit: no message"),
        ("called", "line 21): Odd: not"),
        ("parses", "line 26): SyntaxError: invalid syntax"),
    ],
)
def test_whatever_a_function_raises_is_a_failure_with_its_name_file_and_line(name, said, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(FAILS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunFailed) as error:
        score([load_reward(f"mine.py:{name}", CPU)], answers())
    assert str(error.value) == f"reward {name!r} (mine.py {said}"


def test_a_failure_among_async_functions_leaves_none_behind():
    async def later(**_):
        await asyncio.sleep(0)
        return [1.0, 2.0]

    def fails(**_):
        raise ValueError("no")

    with pytest.raises(RunFailed, match=r"^reward 'fails' \(.*test_rewards.py line \d+\): ValueError: no$"):
        score([Reward("later", later), Reward("fails", fails)], answers())
    assert score([Reward("later", later), Reward("one", lambda **_: [3, 4])], answers()).tolist() == [[1, 3], [2, 4]]


def test_ctrl_c_passes():
    def interrupted(**_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score([Reward("slow", interrupted)], answers())


# -- names ----------------------------------------------------------------------------------------------------------
def test_scorers_of_one_name_are_told_apart(monkeypatch, tmp_path):
    monkeypatch.setattr(rewards, "reward_model", lambda path, device, **_: Reward("", spoils))
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text("def f(**_): pass\ndef g(**_): pass\n")

    def names(*specs):
        return [reward.name for reward in load_rewards(specs, CPU)]

    a, b = tmp_path / "a.py", tmp_path / "b.py"
    assert names("x/final") == ["final"]
    assert names("x/final", "y/final", f"{a}:f") == ["x/final", "y/final", "f"]
    assert names("x/one/final", "y/one/final/", "z/final") == ["x/one/final", "y/one/final", "z/final"]
    assert names(f"{a}:f", f"{b}:f", f"{a}:g") == ["a/f", "b/f", "g"]
    assert names("http://h:1/s", "tiny:word_reward") == ["http", "word_reward"]
    assert names("http://u:p@h:1/s", "http://h:2/s?key=k") == ["***@h:1/s/http", "h:2/s/http"]


def test_one_scorer_twice_is_refused(model, tmp_path):
    rows = tiny.write_rows(tmp_path / "prompts.jsonl", tiny.prompt_rows(4))
    recipe = tiny.online(GrpoRecipe, model, rows, tmp_path / "run", reward_funcs=["tiny:word_reward"] * 2)
    with pytest.raises(BadInput, match=r"reward_funcs = .* names a scorer twice"):
        train("grpo", recipe)


def test_a_fingerprint_follows_the_file_and_hides_secrets(tmp_path, model):
    (tmp_path / "mine.py").write_text("def f(**_): return [1]\n")
    first = rewards.fingerprint(f"{tmp_path}/mine.py:f")
    assert first == rewards.fingerprint(f"{tmp_path}/mine.py:f")
    (tmp_path / "mine.py").write_text("def f(**_): return [2]\n")
    assert rewards.fingerprint(f"{tmp_path}/mine.py:f") != first
    assert rewards.fingerprint("tiny:word_reward") != first
    assert len(rewards.fingerprint(str(model))) == len(first) == 16
    assert rewards.fingerprint("http://user:word@host/score?key=k") == "http://***@host/score?key=***"
    assert rewards.fingerprint("human") == "human"
    with pytest.raises(BadInput, match="no such file"):
        rewards.fingerprint("nowhere.py:f")


# -- reward models --------------------------------------------------------------------------------------------------
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w9 {% endif %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def with_template(source, path, template):
    tiny.write_model(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reward_model(model, tmp_path_factory):
    """Folder of a reward model."""
    path = tmp_path_factory.mktemp("rm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("align_engine.reports.report.write_report", lambda *_: None)
        rows = tiny.write_rows(path / "rows.jsonl", tiny.preference_rows(8))
        return train("rm", tiny.recipe(RmRecipe, model, rows, path / "run", max_steps=1)).final


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (NO_SYSTEM + CHAT, r"cannot read the prompts \(system, user\): .*System role not supported"),
        (None, r"cannot read the prompts \(user\): .*no chat template"),
    ],
)
def test_a_reward_model_that_cannot_read_the_prompts_is_refused_before_the_run(
    template, said, model, reward_model, tmp_path
):
    policy = with_template(model, tmp_path / "policy", CHAT)
    asked = {"role": "user", "content": "w1"}
    rows = [{"prompt": [asked]}] * 5 + [{"prompt": [{"role": "system", "content": "w2"}, asked]}]
    prompts = tiny.write_rows(tmp_path / "prompts.jsonl", rows)
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    tokenizer.chat_template = template
    (reward_model / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(reward_model)
    recipe = tiny.online(GrpoRecipe, policy, prompts, tmp_path / "run", reward_funcs=[str(reward_model)])
    with pytest.raises(BadInput, match=f"^reward_funcs: '.*final' {said}"):
        train("grpo", recipe)
    assert not (tmp_path / "run").exists()


def test_what_is_no_reward_model_is_refused_as_a_scorer(tmp_path):
    with pytest.raises(BadInput, match=r"^reward_funcs: '.*nowhere' is no reward model .*file.py:function"):
        load_reward(str(tmp_path / "nowhere"), CPU)


# -- people ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ('{"completion": "a1", "score": 1', "line 2 is not JSON"),
        ("[1]", "line 2 has no `completion`"),
        ('{"score": 1}', "line 2 has no `completion`"),
        ('{"completion": "a1", "score": "good"}', "line 2: score = 'good' is no finite number"),
        ('{"completion": "a1", "score": Infinity}', "line 2: score = inf is no finite number"),
        (b'{"completion": "\xff", "score": 1}', "line 2 is not JSON"),
    ],
    ids=str,
)
def test_damaged_marks_are_named_by_their_line(damage, said, tmp_path):
    folder = RunFolder(tmp_path, {})
    path = tmp_path / "marks" / "rollout-000000.jsonl"
    with pytest.raises(RunFailed, match="2 of 2 completions wait for marks"):
        rewards.human_scores(rewards.for_people(folder, 0, answers()), answers())
    first = b'{"completion": "a0", "score": 1}\n'
    path.write_bytes(first + (damage if isinstance(damage, bytes) else damage.encode()) + b"\n\n")
    with pytest.raises(BadInput, match=rf"rollout-000000.jsonl {said}"):
        rewards.human_scores(rewards.for_people(folder, 0, answers()), answers())
    path.write_bytes(first + b'{"completion": "a1", "score": "skip"}\n\n')
    assert rewards.human_scores(rewards.for_people(folder, 0, answers()), answers())[:, 0].nan_to_num(-1).tolist() == [
        1.0,
        -1.0,
    ]


# -- servers --------------------------------------------------------------------------------------------------------
class Scorer(ThreadingHTTPServer):
    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.asked = reply, []


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers.get("Authorization"), body))
        code, content = self.server.reply(body)
        try:
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            pass  # the client has left


@pytest.fixture
def scorer():
    started = []

    def start(reply):
        started.append(Scorer(reply))
        threading.Thread(target=started[-1].serve_forever, daemon=True).start()
        return started[-1], f"127.0.0.1:{started[-1].server_port}"

    yield start
    for one in started:
        one.shutdown()
        one.server_close()


def test_a_scorer_gets_its_secrets_and_no_message_shows_them(scorer, monkeypatch):
    server, host = scorer(lambda body: (403, b"go \x1b[31maway"))
    with pytest.raises(RunFailed) as error:
        score([load_reward(f"http://user:word@{host}/score?api_key=abc", CPU)], answers())
    assert str(error.value) == f"http://***@{host}/score?api_key=***: 403 go \x1b[31maway"
    assert server.asked[0][:2] == ("/score?api_key=abc", "Basic dXNlcjp3b3Jk")
    monkeypatch.setenv("ALIGN_SCORER_API_KEY", "token")
    with pytest.raises(RunFailed):
        score([load_reward(f"http://{host}/score", CPU)], answers())
    assert server.asked[1][:2] == ("/score", "Bearer token")


def test_each_part_of_the_answer_has_a_number_for_each_completion(scorer):
    """40 completions go in parts of 16, 16 and 8; one part too long and one too short are 40 numbers, too."""

    def uneven(body):
        count = len(body["completions"])
        return 200, json.dumps({"scores": [1.0] * {16: 17, 8: 6}[count]}).encode()

    _, host = scorer(uneven)
    with pytest.raises(RunFailed, match=r"score answered .*, expected \{'scores': \[...\]\} with 16 numbers$"):
        score([load_reward(f"http://{host}/score", CPU)], answers(40))
    for content in (b"[1, 2]", b'{"scores": 5}', b'{"values": [1, 2]}', b"null"):
        _, host = scorer(lambda body, content=content: (200, content))
        with pytest.raises(RunFailed, match=r"expected \{'scores'"):
            score([load_reward(f"http://{host}/score", CPU)], answers())
    _, host = scorer(lambda body: (200, b"no json"))
    with pytest.raises(RunFailed, match=f"^http://{host}/score: JSONDecodeError"):
        score([load_reward(f"http://{host}/score", CPU)], answers())


def test_a_scorer_that_hangs_fails_in_bounded_time(scorer, monkeypatch):
    monkeypatch.setattr(rewards, "PATIENCE", 0.3)
    done = threading.Event()
    server, host = scorer(lambda body: (done.wait(20), (200, b"{}"))[1])
    began = time.monotonic()
    with pytest.raises(RunFailed, match=f"^http://{host}/score: no answer within 0.3 seconds$"):
        score([load_reward(f"http://{host}/score", CPU)], answers())
    done.set()
    assert time.monotonic() - began < 10 and len(server.asked) == 1, "it is not asked again"


@pytest.mark.parametrize("address", ["http://", "http://host:port/x", "http://[::1/x", "http://user:pa/ss@host/x"])
def test_what_is_no_address_is_refused_without_its_secret(address):
    with pytest.raises(BadInput, match=r"^reward_funcs = .* is not of the form http://host:port") as error:
        load_reward(address, CPU)
    assert "ss@" not in str(error.value)


def test_an_address_from_a_saved_recipe_lacks_its_key(scorer):
    with pytest.raises(BadInput, match=r"its password or key is not kept .* variable ALIGN_SCORER_API_KEY$"):
        load_reward("http://***@host/score?key=***", CPU)


def test_a_function_that_turns_gradients_off_does_so_for_itself():
    def off(completions, **_):
        torch.set_grad_enabled(False)
        return [0.0 for _ in completions]

    rewards.score([Reward("off", off)], answers())
    assert torch.is_grad_enabled()
