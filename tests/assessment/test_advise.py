"""`align advise`: the methods that slides and papers name for a situation, the commands, the questions."""

import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import tiny
from datasets import Dataset

from align_engine import cli
from align_engine.assessment import advise as advice
from align_engine.assessment import first_steps
from align_engine.assessment.asking import asked
from align_engine.assessment.guide import GRADES, guide, ranked, words
from align_engine.assessment.sections import AdviseRecipe
from align_engine.assessment.situation import Situation, kinds, with_prompts
from align_engine.errors import BadInput
from align_engine.planning.cards import Card
from align_engine.planning.rehearse import lengths, rehearse
from align_engine.recipe import RECIPES

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # of peft
ROOT = Path(__file__).parents[2]
CARD = Card("24GB", 24 * 10**9, True)

# (where it is said; what is at hand; task; GPUs, assessors, billions of weights; more; the method that is named for it)
SITUATIONS = [
    ("slide 4: direct RL for small or scientific tasks; data: prompts",
     {"prompts"}, "science", (1, 5, 7), set(), "rloo"),
    ("slide 4: direct RL where the best quality is needed, with a large staff of assessors",
     {"pairs"}, "chat", (8, 40, 70), {"best-quality"}, "rloo"),
    ("slide 5: PPO for summarisation, from ranked answers; arXiv:2009.01325, slide 3: a cluster and a staff",
     {"ranks"}, "summarisation", (8, 40, 70), set(), "ppo"),
    ("slide 5: PPO, GPT-3.5+, question answering; arXiv:2203.02155: InstructGPT with 40 assessors",
     {"ranks"}, "question-answering", (64, 40, 175), set(), "ppo"),
    ("slide 6: DPO on pairs, open models of small size on one's own resources; arXiv:2310.16944, Zephyr",
     {"pairs"}, "chat", (1, 0, 7), set(), "dpo"),
    ("arXiv:2305.18290, section 6: DPO for summaries without the means of PPO, ranks as pairs",
     {"ranks"}, "summarisation", (1, 0, 6), set(), "dpo"),
    ("slide 7: KTO on answers marked ok / not ok, most often safety",
     {"marks"}, "safety", (1, 0, 8), set(), "kto"),
    ("arXiv:2402.01306: KTO where feedback is a binary signal for single answers",
     {"marks"}, "chat", (4, 0, 30), set(), "kto"),
    ("slide 8: GRPO for mathematics with a tool that gives the reward; arXiv:2402.03300, DeepSeekMath 7B",
     {"prompts", "verifier"}, "reasoning", (1, 0, 7), set(), "grpo"),
    ("arXiv:2501.12948: GRPO for code and logic on a cluster, other data beside",
     {"prompts", "verifier", "pairs"}, "reasoning", (64, 40, 600), set(), "grpo"),
    ("slide 9: iterative DPO where a reward model exists; the team's Qwen2.5-7B",
     {"prompts", "reward-model"}, "chat", (8, 0, 7), set(), "iterate"),
    ("slide 1: SFT comes before preference optimisation; arXiv:2203.02155, step 1",
     {"answers", "pairs"}, "chat", (1, 0, 7), {"pretrained"}, "sft"),
]  # fmt: skip


def situation(have, task, amounts, more):
    gpus, assessors, billions = amounts
    return Situation(gpus, CARD, assessors, frozenset(with_prompts(have)), None, task, billions, frozenset(more))


@pytest.mark.parametrize("case", SITUATIONS, ids=lambda case: f"{case[-1]}: {case[0][:40]}")
def test_the_method_that_the_source_names_comes_first(case):
    _, have, task, amounts, more, first = case
    found = ranked(situation(have, task, amounts, more).words)
    assert found[0].method == first and not found[0].missing
    assert found[0].points > found[1].points or found[1].missing  # no tie
    assert {one.method for one in found} == guide()["methods"].keys()
    lacking = [bool(one.missing) for one in found]
    assert lacking == sorted(lacking)


def test_twelve_situations_name_every_method():
    assert len(SITUATIONS) == 12 and {case[-1] for case in SITUATIONS} == guide()["methods"].keys()


def test_what_cannot_be_done_is_last_with_what_is_missing():
    found = {one.method: one.missing for one in ranked(situation({"prompts"}, "chat", (1, 0, 7), set()).words)}
    assert all(found.values()) and found["kto"] == (("marks",),)
    assert found["grpo"] == (("verifier", "reward-model"),)
    found = ranked(words(set(), "chat", {"gpus": 0, "assessors": 0, "billions": None}))
    assert ("prompts",) in dict((one.method, one.missing) for one in found)["rloo"]
    found = ranked(situation({"prompts", "pairs"}, "chat", (8, 0, 7), set()).words)
    assert [one.method for one in found if one.missing] == ["sft"]  # a reward model, marks: of the pairs


def test_every_entry_of_the_guide_has_a_source_and_known_words():
    source = re.compile(r"(talk, slide \d+|arXiv:\d{4}\.\d{5})(, (step|section) \d)?")
    known = {*guide()["data"], *guide()["tasks"], *guide()["words"], "preferences", "pretrained", "best-quality"}
    for name, method in guide()["methods"].items():
        assert name in RECIPES and 1 <= method["slide"] <= 9
        for one in [*(method[grade] for grade in GRADES), *method["applicability"]]:
            assert one["why"] and all(source.fullmatch(part) for part in one["source"].split("; ")), one
        assert all(1 <= method[grade]["grade"] <= 3 for grade in GRADES)
        assert {word.removeprefix("no-") for one in method["applicability"] for word in one["when"]} <= known
        assert {word for need in method["needs"] for word in need} <= guide()["get"].keys()


def test_commands_can_be_typed_and_recipes_are_there():
    typed = 0
    for _, have, task, amounts, more, _ in SITUATIONS:
        at = situation(have, task, amounts, more)
        for one in (one for one in ranked(at.words) if not one.missing):
            for line in first_steps.commands(one, at, "my model", None):
                _, command, *arguments = shlex.split(line)
                path = arguments.pop(arguments.index("--recipe") + 1) if "--recipe" in arguments else None
                arguments = [word for word in arguments if word != "--recipe"]
                recipe, others = cli.read(command, arguments, path and str(ROOT / path))
                assert not others and recipe.output.output_dir, line
                typed += 1
            assert line.startswith(f"align {one.method} ")
    assert typed > 50


def test_what_is_missing_is_made_before():
    at = situation({"ranks"}, "summarisation", (8, 40, 7), set())
    steps = {one.method: first_steps.commands(one, at, None, "a b.jsonl") for one in ranked(at.words)}
    assert [line.split()[1] for line in steps["ppo"]] == ["pairs", "rm", "ppo"]
    assert "--dataset_name 'a b.jsonl'" in steps["ppo"][0] and "--dataset_name data/pairs" in steps["ppo"][1]
    assert "--reward_funcs runs/rm/final" in steps["ppo"][2] and "--dataset_name 'a b.jsonl'" in steps["ppo"][2]
    assert "--layout unpaired" in steps["kto"][0] and "--dataset_name data/marks" in steps["kto"][1]
    assert "--reward_funcs human" in steps["rloo"][0]


COLUMNS = [
    (["prompt"], {"prompts"}), (["prompt", "completion"], {"answers", "prompts"}), (["messages"], {"answers"}),
    (["prompt", "chosen", "rejected"], {"pairs", "prompts"}), (["chosen", "rejected"], {"pairs"}),
    (["prompt", "chosen", "rejected", "chosen_rank"], {"pairs", "prompts", "ranks"}),
    (["prompt", "completion", "label"], {"marks", "prompts"}),
    (["prompt", "completion", "rank"], {"ranks", "prompts"}),
    (["prompt", "completion", "score", "model"], {"scores", "prompts"}),
    (["prompt", "solution"], {"prompts", "verifier"}),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "wanted"), COLUMNS, ids=lambda one: "+".join(one) if isinstance(one, list) else "")
def test_columns_tell_what_data_are(columns, wanted):
    assert kinds(Dataset.from_dict({name: ["a"] for name in columns})) == wanted


def test_columns_of_no_layout_are_refused():
    with pytest.raises(BadInput, match=r"\['question'\] are columns of no layout"):
        kinds(Dataset.from_dict({"question": ["a"]}))


def test_from_flags_to_json(tmp_path, capsys, monkeypatch):
    """Data and model are read, the memory is that of `align plan`, the file is replaced, and nobody else's."""
    only_dpo = lambda method, *more: first_steps.memory(method, *more) if method == "dpo" else {"why_not": "left out"}  # noqa: E731
    monkeypatch.setattr(advice, "memory", only_dpo)
    model = tiny.write_model(tmp_path / "model", vocab=4096)
    rows = tiny.write_rows(tmp_path / "pairs.jsonl", tiny.preference_rows(8))
    flags = ["advise", "--gpus", "1", "--memory", "24GB", "--dataset_name", str(rows), "--model_name_or_path",
             str(model), "--json", str(tmp_path / "advice.json")]  # fmt: skip
    assert cli.main(flags) == 0 and cli.main(flags) == 0
    said, printed = json.loads((tmp_path / "advice.json").read_text()), capsys.readouterr().out
    first = said["methods"][0]
    assert (first["method"], first["rank"], said["situation"]["rows"]) == ("dpo", 1, 8)
    recipe = cli.recipes.load(RECIPES["dpo"], ROOT / first["recipe"])
    recipe.model.model_name_or_path = str(model)
    peak = rehearse("dpo", recipe, CARD, lengths(recipe)).peak
    assert (first["memory"]["bytes"], first["memory"]["phase"], first["memory"]["fits"]) == (peak.peak, peak.name, True)
    assert "## Begin with DPO" in printed and first["commands"][0] in printed
    assert "(talk, slide 6" in printed and printed.count("# Which method") == 2
    assert not list(tmp_path.glob("*.align-tmp"))
    assert cli.main([*flags[:-1], str(rows)]) == 2
    assert "is there already and no earlier advice" in capsys.readouterr().err
    (tmp_path / "notes.json").write_text("{}")
    assert cli.main([*flags[:-1], str(tmp_path / "notes.json")]) == 2
    assert "is there already and no earlier advice" in capsys.readouterr().err
    assert (tmp_path / "notes.json").read_text() == "{}"


def test_a_method_that_no_memory_is_there_for_comes_last(monkeypatch):
    """And one that --fit brings in has that in its command."""

    def asked(method, at, model, serves, ask):
        held = {"bytes": 9 << 30, "phase": "step", "fits": method == "kto", "measured": False, "model": "m"}
        return held if ask is first_steps.taken else {"dpo": {"refusal": "dpo does not fit"}}[method]

    monkeypatch.setattr(advice, "memory", asked)
    flags = {"gpus": 1, "memory": "4GB", "have": ["pairs"], "model_size": 72}
    found = advice.advise(cli.recipes.typed(AdviseRecipe(), {"situation": flags}, "here"))["methods"]
    dpo = next(one for one in found if one["method"] == "dpo")
    assert (dpo["missing"], dpo["commands"], dpo["applicability"]["word"]) == (["dpo does not fit"], [], "not yet")
    assert not found[0]["missing"] and all(one["missing"] for one in found[found.index(dpo) :])
    monkeypatch.setattr(
        advice, "memory", lambda *more: asked(*more) if more[-1] is first_steps.taken else {"fit": ["--x 1: y"]}
    )
    said = advice.advise(cli.recipes.typed(AdviseRecipe(), {"situation": flags}, "here"))
    assert said["methods"][0]["method"] == "dpo" and said["methods"][0]["commands"][0].endswith(" --fit 4GB")
    assert "`--fit` changes --x 1: y" in advice.markdown(said)


def test_a_recipe_that_is_too_large_is_made_to_fit(tmp_path):
    recipe = cli.recipes.load(RECIPES["sft"], ROOT / "recipes" / "qwen2.5-0.5b-full-sft.yaml")
    recipe.model.model_name_or_path = str(tiny.write_model(tmp_path / "model", vocab=4096))
    card = Card("3GB", int(2.3 * 2**30), True)
    assert not first_steps.taken("sft", recipe, card)["fits"]
    assert "per_device_train_batch_size" in first_steps.made_to_fit("sft", recipe, card)["fit"][0]


@pytest.mark.parametrize(("flags", "said"), [
    (["--gpus", "2"], "gpus = 2 needs memory"), (["--gpus", "0", "--memory", "A100"], "memory = 'A100' is of a GPU"),
    (["--memory", "H1000"], "did you mean"), (["--have", "money"], "is none of prompts"),
    (["--assessors", "-1"], "assessors = -1 must be at least 0"), (["--dataset_name", "no.jsonl"], "no data at"),
    (["--model_size", "0"], "model_size = 0.0 must be above 0"),
    (["--json", "/no/such/folder/a.json"], "there is no folder"),
])  # fmt: skip
def test_refusals(flags, said, capsys):
    assert cli.main(["advise", *flags]) == 2
    assert said in capsys.readouterr().err.replace("\n", " ")


class Terminal(io.StringIO):
    """Answers that a person types."""

    def isatty(self):
        return True


def test_questions_on_a_terminal_and_an_answer_that_cannot_be(monkeypatch, capsys):
    typed = ["many", "1", "lots", "", "24GB", "3", "none.jsonl", "", "pairs, marks", "safety", "./none", "", "8",
             "no", "yes"]  # fmt: skip
    monkeypatch.setattr(sys, "stdin", Terminal("".join(f"{line}\n" for line in typed)))
    found = asked(AdviseRecipe()).situation
    assert (found.gpus, found.memory, found.assessors, found.dataset_name) == (1, "24GB", 3, None)
    assert (found.have, found.task, found.model_size) == (["pairs", "marks"], "safety", 8.0)
    assert (found.model_name_or_path, found.pretrained, found.best_quality) == (None, False, True)
    said = capsys.readouterr().out
    for complaint in ("'many' is not a whole number", "memory = 'lots'", "gpus = 1 needs memory", "none.jsonl"):
        assert complaint in said, "what cannot be is asked again at once, not after the last question"
    assert said.count("Folder or hub name of the model") == 2 and "()" not in said
    monkeypatch.setattr(sys, "stdin", Terminal("0\n2\n\n\nchat\n\n\n\n\n"))
    found = asked(AdviseRecipe()).situation
    assert (found.gpus, found.memory, found.assessors) == (0, None, 2), "of no GPU nobody asks the memory"
    monkeypatch.setattr(sys, "stdin", Terminal("1\n"))
    with pytest.raises(BadInput, match="left without answers"):
        asked(AdviseRecipe())
