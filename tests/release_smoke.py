"""What a fresh environment must do, from an empty folder: python release_smoke.py engine|kernels built|"not built"."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import align_kernels

HERE = Path(sys.prefix)


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
    extension = importlib.util.find_spec("align_kernels._C")
    assert (extension is not None) == (built == "built"), extension
    assert (Path(align_kernels.__file__).parent / "py.typed").exists()


def align(*arguments: object, code: int = 0) -> str:
    """What a command prints."""
    done = subprocess.run([HERE / "bin" / "align", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == code, f"align {arguments}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def check_engine(built: str) -> None:
    """The command, the recipes by name, a run and one that goes on from it."""
    import align_engine

    assert HERE in Path(align_engine.__file__).parents
    assert align_engine.__version__ == align_kernels.__version__ and align_engine.__version__ in align("--version")
    facts = json.loads(align("env", "--json"))
    assert facts["packages"]["align-engine"] == align_engine.__version__
    assert facts["cpu_extension"].startswith("built and in use") == (built == "built"), facts["cpu_extension"]
    print("align env:", facts["cpu_extension"], "| compiler:", facts["compiler"])
    assert "qwen2.5-7b-lora-dpo" in align("recipes") and "lora_r: 16" in align("recipes", "qwen2.5-7b-lora-dpo")
    sys.path.insert(0, str(Path(__file__).parent / "helpers"))
    import tiny

    model = tiny.write_model(Path("model"))
    rows = tiny.write_rows(Path("sft.jsonl"), tiny.sft_rows(8))
    pairs = tiny.write_rows(Path("pairs.jsonl"), tiny.preference_rows(8))
    align("sft", "--model_name_or_path", model, "--dataset_name", rows, "--output_dir", "sft", "--max_steps", 2)
    align("dpo", "--recipe", "demo-dpo", "--model_name_or_path", "sft/final", "--dataset_name", pairs,
          "--eval_dataset_name", "none", "--eval_steps", "none", "--output_dir", "dpo", "--max_length", 60,
          "--max_steps", 2)  # fmt: skip
    assert (Path("dpo") / "report.html").exists() and (Path("dpo") / "final" / "model.safetensors").exists()


if __name__ == "__main__":
    what, built = sys.argv[1:]
    check_kernels(built)
    if what == "engine":
        check_engine(built)
    else:
        assert importlib.util.find_spec("transformers") is None, "align-kernels needs torch alone"
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}: {what}, extension {built}: works")
