// Gradients by distance, of groups of heads that share what they belong to, become those of the rows of a table.
#pragma once
#include "attention_backward.h"

namespace pyext {
namespace {

// Sums by distance of groups of heads, of which each has parts: (group_batch, group_heads, parts, distances, pitch).
struct DistanceSlots {
  const float* data;  // of distance u = 0 of the first one
  int64_t group_batch, group_heads, parts, distances;
  int pitch;
};
struct TableGradient {
  void* gradient;        // (batches, heads, rows, features), or null: not wanted
  const int32_t* index;  // of the row of every distance, or null: the same number
  int64_t batches, heads, rows, features;
  double factor;
};

// gradient[b, h, row, :] = factor * the sum over the distances of the row, the groups that share the table, and their
// parts. A block per row, a warp per share of the distances, which are added in this order.
__global__ void __launch_bounds__(kThreads)
    attention_relative_sum(const __grid_constant__ DistanceSlots slots, int64_t length,
                           const __grid_constant__ TableGradient of) {
  PYEXT_SHARED(float, parts);  // (warps, features)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, features = int(of.features);
  const int64_t row = blockIdx.x % of.rows, table = blockIdx.x / of.rows;
  const int64_t batch = table / of.heads, head = table % of.heads;
  const int64_t groups_b = slots.group_batch / of.batches, groups_h = slots.group_heads / of.heads;
  float sum[4] = {};
  const int64_t share = ceil_div(length, 32 * kWarps) * 32, end = min(length, (warp + 1) * share);
  for (int64_t n = 0; n < groups_b * groups_h * slots.parts; ++n) {
    const int64_t group_batch = batch + n / slots.parts / groups_h, group_head = head + n / slots.parts % groups_h;
    const int64_t slot = (group_batch * slots.group_heads + group_head) * slots.parts + n % slots.parts;
    const float* from = slots.data + slot * slots.distances * slots.pitch + lane;
    const auto add = [&](int64_t u) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (lane + 32 * i < features) sum[i] += from[u * slots.pitch + 32 * i];
    };
    for (int64_t first = warp * share; first < end; first += 32) {
      const int64_t own = first + lane;
      unsigned found = __ballot_sync(~0u, own < end && (of.index ? of.index[own] : own) == row);
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
    static_cast<float*>(of.gradient)[blockIdx.x * int64_t(features) + i] = float(of.factor) * total;
  }
}

inline int sum_table(const AttentionProblem& p, const DistanceSlots& slots, const TableGradient& of,
                     cudaStream_t stream) {
  const int64_t blocks = of.batches * of.heads * of.rows;
  if (!of.gradient || blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return ptx::launch(attention_relative_sum, dim3(unsigned(blocks)), dim3(kThreads),
                     sizeof(float) * kWarps * of.features, stream, slots, max_of(p.q_len + p.k_len - 1, 0), of);
}

}  // namespace
}  // namespace pyext
