"""ratings.csv (question, better, worse) -> train.jsonl and held-out.jsonl, as `align dpo` reads them.

python prepare.py
"""

import csv
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
HELD_OUT = 8  # the last questions of the table
SYSTEM = {"role": "system", "content": "You answer for a lamp shop, briefly."}


def message(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def main(out: Path = Path()) -> None:
    with (HERE / "ratings.csv").open(newline="") as table:
        rows = [
            {
                "prompt": [SYSTEM, *message("user", row["question"])],
                "chosen": message("assistant", row["better"]),
                "rejected": message("assistant", row["worse"]),
            }
            for row in csv.DictReader(table)
        ]
    for name, part in (("train", rows[:-HELD_OUT]), ("held-out", rows[-HELD_OUT:])):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        print(f"{name}.jsonl: {len(part)} pairs")


if __name__ == "__main__":
    main()
