// The smallest kernel by the conventions of csrc/cuda/ptx.h: out = a x + y, 16 bytes at a time.
#include "defect.h"
#include "ptx.h"

namespace pyext {
namespace {

template <class T>
__global__ void axpy_kernel(float a, const T* x, const T* y, T* out, int64_t count) {
  constexpr int size = ptx::Vector<T>::size;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * size;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * size;
       i < count + (DEFECT == 37 ? size : 0); i += step) {
    const auto vx = ptx::load_vector(x + i), vy = ptx::load_vector(y + i);
    ptx::Vector<T> result;
    for (int k = 0; k < size; ++k) {
      result.values[k] = ptx::from_float<T>(fmaf(a, ptx::to_float(vx.values[k]), ptx::to_float(vy.values[k])));
    }
    ptx::store_vector(out + i + (DEFECT == 36), result);
  }
}

template <class T>
int launch_axpy(float a, const void* x, const void* y, void* out, int64_t count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  if (count % ptx::Vector<T>::size) return cudaErrorInvalidValue;
  return ptx::launch(axpy_kernel<T>, dim3(4), dim3(64), 0, stream, a, static_cast<const T*>(x),
                     static_cast<const T*>(y), static_cast<T*>(out), count);
}

}  // namespace
}  // namespace pyext

extern "C" int simt_axpy(int format, float a, const void* x, const void* y, void* out, int64_t count,
                         cudaStream_t stream) {
  using namespace pyext;
  if (format == 0) return launch_axpy<float>(a, x, y, out, count, stream);
  if (format == 1) return launch_axpy<bf16>(a, x, y, out, count, stream);
  return launch_axpy<f16>(a, x, y, out, count, stream);
}
