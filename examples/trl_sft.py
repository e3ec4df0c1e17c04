"""TRL: one line before or after the trainer is built. DPO, KTO, GRPO and RLOO alike.

pip install trl
python examples/trl_sft.py
"""

from __future__ import annotations

import tempfile

from data import rows, tiny_model
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from align_engine.integrations.trl import fuse


def main(steps: int = 30) -> list[float]:
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, "<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    dataset = Dataset.from_list([{name: x.tolist() for name, x in row.items()} for row in rows()])
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=3e-3, lr_scheduler_type="constant",
            logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = fuse(SFTTrainer(tiny_model(), args, train_dataset=dataset, processing_class=tokenizer))
        trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
