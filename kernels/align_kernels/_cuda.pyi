"""The compiled CUDA extension (csrc/cuda). Tensors are addresses, 0 for an absent one; dtype 0 is float32, 1 bfloat16,
2 float16."""

class CudaError(RuntimeError): ...

class Queue:
    def __init__(self, device: int, stream: int) -> None: ...

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

class Out:
    def __init__(
        self, out: int, dtype: int, stride: int, limit: float, prob_above: float, limit_is_residual: bool
    ) -> None: ...

class TokenLoss:
    def __init__(
        self,
        *,
        kind: int,
        epsilon_low: float,
        epsilon_high: float,
        delta: float,
        beta: float,
        entropy_coef: float,
        on_policy: bool,
        kl_by_ratio: bool,
        old_logps: int,
        advantages: int,
        ref_logps: int,
        weights: int,
        scale: int,
        value: int,
        metrics: int,
    ) -> None: ...

class UnitLoss:
    def __init__(
        self,
        *,
        kind: int,
        beta: float,
        label_smoothing: float,
        desirable_weight: float,
        undesirable_weight: float,
        state: int,
        place: int,
        rows: int,
        units: int,
        ref_logps: int,
        desirable: int,
        kl: int,
        scale: int,
        value: int,
        metrics: int,
        g: int,
    ) -> None: ...

def device_count() -> int: ...
def forward(logits: Logits, state: int, queue: Queue) -> None: ...
def backward(logits: Logits, state: int, g_logp: int, g_entropy: int, out: Out, queue: Queue) -> None: ...
def peaks(logits: Logits, state: int, rows: int, count: int, out: int, queue: Queue) -> None: ...
def token_loss(logits: Logits, state: int, out: Out, loss: TokenLoss, shared: int, queue: Queue) -> None: ...
def unit_loss(loss: UnitLoss, queue: Queue) -> None: ...
