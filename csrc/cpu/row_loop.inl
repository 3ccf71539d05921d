// What the losses share: where rows lie, how gradients are written, the choice of types.

namespace kdfast::cpu::KDFAST_ISA {
namespace {

template <class S>
const S* row_of(const Logits& logits, int64_t row) {
  return static_cast<const S*>(logits.data) + logits.rows.offset(row);
}

// Where a row's gradient goes. Large gradients are written past the caches: they come back from memory before they are used
// anyway, and an ordinary store would first read the line it overwrites.
template <class S>
struct GradientRow {
  static constexpr int64_t kStreamFromBytes = 8 << 20;

  S* data = nullptr;
  int64_t width = 0;
  bool streamed = false;

  GradientRow(const Gradient& gradient, int64_t rows, int64_t row, const void* logits) {
    if (gradient.data == nullptr) return;
    data = static_cast<S*>(gradient.data) + gradient.rows.offset(row);
    width = gradient.width;
    streamed = gradient.data != logits && rows * width * int64_t(sizeof(S)) >= kStreamFromBytes;
  }
  explicit operator bool() const { return data != nullptr; }

  // Classes before the first that is aligned for stream().
  template <class V>
  int64_t head() const {
    const uintptr_t bytes = sizeof(S) * kLanes<V>;
    return streamed ? int64_t((bytes - uintptr_t(data) % bytes) % bytes / sizeof(S)) : 0;
  }
  template <class V>
  KDFAST_INLINE void put(int64_t i, V v, Full lanes) const {
    if (streamed)
      stream(data + i, v);
    else
      store(data + i, v, lanes);
  }
  template <class V>
  KDFAST_INLINE void put(int64_t i, V v, First lanes) const {
    store(data + i, v, lanes);
  }
  void zero(int64_t from) const {
    if (data != nullptr && from < width) __builtin_memset(data + from, 0, sizeof(S) * (width - from));
  }
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

  struct Sums {
    KDFAST_INLINE void carry() {}
  };

  struct PlainExponentials {
    static constexpr F unit = 1;
    PlainExponentials(const NoHardPart&, const PowersFrom&) {}
  };

  NoHardPart() = default;
  template <class Args>
  NoHardPart(const Args&, int64_t, const S*) {}
  void start(F, F = 1) {}
  bool within_range(const Sums&) const { return true; }
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

// Calls body with a value of the type in memory.
template <class Body>
void with_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::f64:
      return body(double{});
    case DType::f32:
      return body(float{});
    case DType::bf16:
      return body(BF16{});
    case DType::f16:
      return body(F16{});
  }
}

// One side of a pair of two dtypes: its logits converted to F a few rows at a time, in the place of the caller's, and its
// gradient, which overwrites them there, converted back.
template <class F>
struct ConvertedSide {
  using V = typename VecOf<F>::type;
  static constexpr int64_t kBytes = 16384;

  Logits& logits;
  Gradient& gradient;
  const Logits from = logits;
  const Gradient to = gradient;
  const int64_t classes, stride = (classes + 15) / 16 * 16;
  Scratch<F> scratch;

  ConvertedSide(Logits& logits, Gradient& gradient, int64_t classes, int64_t rows)
      : logits(logits), gradient(gradient), classes(classes), scratch(needed() ? rows * stride : 0) {
    if (!needed()) return;
    logits.rows = gradient.rows = {.dims = 1, .size = {rows}, .stride = {stride}};
    gradient.width = classes;
  }
  bool needed() const { return from.dtype != (sizeof(F) == 8 ? DType::f64 : DType::f32); }
  static int64_t rows_together(int64_t classes) { return classes * sizeof(F) < kBytes ? kBytes / (classes * sizeof(F)) : 1; }

  void read(int64_t first, int64_t last, const Numbers& weight) {
    if (!needed()) return;
    F* const converted = scratch.data - first * stride;
    logits.data = converted;
    if (to.data != nullptr) gradient.data = converted;
    with_type(from.dtype, [&](auto number) {
      for (int64_t r = first; r < last; ++r) {
        if (weight.at(r, F(1)) == 0) continue;
        const auto* row = row_of<decltype(number)>(from, r);
        F* const out = converted + r * stride;
        for_each_vector<V>(classes, 0, [&](int64_t i, auto lanes) { store(out + i, load<V>(row + i, lanes, 0), lanes); });
      }
    });
  }
  void write(int64_t first, int64_t last, int64_t rows) const {
    if (!needed() || to.data == nullptr) return;
    with_type(to.dtype, [&](auto number) {
      for (int64_t r = first; r < last; ++r) {
        const GradientRow<decltype(number)> row(to, rows, r, from.data);
        const F* in = scratch.data + (r - first) * stride;
        for_each_vector<V>(classes, row.template head<V>(),
                           [&](int64_t i, auto lanes) { row.put(i, load<V>(in + i, lanes, 0), lanes); });
        row.zero(classes);
      }
    });
  }
};
template <class F, class Args>
void run_converted(Args args, int64_t begin, int64_t end, void (*run)(const Args&, int64_t, int64_t)) {
  const int64_t together = ConvertedSide<F>::rows_together(args.classes);
  ConvertedSide<F> student(args.student, args.grad_student, args.classes, together);
  ConvertedSide<F> teacher(args.teacher, args.grad_teacher, args.classes, together);
  for (int64_t first = begin; first < end; first += together) {
    const int64_t last = first + together < end ? first + together : end;
    student.read(first, last, args.weight);
    teacher.read(first, last, args.weight);
    run(args, first, last);
    student.write(first, last, args.rows);
    teacher.write(first, last, args.rows);
  }
}

// Calls Loss<F, S>::run(args, begin, end) with S the type in memory of student and teacher, F the type to compute in. (Code of
// its own for each of the sixteen pairs of types would take minutes to compile.)
template <template <class, class> class Loss, class Args>
void with_types(const Args& args, int64_t begin, int64_t end) {
  const FlushSubnormals flush;
  if (args.student.dtype == args.teacher.dtype)
    with_type(args.student.dtype, [&](auto number) {
      using S = decltype(number);
      Loss<ComputeType<S>, S>::run(args, begin, end);
    });
  else if (args.student.dtype == DType::f64 || args.teacher.dtype == DType::f64)
    run_converted<double>(args, begin, end, Loss<double, double>::run);
  else
    run_converted<float>(args, begin, end, Loss<float, float>::run);
}

void scale_gradient(void* out, const void* in, DType dtype, double factor, int64_t begin, int64_t end) {
  const FlushSubnormals flush;
  with_type(dtype, [&](auto number) {
    using S = decltype(number);
    using V = typename VecOf<ComputeType<S>>::type;
    const S* from = static_cast<const S*>(in) + begin;
    S* to = static_cast<S*>(out) + begin;
    const auto by = ComputeType<S>(factor);
    for_each_vector<V>(end - begin, 0, [&](int64_t i, auto lanes) { store(to + i, load<V>(from + i, lanes, 0) * by, lanes); });
  });
}

}  // namespace
}  // namespace kdfast::cpu::KDFAST_ISA
