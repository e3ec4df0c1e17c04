"""transformers.Trainer: `FusedTrainer` in its place.

python examples/transformers_trainer.py
"""

from __future__ import annotations

import tempfile

from data import rows, tiny_model
from transformers import TrainingArguments, default_data_collator

from align_engine.integrations.transformers import FusedTrainer


def main(steps: int = 30) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=3e-3,
            lr_scheduler_type="constant", logging_steps=1, report_to=[], save_strategy="no", use_cpu=True,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = FusedTrainer(tiny_model(), args, train_dataset=rows(), data_collator=default_data_collator)
        trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
