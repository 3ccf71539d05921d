"""The hard part of kd_loss as Triton functions: the student's cross-entropy with a row's target, at temperature 1.

Its softmax is read around `top`, any logit near the row's largest. The target's exponential stays out of `others`, the sum of all the
others: where the target has nearly all the mass, they alone are the loss.
"""

import triton
import triton.language as tl

from kdfast.triton.kl_math import log1p_series, number, weight, zero_if_masked

STATS = tl.constexpr(3)  # HardStat of csrc/kl_math.h: top, 1 / z, the gradient at the target
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def target_of(target, target_stride, ignore_index, row, rows, classes, used):
    """Each row's column, -1 where there is none, and whether it has a hard part."""
    y = tl.load(target + row * target_stride, mask=row < rows, other=0).to(tl.int64)
    counts = used & (y != ignore_index)
    return tl.where(counts & (y >= 0) & (y < classes), y, -1).to(tl.int32), counts


@triton.jit
def exponentials(s, top):
    return weight(s, top[:, None], LOG2_E)


@triton.jit
def others_of(e, k, column):
    return tl.where(k[None, :] == column[:, None], 0.0, e)


@triton.jit
def below(s, top, mask):
    """What smoothed labels sum, of the classes there are."""
    return tl.where(mask, top[:, None] - s, 0.0)


@triton.jit
def add_block(top, others, s, k, column):
    """top and others of a row, with another block; top is -inf where there is nothing yet."""
    new = tl.maximum(top, tl.max(s, 1))
    old = tl.where(others == 0.0, 0.0, others * tl.exp(top - new))
    return new, old + tl.sum(others_of(exponentials(s, zero_if_masked(new)), k, column), 1)


@triton.jit
def hard_of_row(top, s_target, column, others, below_mean, smoothing, F: tl.constexpr):
    """(loss, 1 / z, gradient at the target); NaN where the target is no class."""
    gap = top - tl.where(column < 0, float("nan"), s_target)
    z = others + tl.exp(-gap)
    log1p = tl.where(others <= 1.0, log1p_series(tl.minimum(others, 1.0)), tl.log(1.0 + others))
    log_z = tl.where(gap == 0.0, log1p, tl.log(z))
    loss = (log_z + gap) * number(1.0 - smoothing, F)
    if below_mean is not None:
        loss += (log_z + below_mean) * number(smoothing, F)
    return loss, 1.0 / z, -others / z


@triton.jit
def hard_gradient(e, k, column, counts, inv_z, slope, factor, smoothing, classes, F: tl.constexpr):
    """A tile of the gradient, times a factor of the row."""
    uniform = number(smoothing, F) / classes
    at_target = (slope + number(smoothing, F) - uniform) * factor
    g = e * (inv_z * factor)[:, None] - (uniform * factor)[:, None]
    g = tl.where(k[None, :] == column[:, None], at_target[:, None], g)
    return tl.where(counts[:, None], g, 0.0)


@triton.jit
def with_hard(soft, hard, HARD: tl.constexpr):
    """The student's gradient: of the parts that have one."""
    if HARD == "both":
        return soft + hard
    elif HARD == "alone":
        return hard
    else:
        return soft


@triton.jit
def store_hard_stats(row_stats, at, mask, counts, top, inv_z, slope):
    """Zeros for a row without a hard part."""
    tl.store(row_stats + at, tl.where(counts, top, 0.0), mask=mask)
    tl.store(row_stats + at + 1, tl.where(counts, inv_z, 0.0), mask=mask)
    tl.store(row_stats + at + 2, tl.where(counts, slope, 0.0), mask=mask)


@triton.jit
def load_hard_stats(row_stats, at, mask):
    top = tl.load(row_stats + at, mask=mask, other=0.0)
    return top, tl.load(row_stats + at + 1, mask=mask, other=0.0), tl.load(row_stats + at + 2, mask=mask, other=0.0)
