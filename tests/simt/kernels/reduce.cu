// Sums of rows, a scan and a histogram: shuffles, barriers, atomics and shared memory in their usual places.
#include "defect.h"
#include "ptx.h"

namespace pyext {
namespace {

constexpr int threads = 128, warps = threads / 32;

__device__ float warp_sum(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, DEFECT == 3 && lanes == 8 ? 4 : lanes);
  return x;
}

// out[r] = sum of row r; a block takes every gridDim.x-th row.
__global__ void row_sum_kernel(const float* x, float* out, int rows, int columns) {
  PYEXT_SHARED(float, partial);  // of each warp
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    const float* values = x + static_cast<int64_t>(row) * columns;
    float sum = 0;
    for (int i = threadIdx.x; i < columns + (DEFECT == 5); i += threads) sum += values[i];
    sum = warp_sum(sum);
    if (lane == 0) partial[warp] = sum;
    if (DEFECT != 1) __syncthreads();
    if (warp == 0) {
      const float total = warp_sum(lane < warps + (DEFECT == 4) ? partial[lane] : 0.f);
      if (lane == 0) out[row] = total;
    }
    if (DEFECT != 2) __syncthreads();  // before the next row's partial sums
  }
}

// out[i] = x[0] + ... + x[i], by one block.
__global__ void scan_kernel(const int* x, int* out, int count) {
  PYEXT_SHARED(int, shared);
  int* totals = shared;         // of each warp
  int* carry = shared + warps;  // sum of what came before this round
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) *carry = 0;
  for (int start = 0; start < count; start += threads) {
    const int i = start + threadIdx.x;
    int sum = i < count ? x[i] : 0;
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      if (DEFECT == 7 && lane < lanes) continue;  // lanes leave a shuffle that names them
      const int before = __shfl_up_sync(~0u, sum, lanes);
      if (DEFECT == 6 ? lane > lanes : lane >= lanes) sum += before;
    }
    if (lane == 31) totals[warp] = sum;
    __syncthreads();
    int offset = *carry;
    for (int w = 0; w < warp; ++w) offset += totals[w];
    if (i < count) out[i] = offset + sum;
    if (DEFECT != 8) __syncthreads();  // all have read the carry
    if (threadIdx.x == threads - 1) *carry = offset + sum;
  }
}

// counts[b] += how many x are b. Each warp sorts its lanes by value through shared memory first: equal ones add once.
__global__ void histogram_kernel(const int* x, int* counts, int count, int bins) {
  PYEXT_SHARED(int, local);  // bins counters, then the values of the block's threads
  int* values = local + bins;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (DEFECT != 9) {
    for (int b = threadIdx.x; b < bins; b += threads) local[b] = 0;
  }
  const int i = blockIdx.x * threads + threadIdx.x, value = i < count ? x[i] : -1;
  values[threadIdx.x] = value;
  if (DEFECT != 10) __syncwarp();
  int equal = 0, first = lane;
  for (int other = 31; other >= 0; --other) {
    if (values[warp * 32 + other] == value) first = other, ++equal;
  }
  __syncthreads();
  if (value >= 0 && first == lane) {
    if (DEFECT == 11) {
      local[value] += equal;
    } else {
      atomicAdd(&local[value], equal);
    }
  }
  __syncthreads();
  for (int b = threadIdx.x; b < bins; b += threads) {
    if (!local[b]) continue;
    if (DEFECT == 12) {
      counts[b] += local[b];
    } else {
      atomicAdd(&counts[b], local[b]);
    }
  }
}

}  // namespace
}  // namespace pyext

extern "C" int simt_row_sum(const float* x, float* out, int rows, int columns, cudaStream_t stream) {
  using namespace pyext;
  return ptx::launch(row_sum_kernel, dim3(3), dim3(threads), (warps + 1) * sizeof(float), stream, x, out, rows,
                     columns);
}
extern "C" int simt_scan(const int* x, int* out, int count, cudaStream_t stream) {
  using namespace pyext;
  return ptx::launch(scan_kernel, dim3(1), dim3(threads), (warps + 1) * sizeof(int), stream, x, out, count);
}
extern "C" int simt_histogram(const int* x, int* counts, int count, int bins, cudaStream_t stream) {
  using namespace pyext;
  return ptx::launch(histogram_kernel, dim3((count + threads - 1) / threads), dim3(threads),
                     (bins + threads) * sizeof(int), stream, x, counts, count, bins);
}
