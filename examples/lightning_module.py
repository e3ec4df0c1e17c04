"""Lightning: the same lines as in a plain loop, inside `training_step`.

pip install lightning
python examples/lightning_module.py
"""

from __future__ import annotations

import lightning
import torch
from data import rows, tiny_model
from torch.utils.data import DataLoader

from align_engine.integrations import fused_head
from align_kernels import sft_loss


class LanguageModel(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model()
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        with fused_head(self.model, lambda hidden, head: sft_loss(hidden, targets=targets, **head).loss):
            loss = self.model(input_ids=batch["input_ids"]).logits
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=3e-3)


def main(steps: int = 30) -> list[float]:
    module = LanguageModel()
    batches = DataLoader(rows(), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(0))
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, batches)
    return module.losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
