"""Random calls of the public functions, right and wrong, on every instruction set of this CPU and in plain torch: ``make fuzz``.

A case is drawn from the seed and its number alone, and judged by ``problems.judge``. The cases run in child processes, so that a crash
or a hang fails one case, as anything else does. A failure prints the command that repeats it.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).parent))

import problems

from kdfast import _C

MEDDLED = 0.4  # share of the cases with arguments replaced
SECONDS_A_CASE = 60
SHOWN = 20  # failures


def case(seed: int, number: int) -> tuple[problems.Problem, dict[str, Any]]:
    """What is called, as it was drawn, and the arguments, some of them perhaps replaced."""
    rng = random.Random(f"{seed}:{number}")
    problem = problems.draw(rng)
    arguments = problems.build(problem)
    return problem, problems.spoilt(rng, problem, arguments) if rng.random() < MEDDLED else arguments


def run(seed: int, number: int) -> str:
    """Runs one case: "right" or "refused"; what is wrong is raised."""
    problem, arguments = case(seed, number)
    return problems.judge(problem.loss, arguments, grad_output=problem.grad_output, seed=problem.seed, mode=problem.mode)


def run_all(seed: int, numbers: range) -> None:
    """The child: a line [number, outcome, message] for every case."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for number in numbers:
        faulthandler.dump_traceback_later(SECONDS_A_CASE, exit=True)
        outcome, message = "failed", ""
        try:
            outcome = run(seed, number)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
        print(json.dumps([number, outcome, message]), flush=True)


class Share(threading.Thread):
    """The cases ``numbers`` on one instruction set, in child processes: a new one after each crash."""

    def __init__(self, seed: int, numbers: range, isa: str, report: Any) -> None:
        super().__init__(daemon=True)
        self.seed, self.numbers, self.isa, self.report = seed, numbers, isa, report

    def run(self) -> None:
        left = self.numbers
        while left:
            command = [sys.executable, "-X", "faulthandler", "-m", "tests.fuzz", f"--seed={self.seed}", "--child"]
            command += map(str, (left.start, left.stop, left.step))
            with (
                tempfile.TemporaryFile("w+") as errors,
                subprocess.Popen(
                    command, env=os.environ | {"KDFAST_CPU_ISA": self.isa}, stdout=subprocess.PIPE, stderr=errors, text=True
                ) as child,
            ):
                assert child.stdout is not None
                for line in child.stdout:
                    number, outcome, message = json.loads(line)
                    left = range(number + left.step, left.stop, left.step)
                    self.report(number, outcome, message, self.isa)
                if child.wait() or left:
                    errors.seek(0)
                    self.report(left.start, "failed", f"{_ending(child.returncode)}\n{errors.read()[-2000:]}", self.isa)
                    left = left[1:]


def _ending(code: int) -> str:
    return f"the process ended with {signal.Signals(-code).name}" if code < 0 else f"the process ended with status {code}"


def fuzz(seed: int, count: int) -> int:
    """All cases; the number of failures."""
    isas = [os.environ["KDFAST_CPU_ISA"]] if os.environ.get("KDFAST_CPU_ISA") else _C.build_info()["cpu_isas"]
    shares = len(isas) * -(-len(os.sched_getaffinity(0)) // len(isas))
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    outcomes: collections.Counter[str] = collections.Counter()
    lock, began = threading.Lock(), time.monotonic()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(f"seed {seed}", total=count)

        def report(number: int, outcome: str, message: str, isa: str) -> None:
            with lock:
                outcomes[outcome] += 1
                progress.advance(bar)
                if outcome == "failed" and outcomes["failed"] <= SHOWN:
                    command = f"KDFAST_CPU_ISA={isa} python -m tests.fuzz --seed {seed} --case {number}"
                    console.print(f"{command}\n    {message}", markup=False, highlight=False, soft_wrap=True)

        threads = [Share(seed, range(i, count, shares), isas[i % len(isas)], report) for i in range(min(shares, count))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    console.print(
        f"{count} calls, seed {seed}, {', '.join(isas)}: {outcomes['right']} right, {outcomes['refused']} refused by name, "
        f"{outcomes['failed']} failed; {time.monotonic() - began:.0f} s",
        highlight=False,
    )
    assert sum(outcomes.values()) == count
    return outcomes["failed"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--case", type=int, metavar="NUMBER", help="run this case alone, and show it")
    parser.add_argument("--child", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_all(options.seed, range(*options.child))
    elif options.case is not None:
        problem, arguments = case(options.seed, options.case)
        print(
            problem, f"\nkdfast.{problem.loss}(", *(f"    {k}={v!r}," for k, v in arguments.items()), ")", sep="\n", flush=True
        )
        print("wrong arguments:", problems.faults(problem.loss, arguments) or "none", flush=True)
        print(run(options.seed, options.case))
    else:
        sys.exit(fuzz(options.seed, options.count) > 0)


if __name__ == "__main__":
    main()
