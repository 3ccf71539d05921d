// Squared difference of the logits on CUDA. A class at -inf on both sides does not count. Without `center` a gradient needs
// nothing of the row, and leaves with the vector it comes from; with it, the slice stays in registers until the row's mean is
// known.
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

struct Parameters {
  LogitMseArgs args;
  float scale;

  explicit Parameters(const LogitMseArgs& args) : args(args), scale(float(args.scale)) {}
  // Factor of (d - mean) in the student's gradient.
  __device__ __forceinline__ float gradient_factor(float factor, float inv_classes) const {
    return 2 * factor * scale * (args.per_class ? inv_classes : 1.f);
  }
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
  float count, total;  // total: sum d^2
};
struct Row {
  Difference d;
  float inv_classes, total;
};

// What the sum of squares around 0 and the one around the mean have in common.
struct LogitMse {
  using Args = LogitMseArgs;
  using Parameters = kdfast::cuda::Parameters;
  using Partial = kdfast::cuda::Partial;
  using Row = kdfast::cuda::Row;

  static __device__ __forceinline__ Row row_of(const Parameters&, const Partial& partial) {
    return {partial.d, 1 / partial.count, partial.total};
  }

  static __device__ __forceinline__ void finish_row(const Parameters& p, const Row& row, float weight, int64_t index) {
    const float scale = p.scale * (p.args.per_class ? row.inv_classes : 1.f);
    static_cast<float*>(p.args.row_loss)[index] = weight == 0 ? 0.f : row.total * scale * weight;
    if (p.args.row_stats == nullptr) return;
    float* stat = static_cast<float*>(p.args.row_stats) + index * MseStat::count;
    stat[MseStat::s_offset] = row.d.s_offset;
    stat[MseStat::t_offset] = row.d.t_offset;
    stat[MseStat::mean] = row.d.mean;
    stat[MseStat::inv_classes] = row.inv_classes;
  }

  struct Backward {
    Difference d{};
    float factor;

    __device__ __forceinline__ Backward(const Parameters& p, int64_t index, float given) {
      float inv_classes = 1;
      if (p.args.row_stats != nullptr) {
        const float* stat = static_cast<const float*>(p.args.row_stats) + index * MseStat::count;
        d = {stat[MseStat::s_offset], stat[MseStat::t_offset], stat[MseStat::mean]};
        inv_classes = stat[MseStat::inv_classes];
      }
      factor = p.gradient_factor(given, inv_classes);
    }
    template <class H>
    __device__ __forceinline__ void student(const Parameters&, const H& s, const H& t, float (&gradient)[H::width]) const {
      write(s, t, factor, gradient);
    }
    template <class H>
    __device__ __forceinline__ void teacher(const Parameters&, const H& s, const H& t, float (&gradient)[H::width]) const {
      write(s, t, -factor, gradient);
    }

   private:
    template <class H>
    __device__ __forceinline__ void write(const H& s, const H& t, float factor, float (&gradient)[H::width]) const {
#pragma unroll
      for (int i = 0; i < H::width; ++i) gradient[i] = counts(s[i], t[i]) ? d(s[i], t[i]) * factor : 0.f;
    }
  };
};

// Around 0: a vector is done with as soon as it is read, so that a thread may take many.
struct PlainMse : LogitMse {
  static constexpr int kHeld = 32, kBlocks = 2;

  struct Shared {
    float total[kMostWarps][1];
  };

  template <class H, bool wants_gradient>
  struct Held {
    template <class GradientOf, class FactorOf>
    __device__ __forceinline__ Partial reduce(const Parameters& p, const Team& team, const RowSpan& span, const Slice& slice,
                                              const void* student, const void* teacher, GradientOf gradient_of,
                                              FactorOf factor_of, Shared& shared) {
      const float factor = p.gradient_factor(factor_of(), 1);
      const GradientRow gradient = gradient_of();
      float total[1] = {NAN};
      if (slice.whole && (gradient.aligned || !wants_gradient))
        total[0] = sum_whole(p, span, slice, student, teacher, gradient, factor);
      if (!(total[0] == total[0])) total[0] = sum(p, span, slice, student, teacher, gradient, factor);
      cuda::reduce<Sum>(team, total, shared.total);
      return {{}, 1, total[0]};
    }

    __device__ __forceinline__ void write_gradient(const Parameters&, const RowSpan&, const Slice&, const Row&,
                                                   const GradientRow&, float) const {}

   private:
    // The sum of squares, and the gradient, of vectors that go by 128 bits. (Not unrolled: where the lanes of a warp differ by
    // one vector, they would part for the remainder.) NaN where a class is at -inf on both sides.
    __device__ __forceinline__ float sum_whole(const Parameters& p, const RowSpan& span, const Slice& slice,
                                               const void* student, const void* teacher, const GradientRow& gradient,
                                               float factor) const {
      const Cursor s_first(student, H::packed ? 2 : size_of(p.args.student.dtype), H::width, span, slice, true),
          t_first(teacher, H::packed ? 2 : size_of(p.args.teacher.dtype), H::width, span, slice, true),
          g_first(gradient.row, H::packed ? 2 : size_of(gradient.dtype), H::width, span, slice, true);
      const char *s_at = s_first.at, *t_at = t_first.at;
      char* g_at = g_first.at;
      float total = 0;
#pragma unroll 1
      for (int left = slice.count; left > 0; --left) {
        const H s = load_whole<H>(s_at, p.args.student.dtype), t = load_whole<H>(t_at, p.args.teacher.dtype);
        float g[H::width];
#pragma unroll
        for (int i = 0; i < H::width; ++i) {
          const float d = s[i] - t[i];
          total = fmaf(d, d, total);
          g[i] = d * factor;
        }
        if constexpr (wants_gradient) gradient.template store_whole<H>(g, g_at);
        s_at += s_first.step;
        t_at += t_first.step;
        g_at += g_first.step;
      }
      return total;
    }
    __device__ __forceinline__ float sum(const Parameters& p, const RowSpan& span, const Slice& slice, const void* student,
                                         const void* teacher, const GradientRow& gradient, float factor) const {
      Reader<H> read_student(student, p.args.student.dtype, span, slice, H{}),
          read_teacher(teacher, p.args.teacher.dtype, span, slice, H{});
      Writer<H> write(gradient, span, slice);
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
          total = fmaf(d, d, total);
          g[i] = d * factor;
        }
        if constexpr (wants_gradient) write.next(g);
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
struct CentredMse : LogitMse {
  static constexpr int kHeld = 4, kBlocks = 1;

  struct Shared {
    float size[kMostWarps][2], sums[2][kMostWarps][2], total[kMostWarps][1];
  };

  template <class H, bool wants_gradient>
  struct Held {
    H s[kHeld], t[kHeld];

    template <class GradientOf, class FactorOf>
    __device__ __forceinline__ Partial reduce(const Parameters& p, const Team& team, const RowSpan& span, const Slice& slice,
                                              const void* student, const void* teacher, GradientOf, FactorOf, Shared& shared) {
      Reader<H>(student, p.args.student.dtype, span, slice, nothing<H>()).next(s, slice.count);
      Reader<H>(teacher, p.args.teacher.dtype, span, slice, nothing<H>()).next(t, slice.count);
      Partial partial{};
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
      float total[1] = {0};
      for_each(slice, [&](int, float sk, float tk) {
        const float d = counts(sk, tk) ? partial.d(sk, tk) : 0.f;
        total[0] = fmaf(d, d, total[0]);
      });
      cuda::reduce<Sum>(team, total, shared.total);
      partial.total = total[0];
      return partial;
    }

    __device__ __forceinline__ void write_gradient(const Parameters& p, const RowSpan& span, const Slice& slice, const Row& row,
                                                   const GradientRow& gradient, float factor) const {
      factor = p.gradient_factor(factor, row.inv_classes);
      Writer<H> write(gradient, span, slice);
      float g[H::width];
      for_each(slice, [&](int i, float sk, float tk) {
        g[i] = counts(sk, tk) ? row.d(sk, tk) * factor : 0.f;
        if (i == H::width - 1) write.next(g);
      });
    }

   private:
    // f(place in its vector, student's logit, teacher's logit)
    template <class F>
    __device__ __forceinline__ void for_each(const Slice& slice, F f) const {
#pragma unroll
      for (int v = 0; v < kHeld; ++v) {
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

// ---- float64: one block a row, which is read from memory once for each pass
// ----------------------------------------------------

struct WideRow {
  const LogitMseArgs& args;
  const void *student, *teacher;
  double s_offset = 0, t_offset = 0, mean = 0, inv_classes = 1;

  __device__ WideRow(const LogitMseArgs& args, int64_t row) : args(args) {
    student = static_cast<const char*>(args.student.data) + args.student.rows.offset(row) * size_of(args.student.dtype);
    teacher = static_cast<const char*>(args.teacher.data) + args.teacher.rows.offset(row) * size_of(args.teacher.dtype);
  }
  __device__ double s(int64_t k) const { return load_one<double>(student, args.student.dtype, k); }
  __device__ double t(int64_t k) const { return load_one<double>(teacher, args.teacher.dtype, k); }
  __device__ double d(double s, double t) const { return ((s - s_offset) - (t - t_offset)) - mean; }
  __device__ double d_at(int64_t k) const { return counts(s(k), t(k)) ? d(s(k), t(k)) : 0; }
  __device__ double scale() const { return args.scale * (args.per_class ? inv_classes : 1); }

  __device__ void gradients(const Team& team, const Task& task, int64_t row, double weight) const {
    const double factor =
        2 * args.grad_loss.at(row, 1.0) * args.grad_scale * weight / task.divisor.at(0, task.number) * scale();
    for (int64_t k = team.lane; k < args.classes; k += team.size) {
      const double g = d_at(k) * factor;
      if (args.grad_student.data)
        store_one(args.grad_student.data, args.grad_student.dtype, args.grad_student.rows.offset(row) + k, g);
      if (args.grad_teacher.data)
        store_one(args.grad_teacher.data, args.grad_teacher.dtype, args.grad_teacher.rows.offset(row) + k, -g);
    }
  }
};

__global__ void __launch_bounds__(256, 1)
    wide_forward_kernel(const __grid_constant__ LogitMseArgs args, const __grid_constant__ Task task) {
  __shared__ double sizes[kMostWarps][2], shared[3][kMostWarps][2];
  const Team team(task.plan);
  const int64_t r = blockIdx.x;
  const double weight = args.weight.at(r, 1.0);
  WideRow row(args, r);
  double loss = 0;
  if (weight != 0) {
    if (args.center || args.per_class) {
      double size[2] = {0, 0};
      for (int64_t k = team.lane; k < args.classes; k += team.size) {
        size[0] = finite_larger(size[0], row.s(k));
        size[1] = finite_larger(size[1], row.t(k));
      }
      reduce<Max>(team, size, sizes);
      for (int pass = 0; pass < 2; ++pass) {
        double sums[2] = {0, 0};
        for (int64_t k = team.lane; k < args.classes; k += team.size) {
          const double sk = row.s(k), tk = row.t(k);
          sums[0] += to_mean(row.d(sk, tk), sk, tk);
          sums[1] += counts(sk, tk);
        }
        reduce<Sum>(team, sums, shared[pass]);
        const double left = sums[0] / (sums[1] > 0 ? sums[1] : 1);
        row.mean += left;
        row.inv_classes = 1 / sums[1];
        if (pass == 0) {
          const bool on_student = size[0] >= size[1];
          const double offset = math::row_offset(left, on_student ? size[0] : size[1]);
          (on_student ? row.s_offset : row.t_offset) = on_student ? offset : -offset;
          row.mean -= offset;
        }
      }
    }
    double total[2] = {0, 0};
    for (int64_t k = team.lane; k < args.classes; k += team.size) {
      const double d = row.d_at(k);
      total[0] += d * d;
    }
    reduce<Sum>(team, total, shared[2]);
    loss = total[0] * row.scale() * weight;
    if (args.grad_student.data) row.gradients(team, task, r, weight);
  }
  if (team.leads()) {
    static_cast<double*>(args.row_loss)[r] = loss;
    if (args.row_stats) {
      double* stat = static_cast<double*>(args.row_stats) + r * MseStat::count;
      stat[MseStat::s_offset] = row.s_offset;
      stat[MseStat::t_offset] = row.t_offset;
      stat[MseStat::mean] = row.mean;
      stat[MseStat::inv_classes] = row.inv_classes;
    }
  }
  zero_wide(team, args.grad_student, r, weight == 0 ? 0 : args.classes);
  finish<double>(task, args.row_loss, args.rows);
}

__global__ void __launch_bounds__(256, 1)
    wide_backward_kernel(const __grid_constant__ LogitMseArgs args, const __grid_constant__ Task task) {
  const Team team(task.plan);
  const int64_t r = blockIdx.x;
  const double weight = args.weight.at(r, 1.0);
  if (weight != 0) {
    WideRow row(args, r);
    if (args.row_stats) {
      const double* stat = static_cast<const double*>(args.row_stats) + r * MseStat::count;
      row.s_offset = stat[MseStat::s_offset];
      row.t_offset = stat[MseStat::t_offset];
      row.mean = stat[MseStat::mean];
      row.inv_classes = stat[MseStat::inv_classes];
    }
    row.gradients(team, task, r, weight);
  }
  zero_wide(team, args.grad_student, r, weight == 0 ? 0 : args.classes);
  zero_wide(team, args.grad_teacher, r, weight == 0 ? 0 : args.classes);
}

}  // namespace

size_t workspace_bytes(const LogitMseArgs& args) {
  return args.center || args.per_class ? workspace_bytes<CentredMse>(args, MseStat::count) : workspace_bytes<PlainMse>(args, 0);
}

void logit_mse_forward(const LogitMseArgs& args, const Call& call) {
  if (args.center || args.per_class)
    run_forward<CentredMse>(args, call, MseStat::count, "logit_mse", wide_forward_kernel);
  else
    run_forward<PlainMse>(args, call, 0, "logit_mse", wide_forward_kernel);
}
void logit_mse_backward(const LogitMseArgs& args, const Call& call) {
  if (args.center || args.per_class)
    run_backward<CentredMse>(args, call, MseStat::count, "logit_mse", wide_backward_kernel);
  else
    run_backward<PlainMse>(args, call, 0, "logit_mse", wide_backward_kernel);
}

}  // namespace kdfast::cuda
