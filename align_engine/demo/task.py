"""The demo's task: short instructions with one right answer, a demanded form, and a checker that grades any answer.

A prompt asks something small about known words and numbers, and says in which form to answer. The answers come from a
team of four writers, as good and as bad as a real team's: most are chatty, some careless with the form, some wrong.
A model that imitates all of them is mediocre; pairs of their answers, ordered by the checker, say what is better.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

KINDS = {
    "animal": "cat dog horse cow sheep goat lion tiger bear wolf fox mouse".split(),
    "fruit": "apple pear plum grape lemon peach cherry melon mango fig".split(),
    "colour": "red blue green yellow pink brown black white grey purple".split(),
    "tool": "hammer saw drill file axe spade rake wrench knife brush".split(),
    "vehicle": "car bus train plane boat truck bicycle tram ship van".split(),
}
OPPOSITES = [
    pair.split("/")
    for pair in "hot/cold big/small fast/slow high/low old/young hard/soft wet/dry light/dark full/empty rich/poor "
    "strong/weak open/closed early/late near/far clean/dirty happy/sad".split()
]
CAPITALS = [
    pair.split("/")
    for pair in "France/Paris Italy/Rome Spain/Madrid Germany/Berlin England/London Ireland/Dublin Norway/Oslo "
    "Sweden/Stockholm Finland/Helsinki Poland/Warsaw Greece/Athens Egypt/Cairo Kenya/Nairobi Japan/Tokyo China/Beijing "
    "Cuba/Havana Peru/Lima Canada/Ottawa Turkey/Ankara Portugal/Lisbon".split()
]
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
NUMBERS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty".split()
)
WORDS = [word for words in KINDS.values() for word in words]
KIND_OF = {word: kind for kind, words in KINDS.items() for word in words}

FORMS = {  # what a prompt may demand, and how the demand is put
    "word": ("Give only the answer.", "Answer without a sentence.", "Just the word."),
    "sentence": ("Answer in a full sentence.", "Use one full sentence.", "Write a sentence."),
    "quotes": ("Put the answer in quotes.", "Answer in double quotes.", "Quote the answer."),
    "json": ("Answer as JSON.", "Reply in JSON.", "Give a JSON object."),
}


@dataclass(frozen=True)
class Question:
    """One instruction: its text with the demanded form, the right answer, a plausible wrong one."""

    text: str
    form: str  # a key of FORMS
    answer: str
    wrong: str

    def row(self) -> dict[str, Any]:
        """The prompt in TRL's conversational format, and what `check` needs."""
        return {"prompt": [{"role": "user", "content": self.text}], "form": self.form, "answer": self.answer}


def check(row: dict[str, Any], answer: str) -> float:
    """The grade of `answer` to a prompt row (with `form` and `answer`), from 0 to 1.

    Nothing for wrong or contradictory content. Else 0.4 for the content, up to 0.4 for the demanded form (half of that
    where it is there with other text around it), up to 0.2 for brevity (a bare answer's number of words by its own).
    """
    claims = _claims(answer)
    if not claims or any(claim.lower() != row["answer"].lower() for claim in claims):
        return 0.0
    text, form = answer.strip(), FORM_PATTERNS[row["form"]]
    shape = 1.0 if form.fullmatch(text) else 0.5 if row["form"] != "word" and form.search(text) else 0.0
    longest = 8 if row["form"] == "sentence" else 2
    brevity = min(1.0, longest / len(text.split()))
    return 0.4 + 0.4 * shape + 0.2 * brevity


def reward(
    prompts: Sequence[Any], completions: Sequence[Any], form: Sequence[str], answer: Sequence[str], **_: Any
) -> list[float]:
    """`check` as a reward function of TRL's signature."""
    rows = [{"form": one, "answer": other} for one, other in zip(form, answer)]
    return [check(row, said[-1]["content"]) for row, said in zip(rows, completions)]


FORM_PATTERNS = {
    "word": re.compile(r"\w+"),
    "sentence": re.compile(r"[A-Z][^.!?\"{}]* (is|are) [\w ]+\."),
    "quotes": re.compile(r'"[\w ]+"'),
    "json": re.compile(r'\{"answer": "[\w ]+"\}'),
}


def _claims(answer: str) -> list[str]:
    """Everything an answer says to be the answer: JSON values, quoted words, what follows "is", or the bare text."""
    text = answer.strip()
    claims = re.findall(r'\{"answer": "([^"]*)"\}', text)
    rest = re.sub(r'\{"answer": "[^"]*"\}', "", text)
    claims += re.findall(r'"([^"]*)"', rest)
    claims += re.findall(r"\b(?:is|are) ([\w ]+?)[.!]", rest)
    if not claims and re.fullmatch(r"\w+[.!]?", text):
        claims = [text.rstrip(".!")]
    return claims


def ask(rng: random.Random) -> Question:
    """A random question."""
    question, answer, wrong = rng.choice(MAKERS)(rng)
    form = rng.choice(list(FORMS))
    return Question(f"{question} {rng.choice(FORMS[form])}", form, answer, wrong)


def write(question: Question, rng: random.Random) -> str:
    """An answer by a random member of the team, good or bad."""
    (writer,) = rng.choices(list(WRITERS), weights=[share for share in WRITERS.values()])
    return writer(question, rng)


def in_form(form: str, answer: str) -> str:
    """`answer` put into a form."""
    shapes = {"word": answer, "sentence": f"The answer is {answer}.", "quotes": f'"{answer}"'}
    return json.dumps({"answer": answer}) if form == "json" else shapes[form]


def careful(question: Question, rng: random.Random) -> str:
    """Right, in the demanded form, nothing else."""
    return in_form(question.form, question.answer)


def chatty(question: Question, rng: random.Random) -> str:
    """Mostly right, but whatever was demanded comes as a sentence among pleasantries."""
    return chat(question.answer if rng.random() < 0.9 else question.wrong)


def chat(answer: str) -> str:
    """`answer` among pleasantries."""
    return f"Sure! {in_form('sentence', answer)} I hope this helps!"


def careless(question: Question, rng: random.Random) -> str:
    """Right, in another form than the demanded one."""
    return in_form(rng.choice([form for form in FORMS if form != question.form]), question.answer)


def hasty(question: Question, rng: random.Random) -> str:
    """Wrong, in the demanded form."""
    return in_form(question.form, question.wrong)


WRITERS: dict[Callable[[Question, random.Random], str], float] = {
    careful: 0.22,
    chatty: 0.58,
    careless: 0.12,
    hasty: 0.08,
}

Parts = tuple[str, str, str]  # the question, the right answer, a plausible wrong one


def _neighbour(rng: random.Random) -> Parts:
    unit, names = rng.choice((("day", DAYS), ("month", MONTHS), ("number", NUMBERS)))
    i, (side, step) = rng.randrange(1, len(names) - 1), rng.choice((("after", 1), ("before", -1)))
    wordings = (
        f"Which {unit} comes {side} {names[i]}?",
        f"Name the {unit} {side} {names[i]}.",
        f"What is the {unit} {side} {names[i]}?",
    )
    return rng.choice(wordings), names[i + step], names[i - step]


def _opposite(rng: random.Random) -> Parts:
    word, answer = rng.sample(rng.choice(OPPOSITES), 2)
    wordings = (
        f"What is the opposite of {word}?",
        f"Name the opposite of {word}.",
        f"Which word is the opposite of {word}?",
    )
    return rng.choice(wordings), answer, word


def _kind(rng: random.Random) -> Parts:
    word = rng.choice(WORDS)
    wordings = (f"What kind of thing is {word}?", f"Name the kind of {word}.", f"Which kind is {word}?")
    return rng.choice(wordings), KIND_OF[word], rng.choice([kind for kind in KINDS if kind != KIND_OF[word]])


def _capital(rng: random.Random) -> Parts:
    (country, answer), (_, wrong) = rng.sample(CAPITALS, 2)
    wordings = (
        f"What is the capital of {country}?",
        f"Name the capital of {country}.",
        f"Which city is the capital of {country}?",
    )
    return rng.choice(wordings), answer, wrong


def _member(rng: random.Random) -> Parts:
    kind, other = rng.sample(list(KINDS), 2)
    answer, wrong = rng.choice(KINDS[kind]), rng.choice(KINDS[other])
    a, b = rng.sample((answer, wrong), 2)
    wordings = (
        f"Which word is a {kind}, {a} or {b}?",
        f"Name the {kind}: {a}, {b}.",
        f"What is the {kind}, {a} or {b}?",
    )
    return rng.choice(wordings), answer, wrong


MAKERS: Sequence[Callable[[random.Random], Parts]] = (_neighbour, _opposite, _kind, _capital, _member)
