"""Relative error of kdfast and of eager PyTorch against a float64 oracle, over temperatures, logits, widths and dtypes.

The oracle takes the same (already rounded) logits in float64 and evaluates the Kullback-Leibler divergence in a form
without cancellation: with d = (s - t)/tau, p the teacher's probabilities, m = sum p d and x = d - m,

    KL = log1p(sum p (e^x - 1 - x))        q - p = p expm1(x - KL)

since sum p = 1 and sum p x = 0. The textbook forms log(p/q) and q - p replace them where they lose no digit.

Errors are relative: of the batch's loss; and of the whole gradient, in the L2 norm, to the student and to the teacher.
A 16-bit gradient cannot beat the rounding of its dtype, so the budget is a constant plus the error of the oracle's own
gradient once rounded. float16 gradients are taken under a loss scale, as GradScaler does, and divided by it again (the
scale is lowered for eager where its factor tau^2 would overflow). What lies below an output dtype's normal range, or
below 1e-31, counts as zero: in 16 bits nearly equal logits differ in few classes, and at low tau those weigh nothing.

Rows are temperatures, and ``mse`` for ``kdfast.logit_mse``; each cell is the worst over the widths. ``--csv`` has every
case. The exit status is 1 when kdfast misses a budget.
"""

from __future__ import annotations

import argparse
import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast

from . import machine, print_table, write_csv

LOSS_BUDGET, GRADIENT_BUDGET = 5e-6, 2e-6
TAUS = (0.05, 0.3, 1.0, 4.0, 20.0, 1e3, 1e6, math.inf)
CLASSES = (1, 2, 10, 100, 1000, 1003, 32000, 128256)
QUICK = (10, 1003)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MSE: Literal["mse"] = "mse"  # stands where a temperature does
Array = npt.NDArray[np.float64]
Setting = float | Literal["mse"]


@dataclass(frozen=True)
class Regime:
    """Teacher logits of standard deviation ``spread``; the student adds ``noise`` and an ``offset``."""

    spread: float
    noise: float
    offset: float = 0.0


REGIMES = {
    "typical": Regime(3, 1),
    "near 1e-3": Regime(3, 1e-3),
    "near 1e-5": Regime(3, 1e-5),
    "peaked": Regime(15, 1),
    "far": Regime(3, 10),
    "offset 100": Regime(3, 1, 100),
}


# ------------------------------------------------------------------------------------------------------ oracle


def phi(x: Array) -> Array:
    """e^x - 1 - x for |x| < 1, by its series to float64 precision."""
    total, term = np.zeros_like(x), x * x / 2
    for k in range(3, 22):
        total, term = total + term, term * x / k
    return total


def kl_oracle(s: Array, t: Array, tau: float) -> tuple[Array, Array, Array]:
    """tau^2 KL of each row and its gradients to the student and to the teacher, in float64."""
    if math.isinf(tau):
        centred = s - t
        centred -= centred.mean(-1, keepdims=True)
        classes = s.shape[-1]
        return (centred * centred).sum(-1) / (2 * classes), centred / classes, -centred / classes

    def log_softmax(z: Array) -> Array:
        z = z - z.max(-1, keepdims=True)
        z -= np.log(np.exp(z).sum(-1, keepdims=True))
        return z

    log_p, log_q = log_softmax(t / tau), log_softmax(s / tau)
    p, d = np.exp(log_p), (s - t) / tau
    d -= np.take_along_axis(d, t.argmax(-1)[:, None], -1)  # 0 where p may be 1 to the last digit
    x = d - (p * d).sum(-1, keepdims=True)
    small = np.abs(x) < 1
    xs = np.where(small, x, 0.0)
    with np.errstate(over="ignore", invalid="ignore"):  # overflows only in rows that take the textbook form
        terms = np.where(small, p * phi(xs), np.exp(log_p + x) - p - p * x)
        stable = np.log1p(terms.sum(-1, keepdims=True))
    textbook = (p * (log_p - log_q)).sum(-1, keepdims=True)
    kl = np.where(textbook < 0.5, stable, textbook)
    z = x - kl
    near = np.abs(z) < 1
    difference = np.where(near, p * np.expm1(np.where(near, z, 0.0)), np.exp(log_q) - p)
    return kl[:, 0] * tau**2, tau * difference, -tau * p * x


def mse_oracle(s: Array, t: Array) -> tuple[Array, Array, Array]:
    """Mean squared difference of each row and its gradients."""
    d = s - t
    return (d * d).mean(-1), 2 * d / s.shape[-1], -2 * d / s.shape[-1]


@dataclass(frozen=True)
class Answer:
    """A batch's loss and gradients, in float64."""

    loss: float
    student: Array
    teacher: Array


def oracle(student: Tensor, teacher: Tensor, setting: Setting, rows_at_once: int = 8) -> Answer:
    """The truth for the mean over the rows, a few rows at a time."""
    s, t = (x.double().cpu().numpy() for x in (student, teacher))
    loss, gradients = 0.0, (np.empty_like(s), np.empty_like(s))
    for start in range(0, len(s), rows_at_once):
        part = slice(start, start + rows_at_once)
        row, *both = mse_oracle(s[part], t[part]) if setting == MSE else kl_oracle(s[part], t[part], setting)
        loss += float(row.sum()) / len(s)
        for gradient, values in zip(gradients, both, strict=True):
            gradient[part] = values / len(s)
    return Answer(loss, *gradients)


# ------------------------------------------------------------------------------------------------- the two sides

Loss = Callable[[Tensor, Tensor], Tensor]
Record = dict[str, Any]


def eager(setting: Setting) -> Loss:
    """What users write today."""
    if setting == MSE:
        return lambda s, t: F.mse_loss(s, t)

    def kl(s: Tensor, t: Tensor) -> Tensor:
        log_q, log_p = F.log_softmax(s / setting, -1), F.log_softmax(t / setting, -1)
        return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean") * setting**2

    return kl


def fused(setting: Setting, backend: str) -> Loss:
    """The same by kdfast."""
    if setting == MSE:
        return lambda s, t: kdfast.logit_mse(s, t, backend=backend)
    return lambda s, t: kdfast.kl_div_tau(s, t, setting, backend=backend)


def relative(got: Array | float, true: Array | float, dtype: torch.dtype, scale: float = 1.0) -> float:
    """Relative L2 error. A truth too small for the dtype (under the loss scale), or for float32 sums, counts as zero.

    Float32 sums hold their digits above tiny / eps: below it their rounding errors are no longer normal numbers.
    Where the truth is exactly zero (one class), the error is taken relative to float32's eps.
    """
    single = torch.finfo(torch.float32)
    size = float(np.linalg.norm(true))
    floor = max(torch.finfo(dtype).tiny / scale, single.tiny / single.eps) if size else single.eps
    return float(np.linalg.norm(np.subtract(got, true))) / max(size, floor * math.sqrt(np.size(true)))


@dataclass(frozen=True)
class Errors:
    """Relative errors of one side in one case."""

    loss: float
    student: float
    teacher: float


def errors(loss: Loss, student: Tensor, teacher: Tensor, truth: Answer, scale: float, training_scale: float) -> Errors:
    """Gradients are taken under ``scale``; their dtype's normal range ends where it would under ``training_scale``.

    The student's gradient is taken twice, alone as in training and together with the teacher's: the worse counts.
    """
    s, t = student.detach().requires_grad_(), teacher.detach().requires_grad_()
    values = [loss(s, teacher), loss(s, t)]
    alone = torch.autograd.grad(values[0], s, torch.full_like(values[0], scale))
    together = torch.autograd.grad(values[1], (s, t), torch.full_like(values[1], scale))

    def error(gradient: Tensor, true: Array) -> float:
        return relative(gradient.double().cpu().numpy() / scale, true, gradient.dtype, training_scale)

    return Errors(
        loss=worst([relative(value.item(), truth.loss, torch.float32) for value in values]),
        student=worst([error(alone[0], truth.student), error(together[0], truth.student)]),
        teacher=error(together[1], truth.teacher),
    )


def worst(values: Sequence[float]) -> float:
    """The largest; NaN, which is worse than any number, wins."""
    return math.nan if any(math.isnan(v) for v in values) else max(values)


# ------------------------------------------------------------------------------------------------------- cases


def logits(regime: Regime, rows: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Student and teacher logits in float64."""
    generator = np.random.default_rng(seed)
    teacher = regime.spread * generator.standard_normal((rows, classes))
    student = teacher + regime.noise * generator.standard_normal((rows, classes)) + regime.offset
    return torch.from_numpy(student), torch.from_numpy(teacher)


def loss_scale(truth: Answer, dtype: torch.dtype) -> float:
    """A power of two that brings float16 gradients near the middle of their range."""
    largest = max(np.abs(truth.student).max(), np.abs(truth.teacher).max())
    if dtype != torch.float16 or largest == 0:
        return 1.0
    return 2.0 ** min(15, math.floor(math.log2(1024 / largest)))


def eager_scale(scale: float, setting: Setting, dtype: torch.dtype) -> float:
    """The loss scale at which eager's backward, which multiplies it by tau^2 first, stays finite in float16."""
    if dtype != torch.float16 or setting == MSE or math.isinf(setting):
        return scale
    return min(scale, 2.0 ** max(-24, math.floor(15 - 2 * math.log2(setting))))


def gradient_budget(true: Array, dtype: torch.dtype, scale: float) -> float:
    """The constant, plus the error of the true gradient stored in this dtype (and a little: other ties)."""
    if dtype == torch.float32:
        return GRADIENT_BUDGET
    stored = torch.from_numpy(true * scale).to(dtype).double().numpy() / scale
    return GRADIENT_BUDGET + 1.05 * relative(stored, true, dtype, scale)


def measure(student: Tensor, teacher: Tensor, setting: Setting, backend: str) -> Record:
    """One case: the errors of both sides, and kdfast's budgets."""
    dtype = student.dtype
    truth = oracle(student, teacher, setting)
    scale = loss_scale(truth, dtype)
    theirs = errors(eager(setting), student, teacher, truth, eager_scale(scale, setting, dtype), scale)
    ours = errors(fused(setting, backend), student, teacher, truth, scale, scale)
    student_budget, teacher_budget = (gradient_budget(g, dtype, scale) for g in (truth.student, truth.teacher))
    within = ours.loss <= LOSS_BUDGET and ours.student <= student_budget and ours.teacher <= teacher_budget
    return {
        "eager_loss": theirs.loss,
        "kdfast_loss": ours.loss,
        "eager_student_grad": theirs.student,
        "kdfast_student_grad": ours.student,
        "student_grad_budget": student_budget,
        "eager_teacher_grad": theirs.teacher,
        "kdfast_teacher_grad": ours.teacher,
        "teacher_grad_budget": teacher_budget,
        "within_budget": within,
    }


COLUMNS = {
    "eager loss": "eager_loss",
    "kdfast loss": "kdfast_loss",
    "eager grad": "eager_student_grad",
    "kdfast grad": "kdfast_student_grad",
    "grad budget": "student_grad_budget",
    "eager teacher grad": "eager_teacher_grad",
    "kdfast teacher grad": "kdfast_teacher_grad",
}


def name(setting: Setting) -> str:
    """A temperature as a table shows it."""
    return MSE if setting == MSE else f"{setting:g}"


def show(records: Sequence[Record], dtype: str) -> None:
    """One table for a dtype: a row for each regime and temperature, the worst over the widths."""
    rows = []
    mine = [r for r in records if r["dtype"] == dtype]
    for regime, setting in dict.fromkeys((r["regime"], r["tau"]) for r in mine):
        cases = [r for r in mine if (r["regime"], r["tau"]) == (regime, setting)]
        cells = [f"{worst([c[key] for c in cases]):.1e}" for key in COLUMNS.values()]
        missed = [str(c["classes"]) for c in cases if not c["within_budget"]]
        rows.append([regime, name(setting), *cells, f"missed at K = {', '.join(missed)}" if missed else ""])
    widths = ", ".join(dict.fromkeys(str(r["classes"]) for r in mine))
    print_table(f"{dtype}: worst relative error over K = {widths}", ["logits", "tau", *COLUMNS, ""], rows)


def parse_tau(text: str) -> Setting:
    """A temperature, ``inf`` included, or ``mse``."""
    return MSE if text == MSE else float(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options, measure, print; 1 when kdfast missed a budget."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"only K = {' and '.join(map(str, QUICK))}")
    parser.add_argument("--classes", type=int, nargs="+", metavar="K", help=f"default {' '.join(map(str, CLASSES))}")
    parser.add_argument("--taus", type=parse_tau, nargs="+", default=[*TAUS, MSE], help="temperatures, inf, mse")
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES), help="kinds of logits")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: all")
    parser.add_argument("--rows", type=int, help="rows in a batch (default: 4 to 64, fewer where K is large)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--backend", default="auto", help="kdfast's backend (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU (default %(default)s)")
    parser.add_argument("--csv", type=Path, help="write every case to this file")
    options = parser.parse_args(argv)

    torch.set_num_threads(options.threads)
    widths = options.classes or (QUICK if options.quick else CLASSES)
    records: list[Record] = []
    for dtype in options.dtypes:
        for regime, classes in itertools.product(options.regimes, widths):
            rows = options.rows or max(4, min(64, 250_000 // classes))
            seed = zlib.crc32(f"{regime} {classes}".encode())
            pair = [x.to(options.device, DTYPES[dtype]) for x in logits(REGIMES[regime], rows, classes, seed)]
            for setting in options.taus:
                case = {"dtype": dtype, "regime": regime, "tau": setting, "classes": classes, "rows": rows}
                records.append({**case, **measure(pair[0], pair[1], setting, options.backend)})
        show(records, dtype)

    missed = sum(not r["within_budget"] for r in records)
    print(f"kdfast is within its budget in {len(records) - missed} of {len(records)} cases.")
    print(f"Its worst loss: {worst([r['kdfast_loss'] for r in records]):.1e} (budget {LOSS_BUDGET:g})", end="")
    exact = [r for r in records if r["dtype"] == "float32"]
    if exact:
        gradient = worst([r[f"kdfast_{of}_grad"] for r in exact for of in ("student", "teacher")])
        print(f"; worst float32 gradient: {gradient:.1e} (budget {GRADIENT_BUDGET:g})", end="")
    print(f"\n{machine(options.device)}")
    if options.csv:
        write_csv(options.csv, records, options.device)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
