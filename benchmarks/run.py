"""Time, bandwidth, memory and error of kdfast's losses beside everything else that computes them, on this machine.

Each provider's loss and gradient are first checked against float64, at the very shape that is timed (of more than 2^25
pairs of logits: at as many rows of it), and its relative errors stand in its row: one that is off by more than 1% (the
loss) or 5% (the gradient) is marked WRONG, however fast.

Providers take turns in one process; a figure is the median over the rounds, and the spread beside it is half the distance
between the quartiles. CPU: as many threads and cores as --threads says, memory fresh or reused (benchmarks/timing.py).
GPU: CUDA events, and inputs that rotate through more memory than twice the L2 cache.

GB/s counts what has to be moved: every input read once and, forward + backward, the student's gradient written once; a
provider that moves more has fewer. "of copy" is the time of copying as many bytes, half of them read and half written,
measured in turn with the others; a forward pass, which only reads, can go beyond 100%. Peak: bytes that a call has at once
beyond its inputs, results included.

Loss linear_kl begins at hidden states, before the last linear layer, for the packages that fuse it with the loss (rows x
classes, 128 hidden). Extra `bench-peers` installs the other packages; each that is absent is left out with a line.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import machine, print_table, write_csv
from .accuracy import REGIMES, TAUS, Setting
from .accuracy import logits as regime_logits
from .losses import LOSSES, PROVIDERS, Call, Loss, Tensors, least_bytes
from .timing import ALLOCATION, PASSES, Run, copying, glibc, interleave, leaves, peak_memory, rotation, set_allocation, threads

TAU = 4.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The full set for the loss that most come for; of the others, one large, one middle, one small.
SHAPES = {
    "kl_div_tau": ("1024x32000", "256x128256", "4096x1000", "1024x100", "128x10"),
    "linear_kl": ("256x32000",),
    "": ("1024x32000", "4096x1000", "128x10"),
}
GPU_SHAPES = {
    "kl_div_tau": ("8192x128256", "8192x32000", "16384x4096", "65536x1000", "65536x100", "4096x10"),
    "linear_kl": ("8192x32000",),
    "": ("8192x32000", "65536x1000", "4096x10"),
}
QUICK_SHAPES = {"kl_div_tau": ("64x32000", "1024x100"), "linear_kl": ("64x4000",), "": ("1024x100",)}
QUICK_TAUS = (1.0, 1e3, math.inf)
MOST_CHECKED = 2**25  # pairs
ERROR_SHAPE = (64, 1003)
WRONG = 1e-2, 5e-2  # relative error of the loss, of the gradient
# kdfast's own limits, beyond which its time is void: the gradient's rounding in its dtype included.
LIMITS = {torch.float32: (5e-6, 2e-6), torch.bfloat16: (5e-6, 4e-3), torch.float16: (5e-6, 1e-3)}

Errors = tuple[float, float]
Record = dict[str, Any]
console = Console(stderr=True, highlight=False)


def sizes(shape: str) -> tuple[int, int]:
    """``"128x10"`` as (128, 10)."""
    rows, classes = map(int, shape.split("x"))
    return rows, classes


# ------------------------------------------------------------------------------------------------- correctness


def relative_errors(call: Call, loss: Loss, inputs: Tensors, truth: tuple[float, Tensors], scale: float = 1.0) -> Errors:
    """Of the loss and of the gradients together (L2). ``scale`` is the loss scale under which float16 gradients are taken."""
    arguments = leaves(inputs, loss.wanted)
    value = call(*arguments)
    gradients = torch.autograd.grad(value, [arguments[i] for i in loss.wanted], torch.full_like(value, scale))
    true_loss, true_gradients = truth
    wrong, size = 0.0, 0.0
    for got, true in zip(gradients, true_gradients, strict=True):
        for part, true_part in zip(got.split(4096), true.split(4096), strict=True):
            wrong += (part.cpu().double() / scale - true_part).square().sum().item()
            size += true_part.square().sum().item()
    return relative(abs(value.item() - true_loss), abs(true_loss)), relative(math.sqrt(wrong), math.sqrt(size))


def relative(difference: float, size: float) -> float:
    """Zero where both are (one class: the KL is 0)."""
    return difference / size if size else 0.0 if difference == 0 else math.inf


def loss_scale(dtype: torch.dtype, truth: tuple[float, Tensors]) -> float:
    """A power of two that brings float16 gradients near the middle of their range, as GradScaler does."""
    largest = max(gradient.abs().max().item() for gradient in truth[1])
    if dtype != torch.float16 or largest == 0:
        return 1.0
    return 2.0 ** min(15, math.floor(math.log2(1024 / largest)))


def is_wrong(errors: Errors) -> bool:
    """Whether a provider's answer is not the loss that was asked for."""
    return not all(error <= limit for error, limit in zip(errors, WRONG, strict=True))


def shapes(options: argparse.Namespace, loss: str) -> Sequence[str]:
    """Those of a loss."""
    default = options.default_shapes
    return options.shapes or default.get(loss, default[""])


class Benchmark:
    """What was asked for, and what was found."""

    def __init__(self, options: argparse.Namespace, progress: Progress) -> None:
        self.options, self.progress = options, progress
        self.device: torch.device = options.device
        self.times: list[Record] = []
        self.errors: list[Record] = []
        self.left_out: dict[tuple[str, str], str] = {}  # (provider, loss): why
        self.failed: dict[tuple[str, str, str], str] = {}  # (provider, loss, dtype): what it raised
        self.inaccurate: list[str] = []
        self.checked: dict[tuple[str, str, str], dict[str, Errors]] = {}

    def makers(self, loss: str, tau: float) -> Iterator[tuple[str, Call]]:
        """The requested providers of a loss."""
        for name in self.options.providers:
            if loss in PROVIDERS[name].losses:
                yield name, PROVIDERS[name].losses[loss](tau)

    def check(self, loss: str, calls: Mapping[str, Call], inputs: Tensors, on_device: Tensors, tau: float) -> dict[str, Errors]:
        """Each provider's errors; a provider that raises is left out, and what it said is kept."""
        truth = LOSSES[loss].truth(inputs, tau)
        dtype = inputs[0].dtype
        scale = loss_scale(dtype, truth)
        errors = {}
        for name, call in calls.items():
            try:
                errors[name] = relative_errors(call, LOSSES[loss], on_device, truth, scale)
            except Exception as error:
                said = (str(error).splitlines() or [""])[0]
                if name.startswith("kdfast") and isinstance(error, ValueError):  # a kernel that this build does not have
                    self.left_out[name, loss] = said
                else:
                    self.failed[name, loss, str(dtype).removeprefix("torch.")] = f"{type(error).__name__}: {said}"
        return errors

    def time(self, mode: str, loss: str, shape: str, dtype: str) -> None:
        """One case: every provider, forward + backward and forward alone."""
        set_allocation(mode)
        inputs = LOSSES[loss].inputs(*sizes(shape), DTYPES[dtype])
        sets = rotation(inputs, self.device)
        case = loss, shape, dtype
        calls = dict(self.makers(loss, TAU))
        if case not in self.checked:
            rows, classes = sizes(shape)
            checked = min(rows, max(1, MOST_CHECKED // classes))
            here, there = (tuple(x[:checked] if len(x) == rows else x for x in part) for part in (inputs, sets[0]))
            self.checked[case] = self.check(loss, calls, here, there, TAU)
            ours = [(n, e) for n, e in self.checked[case].items() if n.startswith("kdfast") and LOSSES[loss].of_logits]
            self.inaccurate += [
                f"{name} {loss} {shape} {dtype}"
                for name, errors in ours
                if not all(e <= limit for e, limit in zip(errors, LIMITS[DTYPES[dtype]], strict=True))
            ]
        errors = self.checked[case]
        if not errors:
            return
        for label, make in PASSES.items():
            size = least_bytes(loss, label, inputs)
            runs: dict[str, Run] = {name: make(calls[name], sets, LOSSES[loss].wanted) for name in errors}
            if size is not None:
                runs["copy"] = copying(size, self.device)
            timings = interleave(runs, self.options.rounds, self.device)
            for name, timing in timings.items():
                copy = name == "copy"
                self.times.append(
                    {
                        "loss": loss,
                        "pass": label,
                        "shape": shape,
                        "dtype": dtype,
                        "allocation": mode,
                        "threads": self.options.threads if self.device.type == "cpu" else "",
                        "provider": name,
                        "version": f"torch {torch.__version__}" if copy else PROVIDERS[name].version,
                        "median_ms": timing.median,
                        "quartile1_ms": timing.low,
                        "quartile3_ms": timing.high,
                        "page_faults": timing.faults,
                        "bytes": "" if size is None else size,
                        "gb_per_s": "" if size is None else 1e-6 * size / timing.median,
                        "percent_of_copy": "" if size is None else 100 * timings["copy"].median / timing.median,
                        "peak_bytes": "" if copy else peak_memory(runs[name], self.device),
                        "loss_error": "" if copy else errors[name][0],
                        "gradient_error": "" if copy else errors[name][1],
                        "wrong": "" if copy else is_wrong(errors[name]),
                    }
                )

    def error(self, dtype: str, tau: Setting) -> None:
        """kl_div_tau's errors at a temperature, where its logits are typical ones."""
        rows, classes = ERROR_SHAPE
        inputs = tuple(x.to(DTYPES[dtype]) for x in regime_logits(REGIMES["typical"], rows, classes, seed=0))
        calls = {n: c for n, c in self.makers("kl_div_tau", tau) if not math.isinf(tau) or n.startswith("kdfast")}
        found = self.check("kl_div_tau", calls, inputs, tuple(x.to(self.device) for x in inputs), tau)
        for name, (of_loss, of_gradient) in found.items():
            self.errors.append(
                {
                    "loss": "kl_div_tau",
                    "shape": f"{rows}x{classes}",
                    "dtype": dtype,
                    "tau": tau,
                    "provider": name,
                    "version": PROVIDERS[name].version,
                    "loss_error": of_loss,
                    "gradient_error": of_gradient,
                    "wrong": is_wrong((of_loss, of_gradient)),
                }
            )

    def run(self) -> None:
        """All cases."""
        options = self.options
        cases = [
            (mode, loss, shape, dtype)
            for mode, loss in itertools.product(options.allocation, options.losses)
            for shape, dtype in itertools.product(shapes(options, loss), options.dtypes)
        ]
        points = list(itertools.product(options.dtypes, options.taus)) if "kl_div_tau" in options.losses else []
        task = self.progress.add_task("", total=len(cases) + len(points))
        for dtype, tau in points:
            self.progress.update(task, description=f"error at tau = {tau:g}, {dtype}")
            self.error(dtype, tau)
            self.progress.advance(task)
        for case in cases:
            self.progress.update(task, description=" ".join(case[1:]))
            self.time(*case)
            self.progress.advance(task)


# ------------------------------------------------------------------------------------------------------- tables


def milliseconds(value: float) -> str:
    """Three digits."""
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def memory(size: object) -> str:
    """Bytes, in a unit that suits."""
    value = float(size)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def show_times(records: Sequence[Record]) -> None:
    """A table for each loss and way of allocation; a row for each provider of a case."""
    for loss, mode in dict.fromkeys((r["loss"], r["allocation"]) for r in records):
        mine = [r for r in records if (r["loss"], r["allocation"]) == (loss, mode)]
        rows = []
        for case in dict.fromkeys((r["shape"], r["dtype"], r["pass"]) for r in mine):
            group = {str(r["provider"]): r for r in mine if (r["shape"], r["dtype"], r["pass"]) == case}
            base = group.get("kdfast")
            for i, (name, r) in enumerate(group.items()):
                median = float(r["median_ms"])
                spread = (float(r["quartile3_ms"]) - float(r["quartile1_ms"])) / 2
                copy = name == "copy"
                rows.append(
                    [
                        *(case if i == 0 else ("", "", "")),
                        name,
                        f"{milliseconds(median)} ±{100 * spread / median:3.0f}%",
                        "" if base is None or copy else f"{median / float(base['median_ms']):.2f}",
                        "" if r["gb_per_s"] == "" else f"{r['gb_per_s']:.1f}",
                        "" if r["gb_per_s"] == "" else f"{r['percent_of_copy']:.0f}%",
                        "" if copy else memory(r["peak_bytes"]),
                        f"{r['page_faults']:.0f}",
                        "" if copy else f"{r['loss_error']:.0e} / {r['gradient_error']:.0e}",
                        "WRONG" if r["wrong"] is True else "",
                    ]
                )
        headers = ["shape", "dtype", "pass", "provider", "ms", "× kdfast", "GB/s", "of copy", "peak", "faults"]
        print_table(f"{loss}, allocation {mode}", [*headers, "error: loss / gradient", ""], rows)


def show_errors(records: Sequence[Record]) -> None:
    """A row for each temperature, a column for each provider."""
    for dtype in dict.fromkeys(r["dtype"] for r in records):
        mine = [r for r in records if r["dtype"] == dtype]
        names = list(dict.fromkeys(str(r["provider"]) for r in mine))
        cells = {(r["tau"], r["provider"]): f"{r['loss_error']:.0e} / {r['gradient_error']:.0e}" for r in mine}
        rows = [[f"{tau:g}", *(cells.get((tau, n), "—") for n in names)] for tau in dict.fromkeys(r["tau"] for r in mine)]
        print_table(
            f"kl_div_tau {mine[0]['shape']} {dtype}, relative error against float64: loss / gradient", ["tau", *names], rows
        )


# ----------------------------------------------------------------------------------------------------- the command


def shape_of(text: str) -> str:
    """A shape such as 1024x32000."""
    try:
        rows, classes = sizes(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ROWSxCLASSES, such as 1024x32000") from None
    if rows < 1 or classes < 1:
        raise argparse.ArgumentTypeError(f"rows and classes must be at least 1, got {text}")
    return text


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, and what they leave open."""
    parser = argparse.ArgumentParser(prog="kdfast-bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="few shapes, float32, reused memory: a minute")
    parser.add_argument("--device", type=torch.device, help="default: the GPU where there is one")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default %(default)s)")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, help="default: all, linear_kl if a package has it")
    parser.add_argument("--shapes", type=shape_of, nargs="+", metavar="BxK", help="for all losses (default: see run.py)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--taus", type=float, nargs="*", help="of the table of errors (none: leave it out)")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS), help="default: all there are")
    parser.add_argument("--allocation", nargs="+", choices=ALLOCATION, help="on the CPU (default: reused and fresh)")
    parser.add_argument("--rounds", type=int, help="least readings of a figure (default 7; 5 with --quick)")
    parser.add_argument("--out", type=Path, default=Path("kdfast-bench"), help="folder of CSV and plots (default %(default)s)")
    options = parser.parse_args(argv)
    for name in ("threads", "rounds"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1; got {value}")
    for tau in options.taus or ():
        if not (1e-15 <= tau <= 1e15 or tau == math.inf):
            parser.error(f"--taus must be from 1e-15 to 1e15, or inf; got {tau}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)  # now: not after minutes of measuring
    except OSError as error:
        parser.error(f"--out cannot be written: {error}")
    options.device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = options.device.type == "cuda"
    options.default_shapes = QUICK_SHAPES if options.quick else GPU_SHAPES if on_gpu else SHAPES
    options.dtypes = options.dtypes or (["float32"] if options.quick else ["float32", "bfloat16"])
    if options.taus is None:
        options.taus = QUICK_TAUS if options.quick else TAUS
    options.rounds = options.rounds or (5 if options.quick else 7)
    wanted = options.allocation or (["reused"] if options.quick else ["reused", "fresh"])
    options.allocation = [mode for mode in ALLOCATION if mode in wanted] if glibc() and not on_gpu else ["default"]
    return options


def available(options: argparse.Namespace) -> None:
    """Leaves out the providers that cannot run here, with a line each."""
    named = []
    for name in options.providers:
        missing = PROVIDERS[name].missing(options.device)
        if missing is None:
            named.append(name)
        else:
            console.print(f"left out: {name}: {missing}")
    options.providers = named
    if options.losses is None:
        peers = [n for n in named if "linear_kl" in PROVIDERS[n].losses and "logit_mse" not in PROVIDERS[n].losses]
        options.losses = [loss for loss in LOSSES if loss != "linear_kl" or peers]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 when kdfast was inaccurate or raised."""
    options = parse(argv)
    from .figures import draw  # (now, since matplotlib may be missing)

    available(options)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        benchmark = Benchmark(options, progress)
        try:
            with threads(options.threads), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the other packages, about this machine
                benchmark.run()
        except KeyboardInterrupt:
            console.print("interrupted: this is what was measured until then")
        finally:
            set_allocation("default")

    show_errors(benchmark.errors)
    show_times(benchmark.times)
    for (name, loss), said in benchmark.left_out.items():
        print(f"left out: {name} {loss}: {said}")
    for (name, loss, dtype), said in benchmark.failed.items():
        print(f"failed: {name} {loss} {dtype}: {said}")
    about = machine(options.device)
    threads_used = "" if options.device.type == "cuda" else f"; {options.threads} thread{'s' * (options.threads > 1)}"
    print(about + threads_used)
    noisy = sum(r["quartile3_ms"] - r["quartile1_ms"] > 0.4 * r["median_ms"] for r in benchmark.times)
    if noisy:
        print(f"Spread over 20% in {noisy} of {len(benchmark.times)} figures: repeat on a quiet machine.")
    if load > 0.5:
        print(f"The machine was busy before the start (load average {load:.1f}): repeat on a quiet one.")
    if benchmark.inaccurate:
        print("Inaccurate, so that its times mean nothing: " + "; ".join(benchmark.inaccurate))
    for name, records in (("speed", benchmark.times), ("error", benchmark.errors)):
        if records:
            write_csv(options.out / f"{name}.csv", records, options.device)
    draw(options.out)
    return 1 if benchmark.inaccurate or any(name.startswith("kdfast") for name, *_ in benchmark.failed) else 0


if __name__ == "__main__":
    raise SystemExit(main())
