"""Does the house answer what was asked? Chats on topics that were not trained on, before and after.

python compare.py models/base runs/kto/final
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from answers import compare  # noqa: E402

EVASIVE = ("language model", "lovely question", "website", "not sure", "it depends", "history")


def direct(prompts, completions, **_):
    """1 for an answer of at most twelve words that evades nothing, 0 for an evasive or an empty one, else a half."""
    scores = []
    for said in completions:
        text = said[-1]["content"].strip().lower()
        evasive = not text or any(words in text for words in EVASIVE)
        scores.append(0.0 if evasive else 1.0 if len(text.split()) <= 12 else 0.5)
    return scores


if __name__ == "__main__":
    compare(sys.argv[1:], "held-out.jsonl", direct)
