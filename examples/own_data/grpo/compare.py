"""The share of held-out problems that are solved, before and after.

python compare.py Qwen/Qwen2.5-0.5B-Instruct runs/grpo/final
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from answers import compare  # noqa: E402
from verifier import right  # noqa: E402

if __name__ == "__main__":
    compare(sys.argv[1:], "held-out.jsonl", right)
