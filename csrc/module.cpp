// The Python module pyext._C: what was built, what this machine can run, and the choice of instruction set for tests.
// The operators do not pass through here: they register themselves with torch (csrc/<op>.cpp) when the file is loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

std::vector<std::string> isa_names(bool only_usable) {
  std::vector<std::string> names;
  for (const pyext::KernelTable* const* table = pyext::compiled_kernels(); *table; ++table) {
    if (!only_usable || pyext::cpu_can_run((*table)->name)) names.emplace_back((*table)->name);
  }
  return names;
}

py::dict build_info() {
  py::dict info;
  info["version"] = PYEXT_VERSION;
  info["compiler"] = kCompiler;
  info["torch_target"] = PYEXT_TORCH_TARGET;
  info["isas"] = isa_names(/*only_usable=*/false);
#if defined(PYEXT_CUDA)
  info["cuda"] = PYEXT_CUDA;
#endif
  return info;
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> names;
  for (const char* const* name = pyext::cpu_features(); *name; ++name) names.emplace_back(*name);
  return names;
}

std::string isa() {
  const pyext::KernelTable* table = pyext::active_kernels();
  return table ? table->name : "";
}

void set_isa(const std::string& name) {
  if (pyext::set_active_kernels(name.c_str())) return;
  std::string usable = "none";
  for (const std::string& other : isa_names(/*only_usable=*/true)) usable += ", " + other;
  throw py::value_error("name must be one of " + usable + " (what this build and this CPU have), got " + name);
}

double peak_flops(const std::string& dtype, double seconds) {
  int type;
  if (dtype == "fp32") {
    type = pyext::kPeakFp32;
  } else if (dtype == "bf16") {
    type = pyext::kPeakBf16;
  } else if (dtype == "fp64") {
    type = pyext::kPeakFp64;
  } else {
    throw py::value_error("dtype must be 'fp32', 'bf16' or 'fp64', got '" + dtype + "'");
  }
  const pyext::KernelTable* table = pyext::active_kernels();
  if (!table) throw std::runtime_error("peak_flops needs an active instruction set, and this process has none");
  py::gil_scoped_release unlocked;
  return table->peak_flops(type, seconds);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native part of pyext: importing it registers torch.ops.pyext; import torch first.";
  m.def("build_info", &build_info,
        "version, compiler, torch_target, the compiled isas and, if there are CUDA kernels, their compiler, as a dict");
  m.def("cpu_features", &cpu_features, "the instruction-set extensions of this CPU that the kernels can use");
  m.def("isa", &isa, "name of the instruction set in use, or an empty string");
  m.def("available_isas", [] { return isa_names(/*only_usable=*/true); }, "compiled and usable here, slowest first");
  m.def("set_isa", &set_isa, py::arg("name"), "Use one of available_isas(), or 'none'; for tests and benchmarks.");
  m.def("peak_flops", &peak_flops, py::arg("dtype"), py::arg("seconds") = 0.1,
        "flop/s of this thread in a register-only multiply-add loop under the active instruction set.\n"
        "dtype: 'fp32', 'bf16' (vdpbf16ps where there is one, else fp32) or 'fp64'.\n"
        "An average over about `seconds`: on a busy machine take the median or the best of several.");
}
