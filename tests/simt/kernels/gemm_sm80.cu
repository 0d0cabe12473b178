// C = A Bᵀ for Ampere: cp.async into a ring of three stages, ldmatrix, mma.sync. A is (M, K), B is (N, K), C is (M, N),
// all row-major; K is a multiple of 8.
#include "defect.h"
#include "ptx.h"

namespace pyext {
namespace {

constexpr int threads = 128, tile = 64, stages = 3;
constexpr int chunk = 8, chunks = tile / chunk;  // of 16 bytes; a row of a tile has eight
constexpr int tile_elements = tile * tile;

// Where a chunk of a tile lies: rotated by its row, so that a column of chunks does not meet in one bank.
__device__ int swizzled(int row, int c) { return row * tile + (c ^ (row % chunks)) * chunk; }

// 64 rows from `first` on and 64 columns from `k` on; zeros outside.
template <class T>
__device__ void load_tile(T* shared, const T* matrix, int first, int rows, int k, int columns) {
  for (int i = threadIdx.x; i < tile * chunks; i += threads) {
    const int row = first + i / chunks, column = k + i % chunks * chunk;
    const bool valid = (row < rows || DEFECT == 18) && column < columns;
    ptx::cp_async(shared + swizzled(i / chunks, i % chunks),
                  matrix + (valid ? static_cast<int64_t>(row) * columns + column : 0), valid);
  }
}

// A warp's 32 x 32 part of the product of two tiles.
template <class T>
__device__ void multiply_tiles(float (&sum)[2][4][4], const T* a_tile, const T* b_tile, int a_row, int b_row) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < tile / 16; ++step) {
    uint32_t a[2][4], b[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int c = step * 2 + lane / 16;
      ptx::ldmatrix(a[i], a_tile + swizzled(a_row + i * 16 + lane % 16, DEFECT == 16 ? c ^ 1 : c));
      const int row = b_row + i * 16 + lane % 8 + lane / 16 * 8;
      ptx::ldmatrix(b[i], b_tile + swizzled(DEFECT == 19 ? row ^ 8 : row, step * 2 + lane / 8 % 2));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
        ptx::mma<T>(sum[i][j], a[i], pair);
      }
    }
  }
}

template <class T>
__device__ void store_sums(T* c, const float (&sum)[2][4][4], int first_row, int first_column, int m, int n) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = first_row + i * 16 + lane / 4 + e / 2 * 8, column = first_column + j * 8 + lane % 4 * 2 + e % 2;
        if (row < m + (DEFECT == 17) && column < n) {
          c[static_cast<int64_t>(row) * n + column] = ptx::from_float<T>(sum[i][j][e]);
        }
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(threads) gemm_kernel(const T* a, const T* b, T* c, int m, int n, int k) {
  PYEXT_SHARED(T, shared);
  const int warp = threadIdx.x / 32, first_row = blockIdx.y * tile, first_column = blockIdx.x * tile;
  const int steps = (k + tile - 1) / tile;
  const auto load_stage = [&](int step) {
    if (step < steps) {
      T* stage = shared + step % stages * 2 * tile_elements;
      load_tile(stage, a, first_row, m, step * tile, k);
      load_tile(stage + tile_elements, b, first_column, n, step * tile, k);
    }
    ptx::cp_async_commit();  // an empty group, too: groups count steps
  };
  for (int step = 0; step < stages - 1; ++step) load_stage(step);

  float sum[2][4][4] = {};
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<DEFECT == 14 ? stages - 1 : stages - 2>();
    if (DEFECT != 15) __syncthreads();  // the stage is there, for all; and all are done with the one before
    if (DEFECT != 13) load_stage(step + stages - 1);
    const T* stage = shared + step % stages * 2 * tile_elements;
    multiply_tiles(sum, stage, stage + tile_elements, warp / 2 * 32, warp % 2 * 32);
    if (DEFECT == 13) load_stage(step + stages);  // overwrites what others still read
  }
  if (DEFECT != 20) ptx::cp_async_wait<0>();
  store_sums(c, sum, first_row + warp / 2 * 32, first_column + warp % 2 * 32, m, n);
}

template <class T>
int launch_gemm(const void* a, const void* b, void* c, int m, int n, int k, cudaStream_t stream) {
  if (k % chunk) return cudaErrorInvalidValue;
  const dim3 grid((n + tile - 1) / tile, (m + tile - 1) / tile);
  return ptx::launch(gemm_kernel<T>, grid, dim3(threads), stages * 2 * tile_elements * sizeof(T), stream,
                     static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(c), m, n, k);
}

}  // namespace
}  // namespace pyext

extern "C" int simt_gemm_sm80(int is_f16, const void* a, const void* b, void* c, int m, int n, int k,
                              cudaStream_t stream) {
  using namespace pyext;
  return is_f16 ? launch_gemm<f16>(a, b, c, m, n, k, stream) : launch_gemm<bf16>(a, b, c, m, n, k, stream);
}
