// What the backward kernels of relative rows for sm_80 share: bands of relative rows, tiles skewed from keys to
// distances, what a tile of queries brings, and its weights with segments and a bias. With rows r and columns c of a
// tile of dS, one of queries and the other of keys, distances are c - r (rows are queries) or r - c (rows are keys) and
// a constant: a product with a band of relative rows, and its gradient, are GEMMs of the tile skewed by that.
#pragma once
#include "attention_relative_rows.h"
#include "attention_relative_sum.h"

namespace pyext {
namespace {

constexpr int kRelativeRows = 64, kRelativeColumns = 32;

template <int width_>
struct RelativeBackward {
  static constexpr int width = width_, rows = kRelativeRows, columns = kRelativeColumns, warps = rows / 16, M = 1,
                       N = columns / 8, threads = 32 * warps;
  static constexpr bool extras = true;  // there may be segments, or a diagonal bias
  // Wide rows leave no shared memory to copy tiles ahead of their use.
  static constexpr int stages = width <= 64 ? 2 : 1;
  // Distances of a tile, of a warp's 16 rows of it, and of all rows with 16 of its columns; the last is of no use.
  static constexpr int distances = rows + columns, of_warp = 16 + columns, of_columns = rows + 16;
  static constexpr int ring = rows + stages * columns;
  static_assert(columns % 16 == 0 && kStepRows % rows == 0 && rows % columns == 0, "tiles are whole");
};

// --- Shared memory ---

// Pieces of a block's shared memory, one after the other.
struct Pieces {
  char* at;
  template <class Element>
  PYEXT_DEVICE Element* take(int bytes) {
    Element* const piece = reinterpret_cast<Element*>(at);
    at += (bytes + 15) / 16 * 16;
    return piece;
  }
};

template <class Tile>
using RelativeSeen = Visible<Tile::threads, Tile::rows>;

// --- Relative rows of neighbouring distances ---

// Starts the copy of `count` rows of a head from `first` on; zeros beyond row `length` and beyond `features`.
template <class Tile, int count, class T>
PYEXT_DEVICE void copy_rows(const SharedTile<T, Tile::width>& to, const Input& from, int64_t batch, int64_t head,
                            int64_t first, int64_t length, int64_t features) {
  copy_tile<Tile::threads, count>(to, rows_of<T>(from, batch, head) + first * from.row, from.row, length - first,
                                  features);
}

// Starts the copy of those of `count` distances from u = `first` on, of a head whose rows are written out.
template <class Tile, int count, class T>
PYEXT_DEVICE void copy_relative(const SharedTile<T, Tile::width>& to, const AttentionProblem& p, const T* rows,
                                int64_t first) {
  const RelativeRows all(p);
  const int64_t row = first - (p.q_len - 1) + all.origin;
  copy_tile<Tile::threads, count>(to, rows + row * p.head_dim, p.head_dim, all.count - row, p.head_dim);
}

// In a ring.
template <class T, class Tile>
struct Band {
  using Rows = SharedTile<T, Tile::width>;
  Rows ring;
  const AttentionProblem& p;
  static constexpr int elements = tile_elements<Tile::width>(Tile::ring);

  // From an entry on, a multiple of 16: of so many rows none, or all, lie beyond the ring's end.
  struct View {
    using Element = T;
    Rows ring;
    int first;
    PYEXT_DEVICE T* at(int row, int column) const {
      const int group = first + row / 16 * 16;
      return ring.at((group < Tile::ring ? group : group - Tile::ring) + row % 16, column);
    }
  };
  PYEXT_DEVICE View from(int entry) const { return {ring, int(unsigned(entry) % unsigned(Tile::ring))}; }

  // Starts the copy of `count` rows from `entry` on, both of them multiples of Tile::columns; of distances u from
  // `distance` on.
  PYEXT_DEVICE void load(const T* rows, int entry, int64_t distance, int count) const {
#pragma unroll 1
    for (int n = 0; n < count; n += Tile::columns)
      copy_relative<Tile, Tile::columns>(Rows{from(entry + n).at(0, 0)}, p, rows, distance + n);
  }
};

// --- Skewed tiles ---

// A warp's 16 rows by distances. Row r and column c meet at entry c - r + 15, or where rows are keys at r - c +
// columns - 1; entry 0 is entry `first` of the tile.
template <class T, class Tile, bool rows_are_keys>
struct SkewedRows {
  static constexpr int pitch = Tile::of_warp + 4;  // skewed reads: two in a bank
  static constexpr int bytes = int(sizeof(float)) * Tile::rows * pitch;
  float* products;
  SharedTile<T, Tile::of_warp> gradients;  // in the place of the products

  PYEXT_DEVICE explicit SkewedRows(float* shared)
      : products(shared + warp_row() * pitch), gradients{reinterpret_cast<T*>(products)} {}

  static PYEXT_DEVICE int warp_row() { return threadIdx.x / 32 * 16; }
  static PYEXT_DEVICE int first() { return rows_are_keys ? warp_row() : Tile::rows - 16 - warp_row(); }
  static PYEXT_DEVICE int entry(int row, int column) {
    return rows_are_keys ? row - column + Tile::columns - 1 : column - row + 15;
  }
  // f(row, column, index) for all that a lane holds.
  template <class F>
  static PYEXT_DEVICE void for_each(const F& f) {
#pragma unroll
    for (int j = 0; j < Tile::N; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) f(lane_row() + e / 2 * 8, 8 * j + lane_column() + e % 2, j, e);
    }
  }

  // The warp's rows of `left` times the band, whose first row is the tile's first distance.
  PYEXT_DEVICE void multiply(const SharedTile<T, Tile::width>& left, const Band<T, Tile>& band, int entry) const {
    float sum[1][Tile::of_warp / 8][4] = {};
    multiply_transposed(sum, left, warp_row(), band.from(entry + first()));
#pragma unroll
    for (int j = 0; j < Tile::of_warp / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        products[(lane_row() + e / 2 * 8) * pitch + 8 * j + lane_column() + e % 2] = sum[0][j][e];
    }
    __syncwarp();
  }
  PYEXT_DEVICE void add_to(float (&s)[1][Tile::N][4]) const {
    for_each([&](int row, int column, int j, int e) { s[0][j][e] += products[row * pitch + entry(row, column)]; });
  }

  // sum += dS times the band.
  PYEXT_DEVICE void add_gradient(float (&sum)[1][Tile::width / 8][4], const float (&ds)[1][Tile::N][4],
                                 const Band<T, Tile>& band, int entry_of_tile) const {
    __syncwarp();  // all lanes are done with the products
    // Zeros where no row and column meet: 16 of each row, before its first column or behind its last one.
    for (int i = threadIdx.x % 32; i < 16 * 16; i += 32) {
      const int row = i / 16, at = i % 16, before = rows_are_keys ? row : 15 - row;
      *gradients.at(row, at < before ? at : at + Tile::columns) = ptx::from_float<T>(0);
    }
    for_each([&](int row, int column, int j, int e) {
      *gradients.at(row, entry(row, column)) = ptx::from_float<T>(ds[0][j][e]);
    });
    __syncwarp();
    uint32_t left[1][Tile::of_warp / 16][4];
#pragma unroll
    for (int k = 0; k < Tile::of_warp / 16; ++k)
      ptx::ldmatrix(left[0][k], gradients.at(threadIdx.x % 16, 16 * k + threadIdx.x % 32 / 16 * 8));
    pyext::multiply(sum, left, band.from(entry_of_tile + first()));
  }
};

// The columns of a tile by distances, of all warps: 16 columns at a time, of which entry 0 is entry `first` of the
// tile. Row r and column c meet at entry c % 16 - r + rows - 1, or where rows are keys at r - c % 16 + 15.
template <class T, class Tile, bool rows_are_keys>
struct SkewedColumns {
  static constexpr int pitch = Tile::of_columns + 2;  // skewed reads: two in a bank
  static constexpr int bytes = int(sizeof(float)) * Tile::columns * pitch;
  float* products;

  // Squares of 16 columns and 16 distances, by turns of the warps. Others see them after a barrier.
  PYEXT_DEVICE void multiply(const SharedTile<T, Tile::width>& left, const Band<T, Tile>& band, int entry) const {
    constexpr int squares = Tile::columns / 16 * (Tile::of_columns / 16);
#pragma unroll
    for (int n = 0; n < (squares + Tile::warps - 1) / Tile::warps; ++n) {
      const int square = n * Tile::warps + threadIdx.x / 32;
      if (squares % Tile::warps && square >= squares) break;
      const int column = square % (Tile::columns / 16) * 16, at = square / (Tile::columns / 16) * 16;
      const int first = rows_are_keys ? Tile::columns - 16 - column : column;
      float sum[1][2][4] = {};
      multiply_transposed(sum, left, column, band.from(entry + first + at));
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          products[(column + lane_row() + e / 2 * 8) * pitch + at + 8 * j + lane_column() + e % 2] = sum[0][j][e];
      }
    }
  }
  PYEXT_DEVICE void add_to(float (&s)[1][Tile::N][4]) const {
    SkewedRows<T, Tile, rows_are_keys>::for_each([&](int warp_row, int column, int j, int e) {
      const int row = threadIdx.x / 32 * 16 + warp_row;
      const int entry = rows_are_keys ? row - column % 16 + 15 : column % 16 - row + Tile::rows - 1;
      s[0][j][e] += products[column * pitch + entry];
    });
  }
};

// --- What all three kernels are given besides the problem ---

struct RelativeWork {
  WrittenRows rows;
  const float* strips;
  int64_t strip_length;
  const float *delta, *lse;
  const Range* ranges;
  // By distance, summed over the heads that a block goes over: (groups, parts, distances, features), of bias without
  // features. Null: not wanted. A group are the heads that share all tables: of `group_batch` entries of the batch or
  // of all, and of `group_heads` heads or of all.
  float *of_queries, *of_keys, *of_bias;
  int64_t group_batch, group_heads, parts;

  // The range of keys that queries from `first` on see, or more: that of the kStepRows which they are among.
  PYEXT_DEVICE Range range(const AttentionProblem& p, int64_t batch, int64_t first) const {
    const int4 r = reinterpret_cast<const int4*>(ranges)[batch * ceil_div(p.q_len, kStepRows) + first / kStepRows];
    return {r.x, r.y, r.z, r.w};
  }
  PYEXT_DEVICE const float* strip_of(const AttentionProblem& p, int64_t head) const {
    return strips + (p.diag_heads == 1 ? 0 : head * strip_length);
  }
  // Part of a strip, zeros without bias.
  template <class Tile>
  PYEXT_DEVICE void load_strip(float* to, const AttentionProblem& p, int64_t head, int64_t start,
                               int count = Tile::distances) const {
    const float* strip = strip_of(p, head);
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += Tile::threads)
      to[i] = p.diag && 0 <= start + i && start + i < strip_length ? strip[start + i] : 0.0f;
  }
};

// dP becomes dS = P (dP - delta) where rows are queries.
template <int N>
PYEXT_DEVICE void to_score_gradients(float (&ds)[1][N][4], const float (&s)[1][N][4], const float (&lse)[2],
                                     const float (&delta)[2]) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) ds[0][j][e] = ptx::exp2_approx(s[0][j][e] - lse[e / 2]) * (ds[0][j][e] - delta[e / 2]);
  }
}

// What the lane's two rows have of a number per query.
PYEXT_DEVICE void load_rows(float (&to)[2], const float* from, int64_t pair, int64_t row, int64_t count) {
#pragma unroll
  for (int half = 0; half < 2; ++half) to[half] = row + 8 * half < count ? from[pair * count + row + 8 * half] : 0.0f;
}

// --- Tiles of keys by queries, transposed ---

// What a tile of queries brings besides its rows.
template <class Tile>
struct RelativeQueries {
  float strip[Tile::distances], lse[Tile::columns], delta[Tile::columns];
  Interval seen[Tile::columns];
  float segments[Tile::columns][2];
  int segment_ids[Tile::columns];
};

// The same on its way: read early, stored late, so that nobody waits for global memory.
template <class Tile>
struct RelativeQueriesAhead {
  float strip, lse, delta, segments[2];
  Interval seen;
  int segment_id;
  static_assert(Tile::columns <= Tile::threads && Tile::distances <= Tile::threads, "one of each per thread");

  // first: of the tile's queries; start: of its strip.
  template <class Work>
  PYEXT_DEVICE void read(const AttentionProblem& p, const Work& w, int64_t batch, int64_t head, int64_t first,
                         int64_t start) {
    const int64_t query = first + threadIdx.x, pair = batch * p.heads + head, at = start + threadIdx.x;
    strip = Tile::extras && p.diag && 0 <= at && at < w.strip_length
                ? (w.strips + (p.diag_heads == 1 ? 0 : head * w.strip_length))[at]
                : 0.0f;
    const bool exists = threadIdx.x < Tile::columns && query < p.q_len;
    lse = exists ? w.lse[pair * p.q_len + query] : 0.0f, delta = exists ? w.delta[pair * p.q_len + query] : 0.0f;
    if (exists) seen = given(p, batch, query);
    if (!Tile::extras || !p.segment) return;
    segment_id = exists ? p.segment_q[batch * p.segment_q_batch + query] : 0;
#pragma unroll
    for (int same = 0; same < 2; ++same) segments[same] = exists ? segment_score(p, pair, query, same) : 0.0f;
  }
  PYEXT_DEVICE void store(const AttentionProblem& p, int64_t first, RelativeQueries<Tile>& to) const {
    const int i = threadIdx.x;
    if (Tile::extras && i < Tile::distances) to.strip[i] = strip;
    if (i >= Tile::columns) return;
    to.lse[i] = lse, to.delta[i] = delta, to.seen[i] = visible(p, first + i, seen);
    if (Tile::extras && p.segment)
      to.segment_ids[i] = segment_id, to.segments[i][0] = segments[0], to.segments[i][1] = segments[1];
  }
};

// Products become weights; rows are keys.
template <class Tile>
PYEXT_DEVICE void to_weights(float (&s)[1][Tile::N][4], const AttentionProblem& p, const RelativeQueries<Tile>& stage,
                             const int (&row_ids)[2], int first_key, bool all) {
  const int row = threadIdx.x / 32 * 16 + lane_row();
  const float scale = float(p.scale) * kLog2e;
  const auto for_each = [&](const auto& f) {
#pragma unroll
    for (int j = 0; j < Tile::N; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) f(s[0][j][e], row + e / 2 * 8, 8 * j + lane_column() + e % 2);
    }
  };
  if (Tile::extras && p.diag)
    for_each([&](float& x, int key, int query) { x = fmaf(x, scale, stage.strip[key - query + Tile::columns - 1]); });
  else
    scale_rows(s, scale);
  if (Tile::extras && p.segment)
    for_each([&](float& x, int key, int query) {
      const bool same = row_ids[(key - row) / 8] == stage.segment_ids[query];
      x += stage.segments[query][same];
    });
  for_each([&](float& x, int, int query) { x = ptx::exp2_approx(x - stage.lse[query]); });
  if (!all)
    for_each([&](float& x, int key, int query) {
      if (!stage.seen[query].holds(first_key + key)) x = 0;
    });
}

}  // namespace
}  // namespace pyext
