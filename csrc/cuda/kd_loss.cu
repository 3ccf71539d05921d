// Cross-entropy with the target and a soft part on CUDA: the rows of kl_div_tau.cuh and logit_difference.cuh, with a hard part
// that takes the student's logits from the registers that hold them for the soft part.
#include "kl_div_tau.cuh"
#include "logit_difference.cuh"

namespace kdfast::cuda {
namespace {

KlDivTauArgs soft_args(const KdLossArgs& args, KlDivTauArgs) { return args; }
LogitMseArgs soft_args(const KdLossArgs& args, LogitMseArgs) {
  LogitMseArgs soft;
  static_cast<LossArgs&>(soft) = args;
  soft.center = args.center;
  soft.per_class = args.per_class;
  return soft;
}

// The class of a row's target; -1 where it has none: the row is ignored, or its target is no class, which makes it NaN.
struct Target {
  int index;
  bool ignored;

  __device__ __forceinline__ Target(const KdLossArgs& args, int64_t row) {
    const int64_t target = args.target.at(row, int64_t(0));
    ignored = target == args.ignore_index;
    index = !ignored && uint64_t(target) < uint64_t(args.classes) ? int(target) : -1;
  }
  Target() = default;
  __device__ __forceinline__ bool is_class() const { return index >= 0; }
};

// Of a row, in terms of its largest logit s_max: `others` is the sum of the exponentials but the target's, below_max the sum
// of s_max - s; `ignored` is not 0 where the row is.
template <class F>
struct HardSums {
  F s_max, others, at_target, s_target, below_max, count, ignored;
};
template <class F>
struct HardRow {
  F stat[HardStat::count];
  F loss;

  HardRow() = default;
  __device__ __forceinline__ HardRow(const HardSums<F>& sums, F smoothing, F classes) {
    const F z = sums.others + sums.at_target, gap = sums.s_max - sums.s_target;
    // Where the target has the largest logit, log z is small and its terms are not: 1 + others.
    const F log_z = gap == 0 ? math::log1p(sums.others) : math::log(z);
    loss = log_z + gap;
    if (smoothing != 0) loss = (1 - smoothing) * loss + smoothing * (log_z + sums.below_max / classes);
    stat[HardStat::s_max] = sums.s_max;
    stat[HardStat::inv_z] = 1 / z;
    stat[HardStat::slope] = -sums.others / z;
    if (sums.ignored != 0) loss = stat[HardStat::inv_z] = stat[HardStat::slope] = 0;
  }
};

// The gradient is exponential * factor - elsewhere, but at the target.
template <class F>
struct HardGradient {
  F factor, elsewhere, at_target;

  HardGradient() = default;
  __device__ __forceinline__ HardGradient(const F* stat, F by, F smoothing, F classes) {
    factor = stat[HardStat::inv_z] * by;
    elsewhere = smoothing / classes * by;
    at_target = (stat[HardStat::slope] + smoothing - smoothing / classes) * by;
  }
};

template <class F>
__device__ __forceinline__ F hard_factor(const KdLossArgs& args, const Task& task, int64_t row, F weight) {
  return args.grad_loss.at(row, F(1)) * F(args.hard_grad_scale) * weight / task.hard_divisor.at(0, F(task.hard_number));
}

template <class F>
__device__ __forceinline__ void store_losses(const KdLossArgs& args, int64_t row, F hard, F soft) {
  static_cast<F*>(args.row_hard)[row] = hard;
  static_cast<F*>(args.row_soft)[row] = soft;
  if (args.row_loss != nullptr) static_cast<F*>(args.row_loss)[row] = mixed(args.alpha, hard, soft);
}

// A soft loss that holds its rows, with the hard part beside it.
template <class Soft>
struct KdLoss {
  using Args = KdLossArgs;
  static constexpr int kHeld = Soft::kHeld, kHeldFloat = Soft::kHeldFloat, kHeldForward = Soft::kHeldForward,
                       kShared = Soft::kShared, kBlocks = Soft::kBlocks;
  static constexpr bool kForTeacher = false;
  static constexpr int kSoftStats = Soft::kStats, kStats = kSoftStats + HardStat::count;

  struct Parameters {
    KdLossArgs args;
    typename Soft::Parameters soft;
    float smoothing, classes;
    bool alone;   // the hard part is: the soft one has no gradient
    bool writes;  // the hard part has a gradient

    explicit Parameters(const KdLossArgs& args)
        : args(args),
          soft(soft_args(args, typename Soft::Args())),
          smoothing(float(args.label_smoothing)),
          classes(float(args.classes)),
          alone(args.alpha == 0),
          writes(args.alpha != 1) {}
  };
  template <class SoftPartial>
  struct WithHard {
    SoftPartial soft;
    HardSums<float> hard;
  };
  using Partial = WithHard<typename Soft::Partial>;
  struct Row {
    typename Soft::Row soft;
    HardRow<float> hard;
  };
  struct Shared {
    typename Soft::Shared soft;
    HardSums<float> kept[kMostTeams];
    float largest[kMostWarps][1], sums[kMostWarps][3], smoothed[kMostWarps][2];
  };

  // Mixes the gradient of a vector whose class 0 would be at `first`.
  template <class H, class Exponential>
  static __device__ __forceinline__ void add_hard(const Parameters& p, const Exponential& exponential,
                                                  const HardGradient<float>& hard, const Target& target, const H& s, int first,
                                                  float (&gradient)[H::width]) {
    const bool writes = p.writes && !target.ignored;
    if (p.alone) {
#pragma unroll
      for (int i = 0; i < H::width; ++i) gradient[i] = 0;
    }
    if (!writes) return;
    const int at = target.index - first;
    if (unsigned(at) < unsigned(H::width)) {
#pragma unroll
      for (int i = 0; i < H::width; ++i)
        gradient[i] += i == at ? hard.at_target : fmaf(exponential(s[i]), hard.factor, -hard.elsewhere);
    } else {
#pragma unroll
      for (int i = 0; i < H::width; ++i) gradient[i] += fmaf(exponential(s[i]), hard.factor, -hard.elsewhere);
    }
  }

  template <class H, bool wants_gradient, bool for_teacher>
  struct Held {
    typename Soft::template Held<H, wants_gradient, for_teacher> soft;
    const Task* task;  // what the hard part needs of it and of the row is read again rather than kept: registers are scarce

    __device__ __forceinline__ void begin_row(const Task& task) { this->task = &task; }

    static constexpr bool kReads = requires(const decltype(soft)& soft) { soft.is_plain(); };

    __device__ __forceinline__ void read(const Parameters& p, const Plan& plan, const Team& team, const RowSpan& span,
                                         const Slice& slice, const void* student, const void* teacher, Shared& shared) {
      soft.read(p.soft, plan, team, span, slice, student, teacher, shared.soft, beside(p, team, span, slice, shared));
    }
    __device__ __forceinline__ void read_again(const Slice& slice) { soft.read_again(slice); }
    __device__ __forceinline__ bool is_plain() const
      requires kReads
    {
      return soft.is_plain();
    }
    __device__ __forceinline__ auto powers() const { return soft.powers(); }
    template <class Powers>
    __device__ __forceinline__ auto sum_plain(const Parameters& p, const Team& team, const Slice& slice, Shared& shared,
                                              Powers& powers) const {
      const auto sums = soft.sum_plain(p.soft, team, slice, shared.soft, powers);
      return WithHard<decltype(soft.sum_plain(p.soft, team, slice, shared.soft, powers))>{sums, kept(team, shared)};
    }

    template <class GradientOf, class FactorOf>
    __device__ __forceinline__ Partial reduce(const Parameters& p, const Team& team, const RowSpan& span, const Slice& slice,
                                              const void* student, const void* teacher, GradientOf gradient_of,
                                              FactorOf factor_of, Shared& shared) {
      Partial partial;
      if constexpr (kReads)
        partial.soft = soft.reduce(p.soft, team, span, slice, student, teacher, gradient_of, factor_of, shared.soft);
      else
        partial.soft = soft.reduce(p.soft, team, span, slice, student, teacher, gradient_of, factor_of, shared.soft,
                                   beside(p, team, span, slice, shared));
      const HardSums<float>& hard = kept(team, shared);
      if (task->plan.slices > 1) partial.hard = hard;
      return partial;
    }

    __device__ __forceinline__ bool has_far(const Parameters& p, const Slice& slice, const Shared& shared,
                                            const Row& row) const {
      if constexpr (requires { soft.has_far(p.soft, slice, shared.soft, row.soft); })
        return soft.has_far(p.soft, slice, shared.soft, row.soft);
      return false;
    }

    __device__ __forceinline__ void write_gradient(const Parameters& p, const RowSpan& span, const Slice& slice, const Row& row,
                                                   const GradientRow& gradient, float soft_factor) const {
      mixed(p, span, slice, row,
            [&](auto mix) { soft.write_gradient(p.soft, span, slice, row.soft, gradient, soft_factor, mix); });
    }
    template <class Powers>
    __device__ __forceinline__ void write_plain(const Parameters& p, const RowSpan& span, const Slice& slice, const Row& row,
                                                const Powers& powers, const GradientRow& gradient, float soft_factor) const {
      mixed(p, span, slice, row,
            [&](auto mix) { soft.write_plain(p.soft, span, slice, row.soft, powers, gradient, soft_factor, mix); });
    }

   private:
    // The hard part's sums are kept in shared memory meanwhile: the soft part has use for every register.
    __device__ __forceinline__ auto beside(const Parameters& p, const Team& team, const RowSpan& span, const Slice& slice,
                                           Shared& shared) const {
      return [&](auto... s_max) {
        const HardSums<float> sums = sum(p, team, span, slice, shared, s_max...);
        if (team.leads()) shared.kept[team.slot()] = sums;
      };
    }
    static __device__ __forceinline__ const HardSums<float>& kept(const Team& team, const Shared& shared) {
      team.warps > 1 ? __syncthreads() : __syncwarp(team.mask);
      return shared.kept[team.slot()];
    }
    // write(mix): writes the soft part's gradient, each vector of which `mix` mixes with the hard part's.
    template <class Write>
    __device__ __forceinline__ void mixed(const Parameters& p, const RowSpan& span, const Slice& slice, const Row& row,
                                          Write write) const {
      const SoftExponential<H::packed> exponential(kLog2E, row.hard.stat[HardStat::s_max]);
      const int64_t index = task->plan.row_again();
      const Target target(p.args, index);
      HardGradient<float> hard(row.hard.stat, hard_factor(p.args, *task, index, p.args.weight.at(index, 1.f)), p.smoothing,
                               p.classes);
      hard.factor *= exponential.unit(row.hard.stat[HardStat::s_max]);
      write([&](int v, float (&g)[H::width]) {
        add_hard(p, exponential, hard, target, logits_of(v), first_class<H>(span, slice, v), g);
      });
    }
    __device__ __forceinline__ H logits_of(int v) const {
      if constexpr (requires { soft.student(v); })
        return soft.student(v);
      else
        return soft.s[v];
    }
    __device__ __forceinline__ HardSums<float> sum(const Parameters& p, const Team& team, const RowSpan& span,
                                                   const Slice& slice, Shared& shared) const {
      H top = nothing<H>();
#pragma unroll
      for (int v = 0; v < soft.kVectors; ++v) {
        if (v >= slice.count) break;
        top = top.larger(soft.s[v]);
      }
      float largest[1] = {top[0]};
#pragma unroll
      for (int i = 1; i < H::width; ++i) largest[0] = fmaxf(largest[0], top[i]);
      cuda::reduce<Max>(team, largest, shared.largest);
      return sum(p, team, span, slice, shared, largest[0]);
    }
    __device__ __forceinline__ HardSums<float> sum(const Parameters& p, const Team& team, const RowSpan& span,
                                                   const Slice& slice, Shared& shared, float s_max) const {
      const SoftExponential<H::packed> exponential(kLog2E, s_max);
      const Target target(p.args, task->plan.row());
      HardSums<float> hard;
      hard.s_max = s_max;
      float sums[3] = {0, 0, 0};
#pragma unroll
      for (int v = 0; v < soft.kVectors; ++v) {
        if (v >= slice.count) break;
        const H s = still_packed(soft.s[v]);
        float others = 0;
#pragma unroll
        for (int i = 0; i < H::width; ++i) others += exponential(s[i]);
        const int at = target.index - first_class<H>(span, slice, v);
        if (target.is_class() && unsigned(at) < unsigned(H::width)) {
          others = 0;
#pragma unroll
          for (int i = 0; i < H::width; ++i) {
            const float e = exponential(s[i]);
            others += i == at ? 0.f : e;
            sums[1] = i == at ? e : sums[1];
            sums[2] = i == at ? s[i] : sums[2];
          }
        }
        sums[0] += others;
      }
      cuda::reduce<Sum>(team, sums, shared.sums);
      const float unit = exponential.unit(s_max);
      hard.others = sums[0] * unit;
      hard.at_target = target.is_class() ? sums[1] * unit : NAN;
      hard.s_target = target.is_class() ? sums[2] : NAN;
      float smoothed[2] = {0, 0};
      if (p.smoothing != 0) {
        const float top = or_zero(hard.s_max);
#pragma unroll
        for (int v = 0; v < soft.kVectors; ++v) {
          if (v >= slice.count) break;
          const H s = still_packed(soft.s[v]);
#pragma unroll
          for (int i = 0; i < H::width; ++i) {
            const bool inside = span.has(slice.vector(v), i);
            smoothed[0] += inside ? top - s[i] : 0.f;
            smoothed[1] += inside ? 1.f : 0.f;
          }
        }
        cuda::reduce<Sum>(team, smoothed, shared.smoothed);
      }
      hard.below_max = smoothed[0];
      hard.count = smoothed[1];
      hard.ignored = target.ignored;
      return hard;
    }
    template <class Vector>
    static __device__ __forceinline__ int first_class(const RowSpan& span, const Slice& slice, int v) {
      return slice.vector(v) * Vector::width - span.phase;
    }
  };

  static __device__ __forceinline__ Row row_of(const Parameters& p, const Partial& partial, const Team& team,
                                               const Shared& shared) {
    return {Soft::row_of(p.soft, partial.soft), HardRow<float>(shared.kept[team.slot()], p.smoothing, p.classes)};
  }

  template <class Plain>
  static __device__ __forceinline__ void row_of_plain(const Parameters& p, const Plain& sums, bool for_gradient, Row& row) {
    Soft::row_of_plain(p.soft, sums.soft, for_gradient, row.soft);
    row.hard = HardRow<float>(sums.hard, p.smoothing, p.classes);
  }
  static __device__ __forceinline__ bool has_plain(const Row& row) { return Soft::has_plain(row.soft); }

  template <class Read>
  static __device__ __forceinline__ Row merge(const Parameters& p, int slices, Read read, int own, int lane) {
    Row row;
    if constexpr (requires { read.mine; })
      row.soft = Soft::merge(p.soft, slices, OfCluster{read.mine.soft}, own, lane);
    else
      row.soft = Soft::merge(p.soft, slices, [&](int i) { return read(i).soft; }, own, lane);
    HardSums<float> hard{-INFINITY, 0, 0, 0, 0, 0, read(0).hard.ignored};
    for (int i = lane; i < slices; i += 32) hard.s_max = fmaxf(hard.s_max, read(i).hard.s_max);
    hard.s_max = reduce_warp(hard.s_max, Max());
    const auto share_of = [&](float s_max) { return s_max == -INFINITY ? 0.f : exp2_approx((s_max - hard.s_max) * kLog2E); };
    for (int i = lane; i < slices; i += 32) {
      const HardSums<float> from = read(i).hard;
      const float share = share_of(from.s_max);
      hard.others += share * from.others;
      hard.at_target += share * from.at_target;
      hard.s_target += from.s_target;
      hard.below_max += from.count == 0 ? 0.f : fmaf(from.count, hard.s_max - or_zero(from.s_max), from.below_max);
    }
    hard.others = reduce_warp(hard.others, Sum());
    hard.at_target = reduce_warp(hard.at_target, Sum());
    hard.s_target = reduce_warp(hard.s_target, Sum());
    hard.below_max = reduce_warp(hard.below_max, Sum());
    row.hard = HardRow<float>(hard, p.smoothing, p.classes);
    return row;
  }

  static __device__ __forceinline__ bool is_peaked(const Parameters& p, const Row& row)
    requires requires { Soft::is_peaked(p.soft, row.soft); }
  {
    return Soft::is_peaked(p.soft, row.soft);
  }
  static __device__ __forceinline__ bool is_peaked_and_far(const Parameters& p, const Row& row) {
    return Soft::is_peaked_and_far(p.soft, row.soft);
  }
  static __device__ __forceinline__ void set_least(const Team& team, Partial& partial, Shared& shared) {
    Soft::set_least(team, partial.soft, shared.soft);
  }
  template <class H>
  static __device__ __forceinline__ float sum_growth(const Parameters& p, const RowSpan& span, const Slice& slice,
                                                     const RowPointers& at, const Row& row) {
    return Soft::template sum_growth<H>(p.soft, span, slice, at, row.soft);
  }
  static __device__ __forceinline__ void set_shift(Row& row, float growth) { Soft::set_shift(row.soft, growth); }
  static __device__ __forceinline__ auto& shared_growth(Shared& shared) { return Soft::shared_growth(shared.soft); }

  static __device__ __forceinline__ void write_loss(const Parameters& p, const Row& row, float weight, int64_t index) {
    const float soft = Soft::loss_of(p.soft, row.soft, weight);
    const float hard = weight == 0 ? 0.f : row.hard.loss * weight;
    store_losses<float>(p.args, index, hard, soft);
  }
  static __device__ __forceinline__ void store_stats(const Row& row, float* to) {
    Soft::store_stats(row.soft, to);
#pragma unroll
    for (int i = 0; i < HardStat::count; ++i) to[kSoftStats + i] = row.hard.stat[i];
  }

  struct Backward {
    typename Soft::Backward soft;
    Target target;
    HardGradient<float> hard;
    SoftExponential<false> exponential;

    __device__ __forceinline__ Backward(const Parameters& p, const Task& task, int64_t index, float factor)
        : Backward(p, task, static_cast<const float*>(p.args.row_stats) + index * kStats, index, factor) {}
    __device__ __forceinline__ Backward(const Parameters& p, const Task& task, const float* numbers, int64_t index,
                                        float factor)
        : soft(p.soft, numbers, factor), target(p.args, index) {
      const float* stat = numbers + kSoftStats;
      hard = HardGradient<float>(stat, hard_factor(p.args, task, index, p.args.weight.at(index, 1.f)), p.smoothing, p.classes);
      exponential = SoftExponential<false>(kLog2E, stat[HardStat::s_max]);
    }
    template <class H>
    __device__ __forceinline__ void student(const Parameters& p, const H& s, const H& t, int first,
                                            float (&gradient)[H::width]) const {
      soft.student(p.soft, s, t, first, gradient);
      add_hard(p, exponential, hard, target, s, first, gradient);
    }
    template <class H>
    __device__ __forceinline__ void teacher(const Parameters& p, const H& s, const H& t, int first,
                                            float (&gradient)[H::width]) const {
      soft.teacher(p.soft, s, t, first, gradient);
#pragma unroll
      for (int i = 0; i < H::width; ++i) gradient[i] = p.alone ? 0.f : gradient[i];
    }
  };
};

// ---- float64: one block a row, which is read from memory once for each pass -----------------------------------------------

template <class SoftRow>
struct WideRow {
  const KdLossArgs& args;
  SoftRow soft;
  Target target;
  HardRow<double> hard;

  template <class SoftArgs>
  __device__ WideRow(const KdLossArgs& args, const SoftArgs& soft_args, int64_t index)
      : args(args), soft(soft_args, index), target(args, index) {}

  __device__ __forceinline__ void reduce(const Team& team, double (&largest)[kMostWarps][1], double (&shared)[kMostWarps][2]) {
    HardSums<double> all{};
    double top[1] = {-INFINITY};
    for (int64_t k = team.lane; k < args.classes; k += team.size) top[0] = Max()(soft.s(k), top[0]);
    cuda::reduce<Max>(team, top, largest);
    all.s_max = top[0];
    double sums[2] = {0, 0};
    for (int64_t k = team.lane; k < args.classes; k += team.size) {
      sums[0] += k == target.index ? 0 : ::exp(soft.s(k) - all.s_max);
      sums[1] += all.s_max - soft.s(k);
    }
    cuda::reduce<Sum>(team, sums, shared);
    all.others = sums[0];
    all.below_max = sums[1];
    all.s_target = target.is_class() ? soft.s(target.index) : NAN;
    all.at_target = ::exp(all.s_target - all.s_max);
    hard = HardRow<double>(all, args.label_smoothing, double(args.classes));
  }
  __device__ __forceinline__ void gradients(const Team& team, const Task& task, int64_t index, double weight) const {
    const HardGradient<double> gradient(hard.stat, hard_factor(args, task, index, weight), args.label_smoothing,
                                        double(args.classes));
    const bool alone = args.alpha == 0, writes = args.alpha != 1 && !target.ignored;
    const auto mix = [&](int64_t k, double s, double g) {
      const double h = !writes             ? 0
                       : k == target.index ? gradient.at_target
                                           : ::exp(s - hard.stat[HardStat::s_max]) * gradient.factor - gradient.elsewhere;
      return alone ? h : g + h;
    };
    soft.gradients(team, task, index, weight, mix, alone);
  }
};

template <class L, class SoftRow>
__global__ void __launch_bounds__(256, 1)
    kd_wide_forward_kernel(const __grid_constant__ typename L::Parameters parameters, const __grid_constant__ Task task) {
  __shared__ typename SoftRow::Shared shared;
  __shared__ double largest[kMostWarps][1], sums[kMostWarps][2];
  constexpr int kSoftStats = SoftRow::kStats, kStats = kSoftStats + HardStat::count;
  const KdLossArgs& args = parameters.args;
  const Team team(task.plan);
  const int64_t r = blockIdx.x;
  const double weight = args.weight.at(r, 1.0);
  WideRow<SoftRow> row(args, parameters.soft.args, r);
  double hard = 0, soft = 0;
  if (weight != 0) {
    soft = row.soft.reduce(team, shared) * row.soft.scale() * weight;
    row.reduce(team, largest, sums);
    hard = row.target.ignored ? 0 : row.hard.loss * weight;
    if (args.grad_student.data) row.gradients(team, task, r, weight);
  }
  if (team.leads()) {
    store_losses<double>(args, r, hard, soft);
    if (args.row_stats) {
      double* stat = static_cast<double*>(args.row_stats) + r * kStats;
#pragma unroll
      for (int i = 0; i < kSoftStats; ++i) stat[i] = row.soft.stat[i];
#pragma unroll
      for (int i = 0; i < HardStat::count; ++i) stat[kSoftStats + i] = weight != 0 ? row.hard.stat[i] : 0;
    }
  }
  zero_wide(team, args.grad_student, r, weight == 0 ? 0 : args.classes);
  zero_wide(team, args.grad_teacher, r, weight == 0 ? 0 : args.classes);
  finish<double>(task, args);
}

template <class L, class SoftRow>
__global__ void __launch_bounds__(256, 1)
    kd_wide_backward_kernel(const __grid_constant__ typename L::Parameters parameters, const __grid_constant__ Task task) {
  constexpr int kSoftStats = SoftRow::kStats, kStats = kSoftStats + HardStat::count;
  const KdLossArgs& args = parameters.args;
  const Team team(task.plan);
  const int64_t r = blockIdx.x;
  const double weight = args.weight.at(r, 1.0);
  if (weight != 0) {
    WideRow<SoftRow> row(args, parameters.soft.args, r);
    const double* stat = static_cast<const double*>(args.row_stats) + r * kStats;
#pragma unroll
    for (int i = 0; i < kSoftStats; ++i) row.soft.stat[i] = stat[i];
#pragma unroll
    for (int i = 0; i < HardStat::count; ++i) row.hard.stat[i] = stat[kSoftStats + i];
    row.gradients(team, task, r, weight);
  }
  zero_wide(team, args.grad_student, r, weight == 0 ? 0 : args.classes);
  zero_wide(team, args.grad_teacher, r, weight == 0 ? 0 : args.classes);
}

using WithKl = KdLoss<KlDivTau>;
using WithMse = KdLoss<Centred>;
using WideMseRow = PassedRow<Square, double>;

}  // namespace

size_t workspace_bytes(const KdLossArgs& args) {
  return args.soft == Soft::kl ? workspace_bytes<WithKl>(args, WithKl::kStats)
                               : workspace_bytes<WithMse>(args, WithMse::kStats);
}

void kd_loss_forward(const KdLossArgs& args, const Call& call) {
  args.soft == Soft::kl
      ? run_forward<WithKl>(args, call, WithKl::kStats, "kd_loss", kd_wide_forward_kernel<WithKl, WideKlRow>)
      : run_forward<WithMse>(args, call, WithMse::kStats, "kd_loss", kd_wide_forward_kernel<WithMse, WideMseRow>);
}
void kd_loss_backward(const KdLossArgs& args, const Call& call) {
  args.soft == Soft::kl
      ? run_backward<WithKl>(args, call, WithKl::kStats, "kd_loss", kd_wide_backward_kernel<WithKl, WideKlRow>)
      : run_backward<WithMse>(args, call, WithMse::kStats, "kd_loss", kd_wide_backward_kernel<WithMse, WideMseRow>);
}

}  // namespace kdfast::cuda
