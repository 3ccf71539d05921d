"""The oracle itself, against mpmath: the definition of each loss, written down without any trick, in 160 digits."""

from __future__ import annotations

import math
from typing import Any

import mpmath as mp
import numpy as np
import pytest
import torch
from helpers import F32, F64, INF, REGIMES, TAUS, logits, oracle

DIGITS, STEP = 160, mp.mpf(10) ** -25  # central differences in 160 digits: relative truncation 1e-50, no rounding to speak of
FLOOR = mp.mpf(10) ** -40  # what the differences leave of a gradient that is exactly zero


def definition(
    loss: str, s: list[Any], t: list[Any], tau: Any, teacher_tau: Any, center: bool, kind: str = "", delta: float = 1.0
) -> Any:
    """One row. KL: sum p log(p/q) * tau**2; MSE: sum (s - t)**2. exp(-inf) = 0 and 0 log 0 = 0 are all that -inf
    needs."""
    if loss in ("logit_mse", "logit_huber"):
        d = [a - b for a, b in zip(s, t, strict=True)]
        mean = mp.fsum(d) / len(d) if center else mp.mpf(0)
        d, delta = [x - mean for x in d], mp.mpf(delta)
        if kind == "pseudo":
            return mp.fsum(delta**2 * (mp.sqrt(1 + (x / delta) ** 2) - 1) for x in d)
        if kind == "smooth_l1":
            return mp.fsum(x**2 / (2 * delta) if abs(x) < delta else abs(x) - delta / 2 for x in d)
        return mp.fsum(x**2 for x in d)
    a, b = [x / tau for x in s], [x / teacher_tau for x in t]
    lse_a, lse_b = (mp.log(mp.fsum(mp.exp(x) for x in v)) for v in (a, b))
    terms = [mp.exp(y - lse_b) * ((y - lse_b) - (x - lse_a)) for x, y in zip(a, b, strict=True) if y != -mp.inf]
    return tau**2 * mp.fsum(terms)


def slope(loss: str, s: list[Any], t: list[Any], side: str, k: int, *rest: Any) -> Any:
    def at(h: Any) -> Any:
        a, b = list(s), list(t)
        (a if side == "s" else b)[k] += h
        return definition(loss, a, b, *rest)

    return (at(STEP) - at(-STEP)) / (2 * STEP) if (s if side == "s" else t)[k] != -mp.inf else mp.mpf(0)


def agree(got: Any, want: Any, digits: float, scale: Any = 0) -> None:
    assert abs(mp.mpf(float(got)) - want) <= mp.mpf(10) ** -digits * max(abs(want), abs(scale)) + FLOOR, (float(got), want)


def rows_of(x: torch.Tensor) -> list[list[Any]]:
    return [[mp.mpf(v) if math.isfinite(v) else -mp.inf for v in row] for row in x.to(F64).tolist()]


def compare(
    loss: str,
    s: torch.Tensor,
    t: torch.Tensor,
    tau: float = 1.0,
    teacher_tau: float | None = None,
    center: bool = False,
    **huber: Any,
) -> None:
    with mp.workdps(DIGITS):
        for precision, digits in ((np.longdouble, 14.5), (np.float64, 11)):
            truth = oracle(
                loss, s, t, tau, teacher_tau=teacher_tau, center=center, reduction="sum", precision=precision, **huber
            )
            rest = (mp.mpf(tau), mp.mpf(tau if teacher_tau is None else teacher_tau), center, *huber.values())
            total = mp.mpf(0)
            for i, (a, b) in enumerate(zip(rows_of(s), rows_of(t), strict=True)):
                value = definition(loss, a, b, *rest)
                agree(truth.rows[i], value, digits)
                total += value
                for side, g in (("s", truth.student), ("t", truth.teacher)):
                    wants = [slope(loss, a, b, side, k, *rest) for k in range(len(a))]
                    norm = mp.sqrt(mp.fsum(w * w for w in wants))
                    for k, w in enumerate(wants):
                        agree(g[i, k], w, digits, norm)
            agree(truth.loss, total, digits)


@pytest.mark.parametrize("tau", [x for x in TAUS if x < INF])
@pytest.mark.parametrize("regime", REGIMES)
def test_kl(regime: str, tau: float) -> None:
    for k in (1, 2, 3, 5):  # 1: all zero; 2: one degree of freedom; 3 and 5: generic
        compare("kl_div_tau", *logits(regime, (4, k)), tau)


@pytest.mark.parametrize("tau, teacher_tau", [(4.0, 1.0), (1.0, 4.0), (0.05, 20.0), (1e3, 0.3)])
def test_kl_with_two_temperatures(tau: float, teacher_tau: float) -> None:
    compare("kl_div_tau", *logits("typical", (4, 5)), tau, teacher_tau)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("regime", REGIMES)
def test_mse(regime: str, center: bool) -> None:
    compare("logit_mse", *logits(regime, (4, 5)), center=center)


@pytest.mark.parametrize("kind", ["pseudo", "smooth_l1"])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("regime", REGIMES)
def test_huber(regime: str, center: bool, kind: str) -> None:
    for delta in (0.1, 3.0):
        compare("logit_huber", *logits(regime, (4, 5)), center=center, kind=kind, delta=delta)


@pytest.mark.parametrize("tau", [0.3, 1.0, 20.0, 1e6])
def test_minus_infinity(tau: float) -> None:
    s, t = (x.clone() for x in logits("typical", (4, 5), seed=3))
    t[0, 1] = -INF  # teacher only
    s[1, 2] = t[1, 2] = -INF  # both
    t[2, :3] = -INF
    s[2, 0] = -INF
    compare("kl_div_tau", s, t, tau)


@pytest.mark.parametrize("low", [-200.0, -1e4, -3e38])
def test_classes_without_mass(low: float) -> None:
    """Finite logits whose exponentials underflow: on the teacher's side alone, and on both."""
    s, t = logits("typical", (4, 5), seed=3)
    t[0, 1] = t[1, 3] = low
    s[2, 2] = t[2, 2] = low
    for tau in (0.3, 1.0, 20.0):
        compare("kl_div_tau", s, t, tau)


def test_the_limit_of_large_temperature_is_half_the_variance() -> None:
    s, t = logits("typical", (4, 7), (F64, F64))
    with mp.workdps(DIGITS):
        tau = mp.mpf(10) ** 30
        truth = oracle("kl_div_tau", s, t, INF, reduction="sum")
        for i, (a, b) in enumerate(zip(rows_of(s), rows_of(t), strict=True)):
            agree(truth.rows[i], definition("kl_div_tau", a, b, tau, tau, False), 14.5)
            for k in range(7):
                agree(truth.student[i, k], slope("kl_div_tau", a, b, "s", k, tau, tau, False), 12)
                agree(truth.teacher[i, k], slope("kl_div_tau", a, b, "t", k, tau, tau, False), 12)
    half = oracle("logit_mse", s, t, center=True, reduction="sum")
    assert np.allclose(0.5 / 7 * half.rows, truth.rows, rtol=1e-15, atol=0)


@pytest.mark.parametrize("regime", REGIMES)
def test_the_two_precisions_agree_on_long_rows(regime: str) -> None:
    """float64 serves float32 inputs: it must be far below their budget at every size the accuracy tests use."""
    s, t = logits(regime, (2, 32000), (F32, F32))
    for tau in TAUS:
        a, b = (oracle("kl_div_tau", s, t, tau, precision=p) for p in (np.float64, np.longdouble))
        assert abs(a.loss - b.loss) <= 1e-10 * b.loss, tau
        for name in ("student", "teacher"):
            x, y = getattr(a, name), getattr(b, name)
            assert np.linalg.norm((x - y).astype(float)) <= 1e-10 * np.linalg.norm(y.astype(float)), (tau, name)


def test_reductions_weights_and_denominators() -> None:
    s, t = (x.reshape(3, 4, 5) for x in logits("typical", (12, 5), (F64, F64)))
    w = torch.tensor(np.random.default_rng(0).random((3, 4)))
    w[1] = 0
    s = s.clone()
    s[1, 2] = math.nan  # weight 0: must not matter
    rows = oracle("kl_div_tau", s, t, 2.0, reduction="none").loss
    part = np.where(w.numpy() > 0, rows, 0) * w.numpy()
    for reduction, value in (
        ("none", part),
        ("sum", part.sum()),
        ("mean", part.sum() / w.sum().item()),
        ("batchmean", part.sum() / 3),
    ):
        got = oracle("kl_div_tau", s, t, 2.0, reduction=reduction, row_weight=w)
        assert np.allclose(got.loss.astype(float), value.astype(float), rtol=1e-15, atol=0)
        assert (got.student[1] == 0).all() and np.isfinite(got.student.astype(float)).all()
    got = oracle("logit_mse", s[0], t[0], reduction="mean", denominator=7.0).loss
    assert np.isclose(float(got), float(((s[0] - t[0]) ** 2).sum()) / 7.0, rtol=1e-15, atol=0)
    wide = torch.cat([s[0], torch.full((4, 3), math.nan, dtype=F64)], -1)
    got = oracle("kl_div_tau", wide, t[0], num_classes=5)
    assert got.student.shape == (4, 8) and (got.student[:, 5:] == 0).all() and np.isfinite(float(got.loss))
