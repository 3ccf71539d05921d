"""The CUDA kernels beyond the device-parametrised tests: every class of row length, odd starts, launches, traffic, registers.

With no GPU, under an emulator of one: KDFAST_GPU_EMULATOR names its launcher (`LAUNCHER run [--stats FILE] -- COMMAND`),
see .ci/run. PyTorch's own CUDA kernels need not run there: tensors are made and compared on the CPU.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import on_host
import pytest
import torch
from helpers import BF16, F16, F32, F64, INF, Where
from torch import Tensor

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(Where("cuda", "cpp") not in helpers.places(), reason="no CUDA device with kernels of kdfast"),
]
CUDA = Where("cuda", "cpp")

# A length for each class of csrc/cuda/row_reduce.cu: part of a warp, a warp, a block, clusters of 2 to 16, the largest cluster,
# slices merged by a second kernel.
LENGTHS = (1, 7, 10, 100, 1000, 1003, 4096, 16384, 32000, 50257, 128256, 151936, 270000)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("k", LENGTHS)
def test_every_row_length(k: int, dtype: torch.dtype) -> None:
    n = 5 if k < 5000 else 2
    weight = torch.tensor([1.0, 0.5, 0, 2, 1][:n])
    for tau, regime, grads in ((4.0, "typical", "s"), (1.0, "far", "st")):
        s, t = helpers.logits(regime, (n, k), (dtype, dtype))
        helpers.check(CUDA, "kl_div_tau", s, t, tau=tau, grads=grads, row_weight=weight, reduction="mean")
    s, t = helpers.logits("offset", (n, k), (dtype, dtype))
    helpers.check(CUDA, "logit_mse", s, t)
    helpers.check(CUDA, "logit_mse", s, t, center=True, grads="st", row_weight=weight)
    for kind in ("pseudo", "smooth_l1"):
        helpers.check(CUDA, "logit_huber", s, t, kind=kind, delta=30.0)
        helpers.check(CUDA, "logit_huber", s, t, kind=kind, delta=0.5, grads="st", center=True, row_weight=weight)
    for soft, grads in (("kl", "s"), ("mse", "st")):
        helpers.check(CUDA, "kd_loss", s, t, soft=soft, grads=grads, row_weight=weight, label_smoothing=0.1)


losses = pytest.mark.parametrize(
    "name, options",
    [
        ("kl_div_tau", {"tau": 2.0}),
        ("kl_div_tau", {"tau": INF}),
        ("logit_mse", {"center": True}),
        ("logit_huber", {"delta": 0.7}),
        ("kd_loss", {"tau": 2.0, "label_smoothing": 0.1}),
        ("kd_loss", {"soft": "mse"}),
    ],
)
reductions = pytest.mark.parametrize("reduction", ["none", "mean"])


@reductions
@losses
def test_gradcheck(name: str, options: dict[str, Any], reduction: str) -> None:
    """The inputs are moved inside the function, so that finite differences are taken on the CPU."""
    s, t = (x.requires_grad_() for x in helpers.logits("typical", (2, 5), (F64, F64)))
    options = options | {"reduction": reduction, "row_weight": torch.tensor([1.0, 0.5])}
    for sides in ((s, t), (s, t.detach())):
        assert torch.autograd.gradcheck(lambda s, t: CUDA.call(name, s.cuda(), t.cuda(), **options).cpu(), sides)


@reductions
@losses
def test_gradgradcheck(name: str, options: dict[str, Any], reduction: str) -> None:
    s, t = (x.cuda().requires_grad_() for x in helpers.logits("typical", (2, 3), (F64, F64)))
    options = options | {"reduction": reduction, "row_weight": torch.tensor([1.0, 0.5])}
    with on_host.where_needed():
        for sides in ((s, t), (s, t.detach())):
            assert torch.autograd.gradcheck(lambda s, t: CUDA.call(name, s, t, **options), sides)
            assert torch.autograd.gradgradcheck(lambda s, t: CUDA.call(name, s, t, **options), sides)


@pytest.mark.parametrize("pair", [(F16, F16), (F32, BF16), (BF16, F32), (BF16, F16), (F64, F64), (F64, BF16)], ids=str)
@pytest.mark.parametrize("k", [10, 1003, 9001])
def test_every_mixture(k: int, pair: tuple[torch.dtype, torch.dtype]) -> None:
    s, t = helpers.logits("typical", (3, k), pair)
    for tau in (0.5, 20.0, INF):
        helpers.check(CUDA, "kl_div_tau", s, t, tau=tau, grads="st")
    helpers.check(CUDA, "kl_div_tau", s, t, tau=2.0, teacher_tau=3.0)
    for kind in ("pseudo", "smooth_l1"):
        helpers.check(CUDA, "logit_huber", s, t, kind=kind, grads="st")
        helpers.check(CUDA, "logit_huber", s, t, kind=kind, center=True)
    if helpers.widens_by_torch(CUDA, "kd_loss", pair):
        return
    for soft, tau in (("kl", 0.5), ("kl", INF), ("mse", 1.0)):
        for grads in ("s", "st"):
            helpers.check(CUDA, "kd_loss", s, t, soft=soft, tau=tau, grads=grads, label_smoothing=0.1)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("start", [1, 3, 5])
@pytest.mark.parametrize("k", [9, 1003, 9001])
def test_rows_that_begin_anywhere(k: int, start: int, dtype: torch.dtype) -> None:
    """Rows whose starts share no alignment, with the other tensor or with the gradient; nothing outside them is touched."""
    s, t = helpers.logits("typical", (3, k + 13), (dtype, dtype))
    cut = lambda x: x[:, start : start + k]  # noqa: E731
    helpers.check(CUDA, "kl_div_tau", s, t, tau=2.0, grads="st", view=cut)
    helpers.check(CUDA, "kl_div_tau", s, t, tau=2.0, view=cut, teacher_view=lambda x: x[:, 2 : 2 + k])
    for soft, grads in (("kl", "s"), ("kl", "st"), ("mse", "s")):
        y = helpers.default_target((3,), k)
        helpers.check(CUDA, "kd_loss", s, t, target=y, soft=soft, grads=grads, view=cut, label_smoothing=0.1)


# Without weights, of dense logits, the rows of these losses are one run of pairs to the kernel; each of the others keeps them apart.
APART: dict[str, dict[str, Any]] = {
    "joined": {},
    "denominator": {"denominator": torch.tensor(7.5)},
    "weights": {"row_weight": torch.tensor([1.0, 0.5, 0, 2, 1])},
    "none": {"reduction": "none"},
    "num_classes": {"num_classes": 7},
    "gap": {"view": lambda x: x[:, :-1]},
    "start": {"view": lambda x: x[1:]},
    "expanded": {"teacher_view": lambda x: x[:1].expand(5, -1)},
}


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("k", [8, 9, 1003, 4104])  # whole vectors and a rest, of one block and of several
@pytest.mark.parametrize("case", APART)
def test_rows_joined_and_apart(case: str, k: int, dtype: torch.dtype) -> None:
    s, t = helpers.logits("typical", (5, k), (dtype, dtype))
    if case == "start":
        s, t = s[:4], t[:4]
    s[1, 3] = t[1, 3] = s[3, k - 2] = t[3, k - 2] = -INF
    for grads in ("", "s", "st"):
        helpers.check(CUDA, "logit_mse", s, t, grads=grads, **APART[case])
        for kind in ("pseudo", "smooth_l1"):
            helpers.check(CUDA, "logit_huber", s, t, kind=kind, delta=0.5, grads=grads, **APART[case])


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64], ids=str)
@pytest.mark.parametrize("start", [0, 1], ids=["aligned", "unaligned"])
def test_scaled_gradients(start: int, dtype: torch.dtype) -> None:
    """Blocks of whole vectors and a rest, of less than a vector too; the factor is a number of any dtype, and 1 leaves all as it
    is."""
    for count in (1, 7, 4099, 8192, 8201, 33000):
        given = torch.linspace(-3, 3, count + start).to(dtype)
        for factor in (torch.tensor(0.3), torch.tensor(1.0), torch.tensor(-2.0, dtype=F64), torch.tensor(1.5, dtype=BF16)):
            gradient = given.to("cuda")[start:]
            true = (given[start:].to(F64 if dtype == F64 else F32) * factor.to(F64 if dtype == F64 else F32)).to(dtype)
            assert torch.equal(torch.ops.kdfast.scale_gradient(gradient, factor.to("cuda")).cpu(), true), (count, factor)
            assert torch.equal(gradient.cpu(), given[start:])
            torch.ops.kdfast.scale_gradient_inplace(gradient, factor.to("cuda"))
            assert torch.equal(gradient.cpu(), true), (count, factor)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("apart", [1.5e18, 4e18, 1e-22])
def test_squares_at_the_ends_of_float32(apart: float, dtype: torch.dtype) -> None:
    """The squares of a row add up within float32, those of a few rows do not (or of a few classes); and squares below its normal
    numbers are not the loss of the others."""
    t = torch.zeros(150, 10, dtype=dtype)
    s = torch.full_like(t, apart)
    if apart < 1:
        s[3, 3] = 1.0
    helpers.check(CUDA, "logit_mse", s, t)
    s[2, 2] = 3e19  # its square is infinite
    if apart > 1:
        assert CUDA.run("logit_mse", s, t).loss == INF
    s[2, 2] = math.nan
    assert CUDA.run("logit_mse", s, t).loss.isnan()


def test_a_class_masked_in_the_teacher_keeps_the_students_mass() -> None:
    s, t = torch.tensor([[0.0, 0.0, -1.5]]), torch.tensor([[0.0, 0.0, -INF]])
    helpers.check(CUDA, "kl_div_tau", s, t)


@pytest.mark.parametrize("k", [3, 1000, 32000])
def test_the_students_top_far_from_the_teachers(k: int) -> None:
    """A row, or a slice of one, in which the ratio of the two sides' exponentials overflows."""
    s, t = torch.full((2, k), -5.0), torch.full((2, k), -5.0)
    t[:, k - 1] = 20.0
    s[:, k - 1] = -200.0
    s[1, 0] = t[1, 0] = 40.0
    for grads in ("s", "st"):
        helpers.check(CUDA, "kl_div_tau", s, t, grads=grads, reduction="none")


# ---- rows that look plain (csrc/cuda/kl_div_tau.cuh), are, or are not ---------------------------------------------------------


def _plain_logits(k: int, dtype: torch.dtype, spread: float = 3.0, noise: float = 1.0, rows: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(k)
    t = (spread * torch.randn(rows, k, generator=generator)).to(dtype)
    return (t.to(F32) + noise * torch.randn(rows, k, generator=generator)).to(dtype), t


PLAIN_LENGTHS = (1000, 1003, 4096, 20000)  # a warp, a block, clusters


@pytest.mark.parametrize("noise", [0.15, 0.2, 0.26, 0.35, 1.0])
@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_a_row_alone_is_within_budget(dtype: torch.dtype, spread: float, noise: float) -> None:
    """As in test_accuracy.py: student and teacher as near as where the plain form begins, which has the largest errors."""
    for k, rows in ((260, 20), (1000, 20), (4096, 5), (32000, 1)):
        s, t = _plain_logits(k, dtype, spread, noise, rows)
        for i in range(rows):
            for grads in ("", "s"):
                helpers.check(CUDA, "kl_div_tau", s[i : i + 1], t[i : i + 1], reduction="sum", grads=grads)


def _masked(s: Tensor, t: Tensor, value: float, where: str, sides: str) -> None:
    k = s.shape[1]
    mask = {"some": torch.arange(k) % 9 == 4, "half": torch.arange(k) >= k // 2}[where]
    for x, side in ((s, "s"), (t, "t")):
        if side in sides:
            x[:, mask] = value


def _alike_where_the_mass_is(s: Tensor, t: Tensor) -> None:
    s -= 30
    t -= 30
    t[:, 5] = 4
    s[:, 5] = 4.125


def _near_in_half(s: Tensor, t: Tensor) -> None:
    """One half of the row has the mass, and differs little; the other half, whole blocks of a cluster, differs a lot."""
    half = s.shape[1] // 2
    s[:, :half] = t[:, :half] + 0.01 * s[:, :half]
    s[:, half:] -= 40
    t[:, half:] -= 40


def _not_numbers(s: Tensor, t: Tensor) -> None:
    k = s.shape[1]
    s[0, k // 3], s[1, 7], t[2, k - 1] = -INF, math.nan, math.nan


def _infinite(s: Tensor, t: Tensor) -> None:
    s[0, s.shape[1] // 3] = t[1, 3] = INF


ROWS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "plain": lambda s, t: None,
    "alike where the mass is": _alike_where_the_mass_is,
    "near in one half": _near_in_half,
    "offset": lambda s, t: s.add_(100),
    "large": lambda s, t: (s.mul_(1e6), t.mul_(1e6)),
    "largest": lambda s, t: (s.mul_(1e30), t.mul_(1e30)),
    "the student's top": lambda s, t: s[:, 11].add_(300),
    "not numbers": _not_numbers,
    "infinite": _infinite,
    **{
        f"{name} in {where} of {sides}": functools.partial(_masked, value=value, where=where, sides=sides)
        for name, value in (("-inf", -INF), ("-1e38", -1e38))
        for where in ("some", "half")
        for sides in ("st", "t", "s")
        if (value, sides) != (-1e38, "s")  # a loss beyond float32
    },
}


@pytest.mark.parametrize("k", PLAIN_LENGTHS)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("case", ROWS)
def test_rows_that_look_plain(case: str, dtype: torch.dtype, k: int) -> None:
    s, t = _plain_logits(k, dtype)
    ROWS[case](s, t)
    for tau, grads in ((1.0, ""), (1.0, "s"), (4.0, "s")):
        helpers.check(CUDA, "kl_div_tau", s, t, tau=tau, grads=grads, reduction="sum")
    if case != "largest":  # whose cross-entropy is beyond what float32 holds
        helpers.check(CUDA, "kd_loss", s, t, tau=4.0, reduction="sum", label_smoothing=0.1 if "in" not in case.split() else 0.0)


def test_more_elements_than_32_bits_count() -> None:
    """Each row begins one element after the one before, so that rows times K is beyond 2**31 in 4 MB; only the last two
    are read. (tests/cpp/test_row_layout.cpp has the offsets.)"""
    k = 1031
    rows = (1 << 31) // k + 3
    line = torch.randn(2, rows + k, generator=torch.Generator().manual_seed(0)).to(BF16)
    weight = torch.zeros(rows, dtype=torch.bool)
    weight[-2:] = True
    s, t = (x.as_strided((rows, k), (1, 1)) for x in line)
    on_device = [x.as_strided((rows, k), (1, 1)) for x in (x.to("cuda") for x in line)]
    got = CUDA.call("kl_div_tau", *on_device, tau=2.0, row_weight=weight)
    s, t = s[-2:].clone(), t[-2:].clone()
    helpers.check_loss(got.cpu() * rows / 2, helpers.oracle("kl_div_tau", s, t, tau=2.0), (s, t))


# ---- registers ---------------------------------------------------------------------------------------------------------------


def _cuobjdump() -> str | None:
    places = [p for root in sys.path for p in Path(root).glob("triton/backends/nvidia/bin/cuobjdump")]
    return str(places[0]) if places else None


def test_registers_and_local_memory() -> None:
    """Nothing is spilled. At most 128 registers, for 512 threads a block; what reads a row in a stream has more threads."""
    from kdfast import _C

    tool = _cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump (pip install triton)")
    text = subprocess.run([tool, "-res-usage", _C.__file__], capture_output=True, text=True, check=True).stdout
    kernels = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert len(kernels) > 10
    for name, registers, stack, local in kernels:
        streams = "forward_kernel" in name and "9Uncentred" in name
        assert int(registers) <= (96 if "joined" in name else 64 if streams else 128), (name, registers)
        assert int(local) == 0 and int(stack) == 0, (name, registers, stack, local)


# ---- launches and memory traffic, as the emulator counts them ----------------------------------------------------------------

_STEP = """
import torch, kdfast
for k, rows in {cases}:
    g = torch.Generator().manual_seed(0)
    t = torch.randn(rows, k, generator=g) * 3
    s = (t + torch.randn(rows, k, generator=g)).to(torch.{dtype}).to("cuda")
    t = t.to(torch.{dtype}).to("cuda")
    for sides in {sides}:
        s, t = (x.detach().requires_grad_(side in sides) for x, side in ((s, "s"), (t, "t")))
        kdfast.{call}
"""
_TARGET = 'torch.arange(rows).to("cuda")'
_APART = 'row_weight=torch.ones(rows).to("cuda"), reduction="sum", backend="cpp"'
_CALLS = {
    **{f"{loss} apart": f"{loss}(s, t, {_APART})" for loss in ("logit_mse", "logit_huber")},
    **{loss: f'{loss}(s, t, backend="cpp")' for loss in ("kl_div_tau", "logit_mse", "logit_huber")},
    **{soft: f'kd_loss(s, t, {_TARGET}, soft="{soft}", reduction="sum", backend="cpp")' for soft in ("kl", "mse")},
    "kl_div_tau at 4": 'kl_div_tau(s, t, 4.0, backend="cpp")',
    "mean": f'kd_loss(s, t, {_TARGET}, backend="cpp")',
}


def _statistics(
    tmp_path: Path, call: str, dtype: str, cases: list[tuple[int, int]], sides: tuple[str, ...] = ("", "s")
) -> list[dict[str, Any]]:
    launcher = os.environ.get("KDFAST_GPU_EMULATOR")
    if not launcher:
        pytest.skip("needs the emulator's counts (KDFAST_GPU_EMULATOR)")
    counts = tmp_path / f"{call}.json"
    step = _STEP.format(cases=cases, call=_CALLS[call], dtype=dtype, sides=sides)
    subprocess.run([launcher, "run", "--stats", str(counts), "--", sys.executable, "-c", step], check=True)
    return [launch for launch in map(json.loads, counts.read_text().splitlines()) if "kdfast" in launch["kernel"]]


@pytest.mark.parametrize("soft", ["kl", "mse"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kd_loss_moves_what_kl_div_tau_moves(tmp_path: Path, soft: str, dtype: str) -> None:
    """Sectors of the loss and gradient in one launch; at K = 1000 the target and two more losses a row are 2 % by themselves."""
    cases = [(1000, 16), (1003, 16), (4096, 4), (32000, 1), (50257, 1), (128256, 1)]
    sectors = [
        [launch["load_sectors"] + launch["store_sectors"] for launch in _statistics(tmp_path, call, dtype, cases)[1::2]]
        for call in (soft, "kl_div_tau")
    ]
    for (k, _), mixed, alone in zip(cases, *sectors, strict=True):
        assert mixed <= 1.02 * alone, (k, mixed, alone)


def test_the_mean_of_kd_loss_counts_its_rows_first(tmp_path: Path) -> None:
    launches = _statistics(tmp_path, "mean", "bfloat16", [(1000, 16)])
    assert ["divisor" in launch["kernel"] for launch in launches] == [True, False] * 2


@pytest.mark.parametrize("call", [call for call in _CALLS if call not in ("mean", "kl_div_tau at 4")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_one_launch_reads_each_logit_once(tmp_path: Path, call: str, dtype: str) -> None:
    # 151936: sixteen slices, whose equal shares would begin within a sector in bfloat16, and near the longest row of float32
    cases = [(1000, 16), (1003, 16), (4096, 4), (32000, 1), (50257, 1), (128256, 1), (151936, 1)]
    sides = ("", "s") if "kd_loss" in _CALLS[call] else ("", "s", "st")  # kd_loss recomputes where both have a gradient
    launches = _statistics(tmp_path, call, dtype, cases, sides)
    assert len(launches) == len(sides) * len(cases)  # the loss; with the student's gradient; with both
    joined = ["joined" in launch["kernel"] for launch in launches]
    assert set(joined) == {call in ("logit_mse", "logit_huber")}
    size = 2 if dtype == "bfloat16" else 4
    for i, launch in enumerate(launches):
        k, rows = cases[i // len(sides)]
        gradients = i % len(sides)
        pairs, per_pair = k * rows, (2.05, 3.1, 4.1)[gradients] * size
        # Each thread of a row asks for its target or its weight, once for each pass: one sector a warp, which the sectors below
        # count as such.
        number = 8 if "KdLoss" in launch["kernel"] else 4 if call.endswith("apart") else 0
        of_rows = (1 + gradients) * number * math.prod((*launch["grid"], *launch["block"]))
        assert launch["load_bytes"] + launch["store_bytes"] - of_rows <= per_pair * pairs, (k, launch)
        bound = 1.02 if k * size % 32 == 0 else 1.15  # a sector has 32 bytes; K = 1000: every other bf16 row begins within one
        for kind in ("load", "store")[: 1 + (gradients > 0)]:
            assert launch[f"{kind}_sectors"] <= bound * launch[f"{kind}_sectors_ideal"], (k, kind)


# What a device answers that runs clusters of `MOST` blocks at most: the attribute's third number is the cluster's width.
_CLUSTERS = """
#include <stddef.h>
struct Config { unsigned grid[3], block[3]; size_t shared; void* stream; const unsigned* attributes; unsigned count; };
int cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel, const struct Config* config) {
  *clusters = config->attributes[2] > MOST ? 0 : 128 / config->attributes[2];
  return 0;
}
"""
_ROWS_OF_CLUSTERS = """
import torch, kdfast
for k in (100000, 151936):
    t = torch.randn(2, k, generator=torch.Generator().manual_seed(k)) * 3
    s = t + torch.randn(2, k, generator=torch.Generator().manual_seed(0))
    results = []
    for device in ("cuda", "cpu"):
        student, teacher = s.bfloat16().to(device).requires_grad_(), t.bfloat16().to(device)
        loss = kdfast.kl_div_tau(student, teacher, 4.0, backend="cpp")
        loss.backward(torch.ones(()).to(device))
        results.append((loss.detach().cpu(), student.grad.cpu()))
    (loss, gradient), (wanted_loss, wanted_gradient) = results
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=2**-7, atol=1e-9)
"""


@pytest.mark.parametrize("most", [8, 1])
def test_devices_whose_clusters_are_smaller(tmp_path: Path, most: int) -> None:
    """As an H20's, or a small partition's, whatever the compute capability."""
    launcher = os.environ.get("KDFAST_GPU_EMULATOR")
    if not launcher:
        pytest.skip("needs the emulator's counts (KDFAST_GPU_EMULATOR)")
    (tmp_path / "clusters.c").write_text(_CLUSTERS)
    library, counts = tmp_path / "clusters.so", tmp_path / "counts.json"
    compiler = [os.environ.get("CC", "cc"), f"-DMOST={most}", "-shared", "-fPIC"]
    subprocess.run([*compiler, "-o", str(library), str(tmp_path / "clusters.c")], check=True)
    preloaded = ["sh", "-c", 'LD_PRELOAD="$0:$LD_PRELOAD" exec "$@"', str(library)]
    step = [*preloaded, sys.executable, "-c", _ROWS_OF_CLUSTERS]
    subprocess.run([launcher, "run", "--stats", str(counts), "--", *step], check=True)
    launches = [launch for launch in map(json.loads, counts.read_text().splitlines()) if "KlDivTau" in launch["kernel"]]
    assert max(launch["cluster"][0] for launch in launches) == most


@pytest.mark.parametrize("call, forward, both", [("kl_div_tau at 4", 24, 40), ("logit_mse", 8, 8)])
def test_instructions_a_pair(tmp_path: Path, call: str, forward: int, both: int) -> None:
    """Of ordinary rows of bfloat16, the loss alone and with the student's gradient."""
    cases = [(1000, 64), (4096, 8), (32000, 2), (128256, 1)]
    for i, launch in enumerate(_statistics(tmp_path, call, "bfloat16", cases)):
        k, rows = cases[i // 2]
        assert launch["warp_instructions"] * 32 <= (forward, both)[i % 2] * k * rows, (k, launch["warp_instructions"])
