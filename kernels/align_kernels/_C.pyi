"""The compiled extension (csrc/cpu). Tensors are addresses, 0 for an absent one; dtype 0 is float32, 1 bfloat16."""

from typing import overload

class Logits:
    def __init__(
        self,
        z: int,
        dtype: int,
        rows: int,
        cols: int,
        stride: int,
        targets: int,
        offset: int,
        vocab: int,
        bias: int,
        scale: float,
        softcap: float,
        temperature: float,
        row_temperature: int,
    ) -> None: ...
    def take(self, index: int, height: int) -> None: ...

@overload
def forward(logits: Logits, state: int, threads: int) -> None: ...
@overload
def forward(logits: Logits, lists: Lists, state: int, threads: int) -> None: ...
def exponentials(
    logits: Logits, state: int, reference: int, out: int, dtype: int, stride: int, threads: int
) -> None: ...
@overload
def backward(
    logits: Logits,
    lists: Lists,
    state: int,
    g_logp: int,
    g_entropy: int,
    limit: float,
    prob_above: float,
    limit_is_residual: bool,
    out: int,
    threads: int,
) -> None: ...
@overload
def backward(
    logits: Logits,
    state: int,
    g_logp: int,
    g_entropy: int,
    limit: float,
    prob_above: float,
    limit_is_residual: bool,
    out: int,
    dtype: int,
    stride: int,
    threads: int,
) -> None: ...

class Lists:
    def __init__(self, rows: int, begins: int, ends: int, columns: int) -> None: ...

def survey(
    logits: Logits,
    state: int,
    rows: int,
    count: int,
    first: int,
    every: int,
    drop_mass: float,
    steps: int,
    levels: int,
    sums: int,
    threads: int,
) -> None: ...
def keep(
    logits: Logits,
    state: int,
    rows: int,
    count: int,
    first: int,
    floors: int,
    begins: int,
    rooms: int,
    found: int,
    columns: int,
    z: int,
    threads: int,
) -> None: ...
def pull(
    lists: Lists,
    values: int,
    w: int,
    dtype: int,
    stride: int,
    width: int,
    first: int,
    count: int,
    out: int,
    threads: int,
) -> None: ...
def push(
    lists: Lists,
    values: int,
    x: int,
    dtype: int,
    stride: int,
    width: int,
    columns: int,
    out: int,
    add: bool,
    threads: int,
) -> None: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def available_isas() -> list[str]: ...
def product(
    a: int,
    a_dtype: int,
    a_strides: tuple[int, ...],
    b: int,
    b_dtype: int,
    b_strides: tuple[int, ...],
    c: int,
    stride: int,
    m: int,
    n: int,
    k: int,
    add: bool,
    threads: int,
) -> None: ...
def product_advised(dtype: int) -> bool: ...
def narrow_gemm() -> str: ...
def set_narrow_gemm(name: str) -> None: ...
def available_narrow_gemms() -> list[str]: ...
