"""Every instruction set this machine has: the accuracy and semantics tests again, each in a process of its own.

KDFAST_CPU_ISA is read once, when kdfast is imported.  The set chosen by default is what the rest of the suite has tested; the
others run the tests that depend on the kernels' text, with the float types their vectors differ in.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from kdfast import _C

HERE = pathlib.Path(__file__).parent
INFO = _C.build_info()
SELECTED = {
    # whole tables: all widths (tails of every vector length), temperatures and regimes (the other types: below)
    "test_accuracy.py": "cpp and not fp32-bf16 and not bf16-fp32 and not fp16 and not fp64 and not two_temperatures",
    # the paths with masks, strides and odd values; no process-wide tests (memory, threads), they do not depend on the
    # set
    "test_semantics.py": "cpp and ("
    + " or ".join(
        ("minus_inf", "nan", "num_classes", "strided", "weight_zero", "grad_output", "inplace_backward_writes", "dtypes")
    )
    + ")",
    # the hard part beside the sums and in the gradient
    "test_kd_loss.py": "cpp and (test_accuracy or small_share or far_below or masked_classes or nan_stays) "
    "and not fp16 and not fp64 and not fp32-bf16 and not bf16-fp32",
}


def test_the_widest_set_is_the_default() -> None:
    if not os.environ.get("KDFAST_CPU_ISA"):
        assert INFO["cpu_isa"] == INFO["cpu_isas"][-1]
    assert "baseline" in INFO["cpu_isas"]


@pytest.mark.parametrize("isa", [name for name in INFO["cpu_isas"] if name != INFO["cpu_isa"]])
def test_isa(isa: str) -> None:
    env = os.environ | {"KDFAST_CPU_ISA": isa}
    code = "from kdfast import _C; print(_C.build_info()['cpu_isa'])"
    shown = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout.strip()
    assert shown == isa
    for file, expression in SELECTED.items():
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / file), "-k", expression]
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=HERE.parent)
        tail = done.stdout[-3000:] + done.stderr[-1000:]
        assert done.returncode == 0 and " passed" in done.stdout, f"{isa}, {file}:\n{tail}"
