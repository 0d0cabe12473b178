// Gated units on the GPU (csrc/glu.h): a thread computes 16 bytes of the result, in fp32.
#include "../glu.h"
#include "vector.h"

namespace pyext {
namespace {

constexpr int kThreads = 256;

// exp(x): to an ulp or two for results in fp32, to what bf16 and fp16 can show for those.
template <class T>
PYEXT_DEVICE float exponential(float x) {
  if constexpr (std::is_same_v<T, float>)
    return expf(x);
  else
    return ptx::exp2_approx(1.44269504f * x);
}
// 1 / (1 + exp(-x)), and in `rest` what it lacks to 1, which a difference from 1 would only have in absolute accuracy.
template <class T>
PYEXT_DEVICE float sigmoid(float x, float& rest) {
  const float small = exponential<T>(-fabsf(x)), sum = 1.0f + small;
  float large;
  if constexpr (std::is_same_v<T, float>)
    large = 1.0f / sum;
  else
    large = ptx::reciprocal_approx(sum);
  rest = x < 0 ? large : small * large;
  return x < 0 ? small * large : large;
}

// act(x) for tensors of T, and in `slope` its derivative.
template <class T, Activation activation>
PYEXT_DEVICE float activate(float x, float& slope) {
  if constexpr (activation == Activation::geglu) {  // x Phi(x), with Phi' = exp(-x^2 / 2) / sqrt(2 pi)
    const float phi = 0.5f + 0.5f * erff(0.70710678f * x);
    slope = phi + x * (0.39894228f * exponential<T>(-0.5f * x * x));
    return x * phi;
  } else if constexpr (activation == Activation::geglu_tanh) {  // (1 + tanh(y)) / 2 = sigmoid(2 y)
    float rest;
    const float square = x * x, s = sigmoid<T>(x * (1.59576912f + 0.0713548163f * square), rest);
    slope = s + x * (s * rest) * (1.59576912f + 0.214064449f * square);
    return x * s;
  } else if constexpr (activation == Activation::swiglu) {
    float rest;
    const float s = sigmoid<T>(x, rest);
    slope = s + x * (s * rest);
    return x * s;
  } else {
    slope = x <= 0 ? 0.0f : 1.0f;  // NaN passes, as in PyTorch
    return x <= 0 ? 0.0f : x;
  }
}

// Where a thread works: in a row, from `column` on.
struct Place {
  int64_t batch, head, row, column;

  template <class T, class Pointer>
  PYEXT_DEVICE T* in(const Strided<Pointer>& t) const {
    return static_cast<T*>(t.data) + batch * t.batch + head * t.head + row * t.row;
  }
};

// Calls f(place, size) for what this thread computes: `size` elements, N or, at the end of a row, 1 at a time.
// threadIdx.x and blockIdx.x: N columns; threadIdx.y and blockIdx.y: rows; blockIdx.z: heads and batch.
template <int N, class F>
PYEXT_DEVICE void for_each_place(const GluProblem& p, const F& f) {
  const int64_t column = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  for (int64_t z = blockIdx.z; z < p.batch * p.heads; z += gridDim.z) {
    const int64_t batch = p.heads == 1 ? z : z / p.heads, head = z - batch * p.heads;
    const int64_t rows = int64_t(gridDim.y) * blockDim.y;
#pragma unroll 1
    for (int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; row < p.rows; row += rows) {
      if (column + N <= p.width) {
        f(Place{batch, head, row, column}, std::integral_constant<int, N>());
      } else {
#pragma unroll 1
        for (int64_t last = column; last < p.width; ++last)
          f(Place{batch, head, row, last}, std::integral_constant<int, 1>());
      }
    }
  }
}

// The two addresses of gate and up (or of their gradients) for N elements: of each, or of the neighbours.
template <int N, bool interleaved, class T>
struct Addresses {
  T *first, *second;

  template <class Pointer>
  PYEXT_DEVICE Addresses(const Place& at, const Strided<Pointer>& gate, const Strided<Pointer>& up)
      : first(at.in<T>(gate) + (interleaved ? 2 : 1) * at.column),
        second(interleaved ? first + N : at.in<T>(up) + at.column) {}
};

template <class T, int N, bool interleaved, Activation activation>
__global__ void __launch_bounds__(kThreads, 5) glu_forward(const GluProblem p) {
  for_each_place<N>(p, [&](const Place& at, auto size) {
    constexpr int M = decltype(size)::value;
    const Addresses<M, interleaved, const T> from(at, p.gate, p.up);
    Pairs<T, M, interleaved> pairs;
    pairs.read(from.first, from.second);
    float first[M], second[M], out[M];
    pairs.split(first, second);
#pragma unroll
    for (int j = 0; j < M; ++j) {
      const bool swapped = interleaved && p.up_first;
      const float gate = swapped ? second[j] : first[j], up = swapped ? first[j] : second[j];
      float slope;
      out[j] = activate<T, activation>(gate, slope) * up;
    }
    store<T, M>(at.in<T>(p.out) + at.column, rounded<T, M>(out));
  });
}

template <class T, int N, bool interleaved, Activation activation>
__global__ void __launch_bounds__(kThreads, 4) glu_backward(const GluProblem p) {
  for_each_place<N>(p, [&](const Place& at, auto size) {
    constexpr int M = decltype(size)::value;
    const Addresses<M, interleaved, const T> from(at, p.gate, p.up);
    const Addresses<M, interleaved, T> to(at, p.grad_gate, p.grad_up);
    Pairs<T, M, interleaved> pairs;
    pairs.read(from.first, from.second);
    const auto grads = load<T, M>(at.in<const T>(p.grad) + at.column);
    float first[M], second[M], grad[M];
    pairs.split(first, second), to_floats<T, M>(grads, grad);
#pragma unroll
    for (int j = 0; j < M; ++j) {
      const bool swapped = interleaved && p.up_first;
      const float gate = swapped ? second[j] : first[j], up = swapped ? first[j] : second[j];
      float slope;
      const float grad_up = grad[j] * activate<T, activation>(gate, slope), grad_gate = grad[j] * up * slope;
      first[j] = swapped ? grad_up : grad_gate, second[j] = swapped ? grad_gate : grad_up;
    }
    pairs.join(first, second);
    pairs.write(to.first, to.second);
  });
}

// Rows without gaps between them in any tensor are one long row: whatever their width, it is read as vectors.
void join_rows(GluProblem& p) {
  const int64_t pair = p.interleaved ? 2 * p.width : p.width;
  auto dense = [](int64_t width, auto&... tensors) { return ((!tensors.data || tensors.row == width) && ...); };
  if (p.batch * p.heads > 1 || !dense(pair, p.gate, p.up, p.grad_gate, p.grad_up) || !dense(p.width, p.out, p.grad))
    return;
  p.width *= p.rows, p.rows = 1;
  p.gate.row = p.up.row = p.grad_gate.row = p.grad_up.row = p.out.row = p.grad.row = 0;
}

template <class Kernel>
int launch_glu(Kernel kernel, const GluProblem& p, int64_t size, cudaStream_t stream) {
  const int64_t columns = ceil_div(p.width, size);
  const unsigned x = unsigned(min_of(columns, kThreads)), y = unsigned(min_of(kThreads / x, p.rows));
  const dim3 grid(unsigned(ceil_div(columns, x)), grid_yz(ceil_div(p.rows, y)), grid_yz(p.batch * p.heads));
  return ptx::launch(kernel, grid, dim3(x, y), 0, stream, p);
}

// Calls f with the activation as a value of a type.
template <class F>
int with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::geglu:
      return f(std::integral_constant<Activation, Activation::geglu>());
    case Activation::geglu_tanh:
      return f(std::integral_constant<Activation, Activation::geglu_tanh>());
    case Activation::swiglu:
      return f(std::integral_constant<Activation, Activation::swiglu>());
    case Activation::reglu:
      return f(std::integral_constant<Activation, Activation::reglu>());
  }
  return cudaErrorInvalidValue;
}

// kernel(element, size, interleaved, activation) is the kernel for these types.
template <class F>
int run_glu(GluProblem p, void* stream, const F& kernel) {
  if (p.batch * p.heads * p.rows * p.width == 0) return cudaSuccess;
  join_rows(p);
  const bool vectors = has_aligned_rows(p.dtype, p.gate, p.up, p.out, p.grad, p.grad_gate, p.grad_up);
  return with_kernel(p.dtype, vectors, p.interleaved, [&](auto element, auto size, auto interleaved) {
    return with_activation(p.activation, [&](auto activation) {
      return launch_glu(kernel(element, size, interleaved, activation), p, size, static_cast<cudaStream_t>(stream));
    });
  });
}

}  // namespace
}  // namespace pyext

int pyext_cuda_glu_forward(const pyext::GluProblem& p, void* stream) {
  using namespace pyext;
  return run_glu(p, stream, [](auto element, auto size, auto interleaved, auto activation) {
    return glu_forward<decltype(element), size, interleaved, activation>;
  });
}

int pyext_cuda_glu_backward(const pyext::GluProblem& p, void* stream) {
  using namespace pyext;
  return run_glu(p, stream, [](auto element, auto size, auto interleaved, auto activation) {
    return glu_backward<decltype(element), size, interleaved, activation>;
  });
}
