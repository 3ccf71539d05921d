// Raw-pointer interface of every kernel, shared by the CPU and the CUDA side. No torch header is included here or in any
// kernel.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

// Forced inline: a unit compiled for one instruction set must not lend its copy of a function to another.
#if defined(__CUDACC__)
#define KDFAST_INLINE __host__ __device__ __forceinline__
#else
#define KDFAST_INLINE inline __attribute__((always_inline))
#endif

namespace kdfast {

enum class DType : int { f64, f32, bf16, f16 };
enum class NumberType : int { f64, f32, bf16, f16, boolean, i32, i64 };

// Divisor of a scalar reduction before weights and denominator are looked at; None keeps one value a row.
enum class Reduction : int { None = 0, Sum = 1, Mean = 2, BatchMean = 3 };

// Where row r of a (..., K) tensor starts: its leading dimensions, merged where their strides allow, outermost first.
// Strides and offsets count elements. The class dimension has stride 1.
struct RowLayout {
  static constexpr int kMaxDims = 6;
  int dims = 1;
  int64_t size[kMaxDims] = {1};
  int64_t stride[kMaxDims] = {0};

  KDFAST_INLINE int64_t offset(int64_t row) const {
    int64_t at = 0;
#ifdef __CUDA_ARCH__
#pragma unroll 1
#endif
    for (int d = dims - 1; d > 0; --d) {
#ifdef __CUDA_ARCH__  // a division of 64-bit numbers takes a hundred instructions there
      const int64_t next = (row | size[d]) >> 32 == 0 ? int64_t(uint32_t(row) / uint32_t(size[d])) : row / size[d];
#else
      const int64_t next = row / size[d];
#endif
      at += (row - next * size[d]) * stride[d];
      row = next;
    }
    return at + row * stride[0];
  }
};

struct Logits {
  const void* data = nullptr;
  DType dtype = DType::f32;
  RowLayout rows;
};

// A gradient to write: every row has `width` columns; those from `classes` (in the arguments) on are written as zero.
struct Gradient {
  void* data = nullptr;  // nullptr: not wanted
  DType dtype = DType::f32;
  int64_t width = 0;
  RowLayout rows;
};

// A vector of plain numbers of any dtype: row weights, a loss's incoming gradient, a denominator.
struct Numbers {
  const void* data = nullptr;
  NumberType type = NumberType::f32;
  int64_t stride = 1;  // 0: one number for all rows

  template <class F>
  KDFAST_INLINE F at(int64_t row, F if_absent) const {
    if (data == nullptr) return if_absent;
    const int64_t i = row * stride;
    switch (type) {
      case NumberType::f64:
        return F(static_cast<const double*>(data)[i]);
      case NumberType::f32:
        return F(static_cast<const float*>(data)[i]);
      case NumberType::bf16:
        return F(from_bits(uint32_t(static_cast<const uint16_t*>(data)[i]) << 16));
      case NumberType::f16: {
        const uint32_t h = static_cast<const uint16_t*>(data)[i], magnitude = (h & 0x7FFFu) << 13;
        const float x = magnitude >= 0x7C00u << 13   ? from_bits(magnitude | 0x7F800000u)
                        : magnitude >= 0x0400u << 13 ? from_bits(magnitude + (112u << 23))
                                                     : float(h & 0x3FFu) * 0x1p-24f;
        return F(h & 0x8000u ? -x : x);
      }
      case NumberType::boolean:
        return F(static_cast<const uint8_t*>(data)[i] != 0);
      case NumberType::i32:
        return F(static_cast<const int32_t*>(data)[i]);
      case NumberType::i64:
        return F(static_cast<const int64_t*>(data)[i]);
    }
    return if_absent;
  }

 private:
  KDFAST_INLINE static float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
  }
};

// The compute type, F below, is double where a logit tensor is float64 and float otherwise.

// What every loss of two tensors of logits takes and gives: one value a row, times scale.
struct LossArgs {
  Logits student, teacher;
  int64_t rows = 0, classes = 0;
  double scale = 1;
  Numbers weight;  // data == nullptr: all ones. A row of weight 0 is not read.

  // Forward. row_loss[r] = weight * scale * the row's value; row_stats: what the loss leaves of a row for its backward. Both of
  // type F.
  void* row_loss = nullptr;
  void* row_stats = nullptr;  // nullptr: not wanted (forward), required (backward) of a loss that has any

  // Backward, and forward with gradient: the loss's derivative by the row's unweighted value is
  // grad_loss[r] * grad_scale * weight[r].
  Numbers grad_loss;  // data == nullptr: 1
  double grad_scale = 1;
  Gradient grad_student, grad_teacher;
};

// softmax-KL at temperature tau:  KL(softmax(teacher / teacher_tau) || softmax(student / tau)). scale is tau * tau or 1,
// row_stats as KlStat lists them.
struct KlDivTauArgs : LossArgs {
  double tau = 1, teacher_tau = 1;
};

// Sum of squared differences of the logits:  sum_k (d_k - c)^2,  d = student - teacher, c = mean_k d_k if center else 0, and
// scale divided by the number of classes counted if per_class. row_stats as MseStat lists them, only with center.
struct LogitMseArgs : LossArgs {
  bool center = false;
  bool per_class = false;
};

// The same with another function of the differences x = d - c in the place of x^2:
//   smooth_l1:  x^2 / (2 delta) where |x| < delta, else |x| - delta / 2
//   else:       delta^2 (sqrt(1 + (x / delta)^2) - 1)
// With center a gradient is the slope minus the row's mean slope. per_class and scale stay at their defaults.
struct LogitHuberArgs : LogitMseArgs {
  double delta = 1;
  bool smooth_l1 = false;
};

// The whole objective of distillation, one value a row:  weight * ((1 - alpha) * hard + alpha * soft)
//   hard: the student's cross-entropy at temperature 1 with the row's target, (1 - label_smoothing) (log Z - s_target) +
//         label_smoothing mean_k (log Z - s_k); 0 in a row whose target is ignore_index. A target that is neither that nor from
//         0 to classes - 1 makes the row NaN.
//   soft: what kl_div_tau computes, or logit_mse by `center`, `per_class` and `scale`.
// With alpha at 0 or 1 the other part takes no part in loss and gradient, whatever it holds. Student and teacher are both f64,
// or neither is.
enum class Soft : int { kl = 0, mse = 1, tau_limit = 2 };
struct KdLossArgs : KlDivTauArgs {
  Soft soft = Soft::kl;
  bool center = false, per_class = false;  // as in LogitMseArgs

  double alpha = 0.5, label_smoothing = 0;
  int64_t ignore_index = -100;
  Numbers target;  // i64 or i32

  // Forward, of type F: weight * hard and weight * soft; row_loss may be nullptr, their sums being what is wanted. row_stats
  // holds the soft part's numbers, then the hard part's (HardStat).
  void* row_hard = nullptr;
  void* row_soft = nullptr;

  // The two parts have a divisor each (a mean of the hard part is over the rows that are not ignored). Derivatives by a row's
  // unweighted soft and hard value: grad_loss[r] * weight[r] times grad_scale, which is alpha / the soft part's divisor, and
  // hard_grad_scale, (1 - alpha) / the hard part's.
  double hard_grad_scale = 1;
};

namespace cpu {

// Rows [begin, end). Forward writes the gradients too that are asked for (the teacher's beside the student's, not alone);
// backward reads row_stats.
void kl_div_tau_forward(const KlDivTauArgs& args, int64_t begin, int64_t end);
void kl_div_tau_backward(const KlDivTauArgs& args, int64_t begin, int64_t end);
void logit_mse_forward(const LogitMseArgs& args, int64_t begin, int64_t end);
void logit_mse_backward(const LogitMseArgs& args, int64_t begin, int64_t end);
void logit_huber_forward(const LogitHuberArgs& args, int64_t begin, int64_t end);
void logit_huber_backward(const LogitHuberArgs& args, int64_t begin, int64_t end);
void kd_loss_forward(const KdLossArgs& args, int64_t begin, int64_t end);
void kd_loss_backward(const KdLossArgs& args, int64_t begin, int64_t end);

// out[i] = in[i] * factor for i in [begin, end); out and in may be the same.
void scale_gradient(void* out, const void* in, DType dtype, double factor, int64_t begin, int64_t end);

// The instruction set in use: "baseline", "avx2" or "avx512". Chosen when first asked for: the widest one this machine has, or
// the one that the environment variable KDFAST_CPU_ISA names (std::invalid_argument where it cannot be had).
const char* isa_name();
bool isa_available(const char* name);

}  // namespace cpu

namespace cuda {

// What a call needs beside its arguments. Everything is read and written on the device, in the order of the stream; the host
// never waits, and a call can be captured in a CUDA graph. An error of a launch is thrown as std::runtime_error, with its
// sizes.
struct Call {
  void* stream = nullptr;     // cudaStream_t
  void* workspace = nullptr;  // workspace_bytes() bytes, 16-byte aligned
  void* loss = nullptr;       // the sum of the row losses over the divisor, of type F; nullptr: args.row_loss is what is wanted

  // The divisor of the loss and of every gradient (beside args.grad_scale).
  Numbers divisor;  // one number in device memory; data == nullptr: `number`
  double number = 1;
  double times_weights = 0;  // not 0: divide by this times the sum of the row weights too, where that is not 0

  // Of kd_loss, beside the above, which are the soft part's: the reduced parts, and the hard part's divisor.
  void *hard = nullptr, *soft = nullptr;
  Numbers hard_divisor;
  double hard_number = 1;
  bool hard_by_rows = false;  // the sum of the weights of the rows that are not ignored, 1 where that is 0
};

// args.row_loss may be nullptr where call.loss is not. Forward writes the student's gradient, or both, where asked for, and
// then leaves no row_stats.
size_t workspace_bytes(const KlDivTauArgs& args);
size_t workspace_bytes(const LogitMseArgs& args);
size_t workspace_bytes(const LogitHuberArgs& args);
size_t workspace_bytes(const KdLossArgs& args);
void kl_div_tau_forward(const KlDivTauArgs& args, const Call& call);
void kl_div_tau_backward(const KlDivTauArgs& args, const Call& call);
void logit_mse_forward(const LogitMseArgs& args, const Call& call);
void logit_mse_backward(const LogitMseArgs& args, const Call& call);
void logit_huber_forward(const LogitHuberArgs& args, const Call& call);
void logit_huber_backward(const LogitHuberArgs& args, const Call& call);
void kd_loss_forward(const KdLossArgs& args, const Call& call);
void kd_loss_backward(const KdLossArgs& args, const Call& call);

// out[i] = in[i] * factor for `count` numbers; out and in may be the same, and then a factor of 1 reads nothing.
void scale_gradient(void* out, const void* in, DType dtype, const Numbers& factor, int64_t count, void* stream);

}  // namespace cuda
}  // namespace kdfast
