"""Your own loop: `fused_head` stands in for the LM head while the block lasts, and no logits are made.

python examples/plain_torch.py
"""

from __future__ import annotations

import torch
from data import rows, tiny_model
from torch.utils.data import DataLoader

from align_engine.integrations import fused_head
from align_kernels import sft_loss


def main(steps: int = 30) -> list[float]:
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batches = DataLoader(rows(), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(0))
    losses = []
    while len(losses) < steps:
        for batch in batches:
            targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)  # position i predicts i + 1
            with fused_head(model, lambda hidden, head: sft_loss(hidden, targets=targets, **head).loss):  # noqa: B023
                loss = model(input_ids=batch["input_ids"]).logits  # what the function returned
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
