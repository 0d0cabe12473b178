// What every op (csrc/<op>.cpp) does with torch's tensors and threads, by the stable C interface alone.
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(PYEXT_CUDA)
#include <cuda_runtime_api.h>
#endif

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <type_traits>

#include "cpu/isa.h"
#include "parallel.h"
#include "strided.h"

namespace pyext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Double:
      return DType::f64;
    default:
      STD_TORCH_CHECK(false, "pyext takes float32, bfloat16, float16 and float64 tensors");
  }
}

// What a kernel may read in place: unit feature stride. Anything else is copied.
inline Tensor readable(const Tensor& t) {
  return t.size(-1) <= 1 || t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}
inline MaybeTensor readable(const MaybeTensor& t) { return t ? MaybeTensor(readable(*t)) : t; }
inline MaybeTensor contiguous(const MaybeTensor& t) { return t ? MaybeTensor(torch::stable::contiguous(*t)) : t; }

template <class View>
View view(const Tensor& t) {
  View v;
  if constexpr (std::is_same_v<View, Output>)
    v.data = t.mutable_data_ptr();
  else
    v.data = t.const_data_ptr();
  // Broadcast dimensions of size 1 get stride 0, so that any index reads the one entry.
  v.batch = t.size(0) == 1 ? 0 : t.stride(0);
  v.head = t.size(1) == 1 ? 0 : t.stride(1);
  v.row = t.size(2) == 1 ? 0 : t.stride(2);
  return v;
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype, bool zero = false) {
  torch::headeronly::IntHeaderOnlyArrayRef shape(sizes.begin(), sizes.size());
  return zero ? torch::stable::new_zeros(like, shape, dtype) : torch::stable::new_empty(like, shape, dtype);
}
// What kernels on a GPU leave for one another. The allocator keeps it for the stream that they run on.
inline Tensor workspace(const Tensor& like, int64_t bytes) { return empty(like, {bytes}, ScalarType::Byte); }
// Hints that a large fresh tensor be made of huge pages, before anything touches it: zeroing 4 KiB pages one fault at a
// time is most of the time of an op that only streams. What is left at its ends, about 2 MiB, gets its small pages by
// one call each: 512 faults take 0.4 ms, or 1 ms in a process with many mappings, and the calls 0.15 ms (Zen 5).
inline void use_huge_pages([[maybe_unused]] const Tensor& t) {
#if defined(__linux__)
  if (!t.is_cpu()) return;
  constexpr uintptr_t huge = uintptr_t{2} << 20, small = 4096;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t end = begin + uintptr_t(t.numel()) * uintptr_t(t.element_size());
  const uintptr_t first = (begin + huge - 1) / huge * huge, last = end / huge * huge;
  if (first >= last) return;
  auto advise = [](uintptr_t from, uintptr_t to, int advice) {
    madvise(reinterpret_cast<void*>(from), to - from, advice);
  };
  advise(first, last, MADV_HUGEPAGE);
#if defined(MADV_POPULATE_WRITE)
  advise(begin / small * small, first, MADV_POPULATE_WRITE);
  advise(last, (end + small - 1) / small * small, MADV_POPULATE_WRITE);
#endif
#endif
}
inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}
inline ScalarType accumulator(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// torch's thread pool. A call from inside another parallel region gets one thread and still works.
inline void run_parallel(int64_t count, void (*body)(int64_t, void*), void* context) {
  struct Call {
    void (*body)(int64_t, void*);
    void* context;
  } call{body, context};
  auto range = [](int64_t begin, int64_t end, void* p) {
    const Call& c = *static_cast<const Call*>(p);
    for (int64_t i = begin; i < end; ++i) c.body(i, c.context);
  };
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, 1, range, &call));
}
inline Parallel parallel() { return {int(torch::stable::get_num_threads()), run_parallel}; }

inline const KernelTable& kernels() {
  const KernelTable* table = active_kernels();
  STD_TORCH_CHECK(table, "this processor has none of the instruction sets that the kernels were built for");
  return *table;
}

// 10 major + minor of the GPU that x is on; 0 on the CPU.
inline int compute_capability([[maybe_unused]] const Tensor& x) {
  int major = 0, minor = 0;
#if defined(PYEXT_CUDA)
  if (x.is_cuda()) {
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, x.get_device_index());
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, x.get_device_index());
  }
#endif
  return 10 * major + minor;
}

// Runs cpu(), or cuda(stream) where x is on a GPU: on its current stream, the one that CUDA graphs record. The latter
// is a generic lambda, because a build without CUDA never instantiates it and so needs no launcher. `name` is x's.
template <class Cpu, class Cuda>
void run_on_device(const Tensor& x, [[maybe_unused]] const char* name, const Cpu& cpu,
                   [[maybe_unused]] const Cuda& cuda) {
#if defined(PYEXT_CUDA)
  if (x.is_cuda()) {
    STD_TORCH_CHECK(x.scalar_type() != ScalarType::Double, name, " must be float32, bfloat16 or float16 on a GPU");
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    const int error = cuda(stream);
    STD_TORCH_CHECK(error == 0, "a CUDA kernel did not start: ", cudaGetErrorString(static_cast<cudaError_t>(error)));
    return;
  }
#endif
  cpu();
}

}  // namespace pyext
