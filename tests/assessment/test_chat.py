"""`align chat`: answers beside transformers' own, commands, text that must not act on a terminal."""

import fcntl
import io
import json
import os
import select
import signal
import subprocess
import sys
import termios
import time

import pytest
import tiny
import torch
from nursery import PATHS
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_engine import cli
from align_engine.assessment import chat
from align_engine.assessment.sections import TalkSection
from align_engine.assessment.voice import Voice
from align_engine.errors import BadInput

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of peft
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
GREEDY = ["--temperature", "0", "--max_new_tokens", "5"]


def written(path, seed=0, template=TEMPLATE, **more):
    tiny.write_model(path, seed=seed, max_position_embeddings=96, **more)
    if template:
        (path / "chat_template.jinja").write_text(template)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return written(tmp_path_factory.mktemp("chat") / "model", words=[*tiny.WORDS, "user", "assistant"])


@pytest.fixture(scope="module")
def adapter(model):
    """Of the model, with numbers in both of its matrices."""
    torch.manual_seed(1)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), LoraConfig(target_modules="all-linear", init_lora_weights=False)
    )
    adapted.save_pretrained(model.parent / "adapter")
    AutoTokenizer.from_pretrained(model).save_pretrained(model.parent / "adapter")
    return model.parent / "adapter"


def said(path, messages, adapter=None):
    """What transformers itself answers, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    loaded = AutoModelForCausalLM.from_pretrained(path)
    loaded = PeftModel.from_pretrained(loaded, adapter) if adapter else loaded
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = loaded.generate(**ids, max_new_tokens=5, do_sample=False, pad_token_id=1)
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def talk(monkeypatch, capsys, text, *flags):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    code = cli.main(["chat", "--model_name_or_path", *map(str, flags)])
    out = capsys.readouterr()
    return code, out.out.splitlines(), out.err


def turn(role, content):
    return {"role": role, "content": content}


def test_a_conversation_equals_transformers_and_is_saved(model, monkeypatch, capsys, tmp_path):
    saved = tmp_path / "talk.jsonl"
    text = f"w3 w4\nw5\n/save {saved}\n/save {saved}\n/save\n/tell\n/reset\n/save {tmp_path}/b\nw3 w4\n/quit\nw9\n"
    code, lines, _ = talk(monkeypatch, capsys, text, model, *GREEDY, "--system_prompt", "w1")
    first = said(model, [turn("system", "w1"), turn("user", "w3 w4")])
    second = said(
        model, asked := [turn("system", "w1"), turn("user", "w3 w4"), turn("assistant", first), turn("user", "w5")]
    )
    assert code == 0 and lines[1:4] == [first, second, f"written to {saved}"]
    assert lines[4:7] == [f"{saved} is there already: give another name", "/save needs the name of a file",
                          f"there is no command /tell: {chat.COMMANDS}"]  # fmt: skip
    assert lines[7:] == ["the conversation begins anew", "nothing has been said yet", first]
    row = json.loads(saved.read_text())
    assert row == {"model": str(model), "messages": [*asked, turn("assistant", second)]}
    assert first and second and not list(tmp_path.glob("*.align-tmp"))


def test_two_side_by_side_one_of_adapters(model, adapter, monkeypatch, capsys):
    code, lines, _ = talk(monkeypatch, capsys, "w3\n", model, adapter, *GREEDY)
    asked = [turn("user", "w3")]
    assert code == 0 and lines[:2] == [f"A: {model}", f"B: {adapter}"]
    assert lines[2:] == [f"A: {said(model, asked)}", f"B: {said(model, asked, adapter)}"]
    assert said(model, asked) != said(model, asked, adapter)


def test_sampling_is_a_function_of_the_seed(model):
    drawn = [list(Voice(str(model), TalkSection(seed=seed, max_new_tokens=8)).answer("w3")) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_escapes_in_answers_do_not_reach_the_terminal(tmp_path, monkeypatch, capsys):
    """Every word of this model clears the screen, or writes from right to left."""
    words = [f"\x1b[2J{i}" if i % 2 else f"\u202e{i}" for i in range(60)]
    path = written(tmp_path / "model", template=None, words=words)
    code, lines, _ = talk(monkeypatch, capsys, f"{words[3]} {words[4]}\n", path, *GREEDY)
    assert code == 0 and "no chat template" in lines[0]
    out = "\n".join(lines)
    assert "\x1b" not in out and "\u202e" not in out and ("\\x1b[2J" in out or "\\u202e" in out)
    drawn = io.StringIO()
    voices = [Voice(str(path), TalkSection(max_new_tokens=40)) for _ in "AB"]
    console = Console(file=drawn, force_terminal=True, width=60, height=12)
    chat.answer(words[3], voices, console)
    assert "\x1b[2J" not in drawn.getvalue() and "\u202e" not in drawn.getvalue()
    assert "─ A ─" in drawn.getvalue() and "─ B ─" in drawn.getvalue()


def in_front(terminal):
    """What makes a process the one that a terminal's keys send signals to."""

    def take():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever started the tests may ignore it
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    return take


def test_a_person_at_a_terminal(model, tmp_path):
    """Through a pty: an answer, a line that is dropped, a file, an end by Ctrl-D."""
    mine, theirs = os.openpty()
    command = [sys.executable, "-m", "align_engine", "chat", "--model_name_or_path", str(model), "--max_new_tokens"]
    process = subprocess.Popen(
        [*command, "80", "--temperature", "9"], stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True, preexec_fn=in_front(theirs),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(PATHS), "TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    screen, at = "", 0

    def until(text, keys=b""):
        """Read on; `keys` are pressed every second until then."""
        nonlocal screen, at
        end, pressed = time.monotonic() + 120, 0.0
        while text not in screen[at:]:
            assert process.poll() is None and time.monotonic() < end, screen
            if keys and time.monotonic() > pressed + 1:
                os.write(mine, keys)
                pressed = time.monotonic()
            if select.select([mine], [], [], 0.1)[0]:
                screen += os.read(mine, 4096).decode()
        at = screen.index(text, at) + len(text)

    until("Ctrl-C stops an answer")
    until("> ")
    os.write(mine, b"w3 w4\n")
    until(" w")
    until("> ")
    os.write(mine, b"w5")
    until("w5")
    until("the conversation stays", keys=b"\x03")  # Python misses one that comes just before it waits for input
    until("> ")
    os.write(mine, f"/save {tmp_path}/talk.jsonl\n".encode())
    until("written to")
    until("> ")
    os.write(mine, b"\x04")
    assert process.wait(60) == 0 and "Traceback" not in screen and "Loading weights" not in screen
    os.close(mine)
    (row,) = map(json.loads, (tmp_path / "talk.jsonl").read_text().splitlines())
    assert row["messages"][0] == turn("user", "w3 w4") and len(row["messages"]) == 2, "w5 was not said"


def test_an_answer_is_stopped_and_what_was_said_stays(model):
    voice = Voice(str(model), TalkSection(max_new_tokens=80, temperature=2.0))
    pieces = voice.answer("w3")
    first = next(pieces)
    pieces.close()
    assert voice.messages == [turn("user", "w3"), turn("assistant", first)]


def test_refusals(model, tmp_path, monkeypatch, capsys):
    code, _, err = talk(monkeypatch, capsys, "", model, model, model)
    assert code == 2 and "names more than two models" in err
    code, _, err = talk(monkeypatch, capsys, "", tmp_path / "none")
    assert code == 2 and "no such folder" in err
    path = written(tmp_path / "model", template=NO_SYSTEM)
    code, _, err = talk(monkeypatch, capsys, "", path, "--system_prompt", "w1")
    assert code == 2 and "refuses this conversation: no system" in err
    code, lines, _ = talk(monkeypatch, capsys, "w3 " * 100 + "\nw4\n", model, *GREEDY)
    assert code == 0 and "reads 96: /reset" in lines[1] and lines[2] == said(model, [turn("user", "w4")])


def test_what_generate_raises_is_said_and_nothing_was_said(model, monkeypatch):
    voice = Voice(str(model), TalkSection())
    monkeypatch.setattr(voice.model, "generate", lambda **more: 1 / 0)
    with pytest.raises(BadInput, match="cannot answer: ZeroDivisionError"):
        list(voice.answer("w3"))
    assert voice.messages == []
