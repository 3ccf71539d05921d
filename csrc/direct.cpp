// Calls on the CPU that one thread does: from Python to the kernels past torch's dispatcher, which costs more than a small
// call's arithmetic, and after a model's own work, when nothing of it is in the caches, a tenth of a millisecond. Tensors are
// read through DLPack's exchange interface, a table of C functions that torch.Tensor carries.
//
// A function here takes the plainest case alone and writes into memory that it is given. Anything else it declines: it returns
// False, nothing is written, and the caller takes the operator of ops.cpp. The caller also sees to it that the tensors are
// plain ones (their memory holds their values) and that nobody watches the dispatcher.
#undef TORCH_TARGET_VERSION  // refuses this header, which is not torch's but DLPack's, with a stable ABI of its own
#include <ATen/dlpack.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <exception>
#include <optional>
#include <type_traits>

#include "losses.h"

namespace py = pybind11;

namespace kdfast {
namespace {

using Object = PyObject*;

const DLPackExchangeAPI* find_exchange() {
  const py::object capsule = py::getattr(py::module_::import("torch").attr("Tensor"), "__dlpack_c_exchange_api__", py::none());
  if (capsule.is_none()) return nullptr;
  auto* header = static_cast<DLPackExchangeAPIHeader*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (header == nullptr) throw py::error_already_set();
  while (header != nullptr && header->version.major != DLPACK_MAJOR_VERSION) header = header->prev_api;
  return reinterpret_cast<const DLPackExchangeAPI*>(header);
}
const DLPackExchangeAPI* exchange = nullptr;  // found when the module is imported; null where torch speaks another DLPack

// A contiguous tensor on the CPU, valid as long as the Python object is.
struct Contiguous {
  void* data = nullptr;
  int64_t numel = 0;
  DLTensor tensor;

  // False where it is no such tensor, or has no memory.
  bool read(Object object) {
    if (exchange == nullptr) return false;
    if (exchange->dltensor_from_py_object_no_sync(object, &tensor) != 0) {
      PyErr_Clear();
      return false;
    }
    if (tensor.device.device_type != kDLCPU || tensor.data == nullptr || tensor.dtype.lanes != 1) return false;
    numel = 1;
    for (int d = tensor.ndim; d-- > 0;) {
      if (tensor.shape[d] != 1 && tensor.strides[d] != numel) return false;
      numel *= tensor.shape[d];
    }
    data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    return numel > 0;
  }
  bool is(DLDataTypeCode code, int bits) const { return tensor.dtype.code == code && tensor.dtype.bits == bits; }
  bool same_shape(const Contiguous& other) const {
    if (tensor.ndim != other.tensor.ndim) return false;
    for (int d = 0; d < tensor.ndim; ++d)
      if (tensor.shape[d] != other.tensor.shape[d]) return false;
    return true;
  }
  std::optional<DType> floating() const {
    if (is(kDLFloat, 32)) return DType::f32;
    if (is(kDLBfloat, 16)) return DType::bf16;
    if (is(kDLFloat, 16)) return DType::f16;
    if (is(kDLFloat, 64)) return DType::f64;
    return std::nullopt;
  }
};

// The loss into `values` (its kValues tensors), and, where `gradient` is no None, the student's gradient for grad_loss = 1.
// `target`: of kd_loss.
template <class Loss>
bool direct(Loss loss, Object values, Object gradient, Object student, Object teacher, Object target, int reduction) {
  Contiguous s, t;
  if (!s.read(student) || !t.read(teacher) || s.tensor.ndim < 2 || !s.same_shape(t)) return false;
  const auto s_dtype = s.floating(), t_dtype = t.floating();
  if (!s_dtype || !t_dtype || reduction < 0 || reduction > 3) return false;
  const bool wide = *s_dtype == DType::f64 || *t_dtype == DType::f64;

  typename Loss::Args args;
  args.classes = s.tensor.shape[s.tensor.ndim - 1];
  args.rows = s.numel / args.classes;
  const RowLayout rows{.dims = 1, .size = {args.rows}, .stride = {args.classes}};
  args.student = {s.data, *s_dtype, rows};
  args.teacher = {t.data, *t_dtype, rows};

  const Reduction by = Reduction(reduction);
  void* outputs[Loss::kValues];
  if (!PyTuple_CheckExact(values) || PyTuple_GET_SIZE(values) != Loss::kValues) return false;
  for (int i = 0; i < Loss::kValues; ++i) {
    Contiguous value;
    if (!value.read(PyTuple_GET_ITEM(values, i)) || !value.is(kDLFloat, wide ? 64 : 32)) return false;
    if (value.numel != (by == Reduction::None ? args.rows : 1)) return false;
    outputs[i] = value.data;
  }
  if (gradient != Py_None) {
    Contiguous out;
    if (by == Reduction::None || !out.read(gradient) || out.floating() != s_dtype || !out.same_shape(s)) return false;
    args.grad_student = {out.data, *s_dtype, args.classes, rows};
    advise_huge_pages(out.data, size_t(out.numel) * (out.tensor.dtype.bits / 8));
  }
  if constexpr (std::is_same_v<Loss, KdLoss>) {
    Contiguous classes;
    if ((*s_dtype == DType::f64) != (*t_dtype == DType::f64) || int(loss.soft) < 0 || int(loss.soft) > 2) return false;
    if (!classes.read(target) || classes.numel != args.rows) return false;
    if (!classes.is(kDLInt, 64) && !classes.is(kDLInt, 32)) return false;
    loss.target = {classes.data, classes.is(kDLInt, 64) ? NumberType::i64 : NumberType::i32, 1};
  }
  loss.fill(args);
  if constexpr (std::is_same_v<Loss, KdLoss>)
    if (wrong_target(args) >= 0) return false;
  CpuReduction sums;
  sums.divide(args, Divisor{std::nullopt, by, s.tensor.shape[0]}, loss.per_row(args));
  std::optional<py::gil_scoped_release> others_may_run;
  if (s.numel > kPairsPerTask) others_may_run.emplace();
  sums.forward(args, by, wide, outputs, [](const auto& args) { Loss::forward(args, 0, args.rows); });
  return true;
}

// gradient *= grad_loss.
bool scale(Object gradient, Object grad_loss) {
  Contiguous out, by;
  if (!out.read(gradient) || !by.read(grad_loss) || by.numel != 1) return false;
  const auto dtype = out.floating();
  if (!dtype || (!by.is(kDLFloat, 32) && !by.is(kDLFloat, 64))) return false;
  const double factor = by.is(kDLFloat, 64) ? *static_cast<double*>(by.data) : *static_cast<float*>(by.data);
  if (factor == 1) return true;
  if (out.numel > kPairsPerTask) return false;  // worth splitting over threads
  cpu::scale_gradient(out.data, out.data, *dtype, factor, 0, out.numel);
  return true;
}

// The arguments of a function called from Python. (METH_FASTCALL: pybind11's own calls cost as much as the rest.)
struct Arguments {
  PyObject* const* at;

  Object object(int i) const { return at[i]; }
  double number(int i) const { return PyFloat_AsDouble(at[i]); }
  int64_t integer(int i) const { return PyLong_AsLongLong(at[i]); }
  bool flag(int i) const { return at[i] == Py_True; }
};

// Of every function: values, gradient, student, teacher, reduction; then the loss's own parameters.
constexpr int kCommon = 5;
template <class Loss>
bool direct(const Loss& loss, const Arguments& a, Object target = nullptr) {
  return direct(loss, a.object(0), a.object(1), a.object(2), a.object(3), target, int(a.integer(4)));
}
bool kl_div_tau(const Arguments& a) {
  return direct(KlDivTau{a.number(kCommon), a.number(kCommon + 1), a.flag(kCommon + 2)}, a);
}
bool logit_mse(const Arguments& a) { return direct(LogitMse{a.flag(kCommon), a.flag(kCommon + 1)}, a); }
bool logit_huber(const Arguments& a) {
  return direct(LogitHuber{a.number(kCommon), a.flag(kCommon + 1), a.flag(kCommon + 2)}, a);
}
bool kd_loss(const Arguments& a) {
  const KdLoss loss{{},
                    a.number(kCommon + 1),
                    a.number(kCommon + 2),
                    Soft(a.integer(kCommon + 3)),
                    a.integer(kCommon + 4),
                    a.number(kCommon + 5)};
  return direct(loss, a, a.object(kCommon));
}
bool scale_gradient(const Arguments& a) { return scale(a.object(0), a.object(1)); }

template <auto function, int count>
PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
  if (given != count) return PyErr_Format(PyExc_TypeError, "takes %d arguments, got %zd", count, given);
  try {
    const bool done = function(Arguments{arguments});
    return PyErr_Occurred() ? nullptr : PyBool_FromLong(done);
  } catch (const std::exception& error) {
    return PyErr_Format(PyExc_RuntimeError, "%s", error.what());
  }
}
template <auto function, int count>
PyMethodDef method(const char* name) {
  // METH_FASTCALL functions have another type than the one the field is declared with.
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call<function, count>)), METH_FASTCALL, nullptr};
}

}  // namespace

void bind_direct(py::module_& m) {
  exchange = find_exchange();
  m.attr("PAIRS_PER_TASK") = kPairsPerTask;
  static PyMethodDef methods[] = {method<kl_div_tau, kCommon + 3>("kl_div_tau"),   method<logit_mse, kCommon + 2>("logit_mse"),
                                  method<logit_huber, kCommon + 3>("logit_huber"), method<kd_loss, kCommon + 6>("kd_loss"),
                                  method<scale_gradient, 2>("scale_gradient"),     {}};
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace kdfast
