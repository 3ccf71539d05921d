"""The mathematics of csrc/kl_math.h as Triton functions, over tiles of (rows, classes) in the type that is computed in.

The names are those of kl_math.h. What is new here:

* A row's numbers hold in a frame (t_max, s_max, s_offset, t_offset, centre): the logits that w and v are 1 at, and what the difference of
  the logits is read with. Any frame near the row's largest logits serves; that of its first block does for most rows.
* `centre` is the mean difference of the classes it was taken from, so that the mean left over is small and nothing cancels around it.
* Partial rows in different frames merge around their common mean, all terms positive.

A student alone at -inf makes sum w x infinite or NaN, which is how an infinite loss is noticed without a look at each class.
"""

import triton
import triton.language as tl

# Constants of the module, not of a function: a float given a name inside a kernel is float32.
LN2 = tl.constexpr(0.6931471805599453)
STABLE_BELOW = tl.constexpr(0.5)
SMALLEST = tl.constexpr(1.1754943508222875e-38)
# What stands for the difference at a class that the teacher masks: beyond any other one, and finite divided by the least tau, 1e-15.
MASKED = tl.constexpr(1e23)


@triton.jit
def number(x, F: tl.constexpr):
    """A kernel's float64 argument in the type computed with. (The interpreter hands it over as a Python float.)"""
    return tl.full([], x, F)


@triton.jit
def temperatures(ratio, inv_tau, student_log2, teacher_log2, F: tl.constexpr):
    """(tau / teacher_tau, 1 / tau, log2(e) / tau, log2(e) / teacher_tau): what `temps` is below."""
    return number(ratio, F), number(inv_tau, F), number(student_log2, F), number(teacher_log2, F)


@triton.jit
def small(x):
    """Where the series below hold."""
    return x * x < 0.25


@triton.jit
def _phi_over_x2(x):
    # (e^x - 1 - x) / x^2. float64: the coefficients of kl_math.h; float32: on [-1/2, 1/2], 9e-7 relative at the ends. Above 1/2 the
    # exponentials have lost two bits at most.
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
        y = x * 0.0013966609 + 0.008395553
        y = y * x + 0.04166618
        y = y * x + 0.16666277
        y = y * x + 0.5
    return y


@triton.jit
def phi_series(x):
    return x * x * _phi_over_x2(x)


@triton.jit
def expm1_series(x):
    return x * x * _phi_over_x2(x) + x


@triton.jit
def phi(x):
    return tl.where(small(x), phi_series(x), tl.exp(x) - 1.0 - x)


@triton.jit
def log1p_series(x):
    """log1p(x) for -1/2 <= x <= 1, where tl.log(1 + x) has lost digits: 2 atanh(x / (2 + x))."""
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
def weight(logit, reference, log2):
    """w or v: e^((logit - reference) / temperature)."""
    return tl.exp2((logit - reference) * log2)


# READ, a choice for the launch: how the difference student - ratio * teacher is taken.
#   "exact"    equal temperatures, sixteen bits a logit: nothing is rounded
#   "shifted"  equal temperatures: an offset on the side that carries the row's shift
#   "scaled"   two temperatures: from the logits at the teacher's largest


@triton.jit
def difference(s, t, s_offset, t_offset, temps, READ: tl.constexpr):
    if READ == "exact":
        return s - t
    elif READ == "shifted":
        return (s - s_offset) - (t - t_offset)
    else:
        return tl.fma(t - t_offset, -temps[0], s - s_offset)


@triton.jit
def largest_finite(x):
    """The largest finite magnitude of each row."""
    magnitude = tl.abs(x)
    return tl.max(tl.where(magnitude == float("inf"), 0.0, magnitude), 1)


@triton.jit
def zero_if_masked(x):
    return tl.where(x == -float("inf"), 0.0, x)


@triton.jit
def frame_of_tile(s, t, temps, READ: tl.constexpr):
    """(t_max, s_max, s_offset, t_offset, centre) of a tile's rows; 1 where a row's loss is infinite, or it holds NaN; its w; the difference
    at its class j."""
    t_max = tl.max(t, 1)
    s_j, s_max = tl.max(tl.where(t == t_max[:, None], s, -float("inf")), 1), tl.max(s, 1)
    t_max, s_max = zero_if_masked(t_max), zero_if_masked(s_max)
    s_j = tl.where(s_j == -float("inf"), temps[0] * t_max, s_j)
    w = weight(t, t_max[:, None], temps[3])
    if READ == "exact":
        s_offset, t_offset = tl.zeros_like(t_max), tl.zeros_like(t_max)
    elif READ == "shifted":
        # A large number in the place of -inf has no mass, and does not count.
        offset = row_offset(
            s_j - t_max, tl.maximum(largest_finite(tl.where(w > 0.0, s, 0.0)), largest_finite(tl.where(w > 0.0, t, 0.0)))
        )
        on_student = tl.abs(s_j) >= tl.abs(t_max)
        s_offset, t_offset = tl.where(on_student, offset, 0.0), tl.where(on_student, 0.0, -offset)
    else:
        s_offset, t_offset = s_j, t_max
    top = difference(s_j, t_max, s_offset, t_offset, temps, READ)
    # Around class j, and once more around the mean, both from the logits: a class that has all the mass keeps its exact zero, and a
    # class j far off the mean costs the others no digits.
    d = tl.minimum(difference(s, t, s_offset[:, None], t_offset[:, None], temps, READ), MASKED) - top[:, None]
    s0, s1 = tl.sum(w, 1), tl.sum(w * d, 1)
    centre = top + tl.where(s0 == 0.0, 0.0, s1 / s0)
    return (t_max, s_max, s_offset, t_offset, centre), tl.where(s1 - s1 == 0.0, 0.0, 1.0), w, top


@triton.jit
def centred(s, t, frame, temps, READ: tl.constexpr):
    """x - centre of a tile's classes."""
    t_max, s_max, s_offset, t_offset, centre = frame
    d = tl.minimum(difference(s, t, s_offset[:, None], t_offset[:, None], temps, READ), MASKED)
    return (d - centre[:, None]) * temps[1]


@triton.jit
def rest_of(frame, s_max, t_max, temps, READ: tl.constexpr):
    """x - centre at the largest logits: w e^x = v e^rest."""
    _t_max, _s_max, s_offset, t_offset, centre = frame
    return (difference(s_max, t_max, s_offset, t_offset, temps, READ) - centre) * temps[1]


@triton.jit
def w_phi(w, v, y, exp_rest):
    return tl.where(small(y), w * phi_series(y), (v * exp_rest - w) - w * y)


@triton.jit
def loss_of_row(rest, mean, s0, z, excess, infinite):
    """KL, mean and shift of a row, from excess = sum w phi(x - m) / S0. A row that holds NaN has NaN in all three."""
    nan = (z - z) + (s0 - s0)
    log_ratio = tl.log(tl.where(z == 0.0, SMALLEST, z) / s0) + rest
    plain = log_ratio - mean
    stable = plain < STABLE_BELOW
    kl = tl.where(stable, log1p_series(tl.where(excess < 0.0, 0.0, excess)), plain)
    kl = tl.where(kl < 0.0, 0.0, kl)
    shift = tl.where(stable, mean + kl, log_ratio)
    return tl.where(infinite > 0.0, float("inf"), kl) + nan, mean + nan, shift + nan


@triton.jit
def excess_around_mean(excess, mean, s0):
    """sum w phi(x - m) / S0 from sum w phi(x)."""
    return tl.exp(-mean) * (excess / s0 - phi(mean))


# A student that agrees with its teacher but for a class of little mass, which it puts far off: the mean, and with it a frame's centre, lie
# between that class and the others, x - shift is 0 at these but for what an ulp of the centre leaves of it, and that is the gradient. Such
# a row is read around class j, where x is exactly 0, and its shift is made of each class's q - p.


@triton.jit
def loses_digits(kl, z_top):
    """From x - shift at class j: whether rounding of the size of kl is not small beside it. (Above 2, q - p is taken as written.)"""
    return tl.abs(z_top) * 8.0 < tl.minimum(kl, 2.0)


@triton.jit
def around(centre, frame, mean, shift, temps):
    """A row's frame, mean and shift with another centre."""
    t_max, s_max, s_offset, t_offset, old = frame
    moved = (old - centre) * temps[1]
    return (t_max, s_max, s_offset, t_offset, centre), mean + moved, shift + moved


@triton.jit
def ratio_less_one(w, v, y, exp_rest):
    """w (e^x - 1), whose sum over S0 is e^shift - 1."""
    return tl.where(small(y), w * expm1_series(y), v * exp_rest - w)


@triton.jit
def shift_of_ratio(ratio, plain):
    """The shift from ratio = e^shift - 1; plain, the same as the difference of logarithms, serves where that is not small."""
    return tl.where(tl.abs(ratio) < 0.5, log1p_series(tl.where(tl.abs(ratio) < 0.5, ratio, 0.0)), plain)


# A row in parts. A part is (frame, rest, mean, s0, z, excess, infinite):
#
#   mean     m, what is left of it after the frame's centre
#   excess   e^-u sum w phi(x - m),  u = max(0, rest - m): never above s0 + z, however far student and teacher are apart
#
# A part without any class of the teacher has s0 = 0; of its numbers, t_max, s_max, z and infinite alone count.


@triton.jit
def empty_part(like):
    nothing = tl.zeros_like(like)
    return (nothing, nothing, nothing, nothing, nothing), nothing, nothing, nothing, nothing, nothing, nothing


@triton.jit
def part_of_tile(s, t, temps, READ: tl.constexpr):
    frame, infinite, w, _top = frame_of_tile(s, t, temps, READ)
    v = weight(s, frame[1][:, None], temps[2])
    y = centred(s, t, frame, temps, READ)
    rest = rest_of(frame, frame[1], frame[0], temps, READ)
    s0, s1 = tl.sum(w, 1), tl.sum(w * y, 1)
    mean = tl.where(s0 == 0.0, 0.0, s1 / s0)
    u = tl.maximum(rest - mean, 0.0)
    y -= mean[:, None]
    excess = tl.sum(w_phi(w * tl.exp(-u)[:, None], v, y, tl.exp(rest - mean - u)[:, None]), 1)
    return frame, rest, mean, s0, tl.sum(v, 1), excess, infinite


@triton.jit
def _moved(excess, s0, u, delta, growth, u_new):
    """e^-u_new sum w phi(x - m - delta) from e^-u sum w phi(x - m), where the new weights are e^growth w."""
    grown = s0 * tl.exp(growth - u_new)
    # The second form is for a light part so far off that e^-delta alone overflows.
    moved = tl.where(delta > -64.0, grown * phi(-delta), s0 * tl.exp(growth - u_new - delta) - grown * (1.0 - delta))
    return tl.where(excess == 0.0, 0.0, excess * tl.exp(u - delta + growth - u_new)) + moved


@triton.jit
def merge(a, b, temps, READ: tl.constexpr):
    """Two parts of one row as one."""
    a_frame, a_rest, a_mean, a_s0, a_z, a_excess, a_infinite = a
    b_frame, b_rest, b_mean, b_s0, b_z, b_excess, b_infinite = b
    at_max, as_max, as_offset, at_offset, a_centre = a_frame
    bt_max, bs_max, bs_offset, bt_offset, b_centre = b_frame
    a_empty, b_empty = a_s0 == 0.0, b_s0 == 0.0
    t_max = tl.where(a_empty | (~b_empty & (bt_max > at_max)), bt_max, at_max)
    s_max = tl.where((a_z == 0.0) | ((b_z != 0.0) & (bs_max > as_max)), bs_max, as_max)
    a_growth = tl.where(a_empty, 0.0, (at_max - t_max) * temps[3])
    b_growth = tl.where(b_empty, 0.0, (bt_max - t_max) * temps[3])
    a_w, b_w = a_s0 * tl.exp2(a_growth), b_s0 * tl.exp2(b_growth)
    a_v = tl.where(a_z == 0.0, 0.0, a_z * tl.exp2((as_max - s_max) * temps[2]))
    b_v = tl.where(b_z == 0.0, 0.0, b_z * tl.exp2((bs_max - s_max) * temps[2]))
    s0, z = a_w + b_w, a_v + b_v

    apart = ((bs_offset - as_offset) - temps[0] * (bt_offset - at_offset)) + (b_centre - a_centre)
    apart = apart * temps[1] + (b_mean - a_mean)
    apart = tl.where(a_empty | b_empty, 0.0, apart) / tl.where(s0 == 0.0, 1.0, s0)
    a_delta, b_delta = apart * b_w, -apart * a_w
    # The heavier side's mean has the shorter way to go.
    from_b = b_w > a_w
    s_offset, t_offset = tl.where(from_b, bs_offset, as_offset), tl.where(from_b, bt_offset, at_offset)
    centre, mean = tl.where(from_b, b_centre, a_centre), tl.where(from_b, b_mean + b_delta, a_mean + a_delta)
    frame = (t_max, s_max, s_offset, t_offset, centre)
    rest = rest_of(frame, s_max, t_max, temps, READ)

    gap = rest - mean
    u = tl.maximum(gap, 0.0)
    mass = tl.exp(gap - u)
    a_excess = _moved(a_excess, a_s0, tl.maximum(a_rest - a_mean, 0.0), a_delta, a_growth * LN2, u)
    b_excess = _moved(b_excess, b_s0, tl.maximum(b_rest - b_mean, 0.0), b_delta, b_growth * LN2, u)
    excess = tl.where(a_empty, a_v * mass, a_excess) + tl.where(b_empty, b_v * mass, b_excess)
    return frame, rest, mean, s0, z, excess, tl.maximum(a_infinite, b_infinite)


@triton.jit
def near_limit(shift):
    """q - p is taken as p expm1(z) where z^2 is below this: 1/4, or 0 in a row whose shift is large, since z is no better than an ulp of
    that, and q - p as written no worse than one of p."""
    return tl.where(shift * shift < 4.0, 0.25, 0.0)


@triton.jit
def student_gradient(w, v, z, near, p_factor, q_factor):
    """(q - p) times a factor that p_factor = factor / S0 and q_factor = factor / Z hold;  z = x - shift."""
    p = w * p_factor
    return tl.where(z * z < near, p * expm1_series(z), v * q_factor - p)


@triton.jit
def teacher_gradient(w, from_mean, p_factor):
    """p (m - x) times a factor that p_factor = factor / S0 holds;  from_mean = x - m."""
    return -(w * p_factor) * from_mean
