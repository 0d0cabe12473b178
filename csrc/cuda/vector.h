// What the kernels that stream tensors share: vectors in registers, what may be read as vectors, and shapes of grids.
#pragma once
#include <type_traits>

#include "../strided.h"
#include "ptx.h"

namespace pyext {
namespace {

// N elements of a row as they lie in memory: 16 bytes, moved by one instruction, or a single element.
template <class T>
struct Single {
  T values[1];
};
template <class T, int N>
using Pack = std::conditional_t<N == 1, Single<T>, ptx::Vector<T>>;

template <class T, int N>
PYEXT_DEVICE Pack<T, N> load(const T* from) {
  if constexpr (N == 1)
    return {{*from}};
  else
    return ptx::load_vector(from);
}

template <class T, int N>
PYEXT_DEVICE void store(T* to, const Pack<T, N>& pack) {
  if constexpr (N == 1)
    *to = pack.values[0];
  else
    ptx::store_vector(to, pack);
}

template <class T, int N>
PYEXT_DEVICE void to_floats(const Pack<T, N>& pack, float* to) {
#pragma unroll
  for (int j = 0; j < N; ++j) to[j] = ptx::to_float(pack.values[j]);
}

// Two 16-bit elements are rounded by one instruction.
template <class T, int N>
PYEXT_DEVICE Pack<T, N> rounded(const float* from) {
  Pack<T, N> pack;
  if constexpr (N == 1 || sizeof(T) == 4) {
#pragma unroll
    for (int j = 0; j < N; ++j) pack.values[j] = ptx::from_float<T>(from[j]);
  } else {
    uint32_t words[N / 2];
#pragma unroll
    for (int j = 0; j < N / 2; ++j) words[j] = ptx::pack<T>(from[2 * j], from[2 * j + 1]);
    memcpy(&pack, words, sizeof(pack));
  }
  return pack;
}

// Whether every row of a tensor may be read or written 16 bytes at a time.
template <class Pointer>
bool has_aligned_rows(const Strided<Pointer>& t, DType dtype) {
  const int64_t size = dtype == DType::f64 ? 2 : dtype == DType::f32 ? 4 : 8;  // of a vector
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.batch % size == 0 && t.head % size == 0 && t.row % size == 0;
}

// Calls f with a value of the element type. There are no kernels for fp64, which most GPUs have little of.
template <class F>
int with_element_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(float());
    case DType::bf16:
      return f(bf16());
    case DType::f16:
      return f(f16());
    default:
      return cudaErrorInvalidValue;
  }
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// Blocks along a dimension of the grid, which is limited: the kernels go round in strides of the grid.
inline unsigned grid_x(int64_t blocks) { return unsigned(min_of(blocks, (int64_t(1) << 31) - 1)); }
inline unsigned grid_yz(int64_t blocks) { return unsigned(min_of(blocks, 65535)); }

}  // namespace
}  // namespace pyext
