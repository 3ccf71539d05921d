"""What a call costs beside its arithmetic: microseconds of a loss of 8 x 10 logits, kdfast and eager PyTorch, one thread.

On a problem this small every figure is Python, dispatch and autograd. "forward" is without gradient (``torch.no_grad()`` around the
whole loop); "forward + backward" is ``loss.backward()`` with ``.grad`` set to None before. Both losses take turns in one process, in
short rounds; a figure is the least of the rounds, which is what other processes disturb least, and the ratio beside it that of the
medians. The last line is what ``import kdfast`` adds to ``import torch``, the median over processes.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from . import machine, print_table
from .losses import LOSSES, PROVIDERS
from .run import TAU

PASSES = ("forward", "forward + backward")
Call = Callable[[], Tensor]


def losses() -> dict[str, tuple[Tensor, Call, Call]]:
    """The student's logits, kdfast's call and the eager chain of each loss."""
    found = {}
    for name, loss in LOSSES.items():
        if loss.of_logits:
            s, *others = loss.inputs(8, 10, torch.float32)
            s.requires_grad_()
            fused, eager = (
                functools.partial(PROVIDERS[provider].losses[name](TAU), s, *others) for provider in ("kdfast", "eager")
            )
            found[name] = s, fused, eager
    return found


def microseconds(calls: list[Callable[[], object]], rounds: int, repeats: int = 50) -> list[list[float]]:
    """Each call's time in each round; the calls take turns."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(rounds):
        for call, found in zip(calls, times, strict=True):
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            found.append((time.perf_counter() - start) / repeats * 1e6)
    return times


def measure(rounds: int) -> list[list[str]]:
    """Rows of the table."""
    rows = []
    for name, (s, fused, eager) in losses().items():
        for kind in PASSES:
            if kind == "forward":
                with torch.no_grad():
                    times = microseconds([fused, eager], rounds)
            else:

                def step(call: Call, s: Tensor = s) -> Callable[[], None]:
                    def run() -> None:
                        s.grad = None
                        call().backward()

                    return run

                times = microseconds([step(fused), step(eager)], rounds)
            (a, b), (c, d) = (min(t) for t in times), (statistics.median(t) for t in times)
            rows.append([name, kind, f"{a:.1f}", f"{b:.1f}", f"{a / b:.0%}", f"{c / d:.0%}"])
    return rows


def import_milliseconds(processes: int) -> float:
    code = "import time, torch; a = time.perf_counter(); import kdfast; print((time.perf_counter() - a) * 1e3)"
    return statistics.median(float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(processes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=300, help="of 50 calls each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    headers = ["loss", "pass", "kdfast us", "eager us", "ratio", "of medians"]
    print_table(f"8 x 10 float32; {machine()}", headers, measure(arguments.rounds))
    print(f"import kdfast after torch: {import_milliseconds(5):.0f} ms")


if __name__ == "__main__":
    main()
