"""The mathematics of csrc/kl_math.h as Triton functions, over tiles of (rows, classes) in the type that is computed in.

The names are those of kl_math.h. What is new here is how a row's numbers are summed block by block, each logit read once: every block is
summed around its own mean, and two partial rows merge around their common mean, so that all terms stay positive and nothing cancels.
"""

import triton
import triton.language as tl

STABLE_BELOW = tl.constexpr(0.5)
# Constants of the module, not of a function: a float given a name inside a kernel is float32.
LOG2_E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def number(x, F: tl.constexpr):
    """A kernel's float64 argument in the type computed with. (The interpreter hands it over as a Python float.)"""
    return tl.full([], x, F)


@triton.jit
def _phi_over_x2(x):
    # (e^x - 1 - x) / x^2 on [-1, 1], the coefficients of kl_math.h
    if x.dtype == tl.float64:
        y = x * 7.74617859301882749e-13 + 1.16391941241505224e-11
        y = y * x + 1.60576796238016377e-10
        y = y * x + 2.08744355758642747e-9
        y = y * x + 2.50521176959078236e-8
        y = y * x + 2.75573350689337267e-7
        y = y * x + 2.7557319191381817e-6
        y = y * x + 0.0000248015872460968169
        y = y * x + 0.000198412698413241979
        y = y * x + 0.00138888888889814045
        y = y * x + 0.00833333333333329936
        y = y * x + 0.0416666666666660883
        y = y * x + 0.166666666666666667
        y = y * x + 0.500000000000000006
    else:
        y = x * 0.0000252884348 + 0.000203290419
        y = y * x + 0.00138864477
        y = y * x + 0.00833088617
        y = y * x + 0.0416666972
        y = y * x + 0.166666973
        y = y * x + 0.5
    return y


@triton.jit
def phi_series(x):
    return x * x * _phi_over_x2(x)


@triton.jit
def expm1_series(x):
    return x * x * _phi_over_x2(x) + x


@triton.jit
def log1p_nonnegative(x):
    """log1p(x) for 0 <= x <= 1, where tl.log(1 + x) has lost digits: 2 atanh(x / (2 + x))."""
    r = x / (x + 2.0)
    r2 = r * r
    if x.dtype == tl.float64:
        y = r2 * (1.0 / 37) + 1.0 / 35
        y = y * r2 + 1.0 / 33
        y = y * r2 + 1.0 / 31
        y = y * r2 + 1.0 / 29
        y = y * r2 + 1.0 / 27
        y = y * r2 + 1.0 / 25
        y = y * r2 + 1.0 / 23
        y = y * r2 + 1.0 / 21
        y = y * r2 + 1.0 / 19
        y = y * r2 + 1.0 / 17
        y = y * r2 + 1.0 / 15
    else:
        y = r2 * (1.0 / 17) + 1.0 / 15
    y = y * r2 + 1.0 / 13
    y = y * r2 + 1.0 / 11
    y = y * r2 + 1.0 / 9
    y = y * r2 + 1.0 / 7
    y = y * r2 + 1.0 / 5
    y = y * r2 + 1.0 / 3
    return 2.0 * (r + r * r2 * y)


@triton.jit
def power_of_two(x):
    """The power of two at or below x >= 0 (0 for a subnormal)."""
    if x.dtype == tl.float64:
        return (x.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)
    else:
        return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def row_offset(d, magnitude):
    """The shift d in units of 2^-7 of the power of two at or below `magnitude`; 0 where that is not finite."""
    unit = power_of_two(magnitude) * 0.0078125
    if d.dtype == tl.float64:
        big = unit * 6755399441055744.0
    else:
        big = unit * 12582912.0
    offset = (d + big) - big
    return tl.where(offset - offset == 0.0, offset, 0.0)


@triton.jit
def teacher_weight(t, t_max, teacher_log2):
    """w: a finite logit always has mass, a class at -inf has exactly none."""
    if t.dtype == tl.float64:
        w = tl.maximum(tl.exp2((t - t_max) * teacher_log2), 2.2250738585072014e-308, propagate_nan=tl.PropagateNan.ALL)
    else:
        w = tl.maximum(tl.exp2((t - t_max) * teacher_log2), 1.1754943508222875e-38, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(t == -float("inf"), 0.0, w)


@triton.jit
def student_weight(s, s_max, student_log2):
    """v, for a finite s_max."""
    return tl.exp2((s - s_max) * student_log2)


@triton.jit
def difference(s, t, offset, centre, ratio, inv_tau):
    """x."""
    return (((s - offset) - ratio * t) - centre) * inv_tau


@triton.jit
def finite_or_zero(x):
    return tl.where(x - x == 0.0, x, 0.0)


# A row in parts. A part is (t_max, s_max, offset, centre, rest, mean, s0, z, excess, lost):
#
#   rest     x at (s_max, t_max), so that w e^x = v e^rest
#   mean     m, what is left of it after `centre`, which lies within a rounding of it
#   excess   e^-u sum w phi(x - m),  u = max(0, rest - m): never above s0 + z, however far student and teacher are apart
#   lost     1 where the teacher has mass at a class where the student has none
#
# A part without any class of the teacher has s0 = 0; of its numbers, t_max, s_max, z and lost alone count.


@triton.jit
def sum_tile(s, t, ratio, tau, inv_tau, student_log2, teacher_log2, EXACT: tl.constexpr, ALONE: tl.constexpr):
    """The part of a tile, its w and v, and y = x - `centre`. EXACT: differences of the logits are exact as they are.
    ALONE: the part will not be merged, so a row where `excess` overflows has no use for it (u = 0)."""
    inf = float("inf")
    t_max, s_max = tl.max(t, 1), tl.max(s, 1)
    t_top, s_top = tl.where(t_max == -inf, 0.0, t_max), tl.where(s_max == -inf, 0.0, s_max)
    # The largest logits stand for the shift between student and teacher; they are there before any other number is.
    d = s_top - ratio * t_top
    if EXACT:
        offset = tl.zeros_like(d)
    else:
        offset = row_offset(d, tl.maximum(tl.abs(s_top), tl.abs(t_top)))
    centre = finite_or_zero((s_top - offset) - ratio * t_top)

    w = teacher_weight(t, t_top[:, None], teacher_log2)
    x = difference(s, t, offset[:, None], centre[:, None], ratio, inv_tau)
    s0 = tl.sum(w, 1)
    s1 = tl.sum(tl.where(w == 0.0, 0.0, w * x), 1)
    lost = tl.where(s1 == -inf, 1.0, 0.0)

    # Once more around the mean, from the logits: the differences lose nothing to a centre that was far off.
    centre += finite_or_zero(s1 / s0) * tau
    y = tl.where(w == 0.0, 0.0, difference(s, t, offset[:, None], centre[:, None], ratio, inv_tau))
    v = student_weight(s, s_top[:, None], student_log2)  # as late as this: registers
    rest = difference(s_top, t_top, offset, centre, ratio, inv_tau)
    s1, z = tl.sum(w * y, 1), tl.sum(v, 1)
    small = (tl.abs(y) < 1.0) & (w != 0.0)
    if ALONE:
        mean = s1 / s0
        excess = tl.sum(tl.where(small, w * phi_series(y), v * tl.exp(rest)[:, None] - w - w * y), 1)
        excess = excess * (1.0 - mean) - 0.5 * s1 * mean
    else:
        mean = tl.where(s0 == 0.0, 0.0, s1 / s0)
        u = tl.maximum(rest, 0.0)
        scale = tl.exp(-u)
        wu = w * scale[:, None]
        excess = tl.sum(tl.where(small, wu * phi_series(y), v * tl.exp(rest - u)[:, None] - wu - wu * y), 1)
        excess = excess * (1.0 - mean + (u - tl.maximum(rest - mean, 0.0))) - 0.5 * s1 * mean * scale
    return (t_max, s_max, offset, centre, rest, mean, s0, z, excess, lost), w, v, y


@triton.jit
def _moved(excess, s0, u, delta, growth, u_new):
    """e^-u_new sum w phi(x - m - delta) from e^-u sum w phi(x - m), where the new weights are e^growth w."""
    weight = s0 * tl.exp(growth - u_new)
    far = s0 * tl.exp(growth - u_new - delta) - weight * (1.0 - delta)
    moved = tl.where(tl.abs(delta) < 1.0, weight * phi_series(-delta), far)
    return tl.where(excess == 0.0, 0.0, excess * tl.exp(u - delta + growth - u_new)) + moved


@triton.jit
def merge(a, b, ratio, tau, inv_tau, student_log2, teacher_log2):
    """Two parts of one row as one."""
    at_max, as_max, a_offset, a_centre, a_rest, a_mean, a_s0, a_z, a_excess, a_lost = a
    bt_max, bs_max, b_offset, b_centre, b_rest, b_mean, b_s0, b_z, b_excess, b_lost = b
    inf = float("inf")
    t_max, s_max = tl.maximum(at_max, bt_max), tl.maximum(as_max, bs_max)
    t_top, s_top = tl.where(t_max == -inf, 0.0, t_max), tl.where(s_max == -inf, 0.0, s_max)
    a_empty, b_empty = a_s0 == 0.0, b_s0 == 0.0
    a_growth = tl.where(a_empty, 0.0, (at_max - t_top) * teacher_log2)
    b_growth = tl.where(b_empty, 0.0, (bt_max - t_top) * teacher_log2)
    a_w, b_w = a_s0 * tl.exp2(a_growth), b_s0 * tl.exp2(b_growth)
    a_v, b_v = a_z * tl.exp2((as_max - s_top) * student_log2), b_z * tl.exp2((bs_max - s_top) * student_log2)
    s0, z = a_w + b_w, a_v + b_v

    apart = ((b_offset - a_offset) + (b_centre - a_centre)) * inv_tau + (b_mean - a_mean)
    apart = tl.where(a_empty | b_empty, 0.0, apart)
    apart_by_s0 = apart / tl.where(s0 == 0.0, 1.0, s0)
    a_delta, b_delta = apart_by_s0 * b_w, -apart_by_s0 * a_w
    # The heavier side's centre has the shorter way to go.
    from_b = b_w > a_w
    offset, old, delta = (
        tl.where(from_b, b_offset, a_offset),
        tl.where(from_b, b_centre, a_centre),
        tl.where(from_b, b_delta, a_delta),
    )
    centre = old + finite_or_zero(delta) * tau
    mean = tl.where(from_b, b_mean, a_mean) + (delta - (centre - old) * inv_tau)
    rest = difference(s_top, t_top, offset, centre, ratio, inv_tau)

    gap = rest - mean
    u = tl.maximum(gap, 0.0)
    mass = tl.exp(gap - u)
    a_excess = _moved(a_excess, a_s0, tl.maximum(a_rest - a_mean, 0.0), a_delta, a_growth * LN2, u)
    b_excess = _moved(b_excess, b_s0, tl.maximum(b_rest - b_mean, 0.0), b_delta, b_growth * LN2, u)
    excess = tl.where(a_empty, a_v * mass, a_excess) + tl.where(b_empty, b_v * mass, b_excess)
    return t_max, s_max, offset, centre, rest, mean, s0, z, excess, tl.maximum(a_lost, b_lost)


@triton.jit
def kl_of_part(part, ALONE: tl.constexpr):
    """KL of a row whose part is whole."""
    t_max, s_max, offset, centre, rest, mean, s0, z, excess, lost = part
    gap = rest - mean
    plain = tl.log(z / s0) + gap
    if not ALONE:
        excess = excess * tl.exp(tl.maximum(gap, 0.0))
    kl = tl.where(plain < STABLE_BELOW, log1p_nonnegative(tl.where(excess < 0.0, 0.0, excess) / s0), plain)
    return tl.where(lost > 0.0, float("inf"), kl) + ((z - z) + (s0 - s0))  # a NaN in the row stays one


@triton.jit
def student_gradient(w, v, z, p_factor, q_factor):
    """(q - p) times a factor that p_factor = factor / S0 and q_factor = factor / Z hold;  z = x - m - KL."""
    p = w * p_factor
    return tl.where((tl.abs(z) < 1.0) & (w != 0.0), p * expm1_series(z), v * q_factor - p)
