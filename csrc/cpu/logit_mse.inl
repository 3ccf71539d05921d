// Squared difference of the logits on the CPU. Reads the student's and the teacher's logits; writes a loss and, with `center`,
// MseStat numbers a row, and the gradients. A class at -inf on both sides does not count.

namespace kdfast::cpu::KDFAST_ISA {
namespace {

template <class F, class S, class T>
struct LogitMse {
  using V = typename VecOf<F>::type;
  static constexpr F inf = F(__builtin_inf());

  // d, and 0 for a class at -inf on both sides.
  template <class Lanes>
  KDFAST_INLINE static V difference(const S* student, const T* teacher, int64_t i, Lanes lanes) {
    const V s = load<V>(student + i, lanes, -inf), t = load<V>(teacher + i, lanes, -inf);
    return counts(s, t) ? s - t : V{};
  }
  KDFAST_INLINE static IntOf<V> counts(V s, V t) { return (s != -inf) | (t != -inf); }

  // The row's mean difference: the first difference, then the mean of what is left, then once more around that, so that rows far
  // apart lose no digits.
  static void mean_difference(const S* student, const T* teacher, int64_t classes, F* stat) {
    F first = 0, mean = 0, count = 0;
    for (int pass = 0; pass < 2; ++pass) {
      V total{};
      IntOf<V> counted{};
      const F around = pass == 0 ? first : mean;
      for_each_vector<V>(classes, 0, [&](int64_t i, auto lanes) {
        const V s = load<V>(student + i, lanes, -inf), t = load<V>(teacher + i, lanes, -inf);
        const auto in = counts(s, t);
        total += in ? (s - t) - around : V{};
        counted -= in;
      });
      count = 0;
      for (int lane = 0; lane < kLanes<V>; ++lane) count += F(counted[lane]);
      mean = around + sum(total) / (count > 0 ? count : 1);
    }
    stat[MseStat::mean] = mean;
    stat[MseStat::inv_classes] = 1 / count;  // a row with no class left is NaN in the tau -> infinity limit, as at any tau
  }

  static void gradients(const LogitMseArgs& args, int64_t r, F weight, const F* stat) {
    const GradientRow<S> grad_student(args.grad_student, args.rows, r, args.student.data);
    const GradientRow<T> grad_teacher(args.grad_teacher, args.rows, r, args.student.data);
    if (weight == 0) {
      grad_student.zero(0);
      grad_teacher.zero(0);
      return;
    }
    const F factor = 2 * args.grad_loss.at(r, F(1)) * F(args.grad_scale) * weight * row_scale(args, stat);
    const F mean = stat[MseStat::mean];
    const S* student = row_of<S>(args.student, r);
    const T* teacher = row_of<T>(args.teacher, r);
    const int64_t head = grad_student ? grad_student.template head<V>() : grad_teacher.template head<V>();
    for_each_vector<V>(args.classes, head, [&](int64_t i, auto lanes) {
      const V s = load<V>(student + i, lanes, -inf), t = load<V>(teacher + i, lanes, -inf);
      const V g = counts(s, t) ? ((s - t) - mean) * factor : V{};
      if (grad_student) grad_student.put(i, g, lanes);
      if (grad_teacher) grad_teacher.put(i, -g, lanes);
    });
    grad_student.zero(args.classes);
    grad_teacher.zero(args.classes);
  }

  static F row_scale(const LogitMseArgs& args, const F* stat) {
    return F(args.scale) * (args.per_class ? stat[MseStat::inv_classes] : F(1));
  }

  struct Forward {
    static void run(const LogitMseArgs& args, int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        F stat[MseStat::count] = {};
        const F weight = args.weight.at(r, F(1));
        F loss = 0;
        if (weight != 0) {
          const S* student = row_of<S>(args.student, r);
          const T* teacher = row_of<T>(args.teacher, r);
          if (args.center) mean_difference(student, teacher, args.classes, stat);
          const F mean = stat[MseStat::mean];
          V total{};
          for_each_vector<V>(args.classes, 0, [&](int64_t i, auto lanes) {
            const V s = load<V>(student + i, lanes, -inf), t = load<V>(teacher + i, lanes, -inf);
            const V d = counts(s, t) ? (s - t) - mean : V{};
            total += d * d;
          });
          loss = sum(total) * row_scale(args, stat) * weight;
        }
        static_cast<F*>(args.row_loss)[r] = loss;
        copy_numbers(args.row_stats, r * MseStat::count, stat, MseStat::count);
        if (args.grad_student.data || args.grad_teacher.data) gradients(args, r, weight, stat);
      }
    }
  };

  struct Backward {
    static void run(const LogitMseArgs& args, int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        F stat[MseStat::count] = {};
        if (args.row_stats) __builtin_memcpy(stat, static_cast<const F*>(args.row_stats) + r * MseStat::count, sizeof stat);
        gradients(args, r, args.weight.at(r, F(1)), stat);
      }
    }
  };
};
template <class F, class S, class T>
using LogitMseForward = typename LogitMse<F, S, T>::Forward;
template <class F, class S, class T>
using LogitMseBackward = typename LogitMse<F, S, T>::Backward;

void logit_mse_forward(const LogitMseArgs& args, int64_t begin, int64_t end) { with_types<LogitMseForward>(args, begin, end); }
void logit_mse_backward(const LogitMseArgs& args, int64_t begin, int64_t end) { with_types<LogitMseBackward>(args, begin, end); }

}  // namespace
}  // namespace kdfast::cpu::KDFAST_ISA
