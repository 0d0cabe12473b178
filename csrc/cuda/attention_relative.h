// Products of queries and relative rows, rel_query_i . rel_q[rel_index[u]] with u = j - i + q_len - 1: a tile of
// queries and keys needs those of `rows + columns - 1` neighbouring distances u, and all but `columns` of them, the
// tile of keys before has computed. A warp keeps its own in a ring and reads them skewed: what row r and column c need
// lies at entry c - r + rows - 1 of the tile's first one. Products of keys and relative rows, k_j .
// rel_k[rel_index[u]], are of no use to another tile: each computes all of its own, a warp some, and all warps read
// them.
//
// Sources: Dai et al., "Transformer-XL" (2019), appendix B, whose shift of a whole matrix this is, in shared memory;
// He et al., "DeBERTa" (2021), eq. 4.
#pragma once
#include "attention_tiles.h"

namespace pyext {
namespace {

template <class Tile>
struct RelativeRing {
  static constexpr int entries = 128, pitch = entries + 9;  // skewed reads of eight rows meet at most two in a bank
  static constexpr int shared_bytes = int(sizeof(float)) * Tile::rows * pitch;
  static_assert(Tile::M == 1 && Tile::rows + Tile::columns <= entries, "a tile's distances are in the ring");

  float* own;  // of the warp's 16 rows

  PYEXT_DEVICE explicit RelativeRing(float* shared) : own(shared + threadIdx.x / 32 * 16 * pitch) {}
  PYEXT_DEVICE float& at(int row, int entry) const { return own[row * pitch + (entry & (entries - 1))]; }

  // Products of the distances from entry `first` on.
  PYEXT_DEVICE void store(const float (&sum)[1][Tile::N][4], int first) const {
#pragma unroll
    for (int j = 0; j < Tile::N; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) at(lane_row() + e / 2 * 8, first + 8 * j + lane_column() + e % 2) = sum[0][j][e];
    }
    __syncwarp();
  }

  // s += the products of a tile whose first entry is `first`.
  PYEXT_DEVICE void add_to(float (&s)[1][Tile::N][4], int first) const {
    const int row = lane_row(), skew = first + Tile::rows - 1 - threadIdx.x / 32 * 16 - row + lane_column();
#pragma unroll
    for (int j = 0; j < Tile::N; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[0][j][e] += at(row + e / 2 * 8, skew - e / 2 * 8 + 8 * j + e % 2);
    }
  }
};

// The relative rows of Tile::columns distances on their way: which ones is read early, so that nobody waits for it.
template <class Tile>
struct RelativeAhead {
  static constexpr int chunks = Tile::width / 8, count = Tile::columns * chunks / Tile::threads;
  int64_t rows[count];

  PYEXT_DEVICE void read(const AttentionProblem& p, int64_t first) {
    const int64_t length = p.q_len + p.k_len - 1;
#pragma unroll
    for (int n = 0; n < count; ++n) {
      const int64_t u = first + (n * Tile::threads + int(threadIdx.x)) / chunks;
      rows[n] = 0 <= u && u < length ? p.rel_index[u] : -1;
    }
  }

  // Zeros for distances that do not occur, and for rows outside of the table, which nobody can report here.
  template <class T>
  PYEXT_DEVICE void load(const SharedTile<T, Tile::width>& tile, const AttentionProblem& p, const T* table,
                         int64_t row_stride) const {
#pragma unroll
    for (int n = 0; n < count; ++n) {
      const int i = n * Tile::threads + threadIdx.x, column = i % chunks * 8;
      const bool valid = 0 <= rows[n] && rows[n] < p.rel_rows && column < p.head_dim;
      ptx::cp_async(tile.at(i / chunks, column), table + (valid ? rows[n] * row_stride + column : 0), valid);
    }
  }
};

// What relative rows add to the scores of a block of queries. In the order of calls: `start`; `read` and `load` of the
// first tile; then of each tile, `read` of the next one, a barrier behind what was loaded, `load` of the next one,
// `multiply`, `add_to`.
template <class T, class Tile>
struct RelativeRows {
  const AttentionProblem& p;
  SharedTile<T, Tile::width> queries;  // then two stages of Tile::columns rows
  RelativeRing<Tile> ring;
  RelativeAhead<Tile> ahead;
  const T *query, *table;
  int64_t first, origin;  // the first query; the distance of entry 0

  static constexpr int shared_bytes =
      2 * tile_elements<Tile::width>(Tile::rows + 2 * Tile::columns) + RelativeRing<Tile>::shared_bytes;
  static_assert(Tile::rows == 2 * Tile::columns, "two stages hold the distances before the first tile's own");

  PYEXT_DEVICE RelativeRows(const AttentionProblem& problem, int64_t batch, int64_t head, int64_t first_query,
                            void* shared)
      : p(problem),
        queries{static_cast<T*>(shared)},
        ring(reinterpret_cast<float*>(queries.at(Tile::rows + 2 * Tile::columns, 0))),
        query(static_cast<const T*>(p.rel_query.data) + batch * p.rel_query.batch + head * p.rel_query.head),
        table(static_cast<const T*>(p.rel_q.data) + batch * p.rel_q.batch + head * p.rel_q.head),
        first(first_query),
        origin(strip_start(p, first_query + Tile::rows - 1, 0)) {}

  PYEXT_DEVICE SharedTile<T, Tile::width> stage(int tile) const {
    return {queries.at(Tile::rows + (tile & 1) * Tile::columns, 0)};
  }
  // A tile's own distances: those that tiles before it have not met.
  PYEXT_DEVICE void read(int tile) { ahead.read(p, origin + int64_t(tile) * Tile::columns + Tile::rows); }
  PYEXT_DEVICE void load(int tile) const { ahead.load(stage(tile), p, table, p.rel_q.row); }
  PYEXT_DEVICE void multiply(int tile, const SharedTile<T, Tile::width>& = {}) const {
    float sum[1][Tile::N][4] = {};
    multiply_transposed<1, Tile::N>(sum, queries, threadIdx.x / 32 * 16, stage(tile));
    ring.store(sum, tile * Tile::columns + Tile::rows);
  }
  PYEXT_DEVICE void add_to(float (&s)[1][Tile::N][4], int tile) const { ring.add_to(s, tile * Tile::columns); }

  // The distances that a tile shares with the two before it, which nobody computes.
  PYEXT_DEVICE void start(int tile) { start_with(*this, tile); }

 protected:
  template <class Rows>
  PYEXT_DEVICE void start_with(Rows& rows, int tile) {
    load_tile<Tile::threads, Tile::rows>(queries, query, p.rel_query.row, first, p.q_len, p.head_dim);
    for (int before = tile - 2; before < tile; ++before) rows.read(before), rows.load(before);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
#pragma unroll 1
    for (int before = tile - 2; before < tile; ++before) multiply(before);
    __syncthreads();  // all are done with the stages
  }
};

// The same with relative rows for keys. Of these, four blocks of Tile::columns distances stand in a ring: the three of
// a tile, and one under way.
template <class T, class Tile>
struct RelativeRowsOfBoth : RelativeRows<T, Tile> {
  using Queries = RelativeRows<T, Tile>;
  using Queries::ahead, Queries::p;
  static constexpr int entries = Tile::rows + Tile::columns, pitch = entries + 9, ring_rows = 4 * Tile::columns;
  static constexpr int shared_bytes =
      Queries::shared_bytes + 2 * tile_elements<Tile::width>(ring_rows) + int(sizeof(float)) * Tile::columns * pitch;

  SharedTile<T, Tile::width> blocks;
  float* products;  // (columns, entries)
  const T* table_of_keys;

  PYEXT_DEVICE RelativeRowsOfBoth(const AttentionProblem& problem, int64_t batch, int64_t head, int64_t first_query,
                                  void* shared)
      : Queries(problem, batch, head, first_query, shared),
        blocks{reinterpret_cast<T*>(static_cast<char*>(shared) + Queries::shared_bytes)},
        products(reinterpret_cast<float*>(blocks.at(ring_rows, 0))),
        table_of_keys(static_cast<const T*>(p.rel_k.data) + batch * p.rel_k.batch + head * p.rel_k.head) {}

  PYEXT_DEVICE SharedTile<T, Tile::width> from(int entry) const { return {blocks.at(entry & (ring_rows - 1), 0)}; }
  PYEXT_DEVICE void load(int tile) const {
    Queries::load(tile);
    ahead.load(from(tile * Tile::columns + Tile::rows), p, table_of_keys, p.rel_k.row);
  }
  PYEXT_DEVICE void start(int tile) { this->start_with(*this, tile); }

  // Squares of 16 keys and 16 distances, by turns of the warps.
  PYEXT_DEVICE void multiply(int tile, const SharedTile<T, Tile::width>& keys) const {
    Queries::multiply(tile);
    constexpr int key_blocks = Tile::columns / 16, squares = key_blocks * (entries / 16);
#pragma unroll
    for (int n = 0; n < (squares + Tile::warps - 1) / Tile::warps; ++n) {
      const int square = n * Tile::warps + threadIdx.x / 32, key = square % key_blocks * 16;
      const int entry = square / key_blocks * 16;
      if (squares % Tile::warps && square >= squares) break;
      float sum[1][2][4] = {};
      multiply_transposed<1, 2>(sum, keys, key, from(tile * Tile::columns + entry));
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          products[(key + lane_row() + e / 2 * 8) * pitch + entry + 8 * j + lane_column() + e % 2] = sum[0][j][e];
      }
    }
  }
  PYEXT_DEVICE void add_to(float (&s)[1][Tile::N][4], int tile) const {
    Queries::add_to(s, tile);
    __syncthreads();  // all warps' products are there
    const int row = threadIdx.x / 32 * 16 + lane_row();
#pragma unroll
    for (int j = 0; j < Tile::N; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int key = 8 * j + lane_column() + e % 2;
        s[0][j][e] += products[key * pitch + key - row - e / 2 * 8 + Tile::rows - 1];
      }
    }
  }
};

// In the place of the above where there are none.
struct NoRelativeRows {
  static constexpr int shared_bytes = 0;
  PYEXT_DEVICE NoRelativeRows(const AttentionProblem&, int64_t, int64_t, int64_t, void*) {}
  PYEXT_DEVICE void start(int) const {}
  PYEXT_DEVICE void read(int) const {}
  PYEXT_DEVICE void load(int) const {}
  template <class Keys>
  PYEXT_DEVICE void multiply(int, const Keys&) const {}
  template <class Scores>
  PYEXT_DEVICE void add_to(const Scores&, int) const {}
};

}  // namespace
}  // namespace pyext
