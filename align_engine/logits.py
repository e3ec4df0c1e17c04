"""What a model does between its LM head and its `.logits`, read from the source of its `forward`.

No table of architectures and no trial run: the statements that touch the head's output are followed through the syntax
tree of each `forward` from the head up to the model, with the values that this model's config has for them.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

UNKNOWN = object()  # a value that the source does not tell
SAME = {"float", "contiguous", "to", "type", "clone"}  # methods that leave the numbers as they are


class Step(NamedTuple):
    """One thing done to the logits: "*", "/" or "tanh"; anything else says what of the source is not understood."""

    what: str
    value: Any = None


class Logits(NamedTuple):
    """How a model makes its `.logits` of hidden states."""

    path: str  # "hook": linear_logprobs can stand in; "logits": only the logits themselves serve; "none": neither
    why: str  # where path is not "hook"
    transform: dict[str, float]  # `logit_scale` and `softcap` of linear_logprobs, where path is "hook"


def read_logits(model: Any) -> Logits:
    """Inspect a bare causal LM of transformers. Nothing is run."""
    name, head = type(model).__name__, model.get_output_embeddings()
    if head is None or isinstance(head, nn.ModuleList | list | tuple):
        return Logits("none", f"{name} has {'no output embedding' if head is None else f'{len(head)} heads'}", {})
    path = next((path for path, module in model.named_modules() if module is head), None)
    if path is None:
        return Logits("logits", f"{name} does not hold its output embedding as a module", {})
    *parents, child = path.split(".")
    steps: list[Step] = []
    while True:
        steps += Reader(functools.reduce(getattr, parents, model), child).steps()
        if not parents:
            break
        child = parents.pop()
    return _meaning(name, steps)


def _meaning(name: str, steps: list[Step]) -> Logits:
    scale, cap = 1.0, None
    while steps:
        (what, value), *steps = steps
        if cap is None and what == "/" and steps[:2] == [Step("tanh"), Step("*", value)]:
            cap, steps = float(value), steps[2:]
        elif cap is None and what in ("*", "/"):
            scale = scale * value if what == "*" else scale / value
        else:
            return Logits("logits", f"{name}: {what if value is None else f'`{what} {value}` after a softcap'}", {})
    found = {"logit_scale": (float(scale), 1.0), "softcap": (cap, None)}
    return Logits("hook", "", {key: value for key, (value, neutral) in found.items() if value != neutral})


def _unknown(node: ast.AST) -> Step:
    return Step(f"`{ast.unparse(node).splitlines()[0]}` is not understood")


@functools.cache
def _source(forward: Any) -> ast.FunctionDef | None:
    file = inspect.getsourcefile(forward)
    if file is None or not Path(file).is_file():
        return None
    function = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
    assert isinstance(function, ast.FunctionDef)
    return function


class Reader:
    """Follows what the submodule `child` returns through the `forward` of its parent."""

    def __init__(self, parent: Any, child: str) -> None:
        self.parent, self.child = parent, child
        self.known: dict[str, Any] = {"self": parent, "labels": None}  # labels are never passed
        self.tracked: dict[str, list[Step]] = {}
        self.returned: list[tuple[bool, list[Step]]] = []

    def steps(self) -> list[Step]:
        name = f"{type(self.parent).__name__}.forward"
        if isinstance(self.parent, nn.Sequential) and self.child == str(len(self.parent) - 1):
            return []
        forward = inspect.unwrap(self.parent.forward)
        function = _source(getattr(forward, "__func__", forward))
        if function is None:
            return [Step(f"the source of {name} is not at hand")]
        self.walk(function.body)
        named = [steps for as_logits, steps in self.returned if as_logits]
        found = named or [steps for _, steps in self.returned]
        if not found or any(steps != found[0] for steps in found):
            return [Step(f"{name} does not show what becomes of its {self.child}")]
        return found[0]

    def walk(self, body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.If):
                self.branch(node)
            elif isinstance(node, ast.With):
                self.walk(node.body)
            elif isinstance(node, ast.For | ast.While):
                self.perhaps(node.body, node)
            elif isinstance(node, ast.Return) and node.value is not None:
                self.leave(node.value)
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    self.assign(target, node.value, node)
            elif isinstance(node, ast.AnnAssign | ast.AugAssign) and node.value is not None:
                self.assign(node.target, node.value, node)

    def branch(self, node: ast.If) -> None:
        test = self.value(node.test)
        if test is UNKNOWN:
            self.perhaps(node.body, node)
            self.perhaps(node.orelse, node)
        else:
            self.walk(node.body if test else node.orelse)

    def perhaps(self, body: list[ast.stmt], node: ast.stmt) -> None:
        """A body that may or may not run: what was known before and changes in it is not understood."""
        before = dict(self.tracked)
        self.walk(body)
        for name, steps in before.items():
            if self.tracked.get(name) != steps:
                self.tracked[name] = [_unknown(node)]

    def assign(self, target: ast.expr, value: ast.expr, node: ast.stmt) -> None:
        steps = self.follow(value)
        if isinstance(target, ast.Name) and isinstance(node, ast.Assign | ast.AnnAssign):
            self.tracked.pop(target.id, None)
            self.known[target.id] = UNKNOWN if steps is not None else self.value(value)
            if steps is not None:
                self.tracked[target.id] = steps
            return
        base = target.value if isinstance(target, ast.Subscript) else target
        if isinstance(base, ast.Name) and (base.id in self.tracked or steps is not None):
            self.tracked[base.id] = [_unknown(node)]  # changed in place

    def leave(self, node: ast.expr) -> None:
        keywords = {k.arg: k.value for k in node.keywords} if isinstance(node, ast.Call) else {}
        as_tuple = isinstance(node, ast.Tuple) or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add))
        if as_tuple or (steps := self.follow(keywords.get("logits", node))) is None:
            return
        self.returned.append(("logits" in keywords, steps))

    def is_child(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Attribute) and ast.unparse(node) == f"self.{self.child}"

    def follow(self, node: ast.expr) -> list[Step] | None:
        """What was done to the child's output to give this value; None where it is not made of it."""
        if isinstance(node, ast.Name):
            return self.tracked.get(node.id)
        if isinstance(node, ast.Call) and self.is_child(node.func):
            return []
        parts = [part for part in ast.walk(node) if part is not node and isinstance(part, ast.Name | ast.Call)]
        if not any(self.follow(part) is not None for part in parts):
            return None
        steps = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in SAME:
                return self.follow(node.func.value)
            if node.func.attr == "tanh" and len(node.args) == 1 and not node.keywords:
                steps, step = self.follow(node.args[0]), Step("tanh")
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult | ast.Div):
            factor = self.value(node.right)
            if isinstance(factor, int | float):
                steps, step = self.follow(node.left), Step("*" if isinstance(node.op, ast.Mult) else "/", factor)
        return [_unknown(node)] if steps is None else [*steps, step]

    def value(self, node: ast.expr) -> Any:
        """The value of an expression of constants, locals and this model's attributes, or UNKNOWN."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self.known.get(node.id, UNKNOWN)
        if isinstance(node, ast.NamedExpr):
            self.known[node.target.id] = self.value(node.value)
            return self.known[node.target.id]
        if isinstance(node, ast.Attribute):
            owner = self.value(node.value)
            return UNKNOWN if owner is UNKNOWN or node.attr == "training" else getattr(owner, node.attr, UNKNOWN)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get_text_config":
            config = self.value(node.func.value)
            return UNKNOWN if config is UNKNOWN else config.get_text_config()
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Is | ast.IsNot):
            left, right = self.value(node.left), self.value(node.comparators[0])
            return UNKNOWN if UNKNOWN in (left, right) else (left is right) == isinstance(node.ops[0], ast.Is)
        if isinstance(node, ast.BoolOp):
            values = [self.value(part) for part in node.values]
            decisive = isinstance(node.op, ast.Or)
            if any(value is not UNKNOWN and bool(value) == decisive for value in values):
                return decisive
            return UNKNOWN if UNKNOWN in values else not decisive
        return UNKNOWN
