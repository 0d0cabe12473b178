// What the attention kernels' backwards share: what they need of every query, and the sums of dS along diagonals.
#pragma once
#include "attention_tiles.h"

namespace pyext {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kBlockRows = 16 * kWarps, kStepRows = 64, kN = kStepRows / 8;

// --- What both need of every query ---

// A warp per query.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    attention_prepare_queries(const __grid_constant__ AttentionProblem p, float* delta, float* lse) {
  const int64_t at = blockIdx.x * int64_t(kWarps) + threadIdx.x / 32;
  if (at >= p.batch * p.heads * p.q_len) return;
  const int64_t query = at % p.q_len, head = at / p.q_len % p.heads, batch = at / p.q_len / p.heads;
  const T* grad = static_cast<const T*>(p.grad_out.data) + batch * p.grad_out.batch + head * p.grad_out.head +
                  query * p.grad_out.row;
  const T* out = static_cast<const T*>(p.out.data) + batch * p.out.batch + head * p.out.head + query * p.out.row;
  float sum = 0;
  for (int64_t column = threadIdx.x % 32 * 8; column < p.value_dim; column += 32 * 8) {
    const ptx::Vector<T> a = ptx::load_vector(grad + column), b = ptx::load_vector(out + column);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += ptx::to_float(a.values[i]) * ptx::to_float(b.values[i]);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32) return;
  delta[at] = p.grad_lse ? sum - float(p.grad_lse[at]) : sum;
  lse[at] = p.lse[at] == -double(INFINITY) ? 0.0f : float(p.lse[at] / kLn2);
}

__global__ void __launch_bounds__(kStepRows)
    attention_prepare_ranges(const __grid_constant__ AttentionProblem p, Range* ranges) {
  using Seen = Visible<kStepRows, kStepRows>;
  PYEXT_SHARED(Seen, seen);
  const int64_t blocks = ceil_div(p.q_len, kStepRows);
  const Range range = find_visible(p, blockIdx.x / blocks, blockIdx.x % blocks * kStepRows, *seen);
  if (threadIdx.x == 0) ranges[blockIdx.x] = range;
}

// --- Tiles of keys by queries: transposed, rows are keys ---

// What a tile of queries brings besides its rows.
struct QueryStage {
  static constexpr int strip_entries = kBlockRows + kStepRows;
  float strip[strip_entries], lse[kStepRows], delta[kStepRows];
  Interval seen[kStepRows];
};

// Products become weights. `row`: the lane's first one of the block of keys that begins at `first_key`; all: whether
// every query sees all of them.
template <bool biased>
PYEXT_DEVICE void to_weights(float (&p_t)[1][kN][4], float scale, const QueryStage& stage, int row, int first_key,
                             bool all) {
#pragma unroll
  for (int j = 0; j < kN; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int query = 8 * j + lane_column() + e % 2, at = row + e / 2 * 8;
      float& x = p_t[0][j][e];
      const float s = biased ? fmaf(x, scale, stage.strip[at - query + kStepRows - 1]) : x * scale;
      x = ptx::exp2_approx(s - stage.lse[query]);
    }
  }
  if (all) return;  // in a loop of its own, that a branch skips
#pragma unroll
  for (int j = 0; j < kN; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const Interval seen = stage.seen[8 * j + lane_column() + e];
      const int key = first_key + row - seen.begin, length = seen.end - seen.begin;
      p_t[0][j][e] = unsigned(key) < unsigned(length) ? p_t[0][j][e] : 0;
      p_t[0][j][e + 2] = unsigned(key + 8) < unsigned(length) ? p_t[0][j][e + 2] : 0;
    }
  }
}

// dP becomes dS = P (dP - delta).
PYEXT_DEVICE void to_score_gradients(float (&ds_t)[1][kN][4], const float (&p_t)[1][kN][4], const QueryStage& stage) {
#pragma unroll
  for (int j = 0; j < kN; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      ds_t[0][j][e] = p_t[0][j][e] * (ds_t[0][j][e] - stage.delta[8 * j + lane_column() + e % 2]);
  }
}

// --- Sums along diagonals: the gradients of strips ---

struct QueryTile {
  static constexpr int M = 1, N = kN, columns = kStepRows, rows = kBlockRows, strip = rows + columns;
};

// Sums of tiles of dS along their diagonals. A warp's 16 rows have diagonals in octets: lane (g, t) holds, of each 8 x
// 8 block, columns 2 t and 2 t + 1, which lie on diagonals 2 t - g and 2 t + 1 - g of it: on the same two of every
// octet. The last two octets of a tile are the first two of the next one, to its right: their terms are carried there.
struct Diagonals {
  static constexpr int half = kN / 2, quarter = (half + 1) / 2, eighth = (quarter + 1) / 2;
  static constexpr int entries = kBlockRows + kStepRows - 16, floats = kWarps * kStepRows;
  float* sums;  // (warps, octets, 8 diagonals), of a warp the first at distance -16 from its corner

  PYEXT_DEVICE explicit Diagonals(float* shared) : sums(shared) {}

  PYEXT_DEVICE void sum_warp(const float (&ds)[1][kN][4], float (&carried)[2][2]) const {
    const int g = lane_row();
    // The 8 x 8 block that is d blocks to the right of the diagonal of blocks, both halves of the rows added.
    const auto block = [&](int d, int e) {
      return (d >= 0 && d < kN ? ds[0][d][e] : 0.0f) + (d >= -1 && d < kN - 1 ? ds[0][d + 1][2 + e] : 0.0f);
    };
    float terms[kN][2], of_half[half][2], of_quarter[quarter][2], own[eighth][2];
#pragma unroll
    for (int o = 0; o < kN + 2; ++o) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float term = lane_column() + e >= g ? block(o - 2, e) : block(o - 1, e);
        if (o < kN)
          terms[o][e] = o < 2 ? term + carried[o][e] : term;
        else
          carried[o - kN][e] = term;
      }
    }
    halve<1>(of_half, terms), halve<2>(of_quarter, of_half), halve<4>(own, of_quarter);
    float* const to = sums + threadIdx.x / 32 * kStepRows + (g & 1) * half * 8;
#pragma unroll
    for (int k = 0; k < eighth; ++k) {
      const int in_quarter = (g >> 2) * eighth + k, in_half = (g >> 1 & 1) * quarter + in_quarter;
      if (in_quarter >= quarter) continue;  // fewer than eight octets
#pragma unroll
      for (int e = 0; e < 2; ++e) to[8 * in_half + (lane_column() + e - g & 7)] = own[k][e];
    }
  }

  // After the last tile: what it carries, as a tile to its right.
  PYEXT_DEVICE void finish_warp(float (&carried)[2][2]) const {
    const float nothing[1][kN][4] = {};
    sum_warp(nothing, carried);
  }

  // Of entry i, after all warps' sums are there: 0 is that of the last warp's first octet, at the distance of the row
  // below the tile's last one from its first column.
  PYEXT_DEVICE float of(int i) const {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const int at = i - kBlockRows + 16 * (warp + 1);
      if (0 <= at && at < kStepRows) sum += sums[warp * kStepRows + at];
    }
    return sum;
  }
  static PYEXT_DEVICE int64_t start(const AttentionProblem& p, int64_t first_query, int64_t first_key) {
    return strip_start(p, first_query + kBlockRows, first_key);
  }

  // Adds all entries to a strip in global memory that nobody else adds to; entry 0 at `start` of the strip.
  PYEXT_DEVICE void add_to(float* strip, int64_t length, int64_t start) const {
    const int i = threadIdx.x;
    if (i < entries && start + i >= 0 && start + i < length) strip[start + i] += of(i);
  }

 private:
  // The terms of n octets become those of the half of them that the lane keeps, together with those of lane g ^ bit,
  // which gives that half away. What it has on the same diagonal stands g ^ bit - g columns further right.
  template <int bit, int n>
  static PYEXT_DEVICE void halve(float (&kept)[(n + 1) / 2][2], const float (&terms)[n][2]) {
    constexpr int half = (n + 1) / 2;
    const bool upper = lane_row() & bit;
    const int other = (lane_row() ^ bit) * 4, column = lane_column() + (upper ? -bit : bit);
#pragma unroll
    for (int k = 0; k < half; ++k) {
      float given[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float high = k + half < n ? terms[(k + half) % n][e] : 0.0f;
        kept[k][e] = upper ? high : terms[k][e], given[e] = upper ? terms[k][e] : high;
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) kept[k][e] += __shfl_sync(~0u, given[(e + bit) % 2], other + ((column + e) & 7) / 2);
    }
  }
};

// --- Launchers ---

AttentionWorkspace workspace_of(const AttentionProblem& p, void* base) {
  return AttentionWorkspace(p, base, true, ceil_div(p.q_len, kStepRows), ceil_div(p.q_len, kBlockRows));
}

template <class T>
int prepare(const AttentionProblem& p, const AttentionWorkspace& w, cudaStream_t stream) {
  if (const int error = expand_strips(p, w, stream)) return error;
  const int64_t blocks = ceil_div(p.batch * p.heads * p.q_len, kWarps);
  const int64_t ranges = ceil_div(p.q_len, kStepRows) * p.batch;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX || ranges > INT32_MAX) return cudaErrorInvalidValue;
  const int error =
      ptx::launch(attention_prepare_queries<T>, dim3(unsigned(blocks)), dim3(kThreads), 0, stream, p, w.delta, w.lse);
  if (error) return error;
  return ptx::launch(attention_prepare_ranges, dim3(unsigned(ranges)), dim3(kStepRows),
                     sizeof(Visible<kStepRows, kStepRows>), stream, p, reinterpret_cast<Range*>(w.ranges));
}

}  // namespace
}  // namespace pyext
