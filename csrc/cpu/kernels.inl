// The text of an ISA unit: sets the compiler's target, includes the kernels, and puts them in the unit's table.
#include <cstdint>
#include <cstdlib>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/dispatch.h"
#include "kernels.h"

#if defined(KDFAST_TARGET)
#define KDFAST_PRAGMA_TEXT(text) _Pragma(#text)
#define KDFAST_PRAGMA(text) KDFAST_PRAGMA_TEXT(text)
#if defined(__clang__)
KDFAST_PRAGMA(clang attribute push(__attribute__((target(KDFAST_TARGET))), apply_to = function))
#else
KDFAST_PRAGMA(GCC target(KDFAST_TARGET))  // to the end of the unit, where its templates are instantiated
#endif
#endif

// A vector type loses its attributes as a template argument's name, not as its type.
#pragma GCC diagnostic ignored "-Wignored-attributes"
// GCC 12 warns of its own AVX-512 intrinsics, which leave unread what they do not write.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#include "kl_math.h"

#include "cpu/vec.h"

#include "cpu/row_loop.inl"

#include "cpu/kl_div_tau.inl"
#include "cpu/logit_mse.inl"

#include "cpu/kd_loss.inl"
#include "cpu/logit_huber.inl"

namespace kdfast::cpu::KDFAST_ISA {
const Kernels kernels = {
    kl_div_tau_forward,   kl_div_tau_backward, logit_mse_forward, logit_mse_backward, logit_huber_forward,
    logit_huber_backward, kd_loss_forward,     kd_loss_backward,  scale_gradient,
};
}

#if defined(KDFAST_TARGET) && defined(__clang__)
#pragma clang attribute pop
#endif
