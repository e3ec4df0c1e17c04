"""The optimiser of a run, by transformers' names and from its own factory, with torch's Muon beside them."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from align_engine.errors import BadInput
from align_engine.integrations.hook import causal_model
from align_engine.recipe import Recipe, TrainSection

ELSEWHERE = {"params", "lr", "weight_decay", "optim_bits", "is_paged"}  # other settings and the name say these


class Kind(NamedTuple):
    """What a name needs, and where it has been shown to work."""

    package: str | None = None  # that it lies in, besides torch and transformers
    gpu: bool = False  # only there
    shards: bool = False  # of FSDP2 too


BNB, PAGED = Kind("bitsandbytes"), Kind("bitsandbytes", gpu=True)
OPTIMISERS = {
    "adamw_torch": Kind(shards=True),
    "adamw_torch_fused": Kind(shards=True),
    "adafactor": Kind(),
    "sgd": Kind(shards=True),
    "adagrad": Kind(),
    "rmsprop": Kind(shards=True),
    "muon": Kind(shards=True),
    "adamw_torch_8bit": Kind("torchao"),
    "adamw_torch_4bit": Kind("torchao"),
    "adamw_8bit": BNB,
    "adamw_bnb_8bit": BNB,
    "paged_adamw_32bit": PAGED,
    "paged_adamw_8bit": PAGED,
    "ademamix": BNB,
    "ademamix_8bit": BNB,
    "paged_ademamix_32bit": PAGED,
    "paged_ademamix_8bit": PAGED,
    "lion_32bit": BNB,
    "lion_8bit": BNB,
    "paged_lion_32bit": PAGED,
    "paged_lion_8bit": PAGED,
    "rmsprop_bnb": BNB,
    "rmsprop_bnb_8bit": BNB,
    "rmsprop_bnb_32bit": BNB,
}


class MuonAndAdamW(Optimizer):
    """torch's Muon for the groups that are marked `muon`, AdamW for the others, as one optimiser with one state.

    Args:
        groups: dicts of parameters, each with "muon".
        lr, betas, eps, fused: of AdamW; the learning rate of both.
        **muon: keywords of torch.optim.Muon. Its updates have the size of AdamW's where nothing else is said
            (arXiv:2502.16982), so that one learning rate serves both.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, fused: bool,
        **muon: Any,
    ) -> None:  # fmt: skip
        self.parts: dict[bool, Optimizer] = {}
        muon = {"adjust_lr_fn": "match_rms_adamw"} | muon
        if matrices := [group for group in groups if group["muon"]]:
            self.parts[True] = torch.optim.Muon(matrices, lr=lr, **muon)
        if rest := [group for group in groups if not group["muon"]]:
            self.parts[False] = AdamW(rest, lr=lr, betas=betas, eps=eps, fused=fused)
        super().__init__(groups, {})  # the same dicts, which the parts have filled in

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step of each part, on the groups and the state as they stand: a loaded state puts others in place."""
        for marked, part in self.parts.items():
            part.param_groups = [group for group in self.param_groups if group["muon"] == marked]
            part.state = self.state
            part.step()


def make(model: nn.Module, recipe: Recipe, device: torch.device) -> Optimizer:
    """The optimiser that a recipe names, over the trained weights of a model.

    Raises:
        BadInput: as `check`.
    """
    train, groups = recipe.train, parameter_groups(model, recipe)
    kind, options = class_and_options(train)
    if kind is MuonAndAdamW:
        groups = list(_split(groups, _body(model)))
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        options |= {"foreach": False, "fused": False}  # tensor parallelism has cut some: no call takes both kinds
    optimizer = kind(groups, **options)
    if options.get("optim_bits") == 8:
        _embeddings_in_32_bits(optimizer, model)
    return optimizer


def check(train: TrainSection, device: torch.device, sharded: bool) -> None:
    """Refuse an optimiser that cannot run here, by a step of it on a weight made up.

    Args:
        sharded: whether FSDP2 cuts the weights.
    Raises:
        BadInput: no such name, a package that is not installed, a device or shards that it is not for, arguments that
            it does not take.
    """
    name = train.optim
    if (kind := OPTIMISERS.get(name)) is None:
        raise BadInput(f"optim = {name!r} is not served; choose one of {', '.join(OPTIMISERS)}")
    if kind.package and importlib.util.find_spec(kind.package) is None:
        raise BadInput(f"optim = {name!r}: {kind.package} is not installed (pip install {kind.package})")
    if kind.gpu and device.type == "cpu":
        raise BadInput(f"optim = {name!r} pages its state between a GPU and the CPU, and this run is on a CPU")
    if sharded and not kind.shards:
        served = ", ".join(one for one, kind in OPTIMISERS.items() if kind.shards)
        raise BadInput(f"optim = {name!r} does not take FSDP's shards; choose one of {served}")
    state_per_weight(train, device)


def class_and_options(train: TrainSection) -> tuple[Any, dict[str, Any]]:
    """The optimiser's class and its keywords, as transformers' Trainer has them for the name.

    Raises:
        BadInput: optim_args that it does not take.
    """
    from transformers import Trainer
    from transformers.training_args import OptimizerNames

    name = train.optim
    args: Any = SimpleNamespace(
        optim_args=None, **{one: getattr(train, one) for one in ("learning_rate", "adam_beta1", "adam_beta2",
                                                                 "adam_epsilon")}
    )  # fmt: skip
    muon = name == "muon"
    args.optim = OptimizerNames("adamw_torch_fused" if muon else name)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
    kind = MuonAndAdamW if muon else kind
    taken = inspect.signature(torch.optim.Muon if muon else kind).parameters.keys() - ELSEWHERE
    return kind, options | _optim_args(train.optim_args, name, taken)


def schedule(train: TrainSection, optimizer: Any, steps: int) -> Any:
    """The learning rates of so many steps, as transformers makes them.

    Raises:
        BadInput: lr_scheduler_kwargs is not of the form name=value. TypeError, ValueError, KeyError: from transformers.
    """
    from transformers import get_scheduler

    more = keywords(train.lr_scheduler_kwargs, "lr_scheduler_kwargs")
    return get_scheduler(train.lr_scheduler_type, optimizer, warmup(train, steps), steps, more or None)


def warmup(train: TrainSection, steps: int) -> int:
    """Steps in which the learning rate rises, of so many: warmup_steps, where it is below 1 a share as warmup_ratio."""
    if train.warmup_steps >= 1:
        return int(train.warmup_steps)
    return math.ceil(steps * (train.warmup_steps or train.warmup_ratio))


def keywords(text: str | None, field: str) -> dict[str, Any]:
    """`momentum=0.9, nesterov=true` as keywords; values are Python's.

    Raises:
        BadInput: another form, naming the `field` of the recipe.
    """
    try:
        call: Any = ast.parse(f"f({text or ''})", mode="eval").body
        if call.args or any(one.arg is None for one in call.keywords):
            raise ValueError
        return {one.arg: _value(one.value) for one in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise BadInput(f"{field} = {text!r} is not of the form name=value,name=value") from error


def _optim_args(text: str | None, name: str, taken: set[str]) -> dict[str, Any]:
    given = keywords(text, "optim_args")
    if foreign := [one for one in given if one not in taken]:
        raise BadInput(f"optim_args: {name} takes no {foreign[0]!r}, but {', '.join(sorted(taken))}")
    return given


def _value(node: Any) -> Any:
    if isinstance(node, ast.Name):  # true, false, none, or a word
        return {"true": True, "false": False, "none": None}.get(node.id.lower(), node.id)
    return ast.literal_eval(node)


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """The trained weights as an optimiser takes them: matrices with weight decay, vectors without; those of a critic
    apart, with a learning rate of their own."""
    train, critic = recipe.train, getattr(causal_model(model), "value_head", None)
    apart = {id(parameter) for parameter in critic.parameters()} if critic is not None else set()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = []
    for of_critic in (False, True):
        lr = critic.learning_rate if of_critic and critic is not None else train.learning_rate
        mine = [parameter for parameter in trained if (id(parameter) in apart) == of_critic]
        groups += [
            {"params": [p for p in mine if p.dim() >= 2], "weight_decay": train.weight_decay, "lr": lr},
            {"params": [p for p in mine if p.dim() < 2], "weight_decay": 0.0, "lr": lr},
        ]
    return [group for group in groups if group["params"]]


def _body(model: nn.Module) -> set[int]:
    """Ids of the matrices of a model and its adapters that are no embeddings and in no head."""
    causal: Any = causal_model(model)
    heads = [getattr(causal, "score", None), causal.get_output_embeddings(), getattr(causal, "value_head", None)]
    outside = [part for part in model.modules() if isinstance(part, nn.Embedding)]
    outside += [part for part in heads if part is not None]
    apart = {id(parameter) for part in outside for parameter in part.parameters()}
    return {id(p) for p in model.parameters() if p.dim() == 2} - apart


def _split(groups: list[dict[str, Any]], body: set[int]) -> Iterator[dict[str, Any]]:
    """Each group as one for Muon and one for AdamW."""
    for group in groups:
        for muon in (True, False):
            if mine := [parameter for parameter in group["params"] if (id(parameter) in body) == muon]:
                yield {**group, "params": mine, "muon": muon}


def _embeddings_in_32_bits(optimizer: Any, model: nn.Module) -> None:
    """As transformers' Trainer has it, for this optimiser alone: bitsandbytes has one manager for the whole process."""
    manager = optimizer.mng = object.__new__(type(optimizer.mng))
    manager.initialize()
    for part in model.modules():
        if isinstance(part, nn.Embedding):
            manager.register_module_override(part, "weight", {"optim_bits": 32})


def state_per_weight(train: TrainSection, device: torch.device) -> float:
    """Bytes of state for each weight, after one step on a matrix of which an 8-bit optimiser takes 8 bits."""
    weight = nn.Parameter(torch.zeros(128, 128, device=device))
    weight.grad = torch.ones_like(weight)
    kind, options = class_and_options(train)
    muon = {"muon": True} if kind is MuonAndAdamW else {}
    try:
        optimizer = kind([{"params": [weight], "weight_decay": train.weight_decay, **muon}], **options)
        optimizer.step()
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"optim = {train.optim!r} does not run on {device}: {said}") from error
    return (
        sum(_bytes(value) for value in optimizer.state[weight].values() if isinstance(value, Tensor)) / weight.numel()
    )


def _bytes(value: Any) -> int:
    """Of a tensor's storage; of those that torchao's tensors are made of."""
    inner = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else ()
    return sum(_bytes(getattr(value, name)) for name in inner) if inner else value.untyped_storage().nbytes()
