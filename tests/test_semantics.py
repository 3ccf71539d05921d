"""What the options mean: reductions, weights, denominators, num_classes, -inf, NaN, strides, in-place, repeated
backwards, determinism."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import math
import pickle
import struct
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ALL_PAIRS,
    BF16,
    F16,
    F32,
    F64,
    INF,
    PAIRS,
    Objective,
    Where,
    arithmetic,
    as_output,
    check,
    check_grad,
    check_loss,
    default_target,
    logits,
    loss_of,
    oracle,
    peak_memory,
    places,
    resident_memory,
    target_of,
    widens_by_torch,
    with_a_class_far_off,
)
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import kdfast

NAN = math.nan
NAN_WITH_PAYLOAD = struct.unpack("<d", (0x7FF8000020000000).to_bytes(8, "little"))[0]  # 0x7FC00001 in float32
REDUCTIONS = ("none", "sum", "mean", "batchmean")
#: the options that choose another formula; each semantic test passes through all of them
VARIANTS: dict[str, dict[str, Any]] = {
    "kl": {"loss": "kl_div_tau", "tau": 4.0},
    "kl-two-tau": {"loss": "kl_div_tau", "tau": 2.0, "teacher_tau": 5.0},
    "kl-unscaled": {"loss": "kl_div_tau", "tau": 3.0, "scale_by_tau_squared": False},
    "kl-inf": {"loss": "kl_div_tau", "tau": INF},
    "mse": {"loss": "logit_mse"},
    "mse-center": {"loss": "logit_mse", "center": True},
    "huber": {"loss": "logit_huber", "delta": 0.7},
    "huber-center": {"loss": "logit_huber", "center": True},
    "smooth-l1": {"loss": "logit_huber", "kind": "smooth_l1", "delta": 0.5},
    "smooth-l1-center": {"loss": "logit_huber", "kind": "smooth_l1", "center": True},
    "kd": {"loss": "kd_loss", "tau": 2.0, "alpha": 0.4, "label_smoothing": 0.1},
    "kd-inf": {"loss": "kd_loss", "tau": INF, "alpha": 0.6},
    "kd-mse": {"loss": "kd_loss", "soft": "mse", "alpha": 0.3},
}
variants = pytest.mark.parametrize("variant", VARIANTS)
BACKENDS = pytest.mark.parametrize("backend", ["cpp", "reference"])
#: those that can be computed on some of the rows or classes by themselves (for kd_loss: test_kd_loss.py)
parts_of_a_batch = pytest.mark.parametrize("variant", [v for v in VARIANTS if not v.startswith("kd")])


def upstream(reduction: str, shape: tuple[int, ...]) -> Any:
    """An incoming gradient other than 1: a power of two for a scalar (exact in any type), one value a row for
    "none"."""
    if reduction != "none":
        return 0.5
    return torch.tensor(np.random.default_rng(7).integers(1, 9, shape) / 8.0, dtype=F64)


def both_ways(where: Where, variant: str, s: Tensor, t: Tensor, lead: tuple[int, ...], **options: Any) -> None:
    """Every reduction (a scalar's gradients are written in the forward, but for the teacher's alone); gradient of the student, of
    the teacher, and of both."""
    for reduction, grads in itertools.product(REDUCTIONS, ("s", "t", "st")):
        out = upstream(reduction, lead)
        check(where, **VARIANTS[variant], student=s, teacher=t, reduction=reduction, grads=grads, grad_output=out, **options)


# ------------------------------------------------------------------------------------------------ reductions and dtypes


@variants
def test_reductions(where: Where, variant: str) -> None:
    s, t = logits("typical", (3, 5, 17))
    both_ways(where, variant, s, t, (3, 5))


def test_default_reductions(where: Where) -> None:
    """kl_div_tau: batchmean over size(0), as torch's KLDivLoss; logit_mse: mean over everything, as torch's MSELoss."""
    s, t = logits("typical", (3, 5, 17))
    check_loss(where.run("kl_div_tau", s, t, grads="").loss, oracle("kl_div_tau", s, t, 1.0, reduction="batchmean"), (s, t))
    check_loss(where.run("logit_mse", s, t, grads="").loss, oracle("logit_mse", s, t, reduction="mean"), (s, t))


@pytest.mark.parametrize("pair", ALL_PAIRS, ids=lambda p: "-".join(str(x).removeprefix("torch.") for x in p))
@variants
def test_every_mixture_of_dtypes(where: Where, variant: str, pair: tuple[torch.dtype, torch.dtype]) -> None:
    """The loss is float32 (float64 where an input is); a gradient has its own input's dtype.  check() asserts both."""
    if widens_by_torch(where, VARIANTS[variant]["loss"], pair):
        pytest.skip("PyTorch's own kernels do not run under the emulator")
    s, t = logits("typical", (6, 35), pair)
    for reduction, grads in (("sum", "s"), ("none", "st"), ("mean", "t")):
        check(where, **VARIANTS[variant], student=s, teacher=t, reduction=reduction, grads=grads)


@pytest.mark.parametrize("seed", [1.0, 2.0, -3.7, 1e-3, 65536.0, 0.0])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@variants
def test_grad_output(where: Where, variant: str, dtype: torch.dtype, seed: float) -> None:
    """A scalar loss's gradient is multiplied by whatever comes in (loss weights, GradScaler's 65536), also where it was
    written during the forward; fp16 must not have underflowed before the factor arrives."""
    s, t = logits("typical", (6, 35), (dtype, dtype))
    big = seed == 65536.0 and dtype == F16
    options = dict(VARIANTS[variant], student=s, teacher=t, grad_output=seed, denominator=1e6 if big else None)
    check(where, **options, grads="s", reduction="sum")
    check(where, **options, grads="st", reduction="sum")
    if not big:
        check(where, **options, grads="s", reduction="none")


def test_fp16_gradient_does_not_underflow_before_the_loss_scale(where: Where) -> None:
    """Typical AMP: a mean over many rows of a 32000-class problem, scaled by 2**16: unscaled, most entries are below
    6e-8."""
    s, t = logits("typical", (4, 32000), (F16, F16))
    got = check(where, "kl_div_tau", s, t, tau=1.0, grads="s", denominator=4096.0, reduction="sum", grad_output=65536.0)
    assert got.student is not None and (got.student != 0).double().mean() > 0.9


# --------------------------------------------------------------------------------------------------- weights,
# denominators


def some_weights(shape: tuple[int, ...], dtype: torch.dtype, zeros: bool = True) -> Tensor:
    w = torch.tensor(np.random.default_rng(5).integers(0 if zeros else 1, 5, shape) / 4.0, dtype=F64)
    return (w > 0.3) if dtype == torch.bool else w.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bool, F32, F64, BF16, F16], ids=str)
@variants
def test_row_weight(where: Where, variant: str, dtype: torch.dtype) -> None:
    s, t = logits("typical", (4, 6, 17))
    both_ways(where, variant, s, t, (4, 6), row_weight=some_weights((4, 6), dtype))


@variants
def test_row_weight_may_be_strided_or_expanded(where: Where, variant: str) -> None:
    s, t = logits("typical", (4, 6, 17))
    w = some_weights((6, 4), F32)
    every_other = some_weights((4, 12), F32)
    for view in (
        w.t(),
        every_other[:, ::2],
        some_weights((1, 6), F32).expand(4, 6),
        some_weights((4, 1), torch.bool).expand(4, 6),
    ):
        truth = oracle(**VARIANTS[variant], student=s, teacher=t, row_weight=view, reduction="mean")
        options = {k: v for k, v in VARIANTS[variant].items() if k != "loss"}
        if where.runs_torch:
            x = where.put(s).clone().requires_grad_()
            value = where.call(VARIANTS[variant]["loss"], x, where.put(t), row_weight=view, reduction="mean", **options)
            value.backward()
            check_loss(value.detach().cpu(), truth, (s, t))
            check_grad(x.grad.cpu(), truth.student, s, (s, t))


@pytest.mark.parametrize("k", [1, 2, 35])
def test_a_student_at_minus_inf_everywhere(where: Where, k: int) -> None:
    """It has no mass where the teacher has all: +inf, in that row alone."""
    s, t = logits("typical", (4, k))
    s[1] = -INF
    for options in ({"loss": "kl_div_tau", "tau": 4.0}, {"loss": "kl_div_tau", "tau": 4.0, "teacher_tau": 2.0}):
        got = where.run(student=s, teacher=t, reduction="none", grads="s", **options).loss
        assert got[1] == INF and got[[0, 2, 3]].isfinite().all()


@pytest.mark.contract("rows of weight 0 may hold anything")
@pytest.mark.parametrize("junk", [NAN, INF, -INF, 3e38])
@pytest.mark.parametrize("dtype", [torch.bool, F32], ids=str)
@variants
def test_rows_of_weight_zero_may_hold_anything(where: Where, variant: str, dtype: torch.dtype, junk: float) -> None:
    """Padding: no NaN leaks out of a masked row, and its gradient is exactly zero, on both sides."""
    s, t = (x.clone() for x in logits("typical", (4, 6, 17)))
    w = some_weights((4, 6), dtype)
    s[w == 0] = junk
    t[(w == 0) & (torch.arange(6) % 2 == 0)] = junk
    both_ways(where, variant, s, t, (4, 6), row_weight=w)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@variants
def test_all_rows_masked(where: Where, variant: str, reduction: str) -> None:
    """Loss 0 (not 0/0), gradient 0, and still attached to the graph, so that a training step does not fail."""
    s, t = (torch.full((4, 17), NAN), torch.full((4, 17), NAN))
    for w in (torch.zeros(4, dtype=torch.bool), torch.zeros(4)):
        for grads in ("s", "t", "st"):
            got = where.run(**VARIANTS[variant], student=s, teacher=t, row_weight=w, reduction=reduction, grads=grads)
            assert (got.loss == 0).all()
            for g in (got.student, got.teacher):
                assert g is None or (g == 0).all()
    x = where.put(torch.randn(4, 17)).requires_grad_()
    options = {k: v for k, v in VARIANTS[variant].items() if k != "loss"}
    value = where.call(VARIANTS[variant]["loss"], x, where.put(t), row_weight=torch.zeros(4, dtype=torch.bool), **options)
    assert value.requires_grad and value.grad_fn is not None


@pytest.mark.parametrize(
    "denominator",
    [7, 2.5, torch.tensor(7), torch.tensor(7, dtype=torch.int32), torch.tensor(2.5), torch.tensor(2.5, dtype=F64)],
    ids=repr,
)
@variants
def test_denominator(where: Where, variant: str, denominator: Any) -> None:
    """A number or a 0-d tensor of any type replaces the divisor of a mean (and divides a sum)."""
    s, t = logits("typical", (4, 6, 17))
    w = some_weights((4, 6), F32)
    for weight, reduction, grads in itertools.product((None, w), ("sum", "mean", "batchmean"), ("s", "st")):
        check(
            where,
            **VARIANTS[variant],
            student=s,
            teacher=t,
            denominator=denominator,
            row_weight=weight,
            reduction=reduction,
            grads=grads,
        )


def test_gradient_accumulation_with_a_denominator(where: Where, loss: str) -> None:
    """The use of it: micro-batches divided by the whole batch's count add up to the whole batch."""
    s, t = logits("typical", (12, 17))
    w = some_weights((12,), F32, zeros=False)
    y = default_target((12,), 17)
    whole = where.run(loss, s, t, row_weight=w, reduction="mean", denominator=w.sum())
    parts = [
        where.run(loss, s[part], t[part], row_weight=w[part], reduction="mean", denominator=w.sum(), **target_of(loss, y[part]))
        for part in (slice(0, 4), slice(4, 8), slice(8, 12))
    ]
    truth = oracle(loss, s, t, row_weight=w, reduction="mean", denominator=w.sum())
    check_loss(sum((p.loss for p in parts), torch.zeros(())), truth, (s, t))
    check_grad(torch.cat([p.student for p in parts if p.student is not None]), truth.student, s, (s, t))
    check_loss(whole.loss, truth, (s, t))


@pytest.mark.parametrize("shape", [(0, 17), (0, 3, 17), (3, 0, 17)])
@variants
def test_no_rows(where: Where, variant: str, shape: tuple[int, ...]) -> None:
    """sum: 0; the means are NaN as torch's of nothing; batchmean over three empty rows divides by 3; "none" has no
    values."""
    s, t = torch.zeros(shape), torch.zeros(shape)
    for grads in ("s", "st"):
        for reduction in REDUCTIONS:
            got = where.run(**VARIANTS[variant], student=s, teacher=t, reduction=reduction, grads=grads)
            assert got.student is not None and got.student.shape == shape
            if reduction == "none":
                assert got.loss.shape == shape[:-1]
            elif reduction == "sum" or (reduction == "batchmean" and shape[0] > 0):
                assert got.loss == 0
            else:
                assert got.loss.isnan()
        got = where.run(**VARIANTS[variant], student=s, teacher=t, reduction="mean", denominator=5, grads=grads)
        assert got.loss == 0


# ------------------------------------------------------------------------------------------------------------
# num_classes


@pytest.mark.parametrize("fill", [0.0, 50.0, NAN, INF, -INF])
@variants
def test_num_classes(where: Where, variant: str, fill: float) -> None:
    """Padded vocabularies: columns from num_classes on are not read, and get a gradient of exactly zero."""
    s, t = (x.clone() for x in logits("typical", (3, 5, 23)))
    s[..., 17:] = fill
    t[..., 17:] = -fill
    both_ways(where, variant, s, t, (3, 5), num_classes=17)
    both_ways(where, variant, s, t[..., :17].contiguous(), (3, 5), num_classes=17)
    both_ways(where, variant, s[..., :19].contiguous(), t, (3, 5), num_classes=17)


@variants
def test_num_classes_of_the_whole_width_changes_nothing(where: Where, variant: str) -> None:
    s, t = logits("typical", (5, 17))
    a = where.run(**VARIANTS[variant], student=s, teacher=t, grads="st")
    assert a.loss > 0
    b = where.run(**VARIANTS[variant], student=s, teacher=t, grads="st", num_classes=17)
    assert torch.equal(a.loss, b.loss) and torch.equal(a.student, b.student) and torch.equal(a.teacher, b.teacher)
    check(where, **VARIANTS[variant], student=s, teacher=t, num_classes=1, grads="st")


# ------------------------------------------------------------------------------------------------------- -inf, NaN and
# inf

KL = pytest.mark.parametrize("variant", ["kl", "kl-two-tau", "kl-unscaled"])
WIDTHS = pytest.mark.parametrize("k", [5, 17, 200])  # less than a vector, a vector and a tail, many vectors


@WIDTHS
@KL
def test_teacher_minus_inf_contributes_nothing(where: Where, variant: str, k: int) -> None:
    """0 log 0 = 0; the student still pays for its mass there, through its softmax, and gets the gradient tau q."""
    s, t = (x.clone() for x in logits("typical", (6, k)))
    t[0, 0] = t[1, k - 1] = -INF
    t[2, 1:] = -INF  # a one-hot teacher: cross-entropy
    t[3, t[3].argmax()] = -INF
    both_ways(where, variant, s, t, (6,))


@pytest.mark.parametrize("tau", [1e-15, 1e-12, 1e-6, 1e-3])
@pytest.mark.parametrize("k", [1, 2, 100])
def test_tiny_temperatures(where: Where, k: int, tau: float) -> None:
    """Logits divided by tau have no digit left behind the point; where student and teacher agree there is nothing to learn."""
    t = logits("typical", (5, k))[1]
    for s in (t, t + 0.5):
        got = where.run("kl_div_tau", student=s.clone(), teacher=t, tau=tau, scale_by_tau_squared=False, grads="st")
        assert all(x.isfinite().all() for x in (got.loss, got.student, got.teacher))
        if s is t:
            assert got.loss == 0 and not got.student.any() and not got.teacher.any()
    s = logits("typical", (5, k))[0]
    check(where, "kl_div_tau", student=s, teacher=t, tau=tau, scale_by_tau_squared=False, grads="st")


# The CUDA kernels' classes of row length: part of a warp, a warp, a block, a cluster, blocks whose sums a second kernel merges.
@pytest.mark.parametrize("k", [3, 1000, 4096, 32000, 270000])
@pytest.mark.parametrize("tau", [0.05, 1e-12])
@pytest.mark.parametrize("place", [place for place in places() if place.backend == "cpp"], ids=str)
def test_one_class_with_all_the_mass(place: Where, tau: float, k: int) -> None:
    """(tests/triton_runs.py has the same for Triton.)"""
    s, t = torch.full((4, k), -90.0 * tau), torch.full((4, k), -90.0 * tau)
    s[:, [0, k - 1, 1]], t[:, [0, k - 1, 1]] = with_a_class_far_off(tau)
    for grads in ("s", "st"):
        check(place, "kl_div_tau", student=s, teacher=t, tau=tau, scale_by_tau_squared=False, grads=grads)


@pytest.mark.parametrize("tau", [0.05, 1.0, 4.0])
@pytest.mark.parametrize("alike", [2, 3, 40, 300, 5000, 32000, 270000])
@pytest.mark.parametrize("place", [place for place in places() if place.backend == "cpp"], ids=str)
def test_several_classes_with_all_the_mass(place: Where, alike: int, tau: float) -> None:
    """Alike on both sides, and one class of little mass far off."""
    t, s = torch.zeros(4, alike + 1), torch.zeros(4, alike + 1)
    t[:, -1] = -8
    s[:, -1] = torch.tensor([-60.0, -2000, -20000, -60])
    s[0, : alike // 2] = 0.25
    alone = place.device == "cpu" or alike <= 300  # on CUDA one of more is beyond the budget: README, Limits
    s[3, : 1 if alone else alike // 3] = 0.25
    for grads in ("s", "st"):
        check(place, "kl_div_tau", student=s * tau, teacher=t * tau, tau=tau, scale_by_tau_squared=False, grads=grads)


@pytest.mark.parametrize("k", [9, 1000, 4096, 32000, 270000])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("place", [place for place in places() if place.backend == "cpp"], ids=str)
def test_kd_loss_where_few_classes_have_all_the_mass(place: Where, dtype: torch.dtype, alpha: float, k: int) -> None:
    """As above; the target, of the hard part, is among them."""
    t, s = torch.full((3, k), -200.0), torch.full((3, k), -200.0)
    t[:, :3], s[:, :3] = torch.tensor([0.0, 0, -8]), torch.tensor([0.0, 0, -2000])
    t[1, 1] = s[1, 1] = -200
    t[2, 2], s[2, 2] = -14, -20000
    check(
        place,
        "kd_loss",
        student=s.to(dtype),
        teacher=t.to(dtype),
        tau=1.0,
        alpha=alpha,
        target=torch.zeros(3, dtype=torch.int64),
    )


@pytest.mark.contract("-inf on both sides is as if the class were not there")
@WIDTHS
@parts_of_a_batch
def test_minus_inf_on_both_sides_is_as_if_the_class_were_not_there(where: Where, variant: str, k: int) -> None:
    s, t = (x.clone() for x in logits("typical", (6, k)))
    s[:, 1] = t[:, 1] = -INF  # a whole masked column
    s[0, 0] = t[0, 0] = -INF  # in first place, where a running maximum starts
    s[1, 2:] = t[1, 2:] = -INF  # one class left
    s[2, k - 1] = t[2, k - 1] = -INF
    if variant.startswith("kl"):
        both_ways(where, variant, s, t, (6,))
    else:
        for grads in ("s", "st"):
            check(where, **VARIANTS[variant], student=s, teacher=t, reduction="sum", grads=grads)
    # the same numbers with the masked column cut out
    keep = [i for i in range(k) if i != 1]
    cut = where.run(**VARIANTS[variant], student=s[3:, keep], teacher=t[3:, keep], reduction="none", grads="st")
    got = where.run(**VARIANTS[variant], student=s[3:], teacher=t[3:], reduction="none", grads="st")
    for a, b in ((got.loss, cut.loss), (got.student[:, keep], cut.student), (got.teacher[:, keep], cut.teacher)):  # type: ignore[index]
        assert b is not None and torch.linalg.norm(a - b) <= 2e-6 * torch.linalg.norm(b)
    assert got.student is not None and (got.student[:, 1] == 0).all()


@WIDTHS
@KL
def test_student_minus_inf_where_the_teacher_has_mass_is_infinite(where: Where, variant: str, k: int) -> None:
    s, t = (x.clone() for x in logits("typical", (6, k)))
    s[1, 0] = s[2, k - 1] = -INF
    s[4, t[4].argmax()] = -INF
    for grads in ("s", "st"):
        got = check(where, **VARIANTS[variant], student=s, teacher=t, reduction="none", grads=grads)
        assert got.loss.isinf().tolist() == [False, True, True, False, True, False]
    assert where.run(**VARIANTS[variant], student=s, teacher=t, reduction="sum").loss == INF


@WIDTHS
def test_the_limit_of_large_temperature_with_minus_inf_on_one_side(where: Where, k: int) -> None:
    """As tau -> inf the softmaxes become uniform over the classes each side keeps: if they keep different ones, tau**2
    KL -> +inf."""
    s, t = (x.clone() for x in logits("typical", (4, k)))
    s[1, 0] = -INF
    t[2, k - 1] = -INF
    got = check(where, "kl_div_tau", s, t, tau=INF, reduction="none", grads="st")
    assert got.loss.isinf().tolist() == [False, True, True, False]


@WIDTHS
@pytest.mark.parametrize("variant", ["mse", "mse-center", "huber", "huber-center", "smooth-l1", "smooth-l1-center"])
def test_mse_with_minus_inf_on_one_side_is_infinite(where: Where, variant: str, k: int) -> None:
    """As torch's mse_loss; centred too, which must not make inf - inf of it.  Other rows do not notice."""
    s, t = (x.clone() for x in logits("typical", (5, k)))
    s[1, 0] = s[3, k // 2] = -INF
    t[2, k - 1] = -INF
    for grads in ("s", "st"):
        got = check(where, **VARIANTS[variant], student=s, teacher=t, reduction="none", grads=grads)
        assert got.loss.isinf().tolist() == [False, True, True, True, False]


@pytest.mark.contract("NaN stays in its row")
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("junk", [NAN, NAN_WITH_PAYLOAD, INF], ids=["nan", "payload", "inf"])
@WIDTHS
@parts_of_a_batch
def test_nan_stays_in_its_row(where: Where, variant: str, k: int, junk: float, side: str) -> None:
    """NaN (and +inf, which no softmax can take) makes its own row NaN, loss and gradient, and no other."""
    s, t = (x.clone() for x in logits("typical", (6, k)))
    for row, column in ((1, 0), (2, k // 2), (4, k - 1)):
        if side != "teacher":
            s[row, column] = junk
        if side != "student":
            t[row, column] = junk
    clean = [0, 3, 5]
    for grads in ("s", "st"):
        got = where.run(**VARIANTS[variant], student=s, teacher=t, reduction="none", grads=grads)
        if math.isnan(junk):
            assert got.loss.isnan().tolist() == [False, True, True, False, True, False]
        else:
            assert got.loss.isfinite().tolist() == [True, False, False, True, False, True]
        truth = oracle(**VARIANTS[variant], student=s[clean], teacher=t[clean], reduction="none")
        check_loss(got.loss[clean], truth, (s, t))
        assert got.student is not None
        check_grad(got.student[clean], truth.student, s[clean], (s, t))
        # a robust loss has a slope even there: that of its line
        robust = variant.startswith(("huber", "smooth")) and junk == INF and side != "both"
        assert got.student[[1, 2, 4]].isfinite().all(-1).tolist() == [robust] * 3
        if math.isnan(junk) and variant.startswith("kl"):
            assert got.student[[1, 2, 4]].isnan().all()
        if grads == "st":
            assert got.teacher is not None
            check_grad(got.teacher[clean], truth.teacher, t[clean], (s, t))
    got = where.run(**VARIANTS[variant], student=s, teacher=t, reduction="sum", grads="s")
    truth = oracle(**VARIANTS[variant], student=s[clean], teacher=t[clean], reduction="sum")
    assert got.student is not None and not got.loss.isfinite()
    check_grad(got.student[clean], truth.student, s[clean], (s, t))


# ----------------------------------------------------------------------------------------------------------------
# strides


def sliced_time(x: Tensor) -> Tensor:
    return x[:, :-1]


def sliced_classes(x: Tensor) -> Tensor:
    return x[..., 1:-2]


def transposed_lead(x: Tensor) -> Tensor:
    return x.transpose(0, 1)


def every_other_row(x: Tensor) -> Tensor:
    return x[::2, 1::2]


def class_first(x: Tensor) -> Tensor:
    return x.transpose(-1, -2)


VIEWS = [sliced_time, sliced_classes, transposed_lead, every_other_row, class_first]


@pytest.mark.parametrize("pair", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("view", VIEWS)
@variants
def test_strided_views(where: Where, variant: str, view: Callable[[Tensor], Tensor], pair: str) -> None:
    """Leading dimensions in any order; a class dimension that does not have stride 1 too.  Student and teacher alike,
    then one of them."""
    s, t = logits("typical", (4, 7, 19), PAIRS[pair])
    plain_s, plain_t = view(s).contiguous(), view(t).contiguous()
    for reduction, grads in (("sum", "s"), ("none", "st"), ("mean", "t")):
        options = dict(VARIANTS[variant], reduction=reduction, grads=grads)
        check(where, student=s, teacher=t, view=view, **options)
        check(where, student=s, teacher=plain_t, view=view, teacher_view=lambda x: x, **options)
        check(where, student=plain_s, teacher=t, teacher_view=view, **options)


@variants
def test_four_dimensions(where: Where, variant: str) -> None:
    s, t = logits("typical", (2, 3, 4, 19))
    permuted = lambda x: x.permute(2, 0, 1, 3)[:, :, 1:]  # noqa: E731
    for reduction, grads in (("batchmean", "s"), ("none", "st")):
        check(where, **VARIANTS[variant], student=s, teacher=t, reduction=reduction, grads=grads)
        check(where, **VARIANTS[variant], student=s, teacher=t, view=permuted, reduction=reduction, grads=grads)


@variants
def test_more_leading_dimensions_than_any_kernel_holds(where: Where, variant: str) -> None:
    """Eight leading dimensions in reversed order: none of them merge."""
    s, t = logits("typical", (2,) * 8 + (5,))
    reverse = lambda x: x.permute(*reversed(range(8)), 8)  # noqa: E731
    for reduction, grads in (("sum", "s"), ("none", "st")):
        check(where, **VARIANTS[variant], student=s, teacher=t, view=reverse, reduction=reduction, grads=grads)


@variants
def test_expanded_teacher(where: Where, variant: str) -> None:
    """One teacher for several student views: stride 0; its gradient has the expanded shape (autograd sums it)."""
    s, t = logits("typical", (4, 6, 19))
    one = t[:1]
    for grads, reduction in (("s", "sum"), ("st", "none")):
        check(
            where,
            **VARIANTS[variant],
            student=s,
            teacher=one,
            teacher_view=lambda x: x.expand(4, 6, 19),
            grads=grads,
            reduction=reduction,
        )
    if where.runs_torch:
        x, y = (where.put(side).clone().requires_grad_() for side in (s, one))
        options = {k: v for k, v in VARIANTS[variant].items() if k != "loss"}
        where.call(VARIANTS[variant]["loss"], x, y.expand(4, 6, 19), reduction="sum", **options).backward()
        truth = oracle(**VARIANTS[variant], student=s, teacher=one.expand(4, 6, 19), reduction="sum")
        check_grad(y.grad.cpu(), truth.teacher.sum(0, keepdims=True), one, (s, t))


@pytest.mark.parametrize("dtype, rows, k", [(F32, 40, 54321), (F32, 27, 81921), (F32, 16, 140001), (BF16, 110, 40001)], ids=str)
def test_rows_written_past_the_caches_have_the_bits_of_each_alone(
    objective: Objective, dtype: torch.dtype, rows: int, k: int
) -> None:
    """From 8 MiB of gradient on, where a row's may be written while the next one is summed: by lines, which begin anywhere in these
    rows. Targets at both ends of a row and in parts of lines; a row near its teacher and a masked one between the others."""
    s, t = logits("typical", (rows, k), (dtype, dtype))
    s[rows // 2] = t[rows // 2] + 1e-3
    y = torch.arange(rows) % 7
    y[rows // 2 :] = k - 1 - y[rows // 2 :]
    w = torch.ones(rows)
    w[rows // 3] = 0

    def gradient(part: slice) -> Tensor:
        x = s[part].clone().requires_grad_()
        target = (y[part],) if objective.loss == "kd_loss" else ()
        loss = getattr(kdfast, objective.loss)(
            x, t[part], *target, reduction="sum", row_weight=w[part], **dict(objective.options)
        )
        (got,) = torch.autograd.grad(loss, x)
        return got

    together = gradient(slice(None))
    for row in range(rows):
        assert torch.equal(together[row], gradient(slice(row, row + 1))[0]), row


@pytest.mark.contract("strided logits are not copied")
def test_a_strided_view_is_not_copied(loss: str) -> None:
    """64 MiB of logits, the last time step cut off: a no-grad forward needs room for one value a row, not for a
    copy."""
    s, t = torch.randn(32, 17, 32000), torch.randn(32, 17, 32000)
    call = loss_of(loss)
    with torch.no_grad():
        for a, b in ((s[:, :-1], t[:, :-1]), (s.transpose(0, 1), t.transpose(0, 1)), (s, t[:1].expand_as(s))):
            assert peak_memory(lambda a=a, b=b: call(a, b)) < 8 << 20


# ----------------------------------------------------------------------------------------------------------- in-place
# backward


@pytest.mark.parametrize("pair", ["fp32", "bf16", "fp16", "fp64"])
@variants
def test_inplace_backward_writes_into_the_student(kernel: Where, variant: str, pair: str) -> None:
    s, t = logits("typical", (6, 35), PAIRS[pair])
    options = {k: v for k, v in VARIANTS[variant].items() if k != "loss"}
    for reduction in ("sum", "none", "mean"):
        truth = oracle(**VARIANTS[variant], student=s, teacher=t, reduction=reduction)
        leaf = kernel.put(s).requires_grad_()
        inner = as_output(leaf)
        value = kernel.call(
            VARIANTS[variant]["loss"], inner, kernel.put(t), reduction=reduction, inplace_backward=True, **options
        )
        check_loss(value.detach().cpu(), truth, (s, t))
        seed = torch.ones(value.shape, dtype=value.dtype).to(kernel.device)
        (g,) = torch.autograd.grad(value, leaf, seed)
        check_grad(g.cpu(), truth.student, s, (s, t))
        assert g.data_ptr() == inner.data_ptr(), "a gradient of its own: not in place"


@pytest.mark.parametrize("pair", ["fp32", "bf16"])
@variants
def test_inplace_backward_writes_the_rows_it_was_given_and_nothing_else(kernel: Where, variant: str, pair: str) -> None:
    """A view without the last step, padded columns, rows of weight zero that hold NaN: the gradient lands in the view (zeros in
    the padding and the masked rows), and what the view leaves out keeps its bits."""
    s, t = logits("typical", (4, 7, 19), PAIRS[pair])
    w = some_weights((4, 6), F32)
    s[:, :-1][w == 0] = NAN
    s[..., 16:] = NAN
    options = {k: v for k, v in VARIANTS[variant].items() if k != "loss"} | {"num_classes": 16, "reduction": "sum"}
    truth = oracle(VARIANTS[variant]["loss"], s[:, :-1], t[:, :-1], row_weight=w, grad_output=0.5, **options)
    leaf = kernel.put(s).requires_grad_()
    view = as_output(leaf)[:, :-1]
    value = kernel.call(VARIANTS[variant]["loss"], view, kernel.put(t)[:, :-1], row_weight=w, inplace_backward=True, **options)
    check_loss(value.detach().cpu(), truth, (s, t))
    (g,) = torch.autograd.grad(value, view, torch.tensor(0.5, dtype=value.dtype).to(kernel.device))
    assert g.data_ptr() == leaf.data_ptr() and g.stride() == view.stride()
    after = leaf.detach().cpu()
    check_grad(after[:, :-1], truth.student, s[:, :-1], (s, t), silent=truth.no_student)
    assert torch.equal(after[:, -1].nan_to_num(7), s[:, -1].nan_to_num(7))


@variants
def test_inplace_backward_needs_something_to_overwrite(kernel: Where, variant: str) -> None:
    """A leaf would lose the caller's data, by a view of it too; an expanded tensor has several logits in one place: refused before
    anything is written."""
    loss = VARIANTS[variant]["loss"]
    options = {k: v for k, v in VARIANTS[variant].items() if k != "loss"}
    s, t = (kernel.put(x.clone()) for x in logits("typical", (6, 35)))
    before = s.cpu().clone()
    leaf = s.requires_grad_()
    with pytest.raises((ValueError, RuntimeError), match=r"(?s)inplace_backward.*leaf"):
        kernel.call(loss, leaf, t, inplace_backward=True, **options)
    for view in (
        leaf.view_as(leaf),
        leaf.view(2, 3, 35).view(6, 35),
        leaf[1:-1, 3:],
        leaf.split(6)[0],
        leaf.unbind(1)[2].view(2, 3),
    ):
        with pytest.raises(ValueError, match=r"inplace_backward.*a view of one"):
            kernel.call(loss, view, view.detach(), inplace_backward=True, **options)
    leaf_of_a_buffer = s.detach()[1:].requires_grad_()  # a leaf, and a view
    for taken in (leaf_of_a_buffer, leaf_of_a_buffer.view(5, 35)):
        with pytest.raises(ValueError, match=r"inplace_backward.*leaf"):
            kernel.call(loss, taken, t[1:], inplace_backward=True, **options)
    overlapping = as_output(leaf)[:1].expand(6, 35)
    with pytest.raises((ValueError, RuntimeError), match="inplace_backward"):
        kernel.call(loss, overlapping, t, inplace_backward=True, **options)
    assert torch.equal(leaf.detach().cpu(), before)


def test_inplace_backward_is_refused_by_the_reference(loss: str) -> None:
    s, t = logits("typical", (6, 35))
    with pytest.raises(ValueError, match=r"inplace_backward.*reference"):
        loss_of(loss)(s.requires_grad_() * 1, t, inplace_backward=True, backend="reference")


def test_inplace_backward_does_not_corrupt_other_users(loss: str) -> None:
    """Whoever saved the logits before gets the right gradient or autograd's error, never a wrong number."""
    s, t = logits("typical", (6, 35))
    for order in ("before", "after"):
        w = s.clone().requires_grad_()
        inner = w * 1
        other = inner.square().sum() if order == "before" else None
        value = loss_of(loss)(inner, t, reduction="sum", inplace_backward=True)
        if other is None:
            other = inner.square().sum()
        want = torch.from_numpy(oracle(loss, s, t, reduction="sum").student).float() + 2 * s
        try:
            (value + other).backward()
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            continue
        assert w.grad is not None and torch.linalg.norm(w.grad - want) <= 2e-6 * torch.linalg.norm(want), order


def test_inplace_backward_twice(loss: str) -> None:
    """After the logits are overwritten a second backward cannot be right by recomputing: it must be right by other
    means, or refuse."""
    s, t = logits("typical", (6, 35))
    for reduction in ("sum", "none"):
        w = s.clone().requires_grad_()
        value = loss_of(loss)(w * 1, t, reduction=reduction, inplace_backward=True).sum()
        truth = oracle(loss, s, t, reduction="sum").student
        (first,) = torch.autograd.grad(value, w, retain_graph=True)
        check_grad(first, truth, s, (s, t))
        try:
            (second,) = torch.autograd.grad(value, w)
        except RuntimeError:
            continue
        check_grad(second, truth, s, (s, t))


def test_inplace_backward_with_the_teacher_in_the_same_memory(loss: str) -> None:
    """Self-distillation from a slice of the same storage: the right gradient, or an error."""
    base, _ = logits("typical", (12, 35))
    for make in (lambda x: (x[:6], x[6:]), lambda x: (x[:8], x[4:])):  # disjoint, overlapping
        w = base.clone().requires_grad_()
        inner = w * 1
        a, b = make(inner)
        truth = oracle(loss, *make(base), reduction="sum")
        try:
            value = loss_of(loss)(a, b.detach(), reduction="sum", inplace_backward=True)
            (g,) = torch.autograd.grad(value, w)
        except (RuntimeError, ValueError):
            continue
        want = np.zeros(base.shape)
        want[: len(a)] = truth.student
        check_grad(g, want, base, (base, base))


def test_inplace_backward_with_the_teacher_in_the_same_memory_under_another_storage(loss: str) -> None:
    inner = torch.randn(12, 35).requires_grad_() * 1
    teacher = torch.from_dlpack(inner.detach())
    with pytest.raises(ValueError, match=r"inplace_backward.*teacher_logits"):
        loss_of(loss)(inner[1:], teacher[:-1], inplace_backward=True)
    loss_of(loss)(inner[6:], teacher[:6], inplace_backward=True)


def test_inplace_backward_of_logits_without_addresses() -> None:
    inner, teacher = (torch.empty(12, 35, device="meta", requires_grad=grad) * 1 for grad in (True, False))
    kdfast.kl_div_tau(inner, teacher, inplace_backward=True).backward()


def test_inplace_backward_of_many_gradients_at_once(loss: str) -> None:
    """is_grads_batched: there is one gradient's room alone, so none of them takes it."""
    s, t = logits("typical", (6, 35))
    inner = s.clone().requires_grad_() * 1
    value = loss_of(loss)(inner, t, reduction="none", inplace_backward=True)
    (got,) = torch.autograd.grad(value, inner, torch.eye(6), is_grads_batched=True)
    for row in range(6):
        check_grad(got[row], oracle(loss, s, t, reduction="none", grad_output=torch.eye(6)[row]).student, s, (s, t))
    assert torch.equal(inner.detach(), s)


@pytest.mark.parametrize("saving", ["hooks", "save_on_cpu", "checkpoint", "allow_mutation"])
def test_inplace_backward_under_hooks_on_saved_tensors(objective: Objective, saving: str) -> None:
    """Nobody looks at the version of what a hook gives back: what others need must not be overwritten."""
    s, t = logits("typical", (6, 35))

    def head(x: Tensor, inplace: bool) -> Tensor:
        logits = x * 1
        return logits.square().sum() + objective(logits, t, inplace_backward=inplace)

    want = torch.autograd.grad(head(w := s.clone().requires_grad_(), False), w)[0]
    w = s.clone().requires_grad_()
    contexts: dict[str, Any] = {
        "hooks": saved_tensors_hooks(lambda x: x, lambda x: x),
        "save_on_cpu": torch.autograd.graph.save_on_cpu(),
        "allow_mutation": torch.autograd.graph.allow_mutation_on_saved_tensors(),
    }
    with contexts.get(saving, contextlib.nullcontext()):
        value = checkpoint(head, w, True, use_reentrant=False) if saving == "checkpoint" else head(w, True)
        for _ in range(2):
            torch.testing.assert_close(torch.autograd.grad(value, w, retain_graph=True)[0], want, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------- repeated backwards,
# several losses


@pytest.mark.contract("a second backward through a retained graph")
@pytest.mark.parametrize("grads", ["s", "st"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@variants
def test_second_backward_through_a_retained_graph(where: Where, variant: str, dtype: torch.dtype, grads: str) -> None:
    """Right each time, whatever came in, and whatever was done to the gradients handed out before."""
    s, t = logits("typical", (6, 35), (dtype, dtype))
    options = {k: v for k, v in VARIANTS[variant].items() if k != "loss"}
    x, y = where.put(s.clone()).requires_grad_(), where.put(t.clone()).requires_grad_("t" in grads)
    value = where.call(VARIANTS[variant]["loss"], x, y, reduction="sum", **options)
    sides = (x, y) if "t" in grads else (x,)
    handed_out = []
    for seed in (1.0, 1.0, 0.5, 1.0, -2.0, 1.0):
        got = torch.autograd.grad(value, sides, torch.tensor(seed, dtype=value.dtype).to(where.device), retain_graph=True)
        truth = oracle(**VARIANTS[variant], student=s, teacher=t, reduction="sum", grad_output=seed)
        handed_out.append((got, truth))
        if seed == 0.5 and where.runs_torch:
            for g in handed_out.pop()[0]:
                g.zero_()  # clipping, for instance, works in place
    for got, truth in handed_out:  # judged last: a later backward must not write into what an earlier one returned
        check_grad(got[0].cpu(), truth.student, s, (s, t))
        if "t" in grads:
            check_grad(got[1].cpu(), truth.teacher, t, (s, t))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@variants
def test_grad_accumulates_over_backwards(variant: str, dtype: torch.dtype) -> None:
    """.grad is added to in place; if it is the buffer kept for the next backward, the third result is wrong."""
    s, t = logits("typical", (6, 35), (dtype, dtype))
    options = {k: v for k, v in VARIANTS[variant].items() if k != "loss"}
    x = s.clone().requires_grad_()
    value = Where("cpu", "cpp").call(VARIANTS[variant]["loss"], x, t, reduction="sum", **options)
    value.backward(retain_graph=True)
    check_grad(x.grad, oracle(**VARIANTS[variant], student=s, teacher=t, reduction="sum").student, s, (s, t))
    assert x.grad is not None
    first, total = x.grad.clone(), x.grad.clone()
    for _ in range(3):
        value.backward(retain_graph=True)
        assert torch.equal(x.grad, total.add_(first))


@variants
def test_logits_made_in_inference_mode(where: Where, variant: str) -> None:
    """A teacher's, as often: autograd saves no such tensor, but the loss needs none that could have changed."""
    s, t = logits("typical", (6, 35))
    options = {k: v for k, v in VARIANTS[variant].items() if k != "loss"}
    with torch.inference_mode():
        frozen = where.put(t.clone())
    for reduction in ("none", "sum"):
        x = where.put(s.clone()).requires_grad_()
        value = where.call(VARIANTS[variant]["loss"], x, frozen, reduction=reduction, **options)
        (g,) = torch.autograd.grad(value, x, torch.ones(value.shape).to(where.device))
        check_grad(g.cpu(), oracle(**VARIANTS[variant], student=s, teacher=t, reduction=reduction).student, s, (s, t))


def test_a_teacher_made_in_inference_mode_is_freed_after_the_backward(loss: str) -> None:
    """As autograd frees what it saves, be the loss kept."""
    for reduction in ("none", "mean"):
        with torch.inference_mode():
            t = torch.randn(4, 7)
        alive = weakref.ref(t)
        x = torch.randn(4, 7, requires_grad=True)
        value = loss_of(loss)(x, t, reduction=reduction)
        del t
        (first,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
        assert alive() is not None
        (again,) = torch.autograd.grad(value.sum(), x)
        assert alive() is None and torch.equal(first, again)


def test_a_student_changed_beside_a_teacher_made_in_inference_mode() -> None:
    """The check of the others is not lost."""
    with torch.inference_mode():
        t = torch.randn(4, 7)
    x = torch.randn(4, 7).requires_grad_() * 1
    value = kdfast.kl_div_tau(x, t, reduction="none")
    x.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


@pytest.mark.parametrize("lead", [(0,), (3, 0), (0, 2)], ids=str)
@variants
def test_no_rows_in_any_layout(where: Where, variant: str, lead: tuple[int, ...]) -> None:
    """torch calls every layout of no elements contiguous."""
    s, t = (torch.zeros(7, *lead).movedim(0, -1) for _ in range(2))
    for grads in ("s", "st"):
        got = where.run(student=s, teacher=t, reduction="sum", grads=grads, **VARIANTS[variant])
        assert got.loss == 0 and got.student is not None and got.student.shape == s.shape


def test_several_losses_are_summed(where: Where) -> None:
    """Two distillation terms on the same logits, each with its own factor: the incoming gradients are 0.25 and 2."""
    if not where.runs_torch:
        pytest.skip("PyTorch's own kernels, which add here, do not run under the emulator")
    s, t = logits("typical", (6, 35), (F64, F64))
    x, y = where.put(s).clone().requires_grad_(), where.put(t)
    total = (
        0.25 * where.call("kl_div_tau", x, y, tau=4.0)
        + 2 * where.call("logit_mse", x, y)
        + where.call("kl_div_tau", x, y, tau=INF)
    )
    total.backward()
    a, b, c = (
        oracle("kl_div_tau", s, t, 4.0, grad_output=0.25),
        oracle("logit_mse", s, t, grad_output=2.0),
        oracle("kl_div_tau", s, t, INF),
    )
    check_grad(x.grad.cpu(), a.student + b.student + c.student, s, (s, t))


def test_backward_of_a_part_of_the_rows(where: Where, loss: str) -> None:
    """reduction="none", one row picked afterwards: the other rows' gradient is exactly zero."""
    s, t = logits("typical", (6, 35))
    seed = torch.zeros(6)
    seed[2] = 1
    got = check(where, loss, s, t, reduction="none", grads="st", grad_output=seed)
    assert got.student is not None and (got.student[[0, 1, 3, 4, 5]] == 0).all() and (got.student[2] != 0).any()


def test_expanded_grad_output(loss: str) -> None:
    """loss.sum().backward() hands down a stride-0 gradient; a transposed one is as good."""
    s, t = logits("typical", (4, 6, 35))
    for out in (torch.tensor(0.5).expand(4, 6), (torch.arange(24.0).reshape(6, 4) / 8).t()):
        x = s.clone().requires_grad_()
        value = loss_of(loss)(x, t, reduction="none")
        (g,) = torch.autograd.grad(value, x, out)
        check_grad(g, oracle(loss, s, t, reduction="none", grad_output=out).student, s, (s, t))


def test_no_grad_and_detached_inputs(where: Where, loss: str) -> None:
    s, t = (where.put(x.clone()) for x in logits("typical", (6, 35)))
    assert not where.call(loss, s, t).requires_grad
    with torch.no_grad():
        assert not where.call(loss, s.requires_grad_(), t).requires_grad
    with torch.inference_mode():
        assert not where.call(loss, s.detach(), t).requires_grad
    assert where.call(loss, s, t).requires_grad


@pytest.mark.contract("inputs are never written")
def test_inputs_are_never_written(where: Where, loss: str) -> None:
    s, t = logits("typical", (6, 35))
    x, y, w = where.put(s.clone()).requires_grad_(), where.put(t.clone()).requires_grad_(), where.put(torch.ones(6))
    versions = x._version, y._version
    for sides in ((x,), (x, y)):
        value = where.call(loss, x, y, row_weight=w, reduction="sum")
        torch.autograd.grad(value, sides, torch.ones(()).to(where.device))
    assert torch.equal(x.detach().cpu(), s) and torch.equal(y.detach().cpu(), t) and torch.equal(w.cpu(), torch.ones(6))
    assert (x._version, y._version) == versions


def test_modifying_the_logits_before_backward_is_an_error(loss: str) -> None:
    """What the recompute path reads again must be what the forward saw: autograd's version counters say so."""
    s, t = logits("typical", (6, 35))
    for reduction, side in itertools.product(("none", "sum"), ("student", "teacher")):
        w, y = s.clone().requires_grad_(), t.clone()
        inner = w * 1
        value = loss_of(loss)(inner, y, reduction=reduction).sum()
        with torch.no_grad():
            (inner if side == "student" else y).mul_(2)
        try:
            (g,) = torch.autograd.grad(value, w)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
        else:
            check_grad(g, oracle(loss, s, t, reduction="sum").student, s, (s, t))


# ---------------------------------------------------------------------------------------------------- determinism and
# memory


@pytest.mark.contract("same input, same bits, any number of threads")
@pytest.mark.parametrize("shape", [(64, 10), (37, 1003), (4, 32000)])
@pytest.mark.parametrize("pair", ["fp32", "bf16"])
@variants
def test_same_input_same_bits(kernel: Where, variant: str, pair: str, shape: tuple[int, int]) -> None:
    """Over 100 runs (25 for the long rows) and for one thread and two."""
    s, t = logits("typical", shape, PAIRS[pair])
    threads = torch.get_num_threads()
    seen = None
    try:
        for i in range(25 if shape[1] > 2000 else 100):
            torch.set_num_threads(1 + i % 2)
            parts = []
            for grads, reduction in (("s", "sum"), ("st", "none")):
                got = kernel.run(**VARIANTS[variant], student=s, teacher=t, grads=grads, reduction=reduction)
                parts += [x for x in (got.loss, got.student, got.teacher) if x is not None]
            if seen is None:
                seen = parts
                assert all(x.abs().max() > 0 for x in parts)
            else:
                assert all(torch.equal(a, b) for a, b in zip(seen, parts, strict=True)), f"run {i}"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.contract("same input, same bits, any number of threads")
@pytest.mark.parametrize(
    ("shape", "classes"), [((40000, 70), 70), ((9000, 300), 299), ((2400, 1031), 1031), ((80, 33000), 32999)]
)
@pytest.mark.parametrize("pair", ["fp32", "bf16", "fp32-bf16"])
@pytest.mark.parametrize("loss", ["kl_div_tau", "kd_loss"])
@pytest.mark.parametrize("reduction", ["none", "sum"])  # plain rows are those of a gradient written in forward
def test_a_large_gradient_is_that_of_its_parts(
    loss: str, pair: str, shape: tuple[int, int], classes: int, reduction: str
) -> None:
    """Gradients of 8 MiB are written past the caches, a row's beside the next row's sums: the bits of small calls, whatever
    row comes next (one of no weight, one near the teacher, one far off, one whose target is sure or ignored)."""
    rows, width = shape[0] * 4 // PAIRS[pair][0].itemsize, shape[1]
    generator = torch.Generator().manual_seed(rows)
    s, t = (3 * torch.randn(rows, width, generator=generator) for _ in range(2))
    near = torch.rand(rows, generator=generator) < 0.2
    s[near] = t[near] + 1e-3 * s[near]
    y = torch.randint(classes, (rows,), generator=generator)
    sure = torch.rand(rows, generator=generator) < 0.3
    s[sure, y[sure]] += 25
    y[torch.rand(rows, generator=generator) < 0.1] = -100
    weight = torch.rand(rows, generator=generator)
    weight[weight < 0.1] = 0
    s, t = s.to(PAIRS[pair][0]), t.to(PAIRS[pair][1])
    assert s.numel() * s.element_size() >= 8 << 20

    def gradient(at: slice) -> tuple[Tensor, Tensor]:
        student = s[at].clone().requires_grad_()
        options = {"tau": 4.0, "row_weight": weight[at], "num_classes": classes, "reduction": reduction}
        if loss == "kd_loss":
            options |= {"alpha": 0.3, "label_smoothing": 0.1}
        value = getattr(kdfast, loss)(student, t[at], **target_of(loss, y[at]), **options, backend="cpp")
        value.backward(torch.ones_like(value))
        assert student.grad is not None
        return value.detach(), student.grad

    parts = [gradient(slice(i, i + 64)) for i in range(0, rows, 64)]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            value, grad = gradient(slice(0, rows))
            if reduction == "none":
                assert torch.equal(value, torch.cat([part[0] for part in parts]))
            assert torch.equal(grad, torch.cat([part[1] for part in parts])), f"{count} threads"
    finally:
        torch.set_num_threads(threads)
    assert grad[weight > 0].abs().amax(-1).min() > 0 and not grad[:, classes:].any() and not grad[weight == 0].any()


@pytest.mark.parametrize("widths", [(1031, 1033), (1032, 1031), (1031, 1031)])
@pytest.mark.parametrize("pair", ["fp32", "bf16", "fp32-bf16", "bf16-fp32"])
@pytest.mark.parametrize(
    "objective",
    [
        Objective("kl_div_tau"),
        Objective("kd_loss"),
        Objective("kd_loss", (("soft", "mse"),)),
        *(Objective(loss, (("center", center),)) for loss in ("logit_mse", "logit_huber") for center in (False, True)),
    ],
    ids=str,
)
def test_two_large_gradients_are_those_of_their_parts(objective: Objective, pair: str, widths: tuple[int, int]) -> None:
    """The student's and the teacher's rows begin at different places of a cache line, where each is written past the
    caches."""
    rows, classes = 4800, min(widths)
    generator = torch.Generator().manual_seed(rows)
    s, t = (torch.randn(rows, k, generator=generator).to(d) for k, d in zip(widths, PAIRS[pair], strict=True))
    y = torch.randint(classes, (rows,), generator=generator)
    options = {**dict(objective.options), "num_classes": classes, "reduction": "sum", "backend": "cpp"}

    def gradients(at: slice) -> tuple[Tensor | None, ...]:
        student, teacher = (x[at].clone().requires_grad_() for x in (s, t))
        getattr(kdfast, objective.loss)(student, teacher, **target_of(objective.loss, y[at]), **options).backward()
        return student.grad, teacher.grad

    whole = gradients(slice(0, rows))
    parts = zip(*(gradients(slice(i, i + 64)) for i in range(0, rows, 64)), strict=True)
    for grad, of_parts in zip(whole, parts, strict=True):
        assert grad is not None and grad[:, :classes].abs().amax(-1).min() > 0 and not grad[:, classes:].any()
        assert torch.equal(grad, torch.cat(of_parts))


@pytest.mark.parametrize("loss", ["logit_mse", "logit_huber"])
def test_a_large_centred_gradient_is_that_of_its_parts(loss: str) -> None:
    """What the mean difference and the mean slope are does not depend on where the gradient lies."""
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(2400, 1003, generator=generator) for _ in range(2))

    def gradient(at: slice) -> Tensor:
        student = s[at].clone().requires_grad_()
        getattr(kdfast, loss)(student, t[at], center=True, reduction="sum", backend="cpp").backward()
        assert student.grad is not None
        return student.grad

    parts = torch.cat([gradient(slice(i, i + 64)) for i in range(0, len(s), 64)])
    assert parts.abs().amax(-1).min() > 0 and torch.equal(gradient(slice(0, len(s))), parts)


def test_both_ways_to_the_gradient_agree(kernel: Where) -> None:
    """The gradient written during the forward and the one a backward computes: the same within the budget (and each is judged
    in test_accuracy)."""
    s, t = logits("typical", (37, 1003))
    for variant in VARIANTS.values():
        a = kernel.run(**variant, student=s, teacher=t, grads="s", reduction="sum").student
        b = kernel.run(**variant, student=s, teacher=t, grads="s", reduction="none", grad_output=torch.ones(37)).student
        assert a is not None and b is not None and a.abs().max() > 0
        assert torch.linalg.norm(a - b) <= 2e-6 * torch.linalg.norm(a)


@pytest.mark.contract("no growth over 10,000 steps")
def test_no_memory_growth(objective: Objective) -> None:
    """10,000 steps on a tiny problem: a leak of one row's statistics a step would be 600 kB, of a tensor object several
    MB."""
    s, t = (x.clone() for x in logits("typical", (8, 10)))
    s.requires_grad_()

    def steps(count: int) -> None:
        for i in range(count):
            (objective(s, t) if i % 2 else objective(s, t, reduction="none").sum()).backward()
            s.grad = None

    steps(1000)
    growth = []
    for _ in range(3):  # the C library's heap may grow once; a leak grows each time
        gc.collect()
        before, objects = resident_memory(), len(gc.get_objects())
        steps(10_000)
        gc.collect()
        growth.append(resident_memory() - before)
        assert len(gc.get_objects()) - objects < 50
    assert min(growth) < 1 << 20


@pytest.mark.contract("no reference cycles")
@BACKENDS
def test_no_reference_cycles(loss: str, backend: str) -> None:
    """Inputs and graph die with their last name, not at the next garbage collection (which may come after running out
    of memory)."""
    gc.collect()
    gc.disable()
    try:
        for reduction in ("sum", "none"):
            s, t = (x.clone() for x in logits("typical", (8, 10)))
            value = loss_of(loss)(s.requires_grad_() * 1, t, reduction=reduction, backend=backend).sum()
            value.backward()
            watched = [weakref.ref(x) for x in (s, t, value)]
            del s, t, value
            assert all(w() is None for w in watched), reduction
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------------------- relations,
# modules


def test_mse_is_torchs(where: Where) -> None:
    s, t = logits("typical", (3, 5, 17), (F64, F64))
    for reduction in ("mean", "sum"):
        want = F.mse_loss(s, t, reduction=reduction)
        assert abs(where.run("logit_mse", s, t, reduction=reduction, grads="").loss - want) <= 1e-14 * want


@pytest.mark.parametrize("delta", [0.1, 1.0, 3.0])
def test_smooth_l1_is_torchs(where: Where, delta: float) -> None:
    """The name says so: torch's smooth_l1_loss with beta = delta, loss and gradient; its huber_loss is delta times that."""
    s, t = logits("typical", (3, 5, 17), (F64, F64))
    for reduction in ("mean", "sum"):
        x = s.clone().requires_grad_()
        want = F.smooth_l1_loss(x, t, beta=delta, reduction=reduction)
        want.backward()
        got = where.run("logit_huber", s, t, delta=delta, kind="smooth_l1", reduction=reduction)
        assert abs(got.loss - want.detach()) <= 1e-14 * want.detach()
        assert got.student is not None and torch.linalg.norm(got.student - x.grad) <= 1e-14 * torch.linalg.norm(x.grad)
        huber = F.huber_loss(s, t, delta=delta, reduction=reduction)
        assert abs(delta * got.loss - huber) <= 1e-14 * huber


@pytest.mark.parametrize("delta", [1e-15, 1e-3, 1.0, 1e3, 1e15])
@pytest.mark.parametrize("kind", ["pseudo", "smooth_l1"])
def test_huber_between_the_square_and_the_line(where: Where, kind: str, delta: float) -> None:
    """A delta far above the differences leaves a square, far below a line, and neither end loses digits: differences from
    1e-18 delta to 1e18."""
    d = torch.cat([torch.logspace(-18, 18, 37), -torch.logspace(-18, 18, 37)]).reshape(2, 37)
    d = d.clamp(-3e18 / max(delta, 1), 3e18 / max(delta, 1))
    for grads, reduction in (("s", "sum"), ("st", "none")):
        check(where, "logit_huber", d.clone(), torch.zeros_like(d), kind=kind, delta=delta, grads=grads, reduction=reduction)
        for column in (0, 9, 18):  # small differences by themselves, which the large ones would hide in a sum
            one = d[:, column : column + 1].clone()
            check(where, "logit_huber", one, torch.zeros_like(one), kind=kind, delta=delta, grads=grads, reduction=reduction)


@pytest.mark.parametrize("kind", ["pseudo", "smooth_l1"])
def test_huber_of_logits_masked_with_the_lowest_finite_number(where: Where, kind: str) -> None:
    """Robust: where the square overflows, the line does not, and its slope is 1."""
    s, t = logits("typical", (3, 17))
    s[0, 3], t[1, 4] = torch.finfo(F32).min, torch.finfo(F32).min
    got = check(where, "logit_huber", s, t, kind=kind, reduction="none", grads="st")
    assert got.loss.isfinite().all() and got.student is not None and (got.student[0, 3], got.student[1, 4]) == (-1, 1)


def test_kl_is_torchs_batchmean(where: Where) -> None:
    """torch's KLDivLoss divides a "batchmean" by size(0), whatever the other dimensions, and its "sum" is ours."""
    s, t = logits("typical", (3, 5, 17), (F64, F64))
    for reduction in ("batchmean", "sum"):
        want = F.kl_div(F.log_softmax(s, -1), F.log_softmax(t, -1), log_target=True, reduction=reduction)
        assert abs(where.run("kl_div_tau", s, t, reduction=reduction, grads="").loss - want) <= 1e-13 * want


def test_centred_mse_is_the_limit_of_kl(kernel: Where) -> None:
    """0.5/K times the row's centred sum of squares is kl_div_tau at tau = inf, and tau = 1e6 is within 1/tau of it."""
    s, t = logits("typical", (16, 1003), (F64, F64))
    half = kernel.run("logit_mse", s, t, center=True, reduction="none", grads="s")
    limit = kernel.run("kl_div_tau", s, t, tau=INF, reduction="none", grads="s")
    finite = kernel.run("kl_div_tau", s, t, tau=1e6, reduction="none", grads="s")
    assert half.student is not None and limit.student is not None and finite.student is not None
    assert limit.loss.min() > 0 and limit.student.abs().max() > 0
    assert torch.allclose(half.loss * (0.5 / 1003), limit.loss, rtol=1e-13, atol=0)
    assert torch.linalg.norm(half.student * (0.5 / 1003) - limit.student) <= 1e-13 * torch.linalg.norm(limit.student)
    assert torch.allclose(finite.loss, limit.loss, rtol=2e-5, atol=0)
    assert torch.linalg.norm(finite.student - limit.student) <= 2e-5 * torch.linalg.norm(limit.student)


@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0, 20.0, 1e3, 1e6, INF])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_gradient_is_the_slope_of_the_loss(where: Where, tau: float, side: str) -> None:
    """Fourth-order central differences of the package's own loss, in float64: h**4 truncation plus eps/h rounding is
    below 1e-9 of a slope of order 1.  (The oracle is not involved.)"""
    s, t = logits("typical", (4, 17), (F64, F64))
    direction = torch.from_numpy(np.random.default_rng(1).standard_normal((4, 17)))
    h = 1e-3 * min(tau, 10.0)

    def at(x: float) -> float:
        a, b = (s + x * direction, t) if side == "student" else (s, t + x * direction)
        return where.run("kl_div_tau", a, b, tau=tau, reduction="sum", grads="").loss.item()

    slope = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    got = where.run("kl_div_tau", s, t, tau=tau, reduction="sum", grads=side[0])
    g = got.student if side == "student" else got.teacher
    assert g is not None
    assert abs((g * direction).sum().item() - slope) <= 1e-8 * abs(slope) and slope != 0


@pytest.mark.parametrize("tau", [1.0, 20.0, 1e3, 1e6, INF])
def test_float32_gradient_is_the_slope_of_the_float32_loss(kernel: Where, tau: float) -> None:
    """What an optimizer sees.  The loss carries 5e-6 / (relative change over the step, about 0.2) = 2.5e-5, the step's
    truncation 1e-4; eager float32 fails this by orders of magnitude from tau = 1000 on."""
    s, t = logits("typical", (16, 100))
    g = kernel.run("kl_div_tau", s, t, tau=tau, reduction="sum", grads="s").student
    assert g is not None
    direction, h = g.double() / torch.linalg.norm(g.double()), 0.5

    def at(x: float) -> float:
        return kernel.run("kl_div_tau", s.double() + x * direction, t, tau=tau, reduction="sum", grads="").loss.item()

    exact = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)  # float64 loss: only the step's own error

    def rough(x: float) -> float:
        return kernel.run("kl_div_tau", (s.double() + x * direction).float(), t, tau=tau, reduction="sum", grads="").loss.item()

    single = (rough(h) - rough(-h)) / (2 * h)
    reference = (at(h) - at(-h)) / (2 * h)
    assert abs((g.double() * direction).sum().item() - exact) <= 1e-4 * abs(exact)
    assert abs(single - reference) <= 1e-4 * abs(reference)


MODULES = [
    (kdfast.KLDivTau, "kl_div_tau", {"tau": 4.0}),
    (
        kdfast.KLDivTau,
        "kl_div_tau",
        {"tau": 2.0, "teacher_tau": 3.0, "scale_by_tau_squared": False, "reduction": "sum", "num_classes": 15},
    ),
    (kdfast.KLDivTau, "kl_div_tau", {"tau": INF, "reduction": "mean"}),
    (kdfast.LogitMSE, "logit_mse", {}),
    (kdfast.LogitMSE, "logit_mse", {"center": True, "reduction": "none", "num_classes": 15}),
    (kdfast.LogitHuber, "logit_huber", {}),
    (kdfast.LogitHuber, "logit_huber", {"delta": 0.3, "kind": "smooth_l1", "center": True, "num_classes": 15}),
]


@pytest.mark.contract("deepcopy and pickle of the module")
@BACKENDS
@pytest.mark.parametrize("cls, name, options", MODULES)
def test_modules_mirror_the_functions(cls: type, name: str, options: dict[str, Any], backend: str) -> None:
    options = options | {"backend": backend}
    s, t = logits("typical", (6, 17))
    w = some_weights((6,), F32)
    module = cls(**options)
    for copied in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        for extra in (
            ({}, {"row_weight": w}) if options.get("reduction") == "none" else ({}, {"row_weight": w, "denominator": 3.0})
        ):
            x, y = s.clone().requires_grad_(), s.clone().requires_grad_()
            got, want = copied(x, t, **extra), getattr(kdfast, name)(y, t, **options, **extra)
            got.sum().backward()
            want.sum().backward()
            assert torch.equal(got, want) and torch.equal(x.grad, y.grad)
            assert want.abs().max() > 0
    module.forward = types.MethodType(cls.forward, module)  # as wrappers of models do
    shown = repr(module)
    assert shown.startswith(cls.__name__ + "(")
    for key, value in options.items():
        assert f"{key}={value!r}" in shown, shown
    assert isinstance(module, torch.nn.Module) and not list(module.parameters()) and not module.state_dict()


def test_modules_take_every_option_of_their_function() -> None:
    import inspect

    for cls, function in (
        (kdfast.KLDivTau, kdfast.kl_div_tau),
        (kdfast.LogitMSE, kdfast.logit_mse),
        (kdfast.LogitHuber, kdfast.logit_huber),
    ):
        mine = set(inspect.signature(cls.__init__).parameters) | set(inspect.signature(cls.forward).parameters)
        assert set(inspect.signature(function).parameters) <= mine


def test_signatures_are_the_documented_ones() -> None:
    """Keyword-only options, and their defaults."""
    import inspect

    for function, defaults in (
        (kdfast.kl_div_tau, {"tau": 1.0, "teacher_tau": None, "scale_by_tau_squared": True, "reduction": "batchmean"}),
        (kdfast.logit_mse, {"center": False, "reduction": "mean"}),
        (kdfast.logit_huber, {"delta": 1.0, "kind": "pseudo", "center": False, "reduction": "mean"}),
    ):
        defaults |= {"row_weight": None, "denominator": None, "num_classes": None, "inplace_backward": False, "backend": "auto"}
        parameters = inspect.signature(function).parameters
        assert list(parameters) == ["student_logits", "teacher_logits", *defaults]
        assert {k: parameters[k].default for k in defaults} == defaults
        keyword_only = [k for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
        assert keyword_only == [k for k in defaults if k not in ("tau", "delta")]


def test_loss_dtype_follows_the_arithmetic() -> None:
    for a, b in ALL_PAIRS:
        s, t = logits("typical", (2, 3), (a, b))
        assert kdfast.kl_div_tau(s, t).dtype == kdfast.logit_mse(s, t).dtype == arithmetic(s, t)
