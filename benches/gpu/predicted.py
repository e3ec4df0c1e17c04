"""What was expected of an H100 before anything ran on one, and of an H200 where that differs.

Milliseconds of the 7B head (D = 3584, V = 152064) at 8192 rows: GEMMs at 730 TFLOP/s, 5 % more where they write
float32; row kernels by their instructions (27 a logit forward, 35 backward, 14 for exponentials in one pass) or their
bytes at 3.0 TB/s (4.3 on an H200); the forward without logits by 12 instructions a logit in its epilogue, 24 before;
peers by their own figures, scaled by FLOPs. Rates of GEMMs are 730 TFLOP/s times the share of 132 multiprocessors that
tiles of 128 x 256 keep busy.
"""

from __future__ import annotations

# part: what: on an H100, or (on an H100, on an H200)
PREDICTED: dict[str, dict[str, float | tuple[float, float]]] = {
    "gemms": {
        "copy": (3000, 4300),
        "logits bf16, 1024 rows": 730,
        "logits bf16, 1152 rows": 730,
        "logits bf16, 2048 rows": 730,
        "logits bf16, 4096 rows": 730,
        "logits bf16, 8192 rows": 730,
        "logits fp32, 1024 rows": 694,
        "logits fp32, 1152 rows": 694,
        "logits fp32, 2048 rows": 694,
        "logits fp32, 4096 rows": 694,
        "logits fp32, 8192 rows": 694,
        "dX bf16, 1024 rows": 619,
        "dX bf16, 1152 rows": 697,
        "dX bf16, 2048 rows": 619,
        "dX bf16, 4096 rows": 619,
        "dX bf16, 8192 rows": 708,
        "dW fp32 written, 4096 rows": 694,
        "dW fp32 added to, 4096 rows": 657,
    },
    "forward, Qwen2.5-7B, dense, bfloat16": {
        "align_kernels, triton": 14.8,
        "align_kernels, triton through tiles": (14.9, 14.6),
        "align_kernels, cuda": (14.9, 14.6),
        "TRL": 14.0,
        "Liger CuTe": 12.4,
        "QuACK": 12.4,
    },
    "sft, Qwen2.5-7B, frozen, dense, bfloat16": {
        "align_kernels, triton": (28.1, 27.4),
        "align_kernels, cuda": (32.2, 31.5),
        "TRL": 40,
        "Liger CuTe": 51,
        "QuACK": 25,
    },
    "sft, Qwen2.5-7B, trained, dense, bfloat16": {
        "align_kernels, triton": (41.5, 40.2),
        "align_kernels, cuda": (45.7, 44.4),
        "TRL": 55,
        "Liger CuTe": 51,
        "QuACK": (37, 32),
    },
    "gradient, Qwen2.5-7B, trained, dense, bfloat16": {
        "align_kernels, triton": (41.6, 40.3),
        "align_kernels, cuda": (59, 57.5),
        "TRL": 54,
        "Liger CuTe": 50,
    },
    "row kernels": {
        "triton forward, fp32": 2770,
        "triton forward, bf16": 1660,
        "triton backward, fp32 to bf16": 2770,
        "triton backward, bf16": 2490,
        "triton exponentials, fp32 to bf16": (2770, 3900),
        "triton exponentials, bf16": 2000,
        "forward without logits": 601,
        "forward without logits, merge BN 32": 594,
    },
    "epilogue": {
        "forward, epilogue": 12.4,
        "frozen, epilogue": 25,
        "trained, epilogue": 37,
        "late, epilogue": 38.5,
        "peaked, epilogue": 17,
        "forward, row kernel": 14.8,
        "frozen, row kernel": (28.1, 27.4),
        "trained, row kernel": (41.5, 40.2),
        "late, row kernel": (41.6, 40.3),
        "peaked, row kernel": (21.8, 20.1),
        "logits by cuBLAS": 730,
        "exponentials and sums": 730,
        "sums alone": 730,
    },
    "planner": {
        "trained, 2 GiB": (42.4, 41.2),
        "trained, 4 GiB": (41.5, 40.4),
        "trained, 8 GiB": (41.4, 40.3),
        "late, 2 GiB": (57.5, 56.5),
        "late, 4 GiB": (41.6, 40.5),
        "late, 8 GiB": (41.4, 40.3),
    },
    "graph": {f"{rows} rows, {head}: error of a replay": 0 for rows in (512, 2048) for head in ("frozen", "trained")},
    "waiting": {"forward": 1, "frozen": 1, "trained": 1, "late": 2},
    "tests": {"triton, failed": 0, "cuda, failed": 0},
    "sanitizer": {"errors": 0},
}


def prediction(part: str, what: str, device: str) -> float | None:
    found = PREDICTED.get(part, {}).get(what)
    return found[int("H200" in device)] if isinstance(found, tuple) else found
