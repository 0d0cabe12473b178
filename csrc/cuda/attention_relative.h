// Scores with relative rows, rel_query_i . rel_q[rel_index[u]] with u = j - i + q_len - 1, in the forward for sm_80: a
// band is the products of 32 queries and 32 neighbouring distances. A tile of 32 keys needs two bands, of which the
// tile before it has had one. Their skew is where they are stored: product of query r and distance d of a band at
// column d + r of its tile or, beyond 32, of the next one.
// Products of keys and relative rows, k_j . rel_k[rel_index[u]], are of no use to another tile: each computes all of
// its own, a warp some of them, and all warps read them.
//
// Sources: Dai et al., "Transformer-XL" (2019), appendix B, whose shift of a whole matrix this is, in shared memory;
// He et al., "DeBERTa" (2021), eq. 4.
#pragma once
#include "attention_relative_rows.h"

namespace pyext {
namespace {

// blocks: that a multiprocessor is to hold; of_both: relative rows of keys, too.
template <int width_, int M_, int warps_, int blocks_, bool of_both_>
struct RelativeTile {
  static constexpr int width = width_, M = M_, warps = warps_, columns = 32, blocks = blocks_, N = columns / 8,
                       threads = 32 * warps, rows = 16 * M * warps, strip = rows + columns;
  static constexpr bool of_both = of_both_;
  static constexpr int units = rows / columns;  // of queries, each a band apart
  static_assert(rows % columns == 0, "units are whole");

  // Where things are in shared memory, in bytes: products of bands; two stages of values; of keys; rows of the bands
  // that the units need, and of one on its way; the same for keys, and their products; strips; who sees what. Queries
  // begin where they are in registers by the time that something else is there.
  static constexpr int tile_bytes = 2 * tile_elements<width>(columns), ring_pitch = 2 * columns + 8,
                       key_pitch = columns + 8;
  static constexpr int values_at = 4 * rows * ring_pitch, keys_at = values_at + 2 * tile_bytes,
                       bands_at = keys_at + 2 * tile_bytes, bands_of_keys_at = bands_at + (units + 1) * tile_bytes,
                       products_at = bands_of_keys_at + of_both * (units + 2) * tile_bytes,
                       strip_at = products_at + of_both * 4 * (rows + 2 * columns - 1) * key_pitch,
                       seen_at = strip_at + 4 * 2 * strip, seen_end = seen_at + int(sizeof(Visible<threads, rows>));
  // Rows of keys and more than 64 features leave no registers to those of rel_query, nor to scores beside products.
  static constexpr bool in_registers = !of_both || width <= 64;
  static constexpr int query_bytes = 2 * tile_elements<width>(rows),
                       rel_query_at = in_registers ? query_bytes : seen_end,
                       shared_bytes = seen_end + !in_registers * query_bytes;
  static_assert((1 + in_registers) * query_bytes <= keys_at, "queries end where keys begin");
  static_assert(seen_end % 16 == 0, "rows can be copied");
};

// Products of bands, of a warp's 16 M rows. A row has 64 columns: of even tiles, and of odd ones. Eight rows below, all
// are moved by eight to the left, so that a lane's places are the same in all its rows. What a warp stores at once,
// rows g and distances 8 t + n, lies in banks 9 g + 8 t: in all of them; and what half a warp reads at once, columns
// 2 t and 2 t + 1 of four rows, too.
template <class Tile>
struct BandProducts {
  static constexpr int M = Tile::M, N = Tile::N, columns = Tile::columns;
  float* own;  // the lane's first row
  int first;   // place of its first product

  PYEXT_DEVICE explicit BandProducts(float* shared)
      : own(shared + (threadIdx.x / 32 * 16 * M + lane_row()) * Tile::ring_pitch),
        first(threadIdx.x / 32 * 16 * M % columns + lane_row() + lane_column() * 4) {}

  PYEXT_DEVICE void store(const float (&sum)[M][N][4], int tile) const {
#pragma unroll
    for (int n = 0; n < 2 * N; ++n) {
      float* const at = own + (first + n + (tile & 1) * columns & 2 * columns - 1);
#pragma unroll
      for (int octet = 0; octet < 2 * M; ++octet)
        at[8 * octet * Tile::ring_pitch] = sum[octet / 2][n / 2][octet % 2 * 2 + n % 2];
    }
    __syncwarp();
  }
  // What the scores of a tile start with.
  PYEXT_DEVICE void load(float (&s)[M][N][4], int tile) const {
    const int flip = (tile & 1) * columns;
#pragma unroll
    for (int octet = 0; octet < 2 * M; ++octet) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const int moved = (j - octet) & 2 * N - 1;
        const float* const at = own + (moved < N ? flip : -flip) + lane_column();
        const float2 two = *reinterpret_cast<const float2*>(at + 8 * (octet * Tile::ring_pitch + moved));
        s[octet / 2][j][octet % 2 * 2] = two.x, s[octet / 2][j][octet % 2 * 2 + 1] = two.y;
      }
    }
  }
};

// Products of a tile's keys and their relative rows, by query and key: that of key c and distance d, counted from
// `rows` before the tile's own, is of query c - d + rows, of those before and behind the block, too. What a warp stores
// at once, keys g and distances t, lies in banks 9 g - 8 t.
template <class T, class Tile>
struct KeyProducts {
  static constexpr int width = Tile::width, N = Tile::N, pitch = Tile::key_pitch, columns = Tile::columns;
  static constexpr int octets = (Tile::rows + columns) / 8, turns = (octets + Tile::warps - 1) / Tile::warps;
  float* products;

  // Also s += queries keys^T, whose fragments are the same, if registers allow. offset(d): of the row of distance d.
  template <class Offset>
  PYEXT_DEVICE void multiply(float (&s)[1][N][4], const uint32_t (&queries)[1][width / 16][4],
                             const SharedTile<T, width>& keys, const T* rows, const Offset& offset) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float sum[turns][2][4] = {};
    int from[turns];
#pragma unroll
    for (int turn = 0; turn < turns; ++turn)
      from[turn] = offset(8 * min(turn * Tile::warps + warp, octets - 1) + lane % 8) + lane / 8 * 8;
#pragma unroll
    for (int k = 0; k < width / 32; ++k) {
      uint32_t of_keys[2][2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t (&left)[4] = of_keys[m][half];
          ptx::ldmatrix(left, keys.at(16 * m + lane % 16, 32 * k + 16 * half + lane / 16 * 8));
          if constexpr (Tile::in_registers) {
            ptx::mma<T>(s[0][2 * m], queries[0][2 * k + half], {left[0], left[2]});
            ptx::mma<T>(s[0][2 * m + 1], queries[0][2 * k + half], {left[1], left[3]});
          }
        }
      }
#pragma unroll
      for (int turn = 0; turn < turns; ++turn) {
        uint32_t right[4];
        ptx::ldmatrix(right, rows + from[turn] + 32 * k);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          ptx::mma<T>(sum[turn][m], of_keys[m][0], {right[0], right[1]});
          ptx::mma<T>(sum[turn][m], of_keys[m][1], {right[2], right[3]});
        }
      }
    }
#pragma unroll
    for (int turn = 0; turn < turns; ++turn) {
      const int octet = turn * Tile::warps + warp;
      if (octet >= octets) break;
      const int key = lane_row(), query = key - 8 * octet - lane_column() / 2 + Tile::rows + columns - 1;
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int below = 16 * m + e / 2 * 8;
          products[(query + below - e % 2 * 4) * pitch + key + below] = sum[turn][m][e];
        }
      }
    }
  }
  PYEXT_DEVICE void add_to(float (&s)[1][N][4]) const {
    const float* const at = products + (threadIdx.x / 32 * 16 + lane_row() + columns - 1) * pitch + lane_column();
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 two = *reinterpret_cast<const float2*>(at + 8 * half * pitch + 8 * j);
        s[0][j][2 * half] += two.x, s[0][j][2 * half + 1] += two.y;
      }
    }
  }
};

// Products of a block of queries. In the order of calls: `load` of the bands from that before the first tile's on;
// `read_queries`; `multiply_band` of the tile before the first; then of each tile, `load` of band tile + units and
// `to_scores`.
template <class T, class Tile>
struct RelativeScores {
  static constexpr int width = Tile::width, M = Tile::M, N = Tile::N, columns = Tile::columns, units = Tile::units;
  using Rows = SharedTile<T, width>;

  const AttentionProblem& p;
  char* const shared;
  const T *rows, *rows_of_keys;  // of the head, of band 0
  int written_from;              // the first band that is written out
  BandProducts<Tile> band_products;
  KeyProducts<T, Tile> key_products;
  uint32_t queries[M][width / 16][4], rel_queries[Tile::in_registers ? M : 1][width / 16][4];

  PYEXT_DEVICE RelativeScores(const AttentionProblem& problem, const WrittenRows& written, int64_t batch, int64_t head,
                              int64_t first_query, char* memory)
      : p(problem),
        shared(memory),
        band_products(reinterpret_cast<float*>(memory)),
        key_products{reinterpret_cast<float*>(memory + Tile::products_at)} {
    const int64_t origin = RelativeRows(p).origin - first_query - units * columns;
    rows = written.rows_of_queries<T>(p, batch, head) + origin * p.head_dim;
    if (Tile::of_both) rows_of_keys = written.rows_of_keys<T>(p, batch, head) + origin * p.head_dim;
    written_from = int(-origin / columns);
  }

  PYEXT_DEVICE Rows band(int n) const { return in_ring(Tile::bands_at, n % (units + 1)); }
  PYEXT_DEVICE Rows band_of_keys(int n) const { return in_ring(Tile::bands_of_keys_at, n % (units + 2)); }
  PYEXT_DEVICE Rows in_ring(int at, unsigned n) const {
    return {reinterpret_cast<T*>(shared + at + n * unsigned(Tile::tile_bytes))};
  }
  // Bands are counted from the one before the first key's: unit u needs that of number tile + units - u.
  PYEXT_DEVICE void load(int n) const {
    const int64_t at = int64_t(n) * columns * p.head_dim;
    const int count = n >= written_from ? columns : 0;
    copy_tile<Tile::threads, columns>(band(n), rows + at, p.head_dim, count, p.head_dim);
    if (Tile::of_both)
      copy_tile<Tile::threads, columns>(band_of_keys(n), rows_of_keys + at, p.head_dim, count, p.head_dim);
  }

  PYEXT_DEVICE void load_queries(int64_t batch, int64_t head, int64_t first) const {
    const auto load = [&](const Rows& to, const Input& from) {
      load_tile<Tile::threads, Tile::rows>(to, rows_of<T>(from, batch, head), from.row, first, p.q_len, p.head_dim);
    };
    load(queries_at(0), p.query), load(queries_at(Tile::rel_query_at), p.rel_query);
  }
  PYEXT_DEVICE void read_queries() {
    const int row = threadIdx.x / 32 * 16 * M;
    read_left(queries, queries_at(0), row);
    if (Tile::in_registers) read_left(rel_queries, queries_at(Tile::rel_query_at), row);
    __syncthreads();  // all have theirs: something else may be there
  }
  PYEXT_DEVICE Rows queries_at(int at) const { return {reinterpret_cast<T*>(shared + at)}; }

  PYEXT_DEVICE void multiply_band(int tile) const {
    const int row = threadIdx.x / 32 * 16 * M;
    float sum[M][N][4] = {};
    if constexpr (Tile::in_registers)
      multiply_transposed(sum, rel_queries, band(tile + units - row / columns));
    else
      multiply_transposed(sum, queries_at(Tile::rel_query_at), row, band(tile + units - row / columns));
    band_products.store(sum, tile);
  }
  PYEXT_DEVICE void to_scores(float (&s)[M][N][4], int tile, const Rows& keys) const {
    multiply_band(tile);
    if (Tile::in_registers) band_products.load(s, tile);
    if constexpr (Tile::of_both) {
      key_products.multiply(s, queries, keys, band_of_keys(0).data, [&](int distance) {
        const unsigned n = unsigned(tile + distance / columns) % (units + 2);
        return int(n) * tile_elements<width>(columns) + distance % columns * (width + 8);
      });
    }
    if (!Tile::in_registers) band_products.load(s, tile);
    if (!Tile::in_registers || !Tile::of_both) multiply_transposed(s, queries, keys);
    if constexpr (Tile::of_both) {
      __syncthreads();  // all warps' products are there
      key_products.add_to(s);
    }
  }
};

}  // namespace
}  // namespace pyext
