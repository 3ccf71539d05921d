// softmax-KL at temperature tau on CUDA. kl_math.h has the formulas and the names.
//
// Forward holds its slice of a row in registers: the student's logits, and for each class w and x, in units of the logits. The
// sums come first; where the KL is small, a second pass over the registers adds up its stable form around the exact mean, and
// leaves w expm1(x - m) in the place of x, from which the gradient follows by one multiply-add. Backward reads the logits
// again.
#include "row_reduce.cuh"

namespace kdfast::cuda {
namespace {

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

constexpr float kLn2 = 0.693147181f;
constexpr float kSmallest = 1.17549435e-38f;
// x of a class at -inf in the teacher, where w is 0: finite, so that w x is 0 without a branch.
constexpr float kLargestX = 1e20f;

struct KlDivTau {
  using Args = KlDivTauArgs;

  struct Parameters {
    KlDivTauArgs args;
    float ratio, inv_tau, student_log2, teacher_log2;  // tau / teacher_tau, 1 / tau, log2(e) / tau, log2(e) / teacher_tau
    float loss_scale, student_scale, teacher_scale;    // scale, scale / tau, scale / teacher_tau

    explicit Parameters(const KlDivTauArgs& args) : args(args) {
      constexpr double log2_e = 1.4426950408889634;
      ratio = float(args.tau / args.teacher_tau);
      inv_tau = float(1 / args.tau);
      student_log2 = float(log2_e / args.tau);
      teacher_log2 = float(log2_e / args.teacher_tau);
      loss_scale = float(args.scale);
      student_scale = float(args.scale / args.tau);
      teacher_scale = float(args.scale / args.teacher_tau);
    }
  };

  // An exponent is one multiply-add: t log2 - reference. It makes all of a row's w too large by one factor, 2^slack; so v.
  struct Exponent {
    float log2, reference, slack;

    __device__ __forceinline__ Exponent(float log2, float top) : log2(log2) {
      top = top == -INFINITY ? 0.f : top;
      reference = top * log2;
      slack = fmaf(top, log2, -reference);
    }
    __device__ __forceinline__ float operator()(float logit) const { return exp2_approx(fmaf(logit, log2, -reference)); }
  };

  struct Partial {
    float t_max, s_max, s_j, offset, centre;
    float s0, mean, z, excess;  // excess: sum w phi(x - mean); NaN: too large for the stable form
  };
  struct Row {
    float stat[KlStat::count];
    // Of this block's slice: its s_max, what brings its w and v to the row's scale, the row's mean less its own, its excess.
    float s_max, w_share, v_share, shift, excess;
  };
  struct Shared {
    int s_j;  // ordered as floats are
    float largest[kMostWarps][3], sums[kMostWarps][3], excess[kMostWarps][1];
  };

  // KL in its plain form; what it is compared with, and what goes into the stable one, must come from here.
  struct Plain {
    float rest, kl;
    __device__ __forceinline__ Plain(const Parameters& p, const Exponent& w, const Exponent& v, float s0, float z, float s_max,
                                     float s_j, float mean) {
      const float top = s_max == -INFINITY ? 0.f : s_max;
      rest = (top - s_j) * p.inv_tau + (w.slack - v.slack) * kLn2;
      kl = math::log((z == 0 ? kSmallest : z) / s0) + rest - mean;
    }
    __device__ __forceinline__ bool stable() const { return kl < float(math::kStableBelow); }
  };

  template <class H, bool wants_gradient>
  struct Held {
    static constexpr int kept = kVectors;
    H s[kept];
    float w[kept][H::width], x[kept][H::width];

    template <class GradientOf, class FactorOf>
    __device__ __forceinline__ Partial reduce(const Parameters& p, const Team& team, const RowSpan& span, const Slice& slice,
                                              const void* student, const void* teacher, GradientOf, FactorOf, Shared& shared) {
      if (team.warps > 1 && threadIdx.x == 0) shared.s_j = ordered(-INFINITY);
      H t[kept];
#pragma unroll
      for (int v = 0; v < kept; ++v) {
        if (v >= slice.steps) break;
        s[v] = slice.load<H>(student, p.args.student.dtype, span, v);
        t[v] = slice.load<H>(teacher, p.args.teacher.dtype, span, v);
      }
      Partial partial;
      find_reference(p, team, slice, t, partial, shared);
      if (partial.offset == 0)
        sum<false>(p, team, slice, t, partial, shared);
      else
        sum<true>(p, team, slice, t, partial, shared);
      add_excess(p, team, slice, partial, shared);
      return partial;
    }

    // The maxima, and the student's logit where the teacher's is largest (the largest such, where several are).
    __device__ __forceinline__ void find_reference(const Parameters& p, const Team& team, const Slice& slice,
                                                   const H (&t)[kept], Partial& partial, Shared& shared) const {
      float largest[3] = {largest_of(slice, t), largest_of(slice, s), H::packed ? 0.f : finite_magnitude(slice)};
      const float mine = largest[0];
      cuda::reduce<Max>(team, largest, shared.largest);
      partial.t_max = largest[0];
      partial.s_max = largest[1];
      float s_j = -INFINITY;
      if (mine == partial.t_max) {
#pragma unroll
        for (int v = 0; v < kept; ++v) {
          if (v >= slice.steps) break;
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
      if (s_j == -INFINITY) s_j = p.ratio * partial.t_max;  // the loss is infinite: any finite reference will show it
      const float d = s_j - p.ratio * partial.t_max;
      partial.s_j = s_j;
      // Differences of sixteen-bit logits are exact without an offset.
      partial.offset =
          size_of(p.args.student.dtype) == 2 && size_of(p.args.teacher.dtype) == 2 ? 0.f : math::row_offset(d, largest[2]);
      partial.centre = fmaf(-p.ratio, partial.t_max, s_j - partial.offset);
      if (!(fabsf(partial.centre) < INFINITY)) partial.centre = 0;  // a slice or row without a finite teacher logit
    }

    template <bool with_offset>
    __device__ __forceinline__ void sum(const Parameters& p, const Team& team, const Slice& slice, const H (&t)[kept],
                                        Partial& partial, Shared& shared) {
      const Exponent weight(p.teacher_log2, partial.t_max), student_weight(p.student_log2, partial.s_max);
      float sums[3] = {0, 0, 0};
#pragma unroll
      for (int v = 0; v < kept; ++v) {
        if (v >= slice.steps) break;
#pragma unroll
        for (int i = 0; i < H::width; ++i) {
          const float sk = s[v][i], tk = t[v][i];
          w[v][i] = weight(tk);
          x[v][i] = fminf(fmaf(-p.ratio, tk, with_offset ? sk - partial.offset : sk) - partial.centre, kLargestX);
          sums[0] += w[v][i];
          sums[1] = fmaf(w[v][i], x[v][i], sums[1]);
          sums[2] += student_weight(sk);
        }
      }
      if (!(fabsf(sums[1]) <
            INFINITY)) {  // a class at -inf in the student; where the teacher's mass underflows, it is one still
        sums[0] = sums[1] = 0;
#pragma unroll
        for (int v = 0; v < kept; ++v) {
          if (v >= slice.steps) break;
#pragma unroll
          for (int i = 0; i < H::width; ++i) {
            const bool none = x[v][i] == kLargestX && w[v][i] == 0;  // -inf in the teacher
            const float bounded = w[v][i] < kSmallest ? kSmallest : w[v][i];
            sums[0] += none ? 0.f : bounded;
            sums[1] += none ? 0.f : bounded * x[v][i];
          }
        }
      }
      cuda::reduce<Sum>(team, sums, shared.sums);
      partial.s0 = sums[0];
      partial.mean = sums[1] / sums[0] * p.inv_tau;
      partial.z = sums[2];
    }

    // The stable form's sum, and w expm1(x - m) in the place of x.
    __device__ __forceinline__ void add_excess(const Parameters& p, const Team& team, const Slice& slice, Partial& partial,
                                               Shared& shared) {
      const Exponent weight(p.teacher_log2, partial.t_max), student_weight(p.student_log2, partial.s_max);
      const Plain plain(p, weight, student_weight, partial.s0, partial.z, partial.s_max, partial.s_j, partial.mean);
      partial.excess = NAN;
      if (!plain.stable()) return;
      const float exp_of_reference = math::exp(plain.rest - partial.mean);  // w exp(x - m) = v times this
      float excess[1] = {0};
#pragma unroll
      for (int v = 0; v < kept; ++v) {
        if (v >= slice.steps) break;
        float local = 0, largest = 0, h[H::width];
#pragma unroll
        for (int i = 0; i < H::width; ++i) {
          const float u = fmaf(x[v][i], p.inv_tau, -partial.mean);
          const float term = w[v][i] * math::phi_series(u);
          largest = fmaxf(largest, u * u);
          local += term;
          h[i] = fmaf(w[v][i], u, term);
        }
        if (!(largest < 1)) {
          local = 0;
#pragma unroll
          for (int i = 0; i < H::width; ++i) {
            const float u = fmaf(x[v][i], p.inv_tau, -partial.mean);
            const float term = w[v][i] * math::phi_series(u);
            const bool small = u * u < 1;
            const float far = fmaf(student_weight(s[v][i]), exp_of_reference, -w[v][i]);
            local += small ? term : fmaf(-w[v][i], u, far);
            h[i] = small ? fmaf(w[v][i], u, term) : far;
          }
        }
        excess[0] += local;
        if constexpr (wants_gradient)
          for (int i = 0; i < H::width; ++i) x[v][i] = h[i];
      }
      cuda::reduce<Sum>(team, excess, shared.excess);
      partial.excess = excess[0];
    }

    __device__ __forceinline__ void write_gradient(const Parameters& p, const RowSpan& span, const Slice& slice, const Row& row,
                                                   const GradientRow& gradient, float factor) const {
      factor *= p.student_scale;
      const float p_factor = factor * row.w_share * row.stat[KlStat::inv_s0],
                  q_factor = factor * row.v_share * row.stat[KlStat::inv_z];
      const float kl = row.stat[KlStat::kl], shift = row.shift + kl;
      // q - p = p (exp(x - m - KL) - 1), from expm1(x - mean of the slice)
      const bool stable = row.excess == row.excess && kl < float(math::kStableBelow) && fabsf(shift) < 1;
      const float by_h = p_factor * math::exp(-shift), by_w = p_factor * math::expm1_series(-shift);
      const Exponent student_weight(p.student_log2, row.s_max);
#pragma unroll
      for (int v = 0; v < kept; ++v) {
        if (v >= slice.steps) break;
        float g[H::width];
        if (stable) {
#pragma unroll
          for (int i = 0; i < H::width; ++i) g[i] = fmaf(x[v][i], by_h, w[v][i] * by_w);
        } else {
#pragma unroll
          for (int i = 0; i < H::width; ++i) g[i] = fmaf(student_weight(s[v][i]), q_factor, -(w[v][i] * p_factor));
        }
        slice.store<H>(g, gradient, span, v);
      }
    }

   private:
    static __device__ __forceinline__ float largest_of(const Slice& slice, const H (&logits)[kept]) {
      if constexpr (H::packed) {
        uint32_t largest = H::nothing;
#pragma unroll
        for (int v = 0; v < kept; ++v) {
          if (v >= slice.steps) break;
#pragma unroll
          for (int i = 0; i < H::width / 2; ++i) largest = H::larger(largest, logits[v].word[i]);
        }
        const H pair{{largest}};
        return fmaxf(pair[0], pair[1]);
      } else {
        float largest = -INFINITY;
#pragma unroll
        for (int v = 0; v < kept; ++v) {
          if (v >= slice.steps) break;
#pragma unroll
          for (int i = 0; i < H::width; ++i) largest = fmaxf(largest, logits[v][i]);
        }
        return largest;
      }
    }
    __device__ __forceinline__ float finite_magnitude(const Slice& slice) const {
      float size = 0;
#pragma unroll
      for (int v = 0; v < kept; ++v) {
        if (v >= slice.steps) break;
#pragma unroll
        for (int i = 0; i < H::width; ++i) size = finite_larger(size, s[v][i]);
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
    const Exponent weight(p.teacher_log2, partial.t_max), student_weight(p.student_log2, partial.s_max);
    const Plain plain(p, weight, student_weight, partial.s0, partial.z, partial.s_max, partial.s_j, partial.mean);
    const float inv_s0 = 1 / partial.s0;
    const float kl = plain.stable() ? math::log1p(partial.excess * inv_s0) : plain.kl;
    return {{partial.t_max, partial.s_max, partial.offset, partial.centre, partial.mean, kl, inv_s0, 1 / partial.z},
            partial.s_max,
            1,
            1,
            0,
            partial.excess};
  }

  // Slices differ in their references: their sums are brought to those of the slice that holds the row's largest teacher logit.
  struct Merge {
    const Parameters& p;
    Partial to;  // that slice's, but for s_max and, once they are known, mean, s0 and z
    float w_reference, v_reference;

    __device__ Merge(const Parameters& p, const Partial& to, float s_max) : p(p), to(to) {
      this->to.s_max = s_max;
      w_reference = Exponent(p.teacher_log2, to.t_max).reference;
      v_reference = Exponent(p.student_log2, s_max).reference;
    }
    __device__ float w_share(const Partial& from) const {  // no less than the smallest number, as w itself
      const float share = exp2_approx(Exponent(p.teacher_log2, from.t_max).reference - w_reference);
      return from.t_max == -INFINITY ? 0.f : share < kSmallest ? kSmallest : share;
    }
    __device__ float v_share(const Partial& from) const {
      return from.s_max == -INFINITY ? 0.f : exp2_approx(Exponent(p.student_log2, from.s_max).reference - v_reference);
    }
    __device__ float mean(const Partial& from) const {
      return (from.s0 == 0 ? 0.f : from.mean) + ((from.offset - to.offset) + (from.centre - to.centre)) * p.inv_tau;
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
      s1 += from.s0 == 0 ? 0.f : mass * merge.mean(from);
      z += from.s_max == -INFINITY && from.z == 0 ? 0.f : merge.v_share(from) * from.z;
    }
    Partial& row = merge.to;
    row.s0 = reduce_warp(s0, Sum());
    row.mean = reduce_warp(s1, Sum()) / row.s0;
    row.z = reduce_warp(z, Sum());

    const Exponent weight(p.teacher_log2, row.t_max), student_weight(p.student_log2, row.s_max);
    const Plain plain(p, weight, student_weight, row.s0, row.z, row.s_max, row.s_j, row.mean);
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
      result.s_max = from.s_max;
      result.w_share = merge.w_share(from);
      result.v_share = merge.v_share(from);
      result.shift = row.mean - merge.mean(from);
      result.excess = from.excess;
    }
    return result;
  }

  static __device__ __forceinline__ void finish_row(const Parameters& p, const Row& row, float weight, int64_t index) {
    static_cast<float*>(p.args.row_loss)[index] = weight == 0 ? 0.f : row.stat[KlStat::kl] * p.loss_scale * weight;
    if (p.args.row_stats == nullptr) return;
    for (int i = 0; i < KlStat::count; ++i) static_cast<float*>(p.args.row_stats)[index * KlStat::count + i] = row.stat[i];
  }

  struct Backward {
    float stat[KlStat::count];
    Exponent weight, student_weight;
    float p_student, q_student, p_teacher;

    __device__ __forceinline__ Backward(const Parameters& p, int64_t index, float factor)
        : Backward(p, static_cast<const float*>(p.args.row_stats) + index * KlStat::count, factor) {}
    __device__ __forceinline__ Backward(const Parameters& p, const float* numbers, float factor)
        : weight(p.teacher_log2, numbers[KlStat::t_max]), student_weight(p.student_log2, numbers[KlStat::s_max]) {
      for (int i = 0; i < KlStat::count; ++i) stat[i] = numbers[i];
      p_student = factor * p.student_scale * stat[KlStat::inv_s0];
      q_student = factor * p.student_scale * stat[KlStat::inv_z];
      p_teacher = factor * p.teacher_scale * stat[KlStat::inv_s0];
    }

    template <class H>
    __device__ __forceinline__ void vector(const Parameters& p, const H& s, const H& t, float (&for_student)[H::width],
                                           float (&for_teacher)[H::width]) const {
      const float mean = stat[KlStat::mean], shift = mean + stat[KlStat::kl];
      float largest = 0;
#pragma unroll
      for (int i = 0; i < H::width; ++i) {
        const float x = fminf(fmaf(-p.ratio, t[i], s[i] - stat[KlStat::offset]) - stat[KlStat::centre], kLargestX),
                    w = weight(t[i]);
        const float z = fmaf(x, p.inv_tau, -shift);
        for_student[i] = w * p_student * math::expm1_series(z);
        for_teacher[i] = w * p_teacher * fmaf(-x, p.inv_tau, mean);
        largest = fmaxf(largest, z * z);
      }
      if (largest < 1) return;
#pragma unroll
      for (int i = 0; i < H::width; ++i) {
        const float x = fminf(fmaf(-p.ratio, t[i], s[i] - stat[KlStat::offset]) - stat[KlStat::centre], kLargestX);
        const float z = fmaf(x, p.inv_tau, -shift);
        if (!(z * z < 1)) for_student[i] = fmaf(student_weight(s[i]), q_student, -(weight(t[i]) * p_student));
      }
    }
  };
};

// ---- float64: one block a row, which is read from memory once for each pass
// ----------------------------------------------------

struct WideRow {
  const KlDivTauArgs& args;
  const void *student, *teacher;
  double ratio, inv_tau, inv_teacher_tau;
  double stat[KlStat::count];

  __device__ WideRow(const KlDivTauArgs& args, int64_t row) : args(args) {
    student = static_cast<const char*>(args.student.data) + args.student.rows.offset(row) * size_of(args.student.dtype);
    teacher = static_cast<const char*>(args.teacher.data) + args.teacher.rows.offset(row) * size_of(args.teacher.dtype);
    ratio = args.tau / args.teacher_tau;
    inv_tau = 1 / args.tau;
    inv_teacher_tau = 1 / args.teacher_tau;
  }
  __device__ double s(int64_t k) const { return load_one<double>(student, args.student.dtype, k); }
  __device__ double t(int64_t k) const { return load_one<double>(teacher, args.teacher.dtype, k); }
  __device__ double w(double t) const {
    const double w = ::exp((t - stat[KlStat::t_max]) * inv_teacher_tau);
    return t == -INFINITY ? 0 : w < 0x1p-1022 ? 0x1p-1022 : w;
  }
  __device__ double v(double s) const { return s == -INFINITY ? 0 : ::exp((s - stat[KlStat::s_max]) * inv_tau); }
  __device__ double x(double s, double t) const {
    return t == -INFINITY ? 0 : (((s - stat[KlStat::offset]) - ratio * t) - stat[KlStat::centre]) * inv_tau;
  }

  __device__ void gradients(const Team& team, const Task& task, int64_t row, double weight) const {
    const double factor = args.grad_loss.at(row, 1.0) * args.grad_scale * weight / task.divisor.at(0, task.number) * args.scale;
    const double mean = stat[KlStat::mean], shift = mean + stat[KlStat::kl];
    const double p_student = factor * inv_tau * stat[KlStat::inv_s0], q_student = factor * inv_tau * stat[KlStat::inv_z];
    const double p_teacher = factor * inv_teacher_tau * stat[KlStat::inv_s0];
    for (int64_t k = team.lane; k < args.classes; k += team.size) {
      const double sk = s(k), tk = t(k), wk = w(tk), xk = x(sk, tk), z = xk - shift;
      if (args.grad_teacher.data)
        store_one(args.grad_teacher.data, args.grad_teacher.dtype, args.grad_teacher.rows.offset(row) + k,
                  tk == -INFINITY ? 0 : wk * p_teacher * (mean - xk));
      if (args.grad_student.data)
        store_one(args.grad_student.data, args.grad_student.dtype, args.grad_student.rows.offset(row) + k,
                  z * z < 1 ? wk * p_student * math::expm1_series(z) : v(sk) * q_student - wk * p_student);
    }
  }
};

__global__ void __launch_bounds__(256, 1)
    wide_forward_kernel(const __grid_constant__ KlDivTauArgs args, const __grid_constant__ Task task) {
  __shared__ double largest[kMostWarps][3], s_at[kMostWarps][1], sums[kMostWarps][3], excesses[kMostWarps][1];
  const Team team(task.plan);
  const int64_t r = blockIdx.x;
  const double weight = args.weight.at(r, 1.0);
  WideRow row(args, r);
  double* stat = row.stat;
  for (int i = 0; i < KlStat::count; ++i) stat[i] = 0;
  double loss = 0;
  if (weight != 0) {
    double top[3] = {-INFINITY, -INFINITY, 0};
    for (int64_t k = team.lane; k < args.classes; k += team.size) {
      top[0] = Max()(row.t(k), top[0]);
      top[1] = Max()(row.s(k), top[1]);
      top[2] = finite_larger(top[2], row.s(k));
    }
    reduce<Max>(team, top, largest);
    double s_j[1] = {-INFINITY};
    for (int64_t k = team.lane; k < args.classes; k += team.size)
      if (row.t(k) == top[0]) s_j[0] = Max()(row.s(k), s_j[0]);
    reduce<Max>(team, s_j, s_at);
    if (s_j[0] == -INFINITY) s_j[0] = row.ratio * top[0];
    stat[KlStat::t_max] = top[0];
    stat[KlStat::s_max] = top[1] == -INFINITY ? 0 : top[1];
    stat[KlStat::offset] = math::row_offset(s_j[0] - row.ratio * top[0], top[2]);
    stat[KlStat::centre] = (s_j[0] - stat[KlStat::offset]) - row.ratio * top[0];

    double sum[3] = {0, 0, 0};
    for (int64_t k = team.lane; k < args.classes; k += team.size) {
      const double sk = row.s(k), tk = row.t(k), wk = row.w(tk);
      sum[0] += wk;
      sum[1] += wk * row.x(sk, tk);
      sum[2] += row.v(sk);
    }
    reduce<Sum>(team, sum, sums);
    const double inv_s0 = 1 / sum[0], mean = sum[1] * inv_s0, rest = (stat[KlStat::s_max] - s_j[0]) * row.inv_tau;
    stat[KlStat::mean] = mean;
    stat[KlStat::inv_s0] = inv_s0;
    stat[KlStat::inv_z] = 1 / sum[2];
    stat[KlStat::kl] = math::log((sum[2] == 0 ? 0x1p-1022 : sum[2]) * inv_s0) + rest - mean;
    if (stat[KlStat::kl] < math::kStableBelow) {
      const double exp_of_reference = math::exp(rest - mean);
      double excess[1] = {0};
      for (int64_t k = team.lane; k < args.classes; k += team.size) {
        const double sk = row.s(k), tk = row.t(k), wk = row.w(tk), u = row.x(sk, tk) - mean;
        const bool series = tk != -INFINITY && u * u < 1;
        excess[0] += series ? wk * math::phi_series(u) : row.v(sk) * exp_of_reference - wk - wk * u;
      }
      reduce<Sum>(team, excess, excesses);
      stat[KlStat::kl] = math::log1p(excess[0] * inv_s0);
    }
    loss = stat[KlStat::kl] * args.scale * weight;
  }
  if (team.leads()) {
    static_cast<double*>(args.row_loss)[r] = loss;
    if (args.row_stats)
      for (int i = 0; i < KlStat::count; ++i) static_cast<double*>(args.row_stats)[r * KlStat::count + i] = stat[i];
  }
  if (weight != 0 && args.grad_student.data) row.gradients(team, task, r, weight);
  zero_wide(team, args.grad_student, r, weight == 0 ? 0 : args.classes);
  finish<double>(task, args.row_loss, args.rows);
}

__global__ void __launch_bounds__(256, 1)
    wide_backward_kernel(const __grid_constant__ KlDivTauArgs args, const __grid_constant__ Task task) {
  const Team team(task.plan);
  const int64_t r = blockIdx.x;
  const double weight = args.weight.at(r, 1.0);
  if (weight != 0) {
    WideRow row(args, r);
    for (int i = 0; i < KlStat::count; ++i) row.stat[i] = static_cast<const double*>(args.row_stats)[r * KlStat::count + i];
    row.gradients(team, task, r, weight);
  }
  zero_wide(team, args.grad_student, r, weight == 0 ? 0 : args.classes);
  zero_wide(team, args.grad_teacher, r, weight == 0 ? 0 : args.classes);
}

}  // namespace

size_t workspace_bytes(const KlDivTauArgs& args) { return workspace_bytes<KlDivTau>(args, KlStat::count); }

void kl_div_tau_forward(const KlDivTauArgs& args, const Call& call) {
  run_forward<KlDivTau>(args, call, KlStat::count, "kl_div_tau", wide_forward_kernel);
}
void kl_div_tau_backward(const KlDivTauArgs& args, const Call& call) {
  run_backward<KlDivTau>(args, call, KlStat::count, "kl_div_tau", wide_backward_kernel);
}

}  // namespace kdfast::cuda
