"""Two small tasks of lm-evaluation-harness, as files: multiple choice, and instructions that a program checks."""

from __future__ import annotations

import json
import random
from pathlib import Path

import tiny

CHOICE = """task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
FOLLOW = """task: tiny_follow
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: wanted
process_results: !function follow.process_results
generation_kwargs:
  until: []
  do_sample: false
  temperature: 0.0
  max_gen_toks: 8
metric_list:
  - metric: prompt_level_strict_acc
    aggregation: mean
    higher_is_better: true
  - metric: inst_level_strict_acc
    aggregation: !function follow.mean_of_all
    higher_is_better: true
"""
CHECKS = '''"""Whether an answer holds the wanted word, and no more than six others, as IFEval has instructions."""


def process_results(doc, results):
    words = results[0].split()
    kept = [doc["wanted"] in words, len(words) <= 6]
    return {"prompt_level_strict_acc": all(kept), "inst_level_strict_acc": kept}


def mean_of_all(items):
    flat = [one for item in items for one in item]
    return sum(flat) / len(flat)
'''


def write(folder: Path, count: int = 40, seed: int = 0) -> tuple[Path, Path]:
    """(multiple choice, instructions): YAML files in a folder of their own, with their data."""
    folder.mkdir(exist_ok=True)
    rng = random.Random(seed)
    choices = [
        {"question": tiny.sentence(rng, 5), "choices": rng.sample(tiny.WORDS, 3), "answer": rng.randrange(3)}
        for _ in range(count)
    ]
    prompts = [{"prompt": tiny.sentence(rng, 5), "wanted": rng.choice(tiny.WORDS)} for _ in range(count)]
    (folder / "follow.py").write_text(CHECKS)
    found = []
    for name, text, rows in (("choice", CHOICE, choices), ("follow", FOLLOW, prompts)):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(text.format(data=data))
        found.append(folder / f"{name}.yaml")
    return found[0], found[1]
