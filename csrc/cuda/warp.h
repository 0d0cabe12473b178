// What the lanes of a warp, or the threads of a block, compute together. All lanes take part, and all get the result;
// sums are added in an order that depends on nothing but the number of lanes.
#pragma once
#include "ptx.h"

namespace pyext {
namespace {

constexpr int kLanes = 32;

template <class T>
PYEXT_DEVICE T warp_sum(T x) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

template <class T>
PYEXT_DEVICE T warp_max(T x) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    const T other = __shfl_xor_sync(~0u, x, lanes);
    x = other > x ? other : x;
  }
  return x;
}

// The sum over the lanes before this one, and in `total` that over all.
PYEXT_DEVICE int warp_before(int x, int lane, int& total) {
  int sum = x;
#pragma unroll
  for (int lanes = 1; lanes < kLanes; lanes *= 2) {
    const int before = __shfl_up_sync(~0u, sum, lanes);
    if (lane >= lanes) sum += before;
  }
  total = __shfl_sync(~0u, sum, kLanes - 1);
  return sum - x;
}

// The same over the threads of a block of up to 32 whole warps; `parts` is 32 ints of shared memory.
PYEXT_DEVICE int block_before(int x, int* parts, int& total) {
  const int lane = int(threadIdx.x) % kLanes, warp = int(threadIdx.x) / kLanes;
  int sum;
  const int before = warp_before(x, lane, sum);
  if (lane == 0) parts[warp] = sum;
  __syncthreads();
  const int part = lane < int(blockDim.x) / kLanes ? parts[lane] : 0;
  const int warps_before = __shfl_sync(~0u, warp_before(part, lane, total), warp);
  __syncthreads();  // before the parts are written again
  return warps_before + before;
}

// The sum over such a block; `parts` is 32 numbers of shared memory.
template <class T>
PYEXT_DEVICE T block_sum(T x, T* parts) {
  x = warp_sum(x);
  if (threadIdx.x % kLanes == 0) parts[threadIdx.x / kLanes] = x;
  __syncthreads();
  T sum = 0;
  for (int warp = 0; warp < int(blockDim.x) / kLanes; ++warp) sum += parts[warp];
  __syncthreads();  // before the parts are written again
  return sum;
}

}  // namespace
}  // namespace pyext
