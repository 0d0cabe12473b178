// Of the backward with relative rows of queries: what a step's queries and a block's keys have to do with distances.
// They meet at as many as both are together: a window, which falls from step to step by as many as a step has queries,
// a chunk. Sums by distance stay in registers as long as their chunk is in the window.
#pragma once
#include "attention_relative_backward.h"

namespace pyext {
namespace {

// The bias of one distance of the window: in shared memory, a thread's own.
struct DistanceBias {
  float sum;
  int entry;

  template <class Tile, class Skewed>
  PYEXT_DEVICE void add(const Skewed& skewed) {
    for (int query = 0; query < Tile::queries; ++query) sum += ptx::to_float(*skewed.at(query, entry));
  }
  template <class Tile>
  PYEXT_DEVICE void store(float* chunk) {
    const int in_chunk = entry - (Tile::distances - Tile::queries);
    if (in_chunk >= 0) chunk[in_chunk] += sum, sum = 0, entry -= Tile::distances;
    entry += Tile::queries;
  }
};

// A block's keys, and the heads of queries that share them, which end before heads_end.
struct OwnKeys {
  int number, first_key, pair, batch, kv_head, sharing, heads_end;
};

// Rows of a tile are its keys, 16 for each warp, and its columns a step's queries.
// extras: segments, or a diagonal bias.
template <int width_, int queries_, bool extras_>
struct RelativeTurns {
  static constexpr bool extras = extras_;
  static constexpr bool kRegisters = width_ <= 64;  // there are enough, also for what could be read again
  static constexpr int width = width_, warps = 8, threads = 32 * warps, M = 1, keys = 16 * warps, queries = queries_;
  static constexpr int query_warps = 1, J = width_ / 8;
  static constexpr int rows = keys, columns = queries, N = queries / 8, stages = 2;
  // Of distances: those of a step, and with the chunk that the next step needs besides.
  static constexpr int distances = keys + queries, chunks = distances / queries, ring = distances + queries;
  static constexpr int part = 2 * (queries * width + queries);
  static_assert(keys % queries == 0, "whole chunks");

  struct Info {  // behind the tiles
    RelativeQueries<RelativeTurns> stages[2];
    float segments[warps][queries][2];
    DistanceBias bias[distances];
    int* past;
    int64_t parts;
    int ticket;
    OwnKeys of;
  };
  static constexpr int band_pitch = queries + 8;  // see StepBand
  static constexpr int shared_bytes = 2 * (tile_elements<width>(2 * keys + 2 * 3 * queries + ring) +
                                           tile_elements<queries>(keys) + tile_elements<distances>(queries)) +
                                      4 * keys * band_pitch + int(sizeof(Info));
};

// --- A step's products of relative queries and the distances of its window ---

// They stand by key and query, where S^T needs them. A warp has 16 queries and some octets of distances, of which lane
// (g, t) holds t and t + 4: what it stores, keys t + g and queries g, lies in banks 8 t + 9 g, and what half a warp
// reads at once, keys g and two queries from 2 t on, in 8 g + 2 t.
template <class T, class Tile>
struct StepBand {
  static constexpr int pitch = Tile::band_pitch, octets = Tile::distances / 8;
  static constexpr int row_warps = Tile::queries / 16, groups = Tile::warps / row_warps,
                       each = (octets + groups - 1) / groups;
  float* products;

  template <class Rows>
  PYEXT_DEVICE void multiply(const SharedTile<T, Tile::width>& rel_queries, const Rows& band) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = warp % row_warps * 16, first = warp / row_warps * each;
    float sum[each][4] = {};
#pragma unroll
    for (int k = 0; k < Tile::width; k += 32) {
      uint32_t left[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        ptx::ldmatrix(left[half], rel_queries.at(row + lane % 16, k + 16 * half + lane / 16 * 8));
#pragma unroll
      for (int n = 0; n < each; ++n) {
        uint32_t right[4];
        ptx::ldmatrix(right, band.at(8 * min(first + n, octets - 1) + lane % 8 / 2 + lane % 2 * 4, k + lane / 8 * 8));
        ptx::mma<T>(sum[n], left[0], {right[0], right[1]});
        ptx::mma<T>(sum[n], left[1], {right[2], right[3]});
      }
    }
#pragma unroll
    for (int n = 0; n < each; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int query = row + lane_row() + e / 2 * 8, distance = 8 * (first + n) + lane_column() / 2 + e % 2 * 4;
        const int key = distance + query - (Tile::queries - 1);
        if (unsigned(key) < unsigned(Tile::keys)) products[key * pitch + query] = sum[n][e];
      }
    }
  }
  PYEXT_DEVICE void add_to(float (&s_t)[1][Tile::N][4]) const {
    const float* const at = products + (threadIdx.x / 32 * 16 + lane_row()) * pitch + lane_column();
#pragma unroll
    for (int j = 0; j < Tile::N; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 two = *reinterpret_cast<const float2*>(at + 8 * half * pitch + 8 * j);
        s_t[0][j][2 * half] += two.x, s_t[0][j][2 * half + 1] += two.y;
      }
    }
  }
};

// --- dS by distance ---

// Row q of the tile has that of key k at column k - q + queries - 1, and zeros before the first and behind the last
// one.
template <class T, class Tile>
using Skewed = SharedTile<T, Tile::distances>;

// Once: nobody writes there.
template <class T, class Tile>
PYEXT_DEVICE void clear_corners(const Skewed<T, Tile>& skewed) {
  for (int i = threadIdx.x; i < Tile::queries * Tile::queries; i += Tile::threads) {
    const int query = i / Tile::queries, at = i % Tile::queries, before = Tile::queries - 1 - query;
    *skewed.at(query, at < before ? at : at + Tile::keys) = ptx::from_float<T>(0);
  }
}

// left: dS^T of the warp's 16 keys.
template <class T, class Tile>
PYEXT_DEVICE void skew(const Skewed<T, Tile>& skewed, const uint32_t (&left)[1][Tile::N / 2][4]) {
#pragma unroll
  for (int j = 0; j < Tile::N / 2; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int key = threadIdx.x / 32 * 16 + lane_row() + e % 2 * 8, query = 16 * j + lane_column() + e / 2 * 8;
      auto* const at = reinterpret_cast<uint16_t*>(skewed.at(query, key - query + Tile::queries - 1));
      at[0] = uint16_t(left[0][j][e]);
      at[Tile::distances + 8 - 1] = uint16_t(left[0][j][e] >> 16);  // of the next query
    }
  }
}

// sum += left rows for K rows: left(fragment, i, k) and rows(k) are 16 of them, from k on.
template <int K, int M, int N, class Left, class Rows>
PYEXT_DEVICE void add_product(float (&sum)[M][N][4], const Left& left, const Rows& rows) {
#pragma unroll
  for (int k = 0; k < K; k += 16) {
    uint32_t fragments[M][1][4];
#pragma unroll
    for (int i = 0; i < M; ++i) left(fragments[i][0], 16 * i, k);
    multiply(sum, fragments, rows(k));
  }
}

// --- Sums by distance ---

// Groups of warps have every second chunk of the window, or all, and a warp 16 features or more of them. `first` is the
// group's first chunk: one that the window leaves is the last slot of the group whose first chunk is 0.
template <class T, class Tile>
struct DistanceSums {
  static constexpr int groups = max_of(1, 16 * Tile::warps / Tile::width), of_group = Tile::warps / groups;
  static constexpr int features = Tile::width / of_group, F = features / 8, blocks = Tile::queries / 16;
  static constexpr int slots = (Tile::chunks + groups - 1) / groups;
  static_assert(groups == 1 || Tile::chunks % groups == 1, "the last chunk is of the group that has the first one");
  float of[slots][blocks][F][4], before[blocks][F][4];
  int first = 0;

  PYEXT_DEVICE DistanceSums() {
#pragma unroll
    for (int slot = 0; slot < slots; ++slot) clear(slot);
  }
  PYEXT_DEVICE void clear(int slot) {
#pragma unroll
    for (int i = 0; i < blocks; ++i) {
#pragma unroll
      for (int f = 0; f < F; ++f) of[slot][i][f][0] = of[slot][i][f][1] = of[slot][i][f][2] = of[slot][i][f][3] = 0;
    }
  }
  static PYEXT_DEVICE int feature() { return threadIdx.x / 32 % of_group * features; }
  // The window begins with this chunk of all.
  PYEXT_DEVICE void begin(int chunk) { first = (threadIdx.x / 32 / of_group + chunk) % groups; }

  PYEXT_DEVICE void add(const Skewed<T, Tile>& skewed, const SharedTile<T, Tile::width>& rel_queries) {
    const int lane = threadIdx.x % 32;
    uint32_t right[blocks][F / 2][4];
#pragma unroll
    for (int k = 0; k < blocks; ++k) {
#pragma unroll
      for (int f = 0; f < F / 2; ++f)
        ptx::ldmatrix_transposed(right[k][f], rel_queries.at(16 * k + lane % 16, feature() + 16 * f + lane / 16 * 8));
    }
#pragma unroll
    for (int slot = 0; slot < slots; ++slot) {
      if (groups > 1 && slot == slots - 1 && first > 0) break;  // past the window
#pragma unroll
      for (int i = 0; i < blocks; ++i) {
#pragma unroll
        for (int k = 0; k < blocks; ++k) {
          uint32_t left[4];
          ptx::ldmatrix_transposed(left,
                                   skewed.at(16 * k + lane / 16 * 8 + lane % 8,
                                             Tile::queries * (first + groups * slot) + 16 * i + lane / 8 % 2 * 8));
#pragma unroll
          for (int f = 0; f < F; ++f)
            ptx::mma<T>(of[slot][i][f], left, {right[k][f / 2][f % 2 * 2], right[k][f / 2][f % 2 * 2 + 1]});
        }
      }
    }
  }

  // f(this lane's pairs of features of the chunk that the window leaves, where they are in its sums).
  template <class F2>
  PYEXT_DEVICE void for_each(const F2& f) const {
    if (groups > 1 && first > 0) return;
#pragma unroll
    for (int i = 0; i < blocks; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < F; ++n)
          f(i, n, 2 * half, (16 * i + 8 * half + lane_row()) * Tile::width + feature() + 8 * n + lane_column());
      }
    }
  }
  PYEXT_DEVICE void read(const float* chunk) {
    for_each([&](int i, int n, int e, int at) {
      const float2 two = *reinterpret_cast<const float2*>(chunk + at);
      before[i][n][e] = two.x, before[i][n][e + 1] = two.y;
    });
  }
  PYEXT_DEVICE void store(float* chunk) const {
    for_each([&](int i, int n, int e, int at) {
      const float (&sum)[4] = of[slots - 1][i][n];
      *reinterpret_cast<float2*>(chunk + at) = {before[i][n][e] + sum[e], before[i][n][e + 1] + sum[e + 1]};
    });
  }
  // The window falls by a chunk, of which there is nothing yet.
  PYEXT_DEVICE void fall() {
    if (++first < groups) return clear(slots - 1);
#pragma unroll
    for (int slot = slots - 1; slot > 0; --slot) {
#pragma unroll
      for (int i = 0; i < blocks; ++i) {
#pragma unroll
        for (int f = 0; f < F; ++f) {
#pragma unroll
          for (int e = 0; e < 4; ++e) of[slot][i][f][e] = of[slot - 1][i][f][e];
        }
      }
    }
    clear(0), first = 0;
  }
};

}  // namespace
}  // namespace pyext
