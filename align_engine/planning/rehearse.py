"""A run's phases on tensors without numbers: the engine's own code, its model made from the configuration alone.

What is counted is what torch would allocate: weights and their copies, what autograd saves, what a layer or the
optimiser needs for a moment, the workspace that the fused head's plan names. Nothing here knows an architecture.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

from align_engine.algorithms import ALGORITHMS
from align_engine.data.batches import TOKEN_COLUMNS, Batch
from align_engine.data.windows import Micro
from align_engine.errors import BadInput
from align_engine.integrations import hook
from align_engine.models import blank, score_head
from align_engine.models.logps import reference_logps, token_logps
from align_engine.planning.cards import Card
from align_engine.planning.heap import Heap
from align_engine.planning.ledger import HOST, Ledger, Phase
from align_engine.planning.sampling import Sampling
from align_engine.recipe import ModelSection, Recipe, RolloutSection
from align_engine.rollouts import rewards
from align_engine.training import optimiser, packing, shards
from align_engine.training import reference as references
from align_engine.training.engine import Engine
from align_engine.training.metrics import Sums
from align_engine.training.offload import LEAST, Away
from align_engine.training.policy import make_policy
from align_kernels.rehearsal import Rehearsal
from align_kernels.schedules.request import Plan

PAD = 0
SCORED = 32  # completions of one forward pass of a reward model


class Lengths(NamedTuple):
    """Tokens of a row. All rows are as long: the longest that the recipe lets through."""

    prompt: int
    completion: int


def lengths(recipe: Recipe, prompt: int | None = None) -> Lengths:
    """Of a recipe's longest rows.

    Args:
        prompt: tokens of a prompt. Default None: max_prompt_length, else half of max_length (online: all of it).
    Raises:
        BadInput: the recipe has no limit, or this prompt leaves no room.
    """
    data, rollout = recipe.data, recipe.section(RolloutSection)
    most = data.max_length
    if rollout is not None:
        if (taken := prompt or data.max_prompt_length or most) is None:
            raise BadInput("max_length = None: a plan needs the longest prompt: give max_prompt_length or max_length")
        return Lengths(taken, rollout.max_completion_length)
    if most is None:
        raise BadInput("max_length = None: a plan needs the longest sequence: give max_length")
    taken = prompt or data.max_prompt_length or most // 2
    if taken >= most:
        raise BadInput(f"prompt_length = {taken} leaves no room for a completion: it must be below max_length = {most}")
    return Lengths(taken, most - taken)


@dataclass(frozen=True)
class Rehearsed:
    """What a run takes."""

    phases: tuple[Phase, ...]
    parameters: int  # of the policy, its adapters included
    trained: int
    dtypes: dict[str, int]  # parameters by type
    packed: bool
    why_not_packed: str
    rows: int  # of one forward pass
    read: int  # tokens of one forward pass: with padding, or packed
    learnt: int  # targets of one forward pass
    plans: tuple[Plan, ...]  # of the fused head in training
    checkpoint: int  # bytes on disk of one checkpoint
    flops: int  # of one forward and backward pass

    @property
    def peak(self) -> Phase:
        """The phase that takes the most."""
        return max(self.phases, key=lambda phase: phase.peak)

    @property
    def step(self) -> Phase:
        """The training step, once the optimiser has its states."""
        return self.phases[-1]


def rehearse(name: str, recipe: Recipe, card: Card, each: Lengths, rollout: RolloutSection | None = None) -> Rehearsed:
    """Go through the phases of the algorithm `name` as the recipe says, every row as long as `each`.

    Args:
        rollout: how the rows are sampled before the training, of a method that does not sample in it. Default None:
            they are there.
    Raises:
        BadInput: no configuration, or one that no model can be built from.
    """
    ledger = Ledger(None if card.gpu else Heap())
    took = lambda tensor: ledger.name([tensor], "head")  # noqa: E731
    rehearsal = Rehearsal("cuda", took, card.size) if card.gpu else Rehearsal("cpu", took)
    with FakeTensorMode(allow_non_fake_inputs=True), ledger, blank.blank(), rehearsal.acting():
        return _Stage(name, recipe, card, each, rollout, ledger, rehearsal).play()


class _Stage:
    """One rehearsal."""

    def __init__(
        self, name: str, recipe: Recipe, card: Card, each: Lengths, rollout: RolloutSection | None, ledger: Ledger,
        rehearsal: Rehearsal,
    ) -> None:  # fmt: skip
        self.recipe, self.card, self.each, self.ledger, self.rehearsal = recipe, card, each, ledger, rehearsal
        self.algorithm, self.kept = ALGORITHMS[name], list[Any]()
        self.online = recipe.section(RolloutSection) is not None
        self.rollout = recipe.section(RolloutSection) or rollout
        model, _ = make_policy(recipe, self.algorithm, PAD)
        ledger.name(itertools.chain(model.parameters(), model.buffers()), "weights")
        self.model = model.train()
        alone: Any = _Alone(recipe, card)
        self.engine: Any = Engine(self.model, self.algorithm, self._for_engine(), 2, alone, sum(each))
        if recipe.train.activation_offloading:
            self.engine.offload = _Away(ledger, self.model)
        self.why_not_packed = "packing = 'off'"
        if recipe.train.packing != "off":
            self.why_not_packed = packing.why_not_here(self.engine) or ""
            if recipe.train.packing == "on" and self.why_not_packed:
                raise BadInput(f"packing = 'on': {self.why_not_packed}; set it to 'off'")

    def play(self) -> Rehearsed:
        ledger = self.ledger
        with ledger.phase("weights"):
            pass
        refers = self.algorithm.refers(self.recipe)
        if refers:
            self._attach(references.of(self.recipe)[0])
        scorers = self._scorers()
        window = [self._micro() for _ in range(min(self.recipe.train.gradient_accumulation_steps, 2))]
        if self.rollout is not None and not self.online:
            self._sample(scorers)
        self._make_states()
        if not self.card.gpu:
            self._save()
        if self.online:
            self._sample(scorers)
            if self._measured():
                self._measure()
        before = len(self.rehearsal.plans)
        with ledger.phase("training step"):
            self._learn(window)
        plans = tuple(self.rehearsal.plans[before:])
        return self._said(window, plans)

    # -- phases ----------------------------------------------------------------------------------------------------
    def _learn(self, window: list[Micro]) -> None:
        engine, parameters = self.engine, list(self.model.parameters())
        with _unpadded(len(window[0].batch.targets) == 1):
            units = engine.open(window)
            for i, micro in enumerate(window):
                engine.forward_backward(micro, units, last=i == len(window) - 1)
                self.ledger.name((p.grad for p in parameters if p.grad is not None), "gradients")
        engine._sums = Sums()  # spreads of metrics need numbers
        engine.step()

    def _for_engine(self) -> Recipe:
        """The recipe with an optimiser that needs no numbers: what another holds is measured on a small weight."""
        recipe, self.state_per_weight = copy.deepcopy(self.recipe), 0.0
        recipe.train.activation_offloading = False
        name = recipe.train.optim
        if optimiser.OPTIMISERS.get(name, optimiser.BNB).package is not None:
            with _disable_current_modes():
                device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
                optimiser.check(recipe.train, device, sharded=False)
                self.state_per_weight = optimiser.state_per_weight(recipe.train, device)
            name = "sgd"
        recipe.train.optim = name
        return recipe

    def _make_states(self) -> None:
        """Those of the optimiser, which its first step makes."""
        optimizer = self.engine.optimizer
        if self.state_per_weight:
            trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            self.kept.append(held := torch.empty(int(trained * self.state_per_weight), dtype=torch.uint8))
            self.ledger.name([held], "optimiser")
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()
        optimizer.zero_grad()
        states = (x for one in optimizer.state.values() for x in one.values())
        self.ledger.name((x for x in states if isinstance(x, Tensor)), "optimiser")

    def _save(self) -> None:
        """A checkpoint: on a CPU, what is being written lies beside the rest."""
        sizes: dict[str, int] = {}
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                sizes |= {name: p.nbytes, f"{name}'s state": int(self.state_per_weight * p.numel())}
                held = self.engine.optimizer.state.get(p, {})
                sizes |= {f"{name}.{key}": x.nbytes for key, x in held.items() if isinstance(x, Tensor)}
        together = Counter[int]()
        for name, place in shards.files(sizes).items():
            together[place] += sizes[name]
        with self.ledger.phase("checkpoint"):
            written = torch.empty(shards.COPIES * max(together.values()), dtype=torch.uint8)
            self.ledger.name([written], "written")

    def _attach(self, kind: str) -> None:
        """The reference, as `reference.attach` has it; a pass over the rows before the first step is a phase."""
        engine = self.engine
        if kind in ("adapter-off", "adapter-copy", "none") or (kind == "ema" and self.recipe.model.use_peft):
            engine.reference = references.KINDS["adapter-copy" if kind == "ema" else kind](engine).live
            return
        own = references.fields_of(self.recipe).ref_model_name_or_path
        model = self.model
        if kind != "precomputed" or own:
            model = engine.accelerator.prepare_model(references.loaded(engine)).eval()
            if kind == "cpu-offload" and self.card.gpu:  # the head stays, and a matrix at a time comes over
                self.ledger.name(hook.head_module(model).parameters(), "reference")
                self.ledger.name(itertools.chain(model.parameters(), model.buffers()), HOST)
                self.kept.append(over := torch.empty_like(max(model.parameters(), key=Tensor.numel)))
                self.ledger.name([over], "reference")
            self.ledger.name(itertools.chain(model.parameters(), model.buffers()), "reference")
            self.kept.append(model)
        if kind == "precomputed":
            with self.ledger.phase("reference"), self._evaluating():
                batch = self._micro().batch
                for part in (batch, batch.other):
                    if part is not None:
                        reference_logps(model, part, engine.head_options)
        else:
            engine.reference = references.asking(engine, model)

    def _scorers(self) -> list[Any]:
        found = []
        for spec in filter(rewards.is_model, self.rollout.reward_funcs if self.rollout else ()):
            section = ModelSection(dtype="auto", trust_remote_code=self.recipe.model.trust_remote_code)
            model: Any = score_head.load_scalar_model(spec, section, PAD).eval().requires_grad_(False)
            self.ledger.name(itertools.chain(model.parameters(), model.buffers()), "scorers")
            found.append(model)
        return found

    def _sample(self, scorers: list[Any]) -> None:
        """Completions, then what reward models say of them."""
        assert self.rollout is not None
        if not self.rollout.server_base_url:
            self._generate(self.rollout.per_device_generation_batch_size)
        for scorer in scorers:
            with self.ledger.phase("scores"), torch.no_grad():
                ids = torch.zeros(SCORED, sum(self.each), dtype=torch.int64)
                score_head.scores(scorer, ids, torch.ones_like(ids))

    def _generate(self, rows: int) -> None:
        assert self.rollout is not None
        evaluates = self.online and bool(self.recipe.data.eval_dataset_name or self.recipe.data.dataset_test_split)
        if self.online and not evaluates:
            rows = min(rows, self._rows_of_a_rollout())
        prompts = rows if evaluates else -(-rows // self.rollout.num_generations)  # evaluation asks each prompt once
        with self._evaluating(), torch.no_grad(), _unpadded(rows == 1), self.engine.accelerator.autocast():
            Sampling(self.model, self.rollout, self.ledger).play(rows, prompts, *self.each)

    def _measure(self) -> None:
        """Log-probs of the rollout before its first step."""
        with self.ledger.phase("measure"), self._evaluating():
            batch = self._micro().batch
            token_logps(self.model, batch, self.engine.head_options, self.engine.critic)
            if self.engine.reference is not None:
                self.engine.reference(batch)
        self.engine.reference = None  # rows carry its log-probs from here on

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.model.eval()
        yield
        self.model.train()

    # -- rows ------------------------------------------------------------------------------------------------------
    def _rows_of_a_rollout(self) -> int:
        train = self.recipe.train
        steps = (self.rollout and self.rollout.steps_per_generation) or train.gradient_accumulation_steps
        return train.per_device_train_batch_size * steps

    def _rows_of_a_pass(self) -> int:
        train, most = self.recipe.train, self.recipe.train.tokens_per_batch
        if most is None or self.why_not_packed:
            return train.per_device_train_batch_size
        many = train.per_device_train_batch_size * train.gradient_accumulation_steps
        sizes = (self._collated(rows).input_ids.numel() for rows in range(1, many + 1))
        return max(sum(1 for _ in itertools.takewhile(lambda size: size <= most, sizes)), 1)

    def _micro(self) -> Micro:
        batch = self._collated(self._rows_of_a_pass())
        for part in (batch, batch.other):
            if part is not None:
                self.rehearsal.knows(part.targets)
        return Micro(batch, True)

    def _collated(self, rows: int) -> Batch:
        """Real ids: how trees lie depends on them."""
        with _disable_current_modes():
            made = [self._row(i) for i in range(rows)]
            return self.algorithm.collate(made, pad_id=PAD if self.why_not_packed else None)

    def _row(self, number: int) -> dict[str, Any]:
        prompt, completion = self.each
        group = self.rollout.num_generations if self.rollout and self.online else 1
        answer = [1] * completion
        row: dict[str, Any] = {"index": number, "prompt_ids": [2 + number // group] * prompt, "label": number % 2 == 0}
        row |= dict.fromkeys(("completion_ids", "kl_completion_ids", "chosen_ids", "rejected_ids"), answer)
        if self.algorithm.refers(self.recipe) and not self.online and self.engine.reference is None:
            row |= dict.fromkeys(("ref_chosen_logps", "ref_rejected_logps", "ref_logps", "ref_KL_logps"), 0.0)
        if self.online:
            row |= {name: torch.zeros(completion) for name in self._columns()}
        return row

    def _measured(self) -> bool:
        """Whether a rollout is read again before its first step: `Rollouts.measure`."""
        assert self.rollout is not None
        recipe: Any = self.recipe
        accumulation = recipe.train.gradient_accumulation_steps
        windows = (self.rollout.steps_per_generation or accumulation) // accumulation
        return windows * recipe.passes > 1 or self.algorithm.refers(recipe) or not self.algorithm.present_policy

    def _columns(self) -> list[str]:
        """Of a rollout's rows: `Rollouts.measure` and `Rollouts.collect` fill them."""
        assert self.rollout is not None
        recipe: Any = self.recipe
        absent = {"ref_logps"} if not self.algorithm.refers(recipe) else set[str]()
        absent |= {"old_logps"} if not self._measured() else set()
        absent |= {"values", "returns"} if self.engine.critic is None else set()
        return [name for name in TOKEN_COLUMNS if name not in absent]

    # -- what is said ----------------------------------------------------------------------------------------------
    def _said(self, window: list[Micro], plans: tuple[Plan, ...]) -> Rehearsed:
        model, batch = self.model, window[0].batch
        trained = [p for p in model.parameters() if p.requires_grad]
        dtypes: dict[str, int] = {}
        for p in model.parameters():
            kind = str(p.dtype).removeprefix("torch.")
            dtypes[kind] = dtypes.get(kind, 0) + p.numel()
        states = self.engine.optimizer.state.values()
        disk = sum(p.numel() * (p.element_size() + int(self.state_per_weight)) for p in trained)
        disk += sum(x.numel() * x.element_size() for one in states for x in one.values() if isinstance(x, Tensor))
        phases = self.ledger.settle()
        parts = [part for part in (batch, batch.other) if part is not None]
        flops = phases[-1].flops // len(window) + sum(p.gemm_flops for p in plans) // len(window)
        with _disable_current_modes():
            learnt = batch.num_tokens
        return Rehearsed(
            tuple(phases), sum(p.numel() for p in model.parameters()), sum(p.numel() for p in trained), dtypes,
            not self.why_not_packed, self.why_not_packed, len(batch.index), sum(x.input_ids.numel() for x in parts),
            learnt, plans, disk, flops,
        )  # fmt: skip


@contextlib.contextmanager
def _unpadded(holds: bool) -> Iterator[None]:
    """Inside the block, if it holds, no row has padding and transformers makes no mask; else it does, as it cannot see
    whether a fake mask is needed."""
    from transformers import masking_utils

    module: Any = masking_utils
    before = module.is_tracing
    if holds:
        module.is_tracing = lambda *_: False
    try:
        yield
    finally:
        module.is_tracing = before


class _Away:
    """`training.offload.Offload` of a GPU: what is saved lies on the host until it is asked for."""

    def __init__(self, ledger: Ledger, model: nn.Module) -> None:
        self.ledger, self.weights = ledger, {id(p.untyped_storage()) for p in model.parameters()}
        self.hooks = contextlib.ExitStack()

    def __enter__(self) -> None:
        self.hooks.enter_context(saved_tensors_hooks(self.pack, self.unpack))

    def __exit__(self, *error: Any) -> None:
        self.hooks.close()

    def apart(self) -> contextlib.AbstractContextManager[Any]:
        return saved_tensors_hooks(lambda saved: saved, lambda saved: saved)

    def pack(self, saved: Tensor) -> Tensor | Away:
        storage = id(saved.untyped_storage())
        if saved.nbytes < LEAST or storage in self.weights:
            return saved
        copy = torch.empty_like(saved)
        self.ledger.name([copy], HOST)
        return Away(copy)

    def unpack(self, packed: Tensor | Away) -> Tensor:
        return torch.empty_like(packed.copy) if isinstance(packed, Away) else packed


class _Alone:
    """What the engine asks of accelerate, on one device and without numbers."""

    num_processes, process_index, is_main_process, is_fsdp2 = 1, 0, True, False

    def __init__(self, recipe: Recipe, card: Card) -> None:
        self.device = torch.device("cpu")
        bf16 = card.gpu if recipe.train.bf16 is None else recipe.train.bf16
        self.mixed_precision = "bf16" if bf16 else "no"

    def prepare(self, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        return self.prepare_model(model), optimizer

    def prepare_model(self, model: Any, **_: Any) -> Any:
        """As accelerate wraps a forward in autocast."""
        if self.mixed_precision == "bf16":
            model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
        return model

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.mixed_precision == "bf16")

    def no_sync(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: Any, limit: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, limit)

    def reduce(self, tensor: Tensor, reduction: str = "sum") -> Tensor:
        return tensor

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        return model

    def register_save_state_pre_hook(self, hook: Any) -> None:
        pass

    def print(self, *said: Any) -> None:
        pass
