// Chooses the instruction set once, and forwards the calls to its kernels.
#include "cpu/dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace kdfast::cpu {
namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool (*supported)();
};

// Widest first.
const Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512", &avx512::kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl");
     }},
    {"avx2", &avx2::kernels,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
#endif
    {"baseline", &baseline::kernels, [] { return true; }},
};

const Isa& choose() {
  const char* wanted = std::getenv("KDFAST_CPU_ISA");
  std::string available;
  for (const Isa& isa : kIsas) {
    if (!isa.supported()) continue;
    if (wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, isa.name) == 0) return isa;
    available += std::string(available.empty() ? "" : ", ") + isa.name;
  }
  throw std::invalid_argument(std::string("KDFAST_CPU_ISA is '") + wanted + "'; this machine and build take: " + available);
}

const Isa& chosen() {
  static const Isa& isa = choose();
  return isa;
}

}  // namespace

#if defined(__x86_64__)
const bool has_avx512_bf16 = __builtin_cpu_supports("avx512bf16");
#else
const bool has_avx512_bf16 = false;
#endif

const char* isa_name() { return chosen().name; }

bool isa_available(const char* name) {
  for (const Isa& isa : kIsas)
    if (std::strcmp(isa.name, name) == 0) return isa.supported();
  return false;
}

void kl_div_tau_forward(const KlDivTauArgs& args, int64_t begin, int64_t end) {
  chosen().kernels->kl_div_tau_forward(args, begin, end);
}
void kl_div_tau_backward(const KlDivTauArgs& args, int64_t begin, int64_t end) {
  chosen().kernels->kl_div_tau_backward(args, begin, end);
}
void logit_mse_forward(const LogitMseArgs& args, int64_t begin, int64_t end) {
  chosen().kernels->logit_mse_forward(args, begin, end);
}
void logit_mse_backward(const LogitMseArgs& args, int64_t begin, int64_t end) {
  chosen().kernels->logit_mse_backward(args, begin, end);
}
void logit_huber_forward(const LogitHuberArgs& args, int64_t begin, int64_t end) {
  chosen().kernels->logit_huber_forward(args, begin, end);
}
void logit_huber_backward(const LogitHuberArgs& args, int64_t begin, int64_t end) {
  chosen().kernels->logit_huber_backward(args, begin, end);
}
void kd_loss_forward(const KdLossArgs& args, int64_t begin, int64_t end) {
  chosen().kernels->kd_loss_forward(args, begin, end);
}
void kd_loss_backward(const KdLossArgs& args, int64_t begin, int64_t end) {
  chosen().kernels->kd_loss_backward(args, begin, end);
}
void scale_gradient(void* out, const void* in, DType dtype, double factor, int64_t begin, int64_t end) {
  chosen().kernels->scale_gradient(out, in, dtype, factor, begin, end);
}

}  // namespace kdfast::cpu
