// What the tests of the kernels share: matrices of every dtype, a comparison and a report. The oracle of each test computes in
// long double from the values as rounded to the dtype.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

namespace test {

using kdfast::DType;
using Real = long double;

constexpr DType kDTypes[] = {DType::f64, DType::f32, DType::bf16, DType::f16};
constexpr const char* kDTypeNames[] = {"f64", "f32", "bf16", "f16"};
constexpr int kSizes[] = {8, 4, 2, 2};
constexpr double kInf = INFINITY, kNan = NAN;

// An IEEE-like 16-bit number, by its mantissa's bits and its least exponent.
struct Format {
  int mantissa, least;

  uint16_t encode(double x) const {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0, infinity = 0x7FFF >> mantissa << mantissa;
    if (std::isnan(x)) return 0x7FFF;
    x = std::fabs(x);
    const int exponent = x > 0 && x < kInf ? std::max(std::ilogb(x), least) : least;
    const double bits = std::ldexp(exponent - least, mantissa) + std::nearbyint(std::ldexp(x, mantissa - exponent));
    return sign | uint16_t(std::min<double>(bits, infinity));
  }
  double decode(uint16_t bits) const {
    const int exponent = (bits & 0x7FFF) >> mantissa, fraction = bits & ((1 << mantissa) - 1);
    double x = exponent ? std::ldexp(fraction + (1 << mantissa), exponent - 1 + least - mantissa)
                        : std::ldexp(fraction, least - mantissa);
    if (exponent == 0x7FFF >> mantissa) x = fraction ? kNan : kInf;
    return bits & 0x8000 ? -x : x;
  }
};
constexpr Format kBf16{7, -126}, kF16{10, -14};

// Rows of `width` numbers, `gap` apart, in memory of their exact size: AddressSanitizer sees a step past the last row, and a
// gap that does not hold `kGap` any more shows a step past another one.
class Matrix {
 public:
  static constexpr unsigned char kGap = 0xA5;
  const DType dtype;
  const int64_t rows, width, stride;

  Matrix(DType dtype, int64_t rows, int64_t width, int64_t gap = 0)
      : dtype(dtype), rows(rows), width(width), stride(width + gap), bytes_(((rows - 1) * stride + width) * size(), kGap) {}

  double get(int64_t row, int64_t column) const {
    const unsigned char* from = &bytes_[(row * stride + column) * size()];
    if (dtype == DType::f64) return read<double>(from);
    if (dtype == DType::f32) return read<float>(from);
    return (dtype == DType::bf16 ? kBf16 : kF16).decode(read<uint16_t>(from));
  }
  void set(int64_t row, int64_t column, double x) {
    unsigned char* to = &bytes_[(row * stride + column) * size()];
    const float narrow = float(x);
    const uint16_t half = (dtype == DType::bf16 ? kBf16 : kF16).encode(x);
    std::memcpy(to, dtype == DType::f64 ? (void*)&x : dtype == DType::f32 ? (void*)&narrow : (void*)&half, size());
  }
  bool gaps_untouched() const {
    for (int64_t row = 0; row + 1 < rows; ++row)
      for (int64_t i = (row * stride + width) * size(); i < (row + 1) * stride * size(); ++i)
        if (bytes_[i] != kGap) return false;
    return true;
  }
  bool operator==(const Matrix& other) const { return bytes_ == other.bytes_; }

  kdfast::Logits logits() const { return {bytes_.data(), dtype, layout()}; }
  kdfast::Gradient gradient() { return {bytes_.data(), dtype, width, layout()}; }

 private:
  int size() const { return kSizes[int(dtype)]; }
  template <class T>
  static T read(const unsigned char* from) {
    T x;
    std::memcpy(&x, from, sizeof x);
    return x;
  }
  kdfast::RowLayout layout() const {
    kdfast::RowLayout layout;
    layout.size[0] = rows;
    layout.stride[0] = stride;
    return layout;
  }
  std::vector<unsigned char> bytes_;
};

// What every loss's arguments have in common.
template <class Args>
Args args_for(const Matrix& student, const Matrix& teacher, int64_t classes) {
  Args args;
  args.student = student.logits();
  args.teacher = teacher.logits();
  args.rows = student.rows;
  args.classes = classes;
  return args;
}

inline Matrix random_logits(DType dtype, int64_t rows, int64_t width, unsigned seed, double spread = 3, int64_t gap = 3) {
  Matrix matrix(dtype, rows, width, gap);
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0, spread);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < width; ++k) matrix.set(r, k, normal(generator));
  return matrix;
}

inline DType compute_type(DType a, DType b) { return a == DType::f64 || b == DType::f64 ? DType::f64 : DType::f32; }

inline double total(const void* row_loss, DType type, int64_t rows) {
  double sum = 0;
  for (int64_t r = 0; r < rows; ++r)
    sum += type == DType::f64 ? static_cast<const double*>(row_loss)[r] : static_cast<const float*>(row_loss)[r];
  return sum;
}

// Relative errors that are allowed: of a batch's loss, and of a gradient (L2) before it is rounded to its dtype.
inline double loss_budget(DType computed) { return computed == DType::f64 ? 1e-13 : 5e-6; }
inline double gradient_budget(DType computed) { return computed == DType::f64 ? 1e-13 : 2e-6; }

inline int failures = 0, checks = 0;

inline void check(bool ok, const std::string& what) {
  ++checks;
  if (ok) return;
  if (++failures <= 20) std::printf("FAILED %s\n", what.c_str());
}
inline void check_error(Real error, double budget, const std::string& what) {
  char numbers[80];
  std::snprintf(numbers, sizeof numbers, ": relative error %.2Le, budget %.2e", error, budget);
  check(error <= budget, what + numbers);
}

// L2 error against expected[row * width + column]. With e the error before the last rounding, |round(a + e) - a| is at most
// |round(a) - a| + 2 |e|, so a 16-bit gradient is judged as sharply as a 32-bit one.
inline void check_gradient(const Matrix& got, const std::vector<Real>& expected, DType computed, const std::string& what) {
  Real error = 0, size = 0, rounding = 0;
  Matrix rounded(got.dtype, 1, 1);
  for (int64_t r = 0; r < got.rows; ++r)
    for (int64_t k = 0; k < got.width; ++k) {
      const Real truth = expected[r * got.width + k];
      if (truth == 0) check(got.get(r, k) == 0, what + ": not zero where it must be");
      rounded.set(0, 0, double(truth));
      rounding += std::pow(rounded.get(0, 0) - truth, 2);
      error += std::pow(got.get(r, k) - truth, 2);
      size += truth * truth;
    }
  double budget = gradient_budget(computed);
  if (computed == DType::f64 && got.dtype != DType::f64) budget = 0x1p-24;  // the way to 16 bits may lead through 32
  if (computed != got.dtype) budget = 2 * budget + double(size > 0 ? std::sqrt(rounding / size) : 0);
  check_error(std::sqrt(error / (size > 0 ? size : 1)), budget, what);
  check(got.gaps_untouched(), what + ": wrote beyond a row");
}

// The status that CTest reads as "skipped", where this machine lacks the instruction set asked for.
inline void skip_without_isa() {
  const char* isa = std::getenv("KDFAST_CPU_ISA");
  if (isa && *isa && !kdfast::cpu::isa_available(isa)) std::exit(77);
}
inline int report() {
  std::printf("%s: %d checks, %d failed\n", kdfast::cpu::isa_name(), checks, failures);
  return failures > 0;
}

}  // namespace test
