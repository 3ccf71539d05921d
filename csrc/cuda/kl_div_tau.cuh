// softmax-KL at temperature tau on CUDA. kl_math.h has the formulas and the names.
//
// Forward holds its slice of a row in registers. Where student and teacher are not near each other it adds up the plain form in
// one pass (see PlainPartial), which for most rows is good enough. Else, where a gradient is wanted, the sums of w and w x come
// first, and leave both; a second pass over the registers adds up the stable form around the exact mean, and leaves w expm1(x -
// m) in the place of x, from which the gradient follows by two multiplications and an addition. Without a gradient, both logits
// are held, twice as many, and all sums come in one pass around class j wherever that is good enough. Backward reads the logits
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
// 2^n of a whole number from -126 to 127; anything for another. (ex2 need not be exact there.)
__device__ __forceinline__ float exp2_of_whole(float n) { return __int_as_float((int(n) + 127) << 23); }
// The bitwise or of them all, three at a time.
template <int n>
__device__ __forceinline__ uint32_t either_of_all(const uint32_t (&bits)[n]) {
  uint32_t all = bits[0];
#pragma unroll
  for (int i = 1; i < n; i += 2) {
    const uint32_t next = i + 1 < n ? bits[i + 1] : 0;
    asm("lop3.b32 %0, %0, %1, %2, 0xFE;" : "+r"(all) : "r"(bits[i]), "r"(next));
  }
  return all;
}

// Sets what is not used, here and not before: where numbers are set on some paths alone, their registers are theirs from the
// kernel's beginning, or from where they were set before.
__device__ __forceinline__ void set_late(float& x) { asm volatile("mov.f32 %0, 0f00000000;" : "=f"(x)); }
template <class H>
__device__ __forceinline__ void set_late(H& x) {
  if constexpr (H::packed) {
#pragma unroll
    for (uint32_t& word : x.word) asm volatile("mov.b32 %0, 0;" : "=r"(word));
  } else {
#pragma unroll
    for (float& number : x.number) set_late(number);
  }
}
template <int n>
__device__ __forceinline__ void set_late(float (&x)[n], float (&y)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) set_late(x[i]), set_late(y[i]);
}

constexpr float kLog2E = 1.44269504f, kSmallest = 1.17549435e-38f;

// phi(u), u = kUnit y, is kUnit y^2 times the polynomial `of` y, for |y| < 2: in units in which one bit of y tells whether it
// holds.
struct ScaledPhiSeries {  // 4.6e-7 relative
  static constexpr float kUnit = 0.625f;
  static constexpr float of[] = {0.31250003f,    0.065104604f,   0.010172385f,     0.0012706724f,
                                 0.00013251218f, 0.00001227829f, 0.00000093314992f};
};
struct WideScaledPhiSeries {  // 1.3e-7 relative
  static constexpr float kUnit = 0.75f;
  static constexpr float of[] = {0.37499997f,    0.093750052f,    0.017578445f,     0.0026366352f,
                                 0.00032917823f, 0.000035338449f, 0.0000034775408f, 0.0000002795708f};
};
constexpr uint32_t kTwoOrMore = 0x40000000u;  // set where |y| >= 2, and in infinity and NaN
// From here on the KL, which is at least this less log S0, is as good in its plain form, and the stable one might overflow.
constexpr float kPlainFrom = 20;
// From here on x, in units of tau, has lost too much of the student's logit for the stable one: a slice that the teacher all
// but masks, by a large finite number, may still have much of the student's mass.
constexpr float kMostCentre = 65536;
// A row may be peaked where its shift is below this times the mean. Most such rows are ordinary ones, whose shift is near 0 by
// chance: all their classes' x are above -kFar, and the gradient is no smaller, beside the mean, than 1 / kFar.
constexpr double kPeaked = 1. / 8;
constexpr float kFar = 8;
constexpr double kMostRest = 64;  // e^rest is far from infinity
// A row may be plain where the x of two neighbouring classes differ by more than this in more than one of three threads. (Where
// x is normally distributed, its variance is .03 then, and the KL half of that at least.)
constexpr float kApart = 0.22f;
constexpr unsigned kOfThreads = 3;
// The least size of a plain row's gradient, beside its teacher's probabilities; and where it is rounded to sixteen bits.
constexpr float kLeastGradient = 0.2f, kLeastPackedGradient = 0.05f;
constexpr float kMostApart = 100;     // of its w_log2 and v_log2: their ratio, a power of two, is far from infinity
constexpr float kMostLog2 = 1 << 20;  // of both: their rounding makes no power larger than 1.1, nor its square

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
  __device__ __forceinline__ float log2_unit(float top) const { return packed ? -fmaf(or_zero(top), log2, -reference) : 0.f; }
  __device__ __forceinline__ float unit(float top) const { return packed ? exp2_approx(log2_unit(top)) : 1.f; }
  __device__ __forceinline__ float operator()(float logit) const {
    return exp2_approx(packed ? fmaf(logit, log2, -reference) : (logit - reference) * log2);
  }
};

extern __shared__ uint4 of_threads[];

struct KlDivTau {
  using Args = KlDivTauArgs;
  static constexpr int kHeld = 4, kHeldFloat = 5, kHeldForward = 8, kShared = (2 * kHeld + 1) * sizeof(uint4), kBlocks = 1,
                       kStats = KlStat::count;
  static constexpr bool kForTeacher = true;

  struct Parameters {
    KlDivTauArgs args;
    float ratio, inv_tau, student_log2, teacher_log2;  // tau / teacher_tau, 1 / tau, log2(e) / tau, log2(e) / teacher_tau
    float loss_scale, student_scale, teacher_scale;    // scale, scale / tau, scale / teacher_tau
    bool equal, exact;                                 // temperatures; and differences, those of sixteen-bit logits
    // Whether rows may be plain, whose statistics a backward could not use; and ln(2) student_log2: 1 / tau as their
    // exponentials have it, to the last bit.
    bool may_be_plain;
    float plain_inv_tau;

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
      may_be_plain = equal && args.row_stats == nullptr;
      plain_inv_tau = float(0.693147180559945309 * student_log2);
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
      if (p.exact) {  // what `origin` gives for no offset, without its selections
        s_offset = t_offset = 0;
        centre = s_j - t_j;
        return;
      }
      const auto origin = math::origin(p.equal, s_j, t_j, p.equal ? math::row_offset(s_j - t_j, size) : 0.f);
      s_offset = origin.s_offset;
      t_offset = origin.t_offset;
      centre = origin.centre;
    }
    __device__ __forceinline__ explicit Difference(const Parameters& p, const float* stat)
        : ratio(p.ratio), s_offset(stat[KlStat::s_offset]), t_offset(stat[KlStat::t_offset]), centre(stat[KlStat::centre]) {}

    // exact: differences of the logits, and equal temperatures.
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

  struct References {
    float t_max, s_max, s_j;  // s_j: the student's logit where w is 1 and x is 0
    Difference x;
  };
  struct Partial : References {
    // mean: -inf where the loss is infinite; excess: sum w phi(x - mean), NaN where that is large
    float s0, mean, z, excess;
    float least;  // Shared::least of the block, of slices that a kernel of their own merges
  };
  // The sums of the plain form, KL = log(Z / S0) - m (see kl_math.h), of which none needs a class j; only the first two, whose
  // ratio's logarithm is taken, need more than float32. The exponentials are relative to
  // powers of two, so that slices' sums differ by powers of two.
  struct PlainPartial {
    float s0, s0_low, z, z_low;  // sum w, sum v: two numbers each
    float wd;                    // sum w (s - t)
    float ww, wv, vv;            // for the gradient: sums of the products, which tell sum (q - p)^2
    float w_log2, v_log2;        // w = 2^(t student_log2 - w_log2), v likewise
    float w_max;                 // the largest w
  };
  struct Row {
    float stat[KlStat::count];
    float kl, s_j;
    bool is_plain;
    float least;  // x, of slices that a kernel of their own merges
    // Of this block's slice: what brings its w and v to the row's scale, the row's mean less its own.
    float w_share, v_share, apart;
  };
  struct Shared {
    References references[kMostTeams];  // first, where an address needs no addition
    uint32_t largest_pair[kMostWarps][1];
    float apart;  // the bits of a number of threads, for the others of a cluster
    unsigned fixed[kMostWarps][7], fixed_forward[kMostWarps][4];
    float s_j[kMostWarps][1], largest[kMostWarps][2], size[kMostWarps][1], plain[kMostWarps][1], all_sums[kMostWarps][3],
        sums[kMostWarps][2], excess[kMostWarps][1];
    float growth[kMostWarps][1];
    float least[kMostThreads];  // without a gradient: a thread's least x less the mean, 0 where all are near
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

  template <class H, bool wants_gradient, bool for_teacher>
  struct Held {
    static constexpr int kKept = !wants_gradient ? 0 : H::packed ? kHeld : kHeldFloat;
    static constexpr int kVectors = wants_gradient ? kKept : kHeldForward;

    H s[kVectors];
    Exponential<H::packed> weight;
    const References* kept;  // in shared memory: the gradient has use for every register
    // This thread's logits of the student too, where they are packed: after the first sums few rows ask for them. And those of
    // the teacher, in sum_plain.
    static constexpr bool kShares = wants_gradient && H::packed;
    unsigned shared_student;
    // For the gradient: w, in units of w_unit; and h, which is x first and then w (exp(x - mean) - 1) / ScaledPhiSeries::kUnit,
    // if that `is_stable`. v, in the slice's units, is v_rest times w exp(x - mean) then, and v_rest times what student_weight
    // gives otherwise. For both gradients h stays x.
    float w[kKept + 1][H::width], h[kKept + 1][H::width];
    struct End {
      float w_unit, v_rest;
      bool is_stable;
    };
    End held_end;  // beside the logits in shared memory, where these are there
    // Between `read` and what follows: the teacher's logits, and what is known of the row.
    H t[kVectors];
    float t_max, s_max;
    bool looks_plain;

    __device__ __forceinline__ End end() const {
      if constexpr (!kShares) return held_end;
      const uint4 words = of_threads[shared_student + 2 * kVectors];
      return {__uint_as_float(words.x), __uint_as_float(words.y), words.z != 0};
    }
    __device__ __forceinline__ void set_end(const End& end) {
      if constexpr (kShares)
        of_threads[shared_student + 2 * kVectors] = {__float_as_uint(end.w_unit), __float_as_uint(end.v_rest), end.is_stable,
                                                     0};
      else
        held_end = end;
    }

    // beside(largest logit of the student): called where no more than the logits is held
    template <class Beside = Nothing>
    __device__ __forceinline__ void read(const Parameters& p, const Plan& plan, const Team& team, const RowSpan& span,
                                         const Slice& slice, const void* student, const void* teacher, Shared& shared,
                                         Beside beside = {}) {
      read(p, span, slice, student, teacher);
      if constexpr (kShares)
        shared_student = threadIdx.x * unsigned(kShared / sizeof(uint4));  // an odd number, for the banks' sake
      looks_plain = !for_teacher && p.may_be_plain && plan.decides;
      unsigned apart = 0, threads = team.size;
      if (looks_plain) {
        apart = count_apart(p, team, slice);
        if (plan.cluster) {
          if (threadIdx.x == 0) shared.apart = __uint_as_float(apart);
          cluster_arrive();
        }
      }
      find_maxima(team, slice, shared);
      if (looks_plain) {
        if (plan.cluster) {
          cluster_wait();
          const int lane = threadIdx.x % 32;
          const float of_block = lane < plan.slices ? read_cluster(&shared.apart, lane) : 0.f;
          apart = __reduce_add_sync(0xFFFFFFFFu, __float_as_uint(of_block));
          threads *= plan.slices;
        }
        looks_plain = apart * kOfThreads > threads;
      }
      if constexpr (kShares) asm volatile("" : "+r"(shared_student));  // not from the registers that they were stored from
      beside(s_max);
    }
    __device__ __forceinline__ bool is_plain() const { return looks_plain; }
    // The threads that have two such classes, neighbours in their first vector.
    __device__ __forceinline__ unsigned count_apart(const Parameters& p, const Team& team, const Slice& slice) const {
      const bool apart = slice.count > 0 && fabsf((s[0][0] - t[0][0]) - (s[0][1] - t[0][1])) * p.inv_tau > kApart;
      return team.warps > 1 ? __syncthreads_count(apart) : __popc(__ballot_sync(0xFFFFFFFFu, apart));
    }
    // After sum_plain: the logits again, where their registers were wanted for the powers.
    __device__ __forceinline__ void read_again(const Slice& slice) {
      if constexpr (kShares) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          set_late(s[v]), set_late(t[v]);
          if (v < slice.count) s[v] = student(v), t[v] = shared_vector(shared_student + kVectors + v);
        }
      }
    }
    __device__ __forceinline__ void read(const Parameters& p, const RowSpan& span, const Slice& slice, const void* student,
                                         const void* teacher) {
      Reader<H> read_student(student, p.args.student.dtype, span, slice, nothing<H>()),
          read_teacher(teacher, p.args.teacher.dtype, span, slice, nothing<H>());
      next_of_both(read_student, s, read_teacher, t, slice.count);
    }

    template <class GradientOf, class FactorOf>
    __device__ __forceinline__ Partial reduce(const Parameters& p, const Team& team, const RowSpan& span, const Slice& slice,
                                              const void* student, const void* teacher, GradientOf, FactorOf, Shared& shared) {
      Partial partial;
      partial.least = 0;  // which only set_least changes
      partial.t_max = t_max;
      partial.s_max = s_max;
      partial.s_j = find_s_j(team, slice, shared);
      weight = Exponential<H::packed>(p.teacher_log2, partial.t_max);
      float size[1] = {0};
      if constexpr (!H::packed) {
        size[0] = finite_magnitude(p, slice);
        cuda::reduce<Max>(team, size, shared.size);
      }
      if (partial.s_j == -INFINITY)
        partial.s_j = p.ratio * or_zero(partial.t_max);  // any finite one will show the infinite loss
      partial.x = Difference(p, partial.s_j, or_zero(partial.t_max), size[0]);
      References& references = shared.references[team.slot()];
      kept = &references;
      if (wants_gradient && team.leads()) references = partial;
      if constexpr (!wants_gradient)
        if ((H::packed ? p.exact : p.equal) && sum_at_once(p, team, slice, partial, shared)) return partial;
      sum_around_mean(p, team, slice, partial, shared);
      return partial;
    }

    // The student's logits, after the first sums.
    __device__ __forceinline__ H student(int v) const {
      if constexpr (kShares)
        return shared_vector(shared_student + v);
      else
        return still_packed(s[v]);
    }
    static __device__ __forceinline__ H shared_vector(unsigned at) {
      const uint4 words = of_threads[at];
      return H{{words.x, words.y, words.z, words.w}};
    }
    static __device__ __forceinline__ void share(const H& vector, unsigned at) {
      of_threads[at] = {vector.word[0], vector.word[1], vector.word[2], vector.word[3]};
    }

    __device__ __forceinline__ void find_maxima(const Team& team, const Slice& slice, Shared& shared) {
      H s_top = nothing<H>();
      typename H::Pair t_top = H::pair(nothing<H>());
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (v >= slice.count) break;
        if constexpr (kShares) share(s[v], shared_student + v);
        s_top = v == 0 ? s[v] : s_top.larger(s[v]);
        t_top = v == 0 ? H::pair(t[v]) : H::larger_pair(t_top, H::pair(t[v]));
      }
      if constexpr (H::packed) {  // the two side by side
        const uint32_t of_s = H::pair(s_top);
        uint32_t largest[1] = {H::larger_pair(__byte_perm(t_top, of_s, 0x5410), __byte_perm(t_top, of_s, 0x7632))};
        cuda::reduce<typename H::LargerPair>(team, largest, shared.largest_pair);
        const H both{{largest[0]}};
        t_max = both[0];
        s_max = both[1];
      } else {
        float largest[2] = {t_top, H::pair(s_top)};
        cuda::reduce<Max>(team, largest, shared.largest);
        t_max = largest[0];
        s_max = largest[1];
      }
    }
    // The student's logit where the teacher's is largest (the largest such, where several are).
    __device__ __forceinline__ float find_s_j(const Team& team, const Slice& slice, Shared& shared) const {
      float s_j[1] = {-INFINITY};
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (v >= slice.count) break;
        if (!(H::larger_of(H::pair(t[v])) == t_max)) continue;
#pragma unroll
        for (int i = 0; i < H::width; ++i) s_j[0] = t[v][i] == t_max ? fmaxf(s_j[0], s[v][i]) : s_j[0];
      }
      cuda::reduce<Max>(team, s_j, shared.s_j);
      return s_j[0];
    }

    // w and v, for the gradient. Not in the place of w and h, which would then be held where the row is not plain, too.
    struct Powers {
      float w[kKept + 1][H::width], v[kKept + 1][H::width];
      __device__ Powers() {}
    };
    __device__ __forceinline__ Powers powers() const { return Powers(); }
    // The sums of the plain form.
    __device__ __forceinline__ PlainPartial sum_plain(const Parameters& p, const Team& team, const Slice& slice, Shared& shared,
                                                      Powers& powers) const {
      constexpr float kMostFinite = 3.40282347e38f;
      const float log2 = p.student_log2, w_log2 = ceilf(or_zero(t_max) * log2), v_log2 = ceilf(or_zero(s_max) * log2);
      float sum_w = 0, sum_v = 0, wd[1] = {0}, ww = 0, wv = 0, vv = 0;
#pragma unroll
      for (int n = 0; n < kVectors; ++n) {
        if (n >= slice.count) {
          if constexpr (!wants_gradient) {
            break;
          } else {
            set_late(powers.w[n], powers.v[n]);
            continue;
          }
        }
        if constexpr (kShares) share(t[n], shared_student + kVectors + n);
        const H student = still_packed(s[n]), teacher = still_packed(t[n]);
        float w[H::width], v[H::width];
#pragma unroll
        for (int i = 0; i < H::width; ++i) {
          w[i] = exp2_approx(fmaf(teacher[i], log2, -w_log2));
          v[i] = exp2_approx(fmaf(student[i], log2, -v_log2));
          // Where both are -inf, w is 0. (It is infinite, or no number, where the student alone is at -inf.)
          wd[0] = fmaf(w[i], fminf(student[i] - teacher[i], kMostFinite), wd[0]);
          if constexpr (wants_gradient) {
            ww = fmaf(w[i], w[i], ww);
            wv = fmaf(w[i], v[i], wv);
            vv = fmaf(v[i], v[i], vv);
            powers.w[n][i] = w[i];
            powers.v[n][i] = v[i];
          }
        }
        sum_w = n == 0 ? sum_by_halves(w) : sum_w + sum_by_halves(w);
        sum_v = n == 0 ? sum_by_halves(v) : sum_v + sum_by_halves(v);
      }
      // Not so where logits are no numbers, or too large for the exponents.
      if (!(sum_w + sum_v < Fixed::kMost)) wd[0] = NAN;
      PlainPartial sums{};
      const Fixed of_w(sum_w), of_v(sum_v);
      const auto sum_all = [&](auto& shared, auto... products) {
        unsigned fixed[] = {of_w.whole, of_w.rest, of_v.whole, of_v.rest, Fixed::whole_of(products)...};
        sum_integers(team, fixed, shared);
        sums.s0 = Fixed(fixed[0], fixed[1]).value(sums.s0_low);
        sums.z = Fixed(fixed[2], fixed[3]).value(sums.z_low);
        if constexpr (wants_gradient) {
          sums.ww = float(fixed[4]) * Fixed::kWhole;
          sums.wv = float(fixed[5]) * Fixed::kWhole;
          sums.vv = float(fixed[6]) * Fixed::kWhole;
        }
      };
      if constexpr (wants_gradient)
        sum_all(shared.fixed, ww, wv, vv);
      else
        sum_all(shared.fixed_forward);
      cuda::reduce<Sum>(team, wd, shared.plain);
      sums.wd = wd[0];
      sums.w_log2 = w_log2;
      sums.v_log2 = v_log2;
      sums.w_max = exp2_approx(fmaf(or_zero(t_max), log2, -w_log2));
      return sums;
    }

    // Everything in one pass, around class j, where nothing is kept for a gradient. Whether that was good enough: it is not for
    // a row whose mean is far off, beside what its classes differ by or beside 1, nor for one with a class that the student
    // alone masks, nor where the student's largest logit is so far from class j that the sum overflows.
    __device__ __forceinline__ bool sum_at_once(const Parameters& p, const Team& team, const Slice& slice, Partial& partial,
                                                Shared& shared) {
      using Series = WideScaledPhiSeries;
      constexpr float unit = Series::kUnit;
      const float scale = in_units<Series>(p.inv_tau), rest_log2 = (partial.s_max - partial.s_j) * p.student_log2;
      const Exponential<H::packed> student_weight(p.student_log2, partial.s_max);
      // y in one multiply-add of a difference that no centre is taken from yet; too large by `off`, the rounding of `centre`.
      const float centre = partial.x.centre * scale, off = fmaf(partial.x.centre, scale, -centre),
                  off_log2 = kLog2E * unit * off;
      Difference difference = partial.x;
      difference.centre = 0;
      const float v_scale = exp2_approx(rest_log2 + off_log2 + log2_of_units(student_weight, partial)) / unit;
      float& least = shared.least[threadIdx.x];
      least = 0;
      const Sums mine =
          add_up<Series, H::packed, true>([&] { return student_weight; }, slice, t, difference, scale, centre, v_scale, &least);
      float sums[3] = {mine.w, mine.wy, mine.excess};
      cuda::reduce<Sum>(team, sums, shared.all_sums);
      const float inv = 1 / sums[0], y = sums[1] * inv, phi_mean = y * y * math::polynomial<Series>(y);
      const float centred = sums[2] * inv - phi_mean;
      const float w_unit = weight.unit(partial.t_max);
      partial.s0 = sums[0] * w_unit;
      partial.mean = unit * (y - off);
      partial.z = fmaf(unit, sums[1] + sums[2], sums[0]) * w_unit * exp2_approx(-rest_log2 - off_log2);
      partial.excess = exp2_approx(-kLog2E * unit * y) * (unit * centred) * partial.s0;
      least = unit * (least - y);
      return rest_log2 < kLog2E * kPlainFrom && fabsf(partial.x.centre) * p.inv_tau < kMostCentre && fabsf(y) < 2 &&
             centred >= phi_mean / 8 && weight.log2 == p.teacher_log2 && student_weight.log2 == p.student_log2;
    }

    // First the sums from which the mean follows; then the excess around that, or, of a row with a large KL, the plain form's
    // Z.
    __device__ __forceinline__ void sum_around_mean(const Parameters& p, const Team& team, const Slice& slice, Partial& partial,
                                                    Shared& shared) {
      constexpr float unit = ScaledPhiSeries::kUnit;
      float sums[2];
      H::packed&& p.exact ? sum<H::packed>(slice, t, partial.x, sums) : sum<false>(slice, t, partial.x, sums);
      cuda::reduce<Sum>(team, sums, shared.sums);
      if constexpr (wants_gradient) {
        if (team.warps == 1) __syncwarp(team.mask);
        static_cast<References&>(partial) = *kept;
      }
      const float w_unit = weight.unit(partial.t_max);
      partial.s0 = sums[0] * w_unit;
      partial.mean = sums[1] / sums[0] * p.inv_tau;
      const float rest = (or_zero(partial.s_max) - partial.s_j) * p.inv_tau - partial.mean, rest_log2 = kLog2E * rest;
      const bool is_stable = rest < kPlainFrom && fabsf(partial.x.centre) * p.inv_tau < kMostCentre;
      float last[1];
      if (is_stable) {
        const Exponential<H::packed> student_weight(p.student_log2, partial.s_max);
        const float v_scale = exp2_approx(rest_log2 + log2_of_units(student_weight, partial)) / unit;
        const auto again = [&] { return wants_gradient ? student_exponential(p) : student_weight; };
        if constexpr (!wants_gradient) shared.least[threadIdx.x] = 0;
        last[0] = add_up<ScaledPhiSeries, false, false>(again, slice, t, partial.x, in_units<ScaledPhiSeries>(p.inv_tau),
                                                        partial.mean / unit, v_scale, &shared.least[threadIdx.x])
                      .excess;
        if constexpr (!wants_gradient) shared.least[threadIdx.x] *= unit;
      } else {
        if constexpr (!wants_gradient) shared.least[threadIdx.x] = -INFINITY;  // not known
        last[0] = sum_student(Exponential<H::packed>(p.student_log2, partial.s_max), slice);
      }
      cuda::reduce<Sum>(team, last, shared.excess);
      if constexpr (wants_gradient) {
        asm volatile("" ::: "memory");  // not from the registers that they were read into before
        static_cast<References&>(partial) = *kept;
      }
      float v_rest;
      if (is_stable) {
        partial.excess = last[0] * (w_unit * unit);
        const float back = exp2_approx(-rest_log2);
        partial.z = (partial.s0 + partial.excess) * back;
        v_rest = back * w_unit;
      } else {
        partial.excess = NAN;
        v_rest = Exponential<H::packed>(p.student_log2, partial.s_max).unit(partial.s_max);
        partial.z = last[0] * v_rest;
      }
      if constexpr (wants_gradient) set_end({w_unit, v_rest, is_stable});
    }
    // In terms of which v is, in a slice that holds its gradient: made again where it is wanted, which is rare.
    __device__ __forceinline__ Exponential<H::packed> student_exponential(const Parameters& p) const {
      return Exponential<H::packed>(p.student_log2, *static_cast<const volatile float*>(&kept->s_max));
    }
    __device__ __forceinline__ float log2_of_units(const Exponential<H::packed>& student_weight, const Partial& partial) const {
      return student_weight.log2_unit(partial.s_max) - weight.log2_unit(partial.t_max);
    }

    // sum w and sum w x of this thread's classes. For the gradient, leaves w and x.
    template <bool exact>
    __device__ __forceinline__ void sum(const Slice& slice, const H (&t)[kVectors], const Difference& x, float (&sums)[2]) {
      sums[0] = sums[1] = 0;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (v >= slice.count) {
          if constexpr (!wants_gradient) {
            break;
          } else {
            set_late(w[v], h[v]);
            continue;
          }
        }
        const H student = still_packed(s[v]), teacher = still_packed(t[v]);
#pragma unroll
        for (int i = 0; i < H::width; ++i) {
          const float xk = x.template of<exact>(student[i], teacher[i]), wk = weight(teacher[i]);
          sums[0] += wk;
          sums[1] = fmaf(wk, xk, sums[1]);
          if constexpr (wants_gradient) w[v][i] = wk, h[v][i] = xk;
        }
      }
      if (fabsf(sums[1]) < INFINITY) return;
      sums[1] = 0;  // masked classes, or no numbers
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (v >= slice.count) break;
#pragma unroll
        for (int i = 0; i < H::width; ++i) {
          const float sk = s[v][i], tk = t[v][i], wk = weight(tk);
          if (sk == -INFINITY && tk > -INFINITY)
            sums[1] += -INFINITY;
          else if (!(wk == 0 && sk == sk))
            sums[1] += wk * x.template of<exact>(sk, tk);
        }
      }
    }
    // sum v
    __device__ __forceinline__ float sum_student(const Exponential<H::packed>& student_weight, const Slice& slice) const {
      float sum = 0;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (v >= slice.count) break;
        const H logits = student(v);
#pragma unroll
        for (int i = 0; i < H::width; ++i) sum += student_weight(logits[i]);
      }
      return sum;
    }

    struct Sums {
      float w = 0, wy = 0, excess = 0;
    };
    // Sums of w, w y and w phi(u) / unit over this thread's classes, where u = unit y, y = x scale - shift, and v times v_scale
    // is w e^u / unit. For the gradient, takes w and x from where `sum` left them, and leaves h; else lowers `least` to the
    // least y of vectors that have one of 2 or more.
    template <class Series, bool exact, bool at_once, class StudentWeight>
    __device__ __forceinline__ Sums add_up(StudentWeight student_weight_of, const Slice& slice, const H (&t)[kVectors],
                                           const Difference& x, float scale, float shift, float v_scale, float* least) {
      Sums sums;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (v >= slice.count) break;
        H logits, teacher;
        if constexpr (!kShares) logits = student(v);
        if constexpr (!wants_gradient) teacher = still_packed(t[v]);
        const auto weight_of = [&](int i) {
          if constexpr (wants_gradient)
            return w[v][i];
          else
            return weight(teacher[i]);
        };
        float y[H::width];
        uint32_t bits[H::width];
#pragma unroll
        for (int i = 0; i < H::width; ++i) {
          if constexpr (wants_gradient)
            y[i] = fmaf(h[v][i], scale, -shift);
          else
            y[i] = fmaf(x.template of<exact>(logits[i], teacher[i]), scale, -shift);
          bits[i] = __float_as_uint(y[i]);
        }
        if ((either_of_all(bits) & kTwoOrMore) == 0) {
#pragma unroll
          for (int i = 0; i < H::width; ++i) {
            const float wk = weight_of(i), wy = wk * y[i], wyy = wy * y[i], series = math::polynomial<Series>(y[i]);
            sums.w += wk;
            sums.wy += wy;
            sums.excess = fmaf(wyy, series, sums.excess);
            if constexpr (wants_gradient && !for_teacher) h[v][i] = fmaf(wyy, series, wy);
          }
        } else {
          const Exponential<H::packed> student_weight = student_weight_of();
          if constexpr (kShares) logits = student(v);
          float least_y = 0;
#pragma unroll
          for (int i = 0; i < H::width; ++i) {
            const float wk = weight_of(i), far = fmaf(student_weight(logits[i]), v_scale, wk * (-1 / Series::kUnit));
            // 0 where w is; but at once, no number where the student alone is at -inf: the loss is infinite.
            const float wy = wk == 0 && !(at_once && y[i] == -INFINITY) ? 0.f : wk * y[i];
            const float near = wy * y[i] * math::polynomial<Series>(y[i]);
            const bool is_near = fabsf(y[i]) < 2;
            sums.w += wk;
            sums.wy += wy;
            sums.excess += is_near ? near : far - wy;
            if constexpr (!wants_gradient) least_y = fminf(least_y, y[i]);
            if constexpr (wants_gradient && !for_teacher) h[v][i] = is_near ? near + wy : far;
          }
          if constexpr (!wants_gradient) *least = fminf(*least, least_y);
        }
      }
      return sums;
    }

    // Whether an x, in the row's terms, is below -kFar among this thread's classes, or that is not known.
    __device__ __forceinline__ bool has_far(const Parameters& p, const Slice& slice, const Shared& shared,
                                            const Row& row) const {
      if constexpr (!wants_gradient) return shared.least[threadIdx.x] < row.apart - row.stat[KlStat::mean] - kFar;
      const float offset = for_teacher ? kept->x.from(Difference(p, row.stat)) * p.inv_tau : 0.f;
      const float least = math::exp(row.apart - row.stat[KlStat::mean] - kFar);  // w e^(x - mean) is below w times this
      bool far = !for_teacher && !end().is_stable;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (v >= slice.count) break;
#pragma unroll
        for (int i = 0; i < H::width; ++i) {
          if constexpr (for_teacher)
            far = far || fmaf(h[v][i], p.inv_tau, offset) < -kFar;
          else
            far = far || fmaf(h[v][i], ScaledPhiSeries::kUnit, w[v][i]) < w[v][i] * least;
        }
      }
      return far;
    }

    // Of a plain row. mix(number of a vector, its gradient): what becomes of that before it is written
    template <class Mix = Nothing>
    __device__ __forceinline__ void write_plain(const Parameters& p, const RowSpan& span, const Slice& slice, const Row& row,
                                                const Powers& powers, const GradientRow& gradient, float factor,
                                                Mix mix = {}) const {
      const float p_factor = factor * p.student_scale * row.w_share * row.stat[KlStat::inv_s0],
                  q_factor = factor * p.student_scale * row.v_share * row.stat[KlStat::inv_z];
      Writer<H> write(gradient, span, slice);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (v >= slice.count) break;
        float g[H::width];
#pragma unroll
        for (int i = 0; i < H::width; ++i) g[i] = fmaf(powers.v[v][i], q_factor, powers.w[v][i] * -p_factor);
        mix(v, g);
        write.next(g);
      }
    }

    // Of another one.
    template <class Mix = Nothing>
    __device__ __forceinline__ void write_gradient(const Parameters& p, const RowSpan& span, const Slice& slice, const Row& row,
                                                   const GradientRow& gradient, float factor, Mix mix = {}) const {
      constexpr float unit = ScaledPhiSeries::kUnit;
      factor *= p.student_scale;
      const End end = this->end();
      const float p_factor = factor * row.w_share * end.w_unit * row.stat[KlStat::inv_s0], shift = row.apart + row.kl;
      const float q_factor = factor * row.v_share * end.v_rest * row.stat[KlStat::inv_z];
      // q - p is p (exp(x - mean - shift) - 1), or q and p themselves; either, of a stable row, a multiple of h and one of w.
      float by_h = unit * q_factor, by_w = q_factor - p_factor;
      if (row.kl < float(math::kStableBelow) && fabsf(shift) < 1) {
        by_h = unit * p_factor * math::exp(-shift);
        by_w = p_factor * math::expm1_series(-shift);
      }
      Writer<H> write(gradient, span, slice);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (v >= slice.count) break;
        float g[H::width];
        if (end.is_stable) {
#pragma unroll
          for (int i = 0; i < H::width; ++i) g[i] = fmaf(h[v][i], by_h, w[v][i] * by_w);
        } else {
          const Exponential<H::packed> student_weight = student_exponential(p);
          const H logits = student(v);
#pragma unroll
          for (int i = 0; i < H::width; ++i) g[i] = fmaf(student_weight(logits[i]), q_factor, -(w[v][i] * p_factor));
        }
        mix(v, g);
        write.next(g);
      }
    }

    // One after the other, and nothing of the one kept for the other: registers are scarce.
    template <class GradientOf, class FactorOf>
    __device__ __forceinline__ void write_gradients(const Parameters& p, const RowSpan& span, const Slice& slice,
                                                    const Row& row, GradientOf gradient_of, FactorOf factor_of) const {
      // (The slice's x is 0 elsewhere than the row's.)
      const float mean = row.stat[KlStat::mean] - kept->x.from(Difference(p, row.stat)) * p.inv_tau;
      {
        const float factor = factor_of() * p.teacher_scale * row.w_share * end().w_unit * row.stat[KlStat::inv_s0];
        const GradientRow gradient = gradient_of(p.args.grad_teacher);
        Writer<H> write(gradient, span, slice);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          if (v >= slice.count) break;
          float g[H::width];
#pragma unroll
          for (int i = 0; i < H::width; ++i) g[i] = w[v][i] == 0 ? 0.f : w[v][i] * factor * fmaf(-h[v][i], p.inv_tau, mean);
          write.next(g);
        }
      }
      asm volatile("" ::: "memory");
      const Exponential<H::packed> student_weight = student_exponential(p);
      const float factor = factor_of() * p.student_scale,
                  p_factor = factor * row.w_share * end().w_unit * row.stat[KlStat::inv_s0],
                  q_factor = factor * row.v_share * student_weight.unit(kept->s_max) * row.stat[KlStat::inv_z];
      const float limit = math::near_limit(row.stat[KlStat::mean], row.stat[KlStat::shift]);
      const GradientRow gradient = gradient_of(p.args.grad_student);
      Writer<H> write(gradient, span, slice);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (v >= slice.count) break;
        float g[H::width];
        bool near = true;
#pragma unroll
        for (int i = 0; i < H::width; ++i) {
          g[i] = fmaf(h[v][i], p.inv_tau, -mean) - row.kl;
          near = near && g[i] * g[i] < limit;
        }
        if (near) {
#pragma unroll
          for (int i = 0; i < H::width; ++i) g[i] = w[v][i] * p_factor * math::expm1_series(g[i]);
        } else {
          const H logits = student(v);
#pragma unroll
          for (int i = 0; i < H::width; ++i) {
            const float z = g[i], p_k = w[v][i] * p_factor;
            g[i] = z * z < limit ? p_k * math::expm1_series(z) : fmaf(student_weight(logits[i]), q_factor, -p_k);
          }
        }
        write.next(g);
      }
    }

   private:
    // (Where it is asked for, not before: few rows do.)
    template <class Series>
    static __device__ __forceinline__ float in_units(float inv_tau) {
      asm volatile("" : "+f"(inv_tau));
      return inv_tau / Series::kUnit;
    }
    // The largest finite one, among the classes that have mass: a large number in the place of -inf does not count.
    __device__ __forceinline__ float finite_magnitude(const Parameters& p, const Slice& slice) const {
      float size = 0;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (v >= slice.count) break;
#pragma unroll
        for (int i = 0; i < H::width; ++i)
          if ((t[v][i] - t_max) * p.teacher_log2 > -126) size = finite_larger(finite_larger(size, s[v][i]), t[v][i]);
      }
      return size;
    }
  };

  static __device__ __forceinline__ Row row_of(const Parameters& p, const Partial& partial) {
    const float inv_s0 = 1 / partial.s0;
    Row row{};  // not plain
    if (partial.excess == partial.excess) {
      const float growth = partial.excess * inv_s0;  // e^KL - 1; below 0 by rounding, where nearly nothing is left
      row.kl = growth < 0 ? 0.f : growth < 0.5f ? math::log1p_series(growth) : math::log1p(growth);
      row.stat[KlStat::shift] = partial.mean + row.kl;
    } else {
      const Plain plain(p, partial);
      row.kl = plain.kl < 0 ? 0 : plain.kl;
      row.stat[KlStat::shift] = plain.log_ratio;
    }
    row.stat[KlStat::t_max] = partial.t_max;
    row.stat[KlStat::s_max] = partial.s_max;
    row.stat[KlStat::s_offset] = partial.x.s_offset;
    row.stat[KlStat::t_offset] = partial.x.t_offset;
    row.stat[KlStat::centre] = partial.x.centre;
    row.stat[KlStat::mean] = partial.mean;
    row.stat[KlStat::inv_s0] = inv_s0;
    row.stat[KlStat::inv_z] = 1 / (partial.z == 0 ? kSmallest : partial.z);
    row.s_j = partial.s_j;
    row.w_share = row.v_share = 1;
    return row;
  }

  // The row is not plain where its loss is not large beside the errors of its terms, or its gradient beside those of the
  // probabilities.
  static __device__ __forceinline__ void row_of_plain(const Parameters& p, const PlainPartial& sums, bool for_gradient,
                                                      Row& row) {
    // Of the loss: errors of a sum of many classes' terms; roundings; and, four times the usual one, of one class's, of which
    // the square root of sum p^2 <= max p is left; its share of the budget.
    constexpr float kBias = 1.5e-8f, kRounding = 6e-8f, kError = 4e-7f, kBudget = 4e-6f;
    const float inv_s0 = 1 / (sums.s0 + sums.s0_low), inv_z = 1 / (sums.z + sums.z_low);
    // log(Z / S0), and what the rounding of the ratio takes from it.
    const float ratio = (sums.z + sums.z_low) * inv_s0;
    const float rest = fmaf(-ratio, sums.s0, sums.z) + fmaf(-ratio, sums.s0_low, sums.z_low);
    const float apart = sums.v_log2 - sums.w_log2;
    const float shift = fmaf(rest, inv_z, math::log(ratio * exp2_of_whole(apart)));
    const float mean = sums.wd * inv_s0 * p.plain_inv_tau, loss = shift - mean;
    // (The roundings of the shift, which is below |mean| + loss, of the mean and of the logits' differences.)
    const float rounding = fmaf(3 * kRounding, fabsf(mean), kBias);
    const float error = fmaf(kError * sqrtf(sums.w_max * inv_s0), 1 + loss, rounding);
    row.kl = loss;
    row.stat[KlStat::inv_s0] = inv_s0;
    row.stat[KlStat::inv_z] = inv_z;
    row.w_share = row.v_share = 1;
    // (Not where it is infinite, as the mean then is, or no number.)
    row.is_plain = loss * kBudget > error && fabsf(apart) < kMostApart;
    if (!for_gradient) return;
    const float of_p = sums.ww * inv_s0 * inv_s0;                                              // sum p^2
    const float of_gradient = fmaf(fmaf(sums.vv, inv_z, -2 * sums.wv * inv_s0), inv_z, of_p);  // sum (q - p)^2
    const bool within_range = fabsf(sums.w_log2) + fabsf(sums.v_log2) < kMostLog2;
    row.is_plain =
        row.is_plain && within_range &&
        of_gradient > of_p * (p.exact ? kLeastPackedGradient * kLeastPackedGradient : kLeastGradient * kLeastGradient);
  }
  static __device__ __forceinline__ bool has_plain(const Row& row) { return row.is_plain; }

  // Classes alike on both sides that have the mass, and one of little mass far off: either form loses the shift's digits, small
  // as it is beside the mean. Where it is 1 or more, the classes that have the mass differ by as much, and nothing is lost.
  static __device__ __forceinline__ bool is_peaked(const Parameters& p, const Row& row) {
    const float least = fminf(1, float(kPeaked) * fabsf(row.stat[KlStat::mean]));
    return fabsf(row.stat[KlStat::shift]) < least && (row.stat[KlStat::s_max] - row.s_j) * p.inv_tau < float(kMostRest);
  }
  // The same of merged slices, with what has_far says of one.
  static __device__ __forceinline__ bool is_peaked_and_far(const Parameters& p, const Row& row) {
    return is_peaked(p, row) && row.least < -kFar;
  }
  static __device__ __forceinline__ void set_least(const Team& team, Partial& partial, Shared& shared) {
    float most[1] = {-shared.least[threadIdx.x]};
    cuda::reduce<Max>(team, most, shared.growth);
    partial.least = -most[0];
  }
  // sum w (e^x - 1) over this thread's part of such a row: classes that are alike add nothing to it.
  template <class H>
  static __device__ __forceinline__ float sum_growth(const Parameters& p, const RowSpan& span, const Slice& slice,
                                                     const RowPointers& at, const Row& row) {
    const Difference difference(p, row.stat);
    const Exponential<false> weight(p.teacher_log2, row.stat[KlStat::t_max]), grown(p.student_log2, row.s_j);  // w, w e^x
    Reader<H> read_student(at.student, p.args.student.dtype, span, slice, nothing<H>()),
        read_teacher(at.teacher, p.args.teacher.dtype, span, slice, nothing<H>());
    float growth = 0;
#pragma unroll 1
    for (int i = 0; i < slice.count; ++i) {
      H s[1], t[1];
      read_student.next(s, 1);
      read_teacher.next(t, 1);
#pragma unroll
      for (int k = 0; k < H::width; ++k) {
        const float x = difference.of<false>(s[0][k], t[0][k]) * p.inv_tau, w = weight(t[0][k]);
        growth += x * x < 1 ? w * math::expm1_series(x) : grown(s[0][k]) - w;
      }
    }
    return growth;
  }
  static __device__ __forceinline__ void set_shift(Row& row, float growth) {
    row.stat[KlStat::shift] = math::log1p(growth * row.stat[KlStat::inv_s0]);
  }
  static __device__ __forceinline__ auto& shared_growth(Shared& shared) { return shared.growth; }

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
      return v_share(from) * from.z * exp_of_reference - (share * from.s0 == 0 ? 0.f : share * from.s0 * (1 - shift));
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
    row.excess = NAN;
    if (plain.stable()) {
      const float exp_of_reference = math::exp(plain.rest - row.mean);
      float excess = 0;
      for (int i = lane; i < slices; i += 32) excess += merge.excess(read(i), exp_of_reference);
      row.excess = reduce_warp(excess, Sum());
    }
    Row result = row_of(p, row);
    if (own < 0) {
      float least = 0;
      for (int i = lane; i < slices; i += 32) {
        const Partial from = read(i);
        least = fmaxf(least, -(from.least + merge.mean(from)));
      }
      result.least = -reduce_warp(least, Max());
    } else {
      const Partial from = read(own);
      result.w_share = merge.w_share(from);
      result.v_share = merge.v_share(from);
      result.apart = row.mean - merge.mean(from);
    }
    return result;
  }

  // The same of plain slices of a cluster. A number at a time: the warp's threads hold their classes' powers meanwhile.
  static __device__ __forceinline__ Row merge(const Parameters& p, int slices, const OfCluster<PlainPartial>& read, int own,
                                              int lane) {
    const auto number = [&](float PlainPartial::* which) { return lane < slices ? read(which, lane) : 0.f; };
    PlainPartial all;
    const auto share_of = [&](float PlainPartial::* sum, float PlainPartial::* log2, float& of_row) {
      const bool has = number(sum) > 0;
      const float mine = number(log2);
      of_row = reduce_warp(has ? mine : -INFINITY, Max());
      return has && mine - of_row > -kMostApart ? exp2_of_whole(mine - of_row) : 0.f;
    };
    const float w_share = share_of(&PlainPartial::s0, &PlainPartial::w_log2, all.w_log2);
    const float v_share = share_of(&PlainPartial::z, &PlainPartial::v_log2, all.v_log2);
    const auto sum = [&](float share, float PlainPartial::* high, float PlainPartial::* low, float& of_row, float& left) {
      const double total = reduce_warp(double(share) * (double(number(high)) + number(low)), Sum());
      of_row = float(total);
      left = float(total - of_row);
    };
    sum(w_share, &PlainPartial::s0, &PlainPartial::s0_low, all.s0, all.s0_low);
    sum(v_share, &PlainPartial::z, &PlainPartial::z_low, all.z, all.z_low);
    all.wd = reduce_warp(w_share * number(&PlainPartial::wd), Sum());
    all.ww = reduce_warp(w_share * w_share * number(&PlainPartial::ww), Sum());
    all.wv = reduce_warp(w_share * v_share * number(&PlainPartial::wv), Sum());
    all.vv = reduce_warp(v_share * v_share * number(&PlainPartial::vv), Sum());
    all.w_max = reduce_warp(w_share * number(&PlainPartial::w_max), Max());
    Row row{};
    row_of_plain(p, all, p.args.grad_student.data != nullptr, row);
    row.w_share = __shfl_sync(0xFFFFFFFFu, w_share, own);
    row.v_share = __shfl_sync(0xFFFFFFFFu, v_share, own);
    return row;
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

    __device__ __forceinline__ Backward(const Parameters& p, const Task& task, int64_t index, float factor)
        : Backward(p, task, static_cast<const float*>(p.args.row_stats) + index * KlStat::count, index, factor) {}
    __device__ __forceinline__ Backward(const Parameters& p, const Task&, const float* numbers, int64_t, float factor)
        : Backward(p, numbers, factor) {}
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

// ---- float64: one block a row, which is read from memory once for each pass -----------------------------------------

struct WideShared {
  double largest[kMostWarps][2], found[kMostWarps][2], sums[kMostWarps][3], excesses[kMostWarps][1], growth[kMostWarps][1];
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
    double top[2] = {-INFINITY, -INFINITY};
    for (int64_t k = team.lane; k < args.classes; k += team.size) {
      top[0] = Max()(t(k), top[0]);
      top[1] = Max()(s(k), top[1]);
    }
    cuda::reduce<Max>(team, top, shared.largest);
    // The student's logit at class j; and the largest finite magnitude among the classes that have mass: a large number in the
    // place of -inf does not count.
    double found[2] = {-INFINITY, 0}, &s_j = found[0], &size = found[1];
    for (int64_t k = team.lane; k < args.classes; k += team.size) {
      if (t(k) == top[0]) s_j = Max()(s(k), s_j);
      if ((t(k) - top[0]) * inv_teacher_tau > -708) size = finite_larger(finite_larger(size, s(k)), t(k));
    }
    cuda::reduce<Max>(team, found, shared.found);
    const double t_j = top[0] == -INFINITY ? 0 : top[0];
    if (s_j == -INFINITY) s_j = ratio * t_j;
    stat[KlStat::t_max] = t_j;
    stat[KlStat::s_max] = top[1] == -INFINITY ? 0 : top[1];
    const auto origin = math::origin(equal, s_j, t_j, equal ? math::row_offset(s_j - t_j, size) : 0);
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
    const double inv_s0 = 1 / sum[0], mean = sum[1] * inv_s0, rest = (stat[KlStat::s_max] - s_j) * inv_tau;
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
    const double shift = ::fabs(stat[KlStat::shift]);
    if (shift < 1 && shift < kPeaked * ::fabs(mean) && rest < kMostRest) {  // see KlDivTau::is_peaked
      const double exp_rest = math::exp(rest);
      double growth[1] = {0};
      for (int64_t k = team.lane; k < args.classes; k += team.size) {
        const double sk = s(k), tk = t(k), wk = w(tk), xk = x(sk, tk);
        growth[0] += xk * xk < 1 ? wk * math::expm1_series(xk) : v(sk) * exp_rest - wk;
      }
      cuda::reduce<Sum>(team, growth, shared.growth);
      stat[KlStat::shift] = math::log1p(growth[0] * inv_s0);
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
