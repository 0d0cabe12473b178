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

// N elements of each of two tensors: N from one address and N from another, or, interleaved, 2N neighbours in turn, of
// which the second half has an address of its own.
template <class T, int N, bool interleaved>
struct Pairs {
  Pack<T, N> low, high;

  PYEXT_DEVICE void read(const T* first, const T* second) { low = load<T, N>(first), high = load<T, N>(second); }
  PYEXT_DEVICE void write(T* first, T* second) const { store<T, N>(first, low), store<T, N>(second, high); }
  PYEXT_DEVICE void split(float (&first)[N], float (&second)[N]) const {
    float all[2 * N];
    to_floats<T, N>(low, all), to_floats<T, N>(high, all + N);
#pragma unroll
    for (int j = 0; j < N; ++j) first[j] = all[at(j, 0)], second[j] = all[at(j, 1)];
  }
  PYEXT_DEVICE void join(const float (&first)[N], const float (&second)[N]) {
    float all[2 * N];
#pragma unroll
    for (int j = 0; j < N; ++j) all[at(j, 0)] = first[j], all[at(j, 1)] = second[j];
    low = rounded<T, N>(all), high = rounded<T, N>(all + N);
  }

 private:
  static PYEXT_DEVICE constexpr int at(int j, int which) { return interleaved ? 2 * j + which : which * N + j; }
};

constexpr int64_t vector_size(DType dtype) { return dtype == DType::f64 ? 2 : dtype == DType::f32 ? 4 : 8; }

// Whether every row of the tensors may be read or written 16 bytes at a time.
template <class... Tensors>
bool has_aligned_rows(DType dtype, const Tensors&... tensors) {
  const int64_t size = vector_size(dtype);
  auto aligned = [size](const auto& t) {
    return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.batch % size == 0 && t.head % size == 0 &&
           t.row % size == 0;
  };
  return (aligned(tensors) && ...);
}

// Calls of_type(element) with a value of the element type, one of 16 bits.
template <class F>
int with_half(DType dtype, const F& of_type) {
  switch (dtype) {
    case DType::bf16:
      return of_type(bf16());
    case DType::f16:
      return of_type(f16());
    default:
      return cudaErrorInvalidValue;
  }
}

// The same with floats, too. There are no kernels for fp64.
template <class F>
int with_element(DType dtype, const F& of_type) {
  if (dtype == DType::f32) return of_type(float());
  return with_half(dtype, of_type);
}

// The same with the elements that a thread moves at once: 16 bytes if `vectors`, else one.
template <class F>
int with_pack(DType dtype, bool vectors, const F& f) {
  return with_element(dtype, [&](auto element) {
    using Wide = std::integral_constant<int, ptx::Vector<decltype(element)>::size>;
    return vectors ? f(element, Wide()) : f(element, std::integral_constant<int, 1>());
  });
}

// The same with how pairs lie: f(element, size, interleaved).
template <class F>
int with_kernel(DType dtype, bool vectors, bool interleaved, const F& f) {
  return with_pack(dtype, vectors, [&](auto element, auto size) {
    return interleaved ? f(element, size, std::true_type()) : f(element, size, std::false_type());
  });
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
__host__ __device__ constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// Blocks along a dimension of the grid where there may be more than it can have: kernels go round in steps of the grid.
inline unsigned grid_x(int64_t blocks) { return unsigned(min_of(blocks, (int64_t(1) << 31) - 1)); }
inline unsigned grid_yz(int64_t blocks) { return unsigned(min_of(blocks, 65535)); }

}  // namespace
}  // namespace pyext
