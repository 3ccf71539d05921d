// Robust difference of the logits on CUDA: the pseudo-Huber and the smooth L1 loss, by the rows of logit_difference.cuh
// or by none (joined_rows.cuh).
#include "joined_rows.cuh"

namespace kdfast::cuda {
namespace {

// NaN for NaN.
template <class F>
__device__ __forceinline__ F clamp(F d, F bound) {
  return d > bound ? bound : d < -bound ? -bound : d;
}
__device__ __forceinline__ float clamp(float d, float bound) {
  float x;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(d), "f"(bound));
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(x), "f"(-bound));
  return x;
}
__device__ __forceinline__ float reciprocal_root(float x) { return rsqrtf(x); }
__device__ __forceinline__ double reciprocal_root(double x) { return 1 / sqrt(x); }
__device__ __forceinline__ float quotient(float x, float y) { return __fdividef(x, y); }
__device__ __forceinline__ double quotient(double x, double y) { return x / y; }

// delta (sqrt(1 + (d / delta)^2) - 1) without its cancellation, times delta
template <class F>
struct Pseudo {
  using Args = LogitHuberArgs;
  using Stat = HuberStat;
  static constexpr bool kMeanSlope = true;
  // From here on sqrt(d^2 + delta^2) is |d|, rounded, and d^2 is yet finite.
  static constexpr F kFar = sizeof(F) == 4 ? F(1.8e19) : F(1.3e154);

  F delta, delta_squared, value_factor, slope_factor;

  explicit KDFAST_INLINE Pseudo(const Args& args)
      : delta(F(args.delta)), delta_squared(delta * delta), value_factor(delta), slope_factor(delta) {}
  __device__ __forceinline__ F squares(F near) const { return near * near + delta_squared; }
  __device__ __forceinline__ F value(F d) const {
    const F near = clamp(d, kFar), root = squares(near) * reciprocal_root(squares(near));
    return d * quotient(near, root + delta);
  }
  __device__ __forceinline__ F slope(F d) const {
    const F near = clamp(d, kFar);
    return near * reciprocal_root(squares(near));
  }
};

template <class F>
struct SmoothL1 {
  using Args = LogitHuberArgs;
  using Stat = HuberStat;
  static constexpr bool kMeanSlope = true;
  static constexpr F slope_factor = 1, value_factor = 1;

  F delta, inv_delta;

  explicit KDFAST_INLINE SmoothL1(const Args& args) : delta(F(args.delta)), inv_delta(F(1 / args.delta)) {}
  __device__ __forceinline__ F value(F d) const {
    const F near = clamp(d, delta);
    return near * inv_delta * (d - near * F(0.5));
  }
  __device__ __forceinline__ F slope(F d) const { return clamp(d, delta) * inv_delta; }
};

template <template <class> class ElementOf>
void forward(const LogitHuberArgs& args, const Call& call) {
  const auto kernel = is_wide(args.student.dtype, args.teacher.dtype) ? passes_forward_kernel<ElementOf, double>
                                                                      : passes_forward_kernel<ElementOf, float>;
  args.center ? run_forward<ByPasses<ElementOf<float>>>(args, call, HuberStat::count, "logit_huber", kernel)
              : run_uncentred_forward<ElementOf<float>>(args, call, "logit_huber", kernel);
}
template <template <class> class ElementOf>
void backward(const LogitHuberArgs& args, const Call& call) {
  const auto kernel = is_wide(args.student.dtype, args.teacher.dtype) ? passes_backward_kernel<ElementOf, double>
                                                                      : passes_backward_kernel<ElementOf, float>;
  args.center ? run_backward<ByPasses<ElementOf<float>>>(args, call, HuberStat::count, "logit_huber", kernel)
              : run_backward<Uncentred<ElementOf<float>>>(args, call, 0, "logit_huber", kernel);
}

}  // namespace

size_t workspace_bytes(const LogitHuberArgs& args) {
  return args.center ? workspace_bytes<ByPasses<Pseudo<float>>>(args, HuberStat::count)
                     : workspace_of_uncentred<Uncentred<Pseudo<float>>>(args);
}

void logit_huber_forward(const LogitHuberArgs& args, const Call& call) {
  args.smooth_l1 ? forward<SmoothL1>(args, call) : forward<Pseudo>(args, call);
}
void logit_huber_backward(const LogitHuberArgs& args, const Call& call) {
  args.smooth_l1 ? backward<SmoothL1>(args, call) : backward<Pseudo>(args, call);
}

}  // namespace kdfast::cuda
