"""Builds the epilogue of epilogue.py into QuACK's Hopper GEMM, which needs no GPU and no driver, and says what the
compiler made of it: registers, local memory, instructions a logit.

`python benches/gpu/prepare.py build/gpu` installs its compiler and runs this with SETTINGS in the environment. Made are
OUT/full.so and OUT/sums.so, with exponentials and with sums alone, the runtime that they are linked with and
OUT/epilogue.json: what was printed. tvm_ffi loads them.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, const_expr
from quack import layout_utils
from quack.epilogue.frontend import gemm_epilogue
from quack.epilogue.math import pexp2
from quack.epilogue.ops import ColVecLoad, ColVecReduce, VecReduce
from torch._subclasses.fake_tensor import FakeTensorMode

OUT, DUMP = Path(sys.argv[1]).resolve(), Path(os.environ["CUTE_DSL_DUMP_DIR"])
TILE = dict(tile_M=128, tile_N=192, cluster_M=2, cluster_N=1, pingpong=True)
REGISTERS = (("num_regs_load", 24), ("num_regs_mma", 240))  # of the warps that load and multiply: the most there are
PLANES = 4  # s, a, q and the target's u
FAR = -1e30  # the target stands elsewhere
TARGETS = ColVecLoad("targets")


class Beside(ColVecReduce):
    """Of pairs 2^u and u: the sums of 2^u, 2^u u and (2^u)^2 of a row and tile without the column of the row's target,
    and the target's u, FAR where it stands elsewhere. Its buffer holds the four one after the other, (n, 4 T)."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.scaled = True  # the function returns pairs

    def config_key(self):
        return (TARGETS.cache_key(),)

    def sink_alloc_shape(self, lead, n, tile_m, tile_n, num_seqs=None):
        return (*lead, PLANES * -(-n // tile_n))

    def get_smem_tensor(self, gemm, params, storage_epi):
        return getattr(storage_epi, f"s_{TARGETS.name}").get_tensor(cute.make_layout(gemm.cta_tile_shape_mnk[0]))

    @cute.jit
    def begin(self, gemm, param, smem_tensor, ctx):
        sums = tuple(VecReduce.begin(self, gemm, param, None, ctx)[0] for _ in range(PLANES))
        coords = ctx.partition_for_epilogue_fn(cute.make_identity_tensor((ctx.tile_M, ctx.tile_N)))
        return (sums, smem_tensor, coords, ctx.tile_coord_mnkl[1] * ctx.tile_N)

    @cute.jit
    def begin_loop(self, gemm, state, epi_coord):
        sums = tuple(x[None, None, None, epi_coord[0], epi_coord[1]] for x in state[0])
        if const_expr(epi_coord[1] == 0):
            for k in cutlass.range_constexpr(PLANES):
                cute.filter_zeros(sums[k]).fill(0.0 if k < 3 else FAR)
        return (sums, state[1], state[2][None, None, None, epi_coord[0], epi_coord[1]], state[3])

    @cute.jit
    def fn_sink_flush(self, gemm, state, frag, scale=None):
        sums, targets, coords, first = state
        layout = sums[0].layout
        e, u, at = (layout_utils.convert_layout_zero_stride(x, layout) for x in (frag, scale, coords))
        s, a, q, own = (layout_utils.convert_layout_zero_stride(x, layout)[None, 0] for x in sums)
        column = cute.composition(cute.make_layout(gemm.cta_tile_shape_mnk[:2], stride=(0, 1)), at.layout)
        many = const_expr(cute.size(e, mode=[1]))
        for row in cutlass.range_constexpr(cute.size(e, mode=[0])):
            offsets = [cute.crd2idx((row, j), column) for j in range(many)]
            place = Int32(targets[at[row, 0][0]]) - first - at[row, 0][1]  # from the thread's first column on
            if place >= 0 and place <= max(offsets):  # rare; choices for every column would take registers
                for j in cutlass.range_constexpr(many):
                    hit = place == offsets[j]
                    x = Float32(cutlass.select_(hit, Float32(0.0), e[row, j]))
                    own[row] = Float32(cutlass.select_(hit, u[row, j], own[row]))
                    s[row] += x
                    a[row] += x * u[row, j]
                    q[row] += x * x
            else:
                for j in cutlass.range_constexpr(many):
                    s[row] += e[row, j]
                    a[row] += e[row, j] * u[row, j]
                    q[row] += e[row, j] * e[row, j]

    @cute.jit
    def _end_loop_values(self, state, epi_coord):
        return tuple(x[None, None, None, epi_coord[0], epi_coord[1]] for x in state[0])

    @cute.jit
    def _end_loop_smem(self, state):
        return None  # a row lies within one warp

    @cute.jit
    def _merge(self, vals, others):
        sums = tuple(a + b for a, b in zip(vals[:3], others[:3]))
        return (*sums, cute.arch.fmax(vals[3], others[3]))

    @cute.jit
    def end_loop_finish(self, gemm, param, staged, tile_coord_mnkl, varlen_manager):
        tiles = param.shape[2] // PLANES
        for k in cutlass.range_constexpr(PLANES):
            part = cute.domain_offset((0, 0, k * tiles), param)
            ColVecReduce.end_loop_finish(
                self, gemm, part, ((staged[0][k],), *staged[1:]), tile_coord_mnkl, varlen_manager
            )


@gemm_epilogue(
    ops={"factor": ColVecLoad("factor"), "shift": ColVecLoad("shift")},
    reduces={"total": ColVecReduce("total"), "top": ColVecReduce("top", combine="max", check_oob=False)},
    outs={"sums": Beside("sums")},
    extra_ops=(TARGETS,),
)
def exponentials(acc, factor, shift):
    u = acc * factor - shift
    e = pexp2(u)
    return {"D": e, "sums": (e, u), "total": acc, "top": u}


# -- building ------------------------------------------------------------------------------------------------------
def compiled(full: bool) -> Any:
    """Compiled for shapes of any size, from tensors without memory."""
    n, D, V, tiles = 512, 256, 1536, 8
    with FakeTensorMode(allow_non_fake_inputs=True):
        half = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="cuda")  # noqa: E731
        single = lambda *shape: torch.empty(shape, device="cuda")  # noqa: E731
        given = dict(
            factor=single(n), shift=single(n), targets=torch.empty(n, dtype=torch.int32, device="cuda"),
            sums=single(n, PLANES * tiles), total=single(n, tiles), top=single(n, tiles),
        )  # fmt: skip
        out = half(n, V) if full else None
        return exponentials.gemm(
            half(n, D), half(V, D), out, epi_args=given, **TILE, post_init_attrs=REGISTERS, _launch=False
        )


def link(made: Any, name: str) -> list[str]:
    """OUT/NAME.so and what it is linked with; the names of the epilogue's arguments in the order of a call."""
    made.compiled_fn.export_to_c(object_file_path=str(OUT / f"{name}.o"), function_name=name)
    needed = [Path(x) for x in cute.runtime.find_runtime_libraries(enable_tvm_ffi=True)]
    for library in needed:
        if "tvm_ffi" not in library.name:  # that one comes with its package
            shutil.copy2(library, OUT / library.name)
    command = ["gcc", "-shared", "-o", str(OUT / f"{name}.so"), str(OUT / f"{name}.o"), *map(str, needed)]
    subprocess.run([*command, "-Wl,-rpath,$ORIGIN"], check=True)
    (OUT / f"{name}.o").unlink()
    return list(made.arg_template)


def report(cubin: Path) -> dict[str, float]:
    tools = importlib.import_module("triton_instructions")
    command = [str(tools.TOOLS / "cuobjdump"), "-res-usage", str(cubin)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name.lower(): int(n) for name, n in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", said)}
    text = tools.disassembled(cubin.read_bytes())
    logits = TILE["tile_M"] * TILE["tile_N"] / 128  # of a thread: a warp group has a tile
    return found | {"instructions a logit": round(tools.on_the_way(text) / logits, 1), "HGMMA": text.count("HGMMA.")}


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    for module in [m for name, m in sys.modules.items() if name.startswith("quack")]:
        if hasattr(module, "get_max_active_clusters"):  # asks a driver; a call brings its own number
            module.get_max_active_clusters = lambda *_, **__: 66
    found: dict[str, Any] = {}
    for name in ("full", "sums"):
        before = set(DUMP.rglob("*.cubin"))
        arguments = link(compiled(name == "full"), name)
        (cubin,) = set(DUMP.rglob("*.cubin")) - before
        found[name] = report(cubin) | dict(arguments=arguments)
        print(f"{name}: {found[name]}")
    (OUT / "epilogue.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
