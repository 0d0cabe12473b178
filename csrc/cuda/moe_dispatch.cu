// Dispatch and combine on the GPU (csrc/moe_dispatch.h): rows are gathered, 16 bytes at a time. Sums are taken in fp32
// in the order of choices, by one thread or one warp; nothing is added by atomics.
#include "../moe_dispatch.h"
#include "vector.h"
#include "warp.h"

namespace pyext {
namespace {

constexpr int kThreads = 256;
constexpr int kTogether =
    4;  // vectors, or rows of a token, that are read before the first is used: more reads under way

template <class T, class Pointer>
PYEXT_DEVICE T* row_of(const Strided<Pointer>& t, int64_t row) {
  return static_cast<T*>(t.data) + row * t.row;
}
// Whether there is such a row. To raise an error for others than -1, the host would have to wait for the device.
PYEXT_DEVICE bool exists(int64_t row, int64_t rows) { return row >= 0 && row < rows; }

// threadIdx.x, and what follows it in steps of blockDim.x: N columns; threadIdx.y and blockIdx.x: rows.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) dispatch_forward(const DispatchProblem p) {
  for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < p.rows;
       row += int64_t(gridDim.x) * blockDim.y) {
    const int64_t token = p.source[row], step = int64_t(blockDim.x) * N;
    const bool found = exists(token, p.tokens);
    const T* const from = row_of<const T>(p.x, found ? token : 0);
    T* const to = row_of<T>(p.out, row);
    for (int64_t first = int64_t(threadIdx.x) * N; first < p.width; first += kTogether * step) {
      Pack<T, N> packs[kTogether] = {};
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        if (found && first + i * step < p.width) packs[i] = load<T, N>(from + first + i * step);
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        if (first + i * step < p.width) store<T, N>(to + first + i * step, packs[i]);
    }
  }
}

// The rows of up to kTogether choices of a token, from choice k on: -1 where there is none.
struct Choices {
  int64_t rows[kTogether];
  float weights[kTogether];

  PYEXT_DEVICE Choices(const CombineProblem& p, int64_t token, int64_t k) {
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int64_t at = token * p.choices + k + i;
      const int64_t row = k + i < p.choices ? p.position[at] : -1;
      rows[i] = exists(row, p.rows) ? row : -1;
      weights[i] = rows[i] >= 0 && p.weights ? static_cast<const float*>(p.weights)[at] : 1.0f;
    }
  }
  PYEXT_DEVICE bool any() const {
    bool found = false;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) found = found || rows[i] >= 0;
    return found;
  }
};

// threadIdx.x, and what follows it in steps of blockDim.x: N columns; threadIdx.y and blockIdx.x: tokens.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) combine_forward(const CombineProblem p) {
  for (int64_t token = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; token < p.tokens;
       token += int64_t(gridDim.x) * blockDim.y) {
    for (int64_t column = int64_t(threadIdx.x) * N; column < p.width; column += int64_t(blockDim.x) * N) {
      float sums[N] = {};
      for (int64_t k = 0; k < p.choices; k += kTogether) {
        const Choices choices(p, token, k);
        Pack<T, N> packs[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i)
          if (choices.rows[i] >= 0) packs[i] = load<T, N>(row_of<const T>(p.ys, choices.rows[i]) + column);
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          if (choices.rows[i] < 0) continue;
          float values[N];
          to_floats<T, N>(packs[i], values);
#pragma unroll
          for (int j = 0; j < N; ++j) sums[j] += choices.weights[i] * values[j];
        }
      }
      store<T, N>(row_of<T>(p.out, token) + column, rounded<T, N>(sums));
    }
  }
}

// A warp takes up to kTogether choices of a token, of which it reads the gradient once.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) combine_backward(const CombineProblem p, int64_t parts) {
  const int lane = int(threadIdx.x);
  for (int64_t unit = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; unit < p.tokens * parts;
       unit += int64_t(gridDim.x) * blockDim.y) {
    const int64_t token = unit / parts, k = (unit - token * parts) * kTogether;
    const Choices choices(p, token, k);
    const T* const grads = row_of<const T>(p.grad, token);
    float products[kTogether] = {};
    const int64_t width = choices.any() ? p.width : 0;
    for (int64_t column = int64_t(lane) * N; column < width; column += kLanes * N) {
      float grad[N];
      to_floats<T, N>(load<T, N>(grads + column), grad);
      Pack<T, N> packs[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        if (p.grad_weights && choices.rows[i] >= 0)
          packs[i] = load<T, N>(row_of<const T>(p.ys, choices.rows[i]) + column);
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (choices.rows[i] < 0) continue;
        float values[N];
        if (p.grad_weights) {
          to_floats<T, N>(packs[i], values);
#pragma unroll
          for (int j = 0; j < N; ++j) products[i] += grad[j] * values[j];
        }
        if (p.grad_ys.data) {
#pragma unroll
          for (int j = 0; j < N; ++j) values[j] = choices.weights[i] * grad[j];
          store<T, N>(row_of<T>(p.grad_ys, choices.rows[i]) + column, rounded<T, N>(values));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const float product = warp_sum(products[i]);
      if (lane > 0 || k + i >= p.choices) continue;
      if (p.grad_weights) static_cast<float*>(p.grad_weights)[token * p.choices + k + i] = product;
      if (p.grad_ys.data && choices.rows[i] >= 0) p.used[choices.rows[i]] = 1;
    }
  }
}

__global__ void __launch_bounds__(kThreads) combine_forget(const CombineProblem p) {
  for (int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; row < p.rows;
       row += int64_t(gridDim.x) * blockDim.x)
    p.used[row] = 0;
}

// A warp writes zeros to a row that no choice has.
template <class T, int N>
__global__ void __launch_bounds__(kThreads) combine_unused(const CombineProblem p) {
  for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < p.rows;
       row += int64_t(gridDim.x) * blockDim.y) {
    if (p.used[row]) continue;
    for (int64_t column = int64_t(threadIdx.x) * N; column < p.width; column += kLanes * N)
      store<T, N>(row_of<T>(p.grad_ys, row) + column, Pack<T, N>{});
  }
}

// Threads along a row of so many packs, `each` of them a thread; the rest of a block takes other rows.
dim3 block_of(int64_t packs, int64_t each, int64_t rows) {
  const unsigned x = unsigned(min_of(ceil_div(packs, each), kThreads));
  return dim3(x, unsigned(min_of(kThreads / x, rows)));
}
template <class Kernel, class Problem>
int run_rows(Kernel kernel, const Problem& p, int64_t rows, dim3 block, void* stream) {
  const dim3 grid(grid_x(ceil_div(rows, block.y)));
  return ptx::launch(kernel, grid, block, 0, static_cast<cudaStream_t>(stream), p);
}

// Rows that begin at multiples of 16 bytes and are made of whole vectors.
template <class... Tensors>
bool has_whole_vectors(DType dtype, int64_t width, const Tensors&... tensors) {
  return width % vector_size(dtype) == 0 && has_aligned_rows(dtype, tensors...);
}

// A problem that moves bytes, in units of `bytes`, each of them one element.
DispatchProblem in_units(DispatchProblem p, int64_t bytes) {
  const int64_t size = p.dtype == DType::f32 ? 4 : 2;
  for (int64_t* length : {&p.width, &p.x.row, &p.out.row}) *length = *length * size / bytes;
  return p;
}

template <class T, int N>
int run_dispatch(const DispatchProblem& p, void* stream) {
  return run_rows(dispatch_forward<T, N>, p, p.rows, block_of(ceil_div(p.width, N), kTogether, p.rows), stream);
}

}  // namespace
}  // namespace pyext

// A copy needs no more of the dtype than its size.
int pyext_cuda_moe_dispatch_forward(const pyext::DispatchProblem& p, void* stream) {
  using namespace pyext;
  if (p.dtype == DType::f64) return cudaErrorInvalidValue;
  if (p.rows * p.width == 0) return cudaSuccess;
  if (has_whole_vectors(p.dtype, p.width, p.x, p.out)) return run_dispatch<float, 4>(in_units(p, 4), stream);
  return p.dtype == DType::f32 ? run_dispatch<float, 1>(p, stream) : run_dispatch<bf16, 1>(p, stream);
}

int pyext_cuda_moe_combine_forward(const pyext::CombineProblem& p, void* stream) {
  using namespace pyext;
  if (p.tokens * p.width == 0) return cudaSuccess;
  return with_pack(p.dtype, has_whole_vectors(p.dtype, p.width, p.ys, p.out), [&](auto element, auto size) {
    return run_rows(combine_forward<decltype(element), size>, p, p.tokens,
                    block_of(ceil_div(p.width, size), 1, p.tokens), stream);
  });
}

int pyext_cuda_moe_combine_backward(const pyext::CombineProblem& p, void* on) {
  using namespace pyext;
  const auto stream = static_cast<cudaStream_t>(on);
  const dim3 warps(kLanes, kThreads / kLanes);
  const int64_t parts = ceil_div(p.choices, kTogether);
  const bool fills = p.grad_ys.data && p.rows * p.width > 0;
  const bool vectors = has_whole_vectors(p.dtype, p.width, p.grad, p.ys, p.grad_ys);
  int error = fills
                  ? ptx::launch(combine_forget, dim3(grid_x(ceil_div(p.rows, kThreads))), dim3(kThreads), 0, stream, p)
                  : cudaSuccess;
  if (error) return error;
  return with_pack(p.dtype, vectors, [&](auto element, auto size) {
    using T = decltype(element);
    const dim3 grid(grid_x(ceil_div(p.tokens * parts, warps.y)));
    int error = cudaSuccess;
    if (p.tokens * parts > 0) error = ptx::launch(combine_backward<T, size>, grid, warps, 0, stream, p, parts);
    if (!error && fills) error = run_rows(combine_unused<T, size>, p, p.rows, warps, stream);
    return error;
  });
}
