// Sums over a row's differences of logits on CUDA: of their squares (logit_mse.cu) or of another function of them
// (logit_huber.cu). A class at -inf on both sides does not count. Without `center` a gradient needs nothing of the row, and
// leaves with the vector it comes from.
#pragma once

#include "row_reduce.cuh"

namespace kdfast::cuda {
namespace {

// Whether a class counts: not where both sides are at -inf.
template <class F>
__device__ __forceinline__ bool counts(F s, F t) {
  return s != F(-INFINITY) || t != F(-INFINITY);
}
// What a difference of two logits adds to the row's mean: an infinite one, which makes the loss infinite, nothing; but NaN
// where a logit is NaN or +inf.
template <class F>
__device__ __forceinline__ F to_mean(F difference, F s, F t) {
  return fabs(difference) < F(INFINITY) ? difference : s < F(INFINITY) && t < F(INFINITY) ? F(0) : F(NAN);
}

// The function of a difference: a loss's Element<F>. Values and slopes are value(d) and slope(d) times a constant of the call.
template <class F>
struct Square {
  using Args = LogitMseArgs;
  using Stat = MseStat;
  static constexpr bool kMeanSlope = false;  // with `center` the slopes of a row add up to 0 by themselves
  static constexpr F value_factor = 1, slope_factor = 2;

  explicit KDFAST_INLINE Square(const Args&) {}
  __device__ __forceinline__ F value(F d) const { return d * d; }
  __device__ __forceinline__ F slope(F d) const { return d; }
};

// d = (s - s_offset) - (t - t_offset) less its mean. The offset, on the side with the larger logits, carries most of it.
struct Difference {
  float s_offset, t_offset, mean;

  __device__ __forceinline__ float operator()(float s, float t) const { return ((s - s_offset) - (t - t_offset)) - mean; }
  // What this one's zero is in the other's terms, but for the mean.
  __device__ __forceinline__ float from(const Difference& other) const {
    return (s_offset - other.s_offset) - (t_offset - other.t_offset);
  }
};

struct Partial {
  Difference d;
  float count, total;  // total: sum of the values
};
struct Row {
  Difference d;
  float inv_classes, total;
};

// What the sums around 0 and around the mean have in common.
template <class Element>
struct LogitDifference {
  using Args = typename Element::Args;
  using Partial = kdfast::cuda::Partial;
  using Row = kdfast::cuda::Row;
  static constexpr int kStats = MseStat::count;
  static constexpr bool kForTeacher = true;

  struct Parameters {
    Args args;
    Element element;
    float scale;

    explicit Parameters(const Args& args) : args(args), element(args), scale(float(args.scale)) {}
    // Factor of an element's slope in the student's gradient.
    __device__ __forceinline__ float gradient_factor(float factor, float inv_classes) const {
      return element.slope_factor * factor * scale * (args.per_class ? inv_classes : 1.f);
    }
  };

  static __device__ __forceinline__ Row row_of(const Parameters&, const Partial& partial) {
    return {partial.d, 1 / partial.count, partial.total};
  }

  static __device__ __forceinline__ void write_loss(const Parameters& p, const Row& row, float weight, int64_t index) {
    static_cast<float*>(p.args.row_loss)[index] = loss_of(p, row, weight);
  }
  static __device__ __forceinline__ float loss_of(const Parameters& p, const Row& row, float weight) {
    const float scale = p.element.value_factor * p.scale * (p.args.per_class ? row.inv_classes : 1.f);
    return weight == 0 ? 0.f : row.total * scale * weight;
  }
  static __device__ __forceinline__ void store_stats(const Row& row, float* stat) {
    stat[MseStat::s_offset] = row.d.s_offset;
    stat[MseStat::t_offset] = row.d.t_offset;
    stat[MseStat::mean] = row.d.mean;
    stat[MseStat::inv_classes] = row.inv_classes;
  }

  struct Backward {
    Difference d{};
    float factor;

    __device__ __forceinline__ Backward(const Parameters& p, const Task&, int64_t index, float given)
        : Backward(p,
                   p.args.row_stats == nullptr ? nullptr : static_cast<const float*>(p.args.row_stats) + index * MseStat::count,
                   given) {}
    __device__ __forceinline__ Backward(const Parameters& p, const float* stat, float given) {
      float inv_classes = 1;
      if (stat != nullptr) {
        d = {stat[MseStat::s_offset], stat[MseStat::t_offset], stat[MseStat::mean]};
        inv_classes = stat[MseStat::inv_classes];
      }
      factor = p.gradient_factor(given, inv_classes);
    }
    template <class H>
    __device__ __forceinline__ void student(const Parameters& p, const H& s, const H& t, int,
                                            float (&gradient)[H::width]) const {
      write(p, s, t, factor, gradient);
    }
    template <class H>
    __device__ __forceinline__ void teacher(const Parameters& p, const H& s, const H& t, int,
                                            float (&gradient)[H::width]) const {
      write(p, s, t, -factor, gradient);
    }

   private:
    template <class H>
    __device__ __forceinline__ void write(const Parameters& p, const H& s, const H& t, float factor,
                                          float (&gradient)[H::width]) const {
#pragma unroll
      for (int i = 0; i < H::width; ++i) gradient[i] = counts(s[i], t[i]) ? p.element.slope(d(s[i], t[i])) * factor : 0.f;
    }
  };
};

// Around 0: a vector is done with as soon as it is read, so that a thread may take many.
template <class Element>
struct Uncentred : LogitDifference<Element> {
  using typename LogitDifference<Element>::Parameters;
  static constexpr int kHeld = 32, kHeldFloat = kHeld, kHeldForward = kHeld, kShared = 0, kBlocks = 2;

  struct Shared {
    float total[kMostWarps][1];
  };

  template <class H, bool wants_gradient, bool for_teacher>
  struct Held {
    template <class GradientOf, class FactorOf>
    __device__ __forceinline__ Partial reduce(const Parameters& p, const Team& team, const RowSpan& span, const Slice& slice,
                                              const void* student, const void* teacher, GradientOf gradient_of,
                                              FactorOf factor_of, Shared& shared) {
      const float factor = p.gradient_factor(factor_of(), 1);
      const GradientRow gradient = gradient_of(p.args.grad_student),
                        grad_teacher = for_teacher ? gradient_of(p.args.grad_teacher) : GradientRow();
      float total[1] = {NAN};
      if (slice.whole && (gradient.aligned || !wants_gradient) && (grad_teacher.aligned || !for_teacher))
        total[0] = sum_whole(p, span, slice, student, teacher, gradient, grad_teacher, factor);
      if (!(total[0] == total[0])) total[0] = sum(p, span, slice, student, teacher, gradient, grad_teacher, factor);
      cuda::reduce<Sum>(team, total, shared.total);
      return {{}, 1, total[0]};
    }

    // They are written already.
    __device__ __forceinline__ void write_gradient(const Parameters&, const RowSpan&, const Slice&, const Row&,
                                                   const GradientRow&, float) const {}
    template <class GradientOf, class FactorOf>
    __device__ __forceinline__ void write_gradients(const Parameters&, const RowSpan&, const Slice&, const Row&, GradientOf,
                                                    FactorOf) const {}

   private:
    // The sum of values, and the gradients, of vectors that go by 128 bits. (Not unrolled: where the lanes of a warp differ by
    // one vector, they would part for the remainder.) NaN where a class is at -inf on both sides.
    __device__ __forceinline__ float sum_whole(const Parameters& p, const RowSpan& span, const Slice& slice,
                                               const void* student, const void* teacher, const GradientRow& gradient,
                                               const GradientRow& grad_teacher, float factor) const {
      const Cursor s_first(student, span.size(p.args.student.dtype), span, slice, true),
          t_first(teacher, span.size(p.args.teacher.dtype), span, slice, true),
          g_first(gradient.row, span.size(gradient.dtype), span, slice, true),
          teacher_first(grad_teacher.row, span.size(grad_teacher.dtype), span, slice, true);
      const char *s_at = s_first.at, *t_at = t_first.at;
      char *g_at = g_first.at, *teacher_at = teacher_first.at;
      float total = 0;
#pragma unroll 1
      for (int left = slice.count; left > 0; --left) {
        const H s = load_whole<H>(s_at, p.args.student.dtype), t = load_whole<H>(t_at, p.args.teacher.dtype);
        float g[H::width];
#pragma unroll
        for (int i = 0; i < H::width; ++i) {
          const float d = s[i] - t[i];
          total += p.element.value(d);
          g[i] = p.element.slope(d) * factor;
        }
        if constexpr (for_teacher)
          gradient.template store_both<H>(g, g_at, grad_teacher, teacher_at);
        else if constexpr (wants_gradient)
          gradient.template store_whole<H>(g, g_at);
        teacher_at += teacher_first.step;
        s_at += s_first.step;
        t_at += t_first.step;
        g_at += g_first.step;
      }
      return total;
    }
    __device__ __forceinline__ float sum(const Parameters& p, const RowSpan& span, const Slice& slice, const void* student,
                                         const void* teacher, const GradientRow& gradient, const GradientRow& grad_teacher,
                                         float factor) const {
      Reader<H> read_student(student, p.args.student.dtype, span, slice, H{}),
          read_teacher(teacher, p.args.teacher.dtype, span, slice, H{});
      Writer<H> write(gradient, span, slice), write_teacher(grad_teacher, span, slice);
      float total = 0;
#pragma unroll 1
      for (int i = 0; i < slice.count; ++i) {
        H s[1], t[1];
        read_student.next(s, 1);
        read_teacher.next(t, 1);
        float g[H::width];
#pragma unroll
        for (int i = 0; i < H::width; ++i) {
          const float d = counts(s[0][i], t[0][i]) ? s[0][i] - t[0][i] : 0.f;
          total += p.element.value(d);
          g[i] = p.element.slope(d) * factor;
        }
        if constexpr (wants_gradient) write.next(g);
        if constexpr (for_teacher) {
#pragma unroll
          for (float& of_class : g) of_class = -of_class;
          write_teacher.next(g);
        }
      }
      return total;
    }
  };

  template <class Read>
  static __device__ __forceinline__ Row merge(const Parameters&, int slices, Read read, int, int lane) {
    float total = 0;
    for (int i = lane; i < slices; i += 32) total += read(i).total;
    return {{}, 1, reduce_warp(total, Sum())};
  }
};

// Around the mean: the row is held until that is known.
struct Centred : LogitDifference<Square<float>> {
  static constexpr int kHeld = 4, kHeldFloat = 5, kHeldForward = 5, kShared = 0, kBlocks = 1;

  struct Shared {
    float size[kMostWarps][2], sums[2][kMostWarps][2], total[kMostWarps][1];
  };

  template <class H, bool wants_gradient, bool for_teacher>
  struct Held {
    static constexpr int kVectors = !wants_gradient ? kHeldForward : H::packed ? kHeld : kHeldFloat;
    H s[kVectors], t[kVectors];

    template <class GradientOf, class FactorOf, class Beside = Nothing>
    __device__ __forceinline__ Partial reduce(const Parameters& p, const Team& team, const RowSpan& span, const Slice& slice,
                                              const void* student, const void* teacher, GradientOf, FactorOf, Shared& shared,
                                              Beside beside = {}) {
      Reader<H> read_student(student, p.args.student.dtype, span, slice, nothing<H>()),
          read_teacher(teacher, p.args.teacher.dtype, span, slice, nothing<H>());
      next_of_both(read_student, s, read_teacher, t, slice.count);
      beside();
      Partial partial{};
      partial.count = 1;
      if (p.args.center || p.args.per_class) find_mean(team, slice, partial, shared);
      float total[1] = {0};
      for_each(slice, [&](int, float sk, float tk) { total[0] += counts(sk, tk) ? p.element.value(partial.d(sk, tk)) : 0.f; });
      cuda::reduce<Sum>(team, total, shared.total);
      partial.total = total[0];
      return partial;
    }

    // mix(number of a vector, its gradient): what becomes of that before it is written
    template <class Mix = Nothing>
    __device__ __forceinline__ void write_gradient(const Parameters& p, const RowSpan& span, const Slice& slice, const Row& row,
                                                   const GradientRow& gradient, float factor, Mix mix = {}) const {
      factor = p.gradient_factor(factor, row.inv_classes);
      Writer<H> write(gradient, span, slice);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (v >= slice.count) break;
        const H student = still_packed(s[v]), teacher = still_packed(t[v]);
        float g[H::width];
#pragma unroll
        for (int i = 0; i < H::width; ++i)
          g[i] = counts(student[i], teacher[i]) ? p.element.slope(row.d(student[i], teacher[i])) * factor : 0.f;
        mix(v, g);
        write.next(g);
      }
    }
    template <class GradientOf, class FactorOf>
    __device__ __forceinline__ void write_gradients(const Parameters& p, const RowSpan& span, const Slice& slice,
                                                    const Row& row, GradientOf gradient_of, FactorOf factor_of) const {
      write_gradient(p, span, slice, row, gradient_of(p.args.grad_student), factor_of());
      write_gradient(p, span, slice, row, gradient_of(p.args.grad_teacher), -factor_of());
    }

   private:
    __device__ __forceinline__ void find_mean(const Team& team, const Slice& slice, Partial& partial, Shared& shared) const {
      float size[2] = {0, 0};
      for_each(slice, [&](int, float sk, float tk) {
        size[0] = finite_larger(size[0], sk);
        size[1] = finite_larger(size[1], tk);
      });
      cuda::reduce<Max>(team, size, shared.size);
      // The mean, and the offset that most of it becomes; then the mean of what is left.
#pragma unroll 1
      for (int pass = 0; pass < 2; ++pass) {
        float sums[2] = {0, 0};
        for_each(slice, [&](int, float sk, float tk) {
          sums[0] += to_mean(partial.d(sk, tk), sk, tk);
          sums[1] += counts(sk, tk) ? 1.f : 0.f;
        });
        cuda::reduce<Sum>(team, sums, shared.sums[pass]);
        const float left = sums[0] / fmaxf(sums[1], 1);
        partial.d.mean += left;
        partial.count = sums[1];
        if (pass == 0) {
          const bool on_student = size[0] >= size[1];
          const float offset = math::row_offset(left, on_student ? size[0] : size[1]);
          partial.d.s_offset = on_student ? offset : 0.f;
          partial.d.t_offset = on_student ? 0.f : -offset;
          partial.d.mean -= offset;
        }
      }
    }
    // f(place in its vector, student's logit, teacher's logit)
    template <class F>
    __device__ __forceinline__ void for_each(const Slice& slice, F f) const {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        if (v >= slice.count) break;
        const H student = still_packed(s[v]), teacher = still_packed(t[v]);
#pragma unroll
        for (int i = 0; i < H::width; ++i) f(i, student[i], teacher[i]);
      }
    }
  };

  template <class Read>
  static __device__ __forceinline__ Row merge(const Parameters&, int slices, Read read, int, int lane) {
    Row row{read(0).d, 0, 0};  // its offsets serve for all slices: their means are brought to them
    const auto mean_of = [&](const Partial& from) { return from.d.mean + from.d.from(row.d); };
    float count = 0, weighted = 0, total = 0;
    for (int i = lane; i < slices; i += 32) {
      const Partial from = read(i);
      count += from.count;
      weighted += from.count == 0 ? 0.f : from.count * mean_of(from);
      total += from.total;
    }
    count = reduce_warp(count, Sum());
    total = reduce_warp(total, Sum());
    // Once more around the mean, as for a slice.
    float mean = reduce_warp(weighted, Sum()) / count, rest = 0, apart = 0;
    for (int i = lane; i < slices; i += 32) {
      const Partial from = read(i);
      rest += from.count == 0 ? 0.f : from.count * (mean_of(from) - mean);
    }
    mean += reduce_warp(rest, Sum()) / count;
    for (int i = lane; i < slices; i += 32) {
      const Partial from = read(i);
      const float distance = mean_of(from) - mean;
      apart += from.count == 0 ? 0.f : from.count * distance * distance;
    }
    row.d.mean = mean;
    row.inv_classes = 1 / count;
    row.total = total + reduce_warp(apart, Sum());
    return row;
  }
};

// ---- one block a row, which is read from memory once for each pass --------------------------------------------------
//
// Simple, not fast. For float64; and for the sums around the mean of what has no rule to move them to another mean, so that
// slices of a row cannot be merged.

template <class Element>
struct ByPasses : LogitDifference<Element> {
  static constexpr int kHeld = 0, kHeldFloat = 0, kHeldForward = 0;
};

template <template <class> class ElementOf, class F>
struct PassedRow {
  using Element = ElementOf<F>;
  using Args = typename Element::Args;
  using Stat = typename Element::Stat;

  const Args& args;
  const Element element;
  const void *student, *teacher;
  static constexpr int kStats = Stat::count;
  F stat[Stat::count] = {};
  struct Shared {
    F sizes[kMostWarps][2], sums[2][kMostWarps][3], totals[kMostWarps][2];
  };

  __device__ PassedRow(const Args& args, int64_t row) : args(args), element(args) {
    student = static_cast<const char*>(args.student.data) + args.student.rows.offset(row) * size_of(args.student.dtype);
    teacher = static_cast<const char*>(args.teacher.data) + args.teacher.rows.offset(row) * size_of(args.teacher.dtype);
    stat[Stat::inv_classes] = 1;
  }
  __device__ F s(int64_t k) const { return load_one<F>(student, args.student.dtype, k); }
  __device__ F t(int64_t k) const { return load_one<F>(teacher, args.teacher.dtype, k); }
  __device__ F d(F s, F t) const { return ((s - stat[Stat::s_offset]) - (t - stat[Stat::t_offset])) - stat[Stat::mean]; }
  __device__ F scale() const { return F(args.scale) * (args.per_class ? stat[Stat::inv_classes] : F(1)); }
  // value(d) and slope(d) of a class
  template <class Function>
  __device__ __forceinline__ void for_each(const Team& team, Function function) const {
    for (int64_t k = team.lane; k < args.classes; k += team.size) {
      const F sk = s(k), tk = t(k), dk = counts(sk, tk) ? d(sk, tk) : F(0);
      function(k, element.value(dk), counts(sk, tk) ? element.slope(dk) - mean_slope() : F(0));
    }
  }
  __device__ F mean_slope() const {
    if constexpr (Element::kMeanSlope) return stat[Stat::slope];
    return F(0);
  }

  __device__ void find_mean(const Team& team, F (&sizes)[kMostWarps][2], F (&shared)[2][kMostWarps][3]) {
    F size[2] = {0, 0};
    for (int64_t k = team.lane; k < args.classes; k += team.size) {
      size[0] = finite_larger(size[0], s(k));
      size[1] = finite_larger(size[1], t(k));
    }
    cuda::reduce<Max>(team, size, sizes);
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
      F sums[3] = {0, 0, 0};
      for (int64_t k = team.lane; k < args.classes; k += team.size) {
        const F sk = s(k), tk = t(k), dk = d(sk, tk);
        sums[0] += to_mean(dk, sk, tk);
        sums[1] += counts(sk, tk);
        sums[2] += fabs(dk) == F(INFINITY);
      }
      cuda::reduce<Sum>(team, sums, shared[pass]);
      if (Element::kMeanSlope && sums[2] > 0) {  // infinite: around 0 so is the loss, and the slopes are those of its lines
        stat[Stat::inv_classes] = 1 / sums[1];
        return;
      }
      const F left = sums[0] / (sums[1] > 0 ? sums[1] : 1);
      stat[Stat::mean] += left;
      stat[Stat::inv_classes] = 1 / sums[1];
      if (pass == 0) {
        const bool on_student = size[0] >= size[1];
        const F offset = math::row_offset(left, on_student ? size[0] : size[1]);
        stat[Stat::s_offset] = on_student ? offset : F(0);
        stat[Stat::t_offset] = on_student ? F(0) : -offset;
        stat[Stat::mean] -= offset;
      }
    }
  }

  // The statistics; returns the sum of the values.
  __device__ __forceinline__ F reduce(const Team& team, Shared& shared) {
    if (args.center || args.per_class) find_mean(team, shared.sizes, shared.sums);
    F total[2] = {0, 0};
    for_each(team, [&](int64_t, F value, F slope) {
      total[0] += value;
      total[1] += slope;
    });
    cuda::reduce<Sum>(team, total, shared.totals);
    if constexpr (Element::kMeanSlope)
      if (args.center) stat[Stat::slope] = total[1] * stat[Stat::inv_classes];
    return total[0] * element.value_factor;
  }

  // mix(class, student's logit, gradient): what becomes of a student's gradient
  template <class Mix>
  __device__ __forceinline__ void gradients(const Team& team, const Task& task, int64_t row, F weight, Mix mix,
                                            bool alone = false) const {
    const F factor = element.slope_factor * args.grad_loss.at(row, F(1)) * F(args.grad_scale) * weight /
                     task.divisor.at(0, F(task.number)) * scale();
    for_each(team, [&](int64_t k, F, F slope) {
      if (args.grad_student.data)
        store_one(args.grad_student.data, args.grad_student.dtype, args.grad_student.rows.offset(row) + k,
                  mix(k, s(k), slope * factor));
      if (args.grad_teacher.data)
        store_one(args.grad_teacher.data, args.grad_teacher.dtype, args.grad_teacher.rows.offset(row) + k,
                  alone ? F(0) : slope * -factor);
    });
  }
};

template <template <class> class ElementOf, class F>
__global__ void __launch_bounds__(256, 1)
    passes_forward_kernel(const __grid_constant__ typename ElementOf<F>::Args args, const __grid_constant__ Task task) {
  using Row = PassedRow<ElementOf, F>;
  __shared__ typename Row::Shared shared;
  const Team team(task.plan);
  const int64_t r = blockIdx.x;
  const F weight = args.weight.at(r, F(1));
  Row row(args, r);
  F loss = 0;
  if (weight != 0) {
    loss = row.reduce(team, shared) * row.scale() * weight;
    if (args.grad_student.data) row.gradients(team, task, r, weight, [](int64_t, F, F gradient) { return gradient; });
  }
  if (team.leads()) {
    static_cast<F*>(args.row_loss)[r] = loss;
    if (args.row_stats)
#pragma unroll
      for (int i = 0; i < Row::Stat::count; ++i) static_cast<F*>(args.row_stats)[r * Row::Stat::count + i] = row.stat[i];
  }
  zero_wide(team, args.grad_student, r, weight == 0 ? 0 : args.classes);
  zero_wide(team, args.grad_teacher, r, weight == 0 ? 0 : args.classes);
  finish<F>(task, args);
}

template <template <class> class ElementOf, class F>
__global__ void __launch_bounds__(256, 1)
    passes_backward_kernel(const __grid_constant__ typename ElementOf<F>::Args args, const __grid_constant__ Task task) {
  using Row = PassedRow<ElementOf, F>;
  const Team team(task.plan);
  const int64_t r = blockIdx.x;
  const F weight = args.weight.at(r, F(1));
  if (weight != 0) {
    Row row(args, r);
    if (args.row_stats)
#pragma unroll
      for (int i = 0; i < Row::Stat::count; ++i) row.stat[i] = static_cast<const F*>(args.row_stats)[r * Row::Stat::count + i];
    row.gradients(team, task, r, weight, [](int64_t, F, F gradient) { return gradient; });
  }
  zero_wide(team, args.grad_student, r, weight == 0 ? 0 : args.classes);
  zero_wide(team, args.grad_teacher, r, weight == 0 ? 0 : args.classes);
}

}  // namespace
}  // namespace kdfast::cuda
