"""Are answers plain and short? Held-out questions, before and after.

python compare.py Qwen/Qwen2.5-0.5B-Instruct runs/dpo/final
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from answers import compare  # noqa: E402

PLEASANTRIES = re.compile(r"great question|sure!|of course|thank you|hope this|delighted|wonderful", re.IGNORECASE)


def plain(prompts, completions, **_):
    """1 for at most ten words without pleasantries, less for each ten words more, 0 with pleasantries."""
    texts = [said[-1]["content"] for said in completions]
    return [0.0 if PLEASANTRIES.search(text) else min(1.0, 10 / max(len(text.split()), 1)) for text in texts]


if __name__ == "__main__":
    compare(sys.argv[1:], "held-out.jsonl", plain)
