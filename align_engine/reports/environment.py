"""`align env`: versions, devices, and which backend each kernel takes here."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from typing import Any

import torch

PACKAGES = "align-engine torch transformers accelerate datasets peft triton flash-attn trl vllm".split()


def gather() -> dict[str, Any]:
    """Everything that `show` prints, as JSON values."""
    from align_kernels import backends_report
    from align_kernels.backends import cpu

    installed = {one.name.replace("_", "-"): one.version for one in importlib.metadata.distributions()}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    devices = [
        f"cpu: {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {memory:.0f} GiB"
    ]
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        devices.append(f"cuda:{i}: {card.name}, {card.total_memory / 2**30:.0f} GiB, sm_{card.major}{card.minor}")
    products = "its own" if cpu.products.serves(torch.float32) else "torch's"
    units = cpu.products.units()
    narrow = f"bfloat16 multiplied by {units}" if units else "bfloat16 multiplied as float32"
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: installed.get(name) for name in PACKAGES},
        "devices": devices,
        "compiler": shutil.which(os.environ.get("CXX", "c++")),
        "cpu_extension": cpu.why_not(torch.device("cpu"), torch.float32)
        or f"built and in use, on {products} matrix products, {narrow}",
        "backends": [status._asdict() for status in backends_report()],
    }


def show(as_json: bool) -> None:
    """Print the state of this machine."""
    facts = gather()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "state", title="This machine, and its kernels by preference", title_justify="left")
    table.add_row("python", f"{facts['python']} on {facts['system']}")
    for name, found in facts["packages"].items():
        table.add_row(name, found or "[dim]not installed[/dim]")
    table.add_row("devices", "\n".join(facts["devices"]))
    table.add_row("C++ compiler", facts["compiler"] or "[yellow]none found: the CPU extension cannot be built[/yellow]")
    table.add_row("CPU extension", facts["cpu_extension"])
    taken = set()
    for status in facts["backends"]:
        where, state = f"{status['device']} {status['dtype']}", status["why_not"]
        if status["available"]:
            state = "available" if where in taken else "[green]taken by auto[/green]"
            taken.add(where)
        table.add_row(f"{where} {status['name']}", state)
    Console().print(table)
