// The kernels for x86-64 machines with AVX-512 F, BW, DQ and VL.
#if defined(__x86_64__)
#define KDFAST_ISA avx512
#define KDFAST_VECTOR_BYTES 64
#define KDFAST_AVX512
#define KDFAST_AVX2
#define KDFAST_TARGET "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"
#include "kernels.inl"
#endif
