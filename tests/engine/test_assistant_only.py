"""Which tokens `assistant_only_loss` trains on: against masks written by hand, TRL's templates with tags, and the loss
of full logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from byte_tokens import TEMPLATE, answer, byte_tokenizer, user
from tiny import recipe, write_model, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_engine.data.batches import collate_sft
from align_engine.data.sources import load_rows
from align_engine.data.tokenize import describe, prepare
from align_engine.errors import BadInput
from align_engine.recipe import SftRecipe
from align_engine.run import train
from align_engine.training.metrics import read

TALK = [user("ab"), answer("cd"), user("e"), answer("f")]
WANTED = "<|u|>ab<|end|><|a|>[cd<|end|>]<|u|>e<|end|><|a|>[f<|end|>]"
TAGGED = TEMPLATE.replace(
    "{{ m.content }}<|end|>",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|end|>{% endif %}",
)


def shown(tokenizer: Any, row: dict[str, Any]) -> str:
    """The completion's text with brackets around what is trained on."""
    text, inside = "", False
    for token, one in zip(tokenizer.convert_ids_to_tokens(row["completion_ids"]), row["assistant_masks"], strict=True):
        text += "[" * (one and not inside) + "]" * (inside and not one) + token
        inside = bool(one)
    return text + "]" * inside


def made(
    rows: list[dict[str, Any]], template: str = TEMPLATE, **settings: Any
) -> tuple[Any, list[Any], dict[str, Any]]:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    found, report = prepare(datasets.Dataset.from_list(rows), tokenizer, "sft", assistant_only=True, **settings)
    return tokenizer, found.to_list(), report


@pytest.mark.parametrize("template", [TEMPLATE, TAGGED], ids=["text", "tags"])
def test_a_conversation_is_trained_on_where_the_assistant_speaks(template: str) -> None:
    tokenizer, (row,), report = made([{"messages": TALK}], template)
    assert shown(tokenizer, row) == WANTED
    assert "trained on 5 of 14 tokens: the assistant's messages" in describe(report)


@pytest.mark.parametrize("template", [TEMPLATE, TAGGED], ids=["text", "tags"])
def test_of_a_completion_with_several_turns_the_others_are_left_out(template: str) -> None:
    tokenizer, (row,), _ = made([{"prompt": TALK[:1], "completion": TALK[1:]}], template)
    assert shown(tokenizer, row) == "[" + WANTED.partition("[")[2]


def test_a_cut_row_keeps_the_masks_of_what_is_left() -> None:
    tokenizer, (row,), _ = made([{"messages": TALK}], max_length=7)
    assert shown(tokenizer, row) == "<|u|>ab<|end|><|a|>[cd]"
    with pytest.raises(BadInput, match="no token of the assistant's is left"):
        made([{"messages": TALK}], max_length=4)


def turns(reply: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": reply},
            {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Five of them."}]  # fmt: skip


def trl_templates() -> list[str]:
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    return sorted(
        path.name[:-6] for path in folder.glob("*.jinja") if (folder / f"{path.stem}_training.jinja").exists()
    )


@pytest.mark.parametrize("name", trl_templates())
def test_templates_without_tags_give_the_masks_of_trls_with_tags(name: str) -> None:
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    tokenizer, messages = byte_tokenizer(), turns("Four of them.")
    plain, tagged = ((folder / f"{name}{end}.jinja").read_text() for end in ("", "_training"))
    try:
        texts = [tokenizer.apply_chat_template(messages, chat_template=one, tokenize=False) for one in (plain, tagged)]
    except Exception as error:  # of the template
        pytest.skip(f"the template takes no such conversation: {error}")
    if texts[0] != texts[1]:
        pytest.skip("TRL writes the conversation differently for training")
    want = tokenizer.apply_chat_template(
        messages, chat_template=tagged, return_dict=True, return_assistant_tokens_mask=True
    )
    try:
        _, (row,), _ = made([{"messages": messages}], plain, max_length=None)
    except BadInput as error:
        assert "give it {% generation %} tags" in str(error)
        pytest.skip("refused: earlier turns change once others follow")
    assert row["completion_ids"] == want["input_ids"]
    ours, theirs = (
        stretches(tokenizer, row["completion_ids"], m) for m in (row["assistant_masks"], want["assistant_masks"])
    )
    prompt = tokenizer.apply_chat_template(
        messages[:1], chat_template=plain, add_generation_prompt=True, tokenize=False
    )
    for mine, one in zip(ours, theirs, strict=True):  # TRL learns what the generation prompt says too, in some of them
        assert mine and one.endswith(mine) and one.removesuffix(mine).rstrip() in prompt, (mine, one)


def stretches(tokenizer: Any, ids: list[int], masks: list[int]) -> list[str]:
    """The texts that masks of 1 make of tokens."""
    found = [[]]
    for token, one in zip(ids, masks, strict=True):
        if one:
            found[-1].append(token)
        elif found[-1]:
            found.append([])
    return [tokenizer.decode(one).strip() for one in found if one]


@pytest.mark.parametrize("pad_id", [0, None], ids=["padded", "packed"])
def test_batches_have_no_targets_elsewhere(pad_id: int | None) -> None:
    rows = [
        {"index": 0, "prompt_ids": [], "completion_ids": [5, 6, 7], "assistant_masks": [1, 0, 1]},
        {"index": 1, "prompt_ids": [8], "completion_ids": [9, 10], "assistant_masks": [1, 0]},
    ]
    targets = collate_sft(rows, pad_id).targets
    assert [one[one != -100].tolist() for one in targets] == [[7], [9]]


@pytest.mark.parametrize("packing", ["off", "on"])
def test_the_loss_is_that_of_the_assistants_tokens(tmp_path: Path, packing: str) -> None:
    model = write_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w0' if m.role == 'user' else 'w1' }} {{ m.content }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}w1 {% endif %}"
    )
    tokenizer.save_pretrained(model)
    talks = [[user("w5 w6"), answer("w7"), user("w8"), answer("w9 w10 w11")], [user("w12"), answer("w13 w14")]]
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": talk} for talk in talks])
    want, count = torch.zeros((), dtype=torch.float64), 0
    causal = AutoModelForCausalLM.from_pretrained(model).double().eval()
    for talk in talks:
        ids, learnt = [], []
        for message in talk:  # w0 or w1, the words, <eos>: of an answer all but the first
            words = tokenizer(f"{'w0' if message['role'] == 'user' else 'w1'} {message['content']} <eos>").input_ids
            ids += words
            learnt += [False] + [message["role"] == "assistant"] * (len(words) - 1)
        logps = causal(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        taken = logps.gather(1, torch.tensor(ids[1:])[:, None])[:, 0][torch.tensor(learnt[1:])]
        want, count = want - taken.detach().sum(), count + len(taken)
    settings: Any = {"packing": packing, "assistant_only_loss": True, "max_steps": 1}
    folder = train("sft", recipe(SftRecipe, model, rows, tmp_path / "out", **settings))
    assert read(folder.metrics)[0]["loss"] == pytest.approx(float(want / count), rel=1e-5)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "ab", "completion": "cd"}], "assistant_only_loss needs conversations, and this row is text"),
        ([{"prompt_ids": [5], "completion_ids": [6]}], "needs conversations, and the rows hold token ids"),
        ([{"messages": [user("ab")]}], "no token of the assistant's is left"),
        ([{"messages": [answer("ab"), user("c"), answer("d")]}], "begins with the assistant"),
    ],
)
def test_rows_that_say_nothing_of_an_assistant_are_refused(rows: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        made(rows)


def test_a_template_that_changes_earlier_turns_is_refused() -> None:
    changing = TEMPLATE.replace("{{ m.content }}", "{% if loop.last %}!{% endif %}{{ m.content }}")
    with pytest.raises(BadInput, match=r"give it \{% generation %\} tags"):
        made([{"messages": TALK}], changing)


def test_rows_are_read_as_from_a_file(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": TALK}])
    tokenizer = byte_tokenizer()
    found, _ = prepare(load_rows(str(path)), tokenizer, "sft", assistant_only=True)
    assert shown(tokenizer, found[0]) == WANTED
