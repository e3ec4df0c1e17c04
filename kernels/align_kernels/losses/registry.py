"""The table of losses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from torch import Tensor

from align_kernels.losses.family import Family, check_taken

Unit = Literal["token", "sequence", "pair", "batch"]
Level = Literal["token", "sum", "sequence", "batch"]
LOSSES: dict[str, Loss] = {}
UNLISTED: dict[str, Loss] = {}  # of drop-ins, which have another face
COARSER: dict[Unit, tuple[Unit, ...]] = {  # the units that a loss of tokens, sequences or pairs may have
    "token": ("token", "sequence", "pair", "batch"),
    "sequence": ("sequence", "batch"),
    "pair": ("pair", "batch"),
}
PAIRED = "pairs"  # beside the side tensors of a loss of pairs: [2, P], which sequences they are, where not halves
WHOLE = ("lengths", "sequence")
NEEDS = (*WHOLE, "entropy", "log_sum_sq_probs")
Function = TypeVar("Function", bound=Callable)


class Loss(NamedTuple):
    """A loss with what a schedule must know of it.

    `fn(logps, **needs, **side, **hyper) -> (values, {metric: values})`, one value per `per`: a token, a sequence or a
    pair. A loss per token reads log-probs of tokens [n]; the others read their sums over sequences [S], of pairs the
    chosen half before the rejected half.
    """

    name: str
    fn: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    per: Unit
    unit: Unit  # the smallest piece of a batch at which its values are closed; a call may ask for a coarser one
    # tensors of the call, each at a level; those that a call leaves out are not passed on
    #     token     one per token [n]
    #     sum       a weight per token: the loss reads the sum of weight * log-prob of each sequence [S]
    #     sequence  one per sequence [S]
    #     batch     as it is
    side: Mapping[str, Level] = {}
    metrics: tuple[str, ...] = ()
    # what is made from the batch
    #     lengths           [S] tokens of each sequence (of a loss per token: where its unit is coarser than a token)
    #     sequence          [n] which of the sequences a token belongs to (likewise)
    #     entropy           at the level of logps; differentiated where the hyper-parameter entropy_coef is not 0
    #     log_sum_sq_probs  at the level of logps, log sum p^2, without gradient
    needs: tuple[str, ...] = ()
    sparse: bool = False  # many tokens may have a derivative of exactly zero
    # what it chooses among: its `**options` are those of the members that its option `by` names
    family: Family | None = None
    by: str = "loss_type"

    @property
    def keywords(self) -> tuple[dict[str, Any], bool]:
        """As `keywords` of its function, with the options of its family."""
        known, rest = keywords(self.fn)
        return (known, rest) if self.family is None else (known | self.family.options, False)

    def read(self, hyper: Mapping[str, Any]) -> dict[str, Any]:
        """The hyper-parameters of a call, without the options of its family that this call does not read."""
        if self.family is None or self.by not in hyper:
            return dict(hyper)
        names = hyper[self.by]
        return self.family.read((names,) if isinstance(names, str) else names, hyper)


def register_loss(
    per: Unit,
    *,
    unit: Unit | None = None,
    side: Mapping[str, Level] | None = None,
    metrics: Sequence[str] = (),
    needs: Sequence[str] = (),
    sparse: bool = False,
    listed: bool = True,
    family: Family | None = None,
    by: str = "loss_type",
) -> Callable[[Function], Function]:
    """Register a pure function of log-probs as the loss of its name, for `fused_loss` and `explain`.

        @register_loss("pair", side={"ref_logps": "sequence"})
        def mine(logps, *, ref_logps, beta):  # logps, ref_logps [2P] float64
            return -F.logsigmoid(beta * torch.sub(*(logps - ref_logps).chunk(2))), {}  # [P]

    Args:
        per: what the function returns one value for, and reads log-probs of: "token" (logps [n]), "sequence" (sums over
            tokens, [S]) or "pair" ([2P], the chosen half before the rejected half).
        unit: the smallest piece of a batch at which its values are closed: "token", "sequence", "pair" or "batch". The
            function is called on runs of whole units, so a loss that looks across a batch says "batch". Default None:
            `per`.
        side: its other tensors, name -> level: "token" (passed as [n]), "sum" (a weight per token; the function reads
            sum(weight * logp) [S]), "sequence" ([S]) or "batch" (as it is). Floats arrive as float64.
        metrics: names of what the function returns beside its values, {name: one value per `per`}, without gradient.
        needs: what is made from the batch and passed by name: "lengths" ([S] kept tokens), "sequence" ([n], of a loss
            per token: which of the sequences), "entropy" (differentiated where the option entropy_coef is not 0) and
            "log_sum_sq_probs".
        sparse: many tokens may have a derivative of exactly zero: their rows skip the backward. Default False.
        listed: False for a loss that is called by a function of this package alone. Default True.
        family: functions of `align_kernels.losses.family` that it chooses among, and whose options its `**options`
            takes. Default None.
        by: the option that names one or several of them. Default "loss_type".

    Returns:
        the decorator; the function's keyword-only arguments beside `side` and `needs` are its options.

    Raises:
        ValueError: a name that another function has (the same one again, as a reloaded module brings it, is taken); an
            unknown word; an argument of `side` or `needs` that the function does not take.
    """
    side = dict(side or {})
    _one_of("per", per, COARSER)
    unit = unit or per
    _one_of("unit", unit, COARSER[per])
    levels = ("token", "batch") if unit == "token" else get_args(Level)  # a piece of tokens has no whole sequences
    if PAIRED in side:
        raise ValueError(f"the side name {PAIRED!r} is taken: it says which sequences are paired")
    for name, level in side.items():
        _one_of(f"the level of {name!r}", level, levels)
    for name in needs:
        _one_of("needs", name, NEEDS)

    def register(fn: Function) -> Function:
        name, place = fn.__name__, f"{fn.__module__}.{fn.__qualname__}"
        taken = LOSSES.get(name) or UNLISTED.get(name)
        check_taken(fn, None if taken is None else taken.fn)
        known, rest = keywords(fn)
        if strange := [one for one in (*side, *needs) if one not in known and not rest]:
            raise ValueError(f"the loss {place} takes no argument {strange[0]!r}, which side or needs names")
        if unit == "token" and (lost := [x for x in needs if x in WHOLE and known.get(x) is inspect.Parameter.empty]):
            raise ValueError(f"the loss {place} needs {lost[0]!r} of whole sequences: say unit='sequence'")
        table = LOSSES if listed else UNLISTED
        table[name] = Loss(name, fn, per, unit, side, tuple(metrics), tuple(needs), sparse, family, by)
        return fn

    return register


def find(name: str) -> Loss:
    """The loss of a name, listed or not."""
    return LOSSES[name] if name in LOSSES else UNLISTED[name]


def keywords(fn: Callable) -> tuple[dict[str, Any], bool]:
    """The arguments of a loss beside its log-probs, name -> default (`inspect.Parameter.empty`: none), and whether it
    takes others too."""
    _, *parameters = inspect.signature(fn).parameters.values()
    rest = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}, rest


def _one_of(what: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"{what} must be one of {', '.join(known)}, got {value!r}")
