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

// A block of threads per `rows` queries.
template <int rows>
using RowsSeen = Visible < rows<kLanes ? kLanes : rows, rows>;
template <int rows>
__global__ void __launch_bounds__(rows < kLanes ? kLanes : rows)
    attention_prepare_ranges(const __grid_constant__ AttentionProblem p, Range* ranges) {
  PYEXT_SHARED(RowsSeen<rows>, seen);
  const int64_t blocks = ceil_div(p.q_len, rows);
  const Range range = find_visible(p, blockIdx.x / blocks, blockIdx.x % blocks * rows, *seen);
  if (threadIdx.x == 0) ranges[blockIdx.x] = range;
}

// --- Tiles of keys by queries: transposed, rows are keys ---

// What a tile of queries brings besides its rows to a block of keys.
template <int keys, int queries>
struct QueryStageOf {
  static constexpr int count = queries, strip_entries = keys + queries;
  float strip[strip_entries], lse[queries], delta[queries];
  Interval seen[queries];
};
using QueryStage = QueryStageOf<kBlockRows, kStepRows>;

// Products become weights. `row`: the lane's first one of the block of keys that begins at `first_key`; all: whether
// every query sees all of them; first_query: of the tile's.
template <bool biased, int M, int N, class Stage>
PYEXT_DEVICE void to_weights(float (&p_t)[M][N][4], float scale, const Stage& stage, int row, int first_key, bool all,
                             int first_query = 0) {
#pragma unroll
  for (int i = 0; i < M; ++i) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int query = first_query + 8 * j + lane_column() + e % 2, at = row + 16 * i + e / 2 * 8;
        float& x = p_t[i][j][e];
        const float s = biased ? fmaf(x, scale, stage.strip[at - query + Stage::count - 1]) : x * scale;
        x = ptx::exp2_approx(s - stage.lse[query]);
      }
    }
  }
  if (all) return;  // in a loop of its own, that a branch skips
#pragma unroll
  for (int i = 0; i < M; ++i) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const Interval seen = stage.seen[first_query + 8 * j + lane_column() + e];
        const int key = first_key + row + 16 * i - seen.begin, length = seen.end - seen.begin;
        p_t[i][j][e] = unsigned(key) < unsigned(length) ? p_t[i][j][e] : 0;
        p_t[i][j][e + 2] = unsigned(key + 8) < unsigned(length) ? p_t[i][j][e + 2] : 0;
      }
    }
  }
}

// dP becomes dS = P (dP - delta).
template <int M, int N, class Stage>
PYEXT_DEVICE void to_score_gradients(float (&ds_t)[M][N][4], const float (&p_t)[M][N][4], const Stage& stage) {
#pragma unroll
  for (int i = 0; i < M; ++i) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        ds_t[i][j][e] = p_t[i][j][e] * (ds_t[i][j][e] - stage.delta[8 * j + lane_column() + e % 2]);
    }
  }
}

// --- Sums along diagonals: the gradients of strips ---

struct QueryTile {
  static constexpr int M = 1, N = kN, columns = kStepRows, rows = kBlockRows, strip = rows + columns;
};

// Sums of tiles along their diagonals: of 16 M rows and 8 N columns for each of `warps`, `across` of them side by side.
// A warp's rows have diagonals in octets: lane (g, t) holds, of each 8 x 8 block, columns 2 t and 2 t + 1, which lie on
// diagonals 2 t - g and 2 t + 1 - g of it: on the same two of every octet. Carrying, tiles come from left to right
// without a gap, and the octets of a tile that are the first ones of the next one are carried there.
template <int warps, int M, int N, bool carries, int across = 1>
struct DiagonalSums {
  static constexpr int carried_octets = 2 * M, octets = carries ? N : N + carried_octets, of_warp = 8 * octets;
  static constexpr int half = (octets + 1) / 2, quarter = (half + 1) / 2, eighth = (quarter + 1) / 2;
  static constexpr int down = warps / across, entries = 16 * M * (down - 1) + 8 * N * (across - 1) + of_warp,
                       floats = warps * of_warp;
  float* sums;  // (warps, octets, 8 diagonals), of a warp the first at distance -16 M from its corner

  PYEXT_DEVICE explicit DiagonalSums(float* shared) : sums(shared) {}

  PYEXT_DEVICE void sum_warp(const float (&ds)[M][N][4], float (&carried)[carried_octets][2]) const {
    const int g = lane_row();
    // The 8 x 8 block that is d blocks to the right of the diagonal of blocks, summed over the octets of rows.
    const auto block = [&](int d, int e) {
      float sum = d >= 0 && d < N ? ds[0][d][e] : 0.0f;
#pragma unroll
      for (int h = 1; h < 2 * M; ++h)
        if (d >= -h && d < N - h) sum += ds[h / 2][d + h][h % 2 * 2 + e];
      return sum;
    };
    float terms[octets][2], of_half[half][2], of_quarter[quarter][2], own[eighth][2];
#pragma unroll
    for (int o = 0; o < N + carried_octets; ++o) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float term = lane_column() + e >= g ? block(o - 2 * M, e) : block(o - 2 * M + 1, e);
        if (o < octets)
          terms[o][e] = carries && o < carried_octets ? term + carried[o][e] : term;
        else
          carried[o - octets][e] = term;
      }
    }
    halve<1>(of_half, terms), halve<2>(of_quarter, of_half), halve<4>(own, of_quarter);
    float* const to = sums + threadIdx.x / 32 * of_warp + (g & 1) * half * 8;
#pragma unroll
    for (int k = 0; k < eighth; ++k) {
      const int in_quarter = (g >> 2) * eighth + k, in_half = (g >> 1 & 1) * quarter + in_quarter;
      if (in_quarter >= quarter || in_half >= half) continue;  // no power of two
      if ((g & 1) * half + in_half >= octets) continue;
#pragma unroll
      for (int e = 0; e < 2; ++e) to[8 * in_half + (lane_column() + e - g & 7)] = own[k][e];
    }
  }

  // After the last tile: what it carries, as a tile to its right.
  PYEXT_DEVICE void finish_warp(float (&carried)[carried_octets][2]) const {
    const float nothing[M][N][4] = {};
    sum_warp(nothing, carried);
  }

  // Of entry i, after all warps' sums are there: 0 is that of the last warp's first octet, at the distance of the row
  // below the tile's last one from its first column. From a warp to the next one distances move by the same step down
  // and to the right.
  PYEXT_DEVICE float of(int i) const {
    constexpr int step = 16 * M;
    static_assert(across == 1 || step == 8 * N, "one step");
    float sum = 0;
#pragma unroll
    for (int n = 0; n < of_warp; n += step) {
#pragma unroll
      for (int column = 0; column < across; ++column) {
        const int at = n + i % step, row = down - 1 - i / step + n / step + column;
        if (0 <= row && row < down && (of_warp % step == 0 || at < of_warp))
          sum += sums[(row * across + column) * of_warp + at];
      }
    }
    return sum;
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

struct Diagonals : DiagonalSums<kWarps, 1, kN, true> {
  using DiagonalSums::DiagonalSums;
  // Where in a strip the entries of a tile begin whose rows are queries.
  static PYEXT_DEVICE int64_t start(const AttentionProblem& p, int64_t first_query, int64_t first_key) {
    return strip_start(p, first_query + kBlockRows, first_key);
  }
};

// --- Launchers ---

inline AttentionWorkspace workspace_of(const AttentionProblem& p, void* base) {
  return AttentionWorkspace(p, base, true, ceil_div(p.q_len, kStepRows), ceil_div(p.q_len, kBlockRows));
}

template <class T, int rows = kStepRows>
int prepare(const AttentionProblem& p, const AttentionWorkspace& w, cudaStream_t stream) {
  if (const int error = expand_strips(p, w, stream)) return error;
  const int64_t blocks = ceil_div(p.batch * p.heads * p.q_len, kWarps);
  const int64_t ranges = ceil_div(p.q_len, rows) * p.batch;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX || ranges > INT32_MAX) return cudaErrorInvalidValue;
  const int error =
      ptx::launch(attention_prepare_queries<T>, dim3(unsigned(blocks)), dim3(kThreads), 0, stream, p, w.delta, w.lse);
  if (error) return error;
  return ptx::launch(attention_prepare_ranges<rows>, dim3(unsigned(ranges)), dim3(rows < kLanes ? kLanes : rows),
                     sizeof(RowsSeen<rows>), stream, p, reinterpret_cast<Range*>(w.ranges));
}

}  // namespace
}  // namespace pyext
