// Gated units on the GPU (csrc/glu.h): a thread computes 16 bytes of the result, in fp32.
#include "../glu.h"
#include "vector.h"

namespace pyext {
namespace {

constexpr int kThreads = 256;
// Vectors along a row that a thread takes: the address of a row costs as much as the arithmetic of a vector. In the
// backward, which moves more bytes for each, the registers to keep five such addresses are worth more.
constexpr int kForwardColumns = 4, kBackwardColumns = 1;

// exp(x): to an ulp or two where the result is fp32, in its argument's rounding where 16 bits remain.
template <bool exact>
PYEXT_DEVICE float exponential(float x) {
  return exact ? expf(x) : ptx::exp2_approx(1.44269504f * x);
}

// s = 1 / (1 + exp(-x)). Quotients are rounded once where the result is fp32; an approximation to 1 ulp is enough where
// 16 bits remain.
template <bool exact>
struct Logistic {
  float e, sum;

  PYEXT_DEVICE explicit Logistic(float x) : e(exponential<exact>(-x)), sum(1.0f + e) {}
  PYEXT_DEVICE float times(float a) const { return exact ? a / sum : a * ptx::reciprocal_approx(sum); }
  // s (1 - s), which would cancel if it were computed so; s is 0 where e is infinite.
  PYEXT_DEVICE float slope() const {
    const float s = times(1.0f);
    return fminf(e, 0x1p127f) * s * s;
  }
};

// act(x), and in `slope` its derivative.
template <Activation activation, bool exact>
PYEXT_DEVICE float activate(float x, float& slope) {
  if constexpr (activation == Activation::geglu) {  // x Phi(x), with Phi' = exp(-x^2 / 2) / sqrt(2 pi)
    const float phi = 0.5f + 0.5f * erff(0.70710678f * x);
    slope = phi + x * (0.39894228f * exponential<exact>(-0.5f * x * x));
    return x * phi;
  } else if constexpr (activation == Activation::geglu_tanh) {  // (1 + tanh(y)) / 2 is the logistic function of 2 y
    const float square = x * x;
    const Logistic<exact> s(x * (1.59576912f + 0.0713548163f * square));
    slope = s.times(1.0f) + x * s.slope() * (1.59576912f + 0.214064449f * square);
    return s.times(x);
  } else if constexpr (activation == Activation::swiglu) {
    const Logistic<exact> s(x);
    slope = s.times(1.0f) + x * s.slope();
    return s.times(x);
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
// threadIdx.x, blockIdx.x and what follows in up to `most` steps of both: N columns; threadIdx.y and blockIdx.y: rows;
// blockIdx.z: heads and batch.
template <int N, int most, class F>
PYEXT_DEVICE void for_each_place(const GluProblem& p, const F& f) {
  const int64_t first = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  const int64_t columns = int64_t(gridDim.x) * blockDim.x * N, rows = int64_t(gridDim.y) * blockDim.y;
  for (int64_t z = blockIdx.z; z < p.batch * p.heads; z += gridDim.z) {
    const int64_t batch = p.heads == 1 ? z : z / p.heads, head = z - batch * p.heads;
#pragma unroll 1
    for (int64_t row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; row < p.rows; row += rows) {
#pragma unroll 1
      for (int64_t column = first; column < p.width; column += columns) {
        if (column + N <= p.width) {
          f(Place{batch, head, row, column}, std::integral_constant<int, N>());
        } else {
#pragma unroll 1
          for (int64_t last = column; last < p.width; ++last)
            f(Place{batch, head, row, last}, std::integral_constant<int, 1>());
        }
        if (most == 1) break;
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
__global__ void __launch_bounds__(kThreads, 4) glu_forward(const GluProblem p) {
  for_each_place<N, kForwardColumns>(p, [&](const Place& at, auto size) {
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
      out[j] = activate<activation, sizeof(T) == 4>(gate, slope) * up;
    }
    store<T, M>(at.in<T>(p.out) + at.column, rounded<T, M>(out));
  });
}

template <class T, int N, bool interleaved, Activation activation>
__global__ void __launch_bounds__(kThreads, 4) glu_backward(const GluProblem p) {
  for_each_place<N, kBackwardColumns>(p, [&](const Place& at, auto size) {
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
      const float grad_up = grad[j] * activate<activation, sizeof(T) == 4>(gate, slope),
                  grad_gate = grad[j] * up * slope;
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

// A thread takes up to `most` times `size` columns; the blocks of a row share them evenly.
template <class Kernel>
int launch_glu(Kernel kernel, const GluProblem& p, int64_t size, int64_t most, cudaStream_t stream) {
  const int64_t columns = ceil_div(ceil_div(p.width, size), most), blocks = ceil_div(columns, kThreads);
  const unsigned x = unsigned(ceil_div(columns, blocks)), y = unsigned(min_of(kThreads / x, p.rows));
  const dim3 grid(unsigned(blocks), grid_yz(ceil_div(p.rows, y)), grid_yz(p.batch * p.heads));
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
int run_glu(GluProblem p, int64_t most, void* stream, const F& kernel) {
  if (p.batch * p.heads * p.rows * p.width == 0) return cudaSuccess;
  join_rows(p);
  const bool vectors = has_aligned_rows(p.dtype, p.gate, p.up, p.out, p.grad, p.grad_gate, p.grad_up);
  return with_kernel(p.dtype, vectors, p.interleaved, [&](auto element, auto size, auto interleaved) {
    return with_activation(p.activation, [&](auto activation) {
      return launch_glu(kernel(element, size, interleaved, activation), p, size, most,
                        static_cast<cudaStream_t>(stream));
    });
  });
}

}  // namespace
}  // namespace pyext

int pyext_cuda_glu_forward(const pyext::GluProblem& p, void* stream) {
  using namespace pyext;
  return run_glu(p, kForwardColumns, stream, [](auto element, auto size, auto interleaved, auto activation) {
    return glu_forward<decltype(element), size, interleaved, activation>;
  });
}

int pyext_cuda_glu_backward(const pyext::GluProblem& p, void* stream) {
  using namespace pyext;
  return run_glu(p, kBackwardColumns, stream, [](auto element, auto size, auto interleaved, auto activation) {
    return glu_backward<decltype(element), size, interleaved, activation>;
  });
}
