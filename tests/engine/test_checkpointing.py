"""Activations that are computed again in the backward pass, with and without what attention gives: the same bits."""

import pytest
import tiny
from runs import cut_off, same_bits
from torch.utils._python_dispatch import TorchDispatchMode

from align_engine.errors import BadInput
from align_engine.run import train

SELECTIVE = "selective=true"


class Attentions(TorchDispatchMode):
    """Counts forward passes of attention."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() == "aten::_scaled_dot_product_flash_attention_for_cpu"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("packing", ["on", "off"])
def test_attention_is_not_computed_again_and_the_bits_are_the_same(packing, model, completions, tmp_path):
    settings = dict(max_steps=2, save_steps=1, packing=packing, per_device_train_batch_size=4)
    counts, folders = [], []
    for name, more in {"kept": dict(gradient_checkpointing=False), "again": {},
                       "selective": dict(gradient_checkpointing_kwargs=SELECTIVE)}.items():  # fmt: skip
        with Attentions() as counted:
            folders.append(train("sft", tiny.sft(model, completions, tmp_path / name, **settings, **more)).final)
        counts.append(counted.count)
    assert counts[0] == counts[2] < counts[1]
    assert same_bits(folders[0], folders[1]) and same_bits(folders[0], folders[2])
    recipe = tiny.sft(model, completions, tmp_path / "cut", **settings, gradient_checkpointing_kwargs=SELECTIVE)
    cut_off("sft", recipe)
    assert same_bits(train("sft", recipe).final, folders[0])


def test_what_it_needs_is_said(model, completions, tmp_path):
    settings = dict(gradient_checkpointing_kwargs=SELECTIVE, gradient_checkpointing=False)
    with pytest.raises(BadInput, match="gradient_checkpointing_kwargs = 'selective=true' needs gradient_checkpointing"):
        train("sft", tiny.sft(model, completions, tmp_path / "run", **settings))
