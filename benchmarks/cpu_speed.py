"""Time of kdfast on the CPU beside eager PyTorch and torch.compile, forward + backward and forward alone.

Eager is what users write: ``F.kl_div(F.log_softmax(s/tau,-1), F.log_softmax(t/tau,-1), log_target=True,
reduction="batchmean") * tau**2``, and ``F.mse_loss``; compiled is torch.compile of the same. Every provider's loss and
gradient are checked against float64 before it is timed, and the errors are printed.

Providers take turns in one process; a figure is the median over the rounds, and the spread printed beside kdfast's is
half the distance between the quartiles. A step is ``torch.autograd.grad(loss(s, t), s)``, whose result is dropped at
once: as in training, where the logits are a layer's output, the gradient is passed on and dies before the next step.

What "allocation" means, the same for every provider, by glibc's ``mallopt``, without touching the losses:

``fresh``   every block of 128 KiB or more comes from the kernel and goes back to it: its pages are faulted in anew;
``default`` the state glibc settles in by itself in a long run: blocks up to 32 MiB are reused, larger ones are fresh;
``reused``  freed memory stays in the process (no mmap, no trimming), so the gradient of a step lands in the block of
            the step before, and eager's and the compiled temporaries are reused as well.

They run in this order, since a block once in the heap is reused whatever its size. The column "faults" counts the pages
that kdfast faulted in for one step: it shows whether the memory was reused. On a platform without mallopt only
``default`` is there, as the platform has it.

GB/s counts two reads of the logits, and one write of the gradient where there is one, over kdfast's time.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from benchmarks import machine, print_table, write_csv

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

TAU, ALPHA = 4.0, 0.9
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHAPES = ("1024x32000", "256x128256", "4096x1000", "1024x100", "128x10")
QUICK_SHAPES = ("64x32000", "1024x100", "128x10")
# What a loss must reach forward + backward on one thread: times faster than eager, than compiled (None: no target).
BIG = {"reused": (10.0, 4.0), "fresh": (5.0, 2.0)}
MIXED = {"reused": (8.0, 3.0), "fresh": (8.0, 3.0)}
TARGETS: dict[str, dict[str, dict[str, tuple[float, float | None]]]] = {
    "kl_div_tau": {
        "1024x32000": {**BIG},
        "256x128256": {**BIG},
        "4096x1000": {**BIG},
        "1024x100": {"reused": (3.0, None), "fresh": (3.0, None)},
        "128x10": {"reused": (2.0, None), "fresh": (2.0, None)},
    },
    "kd_loss": {"1024x32000": {**MIXED}, "4096x1000": {**MIXED}},
}
KD_TARGET = 1.35  # the most time of kd_loss, in times of kl_div_tau
SCALING_TARGET = 1.7
MOST_ROUNDS = 51
# kdfast's relative errors against float64 above which a timing is void: the gradient's rounding in its dtype included.
ERROR_LIMITS = {torch.float32: (5e-6, 2e-6), torch.bfloat16: (5e-6, 4e-3)}

Loss = Callable[[Tensor, Tensor], Tensor]


def eager_kl(s: Tensor, t: Tensor) -> Tensor:
    """The expression that kdfast replaces."""
    log_q, log_p = F.log_softmax(s / TAU, -1), F.log_softmax(t / TAU, -1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * TAU**2


def labels(s: Tensor) -> Tensor:
    """Targets that depend on the logits alone: some rows have the same ones by themselves, and in float64."""
    return (s.detach()[:, 0] > 0).long()


def eager_kd(s: Tensor, t: Tensor) -> Tensor:
    """The two losses that kd_loss replaces."""
    return (1 - ALPHA) * F.cross_entropy(s, labels(s)) + ALPHA * eager_kl(s, t)


def eager_mse(s: Tensor, t: Tensor) -> Tensor:
    """PyTorch's mean squared error."""
    return F.mse_loss(s, t)


LOSSES: dict[str, tuple[Loss, Loss]] = {  # eager, kdfast
    "kl_div_tau": (eager_kl, lambda s, t: kdfast.kl_div_tau(s, t, TAU)),
    "logit_mse": (eager_mse, lambda s, t: kdfast.logit_mse(s, t)),
    "kd_loss": (eager_kd, lambda s, t: kdfast.kd_loss(s, t, labels(s), tau=TAU, alpha=ALPHA)),
}
PROVIDERS = ("eager", "compile", "kdfast")


def providers(loss: str, names: Sequence[str]) -> dict[str, Loss]:
    """The requested providers of a loss; compiled code is made for the shapes, dtype and threads of its first call."""
    eager, fused = LOSSES[loss]
    torch._dynamo.reset()
    every = {"eager": eager, "compile": torch.compile(eager, dynamic=False), "kdfast": fused}
    return {name: every[name] for name in names}


# ------------------------------------------------------------------------------------------------------ memory

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h
ALLOCATION = {  # in the order of the runs
    "fresh": ((M_MMAP_MAX, 65536), (M_MMAP_THRESHOLD, 128 << 10), (M_TRIM_THRESHOLD, 128 << 10)),
    "default": ((M_MMAP_MAX, 65536), (M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 64 << 20)),
    "reused": ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)),
}


def glibc() -> ctypes.CDLL | None:
    """The C library where it has glibc's ``mallopt`` and ``malloc_trim``."""
    try:
        library = ctypes.CDLL(None)
        return library if library.mallopt and library.malloc_trim else None
    except (AttributeError, OSError, TypeError):
        return None


def set_allocation(mode: str) -> None:
    """Choose what happens to freed memory; what is free now goes back to the kernel."""
    library = glibc()
    if library is None:
        return
    for parameter, value in ALLOCATION[mode]:
        if library.mallopt(parameter, value) != 1:
            raise RuntimeError(f"mallopt({parameter}, {value}) failed: allocation {mode!r} is not available here")
    library.malloc_trim(0)


def page_faults() -> int:
    """Pages faulted in by this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt if resource else 0


# ------------------------------------------------------------------------------------------------------ timing


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call: median and quartiles over the rounds; pages faulted in by a call."""

    median: float
    low: float
    high: float
    faults: float

    @property
    def spread(self) -> float:
        return (self.high - self.low) / 2


def forward(loss: Loss, s: Tensor, t: Tensor) -> Callable[[], None]:
    """The loss alone, no gradient wanted."""

    def call() -> None:
        with torch.no_grad():
            loss(s, t)

    return call


def step(loss: Loss, s: Tensor, t: Tensor) -> Callable[[], None]:
    """The loss and the student's gradient, which is dropped."""
    s = s.detach().requires_grad_()

    def call() -> None:
        torch.autograd.grad(loss(s, t), s)

    return call


PASSES = {"fwd+bwd": step, "fwd": forward}


def interleave(calls: dict[str, Callable[[], None]], rounds: int, batch_ms: float = 2.0) -> dict[str, Timing]:
    """Time the calls in turn. Short ones are repeated until a reading takes ``batch_ms`` or so, and read more often."""
    repeats = {}
    round_ms = 0.0
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        call()
        once = (time.perf_counter() - start) / 2
        repeats[name] = max(1, math.ceil(1e-3 * batch_ms / once))
        round_ms += 1e3 * once * repeats[name]
    rounds = max(rounds, min(MOST_ROUNDS, int(1000 / round_ms)))
    readings: dict[str, list[float]] = {name: [] for name in calls}
    faults = dict.fromkeys(calls, 0)
    order = list(calls)
    for _ in range(rounds):
        for name in order:
            call, count = calls[name], repeats[name]
            before, start = page_faults(), time.perf_counter()
            for _ in range(count):
                call()
            readings[name].append(1e3 * (time.perf_counter() - start) / count)
            faults[name] += page_faults() - before
        order.append(order.pop(0))  # nobody always follows the same neighbour
    return {name: timing(values, faults[name] / rounds / repeats[name]) for name, values in readings.items()}


def on_threads(counts: Sequence[int], loss: str, shape: str, dtype: str, mode: str, rounds: int) -> dict[str, Timing]:
    """A step of kdfast on each number of threads, in turn."""
    set_allocation(mode)
    run = step(LOSSES[loss][1], *logits(shape, DTYPES[dtype]))

    def on(threads: int) -> Callable[[], None]:
        def call() -> None:
            torch.set_num_threads(threads)
            run()

        return call

    return interleave({str(threads): on(threads) for threads in counts}, rounds)


def timing(values: Sequence[float], faults: float) -> Timing:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Timing(median, low, high, faults)


# ------------------------------------------------------------------------------------------------- correctness


def logits(shape: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A student's and a teacher's logits: standard deviation 3, the student one away from the teacher."""
    rows, classes = sizes(shape)
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(rows, classes, generator=generator).mul_(3)
    student = torch.randn(rows, classes, generator=generator).add_(teacher)
    return student.to(dtype), teacher.to(dtype)


def sizes(shape: str) -> tuple[int, int]:
    """``"128x10"`` as (128, 10)."""
    rows, classes = map(int, shape.split("x"))
    return rows, classes


def check(exact: Loss, losses: dict[str, Loss], s: Tensor, t: Tensor) -> dict[str, tuple[float, float]]:
    """Relative errors of each provider's loss and gradient (L2) against ``exact`` in float64, a few rows at a time."""
    rows = len(s)
    chunk = max(1, 2_000_000 // s.size(-1))
    got = {}
    for name, loss in losses.items():
        leaf = s.detach().requires_grad_()
        value = loss(leaf, t)
        got[name] = (value.item(), torch.autograd.grad(value, leaf)[0])
    true_loss, true_square, squares = 0.0, 0.0, dict.fromkeys(losses, 0.0)
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        leaf = s[part].detach().double().requires_grad_()
        value = exact(leaf, t[part].double()) * (len(leaf) / rows)
        (gradient,) = torch.autograd.grad(value, leaf)
        true_loss += value.item()
        true_square += gradient.square().sum().item()
        for name in losses:
            squares[name] += (got[name][1][part].double() - gradient).square().sum().item()
    return {n: (abs(got[n][0] - true_loss) / abs(true_loss), math.sqrt(squares[n] / true_square)) for n in losses}


# ------------------------------------------------------------------------------------------------------- tables


@dataclass
class Bench:
    """What was asked for, and what was found."""

    options: argparse.Namespace
    records: list[dict[str, object]]
    missed: list[str]
    inaccurate: list[str]

    def note(self, timings: dict[str, Timing], errors: dict[str, tuple[float, float]], **case: object) -> None:
        """Keep each provider's figures for the CSV file."""
        for provider, t in timings.items():
            loss_error, gradient_error = errors.get(provider, (math.nan, math.nan))
            self.records.append(
                {
                    **case,
                    "provider": provider,
                    "median_ms": t.median,
                    "quartile1_ms": t.low,
                    "quartile3_ms": t.high,
                    "page_faults": t.faults,
                    "loss_error": loss_error,
                    "gradient_error": gradient_error,
                }
            )

    def verdict(self, case: str, ratios: Sequence[float], targets: Sequence[float | None]) -> str:
        """Targets and whether they were reached."""
        pairs = [(r, target) for r, target in zip(ratios, targets, strict=True) if target and not math.isnan(r)]
        if not pairs:
            return ""
        reached = all(ratio >= target for ratio, target in pairs)
        if not reached:
            self.missed.append(case)
        return f"{' / '.join(f'{target:g}x' for _, target in pairs)} {'reached' if reached else 'MISSED'}"

    def main_table(self) -> None:
        """Every loss, shape, dtype, pass and way of allocation; each provider checked first."""
        rows: dict[str, list[list[str]]] = {}
        errors: dict[str, dict[str, tuple[float, float]]] = {}
        threads = self.options.threads
        torch.set_num_threads(threads)
        cases = list(itertools.product(self.options.losses, self.options.shapes, self.options.dtypes))
        for mode, (loss, shape, dtype) in itertools.product(self.options.allocation, cases):
            set_allocation(mode)
            name = f"{loss} {shape} {dtype}"
            s, t = logits(shape, DTYPES[dtype])
            losses = providers(loss, self.options.providers)
            if name not in errors:
                errors[name] = check(LOSSES[loss][0], losses, s, t)
                if any(e > limit for e, limit in zip(errors[name]["kdfast"], ERROR_LIMITS[DTYPES[dtype]], strict=True)):
                    self.inaccurate.append(name)
            for label, make in PASSES.items():
                timings = interleave({provider: make(fn, s, t) for provider, fn in losses.items()}, self.options.rounds)
                case = {"loss": loss, "call": label, "shape": shape, "dtype": dtype, "allocation": mode}
                self.note(timings, errors[name], **case, threads=threads)
                mine = timings["kdfast"]
                ratios = [timings[p].median / mine.median if p in timings else math.nan for p in ("eager", "compile")]
                moved = s.numel() * s.element_size() * (3 if label == "fwd+bwd" else 2)
                judged = (label, threads) == ("fwd+bwd", 1)
                wanted = TARGETS.get(loss, {}).get(shape, {}).get(mode) if judged else None
                rows.setdefault(name, []).append(
                    [
                        name,
                        label,
                        mode,
                        *(milliseconds(timings[p].median) if p in timings else "" for p in ("eager", "compile")),
                        f"{milliseconds(mine.median)} ± {100 * mine.spread / mine.median:.0f}%",
                        *("" if math.isnan(ratio) else f"{ratio:.1f}x" for ratio in ratios),
                        f"{1e-6 * moved / mine.median:.1f}",
                        f"{mine.faults:.0f}",
                        self.verdict(f"{name} {mode}", ratios, wanted or (None, None)),
                    ]
                )
        checked = [[name, *(f"{e[0]:.1e} / {e[1]:.1e}" for e in found.values())] for name, found in errors.items()]
        print_table("Relative errors against float64: loss / gradient", ["", *self.options.providers], checked)
        headers = ["", "pass", "allocation", "eager ms", "compile ms", "kdfast ms"]
        headers += ["eager / kdfast", "compile / kdfast", "GB/s", "faults", "target"]
        lines = list(itertools.chain.from_iterable(rows.values()))
        print_table(f"Time, {threads} thread{'s' * (threads > 1)}, medians", headers, lines)

    def cost_of_the_hard_part(self) -> None:
        """kd_loss and kl_div_tau taking turns, on one thread."""
        torch.set_num_threads(1)
        mode = self.options.allocation[-1]
        set_allocation(mode)
        rows = []
        for shape, dtype in itertools.product(self.options.shapes, self.options.dtypes):
            s, t = logits(shape, DTYPES[dtype])
            calls = {loss: step(LOSSES[loss][1], s, t) for loss in ("kl_div_tau", "kd_loss")}
            timings = interleave(calls, self.options.rounds)
            for loss, reading in timings.items():
                case = {"loss": loss, "call": "fwd+bwd, both losses", "shape": shape, "dtype": dtype, "allocation": mode}
                self.note({"kdfast": reading}, {}, **case, threads=1)
            alone, both = (reading.median for reading in timings.values())
            name = f"{shape} {dtype}"
            if both > KD_TARGET * alone and shape in TARGETS["kd_loss"]:
                self.missed.append(f"kd_loss over kl_div_tau {name}")
            rows.append([name, milliseconds(alone), milliseconds(both), f"{both / alone:.2f}x"])
        headers = ["", "kl_div_tau ms", "kd_loss ms", f"ratio (at most {KD_TARGET})"]
        print_table(f"What the cross-entropy adds, fwd+bwd, 1 thread, allocation {mode}", headers, rows)

    def bandwidth(self) -> None:
        """How near the forward comes to reading two float32 arrays (a dot product), on one thread."""
        torch.set_num_threads(1)
        shape = self.options.shapes[0]
        s, t = logits(shape, torch.float32)
        mode = self.options.allocation[-1]
        set_allocation(mode)
        calls = {f"{loss} fwd": forward(LOSSES[loss][1], s, t) for loss in self.options.losses}
        calls["torch.dot"] = forward(torch.dot, s.view(-1), t.view(-1))
        timings = interleave(calls, self.options.rounds)
        self.note(timings, {}, loss="", call="bandwidth", shape=shape, dtype="float32", allocation=mode, threads=1)
        size = 2e-6 * s.numel() * s.element_size()
        best = timings["torch.dot"].median
        rows = [
            [name, milliseconds(t.median), f"{size / t.median:.1f}", f"{100 * best / t.median:.0f}%"]
            for name, t in timings.items()
        ]
        print_table(f"Reading two arrays, {shape} float32, 1 thread", ["", "ms", "GB/s", "of torch.dot"], rows)

    def scaling(self) -> None:
        """kdfast on more threads than one."""
        many = self.options.scaling_threads
        shape = self.options.shapes[0]
        rows = []
        mode = self.options.allocation[-1]
        for loss, dtype in itertools.product(self.options.losses, self.options.dtypes):
            # In a process of its own: code that torch.compile made keeps this one to the threads it was made for.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                timings = process.submit(on_threads, (1, many), loss, shape, dtype, mode, 2 * self.options.rounds).result()
            for threads, reading in timings.items():
                case = {"loss": loss, "call": "fwd+bwd, scaling", "shape": shape, "dtype": dtype, "allocation": mode}
                self.note({"kdfast": reading}, {}, **case, threads=int(threads))
            one, more = timings["1"].median, timings[str(many)].median
            wanted = SCALING_TARGET if (many, shape, loss) == (2, "1024x32000", "kl_div_tau") else None
            label = f"{loss} {shape} {dtype}"
            verdict = self.verdict(f"{label} on {many} threads", [one / more], [wanted])
            rows.append([label, milliseconds(one), milliseconds(more), f"{one / more:.2f}x", verdict])
        headers = ["", "1 thread ms", f"{many} threads ms", "ratio", "target"]
        print_table(f"kdfast fwd+bwd on {many} threads", headers, rows)

    def small_calls(self) -> None:
        """What a call costs before any arithmetic, in microseconds."""
        torch.set_num_threads(1)
        rows = []
        s, t = logits("8x10", torch.float32)
        mode = self.options.allocation[-1]
        set_allocation(mode)
        for loss, (label, make) in itertools.product(self.options.losses, PASSES.items()):
            losses = providers(loss, self.options.providers)
            timings = interleave({n: make(fn, s, t) for n, fn in losses.items()}, self.options.rounds)
            self.note(timings, {}, loss=loss, call=label, shape="8x10", dtype="float32", allocation=mode, threads=1)
            cells = [f"{1e3 * x.median:.1f} ± {1e3 * x.spread:.1f}" for x in timings.values()]
            rows.append([f"{loss} {label}", *cells])
        print_table("Overhead of a call, 8x10 float32, 1 thread, microseconds", ["", *self.options.providers], rows)


def milliseconds(value: float) -> str:
    """Three digits."""
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def shape_of(text: str) -> str:
    """A shape such as 1024x32000."""
    try:
        rows, classes = sizes(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ROWSxCLASSES, such as 1024x32000") from None
    if rows < 1 or classes < 1:
        raise argparse.ArgumentTypeError(f"rows and classes must be at least 1, got {text}")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options, measure, print; 1 when kdfast was inaccurate."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_speed", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"shapes {' '.join(QUICK_SHAPES)} and few rounds")
    parser.add_argument("--threads", type=int, default=1, help="threads of the main table (default %(default)s)")
    parser.add_argument("--scaling-threads", type=int, default=2, help="compared with one (default 2; 0: leave out)")
    parser.add_argument("--shapes", type=shape_of, nargs="+", metavar="BxK", help=f"default {' '.join(SHAPES)}")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS), help="kdfast: always")
    parser.add_argument("--allocation", nargs="+", choices=ALLOCATION, default=["reused", "fresh"])
    parser.add_argument("--rounds", type=int, help="least readings of a figure (default 9; 5 with --quick)")
    parser.add_argument("--csv", type=Path, help="write every figure to this file")
    options = parser.parse_args(argv)
    options.shapes = options.shapes or (QUICK_SHAPES if options.quick else SHAPES)
    options.rounds = options.rounds or (5 if options.quick else 9)
    options.providers = [p for p in PROVIDERS if p in options.providers or p == "kdfast"]
    wanted = options.allocation if glibc() else ["default"]
    options.allocation = [mode for mode in ALLOCATION if mode in wanted]

    bench = Bench(options, [], [], [])
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    threads = torch.get_num_threads()
    try:
        bench.main_table()
        bench.bandwidth()
        if {"kl_div_tau", "kd_loss"} <= set(options.losses):
            bench.cost_of_the_hard_part()
        if options.scaling_threads:
            bench.scaling()
        bench.small_calls()
    finally:
        torch.set_num_threads(threads)
        set_allocation("default")
    print(machine())
    if load > 0.5:
        print(f"The machine was busy before the start (load average {load:.1f}): repeat on a quiet one.")
    if bench.missed:
        print("Targets missed: " + "; ".join(bench.missed))
    if bench.inaccurate:
        print("Inaccurate, so that its times mean nothing: " + "; ".join(bench.inaccurate))
    if options.csv:
        write_csv(options.csv, bench.records)
    return 1 if bench.inaccurate else 0


if __name__ == "__main__":
    raise SystemExit(main())
