// Squared difference of the logits on CUDA. A class at -inf on both sides does not count. Without `center` a gradient needs
// nothing of the row, and leaves with the vector it comes from; with it, the slice stays in registers until the row's mean is
// known.
#include "row_reduce.cuh"

namespace kdfast::cuda {
namespace {

struct LogitMse {
  using Args = LogitMseArgs;

  struct Parameters {
    LogitMseArgs args;
    float scale;
    bool centred;

    explicit Parameters(const LogitMseArgs& args)
        : args(args), scale(float(args.scale)), centred(args.center || args.per_class) {}
  };

  struct Partial {
    float offset, mean, count, total;  // total: sum (d - mean)^2, d = (s - offset) - t
  };
  struct Row {
    float offset, mean, inv_classes, total;
  };
  struct Shared {
    float size[kMostWarps][1], sums[2][kMostWarps][2], total[kMostWarps][1];
  };

  static __device__ __forceinline__ bool counts(float s, float t) { return s != -INFINITY || t != -INFINITY; }

  // Factor of (d - mean) in the student's gradient.
  static __device__ __forceinline__ float gradient_factor(const Parameters& p, float factor, float inv_classes) {
    return 2 * factor * p.scale * (p.args.per_class ? inv_classes : 1.f);
  }

  template <class H, bool wants_gradient>
  struct Held {
    static constexpr int kept = kVectors;
    H s[kept], t[kept];

    template <class GradientOf, class FactorOf>
    __device__ __forceinline__ Partial reduce(const Parameters& p, const Team& team, const RowSpan& span, const Slice& slice,
                                              const void* student, const void* teacher, GradientOf gradient_of,
                                              FactorOf factor_of, Shared& shared) {
      Partial partial{0, 0, 0, 0};
      const float factor = gradient_factor(p, factor_of(), 1);
      const GradientRow gradient = gradient_of();
      float total[1] = {0};
#pragma unroll
      for (int v = 0; v < kept; ++v) {
        if (v >= slice.steps) break;
        s[v] = slice.load<H>(student, p.args.student.dtype, span, v);
        t[v] = slice.load<H>(teacher, p.args.teacher.dtype, span, v);
        if (p.centred) continue;
        float local = 0, g[H::width];
#pragma unroll
        for (int i = 0; i < H::width; ++i) {
          const float d = s[v][i] - t[v][i];
          local = fmaf(d, d, local);
          if constexpr (wants_gradient) g[i] = d * factor;
        }
        if (!(local == local)) {  // -inf on both sides, or outside the row
          local = 0;
#pragma unroll
          for (int i = 0; i < H::width; ++i) {
            const float d = counts(s[v][i], t[v][i]) ? s[v][i] - t[v][i] : 0.f;
            local = fmaf(d, d, local);
            if constexpr (wants_gradient) g[i] = d * factor;
          }
        }
        total[0] += local;
        if constexpr (wants_gradient) slice.store<H>(g, gradient, span, v);
      }
      if (p.centred) {
        // The row's mean difference, and the offset that its logits are read with: the mean, then the mean of what is left.
        float size[1] = {0};
#pragma unroll
        for (int v = 0; v < kept; ++v) {
          if (v >= slice.steps) break;
#pragma unroll
          for (int i = 0; i < H::width; ++i) size[0] = finite_larger(size[0], s[v][i]);
        }
        cuda::reduce<Max>(team, size, shared.size);
#pragma unroll 1
        for (int pass = 0; pass < 2; ++pass) {
          float sums[2] = {0, 0};
#pragma unroll
          for (int v = 0; v < kept; ++v) {
            if (v >= slice.steps) break;
#pragma unroll
            for (int i = 0; i < H::width; ++i) {
              const bool in = counts(s[v][i], t[v][i]);
              sums[0] += in ? ((s[v][i] - partial.offset) - t[v][i]) - partial.mean : 0.f;
              sums[1] += in ? 1.f : 0.f;
            }
          }
          cuda::reduce<Sum>(team, sums, shared.sums[pass]);
          const float left = sums[0] / fmaxf(sums[1], 1);
          if (pass == 0) partial.offset = math::row_offset(left, size[0]);
          partial.mean = pass == 0 ? left - partial.offset : partial.mean + left;
          partial.count = sums[1];
        }
        const float mean = fabsf(partial.mean) < INFINITY ? partial.mean : 0.f;  // -inf on one side: the loss is infinite
#pragma unroll
        for (int v = 0; v < kept; ++v) {
          if (v >= slice.steps) break;
#pragma unroll
          for (int i = 0; i < H::width; ++i) {
            const float d = counts(s[v][i], t[v][i]) ? ((s[v][i] - partial.offset) - t[v][i]) - mean : 0.f;
            total[0] = fmaf(d, d, total[0]);
          }
        }
      }
      cuda::reduce<Sum>(team, total, shared.total);
      partial.total = total[0];
      return partial;
    }

    __device__ __forceinline__ void write_gradient(const Parameters& p, const RowSpan& span, const Slice& slice, const Row& row,
                                                   const GradientRow& gradient, float factor) const {
      if (!p.centred) return;
      factor = gradient_factor(p, factor, row.inv_classes);
#pragma unroll
      for (int v = 0; v < kept; ++v) {
        if (v >= slice.steps) break;
        float g[H::width];
#pragma unroll
        for (int i = 0; i < H::width; ++i)
          g[i] = counts(s[v][i], t[v][i]) ? (((s[v][i] - row.offset) - t[v][i]) - row.mean) * factor : 0.f;
        slice.store<H>(g, gradient, span, v);
      }
    }
  };

  static __device__ __forceinline__ Row row_of(const Parameters&, const Partial& partial) {
    return {partial.offset, partial.mean, 1 / partial.count, partial.total};
  }

  template <class Read>
  static __device__ __forceinline__ Row merge(const Parameters& p, int slices, Read read, int, int lane) {
    const float offset = read(0).offset;  // of all slices: their means are brought to it
    const auto mean_of = [&](const Partial& from) { return from.mean + (from.offset - offset); };
    float count = 0, weighted = 0, total = 0;
    for (int i = lane; i < slices; i += 32) {
      const Partial from = read(i);
      count += from.count;
      weighted += from.count == 0 ? 0.f : from.count * mean_of(from);
      total += from.total;
    }
    count = reduce_warp(count, Sum());
    total = reduce_warp(total, Sum());
    if (!p.centred) return {0, 0, 1, total};
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
    apart = reduce_warp(apart, Sum());
    return {offset, mean, 1 / count, fabsf(mean) < INFINITY ? total + apart : total};
  }

  static __device__ __forceinline__ void finish_row(const Parameters& p, const Row& row, float weight, int64_t index) {
    const float scale = p.scale * (p.args.per_class ? row.inv_classes : 1.f);
    static_cast<float*>(p.args.row_loss)[index] = weight == 0 ? 0.f : row.total * scale * weight;
    if (p.args.row_stats == nullptr || !p.centred) return;
    float* stat = static_cast<float*>(p.args.row_stats) + index * MseStat::count;
    stat[MseStat::offset] = row.offset;
    stat[MseStat::mean] = row.mean;
    stat[MseStat::inv_classes] = row.inv_classes;
  }

  struct Backward {
    float offset = 0, mean = 0, factor;

    __device__ __forceinline__ Backward(const Parameters& p, int64_t index, float given) {
      float inv_classes = 1;
      if (p.args.row_stats != nullptr && p.centred) {
        const float* stat = static_cast<const float*>(p.args.row_stats) + index * MseStat::count;
        offset = stat[MseStat::offset];
        mean = stat[MseStat::mean];
        inv_classes = stat[MseStat::inv_classes];
      }
      factor = gradient_factor(p, given, inv_classes);
    }
    template <class H>
    __device__ __forceinline__ void vector(const Parameters&, const H& s, const H& t, float (&for_student)[H::width],
                                           float (&for_teacher)[H::width]) const {
#pragma unroll
      for (int i = 0; i < H::width; ++i) {
        for_student[i] = counts(s[i], t[i]) ? (((s[i] - offset) - t[i]) - mean) * factor : 0.f;
        for_teacher[i] = -for_student[i];
      }
    }
  };
};

// ---- float64: one block a row, which is read from memory once for each pass
// ----------------------------------------------------

struct WideRow {
  const LogitMseArgs& args;
  const void *student, *teacher;
  double offset = 0, mean = 0, inv_classes = 1;

  __device__ WideRow(const LogitMseArgs& args, int64_t row) : args(args) {
    student = static_cast<const char*>(args.student.data) + args.student.rows.offset(row) * size_of(args.student.dtype);
    teacher = static_cast<const char*>(args.teacher.data) + args.teacher.rows.offset(row) * size_of(args.teacher.dtype);
  }
  __device__ bool counts(int64_t k, double around, double& d) const {
    const double s = load_one<double>(student, args.student.dtype, k), t = load_one<double>(teacher, args.teacher.dtype, k);
    const bool in = s != -INFINITY || t != -INFINITY;
    d = in ? ((s - offset) - t) - around : 0;
    return in;
  }
  __device__ double scale() const { return args.scale * (args.per_class ? inv_classes : 1); }

  __device__ void gradients(const Team& team, const Task& task, int64_t row, double weight) const {
    const double factor =
        2 * args.grad_loss.at(row, 1.0) * args.grad_scale * weight / task.divisor.at(0, task.number) * scale();
    for (int64_t k = team.lane; k < args.classes; k += team.size) {
      double d;
      const double g = counts(k, mean, d) ? d * factor : 0;
      if (args.grad_student.data)
        store_one(args.grad_student.data, args.grad_student.dtype, args.grad_student.rows.offset(row) + k, g);
      if (args.grad_teacher.data)
        store_one(args.grad_teacher.data, args.grad_teacher.dtype, args.grad_teacher.rows.offset(row) + k, -g);
    }
  }
};

__global__ void __launch_bounds__(256, 1)
    wide_forward_kernel(const __grid_constant__ LogitMseArgs args, const __grid_constant__ Task task) {
  __shared__ double sizes[kMostWarps][1], shared[3][kMostWarps][2];
  const Team team(task.plan);
  const int64_t r = blockIdx.x;
  const double weight = args.weight.at(r, 1.0);
  WideRow row(args, r);
  double loss = 0;
  if (weight != 0) {
    double d;
    if (args.center || args.per_class) {
      double size[1] = {0};
      for (int64_t k = team.lane; k < args.classes; k += team.size)
        size[0] = finite_larger(size[0], load_one<double>(row.student, args.student.dtype, k));
      reduce<Max>(team, size, sizes);
      for (int pass = 0; pass < 2; ++pass) {
        double sums[2] = {0, 0};
        for (int64_t k = team.lane; k < args.classes; k += team.size) {
          sums[1] += row.counts(k, row.mean, d);
          sums[0] += d;
        }
        reduce<Sum>(team, sums, shared[pass]);
        const double left = sums[0] / (sums[1] > 0 ? sums[1] : 1);
        if (pass == 0) row.offset = math::row_offset(left, size[0]);
        row.mean = pass == 0 ? left - row.offset : row.mean + left;
        row.inv_classes = 1 / sums[1];
      }
    }
    const double around = fabs(row.mean) < INFINITY ? row.mean : 0;
    double total[2] = {0, 0};
    for (int64_t k = team.lane; k < args.classes; k += team.size) {
      row.counts(k, around, d);
      total[0] += d * d;
    }
    reduce<Sum>(team, total, shared[2]);
    loss = total[0] * row.scale() * weight;
    if (args.grad_student.data) row.gradients(team, task, r, weight);
  }
  if (team.leads()) {
    static_cast<double*>(args.row_loss)[r] = loss;
    if (args.row_stats) {
      static_cast<double*>(args.row_stats)[r * MseStat::count + MseStat::offset] = row.offset;
      static_cast<double*>(args.row_stats)[r * MseStat::count + MseStat::mean] = row.mean;
      static_cast<double*>(args.row_stats)[r * MseStat::count + MseStat::inv_classes] = row.inv_classes;
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
      row.offset = static_cast<const double*>(args.row_stats)[r * MseStat::count + MseStat::offset];
      row.mean = static_cast<const double*>(args.row_stats)[r * MseStat::count + MseStat::mean];
      row.inv_classes = static_cast<const double*>(args.row_stats)[r * MseStat::count + MseStat::inv_classes];
    }
    row.gradients(team, task, r, weight);
  }
  zero_wide(team, args.grad_student, r, weight == 0 ? 0 : args.classes);
  zero_wide(team, args.grad_teacher, r, weight == 0 ? 0 : args.classes);
}

}  // namespace

size_t workspace_bytes(const LogitMseArgs& args) { return workspace_bytes<LogitMse>(args, MseStat::count); }

void logit_mse_forward(const LogitMseArgs& args, const Call& call) {
  run_forward<LogitMse>(args, call, MseStat::count, "logit_mse", wide_forward_kernel);
}
void logit_mse_backward(const LogitMseArgs& args, const Call& call) {
  run_backward<LogitMse>(args, call, MseStat::count, "logit_mse", wide_backward_kernel);
}

}  // namespace kdfast::cuda
