// What the losses share: where rows lie, how gradients are written, the choice of types.

namespace kdfast::cpu::KDFAST_ISA {
namespace {

template <class S>
Pointer<const S> row_of(const Logits& logits, int64_t row) {
  return pointer_to<const S>(logits.data, logits.dtype) + logits.rows.offset(row);
}

// Where a row's gradient goes. Large gradients are written past the caches: they come back from memory before they are used
// anyway, and an ordinary store would first read the line it overwrites. Not those of short rows, where the parts of lines at
// the rows' ends take more time than that: from 256 classes of four bytes on, from 1024 of two, which have half as much to read
// beside the same arithmetic.
template <class S>
struct GradientRow {
  static constexpr int64_t kStreamFromBytes = 8 << 20, kStreamRowBytesTimesEach = 4 << 10;

  Pointer<S> data{};
  int64_t width = 0;
  bool streamed = false;

  GradientRow() = default;
  GradientRow(const Gradient& gradient, int64_t rows, int64_t row, const void* student) {
    if (gradient.data == nullptr) return;
    data = pointer_to<S>(gradient.data, gradient.dtype) + gradient.rows.offset(row);
    width = gradient.width;
    const int64_t each = bytes_each(data);
    streamed =
        gradient.data != student && width * each * each >= kStreamRowBytesTimesEach && rows * width * each >= kStreamFromBytes;
  }
  explicit operator bool() const { return address(data) != nullptr; }

  // Classes before the first that begins a cache line.
  int64_t before_line() const { return int64_t((64 - uintptr_t(address(data)) % 64) % 64) / bytes_each(data); }
  // past_caches: allowed where `streamed`, in the whole cache lines.
  template <class V, class Lanes>
  KDFAST_INLINE void put(int64_t i, V v, Lanes lanes, bool past_caches) const {
    if constexpr (__is_same(Lanes, Full))
      if (past_caches) return stream(data + i, v);
    store(data + i, v, lanes);
  }
  void zero(int64_t from) const {
    if (*this && from < width) __builtin_memset(address(data + from), 0, bytes_each(data) * (width - from));
  }
};

// for_each_vector of a row of a gradient to write, with body(i, lanes, past_caches) for `put`. Of a streamed row the parts of
// cache lines at both ends go into the caches, where the rows beside it complete them: in memory that took up to 30 % of the
// time at 1003 classes.
template <class V, int vectors = 1, class S, class Body, class... Sums>
KDFAST_INLINE void for_each_vector_of(const GradientRow<S>& row, int64_t classes, Body body, Sums&... sums) {
  const bool streamed = row.streamed;
  const int64_t before = streamed ? row.before_line() : 0, head = before < classes ? before : classes;
  const int64_t end = streamed ? classes - (classes - head) % (64 / bytes_each(row.data)) : classes;
  if (end < classes) __builtin_prefetch(address(row.data + end), 1, 3);
  const int64_t stops[] = {0, head, end, classes};
  for (int part = streamed ? 0 : 1, last = streamed ? 3 : 2; part < last; ++part) {
    const bool past_caches = streamed && part == 1;
    const auto each = [&](int64_t i, auto lanes) { body(i, lanes, past_caches); };
    for_each_vector<V, vectors>(stops[part], stops[part + 1], each, sums...);
  }
}
// Of a student's and a teacher's row written together: the one that tells where the whole cache lines are. The other is no
// longer streamed where its own are elsewhere.
template <class S>
const GradientRow<S>& leading_row(GradientRow<S>& grad_student, GradientRow<S>& grad_teacher) {
  if (!grad_student.streamed) return grad_teacher;
  grad_teacher.streamed = grad_teacher.streamed && grad_teacher.before_line() == grad_student.before_line();
  return grad_student;
}

// The classes that a vector's lanes hold: `first` and every step-th after it. Of the vectors that a step takes the first leads.
template <class Lanes, int step, bool leading>
struct Place {
  static constexpr bool leads = leading;
  int64_t first, kept;  // kept: where a row of numbers to keep has those of `first` and the others
  Lanes lanes;

  KDFAST_INLINE int64_t lane(int64_t i) const {  // of class i; no lane's number where it is not among them
    return step == 1 ? i - first : (i - first) % step == 0 ? (i - first) / step : -1;
  }
};
// The order that a row of numbers to keep has: the classes', or the even ones and from `odd` on the odd ones.
template <bool by_pairs>
struct KeptOrder {
  static constexpr int kVectors = by_pairs ? 2 : 1;  // at a time
  int64_t odd = 0, even = 0;

  KDFAST_INLINE int64_t at(int64_t i) const { return by_pairs ? ((i & 1) != 0 ? odd : even) + (i >> 1) : even + i; }
  // The same with the classes counted from another.
  KeptOrder from(int64_t first) const { return {at(first + 1), at(first)}; }
  KDFAST_INLINE int64_t count(int64_t classes) const { return by_pairs ? 2 * odd : classes; }  // zeros fill both halves
  template <bool leading = !by_pairs>
  KDFAST_INLINE Place<Full, kVectors, leading> place(int64_t i, Full) const {
    return {i, at(i), {}};
  }
  template <bool leading = !by_pairs>
  KDFAST_INLINE Place<First, kVectors, leading> place(int64_t i, First left) const {
    return {i, at(i), {by_pairs ? (left.n + 1) / 2 : left.n}};
  }
  static KDFAST_INLINE Full after(Full) { return {}; }
  static KDFAST_INLINE First after(First left) { return {left.n - 1}; }
};

// A row of numbers to keep between two passes over a row; on the stack where it is short.
template <class F>
struct Scratch {
  alignas(64) F small[16384 / sizeof(F)];
  F* data = small;

  explicit Scratch(int64_t count) {
    if (count * sizeof(F) <= sizeof small) return;
    if (posix_memalign(reinterpret_cast<void**>(&data), 64, count * sizeof(F)) != 0) abort();
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() {
    if (data != small) free(data);
  }
};

// What a loss has beside its comparison of the logits: nothing. (kd_loss.inl has a part of its own, with these members.)
template <class F, class V, class S>
struct NoHardPart {
  static constexpr int kStats = 0;  // numbers a row for the backward pass
  static constexpr bool alone = false;
  static constexpr int degree = 0;

  struct Sums {
    KDFAST_INLINE void carry() {}
  };

  struct PlainExponentials {
    static constexpr F unit = 1;
    template <class Powers>
    PlainExponentials(const NoHardPart&, const Powers&) {}
  };
  struct PlainGradient {
    static constexpr V minus_elsewhere{};
    void set(const NoHardPart&) {}
    void start_at(int64_t) {}
    template <class Order>
    bool set_target(F*, F*, Order, F, F) const {
      return true;
    }
  };

  NoHardPart() = default;
  template <class Args>
  NoHardPart(const Args&, int64_t, Pointer<const S>) {}
  void start(F, F = 1) {}
  void read_row() {}
  void load_stats(const F*) {}
  void store_stats(void*, int64_t) const {}
  template <class Args>
  void store_loss(const Args& args, int64_t r, F, F soft) const {
    static_cast<F*>(args.row_loss)[r] = soft;
  }
};

template <class F>
void copy_numbers(void* to, int64_t at, const F* from, int count) {
  if (to != nullptr) __builtin_memcpy(static_cast<F*>(to) + at, from, sizeof(F) * count);
}

template <class S>
struct ComputeTypeOf {
  using type = float;
};
template <>
struct ComputeTypeOf<double> {
  using type = double;
};
template <class S>
using ComputeType = typename ComputeTypeOf<S>::type;

// Calls Loss<F, S>::run(args, begin, end) with S the type in memory of student and teacher, F the type to compute in.
template <template <class, class> class Loss, class Args>
void with_types(const Args& args, int64_t begin, int64_t end) {
  const FlushSubnormals flush;
  const DType s = args.student.dtype, t = args.teacher.dtype;
  if (s == DType::f64 || t == DType::f64)
    Loss<double, AnyType>::run(args, begin, end);
  else if (s != t)
    Loss<float, AnyType>::run(args, begin, end);
  else
    with_type<float>(s, [&](auto number) { Loss<float, decltype(number)>::run(args, begin, end); });
  end_streams();
}

void scale_gradient(void* out, const void* in, DType dtype, double factor, int64_t begin, int64_t end) {
  const FlushSubnormals flush;
  with_type<double>(dtype, [&](auto number) {
    using S = decltype(number);
    using V = typename VecOf<ComputeType<S>>::type;
    const S* from = static_cast<const S*>(in) + begin;
    S* to = static_cast<S*>(out) + begin;
    const auto by = ComputeType<S>(factor);
    for_each_vector<V>(0, end - begin, [&](int64_t i, auto lanes) { store(to + i, load<V>(from + i, lanes, 0) * by, lanes); });
  });
}

}  // namespace
}  // namespace kdfast::cpu::KDFAST_ISA
