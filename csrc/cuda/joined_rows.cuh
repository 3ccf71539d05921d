// Sums over the differences of logits where no row differs from another: rows that follow each other without a gap are one run
// of pairs, and a row's length, its start and its end cost nothing. A block sums its part of the run in double precision, the
// last one to arrive adds up what the blocks left, in their order.
#pragma once

#include "logit_difference.cuh"

namespace kdfast::cuda {
namespace {

constexpr int kJoinedThreads = 128;
constexpr int kInFlight = 4;  // vectors of each side that a thread has asked for before it looks at the first
constexpr int kTile = kJoinedThreads * kInFlight;  // vectors
constexpr int64_t kLeastTiles = 2;                 // of a block: what a block costs beside them is to be little
constexpr int64_t kFewBlocks = 128;                // whose sums a warp adds up
constexpr int64_t kMostBlocks = 4096;              // some waves of any GPU, and few numbers for the last block

struct JoinedRows {
  int64_t vectors;
  int rest;      // pairs after the last vector
  int tiles;     // of a block
  float factor;  // of an element's slope in the gradient, but for a divisor in device memory
};

// The numbers of a format that are held by H.
template <class H>
constexpr int kNumberSize = H::packed ? 2 : 4;

// Vectors of a thread, kJoinedThreads apart, and where they begin in memory.
template <class Element, class H, bool wants_gradient, bool for_teacher>
struct JoinedVectors {
  static constexpr int64_t kStep = int64_t(kJoinedThreads) * H::width * kNumberSize<H>;
  const char *student, *teacher;
  char *gradient, *grad_teacher;

  __device__ __forceinline__ void advance() {
    student += kInFlight * kStep;
    teacher += kInFlight * kStep;
    gradient += kInFlight * kStep;
    grad_teacher += kInFlight * kStep;
  }
  // The sum of the values of kInFlight vectors, or, unless `all`, of those of them that are among the next `left` of the run.
  template <bool all>
  __device__ __forceinline__ double sum(const Element& element, float factor, int left) const {
    H s[kInFlight], t[kInFlight];
#pragma unroll
    for (int v = 0; v < kInFlight; ++v) {
      s[v] = t[v] = H{};
      if (all || v * kJoinedThreads < left) {
        s[v] = load_whole<H>(student + v * kStep, DType::f32);
        t[v] = load_whole<H>(teacher + v * kStep, DType::f32);
      }
    }
    float part[2] = {0, 0};
#pragma unroll
    for (int v = 0; v < kInFlight; ++v) {
      float g[H::width];
#pragma unroll
      for (int i = 0; i < H::width; ++i) {
        const float d = s[v][i] - t[v][i];
        part[i % 2] += element.value(d);
        g[i] = element.slope(d) * factor;
      }
      if (wants_gradient && (all || v * kJoinedThreads < left)) store(g, v);
    }
    const float total = part[0] + part[1];
    if (fabsf(total) < INFINITY) return total;
    return sum_one_by_one<all>(element, factor, left);
  }

 private:
  __device__ __forceinline__ void store(const float (&g)[H::width], int v) const {
    GradientRow row;
    row.dtype = DType::f32;
    if constexpr (for_teacher)
      row.template store_both<H>(g, gradient + v * kStep, row, grad_teacher + v * kStep);
    else
      row.template store_whole<H>(g, gradient + v * kStep);
  }
  // The same where a class is at -inf on both sides, a logit is NaN, or squares that are each finite have an infinite sum.
  template <bool all>
  __device__ __forceinline__ double sum_one_by_one(const Element& element, float factor, int left) const {
    double total = 0;
#pragma unroll 1
    for (int v = 0; v < kInFlight && (all || v * kJoinedThreads < left); ++v) {
      const H s = load_whole<H>(student + v * kStep, DType::f32), t = load_whole<H>(teacher + v * kStep, DType::f32);
      float g[H::width];
#pragma unroll
      for (int i = 0; i < H::width; ++i) {
        const float d = counts(s[i], t[i]) ? s[i] - t[i] : 0.f;
        total += element.value(d);
        g[i] = element.slope(d) * factor;
      }
      if (wants_gradient) store(g, v);
    }
    return total;
  }
};

template <class Element, class H, bool wants_gradient, bool for_teacher = false>
__global__ void __launch_bounds__(kJoinedThreads, 5)
    joined_kernel(const __grid_constant__ typename LogitDifference<Element>::Parameters parameters,
                  const __grid_constant__ Task task, const JoinedRows joined) {
  const auto& args = parameters.args;
  const Element& element = parameters.element;
  float factor = joined.factor;
  if (wants_gradient && task.divisor.data != nullptr) factor /= task.divisor.at(0, 1.f);

  const int64_t begin = int64_t(blockIdx.x) * (joined.tiles * kTile);
  int left = int(min(joined.vectors - begin, int64_t(joined.tiles * kTile)));  // of the block
  const int64_t at = (begin + threadIdx.x) * (H::width * kNumberSize<H>);
  JoinedVectors<Element, H, wants_gradient, for_teacher> vectors{
      static_cast<const char*>(args.student.data) + at, static_cast<const char*>(args.teacher.data) + at,
      static_cast<char*>(args.grad_student.data) + at, static_cast<char*>(args.grad_teacher.data) + at};
  double total[1] = {0};
#pragma unroll 1
  for (; left >= kTile; left -= kTile) {
    total[0] += vectors.template sum<true>(element, factor, left);
    vectors.advance();
  }
  if (left > 0) total[0] += vectors.template sum<false>(element, factor, left - int(threadIdx.x));
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x < joined.rest) {
    const int64_t k = joined.vectors * H::width + threadIdx.x;
    const float s = load_one<float>(args.student.data, args.student.dtype, k),
                t = load_one<float>(args.teacher.data, args.teacher.dtype, k), d = counts(s, t) ? s - t : 0.f;
    total[0] += element.value(d);
    if (wants_gradient) store_one(args.grad_student.data, args.grad_student.dtype, k, element.slope(d) * factor);
    if (for_teacher) store_one(args.grad_teacher.data, args.grad_teacher.dtype, k, element.slope(d) * -factor);
  }

  __shared__ double of_warps[kMostWarps][1];
  double* const of_blocks = reinterpret_cast<double*>(task.partials);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) combine<Sum>(total, distance, 0xFFFFFFFFu);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32][0] = total[0];
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kJoinedThreads / 32; ++warp) total[0] += of_warps[warp][0];
    of_blocks[blockIdx.x] = total[0];
    __threadfence();
    last = atomicAdd(task.ticket, 1u) == gridDim.x - 1;
  }
  if (!__syncthreads_or(last)) return;
  __threadfence();
  Plan readers;
  readers.team = gridDim.x <= kFewBlocks ? 32 : kJoinedThreads;
  const Team team(readers);
  if (threadIdx.x >= readers.team) return;
  total[0] = 0;
  for (unsigned block = threadIdx.x; block < gridDim.x; block += readers.team) total[0] += __ldcg(of_blocks + block);
  reduce<Sum>(team, total, of_warps);
  if (threadIdx.x == 0) {
    *static_cast<float*>(task.loss) =
        float(total[0] * (double(element.value_factor) * args.scale) / task.divisor.at(0, task.number));
    *task.ticket = 0;
  }
}

// ---- on the host ----------------------------------------------------------------------------------------------------

// Whether the rows of a tensor follow each other without a gap, at a start that its vectors have too.
inline bool in_one_run(const void* data, const RowLayout& layout, int64_t rows, int64_t classes) {
  return (rows == 1 || (layout.dims == 1 && layout.stride[0] == classes)) && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}
// Whether a sum over all rows is all that a forward pass is to give, but for a gradient.
inline bool joins_rows(const LogitMseArgs& args) {
  const DType dtype = args.student.dtype;
  const auto joins = [&](const Gradient& gradient) {
    return gradient.data == nullptr || (gradient.dtype == dtype && gradient.width == args.classes &&
                                        in_one_run(gradient.data, gradient.rows, args.rows, args.classes));
  };
  return args.rows > 0 && args.classes > 0 && !args.center && !args.per_class && args.weight.data == nullptr &&
         args.row_loss == nullptr && args.grad_loss.data == nullptr && dtype != DType::f64 && args.teacher.dtype == dtype &&
         in_one_run(args.student.data, args.student.rows, args.rows, args.classes) &&
         in_one_run(args.teacher.data, args.teacher.rows, args.rows, args.classes) && joins(args.grad_student) &&
         joins(args.grad_teacher);
}

inline Plan plan_of_joined(const LogitMseArgs& args, JoinedRows& joined) {
  const int64_t pairs = args.rows * args.classes, width = vector_width(args.student.dtype, args.teacher.dtype);
  joined.vectors = pairs / width;
  joined.rest = int(pairs % width);
  const int64_t tiles = (joined.vectors + kTile - 1) / kTile, of_most = (tiles + kMostBlocks - 1) / kMostBlocks;
  joined.tiles = int(of_most > kLeastTiles ? of_most : kLeastTiles);
  Plan plan;
  plan.threads = kJoinedThreads;
  plan.blocks = unsigned(tiles > 0 ? (tiles + joined.tiles - 1) / joined.tiles : 1);
  return plan;
}
inline Workspace workspace_of_joined(const Plan& plan, void* base) {
  return Workspace(base, 0, 0, plan.blocks * sizeof(double));
}

// The workspace of a forward or a backward pass around 0.
template <class L>
size_t workspace_of_uncentred(const typename L::Args& args) {
  const size_t by_rows = workspace_bytes<L>(args, 0);
  if (!joins_rows(args)) return by_rows;
  JoinedRows joined;
  const size_t in_one = workspace_of_joined(plan_of_joined(args, joined), nullptr).bytes;
  return in_one > by_rows ? in_one : by_rows;
}

#define KDFAST_JOINED(H) (joined_kernel<Element, H, false>)
#define KDFAST_JOINED_GRADIENT(H) (joined_kernel<Element, H, true>)
#define KDFAST_JOINED_GRADIENTS(H) (joined_kernel<Element, H, true, true>)

// run_forward of Uncentred<Element>.
template <class Element>
void run_uncentred_forward(const typename Element::Args& args, const Call& call, const char* name,
                           void (*passes_kernel)(typename Element::Args, Task)) {
  if (!joins_rows(args)) return run_forward<Uncentred<Element>>(args, call, 0, name, passes_kernel);
  JoinedRows joined;
  const Plan plan = plan_of_joined(args, joined);
  const cudaStream_t stream = static_cast<cudaStream_t>(call.stream);
  const Workspace memory = workspace_of_joined(plan, call.workspace);
  Task task{plan, call.divisor, call.number, call.loss, zeroed_ticket(stream, memory.ticket), memory.partials};
  typename LogitDifference<Element>::Parameters parameters(args);
  joined.factor = float(parameters.element.slope_factor * args.scale * args.grad_scale / (call.divisor.data ? 1 : call.number));
  void* arguments[] = {&parameters, &task, &joined};
  const void* kernel = args.grad_teacher.data   ? KDFAST_HELD(KDFAST_JOINED_GRADIENTS, args)
                       : args.grad_student.data ? KDFAST_HELD(KDFAST_JOINED_GRADIENT, args)
                                                : KDFAST_HELD(KDFAST_JOINED, args);
  launch(kernel, plan, stream, arguments, name, args.rows, args.classes);
}

}  // namespace
}  // namespace kdfast::cuda
