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


def innermost(forward: Any) -> Any:
    """The function below wrappers that say what they wrap, and below what `fuse` put in its place."""
    while True:
        forward = inspect.unwrap(forward)
        function = getattr(forward, "__func__", forward)
        forward = getattr(function, "replaced", None)
        if forward is None:
            return function


@functools.cache
def _source(function: Any) -> ast.FunctionDef | None:
    """None for what is no `def` in a file: a lambda, a partial, an object."""
    if not inspect.isfunction(function) or not Path(inspect.getsourcefile(function) or "").is_file():
        return None
    try:
        (found, *_) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, SyntaxError):
        return None
    return found if isinstance(found, ast.FunctionDef) else None


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
        function = _source(innermost(self.parent.forward))
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
            match node:
                case ast.With():
                    self.walk(node.body)
                case ast.If() if (test := self.value(node.test)) is not UNKNOWN:
                    self.walk(node.body if test else node.orelse)
                case ast.If() | ast.For() | ast.While():
                    for part in (node.body, node.orelse):  # it may run or not: what it changes is not understood
                        before = dict(self.tracked)
                        self.walk(part)
                        changed = [name for name, steps in before.items() if self.tracked.get(name) != steps]
                        self.tracked |= {name: [_unknown(node)] for name in changed}
                case ast.Return(value=ast.expr() as value):
                    self.leave(value)
                case ast.Assign(targets=targets, value=value):
                    for target in targets:
                        self.assign(target, value, node)
                case ast.AnnAssign(value=ast.expr() as value) | ast.AugAssign(value=value):
                    self.assign(node.target, value, node)

    def assign(self, target: ast.expr, value: ast.expr, node: ast.stmt) -> None:
        steps, found = self.follow(value), self.value(value)
        if isinstance(target, ast.Name) and not isinstance(node, ast.AugAssign):
            self.tracked.pop(target.id, None)
            self.known.pop(target.id, None)
            if steps is not None:
                self.tracked[target.id] = steps
            elif found is not UNKNOWN:
                self.known[target.id] = found
            return
        base = target.value if isinstance(target, ast.Subscript) else target
        if isinstance(base, ast.Name) and (base.id in self.tracked or steps is not None):
            self.tracked[base.id] = [_unknown(node)]  # changed in place

    def leave(self, node: ast.expr) -> None:
        keywords = {k.arg: k.value for k in node.keywords} if isinstance(node, ast.Call) else {}
        as_tuple = isinstance(node, ast.Tuple) or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add))
        if not as_tuple and (steps := self.follow(keywords.get("logits", node))) is not None:
            self.returned.append(("logits" in keywords, steps))

    def follow(self, node: ast.expr) -> list[Step] | None:
        """What was done to the child's output to give this value; None where it is not made of it."""
        if isinstance(node, ast.Name):
            return self.tracked.get(node.id)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == f"self.{self.child}":
            return []
        parts = [part for part in ast.walk(node) if part is not node and isinstance(part, ast.Name | ast.Call)]
        if not any(self.follow(part) is not None for part in parts):
            return None
        steps, step = None, None
        match node:
            case ast.Call(func=ast.Attribute(attr=name, value=owner)) if name in SAME:
                return self.follow(owner)
            case ast.Call(func=ast.Attribute(attr="tanh"), args=[argument], keywords=[]):
                steps, step = self.follow(argument), Step("tanh")
            case ast.BinOp(op=ast.Mult() | ast.Div()) if isinstance(factor := self.value(node.right), int | float):
                steps, step = self.follow(node.left), Step("*" if isinstance(node.op, ast.Mult) else "/", factor)
        return [_unknown(node)] if steps is None or step is None else [*steps, step]

    def value(self, node: ast.expr) -> Any:
        """The value of an expression of constants, known locals and this model's attributes, or UNKNOWN."""
        called = {ast.unparse(part.func) for part in ast.walk(node) if isinstance(part, ast.Call)}
        if "self.training" in ast.unparse(node) or any(not name.endswith(".get_text_config") for name in called):
            return UNKNOWN  # it changes, or something would run
        try:
            return eval(compile(ast.Expression(node), "<forward>", "eval"), {"__builtins__": {}}, self.known)
        except Exception:  # a name that the source does not tell
            return UNKNOWN
