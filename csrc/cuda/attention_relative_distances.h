// The gradients of tables of relative rows and of the diagonal bias by distance: by blocks of distances that go over
// all queries and all heads that share the tables.
#pragma once
#include "attention_relative_backward.h"

namespace pyext {
namespace {

// A block of threads has as many distances as a block of queries has rows. Query r of that and distance u meet at key
// r + u from the first ones' own on: a parallelogram within tiles of these queries and twice as many keys.
template <class T, class Tile>
struct ByDistance {
  static constexpr int width = Tile::width, rows = Tile::rows, columns = Tile::columns, N = Tile::N;
  static constexpr int steps = 2 * rows / columns, pitch = rows + 9, key_pitch = rows + 3;
  using Rows = SharedTile<T, width>;

  const AttentionProblem& p;
  const RelativeWork& w;
  Pieces pieces;
  const Rows queries = tile(rows), rel_queries = tile(rows), grads = tile(rows), band = tile(rows),
             band_of_keys = tile(rows), stages = tile(2 * Tile::stages * columns);
  float* const products = pieces.take<float>(4 * rows * pitch);             // (queries, distances), then dS
  float* const key_products = pieces.take<float>(4 * columns * key_pitch);  // of one step, (keys, distances)
  const SharedTile<T, rows> key_gradients{pieces.take<T>(2 * tile_elements<rows>(columns))};  // dS, too
  float* const strip = pieces.take<float>(4 * rows);
  RelativeSeen<Tile>& seen = *pieces.take<RelativeSeen<Tile>>(sizeof(RelativeSeen<Tile>));
  int64_t first_distance = 0, batch = 0, head = 0, first_query = 0, first_key = 0;
  float lse[2], delta[2];
  SegmentRows segments;
  bool all = false;

  static constexpr int bytes = 2 * tile_elements<width>(5 * rows + 2 * Tile::stages * columns) +
                               4 * (rows * pitch + columns * key_pitch + rows) + 2 * tile_elements<rows>(columns) +
                               int(sizeof(RelativeSeen<Tile>));

  PYEXT_DEVICE ByDistance(const AttentionProblem& p, const RelativeWork& w, char* shared)
      : p(p), w(w), pieces{shared} {}
  PYEXT_DEVICE Rows tile(int count) { return {pieces.take<T>(2 * tile_elements<width>(count))}; }
  PYEXT_DEVICE Rows keys(int step) const { return {stages.at(step % Tile::stages * 2 * columns, 0)}; }
  PYEXT_DEVICE Rows values(int step) const { return {keys(step).at(columns, 0)}; }
  static PYEXT_DEVICE int own() { return threadIdx.x / 32 * 16; }
  // f(query, distance, key of the step, j, e) for what a lane holds of a step and belongs to the block.
  template <class F>
  static PYEXT_DEVICE void for_each(int step, const F& f) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int query = own() + lane_row() + e / 2 * 8, key = 8 * j + lane_column() + e % 2;
        const int distance = step * columns + key - query;
        if (0 <= distance && distance < rows) f(query, distance, key, j, e);
      }
    }
  }

  PYEXT_DEVICE void load_keys(int step) const {
    const int64_t at = first_key + step * columns, kv_head = head / (p.heads / p.kv_heads);
    load_tile<Tile::threads, columns, true>(keys(step), rows_of<T>(p.key, batch, kv_head), p.key.row, at, p.k_len,
                                            p.head_dim);
    load_tile<Tile::threads, columns, true>(values(step), rows_of<T>(p.value, batch, kv_head), p.value.row, at, p.k_len,
                                            p.value_dim);
    ptx::cp_async_commit();
  }
  // A block of queries, and whether anybody of it meets these distances.
  PYEXT_DEVICE bool start(int64_t block) {
    first_query = block * rows, first_key = first_query + first_distance - (p.q_len - 1);
    const Range range = w.range(p, batch, first_query);
    const int64_t end = first_key + 2 * rows;
    if (first_key >= p.k_len || end <= 0 || !range.meets(int(first_key), int(end))) return false;
    all = range.covers(int(first_key), int(end));
    __syncthreads();  // all are done with the block before
    const auto load = [&](const Rows& to, const Input& from, int64_t features) {
      load_tile<Tile::threads, rows>(to, rows_of<T>(from, batch, head), from.row, first_query, p.q_len, features);
    };
    load(queries, p.query, p.head_dim), load(rel_queries, p.rel_query, p.head_dim),
        load(grads, p.grad_out, p.value_dim);
    load_keys(0);
    find_visible(p, batch, first_query, seen);
    const int64_t pair = batch * p.heads + head, row = first_query + own() + lane_row();
    load_rows(lse, w.lse, pair, row, p.q_len), load_rows(delta, w.delta, pair, row, p.q_len);
    if (p.segment) segments.read(p, pair, row);
    return true;
  }

  // rel_query and the block's relative rows.
  PYEXT_DEVICE void multiply_rows() const {
    float sum[1][rows / 8][4] = {};
    multiply_transposed(sum, rel_queries, own(), band);
#pragma unroll
    for (int j = 0; j < rows / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        products[(own() + lane_row() + e / 2 * 8) * pitch + 8 * j + lane_column() + e % 2] = sum[0][j][e];
    }
    __syncwarp();
  }
  // Keys of a step and the block's relative rows for keys, 16 x 16 by turns of the warps.
  PYEXT_DEVICE void multiply_keys(int step) const {
    for (int square = threadIdx.x / 32; square < columns / 16 * (rows / 16); square += Tile::warps) {
      const int key = square % (columns / 16) * 16, distance = square / (columns / 16) * 16;
      float sum[1][2][4] = {};
      multiply_transposed(sum, keys(step), key, Rows{band_of_keys.at(distance, 0)});
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          key_products[(key + lane_row() + e / 2 * 8) * key_pitch + distance + 8 * j + lane_column() + e % 2] =
              sum[0][j][e];
      }
    }
  }

  // dS of a step takes the place of the products.
  PYEXT_DEVICE void to_gradients(int step) const {
    float s[1][N][4] = {}, ds[1][N][4] = {}, biased[1][N][4];
    multiply_transposed(s, queries, own(), keys(step));
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) biased[0][j][e] = -INFINITY;
    }
    for_each(step, [&](int query, int distance, int key, int j, int e) {
      float x = s[0][j][e] + products[query * pitch + distance];
      x += key_products[key * key_pitch + distance];
      biased[0][j][e] = fmaf(x, float(p.scale) * kLog2e, strip[distance]);
    });
    const int64_t at = first_key + step * columns;
    if (!all) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        hide_unseen(biased[0], half, seen.of[own() + lane_row() + 8 * half], int(at));
    }
    if (p.segment) segments.add_to(biased[0], p, batch, int(at));
    multiply_transposed(ds, grads, own(), values(step));
    to_score_gradients(ds, biased, lse, delta);
    for_each(step, [&](int query, int distance, int key, int j, int e) {
      products[query * pitch + distance] = ds[0][j][e];
      *key_gradients.at(key, distance) = ptx::from_float<T>(ds[0][j][e]);
    });
  }

  // sum += dS' K of a step, for the warp's 16 distances.
  PYEXT_DEVICE void add_keys(float (&sum)[1][width / 8][4], int step) const {
    for (int i = threadIdx.x; i < columns * rows; i += Tile::threads) {
      const int key = i / rows, distance = i % rows, query = step * columns + key - distance;
      if (query < 0 || query >= rows) *key_gradients.at(key, distance) = ptx::from_float<T>(0);
    }
    __syncthreads();  // all warps' dS is there
    uint32_t left[1][columns / 16][4];
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < columns / 16; ++k)
      ptx::ldmatrix_transposed(left[0][k],
                               key_gradients.at(16 * k + lane % 8 + lane / 16 * 8, own() + lane / 8 % 2 * 8));
    multiply(sum, left, keys(step));
  }
  // sum += dS'^T rel_query of a block of queries.
  PYEXT_DEVICE void add_queries(float (&sum)[1][width / 8][4]) const {
    uint32_t left[1][rows / 16][4];
#pragma unroll
    for (int k = 0; k < rows / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* from = products + (16 * k + lane_column() + i / 2 * 8) * pitch + own() + lane_row() + i % 2 * 8;
        left[0][k][i] = ptx::pack<T>(from[0], from[pitch]);
      }
    }
    multiply(sum, left, rel_queries);
  }
};

template <class Tile>
PYEXT_DEVICE void store_by_distance(float* to, int64_t first, int64_t count, int64_t features,
                                    const float (&sum)[1][Tile::width / 8][4]) {
#pragma unroll
  for (int j = 0; j < Tile::width / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t u = first + lane_row() + e / 2 * 8, column = 8 * j + lane_column() + e % 2;
      if (u < count && column < features) to[u * features + column] = sum[0][j][e];
    }
  }
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::threads, 1)
    attention_relative_distances(const __grid_constant__ AttentionProblem p, const __grid_constant__ RelativeWork w) {
  PYEXT_SHARED(char, shared);
  ByDistance<T, Tile> block(p, w, shared);
  const int64_t length = p.q_len + p.k_len - 1, blocks = ceil_div(length, Tile::rows), slot = blockIdx.x / blocks;
  const int64_t group = slot / w.parts, group_batch = group / w.group_heads, group_head = group % w.group_heads;
  // Of a group: all entries of the batch or one, and all heads or one.
  const int64_t batches = w.group_batch == 1 ? p.batch : 1, heads = w.group_heads == 1 ? p.heads : 1;
  block.first_distance = blockIdx.x % blocks * Tile::rows;
  const auto copy = [&](const auto& to, const T* rows) {
    copy_relative<Tile, Tile::rows>(to, p, rows, block.first_distance);
  };
  copy(block.band, w.rows.rows_of_queries<T>(p, group_batch, group_head));
  copy(block.band_of_keys, w.rows.rows_of_keys<T>(p, group_batch, group_head));
  ptx::cp_async_commit();
  w.load_strip<Tile>(block.strip, p, group_head, block.first_distance, Tile::rows);

  float of_queries[1][Tile::width / 8][4] = {}, of_keys[1][Tile::width / 8][4] = {}, of_bias = 0;
  for (int64_t n = slot % w.parts; n < batches * heads; n += w.parts) {
    block.batch = group_batch + n / heads, block.head = group_head + n % heads;
    for (int64_t i = 0; i < ceil_div(p.q_len, Tile::rows); ++i) {
      if (!block.start(i)) continue;
#pragma unroll 1
      for (int step = 0; step < block.steps; ++step) {
        if (Tile::stages == 1 && step > 0) {
          __syncthreads();  // all are done with the step before
          block.load_keys(step);
        }
        ptx::cp_async_wait<0>();
        __syncthreads();  // this step's keys are there, for all, and all are done with the last one's
        if (Tile::stages > 1 && step + 1 < block.steps) block.load_keys(step + 1);
        if (step == 0) block.multiply_rows();
        block.multiply_keys(step);
        __syncthreads();                                       // all warps' products are there
        const int first = step * Tile::columns - block.own();  // distance of the warp's first query and the first key
        if (first + Tile::columns > 0 && first - 15 < Tile::rows) block.to_gradients(step);
        block.add_keys(of_keys, step);
      }
      block.add_queries(of_queries);  // all warps' dS is there, for add_keys
      if (w.of_bias && threadIdx.x < Tile::rows)
        for (int query = 0; query < Tile::rows; ++query) of_bias += block.products[query * block.pitch + threadIdx.x];
    }
  }
  ptx::cp_async_wait<0>();

  const int64_t first = block.first_distance + block.own();
  const int64_t at = slot * length;
  if (w.of_queries) store_by_distance<Tile>(w.of_queries + at * p.head_dim, first, length, p.head_dim, of_queries);
  if (w.of_keys) store_by_distance<Tile>(w.of_keys + at * p.head_dim, first, length, p.head_dim, of_keys);
  if (w.of_bias && threadIdx.x < Tile::rows && block.first_distance + threadIdx.x < length)
    w.of_bias[at + block.first_distance + threadIdx.x] = of_bias;
}

}  // namespace
}  // namespace pyext
