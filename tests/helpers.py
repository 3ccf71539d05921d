"""The oracle, the budgets and the inputs of the tests: one helper judges every number.

* ``oracle`` computes a loss and both gradients by the definition, in extended precision, with every option of the
  public functions.  It shares no code with the package; ``test_oracle.py`` proves it against mpmath.
* ``check_loss`` / ``check_grad`` compare with the oracle.  Budgets are *relative* (CONTRIBUTING.md, "Tolerances"): 5e-6 for a
  batch's loss and 2e-6 in L2 for a gradient when the arithmetic is float32, and about 2**-53 / 2**-24 of that for
  float64.  There is no absolute tolerance; the only floor is where float32 has no digits at all (1e-32).
* ``logits`` draws the inputs, ``Where`` runs the package on one (device, backend) pair: inputs are built on the CPU and
  moved, results are moved back, and every backward gets an explicit ``grad_output``, so that no kernel but kdfast's
  runs on the device.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

INF = math.inf
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
#: dtype pairs (student, teacher): the four types, and the mixtures users have.
PAIRS = {
    "fp32": (F32, F32),
    "bf16": (BF16, BF16),
    "fp16": (F16, F16),
    "fp32-bf16": (F32, BF16),  # a frozen 16-bit teacher
    "bf16-fp32": (BF16, F32),  # cached fp32 teacher logits, student under autocast
    "fp64": (F64, F64),
}
#: every other mixture, for the tests that only ask whether it works
ALL_PAIRS = [(a, b) for a in (F64, F32, BF16, F16) for b in (F64, F32, BF16, F16)]

#: the temperatures of the acceptance matrix: label matching, the usual ones, logit matching and its limit
TAUS = (0.05, 0.3, 1.0, 4.0, 20.0, 1e3, 1e6, INF)

LOSS_BUDGET = {F32: 5e-6, F64: 1e-13}
GRAD_BUDGET = {F32: 2e-6, F64: 1e-13}
#: What the type cannot hold: an exponential that underflowed (1e-38) times a logit or two.  Nothing else is absolute here.
FLOOR = {F32: 1e-32, F64: 1e-290}
# float64: 5e-6 and 2e-6 are about 80 and 30 float32 roundings; the same count of float64 roundings is 1e-14 and 4e-15.
# 1e-13 leaves the kernels' float64 polynomials a decimal digit, and is nine digits below anything a float32 step in the
# chain would leave.


# ------------------------------------------------------------------------------------------------------------------
# oracle


@dataclass(frozen=True)
class Truth:
    """What the package should return.  NaN in ``grad_*`` where nothing is specified (see ``unspecified``)."""

    loss: np.ndarray  # 0-d, or one value a row
    student: np.ndarray  # gradient of sum(loss * grad_output), shape of the student's logits
    teacher: np.ndarray
    size: float  # sum of the absolute terms of the loss: the scale its error is relative to
    unspecified: np.ndarray  # rows whose gradient is not specified (loss is +inf by a one-sided -inf), rows' shape
    rows: np.ndarray  # per-row loss, before weights and reduction
    no_student: (
        np.ndarray
    )  # where the student's gradient is zero by construction: masked row, padded column, class off on both sides
    no_teacher: np.ndarray


def to_numpy(x: Any, kind: type = np.float64) -> np.ndarray:
    """Exact conversion of a tensor of any floating type."""
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        x = x.to(F64).numpy() if x.is_floating_point() else x.numpy()
    return np.asarray(x).astype(kind)


def _phi(x: np.ndarray) -> np.ndarray:
    """e**x - 1 - x for |x| < 1, by its series: no cancellation."""
    total, term = np.zeros_like(x), x * x / 2
    for k in range(3, 26):  # 1/25! = 6e-26
        total = total + term
        term = term * x / k
    return total


def _kl_rows(s: np.ndarray, t: np.ndarray, tau: Any, teacher_tau: Any) -> tuple[np.ndarray, ...]:
    """Unscaled KL a row, d/d(s/tau), d/d(t/teacher_tau), rows with student-only -inf."""
    on_s, on_t = s > -INF, t > -INF  # NaN: off on both sides; such rows are overwritten by the caller
    both = on_s & on_t
    # Logits from those of the teacher's likeliest class: exact, and nothing of the size of a logit / tau is left where p and q lie.
    at = np.where(both, t, -INF).argmax(-1)[..., None]
    origin = [np.where(both.any(-1, keepdims=True), np.take_along_axis(a, at, -1), 0) for a in (s, t)]
    s0, t0 = (np.where(on, a - a_j, 0) for a, on, a_j in ((s, on_s, origin[0]), (t, on_t, origin[1])))
    # exact difference first: s and t may agree to many digits
    x = np.where(both, (s0 - t0) / tau if tau == teacher_tau else s0 / tau - t0 / teacher_tau, 0)

    def softmax(z: np.ndarray, on: np.ndarray, temp: Any) -> tuple[np.ndarray, np.ndarray]:
        top = np.max(np.where(on, z, -INF), -1, keepdims=True, initial=-np.finfo(z.dtype).max)
        e = np.where(on, np.exp(np.where(on, z - top, 0) / temp), 0)
        total = e.sum(-1, keepdims=True)
        return e / total, top / temp + np.log(total)

    p, lse_t = softmax(t0, on_t, teacher_tau)
    q, lse_s = softmax(s0, on_s, tau)
    m = (p * x).sum(-1, keepdims=True)
    m = m + (p * (x - m)).sum(-1, keepdims=True)  # once refined: sum p (x - m) = 0 to the last digit
    c = np.where(both, x - m, 0)
    plain = lse_s - lse_t - m
    # KL = log sum_k e^{s_k/tau - lse_t - m}; the terms are p_k e^{c_k} where both sides are on, and sum p c = 0
    # there, so KL = log1p(sum_both p phi(c) + sum_{student alone} e^{...}).  The exponent form also serves where p has
    # underflowed.
    small = both & (np.abs(c) < 1)
    term = np.exp(np.where(on_s & ~small & (plain < 0.5), s0 / tau - lse_t - m, -INF))
    pieces = np.where(small, p * _phi(np.where(small, c, 0)), term - np.where(both, p + p * c, 0))
    stable = np.log1p(np.where(plain < 0.5, pieces, 0).sum(-1, keepdims=True))
    kl = np.where(plain < 0.5, stable, plain)
    z = c - kl
    near = both & (np.abs(z) < 1) & (np.abs(kl) < 1e3)  # of larger ones z is no better than the difference of q and p
    gs = np.where(near, p * np.expm1(np.where(near, z, 0)), q - p)
    gs = np.where(on_s | on_t, gs, 0)
    gt = np.where(on_t, -p * c, 0)
    lost = (on_t & ~on_s).any(-1)  # however little the teacher has there
    return kl[..., 0], gs, gt, lost


def _limit_rows(s: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, ...]:
    """tau**2 KL as tau -> inf: half the population variance of s - t over the classes both sides keep."""
    on_s, on_t = s > -INF, t > -INF
    both = on_s & on_t
    n = np.maximum(both.sum(-1, keepdims=True), 1)
    d = np.where(both, np.where(both, s, 0) - np.where(both, t, 0), 0)
    mean = d.sum(-1, keepdims=True) / n
    mean = mean + np.where(both, d - mean, 0).sum(-1, keepdims=True) / n
    c = np.where(both, d - mean, 0)
    rows = np.where(on_s.any(-1) | on_t.any(-1), (c * c).sum(-1) / n[..., 0] / 2, np.nan)  # no class at all: no softmax
    grad = np.where(np.isnan(rows)[..., None], np.nan, c / n)
    return rows, grad, -grad, (on_s != on_t).any(-1)


def _mse_rows(s: np.ndarray, t: np.ndarray, center: bool) -> tuple[np.ndarray, ...]:
    """Sum over the classes of the squared difference; a class at -inf on both sides contributes nothing."""
    on_s, on_t = s > -INF, t > -INF
    both = on_s & on_t
    c = np.where(both, np.where(both, s, 0) - np.where(both, t, 0), 0)
    if center:
        n = np.maximum(both.sum(-1, keepdims=True), 1)
        mean = c.sum(-1, keepdims=True) / n
        mean = mean + np.where(both, c - mean, 0).sum(-1, keepdims=True) / n
        c = np.where(both, c - mean, 0)
    return (c * c).sum(-1), 2 * c, -2 * c, (on_s != on_t).any(-1)


def _huber_rows(s: np.ndarray, t: np.ndarray, delta: Any, kind: str, center: bool) -> tuple[np.ndarray, ...]:
    """Sum over the classes of the pseudo-Huber or smooth L1 loss of the difference."""
    on_s, on_t = s > -INF, t > -INF
    both = on_s & on_t
    x = np.where(both, np.where(both, s, 0) - np.where(both, t, 0), 0)
    n = np.maximum(both.sum(-1, keepdims=True), 1)
    if center:
        mean = x.sum(-1, keepdims=True) / n
        mean = mean + np.where(both, x - mean, 0).sum(-1, keepdims=True) / n
        x = np.where(both, x - mean, 0)
    size = np.abs(x)
    if kind == "smooth_l1":
        rows, slope = (
            np.where(size < delta, x * x / (2 * delta), size - delta / 2),
            np.where(size < delta, x / delta, np.sign(x)),
        )
    else:  # the definition, times (root + 1) / (root + 1)
        root = np.hypot(1, x / delta)
        rows, slope = x * (x / (root + 1)), x / root
    if center:
        slope = np.where(both, slope - slope.sum(-1, keepdims=True) / n, 0)
    return rows.sum(-1), slope, -slope, (on_s != on_t).any(-1)


def default_target(shape: tuple[int, ...], classes: int) -> Tensor:
    """The targets of kd_loss where a test names none: any class, and every fourth row ignored."""
    rows = np.arange(math.prod(shape))
    return torch.from_numpy(np.where(rows % 4 == 2, -100, (7 * rows + 1) % classes).reshape(shape))


def _cross_entropy_rows(s: np.ndarray, y: np.ndarray, smoothing: Any) -> tuple[np.ndarray, np.ndarray]:
    """Cross-entropy a row with smoothed labels, and its gradient; NaN where there is no such class."""
    k = s.shape[-1]
    exists = (y >= 0) & (y < k)
    at = np.where(exists, y, 0)[:, None]
    hit = np.arange(k) == at
    top = s.max(-1, keepdims=True)
    e = np.exp(s - top)
    others, e_y, s_y = np.where(hit, 0, e).sum(-1), np.take_along_axis(e, at, -1)[:, 0], np.take_along_axis(s, at, -1)[:, 0]
    z = others + e_y
    log_z = np.where(s_y == top[:, 0], np.log1p(others), np.log(z))
    rows = log_z + (top[:, 0] - s_y)
    grad = np.where(hit, -others[:, None] / z[:, None], e / z[:, None])
    if smoothing:
        rows = (1 - smoothing) * rows + smoothing * (log_z + (top - s).mean(-1))
        grad = grad + np.where(hit, smoothing - smoothing / k, -smoothing / k)
    spoilt = ~exists | np.isnan(s).any(-1) | (s == INF).any(-1) | (s == -INF).all(-1)
    return np.where(spoilt, np.nan, rows), np.where(spoilt[:, None], np.nan, grad)


def _kd_oracle(
    s_all: np.ndarray, target: np.ndarray, soft: Truth, alpha: float, ignore_index: int, smoothing: float, reduction: str, k: int,
    row_weight: Any, denominator: Any, grad_output: Any,
) -> Truth:  # fmt: skip
    """``soft`` mixed with the hard part, each reduced by itself."""
    real, lead = s_all.dtype.type, s_all.shape[:-1]
    s, y = s_all[..., :k].reshape(-1, k), target.reshape(-1)
    n = len(s)
    weight = np.ones(n, real) if row_weight is None else to_numpy(row_weight, real).reshape(-1)
    counted = (weight != 0) & (y != ignore_index)
    weight = np.where(counted, weight, 0)
    with np.errstate(all="ignore"):
        rows, grad = _cross_entropy_rows(s, y, real(smoothing))
        rows, grad = np.where(counted, rows, 0) * weight, np.where(counted[:, None], grad, 0)
        mean = weight.sum() if n == 0 or weight.sum() != 0 else real(1)
        divisor = real({"none": 1, "sum": 1, "mean": mean, "batchmean": lead[0]}[reduction])
        divisor = divisor if denominator is None else real(to_numpy(denominator, real))
        value = rows.reshape(lead) if reduction == "none" else rows.sum() / divisor
        up = (
            np.broadcast_to(to_numpy(grad_output, real), lead).reshape(-1)
            if reduction == "none"
            else to_numpy(grad_output, real)
        )
        grad = np.where(counted[:, None], grad * np.reshape(weight * up / divisor, (-1, 1)), 0)
        hard = np.zeros(s_all.shape, real)
        hard[..., :k] = grad.reshape(*lead, k)
        parts = [(a, w) for a, w in ((value, 1 - real(alpha)), (soft.loss, real(alpha))) if w]
        loss = sum(a * w for a, w in parts)
        student = sum(g * w for g, w in ((hard, 1 - real(alpha)), (soft.student, real(alpha))) if w)
    silent = np.ones(s_all.shape, bool)
    if alpha < 1:
        hit = np.arange(k) == y[:, None]
        silent[..., :k] = (~counted[:, None] | ((s == -INF) & ~hit & (smoothing == 0))).reshape(*lead, k)
    return Truth(
        loss=np.asarray(loss),
        student=np.asarray(student),
        teacher=soft.teacher * real(alpha) if alpha else np.zeros_like(soft.teacher),
        size=float(sum(np.abs(a).sum() * w for a, w in parts)),
        unspecified=soft.unspecified & (alpha > 0),
        rows=np.asarray(rows.reshape(lead)),
        no_student=silent & (soft.no_student | (alpha == 0)),
        no_teacher=soft.no_teacher | (alpha == 0),
    )


def oracle(
    loss: str,
    student: Any,
    teacher: Any,
    tau: float | None = None,
    *,
    teacher_tau: float | None = None,
    scale_by_tau_squared: bool = True,
    reduction: str | None = None,
    row_weight: Any = None,
    denominator: Any = None,
    num_classes: int | None = None,
    center: bool = False,
    delta: float = 1.0,
    kind: str = "pseudo",
    target: Tensor | None = None,
    alpha: float = 0.9,
    soft: str = "kl",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    grad_output: Any = 1.0,
    precision: type | None = None,
    **_: Any,
) -> Truth:
    """The right answer.  ``precision``: float64 suffices for float32 and narrower inputs (2e9 below the budget; the
    differences are taken before anything is rounded), longdouble for float64 ones; ``test_oracle.py`` holds the two
    together."""
    wide = F64 in (getattr(student, "dtype", None), getattr(teacher, "dtype", None))
    real = precision or (np.longdouble if wide else np.float64)
    reduction = reduction or ("batchmean" if loss == "kl_div_tau" else "mean")
    tau = (4.0 if loss == "kd_loss" else 1.0) if tau is None else tau
    s_all, t_all = to_numpy(student, real), to_numpy(teacher, real)
    k = num_classes if num_classes is not None else s_all.shape[-1]
    lead = s_all.shape[:-1]
    if loss == "kd_loss":
        part = oracle(
            {"kl": "kl_div_tau", "mse": "logit_mse"}[soft], student, teacher, tau, reduction=reduction, row_weight=row_weight,
            denominator=denominator, num_classes=num_classes, grad_output=grad_output, precision=real,
        )  # fmt: skip
        y = default_target(lead, k) if target is None else target
        return _kd_oracle(
            s_all,
            y.cpu().numpy(),
            part,
            alpha,
            ignore_index,
            label_smoothing,
            reduction,
            k,
            row_weight,
            denominator,
            grad_output,
        )
    s, t = (np.broadcast_to(a[..., :k], (*lead, k)).reshape(-1, k) for a in (s_all, t_all))
    n = s.shape[0]
    weight = np.ones(n, real) if row_weight is None else np.broadcast_to(to_numpy(row_weight, real), lead).reshape(-1)
    used = weight != 0

    with np.errstate(all="ignore"):
        if loss == "logit_mse":
            rows, gs, gt, lost = _mse_rows(s, t, center)
        elif loss == "logit_huber":
            rows, gs, gt, lost = _huber_rows(s, t, real(delta), kind, center)
        elif tau == INF:
            rows, gs, gt, lost = _limit_rows(s, t)
        else:
            tau_s, tau_t = real(tau), real(tau if teacher_tau is None else teacher_tau)
            rows, gs, gt, lost = _kl_rows(s, t, tau_s, tau_t)
            factor = tau_s * tau_s if scale_by_tau_squared else real(1)
            rows, gs, gt = rows * factor, gs * (factor / tau_s), gt * (factor / tau_t)
    bad = np.isnan(s).any(-1) | np.isnan(t).any(-1) | (s == INF).any(-1) | (t == INF).any(-1)
    rows = np.where(lost, INF, rows)
    rows = np.where(bad, np.nan, rows)
    # a softmax or a mean spreads NaN over the row; a plain difference keeps it in its element, as torch's mse_loss
    elementwise = loss in ("logit_mse", "logit_huber")
    spoilt = np.isnan(s) | np.isnan(t) if elementwise and not center else bad[:, None]
    gs, gt = (np.where(spoilt, np.nan, g) for g in (gs, gt))

    terms = np.where(used, np.where(used, rows, 0) * weight, 0)
    per_row = {"none": 1, "sum": 1, "mean": weight.sum() if row_weight is not None else n, "batchmean": lead[0] if lead else 1}
    divisor = real(per_row[reduction])
    if reduction == "mean" and elementwise:
        divisor = divisor * k
    if denominator is not None:
        divisor = real(to_numpy(denominator, real))
    with np.errstate(all="ignore"):
        if reduction == "none":
            value = terms.reshape(lead)
            size = np.abs(terms).sum()
            scale = weight * np.broadcast_to(to_numpy(grad_output, real), lead).reshape(-1)
        else:
            nothing = row_weight is not None and n > 0 and not used.any()
            value = terms.sum() / divisor if not nothing else real(0)
            size = np.abs(terms).sum() / abs(divisor) if not nothing else real(0)
            scale = weight / divisor * real(to_numpy(grad_output, real)) if not nothing else np.zeros(n, real)
        gs, gt = (np.where(used[:, None], g * np.where(used, scale, 0)[:, None], 0) for g in (gs, gt))

    def widen(g: np.ndarray, like: np.ndarray, rest: Any) -> np.ndarray:
        out = np.full((n, like.shape[-1]), rest, g.dtype)
        out[:, :k] = g
        return out.reshape(lead + like.shape[-1:])

    off_s, off_t = s == -INF, t == -INF
    flat = np.full((n, k), k == 1 and (loss == "kl_div_tau" or center)) & ~bad[:, None]  # one class: nothing to distribute
    silent = (off_s & off_t) | flat | ~used[:, None]

    return Truth(
        loss=np.asarray(value),
        student=widen(gs, s_all, 0),
        teacher=widen(gt, t_all, 0),
        size=float(size),
        unspecified=(lost & used & ~bad).reshape(lead),
        rows=rows.reshape(lead),
        no_student=widen(silent, s_all, True),
        no_teacher=widen(silent | (off_t & used[:, None] & ~bad[:, None] & (loss == "kl_div_tau")), t_all, True),
    )


# -------------------------------------------------------------------------------------------------------------------
# judge


def arithmetic(*tensors: Tensor) -> torch.dtype:
    """The type the package computes in: float64 where an input is float64, else float32."""
    return F64 if any(x.dtype == F64 for x in tensors) else F32


def relative(error: float, size: float, floor: float = 0.0) -> float:
    """error / size; 0 where the error is within ``floor``, inf where something stands for an exact zero."""
    return 0.0 if error <= floor else (error / size if size else INF)


def relative_l2(got: np.ndarray, want: np.ndarray, floor: float = 0.0) -> float:
    norm = float(np.sqrt((want.astype(np.longdouble) ** 2).sum()))
    error = float(np.sqrt(((got.astype(np.longdouble) - want) ** 2).sum()))
    return relative(error, norm, floor)


def _same_specials(got: np.ndarray, want: np.ndarray, what: str) -> np.ndarray:
    """NaN and inf must stand exactly where they should; returns the mask of ordinary values."""
    for name, test in (("NaN", np.isnan), ("+inf", lambda a: a == INF), ("-inf", lambda a: a == -INF)):
        g, w = test(got), test(want)
        assert (g == w).all(), f"{what}: {name} at {np.argwhere(g != w)[:5].tolist()} (got {g.sum()}, should be {w.sum()})"
    return np.isfinite(want)


def _held(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The numbers as a type holds them: infinite where it is too narrow."""
    return to_numpy(torch.from_numpy(np.asarray(x, np.float64)).to(dtype))


def loss_error(got: Tensor, truth: Truth, floor: float = 0.0) -> float:
    """Sum of the absolute errors over the sum of the absolute terms: the batch value's relative error (for a vector of
    rows, in L1)."""
    g = to_numpy(got, truth.loss.dtype.type)
    fine = np.isfinite(_held(truth.loss, got.dtype))
    error = float(np.abs(np.where(fine, g - np.where(fine, truth.loss, 0), 0)).sum())
    size = float(np.abs(truth.loss[fine]).sum()) if truth.loss.ndim else truth.size
    return relative(error, size, floor)


def check_loss(got: Tensor, truth: Truth, inputs: tuple[Tensor, ...], *, allow: float = 0.0) -> float:
    """``allow``: a wider relative budget, which the caller must justify."""
    kind = arithmetic(*inputs)
    assert got.dtype == kind, f"loss dtype {got.dtype}, should be {kind}"
    assert tuple(got.shape) == truth.loss.shape, f"loss shape {tuple(got.shape)}, should be {truth.loss.shape}"
    _same_specials(to_numpy(got), _held(truth.loss, got.dtype), "loss")
    error, budget = loss_error(got, truth, FLOOR[kind]), max(LOSS_BUDGET[kind], allow)
    assert error <= budget, (
        f"loss {got.flatten()[:4].tolist()}, should be {truth.loss.astype(float).reshape(-1)[:4].tolist()}: "
        f"relative error {error:.2e} > {budget:.1e}"
    )
    return error


def grad_error(got: Tensor, want: np.ndarray) -> float:
    return relative_l2(to_numpy(got, want.dtype.type), want)


def rounding_error(want: np.ndarray, dtype: torch.dtype) -> float:
    """What rounding the exact gradient to ``dtype`` costs (relative L2): underflow and subnormals included."""
    ideal = _held(want, dtype)
    return relative_l2(ideal.astype(want.dtype), want) if np.isfinite(ideal).all() else INF


def check_grad(
    got: Tensor | None,
    want: np.ndarray,
    like: Tensor,
    inputs: tuple[Tensor, ...],
    *,
    allow: float = 0.0,
    stored: float = 1.0,
    unspecified: np.ndarray | None = None,
    silent: np.ndarray | None = None,
) -> float:
    """``like``: the input whose gradient this is; ``inputs``: both logits (they decide the arithmetic); ``silent``:
    where the gradient is zero by construction, and must be zero to the bit.

    Let a be the exact gradient and e the error before the last rounding.  |round(a + e) - a| <= |round(a) - a| + 2|e|
    holds element by element, so the result may differ from the truth by the unavoidable rounding plus *twice* the
    budget: a 16-bit gradient is judged as sharply as a 32-bit one.  ``stored``: the factor by which a 16-bit gradient was
    multiplied after it had been rounded once: unless it is a power of two, that rounding is one more part of e.
    """
    assert got is not None, "no gradient"
    assert got.dtype == like.dtype, f"gradient dtype {got.dtype}, should be its input's, {like.dtype}"
    assert got.shape == like.shape, f"gradient shape {tuple(got.shape)}, should be {tuple(like.shape)}"
    g = to_numpy(got, want.dtype.type)
    if unspecified is not None and unspecified.any():
        g, want = g[~unspecified], want[~unspecified]
        silent = None if silent is None else silent[~unspecified]
    fine = _same_specials(g, _held(want, like.dtype), "gradient")
    if silent is not None:
        assert (g[silent] == 0).all(), f"gradient {g[silent].max()} where it is zero by construction"
    g, want = g[fine], want[fine]
    kind = arithmetic(*inputs)
    budget = max(GRAD_BUDGET[kind], allow)
    if like.dtype != kind:
        e = budget if math.frexp(stored)[0] == 0.5 else budget + rounding_error(want / abs(stored), like.dtype)
        budget = 2 * e + rounding_error(want, like.dtype)
    error = relative_l2(g, want, FLOOR[kind])
    assert error <= budget, (
        f"gradient: relative L2 error {error:.2e} > {budget:.2e} (|gradient| = {np.linalg.norm(want.astype(float)):.3g}, "
        f"first {g.astype(float).reshape(-1)[:4].tolist()}, should be {want.astype(float).reshape(-1)[:4].tolist()})"
    )
    return error


# -------------------------------------------------------------------------------------------------------------------
# eager


def eager(
    loss: str,
    student: Tensor,
    teacher: Tensor,
    tau: float | None = None,
    *,
    teacher_tau: float | None = None,
    scale_by_tau_squared: bool = True,
    reduction: str | None = None,
    row_weight: Tensor | None = None,
    denominator: Any = None,
    num_classes: int | None = None,
    center: bool = False,
    delta: float = 1.0,
    kind: str = "pseudo",
    target: Tensor | None = None,
    alpha: float = 0.9,
    soft: str = "kl",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    **_: Any,
) -> Tensor:
    """The lines of PyTorch that the package replaces, in the inputs' own (promoted) type.  tau = inf: by
    autograd-friendly variance."""
    reduction = reduction or ("batchmean" if loss == "kl_div_tau" else "mean")
    tau = (4.0 if loss == "kd_loss" else 1.0) if tau is None else tau
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    s, t = student.to(dtype)[..., :num_classes], teacher.to(dtype)[..., :num_classes]
    if loss == "kd_loss":
        y = default_target(s.shape[:-1], s.size(-1)) if target is None else target
        flat = torch.nn.functional.cross_entropy(
            s.reshape(-1, s.size(-1)),
            y.reshape(-1).long(),
            reduction="none",
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
        counted = (y != ignore_index).to(dtype) * (1 if row_weight is None else row_weight.to(dtype))
        rows = flat.reshape(y.shape) * (1 if row_weight is None else row_weight.to(dtype))
        part = eager(
            {"kl": "kl_div_tau", "mse": "logit_mse"}[soft], student, teacher, tau, reduction=reduction, row_weight=row_weight,
            denominator=denominator, num_classes=num_classes,
        )  # fmt: skip
        divisors = {"none": 1, "sum": 1, "mean": counted.sum(), "batchmean": s.size(0)}
        by = divisors[reduction] if denominator is None else denominator
        return (1 - alpha) * (rows if reduction == "none" else rows.sum() / by) + alpha * part
    if loss != "kl_div_tau" or tau == INF:
        d = s - t
        if center or loss == "kl_div_tau":
            d = d - d.mean(-1, keepdim=True)
        if loss == "logit_huber" and kind == "smooth_l1":
            rows = torch.nn.functional.smooth_l1_loss(d, torch.zeros_like(d), beta=delta, reduction="none").sum(-1)
        elif loss == "logit_huber":
            rows = (delta**2 * ((1 + (d / delta).square()).sqrt() - 1)).sum(-1)
        else:
            rows = d.square().sum(-1) if loss == "logit_mse" else d.square().mean(-1) / 2
    else:
        log_q = torch.log_softmax(s / tau, -1)
        log_p = torch.log_softmax(t / (tau if teacher_tau is None else teacher_tau), -1)
        rows = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        rows = rows * (tau * tau if scale_by_tau_squared else 1)
    if row_weight is not None:
        rows = rows * row_weight.to(rows.dtype)
    if reduction == "none":
        return rows
    divisor: Any = {
        "sum": 1,
        "batchmean": s.size(0),
        "mean": rows.numel() if row_weight is None else row_weight.to(rows.dtype).sum(),
    }
    divisor = divisor[reduction]
    if reduction == "mean" and loss in ("logit_mse", "logit_huber"):
        divisor = divisor * s.size(-1)
    return rows.sum() / (divisor if denominator is None else denominator)


def eager_errors(
    loss: str, student: Tensor, teacher: Tensor, truth: Truth, grad_output: Any = 1.0, **options: Any
) -> tuple[float, ...]:
    """Relative error of (loss, student gradient, teacher gradient) of the eager chain, computed in float32 at least:
    what a careful user of plain PyTorch gets.  A property test may accept twice that where float32 cannot do better
    (tiny KL at low tau, say)."""
    kind = arithmetic(student, teacher)
    s, t = (x.detach().to(kind).requires_grad_() for x in (student, teacher))
    value = eager(loss, s, t, **options)
    gs, gt = torch.autograd.grad(value, (s, t), torch.as_tensor(grad_output, dtype=kind).expand_as(value).contiguous())
    return loss_error(value, truth), grad_error(gs, truth.student), grad_error(gt, truth.teacher)


# ------------------------------------------------------------------------------------------------------------------
# inputs

#: regime -> (spread of the teacher, spread of student - teacher, shift of the student)
REGIMES = {
    "typical": (3.0, 1.0, 0.0),
    "close": (3.0, 1e-3, 0.0),  # the student has nearly converged: the loss is a difference of nearly equal sums
    "closer": (3.0, 1e-5, 0.0),
    "peaked": (15.0, 1.0, 0.0),  # one class holds nearly all the mass
    "far": (3.0, 10.0, 0.0),  # an untrained student
    "offset": (3.0, 1.0, 100.0),  # logits are defined up to a constant: a constant must not cost digits
}


def logits(
    regime: str, shape: tuple[int, ...], pair: tuple[torch.dtype, torch.dtype] = (F32, F32), seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(student, teacher) on the CPU, the caller's own."""
    s, t = _logits(regime, shape, pair, seed)
    return s.clone(), t.clone()


@functools.lru_cache(maxsize=64)
def _logits(regime: str, shape: tuple[int, ...], pair: tuple[torch.dtype, torch.dtype], seed: int) -> tuple[Tensor, Tensor]:
    spread, noise, shift = REGIMES[regime]
    rng = np.random.default_rng([seed, *shape, sorted(REGIMES).index(regime)])
    t = torch.from_numpy(rng.standard_normal(shape) * spread).to(pair[1])
    s = (t.to(F64) + torch.from_numpy(rng.standard_normal(shape) * noise) + shift).to(pair[0])
    return s, t


# ------------------------------------------------------------------------------------------------------------------
# running


def with_a_class_far_off(tau: float) -> tuple[Tensor, Tensor]:
    """Rows of one class with nearly all the mass on both sides, and one of little mass that the student puts far off: the small numbers
    are not to be lost beside the 1 of the large class."""
    t = torch.tensor([[0, -8.0, -60], [0, -14, -60], [0, -14, -60], [0, -9, -9]])
    s = torch.tensor([[0, -2000.0, -60], [0, -20000, -60], [0, -2e6, -12], [0, -3000, -6]])
    return s * tau, t * tau


def target_of(loss: str, target: Tensor) -> dict[str, Tensor]:
    """The argument that kd_loss alone takes."""
    return {"target": target} if loss == "kd_loss" else {}


def loss_of(loss: str) -> Callable[..., Any]:
    """The public function as one of (student, teacher): kd_loss has the targets of ``default_target``."""
    import kdfast

    call = getattr(kdfast, loss)
    if loss != "kd_loss":
        return call

    def with_target(student: Tensor, teacher: Tensor, **options: Any) -> Any:
        return call(student, teacher, default_target(student.shape[:-1], student.shape[-1]), **options)

    return with_target


@dataclass(frozen=True)
class Objective:
    """A loss as training takes it: kd_loss is two, by its soft part."""

    loss: str
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return "-".join([self.loss, *(str(value) for _, value in self.options)])

    def __call__(self, student: Tensor, teacher: Tensor, **options: Any) -> Any:
        return loss_of(self.loss)(student, teacher, **dict(self.options), **options)

    def oracle(self, student: Any, teacher: Any, **options: Any) -> Truth:
        return oracle(self.loss, student, teacher, **dict(self.options), **options)


@dataclass(frozen=True)
class Result:
    loss: Tensor
    student: Tensor | None = None
    teacher: Tensor | None = None


class _Output(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def as_output(x: Tensor) -> Tensor:
    """A leaf as a model's output, which inplace_backward may overwrite: in the same memory, and without a kernel of torch's."""
    output: Tensor = _Output.apply(x)
    return output


@dataclass(frozen=True)
class Where:
    """One (device, backend) pair to run the package on."""

    device: str
    backend: str

    def __str__(self) -> str:
        return f"{self.device}-{self.backend}"

    def has(self, loss: str) -> bool:
        """Whether the backend has this loss on the device: a new loss may come to the GPU later than to the CPU."""
        from kdfast import _ops

        own: _ops.Loss = getattr(_ops, loss.upper())
        return self.device == "cpu" or self.backend != "cpp" or own.has_cuda_kernels

    @property
    def runs_torch(self) -> bool:
        """Whether PyTorch's own kernels run on the device: not under a GPU emulator."""
        return self.device == "cpu" or "KDFAST_GPU_EMULATOR" not in os.environ

    def put(self, x: Any) -> Any:
        return x.to(self.device) if isinstance(x, Tensor) else x

    def call(self, loss: str, student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
        """The public function on tensors that are already on the device (weights and denominators are moved)."""
        import kdfast

        if not self.has(loss):
            pytest.skip(f"{self} has no kernels of {loss}")
        if loss == "kd_loss" and "target" not in options:
            options["target"] = default_target(student.shape[:-1], options.get("num_classes") or student.shape[-1])
        options = {k: self.put(v) for k, v in options.items()}
        return getattr(kdfast, loss)(student, teacher, backend=self.backend, **options)

    def run(
        self,
        loss: str,
        student: Tensor,
        teacher: Tensor,
        *,
        grads: str = "s",
        grad_output: Any = 1.0,
        view: Callable[[Tensor], Tensor] = lambda x: x,
        teacher_view: Callable[[Tensor], Tensor] | None = None,
        **options: Any,
    ) -> Result:
        """Forward, and backward for the sides named in ``grads`` ("", "s", "t" or "st").  ``view`` is applied on the
        device, to a leaf."""
        s = view(self.put(student.detach())).detach().requires_grad_("s" in grads)
        t = (teacher_view or view)(self.put(teacher.detach())).detach().requires_grad_("t" in grads)
        value = self.call(loss, s, t, **options)
        sides = [x for x, name in ((s, "s"), (t, "t")) if name in grads]
        if not sides:
            return Result(value.cpu())
        seed = torch.as_tensor(grad_output, dtype=value.dtype).expand(value.shape).contiguous().to(self.device)
        got = [g.cpu() for g in torch.autograd.grad(value, sides, seed)]
        return Result(value.detach().cpu(), got[0] if "s" in grads else None, got[-1] if "t" in grads else None)


def check(
    where: Where,
    loss: str,
    student: Tensor,
    teacher: Tensor,
    *,
    grads: str = "s",
    grad_output: Any = 1.0,
    truth: Truth | None = None,
    allow: tuple[float, float, float] = (0.0, 0.0, 0.0),
    view: Callable[[Tensor], Tensor] = lambda x: x,
    teacher_view: Callable[[Tensor], Tensor] | None = None,
    **options: Any,
) -> Result:
    """Run the package and judge the loss and the gradients asked for against the oracle."""
    vs, vt = view(student), (teacher_view or view)(teacher)
    truth = truth or oracle(loss, vs, vt, grad_output=grad_output, **options)
    got = where.run(
        loss, student, teacher, grads=grads, grad_output=grad_output, view=view, teacher_view=teacher_view, **options
    )
    compare(
        got, truth, vs, vt, grads=grads, grad_output=grad_output, reduction=options.get("reduction"), allow=allow,
        in_forward=where.backend != "reference",
    )  # fmt: skip
    return got


def compare(
    got: Result,
    truth: Truth,
    student: Tensor,
    teacher: Tensor,
    *,
    grads: str,
    grad_output: Any = 1.0,
    reduction: str | None = None,
    allow: tuple[float, ...] = (0.0, 0.0, 0.0),
    in_forward: bool = True,
) -> None:
    """Judge a loss and the gradients asked for against the oracle.  ``in_forward``: whether a forward writes a scalar's."""
    inputs = (student, teacher)
    check_loss(got.loss, truth, inputs, allow=allow[0])
    # a narrow gradient written during the forward is rounded there, and again by a grad_output that is not a power of two
    wanted = [x.dtype for x, side in zip(inputs, "st", strict=True) if side in grads]
    fused = in_forward and "s" in grads and reduction != "none" and F16 not in wanted
    stored = abs(float(torch.as_tensor(grad_output).max())) if fused else 1.0
    if "s" in grads:
        check_grad(
            got.student, truth.student, student, inputs, allow=allow[1], stored=stored, unspecified=truth.unspecified,
            silent=truth.no_student,
        )  # fmt: skip
    if "t" in grads:
        check_grad(
            got.teacher, truth.teacher, teacher, inputs, allow=allow[2], stored=stored, unspecified=truth.unspecified,
            silent=truth.no_teacher,
        )  # fmt: skip


def places() -> list[Where]:
    """Every (device, backend) pair there is.  Under a GPU emulator PyTorch's own CUDA kernels do not run, hence no
    "reference" there."""
    found = [Where("cpu", "cpp"), Where("cpu", "reference")]
    if torch.cuda.is_available():
        import kdfast

        probe = torch.zeros(1, 2).to("cuda")
        for backend in ("cpp", "triton"):
            try:
                kdfast.kl_div_tau(probe, probe, backend=backend)
            except ValueError:  # not built: test_errors.py checks that the refusal is clear
                continue
            found.append(Where("cuda", backend))
        if not os.environ.get("KDFAST_GPU_EMULATOR"):
            found.append(Where("cuda", "reference"))
    return found


def widens_by_torch(where: Where, loss: str, pair: tuple[torch.dtype, torch.dtype]) -> bool:
    """kd_loss makes a narrower side float64 by a copy of PyTorch's, whose own kernels do not run under a GPU emulator."""
    return loss == "kd_loss" and not where.runs_torch and (pair[0] == F64) != (pair[1] == F64)


# ------------------------------------------------------------------------------------------------------------------
# memory


def _status(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def resident_memory() -> int:
    """Bytes resident now (Linux)."""
    return _status("VmRSS")


def peak_memory(call: Callable[[], Any]) -> int:
    """Bytes that ``call`` needed at its worst moment beyond what was resident before it (Linux; buffers of 32 MiB and
    more are mapped afresh and returned at once by the C library, so they show up here whole)."""
    call()  # thread pools, workspaces
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # sets the high-water mark to what is resident now
    before = _status("VmHWM")
    call()
    return _status("VmHWM") - before
