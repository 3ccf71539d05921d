"""kd_loss beyond what it shares with the other losses: targets, the mixture, its parts, and the two losses that it replaces.

The tests of every loss (test_semantics.py, test_autograd.py) run it too, with the targets of helpers.default_target.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import pickle
from typing import Any

import helpers
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BF16,
    F16,
    F32,
    F64,
    INF,
    PAIRS,
    REGIMES,
    Where,
    check,
    check_grad,
    check_loss,
    default_target,
    eager,
    eager_errors,
    logits,
    oracle,
)
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import kdfast

REDUCTIONS = ("none", "sum", "mean", "batchmean")
SOFT = pytest.mark.parametrize("soft", ["kl", "mse"])
NAN = math.nan

# K -> rows: one class, two, less than a vector, vectors and a tail, odd rows, rows that do not keep their exponentials
SIZES = {1: 5, 2: 64, 10: 64, 100: 32, 1003: 32, 32000: 4, 70001: 4}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("regime", REGIMES)
def test_accuracy(kernel: Where, regime: str, k: int, pair: str) -> None:
    """The budgets of kl_div_tau for the mixture, for each part alone, and for shared exponentials (tau = 1)."""
    if k > 2000 and regime not in ("typical", "close", "peaked"):
        pytest.skip("long rows meet three regimes")
    s, t = logits(regime, (SIZES[k], k), PAIRS[pair])
    failures = []
    for tau, alpha, smoothing in (
        (4.0, 0.9, 0.0),
        (1.0, 0.5, 0.1),
        (0.3, 0.5, 0.0),
        (20.0, 0.0, 0.1),
        (20.0, 1.0, 0.0),
        (1e6, 0.9, 0.0),
        (INF, 0.5, 0.1),
    ):
        for soft in ("kl", "mse") if tau in (4.0, 1.0) else ("kl",):
            options: dict[str, Any] = {"tau": tau, "alpha": alpha, "label_smoothing": smoothing, "soft": soft}
            try:
                check(kernel, "kd_loss", s, t, grads="s", **options)
                check(kernel, "kd_loss", s, t, grads="st", reduction="none", **options)
            except AssertionError as error:
                failures.append(f"{options}: {error}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("depth", [3.0, 15.0, 40.0, 80.0])
def test_confident_and_right(where: Where, depth: float) -> None:
    """The target far above the other classes: the cross-entropy is about e**-depth, and so is its gradient at the target."""
    s, t = logits("typical", (16, 100))
    y = torch.arange(16) % 100
    s = s.clamp(-3, 3)
    s[torch.arange(16), y] = depth
    for alpha, smoothing in ((0.0, 0.0), (0.0, 0.1), (0.3, 0.0)):
        for grads, reduction in (("s", "mean"), ("st", "none")):
            check(where, "kd_loss", s, t, target=y, alpha=alpha, label_smoothing=smoothing, grads=grads, reduction=reduction)


@pytest.mark.parametrize("tau", [1.0, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("alpha", [1e-3, 1e-12, 1e-36, 1e-44])
def test_a_small_share_of_the_soft_part(where: Where, alpha: float, tau: float) -> None:
    """What the gradient takes from the soft part's numbers does not come to depend on its share."""
    s, t = (x.clone() for x in logits("typical", (6, 100)))
    y = torch.tensor([0, 1, 50, 51, 98, 99])
    s[::2, y[::2]] = 9.0  # a likely target in every other row
    check(where, "kd_loss", s, t, target=y, alpha=alpha, tau=tau, grads="s")


# --------------------------------------------------------------------------------------------- the losses it replaces


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_alpha_zero_is_torchs_cross_entropy(where: Where, smoothing: float, reduction: str) -> None:
    s, t = logits("typical", (12, 17), (F64, F64))
    y = default_target((12,), 17)
    x = s.clone().requires_grad_()
    want = F.cross_entropy(x, y, label_smoothing=smoothing, reduction=reduction)
    want.sum().backward()
    got = where.run("kd_loss", s, t, target=y, alpha=0.0, label_smoothing=smoothing, reduction=reduction)
    assert torch.linalg.norm(got.loss - want.detach()) <= 1e-14 * torch.linalg.norm(want.detach())
    assert got.student is not None and torch.linalg.norm(got.student - x.grad) <= 1e-14 * torch.linalg.norm(x.grad)


@pytest.mark.parametrize("low", [-1e12, -1e17, torch.finfo(torch.float32).min])
def test_a_target_far_below(where: Where, low: float) -> None:
    """A target masked with a large number: the others' gradient is their softmax, not lost beside it."""
    s, t = (x.clone() for x in logits("typical", (6, 17)))
    y = torch.arange(6)
    s[torch.arange(6), y] = low
    check(where, "kd_loss", s, t, target=y, alpha=0.0, reduction="none", grads="s")


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0, INF])
@pytest.mark.parametrize("pair", ["fp32", "bf16", "fp64"])
@SOFT
def test_alpha_one_is_the_soft_loss(where: Where, soft: str, pair: str, tau: float) -> None:
    s, t = logits("typical", (12, 35), PAIRS[pair])
    name, options = ("kl_div_tau", {"tau": tau}) if soft == "kl" else ("logit_mse", {})
    for reduction, grads in itertools.product(REDUCTIONS, ("s", "st")):
        a = where.run("kd_loss", s, t, alpha=1.0, soft=soft, tau=tau, reduction=reduction, grads=grads)
        b = where.run(name, s, t, reduction=reduction, grads=grads, **options)
        for x, y in ((a.loss, b.loss), (a.student, b.student), (a.teacher, b.teacher)):
            assert (x is None) == (y is None)
            assert x is None or (torch.linalg.norm(x - y) <= 1e-6 * torch.linalg.norm(y) and y.abs().max() > 0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("denominator", [None, 7.0, torch.tensor(5)], ids=str)
@SOFT
def test_the_two_losses_in_eager(where: Where, soft: str, denominator: Any, reduction: str) -> None:
    """The mean of the hard part is over the rows not ignored, of the soft part over all; a denominator replaces both."""
    if reduction == "none" and denominator is not None:
        return
    s, t = logits("typical", (3, 4, 17), (F64, F64))
    y = default_target((3, 4), 17)
    assert (y == -100).any() and (y != -100).any()
    for weight in (None, torch.linspace(0, 2, 12, dtype=F64).reshape(3, 4), torch.arange(12).reshape(3, 4) % 3 > 0):
        options = {"soft": soft, "reduction": reduction, "denominator": denominator, "row_weight": weight, "target": y}
        x = s.clone().requires_grad_()
        want = eager("kd_loss", x, t, tau=3.0, alpha=0.3, label_smoothing=0.1, **options)
        want.sum().backward()
        got = where.run("kd_loss", s, t, tau=3.0, alpha=0.3, label_smoothing=0.1, **options)
        assert torch.linalg.norm(got.loss - want.detach()) <= 1e-13 * torch.linalg.norm(want.detach())
        assert got.student is not None and torch.linalg.norm(got.student - x.grad) <= 1e-13 * torch.linalg.norm(x.grad)


def test_as_good_as_the_eager_pair(kernel: Where) -> None:
    """In float32, against the oracle: the one pass has no more error than the two losses have."""
    s, t = logits("typical", (64, 1003))
    truth = oracle("kd_loss", s, t, 4.0)
    got = kernel.run("kd_loss", s, t)
    assert got.student is not None
    loss, student, _ = eager_errors("kd_loss", s, t, truth, tau=4.0)
    assert helpers.loss_error(got.loss, truth) <= max(loss, 1e-7)
    assert helpers.grad_error(got.student, truth.student) <= student


# ------------------------------------------------------------------------------------------------------------ targets


@SOFT
def test_ignored_rows_keep_their_soft_part(where: Where, soft: str) -> None:
    s, t = logits("typical", (8, 17))
    y = default_target((8,), 17)
    off = y == -100
    whole = where.run("kd_loss", s, t, target=y, soft=soft, alpha=0.4, reduction="none", grads="st")
    alone = where.run("kd_loss", s, t, target=y.abs() % 17, soft=soft, alpha=1.0, reduction="none", grads="st")
    assert off.any() and whole.student is not None and alone.student is not None
    assert torch.allclose(whole.loss[off], 0.4 * alone.loss[off], rtol=1e-6, atol=0)
    assert torch.allclose(whole.student[off], 0.4 * alone.student[off], rtol=1e-6, atol=0)
    assert (whole.loss[~off] != 0.4 * alone.loss[~off]).all()
    for index in (-100, 3, -1):  # any number, a class too
        y = torch.tensor([0, index, 5, index, 2, 1, 0, 9])
        check(where, "kd_loss", s, t, target=y, ignore_index=index, soft=soft, alpha=0.4, grads="st")


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_row_ignored(where: Where, reduction: str) -> None:
    """The hard part is 0, not 0/0; at alpha = 0 so is everything."""
    s, t = logits("typical", (6, 17))
    y = torch.full((6,), -100)
    for alpha in (0.0, 0.5):
        got = check(where, "kd_loss", s, t, target=y, alpha=alpha, reduction=reduction, grads="st")
        assert got.student is not None and bool(got.loss.abs().sum()) == bool(got.student.abs().sum()) == (alpha > 0)
    s[2] = NAN  # no part of an ignored row's logits is seen at alpha = 0
    got = check(where, "kd_loss", s, t, target=y, alpha=0.0, reduction="none", grads="s")
    assert got.student is not None and (got.student[2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_target_layouts(where: Where, dtype: torch.dtype) -> None:
    """Shifted labels are a strided view; int32 will do."""
    s, t = logits("typical", (4, 6, 17))
    labels = default_target((4, 7), 17).to(dtype)
    check(where, "kd_loss", s, t, target=labels[:, 1:], grads="st")
    if where.runs_torch:
        x = where.put(s).clone().requires_grad_()
        kdfast.kd_loss(x, where.put(t), where.put(labels)[:, 1:], backend=where.backend).backward()
        check_grad(x.grad.cpu(), oracle("kd_loss", s, t, 4.0, target=labels[:, 1:]).student, s, (s, t))


@pytest.mark.parametrize("wrong", [17, -1, -101, 10**12, -(10**12)])
def test_targets_that_are_no_class(where: Where, wrong: int) -> None:
    """On the CPU an error, before anything is written; elsewhere the row is NaN, and no other."""
    s, t = logits("typical", (6, 17))
    y = default_target((6,), 17)
    y[1] = wrong
    if where.device == "cpu":
        x = s.clone().requires_grad_()
        for options in ({}, {"reduction": "none"}, {"soft": "mse"}, {"alpha": 1.0}):
            with pytest.raises(ValueError, match=rf"^target must .*0 to 16 .*-100; got {wrong} in row 1$"):
                kdfast.kd_loss(x, t, y, backend=where.backend, **options)
        with pytest.raises(ValueError, match=r"0 to 9 .*row"):
            kdfast.kd_loss(x, t, y.clamp(-100, 16), num_classes=10, backend=where.backend)
    else:
        got = where.run("kd_loss", s, t, target=y, reduction="none")
        assert got.student is not None
        assert got.loss.isnan().tolist() == got.student.isnan().all(-1).tolist() == [False, True, *[False] * 4]
    # a row of weight 0 is not looked at
    w = torch.ones(6)
    w[1] = 0
    check(where, "kd_loss", s, t, target=y, row_weight=w, grads="st")


def test_no_class_in_a_transform_is_nan() -> None:
    s, t = logits("typical", (3, 5), (F64, F64))
    g = torch.func.grad(lambda x: kdfast.kd_loss(x, t, torch.tensor([0, 9, 1]), reduction="sum"))(s)
    assert g.isnan().all(-1).tolist() == [False, True, False]


# ------------------------------------------------------------------------------------------------------ special values


@pytest.mark.parametrize("junk", [NAN, INF, -INF])
@pytest.mark.parametrize("soft, tau", [("kl", 1.0), ("kl", 4.0), ("mse", 4.0)])
@pytest.mark.parametrize("regime", ["typical", "close"])
def test_the_teacher_does_not_matter_at_alpha_zero(where: Where, regime: str, soft: str, tau: float, junk: float) -> None:
    s, t = logits(regime, (6, 17))
    clean = where.run("kd_loss", s, t, tau=tau, alpha=0.0, soft=soft, grads="st")
    t[1, 3], t[4] = junk, junk
    got = where.run("kd_loss", s, t, tau=tau, alpha=0.0, soft=soft, grads="st")
    assert torch.equal(got.loss, clean.loss) and torch.equal(got.student, clean.student)
    assert got.teacher is not None and (got.teacher == 0).all()
    alone = where.run("kd_loss", s, t, tau=tau, alpha=0.0, soft=soft, grads="s")
    assert torch.equal(alone.loss, clean.loss) and alone.student is not None and alone.student.isfinite().all()


@pytest.mark.contract("NaN stays in its row", losses=("kd_loss",))
@pytest.mark.parametrize("junk", [NAN, INF])
@pytest.mark.parametrize("k", [5, 17, 200])
@SOFT
def test_nan_stays_in_its_row(where: Where, soft: str, k: int, junk: float) -> None:
    s, t = logits("typical", (6, k))
    y = torch.arange(6) % k
    for row, column in ((1, 0), (2, k // 2), (4, k - 1)):
        s[row, column] = junk
    clean = [0, 3, 5]
    truth = oracle("kd_loss", s[clean], t[clean], 4.0, target=y[clean], soft=soft, reduction="none")
    for grads in ("s", "st"):
        got = where.run("kd_loss", s, t, target=y, soft=soft, reduction="none", grads=grads)
        assert got.loss.isnan().tolist() == [False, True, True, False, True, False]
        assert got.student is not None and got.student[[1, 2, 4]].isnan().all()
        check_loss(got.loss[clean], truth, (s, t))
        check_grad(got.student[clean], truth.student, s[clean], (s, t))


@pytest.mark.contract("-inf on both sides is as if the class were not there", losses=("kd_loss",))
@pytest.mark.parametrize("tau", [1.0, 4.0])
@pytest.mark.parametrize("k", [5, 17, 200])
def test_masked_classes(where: Where, k: int, tau: float) -> None:
    """-inf on both sides: no mass and no gradient; under smoothed labels, or in the target, the cross-entropy is infinite, as torch's."""
    s, t = logits("typical", (6, k))
    y = torch.full((6,), 2)
    s[:, 1] = t[:, 1] = -INF
    s[0, 0] = t[0, 0] = s[3, 0] = -INF
    t[5, 0] = -INF
    for grads, reduction in (("s", "none"), ("st", "none"), ("s", "sum")):
        check(where, "kd_loss", s, t, target=y, tau=tau, grads=grads, reduction=reduction)
    x = s.clone().requires_grad_()
    y[4] = 1
    for smoothing in (0.0, 0.1):
        rows = F.cross_entropy(x, y, label_smoothing=smoothing, reduction="none")
        (want,) = torch.autograd.grad(rows.sum(), x)
        got = where.run("kd_loss", s, t, target=y, alpha=0.0, label_smoothing=smoothing, reduction="none")
        assert got.student is not None and torch.equal(got.loss.isinf(), rows.isinf()) and rows.isinf().any()
        assert torch.linalg.norm(got.student - want) <= 2e-6 * torch.linalg.norm(want)


# --------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@SOFT
def test_parts(where: Where, soft: str, alpha: float, reduction: str) -> None:
    """Both parts are the losses themselves, whatever alpha; they mix to the loss, and carry no gradient."""
    s, t = logits("typical", (8, 17))
    w = torch.tensor([1.0, 0, 2, 1, 0.5, 1, 1, 3])
    x = where.put(s.clone()).requires_grad_()
    options: dict[str, Any] = {"soft": soft, "reduction": reduction, "row_weight": w}
    parts: Any = where.call("kd_loss", x, where.put(t), alpha=alpha, return_parts=True, **options)
    assert isinstance(parts, kdfast.KDParts) and parts._fields == ("loss", "hard", "soft")
    assert parts.loss.requires_grad and not parts.hard.requires_grad and not parts.soft.requires_grad
    for part, a in ((parts.hard, 0.0), (parts.soft, 1.0), (parts.loss.detach(), alpha)):
        check_loss(part.cpu(), oracle("kd_loss", s, t, 4.0, alpha=a, **options), (s, t))
    seed = torch.ones(parts.loss.shape).to(where.device)
    (g,) = torch.autograd.grad(parts.loss, x, seed)
    check_grad(g.cpu(), oracle("kd_loss", s, t, 4.0, alpha=alpha, **options).student, s, (s, t))
    with torch.no_grad():
        assert len(where.call("kd_loss", x, where.put(t), return_parts=True)) == 3  # type: ignore[arg-type]


def test_parts_cost_nothing() -> None:
    """The same operator runs, and no other, with or without them."""
    s, t = logits("typical", (8, 17))
    s.requires_grad_()
    seen = []
    for return_parts in (False, True):
        with torch.profiler.profile() as profile:
            kdfast.kd_loss(s, t, default_target((8,), 17), return_parts=return_parts)
        seen.append(sorted(e.name for e in profile.events() if "::" in e.name))
    assert seen[0] == seen[1] and any(name.startswith("kdfast::kd_loss_forward_grad") for name in seen[0])


# --------------------------------------------------------------------------------------------------------------- rest


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_compile_and_export(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    s, t = logits("typical", (6, 17), (dtype, F32))
    y = default_target((6,), 17)

    def step(x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return tuple(kdfast.kd_loss(x * 2, t, y, return_parts=True))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    results = []
    for f in (compiled, step):
        x = s.clone().requires_grad_()
        parts = f(x, t, y)
        parts[0].backward()
        results.append([*(p.detach() for p in parts), x.grad])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and b.abs().sum() > 0
    program = torch.export.export(kdfast.KDLoss(tau=4.0), (s, t, y))
    check_loss(program.module()(s, t, y), oracle("kd_loss", s, t, 4.0, target=y), (s, t))


@pytest.mark.contract("deepcopy and pickle of the module", losses=("kd_loss",))
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_module_mirrors_the_function(backend: str) -> None:
    s, t = logits("typical", (6, 17))
    w = torch.linspace(0, 1, 6)
    for options in (
        {},
        {"tau": 2.0, "alpha": 0.3, "soft": "mse", "label_smoothing": 0.1, "reduction": "sum", "num_classes": 15},
        {"ignore_index": 3, "return_parts": True},
    ):
        options = options | {"backend": backend}
        y = torch.tensor([0, 14, options.get("ignore_index", -100), 7, 1, 2])
        module = kdfast.KDLoss(**options)
        for each in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            got, want = each(s, t, y, row_weight=w), kdfast.kd_loss(s, t, y, row_weight=w, **options)
            assert all(torch.equal(a, b) for a, b in zip(torch.atleast_1d(got), torch.atleast_1d(want), strict=True))
        assert all(f"{key}={value!r}" in repr(module) for key, value in options.items())
    mine = set(inspect.signature(kdfast.KDLoss.__init__).parameters) | set(inspect.signature(kdfast.KDLoss.forward).parameters)
    assert set(inspect.signature(kdfast.kd_loss).parameters) <= mine


def test_signature_is_the_documented_one() -> None:
    defaults = {
        "tau": 4.0, "alpha": 0.9, "soft": "kl", "ignore_index": -100, "label_smoothing": 0.0, "reduction": "mean", "row_weight": None,
        "denominator": None, "num_classes": None, "return_parts": False, "inplace_backward": False, "backend": "auto",
    }  # fmt: skip
    parameters = inspect.signature(kdfast.kd_loss).parameters
    assert list(parameters) == ["student_logits", "teacher_logits", "target", *defaults]
    assert {k: parameters[k].default for k in defaults} == defaults
    assert [k for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY] == list(defaults)


ERRORS = [
    (TypeError, "target Tensor list", {"target": [0] * 4}),
    (TypeError, "target float32 int64", {"target": torch.zeros(4)}),
    (TypeError, "target bool", {"target": torch.zeros(4, dtype=torch.bool)}),
    (ValueError, "target (4,) (4,\xa07)", {"target": torch.zeros(4, 7, dtype=torch.int64)}),
    (ValueError, "target (4,) (3,)", {"target": torch.zeros(3, dtype=torch.int64)}),
    (ValueError, "target cpu meta", {"target": torch.zeros(4, dtype=torch.int64, device="meta")}),
    (ValueError, "tau 0", {"tau": 0}),
    (TypeError, "tau tensor", {"tau": torch.tensor(1.0)}),
    (ValueError, "alpha 1.5 0 1", {"alpha": 1.5}),
    (ValueError, "alpha -0.1", {"alpha": -0.1}),
    (ValueError, "alpha nan", {"alpha": NAN}),
    (TypeError, "alpha str", {"alpha": "1"}),
    (TypeError, "alpha tensor number", {"alpha": torch.tensor(0.5)}),
    (ValueError, "alpha requires grad gradient", {"alpha": torch.tensor(0.5, requires_grad=True)}),
    (ValueError, "label_smoothing 1.1", {"label_smoothing": 1.1}),
    (TypeError, "label_smoothing None", {"label_smoothing": None}),
    (ValueError, "soft 'ce' 'kl' 'mse'", {"soft": "ce"}),
    (TypeError, "ignore_index float int", {"ignore_index": 1.0}),
    (ValueError, "ignore_index 64 bits", {"ignore_index": 2**70}),
    (TypeError, "return_parts True int", {"return_parts": 1}),
    (
        TypeError,
        "inplace_backward True Tensor",
        {"inplace_backward": torch.ones(2), "teacher_logits": torch.zeros(4, 7, dtype=F64)},
    ),
    (TypeError, "target dense sparse", {"target": torch.ones(4, dtype=torch.int64).to_sparse()}),
    (TypeError, "ignore_index bool", {"ignore_index": True}),
    (ValueError, "reduction 'avg'", {"reduction": "avg"}),
    (
        ValueError,
        "inplace_backward float32 float64",
        {"inplace_backward": True, "teacher_logits": torch.zeros(4, 7, dtype=F64)},
    ),
    (ValueError, "denominator none", {"denominator": 2.0, "reduction": "none"}),
]


@pytest.mark.contract("wrong arguments: an error that names the argument", losses=("kd_loss",))
@pytest.mark.parametrize("kind, words, options", ERRORS, ids=[words for _, words, _ in ERRORS])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_refused(backend: str, kind: type[Exception], words: str, options: dict[str, Any]) -> None:
    s, t = logits("typical", (4, 7))
    options = {"backend": backend, "teacher_logits": t, "target": torch.zeros(4, dtype=torch.int64)} | options
    with pytest.raises(kind) as caught:
        kdfast.kd_loss(s, **options)
    message = str(caught.value)
    assert all(word.replace("\xa0", " ") in message for word in words.split(" ")) and len(message) < 400, message


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_logits_without_values(backend: str) -> None:
    """Whether a target is a class cannot be seen in a fake tensor, nor while a call is traced."""
    s, t = logits("typical", (4, 7))
    target = torch.tensor([0, 3, 6, -100])
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (s, t, target)]
        assert kdfast.kd_loss(*fake, backend=backend, reduction="none").shape == (4,)
    traced = make_fx(lambda *given: kdfast.kd_loss(*given, backend=backend))(s, t, target)
    torch.testing.assert_close(traced(s, t, target), kdfast.kd_loss(s, t, target, backend=backend))


@pytest.mark.parametrize("alpha", [0.9999, 1 - 1e-6])
def test_a_small_share_of_the_hard_part(kernel: Where, alpha: float) -> None:
    """Where it is all of the loss: 1 - alpha is rounded once."""
    s = logits("typical", (4, 7))[0]
    for reduction in ("none", "sum"):
        check(kernel, "kd_loss", s, s, alpha=alpha, grads="s", reduction=reduction)
