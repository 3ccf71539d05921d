"""The Triton kernels: in Triton's interpreter, compiled for GPUs that are not there, and compiled on an emulated GPU.

Each run is a process of its own (triton_runs.py), since Triton decides at its import what it runs on.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdfast

RUNS = Path(__file__).with_name("triton_runs.py")
EMULATOR = os.environ.get("KDFAST_GPU_EMULATOR")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(*arguments: str, launcher: tuple[str, ...] = (), **environment: str) -> list[str]:
    """The lines that a run printed. Its failure is this test's."""
    command = [*launcher, sys.executable, str(RUNS), *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-1000:]}\n{done.stderr[-4000:]}"
    lines = done.stdout.splitlines()
    assert lines[-1] == "done"
    return lines[:-1]


def test_import_leaves_triton_alone() -> None:
    code = "import sys, kdfast; assert not any(m.split('.')[0] == 'triton' for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_refusals_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from kdfast import functional

    logits = torch.zeros(2, 3)
    monkeypatch.setattr(functional, "TRITON_INTERPRETED", False)
    monkeypatch.setattr(functional, "HAS_TRITON", True)
    with pytest.raises(ValueError, match="takes a GPU"):
        kdfast.kl_div_tau(logits, logits, backend="triton")
    monkeypatch.setattr(functional, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="pip install triton"):
        kdfast.logit_mse(logits, logits, backend="triton")


@needs_triton
def test_interpreter() -> None:
    run("interpreter", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@needs_triton
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiles_without_a_gpu(capability: int) -> None:
    kernels = [json.loads(line) for line in run("compile", str(capability), TRITON_INTERPRET="0")]
    for kernel in kernels:
        print(kernel)  # registers: pytest -s, or the report of a failure
        # a thread of a block of n warps has 64k / (32 n) registers
        assert 0 < kernel["registers"] <= min(255, 65536 // (32 * kernel["warps"]))
    if capability >= 90:
        assert [kernel for kernel in kernels if kernel["spilled"]] == []


# Bytes that a step's launches touch, each byte once a launch, per pair of bf16 logits: what the L2 cache serves is not counted twice.
FORWARD, RESIDENT, BEYOND = 4.1, 6.2, 10.2
BOTH = 8.2  # gradients, where the row is resident


@needs_triton
@pytest.mark.skipif(not EMULATOR, reason="KDFAST_GPU_EMULATOR names no GPU emulator")
def test_on_an_emulated_gpu(tmp_path: Path) -> None:
    stats = tmp_path / "stats.json"
    launcher = (str(EMULATOR), "run", "--stats", str(stats), "--")
    cases = [json.loads(line) for line in run("emulator", str(stats), launcher=launcher, TRITON_INTERPRET="0")]
    launches = [json.loads(line) for line in stats.read_text().splitlines()]
    bytes_moved = {}
    for (k, pair, pairs, grads, begin), (*_, end) in itertools.pairwise(cases):
        step = launches[begin:end]  # the forward and, with gradients, the backward
        moved = sum(launch["unique_load_bytes"] + launch["unique_store_bytes"] for launch in step) / pairs
        issued = sum(launch["thread_instructions"] for launch in step) / pairs
        print(f"K = {k} {pair} {grads!r}: {moved:.2f} bytes, {issued:.1f} instructions a pair, {len(step)} launches")
        resident = {"": FORWARD, "centred": FORWARD, "s": RESIDENT, "st": BOTH}
        if pair.startswith("bf16") and grads in resident:
            limit = BEYOND if grads == "s" and k > 32000 else resident[grads]
            assert moved <= limit, (k, grads, moved)
        bytes_moved[k, pair, grads] = moved
    for (k, pair, grads), moved in bytes_moved.items():
        if grads.startswith("kd") and k >= 1000:  # a row's target and its three sums are not nothing beside ten classes
            assert moved <= 1.02 * bytes_moved[k, pair, "s"], (k, pair, moved)
    assert {k for k, *_ in cases} >= {10, 1000, 1003, 4096, 32000, 128256}
