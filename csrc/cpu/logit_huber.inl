// Robust difference of the logits on the CPU: the pseudo-Huber and the smooth L1 loss, by the rows of logit_mse.inl.

namespace kdfast::cpu::KDFAST_ISA {
namespace {

template <class F>
struct Huber {
  using V = typename VecOf<F>::type;
  using Args = LogitHuberArgs;
  using Stat = HuberStat;
  static constexpr bool kMeanSlope = true;
  static constexpr F inf = F(__builtin_inf()), most = sizeof(F) == 4 ? F(__FLT_MAX__) : F(__DBL_MAX__);

  bool smooth_l1;
  F delta, inv_delta, delta_squared, value_factor, slope_factor;

  explicit Huber(const Args& args)
      : smooth_l1(args.smooth_l1),
        delta(F(args.delta)),
        inv_delta(F(1 / args.delta)),
        delta_squared(delta * delta),
        value_factor(smooth_l1 ? F(1) : delta),
        slope_factor(value_factor) {}

  // NaN for NaN.
  KDFAST_INLINE static V clamp(V d, F bound) { return vmin(splat<V>(bound), vmax(splat<V>(-bound), d)); }
  // sqrt(d^2 + delta^2) where that does not overflow, else |d| (which is it, rounded).
  KDFAST_INLINE V root(V d) const {
    const V squared = d * d;
    return squared < inf ? vsqrt(squared + delta_squared) : (d < 0 ? -d : d);
  }
  KDFAST_INLINE V value(V d) const {
    if (smooth_l1) {
      const V near = clamp(d, delta);
      return near * inv_delta * (d - near * F(0.5));
    }
    const V finite = clamp(d, most);
    return d * (finite / (root(finite) + delta));  // delta (sqrt(1 + (d / delta)^2) - 1) without its cancellation
  }
  KDFAST_INLINE V slope(V d) const {
    if (smooth_l1) return clamp(d, delta) * inv_delta;
    const V finite = clamp(d, most);
    return finite / root(finite);
  }
};
template <class F, class S>
using LogitHuberForward = typename LogitDifference<Huber, NoHardPart, F, S>::Forward;
template <class F, class S>
using LogitHuberBackward = typename LogitDifference<Huber, NoHardPart, F, S>::Backward;

void logit_huber_forward(const LogitHuberArgs& args, int64_t begin, int64_t end) {
  with_types<LogitHuberForward>(args, begin, end);
}
void logit_huber_backward(const LogitHuberArgs& args, int64_t begin, int64_t end) {
  with_types<LogitHuberBackward>(args, begin, end);
}

}  // namespace
}  // namespace kdfast::cpu::KDFAST_ISA
