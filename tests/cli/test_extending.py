"""docs/extending.md: its files work as they stand there, and what does not fit is refused by name."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from align_engine.algorithms import ALGORITHMS, TOOLS, register
from align_engine.algorithms.grpo import GRPO
from align_engine.algorithms.preference import DPO
from align_engine.cli import COMMANDS, main
from align_engine.errors import BadInput
from align_engine.iterate import round_recipe
from align_engine.recipe import RECIPES, DpoRecipe, GentleRecipe, IterateRecipe, LossReference
from align_engine.training import metrics
from align_engine.training.importing import run_file
from align_kernels import backends_report, explain, fused_loss, linear_logprobs, register_backend, register_loss
from align_kernels.backends import torch_ops
from align_kernels.compat.liger import preference
from align_kernels.dispatch import BACKENDS
from align_kernels.losses import registry

GUIDE = Path(__file__).parents[2] / "docs" / "extending.md"
FILES = {name: code for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", GUIDE.read_text(), re.DOTALL)}


def forget() -> None:
    """The guide's modules, and the names that they registered."""
    for table in (registry.LOSSES, ALGORITHMS, RECIPES):
        table.pop("rdpo", None)
    for name in [name for name in sys.modules if name.startswith(("rdpo", "double"))]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch):
    """Every table as it was, once the test is done; so are the imported modules."""
    held: list[dict] = [registry.LOSSES, registry.UNLISTED, BACKENDS, ALGORITHMS, RECIPES]
    before = [dict(table) for table in held]
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for table, rows in zip(held, before):
        table.clear()
        table.update(rows)
    forget()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, code in FILES.items():
        (tmp_path / name).write_text(code)
    return tmp_path


def test_the_guide_has_short_files():
    assert FILES.keys() == {"rdpo.py", "test_rdpo.py", "double.py", "rdpo_method.py"}
    assert all(len(code.splitlines()) < 40 for code in FILES.values())


# -- a loss ---------------------------------------------------------------------------------------------------------
def batch(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [6, 7, 16], weight [50, 16], targets [6, 7] of unequal lengths, ref_logps [6]."""
    make = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 7, 16, generator=make, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(50, 16, generator=make, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, 50, (6, 7), generator=make)
    targets[torch.arange(7) >= torch.tensor([7, 3, 5, 2, 6, 4])[:, None]] = -100
    return hidden, weight, targets, -20 * torch.rand(6, generator=make, dtype=torch.float64)


def eager_logps(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[B], sums of log-probs over the kept tokens, from all logits in float64."""
    logp = (hidden.double() @ weight.double().T).log_softmax(-1)
    picked = logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (picked * (targets != -100)).sum(-1)


def eager_rdpo(logps: torch.Tensor, ref: torch.Tensor, lengths: torch.Tensor, beta: float, alpha: float):
    (w, l), (n_w, n_l) = (logps - ref).chunk(2), lengths.chunk(2)
    return -F.logsigmoid(beta * (w - l) + alpha * n_w - alpha * n_l).mean()


@pytest.mark.parametrize("head", [{}, {"impl": "torch"}, {"impl": "eager"}, {"workspace": 1}])
def test_the_loss_equals_its_eager_formula(files: Path, head: dict):
    loss = run_file(str(files / "rdpo.py"), "test").rdpo_loss
    hidden, weight, targets, ref = batch()
    out = loss(hidden, weight, targets, ref, beta=0.3, length_alpha=0.2, **head)
    got = torch.autograd.grad(out.loss, (hidden, weight))
    logps = eager_logps(hidden, weight, targets)
    expected = eager_rdpo(logps, ref, (targets != -100).sum(1).double(), 0.3, 0.2)
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got, torch.autograd.grad(expected, (hidden, weight)), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.logps, logps.detach(), rtol=1e-12, atol=1e-12)
    margin = 0.3 * torch.sub(*(logps - ref).chunk(2)).mean()
    assert out.metrics["rewards/margins"].item() == pytest.approx(margin.item(), rel=1e-12)
    assert out.metrics.keys() >= {"logps/chosen", "logits/rejected", "entropy", "mean_token_accuracy"}


def test_the_losss_own_test_passes(files: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(files))
    run_file(str(files / "test_rdpo.py"), "test").test_value_and_gradients_equal_the_eager_formula()


def test_the_loss_takes_one_pass_and_compiles(files: Path):
    loss = run_file(str(files / "rdpo.py"), "test").rdpo_loss
    hidden, weight, targets, ref = batch()
    assert explain(hidden, weight, targets, loss="rdpo").schedule == "one pass"
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, weight, targets, ref).loss, loss(hidden, weight, targets, ref).loss)


def test_losses_per_token_and_sequence():
    @register_loss("token", side={"weights": "token"})
    def weighed(logps, *, weights, power=1.0):
        return -weights * logps.abs() ** power, {}

    @register_loss("sequence", side={"weights": "sum", "target": "batch"}, metrics=("distance",))
    def distant(logps, *, weights, target):
        return (weights - target) ** 2, {"distance": weights.detach() - target}

    hidden, weight, targets, _ = batch()
    weights = torch.rand(targets.shape, dtype=torch.float64)
    logp = linear_logprobs(hidden, weight, targets, impl="eager").logp
    out = fused_loss("weighed", hidden, weight, targets, {"weights": weights}, {"power": 2}, num_items=4)
    torch.testing.assert_close(out.loss, (-weights * logp.abs() ** 2).sum() / 4)
    assert out.logps.shape == targets.shape
    out = fused_loss("distant", hidden, weight, targets, {"weights": weights, "target": torch.tensor(-9.0)})
    sums = (weights * logp).sum(1)
    torch.testing.assert_close(out.loss, ((sums + 9) ** 2).mean())
    torch.testing.assert_close(out.metrics["distance"], (sums + 9).mean())
    assert out.logps.shape == (6,)


def test_a_call_that_does_not_fit_is_refused(files: Path):
    run_file(str(files / "rdpo.py"), "test")
    hidden, weight, targets, ref = batch()
    options = {"beta": 0.1, "length_alpha": 0.1}

    def call(side: dict, options: dict, name: str = "rdpo", **head):
        fused_loss(name, hidden, weight, targets, side, options, **head)

    with pytest.raises(ValueError, match=r"name must be one of .*dpo.*, got 'rpdo'"):
        call({}, {}, "rpdo")
    with pytest.raises(TypeError, match="loss 'rdpo' takes no option 'bta': it takes beta, length_alpha"):
        call({"ref_logps": ref}, options | {"bta": 1.0})
    with pytest.raises(TypeError, match="loss 'rdpo' takes no option 'ref_logps'"):
        call({}, options | {"ref_logps": 1.0})
    with pytest.raises(TypeError, match="loss 'rdpo' takes no tensor 'reference': it takes ref_logps"):
        call({"reference": ref}, options)
    with pytest.raises(TypeError, match="loss 'rdpo' needs ref_logps, length_alpha"):
        call({"ref_logps": None}, {"beta": 0.1})
    with pytest.raises(ValueError, match=r"ref_logps must have shape \(6,\), got \(3,\)"):
        call({"ref_logps": ref[:3]}, options)
    with pytest.raises(ValueError, match="beta must be finite"):
        call({"ref_logps": ref}, options | {"beta": float("nan")})
    with pytest.raises(TypeError, match=r"fused_loss.*takes no argument 'softcp': did you mean softcap"):
        call({"ref_logps": ref}, options, softcp=3.0)
    with pytest.raises(ValueError, match=r"loss must be one of .*, got 'rpdo'"):
        explain(hidden, weight, targets, loss="rpdo")


def test_a_registration_that_does_not_fit_is_refused():
    def mine(logps, *, ref_logps):
        return logps - ref_logps, {}

    with pytest.raises(ValueError, match="per must be one of token, sequence, pair, got 'row'"):
        register_loss("row")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unit must be one of pair, batch, got 'token'"):
        register_loss("pair", unit="token")
    with pytest.raises(ValueError, match="the level of 'ref_logps' must be one of token, sum, sequence, batch"):
        register_loss("pair", side={"ref_logps": "pair"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="the level of 'ref_logps' must be one of token, batch, got 'sequence'"):
        register_loss("token", side={"ref_logps": "sequence"})
    with pytest.raises(ValueError, match="needs 'lengths' of whole sequences: say unit='sequence'"):
        register_loss("token", needs=("lengths",))(lambda logps, *, lengths: (logps / lengths, {}))
    with pytest.raises(ValueError, match=r"needs must be one of .*, got 'length'"):
        register_loss("pair", needs=("length",))
    with pytest.raises(ValueError, match="mine takes no argument 'lengths', which side or needs names"):
        register_loss("pair", side={"ref_logps": "sequence"}, needs=("lengths",))(mine)
    assert "mine" not in registry.LOSSES


def test_losses_of_drop_ins_are_no_public_names():
    assert registry.UNLISTED["liger_dpo"].fn is preference.liger_dpo
    assert not [name for name in registry.LOSSES if name.startswith("liger")]
    hidden, weight, targets, _ = batch()
    with pytest.raises(ValueError, match="name must be one of"):
        fused_loss("liger_dpo", hidden, weight, targets)

    def liger_dpo(logps):
        return logps, {}

    with pytest.raises(ValueError, match="the loss name 'liger_dpo' is taken"):
        register_loss("pair")(liger_dpo)


# -- a backend ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_the_backend_equals_eager_logits(files: Path, dtype: torch.dtype, tolerance: float):
    run_file(str(files / "double.py"), "test")
    hidden, weight, targets, _ = batch(dtype)
    out = linear_logprobs(hidden, weight, targets, softcap=4.0, temperature=0.7, impl="double", workspace=1 << 10)
    logits = 4.0 * torch.tanh(hidden.double() @ weight.double().T / 4.0) / 0.7
    log_p, kept = logits.log_softmax(-1), targets != -100
    logp = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * kept
    entropy = -(log_p.exp() * log_p).sum(-1) * kept
    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    torch.testing.assert_close(out.logp, logp, **close)
    torch.testing.assert_close(out.entropy, entropy, **close)
    got = torch.autograd.grad((out.logp - out.entropy).sum(), (hidden, weight))
    torch.testing.assert_close(got, torch.autograd.grad((logp - entropy).sum(), (hidden, weight)), **close)


def test_the_backend_is_explained_reported_and_never_chosen(files: Path):
    kind = type(run_file(str(files / "double.py"), "test").Double())
    hidden, weight, targets, _ = batch()
    plan = explain(hidden, weight, targets, impl="double")
    assert plan.backend == "double" and "double" in str(plan)
    assert explain(hidden, weight, targets).backend != "double"
    assert [s.available for s in backends_report() if (s.name, s.device) == ("double", "cpu")] == [True] * 4
    kind.why_not = lambda self, device, dtype: "it rests"
    with pytest.raises(ValueError, match=r'impl="double" cannot serve torch\.float64 on cpu: it rests'):
        linear_logprobs(hidden, weight, targets, impl="double")


@pytest.mark.parametrize("name", ["auto", "eager", "cpu", "torch"])
def test_a_backend_of_a_taken_name_is_refused(name: str):
    with pytest.raises(ValueError, match=f"the backend name '{name}' is taken"):
        register_backend(name, SimpleNamespace(**vars(torch_ops)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    [
        "why_not",
        "forward",
        "backward",
        "peaks",
        "lists",
        "exponentials",
        "on_chip",
        "products",
        "losses",
        "multiply",
        "row_sums",
        "survey",
    ],
)
def test_a_backend_without_a_part_of_the_protocol_is_refused(name: str):
    parts = dict(vars(torch_ops))
    del parts[name]
    with pytest.raises(TypeError, match=f"backend 'mine' has no attribute '{name}'"):
        register_backend("mine", SimpleNamespace(**parts))  # type: ignore[arg-type]
    power = SimpleNamespace(**vars(torch_ops) | {"products": SimpleNamespace(serves=bool, reads=bool, takes=bool)})
    with pytest.raises(TypeError, match="products of backend 'mine' has no attribute 'product'"):
        register_backend("mine", power)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="backend 'mine': 'forward' must be a function, got None"):
        register_backend("mine", SimpleNamespace(**vars(torch_ops) | {"forward": None}))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="backend 'mine' has neither 'peaks' nor 'lists'"):
        register_backend("mine", SimpleNamespace(**vars(torch_ops) | {"peaks": None}))  # type: ignore[arg-type]
    assert "mine" not in BACKENDS


def test_a_run_trains_on_the_backend(files: Path, model, pairs, capsys):
    settings = dict(model_name_or_path=model, dataset_name=pairs, max_steps=1, impl="double")
    run = ["dpo", *flags(**settings, output_dir=files / "run")]
    assert main(run) == 2 and "impl must be one of auto, eager, cpu" in capsys.readouterr().err
    assert main(["--plugin", str(files / "double.py"), *run]) == 0, capsys.readouterr().err


# -- a method -------------------------------------------------------------------------------------------------------
def flags(**settings) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def test_the_method_trains_from_the_command_line(files: Path, model, other_model, pairs, capsys):
    run = dict(model_name_or_path=model, dataset_name=pairs, output_dir=files / "run", max_steps=1, bf16="no",
               ref_model_name_or_path=other_model, per_device_train_batch_size=8, logging_steps=1, beta=0.3,
               length_alpha=0.2)  # fmt: skip
    command = ["--plugin", str(files / "rdpo_method.py"), "rdpo", *flags(**run)]
    assert main(command) == 0, capsys.readouterr().err
    record = metrics.read(files / "run" / "metrics.jsonl")[0]
    tokenizer, sums = AutoTokenizer.from_pretrained(model), {}
    for path in (model, other_model):
        net = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        for side in ("chosen", "rejected"):
            for row in tiny.preference_rows(8):
                prompt, answer = (tokenizer(row[key])["input_ids"] for key in ("prompt", side))
                ids = torch.tensor([*prompt, *answer, tokenizer.eos_token_id])
                logp = net(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
                each = logp.gather(-1, ids[1:, None])[len(prompt) - 1 :]
                sums.setdefault(path, []).append((each.sum(), len(each)))
    policy, ref = (torch.stack([total for total, _ in sums[path]]) for path in (model, other_model))
    lengths = torch.tensor([float(count) for _, count in sums[model]])
    expected = eager_rdpo(policy, ref, lengths.double(), 0.3, 0.2).item()
    assert record["loss"] == pytest.approx(expected, abs=1e-5)
    assert main(command) == 0 and "nothing to do" in capsys.readouterr().out
    assert main([*command[:3], "--help"]) == 0
    assert "Margin that a chosen answer gets for free" in " ".join(capsys.readouterr().out.split())
    assert main([*command[:2], "--help"]) == 0
    assert re.search("  rdpo +R-DPO: direct preference optimisation", capsys.readouterr().out)


def test_the_method_serves_in_iterative_rounds(files: Path):
    recipe = IterateRecipe()
    recipe.iteration.method, recipe.iteration.method_settings = "rdpo", ["length_alpha=0.5"]
    with pytest.raises(BadInput, match="method = 'rdpo' is none of dpo"):
        round_recipe(recipe, "model", files, 2)
    run_file(str(files / "rdpo_method.py"), "test")
    made: Any = round_recipe(recipe, "model", files, 2)
    assert made.loss.length_alpha == 0.5 and type(made) is RECIPES["rdpo"]


def test_a_run_does_not_go_on_under_another_version_of_its_method(files: Path, model, pairs, capsys):
    place = files / "rdpo_method.py"
    settings = dict(
        model_name_or_path=model, dataset_name=pairs, output_dir=files / "run", lr_scheduler_type="constant"
    )

    def run(steps: int) -> int:
        forget()  # as a new process
        return main(["--plugin", str(place), "rdpo", *flags(**settings, max_steps=steps)])

    assert run(1) == 0, capsys.readouterr().err
    held = place.read_text()
    place.write_text(f"{held}# another version\n")
    assert run(2) == 2
    assert "files of the method" in capsys.readouterr().err
    place.write_text(held)
    assert run(2) == 0, capsys.readouterr().err


def test_a_plugin_that_cannot_run_is_one_message(tmp_path: Path, capsys):
    assert main(["--plugin", str(tmp_path / "none.py"), "dpo"]) == 2
    assert "--plugin" in capsys.readouterr().err
    (tmp_path / "bad.py").write_text("import torch\n\nraise KeyError('here')\n")
    assert main(["--plugin", str(tmp_path / "bad.py"), "dpo"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "bad.py line 3" in said and "KeyError" in said


def test_a_method_that_does_not_fit_is_refused():
    from dataclasses import field, replace

    class Mine(GentleRecipe):
        """Mine."""

        loss: LossReference = field(default_factory=LossReference)

    class Twice(LossReference):
        """Loss."""

        seed: int = 0

    class Clash(GentleRecipe):
        """Clash."""

        loss: Twice = field(default_factory=Twice)

    assert set(TOOLS) | RECIPES.keys() == COMMANDS.keys()
    for name in ("dpo", "iterate", "direct", *TOOLS):
        with pytest.raises(ValueError, match=f"the name '{name}' of .*Mine is taken"):
            register(replace(DPO, name=name), Mine)
    with pytest.raises(ValueError, match="Clash has the field 'seed' in two sections"):
        register(replace(DPO, name="clash"), Clash)
    with pytest.raises(ValueError, match=r"'mine' has advantages, so .*DpoRecipe must be an OnlineRecipe"):
        register(replace(GRPO, name="mine"), DpoRecipe)
    with pytest.raises(ValueError, match="the loss of 'mine' takes no `num_items`"):
        register(replace(DPO, name="mine", loss=lambda hidden, weight, targets, **head: None), Mine)
    register(replace(DPO, name="mine"), Mine)
    register(replace(DPO, name="mine"), Mine)  # the same again
    assert ALGORITHMS["mine"].loss is DPO.loss and COMMANDS["mine"] is Mine


# -- a preference loss inside the package -----------------------------------------------------------------------------
INSIDE = dict(re.findall(r"```python\n# in ([\w/.]+).*?\n(.*?)```", GUIDE.read_text(), re.DOTALL))
PLACES = {  # file -> the line before which the guide's code is put
    "kernels/align_kernels/losses/dpo.py": "# -- the loss --",
    "align_engine/recipe/sections.py": "\n\nclass SimpoLoss(",
}
CHECKS = """
    import sys
    import torch
    import torch.nn.functional as F
    from align_kernels import dpo_loss
    from align_kernels.backends.cuda import losses as on_cuda
    from align_kernels.losses.registry import LOSSES
    from align_engine.cli import main

    hidden, weight, targets, ref = torch.load(sys.argv[1])
    logp = (hidden @ weight.T).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    z = 0.4 * torch.sub(*((logp * (targets != -100)).sum(1) - ref).chunk(2))
    focal, sigmoid = -((1 - z.sigmoid()) ** 1.5) * z.sigmoid().log(), -z.sigmoid().log()
    for loss_type, expected in (("focal", focal), ("focal,sigmoid", focal + sigmoid)):
        for head in ({}, {"impl": "torch"}, {"impl": "eager"}, {"workspace": 1}):
            options = {"beta": 0.4, "loss_type": loss_type, "focal_gamma": 1.5}
            got = dpo_loss(hidden, weight, targets, ref, **options, **head).loss
            torch.testing.assert_close(got, expected.mean(), rtol=1e-12, atol=0.0)
            grads = (torch.autograd.grad(x, (hidden, weight), retain_graph=True) for x in (got, expected.mean()))
            torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)
    compiled = torch.compile(dpo_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, weight, targets, ref, **options).loss, got)

    def said(**options):
        try:
            dpo_loss(hidden, weight, targets, ref, **options)
        except (TypeError, ValueError) as error:
            return str(error)

    assert said(loss_type="focal", focal_gamma=-1.0) == "focal_gamma must not be negative, got -1.0"
    assert said(focal_gamma=1.0) == "focal_gamma=1.0 is read by loss_type focal, not by sigmoid"
    assert said(loss_type="focal", focal_gamma="x") == "dpo_loss(): focal_gamma must be a number, got 'x'"
    assert said(loss_type="focal", focal_gama=1.0).endswith("did you mean focal_gamma?")
    assert said(loss_type="focal", f_divergence_type="forward_kl") is None

    for loss_type, served in (("sigmoid", True), ("hinge", True), ("focal", False)):  # by the kernels of CUDA
        hyper = LOSSES["dpo"].read({"loss_type": loss_type, "beta": 0.1, "focal_gamma": 2.0, "discopop_tau": 0.05})
        assert on_cuda.serves("dpo", hyper, ["ref_logps"]) == served

    assert main(["dpo", "--loss_type", "focal", *sys.argv[2:]]) == 0
    assert main(["dpo", "--help"]) == 0
"""


def test_a_preference_loss_with_an_option_is_one_file_and_a_field_of_the_recipe(tmp_path: Path, model, pairs):
    """The guide's two pieces, put into a copy of the sources, are all that such a loss needs."""
    root, tree = GUIDE.parents[1], tmp_path / "tree"
    for package in ("align_engine", "kernels"):
        shutil.copytree(root / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    assert INSIDE.keys() == PLACES.keys()
    for file, line in PLACES.items():
        text = (tree / file).read_text()
        assert text.count(line) == 1
        (tree / file).write_text(text.replace(line, f"{INSIDE[file]}\n\n{line}"))
    torch.save(batch(), tmp_path / "batch.pt")
    command = flags(
        model_name_or_path=model, dataset_name=pairs, output_dir=tmp_path / "run", max_steps=1, focal_gamma=0.0
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(str(tree / part) for part in (".", "kernels"))}
    code = [sys.executable, "-c", textwrap.dedent(CHECKS), str(tmp_path / "batch.pt"), *command]
    done = subprocess.run(code, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--focal_gamma" in done.stdout and "How much less sure pairs count with focal." in done.stdout
    assert json.loads((tmp_path / "run" / "run.json").read_text())["identity"]["focal_gamma"] == 0.0
    (record,) = (line for line in metrics.read(tmp_path / "run" / "metrics.jsonl") if "loss" in line)
    assert record["loss"] == pytest.approx(math.log(2), abs=1e-5)  # with gamma = 0 it is sigmoid, at the reference
