"""How it is measured: calls that take turns, memory that is fresh or reused, the peak beyond the inputs.

On the CPU what "allocation" means is set by glibc's ``mallopt``, the same for every provider, without touching the losses:

``fresh``   every block of 128 KiB or more comes from the kernel and goes back to it: its pages are faulted in anew;
``default`` the state glibc settles in by itself in a long run: blocks up to 32 MiB are reused, larger ones are fresh;
``reused``  freed memory stays in the process (no mmap, no trimming), so the gradient of a step lands in the block of
            the step before, and everybody's temporaries are reused as well.

They run in this order, since a block once in the heap is reused whatever its size. On a platform without mallopt only
``default`` is there, as the platform has it. On a GPU, PyTorch's allocator reuses memory: only ``default``.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .losses import Call, Tensors

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

Run = Callable[[], object]

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


def peak_memory(run: Run, device: torch.device) -> int:
    """Bytes that a call has at once beyond what was there before it, its results included."""
    if device.type == "cuda":
        run()
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.autograd.profiler.profile(use_kineto=True, profile_memory=True) as profiler:
        run()
    changes = (event.nbytes() for event in profiler.kineto_results.events() if event.name() == "[memory]")
    return max(itertools.accumulate(changes, initial=0))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch on this many threads, and this process on as many cores, where the platform can; both put back at the end."""
    before = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    torch.set_num_threads(count)
    if cores:
        os.sched_setaffinity(0, sorted(cores)[-count:])  # interrupts prefer the first
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if cores:
            os.sched_setaffinity(0, cores)


# ------------------------------------------------------------------------------------------------------ timing

MOST_ROUNDS = 51
MOST_SETS = 256


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call: median and quartiles over the rounds; pages faulted in by a call."""

    median: float
    low: float
    high: float
    faults: float


def summary(values: Sequence[float], faults: float) -> Timing:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return Timing(median, low, high, faults)


def rotation(inputs: Tensors, device: torch.device) -> list[Tensors]:
    """The inputs on the device; on a GPU as many copies as together are larger than twice its L2 cache, for calls in turn."""
    first = tuple(x.to(device) for x in inputs)
    if device.type != "cuda":
        return [first]
    size = sum(x.numel() * x.element_size() for x in inputs)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = min(MOST_SETS, math.ceil(2 * cache / size))
    return [first, *(tuple(x.to(device) for x in inputs) for _ in range(count - 1))]


def forward(call: Call, sets: Sequence[Tensors], wanted: Sequence[int]) -> Run:
    """The loss alone, no gradient wanted."""
    turn = itertools.cycle(sets)

    def run() -> None:
        with torch.no_grad():
            call(*next(turn))

    return run


def step(call: Call, sets: Sequence[Tensors], wanted: Sequence[int]) -> Run:
    """The loss and the gradients, which are dropped: as in training, where they are passed on and die before the next step."""
    turn = itertools.cycle([leaves(inputs, wanted) for inputs in sets])

    def run() -> None:
        inputs = next(turn)
        torch.autograd.grad(call(*inputs), [inputs[i] for i in wanted])

    return run


def leaves(inputs: Tensors, wanted: Sequence[int]) -> Tensors:
    """The same memory; those that are wanted require a gradient."""
    return tuple(x.detach().requires_grad_(i in wanted) for i, x in enumerate(inputs))


PASSES = {"fwd+bwd": step, "fwd": forward}


def copying(size: int, device: torch.device) -> Run:
    """A copy that moves ``size`` bytes, half of them read and half of them written, from one of as many places as inputs have."""
    source = torch.zeros(max(1, size // 8))  # of 4 bytes
    turn = itertools.cycle([(torch.empty_like(x), x) for (x,) in rotation((source,), device)])

    def run() -> None:
        target, source = next(turn)
        target.copy_(source)

    return run


def reading(run: Run, count: int, device: torch.device) -> float:
    """Seconds of ``count`` calls: on a GPU between two events of its stream."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)
    start = time.perf_counter()
    for _ in range(count):
        run()
    return time.perf_counter() - start


def interleave(calls: dict[str, Run], rounds: int, device: torch.device, batch_ms: float = 2.0) -> dict[str, Timing]:
    """Time the calls in turn. Short ones are repeated until a reading takes ``batch_ms`` or so, and read more often."""
    repeats = {}
    round_ms = 0.0
    for name, run in calls.items():
        run()
        once = reading(run, 2, device) / 2
        repeats[name] = max(1, math.ceil(1e-3 * batch_ms / max(once, 1e-9)))
        round_ms += 1e3 * once * repeats[name]
    rounds = max(rounds, min(MOST_ROUNDS, int(500 / round_ms)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    faults = dict.fromkeys(calls, 0)
    order = list(calls)
    for _ in range(rounds):
        for name in order:
            before = page_faults()
            seconds[name].append(reading(calls[name], repeats[name], device) / repeats[name])
            faults[name] += page_faults() - before
        order.append(order.pop(0))  # nobody always follows the same neighbour
    return {name: summary([1e3 * s for s in values], faults[name] / rounds / repeats[name]) for name, values in seconds.items()}
