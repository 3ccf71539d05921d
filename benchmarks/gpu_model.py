"""What the GPU kernels must cost at least, counted where there is no GPU: modelled, not measured.

Runs one step of each loss on a PTX emulator that the environment variable KDFAST_GPU_EMULATOR names (a launcher,
``LAUNCHER run --stats FILE -- COMMAND``, that leaves one JSON object a kernel launch in FILE) and counts, a pair of logits:
bytes that a launch touches, each once, and those its threads ask for, which caches may serve; instructions (PTX, one for
each thread of an issued warp); results of the special-function units; registers of the kernel that takes most.

The bound of a GPU is the sum over a step's launches of the largest of three times: bytes touched over the data sheet's
bandwidth, instructions over four warps a clock and multiprocessor, special-function results over 16 a clock and
multiprocessor. A real kernel is slower: latency, occupancy, bank conflicts and launches are not in the model, and what
the instructions become on another GPU is not either (they are counted once, for compute capability 9.0).

Liger-Kernel's two kernels for this loss, where it is installed, are launched by themselves: the softmaxes that it leaves
to PyTorch before them (and the gradient of one after the first) are not counted, at least 4 bytes a pair of bfloat16 each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import _C

from . import machine, print_table, write_csv
from .losses import LOSSES, PROVIDERS, Tensors
from .run import TAU, relative_errors, shape_of, sizes

DTYPE = torch.bfloat16
SHAPES = ("16x1000", "8x4096", "2x32000", "1x128256")
LIGER_KERNELS = "liger kl_div", "liger kl_loss_and_grad"


@dataclass(frozen=True)
class Gpu:
    """From its data sheet: bytes a second, multiprocessors, clock."""

    bandwidth: float
    multiprocessors: int
    hertz: float

    def bound(self, touched: float, issued: float, special: float) -> tuple[float, str]:
        """The least seconds of a launch, and what sets them."""
        rate = self.multiprocessors * self.hertz
        return max((touched / self.bandwidth, "memory"), (issued / (128 * rate), "issue"), (special / (16 * rate), "special"))


GPUS = {
    "A100": Gpu(1.555e12, 108, 1.41e9),
    "H100": Gpu(3.35e12, 132, 1.755e9),
    "B200": Gpu(8.0e12, 148, 1.85e9),
}

# ------------------------------------------------------------------------------- in the process on the emulated GPU

Step = Callable[[], None]


def steps(shape: str) -> Iterator[tuple[str, str, str, Step, Callable[[], None]]]:
    """(provider, loss, pass, a step, its check) of every kernel of kdfast."""
    for (provider, loss), label in ((c, p) for c in kdfast_cases() for p in ("fwd", "fwd+bwd")):
        inputs = LOSSES[loss].inputs(*sizes(shape), DTYPE)
        on_device = tuple(x.to("cuda") for x in inputs)
        yield provider, loss, label, *one(provider, loss, label, inputs, on_device)


def kdfast_cases() -> Iterator[tuple[str, str]]:
    """Its backends and losses."""
    for provider in ("kdfast", "kdfast-triton"):
        for loss in LOSSES:
            if LOSSES[loss].of_logits:
                yield provider, loss


def one(provider: str, loss: str, label: str, inputs: Tensors, on_device: Tensors) -> tuple[Step, Callable[[], None]]:
    """A step as in training, PyTorch's own kernels left out: the gradient of the loss comes from the host."""
    call = PROVIDERS[provider].losses[loss](TAU)
    grad_loss = torch.ones(()).to("cuda")

    def step() -> None:
        student = on_device[0].detach().requires_grad_(label == "fwd+bwd")
        value = call(student, *on_device[1:])
        if label == "fwd+bwd":
            torch.autograd.grad(value, student, grad_loss)

    def check() -> None:
        within(provider, loss, relative_errors(call, LOSSES[loss], on_device, LOSSES[loss].truth(inputs, TAU)))

    return step, check


def within(provider: str, loss: str, errors: Sequence[float], limits: Sequence[float] = (5e-6, 4e-3)) -> None:
    """What is counted must be the loss."""
    if not all(error <= limit for error, limit in zip(errors, limits, strict=True)):
        raise SystemExit(f"{provider} computed another loss than {loss}: relative errors {errors}")


def liger_steps(shape: str) -> Iterator[tuple[str, str, str, Step, Callable[[], None]]]:
    """Liger's kernels on what PyTorch would hand them, made on the CPU."""
    from liger_kernel.ops import kl_div as liger
    from liger_kernel.ops.backends._triton.kl_div import kl_loss_and_grad_triton

    inputs = LOSSES["kl_div_tau"].inputs(*sizes(shape), DTYPE)
    rows, classes = inputs[0].shape
    log_q, log_p = (F.log_softmax(x.float() / TAU, -1).to(DTYPE).to("cuda") for x in inputs)
    target = F.softmax(inputs[1].float() / TAU, -1).to(DTYPE).to("cuda")
    gradient, losses = torch.empty_like(log_p), torch.empty(rows, device="cuda")
    block = min(liger.MAX_FUSED_SIZE, 1 << (classes - 1).bit_length())
    options = {"BLOCK_SIZE": block, "num_warps": liger.get_num_warps(block), "log_target": True}
    logits = inputs[0].to("cuda")
    results: dict[str, Tensor] = {}

    def forward() -> None:
        mode = liger._str_to_reduction_mode["batchmean"]
        pointers = (log_q, log_q.stride(0), log_p, log_p.stride(0), losses, losses.stride(0))
        liger._kldiv_kernel_forward[(rows,)](*pointers, classes, eps=1e-10, reduction=mode, **options)
        results["separate"] = losses

    def both() -> None:
        forward()
        liger._kldiv_kernel_backward[(rows,)](log_p, log_p.stride(0), gradient, gradient.stride(0), classes, **options)

    def fused() -> None:
        logits.copy_(inputs[0])  # its gradient overwrites them
        results["fused"], _ = kl_loss_and_grad_triton(logits, target, None, -100, TAU, 1e-10, 1.0)

    def check(name: str) -> Callable[[], None]:
        def compare() -> None:
            true = LOSSES["kl_div_tau"].truth(inputs, TAU)[0]
            got = results[name].cpu().double().sum().item() / rows * TAU**2
            within(f"liger {name}", "kl_div_tau", (abs(got - true) / true,), (0.5,))  # bfloat16 probabilities

        return compare

    yield LIGER_KERNELS[0], "kl_div_tau", "fwd", forward, check("separate")
    yield LIGER_KERNELS[0], "kl_div_tau", "fwd+bwd", both, check("separate")
    yield LIGER_KERNELS[1], "kl_div_tau", "fwd+bwd", fused, check("fused")


def triton_registers() -> Callable[[], dict[str, int]]:
    """Watches Triton's launches from now on; the returned function has the registers a thread of each kernel."""
    try:
        from triton.runtime.jit import JITFunction
    except ModuleNotFoundError:
        return dict
    run, cubins = JITFunction.run, {}

    def watched(self: JITFunction, *arguments: object, **options: object) -> object:
        kernel = run(self, *arguments, **options)
        cubins.setdefault((self.__name__, kernel.asm["cubin"]), None)
        return kernel

    JITFunction.run = watched

    def registers() -> dict[str, int]:
        found: dict[str, int] = {}
        for name, cubin in cubins:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(cubin)
                file.flush()
                found[name] = max([found.get(name, 0), *(used for _, used in resource_usage(file.name))])
        cubins.clear()
        return found

    return registers


def resource_usage(path: str) -> list[tuple[str, int]]:
    """(mangled name, registers) of the kernels in a file; empty without cuobjdump, which Triton ships."""
    tools = [p for root in sys.path for p in Path(root).glob("triton/backends/nvidia/bin/cuobjdump")]
    tool = str(tools[0]) if tools else shutil.which("cuobjdump")
    if tool is None:
        return []
    text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return [(name, int(used)) for name, used in re.findall(r"Function (\S+):\s+REG:(\d+)", text)]


def emulate(counts: Path, shapes: Sequence[str]) -> None:
    """Runs every step twice and prints a line for each, with the lines of ``counts`` that are the second's."""

    def launches() -> int:
        return counts.read_text().count("\n") if counts.exists() else 0

    registers = triton_registers()
    for shape in shapes:
        for source in (steps, liger_steps):
            try:
                for provider, loss, label, step, check in source(shape):
                    try:
                        step()  # compiles, chooses configurations
                    except ValueError as error:  # kdfast says what this build does not have
                        tell(left_out=f"{provider} {loss}: {str(error).split(';')[0]}")
                        continue
                    registers()
                    begin = launches()
                    step()
                    end = launches()
                    check()
                    tell(provider=provider, loss=loss, call=label, shape=shape, begin=begin, end=end, registers=registers())
            except ImportError as error:
                tell(left_out=f"liger: {error}")


def tell(**what: object) -> None:
    """A line for the process that counts."""
    print(json.dumps(what), flush=True)


# ----------------------------------------------------------------------------------------- in the process that counts


def cuda_registers() -> dict[str, int]:
    """Of the C++ kernels in this build, by their names as the emulator writes them."""
    usage = resource_usage(_C.__file__)
    demangle = shutil.which("c++filt")
    if not usage or demangle is None:
        return {}
    names = subprocess.run([demangle], input="\n".join(n for n, _ in usage), capture_output=True, text=True, check=True).stdout
    found: dict[str, int] = defaultdict(int)
    for name, (_, used) in zip(names.splitlines(), usage, strict=True):
        found[name] = max(found[name], used)  # more than one architecture
    return found


def count(launcher: str, shapes: Sequence[str]) -> list[dict[str, object]]:
    """Every case's counts, a pair."""
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts.json"
        child = [sys.executable, "-m", f"{__package__}.gpu_model", "--count-into", str(counts), "--shapes", *shapes]
        environment = {**os.environ, "TRITON_INTERPRET": "0"}
        done = subprocess.run(
            [launcher, "run", "--stats", str(counts), "--", *child], env=environment, stdout=subprocess.PIPE, text=True
        )
        if done.returncode != 0:
            raise SystemExit(f"{launcher} ended with {done.returncode}\n{done.stdout[-2000:]}")
        cases = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        launches = [json.loads(line) for line in counts.read_text().splitlines()]
    for said in dict.fromkeys(case["left_out"] for case in cases if "left_out" in case):
        print(f"left out: {said}")
    of_cuda = cuda_registers()
    records = []
    for case in cases:
        if "left_out" in case:
            continue
        step = launches[case["begin"] : case["end"]]
        registers = [of_cuda.get(x["kernel"]) or case["registers"].get(x["kernel"], 0) for x in step]
        pairs = math.prod(sizes(case["shape"]))
        record = {name: case[name] for name in ("provider", "loss", "call", "shape")}
        record["launches"] = len(step)
        total: dict[str, float] = defaultdict(float)
        bounds: dict[str, dict[str, float]] = {name: defaultdict(float) for name in GPUS}
        for x in step:
            touched = x["unique_load_bytes"] + x["unique_store_bytes"]
            issued, special = 32 * x["warp_instructions"], x["thread_mufu"]
            total["bytes"] += touched
            total["bytes_requested"] += x["load_bytes"] + x["store_bytes"]
            total["instructions"] += issued
            total["special_results"] += special
            for name, gpu in GPUS.items():
                seconds, by = gpu.bound(touched, issued, special)
                bounds[name][by] += seconds
        record |= {name: value / pairs for name, value in total.items()}
        record["registers"] = max(registers, default=0) or ""
        for name, by in bounds.items():
            record[f"modelled_ps_{name}"] = 1e12 * sum(by.values()) / pairs
            record[f"bound_by_{name}"] = max(by, key=lambda what: by[what])
        records.append(record)
    return records


def show(records: Sequence[dict[str, object]]) -> None:
    """A table for each loss."""
    for loss in dict.fromkeys(r["loss"] for r in records):
        rows = [
            [
                str(r["provider"]),
                str(r["call"]),
                str(r["shape"]),
                str(r["launches"]),
                *(f"{r[name]:.2f}" for name in ("bytes", "bytes_requested", "instructions", "special_results")),
                str(r["registers"]),
                *(f"{r[f'modelled_ps_{gpu}']:.2f} {r[f'bound_by_{gpu}']}" for gpu in GPUS),
            ]
            for r in records
            if r["loss"] == loss
        ]
        headers = ["provider", "pass", "shape", "launches", "bytes", "requested", "instructions", "special", "registers"]
        title = (
            f"{loss}, bfloat16, a pair of logits, counted on an emulated GPU; least picoseconds a pair, MODELLED, not measured"
        )
        print_table(title, [*headers, *GPUS], rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Count, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_model", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", type=shape_of, nargs="+", metavar="BxK", default=list(SHAPES))
    parser.add_argument("--out", type=Path, help="folder for gpu_model.csv")
    parser.add_argument("--count-into", type=Path, help=argparse.SUPPRESS)  # the process on the emulated GPU
    options = parser.parse_args(argv)
    if options.count_into:
        emulate(options.count_into, options.shapes)
        sys.stdout.flush()
        os._exit(0)  # the emulator's threads may still be there
    launcher = os.environ.get("KDFAST_GPU_EMULATOR")
    if not launcher:
        parser.error("KDFAST_GPU_EMULATOR names no launcher of a GPU emulator")
    records = count(launcher, options.shapes)
    show(records)
    print(f"Modelled, not measured. {machine()}")
    if options.out:
        write_csv(options.out / "gpu_model.csv", records)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
