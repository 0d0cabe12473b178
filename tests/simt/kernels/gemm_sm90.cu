// C = A B for Hopper: a producer warpgroup fills a ring of stages by TMA, two consumer warpgroups multiply them by
// wgmma and store by TMA; blocks are persistent. A is (M, K) row-major, C is (M, N) row-major; B is (K, N) row-major if
// `transpose_b` (wgmma calls it transposed), else (N, K). Rows are multiples of 16 bytes. In fp16, A goes through
// registers.
#include "defect.h"
#include "ptx.h"

namespace pyext {
namespace {

constexpr int tile_m = 128, tile_n = 128, tile_k = 64, stages = 3, consumers = 2, threads = 128 * (1 + consumers);
constexpr int a_elements = tile_m * tile_k, b_elements = tile_n * tile_k, stage_elements = a_elements + b_elements;
constexpr int out_elements = 64 * tile_n;  // of each consumer
constexpr int stage_bytes = stage_elements * 2;
constexpr int row = 64;                  // of every tile in shared memory: 128 bytes, the span of the swizzle
constexpr int atom_bytes = 1024;         // eight rows
constexpr int half_elements = 64 * row;  // tiles with rows along N have two halves of 64 columns

struct Problem {
  int m, n, k;
  __host__ __device__ int columns() const { return (n + tile_n - 1) / tile_n; }
  __host__ __device__ int tiles() const { return (m + tile_m - 1) / tile_m * columns(); }
  __host__ __device__ int steps() const { return (k + tile_k - 1) / tile_k; }
};

// What lies in shared memory, and the position in the ring of stages.
template <class T>
struct Ring {
  T *data, *out;
  uint64_t *full, *empty;  // of each stage
  int stage = 0, parity = 0;

  __device__ explicit Ring(T* shared)
      : data(shared),
        out(shared + stages * stage_elements),
        full(reinterpret_cast<uint64_t*>(out + consumers * out_elements)),
        empty(full + stages) {}
  __device__ T* a() const { return data + stage * stage_elements; }
  __device__ T* b() const { return a() + a_elements; }
  __device__ void advance() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};
constexpr size_t shared_bytes = stages * stage_bytes + consumers * out_elements * 2 + 2 * stages * sizeof(uint64_t);

template <class T>
__device__ void initialise(const Ring<T>& ring) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) {
      ptx::mbarrier_init(ring.full + i, 1);
      ptx::mbarrier_init(ring.empty + i, DEFECT == 34 ? 4 : 4 * consumers);  // one arrival per warp
    }
    if (DEFECT != 22) ptx::fence_mbarrier_init();
  }
  if (DEFECT != 21) __syncthreads();
}

template <class T, bool transpose_b>
__device__ void produce(Ring<T> ring, const ptx::TensorMap& map_a, const ptx::TensorMap& map_b, Problem problem) {
  for (int tile = blockIdx.x; tile < problem.tiles(); tile += gridDim.x) {
    const int m = tile / problem.columns() * tile_m, n = tile % problem.columns() * tile_n;
    for (int step = 0; step < problem.steps(); ++step) {
      // The stages are empty at first: the phase before the first one counts as complete.
      if (DEFECT != 24) ptx::mbarrier_wait(ring.empty + ring.stage, ring.parity ^ 1);
      ptx::mbarrier_expect(ring.full + ring.stage, stage_bytes + (DEFECT == 26 ? -16 : DEFECT == 27 ? 16 : 0));
      const int k = step * tile_k, at_a[2] = {k, m};
      ptx::tma_load(ring.a(), &map_a, ring.full + ring.stage, at_a);
      if (transpose_b) {
        for (int half = 0; half < 2; ++half) {
          const int at_b[2] = {n + half * row, k};
          ptx::tma_load(ring.b() + half * half_elements, &map_b, ring.full + ring.stage, at_b);
        }
      } else {
        const int at_b[2] = {k, n};
        ptx::tma_load(ring.b(), &map_b, ring.full + ring.stage, at_b);
      }
      ring.advance();
    }
  }
}

// A warp's 16 x 16 fragment of a swizzled tile, from column 16 i on.
template <class T>
__device__ void load_fragment(uint32_t (&fragment)[4], const T* a, int i) {
  const int lane = threadIdx.x % 32, r = threadIdx.x % 128 / 32 * 16 + lane % 16, chunk = i * 2 + lane / 16;
  ptx::ldmatrix(fragment, a + r * row + (chunk ^ r % 8) * 8);
}

// One stage: four wgmma of depth 16. Along k, a K-major operand advances within its 128-byte rows, a transposed one by
// two atoms of eight rows.
template <class T, bool transpose_b, bool a_in_registers>
__device__ void multiply_stage(float (&sum)[tile_n / 2], const T* a, const T* b, bool accumulate) {
  constexpr int steps = tile_k / 16, stride = DEFECT == 28 ? atom_bytes / 2 : atom_bytes;
  [[maybe_unused]] uint32_t fragments[steps][4];
  if constexpr (a_in_registers) {
#pragma unroll
    for (int i = 0; i < steps; ++i) load_fragment(fragments[i], a, i);
  }
  if (DEFECT != 29) ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < steps; ++i) {
    const uint64_t b_step = transpose_b ? ptx::matrix_descriptor(b + i * 16 * row, stride, half_elements * 2)
                                        : ptx::matrix_descriptor(b + i * 16, stride);
    if constexpr (a_in_registers) {
      ptx::wgmma<T, transpose_b>(sum, fragments[i], b_step, accumulate || i > 0);
    } else {
      const uint64_t a_step = ptx::matrix_descriptor(a + i * 16, atom_bytes);
      ptx::wgmma<T, false, transpose_b>(sum, a_step, b_step, accumulate || i > 0);
    }
  }
  ptx::wgmma_commit();
}

// The sums of a warpgroup, by way of shared memory in the layout that the tensor map of C expects.
template <class T>
__device__ void store_sums(const float (&sum)[tile_n / 2], T* out, const ptx::TensorMap& map_c, int barrier, int m,
                           int n) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const bool stores = threadIdx.x % 128 == 0;
  if (stores && DEFECT != 33) ptx::tma_store_wait<0>();  // of the tile before
  ptx::bar_sync(barrier, 128);
#pragma unroll
  for (int i = 0; i < tile_n / 2; i += 2) {
    const int r = warp * 16 + lane / 4 + i % 4 / 2 * 8, half = i / 4 / 8, chunk = i / 4 % 8;
    T* chunk_of_row = out + half * half_elements + r * row + (DEFECT == 38 ? chunk : chunk ^ r % 8) * 8;
    *reinterpret_cast<uint32_t*>(chunk_of_row + lane % 4 * 2) = ptx::pack<T>(sum[i], sum[i + 1]);
  }
  if (DEFECT != 31) ptx::fence_proxy_async();
  if (DEFECT != 32) ptx::bar_sync(barrier, 128);
  if (stores) {
    for (int half = 0; half < 2; ++half) {
      const int at[2] = {n + half * row, m};
      ptx::tma_store(&map_c, out + half * half_elements, at);
    }
    ptx::tma_store_commit();
  }
}

template <class T, bool transpose_b, bool a_in_registers>
__device__ void consume(Ring<T> ring, const ptx::TensorMap& map_c, Problem problem) {
  const int group = threadIdx.x / 128 - 1;
  const bool signals = ptx::elect_one();
  T* out = ring.out + group * out_elements;
  for (int tile = blockIdx.x; tile < problem.tiles(); tile += gridDim.x) {
    const int m = tile / problem.columns() * tile_m + group * 64, n = tile % problem.columns() * tile_n;
    float sum[tile_n / 2];
    for (int step = 0; step < problem.steps(); ++step) {
      ptx::mbarrier_wait(ring.full + ring.stage, DEFECT == 23 ? ring.parity ^ 1 : ring.parity);
      multiply_stage<T, transpose_b, a_in_registers>(sum, ring.a() + group * half_elements, ring.b(), step > 0);
      if (DEFECT == 25 && signals) ptx::mbarrier_arrive(ring.empty + ring.stage);
      if (DEFECT != 30 || step + 1 < problem.steps()) ptx::wgmma_wait<0>();
      if (a_in_registers && DEFECT != 39) __syncwarp();  // all lanes have read their part of A
      if (DEFECT != 25 && signals) ptx::mbarrier_arrive(ring.empty + ring.stage);
      ring.advance();
    }
    ptx::wgmma_pin(sum);
    store_sums(sum, out, map_c, 1 + group, m, n);
    if (DEFECT == 30) ptx::wgmma_wait<0>();
  }
  if (threadIdx.x % 128 == 0 && DEFECT != 35) ptx::tma_store_wait<0>();
}

template <class T, bool transpose_b, bool a_in_registers>
__global__ void __launch_bounds__(threads, 1)
    gemm_kernel(const __grid_constant__ ptx::TensorMap map_a, const __grid_constant__ ptx::TensorMap map_b,
                const __grid_constant__ ptx::TensorMap map_c, Problem problem) {
  PYEXT_SHARED(T, shared);
  Ring<T> ring(shared);
  initialise(ring);
  if (threadIdx.x < 128) {
    ptx::setmaxnreg_dec<40>();
    if (threadIdx.x < 32 && ptx::elect_one()) produce<T, transpose_b>(ring, map_a, map_b, problem);
  } else {
    ptx::setmaxnreg_inc<232>();
    consume<T, transpose_b, a_in_registers>(ring, map_c, problem);
  }
}

// A row-major matrix in swizzled boxes of box_rows rows.
template <class T>
cudaError_t map_of(ptx::TensorMap* map, const void* base, int rows, int columns, int box_rows) {
  const int64_t size[2] = {columns, rows}, stride[1] = {static_cast<int64_t>(columns) * 2};
  const int box[2] = {row, box_rows};
  return ptx::encode_tensor_map<T>(map, base, size, stride, box, row * 2);
}

template <class T, bool transpose_b, bool a_in_registers>
int launch_gemm(const void* a, const void* b, void* c, Problem problem, cudaStream_t stream) {
  ptx::TensorMap map_a, map_b, map_c;
  cudaError_t error = map_of<T>(&map_a, a, problem.m, problem.k, tile_m);
  if (!error)
    error = map_of<T>(&map_b, b, transpose_b ? problem.k : problem.n, transpose_b ? problem.n : problem.k,
                      transpose_b ? tile_k : tile_n);
  if (!error) error = map_of<T>(&map_c, c, problem.m, problem.n, 64);
  if (error) return error;
  return ptx::launch(gemm_kernel<T, transpose_b, a_in_registers>, dim3(min(problem.tiles(), 2)), dim3(threads),
                     shared_bytes, stream, map_a, map_b, map_c, problem);
}

}  // namespace
}  // namespace pyext

extern "C" int simt_gemm_sm90(int is_f16, int transpose_b, const void* a, const void* b, void* c, int m, int n, int k,
                              cudaStream_t stream) {
  using namespace pyext;
  const Problem problem{m, n, k};
  if (is_f16) {
    return transpose_b ? launch_gemm<f16, true, true>(a, b, c, problem, stream)
                       : launch_gemm<f16, false, true>(a, b, c, problem, stream);
  }
  return transpose_b ? launch_gemm<bf16, true, false>(a, b, c, problem, stream)
                     : launch_gemm<bf16, false, false>(a, b, c, problem, stream);
}
