"""The losses in plain torch: their definition, differentiable any number of times on any device.

The truth that the kernels are tested against, the path for transforms that kernels cannot serve (torch.func, forward-mode AD, double
backward), and the fallback for devices without kernels. It computes in float64 where the device has it, which is what
makes plain formulas as accurate as the kernels' (csrc/kl_math.h); loss and gradients are of the kernels' dtypes. Arguments are
those of kdfast.functional after its checks.
"""

import math

import torch
from torch import Tensor

STABLE_BELOW = 0.5  # kStableBelow of csrc/kl_math.h
WITHOUT_FLOAT64 = ("mps",)
SERIES_TERMS = 20  # of e^x for |x| < 1: the next is below one unit in the last place of float64, as is its second derivative


def kl_div_tau(
    student: Tensor,
    teacher: Tensor,
    row_weight: Tensor | None,
    denominator: Tensor | None,
    divisor: float | None,
    reduction: int,
    num_classes: int,
    tau: float,
    teacher_tau: float,
    scale_by_tau_squared: bool,
) -> Tensor:
    """tau**2 * KL(softmax(teacher / teacher_tau) || softmax(student / tau)) of each row, reduced."""
    s, t = _prepare(student, teacher, row_weight, num_classes)
    loss = _kl(s, t, tau, teacher_tau) * (tau**2 if scale_by_tau_squared else 1)
    return _reduce(loss, row_weight, denominator, divisor, reduction, 1).to(_loss_dtype(student, teacher))


def logit_mse(
    student: Tensor,
    teacher: Tensor,
    row_weight: Tensor | None,
    denominator: Tensor | None,
    divisor: float | None,
    reduction: int,
    num_classes: int,
    center: bool,
    tau_limit: bool,
) -> Tensor:
    """Sum of squared differences of each row (minus their mean: center), reduced. tau_limit: 0.5 / K times that."""
    s, t = _prepare(student, teacher, row_weight, num_classes)
    d, counted = _differences(s, t, center)
    loss = (d * d).sum(-1)
    if tau_limit:
        loss = loss * 0.5 / counted
    per_row = 1 if tau_limit else s.shape[-1]
    return _reduce(loss, row_weight, denominator, divisor, reduction, per_row).to(_loss_dtype(student, teacher))


def logit_huber(
    student: Tensor,
    teacher: Tensor,
    row_weight: Tensor | None,
    denominator: Tensor | None,
    divisor: float | None,
    reduction: int,
    num_classes: int,
    delta: float,
    smooth_l1: bool,
    center: bool,
) -> Tensor:
    """Sum of the pseudo-Huber or smooth L1 losses of each row's differences (minus their mean: center), reduced."""
    s, t = _prepare(student, teacher, row_weight, num_classes)
    d, _ = _differences(s, t, center)
    if smooth_l1:
        near = d.clamp(-delta, delta)
        loss = near / delta * (d - near / 2)
    else:  # delta**2 (sqrt(1 + (d/delta)**2) - 1) without its cancellation
        infinite = d.isinf()
        finite = torch.where(infinite, 0, d)
        root = torch.hypot(finite, finite.new_full((), delta))
        loss = delta * torch.where(infinite, d.abs(), finite * (finite / (delta + root)))
    value = _reduce(loss.sum(-1), row_weight, denominator, divisor, reduction, s.shape[-1])
    return value.to(_loss_dtype(student, teacher))


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    row_weight: Tensor | None,
    denominator: Tensor | None,
    divisor: float | None,
    reduction: int,
    num_classes: int,
    target: Tensor,
    tau: float,
    alpha: float,
    soft: int,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(1 - alpha) * hard + alpha * soft, hard and soft, reduced. soft: 0 is kl_div_tau, 1 logit_mse, 2 its tau_limit."""
    s, t = _prepare(student, teacher, row_weight, num_classes)
    if soft == 0:
        rows = _kl(s, t, tau, tau) * tau**2
    else:
        d, classes = _differences(s, t, center=soft == 2)
        rows = (d * d).sum(-1) * (0.5 / classes if soft == 2 else 1)
    soft_value = _reduce(rows, row_weight, denominator, divisor, reduction, s.shape[-1] if soft == 1 else 1)
    counted = target.long() != ignore_index  # which no narrower type may hold
    weight = counted if row_weight is None else torch.where(counted, row_weight, 0)
    hard = _cross_entropy(s, target, weight != 0, label_smoothing)
    hard_value = _reduce(hard, weight, denominator, divisor, reduction, 1)
    if alpha == 0:  # whatever the soft part holds; the teacher's gradient is 0
        value = hard_value + _reduce(
            torch.where(torch.zeros_like(t, dtype=torch.bool), t, 0).sum(-1), None, None, 1.0, reduction, 1
        )
    else:
        value = soft_value if alpha == 1 else (1 - alpha) * hard_value + alpha * soft_value
    dtype = _loss_dtype(student, teacher)
    return value.to(dtype), hard_value.detach().to(dtype), soft_value.detach().to(dtype)


def _cross_entropy(s: Tensor, target: Tensor, counted: Tensor, smoothing: float) -> Tensor:
    """Of each row at temperature 1, as torch.nn.CrossEntropyLoss defines it; 0 in rows not counted, NaN where there is no such class."""
    s = torch.where(counted.unsqueeze(-1), s, 0)
    exists = (target >= 0) & (target < s.shape[-1])
    index = torch.where(exists & counted, target, 0).long().unsqueeze(-1)
    s_target, log_z = s.gather(-1, index).squeeze(-1), s.logsumexp(-1)
    masked = s_target == -math.inf
    # Where the target's logit is the largest, the sum of the others' exponentials may be far below 1.
    largest = s.detach().amax(-1)
    likely = s_target == largest
    d = s - torch.where(likely, s_target, largest).unsqueeze(-1)
    d_target = torch.where(masked, 0, d.gather(-1, index).squeeze(-1))
    at_target = torch.zeros_like(s, dtype=torch.bool).scatter(-1, index, True)
    others = torch.where(at_target, 0, d.exp()).sum(-1)
    # (d_target is 0 or NaN where the target is likely; its gradient would not be 0, but a difference that hides the others'.)
    likelihood = torch.where(likely, torch.log1p(others) - d_target.detach(), (others + d_target.exp()).log() - d_target)
    loss = torch.where(masked, log_z - s_target, likelihood)
    if smoothing != 0:
        loss = (1 - smoothing) * loss + smoothing * (log_z.unsqueeze(-1) - s).mean(-1)
    return torch.where(counted, loss * torch.where(exists, 1.0, math.nan), 0)


def _differences(s: Tensor, t: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    """Each row's differences, minus their mean: center; and how many there are. A class at -inf on both sides has none: 0."""
    out = (s == -math.inf) & (t == -math.inf)
    d = torch.where(out, 0, s) - torch.where(out, 0, t)
    counted = (~out).sum(-1).to(d.dtype)
    if center:
        mean = d.sum(-1) / counted.clamp(min=1)
        # Infinite differences: the loss is infinite around any mean, and NaN only where a logit is NaN.
        mean = torch.where(d.isinf().any(-1) & ~d.isnan().any(-1), 0, mean)
        d = torch.where(out, 0, d - mean.unsqueeze(-1))
    return d, counted


def _prepare(student: Tensor, teacher: Tensor, row_weight: Tensor | None, num_classes: int) -> tuple[Tensor, Tensor]:
    """The columns used, in the type computed with; rows of weight 0 replaced by zeros."""
    dtype = torch.float32 if student.device.type in WITHOUT_FLOAT64 else torch.float64
    if num_classes >= 0:
        student, teacher = student[..., :num_classes], teacher[..., :num_classes]
    s, t = student.to(dtype), teacher.to(dtype)
    if row_weight is not None:
        used = (row_weight != 0).unsqueeze(-1)
        s, t = torch.where(used, s, 0), torch.where(used, t, 0)
    return s, t


def _loss_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32


def _reduce(
    loss: Tensor, row_weight: Tensor | None, denominator: Tensor | None, divisor: float | None, reduction: int, per_row: int
) -> Tensor:
    weight = None if row_weight is None else row_weight.to(loss.dtype)
    if weight is not None:
        loss = loss * weight
    if reduction == 0:
        return loss
    total = loss.sum()
    if divisor is not None:
        return total / divisor
    if denominator is not None:
        return total / denominator.to(loss.dtype)
    if reduction == 1:
        return total
    if reduction == 3:
        return total / loss.shape[0]
    if weight is None or loss.numel() == 0:
        return total / (loss.numel() * per_row)
    weights = weight.sum()
    return total / torch.where(weights == 0, 1, weights * per_row)


def _phi(x: Tensor) -> Tensor:
    """e^x - 1 - x, to full relative precision; so are its derivatives."""
    small = x.abs() < 1
    y = torch.where(small, x, 0)
    series = torch.zeros_like(y)
    for k in range(SERIES_TERMS, 1, -1):
        series = (series * y + 1 / math.factorial(k)) if k > 2 else (series * y + 0.5) * y * y
    z = torch.where(small, 0, x)
    return torch.where(small, series, torch.expm1(z) - z)


def _kl(s: Tensor, t: Tensor, tau: float, teacher_tau: float) -> Tensor:
    """KL of each row, without the factor tau**2."""
    off_s, off_t = s == -math.inf, t == -math.inf
    nowhere = off_s.all(-1, keepdim=True)
    log_p = torch.log_softmax(_below_zero(t) / teacher_tau, -1)
    log_q = torch.log_softmax(_below_zero(torch.where(nowhere, 0, s)) / tau, -1)
    p, log_q = log_p.exp(), torch.where(nowhere, -math.inf, log_q)
    # A mass that underflowed is still one where the student has none.
    p = torch.where(~off_t & off_s & (p == 0), torch.finfo(p.dtype).tiny, p)
    massless = p == 0
    plain = (p * (torch.where(massless, 0, log_p) - torch.where(massless, 0, log_q))).sum(-1)

    # The differences are taken before the division by tau, around the teacher's largest logit.
    gone = massless | off_s
    s, t = torch.where(gone, 0, s), torch.where(gone, 0, t)
    top = torch.where(gone, -math.inf, log_p.detach()).argmax(-1, keepdim=True)
    s_top, t_top = s.detach().gather(-1, top), t.detach().gather(-1, top)
    d = (s - t) - (s_top - t_top) if tau == teacher_tau else (s - s_top) - (tau / teacher_tau) * (t - t_top)
    x = torch.where(gone, 0, d / tau)
    z = torch.where(gone, 0, x - (p * x).sum(-1, keepdim=True))
    stable = (plain.detach() < STABLE_BELOW).unsqueeze(-1)
    excess = (p * _phi(torch.where(stable, z, 0))).sum(-1)
    # The student's mass where the teacher has none.
    elsewhere = torch.where(massless & stable, log_q, -math.inf).exp().sum(-1)
    return torch.where(stable.squeeze(-1), torch.log1p(excess) - torch.log1p(-elsewhere), plain)


def _below_zero(logits: Tensor) -> Tensor:
    """The logits less their row's largest: a division by tau does not overflow then."""
    top = logits.detach().amax(-1, keepdim=True)
    return logits - torch.where(top.isinf(), 0, top)
