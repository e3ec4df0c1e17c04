"""What a fresh environment must do, from an empty folder: python release_smoke.py engine|kernels built|"not built"."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import align_kernels

HERE = Path(sys.prefix)


def check_metadata(distribution: str) -> None:
    """What the installed distribution says of itself; no file of it lies in another folder."""
    said = importlib.metadata.metadata(distribution)
    assert said["Version"] == align_kernels.__version__ and said["Author"] == "align-engine developers"
    assert said["License-Expression"] == "Apache-2.0" and said.get_all("License-File") == ["LICENSE"]
    assert {"Typing :: Typed", "Operating System :: POSIX :: Linux"} <= {*(said.get_all("Classifier") or ())}
    files = importlib.metadata.files(distribution) or []
    tops = {str(file).split("/")[0] for file in files if ".." not in str(file)}
    own = f"{distribution.replace('-', '_')}-{said['Version']}.dist-info"
    assert tops <= {"align_engine", "align_kernels", own}, tops
    assert any(str(file) == "align_kernels/py.typed" for file in files)
    (wheel,) = (file for file in files if file.name == "WHEEL")
    print("wheel:", *(line for line in wheel.read_text().splitlines() if line.startswith("Tag")))


def check_syntax(*packages: str) -> None:
    """This Python has nothing to warn of in any file."""
    folders = [Path(align_kernels.__file__).parents[1] / name for name in packages]
    subprocess.run([sys.executable, "-W", "error", "-m", "compileall", "-q", "-f", *folders], check=True)


def check_kernels(built: str) -> None:
    """The loss and its gradient are those of eager logits; the extension is there, or says that it is not."""
    assert HERE in Path(align_kernels.__file__).parents, align_kernels.__file__
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 6, 16, requires_grad=True), torch.randn(50, 16)
    targets, ref = torch.randint(50, (4, 6)), torch.randn(4)
    out = align_kernels.dpo_loss(hidden, weight, targets, ref, beta=0.1)
    (grad,) = torch.autograd.grad(out.loss, hidden)
    logps = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[..., None])[..., 0].sum(-1)
    chosen, rejected = (logps - ref).chunk(2)
    eager = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
    torch.testing.assert_close(out.loss, eager)
    torch.testing.assert_close(grad, torch.autograd.grad(eager, hidden)[0])
    print(f"dpo_loss {out.loss.item():.6f}, eager {eager.item():.6f}, gradients the same")
    maps = Path("/proc/self/maps").read_text().splitlines()
    pools = {line.split()[-1] for line in maps if "libgomp" in line}
    assert len(pools) == 1, f"torch and the extension share one OpenMP: {pools}"
    extension = importlib.util.find_spec("align_kernels._C")
    assert (extension is not None) == (built == "built"), extension
    if extension is not None:
        sys.path.insert(0, str(Path(__file__).parent / "helpers"))
        import elf

        assert elf.unhardened(Path(str(extension.origin)).read_bytes()) == []


def align(*arguments: object) -> str:
    """What a command prints."""
    done = subprocess.run([HERE / "bin" / "align", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, f"align {arguments}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def check_engine(built: str) -> None:
    """The command, the recipes by name, a plan and a run on what the package ships."""
    import align_engine

    assert HERE in Path(align_engine.__file__).parents and (Path(align_engine.__file__).parent / "py.typed").exists()
    assert align_engine.__version__ == align_kernels.__version__ and align_engine.__version__ in align("--version")
    facts = json.loads(align("env", "--json"))
    assert facts["packages"]["align-engine"] == align_engine.__version__
    assert facts["cpu_extension"].startswith("built and in use") == (built == "built"), facts["cpu_extension"]
    assert built == "built" or "No module named 'align_kernels._C'" in facts["cpu_extension"]
    taken: dict[str, str] = {}
    for status in facts["backends"]:
        if status["available"]:
            taken.setdefault(f"{status['device']} {status['dtype']}", status["name"])
    assert taken["cpu float32"] == ("cpu" if built == "built" else "torch"), taken
    print("align env: CPU extension:", facts["cpu_extension"], "| C++ compiler:", facts["compiler"], "|", taken)
    names = align("recipes")
    assert "qwen2.5-7b-lora-dpo" in names and "lora_r: 16" in align("recipes", "qwen2.5-7b-lora-dpo")
    model = prepare()
    plan = align("plan", "dpo", "--recipe", "qwen2.5-7b-lora-dpo", "--model_name_or_path", model, "--memory", "24GB")
    print("align plan:", plan.strip().splitlines()[-1])
    said = align("dpo", "--recipe", "demo-dpo", "--model_name_or_path", model, "--dataset_name", "train.jsonl",
                 "--eval_dataset_name", "held-out.jsonl", "--eval_steps", 2, "--logging_steps", 1,
                 "--output_dir", "dpo", "--max_steps", 2)  # fmt: skip
    steps = [json.loads(line) for line in Path("dpo/metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if "loss" in step]
    (evaluated,) = (step["eval_loss"] for step in steps if "eval_loss" in step)
    assert len(losses) == 2 and abs(losses[0] - math.log(2)) < 1e-4 < abs(evaluated - math.log(2)), said
    assert (Path("dpo") / "report.html").exists() and (Path("dpo") / "final" / "model.safetensors").exists()
    print(f"align dpo: loss {losses[0]:.4f}, after two steps {evaluated:.4f} on held-out pairs")


def prepare() -> str:
    """The rows of the shipped example of own data, and a model of the demo's kind that reads them."""
    from align_engine.demo.make import make_model, make_tokenizer
    from align_engine.recipe import shipped

    example = shipped.folder("examples") / "own_data" / "dpo"
    assert HERE in example.parents
    runpy.run_path(str(example / "prepare.py"), run_name="__main__")
    rows = map(json.loads, Path("train.jsonl").read_text().splitlines())
    turns = [turn for row in rows for side in ("prompt", "chosen", "rejected") for turn in row[side]]
    tokenizer = make_tokenizer([f"{turn['role']}\n{turn['content']}" for turn in turns], vocab_size=400)
    for part in (tokenizer, make_model(tokenizer, hidden=32, layers=1)):
        part.save_pretrained("model")
    return "model"


if __name__ == "__main__":
    what, built = sys.argv[1:]
    check_metadata(f"align-{what}")
    check_syntax("align_kernels", *(["align_engine"] if what == "engine" else []))
    check_kernels(built)
    if what == "engine":
        check_engine(built)
    else:
        others = [name for name in ("transformers", "accelerate", "align_engine") if importlib.util.find_spec(name)]
        assert not others, "align-kernels needs torch alone"
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}: {what}, extension {built}: works")
