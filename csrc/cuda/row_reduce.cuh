// What the losses share on CUDA: which threads work on a row, how they read and write it, how they reduce over it.
//
// A row is read once. A team of threads holds it in registers, a few neighbouring logits (a vector) at a time: part of a warp,
// a warp, a block, or several blocks of which each holds a slice. Slices are reduced each by itself to a few numbers
// (Loss::Partial), which are then merged: by the blocks of a cluster through their shared memory, else through a workspace by a
// second kernel. A loss (kl_div_tau.cu, logit_mse.cu) brings its arithmetic; `forward_kernel`, `merge_kernel` and
// `backward_kernel` bring the rest.
#pragma once

#include <cuda_runtime.h>

#include "kernels.h"
#include "kl_math.h"

namespace kdfast::cuda {

// ---- plans: which threads work on a row -----------------------------------------------------------------------------

constexpr int kMostThreads = 512;  // of a block: 128 registers each
constexpr int kMostWarps = kMostThreads / 32;
constexpr int kMostCluster = 16;
constexpr int kMostTeams = 128;  // of a block: one thread each

// The loss of kd_loss, of its parts: one whose share is 0 does not enter, whatever it is.
template <class F>
__device__ __forceinline__ F mixed(double alpha, F hard, F soft) {
  return alpha == 0 ? hard : alpha == 1 ? soft : F(1 - alpha) * hard + F(alpha) * soft;
}

struct Plan {
  int team = 1;     // threads of a block that share a row: a power of two up to 32, or all of them
  int teams = 1;    // of a block
  int threads = 1;  // of a block
  int slices = 1;   // blocks that share a row
  int slice_vectors = 0;
  bool cluster = false;
  bool decides = false;  // the row's threads, a warp or more, can find out something about it together before they go on
  unsigned blocks = 0;
  unsigned shared = 0;  // bytes of a block's shared memory that the launch sets aside

  // Of this thread.
  __device__ __forceinline__ int64_t row() const {
    if (slices > 1) return blockIdx.x / unsigned(slices);
    return teams == 1 ? int64_t(blockIdx.x) : int64_t(blockIdx.x) * teams + threadIdx.x / unsigned(team);
  }
  // The same, and what follows from it, computed again rather than kept: registers are scarce.
  __device__ __forceinline__ int64_t row_again() const {
    int64_t index = row();
    asm volatile("" : "+l"(index));
    return index;
  }
  __device__ __forceinline__ int slice() const { return slices > 1 ? int(blockIdx.x % unsigned(slices)) : 0; }
};

// `row_vectors`: vectors that a row takes at most; `per_thread`: those that a thread takes at most.
Plan plan_rows(int64_t rows, int64_t row_vectors, int per_thread);
// The number of a launch's blocks, where a launch may have as many.
unsigned blocks_of(int64_t blocks, int64_t rows);
// The number of vectors that no row exceeds, given how its start is aligned.
int64_t vectors_of_row(const Logits& student, int64_t classes, int width);

// Memory of a call, carved from its workspace.
struct Workspace {
  double *divisor, *hard_divisor;
  unsigned* ticket;
  void* row_loss;
  float* row_stats;
  float* partials;
  size_t bytes;

  // Sizes in bytes.
  Workspace(void* base, size_t row_loss_size, size_t row_stats_size, size_t partials_size);
};

struct Task;

// A counter that is zero, for the blocks of one launch to find out which is the last; the last sets it back to zero.
unsigned* zeroed_ticket(cudaStream_t stream, unsigned* in_workspace);
// Sums the row weights for call.times_weights and returns the resulting divisor, a number in device memory.
Numbers resolve_divisor(const Call& call, const Numbers& weight, int64_t rows, double* in_workspace);
// The same for the hard part of kd_loss: the weights of the rows that are not ignored.
Numbers resolve_hard_divisor(const Call& call, const KdLossArgs& args, double* in_workspace);

// The loss of no rows: 0 over the divisor.
void sum_nothing(const Task& task, bool wide, cudaStream_t stream);

// Launches kernel(arguments...); `what` and the sizes go into the error, should there be one.
void launch(const void* kernel, const Plan& plan, cudaStream_t stream, void** arguments, const char* what, int64_t rows,
            int64_t classes);

// ---- teams ----------------------------------------------------------------------------------------------------------

struct Team {
  int size;       // threads
  int lane;       // this thread's number among them
  unsigned mask;  // those of this warp
  int warps;      // more than one only where the team is the block

  __device__ explicit Team(const Plan& plan) {
    size = plan.team;
    lane = size > 32 ? threadIdx.x : threadIdx.x & (size - 1);
    warps = size > 32 ? size / 32 : 1;
    mask = size >= 32 ? 0xFFFFFFFFu : ((1u << size) - 1) << (threadIdx.x & 31 & ~(size - 1));
  }
  __device__ bool leads() const { return lane == 0; }
  __device__ __forceinline__ unsigned slot() const { return size > 32 ? 0 : threadIdx.x / unsigned(size); }  // of its block's
};

struct Max {
  template <class F>
  __device__ F operator()(F a, F b) const {
    return a > b ? a : b;
  }
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
  static constexpr double identity = -INFINITY;
};
struct Sum {
  template <class F>
  __device__ F operator()(F a, F b) const {
    return a + b;
  }
  static constexpr double identity = 0;
};

// The larger of `size` and the magnitude of x, where that is finite.
template <class F>
__device__ __forceinline__ F finite_larger(F size, F x) {
  x = x < 0 ? -x : x;
  return x > size && x < F(INFINITY) ? x : size;
}

template <class Op, class F, int N>
__device__ __forceinline__ void combine(F (&x)[N], int distance, unsigned mask) {
#pragma unroll
  for (int n = 0; n < N; ++n) x[n] = Op()(x[n], __shfl_xor_sync(mask, x[n], distance));
}

// Reduces N numbers over a team, in a fixed order; every thread gets the result. `shared` is used by no other reduction of the
// block.
template <class Op, class F, int N>
__device__ __forceinline__ void reduce(const Team& team, F (&x)[N], F (&shared)[kMostWarps][N]) {
  if (team.size < 32) {
    for (int distance = team.size / 2; distance > 0; distance /= 2) combine<Op>(x, distance, team.mask);
    return;
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) combine<Op>(x, distance, 0xFFFFFFFFu);
  if (team.warps == 1) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane == 0)
    for (int n = 0; n < N; ++n) shared[warp][n] = x[n];
  __syncthreads();
  // Every 16 lanes, or 8, read all warps' numbers, and end with the same result.
  const int from = lane & (team.warps > kMostWarps / 2 ? kMostWarps - 1 : kMostWarps / 2 - 1);
  for (int n = 0; n < N; ++n) x[n] = from < team.warps ? shared[from][n] : F(Op::identity);
  if (team.warps > kMostWarps / 2) combine<Op>(x, kMostWarps / 2, 0xFFFFFFFFu);
#pragma unroll
  for (int distance = kMostWarps / 4; distance > 0; distance /= 2) combine<Op>(x, distance, 0xFFFFFFFFu);
}

template <class F, class Op>
__device__ __forceinline__ F reduce_warp(F x, Op op) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x = op(x, __shfl_xor_sync(0xFFFFFFFFu, x, distance));
  return x;
}

// In a tree: its rounding is smaller than that of one sum after the other.
template <int n>
__device__ __forceinline__ float sum_by_halves(const float (&x)[n]) {
  float sums[n];
#pragma unroll
  for (int i = 0; i < n; ++i) sums[i] = x[i];
#pragma unroll
  for (int half = n / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

// Adds up N integers over a team of a warp or more: an instruction adds up a warp's.
template <int N>
__device__ __forceinline__ void sum_integers(const Team& team, unsigned (&x)[N], unsigned (&shared)[kMostWarps][N]) {
#pragma unroll
  for (int n = 0; n < N; ++n) x[n] = __reduce_add_sync(0xFFFFFFFFu, x[n]);
  if (team.warps == 1) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (lane == 0)
    for (int n = 0; n < N; ++n) shared[warp][n] = x[n];
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) x[n] = __reduce_add_sync(0xFFFFFFFFu, lane < team.warps ? shared[lane][n] : 0u);
}

// A number of at least 0 and below kMost in fixed point, so that `sum_integers` rounds nothing: `whole` counts 2^-15, which the
// number is rounded to, and `rest`, which has either sign, 2^-37.
struct Fixed {
  static constexpr float kMost = 256, kWhole = 0x1p-15f, kRest = 0x1p-37f;
  unsigned whole, rest;

  // An addition of the right size leaves a number's bits from 2^-15 up in the last places.
  static __device__ __forceinline__ unsigned whole_of(float x) { return __float_as_uint(x + kMost) - __float_as_uint(kMost); }

  __device__ __forceinline__ Fixed(unsigned whole, unsigned rest) : whole(whole), rest(rest) {}
  __device__ __forceinline__ explicit Fixed(float x) : whole(whole_of(x)) {
    constexpr float kShift = 0x1.8p-14f;
    rest = __float_as_uint((x - ((x + kMost) - kMost)) + kShift) - __float_as_uint(kShift);
  }
  // In two numbers, of which the second is small beside the first.
  __device__ __forceinline__ float value(float& low) const {
    const float most = float(whole);
    low = fmaf(float(int(rest)), kRest, float(int(whole - __float2uint_rn(most))) * kWhole);
    return most * kWhole;
  }
};

// ---- vectors --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float widen_bf16(uint32_t bits) { return __uint_as_float(bits << 16); }
__device__ __forceinline__ float widen_f16(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
__device__ __forceinline__ uint32_t narrow_bf16(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
__device__ __forceinline__ uint32_t narrow_f16(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

// One element of any dtype.
template <class F>
__device__ __forceinline__ F load_one(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f64:
      return F(static_cast<const double*>(data)[i]);
    case DType::f32:
      return F(static_cast<const float*>(data)[i]);
    case DType::bf16:
      return F(widen_bf16(static_cast<const uint16_t*>(data)[i]));
    case DType::f16:
      return F(widen_f16(static_cast<const uint16_t*>(data)[i]));
  }
  return F(0);
}
template <class F>
__device__ __forceinline__ void store_one(void* data, DType dtype, int64_t i, F x) {
  switch (dtype) {
    case DType::f64:
      static_cast<double*>(data)[i] = x;
      break;
    case DType::f32:
      static_cast<float*>(data)[i] = float(x);
      break;
    case DType::bf16:
      static_cast<uint16_t*>(data)[i] = uint16_t(narrow_bf16(float(x), 0));
      break;
    case DType::f16:
      static_cast<uint16_t*>(data)[i] = uint16_t(narrow_f16(float(x), 0));
      break;
  }
}
__host__ __device__ constexpr int size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Where a row's vectors lie. They begin at multiples of their size in the student's memory: the first one may begin `phase`
// classes before the row, and the last may end after it. Those two go element by element, so that nothing outside the row is
// touched; the others go whole, unless the teacher's row begins elsewhere between two such boundaries.
struct RowSpan {
  bool packed;  // all of its numbers are of one 16-bit format: known where the kernel is compiled
  int width, classes, phase, vectors;
  int whole_begin;  // vectors [whole_begin, whole_begin + whole) go by 128 bits
  unsigned whole;

  __device__ __forceinline__ RowSpan(bool packed, const void* student, DType student_dtype, const void* teacher,
                                     DType teacher_dtype, int64_t classes)
      : packed(packed), width(packed ? 8 : 4), classes(int(classes)) {
    const unsigned at = unsigned(reinterpret_cast<uintptr_t>(student));
    phase = (size(student_dtype) == 4 ? at >> 2 : at >> 1) & (width - 1);
    const unsigned end = unsigned(phase + this->classes), each = unsigned(width);  // unsigned: a division is a shift
    vectors = int((end + each - 1) / each);
    whole_begin = phase > 0;
    whole = is_aligned(teacher, teacher_dtype) ? unsigned(max(0, int(end / each) - whole_begin)) : 0;
  }
  __device__ __forceinline__ int size(DType dtype) const { return packed ? 2 : size_of(dtype); }
  // Whether a row of another tensor has its vectors at multiples of their size too.
  __device__ __forceinline__ bool is_aligned(const void* row, DType dtype) const {
    return ((unsigned(reinterpret_cast<uintptr_t>(row)) - phase * size(dtype)) & (width * size(dtype) - 1)) == 0;
  }
  __device__ __forceinline__ bool is_whole(int vector) const { return unsigned(vector - whole_begin) < whole; }
  // Element i of a vector, where it is in the row.
  __device__ __forceinline__ bool has(int vector, int i) const {
    return unsigned(vector * width - phase + i) < unsigned(classes);
  }
};

// Streamed: each byte is used once.
__device__ __forceinline__ uint4 load_words(const void* at) { return __ldcs(static_cast<const uint4*>(at)); }
__device__ __forceinline__ void store_words(void* at, uint4 words) { __stcs(static_cast<uint4*>(at), words); }

// How a thread holds a vector: the bits of a 16-bit format, two to a register, or numbers of any other mixture of dtypes.
// Logits outside the row are -inf.
struct HeldBF16 {
  static constexpr bool packed = true;
  static constexpr int width = 8;  // 16 bytes
  uint32_t word[width / 2];

  __device__ __forceinline__ float operator[](int i) const {
    return i % 2 ? __uint_as_float(word[i / 2] & 0xFFFF0000u) : __uint_as_float(word[i / 2] << 16);
  }
  static constexpr uint32_t nothing = 0xFF80FF80u;
  static __device__ __forceinline__ uint32_t narrow(float low, float high) { return narrow_bf16(low, high); }
  static __device__ __forceinline__ uint32_t larger_pair(uint32_t a, uint32_t b) {
    uint32_t c;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
  }
  struct LargerPair {
    __device__ __forceinline__ uint32_t operator()(uint32_t a, uint32_t b) const { return larger_pair(a, b); }
    static constexpr uint32_t identity = nothing;
  };
  // The largest two, of the even and of the odd places.
  using Pair = uint32_t;
  static __device__ __forceinline__ Pair pair(const HeldBF16& v) {
    return larger_pair(larger_pair(v.word[0], v.word[1]), larger_pair(v.word[2], v.word[3]));
  }
  static __device__ __forceinline__ float larger_of(Pair pair) {
    const HeldBF16 v{{pair}};
    return fmaxf(v[0], v[1]);
  }
  __device__ __forceinline__ HeldBF16 larger(const HeldBF16& other) const {
    HeldBF16 c;
#pragma unroll
    for (int i = 0; i < width / 2; ++i) c.word[i] = larger_pair(word[i], other.word[i]);
    return c;
  }
};
struct HeldF16 {
  static constexpr bool packed = true;
  static constexpr int width = 8;  // 16 bytes
  uint32_t word[width / 2];

  __device__ __forceinline__ float operator[](int i) const {
    return widen_f16(uint16_t(i % 2 ? word[i / 2] >> 16 : word[i / 2] & 0xFFFFu));
  }
  static constexpr uint32_t nothing = 0xFC00FC00u;
  static __device__ __forceinline__ uint32_t narrow(float low, float high) { return narrow_f16(low, high); }
  static __device__ __forceinline__ uint32_t larger_pair(uint32_t a, uint32_t b) {
    uint32_t c;
    asm("max.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
  }
  struct LargerPair {
    __device__ __forceinline__ uint32_t operator()(uint32_t a, uint32_t b) const { return larger_pair(a, b); }
    static constexpr uint32_t identity = nothing;
  };
  // The largest two, of the even and of the odd places.
  using Pair = uint32_t;
  static __device__ __forceinline__ Pair pair(const HeldF16& v) {
    return larger_pair(larger_pair(v.word[0], v.word[1]), larger_pair(v.word[2], v.word[3]));
  }
  static __device__ __forceinline__ float larger_of(Pair pair) {
    const HeldF16 v{{pair}};
    return fmaxf(v[0], v[1]);
  }
  __device__ __forceinline__ HeldF16 larger(const HeldF16& other) const {
    HeldF16 c;
#pragma unroll
    for (int i = 0; i < width / 2; ++i) c.word[i] = larger_pair(word[i], other.word[i]);
    return c;
  }
};
struct HeldFloat {
  static constexpr bool packed = false;
  static constexpr int width = 4;  // 16 bytes of float32, 8 of a 16-bit format
  float number[width];

  __device__ __forceinline__ float operator[](int i) const { return number[i]; }
  using Pair = float;  // the largest
  static __device__ __forceinline__ Pair pair(const HeldFloat& v) {
    return fmaxf(fmaxf(v.number[0], v.number[1]), fmaxf(v.number[2], v.number[3]));
  }
  static __device__ __forceinline__ float larger_of(Pair pair) { return pair; }
  static __device__ __forceinline__ Pair larger_pair(Pair a, Pair b) { return fmaxf(a, b); }
  __device__ __forceinline__ HeldFloat larger(const HeldFloat& other) const {
    HeldFloat c;
#pragma unroll
    for (int i = 0; i < width; ++i) c.number[i] = fmaxf(number[i], other.number[i]);
    return c;
  }
};

static_assert(HeldBF16::width == 8 && HeldF16::width == 8 && HeldFloat::width == 4, "RowSpan counts on these widths");

template <class Held>
__device__ __forceinline__ Held nothing() {
  Held v;
  if constexpr (Held::packed) {
    for (auto& word : v.word) word = Held::nothing;
  } else {
    for (auto& x : v.number) x = -INFINITY;
  }
  return v;
}

// The same vector: keeps the compiler from holding its unpacked numbers from one pass to the next, in twice the registers.
template <class Held>
__device__ __forceinline__ Held still_packed(Held v) {
  if constexpr (Held::packed) asm volatile("" : "+r"(v.word[0]), "+r"(v.word[1]), "+r"(v.word[2]), "+r"(v.word[3]));
  return v;
}

// `at`: where the vector begins in memory, be that before its row. `v`: what stands outside the row.
template <class Held>
__device__ __forceinline__ Held load_part(const void* at, DType dtype, const RowSpan& span, int vector, Held v) {
#pragma unroll
  for (int i = 0; i < Held::width; ++i) {
    if (!span.has(vector, i)) continue;
    if constexpr (Held::packed) {
      const uint32_t bits = static_cast<const uint16_t*>(at)[i];
      v.word[i / 2] = i % 2 ? (v.word[i / 2] & 0xFFFFu) | bits << 16 : (v.word[i / 2] & 0xFFFF0000u) | bits;
    } else {
      v.number[i] = load_one<float>(at, dtype, i);
    }
  }
  return v;
}

template <class Held>
__device__ __forceinline__ Held load_whole(const void* at, DType dtype) {
  Held v;
  if constexpr (Held::packed) {
    const uint4 words = load_words(at);
    v.word[0] = words.x, v.word[1] = words.y, v.word[2] = words.z, v.word[3] = words.w;
  } else if (dtype == DType::f32) {
    const uint4 words = load_words(at);
    v.number[0] = __uint_as_float(words.x), v.number[1] = __uint_as_float(words.y);
    v.number[2] = __uint_as_float(words.z), v.number[3] = __uint_as_float(words.w);
  } else {
    const uint2 words = __ldcs(reinterpret_cast<const uint2*>(at));
    const uint32_t word[] = {words.x, words.y};
#pragma unroll
    for (int i = 0; i < Held::width; ++i) {
      const uint16_t bits = uint16_t(i % 2 ? word[i / 2] >> 16 : word[i / 2] & 0xFFFFu);
      v.number[i] = dtype == DType::bf16 ? widen_bf16(bits) : widen_f16(bits);
    }
  }
  return v;
}

// A gradient's row, nullptr where it is not wanted.
struct GradientRow {
  char* row = nullptr;
  DType dtype;
  int64_t width;
  bool aligned = false;

  __device__ __forceinline__ GradientRow() {}
  __device__ __forceinline__ GradientRow(const Gradient& gradient, int64_t index, const RowSpan& span)
      : dtype(gradient.dtype), width(gradient.width) {
    if (gradient.data == nullptr) return;
    row = static_cast<char*>(gradient.data) + gradient.rows.offset(index) * span.size(dtype);
    aligned = span.is_aligned(row, dtype);
  }
  __device__ explicit operator bool() const { return row != nullptr; }

  // `at`: where the vector begins in memory. A packed vector's gradient has its dtype.
  template <class Held>
  __device__ __forceinline__ void store_whole(const float (&x)[Held::width], char* at) const {
    if constexpr (!Held::packed) {
      if (dtype == DType::f32) {
        store_words(at, {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])});
        return;
      }
    }
    uint32_t word[Held::width / 2];
    narrow_all<Held>(x, word);
    if constexpr (Held::packed)
      store_words(at, {word[0], word[1], word[2], word[3]});
    else
      __stcs(reinterpret_cast<uint2*>(at), make_uint2(word[0], word[1]));
  }
  // And the negative in another row.
  template <class Held>
  __device__ __forceinline__ void store_both(const float (&x)[Held::width], char* at, const GradientRow& negative,
                                             char* negative_at) const {
    if constexpr (Held::packed) {
      uint32_t word[Held::width / 2];
      narrow_all<Held>(x, word);
      store_words(at, {word[0], word[1], word[2], word[3]});
      for (uint32_t& pair : word) pair ^= 0x80008000u;
      store_words(negative_at, {word[0], word[1], word[2], word[3]});
    } else {
      store_whole<Held>(x, at);
      float minus_x[Held::width];
#pragma unroll
      for (int i = 0; i < Held::width; ++i) minus_x[i] = -x[i];
      negative.template store_whole<Held>(minus_x, negative_at);
    }
  }
  template <class Held>
  __device__ __forceinline__ void store_part(const float (&x)[Held::width], char* at, const RowSpan& span, int vector) const {
    uint32_t word[Held::width / 2];
    if constexpr (Held::packed) narrow_all<Held>(x, word);
#pragma unroll
    for (int i = 0; i < Held::width; ++i) {
      if (!span.has(vector, i)) continue;
      if constexpr (Held::packed)
        reinterpret_cast<uint16_t*>(at)[i] = uint16_t(word[i / 2] >> (i % 2 * 16));
      else
        store_one(at, dtype, i, x[i]);
    }
  }
  // Columns [from, width) become zero. The threads of the row's team share the work.
  __device__ __forceinline__ void zero(const Team& team, int64_t from) const {
    if (row == nullptr) return;
    for (int64_t i = from + team.lane; i < width; i += team.size) store_one(row, dtype, i, 0.f);
  }

 private:
  template <class Held>
  __device__ __forceinline__ void narrow_all(const float (&x)[Held::width], uint32_t (&word)[Held::width / 2]) const {
#pragma unroll
    for (int i = 0; i < Held::width / 2; ++i) {
      if constexpr (Held::packed)
        word[i] = Held::narrow(x[2 * i], x[2 * i + 1]);
      else
        word[i] = dtype == DType::bf16 ? narrow_bf16(x[2 * i], x[2 * i + 1]) : narrow_f16(x[2 * i], x[2 * i + 1]);
    }
  }
};

// Columns [from, width) of a row of any dtype become zero.
inline __device__ void zero_wide(const Team& team, const Gradient& gradient, int64_t row, int64_t from) {
  if (gradient.data == nullptr) return;
  for (int64_t k = from + team.lane; k < gradient.width; k += team.size)
    store_one(gradient.data, gradient.dtype, gradient.rows.offset(row) + k, 0.0);
}

// ---- slices ---------------------------------------------------------------------------------------------------------

// The vectors of this thread: first, first + stride, ... , `count` of them.
struct Slice {
  int first, stride, count;
  bool whole;  // all of them go by 128 bits

  __device__ __forceinline__ Slice(const Team& team, const Plan& plan, const RowSpan& span, int index) {
    const int begin = index * plan.slice_vectors, end = min(begin + plan.slice_vectors, span.vectors);
    first = begin + team.lane;
    stride = team.size;
    const int after = max(0, end - first + stride - 1);
    count = int(unsigned(after) / unsigned(stride));
    whole = count > 0 && span.is_whole(first) && span.is_whole(vector(count - 1));
  }
  __device__ __forceinline__ int vector(int step) const { return first + step * stride; }
};

// Goes through a slice's vectors of one tensor, in order.
struct Cursor {
  const RowSpan& span;
  int vector, stride;
  bool whole;  // all of them go by 128 bits
  char* at;    // where the next one begins in memory
  int step;

  __device__ __forceinline__ Cursor(const void* row, int size, const RowSpan& span, const Slice& slice, bool whole)
      : span(span), vector(slice.first), stride(slice.stride), whole(whole) {
    at = static_cast<char*>(const_cast<void*>(row)) + int64_t(vector * span.width - span.phase) * size;
    step = stride * span.width * size;
  }
  __device__ __forceinline__ void advance() {
    at += step;
    vector += stride;
  }
};

// `outside`: what stands where a vector reaches out of the row.
template <class Held>
struct Reader : Cursor {
  DType dtype;
  Held outside;

  __device__ __forceinline__ Reader(const void* row, DType dtype, const RowSpan& span, const Slice& slice, Held outside)
      : Cursor(row, span.size(dtype), span, slice, slice.whole), dtype(dtype), outside(outside) {}
  // The next ones, at most `count`.
  template <int n>
  __device__ __forceinline__ void next(Held (&held)[n], int count) {
    if (whole) {
#pragma unroll
      for (int v = 0; v < n; ++v, advance()) {
        if (v >= count) break;
        held[v] = load_whole<Held>(at, dtype);
      }
    } else {
#pragma unroll
      for (int v = 0; v < n; ++v, advance()) {
        if (v >= count) break;
        held[v] = span.is_whole(vector) ? load_whole<Held>(at, dtype) : load_part<Held>(at, dtype, span, vector, outside);
      }
    }
  }
};

// The next ones of two tensors, at most `count` of each.
template <class Held, int n>
__device__ __forceinline__ void next_of_both(Reader<Held>& read_x, Held (&x)[n], Reader<Held>& read_y, Held (&y)[n],
                                             int count) {
  if (read_x.whole && read_y.whole) {
#pragma unroll
    for (int v = 0; v < n; ++v, read_x.advance(), read_y.advance()) {
      if (v >= count) break;
      x[v] = load_whole<Held>(read_x.at, read_x.dtype);
      y[v] = load_whole<Held>(read_y.at, read_y.dtype);
    }
  } else {
    read_x.next(x, count);
    read_y.next(y, count);
  }
}

template <class Held>
struct Writer : Cursor {
  const GradientRow& gradient;

  __device__ __forceinline__ Writer(const GradientRow& gradient, const RowSpan& span, const Slice& slice)
      : Cursor(gradient.row, span.size(gradient.dtype), span, slice, slice.whole && gradient.aligned), gradient(gradient) {}
  __device__ __forceinline__ void next(const float (&x)[Held::width]) {
    if (whole || (gradient.aligned && span.is_whole(vector)))
      gradient.store_whole<Held>(x, at);
    else
      gradient.store_part<Held>(x, at, span, vector);
    advance();
  }
};

// Where a loss has no other part beside it.
struct Nothing {
  template <class... Given>
  __device__ __forceinline__ void operator()(const Given&...) const {}
};

// ---- the blocks of a cluster ----------------------------------------------------------------------------------------

__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// The number at `mine`, in this block's shared memory, of the cluster's block `rank`.
__device__ __forceinline__ float read_cluster(const float* mine, int rank) {
  float x = 0;
#if __CUDA_ARCH__ >= 900
  uint32_t at;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(uint32_t(__cvta_generic_to_shared(mine))), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(at) : "memory");
#endif
  return x;
}

// Numbers that each block of a cluster has in the same place, `mine`.
template <class Numbers>
struct OfCluster {
  const Numbers& mine;

  __device__ __forceinline__ Numbers operator()(int rank) const {
    Numbers numbers;
    for (int n = 0; n < int(sizeof(Numbers) / sizeof(float)); ++n)
      reinterpret_cast<float*>(&numbers)[n] = read_cluster(reinterpret_cast<const float*>(&mine) + n, rank);
    return numbers;
  }
  __device__ __forceinline__ float operator()(float Numbers::* which, int rank) const {
    return read_cluster(&(mine.*which), rank);
  }
};

// ---- kernels --------------------------------------------------------------------------------------------------------

// What a kernel is told beside the loss's own parameters.
struct Task {
  Plan plan;
  Numbers divisor;
  double number;     // the divisor, where that is absent
  void* loss;        // the reduced loss; nullptr: not wanted
  unsigned* ticket;  // zero, and zero again afterwards
  float* partials;   // of slices that no cluster merges

  // Of kd_loss, whose soft part has the divisor above.
  void *hard = nullptr, *soft = nullptr;  // the reduced parts
  Numbers hard_divisor;
  double hard_number = 1;
};

// Whether this block is the last to arrive here: every other's row losses are written then.
inline __device__ bool arrives_last(const Task& task) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(task.ticket, 1u) == gridDim.x - 1;
  __syncthreads();
  if (last) __threadfence();
  return last;
}
template <class F>
__device__ __forceinline__ double sum_rows(const void* values, int64_t rows, double (&shared)[kMostWarps][1]) {
  double total[1] = {0};
  for (int64_t r = threadIdx.x; r < rows; r += blockDim.x) total[0] += __ldcg(static_cast<const F*>(values) + r);
  Plan block;
  block.team = blockDim.x;
  reduce<Sum>(Team(block), total, shared);
  return total[0];
}

// Sums the row losses once every block has written its own: the last one to arrive does, in an order that does not depend on
// which it is.
template <class F, class Args>
__device__ __forceinline__ void finish(const Task& task, const Args& args) {
  if (task.loss == nullptr || !arrives_last(task)) return;
  __shared__ double shared[kMostWarps][1];
  const double total = sum_rows<F>(args.row_loss, args.rows, shared);
  if (threadIdx.x == 0) {
    *static_cast<F*>(task.loss) = F(total / task.divisor.at(0, task.number));
    *task.ticket = 0;
  }
}
template <class F>
__device__ __forceinline__ void finish(const Task& task, const KdLossArgs& args) {
  if (task.loss == nullptr || !arrives_last(task)) return;
  __shared__ double shared[2][kMostWarps][1];
  const double hard_total = sum_rows<F>(args.row_hard, args.rows, shared[0]),
               soft_total = sum_rows<F>(args.row_soft, args.rows, shared[1]);
  if (threadIdx.x == 0) {
    const double hard = hard_total / task.hard_divisor.at(0, task.hard_number),
                 soft = soft_total / task.divisor.at(0, task.number);
    *static_cast<F*>(task.loss) = F(mixed(args.alpha, hard, soft));
    *static_cast<F*>(task.hard) = F(hard);
    *static_cast<F*>(task.soft) = F(soft);
    *task.ticket = 0;
  }
}

// A loss L has: kHeld, the packed vectors of a row that a thread takes, kHeldFloat, the others, and kHeldForward, either where
// no gradient is wanted (not fewer); kShared, the bytes of shared memory that a thread's packed vectors take there, where a
// gradient is wanted; kBlocks, of the largest size, that a multiprocessor is to hold; kStats; Parameters, with `args` in it;
// Partial, the numbers of a slice, and Row, those of a row, all floats;
//   Held<H, wants_gradient, for_teacher>  a slice in registers: reduce() makes its Partial, write_gradient() needs the Row;
//                                with for_teacher, write_gradients() the same for both tensors
//   kForTeacher                whether there is such a one with for_teacher
//   row_of(parameters, partial)                  the Row of a single slice; of a loss that keeps numbers in shared memory
//                                                meanwhile, row_of(parameters, partial, team, shared)
//   merge(parameters, slices, read, own, lane)   the Row of several, by a warp: read(i) is the Partial of slice i, `own` this
//                                                block's
//   write_loss(parameters, row, weight, index)
//   store_stats(row, to)                         kStats numbers
// and, if its numbers may want a second look at the row,
//   is_peaked(parameters, row)                   whether they may
//   Held::has_far(parameters, slice, shared, row)    whether they do, for any of the row's threads
//   set_least(team, partial, shared), is_peaked_and_far(parameters, row)    the same of slices that are merged later
//   sum_growth<H>(...), set_shift(row, growth)   what to add up over the row, and what follows
// and, if it has a plain form, cheaper and good enough for most rows,
//   Held::read(...), is_plain()                  what reduce() goes on from; and whether the row looks plain
//   Held::powers()                               what sum_plain() keeps for the gradient
//   Held::sum_plain(..., powers)                 the slice's numbers, of which merge() makes the Row of several
//   row_of_plain(parameters, numbers, wants_gradient, row), has_plain(row)    the Row of a single slice; and whether it is
//                                                good enough
//   Held::write_plain(..., powers, ...)          as write_gradient()
//   Held::read_again(...)                        where it is not, before reduce()
template <class L, bool with_stats>
__device__ __forceinline__ void finish_row(const typename L::Parameters& parameters, const typename L::Row& row, float weight,
                                           int64_t index) {
  L::write_loss(parameters, row, weight, index);
  if constexpr (with_stats)
    if (parameters.args.row_stats != nullptr)
      L::store_stats(row, static_cast<float*>(parameters.args.row_stats) + index * L::kStats);
}

// Where a row's logits lie.
struct RowPointers {
  const void *student, *teacher;

  // packed: as in RowSpan.
  __device__ __forceinline__ RowPointers(bool packed, const LossArgs& args, int64_t index)
      : student(at(packed, args.student, index)), teacher(at(packed, args.teacher, index)) {}

 private:
  static __device__ __forceinline__ const void* at(bool packed, const Logits& logits, int64_t index) {
    return static_cast<const char*>(logits.data) + logits.rows.offset(index) * (packed ? 2 : size_of(logits.dtype));
  }
};

// What the gradient of a row's unweighted loss is multiplied by.
template <class Args>
__device__ __forceinline__ float factor_of_row(const Args& args, const Task& task, int64_t index) {
  return args.grad_loss.at(index, 1.f) * float(args.grad_scale) * args.weight.at(index, 1.f) /
         task.divisor.at(0, float(task.number));
}

// The gradients of a slice from what a forward left of its row.
template <class H, class Parameters, class Backward>
__device__ __forceinline__ void write_gradients(const Parameters& parameters, const RowSpan& span, const Slice& slice,
                                                const RowPointers& at, const Backward& backward,
                                                const GradientRow& grad_student, const GradientRow& grad_teacher) {
  const auto& args = parameters.args;
  Reader<H> read_student(at.student, args.student.dtype, span, slice, nothing<H>()),
      read_teacher(at.teacher, args.teacher.dtype, span, slice, nothing<H>());
  Writer<H> write_student(grad_student, span, slice), write_teacher(grad_teacher, span, slice);
#pragma unroll 1
  for (int i = 0; i < slice.count; ++i) {
    H s[1], t[1];
    const int first = read_student.vector * H::width - span.phase;
    read_student.next(s, 1);
    read_teacher.next(t, 1);
    float gradient[H::width];
    if (grad_teacher) {
      backward.teacher(parameters, s[0], t[0], first, gradient);
      write_teacher.next(gradient);
    }
    if (grad_student) {
      backward.student(parameters, s[0], t[0], first, gradient);
      write_student.next(gradient);
    }
  }
}

// Whether it is so for any of a row's threads. (Between an arrival at the cluster's barrier and the wait for it, as all that
// follows.)
__device__ __forceinline__ bool any_of_row(const Plan& plan, const Team& team, bool mine) {
  __shared__ float of_block;
  bool any = team.warps > 1 ? __syncthreads_or(mine) : __any_sync(team.mask, mine);
  if (plan.cluster) {
    cluster_wait();
    if (threadIdx.x == 0) of_block = any;
    cluster_arrive();
    cluster_wait();
    any = false;
    for (int i = 0; i < plan.slices; ++i) any = read_cluster(&of_block, i) != 0 || any;
    cluster_arrive();
  }
  return any;
}

// A row of which L::is_peaked says that its classes must be seen once more: mends its numbers, and leaves them, or the
// gradient. By all threads of the row. `kept`: its numbers as the team's leader has left them.
template <class L, class H, bool wants_gradient>
__device__ __noinline__ void mend_row(const typename L::Parameters& parameters, const Task& task, const typename L::Row& kept,
                                      typename L::Shared& shared) {
  __shared__ float of_block;
  const auto& args = parameters.args;
  const Plan& plan = task.plan;
  const Team team(plan);
  team.warps > 1 ? __syncthreads() : __syncwarp(team.mask);
  typename L::Row row = kept;
  const int64_t index = plan.row_again();
  const RowPointers at(H::packed, args, index);
  const RowSpan span(H::packed, at.student, args.student.dtype, at.teacher, args.teacher.dtype, args.classes);
  const Slice slice(team, plan, span, plan.slice());
  float growth[1] = {L::template sum_growth<H>(parameters, span, slice, at, row)};
  reduce<Sum>(team, growth, L::shared_growth(shared));
  if (plan.cluster) {
    cluster_wait();
    if (threadIdx.x == 0) of_block = growth[0];
    cluster_arrive();
    cluster_wait();
    growth[0] = 0;
    for (int i = 0; i < plan.slices; ++i) growth[0] += read_cluster(&of_block, i);
    cluster_arrive();
  }
  L::set_shift(row, growth[0]);
  if constexpr (wants_gradient) {
    float numbers[L::kStats];
    L::store_stats(row, numbers);
    const typename L::Backward backward(parameters, task, numbers, index, factor_of_row(args, task, index));
    write_gradients<H>(parameters, span, slice, at, backward, GradientRow(args.grad_student, index, span),
                       GradientRow(args.grad_teacher, index, span));
  } else if (team.leads() && plan.slice() == 0) {
    L::store_stats(row, static_cast<float*>(args.row_stats) + index * L::kStats);
  }
}

template <class L>
inline constexpr bool kHasParts = __is_same(typename L::Args, KdLossArgs);

// The row of a cluster from its slices, for all threads. (Between the two halves of a barrier then, as all that follows: this
// block has read the others' numbers, and theirs must not leave before all have.)
template <class L, class Partial>
__device__ __forceinline__ void merge_cluster(const typename L::Parameters& parameters, const Plan& plan, const Partial& mine,
                                              typename L::Row& kept, typename L::Row& row) {
  __shared__ Partial own;
  if (threadIdx.x == 0) own = mine;
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x < 32) {
    const auto merged = L::merge(parameters, plan.slices, OfCluster<Partial>{own}, plan.slice(), int(threadIdx.x));
    if (threadIdx.x == 0) kept = merged;
  }
  __syncthreads();
  cluster_arrive();
  row = kept;
}

// Leaves statistics, or the student's gradient, or both gradients.
template <class L, class H, bool wants_gradient, bool for_teacher = false>
__global__ void __launch_bounds__(kMostThreads, L::kBlocks)
    forward_kernel(const __grid_constant__ typename L::Parameters parameters, const __grid_constant__ Task task) {
  using Partial = typename L::Partial;
  using Row = typename L::Row;
  using Held = typename L::template Held<H, wants_gradient, for_teacher>;
  __shared__ typename L::Shared shared;
  constexpr bool kMends = requires(const Row& row) { L::is_peaked(parameters, row); };
  __shared__ Row kept[kMends ? kMostTeams : 1];  // one a team; the first, of a cluster's row

  const auto& args = parameters.args;
  const Plan& plan = task.plan;
  const Team team(plan);
  const int64_t index = plan.row();
  const int slice_index = plan.slice();
  const float weight = index < args.rows ? args.weight.at(index, 1.f) : 0.f;

  if (weight != 0) {
    const RowPointers at(H::packed, args, index);
    const RowSpan span(H::packed, at.student, args.student.dtype, at.teacher, args.teacher.dtype, args.classes);
    const Slice slice(team, plan, span, slice_index);
    const auto index_again = [&] {
      if constexpr (kHasParts<L>) return plan.row_again();
      return index;
    };
    const auto leave = [&](const Row& row) {
      const int64_t at = index_again();
      finish_row<L, !wants_gradient>(parameters, row, kHasParts<L> ? args.weight.at(at, 1.f) : weight, at);
    };
    const auto gradient_of = [&](const Gradient& gradient) { return GradientRow(gradient, index_again(), span); };
    const auto factor_of = [&] {  // reads the weight again rather than keep it: registers are scarce
      return factor_of_row(args, task, index_again());
    };

    Held held;
    if constexpr (requires { held.begin_row(task); }) held.begin_row(task);
    do {  // once. (Left where a plain row is done: a flag would keep the registers of what follows from it.)
      if constexpr (requires { held.is_plain(); }) {
        held.read(parameters, plan, team, span, slice, at.student, at.teacher, shared);
        if (!for_teacher && held.is_plain()) {
          auto powers = held.powers();
          const auto sums = held.sum_plain(parameters, team, slice, shared, powers);
          Row row;
          if (plan.cluster)
            merge_cluster<L>(parameters, plan, sums, kept[0], row);
          else
            L::row_of_plain(parameters, sums, wants_gradient, row);
          if (L::has_plain(row)) {
            if (team.leads() && slice_index == 0) leave(row);
            if constexpr (wants_gradient)
              held.write_plain(parameters, span, slice, row, powers, gradient_of(args.grad_student), factor_of());
            break;
          }
          if (plan.cluster) cluster_wait();
          held.read_again(slice);
        }
      }
      Partial partial = held.reduce(parameters, team, span, slice, at.student, at.teacher, gradient_of, factor_of, shared);
      Row row;
      if (plan.slices == 1) {
        if (wants_gradient || args.row_stats != nullptr || team.leads()) {
          if constexpr (requires { L::row_of(parameters, partial, team, shared); })
            row = L::row_of(parameters, partial, team, shared);
          else
            row = L::row_of(parameters, partial);
        }
        if (team.leads()) {
          if constexpr (kMends && for_teacher) kept[team.slot()] = row;
          leave(row);
        }
      } else if (plan.cluster) {
        merge_cluster<L>(parameters, plan, partial, kept[0], row);
        if (team.leads() && slice_index == 0) leave(row);
      } else {
        if constexpr (kMends && !wants_gradient) L::set_least(team, partial, shared);
        if (threadIdx.x == 0) reinterpret_cast<Partial*>(task.partials)[blockIdx.x] = partial;
        return;
      }
      bool peaked = false;
      if constexpr (kMends)
        if ((wants_gradient || args.row_stats != nullptr) && L::is_peaked(parameters, row))
          peaked = any_of_row(plan, team, held.has_far(parameters, slice, shared, row));
      if (peaked) {
        if constexpr (kMends) {
          if (team.leads() && !plan.cluster) kept[team.slot()] = row;
          mend_row<L, H, wants_gradient>(parameters, task, kept[team.slot()], shared);
        }
      } else if constexpr (for_teacher) {
        if constexpr (kMends) {  // its numbers from shared memory, as they are wanted
          team.warps > 1 ? __syncthreads() : __syncwarp(team.mask);
          asm volatile("" ::: "memory");
          held.write_gradients(parameters, span, slice, kept[team.slot()], gradient_of, factor_of);
        } else {
          held.write_gradients(parameters, span, slice, row, gradient_of, factor_of);
        }
      } else if constexpr (wants_gradient) {
        held.write_gradient(parameters, span, slice, row, gradient_of(args.grad_student), factor_of());
      }
    } while (false);
    if (slice_index == plan.slices - 1) {
      if constexpr (wants_gradient) gradient_of(args.grad_student).zero(team, args.classes);
      if constexpr (for_teacher) gradient_of(args.grad_teacher).zero(team, args.classes);
    }
    if (plan.cluster) cluster_wait();
  } else if (index < args.rows) {  // not read
    if (slice_index == 0) {
      const void* row = args.student.data;
      const RowSpan span(H::packed, row, args.student.dtype, row, args.student.dtype, args.classes);
      if constexpr (wants_gradient) GradientRow(args.grad_student, index, span).zero(team, 0);
      if constexpr (for_teacher) GradientRow(args.grad_teacher, index, span).zero(team, 0);
      if (team.leads() && (plan.slices == 1 || plan.cluster)) finish_row<L, !wants_gradient>(parameters, Row{}, weight, index);
    }
    if (plan.slices > 1 && !plan.cluster) return;
  }
  finish<float>(task, args);
}

// The rows' slices from the workspace, a warp a row.
template <class L>
__global__ void __launch_bounds__(128, 4)
    merge_kernel(const __grid_constant__ typename L::Parameters parameters, const __grid_constant__ Task task, int slices) {
  const auto& args = parameters.args;
  const int64_t index = int64_t(blockIdx.x) * 4 + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (index < args.rows) {
    const float weight = args.weight.at(index, 1.f);
    typename L::Row row{};
    if (weight != 0) {
      const auto read = [&](int i) { return reinterpret_cast<const typename L::Partial*>(task.partials)[index * slices + i]; };
      row = L::merge(parameters, slices, read, -1, lane);
      if constexpr (requires { L::is_peaked(parameters, row); }) {
        if (args.row_stats != nullptr && L::is_peaked_and_far(parameters, row)) {
          Plan plan;
          plan.team = 32;
          const RowPointers at(HeldFloat::packed, args, index);
          const RowSpan span(HeldFloat::packed, at.student, args.student.dtype, at.teacher, args.teacher.dtype, args.classes);
          plan.slice_vectors = span.vectors;
          const Team warp(plan);
          const float growth = L::template sum_growth<HeldFloat>(parameters, span, Slice(warp, plan, span, 0), at, row);
          L::set_shift(row, reduce_warp(growth, Sum()));
        }
      }
    }
    if (lane == 0) finish_row<L, true>(parameters, row, weight, index);
  }
  finish<float>(task, args);
}

// Gradients from what the forward left of a row: L::Backward computes those of a vector.
template <class L, class H>
__global__ void __launch_bounds__(kMostThreads, 1)
    backward_kernel(const __grid_constant__ typename L::Parameters parameters, const __grid_constant__ Task task) {
  const auto& args = parameters.args;
  const Plan& plan = task.plan;
  const Team team(plan);
  const int64_t index = plan.row();
  const int slice_index = plan.slice();
  if (index >= args.rows) return;

  const RowPointers at(H::packed, args, index);
  const RowSpan span(H::packed, at.student, args.student.dtype, at.teacher, args.teacher.dtype, args.classes);
  const GradientRow grad_student(args.grad_student, index, span), grad_teacher(args.grad_teacher, index, span);
  const float weight = args.weight.at(index, 1.f);
  if (weight == 0) {
    if (slice_index > 0) return;
    grad_student.zero(team, 0);
    grad_teacher.zero(team, 0);
    return;
  }
  if (slice_index == plan.slices - 1) {
    grad_student.zero(team, args.classes);
    grad_teacher.zero(team, args.classes);
  }
  const float factor = args.grad_loss.at(index, 1.f) * float(args.grad_scale) * weight / task.divisor.at(0, float(task.number));
  const typename L::Backward backward(parameters, task, index, factor);
  const Slice slice(team, plan, span, slice_index);
  write_gradients<H>(parameters, span, slice, at, backward, grad_student, grad_teacher);
}

// ---- on the host: the launches of a call ----------------------------------------------------------------------------

inline bool is_wide(DType student, DType teacher) { return student == DType::f64 || teacher == DType::f64; }
// Whether a row is read once for each pass, by a block, and not held.
template <class L>
bool by_passes(const typename L::Args& args) {
  return L::kHeld == 0 || is_wide(args.student.dtype, args.teacher.dtype);
}
inline int vector_width(DType student, DType teacher) {
  return size_of(student) == 2 && student == teacher ? HeldBF16::width : HeldFloat::width;
}

// What a kernel that reads a row once for each pass is given.
template <class L, bool parts = kHasParts<L>>
struct PassesArgsOf {
  using type = typename L::Args;
};
template <class L>
struct PassesArgsOf<L, true> {
  using type = typename L::Parameters;
};
template <class L>
using PassesArgs = typename PassesArgsOf<L>::type;

// The vectors of a row that a thread takes at most.
template <class L>
int most_held(const typename L::Args& args) {
  if (!args.grad_student.data && !args.grad_teacher.data) return L::kHeldForward;
  return vector_width(args.student.dtype, args.teacher.dtype) == HeldBF16::width ? L::kHeld : L::kHeldFloat;
}

template <class L>
Plan plan_of(const typename L::Args& args) {
  if (by_passes<L>(args)) {
    Plan plan;
    plan.team = plan.threads = 256;
    plan.blocks = blocks_of(args.rows, args.rows);
    return plan;
  }
  return plan_rows(args.rows, vectors_of_row(args.student, args.classes, vector_width(args.student.dtype, args.teacher.dtype)),
                   most_held<L>(args));
}

// Whether a forward leaves the gradients to a backward pass. In float16 it always does: kdfast/_ops.py asks for no gradient
// there, since one that is not scaled yet underflows, and an instance of the kernel for it would be compiled for nothing.
template <class L>
bool backward_follows(const typename L::Args& args) {
  if (L::kHeld == 0 || by_passes<L>(args)) return false;
  if (args.student.dtype == DType::f16 && args.teacher.dtype == DType::f16)
    return args.grad_student.data != nullptr || args.grad_teacher.data != nullptr;
  return args.grad_teacher.data != nullptr && !L::kForTeacher;
}

template <class L>
Workspace workspace_of(const typename L::Args& args, const Plan& plan, void* base, int stats) {
  const bool wide = is_wide(args.student.dtype, args.teacher.dtype), apart = plan.slices > 1 && !plan.cluster;
  return Workspace(base, args.rows * (wide ? 8 : 4) * (kHasParts<L> ? 2 : 1),
                   apart || backward_follows<L>(args) ? args.rows * stats * 4 : 0,
                   apart ? args.rows * plan.slices * sizeof(typename L::Partial) : 0);
}
template <class L>
size_t workspace_bytes(const typename L::Args& args, int stats) {
  return workspace_of<L>(args, plan_of<L>(args), nullptr, stats).bytes;
}

template <class L>
void set_parts(Task& task, const typename L::Args& args, const Call& call, const Workspace& memory) {
  if constexpr (kHasParts<L>) {
    task.hard = call.hard;
    task.soft = call.soft;
    task.hard_divisor = resolve_hard_divisor(call, args, memory.hard_divisor);
    task.hard_number = call.hard_number;
  }
}

// The kernel's instance for how logits of these dtypes are held; of one that writes gradients in forward.
#define KDFAST_HELD(INSTANCE, ARGS)                                                                          \
  ((ARGS).student.dtype == DType::f16 && (ARGS).teacher.dtype == DType::f16 ? (const void*)INSTANCE(HeldF16) \
                                                                            : KDFAST_HELD_OF_GRADIENT(INSTANCE, ARGS))
#define KDFAST_HELD_OF_GRADIENT(INSTANCE, ARGS)                                                                 \
  ((ARGS).student.dtype == DType::bf16 && (ARGS).teacher.dtype == DType::bf16 ? (const void*)INSTANCE(HeldBF16) \
                                                                              : (const void*)INSTANCE(HeldFloat))
#define KDFAST_FORWARD(H) (forward_kernel<L, H, false>)
#define KDFAST_FORWARD_GRADIENT(H) (forward_kernel<L, H, true>)
#define KDFAST_FORWARD_GRADIENTS(H) (forward_kernel<L, H, true, true>)
#define KDFAST_BACKWARD(H) (backward_kernel<L, H>)

template <class L>
void run_backward(const typename L::Args& args, const Call& call, int stats, const char* name,
                  void (*passes_kernel)(PassesArgs<L>, Task)) {
  if (args.rows == 0) return;
  const cudaStream_t stream = static_cast<cudaStream_t>(call.stream);
  Plan plan = plan_of<L>(args);
  const Workspace memory = workspace_of<L>(args, plan, call.workspace, stats);
  plan.cluster = false;
  Task task{plan, resolve_divisor(call, args.weight, args.rows, memory.divisor), call.number, nullptr, nullptr, nullptr};
  set_parts<L>(task, args, call, memory);
  if (by_passes<L>(args)) {
    PassesArgs<L> given(args);
    void* arguments[] = {&given, &task};
    return launch((const void*)passes_kernel, plan, stream, arguments, name, args.rows, args.classes);
  }
  if constexpr (L::kHeld > 0) {
    typename L::Parameters parameters(args);
    void* arguments[] = {&parameters, &task};
    launch(KDFAST_HELD(KDFAST_BACKWARD, args), plan, stream, arguments, name, args.rows, args.classes);
  }
}

template <class L>
void run_forward(const typename L::Args& caller, const Call& call, int stats, const char* name,
                 void (*passes_kernel)(PassesArgs<L>, Task)) {
  typename L::Args args = caller;
  const cudaStream_t stream = static_cast<cudaStream_t>(call.stream);
  Plan plan = plan_of<L>(args);
  const Workspace memory = workspace_of<L>(args, plan, call.workspace, stats);
  const bool wide = is_wide(args.student.dtype, args.teacher.dtype), apart = plan.slices > 1 && !plan.cluster;
  const bool wants_gradient = args.grad_student.data != nullptr;
  if (backward_follows<L>(args) && !apart) {
    args.row_stats = memory.row_stats;
    typename L::Args first = args;
    first.grad_student = first.grad_teacher = Gradient();
    run_forward<L>(first, call, stats, name, passes_kernel);
    return run_backward<L>(args, call, stats, name, passes_kernel);
  }
  if constexpr (kHasParts<L>) {
    if (args.row_soft == nullptr) {
      args.row_soft = memory.row_loss;
      args.row_hard = static_cast<char*>(memory.row_loss) + args.rows * (wide ? 8 : 4);
    }
  } else if (args.row_loss == nullptr) {
    args.row_loss = memory.row_loss;
  }
  Task task{plan,           resolve_divisor(call, args.weight, args.rows, memory.divisor), call.number, call.loss, nullptr,
            memory.partials};
  set_parts<L>(task, args, call, memory);
  if (args.rows == 0) return sum_nothing(task, wide, stream);
  if (call.loss) task.ticket = zeroed_ticket(stream, memory.ticket);
  if (by_passes<L>(args)) {
    PassesArgs<L> given(args);
    void* arguments[] = {&given, &task};
    return launch((const void*)passes_kernel, plan, stream, arguments, name, args.rows, args.classes);
  }
  if constexpr (L::kHeld > 0) {
    if (apart && wants_gradient && stats > 0 && args.row_stats == nullptr) args.row_stats = memory.row_stats;
    typename L::Parameters parameters(args);
    void* arguments[] = {&parameters, &task};
    if (!apart) {
      if (wants_gradient && vector_width(args.student.dtype, args.teacher.dtype) == HeldBF16::width)
        plan.shared = unsigned(plan.threads * L::kShared);
      const void* kernel =
          wants_gradient ? KDFAST_HELD_OF_GRADIENT(KDFAST_FORWARD_GRADIENT, args) : KDFAST_HELD(KDFAST_FORWARD, args);
      if constexpr (L::kForTeacher)
        if (args.grad_teacher.data) kernel = KDFAST_HELD_OF_GRADIENT(KDFAST_FORWARD_GRADIENTS, args);
      return launch(kernel, plan, stream, arguments, name, args.rows, args.classes);
    }
    launch(KDFAST_HELD(KDFAST_FORWARD, args), plan, stream, arguments, name, args.rows, args.classes);
    Plan merging;
    merging.threads = 128;
    merging.blocks = blocks_of((args.rows + 3) / 4, args.rows);
    void* merged[] = {&parameters, &task, &plan.slices};
    launch((const void*)merge_kernel<L>, merging, stream, merged, name, args.rows, args.classes);
    if (!wants_gradient) return;
    launch(KDFAST_HELD(KDFAST_BACKWARD, args), plan, stream, arguments, name, args.rows, args.classes);
  }
}

}  // namespace kdfast::cuda
