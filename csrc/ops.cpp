// The map of the package: every operator's schema, its registration for each device, and what torch has to do with it. The
// operators are private: kdfast/functional.py checks the arguments and kdfast/_ops.py gives them their gradients. Only torch's
// stable ABI is used, so that one binary serves every torch from 2.13 on.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#ifdef KDFAST_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>
#endif
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "losses.h"

namespace kdfast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- tensors to raw pointers ---------------------------------------------------------------------------------------------

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, "kdfast: logits must be float64, float32, bfloat16 or float16");
  }
}

ScalarType accumulate_type(const Tensor& student, const Tensor& teacher) {
  const bool wide = student.scalar_type() == ScalarType::Double || teacher.scalar_type() == ScalarType::Double;
  return wide ? ScalarType::Double : ScalarType::Float;
}

int64_t rows_in(const Tensor& logits) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < logits.dim(); ++d) rows *= logits.size(d);
  return rows;
}

// False where the leading dimensions do not merge into kMaxDims.
bool merge_rows(const Tensor& logits, RowLayout& layout) {
  const auto sizes = logits.sizes(), strides = logits.strides();
  layout = RowLayout{};
  int dims = 0;
  for (int64_t d = 0; d + 1 < logits.dim(); ++d) {
    if (sizes[d] == 1) continue;
    if (dims > 0 && layout.stride[dims - 1] == sizes[d] * strides[d]) {
      layout.size[dims - 1] *= sizes[d];
      layout.stride[dims - 1] = strides[d];
      continue;
    }
    if (dims == RowLayout::kMaxDims) return false;
    layout.size[dims] = sizes[d];
    layout.stride[dims++] = strides[d];
  }
  layout.dims = std::max(dims, 1);
  return true;
}

Logits logits_of(Tensor& tensor) {
  Logits logits;
  if (!merge_rows(tensor, logits.rows)) {
    tensor = torch::stable::contiguous(tensor);
    merge_rows(tensor, logits.rows);
  }
  logits.data = tensor.data_ptr();
  logits.dtype = dtype_of(tensor);
  return logits;
}

Gradient gradient_of(const Tensor& tensor) {
  Gradient gradient;
  STD_TORCH_CHECK(merge_rows(tensor, gradient.rows), "kdfast: inplace_backward takes logits of at most ", RowLayout::kMaxDims,
                  " leading dimensions that do not merge");
  gradient.data = tensor.data_ptr();
  gradient.dtype = dtype_of(tensor);
  gradient.width = tensor.size(tensor.dim() - 1);
  return gradient;
}

// One number a row, or one for all rows where `numel` is 1 or every stride is 0.
Numbers numbers_of(const OptionalTensor& tensor, int64_t rows, const char* name) {
  Numbers numbers;
  if (!tensor) return numbers;
  numbers.data = tensor->data_ptr();
  const auto strides = tensor->strides();
  const bool one = tensor->numel() == 1 || std::all_of(strides.begin(), strides.end(), [](int64_t s) { return s == 0; });
  numbers.stride = one ? 0 : 1;
  STD_TORCH_CHECK(one || (tensor->numel() == rows && tensor->is_contiguous()), "kdfast: ", name,
                  " must be contiguous, one a row");
  switch (tensor->scalar_type()) {
    case ScalarType::Double:
      numbers.type = NumberType::f64;
      break;
    case ScalarType::Float:
      numbers.type = NumberType::f32;
      break;
    case ScalarType::BFloat16:
      numbers.type = NumberType::bf16;
      break;
    case ScalarType::Half:
      numbers.type = NumberType::f16;
      break;
    case ScalarType::Bool:
      numbers.type = NumberType::boolean;
      break;
    case ScalarType::Int:
      numbers.type = NumberType::i32;
      break;
    case ScalarType::Long:
      numbers.type = NumberType::i64;
      break;
    default:
      STD_TORCH_CHECK(false, "kdfast: ", name, " has a dtype that is not taken");
  }
  return numbers;
}

// A tensor on the device of another. (By the shim: torch::stable::new_empty boxes its arguments.)
Tensor empty_beside(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                                                         torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                                                         device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

// A gradient for `input`, contiguous; an empty tensor where it is not wanted.
Tensor new_gradient(const Tensor& input, bool wanted) {
  Tensor gradient = empty_beside(input, wanted ? sizes_of(input) : std::vector<int64_t>{0}, input.scalar_type());
  if (input.is_cpu()) advise_huge_pages(gradient.data_ptr(), size_t(gradient.numel()) * gradient.element_size());
  return gradient;
}

// ---- what every loss's operators share -----------------------------------------------------------------------------------

struct Options {
  const OptionalTensor& row_weight;
  const OptionalTensor& denominator;
  std::optional<double> divisor;  // a denominator given as a number
  Reduction reduction;
};

// Logits and options checked as far as memory safety needs it; user-facing checks are functional.py's.
template <class Args>
Args make_args(Tensor& student, Tensor& teacher, const Options& options, int64_t num_classes) {
  STD_TORCH_CHECK(student.dim() >= 1 && student.dim() == teacher.dim(), "kdfast: student and teacher must have the same rank");
  const int64_t last = student.dim() - 1;
  for (int64_t d = 0; d < last; ++d)
    STD_TORCH_CHECK(student.size(d) == teacher.size(d), "kdfast: student and teacher must have the same leading dimensions");
  const int64_t classes = num_classes < 0 ? student.size(last) : num_classes;
  STD_TORCH_CHECK(classes >= 1 && classes <= student.size(last) && classes <= teacher.size(last),
                  "kdfast: num_classes must be from 1 to the logits' width");
  STD_TORCH_CHECK((student.stride(last) == 1 && teacher.stride(last) == 1) || classes <= 1 || rows_in(student) == 0,
                  "kdfast: the class dimension must have stride 1");
  STD_TORCH_CHECK(int(options.reduction) >= 0 && int(options.reduction) <= 3, "kdfast: unknown reduction");
  Args args;
  args.rows = rows_in(student);
  args.classes = classes;
  args.student = logits_of(student);
  args.teacher = logits_of(teacher);
  args.weight = numbers_of(options.row_weight, args.rows, "row_weight");
  return args;
}

// With a denominator that is a tensor read here, so on the CPU.
Divisor divisor_of(const Options& options, const Tensor& student) {
  std::optional<double> number = options.divisor;
  if (!number && options.denominator && student.is_cpu()) number = numbers_of(options.denominator, 1, "denominator").at(0, 1.0);
  return {number, options.reduction, student.dim() > 1 ? student.size(0) : 1};
}

// A thread's share of the rows, that it and those which are done with theirs take blocks of.
class Share {
 public:
  Share() = default;
  void set(int64_t begin, int64_t end) {
    next_ = begin;
    end_ = end;
  }
  // Blocks that become smaller as the share does, of `least` rows or more, until nothing is left.
  template <class Body>
  void take_blocks(int64_t least, Body body) {
    constexpr int64_t kBlocks = 4;  // of what is left
    for (int64_t begin = next_.load(std::memory_order_relaxed); begin < end_;) {
      const int64_t block = std::max(least, (end_ - begin) / kBlocks), end = std::min(end_, begin + block);
      if (!next_.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
      body(begin, end);
      begin = next_.load(std::memory_order_relaxed);
    }
  }

 private:
  alignas(64) std::atomic<int64_t> next_{0};  // (a cache line each)
  int64_t end_ = 0;
};

// Runs the kernel on all rows, on as many threads as are worth it: by even shares, whose rest goes to whoever is done, since a
// core may be slower than another or busy with something else. A row's bits depend on no other row.
template <class Args, class Kernel>
void for_rows(const Args& args, Kernel kernel) {
  const int64_t rows = args.rows, grain = std::max<int64_t>(1, kPairsPerTask / std::max<int64_t>(1, args.classes));
  const int64_t threads = rows <= grain ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), (rows + grain - 1) / grain);
  if (threads == 1) return kernel(args, 0, rows);
  std::vector<Share> shares(threads);
  for (int64_t i = 0; i < threads; ++i) shares[i].set(rows * i / threads, rows * (i + 1) / threads);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    if (last - first == threads) return kernel(args, 0, rows);  // within another parallel region
    for (int64_t i = 0; i < threads; ++i)
      shares[(first + i) % threads].take_blocks(grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  });
}

// What forward returns of each loss before the statistics or the gradient: of type `type`, one number or one a row.
using Value = std::tuple<Tensor>;
using Parts = std::tuple<Tensor, Tensor, Tensor>;  // loss, hard, soft

Tensor empty_value(const Tensor& student, ScalarType type, Reduction reduction) {
  std::vector<int64_t> sizes;
  if (reduction == Reduction::None) {
    sizes = sizes_of(student);
    sizes.pop_back();
  }
  return empty_beside(student, sizes, type);
}

// What differs between the devices: where the divisor is known, how a kernel runs, how its row losses are reduced.
struct OnCpu {
  CpuReduction reduction;

  explicit OnCpu(const Tensor&) {}
  template <class Args>
  void divide(Args& args, const Options& options, const Tensor& student, double per_row) {
    if constexpr (std::is_same_v<Args, KdLossArgs>) {  // (functional.py knows this message by its beginning)
      const int64_t row = wrong_target(args);
      STD_TORCH_CHECK(row < 0, "kdfast: target must be from 0 to ", args.classes - 1, " or ignore_index = ", args.ignore_index,
                      "; got ", args.target.at(row, int64_t(0)), " in row ", row);
    }
    reduction.divide(args, divisor_of(options, student), per_row);
  }
  template <class Loss, class Args>
  auto forward(Args& args, const Tensor& student, ScalarType type, Reduction by) const {
    const auto run = [&](void* const* values) {
      reduction.forward(args, by, type == ScalarType::Double, values, [](const Args& args) { for_rows(args, Loss::forward); });
    };
    Tensor loss = empty_value(student, type, by);
    if constexpr (Loss::kValues == 1) {
      void* const values[] = {loss.data_ptr()};
      run(values);
      return Value{loss};
    } else {
      Tensor hard = empty_value(student, type, by), soft = empty_value(student, type, by);
      void* const values[] = {loss.data_ptr(), hard.data_ptr(), soft.data_ptr()};
      run(values);
      return Parts{loss, hard, soft};
    }
  }
  template <class Loss, class Args>
  void backward(const Args& args, const Tensor&) const {
    for_rows(args, Loss::backward);
  }
  void scale(const Tensor& out, const Tensor& in, const Numbers& by) const {
    const double factor = by.at(0, 1.0);
    if (factor == 1 && out.data_ptr() == in.data_ptr()) return;
    constexpr int64_t kPerTask = 2 * kPairsPerTask;  // a number takes less than half the time of a pair
    torch::stable::parallel_for(0, in.numel(), kPerTask, [&](int64_t begin, int64_t end) {
      cpu::scale_gradient(out.data_ptr(), in.data_ptr(), dtype_of(in), factor, begin, end);
    });
  }
};

#ifdef KDFAST_WITH_CUDA
struct OnCuda {
  torch::stable::accelerator::DeviceGuard guard;
  cuda::Call call;

  explicit OnCuda(const Tensor& student) : guard(student.get_device_index()) {
    call.stream = torch::stable::accelerator::getCurrentStream(student.get_device_index()).nativeHandle();
  }
  template <class Args>
  void divide(Args& args, const Options& options, const Tensor& student, double per_row) {
    const bool by_weights = options.reduction == Reduction::Mean && args.weight.data != nullptr && args.rows > 0;
    if (options.denominator && !options.divisor)
      call.divisor = numbers_of(options.denominator, 1, "denominator");
    else if (by_weights && !options.divisor)
      call.times_weights = per_row;
    else
      call.number = divisor_of(options, student).of(args.weight, args.rows, per_row);
  }
  void divide(KdLossArgs& args, const Options& options, const Tensor& student, double per_row) {
    divide<KdLossArgs>(args, options, student, per_row);
    args.grad_scale = args.alpha;
    args.hard_grad_scale = 1 - args.alpha;
    if (options.denominator && !options.divisor)
      call.hard_divisor = call.divisor;
    else if (options.reduction == Reduction::Mean && args.rows > 0 && !options.divisor)
      call.hard_by_rows = true;
    else
      call.hard_number = divisor_of(options, student).of(args.weight, args.rows, 1);
  }
  template <class Loss, class Args>
  Value forward(Args& args, const Tensor& student, ScalarType type, Reduction reduction) {
    Tensor loss = empty_value(student, type, reduction);
    (reduction == Reduction::None ? args.row_loss : call.loss) = loss.data_ptr();
    const Tensor workspace = allocate(args, student);
    Loss::forward_cuda(args, call);
    return {loss};
  }
  template <class Loss>
  Parts forward(KdLossArgs& args, const Tensor& student, ScalarType type, Reduction reduction) {
    const bool by_row = reduction == Reduction::None;
    const auto empty = [&] { return empty_value(student, type, reduction); };
    Tensor loss = empty(), hard = empty(), soft = empty();
    (by_row ? args.row_loss : call.loss) = loss.data_ptr();
    (by_row ? args.row_hard : call.hard) = hard.data_ptr();
    (by_row ? args.row_soft : call.soft) = soft.data_ptr();
    const Tensor workspace = allocate(args, student);
    Loss::forward_cuda(args, call);
    return {loss, hard, soft};
  }
  template <class Loss, class Args>
  void backward(const Args& args, const Tensor& student) {
    const Tensor workspace = allocate(args, student);
    Loss::backward_cuda(args, call);
  }
  void scale(const Tensor& out, const Tensor& in, const Numbers& factor) const {
    cuda::scale_gradient(out.data_ptr(), in.data_ptr(), dtype_of(in), factor, in.numel(), call.stream);
  }

 private:
  template <class Args>
  Tensor allocate(const Args& args, const Tensor& student) {
    Tensor workspace = empty_beside(student, {int64_t(cuda::workspace_bytes(args))}, ScalarType::Byte);
    call.workspace = workspace.data_ptr();
    return workspace;
  }
};
#endif

// The kinds of operator, the same for every loss. `Loss` names its arguments, kernels and statistics.
template <class Loss, class Device>
struct Ops {
  using Args = typename Loss::Args;

  static auto forward(const Loss& loss, Tensor student, Tensor teacher, const Options& options, int64_t num_classes,
                      bool for_backward) {
    Args args = make_args<Args>(student, teacher, options, num_classes);
    loss.fill(args);
    const ScalarType type = accumulate_type(student, teacher);
    const int64_t count = for_backward ? loss.stats() : 0;
    Tensor stats = empty_beside(student, {args.rows, count}, type);
    if (count > 0) args.row_stats = stats.data_ptr();
    Device device(student);
    device.divide(args, options, student, loss.per_row(args));
    return std::tuple_cat(device.template forward<Loss>(args, student, type, options.reduction), std::make_tuple(stats));
  }

  static auto forward_grad(const Loss& loss, Tensor student, Tensor teacher, const Options& options, int64_t num_classes) {
    Tensor grad_student = new_gradient(student, true);
    return std::tuple_cat(forward_into(loss, student, teacher, options, num_classes, grad_student, nullptr),
                          std::make_tuple(grad_student));
  }

  static auto forward_grads(const Loss& loss, Tensor student, Tensor teacher, const Options& options, int64_t num_classes) {
    Tensor grad_student = new_gradient(student, true), grad_teacher = new_gradient(teacher, true);
    return std::tuple_cat(forward_into(loss, student, teacher, options, num_classes, grad_student, &grad_teacher),
                          std::make_tuple(grad_student, grad_teacher));
  }

  static auto forward_into(const Loss& loss, Tensor student, Tensor teacher, const Options& options, int64_t num_classes,
                           const Tensor& grad_student, const Tensor* grad_teacher) {
    STD_TORCH_CHECK(options.reduction != Reduction::None, "kdfast: a gradient in forward needs a scalar loss");
    Args args = make_args<Args>(student, teacher, options, num_classes);
    loss.fill(args);
    Device device(student);
    device.divide(args, options, student, loss.per_row(args));
    args.grad_student = gradient_of(grad_student);
    if (grad_teacher) args.grad_teacher = gradient_of(*grad_teacher);
    return device.template forward<Loss>(args, student, accumulate_type(student, teacher), options.reduction);
  }

  static void backward_into(const Loss& loss, const Tensor& grad_loss, Tensor student, Tensor teacher, const Tensor& stats,
                            const Options& options, int64_t num_classes, const Tensor* grad_student,
                            const Tensor* grad_teacher) {
    Args args = make_args<Args>(student, teacher, options, num_classes);
    loss.fill(args);
    STD_TORCH_CHECK(stats.scalar_type() == accumulate_type(student, teacher) && stats.is_contiguous() &&
                        stats.numel() == args.rows * loss.stats(),
                    "kdfast: row_stats is not what the forward operator returned for these logits");
    if (loss.stats() > 0) args.row_stats = stats.data_ptr();
    args.grad_loss = numbers_of(grad_loss, args.rows, "grad_loss");
    Device device(student);
    device.divide(args, options, student, loss.per_row(args));
    if (grad_student) args.grad_student = gradient_of(*grad_student);
    if (grad_teacher) args.grad_teacher = gradient_of(*grad_teacher);
    device.template backward<Loss>(args, student);
  }

  static std::tuple<Tensor, Tensor> backward(const Loss& loss, const Tensor& grad_loss, const Tensor& student,
                                             const Tensor& teacher, const Tensor& stats, const Options& options,
                                             int64_t num_classes, bool for_student, bool for_teacher) {
    Tensor grad_student = new_gradient(student, for_student), grad_teacher = new_gradient(teacher, for_teacher);
    backward_into(loss, grad_loss, student, teacher, stats, options, num_classes, for_student ? &grad_student : nullptr,
                  for_teacher ? &grad_teacher : nullptr);
    return {grad_student, grad_teacher};
  }

  static Tensor backward_inplace(const Loss& loss, const Tensor& grad_loss, const Tensor& student, const Tensor& teacher,
                                 const Tensor& stats, const Options& options, int64_t num_classes, bool for_teacher) {
    Tensor grad_teacher = new_gradient(teacher, for_teacher);
    backward_into(loss, grad_loss, student, teacher, stats, options, num_classes, &student,
                  for_teacher ? &grad_teacher : nullptr);
    return grad_teacher;
  }
};

// The target of kd_loss, and what its kernels rely on.
Numbers target_of(const Tensor& target, const Tensor& student, const Tensor& teacher, int64_t soft) {
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long || target.scalar_type() == ScalarType::Int,
                  "kdfast: the target must be int64 or int32");
  STD_TORCH_CHECK((student.scalar_type() == ScalarType::Double) == (teacher.scalar_type() == ScalarType::Double),
                  "kdfast: kd_loss takes float64 logits on both sides or on none");
  STD_TORCH_CHECK(soft >= 0 && soft <= 2, "kdfast: unknown soft loss");
  return numbers_of(target, rows_in(student), "target");
}

// ---- operators -----------------------------------------------------------------------------------------------------------
//
// Every loss has five:
//   X_forward           -> (loss, row_stats)       the loss, reduced; what the backward needs to know of each row, nothing
//                                                  unless it is for_backward
//   X_forward_grad      -> (loss, grad_student)    the same and the student's gradient for grad_loss = 1
//   X_forward_grads     -> (loss, grad_student, grad_teacher)    and the teacher's
//                                                  (of kd_loss they return loss, hard and soft part in the place of loss)
//   X_backward          -> (grad_student, grad_teacher)    each an empty tensor where it is not wanted
//   X_backward_inplace  -> grad_teacher            the student's gradient overwrites its logits
// `row_weight` one number a row; `denominator` (a tensor) or `divisor` (a number) replaces the reduction's own divisor;
// `reduction` as kernels.h numbers it; `num_classes` -1: all columns.

#define KDFAST_COMMON                                                                                                    \
  const OptionalTensor &row_weight, const OptionalTensor &denominator, std::optional<double> divisor, int64_t reduction, \
      int64_t num_classes
#define KDFAST_OPTIONS Options{row_weight, denominator, divisor, Reduction(reduction)}, num_classes
#define KDFAST_COMMON_SCHEMA "Tensor? row_weight, Tensor? denominator, float? divisor, int reduction, int num_classes"

// The functions of one loss. PARAMETERS: the loss's own, in parentheses; VALUES: the Loss made of them.
#define KDFAST_UNWRAP(...) __VA_ARGS__
#define KDFAST_LOSS(NAME, LOSS, PARAMETERS, VALUES)                                                                        \
  template <class Device>                                                                                                  \
  auto NAME##_forward(const Tensor& student, const Tensor& teacher, KDFAST_COMMON, KDFAST_UNWRAP PARAMETERS,               \
                      bool for_backward) {                                                                                 \
    return Ops<LOSS, Device>::forward(LOSS{KDFAST_UNWRAP VALUES}, student, teacher, KDFAST_OPTIONS, for_backward);         \
  }                                                                                                                        \
  template <class Device>                                                                                                  \
  auto NAME##_forward_grad(const Tensor& student, const Tensor& teacher, KDFAST_COMMON, KDFAST_UNWRAP PARAMETERS) {        \
    return Ops<LOSS, Device>::forward_grad(LOSS{KDFAST_UNWRAP VALUES}, student, teacher, KDFAST_OPTIONS);                  \
  }                                                                                                                        \
  template <class Device>                                                                                                  \
  auto NAME##_forward_grads(const Tensor& student, const Tensor& teacher, KDFAST_COMMON, KDFAST_UNWRAP PARAMETERS) {       \
    return Ops<LOSS, Device>::forward_grads(LOSS{KDFAST_UNWRAP VALUES}, student, teacher, KDFAST_OPTIONS);                 \
  }                                                                                                                        \
  template <class Device>                                                                                                  \
  std::tuple<Tensor, Tensor> NAME##_backward(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher,        \
                                             const Tensor& row_stats, KDFAST_COMMON, KDFAST_UNWRAP PARAMETERS,             \
                                             bool for_student, bool for_teacher) {                                         \
    return Ops<LOSS, Device>::backward(LOSS{KDFAST_UNWRAP VALUES}, grad_loss, student, teacher, row_stats, KDFAST_OPTIONS, \
                                       for_student, for_teacher);                                                          \
  }                                                                                                                        \
  template <class Device>                                                                                                  \
  Tensor NAME##_backward_inplace(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher,                    \
                                 const Tensor& row_stats, KDFAST_COMMON, KDFAST_UNWRAP PARAMETERS, bool for_teacher) {     \
    return Ops<LOSS, Device>::backward_inplace(LOSS{KDFAST_UNWRAP VALUES}, grad_loss, student, teacher, row_stats,         \
                                               KDFAST_OPTIONS, for_teacher);                                               \
  }

KDFAST_LOSS(kl_div_tau, KlDivTau, (double tau, double teacher_tau, bool scale_by_tau_squared),
            (tau, teacher_tau, scale_by_tau_squared))
KDFAST_LOSS(logit_mse, LogitMse, (bool center, bool tau_limit), (center, tau_limit))
KDFAST_LOSS(logit_huber, LogitHuber, (double delta, bool smooth_l1, bool center), (delta, smooth_l1, center))
KDFAST_LOSS(kd_loss, KdLoss,
            (const Tensor& target, double tau, double alpha, int64_t soft, int64_t ignore_index, double label_smoothing),
            (target_of(target, student, teacher, soft), tau, alpha, Soft(soft), ignore_index, label_smoothing))

template <class Device>
void scale_into(const Tensor& out, const Tensor& gradient, const Tensor& grad_loss) {
  STD_TORCH_CHECK(gradient.is_contiguous() && grad_loss.numel() == 1, "kdfast: a contiguous gradient and one factor are taken");
  Device(gradient).scale(out, gradient, numbers_of(grad_loss, 1, "grad_loss"));
}
template <class Device>
Tensor scale_gradient(const Tensor& gradient, const Tensor& grad_loss) {
  Tensor out = new_gradient(gradient, true);
  scale_into<Device>(out, gradient, grad_loss);
  return out;
}
template <class Device>
void scale_gradient_inplace(const Tensor& gradient, const Tensor& grad_loss) {
  scale_into<Device>(gradient, gradient, grad_loss);
}

}  // namespace
}  // namespace kdfast

// VALUES: what forward returns of the loss.
#define KDFAST_SCHEMAS(NAME, PARAMETERS, VALUES)                                                                             \
  library.def(NAME "_forward(Tensor student, Tensor teacher, " KDFAST_COMMON_SCHEMA ", " PARAMETERS                          \
                   ", bool for_backward) -> (" VALUES ", Tensor)");                                                          \
  library.def(NAME "_forward_grad(Tensor student, Tensor teacher, " KDFAST_COMMON_SCHEMA ", " PARAMETERS ") -> (" VALUES     \
                   ", Tensor)");                                                                                             \
  library.def(NAME "_forward_grads(Tensor student, Tensor teacher, " KDFAST_COMMON_SCHEMA ", " PARAMETERS ") -> (" VALUES    \
                   ", Tensor, Tensor)");                                                                                     \
  library.def(NAME "_backward(Tensor grad_loss, Tensor student, Tensor teacher, Tensor row_stats, " KDFAST_COMMON_SCHEMA     \
                   ", " PARAMETERS ", bool for_student, bool for_teacher) -> (Tensor, Tensor)");                             \
  library.def(                                                                                                               \
      NAME "_backward_inplace(Tensor grad_loss, Tensor(a!) student, Tensor teacher, Tensor row_stats, " KDFAST_COMMON_SCHEMA \
           ", " PARAMETERS ", bool for_teacher) -> Tensor");

#define KDFAST_REGISTER_LOSS(NAME, DEVICE)                                                        \
  library.impl(#NAME "_forward", TORCH_BOX(&kdfast::NAME##_forward<kdfast::DEVICE>));             \
  library.impl(#NAME "_forward_grad", TORCH_BOX(&kdfast::NAME##_forward_grad<kdfast::DEVICE>));   \
  library.impl(#NAME "_forward_grads", TORCH_BOX(&kdfast::NAME##_forward_grads<kdfast::DEVICE>)); \
  library.impl(#NAME "_backward", TORCH_BOX(&kdfast::NAME##_backward<kdfast::DEVICE>));           \
  library.impl(#NAME "_backward_inplace", TORCH_BOX(&kdfast::NAME##_backward_inplace<kdfast::DEVICE>))
#define KDFAST_REGISTER(DEVICE)                                                       \
  KDFAST_REGISTER_LOSS(kl_div_tau, DEVICE);                                           \
  KDFAST_REGISTER_LOSS(logit_mse, DEVICE);                                            \
  KDFAST_REGISTER_LOSS(logit_huber, DEVICE);                                          \
  KDFAST_REGISTER_LOSS(kd_loss, DEVICE);                                              \
  library.impl("scale_gradient", TORCH_BOX(&kdfast::scale_gradient<kdfast::DEVICE>)); \
  library.impl("scale_gradient_inplace", TORCH_BOX(&kdfast::scale_gradient_inplace<kdfast::DEVICE>))

STABLE_TORCH_LIBRARY(kdfast, library) {
  KDFAST_SCHEMAS("kl_div_tau", "float tau, float teacher_tau, bool scale_by_tau_squared", "Tensor")
  KDFAST_SCHEMAS("logit_mse", "bool center, bool tau_limit", "Tensor")
  KDFAST_SCHEMAS("logit_huber", "float delta, bool smooth_l1, bool center", "Tensor")
  KDFAST_SCHEMAS("kd_loss", "Tensor target, float tau, float alpha, int soft, int ignore_index, float label_smoothing",
                 "Tensor, Tensor, Tensor")
  library.def("scale_gradient(Tensor gradient, Tensor grad_loss) -> Tensor");
  library.def("scale_gradient_inplace(Tensor(a!) gradient, Tensor grad_loss) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, library) { KDFAST_REGISTER(OnCpu); }
#ifdef KDFAST_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(kdfast, CUDA, library) { KDFAST_REGISTER(OnCuda); }
#endif
