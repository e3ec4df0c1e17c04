"""`align plan` and `--fit`: computed bytes and FLOPs beside those of real steps, and what is done with them."""

import gc
import json
import os
import platform
import shutil
import subprocess
import sys
from typing import Any

import pytest
import tiny
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from align_engine import recipe as recipes
from align_engine.cli import main
from align_engine.errors import BadInput
from align_engine.planning import cards
from align_engine.planning.fit import fitted
from align_engine.planning.heap import Heap
from align_engine.planning.rehearse import Lengths, lengths, rehearse
from align_engine.recipe import RECIPES
from align_engine.rollouts.source import Rollouts
from align_engine.run import train
from align_engine.training import shards
from align_engine.training.allocator import MAPPED
from align_engine.training.engine import Engine

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning")  # of peft
SHAPE: dict[str, Any] = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2, max_position_embeddings=128)  # fmt: skip
EACH = Lengths(16, 48)
HERE = cards.machine()
ONLINE = ("rloo", "grpo", "ppo")


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """A checkpoint's files are small beside these models, as they are beside large ones."""
    monkeypatch.setattr(shards, "FILE", 1 << 16)


class Measured(BaseException):
    """Ends a run once it is measured: none of its outputs is read."""


def words(first, count):
    return " ".join(f"w{(first + i) % 60}" for i in range(count))


def rows_of(name, count=16):
    """Rows as long as EACH, every other one shorter by a token: so there is padding, as in any data."""
    found = []
    for i in range(count):
        prompt, answer = words(i, EACH.prompt), words(i, EACH.completion - 1 - i % 2)  # and the EOS token
        if name in ONLINE:
            found.append({"prompt": words(i, EACH.prompt - i % 2), "wanted": "w3"})
        elif name in ("sft", "kto"):
            found.append({"prompt": prompt, "completion": answer, "label": i % 2 == 0})
        else:
            found.append({"prompt": prompt, "chosen": answer, "rejected": words(i + 7, EACH.completion - 1 - i % 2)})
    return found


def made(name, folder, vocab=4096, **settings):
    """A model, rows and the recipe of a run on them."""
    model = tiny.write_model(folder / "model", vocab=vocab, **SHAPE)
    rows = tiny.write_rows(folder / "rows.jsonl", rows_of(name))
    settings = dict(max_length=sum(EACH), per_device_train_batch_size=4, gradient_accumulation_steps=2) | settings
    if name in ONLINE:
        online = dict(max_completion_length=EACH.completion, max_prompt_length=EACH.prompt, num_generations=4)
        settings = dict(reward_funcs=["tiny:word_reward"]) | online | settings
    return tiny.recipe(RECIPES[name], model, rows, folder / "run", **settings)


def peak_inside(work):
    """Bytes that torch's allocator gives out on top of what is there, at their most."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    found: Any = profiler.profiler
    events = found.kineto_results.events()
    level = peak = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        level += size
        peak = max(peak, level)
    return peak


def held(engine):
    """Bytes of weights, buffers and optimiser states."""
    models = [engine.model, *engine.readers]
    tensors = [x for model in models for x in (*model.parameters(), *model.buffers())]
    tensors += [x for state in engine.optimizer.state.values() for x in state.values()]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def second_step(name, recipe, work):
    """What `work(engine, step)` says inside a run, in the place of its second step."""
    found = []

    def learn(engine, *arguments, once=Engine.learn):
        if engine.progress.step == 0:
            return once(engine, *arguments)
        found.append(work(engine, lambda: once(engine, *arguments)))
        raise Measured

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Measured):
        patch.setattr(Engine, "learn", learn)
        train(name, recipe)
    return found[0]


CASES = {
    "sft": ("sft", {"gradient_checkpointing": False}),
    "sft recomputed": ("sft", {"gradient_checkpointing": True}),
    "sft, gradients of a large vocabulary": ("sft", {"vocab": 32768, "per_device_train_batch_size": 2}),
    "sft in bfloat16": ("sft", {"gradient_checkpointing": True, "bf16": True}),
    "dpo, LoRA": ("dpo", {"gradient_checkpointing": False, "use_peft": True}),
    "dpo, trees": ("dpo", {"gradient_checkpointing": False, "packing": "on"}),
    "dpo, a second model": ("dpo", {"gradient_checkpointing": True, "reference": "frozen"}),
    "kto": ("kto", {"gradient_checkpointing": False}),
    "rm": ("rm", {"gradient_checkpointing": False}),
    "grpo, trees": ("grpo", {"gradient_checkpointing": False, "packing": "on"}),
    "ppo": ("ppo", {"gradient_checkpointing": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_computed_peak_of_a_step_is_the_allocators(case, tmp_path):
    name, settings = CASES[case]
    recipe = made(name, tmp_path, **settings)
    measured = second_step(name, recipe, lambda engine, step: peak_inside(step) + held(engine))
    computed = rehearse(name, recipe, HERE, EACH)
    assert computed.phases[-1].name == "training step"
    assert 0.97 <= computed.step.tensors / measured <= 1.05
    assert sum(computed.step.parts.values()) == computed.step.peak >= computed.step.tensors


def test_pairs_that_share_prompts_read_fewer_tokens(tmp_path):
    """The counts are those of the batches themselves."""
    recipe, seen = made("dpo", tmp_path, packing="on", gradient_accumulation_steps=1), []

    def forward_backward(engine, micro, *arguments, once=Engine.forward_backward, **more):
        seen.append((micro.batch.input_ids.numel(), micro.batch.num_tokens))
        once(engine, micro, *arguments, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "forward_backward", forward_backward)
        second_step("dpo", recipe, lambda engine, step: None)
    computed = rehearse("dpo", recipe, HERE, EACH)
    assert computed.packed and computed.read == 4 * (16 + 2 * 48) and computed.learnt == 4 * 2 * 48
    (read, learnt), *_ = seen
    assert computed.read - read == computed.learnt - learnt <= 8  # some rows have two answers shorter by a token
    assert rehearse("dpo", made("dpo", tmp_path / "padded"), HERE, EACH).read == 4 * 2 * 64


@pytest.mark.parametrize("settings", [{}, {"use_peft": True}], ids=["full", "LoRA"])
def test_flops_are_those_that_torch_counts(settings, tmp_path):
    """torch's own counter around a real pass; it knows no attention kernel of a CPU, so attention is plain products."""
    recipe = made("dpo", tmp_path, gradient_accumulation_steps=1, attn_implementation="eager", **settings)
    counted = []

    def forward_backward(engine, *arguments, once=Engine.forward_backward, **more):
        with FlopCounterMode(display=False) as counter:
            once(engine, *arguments, **more)
        counted.append(counter.get_total_flops())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "forward_backward", forward_backward)
        second_step("dpo", recipe, lambda engine, step: step())
    computed = rehearse("dpo", recipe, HERE, EACH).flops
    assert counted[-1] == pytest.approx(computed, rel=0.04)  # rows shorter by a token, tails of trees


def test_sampling_takes_what_generate_takes(tmp_path):
    recipe, found = made("grpo", tmp_path, gradient_accumulation_steps=4), []

    def collect(source, *arguments, once=Rollouts.collect):
        found.append(peak_inside(lambda: once(source, *arguments)) + held(source.engine))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rollouts, "collect", collect)
        second_step("grpo", recipe, lambda engine, step: None)
    phases = {phase.name: phase for phase in rehearse("grpo", recipe, HERE, EACH).phases}
    assert "measure" not in phases, "one step a rollout, and no reference"
    computed = max(phases[name].tensors for name in ("prompts read", "sampling"))
    assert 0.95 <= computed / found[-1] <= 1.15
    keys = 2 * 16 * (sum(EACH)) * 2 * 2 * 16 * 4  # both, rows, tokens, layers, heads, of 16 numbers, of 4 bytes
    assert phases["sampling"].parts["keys and values"] == pytest.approx(keys, rel=0.3)


def test_a_checkpoint_takes_what_is_said(tmp_path):
    recipe = made("sft", tmp_path, use_peft=True, max_steps=1, save_total_limit=1)
    train("sft", recipe)
    folder = tmp_path / "run" / "checkpoint-000001"
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert 0.8 <= rehearse("sft", recipe, HERE, EACH).checkpoint / size <= 1.0


# -- the command ---------------------------------------------------------------------------------------------------
def config_only(folder):
    """A model's folder without its weights."""
    path = tiny.write_model(folder, vocab=4096, **SHAPE)
    (path / "model.safetensors").unlink()
    return path


def test_plan_needs_only_a_configuration(tmp_path, capsys):
    model = config_only(tmp_path / "model")
    for file in model.iterdir():
        if file.name != "config.json":
            file.unlink()
    flags = ["--model_name_or_path", str(model), "--max_length", "64", "--per_device_train_batch_size", "2"]
    assert main(["plan", "dpo", *flags, "--memory", "A100"]) == 0
    said = capsys.readouterr().out
    for part in ("weights", "gradients", "optimiser", "activations", "training step", "not yet measured", "fits"):
        assert part in said
    assert main(["plan", "dpo", *flags, "--json", "--prompt_length", "16"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == {"prompt": 16, "completion": 48, "of_a_pass": 2, "passes_of_a_step": 1}
    assert found["step"]["tokens_read"] == 4 * 64 and found["otherwise"]["packing"]["tokens_read"] == 2 * (16 + 96)
    assert found["peak"]["bytes"] == max(phase["bytes"] for phase in found["phases"])
    assert found["otherwise"]["gradient_checkpointing"]["bytes"] > found["phases"][-1]["bytes"]
    assert found["reference"] == "precomputed" and found["fits"] and found["fit"] == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--memory", "24 apples"], "memory = '24 apples' is neither a size (24GB, 80GiB) nor a card"),
        (["--memory", "A1000"], "did you mean 'A100'?"),
        (["--memory", "1MB"], "less than a process takes"),
        (["--max_length", "None"], "give max_length"),
        (["--prompt_length", "64"], "prompt_length = 64 leaves no room for a completion"),
        (["--learning_rat", "1"], "--learning_rat"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_made_is_one_sentence(change, said, tmp_path, capsys):
    model = config_only(tmp_path / "model")
    capsys.readouterr()
    assert main(["plan", "sft", "--model_name_or_path", str(model), "--max_length", "64", *change]) == 2
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.count("\n") == 1


def test_a_model_that_cannot_be_built_is_one_sentence(tmp_path, capsys):
    model = config_only(tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    capsys.readouterr()
    for changed, said in (({"model_type": "nonsense"}, "nonsense"), (None, "holds no model")):
        (model / "config.json").unlink()
        if changed:
            (model / "config.json").write_text(json.dumps(settings | changed))
        assert main(["plan", "sft", "--model_name_or_path", str(model)]) == 2
        complaint = capsys.readouterr().err
        assert said in complaint and complaint.count("\n") == 1
    assert main(["plan", "sfft"]) == 2
    assert "no method 'sfft'" in capsys.readouterr().err


def test_sizes_and_names_of_cards():
    assert cards.card("24GB")[:2] == ("24GB", 24 * 10**9)
    assert cards.card("1.5 gib").size == 3 * 2**29
    assert cards.card("nvidia h100") == cards.Card("H100", 80 * 10**9, True)
    assert cards.card("rtx 4090").size == 24 * 10**9
    assert cards.card(None) == cards.card("auto") == HERE


def test_lengths_of_rows():
    offline, online = RECIPES["dpo"](), RECIPES["grpo"]()
    assert lengths(offline) == (512, 512) and lengths(offline, 24) == (24, 1000)
    assert lengths(online) == (1024, 512) and lengths(online, 24) == (24, 512)


# -- fit -----------------------------------------------------------------------------------------------------------
def card_for(size):
    """A card whose tensors may take just so many bytes."""
    return cards.Card("small", int((size + HERE.base) / cards.SHARE) + 1, False)


def test_a_recipe_that_fits_is_left_alone(tmp_path):
    recipe = made("dpo", tmp_path, gradient_checkpointing=False, fit="auto")
    found = fitted("dpo", recipe, HERE)
    assert found.changes == [] and found.recipe.train.fit is None
    recipe.train.fit = None
    assert found.recipe == recipe


def test_passes_become_smaller_then_activations_are_recomputed_then_adapters_are_trained(tmp_path):
    recipe = made("dpo", tmp_path, gradient_checkpointing=False, gradient_accumulation_steps=1)

    def peak(**settings):
        times = 4 // settings["per_device_train_batch_size"]
        other = made("dpo", tmp_path / str(sorted(settings)), gradient_accumulation_steps=times, **settings)
        return rehearse("dpo", other, HERE, Lengths(1, 63)).peak.peak

    half = peak(gradient_checkpointing=False, per_device_train_batch_size=2)
    found = fitted("dpo", recipe, card_for(half))
    assert {c.field: c.value for c in found.changes} == {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}  # fmt: skip
    assert found == fitted("dpo", recipe, card_for(half)), "a function of its arguments"
    assert all("'training step' would take" in change.why for change in found.changes)
    one = peak(gradient_checkpointing=True, per_device_train_batch_size=1)
    found = fitted("dpo", recipe, card_for(one))
    assert {c.field for c in found.changes} >= {"gradient_checkpointing", "per_device_train_batch_size"}
    train = found.recipe.train
    assert train.per_device_train_batch_size * train.gradient_accumulation_steps == 4
    adapters = peak(gradient_checkpointing=True, per_device_train_batch_size=1, use_peft=True)
    assert adapters < one
    assert fitted("dpo", recipe, card_for(adapters)).recipe.model.use_peft


def test_what_cannot_fit_says_what_would(tmp_path):
    recipe = made("dpo", tmp_path)
    with pytest.raises(BadInput, match=r"does not fit\. .* What would fit: a device of .* MiB"):
        fitted("dpo", recipe, card_for(100_000))


def test_a_second_model_gives_way_to_its_log_probs(tmp_path):
    recipe = made("dpo", tmp_path, reference="frozen", per_device_train_batch_size=1, max_length=8)
    without = made("dpo", tmp_path / "b", reference="precomputed", per_device_train_batch_size=1, max_length=8)
    card = card_for(rehearse("dpo", without, HERE, Lengths(1, 7)).peak.peak)
    found = fitted("dpo", recipe, card)
    assert [(c.field, c.value) for c in found.changes] == [("reference", "precomputed")]


def test_a_run_with_fit_is_the_run_as_settled(tmp_path, capsys):
    """It takes the same steps as its own recipe without `fit`, goes on with the same command, and stops before weights
    are loaded where it cannot fit."""
    plain = made("dpo", tmp_path, gradient_accumulation_steps=1, max_steps=2, gradient_checkpointing=False)
    small = card_for(rehearse("dpo", plain, HERE, Lengths(1, 63)).peak.peak - 1)
    path = tmp_path / "recipe.yaml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cards, "card", lambda asked, field: small)
        plain.train.fit, plain.output.output_dir = "small", str(tmp_path / "fitted")
        recipes.save(plain, path)
        assert main(["dpo", "--recipe", str(path)]) == 0
        assert "--per_device_train_batch_size 2: the phase 'training step' would take" in capsys.readouterr().out
        assert main(["dpo", "--recipe", str(path)]) == 0
        assert "nothing to do" in capsys.readouterr().out
        shutil.move(tmp_path / "model" / "model.safetensors", tmp_path / "elsewhere")
        small = card_for(100_000)
        assert main(["dpo", "--recipe", str(path), "--output_dir", str(tmp_path / "other")]) == 2
        assert "What would fit" in capsys.readouterr().err and not (tmp_path / "other").exists()
        shutil.move(tmp_path / "elsewhere", tmp_path / "model" / "model.safetensors")
    settled = recipes.load(RECIPES["dpo"], tmp_path / "fitted" / "recipe.yaml")
    assert settled.train.fit is None and settled.train.per_device_train_batch_size == 2
    assert main(["dpo", "--recipe", str(tmp_path / "fitted" / "recipe.yaml")]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_fit_is_refused_where_it_cannot_plan(tmp_path, capsys):
    recipe = made("dpo", tmp_path, fit="A100")
    with pytest.raises(BadInput, match="fit = 'A100' is a GPU, and this run is on cpu"):
        train("dpo", recipe)


def test_4_bits_are_a_quarter(tmp_path):
    full = rehearse("dpo", made("dpo", tmp_path, use_peft=True, dtype="bfloat16"), HERE, EACH)
    four = rehearse("dpo", made("dpo", tmp_path / "4", use_peft=True, dtype="bfloat16", load_in_4bit=True), HERE, EACH)
    layers = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)  # weights of their linear layers
    saved = full.phases[-1].parts["weights"] - four.phases[-1].parts["weights"]
    assert saved == pytest.approx(layers * (2 - 0.5 - 1 / 64), rel=0.01)


def test_experts_and_other_architectures_need_no_formula(tmp_path):
    from transformers import AutoConfig

    for kind, more in {"mixtral": dict(num_local_experts=4, num_experts_per_tok=2), "gemma2": dict(head_dim=16),
                       "gpt2": dict(n_embd=64, n_layer=2, n_head=4)}.items():  # fmt: skip
        config = AutoConfig.for_model(kind, vocab_size=4096, bos_token_id=0, eos_token_id=1, pad_token_id=0,
                                      **({} if kind == "gpt2" else SHAPE), **more)  # fmt: skip
        config.architectures = None
        config.save_pretrained(tmp_path / kind)
        recipe = made("sft", tmp_path / f"of {kind}")
        recipe.model.model_name_or_path = str(tmp_path / kind)
        found = rehearse("sft", recipe, HERE, EACH)
        # a checkpoint may take more than the step's activations, which lie in the memory that it leaves to malloc
        assert found.peak.parts["weights"] > 0 and found.peak.peak > 2.5 * found.peak.parts["weights"]
        assert found.flops > 0


def test_numbers_are_not_needed_of_a_torch_tensor(tmp_path):
    """Nothing of a rehearsal stays behind: real tensors and modules work as before."""
    rehearse("sft", made("sft", tmp_path), HERE, EACH)
    layer = torch.nn.Linear(2, 2).to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16 and float(layer.weight.detach().abs().sum()) > 0


# -- malloc --------------------------------------------------------------------------------------------------------
def test_a_heap_keeps_what_was_freed_and_gives_back_its_end():
    heap, size = Heap(), 1 << 19
    heap.add(0, MAPPED)
    assert heap.resident == heap.live == 0, "mapped apart"
    for number in range(1, 5):
        heap.add(number, size)
    assert heap.live == 4 * size <= heap.resident < 4.2 * size
    before = heap.resident
    heap.remove(2)
    heap.remove(3)
    assert heap.live == 2 * size and heap.resident == before
    heap.add(5, size * 3 // 2)
    assert heap.resident == before, "a hole of two is large enough"
    for number in (1, 4, 5):
        heap.remove(number)
    assert heap.live == 0 and heap.resident == before, "less than TRIMMED is free at its end"
    heap.add(6, MAPPED)
    assert heap.live == MAPPED, "there is room for it in the free end"
    heap.remove(6)
    for number in range(7, 160):
        heap.add(number, size)
    for number in range(8, 160):
        heap.remove(number)
    assert heap.resident < 5 * size


def test_a_huge_page_comes_whole():
    heap = Heap()
    heap.add(0, 12 << 20)
    assert heap.resident == 0, "mapped apart"
    for number in range(1, 60):  # a free end of 58 blocks
        heap.add(number, MAPPED // 2)
    for number in range(1, 60):
        heap.remove(number)
    assert heap.resident < 30 << 20
    heap.add(0, 12 << 20)
    assert heap.live == 12 << 20 and heap.resident < 30 << 20


GLIBCS = """
import ctypes, os, random
from align_engine.planning.heap import Heap
from align_engine.training import allocator

class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Mallinfo
libc.free.argtypes = [ctypes.c_void_p]
allocator.tune()

def trace(seed):
    heap, draw, live = Heap(), random.Random(seed), {}
    libc.malloc_trim(0)
    before, played, real, number = libc.mallinfo2(), [], [], 0
    for _ in range(4000):
        if live and draw.random() < (0.3 if len(live) < 150 else 0.7):
            one = draw.choice(sorted(live))
            libc.free(live.pop(one))
            heap.remove(one)
        else:
            number, size, place = number + 1, int(2 ** draw.uniform(12, 22.5)), ctypes.c_void_p()
            align = 4096 if size >= allocator.LARGE else 64
            assert libc.posix_memalign(ctypes.byref(place), ctypes.c_size_t(align), ctypes.c_size_t(size)) == 0
            live[number] = place
            heap.add(number, size)
        now = libc.mallinfo2()
        real.append(now.arena - before.arena)
        played.append(heap.size)
    print(sum(real), sum(played), max(real), max(played), flush=True)

for seed in range(12):
    if not (child := os.fork()):
        trace(seed)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is the oracle")
def test_a_heap_is_as_large_as_glibcs():
    """Over a dozen traces, each in a process of its own: where the system lets a heap begin decides which holes blocks
    find, which moves a single one by up to 7 %."""
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", GLIBCS], capture_output=True, text=True, check=True,
                          env=os.environ | paths)  # fmt: skip
    traces = [list(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(traces) == 12
    real, played, most, most_played = map(sum, zip(*traces, strict=True))
    assert played == pytest.approx(real, rel=0.05) and most_played == pytest.approx(most, rel=0.05)
