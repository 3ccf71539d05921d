"""What PyTorch's documentation says of the losses that kdfast replaces, and whether it holds here.

Each test is named after a statement of nn.KLDivLoss, nn.MSELoss, nn.CrossEntropyLoss, nn.SmoothL1Loss or nn.HuberLoss. Those that do not
hold are ``test_difference_*``, one for each row of docs/differences.md.
"""

from __future__ import annotations

import inspect
import math
import pathlib
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import F32, F64, GRAD_BUDGET, LOSS_BUDGET, logits
from torch import Tensor, nn

import kdfast

REDUCTIONS = ("none", "sum", "mean", "batchmean")
DIFFERENCES = pathlib.Path(__file__).parents[1] / "docs" / "differences.md"
HUBER: dict[str, Any] = {"kind": "smooth_l1"}


@pytest.fixture(params=["cpp", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[(5,), (2, 1, 3)], ids=str)
def pair(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    """Student and teacher, float64, of any number of dimensions."""
    s, t = logits("typical", (*request.param, 7), (F64, F64))
    return s.requires_grad_(), t.requires_grad_()


@pytest.fixture
def target(pair: tuple[Tensor, Tensor]) -> Tensor:
    lead = pair[0].shape[:-1]
    return (3 * torch.arange(lead.numel()) % 7).reshape(lead)


def same(got: Tensor, want: Tensor, *inputs: Tensor) -> None:
    """The value, and its gradients of the inputs, are those of the other."""
    assert got.shape == want.shape and got.dtype == want.dtype
    assert torch.linalg.vector_norm(got - want) <= LOSS_BUDGET[F64] * torch.linalg.vector_norm(want)
    if inputs:
        gradients = (torch.autograd.grad(x.sum(), inputs, retain_graph=True) for x in (got, want))
        for a, b in zip(*gradients, strict=True):
            assert b.abs().max() > 0 and torch.linalg.vector_norm(a - b) <= GRAD_BUDGET[F64] * torch.linalg.vector_norm(b)


def cross_entropy(student: Tensor, target: Tensor, **options: Any) -> Any:
    """The hard part of kd_loss alone."""
    return kdfast.kd_loss(student, torch.zeros_like(student), target, alpha=0.0, **options)


def channels(x: Tensor) -> Tensor:
    """The class dimension where torch's cross_entropy has it."""
    return x.movedim(-1, 1)


# ---------------------------------------------------------------------------------------------------------- KLDivLoss


def test_kl_is_roughly_equivalent_to_target_exp_times_target_minus_input(pair: tuple[Tensor, Tensor], backend: str) -> None:
    s, t = pair
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    pointwise = log_p.exp() * (log_p - log_q)
    same(kdfast.kl_div_tau(s, t, reduction="none", backend=backend), pointwise.sum(-1), s, t)


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
def test_kl_with_and_without_log_target(pair: tuple[Tensor, Tensor], backend: str, reduction: str, log_target: bool) -> None:
    s, t = pair
    their_target = t.log_softmax(-1) if log_target else t.softmax(-1)
    want = nn.KLDivLoss(reduction=reduction, log_target=log_target)(s.log_softmax(-1), their_target)
    same(kdfast.kl_div_tau(s, t, reduction=reduction, backend=backend), want, s, t)


def test_kl_first_argument_is_the_model_and_second_the_observations(pair: tuple[Tensor, Tensor], backend: str) -> None:
    """KL(P || Q) of the observations P and the model Q, in the order (Q, P)."""
    s, t = pair
    p = torch.distributions.Categorical(logits=t)
    q = torch.distributions.Categorical(logits=s)
    want = torch.distributions.kl_divergence(p, q)
    got = kdfast.kl_div_tau(s, t, reduction="none", backend=backend)
    same(got, want, s, t)
    assert (kdfast.kl_div_tau(t, s, reduction="none", backend=backend) - got).abs().max() > 1e-3


def test_kl_batchmean_is_the_sum_over_size_0(pair: tuple[Tensor, Tensor], backend: str) -> None:
    s, t = pair
    total = kdfast.kl_div_tau(s, t, reduction="sum", backend=backend)
    same(kdfast.kl_div_tau(s, t, reduction="batchmean", backend=backend), total / s.size(0), s, t)


def test_kl_reductions_of_the_unreduced_loss(pair: tuple[Tensor, Tensor], backend: str) -> None:
    """ "sum" and "mean" are those of "none"; a scalar by default, one value a row unreduced."""
    s, t = pair
    rows = kdfast.kl_div_tau(s, t, reduction="none", backend=backend)
    assert rows.shape == s.shape[:-1] and kdfast.kl_div_tau(s, t, backend=backend).shape == ()
    same(kdfast.kl_div_tau(s, t, reduction="sum", backend=backend), rows.sum(), s, t)
    same(kdfast.kl_div_tau(s, t, reduction="mean", backend=backend), rows.mean(), s, t)


def test_kl_avoids_underflow(backend: str) -> None:
    """The reason for torch's log space: probabilities that underflow are no 0 in a logarithm."""
    s = torch.tensor([[0.0, -200.0], [-300.0, 0.0]])
    got = kdfast.kl_div_tau(s, torch.zeros(2, 2), reduction="none", backend=backend)
    want = F.kl_div(s.double().log_softmax(-1), torch.full((2, 2), 0.5, dtype=F64), reduction="none").sum(-1)
    assert (s.softmax(-1) == 0).any() and ((got - want).abs() <= LOSS_BUDGET[F32] * want).all()


# ------------------------------------------------------------------------------------------------------------- MSELoss


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mse_is_the_squared_difference_of_each_element(pair: tuple[Tensor, Tensor], backend: str, reduction: str) -> None:
    s, t = pair
    same(kdfast.logit_mse(s, t, reduction=reduction, backend=backend), nn.MSELoss(reduction=reduction)(s, t), s, t)


def test_mse_default_is_the_mean_which_divides_by_all_elements(pair: tuple[Tensor, Tensor], backend: str) -> None:
    s, t = pair
    total = kdfast.logit_mse(s, t, reduction="sum", backend=backend)
    same(kdfast.logit_mse(s, t, backend=backend), total / s.numel(), s, t)
    same(kdfast.logit_mse(s, t, backend=backend), nn.MSELoss()(s, t), s, t)


# ---------------------------------------------------------------------------------------------- SmoothL1Loss, HuberLoss


@pytest.mark.parametrize("delta", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_smooth_l1_is_a_square_below_beta_and_l1_otherwise(
    pair: tuple[Tensor, Tensor], backend: str, reduction: str, delta: float
) -> None:
    s, t = pair
    want = nn.SmoothL1Loss(beta=delta, reduction=reduction)(s, t)
    same(kdfast.logit_huber(s, t, delta, **HUBER, reduction=reduction, backend=backend), want, s, t)


@pytest.mark.parametrize("delta", [0.1, 1.0, 3.0])
def test_smooth_l1_is_huber_over_beta(pair: tuple[Tensor, Tensor], backend: str, delta: float) -> None:
    """And HuberLoss is equivalent to SmoothL1Loss when delta is 1."""
    s, t = pair
    same(delta * kdfast.logit_huber(s, t, delta, **HUBER, backend=backend), nn.HuberLoss(delta=delta)(s, t), s, t)


def test_smooth_l1_has_slope_1_at_beta_and_beyond(backend: str) -> None:
    d = torch.tensor([[0.5, 2.0, 2.001, 7.0, -100.0]], dtype=F64, requires_grad=True)
    loss = kdfast.logit_huber(d, torch.zeros_like(d).detach(), 2.0, **HUBER, reduction="sum", backend=backend)
    (slope,) = torch.autograd.grad(loss, d)
    assert slope.tolist() == [[0.25, 1, 1, 1, -1]]


def test_smooth_l1_converges_to_l1_as_beta_falls_and_huber_to_0(pair: tuple[Tensor, Tensor], backend: str) -> None:
    s, t = pair
    tiny = 1e-15
    got = kdfast.logit_huber(s, t, tiny, **HUBER, backend=backend)
    same(got, nn.L1Loss()(s, t), s)
    assert 0 < tiny * got < 1e-13


def test_smooth_l1_converges_to_0_as_beta_grows_and_huber_to_half_the_mse(pair: tuple[Tensor, Tensor], backend: str) -> None:
    s, t = pair
    huge = 1e6
    got = kdfast.logit_huber(s, t, huge, **HUBER, backend=backend)
    assert 0 < got < 1e-4
    same(huge * got, nn.MSELoss()(s, t) / 2, s, t)


def test_smooth_l1_is_less_sensitive_to_outliers_than_mse(pair: tuple[Tensor, Tensor], backend: str) -> None:
    s, t = (x.detach() for x in pair)
    far = s.clone()
    far[..., 0] += 1000
    for kind in ("smooth_l1", "pseudo"):
        growth = kdfast.logit_huber(far, t, kind=kind, backend=backend) / kdfast.logit_huber(s, t, kind=kind, backend=backend)
        assert growth < 0.01 * kdfast.logit_mse(far, t, backend=backend) / kdfast.logit_mse(s, t, backend=backend)


# ---------------------------------------------------------------------------------------------------- CrossEntropyLoss


def test_cross_entropy_is_log_softmax_followed_by_nll_loss(pair: tuple[Tensor, Tensor], target: Tensor, backend: str) -> None:
    s, _ = pair
    want = F.nll_loss(channels(s.log_softmax(-1)).contiguous(), target, reduction="none")
    same(cross_entropy(s, target, reduction="none", backend=backend), want, s)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_of_class_indices(
    pair: tuple[Tensor, Tensor], target: Tensor, backend: str, reduction: str, ignore_index: int, smoothing: float
) -> None:
    """The unreduced loss is 0 where the target is ignore_index; the sum; the mean over the targets not ignored; smoothed labels are a
    mixture of the truth and a uniform distribution."""
    s, _ = pair
    target = torch.where(target == 3, ignore_index, target)
    options: dict[str, Any] = {"reduction": reduction, "ignore_index": ignore_index, "label_smoothing": smoothing}
    assert (target == ignore_index).any()
    same(cross_entropy(s, target, backend=backend, **options), nn.CrossEntropyLoss(**options)(channels(s), target), s)


def test_cross_entropy_target_probabilities_of_smoothed_labels(
    pair: tuple[Tensor, Tensor], target: Tensor, backend: str
) -> None:
    s, _ = pair
    mixture = 0.8 * F.one_hot(target, 7).double() + 0.2 / 7
    same(
        cross_entropy(s, target, label_smoothing=0.2, backend=backend), nn.CrossEntropyLoss()(channels(s), channels(mixture)), s
    )


def test_cross_entropy_ignored_targets_do_not_contribute_to_the_input_gradient(
    pair: tuple[Tensor, Tensor], target: Tensor, backend: str
) -> None:
    """ignore_index may not be in the class range."""
    s, _ = pair
    ignored = target == 3
    (g,) = torch.autograd.grad(cross_entropy(s, torch.where(ignored, 99, target), ignore_index=99, backend=backend), s)
    assert ignored.any() and (g[ignored] == 0).all() and (g[~ignored] != 0).all()


def test_cross_entropy_input_is_unnormalized_logits(pair: tuple[Tensor, Tensor], target: Tensor, backend: str) -> None:
    """They need not be positive, nor sum to 1: a constant changes nothing."""
    s, _ = pair
    assert (s < 0).any()
    shift = torch.arange(s.size(0), dtype=F64).reshape(-1, *[1] * (s.dim() - 1))
    got, want = (cross_entropy(x.detach(), target, backend=backend) for x in (s + shift, s))
    assert (got - want).abs() <= 1e-13 * want


def test_cross_entropy_label_smoothing_is_from_0_to_1(pair: tuple[Tensor, Tensor], target: Tensor, backend: str) -> None:
    s, _ = pair
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match="label_smoothing"):
            cross_entropy(s, target, label_smoothing=wrong, backend=backend)


def test_cross_entropy_of_targets_between_0_and_the_number_of_classes(
    pair: tuple[Tensor, Tensor], target: Tensor, backend: str
) -> None:
    s, _ = pair
    for wrong in (7, -1):
        bad = torch.where(target == 3, wrong, target)
        with pytest.raises(ValueError, match="target"):
            cross_entropy(s, bad, backend=backend)
        with pytest.raises((IndexError, RuntimeError)):
            nn.CrossEntropyLoss()(channels(s), bad)


# ---------------------------------------------------------------------------------------------------------- all of them


def their_losses() -> list[tuple[Callable[..., Tensor], type[nn.Module]]]:
    return [
        (kdfast.kl_div_tau, nn.KLDivLoss),
        (kdfast.logit_mse, nn.MSELoss),
        (kdfast.logit_huber, nn.SmoothL1Loss),
        (kdfast.logit_huber, nn.HuberLoss),
        (kdfast.kd_loss, nn.CrossEntropyLoss),
    ]


def test_output_can_be_backwarded(pair: tuple[Tensor, Tensor], target: Tensor, backend: str) -> None:
    """The examples of all: output.backward() fills the input's gradient, of its shape and dtype."""
    s, t = pair
    for loss, _ in their_losses():
        s.grad = None
        loss(s, t.detach(), *([target] if loss is kdfast.kd_loss else []), backend=backend).backward()
        assert s.grad is not None and s.grad.shape == s.shape and s.grad.dtype == s.dtype and s.grad.abs().max() > 0


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_reductions_of_torch_are_taken_by_name(
    pair: tuple[Tensor, Tensor], target: Tensor, backend: str, reduction: str
) -> None:
    s, t = pair
    for loss, theirs in their_losses():
        assert theirs(reduction=reduction).reduction == reduction
        value = loss(s, t, *([target] if loss is kdfast.kd_loss else []), reduction=reduction, backend=backend)
        assert value.shape == (s.shape[:-1] if reduction == "none" else ())


# ---------------------------------------------------------------------------------- differences: rows of differences.md


def test_difference_raw_logits(pair: tuple[Tensor, Tensor], backend: str) -> None:
    """Logits, and log-probabilities, which are logits too; not probabilities."""
    s, t = pair
    want = kdfast.kl_div_tau(s, t, backend=backend)
    same(kdfast.kl_div_tau(s.log_softmax(-1), t.log_softmax(-1), backend=backend), want, s, t)
    assert (kdfast.kl_div_tau(s, t.softmax(-1), backend=backend) - want).abs() > 1e-3
    assert (nn.KLDivLoss(reduction="batchmean", log_target=True)(s, t) - want).abs() > 1e-3


def test_difference_no_log_target() -> None:
    assert "log_target" in inspect.signature(nn.KLDivLoss).parameters
    for function, module in ((kdfast.kl_div_tau, kdfast.KLDivTau), (kdfast.kd_loss, kdfast.KDLoss)):
        assert not {"log_target"} & {*inspect.signature(function).parameters, *inspect.signature(module).parameters}


def test_difference_temperature(pair: tuple[Tensor, Tensor], backend: str) -> None:
    s, t = pair
    tau = 4.0
    want = nn.KLDivLoss(reduction="batchmean", log_target=True)((s / tau).log_softmax(-1), (t / tau).log_softmax(-1))
    same(kdfast.kl_div_tau(s, t, tau, backend=backend), tau**2 * want, s, t)
    same(kdfast.kl_div_tau(s, t, tau, scale_by_tau_squared=False, backend=backend), want, s, t)


def test_difference_unreduced_is_a_row(pair: tuple[Tensor, Tensor], backend: str) -> None:
    s, t = pair
    theirs = nn.KLDivLoss(reduction="none", log_target=True)(s.log_softmax(-1), t.log_softmax(-1))
    assert theirs.shape == s.shape
    same(kdfast.kl_div_tau(s, t, reduction="none", backend=backend), theirs.sum(-1), s, t)
    same(kdfast.logit_mse(s, t, reduction="none", backend=backend), nn.MSELoss(reduction="none")(s, t).sum(-1), s, t)
    want = nn.SmoothL1Loss(reduction="none")(s, t).sum(-1)
    same(kdfast.logit_huber(s, t, **HUBER, reduction="none", backend=backend), want, s, t)


def test_difference_kl_mean(pair: tuple[Tensor, Tensor], backend: str) -> None:
    """ "mean" is over rows, a true KL; torch's is over elements, and warns."""
    s, t = pair
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = nn.KLDivLoss(reduction="mean", log_target=True)(s.log_softmax(-1), t.log_softmax(-1))
    same(kdfast.kl_div_tau(s, t, reduction="mean", backend=backend), theirs * s.size(-1), s, t)


def test_difference_kl_default_reduction(pair: tuple[Tensor, Tensor], backend: str) -> None:
    s, t = pair
    assert nn.KLDivLoss().reduction == "mean" and kdfast.KLDivTau().reduction == "batchmean"
    same(kdfast.kl_div_tau(s, t, backend=backend), kdfast.kl_div_tau(s, t, reduction="batchmean", backend=backend), s, t)


def test_difference_batchmean_of_all(pair: tuple[Tensor, Tensor], target: Tensor, backend: str) -> None:
    s, t = pair
    for loss, theirs in their_losses()[1:]:
        more = [target] if loss is kdfast.kd_loss else []
        got = loss(s, t, *more, reduction="batchmean", backend=backend)
        same(got, loss(s, t, *more, reduction="sum", backend=backend) / s.size(0), s, t)
        with pytest.raises(ValueError, match="batchmean"):
            theirs(reduction="batchmean")(channels(s), target if more else channels(t))


def test_difference_no_size_average_or_reduce() -> None:
    for loss, theirs in their_losses():
        if theirs is not nn.HuberLoss:
            assert {"size_average", "reduce"} <= set(inspect.signature(theirs).parameters)
        with pytest.raises(TypeError, match="size_average"):
            loss(torch.zeros(2, 3), torch.zeros(2, 3), size_average=False)


def test_difference_no_broadcasting(pair: tuple[Tensor, Tensor], target: Tensor, backend: str) -> None:
    s, t = pair
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert nn.MSELoss()(s, t[:1]).isfinite()
    for loss, _ in their_losses():
        more = [target] if loss is kdfast.kd_loss else []
        with pytest.raises(ValueError, match="teacher_logits"):
            loss(s, t[:1], *more, backend=backend)
        assert loss(s, t[:1].expand(s.shape), *more, backend=backend).isfinite()


def test_difference_no_unbatched_input(backend: str) -> None:
    s, y = torch.randn(7), torch.tensor(3)
    assert nn.CrossEntropyLoss()(s, y).shape == nn.MSELoss()(s, s).shape == ()
    for loss, _ in their_losses():
        with pytest.raises(ValueError, match="student_logits"):
            loss(s, s, *([y] if loss is kdfast.kd_loss else []), backend=backend)


def test_difference_class_dimension_is_last(target: Tensor, pair: tuple[Tensor, Tensor], backend: str) -> None:
    s, _ = pair
    same(cross_entropy(s, target, backend=backend), nn.CrossEntropyLoss()(channels(s), target), s)
    if s.dim() > 2:
        with pytest.raises(ValueError, match="target"):
            cross_entropy(channels(s), target, backend=backend)


def test_difference_dtypes(backend: str) -> None:
    """The loss of 16-bit logits is float32; student and teacher may differ."""
    s, t = logits("typical", (4, 7), (torch.bfloat16, torch.float16))
    y = torch.arange(4)
    assert nn.MSELoss()(s, s + 1).dtype == nn.CrossEntropyLoss()(s, y).dtype == torch.bfloat16
    for loss, _ in their_losses():
        x = s.clone().requires_grad_()
        value = loss(x, t, *([y] if loss is kdfast.kd_loss else []), backend=backend)
        value.backward()
        assert value.dtype == F32 and x.grad is not None and x.grad.dtype == torch.bfloat16


def test_difference_minus_inf_on_both_sides(backend: str) -> None:
    s, t = logits("typical", (4, 7), (F64, F64))
    s[:, 2] = t[:, 2] = -math.inf
    s.requires_grad_()
    theirs = nn.KLDivLoss(reduction="sum", log_target=True)(s.log_softmax(-1), t.log_softmax(-1))
    assert theirs.isnan() and nn.MSELoss()(s, t).isnan() and nn.SmoothL1Loss()(s, t).isnan()
    keep = [0, 1, 3, 4, 5, 6]
    for loss in (kdfast.kl_div_tau, kdfast.logit_mse, kdfast.logit_huber):
        got = loss(s, t, reduction="sum", backend=backend)
        same(got, loss(s[:, keep], t[:, keep], reduction="sum", backend=backend), s)
        (g,) = torch.autograd.grad(loss(s, t, backend=backend), s)
        assert (g[:, 2] == 0).all()


def test_difference_no_class_weights(pair: tuple[Tensor, Tensor], target: Tensor, backend: str) -> None:
    """``row_weight`` = class_weight[target] weighs the hard part alike, mean included, and the soft part too."""
    s, t = pair
    weight = torch.linspace(0.5, 2, 7, dtype=F64)
    assert "weight" not in inspect.signature(kdfast.kd_loss).parameters
    for reduction in ("none", "sum", "mean"):
        want = nn.CrossEntropyLoss(weight=weight, reduction=reduction)(channels(s), target)
        same(cross_entropy(s, target, row_weight=weight[target], reduction=reduction, backend=backend), want, s)
    both = kdfast.kd_loss(s, t, target, row_weight=weight[target], alpha=1.0, backend=backend)
    assert (both - kdfast.kd_loss(s, t, target, alpha=1.0, backend=backend)).abs() > 1e-6


def test_difference_no_probability_targets(pair: tuple[Tensor, Tensor], target: Tensor, backend: str) -> None:
    """A float target is refused. Cross-entropy with probabilities p is kl_div_tau with the teacher log p, plus p's entropy."""
    s, t = pair
    p = t.detach().softmax(-1)
    with pytest.raises(TypeError, match="target"):
        kdfast.kd_loss(s, t, p, backend=backend)
    want = nn.CrossEntropyLoss(reduction="sum")(channels(s), channels(p))
    entropy = -(p * p.log()).sum()
    same(kdfast.kl_div_tau(s, p.log(), reduction="sum", backend=backend) + entropy, want, s)


def test_difference_every_target_ignored(pair: tuple[Tensor, Tensor], target: Tensor, backend: str) -> None:
    s, _ = pair
    none = torch.full_like(target, -100)
    assert nn.CrossEntropyLoss()(channels(s), none).isnan()
    got = cross_entropy(s, none, backend=backend)
    (g,) = torch.autograd.grad(got, s)
    assert got == 0 and (g == 0).all()


def test_difference_wrong_target_is_a_value_error(pair: tuple[Tensor, Tensor], target: Tensor, backend: str) -> None:
    """torch: an IndexError that names no row. (On a GPU: a NaN row here, an assertion that ends the context there.)"""
    s, _ = pair
    bad = torch.where(target == 3, 7, target)
    with pytest.raises(IndexError, match="out of bounds"):
        nn.CrossEntropyLoss()(channels(s), bad)
    with pytest.raises(ValueError, match="got 7 in row"):
        cross_entropy(s, bad, backend=backend)


def test_difference_int32_targets(pair: tuple[Tensor, Tensor], target: Tensor, backend: str) -> None:
    s, _ = pair
    with pytest.raises(RuntimeError, match=r"Long|Int"):
        nn.CrossEntropyLoss()(channels(s), target.int())
    assert torch.equal(cross_entropy(s, target.int(), backend=backend), cross_entropy(s, target, backend=backend))


def test_difference_delta_is_positive(backend: str) -> None:
    x = torch.zeros(2, 3)
    assert nn.SmoothL1Loss(beta=0.0)(x, x + 1) == 1
    with pytest.raises(ValueError, match="delta"):
        kdfast.logit_huber(x, x, 0.0, **HUBER, backend=backend)


def test_difference_pseudo_huber_is_the_default(pair: tuple[Tensor, Tensor], backend: str) -> None:
    s, t = pair
    d = s - t
    for delta in (0.5, 2.0):
        want = (delta**2 * ((1 + (d / delta) ** 2).sqrt() - 1)).mean()
        same(kdfast.logit_huber(s, t, delta, backend=backend), want, s, t)
        assert (want - nn.HuberLoss(delta=delta)(s, t)).abs() > 1e-3


def test_every_row_of_the_table_is_proved() -> None:
    """docs/differences.md and the tests above name each other."""
    rows = re.findall(r"^\|.*\| `(test_difference_\w+)` \|$", DIFFERENCES.read_text(), re.M)
    mine = [name for name in globals() if name.startswith("test_difference_")]
    assert sorted(rows) == sorted(mine) and len(set(rows)) == len(rows)
