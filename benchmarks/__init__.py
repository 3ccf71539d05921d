"""Measurements that a reader can repeat: ``python -m benchmarks.run``, ``.accuracy``, ``.overhead`` and ``.gpu_model``;
``.figures`` draws their results.

Installed, this is the package ``kdfast_bench``, and ``kdfast-bench`` its ``run``.
"""

from __future__ import annotations

import csv
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which measures memory, would tell of each start and stop

import torch

try:
    from rich import box
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:
    raise ImportError(f"the benchmarks need {error.name}: pip install 'kdfast[bench]'") from None

import kdfast
from kdfast import _C


def cpu_name() -> str:
    """The processor's own name, or as much as the platform tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown CPU"


def machine(device: torch.device | str = "cpu") -> str:
    """One line that every printed figure carries: hardware and versions."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()}), {usable} cores"]
    if torch.device(device).type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
    kernels = f"{_C.build_info()['cpu_isa']} kernels on the CPU"
    parts += [f"torch {torch.__version__}", f"kdfast {kdfast.__version__} ({kernels})"]
    return "; ".join(parts)


def print_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table as wide as the terminal, or whole where there is none (a file, a log)."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for position, header in enumerate(headers):
        table.add_column(header, justify="right" if position else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(title, table, sep="\n")


def write_csv(path: Path, records: Sequence[Mapping[str, object]], device: torch.device | str = "cpu") -> None:
    """One line for each record; every line names device and machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*records[0], "device", "machine"])
        writer.writeheader()
        writer.writerows({**record, "device": str(device), "machine": machine(device)} for record in records)
    print(f"{len(records)} lines in {path}")
