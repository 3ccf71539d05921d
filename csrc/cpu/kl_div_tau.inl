// softmax-KL at temperature tau on the CPU. Reads the student's and the teacher's logits; writes a loss and KlStat numbers a row,
// and the gradients. kl_math.h has the formulas and the names.
//
// Forward goes over a row three times, and once more for a gradient; all but the first find the row in cache. The exponentials are
// kept in a scratch row rather than computed again.

namespace kdfast::cpu::KDFAST_ISA {
namespace {

template <class F>
struct KlTemperatures {
  F ratio, inv_tau, student_log2, teacher_log2;  // tau / teacher_tau, 1 / tau, log2(e) / tau, log2(e) / teacher_tau

  explicit KlTemperatures(const KlDivTauArgs& args) {
    constexpr double kLog2E = 1.4426950408889634;
    ratio = F(args.tau / args.teacher_tau);
    inv_tau = F(1 / args.tau);
    student_log2 = F(kLog2E / args.tau);
    teacher_log2 = F(kLog2E / args.teacher_tau);
  }
};

// One row's KlStat numbers and what is computed from them for each class. V is the vector type.
template <class F, class V>
struct KlRow : KlTemperatures<F> {
  F stat[KlStat::count] = {};

  explicit KlRow(const KlTemperatures<F>& temperatures) : KlTemperatures<F>(temperatures) {}

  KDFAST_INLINE V teacher_weight(V t) const {  // w; exactly 0 for a class at -inf and only there
    const V w = exp2_nonpositive<false>((t - stat[KlStat::t_max]) * this->teacher_log2);
    return t == -F(__builtin_inf()) ? V{} : w;
  }
  KDFAST_INLINE V student_weight(V s) const {  // v
    return exp2_nonpositive<true>((s - stat[KlStat::s_max]) * this->student_log2);
  }
  KDFAST_INLINE V difference(V s, V t) const {  // x
    return (((s - stat[KlStat::offset]) - this->ratio * t) - stat[KlStat::centre]) * this->inv_tau;
  }
};

// The pass for the maxima, and what follows from them.
template <class F, class V, class S, class T>
void find_reference(KlRow<F, V>& row, const S* student, const T* teacher, int64_t classes) {
  constexpr F inf = F(__builtin_inf());
  V s_max = splat<V>(-inf), t_max = splat<V>(-inf), s_at_t_max = splat<V>(-inf);
  for_each_vector<V>(classes, 0, [&](int64_t i, auto lanes) {
    const V s = load<V>(student + i, lanes, -inf), t = load<V>(teacher + i, lanes, -inf);
    s_at_t_max = t > t_max ? s : s_at_t_max;
    t_max = vmax(t, t_max);
    s_max = vmax(s, s_max);
  });
  F s_j = s_at_t_max[0], t_j = t_max[0];
  for (int lane = 1; lane < kLanes<V>; ++lane) {
    if (t_max[lane] > t_j) s_j = s_at_t_max[lane];
    t_j = t_max[lane] > t_j ? t_max[lane] : t_j;
  }
  const F s_top = reduce(s_max, [](F a, F b) { return a > b ? a : b; });
  if (s_j == -inf) s_j = row.ratio * t_j;  // the loss is infinite (the teacher has mass there): any finite reference will show it
  const F d = s_j - row.ratio * t_j;
  const bool exact = sizeof(S) == 2 && sizeof(T) == 2 && row.ratio == 1;  // sixteen bits a logit: differences are exact without it
  const F size = math::larger_magnitude(math::larger_magnitude(s_top, s_j), t_j);
  row.stat[KlStat::t_max] = t_j;
  row.stat[KlStat::s_max] = s_top;
  row.stat[KlStat::offset] = exact ? F(0) : math::row_offset(d, size);
  row.stat[KlStat::centre] = (s_j - row.stat[KlStat::offset]) - row.ratio * t_j;
  row.stat[KlStat::kl] = (s_top - s_j) * row.inv_tau;  // `rest` of the plain form, until the sums are known
}

// The passes for the sums. Leaves w and, where wanted, v in scratch rows.
template <class F, class V, class S, class T>
void sum_row(KlRow<F, V>& row, const S* student, const T* teacher, int64_t classes, F* kept_w, F* kept_v) {
  constexpr F inf = F(__builtin_inf());
  V s0{}, s1{}, z{};
  for_each_vector<V>(classes, 0, [&](int64_t i, auto lanes) {
    const V s = load<V>(student + i, lanes, -inf), t = load<V>(teacher + i, lanes, -inf);
    const V w = row.teacher_weight(t), v = row.student_weight(s);
    const V x = row.difference(s, t);
    s0 += w;
    z += v;
    s1 += w * (w == 0 ? V{} : x);  // 0 log 0
    store(kept_w + i, w, lanes);
    if (kept_v) store(kept_v + i, v, lanes);
  });
  const F inv_s0 = 1 / sum(s0), zs = sum(z), mean = sum(s1) * inv_s0;
  const F rest = row.stat[KlStat::kl], plain = math::log(zs * inv_s0) + rest - mean;
  row.stat[KlStat::mean] = mean;
  row.stat[KlStat::inv_s0] = inv_s0;
  row.stat[KlStat::inv_z] = 1 / zs;
  row.stat[KlStat::kl] = plain;
  if (!(plain < F(math::kStableBelow))) return;

  const F exp_of_reference = math::exp(rest - mean);  // w exp(x - m) = v times this: no overflow, and right where w underflows
  V excess{};                                         // sum w phi(x - m)
  for_each_vector<V>(classes, 0, [&](int64_t i, auto lanes) {
    const V s = load<V>(student + i, lanes, -inf), t = load<V>(teacher + i, lanes, -inf), w = load<V>(kept_w + i, lanes, 0);
    const V x = row.difference(s, t) - mean;
    const V centred = w == 0 ? V{} : x;
    const auto small = centred * centred < 1;
    V term = w * math::phi_series(centred);
    if (any(~small)) term = small ? term : row.student_weight(s) * exp_of_reference - w - w * centred;
    excess += term;
  });
  row.stat[KlStat::kl] = math::log1p(sum(excess) * inv_s0);
}

// The pass for the gradients. weights(i, lanes, s, t) gives w and v of a vector's classes.
template <class F, class V, class S, class T, class Weights>
void write_gradients(const KlRow<F, V>& row, const S* student, const T* teacher, int64_t classes, Weights weights, F student_factor,
                     F teacher_factor, const GradientRow<S>& grad_student, const GradientRow<T>& grad_teacher) {
  constexpr F inf = F(__builtin_inf());
  const F mean = row.stat[KlStat::mean], shift = mean + row.stat[KlStat::kl];
  const F p_student = row.stat[KlStat::inv_s0] * student_factor, q_student = row.stat[KlStat::inv_z] * student_factor;
  const F p_teacher = row.stat[KlStat::inv_s0] * teacher_factor;
  const int64_t head = grad_student ? grad_student.template head<V>() : grad_teacher.template head<V>();
  for_each_vector<V>(classes, head, [&](int64_t i, auto lanes) {
    const V s = load<V>(student + i, lanes, -inf), t = load<V>(teacher + i, lanes, -inf);
    const V w = weights.teacher(i, lanes, t), x = row.difference(s, t);
    if (grad_student) {
      const V z = x - shift, p = w * p_student;
      const auto small = z * z < 1;
      V g = p * math::expm1_series(z);
      if (any(~small)) g = small ? g : weights.student(i, lanes, s) * q_student - p;
      grad_student.put(i, g, lanes);
    }
    if (grad_teacher) grad_teacher.put(i, w == 0 ? V{} : w * p_teacher * (mean - x), lanes);
  });
  grad_student.zero(classes);
  grad_teacher.zero(classes);
}

template <class F, class S, class T>
struct KlDivTau {
  using V = typename VecOf<F>::type;

  struct Kept {
    const F *w, *v;
    template <class Lanes>
    KDFAST_INLINE V teacher(int64_t i, Lanes lanes, V) const {
      return load<V>(w + i, lanes, 0);
    }
    template <class Lanes>
    KDFAST_INLINE V student(int64_t i, Lanes lanes, V) const {
      return load<V>(v + i, lanes, 0);
    }
  };
  struct Recomputed {
    const KlRow<F, V>& row;
    template <class Lanes>
    KDFAST_INLINE V teacher(int64_t, Lanes, V t) const {
      return row.teacher_weight(t);
    }
    template <class Lanes>
    KDFAST_INLINE V student(int64_t, Lanes, V s) const {
      return row.student_weight(s);
    }
  };

  template <class Weights>
  static void gradients(const KlDivTauArgs& args, int64_t r, F weight, const KlRow<F, V>& row, Weights weights) {
    const GradientRow<S> grad_student(args.grad_student, args.rows, r, args.student.data);
    const GradientRow<T> grad_teacher(args.grad_teacher, args.rows, r, args.student.data);
    if (weight == 0) {
      grad_student.zero(0);
      grad_teacher.zero(0);
      return;
    }
    const F factor = args.grad_loss.at(r, F(1)) * F(args.grad_scale) * weight;
    write_gradients<F, V>(row, row_of<S>(args.student, r), row_of<T>(args.teacher, r), args.classes, weights,
                          factor * F(args.scale / args.tau), factor * F(args.scale / args.teacher_tau), grad_student, grad_teacher);
  }

  struct Forward {
    static void run(const KlDivTauArgs& args, int64_t begin, int64_t end) {
      const KlTemperatures<F> temperatures(args);
      const bool wants_gradient = args.grad_student.data || args.grad_teacher.data;
      Scratch<F> scratch(args.classes * (wants_gradient ? 2 : 1));
      F *w = scratch.data, *v = wants_gradient ? w + args.classes : nullptr;
      for (int64_t r = begin; r < end; ++r) {
        KlRow<F, V> row(temperatures);
        const F weight = args.weight.at(r, F(1));
        F loss = 0;
        if (weight != 0) {
          const S* student = row_of<S>(args.student, r);
          const T* teacher = row_of<T>(args.teacher, r);
          find_reference(row, student, teacher, args.classes);
          sum_row(row, student, teacher, args.classes, w, v);
          loss = row.stat[KlStat::kl] * F(args.scale) * weight;
        }
        static_cast<F*>(args.row_loss)[r] = loss;
        copy_numbers(args.row_stats, r * KlStat::count, row.stat, KlStat::count);
        if (wants_gradient) gradients(args, r, weight, row, Kept{w, v});
      }
    }
  };

  struct Backward {
    static void run(const KlDivTauArgs& args, int64_t begin, int64_t end) {
      const KlTemperatures<F> temperatures(args);
      for (int64_t r = begin; r < end; ++r) {
        KlRow<F, V> row(temperatures);
        __builtin_memcpy(row.stat, static_cast<const F*>(args.row_stats) + r * KlStat::count, sizeof row.stat);
        gradients(args, r, args.weight.at(r, F(1)), row, Recomputed{row});
      }
    }
  };
};
template <class F, class S, class T>
using KlDivTauForward = typename KlDivTau<F, S, T>::Forward;
template <class F, class S, class T>
using KlDivTauBackward = typename KlDivTau<F, S, T>::Backward;

void kl_div_tau_forward(const KlDivTauArgs& args, int64_t begin, int64_t end) { with_types<KlDivTauForward>(args, begin, end); }
void kl_div_tau_backward(const KlDivTauArgs& args, int64_t begin, int64_t end) { with_types<KlDivTauBackward>(args, begin, end); }

}  // namespace
}  // namespace kdfast::cpu::KDFAST_ISA
