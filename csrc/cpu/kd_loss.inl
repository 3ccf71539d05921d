// Cross-entropy with the target and a soft part on the CPU: the rows of kl_div_tau.inl and of logit_mse.inl, with a hard part
// that shares their loads of the student's logits (and the exponentials of kl_div_tau at tau = 1).

namespace kdfast::cpu::KDFAST_ISA {
namespace {

// The hard part of one row.
template <class F, class V, class S>
struct HardPart {
  static constexpr int kStats = HardStat::count;
  static constexpr bool kept = false;
  static constexpr F inf = F(__builtin_inf()), nan = F(__builtin_nan("")), log2_e = F(1.4426950408889634);

  struct Sums {
    Sum<V> others, below_max;  // of the exponentials (the target's too, where they or their powers are kept); of s_max - s
    F target_exponential = nan, target_s = nan;  // they stay NaN where the target is no class

    KDFAST_INLINE void carry() {
      others.carry();
      below_max.carry();
    }
  };

  Pointer<const S> student{};
  int64_t classes = 0, target = 0;
  F smoothing = 0, loss = 0;
  F stat[HardStat::count] = {};
  bool smooths = false;                        // smoothing is not 0
  bool counts = false;                         // not an ignored row
  F unit = 1;                                  // of the exponentials, beside e^(s - s_max)
  int degree = 0;                              // of the soft part's in its exponentials, 0: not worth it
  bool writes = false;                         // it has a gradient
  bool alone = false;                          // the soft part has none
  F factor = 0, at_target = 0, elsewhere = 0;  // the gradient is e_k * factor - elsewhere, but at the target

  HardPart() = default;
  HardPart(const KdLossArgs& args, int64_t r, Pointer<const S> logits)
      : student(logits),
        classes(args.classes),
        target(args.target.at(r, int64_t(0))),
        smoothing(args.classes > 1 ? F(args.label_smoothing) : 0) {
    smooths = smoothing != 0;
    counts = target != args.ignore_index;
    // (At alpha = 0 the soft part may be NaN where the hard part is not.)
    if (args.soft == Soft::kl && args.alpha != 0) degree = args.tau == 1 ? 1 : args.tau == 2 ? 2 : args.tau == 4 ? 4 : 0;
    writes = counts && args.alpha != 1;
    alone = args.alpha == 0;
  }

  KDFAST_INLINE V exponential(V s) const { return exp2_nonpositive((s - stat[HardStat::s_max]) * log2_e); }
  template <class Lanes>
  KDFAST_INLINE V exponential(const HardPart&, int64_t, Lanes, V s) const {
    return exponential(s);
  }
  // The target's place among a vector's lanes; false where it has none.
  struct TargetLane {
    int64_t lane, lanes;

    template <class Place>
    KDFAST_INLINE TargetLane(int64_t target, const Place& place) : lane(place.lane(target)), lanes(count_of<V>(place.lanes)) {}
    KDFAST_INLINE explicit operator bool() const { return uint64_t(lane) < uint64_t(lanes); }
    KDFAST_INLINE IntOf<V> mask() const { return lane_numbers<V>() == ScalarOf<IntOf<V>>(lane); }
  };

  void start(F s_max, F unit_of_exponentials = 1) {
    stat[HardStat::s_max] = s_max;
    unit = unit_of_exponentials;
  }
  // The exponentials of a plain row, in units of their own: from v, the student's powers at the soft part's temperature, where
  // that is 1, 2 or 4.
  struct PlainExponentials {
    PowersFrom powers;
    int degree;
    F unit;

    template <class Powers>
    PlainExponentials(const HardPart& hard, const Powers& student) : powers(log2_e, student.from), degree(hard.degree) {
      unit = to_the(degree, 1 / (degree == 0 ? powers.unit() : student.unit()));
    }
    KDFAST_INLINE V operator()(V s, V v) const { return __builtin_expect(degree > 0, 1) ? to_the(degree, v) : powers(s); }
  };
  template <class X>
  static KDFAST_INLINE X to_the(int degree, X x) {  // 1, 2 or 4 (and 0: not wanted)
    if (__builtin_expect(degree > 1, 1)) x *= x;
    if (__builtin_expect(degree > 2, 1)) x *= x;
    return x;
  }
  // Adds a vector to the sums, and keeps its exponentials where there is a scratch row for them. shared: those of the soft
  // part, which at tau = 1 are the same.
  template <class Lanes>
  KDFAST_INLINE void add(Sums& sums, F* kept_e, int64_t i, Lanes lanes, V s, V shared) const {
    if (counts) add_exponentials(sums, kept_e, KeptOrder<false>{}.place(i, lanes), s, degree == 1 ? shared : exponential(s));
  }
  // The same in a plain row. v: the student's powers, which are kept too.
  template <class Place>
  KDFAST_INLINE void add_plain(const PlainExponentials& exponentials, Sums& sums, F* kept_e, const Place& place, V s,
                               V v) const {
    add_exponentials(sums, kept_e, place, s, only(place.lanes, exponentials(s, v)), degree > 0);
  }
  template <class Place>
  KDFAST_INLINE void add_exponentials(Sums& sums, F* kept_e, const Place& place, V s, V e, bool made_again = false) const {
    if (kept_e != nullptr) {
      if (!made_again) store(kept_e + place.kept, e, Full{});
    } else if (const TargetLane at(target, place); at) {
      sums.target_s = largest(at.mask() ? s : splat<V>(-inf));
      sums.target_exponential = sum(at.mask() ? e : V{});
      e = at.mask() ? V{} : e;
    }
    sums.others += e;
    if (__builtin_expect(smooths, 0)) sums.below_max += only(place.lanes, stat[HardStat::s_max] - s);
  }
  // What a row's kept numbers are: its exponentials, or powers that those are made of.
  struct Themselves {
    KDFAST_INLINE V operator()(V e) const { return e; }
  };
  struct OfPowers {
    int degree;
    KDFAST_INLINE V operator()(V v) const { return to_the(degree, v); }
  };
  // Takes the target's exponential from the sum of those kept: exponential_of(the numbers kept). Where it is most of the sum,
  // the others are added again: nothing cancels.
  template <class Order, class ExponentialOf>
  void take_target(Sums& sums, F& others, F* kept, Order order, ExponentialOf exponential_of) const {
    others = sums.others.value();
    if (kept == nullptr || uint64_t(target) >= uint64_t(classes)) return;
    F& at_target = kept[order.at(target)];
    const F number = at_target;
    sums.target_s = load<V>(student + target, First{1}, 0)[0];
    sums.target_exponential = exponential_of(splat<V>(number))[0];
    others -= sums.target_exponential;
    if (others >= sums.target_exponential) return;
    at_target = 0;
    Sum<V> again;
    const auto add = [&](int64_t i, auto lanes) { again += exponential_of(load<V>(kept + i, lanes, 0)); };
    for_each_vector<V>(0, order.count(classes), add, again);
    others = again.value();
    at_target = number;
  }
  // The same of a plain row, or false: its exponentials are not within what their powers can show. (An origin is a rounded
  // exponent, but where it lies too far off: then the unit tells nothing, or is infinite.)
  static constexpr F kMostUnit = 8;  // 2^(1/2) to the power of 4, and room
  template <class Order>
  bool finish_plain_row(Sums& sums, F* kept_v, F* kept_e, Order order) {
    if (!counts) return true;
    const F z = degree > 0 ? finish_row(sums, kept_v, order, OfPowers{degree}) : finish_row(sums, kept_e, order);
    return z < PowersFrom::kMostSquares && z >= kLeastSum && unit >= 1 / kMostUnit && unit <= kMostUnit;
  }
  // Returns the sum of the exponentials, in their own units. Where they are kept themselves, puts in the target's place what
  // the gradient's formula makes into the gradient there.
  template <class Order = KeptOrder<false>, class ExponentialOf = Themselves>
  F finish_row(Sums& sums, F* kept, Order order = {}, ExponentialOf exponential_of = {}) {
    if (!counts) return 0;
    F others;
    take_target(sums, others, kept, order, exponential_of);
    if (__is_same(ExponentialOf, Themselves) && kept != nullptr && uint64_t(target) < uint64_t(classes))
      kept[order.at(target)] = smoothing * (others + sums.target_exponential) - others;
    const F sum = others + sums.target_exponential, e_target = sums.target_exponential * unit;
    others *= unit;
    const F z = others + e_target;
    const F gap = stat[HardStat::s_max] - sums.target_s;
    // The loss of a likely target is small, and log z and the gap are not; nor where a plain row's s_max lies far below the
    // rest.
    const bool likely = others < e_target;
    loss = likely ? math::log1p(others / e_target) : gap < 0 ? F(math::log(double(z)) + gap) : math::log(z) + gap;
    const F log_z = likely ? loss - gap : math::log(z);
    if (smooths) loss = (1 - smoothing) * loss + smoothing * (log_z + sums.below_max.value() / F(classes));
    stat[HardStat::inv_z] = 1 / z;
    stat[HardStat::slope] = -others / z;
    return sum;
  }
  // Both passes, for a soft part that has none to share.
  void read_row() {
    if (!counts) return;
    V top = splat<V>(-inf);
    for_each_vector<V>(0, classes, [&](int64_t i, auto lanes) { top = vmax(load<V>(student + i, lanes, -inf), top); });
    start(largest(top));
    Sums sums;
    const auto add_vector = [&](int64_t i, auto lanes) {
      const V s = load<V>(student + i, lanes, -inf);
      add(sums, nullptr, i, lanes, s, V{});
    };
    for_each_vector<V>(0, classes, add_vector, sums);
    finish_row(sums, nullptr);
  }

  void load_stats(const F* from) { __builtin_memcpy(stat, from, sizeof stat); }
  void store_stats(void* to, int64_t at) const { copy_numbers(to, at, stat, HardStat::count); }
  void store_loss(const KdLossArgs& args, int64_t r, F weight, F soft) const {
    const F hard = counts && weight != 0 ? loss * weight : 0;
    static_cast<F*>(args.row_hard)[r] = hard;
    static_cast<F*>(args.row_soft)[r] = soft;
    if (args.row_loss == nullptr) return;
    const double alpha = args.alpha;
    static_cast<F*>(args.row_loss)[r] = alpha == 0 ? hard : alpha == 1 ? soft : F(1 - alpha) * hard + F(alpha) * soft;
  }

  void scale(F by) {
    factor = stat[HardStat::inv_z] * unit * by;
    elsewhere = smoothing / F(classes) * by;
    at_target = (stat[HardStat::slope] + smoothing - smoothing / F(classes)) * by;
  }
  template <class Weights, class Lanes>
  KDFAST_INLINE V gradient(const Weights& weights, int64_t i, Lanes lanes, V s) const {
    V g = weights.exponential(*this, i, lanes, s) * factor - elsewhere;
    if constexpr (!Weights::kept)
      if (const TargetLane at(target, KeptOrder<false>{}.place(i, lanes)); at) g = at.mask() ? splat<V>(at_target) : g;
    return g;
  }
  // What a plain row's gradient has of the hard part: minus_elsewhere, and the exponentials times `factor`.
  struct PlainGradient {
    static constexpr F kMostInstead = F(0x1p+120);  // what takes w's place is far from infinity
    V factor{}, minus_elsewhere{};
    F exponential_at_target = 0;  // what stands in its place
    int64_t target = 0;
    int degree = 0;
    bool writes = false;

    void set(const HardPart& hard) {
      writes = hard.writes;
      factor = minus_elsewhere = V{};
      if (!writes) return;
      factor = splat<V>(hard.factor);
      minus_elsewhere = splat<V>(-hard.elsewhere);
      target = hard.target;
      degree = hard.degree;
      exponential_at_target = (hard.stat[HardStat::slope] + hard.smoothing) / (hard.stat[HardStat::inv_z] * hard.unit);
    }
    // Counts the row's classes from another.
    void start_at(int64_t first) { target -= first; }
    // v: the student's powers.
    template <class Weights, class Place>
    KDFAST_INLINE V add(V g, const Weights& weights, const Place& place, V s, V v) const {
      if (!writes) return g;
      V e = __builtin_expect(degree > 0, 1) ? to_the(degree, v) : weights.exponential(place, s);
      if constexpr (!Weights::kept)  // else it is in its place among them
        if (const TargetLane at(target, place); at) e = at.mask() ? splat<V>(exponential_at_target) : e;
      return multiply_add(e, factor, g);
    }
    // Puts numbers in the place of the target's w and v, of which the exponentials are made, that the formula for the others
    // makes into the gradient there; minus_p and q are its factors of w and v. False where there are none. (A target that is no
    // class has made the sums NaN: the row is not plain.)
    template <class Order>
    bool set_target(F* kept_w, F* kept_v, Order order, F minus_p, F q) const {
      if (!writes || degree == 0) return true;
      F &w = kept_w[order.at(target)], &v = kept_v[order.at(target)];
      const F instead = w + (v * q + exponential_at_target * factor[0]) / minus_p;
      if (!(instead < kMostInstead && instead > -kMostInstead)) return false;
      w = instead;
      v = 0;
      return true;
    }
  };
  template <class Weights>
  void write_gradient(const Weights& weights, const GradientRow<S>& grad_student) const {
    if (!grad_student) return;
    if (!writes) return grad_student.zero(0);
    for_each_vector_of<V>(grad_student, classes, [&](int64_t i, auto lanes, bool past_caches) {
      grad_student.put(i, gradient(weights, i, lanes, load<V>(student + i, lanes, -inf)), lanes, past_caches);
    });
    grad_student.zero(classes);
  }
};

template <class F>
using KdSquare = Square<F, KdLossArgs>;

template <class F, class S>
using KdLossKl = KlDivTau<KdLossArgs, HardPart, F, S>;
template <class F, class S>
using KdLossMse = LogitDifference<KdSquare, HardPart, F, S>;
template <class F, class S>
using KdLossKlForward = typename KdLossKl<F, S>::Forward;
template <class F, class S>
using KdLossKlBackward = typename KdLossKl<F, S>::Backward;
template <class F, class S>
using KdLossMseForward = typename KdLossMse<F, S>::Forward;
template <class F, class S>
using KdLossMseBackward = typename KdLossMse<F, S>::Backward;

void kd_loss_forward(const KdLossArgs& args, int64_t begin, int64_t end) {
  args.soft == Soft::kl ? with_types<KdLossKlForward>(args, begin, end) : with_types<KdLossMseForward>(args, begin, end);
}
void kd_loss_backward(const KdLossArgs& args, int64_t begin, int64_t end) {
  args.soft == Soft::kl ? with_types<KdLossKlBackward>(args, begin, end) : with_types<KdLossMseBackward>(args, begin, end);
}

}  // namespace
}  // namespace kdfast::cpu::KDFAST_ISA
