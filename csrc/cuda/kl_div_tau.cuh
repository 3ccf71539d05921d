// softmax-KL at temperature tau on CUDA. kl_math.h has the formulas and the names.
//
// Forward holds its slice of a row in registers: the student's logits, and for each class w and x, in units of the logits. The
// sums come first; where the KL is small, a second pass over the registers adds up its stable form around the exact mean, and
// leaves w expm1(x - m) in the place of x, from which the gradient follows by one multiply-add. Backward reads the logits
// again.
#pragma once

#include "row_reduce.cuh"

namespace kdfast::cuda {
namespace {

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The bitwise or of three.
__device__ __forceinline__ uint32_t either(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xFE;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

constexpr float kSmallest = 1.17549435e-38f;
// x of a class that weighs nothing, where it is larger or no number: finite, so that w x is 0 without a branch.
constexpr float kLargestX = 1e20f;

// phi(u), u = kUnit y, is kUnit y^2 times this, for |y| < 2: in units in which one bit of y tells whether it holds. 3.3e-7
// relative at most; over values about 0, whose errors have both signs, 2e-7.
constexpr float kUnit = 0.375f;
struct UnitPhiSeries {
  static constexpr float of[] = {0.18750004f, 0.023437481f, 0.0021970335f, 0.00016480687f, 0.000010455251f, 0.0000005539117f};
};
constexpr uint32_t kTwoOrMore = 0x40000000u;  // set where |y| >= 2, and in infinity and NaN

__device__ __forceinline__ float or_zero(float top) { return top == -INFINITY ? 0.f : top; }
// 2^((logit - top) log2), times 1 / unit.
template <bool packed>
struct SoftExponential {
  float log2, reference;

  __device__ __forceinline__ SoftExponential() {}
  __device__ __forceinline__ SoftExponential(float log2, float top) : log2(log2), reference(or_zero(top)) {
    if constexpr (packed) {
      // The exponent of a sixteen-bit logit is one multiply-add, which makes all of a row's numbers too large by one factor.
      // Where that might overflow, a logit is worth nothing unless it is equal to the top: any log2 as large will do, and a
      // power of two makes the factor 1.
      constexpr float kMost = 268435456.f;
      if (fabsf(reference * log2) > kMost) this->log2 = math::power_of_two(kMost / fabsf(reference));
      reference *= this->log2;
    }
  }
  // Of the same top: not kept, so that no register is.
  __device__ __forceinline__ float unit(float top) const {
    return packed ? exp2_approx(-fmaf(or_zero(top), log2, -reference)) : 1.f;
  }
  __device__ __forceinline__ float operator()(float logit) const {
    return exp2_approx(packed ? fmaf(logit, log2, -reference) : (logit - reference) * log2);
  }
};

struct KlDivTau {
  using Args = KlDivTauArgs;
  static constexpr int kHeld = 4, kBlocks = 1, kStats = KlStat::count;

  struct Parameters {
    KlDivTauArgs args;
    float ratio, inv_tau, student_log2, teacher_log2;  // tau / teacher_tau, 1 / tau, log2(e) / tau, log2(e) / teacher_tau
    float loss_scale, student_scale, teacher_scale;    // scale, scale / tau, scale / teacher_tau
    bool equal, exact;                                 // temperatures; and differences, those of sixteen-bit logits

    explicit Parameters(const KlDivTauArgs& args) : args(args) {
      constexpr double log2_e = 1.4426950408889634;
      ratio = float(args.tau / args.teacher_tau);
      inv_tau = float(1 / args.tau);
      student_log2 = float(log2_e / args.tau);
      teacher_log2 = float(log2_e / args.teacher_tau);
      loss_scale = float(args.scale);
      student_scale = float(args.scale / args.tau);
      teacher_scale = float(args.scale / args.teacher_tau);
      equal = args.tau == args.teacher_tau;
      exact = equal && size_of(args.student.dtype) == 2 && size_of(args.teacher.dtype) == 2;
    }
  };

  template <bool packed>
  using Exponential = SoftExponential<packed>;

  // x in units of the logits.
  struct Difference {
    float ratio, s_offset, t_offset, centre;

    Difference() = default;
    // s_j and t_j: logits of the class where the teacher's is largest; size: the largest finite magnitude.
    __device__ __forceinline__ Difference(const Parameters& p, float s_j, float t_j, float size) : ratio(p.ratio) {
      const auto origin = math::origin(p.equal, s_j, t_j, p.exact || !p.equal ? 0.f : math::row_offset(s_j - t_j, size));
      s_offset = origin.s_offset;
      t_offset = origin.t_offset;
      centre = origin.centre;
    }
    __device__ __forceinline__ explicit Difference(const Parameters& p, const float* stat)
        : ratio(p.ratio), s_offset(stat[KlStat::s_offset]), t_offset(stat[KlStat::t_offset]), centre(stat[KlStat::centre]) {}

    template <bool exact>
    __device__ __forceinline__ float of(float s, float t) const {
      if constexpr (exact) return (s - t) - centre;
      return fmaf(-ratio, t - t_offset, s - s_offset) - centre;
    }
    // What this one's zero is in the other's terms.
    __device__ __forceinline__ float from(const Difference& other) const {
      return fmaf(-ratio, t_offset - other.t_offset, s_offset - other.s_offset) + (centre - other.centre);
    }
  };

  struct Partial {
    float t_max, s_max, s_j;
    Difference x;
    float s0, mean, z, excess;  // mean: -inf where the loss is infinite; excess: sum w phi(x - mean), NaN where that is large
  };
  struct Row {
    float stat[KlStat::count];
    float kl;
    // Of this block's slice: what brings its w and v to the row's scale, the row's mean less its own, its excess.
    float w_share, v_share, apart, excess;
  };
  struct Shared {
    int s_j;  // ordered as floats are
    float largest[kMostWarps][2], size[kMostWarps][1], sums[kMostWarps][3], excess[kMostWarps][1];
  };

  // KL in its plain form; what it is compared with, and what goes into the stable one, must come from here.
  struct Plain {
    float rest, log_ratio, kl;
    __device__ __forceinline__ Plain(const Parameters& p, const Partial& row) {
      rest = (or_zero(row.s_max) - row.s_j) * p.inv_tau;
      log_ratio = math::log((row.z == 0 ? kSmallest : row.z) / row.s0) + rest;
      kl = log_ratio - row.mean;
    }
    __device__ __forceinline__ bool stable() const { return kl < float(math::kStableBelow); }
  };

  template <class H, bool wants_gradient>
  struct Held {
    H s[kHeld];
    Exponential<H::packed> weight, student_weight;
    float w_unit, v_unit;
    float w[kHeld][H::width], x[kHeld][H::width];

    // beside(largest logit of the student): called where no more than the logits is held
    template <class GradientOf, class FactorOf, class Beside = Nothing>
    __device__ __forceinline__ Partial reduce(const Parameters& p, const Team& team, const RowSpan& span, const Slice& slice,
                                              const void* student, const void* teacher, GradientOf, FactorOf, Shared& shared,
                                              Beside beside = {}) {
      if (team.warps > 1 && threadIdx.x == 0) shared.s_j = ordered(-INFINITY);
      H t[kHeld];
      Reader<H>(student, p.args.student.dtype, span, slice, nothing<H>()).next(s, slice.count);
      Reader<H>(teacher, p.args.teacher.dtype, span, slice, nothing<H>()).next(t, slice.count);
      Partial partial;
      find_references(p, team, slice, t, partial, shared);
      beside(partial.s_max);
      weight = Exponential<H::packed>(p.teacher_log2, partial.t_max);
      student_weight = Exponential<H::packed>(p.student_log2, partial.s_max);
      float sums[3];
      if (H::packed && p.exact)
        sum<H::packed>(p, slice, t, partial, sums);
      else
        sum<false>(p, slice, t, partial, sums);
      cuda::reduce<Sum>(team, sums, shared.sums);
      w_unit = weight.unit(partial.t_max);
      v_unit = student_weight.unit(partial.s_max);
      partial.s0 = sums[0] * w_unit;
      partial.mean = sums[1] / sums[0] * p.inv_tau;
      partial.z = sums[2] * v_unit;
      partial.excess = NAN;
      const Plain plain(p, partial);
      if (plain.stable()) {
        const float exp_of_reference = math::exp(plain.rest - partial.mean) * (v_unit / w_unit);
        float excess[1] = {add_excess(p, slice, partial.mean, exp_of_reference)};
        cuda::reduce<Sum>(team, excess, shared.excess);
        partial.excess = excess[0] * (w_unit * kUnit);
      }
      return partial;
    }

    // The maxima, and the student's logit where the teacher's is largest (the largest such, where several are).
    __device__ __forceinline__ void find_references(const Parameters& p, const Team& team, const Slice& slice,
                                                    const H (&t)[kHeld], Partial& partial, Shared& shared) const {
      const float mine = largest_of(slice, t);
      float largest[2] = {mine, largest_of(slice, s)}, size[1] = {0};
      cuda::reduce<Max>(team, largest, shared.largest);
      if constexpr (!H::packed) {
        size[0] = fmaxf(finite_magnitude(slice, s), finite_magnitude(slice, t));
        cuda::reduce<Max>(team, size, shared.size);
      }
      partial.t_max = largest[0];
      partial.s_max = largest[1];
      float s_j = -INFINITY;
      if (mine == partial.t_max) {
#pragma unroll
        for (int v = 0; v < kHeld; ++v) {
          if (v >= slice.count) break;
          if (!(largest_in(t[v]) == partial.t_max)) continue;
#pragma unroll
          for (int i = 0; i < H::width; ++i) s_j = t[v][i] == partial.t_max ? fmaxf(s_j, s[v][i]) : s_j;
        }
        if (team.warps > 1) atomicMax(&shared.s_j, ordered(s_j));
      }
      if (team.warps > 1) {
        __syncthreads();
        s_j = from_ordered(shared.s_j);
      } else {
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2)
          if (distance < team.size) s_j = fmaxf(s_j, __shfl_xor_sync(team.mask, s_j, distance));
      }
      const float t_j = or_zero(partial.t_max);
      if (s_j == -INFINITY) s_j = p.ratio * t_j;  // the loss is infinite: any finite reference will show it
      partial.s_j = s_j;
      partial.x = Difference(p, s_j, t_j, size[0]);
    }

    // sum w, sum w x, sum v of this thread's classes.
    template <bool exact>
    __device__ __forceinline__ void sum(const Parameters& p, const Slice& slice, const H (&t)[kHeld], const Partial& partial,
                                        float (&sums)[3]) {
      sums[0] = sums[1] = sums[2] = 0;
#pragma unroll
      for (int v = 0; v < kHeld; ++v) {
        if (v >= slice.count) break;
        float s1 = 0;
#pragma unroll
        for (int i = 0; i < H::width; ++i) {
          const float sk = s[v][i], tk = t[v][i];
          w[v][i] = weight(tk);
          x[v][i] = partial.x.template of<exact>(sk, tk);
          sums[0] += w[v][i];
          s1 = fmaf(w[v][i], x[v][i], s1);
          sums[2] += student_weight(sk);
        }
        if (!(fabsf(s1) < INFINITY)) {
          s1 = 0;
#pragma unroll
          for (int i = 0; i < H::width; ++i) {
            const float sk = s[v][i], tk = t[v][i];
            const bool infinite = sk == -INFINITY && tk > -INFINITY;
            if (w[v][i] == 0 && sk == sk) x[v][i] = tk == -INFINITY ? kLargestX : fmaxf(fminf(x[v][i], kLargestX), -kLargestX);
            if (infinite) x[v][i] = 0;
            s1 += infinite ? -INFINITY : w[v][i] * x[v][i];
          }
        }
        sums[1] += s1;
      }
    }

    // The stable form's sum over kUnit; and w expm1(x - m) over kUnit in the place of x.
    __device__ __forceinline__ float add_excess(const Parameters& p, const Slice& slice, float mean, float exp_of_reference) {
      constexpr float per_unit = 1 / kUnit;
      const float scale = per_unit * p.inv_tau;
      mean *= per_unit;
      exp_of_reference *= per_unit;  // w exp(x - m) = v times this
      float excess = 0;
#pragma unroll
      for (int v = 0; v < kHeld; ++v) {
        if (v >= slice.count) break;
        float y[H::width];  // (x - m) / kUnit
        uint32_t bits = 0;
#pragma unroll
        for (int i = 0; i < H::width; i += 2) {
          y[i] = fmaf(x[v][i], scale, -mean);
          y[i + 1] = fmaf(x[v][i + 1], scale, -mean);
          bits = either(bits, __float_as_uint(y[i]), __float_as_uint(y[i + 1]));
        }
        if ((bits & kTwoOrMore) == 0) {
#pragma unroll
          for (int i = 0; i < H::width; ++i) {
            const float wy = w[v][i] * y[i], wyy = wy * y[i], series = math::polynomial<UnitPhiSeries>(y[i]);
            excess = fmaf(wyy, series, excess);
            if constexpr (wants_gradient) x[v][i] = fmaf(wyy, series, wy);
          }
        } else {
#pragma unroll
          for (int i = 0; i < H::width; ++i) {
            const float wy = w[v][i] == 0 ? 0.f : w[v][i] * y[i], near = wy * y[i] * math::polynomial<UnitPhiSeries>(y[i]);
            const float far = fmaf(student_weight(s[v][i]), exp_of_reference, -per_unit * w[v][i]);
            const bool is_near = fabsf(y[i]) < 2;
            excess += is_near ? near : far - wy;
            if constexpr (wants_gradient) x[v][i] = is_near ? near + wy : far;
          }
        }
      }
      return excess;
    }

    // mix(number of a vector, its gradient): what becomes of that before it is written
    template <class Mix = Nothing>
    __device__ __forceinline__ void write_gradient(const Parameters& p, const RowSpan& span, const Slice& slice, const Row& row,
                                                   const GradientRow& gradient, float factor, Mix mix = {}) const {
      factor *= p.student_scale;
      const float p_factor = factor * row.w_share * w_unit * row.stat[KlStat::inv_s0],
                  q_factor = factor * row.v_share * v_unit * row.stat[KlStat::inv_z];
      const float shift = row.apart + row.kl;
      // q - p = p (exp(x - m - KL) - 1), from expm1(x - mean of the slice)
      const bool stable = row.excess == row.excess && row.kl < float(math::kStableBelow) && fabsf(shift) < 1;
      const float by_h = p_factor * math::exp(-shift) * kUnit, by_w = p_factor * math::expm1_series(-shift);
      Writer<H> write(gradient, span, slice);
#pragma unroll
      for (int v = 0; v < kHeld; ++v) {
        if (v >= slice.count) break;
        float g[H::width];
        if (stable) {
#pragma unroll
          for (int i = 0; i < H::width; ++i) g[i] = fmaf(x[v][i], by_h, w[v][i] * by_w);
        } else {
#pragma unroll
          for (int i = 0; i < H::width; ++i) g[i] = fmaf(student_weight(s[v][i]), q_factor, -(w[v][i] * p_factor));
        }
        mix(v, g);
        write.next(g);
      }
    }

   private:
    static __device__ __forceinline__ float largest_of(const Slice& slice, const H (&logits)[kHeld]) {
      H largest = nothing<H>();
#pragma unroll
      for (int v = 0; v < kHeld; ++v) {
        if (v >= slice.count) break;
        largest = largest.larger(logits[v]);
      }
      return largest_in(largest);
    }
    static __device__ __forceinline__ float largest_in(const H& vector) {
      if constexpr (H::packed) {
        const H pair{
            {H::larger_pair(H::larger_pair(vector.word[0], vector.word[1]), H::larger_pair(vector.word[2], vector.word[3]))}};
        return fmaxf(pair[0], pair[1]);
      } else {
        return fmaxf(fmaxf(vector[0], vector[1]), fmaxf(vector[2], vector[3]));
      }
    }
    static __device__ __forceinline__ float finite_magnitude(const Slice& slice, const H (&logits)[kHeld]) {
      float size = 0;
#pragma unroll
      for (int v = 0; v < kHeld; ++v) {
        if (v >= slice.count) break;
#pragma unroll
        for (int i = 0; i < H::width; ++i) size = finite_larger(size, logits[v][i]);
      }
      return size;
    }
    static __device__ __forceinline__ int ordered(float x) {
      const int bits = __float_as_int(x);
      return bits < 0 ? bits ^ 0x7FFFFFFF : bits;
    }
    static __device__ __forceinline__ float from_ordered(int bits) {
      return __int_as_float(bits < 0 ? bits ^ 0x7FFFFFFF : bits);
    }
  };

  static __device__ __forceinline__ Row row_of(const Parameters& p, const Partial& partial) {
    const Plain plain(p, partial);
    const float inv_s0 = 1 / partial.s0;
    float kl = plain.stable() ? math::log1p(partial.excess * inv_s0) : plain.kl;
    kl = kl < 0 ? 0 : kl;
    Row row{};
    row.stat[KlStat::t_max] = partial.t_max;
    row.stat[KlStat::s_max] = partial.s_max;
    row.stat[KlStat::s_offset] = partial.x.s_offset;
    row.stat[KlStat::t_offset] = partial.x.t_offset;
    row.stat[KlStat::centre] = partial.x.centre;
    row.stat[KlStat::mean] = partial.mean;
    row.stat[KlStat::shift] = plain.stable() ? partial.mean + kl : plain.log_ratio;
    row.stat[KlStat::inv_s0] = inv_s0;
    row.stat[KlStat::inv_z] = 1 / (partial.z == 0 ? kSmallest : partial.z);
    row.kl = kl;
    row.w_share = row.v_share = 1;
    row.excess = partial.excess;
    return row;
  }

  // Slices differ in their references: their sums are brought to those of the slice that holds the row's largest teacher logit.
  struct Merge {
    const Parameters& p;
    Partial to;  // that slice's, but for s_max and, once they are known, mean, s0 and z

    __device__ Merge(const Parameters& p, const Partial& to, float s_max) : p(p), to(to) { this->to.s_max = s_max; }
    __device__ float w_share(const Partial& from) const { return share(from.t_max, to.t_max, p.teacher_log2); }
    __device__ float v_share(const Partial& from) const { return share(from.s_max, to.s_max, p.student_log2); }
    static __device__ float share(float from, float to, float log2) {
      return from == -INFINITY ? 0.f : exp2_approx((from - to) * log2);
    }
    __device__ float mean(const Partial& from) const {
      return (from.s0 == 0 ? 0.f : from.mean) + from.x.from(to.x) * p.inv_tau;
    }
    // sum w phi(x - m) over a slice, in the row's scale
    __device__ float excess(const Partial& from, float exp_of_reference) const {
      const float share = w_share(from), shift = to.mean - mean(from);
      if (from.excess == from.excess && fabsf(shift) < 1)
        return share * fmaf(math::exp(-shift), from.excess, from.s0 * math::phi_series(-shift));
      return v_share(from) * from.z * exp_of_reference - (from.s0 == 0 ? 0.f : share * from.s0 * (1 - shift));
    }
  };

  template <class Read>
  static __device__ __forceinline__ Row merge(const Parameters& p, int slices, Read read, int own, int lane) {
    float t_max = -INFINITY, s_max = -INFINITY;
    int at = slices;
    for (int i = lane; i < slices; i += 32) {
      const Partial from = read(i);
      if (from.t_max > t_max) t_max = from.t_max, at = i;
      s_max = fmaxf(s_max, from.s_max);
    }
    const float top = reduce_warp(t_max, Max());
    at = __reduce_min_sync(0xFFFFFFFFu, t_max == top ? at : slices);
    Merge merge(p, read(at < slices ? at : 0), reduce_warp(s_max, Max()));

    float s0 = 0, s1 = 0, z = 0;
    for (int i = lane; i < slices; i += 32) {
      const Partial from = read(i);
      const float mass = merge.w_share(from) * from.s0;
      s0 += mass;
      s1 += from.s0 == 0 ? 0.f : from.mean == -INFINITY ? -INFINITY : mass == 0 ? 0.f : mass * merge.mean(from);
      z += from.s_max == -INFINITY && from.z == 0 ? 0.f : merge.v_share(from) * from.z;
    }
    Partial& row = merge.to;
    row.s0 = reduce_warp(s0, Sum());
    row.mean = reduce_warp(s1, Sum()) / row.s0;
    row.z = reduce_warp(z, Sum());

    const Plain plain(p, row);
    float excess = 0;
    if (plain.stable()) {
      const float exp_of_reference = math::exp(plain.rest - row.mean);
      for (int i = lane; i < slices; i += 32) excess += merge.excess(read(i), exp_of_reference);
      excess = reduce_warp(excess, Sum());
    }
    row.excess = excess;
    Row result = row_of(p, row);
    if (own >= 0) {
      const Partial from = read(own);
      result.w_share = merge.w_share(from);
      result.v_share = merge.v_share(from);
      result.apart = row.mean - merge.mean(from);
      result.excess = from.excess;
    }
    return result;
  }

  static __device__ __forceinline__ void write_loss(const Parameters& p, const Row& row, float weight, int64_t index) {
    static_cast<float*>(p.args.row_loss)[index] = loss_of(p, row, weight);
  }
  static __device__ __forceinline__ float loss_of(const Parameters& p, const Row& row, float weight) {
    return weight == 0 ? 0.f : row.kl * p.loss_scale * weight;
  }
  static __device__ __forceinline__ void store_stats(const Row& row, float* to) {
#pragma unroll
    for (int i = 0; i < kStats; ++i) to[i] = row.stat[i];
  }

  struct Backward {
    float stat[KlStat::count];
    Exponential<false> weight, student_weight;
    float p_student, q_student, p_teacher;

    __device__ __forceinline__ Backward(const Parameters& p, const Task&, int64_t index, float factor)
        : Backward(p, static_cast<const float*>(p.args.row_stats) + index * KlStat::count, factor) {}
    __device__ __forceinline__ Backward(const Parameters& p, const float* numbers, float factor)
        : weight(p.teacher_log2, numbers[KlStat::t_max]), student_weight(p.student_log2, numbers[KlStat::s_max]) {
      for (int i = 0; i < KlStat::count; ++i) stat[i] = numbers[i];
      p_student = factor * p.student_scale * stat[KlStat::inv_s0];
      q_student = factor * p.student_scale * stat[KlStat::inv_z];
      p_teacher = factor * p.teacher_scale * stat[KlStat::inv_s0];
    }

    template <class H>
    __device__ __forceinline__ void student(const Parameters& p, const H& s, const H& t, int,
                                            float (&gradient)[H::width]) const {
      const Difference difference(p, stat);
      const float shift = stat[KlStat::shift], limit = math::near_limit(stat[KlStat::mean], shift);
      bool near = true;
#pragma unroll
      for (int i = 0; i < H::width; ++i) {
        gradient[i] = fmaf(difference.of<false>(s[i], t[i]), p.inv_tau, -shift);
        near = near && gradient[i] * gradient[i] < limit;
      }
      if (near) {
#pragma unroll
        for (int i = 0; i < H::width; ++i) gradient[i] = weight(t[i]) * p_student * math::expm1_series(gradient[i]);
      } else {
#pragma unroll
        for (int i = 0; i < H::width; ++i) {
          const float z = gradient[i], p_k = weight(t[i]) * p_student;
          gradient[i] = z * z < limit ? p_k * math::expm1_series(z) : fmaf(student_weight(s[i]), q_student, -p_k);
        }
      }
    }
    template <class H>
    __device__ __forceinline__ void teacher(const Parameters& p, const H& s, const H& t, int,
                                            float (&gradient)[H::width]) const {
      const Difference difference(p, stat);
#pragma unroll
      for (int i = 0; i < H::width; ++i) {
        const float x = difference.of<false>(s[i], t[i]), w = weight(t[i]);
        gradient[i] = w == 0 ? 0.f : w * p_teacher * fmaf(-x, p.inv_tau, stat[KlStat::mean]);
      }
    }
  };
};

// ---- float64: one block a row, which is read from memory once for each pass
// ----------------------------------------------------

struct WideShared {
  double largest[kMostWarps][3], s_at[kMostWarps][1], sums[kMostWarps][3], excesses[kMostWarps][1];
};

struct WideKlRow {
  using Shared = WideShared;
  static constexpr int kStats = KlStat::count;

  const KlDivTauArgs& args;
  const void *student, *teacher;
  double ratio, inv_tau, inv_teacher_tau;
  bool equal;
  double stat[KlStat::count] = {};

  __device__ WideKlRow(const KlDivTauArgs& args, int64_t row) : args(args) {
    student = static_cast<const char*>(args.student.data) + args.student.rows.offset(row) * size_of(args.student.dtype);
    teacher = static_cast<const char*>(args.teacher.data) + args.teacher.rows.offset(row) * size_of(args.teacher.dtype);
    ratio = args.tau / args.teacher_tau;
    inv_tau = 1 / args.tau;
    inv_teacher_tau = 1 / args.teacher_tau;
    equal = args.tau == args.teacher_tau;
  }
  __device__ double scale() const { return args.scale; }
  __device__ double s(int64_t k) const { return load_one<double>(student, args.student.dtype, k); }
  __device__ double t(int64_t k) const { return load_one<double>(teacher, args.teacher.dtype, k); }
  __device__ double w(double t) const {
    const double w = ::exp((t - stat[KlStat::t_max]) * inv_teacher_tau);
    return t == -INFINITY || w < 0x1p-1022 ? 0 : w;
  }
  __device__ double v(double s) const { return s == -INFINITY ? 0 : ::exp((s - stat[KlStat::s_max]) * inv_tau); }
  __device__ double x(double s, double t) const {
    const double student = s - stat[KlStat::s_offset], teacher = t - stat[KlStat::t_offset];
    return (equal ? (student - teacher) - stat[KlStat::centre] : ::fma(-ratio, teacher, student)) * inv_tau;
  }

  // The statistics; returns the KL.
  __device__ __forceinline__ double reduce(const Team& team, WideShared& shared) {
    double top[3] = {-INFINITY, -INFINITY, 0};
    for (int64_t k = team.lane; k < args.classes; k += team.size) {
      top[0] = Max()(t(k), top[0]);
      top[1] = Max()(s(k), top[1]);
      top[2] = finite_larger(finite_larger(top[2], s(k)), t(k));
    }
    cuda::reduce<Max>(team, top, shared.largest);
    double s_j[1] = {-INFINITY};
    for (int64_t k = team.lane; k < args.classes; k += team.size)
      if (t(k) == top[0]) s_j[0] = Max()(s(k), s_j[0]);
    cuda::reduce<Max>(team, s_j, shared.s_at);
    const double t_j = top[0] == -INFINITY ? 0 : top[0];
    if (s_j[0] == -INFINITY) s_j[0] = ratio * t_j;
    stat[KlStat::t_max] = t_j;
    stat[KlStat::s_max] = top[1] == -INFINITY ? 0 : top[1];
    const auto origin = math::origin(equal, s_j[0], t_j, equal ? math::row_offset(s_j[0] - t_j, top[2]) : 0);
    stat[KlStat::s_offset] = origin.s_offset;
    stat[KlStat::t_offset] = origin.t_offset;
    stat[KlStat::centre] = origin.centre;

    double sum[3] = {0, 0, 0};
    for (int64_t k = team.lane; k < args.classes; k += team.size) {
      const double sk = s(k), tk = t(k), wk = w(tk);
      sum[0] += wk;
      sum[1] += sk == -INFINITY && tk > -INFINITY ? -INFINITY : wk == 0 ? 0 : wk * x(sk, tk);
      sum[2] += v(sk);
    }
    cuda::reduce<Sum>(team, sum, shared.sums);
    const double inv_s0 = 1 / sum[0], mean = sum[1] * inv_s0, rest = (stat[KlStat::s_max] - s_j[0]) * inv_tau;
    const double z = sum[2] == 0 ? 0x1p-1022 : sum[2], log_ratio = math::log(z * inv_s0) + rest;
    double kl = log_ratio - mean;
    stat[KlStat::mean] = mean;
    stat[KlStat::shift] = log_ratio;
    stat[KlStat::inv_s0] = inv_s0;
    stat[KlStat::inv_z] = 1 / z;
    if (kl < math::kStableBelow) {
      const double exp_of_reference = math::exp(rest - mean);
      double excess[1] = {0};
      for (int64_t k = team.lane; k < args.classes; k += team.size) {
        const double sk = s(k), tk = t(k), wk = w(tk), u = x(sk, tk) - mean;
        const double far = v(sk) * exp_of_reference;
        excess[0] += wk == 0 ? far : u * u < 1 ? wk * math::phi_series(u) : far - wk - wk * u;
      }
      cuda::reduce<Sum>(team, excess, shared.excesses);
      kl = math::log1p(excess[0] * inv_s0);
      kl = kl < 0 ? 0 : kl;
      stat[KlStat::shift] = mean + kl;
    }
    return kl;
  }

  // mix(class, student's logit, gradient): what becomes of a student's gradient
  template <class Mix>
  __device__ __forceinline__ void gradients(const Team& team, const Task& task, int64_t row, double weight, Mix mix,
                                            bool alone = false) const {
    const double factor = args.grad_loss.at(row, 1.0) * args.grad_scale * weight / task.divisor.at(0, task.number) * args.scale;
    const double mean = stat[KlStat::mean], shift = stat[KlStat::shift], limit = math::near_limit(mean, shift);
    const double p_student = factor * inv_tau * stat[KlStat::inv_s0], q_student = factor * inv_tau * stat[KlStat::inv_z];
    const double p_teacher = factor * inv_teacher_tau * stat[KlStat::inv_s0];
    for (int64_t k = team.lane; k < args.classes; k += team.size) {
      const double sk = s(k), tk = t(k), wk = w(tk), xk = x(sk, tk), z = xk - shift;
      if (args.grad_teacher.data)
        store_one(args.grad_teacher.data, args.grad_teacher.dtype, args.grad_teacher.rows.offset(row) + k,
                  wk == 0 || alone ? 0 : wk * p_teacher * (mean - xk));
      if (args.grad_student.data)
        store_one(args.grad_student.data, args.grad_student.dtype, args.grad_student.rows.offset(row) + k,
                  mix(k, sk, z * z < limit ? wk * p_student * math::expm1_series(z) : v(sk) * q_student - wk * p_student));
    }
  }
};

}  // namespace
}  // namespace kdfast::cuda
