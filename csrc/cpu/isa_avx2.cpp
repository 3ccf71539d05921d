// The kernels for x86-64 machines with AVX2, FMA and F16C.
#if defined(__x86_64__)
#define KDFAST_ISA avx2
#define KDFAST_VECTOR_BYTES 32
#define KDFAST_AVX2
#define KDFAST_TARGET "avx2,fma,f16c"
#include "kernels.inl"
#endif
