// Sums over a row's differences of logits on the CPU: of their squares here, of another function of them in logit_huber.inl.
// Reads the student's and the teacher's logits; writes a loss and, with `center`, Element::Stat numbers a row, and the
// gradients. A class at -inf on both sides does not count.

namespace kdfast::cpu::KDFAST_ISA {
namespace {

// The function of a difference. Loss and slope are a row's constant times value(d) and slope(d).
template <class F, class ArgsOf = LogitMseArgs>
struct Square {
  using V = typename VecOf<F>::type;
  using Args = ArgsOf;
  using Stat = MseStat;
  static constexpr bool kMeanSlope = false;  // with `center` the slopes of a row add up to 0 by themselves
  static constexpr F value_factor = 1, slope_factor = 2;

  explicit Square(const Args&) {}
  KDFAST_INLINE V value(V d) const { return d * d; }
  KDFAST_INLINE V slope(V d) const { return d; }
};

template <class F>
using PlainSquare = Square<F>;

template <template <class> class ElementOf, template <class, class, class> class HardPart, class F, class S>
struct LogitDifference {
  using V = typename VecOf<F>::type;
  using Hard = HardPart<F, V, S>;
  using Element = ElementOf<F>;
  using Args = typename Element::Args;
  using Stat = typename Element::Stat;
  static constexpr int kStats = Stat::count + Hard::kStats;
  static constexpr F inf = F(__builtin_inf());

  // Whether a class takes part: not where both sides are at -inf.
  KDFAST_INLINE static IntOf<V> counts(V s, V t) { return (s != -inf) | (t != -inf); }

  // A class's difference less the row's mean, most of which is the offset. (Those of sixteen-bit logits are exact.)
  static constexpr bool kSixteenBits = sizeof(S) == 2;
  KDFAST_INLINE static V centred(V s, V t, F offset, F mean) {
    if constexpr (kSixteenBits) return ((s - t) - offset) - mean;
    return math::shifted_difference(s, t, offset, mean);
  }

  // The row's mean difference, in two parts: the offset, and the mean of what that leaves.
  static void mean_difference(Pointer<const S> student, Pointer<const S> teacher, int64_t classes, F* stat) {
    F offset = 0, mean = 0, count = 0;
    for (int pass = 0; pass < 2; ++pass) {
      Sum<V> total;
      V farthest{};
      IntOf<V> counted{};
      const auto add = [&](int64_t i, auto lanes) {
        const V s = load<V>(student + i, lanes, -inf), t = load<V>(teacher + i, lanes, -inf);
        const auto in = counts(s, t);
        const V left_or_nan = pass == 0 ? s - t : centred(s, t, offset, 0);
        total += in ? left_or_nan : V{};
        counted -= in;
        farthest = vmax(in ? magnitude(left_or_nan) : V{}, farthest);
      };
      for_each_vector<V>(0, classes, add, total);
      count = 0;
      for (int lane = 0; lane < kLanes<V>; ++lane) count += F(counted[lane]);
      (pass == 0 ? offset : mean) = total.value() / (count > 0 ? count : 1);
      if (largest(farthest) == inf) {  // infinite: around 0 so is the loss, and NaN only where a logit is NaN
        offset = mean = 0;
        break;
      }
    }
    stat[MseStat::s_offset] = offset;
    stat[MseStat::t_offset] = 0;
    stat[MseStat::mean] = mean;
    stat[MseStat::inv_classes] = 1 / count;  // a row with no class left is NaN in the tau -> infinity limit, as at any tau
  }

  // The pass over a row's differences: writes the gradients that are wanted, and returns the sum of the values; without
  // gradients that of the slopes too, where it is not 0. With for_teacher the student's gradient may be unwanted.
  template <bool for_student, bool for_teacher>
  static F pass(const Args& args, int64_t r, F weight, const F* stat, Hard& hard, F* slopes = nullptr) {
    GradientRow<S> grad_student, grad_teacher;
    if constexpr (for_student || for_teacher) {
      grad_student = GradientRow<S>(args.grad_student, args.rows, r, args.student.data);
      grad_teacher = GradientRow<S>(args.grad_teacher, args.rows, r, args.student.data);
    }
    if (weight == 0) {
      grad_student.zero(0);
      grad_teacher.zero(0);
      return 0;
    }
    const Element element(args);
    const F grad_row = args.grad_loss.at(r, F(1)) * weight;
    const F factor = element.slope_factor * grad_row * F(args.grad_scale) * row_scale(args, stat);
    if constexpr (Hard::kStats > 0 && (for_student || for_teacher)) {
      hard.scale(grad_row * F(args.hard_grad_scale));
      if (hard.alone) {
        hard.write_gradient(hard, grad_student);
        grad_teacher.zero(0);
        return pass<false, false>(args, r, weight, stat, hard);
      }
    }
    const F mean = stat[MseStat::mean], offset = stat[MseStat::s_offset];
    Pointer<const S> student = row_of<S>(args.student, r);
    Pointer<const S> teacher = row_of<S>(args.teacher, r);
    const GradientRow<S>& leading = for_teacher ? leading_row(grad_student, grad_teacher) : grad_student;
    const bool student_streamed = grad_student.streamed, teacher_streamed = grad_teacher.streamed;
    Sum<V> total, total_slope;
    const auto add = [&](int64_t i, auto lanes, bool past_caches) {
      const V s = load<V>(student + i, lanes, -inf), t = load<V>(teacher + i, lanes, -inf);
      const V difference_or_nan = centred(s, t, offset, mean);
      const V d = counts(s, t) ? difference_or_nan : V{};
      total += element.value(d);
      if constexpr (for_student || for_teacher || Element::kMeanSlope) {
        V slope = element.slope(d);
        if constexpr (!for_student && !for_teacher) total_slope += slope;
        if constexpr (Element::kMeanSlope) slope = counts(s, t) ? slope - stat[Stat::slope] : V{};
        if (for_student && (!for_teacher || grad_student)) {
          V g = slope * factor;
          if constexpr (Hard::kStats > 0)
            if (hard.writes) g += hard.gradient(hard, i, lanes, s);
          grad_student.put(i, g, lanes, past_caches && (!for_teacher || student_streamed));
        }
        if constexpr (for_teacher) grad_teacher.put(i, slope * -factor, lanes, past_caches && teacher_streamed);
      }
    };
    for_each_vector_of<V>(leading, args.classes, add, total, total_slope);
    grad_student.zero(args.classes);
    grad_teacher.zero(args.classes);
    if (slopes != nullptr) *slopes = total_slope.value();
    return total.value() * element.value_factor;
  }

  static F row_scale(const Args& args, const F* stat) {
    return F(args.scale) * (args.per_class ? stat[MseStat::inv_classes] : F(1));
  }

  template <bool gradient>
  static void forward(const Args& args, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      F stat[Stat::count] = {}, total = 0, slopes = 0;
      const F weight = args.weight.at(r, F(1));
      const bool centred = args.center && weight != 0, first_the_slopes = Element::kMeanSlope && centred;
      Hard hard(args, r, row_of<S>(args.student, r));
      if (weight != 0) hard.read_row();
      if (centred) mean_difference(row_of<S>(args.student, r), row_of<S>(args.teacher, r), args.classes, stat);
      if constexpr (Element::kMeanSlope)
        if (first_the_slopes) {
          total = pass<false, false>(args, r, weight, stat, hard, &slopes);
          stat[Stat::slope] = slopes * stat[Stat::inv_classes];
        }
      if (gradient && args.grad_teacher.data)
        total = pass<gradient, gradient>(args, r, weight, stat, hard);
      else if (gradient || !first_the_slopes)
        total = pass<gradient, false>(args, r, weight, stat, hard);
      hard.store_loss(args, r, weight, weight != 0 ? total * row_scale(args, stat) * weight : 0);
      copy_numbers(args.row_stats, r * kStats, stat, Stat::count);
      hard.store_stats(args.row_stats, r * kStats + Stat::count);
    }
  }

  template <bool for_teacher>
  static void backward(const Args& args, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      F stat[Stat::count] = {};
      Hard hard(args, r, row_of<S>(args.student, r));
      if (args.row_stats) {
        const F* stats = static_cast<const F*>(args.row_stats) + r * kStats;
        __builtin_memcpy(stat, stats, sizeof stat);
        hard.load_stats(stats + Stat::count);
      }
      pass<true, for_teacher>(args, r, args.weight.at(r, F(1)), stat, hard);
    }
  }

  struct Forward {
    static void run(const Args& args, int64_t begin, int64_t end) {
      args.grad_student.data ? forward<true>(args, begin, end) : forward<false>(args, begin, end);
    }
  };
  struct Backward {
    static void run(const Args& args, int64_t begin, int64_t end) {
      args.grad_teacher.data ? backward<true>(args, begin, end) : backward<false>(args, begin, end);
    }
  };
};
template <class F, class S>
using LogitMseForward = typename LogitDifference<PlainSquare, NoHardPart, F, S>::Forward;
template <class F, class S>
using LogitMseBackward = typename LogitDifference<PlainSquare, NoHardPart, F, S>::Backward;

void logit_mse_forward(const LogitMseArgs& args, int64_t begin, int64_t end) { with_types<LogitMseForward>(args, begin, end); }
void logit_mse_backward(const LogitMseArgs& args, int64_t begin, int64_t end) {
  with_types<LogitMseBackward>(args, begin, end);
}

}  // namespace
}  // namespace kdfast::cpu::KDFAST_ISA
