"""Which share of a softmax's columns do rows need that nobody tuned, and does column compaction pay there?

    nice -n 19 python benches/measure_columns.py train --minutes 8 --out model      # again: goes on from there
    python benches/measure_columns.py report --out model
    nice -n 19 python benches/measure_columns.py train --minutes 20 --files 6 --out small
    python benches/measure_columns.py report --files 6 --out small

Trains a small Qwen2 on the Python standard library's own sources and the texts of its help (BPE of 32k, a twentieth of
the files held out), then reports on held-out text: validation loss, entropy, the share of columns that survive per
drop_mass and band of entropy, and the time of an SFT step of the head against the exact schedule. With `--files` it
trains on so few files that it learns them by heart, and the report is on its own answers to their text.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sysconfig
import time
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from align_kernels import linear_logprobs, sft_loss
from align_kernels.backends.state import entropy as entropy_of
from align_kernels.head import Head, read_head
from align_kernels.losses import LOSSES
from align_kernels.schedules import compaction, lists
from align_kernels.schedules.dense import softmax
from align_kernels.schedules.plan import start
from align_kernels.units import LossCall, keep_rows

VOCAB, LENGTH = 32000, 256
ROWS = 4096
TAUS = (2**-8, 2**-10, 2**-12)
BANDS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, math.inf)


# -- a model of real text -----------------------------------------------------------------------------------------
def texts() -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in root.rglob("*.py") if not {"site-packages", "lib2to3"} & set(p.parts))
    return [p.read_text(encoding="utf-8", errors="ignore") for p in files]


def tokens(out: Path, files: int | None) -> tuple[Tensor, Tensor]:
    """Training ids, of so many files, and held-out ones; the tokenizer is trained once, on all but those."""
    everything = texts()
    held, rest = everything[::20], [t for i, t in enumerate(everything) if i % 20]
    tokenizer = out / "vocab.json", out / "merges.txt"
    if not tokenizer[0].exists():
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(rest, vocab_size=VOCAB, min_frequency=2, special_tokens=["<end>"], show_progress=False)
        bpe.save_model(str(out))
    bpe = ByteLevelBPETokenizer(*map(str, tokenizer))

    def encode(parts: list[str]) -> Tensor:
        return torch.tensor([i for e in bpe.encode_batch(parts) for i in (*e.ids, 0)])

    return encode(rest[:files]), encode(held)


def train(out: Path, files: int | None, minutes: float) -> None:
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed((out / "config.json").exists())
    ids, _ = tokens(out, files)
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM.from_pretrained(out) if (out / "config.json").exists() else Qwen2ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    start, step = time.perf_counter(), 0
    while (done := (time.perf_counter() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, step / 50) * (1 - done)
        at = torch.randint(0, len(ids) - LENGTH, (4,))
        batch = torch.stack([ids[i : i + LENGTH] for i in at.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(input_ids=batch).last_hidden_state[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            print(f"step {step}, {done:.0%}: loss {loss.item():.3f}", flush=True)
    print(f"{step} steps, {step * batch.numel() / 1e6:.1f} M tokens of {len(ids) / 1e6:.1f} M")
    model.save_pretrained(out)


# -- what compaction finds ----------------------------------------------------------------------------------------
@torch.no_grad()
def rows(out: Path, files: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [ROWS, D] in the second halves of sequences, the head's weight and the next tokens [ROWS]: of
    held-out text, or answers to the first halves of the text that it was trained on."""
    model = Qwen2ForCausalLM.from_pretrained(out)
    trained, held = tokens(out, files)
    ids = held if files is None else trained
    ids = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    ids, half = ids[torch.linspace(0, len(ids) - 1, 2 * ROWS // LENGTH).long()], LENGTH // 2
    if files is not None:
        torch.manual_seed(0)
        ids = model.generate(
            ids[:, :half], attention_mask=torch.ones_like(ids[:, :half]), do_sample=True, top_k=0, max_new_tokens=half
        )
    hidden = model.model(input_ids=ids).last_hidden_state
    return hidden[:, half - 1 : -1].flatten(0, 1), model.lm_head.weight.detach(), ids[:, half:].flatten()


def shares(hidden: Tensor, weight: Tensor, targets: Tensor, tau: float, entropy: bool) -> tuple[Tensor, Tensor]:
    """Of each row, however many columns it takes: entropy and share of columns [n]."""
    hidden = hidden.detach().requires_grad_()
    h, settings, needs = read_head(hidden, weight, targets, drop_mass=tau)
    tiled = start(h, settings, needs, keep_rows(targets, -100), LossCall(LOSSES["sft"])).tiled
    tiled.head = Head(*(None if x is None else x.detach() for x in h))
    heights, found = [], []
    for chunk in tiled.chunks(0, len(targets)):
        store = tiled.store(len(chunk.targets))
        state = softmax(tiled, chunk, store)
        heights.append(entropy_of(state))
        found.append(torch.ones(len(state), dtype=torch.float64))
        every, room = torch.arange(len(state)), tiled.plan.spare // 4
        for some in compaction.cut(tiled, chunk, state, store, every, [], room, entropy=entropy):
            found[-1][some.rows] = (some.lists.ends - some.lists.begins).double() / len(weight)
    return torch.cat(heights), torch.cat(found)


def report(out: Path, files: int | None) -> None:
    hidden, weight, targets = rows(out, files)
    with torch.no_grad():
        stats = linear_logprobs(hidden, weight, targets)
    print(f"{len(targets)} rows: loss {-stats.logp.mean():.2f}, entropy mean {stats.entropy.mean():.2f}, "
          f"median {stats.entropy.median():.2f}")  # fmt: skip
    counts = torch.histogram(stats.entropy, torch.tensor([*BANDS[:-1], 99.0])).hist
    names = [f"{a:g}-{b:g}" for a, b in pairwise(BANDS)]
    print("share of rows   ", " ".join(f"{n:>7}" for n in names))
    print("                ", " ".join(f"{c / len(targets):7.1%}" for c in counts))
    limits = lists.MOST, lists.SLOWER
    lists.MOST, lists.SLOWER = 1.0, 0
    print("share of columns that survive, mean over rows, and by their entropy (no limit on the share)")
    for entropy in (False, True):
        for tau in TAUS:
            height, found = shares(hidden, weight, targets, tau, entropy)
            bands = [found[(a <= height) & (height < b)].mean() for a, b in pairwise(BANDS)]
            print(
                f"{'entropy too, ' if entropy else ''}2^{math.log2(tau):.0f}: all {found.mean():6.1%} |",
                " ".join(f"{share:7.1%}" for share in bands),
                flush=True,
            )
    lists.MOST, lists.SLOWER = limits
    print("one SFT step of the head, CPU seconds, medians of 5, in turn")
    order = stats.entropy.argsort()
    for name, index in (("all rows", order.sort().values), ("the peaked half", order[: ROWS // 2].sort().values)):
        for trained in (True, False):
            compare(
                f"{name}, head {'trained' if trained else 'frozen'}", hidden[index], weight, targets[index], trained
            )


def compare(name: str, hidden: Tensor, weight: Tensor, targets: Tensor, trained: bool) -> None:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_(trained)

    def step(tau: float) -> Tensor:
        hidden.grad = weight.grad = None
        sft_loss(hidden, weight, targets, drop_mass=tau).loss.backward()
        return hidden.grad

    seconds, nvd, error = {}, {}, {}
    exact = step(0.0).clone()
    with torch.autocast("cpu", torch.bfloat16):  # the rounding that training in bfloat16 takes for granted
        x = hidden.detach().requires_grad_()
        torch.nn.functional.cross_entropy((x @ weight.T).float(), targets).backward()
    eager = (x.grad - exact).norm() / exact.norm()
    for tau in (0.0, *TAUS):
        with FlopCounterMode(display=False) as counter:
            error[tau] = (step(tau) - exact).norm() / exact.norm()
        nvd[tau] = counter.get_total_flops() / (len(hidden) * weight.numel())
    for _ in range(5):
        for tau in (0.0, *TAUS):
            start = time.process_time()
            step(tau)
            seconds.setdefault(tau, []).append(time.process_time() - start)
    base = statistics.median(seconds[0.0])
    for tau in TAUS:
        took = statistics.median(seconds[tau])
        print(
            f"{name}, 2^{math.log2(tau):.0f}: {base:.2f} -> {took:.2f} s, {base / took:.2f}x, "
            f"{nvd[0.0]:.2f} -> {nvd[tau]:.2f} NVD, error of dX {error[tau]:.1e} (eager bfloat16 {eager:.1e})",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "report"])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--files", type=int, help="that it is trained on, the first ones; all by default")
    parser.add_argument("--out", type=Path, default=Path("columns-model"))
    args = parser.parse_args()
    if args.what == "train":
        train(args.out, args.files, args.minutes)
    else:
        report(args.out, args.files)
