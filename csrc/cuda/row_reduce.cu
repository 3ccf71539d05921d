// The host's side of row_reduce.cuh, and the small kernels that belong to no loss.
#include "row_reduce.cuh"

#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>

namespace kdfast::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next call does not report it again
  throw std::runtime_error(std::string("kdfast: ") + what + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// One for each stream: its launches come one after the other, and each leaves the ticket zero.
constexpr int kTickets = 8192;
__device__ unsigned tickets[kTickets];

// Stands for the kernels where a device is asked for its clusters.
__global__ void __launch_bounds__(kMostThreads, 1) full_block_kernel() {}

// The most blocks of kMostThreads threads, each alone on its multiprocessor, that may form a cluster, where clusters of so many
// leave less than half of the multiprocessors idle. Sixteen on an H100; but how many multiprocessors lie together depends on
// the product and on its partition, not on the compute capability alone (an H20 has sixteen nowhere). 1: no clusters.
int most_cluster_of(int device) {
  int has = 0, shared = 0, multiprocessors = 0;
  cudaDeviceGetAttribute(&has, cudaDevAttrClusterLaunch, device);
  if (!has) return 1;
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  const void* kernel = (const void*)full_block_kernel;
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  if (attributes.ptxVersion < 90) return 1;  // compiled for older chips alone: without a cluster's instructions
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "cudaFuncSetAttribute");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cudaFuncSetAttribute");
  for (int size = kMostCluster; size > 1; size /= 2) {
    cudaLaunchAttribute cluster[1];
    cluster[0].id = cudaLaunchAttributeClusterDimension;
    cluster[0].val.clusterDim.x = unsigned(size);
    cluster[0].val.clusterDim.y = cluster[0].val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(size));
    config.blockDim = dim3(kMostThreads);
    config.dynamicSmemBytes = size_t(shared);  // all that there is: one block a multiprocessor
    config.attrs = cluster;
    config.numAttrs = 1;
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess)
      cudaGetLastError();  // no such clusters, whatever the reason: a launch would report what is wrong with the device
    else if (2 * clusters * size > multiprocessors)
      return size;
  }
  return 1;
}

constexpr int kMostDevices = 64;
struct Device {
  std::once_flag once;
  int most_cluster = 1;
  unsigned* tickets = nullptr;
  std::mutex of_streams_mutex;
  std::unordered_map<unsigned long long, unsigned*> of_streams;  // by the stream's id, which no other ever has
};
Device& current_device() {
  static Device* const devices = new Device[kMostDevices];  // never destroyed: threads may launch until the process ends
  int index = 0;
  check(cudaGetDevice(&index), "cudaGetDevice");
  if (index >= kMostDevices) throw std::runtime_error("kdfast: more than 64 devices");
  Device& device = devices[index];
  std::call_once(device.once, [&] {
    void* at = nullptr;
    check(cudaGetSymbolAddress(&at, tickets), "cudaGetSymbolAddress");
    device.tickets = static_cast<unsigned*>(at);
    device.most_cluster = most_cluster_of(index);
  });
  return device;
}

}  // namespace

// ---- which class serves which row -----------------------------------------------------------------------------------
//
// A thread holds c = 32 logits of a pair of one 16-bit format, 20 of another pair: w, v and the logits take 80 of the 128
// registers that 512 threads leave to each (packed logits lie in shared memory meanwhile). (The KL without a gradient holds the
// logits alone, and c is 64, or 32; the squares around the mean too, c is 40, or 20; those around 0 hold nothing: 256, or 128.)
// The bounds in parentheses are for c = 32 and 20.
//
//   row                                     team                    why
//   <= 32 c   (1024, 640 logits)            1 .. 32 lanes           no barrier; as few lanes as hold it, for short reductions
//   <= 256 c  (8192, 5120)                  a block                 two or more fit a multiprocessor: one loads, one computes
//   clusters (compute capability 9.0 on):
//   <= 2, 4, 8, 16 x 256 c (131072, 81920)  that many blocks        the row stays on chip; 16 where the device can (an H100)
//   <= 16 x 512 c (262144, 163840)          16 of the largest       the same
//   no cluster, or a longer row:
//   <= 512 c  (16384, 10240)                the largest block       alone on its multiprocessor, but the row is read once
//   else                                    blocks of 256 c         each reduces a slice, a second kernel merges, a third
//                                                                   reads again
//   float64 on either side                  a block of 256          reads the row for each pass; simple, not fast
//   logit_huber around the mean             the same
Plan plan_rows(int64_t rows, int64_t row_vectors, int per_thread) {
  const int64_t kept = per_thread;
  constexpr int kBlock = 256;
  constexpr int kFullSectors = 32;  // lanes: a shorter team touches more sectors where rows begin within one
  Plan plan;
  const int64_t most_cluster = current_device().most_cluster;
  if (row_vectors <= 32 * kept) {
    while (plan.team * kept < row_vectors || (plan.team < kFullSectors && plan.team * 4 < row_vectors)) plan.team *= 2;
    plan.threads = 128;
    plan.slice_vectors = int(row_vectors);
    plan.teams = plan.threads / plan.team;
    plan.decides = plan.team == 32;
    plan.blocks = blocks_of((rows + plan.teams - 1) / plan.teams, rows);
    return plan;
  }
  int64_t most_threads = kBlock;
  if (row_vectors > kBlock * kept) {
    if (most_cluster > 1 && row_vectors <= most_cluster * kMostThreads * kept) {
      if (row_vectors > most_cluster * kBlock * kept) most_threads = kMostThreads;
      while (plan.slices * most_threads * kept < row_vectors) plan.slices *= 2;
      plan.cluster = true;
    } else if (row_vectors <= kMostThreads * kept) {
      most_threads = kMostThreads;
    } else {
      plan.slices = int((row_vectors + kBlock * kept - 1) / (kBlock * kept));
    }
  }
  plan.slice_vectors = int((row_vectors + plan.slices - 1) / plan.slices);
  // Slices that begin with a line, where that leaves none empty: a warp's loads then touch no sector more than they have to.
  constexpr int kLine = 8;  // vectors
  const int in_lines = (plan.slice_vectors + kLine - 1) / kLine * kLine;
  if ((plan.slices - 1) * int64_t(in_lines) < row_vectors) plan.slice_vectors = in_lines;
  plan.team = plan.threads = ((plan.slice_vectors + kept - 1) / kept + 31) / 32 * 32;
  plan.decides = plan.slices == 1 || plan.cluster;
  plan.blocks = blocks_of(rows * plan.slices, rows);
  return plan;
}

unsigned blocks_of(int64_t blocks, int64_t rows) {
  if (blocks > INT32_MAX) throw std::runtime_error("kdfast: too many rows: " + std::to_string(rows));
  return unsigned(blocks);
}

int64_t vectors_of_row(const Logits& student, int64_t classes, int width) {
  if (classes > INT32_MAX - 32) throw std::runtime_error("kdfast: too many classes: " + std::to_string(classes));
  bool aligned = reinterpret_cast<uintptr_t>(student.data) % uintptr_t(width * size_of(student.dtype)) == 0;
  for (int d = 0; d < student.rows.dims; ++d) aligned = aligned && student.rows.stride[d] % width == 0;
  return (classes + (aligned ? 0 : width - 1) + width - 1) / width;
}

Workspace::Workspace(void* base, size_t row_loss_size, size_t row_stats_size, size_t partials_size) {
  char* at = static_cast<char*>(base);
  const auto take = [&](size_t size) {
    char* taken = at;
    at += (size + 15) / 16 * 16;
    return taken;
  };
  divisor = reinterpret_cast<double*>(take(sizeof(double)));
  hard_divisor = reinterpret_cast<double*>(take(sizeof(double)));
  ticket = reinterpret_cast<unsigned*>(take(sizeof(unsigned)));
  row_loss = take(row_loss_size);
  row_stats = reinterpret_cast<float*>(take(row_stats_size));
  partials = reinterpret_cast<float*>(take(partials_size));
  bytes = size_t(at - static_cast<char*>(base));
}

unsigned* zeroed_ticket(cudaStream_t stream, unsigned* in_workspace) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  if (status == cudaStreamCaptureStatusNone) {
    unsigned long long id = 0;
    check(cudaStreamGetId(stream, &id), "cudaStreamGetId");
    Device& device = current_device();
    const std::lock_guard lock(device.of_streams_mutex);
    const auto found = device.of_streams.find(id);
    if (found != device.of_streams.end()) return found->second;
    const size_t count = device.of_streams.size();
    if (count < kTickets) return device.of_streams[id] = device.tickets + count;
  }
  // A captured launch runs again at any later time: it has a ticket of its own. (As has one of more streams than tickets.)
  check(cudaMemsetAsync(in_workspace, 0, sizeof(unsigned), stream), "cudaMemsetAsync");
  return in_workspace;
}

void launch(const void* kernel, const Plan& plan, cudaStream_t stream, void** arguments, const char* what, int64_t rows,
            int64_t classes) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.blocks);
  config.blockDim = dim3(unsigned(plan.threads));
  config.dynamicSmemBytes = plan.shared;
  config.stream = stream;
  // Of 48 KiB a kernel's own takes less than half. The most that any asks for is 72 KiB, which every device has beside that.
  constexpr unsigned kUnasked = 24 << 10, kMost = 72 << 10;
  if (plan.shared > kUnasked)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(kMost)), "cudaFuncSetAttribute");
  cudaLaunchAttribute cluster[1];
  if (plan.cluster) {
    cluster[0].id = cudaLaunchAttributeClusterDimension;
    cluster[0].val.clusterDim.x = unsigned(plan.slices);
    cluster[0].val.clusterDim.y = cluster[0].val.clusterDim.z = 1;
    config.attrs = cluster;
    config.numAttrs = 1;
    if (plan.slices > 8)
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cudaFuncSetAttribute");
  }
  const cudaError_t error = cudaLaunchKernelExC(&config, kernel, arguments);
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string("kdfast: ") + what + " of " + std::to_string(rows) + " rows of " +
                           std::to_string(classes) + " classes could not be launched (" + std::to_string(plan.blocks) +
                           " blocks of " + std::to_string(plan.threads) + " threads" +
                           (plan.cluster ? ", clusters of " + std::to_string(plan.slices) : std::string()) +
                           "): " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// ---- small kernels --------------------------------------------------------------------------------------------------

namespace {

__global__ void __launch_bounds__(kMostThreads) divisor_kernel(Numbers weight, Numbers divisor, double per_weight, int64_t rows,
                                                               Numbers target, int64_t ignored, double* out) {
  __shared__ double shared[kMostWarps][1];
  Plan block;
  block.team = blockDim.x;
  double total[1] = {0};
  for (int64_t r = threadIdx.x; r < rows; r += blockDim.x) {
    if (target.data == nullptr || target.at(r, int64_t(0)) != ignored) total[0] += weight.at(r, 1.0);
  }
  reduce<Sum>(Team(block), total, shared);
  if (threadIdx.x == 0) *out = divisor.at(0, 1.0) * (total[0] == 0 ? 1.0 : total[0] * per_weight);
}

__global__ void sum_nothing_kernel(Task task, bool wide) {
  const double loss = 0 / task.divisor.at(0, task.number);
  for (void* out : {task.loss, task.hard, task.soft}) {
    if (out == nullptr) continue;
    if (wide)
      *static_cast<double*>(out) = loss;
    else
      *static_cast<float*>(out) = float(loss);
  }
}

// The vectors that a thread takes at once: their loads are under way together, and a factor of 1 costs one thread for all.
constexpr int kScaledAtOnce = 4;
constexpr int kScaleThreads = 256;

template <class H>
__global__ void __launch_bounds__(kScaleThreads)
    scale_kernel(void* out, const void* in, DType dtype, const float* float_factor, Numbers factor, float idle, int64_t count) {
  const float by = float_factor ? *float_factor : factor.at(0, 1.f);
  if (by == idle) return;
  const int64_t vectors = (count + H::width - 1) / H::width, size = H::packed ? 2 : size_of(dtype);
  const bool aligned = (reinterpret_cast<uintptr_t>(out) | reinterpret_cast<uintptr_t>(in)) % 16 == 0;
  RowSpan span(H::packed, nullptr, dtype, nullptr, dtype, 0);
  GradientRow row;
  row.dtype = dtype;
  constexpr int64_t kOfBlock = kScaleThreads * kScaledAtOnce;
  for (int64_t first = blockIdx.x * kOfBlock + threadIdx.x; first < vectors; first += gridDim.x * kOfBlock) {
    // A vector that is not whole goes element by element.
    const auto is_whole = [&](int64_t v) { return aligned && (v + 1) * H::width <= count; };
    const auto set_left = [&](int64_t v) { span.classes = int(min(int64_t(H::width), count - v * H::width)); };
    H x[kScaledAtOnce];
#pragma unroll
    for (int i = 0; i < kScaledAtOnce; ++i) {
      const int64_t v = first + i * kScaleThreads;
      if (v >= vectors) break;
      const char* from = static_cast<const char*>(in) + v * H::width * size;
      set_left(v);
      x[i] = is_whole(v) ? load_whole<H>(from, dtype) : load_part<H>(from, dtype, span, 0, nothing<H>());
    }
#pragma unroll
    for (int i = 0; i < kScaledAtOnce; ++i) {
      const int64_t v = first + i * kScaleThreads;
      if (v >= vectors) break;
      char* to = static_cast<char*>(out) + v * H::width * size;
      float y[H::width];
      for (int k = 0; k < H::width; ++k) y[k] = x[i][k] * by;
      set_left(v);
      if (is_whole(v))
        row.store_whole<H>(y, to);
      else
        row.store_part<H>(y, to, span, 0);
    }
  }
}
__global__ void __launch_bounds__(kScaleThreads)
    scale_wide_kernel(double* out, const double* in, Numbers factor, int64_t count) {
  const double by = factor.at(0, 1.0);
  if (by == 1 && out == in) return;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += int64_t(gridDim.x) * blockDim.x)
    out[i] = in[i] * by;
}

}  // namespace

namespace {
Numbers sum_weights(const Call& call, const Numbers& divisor, double per_weight, const Numbers& weight, int64_t rows,
                    const Numbers& target, int64_t ignored, double* in_workspace) {
  Plan plan;
  plan.threads = kMostThreads;
  plan.blocks = 1;
  Numbers given[] = {weight, divisor, target};
  void* arguments[] = {&given[0], &given[1], &per_weight, &rows, &given[2], &ignored, &in_workspace};
  launch((const void*)divisor_kernel, plan, static_cast<cudaStream_t>(call.stream), arguments, "the sum of row weights", rows,
         1);
  Numbers sum;
  sum.data = in_workspace;
  sum.type = NumberType::f64;
  sum.stride = 0;
  return sum;
}
}  // namespace

Numbers resolve_divisor(const Call& call, const Numbers& weight, int64_t rows, double* in_workspace) {
  if (call.times_weights == 0) return call.divisor;
  return sum_weights(call, call.divisor, call.times_weights * call.number, weight, rows, Numbers(), 0, in_workspace);
}
Numbers resolve_hard_divisor(const Call& call, const KdLossArgs& args, double* in_workspace) {
  if (!call.hard_by_rows) return call.hard_divisor;
  return sum_weights(call, Numbers(), 1, args.weight, args.rows, args.target, args.ignore_index, in_workspace);
}

void sum_nothing(const Task& task, bool wide, cudaStream_t stream) {
  if (task.loss == nullptr) return;
  Plan plan;
  plan.blocks = 1;
  Task copy = task;
  void* arguments[] = {&copy, &wide};
  launch((const void*)sum_nothing_kernel, plan, stream, arguments, "the loss", 0, 0);
}

void scale_gradient(void* out, const void* in, DType dtype, const Numbers& factor, int64_t count, void* stream) {
  if (count == 0) return;
  Plan plan;
  plan.threads = kScaleThreads;
  // A thread takes kScaledAtOnce vectors, more where there are blocks enough: most calls find a factor of 1, and then a thread
  // costs as much as a vector.
  const int64_t few = kScaleThreads * kScaledAtOnce * (16 / size_of(dtype)), per_block = count < (1 << 23) ? few : 8 * few;
  const int64_t blocks = (count + per_block - 1) / per_block;
  plan.blocks = unsigned(blocks < (1 << 20) ? blocks : 1 << 20);
  Numbers by = factor;
  // What a factor nearly always is, so that a thread need not ask.
  const float* of_float = factor.type == NumberType::f32 ? static_cast<const float*>(factor.data) : nullptr;
  float idle = out == in ? 1 : NAN;  // the factor that leaves nothing to do
  void *typed[] = {&out, &in, &dtype, &of_float, &by, &idle, &count}, *wide[] = {&out, &in, &by, &count};
  const void* kernel = dtype == DType::bf16  ? (const void*)scale_kernel<HeldBF16>
                       : dtype == DType::f16 ? (const void*)scale_kernel<HeldF16>
                       : dtype == DType::f32 ? (const void*)scale_kernel<HeldFloat>
                                             : (const void*)scale_wide_kernel;
  launch(kernel, plan, static_cast<cudaStream_t>(stream), dtype == DType::f64 ? wide : typed, "scaling a gradient", 1, count);
}

}  // namespace kdfast::cuda
