"""recipes/memory.py beside measured peaks: every byte that torch's allocator gives out on a CPU in a training step."""

import gc
import runpy
from pathlib import Path

import pytest
import tiny
from torch.profiler import ProfilerActivity, profile

from align_engine.run import train
from align_engine.training.engine import Engine

MEMORY = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "memory.py"))
T, BATCH = 64, 8


class Measured(BaseException):
    """Ends a run once its second step is measured: none of its outputs is read."""


def state_bytes(optimizer):
    return sum(x.numel() * x.element_size() for state in optimizer.state.values() for x in state.values())


def peak_of_a_step(name, recipe):
    """Bytes of weights, optimiser states and all that the second step allocates on top, at their peak."""
    found = []

    def learn(engine, window, clock, once=Engine.learn):
        if engine.progress.step == 0:
            return once(engine, window, clock)
        model = engine.model
        weights = {x.data_ptr(): x.numel() * x.element_size() for x in model.parameters()}
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            once(engine, window, clock)
        events = profiler.profiler.kineto_results.events()
        steps = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        level = peak = 0
        for _, size in steps:
            level += size
            peak = max(peak, level)
        found.append(sum(weights.values()) + state_bytes(engine.optimizer) + peak)
        raise Measured

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Measured):
        patch.setattr(Engine, "learn", learn)
        train(name, recipe)
    return found[0]


def full_rows(name):
    """Rows of T tokens each (two of them for a pair), all but the first one of the answer."""
    answer = lambda i: " ".join(f"w{(i + j) % 60}" for j in range(T - 2))  # noqa: E731
    if name == "sft":
        return [{"prompt": "w1", "completion": answer(i)} for i in range(2 * BATCH)]
    return [{"prompt": "w1", "chosen": answer(i), "rejected": answer(i + 7)} for i in range(2 * BATCH)]


CASES = {  # (algorithm, vocabulary, settings, least and most of computed over measured)
    "float32": ("sft", 64, {}, 0.95, 1.1),
    "float32 in bfloat16": ("sft", 64, {"bf16": True}, 0.95, 1.1),
    "bfloat16": ("sft", 64, {"bf16": True, "dtype": "bfloat16"}, 0.95, 1.1),
    "LoRA with dropout": ("sft", 64, {"bf16": True, "dtype": "bfloat16", "use_peft": True, "lora_r": 4}, 0.95, 1.1),
    "LoRA on pairs": ("dpo", 64, {"bf16": True, "dtype": "bfloat16", "use_peft": True, "lora_r": 4}, 0.95, 1.1),
    # on a CPU the gradient's memory lends itself to logits: computed is a bound
    "a large head": ("sft", 4096, {}, 1.0, 1.3),
    "a large head in bfloat16": ("sft", 4096, {"bf16": True}, 1.0, 1.3),
}


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")  # of peft
@pytest.mark.parametrize("case", CASES)
def test_the_computed_peak_is_the_measured_one(case, tmp_path):
    name, vocabulary, settings, least, most = CASES[case]
    shape = MEMORY["Shape"](vocabulary, 64, 160, 4, 4, 2, 16, tied=True)
    model = tiny.write_model(tmp_path / "model", vocab=vocabulary, hidden_size=shape.hidden, num_attention_heads=4,
                             intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
                             num_key_value_heads=2, max_position_embeddings=T)  # fmt: skip
    rows = tiny.write_rows(tmp_path / "rows.jsonl", full_rows(name))
    settings = {"max_length": T, "per_device_train_batch_size": BATCH // 2, "gradient_accumulation_steps": 2} | settings
    recipe = tiny.offline(name, model, rows, tmp_path / "run", **settings)
    computed = sum(MEMORY["parts"](name, recipe, shape).values()) - MEMORY["REST"]
    assert least <= computed / peak_of_a_step(name, recipe) <= most


def test_real_models_fit_on_their_cards():
    """Each recipe bears the line that the formula gives it; published sizes of the models stand beside it here."""
    sizes = {name: round((shape.embeddings + shape.blocks) / 1e9, 2) for name, shape in MEMORY["SHAPES"].items()}
    assert sizes == {"Qwen2.5-0.5B": 0.49, "Qwen2.5-7B": 7.62, "Llama-3.1-8B": 8.03, "Mistral-7B": 7.25}
    real = [path for path in MEMORY["FOLDER"].glob("*.yaml") if not path.stem.startswith("demo-")]
    assert {path.stem.rpartition("-")[2] for path in real} == {
        "sft", "rm", "dpo", "kto", "rloo", "grpo", "ppo", "iterate",
    }  # fmt: skip
    assert len(real) >= 22
    for path in real:
        loaded, text = MEMORY["load"](path), path.read_text()
        line = (
            f"# expected memory: {MEMORY['describe'](*loaded)}\n# computed by recipes/memory.py, not measured on a GPU"
        )
        assert line in text, path
        need = sum(MEMORY["parts"](*loaded).values())
        card = next(size for size in (24, 40, 80) if need < 0.9 * size * 1e9)
        assert f"one card of {card} GB" in text, path
