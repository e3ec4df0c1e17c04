"""Machine instructions a logit, from the assembly of a kernel: on the way that nearly every logit takes.

Where a kernel loops over a row, that is the shortest way around its longest loop; where it multiplies matrices, the
shortest one from the last of those instructions to the end; else the shortest one through the whole. Rare branches, a
ragged last tile or a target, are so passed by.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import deque
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATMUL = r"HGMMA|HMMA|UTCHMMA|UTCQMMA|UTCMMA|v_mfma"


class Code(NamedTuple):
    words: list[str]
    after: list[list[int]]  # of each instruction, those that may follow


def disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "nvdisasm"), "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def parsed(text: str) -> Code:
    """Of NVIDIA's SASS, as nvdisasm writes it, or of AMD's assembly."""
    words, labels = [], {}
    for line in text.splitlines():
        if found := re.match(r"\s*(\.?L\w+):", line):
            labels[found[1]] = len(words)
        elif found := re.match(r"\s*(?:/\*[0-9a-f]{4,}\*/)?\s+([@A-Za-z][^;/]*)", line):
            word = found[1].strip()
            if not re.match(r"NOP|s_nop|s_waitcnt|s_code_end|s_setprio|\.", word):
                words.append(word)
    after = []
    for i, word in enumerate(words):
        target = next((labels[x] for x in re.findall(r"\.?L\w+", word) if x in labels), None)
        ends = re.match(r"(EXIT|s_endpgm)", word)
        jumps = re.match(r"(BRA|s_branch)(\.\w+)*\s+[`(.L]", word)  # without a condition
        goes = [] if ends or jumps else [i + 1] * (i + 1 < len(words))
        if target is not None and re.search(r"\bBRA|s_c?branch", word):
            goes.append(target)
        after.append(goes)
    return Code(words, after)


def shortest(code: Code, begin: int, ends: set[int]) -> int:
    """Instructions from `begin` to the nearest of `ends`, both counted; 0 where there is no way."""
    queue, seen = deque([(begin, 1)]), {begin}
    while queue:
        i, length = queue.popleft()
        if i in ends:
            return length
        for j in code.after[i]:
            if j not in seen:
                seen.add(j)
                queue.append((j, length + 1))
    return 0


def on_the_way(text: str) -> int:
    """Instructions of the way that nearly every logit takes."""
    code = parsed(text)
    ends = {i for i, word in enumerate(code.words) if re.match(r"EXIT|s_endpgm", word)}
    products = [i for i, word in enumerate(code.words) if re.search(MATMUL, word)]
    if products:
        return shortest(code, products[-1] + 1, ends)
    loops = [shortest(code, j, {i}) for i, goes in enumerate(code.after) for j in goes if j < i]
    return max(loops, default=0) or shortest(code, 0, ends)
