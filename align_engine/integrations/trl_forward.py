"""What stands in place of a model's forward, and can still call it."""

from __future__ import annotations

import inspect
from typing import Any


class ReplacedForward:
    """The base of both forwards that `fuse` puts into a model.

    Args:
        kind: of the model.
        own: what others put in place of its forward, on the instance; None for nothing.
    """

    def __init__(self, kind: type, own: Any) -> None:
        self.kind, self.own = kind, own

    @property
    def replaced(self) -> Any:
        return self.kind.forward if self.own is None else self.own

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.replaced)
        if self.own is None:
            return signature
        this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return signature.replace(parameters=[this, *signature.parameters.values()])

    def plain(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        return self.kind.forward(model, *args, **kwargs) if self.own is None else self.own(*args, **kwargs)
