// Squared difference of the logits on CUDA, by the rows of logit_difference.cuh. With `center` the slice stays in registers
// until the row's mean is known.
#include "logit_difference.cuh"

namespace kdfast::cuda {
namespace {

// Around the mean: the row is held until that is known.
struct Centred : LogitDifference<Square<float>> {
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
      for_each(slice, [&](int, float sk, float tk) { total[0] += counts(sk, tk) ? p.element.value(partial.d(sk, tk)) : 0.f; });
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
        g[i] = counts(sk, tk) ? p.element.slope(row.d(sk, tk)) * factor : 0.f;
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

}  // namespace

size_t workspace_bytes(const LogitMseArgs& args) {
  return args.center || args.per_class ? workspace_bytes<Centred>(args, MseStat::count)
                                       : workspace_bytes<Plain<Square<float>>>(args, 0);
}

void logit_mse_forward(const LogitMseArgs& args, const Call& call) {
  if (args.center || args.per_class)
    run_forward<Centred>(args, call, MseStat::count, "logit_mse", passes_forward_kernel<Square, double>);
  else
    run_forward<Plain<Square<float>>>(args, call, 0, "logit_mse", passes_forward_kernel<Square, double>);
}
void logit_mse_backward(const LogitMseArgs& args, const Call& call) {
  if (args.center || args.per_class)
    run_backward<Centred>(args, call, MseStat::count, "logit_mse", passes_backward_kernel<Square, double>);
  else
    run_backward<Plain<Square<float>>>(args, call, 0, "logit_mse", passes_backward_kernel<Square, double>);
}

}  // namespace kdfast::cuda
