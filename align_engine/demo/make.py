"""Writes the demo's data, tokenizer and untrained model."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from align_engine.demo.task import Question, ask, careful, careless, chat, check, hasty, write

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_demo(
    out_dir: str | Path, seed: int = 0, *, sft_rows: int = 4000, preference_rows: int = 2000, heldout_rows: int = 300
) -> Path:
    """Write the demo into the folder `out_dir` and return it. The same seed writes the same bytes.

    sft.jsonl          prompt, completion: what the team wrote, good and bad
    preference.jsonl   prompt, chosen, rejected: two of the team's answers, the better one by the checker is chosen
    ranked.jsonl       the same prompts with pairs of three ranked answers, for the reward model
    prompts.jsonl      the prompts of preference.jsonl, with form and answer for `check`
    heldout.jsonl      prompt, completion (the careful answer), chosen, rejected; form and answer for `check`
    tokenizer/         a byte-level BPE with a chat template, for `from_pretrained`
    model/             a small untrained Qwen2, with the tokenizer

    No prompt stands twice, in one file or in two.
    """
    rng, out = random.Random(seed), Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    questions = distinct_questions(sft_rows + preference_rows + heldout_rows, rng)
    heldout, sft = questions[:heldout_rows], questions[heldout_rows : heldout_rows + sft_rows]
    preference = questions[heldout_rows + sft_rows :]
    rows = {
        "sft": [{"prompt": q.row()["prompt"], "completion": message(write(q, rng))} for q in sft],
        "preference": [{"prompt": q.row()["prompt"], **pair(q, rng)} for q in preference],
        "prompts": [q.row() for q in preference],
        "heldout": [{**q.row(), "completion": message(careful(q, rng)), **pair(q, rng)} for q in heldout],
        "ranked": [{"prompt": q.row()["prompt"], **ranks} for q in preference for ranks in ranked_pairs(q, rng)],
    }
    for name, content in rows.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    turns = (turn for row in rows["sft"] for turn in row["prompt"] + row["completion"])
    texts = [f"{turn['role']}\n{turn['content']}" for turn in turns]
    tokenizer = make_tokenizer(texts)
    for folder in ("tokenizer", "model"):
        tokenizer.save_pretrained(out / folder)
    make_model(tokenizer, seed).save_pretrained(out / "model")
    return out


def distinct_questions(count: int, rng: random.Random) -> list[Question]:
    """`count` questions, all with different texts. The task has more than 100,000."""
    found: dict[str, Question] = {}
    while len(found) < count:
        question = ask(rng)
        found.setdefault(question.text, question)
    return list(found.values())


def graded_answers(question: Question, count: int, rng: random.Random) -> list[tuple[float, str]]:
    """`count` answers of the team with different grades, the best first."""
    graded: dict[float, str] = {}
    while len(graded) < count:
        answer = write(question, rng)
        graded.setdefault(check(question.row(), answer), answer)
    return sorted(graded.items(), reverse=True)


def pair(question: Question, rng: random.Random) -> dict[str, Any]:
    """chosen and rejected, as messages."""
    (_, chosen), (_, rejected) = graded_answers(question, 2, rng)
    return {"chosen": message(chosen), "rejected": message(rejected)}


def ranked_pairs(question: Question, rng: random.Random) -> list[dict[str, Any]]:
    """Every pair of three answers whose ranks are fixed in advance: right in the demanded form, right in another or
    among pleasantries, wrong in the demanded form. A wrong answer loses to both, so that content outweighs form."""
    answers = [
        careful(question, rng),
        rng.choice((careless(question, rng), chat(question.answer))),
        hasty(question, rng),
    ]
    pairs = itertools.combinations(enumerate(map(message, answers), start=1), 2)
    return [
        {"chosen": chosen, "rejected": rejected, "chosen_rank": i, "rejected_rank": j}
        for (i, chosen), (j, rejected) in pairs
    ]


def message(content: str) -> list[dict[str, str]]:
    """An answer as TRL's conversational format has it."""
    return [{"role": "assistant", "content": content}]


def make_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> Qwen2Tokenizer:
    """A byte-level BPE with a chat template, trained on `texts`. EOS is <|im_end|>.

    It is of the class that transformers loads beside any Qwen2 model, whatever was saved there. No token joins a space
    or a quote to a word, so that an answer's word is the same token in every form.
    """
    core = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+|\s"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    learned = json.loads(core.to_str())["model"]
    parts: dict[str, Any] = {"vocab": learned["vocab"], "merges": [tuple(merge) for merge in learned["merges"]]}
    names: dict[str, Any] = {"unk_token": None, "pad_token": special[0], "eos_token": special[2]}
    tokenizer = Qwen2Tokenizer(**parts, **names, extra_special_tokens=[special[1]])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: Qwen2Tokenizer, seed: int = 0, *, hidden: int = 128, layers: int = 3) -> Qwen2ForCausalLM:
    """A small Qwen2 with random weights that fits the tokenizer."""
    ids: dict[str, Any] = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)
