// Scratch memory of the attention kernels, linear in the lengths, and the strips in it: one bias per distance and head,
// so that a tile of queries and keys needs the few entries between its corners.
#pragma once
#include "../attention.h"
#include "vector.h"
#include "warp.h"

namespace pyext {
namespace {

// Strips that blocks of queries add their gradients to: enough blocks at work to fill any GPU.
constexpr int64_t kStrips = 512;
constexpr float kLog2e = 1.4426950408889634f;

struct AttentionWorkspace {
  // (diag_heads, strip_pitch): entry strip_margin + u is the bias of distance u - (k_len - 1), times log2(e), for u in
  // [0, strip_length), and 0 for others. Null without bias.
  float* strips = nullptr;
  int64_t strip_length = 0, strip_margin = 0, strip_pitch = 0;

  // Backward only. Of every query, (batch, heads, q_len): the gradient of its scores is P (dP - delta); its LSE in
  // units of log2, 0 where it sees nothing.
  float *delta = nullptr, *lse = nullptr;
  // (batch, ranges): see `Range`, of kRangeRows queries each.
  int4* ranges = nullptr;
  // Gradients of the strips, (batch, heads, slot_count, strip_length), and (diag_heads, strip_length), their sums.
  float *slots = nullptr, *strip_gradients = nullptr;
  int64_t slot_count = 0;

  int64_t bytes = 0;

  // With a margin only: counts the items of work that blocks have taken, see attention_sm90.cu.
  int* next_item = nullptr;

  // A null base measures. `query_blocks`: of the kernel that computes the gradients of strips. With a margin, strips
  // begin at multiples of 16 bytes and may be read beyond their ends by that much.
  AttentionWorkspace(const AttentionProblem& p, void* base, bool backward, int64_t ranges_per_batch = 0,
                     int64_t query_blocks = 0, int64_t margin = 0)
      : strip_margin(margin) {
    const auto take = [&](auto*& piece, int64_t count) { this->take(base, piece, count); };
    if (p.diag) {
      strip_length = max_of(p.q_len + p.k_len - 1, 0);
      strip_pitch = margin ? ceil_div(strip_length + 2 * margin, 4) * 4 : strip_length;
      take(strips, p.diag_heads * strip_pitch);
    }
    if (margin) take(next_item, 1);
    if (!backward) return;
    take(delta, p.batch * p.heads * p.q_len), take(lse, p.batch * p.heads * p.q_len);
    take(ranges, p.batch * ranges_per_batch);
    if (!p.grad_diag) return;
    slot_count = max_of(1, min_of(query_blocks, kStrips / max_of(1, p.batch * p.heads)));
    take(slots, p.batch * p.heads * slot_count * strip_length), take(strip_gradients, p.diag_heads * strip_length);
  }

  // A piece behind those taken so far.
  template <class Element>
  void take(void* base, Element*& piece, int64_t count) {
    piece = base ? reinterpret_cast<Element*>(static_cast<char*>(base) + bytes) : nullptr;
    bytes += ceil_div(count * int64_t(sizeof(Element)), 256) * 256;
  }
};

// strips[h, margin + u] = diag[h, index[u]] log2(e). A row outside of the table, which nobody can report here, becomes
// NaN.
__global__ void __launch_bounds__(256)
    attention_strips_expand(const float* diag, int64_t rows, const int32_t* index, float* strips, int64_t length,
                            int64_t margin, int64_t pitch, int64_t heads) {
  const int64_t at = blockIdx.x * int64_t(256) + threadIdx.x, u = at - margin;
  if (at >= pitch) return;
  const bool inside = 0 <= u && u < length;
  const int64_t row = inside && index ? index[u] : u;
  const bool exists = 0 <= row && row < rows;
  for (int64_t head = blockIdx.y; head < heads; head += gridDim.y)
    strips[head * pitch + at] = !inside ? 0.0f : exists ? diag[head * rows + row] * kLog2e : NAN;
}

// A thread per entry, and along y heads, of which the kernels take the rest in steps of the grid.
inline dim3 strips_grid(const AttentionProblem& p, int64_t entries) {
  return dim3(unsigned(ceil_div(entries, 256)), grid_yz(p.diag_heads));
}

inline int expand_strips(const AttentionProblem& p, const AttentionWorkspace& w, cudaStream_t stream) {
  if (p.diag_heads * w.strip_pitch == 0) return cudaSuccess;
  return ptx::launch(attention_strips_expand, strips_grid(p, w.strip_pitch), dim3(256), 0, stream,
                     static_cast<const float*>(p.diag), p.diag_rows, p.diag_index, w.strips, w.strip_length,
                     w.strip_margin, w.strip_pitch, p.diag_heads);
}

// sums[c, h, u] = the sum of slots[b, i, s, u] over s, the heads i that share table h and the entries b of the batch
// that share table c, in this order. `tables` of them in all, `heads_of` for each c.
__global__ void __launch_bounds__(256)
    attention_strips_sum(const float* slots, int64_t batch, int64_t heads, int64_t slot_count, int64_t length,
                         int64_t tables, int64_t heads_of, float* sums) {
  const int64_t u = blockIdx.x * int64_t(256) + threadIdx.x;
  const int64_t sharing = heads / heads_of, entries = batch / (tables / heads_of);
  if (u >= length) return;
  for (int64_t table = blockIdx.y; table < tables; table += gridDim.y) {
    const int64_t first = table / heads_of * entries, strip = table % heads_of;
    float sum = 0;
    for (int64_t b = first; b < first + entries; ++b)
      for (int64_t i = strip * sharing; i < (strip + 1) * sharing; ++i)
        for (int64_t s = 0; s < slot_count; ++s) sum += slots[((b * heads + i) * slot_count + s) * length + u];
    sums[table * length + u] = sum;
  }
}

// Slots of every head -> (batches or 1, heads_of or 1, length).
inline int sum_slots(const float* slots, int64_t batch, int64_t heads, int64_t slot_count, int64_t length,
                     int64_t batches, int64_t heads_of, float* sums, cudaStream_t stream) {
  if (batches * heads_of * length == 0) return cudaSuccess;
  return ptx::launch(attention_strips_sum, dim3(unsigned(ceil_div(length, 256)), grid_yz(batches * heads_of)),
                     dim3(256), 0, stream, slots, batch, heads, slot_count, length, batches * heads_of, heads_of, sums);
}

// gradient[h, r] = the sum of strip_gradients[h, u] over the distances u of row r: one block each, in a fixed order.
__global__ void __launch_bounds__(256) attention_strips_by_row(const float* strip_gradients, const int32_t* index,
                                                               int64_t length, int rows, float* gradient) {
  PYEXT_SHARED(float, parts);
  const int row = int(blockIdx.x) % rows, head = int(blockIdx.x) / rows;
  const float* strip = strip_gradients + head * length;
  float sum = 0;
  for (int64_t u = threadIdx.x; u < length; u += 256)
    if (index[u] == row) sum += strip[u];
  sum = block_sum(sum, parts);
  if (threadIdx.x == 0) gradient[blockIdx.x] = sum;
}

// Slots -> grad_diag.
inline int sum_strips(const AttentionProblem& p, const AttentionWorkspace& w, cudaStream_t stream) {
  float* const gradient = static_cast<float*>(p.grad_diag);
  const int64_t rows = p.diag_heads * p.diag_rows;
  if (rows > INT32_MAX) return cudaErrorInvalidValue;
  if (const int error = sum_slots(w.slots, p.batch, p.heads, w.slot_count, w.strip_length, 1, p.diag_heads,
                                  p.diag_index ? w.strip_gradients : gradient, stream))
    return error;
  if (!p.diag_index || rows == 0) return cudaSuccess;
  return ptx::launch(attention_strips_by_row, dim3(unsigned(rows)), dim3(256), 32 * sizeof(float), stream,
                     w.strip_gradients, p.diag_index, w.strip_length, int(p.diag_rows), gradient);
}

}  // namespace
}  // namespace pyext
