"""chats.jsonl (turns, thumb) -> marks.jsonl and held-out.jsonl, and a model with a chat template for them.

python prepare.py                                     # the data
python prepare.py Qwen/Qwen2.5-0.5B models/base       # and a base model with our template
"""

import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
ROLES = {"guest": "user", "bot": "assistant"}
HELD_OUT = ("dogs", "cake")  # chats on these topics


def rows() -> list[dict]:
    """A row for the last answer of each chat that somebody has marked; what was said before is its prompt."""
    found = []
    for line in (HERE / "chats.jsonl").read_text().splitlines():
        chat = json.loads(line)
        if chat["thumb"] is None:
            continue
        messages = [{"role": ROLES[turn["role"]], "content": turn["text"]} for turn in chat["turns"]]
        found.append({"prompt": messages[:-1], "completion": messages[-1:], "label": chat["thumb"] == "up",
                      "topic": chat["chat"].partition("-")[0]})  # fmt: skip
    return found


def with_template(source: str, target: Path) -> None:
    """A copy of a model whose tokenizer writes conversations by template.jinja and ends a turn by its EOS."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = (HERE / "template.jinja").read_text()
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(target)
    tokenizer.save_pretrained(target)


def main(out: Path = Path()) -> None:
    made = rows()
    for name, held in (("marks", False), ("held-out", True)):
        part = [row for row in made if (row["topic"] in HELD_OUT) == held]
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        print(f"{name}.jsonl: {len(part)} marks, {sum(row['label'] for row in part)} of them good")


if __name__ == "__main__":
    main()
    if len(sys.argv) == 3:
        with_template(sys.argv[1], Path(sys.argv[2]))
