"""Which of a few tiles a kernel takes, where registers and the number of classes leave a choice: the fastest on the device at hand.

The first call of a kind that fills a GPU measures them on scratch outputs; what it finds holds for the rest of the process, so that the
same input keeps giving the same bits. A call that must not measure, and any call with KDFAST_TRITON_AUTOTUNE=0, with
`torch.use_deterministic_algorithms(True)` or in Triton's interpreter, takes the first of the list.
"""

import os
import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

# What is measured: fewer rows leave multiprocessors idle, fewer pairs of logits are gone before a launch is; more tell nothing new.
LEAST_ROWS, LEAST_PAIRS = 128, 1 << 19
MOST_ROWS, MOST_PAIRS = 4 * LEAST_ROWS, 1 << 24  # one of the two may be exceeded


class Tile(NamedTuple):
    """What a program computes at a time, and the warps that do."""

    rows: int
    classes: int
    warps: int


def _enabled() -> bool:
    value = os.environ.get("KDFAST_TRITON_AUTOTUNE") or "1"
    if value not in ("0", "1"):
        raise ValueError(f"the environment variable KDFAST_TRITON_AUTOTUNE must be 0 or 1; got {value!r}")
    return value == "1" and not knobs.runtime.interpret


ENABLED = _enabled()
_chosen: dict[Hashable, Tile] = {}
_lock = threading.Lock()


def rows_to_measure(rows: int, classes: int) -> int:
    """How many of a call's rows; 0 for a call that is too small to tell."""
    if rows < LEAST_ROWS or rows * classes < LEAST_PAIRS:
        return 0
    return min(rows, max(MOST_ROWS, MOST_PAIRS // classes))


def choose(key: Hashable, tiles: tuple[Tile, ...], trial: Callable[[], Callable[[Tile], Any]]) -> Tile:
    """One of `tiles`, always the same for a key. trial() returns a function that launches the kernel with a tile and changes nothing
    that anybody sees."""
    if len(tiles) == 1 or not ENABLED or torch.are_deterministic_algorithms_enabled():
        return tiles[0]
    tile = _chosen.get(key)
    if tile is None:
        with _lock:
            tile = _chosen.get(key)
            if tile is None:
                tile = _chosen[key] = _fastest(tiles, trial) if _may_measure() else tiles[0]
    return tile


def _may_measure() -> bool:
    """Not where the host must not wait for the device, nor while a program is traced."""
    return not (torch.cuda.is_current_stream_capturing() or torch.compiler.is_compiling())


def _fastest(tiles: tuple[Tile, ...], trial: Callable[[], Callable[[Tile], Any]]) -> Tile:
    try:
        launch = trial()
        times = [_time(lambda tile=tile: launch(tile)) for tile in tiles]
    except torch.OutOfMemoryError:  # for scratch outputs, or for what empties the L2 cache between launches
        return tiles[0]
    return tiles[times.index(min(times))]


def _time(call: Callable[[], Any]) -> float:
    """Milliseconds, the median."""
    try:
        time, *_ = driver.active.get_benchmarker()(call, quantiles=(0.5, 0.2, 0.8))
    except OutOfResources:  # a device with less shared memory or fewer threads a program
        return float("inf")
    return float(time)
