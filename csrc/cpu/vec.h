// SIMD: what the kernels need of a vector, for the instruction set of the unit that includes it. A unit (isa_*.cpp) first sets
// the compiler's target and defines KDFAST_ISA (a namespace, so that the linker keeps the units' code apart),
// KDFAST_VECTOR_BYTES, and KDFAST_AVX2 or KDFAST_AVX512 where those intrinsics may be used. Everything else is GCC/Clang vector
// extensions. No std:: function is called: an inline one could be kept from a unit that the machine cannot run.

namespace kdfast::cpu::KDFAST_ISA {
namespace {

using math::Scalar;

typedef float VecF __attribute__((vector_size(KDFAST_VECTOR_BYTES), may_alias));
typedef double VecD __attribute__((vector_size(KDFAST_VECTOR_BYTES), may_alias));

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

template <class F>
struct VecOf;
template <>
struct VecOf<float> {
  typedef VecF type;
  typedef int32_t Int __attribute__((vector_size(KDFAST_VECTOR_BYTES)));
  static constexpr int mantissa = 23, lowest = -126;
  static constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
};
template <>
struct VecOf<double> {
  typedef VecD type;
  typedef int64_t Int __attribute__((vector_size(KDFAST_VECTOR_BYTES)));
  static constexpr int mantissa = 52, lowest = -1022;
  static constexpr double magic = 6755399441055744.0;
};
template <class V>
using ScalarOf = typename Scalar<V>::type;
template <class V>
using IntOf = typename VecOf<ScalarOf<V>>::Int;
template <class V>
inline constexpr int kLanes = sizeof(V) / sizeof(ScalarOf<V>);

// A whole vector, or its first n lanes.
struct Full {};
struct First {
  int n;
};

template <class V>
KDFAST_INLINE V splat(ScalarOf<V> x) {
  return x - V{};
}
// b where either is NaN.
template <class V>
KDFAST_INLINE V vmax(V a, V b) {
#if defined(KDFAST_AVX512)
  if constexpr (sizeof(ScalarOf<V>) == 4)
    return _mm512_max_ps(a, b);
  else
    return _mm512_max_pd(a, b);
#elif defined(KDFAST_AVX2)
  if constexpr (sizeof(ScalarOf<V>) == 4)
    return _mm256_max_ps(a, b);
  else
    return _mm256_max_pd(a, b);
#else
  return a > b ? a : b;
#endif
}
template <class V>
KDFAST_INLINE V vmin(V a, V b) {
#if defined(KDFAST_AVX512)
  if constexpr (sizeof(ScalarOf<V>) == 4)
    return _mm512_min_ps(a, b);
  else
    return _mm512_min_pd(a, b);
#elif defined(KDFAST_AVX2)
  if constexpr (sizeof(ScalarOf<V>) == 4)
    return _mm256_min_ps(a, b);
  else
    return _mm256_min_pd(a, b);
#else
  return a < b ? a : b;
#endif
}
template <class V>
KDFAST_INLINE V vsqrt(V x) {
#if defined(KDFAST_AVX512)
  if constexpr (sizeof(ScalarOf<V>) == 4)
    return _mm512_sqrt_ps(x);
  else
    return _mm512_sqrt_pd(x);
#elif defined(KDFAST_AVX2)
  if constexpr (sizeof(ScalarOf<V>) == 4)
    return _mm256_sqrt_ps(x);
  else
    return _mm256_sqrt_pd(x);
#else
  for (int i = 0; i < kLanes<V>; ++i) x[i] = sizeof(ScalarOf<V>) == 4 ? __builtin_sqrtf(x[i]) : __builtin_sqrt(x[i]);
  return x;
#endif
}
// Whether the mask holds in any lane.
template <class I>
KDFAST_INLINE bool any(I mask) {
#if defined(KDFAST_AVX512)
  return _mm512_movepi8_mask((__m512i)mask) != 0;
#elif defined(KDFAST_AVX2)
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#else
  bool found = false;
  for (unsigned i = 0; i < sizeof(mask) / sizeof(mask[0]); ++i) found |= mask[i] != 0;
  return found;
#endif
}
template <class V>
KDFAST_INLINE V magnitude(V x) {
  return (V)((IntOf<V>)x & ~(IntOf<V>)splat<V>(ScalarOf<V>(-0.0)));
}
// Lane i with lane i + n / 2, then the same for the lower half: always in the same order.
template <class V, class Op>
KDFAST_INLINE ScalarOf<V> reduce(V v, Op op) {
  if constexpr (kLanes<V> == 16) v = op(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  if constexpr (kLanes<V> == 16) v = op(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 15));
  if constexpr (kLanes<V> == 16) v = op(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  if constexpr (kLanes<V> == 16) v = op(v, __builtin_shufflevector(v, v, 1, 0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  if constexpr (kLanes<V> == 8) v = op(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
  if constexpr (kLanes<V> == 8) v = op(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 4, 5, 6, 7));
  if constexpr (kLanes<V> == 8) v = op(v, __builtin_shufflevector(v, v, 1, 0, 2, 3, 4, 5, 6, 7));
  if constexpr (kLanes<V> == 4) v = op(v, __builtin_shufflevector(v, v, 2, 3, 0, 1));
  if constexpr (kLanes<V> == 4) v = op(v, __builtin_shufflevector(v, v, 1, 0, 2, 3));
  if constexpr (kLanes<V> == 2) v = op(v, __builtin_shufflevector(v, v, 1, 0));
  return v[0];
}
struct Plus {
  template <class V>
  KDFAST_INLINE V operator()(V a, V b) const {
    return a + b;
  }
};
struct Larger {
  template <class V>
  KDFAST_INLINE V operator()(V a, V b) const {
    return vmax(a, b);
  }
};
template <class V>
KDFAST_INLINE ScalarOf<V> sum(V v) {
  return reduce(v, Plus{});
}
// The sums of four vectors, by halves as in `reduce`, in about a third of the steps that one after the other would take.
template <class F>
struct FourSums {
  F a, b, c, d;
};
template <class V>
KDFAST_INLINE FourSums<ScalarOf<V>> sums(V a, V b, V c, V d) {
  if constexpr (kLanes<V> == 16) {
    const V ab = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                 __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    const V cd = __builtin_shufflevector(c, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                 __builtin_shufflevector(c, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    V x = __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
          __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    x += __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return {x[0], x[4], x[8], x[12]};
  } else if constexpr (kLanes<V> == 8) {
    const V ab =
        __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
    const V cd =
        __builtin_shufflevector(c, d, 0, 1, 2, 3, 8, 9, 10, 11) + __builtin_shufflevector(c, d, 4, 5, 6, 7, 12, 13, 14, 15);
    V x =
        __builtin_shufflevector(ab, cd, 0, 1, 4, 5, 8, 9, 12, 13) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7, 10, 11, 14, 15);
    x += __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6);
    return {x[0], x[2], x[4], x[6]};
  } else {
    return {sum(a), sum(b), sum(c), sum(d)};
  }
}
template <class V>
KDFAST_INLINE ScalarOf<V> largest(V v) {
  return reduce(v, Larger{});
}

// 2^x, rounded within an ulp, for x <= 0, and above it while 2^x is a normal number. 0 below the normal numbers, NaN for NaN.
template <class V>
KDFAST_INLINE V exp2_nonpositive(V x) {
  using F = ScalarOf<V>;
#if defined(KDFAST_AVX512)
  V fraction, result;
  if constexpr (sizeof(F) == 4) {
    fraction = (V)_mm512_reduce_ps((__m512)x, 0);
    result = (V)_mm512_scalef_ps((__m512)math::polynomial<math::Exp2Series<F>>(fraction), (__m512)(x - fraction));
  } else {
    fraction = (V)_mm512_reduce_pd((__m512d)x, 0);
    result = (V)_mm512_scalef_pd((__m512d)math::polynomial<math::Exp2Series<F>>(fraction), (__m512d)(x - fraction));
  }
  return result;  // (FlushSubnormals is on)
#else
  using T = VecOf<F>;
  const V lowest = splat<V>(F(T::lowest));
  const V bounded = vmax(lowest, x);
  const V shifted = bounded + T::magic;
  const V fraction = bounded - (shifted - T::magic);
  const V mantissa = math::polynomial<math::Exp2Series<F>>(fraction);
  // (Not by adding to the mantissa's bits: with some payloads that makes a number of a NaN.)
  const V power = (V)((IntOf<V>)splat<V>(1) + ((IntOf<V>)shifted << T::mantissa));
  return x < lowest ? V{} : mantissa * power;
#endif
}

// a * x - b, rounded once where kFused: where the instruction set has one for it.
#if defined(KDFAST_AVX2)
inline constexpr bool kFused = true;
#else
inline constexpr bool kFused = false;
#endif
template <class V>
KDFAST_INLINE V multiply_subtract(V x, ScalarOf<V> a, ScalarOf<V> b) {
#if defined(KDFAST_AVX512)
  if constexpr (sizeof(ScalarOf<V>) == 4)
    return _mm512_fmsub_ps(x, splat<V>(a), splat<V>(b));
  else
    return _mm512_fmsub_pd(x, splat<V>(a), splat<V>(b));
#elif defined(KDFAST_AVX2)
  if constexpr (sizeof(ScalarOf<V>) == 4)
    return _mm256_fmsub_ps(x, splat<V>(a), splat<V>(b));
  else
    return _mm256_fmsub_pd(x, splat<V>(a), splat<V>(b));
#else
  return x * a - b;
#endif
}

// x * a + b, likewise.
template <class V>
KDFAST_INLINE V multiply_add(V x, V a, V b) {
#if defined(KDFAST_AVX512)
  if constexpr (sizeof(ScalarOf<V>) == 4)
    return _mm512_fmadd_ps(x, a, b);
  else
    return _mm512_fmadd_pd(x, a, b);
#elif defined(KDFAST_AVX2)
  if constexpr (sizeof(ScalarOf<V>) == 4)
    return _mm256_fmadd_ps(x, a, b);
  else
    return _mm256_fmadd_pd(x, a, b);
#else
  return x * a + b;
#endif
}
template <class V>
KDFAST_INLINE V multiply_add(V x, ScalarOf<V> a, V b) {
  return multiply_add(x, splat<V>(a), b);
}

// 2^x by the shorter series, for |x| below kShortExp2Limit.
inline constexpr float kShortExp2Limit = 125;
KDFAST_INLINE VecF short_exp2(VecF x) {
  using T = VecOf<float>;
  const VecF shifted = x + T::magic, mantissa = math::polynomial<math::ShortExp2Series>(x - (shifted - T::magic));
  return (VecF)((IntOf<VecF>)mantissa + ((IntOf<VecF>)shifted << T::mantissa));
}

// 2^(c x - origin) to about an ulp, with an origin that makes it 1 near x = `from`; c x itself is not rounded (but in the
// baseline), however large it is. 0 where it is below the normal numbers, kMostPower or more (or NaN) where it is above that.
// precise: twice as well, where the instruction set has such a form (kHasPrecise).
inline constexpr float kMostPower = 0x1p+100f;
// Of a row's powers: where their sum is below this, the origin lies too far off, and the lesser ones may be 0.
inline constexpr float kLeastSum = 0x1p-40f;
template <bool precise>
struct PowersOf {
  float c, from;
  double origin;

  float unit() const { return math::exp(0.693147181f * float(double(from) * c - origin)); }  // 2^(c from - origin)

#if defined(KDFAST_AVX512)
  static constexpr bool kHasPrecise = true;
  // SquareExp2::kScale 2^(i / 32)
  alignas(64) static constexpr float kScaledPowers[32] = {
      0.240228131f, 0.245488435f, 0.25086394f,  0.256357133f, 0.261970639f, 0.26770705f,  0.273569077f, 0.279559433f,
      0.285681009f, 0.291936606f, 0.298329175f, 0.304861724f, 0.311537355f, 0.318359107f, 0.325330287f, 0.332454085f,
      0.339733869f, 0.347173095f, 0.35477519f,  0.362543762f, 0.370482415f, 0.378594935f, 0.386885077f, 0.395356774f,
      0.404013962f, 0.412860692f, 0.421901166f, 0.431139618f, 0.440580338f, 0.450227797f, 0.460086495f, 0.47016108f};
  // 2^(i / 32)
  alignas(64) static constexpr float kPowers[32] = {
      1.0f,        1.0218972f,  1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f,  1.13878858f, 1.1637249f,
      1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f, 1.35425556f, 1.38390994f,
      1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f, 1.5759809f,  1.61049032f, 1.64575553f,
      1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f, 1.8340081f,  1.87416768f, 1.91520655f, 1.95714414f};
  static constexpr float magic = 0x1.8p+18f, kMostOrigin = 120;  // adding magic rounds to 1/32
  static constexpr float kMostSquares = kMostPower;
  VecF low, high;  // the table's numbers times 2^-origin

  PowersOf(float c, float from) : c(c), from(from) {
    const float shift = from * c, bounded = shift > kMostOrigin ? kMostOrigin : shift > -kMostOrigin ? shift : -kMostOrigin;
    const float whole = (bounded + VecOf<float>::magic) - VecOf<float>::magic;
    origin = whole;
    const float* table = precise ? kPowers : kScaledPowers;
    low = _mm512_scalef_ps(_mm512_loadu_ps(table), splat<VecF>(-whole));
    high = _mm512_scalef_ps(_mm512_loadu_ps(table + 16), splat<VecF>(-whole));
  }
  KDFAST_INLINE VecF operator()(VecF x) const {
    const VecF shifted = _mm512_fmadd_ps(x, splat<VecF>(c), splat<VecF>(magic)), rounded = shifted - magic;
    const VecF fraction = _mm512_fmsub_ps(x, splat<VecF>(c), rounded);
    const VecF step = _mm512_permutex2var_ps(low, (__m512i)shifted, high);  // by the five lowest bits
    if constexpr (precise) {                                                // step (1 + growth), rounded once
      const VecF growth = fraction * math::polynomial<math::GrowthExp2Series>(fraction);
      return _mm512_scalef_ps(_mm512_fmadd_ps(step, growth, step), rounded);
    } else {
      const VecF shifted_fraction = fraction + math::SquareExp2::kShift;
      const VecF power = _mm512_fmadd_ps(shifted_fraction, shifted_fraction, splat<VecF>(math::SquareExp2::kRest));
      return _mm512_scalef_ps(step * power, rounded);  // (FlushSubnormals is on)
    }
  }
#elif defined(KDFAST_AVX2)
  static constexpr bool kHasPrecise = false;
  // 2^(i / 8), less i / 8 in the exponent's place: there 1/8 is added for every 1/8 of the exponent.
  static constexpr int32_t kPowers[8] = {0x3F800000, 0x3F7B95C2, 0x3F7837F0, 0x3F75FED7,
                                         0x3F7504F3, 0x3F75672A, 0x3F7744FD, 0x3F7AC0C7};
  static constexpr float magic = 0x1.8p+20f, kMostOrigin = 0x1p+17f;  // adding magic rounds to 1/8
  static constexpr float kMostSquares = kMostPower;
  VecF powers, least, most;  // kPowers times 2^-origin; the x whose powers are 0 and 2^126

  PowersOf(float c, float from) : c(c), from(from) {
    const float shift = from * c, bounded = shift > kMostOrigin ? kMostOrigin : shift > -kMostOrigin ? shift : -kMostOrigin;
    const float whole = (bounded + VecOf<float>::magic) - VecOf<float>::magic;
    origin = whole;
    powers = (VecF)_mm256_sub_epi32(_mm256_loadu_si256((const __m256i*)kPowers),
                                    _mm256_set1_epi32(int32_t(uint32_t(int32_t(whole)) << 23)));
    least = splat<VecF>((whole - 126.5f) / c);
    most = splat<VecF>((whole + 126) / c);
  }
  KDFAST_INLINE VecF operator()(VecF x) const {
    x = vmin(most, vmax(least, x));
    const VecF shifted = multiply_add(x, c, splat<VecF>(magic)), rounded = shifted - magic;
    const VecF power = math::polynomial<math::SixteenthExp2Series>((VecF)_mm256_fmsub_ps(x, splat<VecF>(c), rounded));
    const __m256i steps = (__m256i)shifted;
    const __m256i step = (__m256i)_mm256_permutevar8x32_ps(powers, steps);  // by the three lowest bits
    // (The step is subnormal where the power is 0, and FlushSubnormals is on.)
    return (VecF)_mm256_add_epi32(step, _mm256_slli_epi32(steps, 20)) * power;
  }
#else
  static constexpr bool kHasPrecise = false;
  static constexpr float kMostSquares = 0x1p+16f;  // of powers above 2^8 the exponent's rounding would show

  PowersOf(float c, float from) : c(c), from(from) { origin = kFused ? double(from * c) : double(from) * c; }
  KDFAST_INLINE VecF operator()(VecF x) const {
    const VecF y = kFused ? multiply_subtract(x, c, float(origin)) : (x - from) * c;
    return exp2_nonpositive(vmin(splat<VecF>(126), y));
  }
#endif
};
using PowersFrom = PowersOf<false>;

// Sixteen-bit formats: widened exactly, narrowed to nearest even. Written so that flushed subnormals (FlushSubnormals below) do
// not touch a half's own subnormals.
template <class V>
struct Half {
  typedef uint16_t Bits __attribute__((vector_size(2 * kLanes<V>)));
  typedef uint32_t Words __attribute__((vector_size(4 * kLanes<V>)));
  typedef float Floats __attribute__((vector_size(4 * kLanes<V>)));
};
template <class V>
KDFAST_INLINE typename Half<V>::Floats widen(typename Half<V>::Bits h, BF16) {
#if defined(KDFAST_AVX512)
  if constexpr (sizeof(h) == 32) return (typename Half<V>::Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#endif
#if defined(KDFAST_AVX2)
  if constexpr (sizeof(h) == 16) return (typename Half<V>::Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
#endif
  return (typename Half<V>::Floats)(__builtin_convertvector(h, typename Half<V>::Words) << 16);
}
// Rounds to the upper halves; not a NaN, which some payloads would carry into a number.
template <class Words>
KDFAST_INLINE Words rounded_to_bf16(Words w) {
  return w + 0x7FFFu + ((w >> 16) & 1u);
}
template <class V>
KDFAST_INLINE typename Half<V>::Bits narrow(typename Half<V>::Floats x, BF16) {
#if defined(KDFAST_AVX512) && defined(__GNUC__)
  // The same bits in two micro-operations instead of nine. (As text, since the unit is compiled for machines without it too.)
  if constexpr (sizeof(x) == 64) {
    if (has_avx512_bf16) {
      __m256i h;
      asm("vcvtneps2bf16 %1, %0" : "=v"(h) : "v"((__m512)x));
      return (typename Half<V>::Bits)h;
    }
  }
#endif
  using Words = typename Half<V>::Words;
  const Words w = (Words)x;
  const Words rounded = rounded_to_bf16(w);
#if defined(KDFAST_AVX512)
  if constexpr (sizeof(w) == 64) {  // the odd words, and NaN's, in one instruction instead of four
    const __m512i words = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29, 27, 25, 23, 21, 19, 17, 15,
                                           13, 11, 9, 7, 5, 3, 1);
    const __mmask32 numbers = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_ORD_Q);
    return (typename Half<V>::Bits)_mm512_castsi512_si256(
        _mm512_mask_permutexvar_epi16(_mm512_set1_epi16(0x7FC0), numbers, words, (__m512i)rounded));
  }
#endif
  const Words result = x == x ? rounded : Words{} + 0x7FC00000u;
#if defined(KDFAST_AVX2)
  if constexpr (sizeof(w) == 32) {  // three instructions instead of six
    const __m256i words = _mm256_srli_epi32((__m256i)result, 16);
    return (typename Half<V>::Bits)_mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }
#endif
  return __builtin_convertvector(result >> 16, typename Half<V>::Bits);
}
template <class V>
KDFAST_INLINE typename Half<V>::Floats widen(typename Half<V>::Bits h, F16) {
#if defined(KDFAST_AVX512)
  if constexpr (sizeof(h) == 32) return (typename Half<V>::Floats)_mm512_cvtph_ps((__m256i)h);
#endif
#if defined(KDFAST_AVX2)
  if constexpr (sizeof(h) == 16) return (typename Half<V>::Floats)_mm256_cvtph_ps((__m128i)h);
#endif
  using Words = typename Half<V>::Words;
  using Floats = typename Half<V>::Floats;
  const Words w = __builtin_convertvector(h, Words), magnitude = (w & 0x7FFFu) << 13, exponent = magnitude & (0x7C00u << 13);
  const Words rebiased = magnitude + (112u << 23);
  const Words subnormal = (Words)((Floats)(rebiased + (1u << 23)) - 0x1p-14f);
  const Words finite = exponent == 0u ? subnormal : rebiased;
  return (Floats)((w & 0x8000u) << 16 | (exponent == 0x7C00u << 13 ? magnitude | 0x7F800000u : finite));
}
template <class V>
KDFAST_INLINE typename Half<V>::Bits narrow(typename Half<V>::Floats x, F16) {
#if defined(KDFAST_AVX512)
  if constexpr (sizeof(x) == 64) return (typename Half<V>::Bits)_mm512_cvtps_ph((__m512)x, 0);
#endif
#if defined(KDFAST_AVX2)
  if constexpr (sizeof(x) == 32) return (typename Half<V>::Bits)_mm256_cvtps_ph((__m256)x, 0);
#endif
  using Words = typename Half<V>::Words;
  using Floats = typename Half<V>::Floats;
  const Words w = (Words)x, magnitude = w & 0x7FFFFFFFu;
  const Words normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const Words subnormal =
      (Words)((Floats)magnitude + 0.5f) - (Words)(Floats{} + 0.5f);  // an ulp of 0.5 is a half's least number
  const Words infinite = magnitude > 0x7F800000u ? Words{} + 0x7E00u : Words{} + 0x7C00u;
  const Words small = magnitude < 113u << 23 ? subnormal : normal;
  return __builtin_convertvector((w & 0x80000000u) >> 16 | (magnitude >= 0x477FF000u ? infinite : small),
                                 typename Half<V>::Bits);
}

// Memory. S is the type in memory, float, double, BF16 or F16; V the vector computed with.
template <class V, class S>
KDFAST_INLINE V load(const S* p, Full) {
  if constexpr (sizeof(S) == 2) {
    typename Half<V>::Bits h;
    __builtin_memcpy(&h, p, sizeof h);
    return __builtin_convertvector(widen<V>(h, S{}), V);
  } else {
    S __attribute__((vector_size(sizeof(S) * kLanes<V>))) v;
    __builtin_memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, V);
  }
}
template <class V, class S>
KDFAST_INLINE void store(S* p, V v, Full) {
  if constexpr (sizeof(S) == 2) {
    const auto h = narrow<V>(__builtin_convertvector(v, typename Half<V>::Floats), S{});
    __builtin_memcpy(p, &h, sizeof h);
  } else {
    typedef S Out __attribute__((vector_size(sizeof(S) * kLanes<V>)));
    const Out out = __builtin_convertvector(v, Out);
    __builtin_memcpy(p, &out, sizeof out);
  }
}
// Past the caches; p is aligned to a whole vector of S.
template <class V, class S>
KDFAST_INLINE void stream(S* p, V v) {
  alignas(64) S out[kLanes<V>];
  store(out, v, Full{});
#if defined(KDFAST_AVX512)
  if constexpr (sizeof(out) == 64) return _mm512_stream_si512((__m512i*)p, *(const __m512i_u*)out);
#endif
#if defined(KDFAST_AVX2)
  if constexpr (sizeof(out) == 32) return _mm256_stream_si256((__m256i*)p, *(const __m256i_u*)out);
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(out) == 16) return _mm_stream_si128((__m128i*)p, *(const __m128i_u*)out);
#endif
  __builtin_memcpy(p, out, sizeof out);
}
// What was streamed is in order with other stores from here on: another thread may be told that it is there.
inline void end_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}
template <class V>
KDFAST_INLINE IntOf<V> lane_numbers() {
  IntOf<V> lane;
  for (int i = 0; i < kLanes<V>; ++i) lane[i] = i;
  return lane;
}
template <class V>
KDFAST_INLINE IntOf<V> lanes_below(int n) {
  return lane_numbers<V>() < (ScalarOf<IntOf<V>>)n;
}
// The lanes from n on read as `fill`, and are not written.
template <class V, class S>
KDFAST_INLINE V load(const S* p, First first, ScalarOf<V> fill) {
#if defined(KDFAST_AVX512)
  const uint32_t mask = (1u << first.n) - 1;
  if constexpr (sizeof(S) == 4 && sizeof(ScalarOf<V>) == 4) return (V)_mm512_mask_loadu_ps((__m512)splat<V>(fill), mask, p);
  if constexpr (sizeof(S) == 2 && sizeof(ScalarOf<V>) == 4) {
    const auto h = (typename Half<V>::Bits)_mm256_maskz_loadu_epi16(mask, p);
    return (V)_mm512_mask_mov_ps((__m512)splat<V>(fill), mask, (__m512)widen<V>(h, S{}));
  }
#endif
  S padded[kLanes<V>] = {};
  __builtin_memcpy(padded, p, sizeof(S) * first.n);
  return lanes_below<V>(first.n) ? load<V>(padded, Full{}) : splat<V>(fill);
}
template <class V, class S>
KDFAST_INLINE V load(const S* p, Full, ScalarOf<V>) {
  return load<V>(p, Full{});
}
template <class V>
KDFAST_INLINE int64_t count_of(Full) {
  return kLanes<V>;
}
template <class V>
KDFAST_INLINE int64_t count_of(First first) {
  return first.n;
}
// x in the lanes, 0 in the others.
template <class V>
KDFAST_INLINE V only(Full, V x) {
  return x;
}
template <class V>
KDFAST_INLINE V only(First first, V x) {
  return lanes_below<V>(first.n) ? x : V{};
}
template <class V, class S>
KDFAST_INLINE void store(S* p, V v, First first) {
#if defined(KDFAST_AVX512)
  const uint32_t mask = (1u << first.n) - 1;
  if constexpr (sizeof(S) == 4 && sizeof(ScalarOf<V>) == 4) return _mm512_mask_storeu_ps(p, mask, (__m512)v);
  if constexpr (sizeof(S) == 2 && sizeof(ScalarOf<V>) == 4)
    return _mm256_mask_storeu_epi16(p, mask, (__m256i)narrow<V>((typename Half<V>::Floats)v, S{}));
#endif
  S padded[kLanes<V>];
  store(padded, v, Full{});
  __builtin_memcpy(p, padded, sizeof(S) * first.n);
}

// Of bfloat16 two vectors at a time, the even and the odd classes: half the instructions to widen and to narrow them.
template <class V, class S>
inline constexpr bool kByPairs = kLanes<V> == 16 && __is_same(S, BF16);
template <class V>
struct Pair {
  V even, odd;
};
#if defined(KDFAST_AVX512)
KDFAST_INLINE Pair<VecF> split(__m512i halves) {
  return {(VecF)_mm512_slli_epi32(halves, 16), (VecF)_mm512_and_epi32(halves, _mm512_set1_epi32(int(0xFFFF0000)))};
}
KDFAST_INLINE __m512i joined(Pair<VecF> x) {
#if defined(__GNUC__)
  if (has_avx512_bf16) {
    __m512i halves;  // the even ones, then the odd ones
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(halves) : "v"((__m512)x.even), "v"((__m512)x.odd));
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, halves);
  }
#endif
  using Words = typename Half<VecF>::Words;
  const Words nan = Words{} + 0x7FC00000u;
  const Words from_even = x.even == x.even ? rounded_to_bf16((Words)x.even) : nan;
  const Words from_odd = x.odd == x.odd ? rounded_to_bf16((Words)x.odd) : nan;
  return _mm512_mask_mov_epi16((__m512i)from_odd, 0x55555555, (__m512i)(from_even >> 16));
}
KDFAST_INLINE Pair<VecF> load_pair(const BF16* p, Full) { return split(_mm512_loadu_si512(p)); }
KDFAST_INLINE Pair<VecF> load_pair(const BF16* p, First first) {
  return split(_mm512_maskz_loadu_epi16((1u << first.n) - 1, p));
}
KDFAST_INLINE void store(BF16* p, Pair<VecF> x, Full) { _mm512_storeu_si512(p, joined(x)); }
KDFAST_INLINE void store(BF16* p, Pair<VecF> x, First first) { _mm512_mask_storeu_epi16(p, (1u << first.n) - 1, joined(x)); }
KDFAST_INLINE void stream(BF16* p, Pair<VecF> x) { _mm512_stream_si512((__m512i*)p, joined(x)); }
#endif

// Calls body with a value of the type in memory. Only where F is double may that be double.
template <class F, class Body>
KDFAST_INLINE auto with_type(DType dtype, Body body) {
  if constexpr (sizeof(F) == 8)
    if (dtype == DType::f64) return body(double{});
  if (dtype == DType::f32) return body(float{});
  return dtype == DType::bf16 ? body(BF16{}) : body(F16{});
}

// A pointer to numbers of a type that only their DType tells, for the pairs of two types: code of its own for each of them
// would take minutes to compile. S is AnyType then, and Pointer<S> what S* is otherwise.
struct AnyType {};
struct AnyPointer {
  char* data = nullptr;
  DType dtype = DType::f32;
  int64_t at = 0;

  KDFAST_INLINE AnyPointer operator+(int64_t i) const { return {data, dtype, at + i}; }
  template <class S>
  KDFAST_INLINE S* as(S) const {
    return reinterpret_cast<S*>(data) + at;
  }
};
template <class S>
struct PointerOf {
  using type = S*;
};
template <>
struct PointerOf<AnyType> {
  using type = AnyPointer;
};
template <>
struct PointerOf<const AnyType> {
  using type = AnyPointer;
};
template <class S>
using Pointer = typename PointerOf<S>::type;

KDFAST_INLINE int64_t bytes_each(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
KDFAST_INLINE int64_t bytes_each(AnyPointer p) { return bytes_each(p.dtype); }
KDFAST_INLINE char* address(AnyPointer p) { return p.data + p.at * bytes_each(p); }
template <class S>
KDFAST_INLINE int64_t bytes_each(S*) {
  return sizeof(S);
}
template <class S>
KDFAST_INLINE S* address(S* p) {
  return p;
}
template <class S, class Void>
KDFAST_INLINE Pointer<S> pointer_to(Void* data, DType dtype) {
  if constexpr (sizeof(S) == 1)
    return AnyPointer{static_cast<char*>(const_cast<void*>(data)), dtype, 0};
  else
    return static_cast<S*>(data);
}
template <class V, class Lanes>
KDFAST_INLINE V load(AnyPointer p, Lanes lanes, ScalarOf<V> fill) {
  return with_type<ScalarOf<V>>(p.dtype, [&](auto number) { return load<V>(p.as(number), lanes, fill); });
}
template <class V, class Lanes>
KDFAST_INLINE void store(AnyPointer p, V v, Lanes lanes) {
  with_type<ScalarOf<V>>(p.dtype, [&](auto number) { store(p.as(number), v, lanes); });
}
template <class V>
KDFAST_INLINE void stream(AnyPointer p, V v) {
  with_type<ScalarOf<V>>(p.dtype, [&](auto number) { stream(p.as(number), v); });
}

// The lower or the upper half of the lanes, in double precision.
template <int half>
KDFAST_INLINE VecD widened(VecF v) {
#if defined(KDFAST_AVX512)  // (one instruction, which the compiler does not find)
  return _mm512_cvtps_pd(half == 0 ? _mm512_castps512_ps256(v) : _mm512_extractf32x8_ps(v, 1));
#endif
  constexpr int n = kLanes<VecF> / 2, at = half * n;
  if constexpr (n == 8)
    return __builtin_convertvector(__builtin_shufflevector(v, v, at, at + 1, at + 2, at + 3, at + 4, at + 5, at + 6, at + 7),
                                   VecD);
  else if constexpr (n == 4)
    return __builtin_convertvector(__builtin_shufflevector(v, v, at, at + 1, at + 2, at + 3), VecD);
  else
    return __builtin_convertvector(__builtin_shufflevector(v, v, at, at + 1), VecD);
}

// A row's sum. A float holds the sum of one block of vectors at the most, or one more: over a long row of nearly equal terms
// each addition to a running float would round the same way, a hundred times the error of a term in the end.
template <class V>
struct Sum {
  static constexpr int64_t kBlock = 16 * kLanes<V>;

  V part{};
  VecD carried{};

  KDFAST_INLINE void operator+=(V x) { part += x; }
  KDFAST_INLINE void carry() {
    if constexpr (sizeof(ScalarOf<V>) == 4)
      carried = (carried + widened<0>(part)) + widened<1>(part);
    else
      carried += part;
    part = V{};
  }
  KDFAST_INLINE double exact() const { return sum(carried); }
  KDFAST_INLINE ScalarOf<V> value() const { return ScalarOf<V>(exact()); }
};

// Calls body(i, lanes) for every `vectors` vectors of the classes from `begin` to `end`: i their first class, lanes Full or,
// for the last ones, First. Carries the sums that the body adds to.
template <class V, int vectors = 1, class Body, class... Sums>
KDFAST_INLINE void for_each_vector(int64_t begin, int64_t end, Body body, Sums&... sums) {
  constexpr int64_t step = vectors * kLanes<V>;
  int64_t i = begin;
  while (i + step <= end) {
    const int64_t stop = sizeof...(Sums) == 0 || end - i < Sum<V>::kBlock ? end : i + Sum<V>::kBlock;
    for (; i + step <= stop; i += step) body(i, Full{});
    if (i + step <= end) (sums.carry(), ...);
  }
  if (i < end) body(i, First{int(end - i)});
  (sums.carry(), ...);
}

// Subnormal results and operands read as zero while this lives: they cost a hundred cycles each and carry nothing a loss can
// show.
struct FlushSubnormals {
#if defined(__SSE2__)
  unsigned saved = _mm_getcsr();
  FlushSubnormals() { _mm_setcsr(saved | 0x8040u); }
  ~FlushSubnormals() { _mm_setcsr(saved); }
#endif
};

}  // namespace
}  // namespace kdfast::cpu::KDFAST_ISA
