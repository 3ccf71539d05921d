// Each loss: its parameters as its operators take them, what they make of its kernels' arguments, and the kernels. Then the
// reduction over rows on the CPU. No torch header here: ops.cpp and direct.cpp share it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"
#include "kl_math.h"

namespace kdfast {

struct KlDivTau {
  using Args = KlDivTauArgs;
  static constexpr int kValues = 1;
  static constexpr auto forward = cpu::kl_div_tau_forward;
  static constexpr auto backward = cpu::kl_div_tau_backward;
#ifdef KDFAST_WITH_CUDA
  static void forward_cuda(const Args& args, const cuda::Call& call) { cuda::kl_div_tau_forward(args, call); }
  static void backward_cuda(const Args& args, const cuda::Call& call) { cuda::kl_div_tau_backward(args, call); }
#endif

  double tau, teacher_tau;
  bool scale_by_tau_squared;

  void fill(Args& args) const {
    args.tau = tau;
    args.teacher_tau = teacher_tau;
    args.scale = scale_by_tau_squared ? tau * tau : 1;
  }
  static int64_t stats() { return KlStat::count; }
  static double per_row(const Args&) { return 1; }  // how many elements a row counts for in a mean
};

struct LogitMse {
  using Args = LogitMseArgs;
  static constexpr int kValues = 1;
  static constexpr auto forward = cpu::logit_mse_forward;
  static constexpr auto backward = cpu::logit_mse_backward;
#ifdef KDFAST_WITH_CUDA
  static void forward_cuda(const Args& args, const cuda::Call& call) { cuda::logit_mse_forward(args, call); }
  static void backward_cuda(const Args& args, const cuda::Call& call) { cuda::logit_mse_backward(args, call); }
#endif

  bool center;
  bool tau_limit;  // 0.5 / K times the centred sum: kl_div_tau at tau = infinity

  void fill(Args& args) const {
    args.center = center;
    args.per_class = tau_limit;
    args.scale = tau_limit ? 0.5 : 1;
  }
  int64_t stats() const { return center ? MseStat::count : 0; }
  double per_row(const Args& args) const { return tau_limit ? 1 : double(args.classes); }
};

struct LogitHuber {
  using Args = LogitHuberArgs;
  static constexpr int kValues = 1;
  static constexpr auto forward = cpu::logit_huber_forward;
  static constexpr auto backward = cpu::logit_huber_backward;
#ifdef KDFAST_WITH_CUDA
  static void forward_cuda(const Args& args, const cuda::Call& call) { cuda::logit_huber_forward(args, call); }
  static void backward_cuda(const Args& args, const cuda::Call& call) { cuda::logit_huber_backward(args, call); }
#endif

  double delta;
  bool smooth_l1, center;

  void fill(Args& args) const {
    args.delta = delta;
    args.smooth_l1 = smooth_l1;
    args.center = center;
  }
  int64_t stats() const { return center ? HuberStat::count : 0; }
  static double per_row(const Args& args) { return double(args.classes); }
};

struct KdLoss {
  using Args = KdLossArgs;
  static constexpr int kValues = 3;  // loss, hard part, soft part
  static constexpr auto forward = cpu::kd_loss_forward;
  static constexpr auto backward = cpu::kd_loss_backward;
#ifdef KDFAST_WITH_CUDA
  static void forward_cuda(const Args& args, const cuda::Call& call) { cuda::kd_loss_forward(args, call); }
  static void backward_cuda(const Args& args, const cuda::Call& call) { cuda::kd_loss_backward(args, call); }
#endif

  Numbers target;
  double tau, alpha;
  Soft soft;
  int64_t ignore_index;
  double label_smoothing;

  void fill(Args& args) const {
    args.soft = soft;
    args.center = args.per_class = soft == Soft::tau_limit;
    if (soft == Soft::kl) args.tau = args.teacher_tau = tau;
    args.scale = soft == Soft::kl ? tau * tau : soft == Soft::tau_limit ? 0.5 : 1;
    args.alpha = alpha;
    args.label_smoothing = label_smoothing;
    args.ignore_index = ignore_index;
    args.target = target;
  }
  int64_t stats() const { return HardStat::count + (soft == Soft::kl ? int(KlStat::count) : int(MseStat::count)); }
  double per_row(const Args& args) const { return soft == Soft::mse ? double(args.classes) : 1; }
};

// The first row that counts whose target is no class, -1 where there is none.
inline int64_t wrong_target(const KdLossArgs& args) {
  for (int64_t r = 0; r < args.rows; ++r) {
    const int64_t target = args.target.at(r, int64_t(0));
    if ((target < 0 || target >= args.classes) && target != args.ignore_index && args.weight.at(r, 1.0) != 0) return r;
  }
  return -1;
}

// Below this many logit pairs a call is not worth splitting over threads.
constexpr int64_t kPairsPerTask = 32768;

// What the sum over rows is divided by.
struct Divisor {
  std::optional<double> number;  // given
  Reduction reduction;
  int64_t batch;  // the logits' size(0)

  // `per_row`: how many elements a row counts for in a mean.
  double of(const Numbers& weight, int64_t rows, double per_row) const {
    if (number) return *number;
    switch (reduction) {
      case Reduction::None:
      case Reduction::Sum:
        return 1;
      case Reduction::BatchMean:
        return double(batch);
      case Reduction::Mean:
        break;
    }
    if (weight.data == nullptr || rows == 0) return double(rows) * per_row;
    double total = 0;
    for (int64_t r = 0; r < rows; ++r) total += weight.at(r, 1.0);
    return total == 0 ? 1 : total * per_row;  // every row masked: 0 / 1
  }
  // Of kd_loss's hard part, whose mean is over the rows that are not ignored.
  double of_hard(const KdLossArgs& args) const {
    if (number || reduction != Reduction::Mean || args.rows == 0) return of(args.weight, args.rows, 1);
    double total = 0;
    for (int64_t r = 0; r < args.rows; ++r)
      if (args.target.at(r, int64_t(0)) != args.ignore_index) total += args.weight.at(r, 1.0);
    return total == 0 ? 1 : total;
  }
};

// The sums of a reduction over rows on the CPU.
class CpuReduction {
  // One value a row, for a kernel to fill.
  struct Rows {
    bool wide;
    int64_t rows;
    std::vector<double> memory;

    Rows(bool wide, int64_t rows) : wide(wide), rows(rows), memory(wide ? rows : (rows + 1) / 2) {}
    template <class F>
    double sum_of(const F* values) const {
      double total = 0;
      for (int64_t i = 0; i < rows; ++i) total += values[i];
      return total;
    }
    double sum() const {
      const void* data = memory.data();
      return wide ? sum_of(static_cast<const double*>(data)) : sum_of(static_cast<const float*>(data));
    }
  };
  static void store(void* to, bool wide, double value) {
    if (wide)
      *static_cast<double*>(to) = value;
    else
      *static_cast<float*>(to) = float(value);
  }

  double divisor = 1, hard_divisor = 1;

 public:
  template <class Args>
  void divide(Args& args, const Divisor& by, double per_row) {
    divisor = by.of(args.weight, args.rows, per_row);
    args.grad_scale = 1 / divisor;
  }
  void divide(KdLossArgs& args, const Divisor& by, double per_row) {
    divisor = by.of(args.weight, args.rows, per_row);
    hard_divisor = by.of_hard(args);
    args.grad_scale = args.alpha / divisor;
    args.hard_grad_scale = (1 - args.alpha) / hard_divisor;
  }

  // Runs a forward kernel over all rows by run(args), and writes its kValues values: one number each, or, without a reduction,
  // one a row. Of double where `wide`, else of float.
  template <class Args, class Run>
  void forward(Args& args, Reduction reduction, bool wide, void* const* values, Run run) const {
    if (reduction == Reduction::None) {
      args.row_loss = values[0];
      return run(args);
    }
    Rows loss(wide, args.rows);
    args.row_loss = loss.memory.data();
    run(args);
    store(values[0], wide, loss.sum() / divisor);
  }
  template <class Run>
  void forward(KdLossArgs& args, Reduction reduction, bool wide, void* const* values, Run run) const {
    if (reduction == Reduction::None) {
      args.row_loss = values[0];
      args.row_hard = values[1];
      args.row_soft = values[2];
      return run(args);
    }
    Rows hard_rows(wide, args.rows), soft_rows(wide, args.rows);
    args.row_hard = hard_rows.memory.data();
    args.row_soft = soft_rows.memory.data();
    run(args);
    const double hard = hard_rows.sum() / hard_divisor, soft = soft_rows.sum() / divisor, a = args.alpha;
    store(values[0], wide, a == 0 ? hard : a == 1 ? soft : (1 - a) * hard + a * soft);
    store(values[1], wide, hard);
    store(values[2], wide, soft);
  }
};

// For a gradient that is about to be written on the CPU. Fresh memory comes from the system page by page, and for a large
// gradient that costs more than its arithmetic: huge pages cost an eighth of it. A hint, which the system may ignore.
inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096;
  constexpr size_t kFrom = 4 << 20;  // two huge pages: of less, hardly one lies within it
  if (bytes < kFrom) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data), first = (begin + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), (begin + bytes - first) / kPage * kPage, MADV_HUGEPAGE);
#endif
}

}  // namespace kdfast
