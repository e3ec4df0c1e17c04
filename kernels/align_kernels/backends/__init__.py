"""Backends: modules with primitives on a tile of logits, and a predicate `why_not`.

All work on a tile of raw logits z [n, c], the columns `offset .. offset + c` of a vocabulary of `vocab` columns, and
apply the head's transform themselves: l = softcap(scale * (z + bias)) / temperature. `state` [n, 8] holds what has been
seen of each row's softmax so far (state.py). A backend knows no schedule, and imports no other backend.

A new backend is a module with everything that `Backend` names, and a line of `dispatch.BACKENDS`; from outside of the
package, `align_kernels.register_backend`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, Unpack

import torch
from torch import Tensor

from align_kernels.backends.arguments import Clamp, Linear, Lists, Transform


class Backend(Protocol):
    """What a backend has. Powers that not every one has are None where they are absent."""

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None where logits of this device and dtype are served, else the reason in one sentence."""
        ...

    def forward(
        self,
        z: Tensor,  # (n, c)
        state: Tensor,  # (n, 8) float64, updated in place
        targets: Tensor,  # (n,) int64
        **transform: Unpack[Transform],
    ) -> None:
        """Fold one tile of logits into the running state of its rows."""
        ...

    def backward(
        self,
        z: Tensor,  # (n, c)
        state: Tensor,  # (m, 8) float64, finished over the whole vocabulary
        targets: Tensor,  # (m,) int64
        g_logp: Tensor,  # (m,) float32
        g_entropy: Tensor | None,  # (m,) float32
        *,
        clamp: Clamp | None,
        out: Tensor,  # (m, c), may be z where all its rows are taken
        rows: Tensor | None = None,  # (m,) int64: the rows of z that are taken; None: all n
        **transform: Unpack[Transform],  # of the m rows
    ) -> None:
        """Write dL/dz of some rows of a tile: g (1[v = y] - p), clamped where asked, minus g_H p (l - lse + H)."""
        ...

    @property
    def exponentials(self) -> Exponentials | None: ...

    @property
    def peaks(self) -> Peaks | None: ...

    @property
    def survey(self) -> Survey | None: ...

    @property
    def lists(self) -> ListsOfColumns | None: ...

    @property
    def on_chip(self) -> OnChip | None: ...

    @property
    def products(self) -> Products | None: ...

    @property
    def losses(self) -> Losses | None: ...

    @property
    def multiply(self) -> Multiply | None: ...

    @property
    def row_sums(self) -> RowSums | None: ...


class Exponentials(Protocol):
    """`forward` without a softcap, which also writes exp(l - reference), 0 at the target."""

    def __call__(
        self,
        z: Tensor,  # (n, c)
        state: Tensor,  # (n, 8) float64, updated in place
        targets: Tensor,  # (n,) int64
        reference: Tensor,  # (n,) float32, updated in place, -inf before the first tile
        *,
        out: Tensor,  # (n, c) in the dtype of the GEMMs, may be z
        **linear: Unpack[Linear],
    ) -> None: ...


class Peaks(Protocol):
    """The largest log-prob of each column over some rows: what blocks of rows choose their columns by."""

    def __call__(
        self,
        z: Tensor,  # (n, c)
        state: Tensor,  # (n, 8) float64, finished over the whole vocabulary
        targets: Tensor,  # (n,) int64
        rows: Tensor,  # (m,) int64, m >= 1 of the n
        *,
        out: Tensor,  # (c,) float32
        **transform: Unpack[Transform],
    ) -> None: ...


class Survey(Protocol):
    """What every so many-th run of columns tells of some rows: by it rows are told apart before any column is chosen.

    A column of level j is kept from p >= drop_mass / 2^(j / steps) on, of the last level never. Of the levels but the
    first and the last a backend may take p for their mean or their middle; nobody asks for the first one's sums.
    """

    def __call__(
        self,
        z: Tensor,  # (n, c)
        state: Tensor,  # (n, 8) float64, finished over the whole vocabulary
        targets: Tensor,  # (n,) int64
        rows: Tensor,  # (m,) int64, of the n
        sums: Tensor,  # (m, levels + 2, 3) float64: number, sum of p and of -p log p by level, added to
        *,
        first: int,  # the tile's first column on this rank, a multiple of RUN
        every: int,
        drop_mass: float,
        steps: int,
        sample: Tensor | None = None,  # (m, S) uint8, written: the level of each column that is looked at
        **transform: Unpack[Transform],
    ) -> None: ...


class ListsOfColumns(Protocol):
    """Rows that keep few columns each, where products over those alone are faster than over blocks of rows."""

    def reads(self, w: Tensor) -> bool:
        """Whether `pull` takes a weight as it lies."""
        ...

    def keep(
        self,
        z: Tensor,  # (n, c)
        state: Tensor,  # (n, 8) float64, finished over the whole vocabulary
        targets: Tensor,  # (n,) int64
        rows: Tensor,  # (m,) int64, of the n
        floors: Tensor,  # (m,) float32
        into: Lists,
        found: Tensor,  # (m,) int64, added to
        *,
        first: int,
        **transform: Unpack[Transform],
    ) -> None:
        """Append a tile's columns whose log-prob reaches the row's floor, and the target, while there is room."""
        ...

    def forward(
        self, lists: Lists, columns: int, state: Tensor, targets: Tensor, **transform: Unpack[Transform]
    ) -> None:
        """`forward` of rows of whose `columns` all but some are -inf."""
        ...

    def backward(
        self,
        lists: Lists,
        columns: int,
        state: Tensor,  # (m, 8) float64, finished over the whole vocabulary
        targets: Tensor,  # (m,) int64
        g_logp: Tensor,  # (m,) float32
        g_entropy: Tensor | None,  # (m,) float32
        *,
        clamp: Clamp | None,
        out: Tensor,  # (K,) float32, may be lists.z
        **transform: Unpack[Transform],
    ) -> None:
        """Write dL/dz of the entries."""
        ...

    def pull(self, out: Tensor, lists: Lists, values: Tensor, w: Tensor, first: int) -> None:
        """out[t] += the sum over t's columns v of their value times w[v - first]."""
        ...

    def push(self, out: Tensor, lists: Lists, values: Tensor, x: Tensor, add: bool) -> None:
        """out[v] (+)= the sum over the rows t that keep column v of their value times x[t]."""
        ...


class OnChip(Protocol):
    """`forward` from hidden states, with no logits written."""

    @property
    def STATISTICS(self) -> float:
        """Bytes that it takes per logit."""
        ...

    def why_not(self, hidden: Tensor, weight: Tensor) -> str | None:
        """None where these tensors are served, else the reason in a few words."""
        ...

    def forward(
        self,
        x: Tensor,  # (n, D)
        weight: Tensor,  # (V, D)
        state: Tensor,  # (n, 8) float64, updated in place
        targets: Tensor,  # (n,) int64
        **transform: Unpack[Transform],
    ) -> None: ...


class Products(Protocol):
    """Matrix products of the backend's own."""

    def serves(self, dtype: torch.dtype, *sizes: int) -> bool:
        """Whether products of this dtype and sizes are served, and faster than torch.mm on this machine."""
        ...

    def reads(self, dtype: torch.dtype) -> bool:
        """Whether `product` takes matrices of this dtype as they lie."""
        ...

    def takes(self, out: Tensor, a: Tensor, b: Tensor) -> bool:
        """Whether these are laid out for `product`, and large enough to be faster."""
        ...

    def product(self, out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
        """out (m, n) (+)= a (m, k) @ b (k, n)."""
        ...


class Multiply(Protocol):
    """A tensor times a number of its device, in place; where that is 1 nothing else is read or written."""

    def __call__(self, x: Tensor, factor: Tensor) -> None: ...


class RowSums(Protocol):
    """Sums whose rows are written when they are first reached, so that nobody clears them before."""

    def add(
        self,
        sums: Tensor,  # (V, D), of which rows that are not reached hold anything
        reached: Tensor,  # (V,) bool, updated in place
        rows: Tensor,  # (K,) int64, none twice
        values: Tensor,  # (K, D) of the dtype of the sums
    ) -> None:
        """Add values to rows that are reached, and write them to the others."""
        ...

    def finish(
        self,
        sums: Tensor,  # (V, D)
        reached: Tensor,  # (V,) bool
        out: Tensor,  # (V, D), may be the sums
    ) -> None:
        """Write the rows that are reached, and zeros for the others, which are not read."""
        ...


class Losses(Protocol):
    """Coefficients of some losses, found on the device."""

    def serves(self, name: str, hyper: Mapping[str, Any], given: Iterable[str]) -> bool:
        """Whether the loss `name` with these options and side tensors is known, and known whole."""
        ...

    def token_loss(
        self,
        name: str,
        hyper: Mapping[str, Any],
        z: Tensor,  # (n, V) raw logits, whole rows
        state: Tensor,  # (n, 8) float64, empty; finished on return
        targets: Tensor,  # (n,) int64
        side: dict[str, Tensor],  # (n,) float32
        factor: Tensor,  # () float64, of the sum over tokens
        *,
        clamp: Clamp | None,
        out: Tensor,  # (n, V), may be z
        shared: int = -1,  # bytes of a row that wait on the chip for its coefficient, < 0: all there are
        **transform: Unpack[Transform],
    ) -> Any:
        """Statistics, coefficient and dL/dz of whole rows: `values` (n,) and `metrics` (4, n)."""
        ...

    def unit_loss(
        self,
        name: str,
        hyper: Mapping[str, Any],
        state: Tensor,  # (n, 8) float64, finished
        place: Tensor,  # (n,) int64: sequence of each row, of a pair the chosen ones first
        units: int,
        side: dict[str, Tensor],  # (sequences,) float32, desirable bool
        factor: Tensor,  # () float64, of the sum over units
    ) -> Any:
        """`values` (units,), `metrics` (., units) and g (n,) of a loss of sequences or pairs."""
        ...
