// The Python module kdfast._C. Importing it also registers the operators of ops.cpp. No torch header is included here, so the
// extension depends on pybind11, DLPack (direct.cpp) and torch's stable ABI alone.
#include <pybind11/pybind11.h>

#include <string>

#include "kernels.h"

namespace py = pybind11;

namespace kdfast {
void bind_direct(py::module_& m);  // direct.cpp
}

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

#ifdef KDFAST_WITH_CUDA
constexpr bool kCuda = true;
constexpr const char *kCudaVersion = KDFAST_CUDA_VERSION, *kCudaArchs = KDFAST_CUDA_ARCHS;
#else
constexpr bool kCuda = false;
constexpr const char *kCudaVersion = "", *kCudaArchs = "";
#endif

// "8.0;9.0" -> ["8.0", "9.0"]
py::list split(const std::string& text) { return py::list(py::str(text).attr("replace")(";", " ").attr("split")()); }

py::dict build_info() {
  py::list cpu_isas;
  for (const char* isa : {"baseline", "avx2", "avx512"})
    if (kdfast::cpu::isa_available(isa)) cpu_isas.append(isa);

  py::dict info;
  info["version"] = KDFAST_VERSION;
  info["torch_version"] = KDFAST_TORCH_VERSION;
  info["compiler"] = kCompiler;
  info["cpu_isas"] = cpu_isas;
  info["cpu_isa"] = kdfast::cpu::isa_name();
  info["cuda"] = kCuda;
  info["cuda_version"] = kCudaVersion;
  info["cuda_archs"] = split(kCudaArchs);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "kdfast's kernels; they are called as torch.ops.kdfast.*, and calls on the CPU that one thread does directly";
  m.def("build_info", &build_info, "What this build holds, and what of it this machine can use.");
  kdfast::bind_direct(m);
}
