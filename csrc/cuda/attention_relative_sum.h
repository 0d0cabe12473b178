// Gradients by distance, of groups of heads that share what they belong to, become those of the rows of a table.
#pragma once
#include "attention_backward.h"

namespace pyext {
namespace {

// Heads are summed in groups of all that share tables, a group in parts.
struct RelativeGroups {
  int64_t batch, heads, parts;
};

// gradient[b, h, row, :] = factor * the sum of by_distance over the distances of the row, the groups that share the
// table, and their parts. A block per row, a warp per share of the distances, which are added in this order.
__global__ void __launch_bounds__(kThreads)
    attention_relative_sum(const float* by_distance, const __grid_constant__ RelativeGroups groups,
                           const int32_t* index, int64_t length, int64_t batches, int64_t heads, int64_t rows,
                           int features, float factor, float* gradient) {
  PYEXT_SHARED(float, parts);  // (warps, features)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = blockIdx.x % rows, table = blockIdx.x / rows, batch = table / heads, head = table % heads;
  const int64_t groups_b = groups.batch / batches, groups_h = groups.heads / heads;
  float sum[4] = {};
  const int64_t share = ceil_div(length, 32 * kWarps) * 32, end = min(length, (warp + 1) * share);
  for (int64_t n = 0; n < groups_b * groups_h * groups.parts; ++n) {
    const int64_t group_batch = batch + n / groups.parts / groups_h, group_head = head + n / groups.parts % groups_h;
    const int64_t slot = (group_batch * groups.heads + group_head) * groups.parts + n % groups.parts;
    const float* from = by_distance + slot * length * features + lane;
    const auto add = [&](int64_t u) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (lane + 32 * i < features) sum[i] += from[u * features + 32 * i];
    };
    for (int64_t first = warp * share; first < end; first += 32) {
      const int64_t own = first + lane;
      unsigned found = __ballot_sync(~0u, own < end && (index ? index[own] : own) == row);
      if (found == ~0u) {  // clipped distances: many loads on their way at once
#pragma unroll 8
        for (int u = 0; u < 32; ++u) add(first + u);
      } else {
        for (; found; found &= found - 1) add(first + __ffs(int(found)) - 1);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (lane + 32 * i < features) parts[warp * features + lane + 32 * i] = sum[i];
  __syncthreads();
  for (int i = threadIdx.x; i < features; i += kThreads) {
    float total = 0;
    for (int k = 0; k < kWarps; ++k) total += parts[k * features + i];
    gradient[blockIdx.x * int64_t(features) + i] = factor * total;
  }
}

// by_distance: (groups, parts, length, features). Null gradients are not wanted.
inline int sum_by_rows(const float* by_distance, const RelativeGroups& groups, const int32_t* index, int64_t length,
                       int64_t batches, int64_t heads, int64_t rows, int64_t features, double factor, void* gradient,
                       cudaStream_t stream) {
  const int64_t blocks = batches * heads * rows;
  if (!gradient || blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return ptx::launch(attention_relative_sum, dim3(unsigned(blocks)), dim3(kThreads), sizeof(float) * kWarps * features,
                     stream, by_distance, groups, index, length, batches, heads, rows, int(features), float(factor),
                     static_cast<float*>(gradient));
}

}  // namespace
}  // namespace pyext
