// Rotary position embedding on the GPU (csrc/rotary.h). Forward: a thread keeps the table entries of a few pairs of one
// token and turns these pairs in several heads. Backward, to the tables: a block owns a row of the tables and sums over
// the tokens that took it, in an order that depends on shapes and positions only, so that the bits are always the same.
#include "../rotary.h"
#include "vector.h"

namespace pyext {
namespace {

constexpr int kThreads = 256;
// Heads that share the table entries of a thread: read for each head alone, fp32 entries would be as many bytes as
// bf16 features.
constexpr int kHeads = 4;
constexpr int kTogether = 2;  // heads that are read before the first of them is written: more reads under way

// The address of pair k of a row. The second vector of the N pairs that begin there is N or `half` elements further.
template <bool interleaved, class T>
PYEXT_DEVICE T* pair_of(T* row, int64_t k) {
  return row + (interleaved ? 2 * k : k);
}

// N entries of a row of a table, from k on.
template <int N, class T>
PYEXT_DEVICE void read_entries(const T* from, float (&to)[N]) {
  if constexpr (std::is_same_v<T, double>) {
#pragma unroll
    for (int j = 0; j < N; ++j) to[j] = float(from[j]);
  } else {
    constexpr int size = N % ptx::Vector<T>::size ? 1 : ptx::Vector<T>::size;
#pragma unroll
    for (int j = 0; j < N; j += size) to_floats<T, size>(load<T, size>(from + j), to + j);
  }
}
template <int N>
PYEXT_DEVICE void read_entries(const Input& table, DType dtype, int64_t offset, float (&to)[N]) {
  switch (dtype) {
    case DType::f32:
      return read_entries(static_cast<const float*>(table.data) + offset, to);
    case DType::bf16:
      return read_entries(static_cast<const bf16*>(table.data) + offset, to);
    case DType::f16:
      return read_entries(static_cast<const f16*>(table.data) + offset, to);
    case DType::f64:
      return read_entries(static_cast<const double*>(table.data) + offset, to);
  }
}

// Turns N pairs of one token, from pair k on, in `heads` heads. The row of a position that no table has becomes NaN: to
// raise an error, the host would have to wait for the device.
template <class T, int N, bool interleaved>
PYEXT_DEVICE void turn(const RotaryProblem& p, const T* x, T* out, int64_t batch, int64_t row, int64_t k,
                       int64_t heads) {
  float cos[N], sin[N];
  if (row >= 0 && row < p.table_rows) {
    read_entries(p.cos, p.table_dtype, batch * p.cos.batch + row * p.cos.row + k, cos);
    read_entries(p.sin, p.table_dtype, batch * p.sin.batch + row * p.sin.row + k, sin);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) cos[j] = sin[j] = NAN;
  }
  if (p.inverse) {
#pragma unroll
    for (int j = 0; j < N; ++j) sin[j] = -sin[j];
  }
  const int64_t apart = interleaved ? N : p.half;
#pragma unroll 1
  for (int64_t head = 0; head < heads; head += kTogether) {
    const T* from = pair_of<interleaved>(x + head * p.x.head, k);
    T* to = pair_of<interleaved>(out + head * p.out.head, k);
    Pairs<T, N, interleaved> pairs[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      if (head + i < heads) pairs[i].read(from + i * p.x.head, from + i * p.x.head + apart);
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (head + i >= heads) break;
      float first[N], second[N];
      pairs[i].split(first, second);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float a = first[j], b = second[j];
        first[j] = a * cos[j] - b * sin[j], second[j] = b * cos[j] + a * sin[j];
      }
      pairs[i].join(first, second);
      pairs[i].write(to + i * p.out.head, to + i * p.out.head + apart);
    }
  }
}

// threadIdx.x, and what follows it in steps of blockDim.x: N pairs, or N features of those that are only copied.
// threadIdx.y and blockIdx.x: tokens. blockIdx.y: groups of heads. blockIdx.z: batch.
template <class T, int N, bool interleaved>
__global__ void __launch_bounds__(kThreads, 3) rotary_forward(const RotaryProblem p) {
  const int64_t token = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= p.length) return;
  const int64_t turned = p.half / N, chunks = turned + (p.head_dim - 2 * p.half) / N;
  for (int64_t batch = blockIdx.z; batch < p.batch; batch += gridDim.z) {
    const int64_t row = p.positions ? p.positions[batch * p.positions_batch + token] : token;
    for (int64_t head = int64_t(blockIdx.y) * kHeads; head < p.heads; head += int64_t(gridDim.y) * kHeads) {
      const int64_t heads = p.heads - head < kHeads ? p.heads - head : kHeads;
      const T* x = static_cast<const T*>(p.x.data) + batch * p.x.batch + head * p.x.head + token * p.x.row;
      T* out = static_cast<T*>(p.out.data) + batch * p.out.batch + head * p.out.head + token * p.out.row;
      for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) {
        if (chunk < turned) {
          turn<T, N, interleaved>(p, x, out, batch, row, chunk * N, heads);
        } else {
          const int64_t feature = 2 * p.half + (chunk - turned) * N;
#pragma unroll 1
          for (int64_t i = 0; i < heads; ++i)
            store<T, N>(out + i * p.out.head + feature, load<T, N>(x + i * p.x.head + feature));
        }
      }
    }
  }
}

// The tokens that took a row of the tables: `count` of them, numbered from 0.
struct RowTokens {
  int64_t count, repeats;  // each token stands for this many, one in each batch entry
  const int64_t* order;

  PYEXT_DEVICE RowTokens(const RotaryProblem& p, int64_t table, int64_t row)
      : count(p.batch && row < p.length),
        repeats(shared_positions(p) && p.table_batch == 1 ? p.batch : 1),
        order(nullptr) {
    if (p.positions) {
      const bool piecewise = !shared_positions(p) && p.table_batch > 1;
      const int64_t first = piecewise ? table * p.length : 0;
      int64_t range[2];
      find(p.sorted + first, shared_positions(p) || piecewise ? p.length : p.batch * p.length, row, range);
      order = p.order + first + range[0], count = range[1] - range[0];
    }
    count *= repeats;
  }

  // Batch entry and row of x of number n.
  PYEXT_DEVICE void locate(const RotaryProblem& p, int64_t table, int64_t row, int64_t n, int64_t& batch,
                           int64_t& token) const {
    const int64_t index = repeats > 1 ? n / repeats : n;
    token = order ? order[index] : row, batch = p.table_batch > 1 ? table : n - index * repeats;
    if (!shared_positions(p) && p.table_batch == 1) batch = token / p.length, token -= batch * p.length;
  }

 private:
  static PYEXT_DEVICE bool shared_positions(const RotaryProblem& p) { return p.positions_batch == 0; }

  // Where row and row + 1 would go in `sorted`: between them lie the tokens. Both searches at once, because each step
  // waits for the memory.
  static PYEXT_DEVICE void find(const int64_t* sorted, int64_t size, int64_t row, int64_t (&range)[2]) {
    int64_t step = 1;
    while (2 * step <= size) step *= 2;
    for (range[0] = range[1] = 0; step; step /= 2)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (range[i] + step <= size && sorted[range[i] + step - 1] < row + i) range[i] += step;
  }
};

// N sums that keep what rounding takes from them (Kahan, 1965): a row that a hundred thousand tokens took is as exact
// as one that a single token took.
template <int N>
struct Sums {
  float sum[N] = {}, excess[N] = {};

  PYEXT_DEVICE void add(int j, float value) {
    const float corrected = value - excess[j], next = sum[j] + corrected;
    excess[j] = (next - sum[j]) - corrected, sum[j] = next;
  }
};

// Adds what N pairs, from pair k on, of one token contribute in the heads threadIdx.y, threadIdx.y + blockDim.y, ...
template <class T, int N, bool interleaved>
PYEXT_DEVICE void add_token(const RotaryProblem& p, int64_t batch, int64_t token, int64_t k, Sums<N>& cos,
                            Sums<N>& sin) {
  const T* x = static_cast<const T*>(p.x.data) + batch * p.x.batch + token * p.x.row;
  const T* grad = static_cast<const T*>(p.grad.data) + batch * p.grad.batch + token * p.grad.row;
  x = pair_of<interleaved>(x, k), grad = pair_of<interleaved>(grad, k);
  const int64_t apart = interleaved ? N : p.half;
  for (int64_t head = threadIdx.y; head < p.heads; head += blockDim.y) {
    Pairs<T, N, interleaved> pairs, grads;
    const T *from = x + head * p.x.head, *grad_from = grad + head * p.grad.head;
    pairs.read(from, from + apart), grads.read(grad_from, grad_from + apart);
    float x1[N], x2[N], g1[N], g2[N];
    pairs.split(x1, x2), grads.split(g1, g2);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      cos.add(j, g1[j] * x1[j] + g2[j] * x2[j]);
      sin.add(j, g2[j] * x1[j] - g1[j] * x2[j]);
    }
  }
}

// A block sums a row of the tables. threadIdx.x, and what follows it in steps of blockDim.x: N pairs; threadIdx.y:
// heads; threadIdx.z: tokens. Shared memory: [threadIdx.z][threadIdx.y][cos, sin][N blockDim.x pairs].
template <class T, int N, bool interleaved>
__global__ void __launch_bounds__(kThreads, 2) rotary_backward(const RotaryProblem p) {
  PYEXT_SHARED(float, parts);
  const int width = int(blockDim.x) * N, slots = int(blockDim.y * blockDim.z);
  const int slot = int(threadIdx.z * blockDim.y + threadIdx.y), thread = slot * int(blockDim.x) + int(threadIdx.x);
  for (int64_t r = blockIdx.x; r < p.table_batch * p.table_rows; r += gridDim.x) {
    const int64_t table = r / p.table_rows, row = r - table * p.table_rows;
    const RowTokens tokens(p, table, row);
    for (int64_t begin = 0; begin < p.half; begin += width) {
      Sums<N> cos, sin;
      const int64_t k = begin + int64_t(threadIdx.x) * N;
      for (int64_t n = k < p.half ? threadIdx.z : tokens.count; n < tokens.count; n += blockDim.z) {
        int64_t batch, token;
        tokens.locate(p, table, row, n, batch, token);
        add_token<T, N, interleaved>(p, batch, token, k, cos, sin);
      }
      float* part = parts + slot * 2 * width + int(threadIdx.x) * N;
#pragma unroll
      for (int j = 0; j < N; ++j) part[j] = cos.sum[j], part[width + j] = sin.sum[j];
      __syncthreads();
      for (int i = thread; i < 2 * width; i += slots * int(blockDim.x)) {
        double sum = 0;
        for (int s = 0; s < slots; ++s) sum += parts[s * 2 * width + i];
        const int64_t to = begin + (i < width ? i : i - width);
        if (to >= p.half) continue;
        if (i < width)
          static_cast<float*>(p.grad_cos)[r * p.half + to] = float(sum);
        else
          static_cast<float*>(p.grad_sin)[r * p.half + to] = float(p.inverse ? -sum : sum);
      }
      __syncthreads();  // before the parts are written again
    }
  }
}

template <class T, int N, bool interleaved>
int launch_forward(const RotaryProblem& p, cudaStream_t stream) {
  const int64_t chunks = p.half / N + (p.head_dim - 2 * p.half) / N;
  const unsigned x = unsigned(min_of(chunks, kThreads)), y = unsigned(min_of(kThreads / x, p.length));
  const dim3 grid(unsigned(ceil_div(p.length, y)), grid_yz(ceil_div(p.heads, kHeads)), grid_yz(p.batch));
  return ptx::launch(rotary_forward<T, N, interleaved>, grid, dim3(x, y), 0, stream, p);
}

template <class T, int N, bool interleaved>
int launch_backward(const RotaryProblem& p, cudaStream_t stream) {
  const unsigned x = unsigned(min_of(ceil_div(p.half, N), 64));
  const unsigned y = unsigned(max_of(1, min_of(kThreads / x, p.heads)));
  const int64_t tokens = p.positions ? p.batch * p.length : p.table_batch == 1 ? p.batch : 1;
  const unsigned z = unsigned(max_of(1, min_of(kThreads / (x * y), tokens)));
  const size_t shared = size_t(x) * y * z * 2 * N * sizeof(float);
  const dim3 grid(grid_x(p.table_batch * p.table_rows));
  return ptx::launch(rotary_backward<T, N, interleaved>, grid, dim3(x, y, z), shared, stream, p);
}

// Whether a row is made of whole vectors.
bool has_whole_vectors(const RotaryProblem& p) {
  return p.half % vector_size(p.dtype) == 0 && p.head_dim % vector_size(p.dtype) == 0;
}

}  // namespace
}  // namespace pyext

int pyext_cuda_rotary_forward(const pyext::RotaryProblem& p, void* stream) {
  using namespace pyext;
  if (p.batch * p.heads * p.length * p.head_dim == 0) return cudaSuccess;
  const bool vectors =
      has_whole_vectors(p) && has_aligned_rows(p.dtype, p.x, p.out) && has_aligned_rows(p.table_dtype, p.cos, p.sin);
  return with_kernel(p.dtype, vectors, p.interleaved, [&](auto element, auto size, auto interleaved) {
    return launch_forward<decltype(element), size, interleaved>(p, static_cast<cudaStream_t>(stream));
  });
}

int pyext_cuda_rotary_backward(const pyext::RotaryProblem& p, void* stream) {
  using namespace pyext;
  if (p.table_batch * p.table_rows * p.half == 0) return cudaSuccess;
  const bool vectors = has_whole_vectors(p) && has_aligned_rows(p.dtype, p.x, p.grad);
  return with_kernel(p.dtype, vectors, p.interleaved, [&](auto element, auto size, auto interleaved) {
    return launch_backward<decltype(element), size, interleaved>(p, static_cast<cudaStream_t>(stream));
  });
}
