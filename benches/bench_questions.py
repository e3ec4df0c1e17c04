"""align_kernels beside its peers: one group a question, the same inputs for all (`make bench`).

    python -m pytest benches/bench_questions.py --benchmark-json benches/results/bench.json [--minutes 11]
    python -m pytest benches/bench_questions.py --short    # each kind of question once, tiny: to prove the scripts

turns.py measures: methods take turns, so pytest-benchmark, which would time one after the other, is handed the seconds.
`extra_info` has the peak memory above inputs and gradients, the FLOPs of the matrix products, the errors against
float64, and the share of the bare products' rate in the same rounds. What cannot run stands under `cannot_run`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from methods import GEMMS
from questions import HEADS, Question
from turns import Figure, Race, players_of

SMALL, SEVEN, LLAMA, GEMMA = "Qwen2.5-0.5B", "Qwen2.5-7B", "Llama-3-8B", "Gemma-2-2B"
IN_SHORT = Question(
    "dpo", "TinyLlama-1.1B", 256, trained=True
)  # of the README; rows enough that reading the weight is not all
BF16 = {"dtype": "bfloat16"}
QUESTIONS = [
    Question("forward", SMALL, 96),
    Question("forward", SEVEN, 24),
    Question("forward", LLAMA, 24),
    Question("forward", GEMMA, 24),
    Question("forward", SMALL, 96, **BF16),
    Question("gradient", SMALL, 96),
    Question("gradient", SMALL, 96, trained=True),
    Question("gradient", SMALL, 96, softmax="peaked"),
    Question("gradient", SMALL, 96, **BF16),
    Question("gradient", SEVEN, 24),
    Question("sft", SMALL, 96, trained=True),
    Question("sft", SMALL, 96, trained=True, **BF16),
    Question("sft", SEVEN, 24, trained=True),
    Question("sft", GEMMA, 24),
    IN_SHORT,
    Question("dpo", SMALL, 48),
    Question("dpo", SMALL, 48, trained=True),
    Question("dpo", SMALL, 48, trained=True, clamp=0.1),
    Question("kto", SMALL, 48),
    Question("ppo-clip", SMALL, 48, trained=True),
    Question("grpo", SMALL, 48),
    Question("grpo", SMALL, 48, trained=True),
    Question("dpo step", "small", 3, trained=True),
    Question("grpo step", "small", 2, trained=True),
]
SHORT = [
    Question("forward", "tiny", 8),
    Question("gradient", "tiny", 8, softmax="peaked"),
    Question("sft", "tiny", 8, **BF16),
    *(Question(what, "tiny", 8, trained=True) for what in ("dpo", "kto", "ppo-clip", "grpo")),
    Question("dpo", "tiny", 8, clamp=0.1),
    Question("dpo step", "tiny", 2, trained=True),
    Question("grpo step", "tiny", 1, trained=True),
]
pytestmark = pytest.mark.filterwarnings("default")  # of peers


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    questions = SHORT if metafunc.config.getoption("--short") else QUESTIONS
    asked = [(question, method) for question in questions for method in players_of(question)]
    ids = [f"{question.name}, {method}" for question, method in asked]
    metafunc.parametrize(("question", "method"), asked, ids=ids)


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> Iterator[Callable[[Question], dict[str, Figure]]]:
    """All methods' figures on a question, found when the first of them is asked for."""
    option = request.config.getoption
    asked = list(dict.fromkeys(item.callspec.params["question"] for item in request.session.items))
    race = Race(asked, option("--minutes"), option("--short"))
    found: dict[Question, dict[str, Figure]] = {}

    def of(question: Question) -> dict[str, Figure]:
        if question not in found:
            found[question] = race.run(question)
        return found[question]

    yield of
    race.end()


@pytest.fixture
def figure(
    request: pytest.FixtureRequest, figures: Callable, cannot_run: list, question: Question, method: str
) -> Figure:
    """Of one method. Its seconds are what the clock of the `benchmark` after it shows, in pairs of 0 and a time."""
    found = figures(question)[method]
    if found.reason:
        cannot_run.append({"group": question.name, "method": method, "reason": found.reason})
        pytest.skip(f"{method} cannot run: {found.reason}")
    shown = iter([moment for seconds in found.seconds for moment in (0.0, seconds)])

    def turn() -> float:
        return next(shown)

    request.node.add_marker(pytest.mark.benchmark(group=question.name, timer=turn))
    return found


def test_question(figure: Figure, benchmark: Any, figures: Callable, question: Question, method: str) -> None:
    ceiling = figures(question).get(GEMMS)
    benchmark.extra_info |= {
        "method": method,
        "rows": question.rows,
        "peak_mb": None if method == GEMMS else figure.peak_mb,  # theirs would count their results
        "gflop": figure.flops / 1e9 if figure.flops else None,  # none are seen inside torch's own operator
        "errors": figure.errors,
    }
    if ceiling is not None and not ceiling.reason:
        d, v = HEADS[question.head]
        benchmark.extra_info |= {
            "nvd": figure.flops / (question.rows * d * v) if figure.flops else None,
            "share_of_gemms": ceiling.median / figure.median,
        }
    benchmark.pedantic(lambda: None, rounds=len(figure.seconds))
