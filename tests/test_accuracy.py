"""Accuracy over the whole range the package promises: every temperature, regime, width and dtype, loss and both
gradients.

Budgets and their meaning: helpers.py.  ``python tests/test_accuracy.py`` prints the table of errors with eager
PyTorch's beside them.
"""

from __future__ import annotations

import functools
import itertools
import sys
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    BF16,
    F16,
    F32,
    F64,
    GRAD_BUDGET,
    INF,
    PAIRS,
    REGIMES,
    TAUS,
    Truth,
    Where,
    check,
    check_grad,
    check_loss,
    eager,
    eager_errors,
    grad_error,
    logits,
    loss_error,
    oracle,
    places,
    to_numpy,
)

# K -> rows. Rows enough that the batch's loss is not that of one lucky row, few enough that the grid is quick.
SIZES = {
    1: 5,  # one class: loss and gradient are exactly zero
    2: 64,  # one degree of freedom: errors cannot average out; narrower than any SIMD vector
    10: 64,  # vision; one vector of 16 with a tail, or less than one
    100: 32,  # vision; 100 = 6 x 16 + 4
    1000: 32,  # vision; a multiple of 8, not of 16
    1003: 32,  # odd: every second row starts unaligned, and every vector width leaves a tail
    32000: 4,  # language models; accumulators must not lose digits
    128256: 2,  # the largest vocabulary in common use: the longest sums
}


ON_CPU = [place for place in places() if place.device == "cpu"]  # elsewhere: README, Limits


def grid() -> list[Any]:
    """All of it for float32 and bf16; at K >= 32000 each other dtype pair meets one regime (the sums are long, the
    types have met them all)."""
    others = [p for p in PAIRS if p not in ("fp32", "bf16")]
    turn = {p: list(REGIMES)[i % len(REGIMES)] for i, p in enumerate(others)}
    return [
        pytest.param(k, regime, pair, id=f"{k}-{regime}-{pair}")
        for k, regime, pair in itertools.product(SIZES, REGIMES, PAIRS)
        if k < 32000 or turn.get(pair, regime) == regime
    ]


@functools.lru_cache(maxsize=256)
def weights_for_rows(rows: int) -> torch.Tensor:
    """The incoming gradient of a loss that is one value a row: dyadic, so that it adds no rounding of its own."""
    return torch.tensor(np.random.default_rng(rows).integers(1, 9, rows) / 8.0, dtype=F64)


@functools.lru_cache(maxsize=2)
def truths(loss: str, k: int, regime: str, pair: str, **options: Any) -> tuple[Truth, Truth]:
    """(batchmean, one value a row with an incoming gradient), from one evaluation of the definition."""
    s, t = logits(regime, (SIZES[k], k), PAIRS[pair])
    up = weights_for_rows(SIZES[k])
    per_row = oracle(loss, s, t, reduction="none", grad_output=up, **options)
    n, up_np = SIZES[k], up.numpy()[:, None]
    total = per_row.rows.sum() / n
    batch = Truth(
        loss=np.asarray(total),
        student=per_row.student / up_np / n,
        teacher=per_row.teacher / up_np / n,
        size=float(total),
        unspecified=per_row.unspecified,
        rows=per_row.rows,
        no_student=per_row.no_student,
        no_teacher=per_row.no_teacher,
    )
    return batch, per_row


def verify(where: Where, loss: str, k: int, regime: str, pair: str, **options: Any) -> None:
    """Both ways to the gradient: written during the forward (student alone, scalar loss), and recomputed (both sides,
    one value a row)."""
    s, t = logits(regime, (SIZES[k], k), PAIRS[pair])
    batch, per_row = truths(loss, k, regime, pair, **options)
    up = weights_for_rows(SIZES[k])

    def both(allow: tuple[float, float, float]) -> None:
        check(where, loss, s, t, grads="s", reduction="batchmean", truth=batch, allow=allow, **options)
        check(where, loss, s, t, grads="st", reduction="none", truth=per_row, grad_output=up, allow=allow, **options)

    try:
        both((0, 0, 0))
    except AssertionError:
        if regime != "peaked" or not 0 < options.get("tau", 1.0) < 1:
            raise
        # Peaked and cold: every row may have converged to one class, and what is left of the batch is exponentials of -20 to
        # -80, whose relative error in float32 is |y| 2**-24 a rounding.  Here the second clause: twice the eager error.
        a, b, c = eager_errors(loss, s, t, batch, **options)
        both((2 * a, 2 * b, 2 * c))


def verify_all(where: Where, loss: str, k: int, regime: str, pair: str, cases: list[dict[str, Any]]) -> None:
    failures = []
    for options in cases:
        try:
            verify(where, loss, k, regime, pair, **options)
        except AssertionError as error:
            failures.append(f"{options}: {error}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("k, regime, pair", grid())
def test_kl(kernel: Where, k: int, regime: str, pair: str) -> None:
    verify_all(kernel, "kl_div_tau", k, regime, pair, [{"tau": tau} for tau in TAUS])


@pytest.mark.parametrize("k, regime, pair", grid())
def test_mse(kernel: Where, k: int, regime: str, pair: str) -> None:
    verify_all(kernel, "logit_mse", k, regime, pair, [{"center": False}, {"center": True}])


@pytest.mark.parametrize("k, regime, pair", grid())
def test_huber(kernel: Where, k: int, regime: str, pair: str) -> None:
    cases = [
        {"kind": kind, "delta": d, "center": c} for kind in ("pseudo", "smooth_l1") for d, c in ((1.0, False), (0.1, True))
    ]
    verify_all(kernel, "logit_huber", k, regime, pair, cases)


@pytest.mark.parametrize("pair", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("k", [1, 2, 10, 1003])  # exactly zero, narrower than a vector, one vector, many with a tail
@pytest.mark.parametrize("regime", ["typical", "peaked", "far", "offset"])
def test_two_temperatures(where: Where, k: int, regime: str, pair: str) -> None:
    cases = [
        {"tau": a, "teacher_tau": b}
        for a, b in [(4.0, 1.0), (1.0, 4.0), (0.3, 20.0), (20.0, 0.3), (1e3, 1.0), (1.0, 1e3), (0.05, 1.0)]
    ]
    verify_all(where, "kl_div_tau", k, regime, pair, cases)


@pytest.mark.parametrize("pair", ["fp32", "bf16", "fp16", "fp32-bf16"])
@pytest.mark.parametrize(
    "k", [1, 2, 10, 1003]
)  # the reference has no vectors: these are its degenerate, tiny, small and long rows
@pytest.mark.parametrize("regime", REGIMES)
def test_reference_backend(k: int, regime: str, pair: str) -> None:
    """The plain-torch path serves transforms and devices without kernels: the same promise, the same budget."""
    where = Where("cpu", "reference")
    verify_all(where, "kl_div_tau", k, regime, pair, [{"tau": tau} for tau in TAUS])
    verify_all(where, "logit_mse", k, regime, pair, [{"center": False}, {"center": True}])
    verify_all(where, "logit_huber", k, regime, pair, [{"kind": kind} for kind in ("pseudo", "smooth_l1")])


@pytest.mark.parametrize("shift", [1.0, 37.3, 100.0, -1000.0])
def test_a_constant_costs_no_digits(kernel: Where, shift: float) -> None:
    """Softmax does not see a constant added to a row of logits, neither to one side's nor to both.

    The inputs are float32 numbers as they are after the shift; the oracle sees the same ones."""
    s, t = logits("typical", (32, 100))  # wide enough that one row does not decide
    cases: list[dict[str, Any]] = [{"loss": "kl_div_tau", "tau": tau} for tau in (0.3, 1.0, 20.0, 1e6, INF)]
    failures = []
    for name, s1, t1 in (("student", s + shift, t), ("both", s + shift, t + shift), ("teacher", s, t + shift)):
        for options in [*cases, {"loss": "logit_mse", "center": True}]:
            for grads in ("s", "st"):
                try:
                    check(kernel, student=s1, teacher=t1, grads=grads, reduction="sum", **options)
                except AssertionError as error:
                    failures.append(f"{name} {options} {grads}: {error}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("shift", [1.0, 37.3, 100.0])
def test_a_constant_and_nearly_equal_logits(kernel: Where, shift: float) -> None:
    """The hardest sum of both: student = teacher + shift + 1e-3.  Within twice the error of eager float32 where that is
    at its best."""
    s, t = logits("close", (32, 100))
    for tau in (0.3, 1.0, 4.0):
        truth = oracle("kl_div_tau", s + shift, t, tau)
        theirs = eager_errors("kl_div_tau", s + shift, t, truth, tau=tau)
        allow = (2 * theirs[0], 2 * theirs[1], 2 * theirs[2])
        check(kernel, "kl_div_tau", s + shift, t, tau=tau, grads="s", truth=truth, allow=allow)
        check(kernel, "kl_div_tau", s + shift, t, tau=tau, grads="st", truth=truth, allow=allow)


@pytest.mark.parametrize("size, shift, apart", [(10, 1, 1e-4), (50, -10, 1e-3), (50, 300, 1e-2), (5, 0.02, 1e-5)])
@pytest.mark.parametrize("k, rows", [(100, 16), (1003, 4), (40000, 1)])
@pytest.mark.parametrize("place", ON_CPU, ids=str)
def test_a_constant_and_differences_of_a_few_roundings(
    place: Where, k: int, rows: int, size: float, shift: float, apart: float
) -> None:
    """Around the mean: no digit of the differences is lost, where eager float32 is up to 3 % off."""
    generator = torch.Generator().manual_seed(k)
    t = size * torch.randn(rows, k, generator=generator)
    s = (t.double() + shift + apart * torch.randn(rows, k, generator=generator, dtype=F64)).float()
    check(place, "logit_mse", s, t, center=True, grads="s")
    check(place, "logit_mse", s, t, center=True, grads="st", reduction="none", grad_output=torch.ones(rows))
    check(place, "kl_div_tau", s, t, tau=INF, grads="s")
    for kind in ("pseudo", "smooth_l1"):
        check(place, "logit_huber", s, t, kind=kind, delta=apart, center=True, grads="st")


@pytest.mark.parametrize("number", [-1e4, -1e9, torch.finfo(F32).min])
@pytest.mark.parametrize("shift", [10.0, 100.0])
def test_a_constant_beside_classes_masked_by_a_number(kernel: Where, shift: float, number: float) -> None:
    """Classes masked by a large number instead of -inf have no mass: their size must not hide the constant, which would cost the
    digits of nearly equal logits."""
    s, t = logits("typical", (32, 100))
    s = t + 0.1 * (s - t) + shift
    s[:, ::10] = t[:, ::10] = number
    for tau in (0.3, 1.0, 4.0):
        for grads in ("s", "st"):
            check(kernel, "kl_div_tau", s, t, tau=tau, grads=grads)


@pytest.mark.parametrize("pair", ["fp32", "bf16"])
@pytest.mark.parametrize("shift", [-150.0, -169.0, -177.0, -185.0, -300.0, 169.0, 185.0])
def test_logits_far_below_zero(kernel: Where, shift: float, pair: str) -> None:
    """As log-probabilities at a low temperature are, on one side or on both: no power is lost below the normal numbers."""
    for k, tau in ((64, 1.0), (300, 0.05), (1000, 20.0)):
        t, s = (
            (tau * x).to(dtype) for x, dtype in zip(reversed(logits("typical", (4, k))), reversed(PAIRS[pair]), strict=True)
        )
        for student, teacher in ((s + shift * tau, t), (s, t + shift * tau), (s + shift * tau, t + shift * tau)):
            check(kernel, "kl_div_tau", student, teacher, tau=tau, grads="s", reduction="sum")
            check(kernel, "kd_loss", student, teacher, tau=tau, grads="s", reduction="sum")


@pytest.mark.parametrize("far", [32.0, 60.0, 83.0, 85.0, 88.0, 700.0, 1500.0])
@pytest.mark.parametrize("place", ON_CPU, ids=str)
def test_flat_rows_whose_likeliest_class_is_far_off(place: Where, far: float) -> None:
    """The student has the teacher's likeliest class, of little mass, far below the others: around that class every difference is large,
    and its exponential may be infinite."""
    for k, spread in ((200, 0.05), (1000, 0.0), (2000, 0.05)):
        generator = torch.Generator().manual_seed(k)
        t = spread * torch.randn(3, k, generator=generator)
        s = t + spread * torch.randn(3, k, generator=generator)
        t[:, 7] = t.amax(-1) + 0.01
        s[:, 7] = -far
        for tau in (1.0, 20.0):
            truth = oracle("kl_div_tau", s * tau, t * tau, tau, reduction="sum")
            theirs = eager_errors("kl_div_tau", s * tau, t * tau, truth, tau=tau, reduction="sum")
            allow = (2 * theirs[0], 2 * theirs[1], 2 * theirs[2])
            check(place, "kl_div_tau", s * tau, t * tau, tau=tau, grads="s", reduction="sum", truth=truth, allow=allow)


def test_a_teacher_that_is_alike_in_every_class(kernel: Where) -> None:
    """Each term and each partial sum may be rounded the same way."""
    for k, value, shift, noise in ((1024, 1.365, 40.0, 1.4), (8192, 0.7, 0.0, 3.1), (1000, -2.3, 10.0, 2.0)):
        t = torch.full((2, k), value)
        s = t + shift + noise * torch.randn(2, k, generator=torch.Generator().manual_seed(k))
        for dtype in (F32, BF16):
            check(kernel, "kl_div_tau", s, t.to(dtype), tau=20.0, grads="s", reduction="sum")


@pytest.mark.parametrize("place", ON_CPU, ids=str)
def test_a_constant_between_logits_of_both_signs(place: Where) -> None:
    """Taken from one side's logits, the constant would make numbers of a binade higher out of half of them."""
    sign = torch.tensor([1.0, -1.0]).repeat(4, 500)
    for size, shift, apart, tau in ((8.36, 1, 0.01, 20.0), (8.36, -1, 0.1, 4.0), (40, 10, 0.1, 1e3), (0.5, 1e4, 0.02, 0.05)):
        t = size * sign
        s = (t.double() + shift + apart * torch.randn(t.shape, generator=torch.Generator().manual_seed(3), dtype=F64)).float()
        for grads in ("s", "st"):
            check(place, "kl_div_tau", s, t, tau=tau, grads=grads, reduction="sum")


def test_a_teacher_that_is_alike_in_most_classes(kernel: Where) -> None:
    """The same, times a mean that is large beside the loss."""
    generator = torch.Generator().manual_seed(5)
    for k, shift in ((1003, 10.0), (1003, 30.0), (10000, 5.0), (32000, 30.0)):
        level = 8 * torch.rand(4, 1, generator=generator) - 4
        t = torch.where(torch.rand(4, k, generator=generator) < 0.9, level, level - 20)
        s = 0.75 * torch.randn(4, k, generator=generator) + level + shift
        s = torch.where(t < level - 5, s - 20, s)
        check(kernel, "kl_div_tau", s, t, tau=1.0, grads="s", reduction="sum")


def where_a_row_is_sampled(k: int) -> torch.Tensor:
    """The classes that csrc/cpu/kl_div_tau.inl looks at before it takes a row for a plain one."""
    mask = torch.zeros(k, dtype=torch.bool)
    for i in range(4):
        mask[k // 4 * i : k // 4 * i + 16] = True
    return mask


@pytest.mark.parametrize("tau, rest, sampled", [(1, -100, -180), (2, -150, -270), (3, -100, -180), (4, -300, -500), (1, 30, 0)])
def test_the_classes_that_are_sampled_lie_far_below(kernel: Where, tau: float, rest: float, sampled: float) -> None:
    """Losses, hard parts and gradients, those by a large denominator too, whose factors are near the end of float32."""
    offset = torch.where(where_a_row_is_sampled(1024), sampled, rest)
    generator = torch.Generator().manual_seed(0)
    t = tau * torch.randn(2, 1024, generator=generator)
    s, t = t + tau * torch.randn(2, 1024, generator=generator) + offset, t + offset
    for options in ({"denominator": 1e27}, {}):
        check(kernel, "kl_div_tau", s, t, tau=tau, grads="s", reduction="sum", **options)
        check(kernel, "kd_loss", s, t, tau=tau, alpha=0.5, grads="s", reduction="sum", **options)


@pytest.mark.parametrize("far", [1e20, 1e30, 1e37])
def test_a_class_far_off_around_the_mean(kernel: Where, far: float) -> None:
    """A difference whose square no float32 holds: it is not infinite, and enters the mean."""
    s, t = logits("typical", (6, 64))
    s[:, 3] = far
    for kind in ("pseudo", "smooth_l1"):
        check(kernel, "logit_huber", s, t, kind=kind, center=True, grads="st", reduction="sum")
    s, t = torch.tensor([[far]]), torch.zeros(1, 1)
    assert kernel.run("logit_mse", s, t, center=True).loss == 0
    assert kernel.run("kl_div_tau", s, t, tau=INF).loss == 0


@pytest.mark.parametrize("loss", ["kl_div_tau", "logit_mse", "logit_huber"])
def test_student_equal_to_teacher_is_exactly_zero(where: Where, loss: str) -> None:
    """The converged student: loss and gradients are zero, not rounding noise (which a large tau**2 would blow up)."""
    for pair in PAIRS.values():
        if pair[0] != pair[1]:
            continue
        x = logits("typical", (16, 1003), pair)[1]
        for options in [{"tau": tau} for tau in TAUS] if loss == "kl_div_tau" else [{}, {"center": True}]:
            got = where.run(loss, x, x, grads="st", **options)
            for part in (got.loss, got.student, got.teacher):
                assert part is not None and part.abs().max() == 0, (pair, options, part)


@pytest.mark.parametrize("depth", [20.0, 80.0, 100.0, 200.0, 5000.0])
def test_teacher_without_mass_where_the_student_has_some(where: Where, depth: float) -> None:
    """A confident teacher: finite logits so low that exp underflows, or nearly. The student's mass there is most of the
    loss, which may still be small (the student is nearly right); 0.408 = -log 0.665 in the first row."""
    s = torch.tensor([[0.0, -1, -2] + [-30] * 14, [-3.0, 0, -4] + [-9] * 14, [-6.0, -7, 0] + [-8] * 14])
    t = torch.where(s == 0, 0.0, s - depth)
    for tau in (0.3, 1.0, 4.0):
        check(where, "kl_div_tau", s, t, tau=tau, grads="s", reduction="sum")
        if where.backend != "reference":
            check(where, "kl_div_tau", s, t, tau=tau, grads="st", reduction="none")
            continue
        # The teacher's gradient may be 1e-289 here: through log_softmax's own derivative it is good to a float64 ulp of the mass.
        got = where.run("kl_div_tau", s, t, tau=tau, grads="st", reduction="none")
        truth = oracle("kl_div_tau", s, t, tau, reduction="none")
        check_loss(got.loss, truth, (s, t))
        check_grad(got.student, truth.student, s, (s, t))
        assert got.teacher is not None
        error = np.abs(to_numpy(got.teacher) - truth.teacher)
        assert (error <= GRAD_BUDGET[F32] * np.abs(truth.teacher) + tau * np.finfo(float).eps).all()


@pytest.mark.parametrize("noise", [0.1, 0.13, 0.16, 0.2, 0.3, 1.0])
@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize("k, rows", [(65, 200), (128, 200), (1000, 100), (32000, 4)])
def test_a_row_alone_is_within_budget(k: int, rows: int, spread: float, noise: float) -> None:
    """A batch's loss averages over its rows' errors, a batch of one does not. Student and teacher are as near as where the
    CPU's plain form begins (`finish_plain_row` in csrc/cpu/kl_div_tau.inl), which has the largest errors."""
    generator = torch.Generator().manual_seed(k)
    t = spread * torch.randn(rows, k, generator=generator)
    s = t + noise * torch.randn(rows, k, generator=generator)
    for i in range(rows):
        check(Where("cpu", "cpp"), "kl_div_tau", s[i : i + 1], t[i : i + 1], tau=1.0, reduction="sum", grads="s")


def test_gradient_rows_sum_to_zero(kernel: Where) -> None:
    """sum_k (q_k - p_k) = 0: the residual is rounding alone, relative to the gradient (not to q and p, which are far
    larger)."""
    for regime, tau in itertools.product(REGIMES, (1.0, 20.0, 1e6, INF)):
        got = kernel.run("kl_div_tau", *logits(regime, (16, 1003)), tau=tau, grads="st", reduction="sum")
        for g in (got.student, got.teacher):
            assert g is not None and g.abs().max() > 0
            assert (g.double().sum(-1).abs() <= 2e-6 * g.double().abs().sum(-1)).all(), (regime, tau)


def test_loss_is_never_negative(where: Where) -> None:
    for regime, tau, pair in itertools.product(REGIMES, TAUS, ("fp32", "bf16", "fp64")):
        s, t = logits(regime, (64, 10), PAIRS[pair])
        value = where.run("kl_div_tau", s, t, tau=tau, reduction="none", grads="").loss
        assert ((value >= 0).all() and (value > 0).any()) or (s == t).all(), (regime, tau, pair, value.min())


@pytest.mark.parametrize("low, high", [(F16, 6e4), (BF16, 3e38), (F32, 3e38), (F64, 1e300)])
def test_huge_logits_stay_finite(where: Where, low: torch.dtype, high: float) -> None:
    """The largest finite logits of each type (a saturated head): no overflow of exp, nor of a sum, in the KL."""
    s, t = (x.clone() for x in logits("typical", (4, 33), (low, low)))
    s[:, 3], t[:, 3] = high, high
    s[1, 5], t[2, 7] = -high, -high
    got = where.run("kl_div_tau", s, t, tau=1.0, grads="st")
    assert all(x is not None and x.isfinite().all() for x in (got.loss, got.student, got.teacher))


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
@pytest.mark.parametrize("tau", [0.3, 1.0, 20.0])
def test_classes_masked_with_the_lowest_finite_number(where: Where, tau: float, dtype: torch.dtype) -> None:
    """masked_fill(finfo.min), as common as -inf: on both sides, and on the teacher's alone.  Their differences overflow."""
    low = torch.finfo(dtype).min
    for k in (5, 17, 200):
        s, t = logits("typical", (6, k), (dtype, dtype))
        s[:, 1] = t[:, 1] = low
        s[2, 3:] = t[2, 3:] = low
        t[3, 0] = t[4, k - 1] = low
        for grads, reduction in (("s", "sum"), ("st", "none")):
            check(where, "kl_div_tau", s, t, tau=tau, grads=grads, reduction=reduction)


# ------------------------------------------------------------------------------------------------------- the table for
# people


def table(k: int = 1000, rows: int = 64) -> str:
    """Markdown: per regime and tau, relative error of the loss / of the student's gradient, kdfast and eager PyTorch in
    the same dtype."""
    where, lines = Where("cpu", "cpp"), []
    for pair in ("fp32", "bf16"):
        lines += [f"\n{pair}, {rows} x {k}: relative error of the loss / of the student's gradient (L2)\n"]
        lines += ["| logits | | " + " | ".join(f"tau = {tau:g}" for tau in TAUS) + " |", "|---|---|" + "---|" * len(TAUS)]
        for regime in REGIMES:
            s, t = logits(regime, (rows, k), PAIRS[pair])
            ours, theirs = [], []
            for tau in TAUS:
                truth = oracle("kl_div_tau", s, t, tau)
                got = where.run("kl_div_tau", s, t, tau=tau, grads="s")
                assert got.student is not None
                ours.append(f"{loss_error(got.loss, truth):.0e} / {grad_error(got.student, truth.student):.0e}")
                x = s.detach().requires_grad_()
                value = eager("kl_div_tau", x, t, tau)
                (g,) = torch.autograd.grad(value, x)
                theirs.append(f"{loss_error(value, truth):.0e} / {grad_error(g, truth.student):.0e}")
            lines += [f"| {regime} | kdfast | " + " | ".join(ours) + " |", "| | eager | " + " | ".join(theirs) + " |"]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(*map(int, sys.argv[1:])))
