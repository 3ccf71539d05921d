// Squared difference of the logits on the CPU. Reads the student's and the teacher's logits; writes a loss and, with `center`,
// MseStat numbers a row, and the gradients. A class at -inf on both sides does not count.

namespace kdfast::cpu::KDFAST_ISA {
namespace {

template <class F, class S, class T>
struct LogitMse {
  using V = typename VecOf<F>::type;
  static constexpr F inf = F(__builtin_inf());

  // Whether a class takes part: not where both sides are at -inf.
  KDFAST_INLINE static IntOf<V> counts(V s, V t) { return (s != -inf) | (t != -inf); }

  // The row's mean difference, and the offset that one side's logits are read with (kl_math.h): the mean, then the mean of what
  // is left.
  static void mean_difference(const S* student, const T* teacher, int64_t classes, F* stat) {
    F s_offset = 0, t_offset = 0, mean = 0, count = 0;
    for (int pass = 0; pass < 2; ++pass) {
      Sum<V> total;
      V s_size{}, t_size{}, farthest{};
      IntOf<V> counted{};
      const auto add = [&](int64_t i, auto lanes) {
        const V s = load<V>(student + i, lanes, -inf), t = load<V>(teacher + i, lanes, -inf);
        const auto in = counts(s, t);
        const V left_or_nan = ((s - s_offset) - (t - t_offset)) - mean;
        total += in ? left_or_nan : V{};
        counted -= in;
        s_size = vmax(finite_magnitude(s), s_size);
        t_size = vmax(finite_magnitude(t), t_size);
        farthest = vmax(in ? left_or_nan * left_or_nan : V{}, farthest);
      };
      for_each_vector<V>(classes, 0, add, total);
      count = 0;
      for (int lane = 0; lane < kLanes<V>; ++lane) count += F(counted[lane]);
      const F left = total.value() / (count > 0 ? count : 1);
      mean += left;
      if (pass == 0) {
        const F s_largest = largest(s_size), t_largest = largest(t_size);
        const bool on_student = s_largest >= t_largest;
        const F offset = math::row_offset(left, on_student ? s_largest : t_largest);
        (on_student ? s_offset : t_offset) = on_student ? offset : -offset;
        mean -= offset;
      }
      if (largest(farthest) == inf) {  // infinite: around 0 so is the loss, and NaN only where a logit is NaN
        mean = 0;
        break;
      }
    }
    stat[MseStat::s_offset] = s_offset;
    stat[MseStat::t_offset] = t_offset;
    stat[MseStat::mean] = mean;
    stat[MseStat::inv_classes] = 1 / count;  // a row with no class left is NaN in the tau -> infinity limit, as at any tau
  }

  // The pass over a row's differences: writes the gradients that are wanted, and returns the sum of squares.
  template <bool for_student, bool for_teacher>
  static F pass(const LogitMseArgs& args, int64_t r, F weight, const F* stat) {
    const GradientRow<S> grad_student(args.grad_student, args.rows, r, args.student.data);
    const GradientRow<T> grad_teacher(args.grad_teacher, args.rows, r, args.student.data);
    if (weight == 0) {
      grad_student.zero(0);
      grad_teacher.zero(0);
      return 0;
    }
    const F factor = 2 * args.grad_loss.at(r, F(1)) * F(args.grad_scale) * weight * row_scale(args, stat);
    const F mean = stat[MseStat::mean], s_offset = stat[MseStat::s_offset], t_offset = stat[MseStat::t_offset];
    const S* student = row_of<S>(args.student, r);
    const T* teacher = row_of<T>(args.teacher, r);
    const int64_t head = for_student ? grad_student.template head<V>() : grad_teacher.template head<V>();
    Sum<V> total;
    const auto add = [&](int64_t i, auto lanes) {
      const V s = load<V>(student + i, lanes, -inf), t = load<V>(teacher + i, lanes, -inf);
      const V difference_or_nan = ((s - s_offset) - (t - t_offset)) - mean;
      const V d = counts(s, t) ? difference_or_nan : V{};
      total += d * d;
      if constexpr (for_student) grad_student.put(i, d * factor, lanes);
      if constexpr (for_teacher) grad_teacher.put(i, d * -factor, lanes);
    };
    for_each_vector<V>(args.classes, head, add, total);
    grad_student.zero(args.classes);
    grad_teacher.zero(args.classes);
    return total.value();
  }

  static F row_scale(const LogitMseArgs& args, const F* stat) {
    return F(args.scale) * (args.per_class ? stat[MseStat::inv_classes] : F(1));
  }

  template <bool gradient>
  static void forward(const LogitMseArgs& args, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      F stat[MseStat::count] = {};
      const F weight = args.weight.at(r, F(1));
      if (args.center && weight != 0)
        mean_difference(row_of<S>(args.student, r), row_of<T>(args.teacher, r), args.classes, stat);
      const F squares = pass<gradient, false>(args, r, weight, stat);
      static_cast<F*>(args.row_loss)[r] = weight != 0 ? squares * row_scale(args, stat) * weight : 0;
      copy_numbers(args.row_stats, r * MseStat::count, stat, MseStat::count);
    }
  }

  template <bool for_student, bool for_teacher>
  static void backward(const LogitMseArgs& args, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      F stat[MseStat::count] = {};
      if (args.row_stats) __builtin_memcpy(stat, static_cast<const F*>(args.row_stats) + r * MseStat::count, sizeof stat);
      pass<for_student, for_teacher>(args, r, args.weight.at(r, F(1)), stat);
    }
  }

  struct Forward {
    static void run(const LogitMseArgs& args, int64_t begin, int64_t end) {
      args.grad_student.data ? forward<true>(args, begin, end) : forward<false>(args, begin, end);
    }
  };
  struct Backward {
    static void run(const LogitMseArgs& args, int64_t begin, int64_t end) {
      if (!args.grad_teacher.data) return backward<true, false>(args, begin, end);
      args.grad_student.data ? backward<true, true>(args, begin, end) : backward<false, true>(args, begin, end);
    }
  };
};
template <class F, class S, class T>
using LogitMseForward = typename LogitMse<F, S, T>::Forward;
template <class F, class S, class T>
using LogitMseBackward = typename LogitMse<F, S, T>::Backward;

void logit_mse_forward(const LogitMseArgs& args, int64_t begin, int64_t end) { with_types<LogitMseForward>(args, begin, end); }
void logit_mse_backward(const LogitMseArgs& args, int64_t begin, int64_t end) {
  with_types<LogitMseBackward>(args, begin, end);
}

}  // namespace
}  // namespace kdfast::cpu::KDFAST_ISA
