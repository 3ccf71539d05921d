// softmax-KL at temperature tau on the CPU. Reads the student's and the teacher's logits; writes a loss and KlStat numbers a
// row, and the gradients. kl_math.h has the formulas and the names.
//
// Forward goes over a row once where it is plain (see `plain` below), else twice, and once more for the gradient; the row is in
// cache before the first pass, since the passes of the row before it fetch it. For the gradient the exponentials are kept in a
// scratch row, not computed again.

namespace kdfast::cpu::KDFAST_ISA {
namespace {

template <class F>
struct KlTemperatures {
  F ratio, inv_tau, student_log2, teacher_log2;  // tau / teacher_tau, 1 / tau, log2(e) / tau, log2(e) / teacher_tau
  bool equal;

  KlTemperatures() = default;
  explicit KlTemperatures(const KlDivTauArgs& args) {
    constexpr double kLog2E = 1.4426950408889634;
    ratio = F(args.tau / args.teacher_tau);
    inv_tau = F(1 / args.tau);
    student_log2 = F(kLog2E / args.tau);
    teacher_log2 = F(kLog2E / args.teacher_tau);
    equal = args.tau == args.teacher_tau;
  }
};

// One row: its logits and its KlStat numbers. The passes over it are not inlined: one large function of them all would be no
// faster and take the compiler longer.
template <class F, class V, class S>
struct KlRow {
  static constexpr F inf = F(__builtin_inf()), ln_2 = F(0.693147180559945309);
  static constexpr F kNarrow = sizeof(F) == 4 ? 2 : -1;  // the range of WidePhiSeries
  static constexpr F kMostFolded = 4096;
  static constexpr F kMostRest = 64;  // e^rest is far from infinity
  static constexpr F kMostMean = 16;  // beside the loss: four bits of it are given away
  static constexpr double ln_2_exactly = 0.693147180559945309;
  static constexpr bool kSixteenBits = sizeof(S) == 2;

  KlTemperatures<F> k;
  Pointer<const S> student{}, teacher{};
  int64_t classes = 0;
  F stat[KlStat::count] = {};
  F rest = 0;                                        // of the plain form
  F s0 = 0, s1 = 0, z = 0, excess = 0;               // the sums of w, w x, v and w phi(x)
  F kl = 0, exp_of_shift = 0;                        // e^-shift, of a narrow row
  F ww = 0;                                          // of a plain row: the sum of w^2
  F leading_ww = 0, leading_wv = 0, leading_vv = 0;  // and of the products in its leading vectors (Place)
  double exact_s0 = 0, exact_s1 = 0, exact_z = 0;    // its sums before they are rounded, which would show in its loss
  // Every |x| is at most kNarrow, no class masked, no w below 2^-kShortExp2Limit: then e^x comes from the series, and the
  // student's exponentials are not needed.
  bool narrow = false;
  // In a narrow row the constants under w are folded into one multiply-add, whose rounding is the same for every class: w is
  // 2^w_excess of what it should be. The row's ratios do not show it; the numbers that leave the row do.
  F folded_t_max = 0, w_excess = 0;
  // Student and teacher are not near each other, nothing is masked and no power too large: then loss and gradient lose nothing
  // in the plain form, which needs no maximum before the sums.
  bool plain = false;
  bool shifted = false;    // a constant between the two sides, larger than all differences from it
  bool recentred = false;  // x is zero at the mean, not at class j
  bool infinite = false;   // the student is at -inf where the teacher is not, be the mass there too small for a float

  KlRow() = default;
  KlRow(const KlTemperatures<F>& temperatures, int64_t n) : k(temperatures), classes(n) {}
  // Another row. (Not by assigning a new one, whose copy would wait for the writing of its members.)
  void begin(Pointer<const S> s, Pointer<const S> t) {
    student = s;
    teacher = t;
    kl = 0;
    for (F& number : stat) number = 0;
    plain = narrow = recentred = infinite = false;
  }

  template <class Lanes>
  KDFAST_INLINE V student_logits(int64_t i, Lanes lanes, F fill = -inf) const {
    return load<V>(student + i, lanes, fill);
  }
  template <class Lanes>
  KDFAST_INLINE V teacher_logits(int64_t i, Lanes lanes, F fill = -inf) const {
    return load<V>(teacher + i, lanes, fill);
  }
  KDFAST_INLINE V teacher_weight(V t) const {  // w
    return exp2_nonpositive((t - stat[KlStat::t_max]) * k.teacher_log2);
  }
  KDFAST_INLINE V student_weight(V s) const {  // v
    return exp2_nonpositive((s - stat[KlStat::s_max]) * k.student_log2);
  }
  // s - t - (centre + low). (Differences of sixteen-bit logits are exact, and low is 0.)
  static KDFAST_INLINE V centred(V s, V t, F centre, F low) {
    if constexpr (kSixteenBits) return (s - t) - centre;
    return math::shifted_difference(s, t, centre, low);
  }
  KDFAST_INLINE V difference(V s, V t) const {  // x
    if (!k.equal) return ((s - stat[KlStat::s_offset]) - k.ratio * (t - stat[KlStat::t_offset])) * k.inv_tau;
    return centred(s, t, stat[KlStat::centre], stat[KlStat::s_offset]) * k.inv_tau;
  }

  // The two tensors' powers in a plain row. The exponents are those of one temperature, log2(e) / student_log2, to the last
  // bit.
  template <bool precise = false>
  struct PlainPowers {
    PowersOf<precise> teacher, student;
    PlainPowers(const KlRow& row)
        : teacher(row.k.student_log2, row.stat[KlStat::t_max]), student(row.k.student_log2, row.stat[KlStat::s_max]) {}
  };
  // The fewest: more than a vector has lanes. Below kManyClasses the powers are precise, which lets more rows be plain: a short
  // row's loss lies near what a plain one must have, and the powers are a small part of its time.
  static constexpr int64_t kFewestClasses = 64, kManyClasses = 256;
  KDFAST_INLINE bool is_precise() const { return PowersFrom::kHasPrecise && classes < kManyClasses; }
  // Of a plain row's loss (finish_plain_row), relative: the error of a sum of many classes' terms, and, four times the usual
  // one, that of one class's (whose exponent is rounded where the multiply-adds are not fused); its share of the budget.
  static constexpr double kBias = 2e-8, kBudget = 2.5e-6, kLeastGradient = kFused ? 0.15 : 0.3;
  // Of the mean: where most classes have the same w, all partial sums of those may be rounded the same way.
  static constexpr double kBiasOfMean = 1.5e-7;
  static constexpr F kLeastFactor = F(0x1p-100f);  // of the powers in a gradient
  static constexpr double kLeastUneven = 1.0001;   // K sum p^2, which is 1 where all are alike
  double error_of_one() const { return is_precise() ? 2.2e-7 : kFused ? 4e-7 : 8e-7; }
  // The variance of the classes' differences, in units of tau, that such a row has where the logits are ordinary: twice its
  // loss, and about the square of its gradient.
  F least_variance() const {
    const F of_p = F(1.3) / __builtin_sqrtf(F(classes));  // a row of normal logits of deviation 0.7 tau: e^(0.7^2 / 2)
    const F of_loss = 2 * F((kBias + error_of_one() * of_p) / kBudget), of_gradient = F(kLeastGradient * kLeastGradient);
    return of_loss > of_gradient ? of_loss : of_gradient;
  }

  // Whether the row looks plain in a few of its classes. Leaves their largest logits in the place of the row's.
  bool guess_plain(F least_variance) {
    const F tau = 1 / k.inv_tau;
    V s, t, d[4];
    s = t = splat<V>(-inf);
    for (int i = 0; i < 4; ++i) {
      const int64_t at = classes / 4 * i;
      const V s_i = student_logits(at, Full{}), t_i = teacher_logits(at, Full{});
      s = vmax(s_i, s);
      t = vmax(t_i, t);
      d[i] = s_i - t_i;
    }
    const V first = d[0] - d[1], second = d[2] - d[3];
    const bool far = sum(first * first + second * second) > least_variance * 4 * kLanes<V> * tau * tau;
    stat[KlStat::s_max] = largest(s);
    stat[KlStat::t_max] = largest(t);
    return far;
  }

  // Calls body(place, s, t) with the logits of the vector at class i, or of the even and the odd classes of two.
  using Order = KeptOrder<kByPairs<V, S>>;
  template <class Lanes, class Body>
  static KDFAST_INLINE void each_vector(Pointer<const S> student, Pointer<const S> teacher, int64_t i, Lanes lanes, Order order,
                                        Body body) {
    if constexpr (kByPairs<V, S>) {
      const Pair<V> s = load_pair(student + i, lanes), t = load_pair(teacher + i, lanes);
      body(order.template place<true>(i, lanes), s.even, t.even);
      body(order.place(i + 1, Order::after(lanes)), s.odd, t.odd);
    } else {
      body(order.place(i, lanes), load<V>(student + i, lanes, 0), load<V>(teacher + i, lanes, 0));
    }
  }

  // sum_row of a plain row: keeps w and v. Sums w (s - t) in the place of w x, and the products that show how far p is from q.
  // Fetches another row and `to_write`. Writes an earlier row's gradient on the way, from the numbers that it puts its own in
  // the place of.
  template <bool precise, class Hard, class Gradient>
  __attribute__((noinline)) void sum_plain_row(F* kept_w, F* kept_v, F* kept_e, Order order, Hard& hard,
                                               Pointer<const S> next_student, Pointer<const S> next_teacher,
                                               Pointer<const S> to_write, const Gradient& gradient_of_earlier) {
    typename Hard::Sums hard_sums;
    const KlRow row(*this);  // where no store can touch it
    const PlainPowers<precise> powers(*this);
    const typename Hard::PlainExponentials exponentials(hard, powers.student);
    hard.start(stat[KlStat::s_max], exponentials.unit);
    const Hard hard_part(hard);
    const Gradient earlier(gradient_of_earlier);
    earlier.begin();
    Sum<V> sum_w, sum_wd, sum_v;
    V others_ww{}, leaders_ww{}, leaders_wv{}, leaders_vv{};
    const auto add = [&](const auto& place, V s, V t) __attribute__((always_inline)) {
      const V w = only(place.lanes, powers.teacher(t)), v = only(place.lanes, powers.student(s));
      sum_w += w;
      sum_wd += w * (s - t);
      sum_v += v;
      if constexpr (place.leads) {
        leaders_ww += w * w;
        leaders_wv += w * v;
        leaders_vv += v * v;
      } else {
        others_ww += w * w;
      }
      if (kept_w != nullptr) {
        store(kept_w + place.kept, w, Full{});
        store(kept_v + place.kept, v, Full{});
      }
      if constexpr (Hard::kStats > 0) hard_part.add_plain(exponentials, hard_sums, kept_e, place, s, v);
    };
    const auto add_all = [&](int64_t i, auto lanes) {
      __builtin_prefetch(address(next_student + i), 0, 3);
      __builtin_prefetch(address(next_teacher + i), 0, 3);
      __builtin_prefetch(address(to_write + i), 1, 3);
      earlier.write(i);
      each_vector(row.student, row.teacher, i, lanes, order, add);
    };
    for_each_vector<V, Order::kVectors>(0, classes, add_all, sum_w, sum_wd, sum_v, hard_sums);
    earlier.finish();
    bool within_range = true;
    if constexpr (Hard::kStats > 0) within_range = hard.finish_plain_row(hard_sums, kept_v, kept_e, order);
    const auto exact = sums(sum_w.carried, sum_wd.carried, sum_v.carried, VecD{});
    exact_s0 = exact.a;
    exact_s1 = exact.b;
    exact_z = within_range ? exact.c : inf;  // (no plain row)
    s0 = F(exact_s0);
    z = F(exact_z);
    const auto products = sums(others_ww + leaders_ww, leaders_ww, leaders_wv, leaders_vv);
    ww = products.a;
    leading_ww = products.b;
    leading_wv = products.c;
    leading_vv = products.d;
  }

  // The loss of a plain row, or false: where its loss is not large beside the errors of its terms, or its gradient beside
  // those of the probabilities.
  bool finish_plain_row() {
    if (!(s0 >= kLeastSum && z >= kLeastSum && s0 < kMostPower && z < kMostPower && ww < PowersFrom::kMostSquares &&
          leading_vv < PowersFrom::kMostSquares))
      return false;
    const PlainPowers<> powers(*this);
    const double inv_s0 = 1 / exact_s0, inv_z = 1 / exact_z, inv_tau = ln_2_exactly * k.student_log2;
    const double mean_d = exact_s1 * inv_s0, mean = mean_d * inv_tau;
    const double log_ratio = math::log(exact_z * inv_s0) + ln_2_exactly * (powers.student.origin - powers.teacher.origin);
    const double loss = log_ratio - mean, of_p = ww * inv_s0 * inv_s0;  // sum p^2
    const double size_of_mean = mean < 0 ? -mean : mean;
    const double error = (kBias + error_of_one() * __builtin_sqrtf(F(of_p))) * (1 + size_of_mean) + kBiasOfMean * size_of_mean;
    // sum (q - p)^2, of which the leading vectors have their share: at the worst it is half of this.
    const double of_leaders = (leading_vv * inv_z - 2 * leading_wv * inv_s0) * inv_z + leading_ww * inv_s0 * inv_s0;
    const double of_gradient = Order::kVectors * of_leaders;
    if (!(loss * kBudget > error && loss < kMostPower && of_gradient > kLeastGradient * kLeastGradient * of_p)) return false;
    // (Where the teacher's classes are all alike, every term and every partial sum may be rounded the same way.)
    if (of_p * double(classes) < kLeastUneven) return false;
    kl = F(loss);
    return true;
  }

  // Whether a gradient's factor of the powers, were it to be divided by a sum, would leave the normal numbers.
  bool underflows(F factor) const {
    const F size = factor < 0 ? -factor : factor;
    return size != 0 && (size < kLeastFactor * s0 || size < kLeastFactor * z);
  }

  // The pass for the maxima, and what follows from them. Fetches another row's teacher.
  __attribute__((noinline)) void find_reference(Pointer<const S> next_teacher) {
    V s_max = splat<V>(-inf), t_max = s_max, s_at_t_max = s_max, t_min = splat<V>(inf), d_max = s_max, d_min = t_min;
    // (What fills the last vector changes no extremum.)
    const F s_first = load<V>(student, First{1}, 0)[0], t_first = load<V>(teacher, First{1}, 0)[0];
    for_each_vector<V>(0, classes, [&](int64_t i, auto lanes) {
      __builtin_prefetch(address(next_teacher + i), 0, 2);
      const V s = student_logits(i, lanes, s_first), t = teacher_logits(i, lanes, t_first), d = s - t;
      s_at_t_max = t > t_max ? s : s_at_t_max;
      t_max = vmax(t, t_max);
      s_max = vmax(s, s_max);
      t_min = vmin(t, t_min);
      d_max = vmax(d, d_max);
      d_min = vmin(d, d_min);
    });
    const bool masked = any((d_min == -inf) | (t_min == -inf));
    const F s_top = largest(s_max), t_j = largest(t_max);
    if (masked) infinite = masks_more();
    F s_j = largest(t_max == t_j ? s_at_t_max : splat<V>(-inf));
    if (s_j == -inf)
      s_j = k.ratio * t_j;  // the loss is infinite (the teacher has mass there): any finite reference will show it
    stat[KlStat::t_max] = t_j;
    stat[KlStat::s_max] = s_top == -inf ? 0 : s_top;
    set_origin(s_j, t_j);
    const F reach = kNarrow / k.inv_tau, d_j = s_j - t_j;
    // (Beyond kMostFolded the rounding of the folded constant would not be small against 1.)
    folded_t_max = t_j * k.teacher_log2;
    narrow = k.equal && !masked && (t_j + largest(-t_min)) * k.teacher_log2 < F(kShortExp2Limit) &&
             folded_t_max * folded_t_max < kMostFolded * kMostFolded &&
             !any(vmax(d_max - d_j, d_j - d_min) <= reach ? IntOf<V>{} : ~IntOf<V>{});
    shifted = !kSixteenBits && !any(vmax(d_max - d_j, d_j - d_min) >= (d_j < 0 ? -d_j : d_j));
    if (narrow && kFused) w_excess = F(__builtin_fma(t_j, k.teacher_log2, -folded_t_max));
  }

  // x is zero where the logits are these. (At equal temperatures, which need no offset, s_offset is `low`.)
  void set_origin(F s, F t) {
    const F lost = math::lost_by(s - t, s, t), low = kSixteenBits || !(lost == lost) ? 0 : lost;
    stat[KlStat::s_offset] = k.equal ? low : s;
    stat[KlStat::t_offset] = k.equal ? 0 : t;
    stat[KlStat::centre] = k.equal ? s - t : 0;
    rest = difference(splat<V>(stat[KlStat::s_max]), splat<V>(stat[KlStat::t_max]))[0];
  }

  // Whether the student masks classes that the teacher does not.
  __attribute__((noinline)) bool masks_more() const {
    V missing = splat<V>(-inf);
    for_each_vector<V>(0, classes, [&](int64_t i, auto lanes) {
      const V s = student_logits(i, lanes), t = teacher_logits(i, lanes);
      missing = vmax(s == -inf ? t : splat<V>(-inf), missing);
    });
    return largest(missing) > -inf;
  }

  // A narrow row's weights, with its constants where no store can touch them.
  struct NarrowWeights {
    Pointer<const S> student, teacher;
    F teacher_log2, inv_tau, t_max, folded_t_max, centre, low;
    bool shifted;

    explicit NarrowWeights(const KlRow& row)
        : student(row.student),
          teacher(row.teacher),
          teacher_log2(row.k.teacher_log2),
          inv_tau(row.k.inv_tau),
          t_max(row.stat[KlStat::t_max]),
          folded_t_max(row.folded_t_max),
          centre(row.stat[KlStat::centre]),
          low(row.stat[KlStat::s_offset]),
          shifted(row.shifted) {}

    template <class Lanes>
    KDFAST_INLINE void read(int64_t i, Lanes lanes, V& w, V& x) const {
      if constexpr (sizeof(F) == 4) {
        const V s = load<V>(student + i, lanes, 0), t = load<V>(teacher + i, lanes, t_max);
        const V d = shifted ? centred(s, t, centre, low) : (s - t) - centre;
        w = short_exp2(kFused ? multiply_subtract(t, teacher_log2, folded_t_max) : (t - t_max) * teacher_log2);
        w = only(lanes, w);
        x = only(lanes, d * inv_tau);
      }
    }
    // w, and u = w (e^x - 1) from the series.
    template <class Lanes>
    KDFAST_INLINE void operator()(int64_t i, Lanes lanes, V& w, V& u, V& wx, V& w_phi) const {
      V x;
      read(i, lanes, w, x);
      wx = w * x;
      w_phi = wx * x * math::polynomial<math::WidePhiSeries>(x);
      u = wx + w_phi;
    }
  };

  // sum_row of a narrow row: keeps w and u.
  template <class Hard>
  __attribute__((noinline)) void sum_narrow_row(F* kept_w, F* kept_u, F* kept_e, Hard& hard, Pointer<const S> next_student,
                                                Pointer<const S> to_write) {
    typename Hard::Sums hard_sums;
    const NarrowWeights weights(*this);
    const F exp_back = math::exp(-rest) * (1 - w_excess * ln_2);  // v = w e^x e^-rest
    Sum<V> sum_w, sum_wx, sum_w_phi;
    const auto add = [&](int64_t i, auto lanes) {
      __builtin_prefetch(address(next_student + i), 0, 2);
      __builtin_prefetch(address(to_write + i), 1, 3);
      V w, u, wx, w_phi;
      weights(i, lanes, w, u, wx, w_phi);
      sum_w += w;
      sum_wx += wx;
      sum_w_phi += w_phi;
      if (kept_w != nullptr) {
        store(kept_w + i, w, lanes);
        store(kept_u + i, u, lanes);
      }
      if constexpr (Hard::kStats > 0) hard.add(hard_sums, kept_e, i, lanes, student_logits(i, lanes), (w + u) * exp_back);
    };
    for_each_vector<V>(0, classes, add, sum_w, sum_wx, sum_w_phi, hard_sums);
    if constexpr (Hard::kStats > 0) hard.finish_row(hard_sums, kept_e);
    s0 = sum_w.value();
    s1 = sum_wx.value();
    excess = sum_w_phi.value();
  }

  // The pass for the sums, the hard part's too. Keeps w, v and the hard part's exponentials where there are scratch rows for
  // them, and fetches another row's student and `to_write`, where the gradient goes.
  template <class Hard>
  __attribute__((noinline)) void sum_row(F* kept_w, F* kept_v, F* kept_e, Hard& hard, Pointer<const S> next_student,
                                         Pointer<const S> to_write) {
    typename Hard::Sums hard_sums;
    const KlRow row(*this);              // where no store can touch it
    const F exp_rest = math::exp(rest);  // w e^x = v e^rest
    Sum<V> sum_w, sum_wx, sum_v, sum_w_phi;
    const auto add = [&](int64_t i, auto lanes) {
      __builtin_prefetch(address(next_student + i), 0, 2);
      __builtin_prefetch(address(to_write + i), 1, 3);
      const V s = row.student_logits(i, lanes), t = row.teacher_logits(i, lanes);
      const V w = row.teacher_weight(t), v = row.student_weight(s), difference_or_nan = row.difference(s, t);
      const V x = w == 0 ? V{} : difference_or_nan;  // 0 log 0
      const V wx = w * x;
      sum_w += w;
      sum_wx += wx;
      sum_v += v;
      // A class that the teacher masks has no w, but its v counts: its difference is not below 1, being infinite or NaN.
      sum_w_phi += difference_or_nan * difference_or_nan < 1 ? w * math::phi_series(x) : (v * exp_rest - w) - wx;
      if (kept_w != nullptr) {
        store(kept_w + i, w, lanes);
        store(kept_v + i, v, lanes);
      }
      if constexpr (Hard::kStats > 0) hard.add(hard_sums, kept_e, i, lanes, s, v);
    };
    for_each_vector<V>(0, classes, add, sum_w, sum_wx, sum_v, sum_w_phi, hard_sums);
    if constexpr (Hard::kStats > 0) hard.finish_row(hard_sums, kept_e);
    s0 = sum_w.value();
    s1 = sum_wx.value();
    z = sum_v.value();
    excess = sum_w_phi.value();
  }

  // The row's numbers from its sums; or false, where the stable form around class j would lose digits (three bits are given
  // away) or overflow, because j is far off the mean: then the row is to be summed once more around the mean.
  bool finish_row() {
    if constexpr (sizeof(F) == 4)
      if (narrow) return finish_narrow_row();
    return finish_any_row();
  }
  // Always in the stable form, and without a call: e^-m is in the reach of the series.
  bool finish_narrow_row() {
    const F inv_s0 = 1 / s0, mean = s1 * inv_s0, phi_mean = mean * mean * math::polynomial<math::WidePhiSeries>(mean);
    const F centred = excess * inv_s0 - phi_mean;
    const F exp_of_mean = mean * mean * math::polynomial<math::WidePhiSeries>(-mean) - mean + 1;
    stat[KlStat::mean] = mean;
    stat[KlStat::inv_s0] = inv_s0;
    if (centred < phi_mean / 8) return false;
    const F growth_of_kl = exp_of_mean * centred;  // e^KL - 1
    kl = growth_of_kl < F(0.5) ? math::log1p_series(growth_of_kl) : math::log1p(growth_of_kl);
    stat[KlStat::shift] = mean + kl;
    exp_of_shift = exp_of_mean / (1 + growth_of_kl);
    return true;
  }
  bool finish_any_row() {
    const F inv_s0 = 1 / s0, finite_mean = s1 * inv_s0;
    const F mean = infinite && finite_mean == finite_mean ? -inf : finite_mean;
    if (z == 0) z = 1;  // the student is at -inf everywhere: the mean makes the loss infinite
    const F log_ratio = math::log(z * inv_s0) + rest;
    stat[KlStat::inv_z] = 1 / z;
    stat[KlStat::mean] = mean;
    stat[KlStat::inv_s0] = inv_s0;
    kl = log_ratio - mean;
    stat[KlStat::shift] = log_ratio;
    // The mean is far off beside the loss: x about class j is large nearly everywhere.
    const F most_mean = kMostMean * (kl > F(0.25) ? kl : F(0.25)), size_of_mean = mean < 0 ? -mean : mean;
    if (!recentred && size_of_mean > most_mean && size_of_mean < inf) return false;
    if (kl < F(math::kStableBelow)) {
      const F phi_mean = math::phi(mean), centred = excess * inv_s0 - phi_mean;
      if (!recentred && !(centred >= phi_mean / 8)) return false;
      kl = math::log1p(math::exp(-mean) * centred);
      if (kl < 0) kl = 0;  // rounding, where nearly nothing is left
      stat[KlStat::shift] = mean + kl;
    }
    // Classes alike on both sides that have the mass, and one of little mass far off: either form loses the shift's digits.
    const F shift = stat[KlStat::shift], size_of_shift = shift < 0 ? -shift : shift;
    if (rest < kMostRest && size_of_shift < size_of_mean / 8) stat[KlStat::shift] = shift_of_differences();
    return true;
  }
  // Makes x zero at its mean, which the sums have shown, instead of class j.
  void recentre() {
    const F mean = stat[KlStat::mean], t_j = stat[KlStat::t_max], s_j = stat[KlStat::s_max] - rest / k.inv_tau;
    set_origin(s_j + mean / k.inv_tau, t_j);
    narrow = false;  // the differences may be twice as large
    recentred = true;
  }

  void store_stats(void* to, int64_t at) const {
    if (to == nullptr) return;
    F left[KlStat::count];
    __builtin_memcpy(left, stat, sizeof left);
    if (narrow) {
      left[KlStat::inv_s0] += left[KlStat::inv_s0] * w_excess * ln_2;
      left[KlStat::inv_z] = left[KlStat::inv_s0] * math::exp(rest) * exp_of_shift;  // S0 / Z = e^(rest - R)
    }
    copy_numbers(to, at, left, KlStat::count);
  }

  // The shift from the classes' own differences, log1p(sum w (e^x - 1) / S0): those that have the mass, alike on both sides,
  // add nothing to it. Another pass.
  __attribute__((noinline)) F shift_of_differences() const {
    const F exp_rest = math::exp(rest);
    Sum<V> growth;
    const auto add = [&](int64_t i, auto lanes) {
      const V s = student_logits(i, lanes), t = teacher_logits(i, lanes), w = teacher_weight(t), x = difference(s, t);
      growth += x * x < 1 ? w * math::expm1_series(x) : student_weight(s) * exp_rest - w;
    };
    for_each_vector<V>(0, classes, add, growth);
    return math::log1p(growth.value() * stat[KlStat::inv_s0]);
  }

  // The pass for the student's gradient in a narrow row: q - p = p expm1(x - shift) = p (e^-shift (e^x - 1) + (e^-shift - 1)),
  // as good as x itself where |shift| is no more than a few. each(i, lanes, w, u) sets w and u.
  template <class Each, class Weights, class Hard>
  void write_narrow_gradient(Each each, Weights weights, const Hard& hard, F factor, const GradientRow<S>& grad_student) const {
    const F p = stat[KlStat::inv_s0] * factor, back = -stat[KlStat::shift];
    const F by_u = p * exp_of_shift, by_w = p * (back * back < 1 ? math::expm1_series(back) : exp_of_shift - 1);
    const auto write = [&](int64_t i, auto lanes, bool past_caches) {
      V w, u;
      each(i, lanes, w, u);
      V g = u * by_u + w * by_w;
      if constexpr (Hard::kStats > 0)
        if (hard.writes) g += hard.gradient(weights, i, lanes, student_logits(i, lanes));
      grad_student.put(i, g, lanes, past_caches);
    };
    for_each_vector_of<V>(grad_student, classes, write);
    grad_student.zero(classes);
  }

  // The pass for the gradients: the student's where it is wanted, the teacher's where `for_teacher`. weights.teacher(i, lanes,
  // t) and weights.student(i, lanes, s) are w and v.
  template <bool for_teacher, class Weights, class Hard>
  void write_gradients(Weights weights, const Hard& hard, F student_factor, F teacher_factor, GradientRow<S>& grad_student,
                       GradientRow<S>& grad_teacher) const {
    const KlRow row(*this);  // where no store can touch it
    const F mean = stat[KlStat::mean], shift = stat[KlStat::shift], near_limit = math::near_limit(mean, shift);
    const F p_student = stat[KlStat::inv_s0] * student_factor, q_student = stat[KlStat::inv_z] * student_factor;
    const F p_teacher = stat[KlStat::inv_s0] * teacher_factor;
    const bool for_student = !for_teacher || grad_student;
    const GradientRow<S>& leading = for_teacher ? leading_row(grad_student, grad_teacher) : grad_student;
    const bool student_streamed = grad_student.streamed, teacher_streamed = grad_teacher.streamed;
    for_each_vector_of<V>(leading, classes, [&](int64_t i, auto lanes, bool past_caches) {
      const V s = row.student_logits(i, lanes), t = row.teacher_logits(i, lanes);
      const V w = weights.teacher(i, lanes, t), x = row.difference(s, t);
      if (for_student) {
        const V z = x - shift, p = w * p_student;
        const V near = p * math::expm1_series(z), far = weights.student(i, lanes, s) * q_student - p;
        V g = z * z < near_limit ? near : far;
        if constexpr (Hard::kStats > 0)
          if (hard.writes) g += hard.gradient(weights, i, lanes, s);
        grad_student.put(i, g, lanes, past_caches && (!for_teacher || student_streamed));
      }
      if constexpr (for_teacher) {
        const V g = w * p_teacher * (mean - x);
        grad_teacher.put(i, w == 0 ? V{} : g, lanes, past_caches && teacher_streamed);
      }
    });
    grad_student.zero(classes);
    grad_teacher.zero(classes);
  }
};

template <bool>
struct Precise {};

template <class Args, template <class, class, class> class HardPart, class F, class S>
struct KlDivTau {
  using V = typename VecOf<F>::type;
  using Row = KlRow<F, V, S>;
  using Hard = HardPart<F, V, S>;
  static constexpr int kStats = KlStat::count + Hard::kStats;

  struct Kept {
    static constexpr bool kept = true;
    const F *w, *v, *e;
    template <class Lanes>
    KDFAST_INLINE V teacher(int64_t i, Lanes lanes, V) const {
      return load<V>(w + i, lanes, 0);
    }
    template <class Lanes>
    KDFAST_INLINE V student(int64_t i, Lanes lanes, V) const {
      return load<V>(v + i, lanes, 0);
    }
    template <class Lanes>
    KDFAST_INLINE V exponential(const Hard&, int64_t i, Lanes lanes, V) const {
      return load<V>(e + i, lanes, 0);
    }
  };
  struct Recomputed {
    static constexpr bool kept = false;
    const Row row;
    template <class Lanes>
    KDFAST_INLINE V teacher(int64_t, Lanes, V t) const {
      return row.teacher_weight(t);
    }
    template <class Lanes>
    KDFAST_INLINE V student(int64_t, Lanes, V s) const {
      return row.student_weight(s);
    }
    template <class Lanes>
    KDFAST_INLINE V exponential(const Hard& hard, int64_t, Lanes, V s) const {
      return hard.exponential(s);
    }
  };

  // The same of a plain row.
  struct KeptPlain {
    static constexpr bool kept = true;
    const F *w = nullptr, *v = nullptr, *e = nullptr;
    template <class Place>
    KDFAST_INLINE V teacher(const Place& place, V) const {
      return load<V>(w + place.kept, place.lanes, 0);
    }
    template <class Place>
    KDFAST_INLINE V student(const Place& place, V) const {
      return load<V>(v + place.kept, place.lanes, 0);
    }
    template <class Place>
    KDFAST_INLINE V exponential(const Place& place, V) const {
      return load<V>(e + place.kept, place.lanes, 0);
    }
  };
  struct RecomputedPlain {
    static constexpr bool kept = false;
    typename Row::template PlainPowers<> powers;
    typename Hard::PlainExponentials exponentials;

    RecomputedPlain(const Row& row, const Hard& hard) : powers(row), exponentials(hard, powers.student) {}
    template <class Place>
    KDFAST_INLINE V teacher(const Place& place, V t) const {
      return only(place.lanes, powers.teacher(t));
    }
    template <class Place>
    KDFAST_INLINE V student(const Place& place, V s) const {
      return only(place.lanes, powers.student(s));
    }
    template <class Place>
    KDFAST_INLINE V exponential(const Place& place, V s) const {
      return only(place.lanes, exponentials(s, powers.student(s)));
    }
  };

  template <bool for_teacher, class Weights>
  __attribute__((noinline)) static void gradients(const Args& args, int64_t r, F weight, const Row& row, Hard& hard,
                                                  Weights weights) {
    GradientRow<S> grad_student(args.grad_student, args.rows, r, args.student.data);
    GradientRow<S> grad_teacher(args.grad_teacher, args.rows, r, args.student.data);
    if (weight == 0) {
      grad_student.zero(0);
      grad_teacher.zero(0);
      return;
    }
    const F grad_row = args.grad_loss.at(r, F(1)) * weight, factor = grad_row * F(args.grad_scale);
    if constexpr (Hard::kStats > 0) {
      hard.scale(grad_row * F(args.hard_grad_scale));
      if (hard.alone) {
        hard.write_gradient(weights, grad_student);
        grad_teacher.zero(0);
        return;
      }
    }
    row.template write_gradients<for_teacher>(weights, hard, factor * F(args.scale / args.tau),
                                              factor * F(args.scale / args.teacher_tau), grad_student, grad_teacher);
  }

  template <class Weights>
  __attribute__((noinline)) static void narrow_gradient(const Args& args, int64_t r, F weight, const Row& row, Hard& hard,
                                                        Weights weights) {
    const typename Row::NarrowWeights narrow(row);
    const auto each = [&](int64_t i, auto lanes, V& w, V& u) {
      if constexpr (Weights::kept) {
        w = load<V>(weights.w + i, lanes, 0);
        u = load<V>(weights.v + i, lanes, 0);
      } else {
        V wx, w_phi;
        narrow(i, lanes, w, u, wx, w_phi);
      }
    };
    const F grad_row = args.grad_loss.at(r, F(1)) * weight;
    const GradientRow<S> grad_student(args.grad_student, args.rows, r, args.student.data);
    if constexpr (Hard::kStats > 0) {
      hard.scale(grad_row * F(args.hard_grad_scale));
      if (hard.alone) return hard.write_gradient(weights, grad_student);
    }
    row.write_narrow_gradient(each, weights, hard, grad_row * F(args.grad_scale) * F(args.scale / args.tau), grad_student);
  }

  // The student's gradient of a plain row, a vector at a time (or two). The two multiply-adds are spelt out: whichever function
  // this is part of, the bits are the same. (The factors are vectors in memory: registers are scarce, and to make one of a
  // number would take an instruction of the kind that the powers are made of.)
  template <class Weights>
  struct PlainGradient {
    Weights weights;
    typename Hard::PlainGradient hard{};
    GradientRow<S> grad_student{};
    Pointer<const S> student{}, teacher{};
    typename Row::Order order{};
    int64_t classes = 0;
    V minus_p{}, q{};

    PlainGradient() = default;
    explicit PlainGradient(const Weights& weights) : weights(weights) {}
    // (Not by a constructor: a copy, by vectors, would wait for the writing of the numbers.)
    void set(const Args& args, int64_t r, F weight, const Row& row, const Hard& hard_part, typename Row::Order order_of_kept) {
      hard.set(hard_part);
      grad_student = GradientRow<S>(args.grad_student, args.rows, r, args.student.data);
      student = row.student;
      teacher = row.teacher;
      order = order_of_kept;
      classes = row.classes;
      minus_p = q = V{};
      if (hard_part.alone) return;
      const F factor = args.grad_loss.at(r, F(1)) * weight * F(args.grad_scale) * F(args.scale / args.tau);
      minus_p = splat<V>(-(factor / row.s0));
      q = splat<V>(factor / row.z);
    }
    // Counts the row's classes from another.
    void start_at(int64_t first) {
      hard.start_at(first);
      student = student + first;
      teacher = teacher + first;
      grad_student.data = grad_student.data + first;
      grad_student.width -= first;
      order = order.from(first);
      classes -= first;
    }
    template <class Place>
    KDFAST_INLINE V at(const Place& place, V s, V t) const {
      const V v = weights.student(place, s);
      V g = multiply_add(weights.teacher(place, t), minus_p, hard.minus_elsewhere);
      g = multiply_add(v, q, g);
      if constexpr (Hard::kStats > 0) g = hard.add(g, weights, place, s, v);
      return g;
    }
    template <class Lanes>
    KDFAST_INLINE void operator()(int64_t i, Lanes lanes, bool past_caches) const {
      if constexpr (kByPairs<V, S>) {
        Pair<V> s{}, t{};
        if constexpr (!Weights::kept) {
          s = load_pair(student + i, lanes);
          t = load_pair(teacher + i, lanes);
        }
        const Pair<V> g{at(order.place(i, lanes), s.even, t.even), at(order.place(i + 1, order.after(lanes)), s.odd, t.odd)};
        grad_student.put(i, g, lanes, past_caches);
      } else {
        V s{}, t{};
        if constexpr (!Weights::kept) {
          s = load<V>(student + i, lanes, 0);
          t = load<V>(teacher + i, lanes, 0);
        }
        grad_student.put(i, at(order.place(i, lanes), s, t), lanes, past_caches);
      }
    }
  };

  template <class Weights>
  __attribute__((noinline)) static void plain_gradient(const PlainGradient<Weights>& gradient) {
    const PlainGradient<Weights> write(gradient);  // where no store can touch it
    constexpr int vectors = Row::Order::kVectors;
    if (write.grad_student.streamed)
      for_each_vector_of<V, vectors>(write.grad_student, write.classes, write);
    else  // the same from class 0 on, from where the compiler knows which vectors are even
      for_each_vector<V, vectors>(0, write.classes, [&](int64_t i, auto lanes) { write(i, lanes, false); });
    write.grad_student.zero(write.classes);
  }

  // A plain row's gradient left to be written by the pass for another's sums (`end` > 0): its way past the caches, into which
  // a pass for the gradient alone would put a vector faster than memory takes it, then lies beside their arithmetic. Whole
  // cache lines at a time: one begun and left would go to memory in parts.
  template <class Weights>
  struct Postponed {
    // Not where a loop has 16 registers, which the two together lack: short rows were slower for it. (Nor those of pairs of two
    // types, or of float16, whose code would be compiled for little use. And computed again, of float32 alone: bfloat16 waits
    // for its arithmetic, not for memory.)
    static constexpr bool kWanted = kLanes<V> == 16 && (sizeof(S) == 4 || (__is_same(S, BF16) && Weights::kept));
    static constexpr int64_t kLine = Row::Order::kVectors * kLanes<V>;  // classes

    PlainGradient<Weights> gradient;
    int64_t head = 0, end = 0;  // classes before the first whole line, and from there on

    Postponed() = default;
    explicit Postponed(const Weights& weights) : gradient(weights) {}
    // Of the gradient that has been set.
    void start() {
      head = gradient.grad_student.before_line();  // (A plain row has more classes.)
      end = gradient.classes - head;
      gradient.start_at(head);
      __builtin_prefetch(address(gradient.grad_student.data + (end - 1)), 1, 3);
    }
    void begin() const {
      if (head > 0) write_part(gradient, -head, 0);
    }
    // In time for the numbers at class i and after it to be replaced.
    KDFAST_INLINE void write(int64_t i) const {
      if (i + kLine > end) return write_part(gradient, i, end);
      gradient(i, Full{}, true);
    }
    // A part of a line. (Of a copy, so that the loop may keep its own in registers.)
    __attribute__((noinline)) static void write_part(PlainGradient<Weights> gradient, int64_t i, int64_t stop) {
      for_each_vector<V, Row::Order::kVectors>(i, stop, [&](int64_t k, auto lanes) { gradient(k, lanes, false); });
    }
    void finish() const { gradient.grad_student.zero(end); }
  };
  struct NothingPostponed {
    void begin() const {}
    KDFAST_INLINE void write(int64_t) const {}
    void finish() const {}
  };
  template <class Weights>
  static void write_postponed(Postponed<Weights>& postponed) {
    if constexpr (Postponed<Weights>::kWanted)
      if (postponed.end > 0) {
        postponed.begin();
        plain_gradient(postponed.gradient);
      }
    postponed.end = 0;
  }

  // Short rows go through each pass together: what a row waits for between two passes is then another row's work.
  static constexpr int kTogether = 16, kTogetherBytes = 4 << 10;  // of the student's logits
  static constexpr int kKeptRows = Hard::kStats > 0 ? 3 : 2;
  // Rows longer than this (with their logits) do not keep w and v, which would drive the logits too far from the cache. Sooner
  // where the gradient that is computed again can be postponed: the logits that it reads are then half of what would be kept.
  static constexpr int64_t kKeptBytes = Postponed<RecomputedPlain>::kWanted ? 5 << 18 : 5 << 19;
  // How far ahead, in classes, a row is then fetched into the cache: not the next row, beside two others.
  static constexpr int64_t kAhead = 1024;

  // Writes the student's gradient too, where it is wanted; unless `keep`, the teacher's beside it.
  static void forward(const Args& args, int64_t begin, int64_t end, bool keep) {
    const KlTemperatures<F> temperatures(args);
    const int64_t classes = args.classes, most = kTogetherBytes / (classes * bytes_each(args.student.dtype));
    const int64_t together = most < 1 ? 1 : most > kTogether ? kTogether : most;
    const bool for_teacher = args.grad_teacher.data != nullptr;
    // (Short rows have too few pairs to pay for its numbers. A plain row leaves no stats: the teacher's gradient and a gradient
    // recomputed need more digits of some.)
    const bool may_be_plain =
        sizeof(F) == 4 && temperatures.equal && classes >= Row::kFewestClasses && !for_teacher && args.row_stats == nullptr;
    const F least_variance = Row(temperatures, classes).least_variance();
    // Long rows whose gradient needs the logits again: two of the next row's would drive them out of the cache.
    const bool reads_again = args.grad_student.data != nullptr && !keep;
    const bool fetches_ahead = reads_again && Postponed<RecomputedPlain>::kWanted;
    constexpr int64_t step = Row::Order::kVectors * kLanes<V>;
    const int64_t stride = (classes + step - 1) / step * step;  // no vector across two cache lines
    const typename Row::Order order{stride / 2};
    Scratch<F> scratch(keep ? together * stride * kKeptRows : 0);
    F weight[kTogether];
    Row rows[kTogether];
    Hard hard[kTogether];
    Postponed<KeptPlain> postponed[kTogether];
    const auto kept = [&](int64_t i, int which) { return keep ? scratch.data + (kKeptRows * i + which) * stride : nullptr; };
    const auto kept_w = [&](int64_t i) { return kept(i, 0); };
    const auto kept_v = [&](int64_t i) { return kept(i, 1); };
    const auto kept_e = [&](int64_t i) { return kept(i, kKeptRows - 1); };
    for (int64_t i = 0; i < together; ++i) {
      rows[i] = Row(temperatures, classes);
      postponed[i].gradient.weights = {kept_w(i), kept_v(i), kept_e(i)};
    }
    Postponed<RecomputedPlain> postponed_again({rows[0], hard[0]});  // where nothing is kept
    for (int64_t first = begin; first < end; first += together) {
      const int64_t count = first + together < end ? together : end - first;
      const auto next = [&](int64_t i) { return first + i + together < end ? first + i + together : first + i; };
      const auto find_sums = [&](int64_t i) {
        Row& row = rows[i];
        Pointer<const S> next_student = row_of<S>(args.student, next(i));
        if (fetches_ahead && row.plain) next_student = row.student + kAhead;
        const GradientRow<S> gradient(args.grad_student, args.rows, first + i, args.student.data);
        const bool into_caches = gradient && !gradient.streamed;
        const Pointer<const S> to_write = into_caches ? Pointer<const S>(gradient.data) : next_student;
        if constexpr (sizeof(F) == 4)  // (rows of doubles are neither plain nor narrow)
          if (row.plain) {
            Pointer<const S> next_teacher = row_of<S>(args.teacher, reads_again ? first + i : next(i));
            if (fetches_ahead) next_teacher = row.teacher + kAhead;
            const auto sum = [&]<bool precise>(Precise<precise>, const auto& earlier) {
              row.template sum_plain_row<precise>(kept_w(i), kept_v(i), kept_e(i), order, hard[i], next_student, next_teacher,
                                                  to_write, earlier);
            };
            const auto sum_and_write = [&](auto& earlier) {
              if (earlier.end == 0) return false;
              sum(Precise<false>{}, earlier);
              earlier.end = 0;
              return true;
            };
            if constexpr (PowersFrom::kHasPrecise)
              if (row.is_precise()) {
                write_postponed(postponed[i]);
                return sum(Precise<true>{}, NothingPostponed{});
              }
            if constexpr (decltype(postponed_again)::kWanted)
              if (sum_and_write(postponed_again)) return;
            if constexpr (Postponed<KeptPlain>::kWanted)
              if (sum_and_write(postponed[i])) return;
            return sum(Precise<false>{}, NothingPostponed{});
          }
        write_postponed(postponed_again);
        write_postponed(postponed[i]);
        hard[i].start(row.stat[KlStat::s_max]);
        if constexpr (sizeof(F) == 4)
          if (row.narrow) return row.sum_narrow_row(kept_w(i), kept_v(i), kept_e(i), hard[i], next_student, to_write);
        row.sum_row(kept_w(i), kept_v(i), kept_e(i), hard[i], next_student, to_write);
      };
      const auto read_again = [&](int64_t i) {  // a row that is not plain after all
        rows[i].begin(rows[i].student, rows[i].teacher);
        rows[i].find_reference(rows[i].teacher);
        find_sums(i);
      };
      const auto underflows = [&](int64_t i) {
        if (args.grad_student.data == nullptr) return false;
        const F given = args.grad_loss.at(first + i, F(1)) * weight[i];
        if constexpr (Hard::kStats > 0)
          if (rows[i].underflows(given * F(args.hard_grad_scale))) return true;
        return rows[i].underflows(given * F(args.grad_scale) * F(args.scale / args.tau));
      };
      const auto finish = [&](int64_t i) {
        if (rows[i].plain) {
          if (rows[i].finish_plain_row() && !underflows(i)) return;
          read_again(i);
        }
        if (rows[i].finish_row()) return;
        rows[i].recentre();
        find_sums(i);
        rows[i].finish_row();
      };
      for (int64_t i = 0; i < count; ++i) {
        const int64_t r = first + i;
        rows[i].begin(row_of<S>(args.student, r), row_of<S>(args.teacher, r));
        hard[i] = Hard(args, r, rows[i].student);
        weight[i] = args.weight.at(r, F(1));
        if (weight[i] == 0) continue;
        if constexpr (sizeof(F) == 4) rows[i].plain = may_be_plain && rows[i].guess_plain(least_variance);
        if (!rows[i].plain) rows[i].find_reference(row_of<S>(args.teacher, next(i)));
        if (for_teacher) rows[i].narrow = false;  // whose pass writes the student's alone
      }
      for (int64_t i = 0; i < count; ++i)
        if (weight[i] != 0) find_sums(i);
      for (int64_t i = 0; i < count; ++i) {
        if (weight[i] != 0) finish(i);
        const F loss = rows[i].kl * F(args.scale) * weight[i];
        hard[i].store_loss(args, first + i, weight[i], weight[i] != 0 ? loss : 0);
        rows[i].store_stats(args.row_stats, (first + i) * kStats);
        hard[i].store_stats(args.row_stats, (first + i) * kStats + KlStat::count);
      }
      if (!args.grad_student.data) continue;
      const auto write_plain = [&](int64_t i) {
        if constexpr (sizeof(F) == 4) {
          const int64_t r = first + i;
          if constexpr (Hard::kStats > 0) hard[i].scale(args.grad_loss.at(r, F(1)) * weight[i] * F(args.hard_grad_scale));
          PlainGradient<KeptPlain>& gradient = postponed[i].gradient;
          if (keep) gradient.set(args, r, weight[i], rows[i], hard[i], order);
          if (!keep || !gradient.hard.set_target(kept_w(i), kept_v(i), order, gradient.minus_p[0], gradient.q[0])) {
            PlainGradient<RecomputedPlain>& again = postponed_again.gradient;
            again.weights = RecomputedPlain(rows[i], hard[i]);
            again.set(args, r, weight[i], rows[i], hard[i], order);
            if (!keep && decltype(postponed_again)::kWanted && again.grad_student.streamed) return postponed_again.start();
            return plain_gradient(again);
          }
          if (Postponed<KeptPlain>::kWanted && gradient.grad_student.streamed)
            postponed[i].start();
          else
            plain_gradient(gradient);
        }
      };
      const auto write = [&](int64_t i, auto weights) {
        if constexpr (!decltype(weights)::kept)
          if (for_teacher) return gradients<true>(args, first + i, weight[i], rows[i], hard[i], weights);
        if constexpr (sizeof(F) == 4)
          if (weight[i] != 0 && rows[i].narrow) return narrow_gradient(args, first + i, weight[i], rows[i], hard[i], weights);
        gradients<false>(args, first + i, weight[i], rows[i], hard[i], weights);
      };
      for (int64_t i = 0; i < count; ++i) {
        if (rows[i].plain)
          write_plain(i);
        else if (keep)
          write(i, Kept{kept_w(i), kept_v(i), kept_e(i)});
        else
          write(i, Recomputed{rows[i]});
      }
    }
    for (int64_t i = 0; i < together; ++i) write_postponed(postponed[i]);
    write_postponed(postponed_again);
  }

  template <bool for_teacher>
  static void backward(const Args& args, int64_t begin, int64_t end) {
    Row row(KlTemperatures<F>(args), args.classes);
    for (int64_t r = begin; r < end; ++r) {
      row.begin(row_of<S>(args.student, r), row_of<S>(args.teacher, r));
      const F* stats = static_cast<const F*>(args.row_stats) + r * kStats;
      __builtin_memcpy(row.stat, stats, sizeof row.stat);
      Hard hard(args, r, row.student);
      hard.load_stats(stats + KlStat::count);
      gradients<for_teacher>(args, r, args.weight.at(r, F(1)), row, hard, Recomputed{row});
    }
  }

  struct Forward {
    static void run(const Args& args, int64_t begin, int64_t end) {
      const int64_t logits = bytes_each(args.student.dtype) + bytes_each(args.teacher.dtype);
      const int64_t bytes = args.classes * (logits + int64_t(kKeptRows * sizeof(F)));
      const bool keep = args.grad_student.data != nullptr && args.grad_teacher.data == nullptr && bytes <= kKeptBytes;
      forward(args, begin, end, keep);
    }
  };
  struct Backward {
    static void run(const Args& args, int64_t begin, int64_t end) {
      args.grad_teacher.data ? backward<true>(args, begin, end) : backward<false>(args, begin, end);
    }
  };
};
template <class F, class S>
using KlDivTauForward = typename KlDivTau<KlDivTauArgs, NoHardPart, F, S>::Forward;
template <class F, class S>
using KlDivTauBackward = typename KlDivTau<KlDivTauArgs, NoHardPart, F, S>::Backward;

void kl_div_tau_forward(const KlDivTauArgs& args, int64_t begin, int64_t end) { with_types<KlDivTauForward>(args, begin, end); }
void kl_div_tau_backward(const KlDivTauArgs& args, int64_t begin, int64_t end) {
  with_types<KlDivTauBackward>(args, begin, end);
}

}  // namespace
}  // namespace kdfast::cpu::KDFAST_ISA
