// The mathematics of the losses, written once for every device. A number type V is float or double on CUDA and a SIMD vector of
// them on the CPU; conditions are written as `mask ? a : b`, which holds for both.
//
// softmax-KL at temperature tau without cancellation. For one row, with student logits s, teacher logits t and c = tau /
// teacher_tau:
//
//   w_k = exp((t_k - t_max) / teacher_tau)       S0 = sum w       p_k = w_k / S0
//   v_k = exp((s_k - s_max) / tau)               Z  = sum v       q_k = v_k / Z
//   x_k = ((s_k - s_offset) - c (t_k - t_offset) - centre) / tau   m  = sum w x / S0
//   R   = log(Z / S0) + rest                                      (log of the ratio of the normalisers)
//   KL  = R - m                                    (plain form: an absolute error of one ulp of the logits)
//   KL  = log1p(sum w phi(x - m) / S0),  phi(x) = exp(x) - 1 - x  (stable form: a relative error, used where KL < 1/2;
//         a class at -inf in the teacher, whose w is 0, stands in the sum with its limit w exp(x - m) = v exp(rest - m))
//   q_k - p_k = p_k expm1(x_k - shift),  shift = m + KL = R       (where that argument is below 1 and the row is near, see
//         near_limit below; else as written. m + KL is the better sum where the stable form is, R where the plain form is)
//
// The difference is taken before the division by tau, so that x is right to an ulp of the difference however large tau is. At
// equal temperatures s_k - t_k is taken first, which is exact where the student is near the teacher; a shift of 100 between the
// two would cost the gradient six bits: on the CPU what s_k - t_k loses is added again (shifted_difference below), in CUDA the
// offset, on one side alone, is the row's shift (row_offset). `centre` makes x zero at the teacher's largest logit, class j (on
// the CPU at the mean, where class j is far off that).
// At two temperatures c t_k cannot be had exactly, and the offsets are s_j and t_j: the classes near the top, where the mass
// is, then have the least error. centre is 0 there.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

namespace kdfast {

// What a forward pass leaves for a backward pass, in this order, for each row. Where the loss is small a gradient needs p, q, m
// and m + KL to full relative precision; the log-sum-exps alone (two numbers) would not give it.
struct KlStat {
  // (On the CPU, at equal temperatures: s_offset is the centre's low part, see shifted_difference.)
  enum { t_max, s_max, s_offset, t_offset, centre, mean, shift, inv_s0, inv_z, count };
};

struct MseStat {
  enum { s_offset, t_offset, mean, inv_classes, count };  // (on the CPU s_offset is that of the difference, t_offset 0)
};

struct HuberStat : MseStat {
  enum { slope = MseStat::count, count };  // the row's mean slope, which `center` takes from every class's
};

// The hard part of kd_loss: slope is the softmax at the target less 1, which is -(the sum of the others), no difference.
struct HardStat {
  enum { s_max, inv_z, slope, count };
};

namespace math {

template <class V>
struct Scalar {
  using type = __typeof__(V{}[0] + 0);
};
template <>
struct Scalar<float> {
  using type = float;
};
template <>
struct Scalar<double> {
  using type = double;
};

// Horner's rule for the coefficients C::of, which ascend. (A recursion over constants: device code may not refer to a host's
// array.)
template <class C, int i = 0, class V>
KDFAST_INLINE V polynomial(V x) {
  constexpr int last = int(sizeof(C::of) / sizeof(C::of[0])) - 1;
  constexpr auto c = C::of[i];
  if constexpr (i + 1 == last) {
    constexpr auto top = C::of[last];
    return x * top + c;
  } else {
    return polynomial<C, i + 1>(x) * x + c;
  }
}

// Chebyshev interpolants on the interval named, to the precision of the type.
template <class F>
struct PhiSeries;       // (e^x - 1 - x) / x^2 on [-1, 1]
struct WidePhiSeries {  // the same on [-2, 2], 2.8e-7 relative
  static constexpr float of[] = {0.5f,
                                 0.166666428f,
                                 0.0416666469f,
                                 0.00833412801f,
                                 0.00138895459f,
                                 0.000197701154f,
                                 0.0000247427187f,
                                 0.00000299008514f,
                                 0.000000294994941f};
};
template <class F>
struct Exp2Series;  // 2^x on [-1/2, 1/2]
template <>
struct PhiSeries<float> {  // 1.1e-7 relative
  static constexpr float of[] = {0.5f,           0.166666973f,    0.0416666972f,   0.00833088617f,
                                 0.00138864477f, 0.000203290419f, 0.0000252884348f};
};
template <>
struct Exp2Series<float> {  // 2.5e-9 relative
  static constexpr float of[] = {1.0f,           0.693147207f,   0.240226509f,   0.0555032723f,
                                 0.00961805667f, 0.00134004282f, 0.000154614447f};
};
struct ShortExp2Series {  // the same, 2.1e-7 relative: for weights that stand in ratios alone
  static constexpr float of[] = {1.00000008f, 0.693147188f, 0.240221075f, 0.0555035711f, 0.00967603192f, 0.00133908634f};
};
struct SixteenthExp2Series {  // 2^x on [-1/16, 1/16], 3.8e-8 relative
  static constexpr float of[] = {1.0f, 0.6931472f, 0.24025469f, 0.055508014f};
};
// 2^x on [-1/64, 1/64], 5.3e-8 relative, is kScale ((x + kShift)^2 + kRest): an addition in the place of a multiply-add, of
// which the sums have enough.
struct SquareExp2 {
  static constexpr float kScale = 0.24022813f, kShift = 1.44270647f, kRest = 2.08130789f;
};
struct GrowthExp2Series {  // (2^x - 1) / x on [-1/64, 1/64], 5.3e-8 relative: 6e-10 of 2^x
  static constexpr float of[] = {0.69314718f, 0.24022651f, 0.055504109f};
};
template <>
struct PhiSeries<double> {  // 1.5e-17 relative
  static constexpr double of[] = {0.500000000000000006,     0.166666666666666667,   0.0416666666666660883,
                                  0.00833333333333329936,   0.00138888888889814045, 0.000198412698413241979,
                                  0.0000248015872460968169, 2.7557319191381817e-6,  2.75573350689337267e-7,
                                  2.50521176959078236e-8,   2.08744355758642747e-9, 1.60576796238016377e-10,
                                  1.16391941241505224e-11,  7.74617859301882749e-13};
};
template <>
struct Exp2Series<double> {  // 4.2e-18 relative
  static constexpr double of[] = {1.0,
                                  0.693147180559945309,
                                  0.240226506959101596,
                                  0.055504108664821627,
                                  0.00961812910758725667,
                                  0.00133335581464064707,
                                  0.000154035304637243542,
                                  0.0000152527338415567726,
                                  1.32154325359123762e-6,
                                  1.01780570877339411e-7,
                                  7.07419429728852101e-9,
                                  4.45581790833606449e-10};
};

// Both for |x| <= 1, multiply-adds only.
template <class V>
KDFAST_INLINE V phi_series(V x) {
  return x * x * polynomial<PhiSeries<typename Scalar<V>::type>>(x);
}
template <class V>
KDFAST_INLINE V expm1_series(V x) {
  return x * x * polynomial<PhiSeries<typename Scalar<V>::type>>(x) + x;
}

KDFAST_INLINE float log(float x) { return ::logf(x); }
KDFAST_INLINE double log(double x) { return ::log(x); }
KDFAST_INLINE float exp(float x) { return ::expf(x); }
KDFAST_INLINE double exp(double x) { return ::exp(x); }
// Within a few ulp for x >= -0.9: the logarithm of the rounded 1 + x, and the rounding made good.
template <class F>
KDFAST_INLINE F log1p(F x) {
  const F sum = 1 + x;
  return log(sum) + (x - (sum - 1)) / sum;
}
// For 0 <= x < 1/2, 2e-8 relative: 2 atanh(x / (2 + x)).
KDFAST_INLINE float log1p_series(float x) {
  const float s = x / (2 + x), z = s * s;
  return 2 * s + 2 * s * z * (1.f / 3 + z * (1.f / 5 + z * (1.f / 7 + z * (1.f / 9 + z * (1.f / 11)))));
}
KDFAST_INLINE double log1p_series(double x) { return log1p(x); }
// The power of two at or below x > 0 (0 for a subnormal).
KDFAST_INLINE float power_of_two(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof x);
  bits &= 0x7F800000u;
  memcpy(&x, &bits, sizeof x);
  return x;
}
KDFAST_INLINE double power_of_two(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof x);
  bits &= 0x7FF0000000000000u;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// The shift `d` between student and teacher in units of 2^-7 of the power of two at or below `size`, the largest finite
// magnitude of the logits. Being that coarse, its subtraction from a logit rounds nothing away but where it is far larger than
// the logit, and a shift too small to matter is left alone (0).
template <class F>
KDFAST_INLINE F row_offset(F d, F size) {
  constexpr F round = sizeof(F) == 4 ? F(12582912.0) : F(6755399441055744.0);  // 1.5 * 2^23, 1.5 * 2^52
  const F big = round * (power_of_two(size) / 128), offset = (d + big) - big;
  return offset - offset == 0 ? offset : F(0);  // not finite: a row with infinities or NaN
}

// What the rounding of d = s - t loses (Knuth's two-sum). NaN where d is infinite.
template <class V>
KDFAST_INLINE V lost_by(V d, V s, V t) {
  const V minus_t = d - s;
  return (s - (d - minus_t)) - (t + minus_t);
}
// s - t - (offset + low) as if s - t were not rounded: what that loses is added where the offset has made room for it.
template <class V, class F>
KDFAST_INLINE V shifted_difference(V s, V t, F offset, F low) {
  const V d = s - t, lost = lost_by(d, s, t), left = d - offset;
  return lost == lost ? left + (lost - low) : left;
}

// What a row's logits are read with, from those at the teacher's largest and, at equal temperatures, the row's offset: that is
// subtracted from the side that has the larger logit there, which carries the shift.
template <class F>
struct Origin {
  F s_offset, t_offset, centre;
};
template <class F>
KDFAST_INLINE Origin<F> origin(bool equal, F s_j, F t_j, F offset) {
  if (!equal) return {s_j, t_j, 0};
  const bool on_student = (s_j < 0 ? -s_j : s_j) >= (t_j < 0 ? -t_j : t_j);
  const F s_offset = on_student ? offset : F(0), t_offset = on_student ? F(0) : -offset;
  return {s_offset, t_offset, (s_j - s_offset) - (t_j - t_offset)};
}

template <class F>
KDFAST_INLINE F phi(F x) {
  return x * x < 1 ? phi_series(x) : exp(x) - 1 - x;
}

// Below this value of the plain form the stable one is taken: there the plain one has lost a digit to cancellation, and the
// stable one has no term above e^(1/2).
inline constexpr double kStableBelow = 0.5;

// q_k - p_k is taken as p_k expm1(z_k) where z_k^2 is below this: 1, or 0 in a row whose shift is large for another reason than
// large x about a small KL. q_j and p_j, of the teacher's likeliest class, then differ by a factor of e at least, so that
// nothing cancels, and z would be no better than an ulp of the shift.
template <class F>
KDFAST_INLINE F near_limit(F mean, F shift) {
  return shift * shift >= 1 && shift - mean >= F(kStableBelow) ? F(0) : F(1);
}

}  // namespace math
}  // namespace kdfast
