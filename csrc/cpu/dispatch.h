// The table of kernels that every ISA unit fills, and dispatch.cpp chooses from.
#pragma once

#include "kernels.h"

namespace kdfast::cpu {

struct Kernels {
  void (*kl_div_tau_forward)(const KlDivTauArgs&, int64_t, int64_t);
  void (*kl_div_tau_backward)(const KlDivTauArgs&, int64_t, int64_t);
  void (*logit_mse_forward)(const LogitMseArgs&, int64_t, int64_t);
  void (*logit_mse_backward)(const LogitMseArgs&, int64_t, int64_t);
  void (*logit_huber_forward)(const LogitHuberArgs&, int64_t, int64_t);
  void (*logit_huber_backward)(const LogitHuberArgs&, int64_t, int64_t);
  void (*kd_loss_forward)(const KdLossArgs&, int64_t, int64_t);
  void (*kd_loss_backward)(const KdLossArgs&, int64_t, int64_t);
  void (*scale_gradient)(void*, const void*, DType, double, int64_t, int64_t);
};

extern const bool has_avx512_bf16;  // whether this machine can narrow floats to bfloat16 by itself

namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

}  // namespace kdfast::cpu
