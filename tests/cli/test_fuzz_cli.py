"""A seeded share of the fuzz of the command line; `python tests/cli/fuzz.py` runs more of it."""

import warnings

import pytest
from cases import KINDS, Bench

from .fuzz import fuzz, judged, numbered

SEED, COUNT = 0, 500


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", KINDS)
def test_broken_input_ends_in_a_sentence_and_changes_no_file_of_the_user(kind, bench, tmp_path):
    which = [(number, name) for number, name in numbered(COUNT) if name == kind]
    faults = [
        f"case {number} of seed {SEED}: {case.what}\n  exit {result.code}: {', '.join(result.faults)}\n{result.message}"
        for number, _, case, result in fuzz(bench, SEED, which, tmp_path)
        if result.faults
    ]
    assert not faults, "\n".join(["python tests/cli/fuzz.py --seed SEED --only CASE shows one again", *faults])


@pytest.mark.parametrize(
    ("code", "message", "fault"),
    [
        (2, "align: error: no command 'dop'; did you mean 'dpo'?", []),
        (0, "warnings.py:1: UserWarning: x", []),
        (1, "align: error: KeyError: 'nobody'\n(the same command with --debug shows where)", ["Python's own words"]),
        (2, "align: error: json.decoder.JSONDecodeError: Expecting value", ["Python's own words"]),
        (2, "", ["no message"]),
        (3, "align: error: x", ["exit code 3"]),
        (2, "Traceback (most recent call last):", ["traceback"]),
        (2, "align: error: 'a\x1b[31m' is no folder", ["control characters"]),
    ],
)
def test_what_the_fuzz_takes_for_a_fault(code, message, fault):
    assert judged(code, message, "") == fault
