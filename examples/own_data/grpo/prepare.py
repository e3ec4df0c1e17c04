"""problems.csv (problem, result) -> train.jsonl and held-out.jsonl, as `align grpo` reads them.

python prepare.py
"""

import csv
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
HELD_OUT = 12  # the last problems of the table
ASK = "Think in one sentence, then write the result as: #### number"


def main(out: Path = Path()) -> None:
    with (HERE / "problems.csv").open(newline="") as table:
        rows = [
            {"prompt": [{"role": "user", "content": f"{row['problem']} {ASK}"}], "result": row["result"]}
            for row in csv.DictReader(table)
        ]
    for name, part in (("train", rows[:-HELD_OUT]), ("held-out", rows[-HELD_OUT:])):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        print(f"{name}.jsonl: {len(part)} problems")


if __name__ == "__main__":
    main()
