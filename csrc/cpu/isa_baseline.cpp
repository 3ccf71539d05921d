// The kernels for any machine the compiler targets by default (SSE2 on x86-64, NEON on arm64).
#define KDFAST_ISA baseline
#define KDFAST_VECTOR_BYTES 16
#include "kernels.inl"
