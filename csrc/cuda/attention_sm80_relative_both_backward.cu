// Attention backward with relative rows of queries and of keys for sm_80 and later, deterministic as
// attention_sm80_backward.cu: no atomics, and every sum in a fixed order. Three kernels compute S and dP again, each
// for what it can add up alone: one has a block of keys (dK, dV), one a block of queries (dQ, the gradients of
// rel_query and segments), and one a block of distances, of all queries and all heads that share tables (the gradients
// of tables and of the diagonal bias, by distance). A last one adds up the distances of each row of a table.
//
//   S = scale (Q K^T + skewed(rel_query R_q^T) + skewed(K R_k^T)) + bias, and with dS' = dS skewed to distances
//   dQ = scale dS K, d rel_query = scale dS' R_q, dK = scale (dS^T Q + dS'^T R_k)
//   dR_q = scale dS'^T rel_query, dR_k = scale dS' K, with dS' by queries and by keys
// Sources: Dao, "FlashAttention-2" (2023), algorithm 2; He et al., "DeBERTa" (2021), eq. 4; Yang et al., "XLNet"
// (2019), section 2.5.
#include "attention_relative_distances.h"

namespace pyext {
namespace {

// --- dK and dV ---

// At 64 features two blocks share a Hopper, at up to 115,712 bytes each.
template <class Tile>
constexpr int relative_key_bytes() {
  using Skewed = SkewedRows<bf16, Tile, true>;
  const int rows = 2 * Tile::rows + 3 * Tile::stages * Tile::columns + 2 * Tile::ring;
  return 2 * tile_elements<Tile::width>(rows) + SkewedColumns<bf16, Tile, true>::bytes + Skewed::bytes +
         Tile::stages * int(sizeof(RelativeQueries<Tile>));
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::threads, 1)
    attention_relative_keys(const __grid_constant__ AttentionProblem p, const __grid_constant__ RelativeWork w) {
  constexpr int width = Tile::width, rows = Tile::rows, columns = Tile::columns, N = Tile::N;
  constexpr int tile_bytes = 2 * tile_elements<width>(columns);
  PYEXT_SHARED(char, shared);
  Pieces pieces{shared};
  const SharedTile<T, width> keys{pieces.take<T>(2 * tile_elements<width>(rows))};
  const SharedTile<T, width> values{pieces.take<T>(2 * tile_elements<width>(rows))};
  T* const stages = pieces.take<T>(3 * Tile::stages * tile_bytes);
  const auto stage = [&](int n, int which) {
    return SharedTile<T, width>{stages + (n % Tile::stages * 3 + which) * tile_elements<width>(columns)};
  };
  const auto queries = [&](int n) { return stage(n, 0); };
  const auto rel_queries = [&](int n) { return stage(n, 1); };
  const auto grads = [&](int n) { return stage(n, 2); };
  const Band<T, Tile> band{{pieces.take<T>(2 * Band<T, Tile>::elements)}, p};
  const Band<T, Tile> band_of_keys{{pieces.take<T>(2 * Band<T, Tile>::elements)}, p};
  const SkewedColumns<T, Tile, true> skewed{pieces.take<float>(SkewedColumns<T, Tile, true>::bytes)};
  auto* const infos = pieces.take<RelativeQueries<Tile>>(Tile::stages * int(sizeof(RelativeQueries<Tile>)));

  const int key_blocks = int(ceil_div(p.k_len, rows)), kv_heads = int(p.kv_heads);
  const int first_key = blockIdx.x % key_blocks * rows, kv_pair = blockIdx.x / key_blocks;
  const int kv_head = kv_pair % kv_heads, batch = kv_pair / kv_heads;
  const int blocks = int(ceil_div(p.q_len, columns)), sharing = int(p.heads / p.kv_heads);
  const int heads_end = (kv_head + 1) * sharing;

  // The queries that see a key of this block: steps of one head, then of the next that shares the keys.
  struct Step {
    int head, block;
    bool all;  // its queries see all keys
  };
  const auto range = [&](const Step& step) { return w.range(p, batch, int64_t(step.block) * columns); };
  const auto settled = [&](Step step) {
    for (; step.head < heads_end; ++step.head, step.block = 0)
      for (; step.block < blocks; ++step.block)
        if (const Range seen = range(step); seen.meets(first_key, first_key + rows)) {
          step.all = seen.covers(first_key, first_key + rows);
          return step;
        }
    return step;
  };
  // Distances fall from step to step: entries count from the last one on.
  const auto entry = [&](const Step& step) { return (blocks - 1 - step.block) * columns; };
  const int64_t origin = strip_start(p, int64_t(blocks) * columns - 1, first_key);
  RelativeQueriesAhead<Tile> ahead;
  // follows: the step before is that of the queries before, and most of the band is there.
  const auto load = [&](const Step& step, int n, bool follows) {
    const int64_t first = int64_t(step.block) * columns;
    copy_rows<Tile, columns>(queries(n), p.query, batch, step.head, first, p.q_len, p.head_dim);
    copy_rows<Tile, columns>(rel_queries(n), p.rel_query, batch, step.head, first, p.q_len, p.head_dim);
    copy_rows<Tile, columns>(grads(n), p.grad_out, batch, step.head, first, p.q_len, p.value_dim);
    const int at = entry(step), count = follows ? columns : Tile::distances;
    band.load(w.rows.rows_of_queries<T>(p, batch, step.head), at, origin + at, count);
    band_of_keys.load(w.rows.rows_of_keys<T>(p, batch, step.head), at, origin + at, count);
    ptx::cp_async_commit();
    ahead.read(p, w, batch, step.head, first, origin + at);
  };

  copy_rows<Tile, rows>(keys, p.key, batch, kv_head, first_key, p.k_len, p.head_dim);
  copy_rows<Tile, rows>(values, p.value, batch, kv_head, first_key, p.k_len, p.value_dim);
  ptx::cp_async_commit();
  const SkewedRows<T, Tile, true> skewed_rows(reinterpret_cast<float*>(pieces.at));
  const int own = threadIdx.x / 32 * 16;
  int row_ids[2];
  if (p.segment) load_ids(row_ids, p.segment_k + batch * p.segment_k_batch, first_key + own + lane_row(), p.k_len);
  float grad_key[1][width / 8][4] = {}, grad_value[1][width / 8][4] = {};
  const Step none{heads_end, 0, false};
  Step step = none, loaded = none, next = settled({heads_end - sharing, 0, false});
  for (int n = 0;; ++n) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this step's tiles are there, for all, and all are done with the last one's
    const bool idle = step.head == heads_end;
    if (idle && next.head == heads_end) break;
    // What comes next is copied now if its band takes the place of nothing that this step needs.
    const bool follows = next.head == loaded.head && next.block == loaded.block + 1;
    const Step now = step;
    step = none;
    if (next.head < heads_end && (idle || (Tile::stages > 1 && follows))) {
      load(next, n + 1, follows);
      step = loaded = next, next = settled({next.head, next.block + 1, false});
    }
    const bool stores_late = Tile::stages > 1 && !idle;
    if (!stores_late && step.head < heads_end)
      ahead.store(p, int64_t(step.block) * columns, infos[(n + 1) % Tile::stages]);
    if (idle) continue;
    const RelativeQueries<Tile>& info = infos[n % Tile::stages];

    skewed.multiply(rel_queries(n), band, entry(now));
    skewed_rows.multiply(keys, band_of_keys, entry(now));
    float p_t[1][N][4] = {};  // transposed: rows are keys
    multiply_transposed(p_t, keys, own, queries(n));
    skewed_rows.add_to(p_t);
    __syncthreads();  // all warps' products are there
    skewed.add_to(p_t);
    to_weights<Tile>(p_t, p, info, row_ids, first_key, now.all);
    uint32_t left[1][N / 2][4];
    as_left<T>(left, p_t);
    multiply(grad_value, left, grads(n));
    float ds_t[1][N][4] = {};
    multiply_transposed(ds_t, values, own, grads(n));
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        ds_t[0][j][e] = p_t[0][j][e] * (ds_t[0][j][e] - info.delta[8 * j + lane_column() + e % 2]);
    }
    as_left<T>(left, ds_t);
    multiply(grad_key, left, queries(n));
    skewed_rows.add_gradient(grad_key, ds_t, band_of_keys, entry(now));
    if (stores_late && step.head < heads_end)
      ahead.store(p, int64_t(step.block) * columns, infos[(n + 1) % Tile::stages]);
  }
  ptx::cp_async_wait<0>();

  const float scaled[1][2] = {{float(p.scale), float(p.scale)}}, plain[1][2] = {{1, 1}};
  store_rows(rows_of<T>(p.grad_key, batch, kv_head), p.grad_key.row, first_key + own, p.k_len, p.head_dim, grad_key,
             scaled);
  store_rows(rows_of<T>(p.grad_value, batch, kv_head), p.grad_value.row, first_key + own, p.k_len, p.value_dim,
             grad_value, plain);
}

// --- dQ, and the gradients of rel_query and segments ---

template <class Tile>
constexpr int relative_query_bytes() {
  const int rows = 3 * Tile::rows + 2 * Tile::stages * Tile::columns + 2 * Tile::ring;
  return 2 * tile_elements<Tile::width>(rows) + SkewedRows<bf16, Tile, false>::bytes +
         SkewedColumns<bf16, Tile, false>::bytes + Tile::stages * 4 * Tile::distances + int(sizeof(RelativeSeen<Tile>));
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::threads, 1)
    attention_relative_queries(const __grid_constant__ AttentionProblem p, const __grid_constant__ RelativeWork w) {
  constexpr int width = Tile::width, rows = Tile::rows, columns = Tile::columns, N = Tile::N;
  PYEXT_SHARED(char, shared);
  Pieces pieces{shared};
  const auto tile_of_rows = [&] { return SharedTile<T, width>{pieces.take<T>(2 * tile_elements<width>(rows))}; };
  const SharedTile<T, width> queries = tile_of_rows(), rel_queries = tile_of_rows(), grads = tile_of_rows();
  T* const stages = pieces.take<T>(2 * Tile::stages * 2 * tile_elements<width>(columns));
  const auto stage = [&](int n) {
    return SharedTile<T, width>{stages + n % Tile::stages * 2 * tile_elements<width>(columns)};
  };
  const auto keys = [&](int n) { return stage(n); };
  const auto values = [&](int n) { return SharedTile<T, width>{stage(n).at(columns, 0)}; };
  const Band<T, Tile> band{{pieces.take<T>(2 * Band<T, Tile>::elements)}, p};
  const Band<T, Tile> band_of_keys{{pieces.take<T>(2 * Band<T, Tile>::elements)}, p};
  using Columns = SkewedColumns<T, Tile, false>;
  const SkewedRows<T, Tile, false> skewed(pieces.take<float>(SkewedRows<T, Tile, false>::bytes));
  const Columns skewed_columns{pieces.take<float>(Columns::bytes)};
  float* const strips = pieces.take<float>(Tile::stages * 4 * Tile::distances);
  auto& seen = *pieces.take<RelativeSeen<Tile>>(sizeof(RelativeSeen<Tile>));

  // The last queries first: under a causal mask they have most to do.
  const int blocks = int(ceil_div(p.q_len, rows)), heads = int(p.heads), pair = blockIdx.x / blocks;
  const int head = pair % heads, batch = pair / heads, kv_head = head / (heads / int(p.kv_heads));
  const int first = (blocks - 1 - blockIdx.x % blocks) * rows;
  const Range range = find_visible(p, batch, first, seen);
  const int begin = range.begin / columns, end = range.end ? (range.end - 1) / columns + 1 : begin;
  const int64_t origin = strip_start(p, int64_t(first) + rows - 1, 0);
  const auto load = [&](int tile) {
    const int64_t at = int64_t(tile) * columns;
    copy_rows<Tile, columns>(keys(tile), p.key, batch, kv_head, at, p.k_len, p.head_dim);
    copy_rows<Tile, columns>(values(tile), p.value, batch, kv_head, at, p.k_len, p.value_dim);
    const int before = tile == begin ? 0 : rows, entry = tile * columns + before, count = Tile::distances - before;
    band.load(w.rows.rows_of_queries<T>(p, batch, head), entry, origin + entry, count);
    band_of_keys.load(w.rows.rows_of_keys<T>(p, batch, head), entry, origin + entry, count);
    ptx::cp_async_commit();
    w.load_strip<Tile>(strips + tile % Tile::stages * Tile::distances, p, head, origin + at);
  };
  copy_rows<Tile, rows>(queries, p.query, batch, head, first, p.q_len, p.head_dim);
  copy_rows<Tile, rows>(rel_queries, p.rel_query, batch, head, first, p.q_len, p.head_dim);
  copy_rows<Tile, rows>(grads, p.grad_out, batch, head, first, p.q_len, p.value_dim);
  ptx::cp_async_commit();

  const int own = threadIdx.x / 32 * 16;
  const int64_t row = int64_t(first) + own + lane_row();
  float lse[2], delta[2], of_other[2] = {}, of_same[2] = {};
  load_rows(lse, w.lse, pair, row, p.q_len), load_rows(delta, w.delta, pair, row, p.q_len);
  float grad_query[1][width / 8][4] = {}, grad_rel_query[1][width / 8][4] = {};
  SegmentRows segments;
  if (p.segment) segments.read(p, pair, row);
  for (int tile = begin + 1 - Tile::stages; tile < end; ++tile) {
    if (Tile::stages > 1) ptx::cp_async_wait<0>();
    __syncthreads();  // with two stages this step's tiles are there, for all; and all are done with the last one's
    if (tile + Tile::stages - 1 < end) load(tile + Tile::stages - 1);
    if (tile < begin) continue;
    if (Tile::stages == 1) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // this step's tiles are there, for all
    }
    const int entry = tile * columns, first_key = tile * columns;

    skewed.multiply(rel_queries, band, entry);
    skewed_columns.multiply(keys(tile), band_of_keys, entry);
    float s[1][N][4] = {}, ds[1][N][4] = {};
    multiply_transposed(s, queries, own, keys(tile));
    skewed.add_to(s);
    __syncthreads();  // all warps' products are there
    skewed_columns.add_to(s);
    finish_scores<Tile, true>(s, float(p.scale) * kLog2e, strips + tile % Tile::stages * Tile::distances, seen.of,
                              first_key, range.covers(first_key, first_key + columns));
    const uint32_t same = p.segment ? segments.add_to(s[0], p, batch, first_key) : 0;
    multiply_transposed(ds, grads, own, values(tile));
    to_score_gradients(ds, s, lse, delta);
    if (p.grad_segment) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const bool equal = same >> (4 * j + e) & 1;
          of_same[e / 2] += equal ? ds[0][j][e] : 0, of_other[e / 2] += equal ? 0 : ds[0][j][e];
        }
      }
    }
    uint32_t left[1][N / 2][4];
    as_left<T>(left, ds);
    multiply(grad_query, left, keys(tile));
    skewed.add_gradient(grad_rel_query, ds, band, entry);
  }
  ptx::cp_async_wait<0>();

  const float scaled[1][2] = {{float(p.scale), float(p.scale)}};
  store_rows(rows_of<T>(p.grad_query, batch, head), p.grad_query.row, first + own, p.q_len, p.head_dim, grad_query,
             scaled);
  store_rows(rows_of<T>(p.grad_rel_query, batch, head), p.grad_rel_query.row, first + own, p.q_len, p.head_dim,
             grad_rel_query, scaled);
  if (!p.grad_segment) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float both[2] = {of_other[half], of_same[half]};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      both[k] += __shfl_xor_sync(~0u, both[k], 1), both[k] += __shfl_xor_sync(~0u, both[k], 2);
      if (threadIdx.x % 4 == 0 && row + 8 * half < p.q_len)
        static_cast<float*>(p.grad_segment)[2 * (pair * p.q_len + row + 8 * half) + k] = both[k];
    }
  }
}

// --- Launchers ---

// Blocks that go over distances at the same time: enough to fill any GPU.
constexpr int64_t kDistanceBlocks = 512;

struct RelativeWorkspace {
  RelativeWork work{};
  AttentionWorkspace base;
  int64_t length, slots = 0, bytes = 0;

  static AttentionWorkspace base_of(AttentionProblem p, void* memory) {
    p.grad_diag = nullptr;  // whose slots are not needed
    return AttentionWorkspace(p, memory, true, ceil_div(p.q_len, kStepRows));
  }

  RelativeWorkspace(const AttentionProblem& p, void* memory)
      : base(base_of(p, memory)), length(max_of(p.q_len + p.k_len - 1, 0)), bytes(base.bytes) {
    work.strips = base.strips, work.strip_length = base.strip_length;
    work.delta = base.delta, work.lse = base.lse, work.ranges = reinterpret_cast<const Range*>(base.ranges);
    work.group_batch = max_of(p.rel_q_batch, p.rel_k_batch);
    work.group_heads = max_of(max_of(p.rel_q_heads, p.rel_k_heads), p.diag_heads);
    const int64_t groups = work.group_batch * work.group_heads;
    if (groups == 0) return;
    const int64_t sharing = max_of(1, p.batch / work.group_batch * (p.heads / work.group_heads));
    const int64_t blocks = max_of(1, groups * ceil_div(length, kRelativeRows));
    work.parts = max_of(1, min_of(sharing, kDistanceBlocks / blocks));
    slots = groups * work.parts;
    const auto take = [&](float*& piece, bool wanted, int64_t features) {
      if (!wanted) return;
      piece = reinterpret_cast<float*>(static_cast<char*>(memory) + bytes);
      bytes += ceil_div(slots * length * features * int64_t(sizeof(float)), 256) * 256;
    };
    take(work.of_queries, p.grad_rel_q, p.head_dim), take(work.of_keys, p.grad_rel_k, p.head_dim);
    take(work.of_bias, p.grad_diag, 1);
    const RelativeRows rows(p);
    work.rows = {static_cast<char*>(memory) + bytes, static_cast<char*>(memory) + bytes + rows.bytes};
    bytes += rows.bytes + rows.bytes_of_keys;
  }
};

template <class Kernel>
int launch_blocks(Kernel kernel, int64_t blocks, int threads, int shared_bytes, cudaStream_t stream,
                  const AttentionProblem& p, const RelativeWork& w) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return ptx::launch(kernel, dim3(unsigned(blocks)), dim3(threads), shared_bytes, stream, p, w);
}

template <class T, class Tile>
int launch_relative(const AttentionProblem& p, const RelativeWorkspace& w, cudaStream_t stream) {
  if (const int error = prepare<T>(p, w.base, stream)) return error;
  if (const int error = write_rows<T, RowOrder::natural, RowOrder::natural>(p, w.work.rows, stream)) return error;
  const auto launch = [&](auto kernel, int64_t blocks, int shared_bytes) {
    return launch_blocks(kernel, blocks, Tile::threads, shared_bytes, stream, p, w.work);
  };
  if (const int error = launch(attention_relative_keys<T, Tile>, ceil_div(p.k_len, Tile::rows) * p.kv_heads * p.batch,
                               relative_key_bytes<Tile>()))
    return error;
  if (const int error = launch(attention_relative_queries<T, Tile>, ceil_div(p.q_len, Tile::rows) * p.heads * p.batch,
                               relative_query_bytes<Tile>()))
    return error;
  if (!p.grad_rel_q && !p.grad_rel_k && !p.grad_diag) return cudaSuccess;
  if (const int error = launch(attention_relative_distances<T, Tile>, ceil_div(w.length, Tile::rows) * w.slots,
                               ByDistance<T, Tile>::bytes))
    return error;
  const auto sum = [&](const float* sums, const TableGradient& of) {
    return sum_table(p, {sums, w.work.group_batch, w.work.group_heads, w.work.parts, w.length, int(of.features)}, of,
                     stream);
  };
  if (const int error = sum(w.work.of_queries,
                            {p.grad_rel_q, p.rel_index, p.rel_q_batch, p.rel_q_heads, p.rel_rows, p.head_dim, p.scale}))
    return error;
  if (const int error = sum(w.work.of_keys,
                            {p.grad_rel_k, p.rel_index, p.rel_k_batch, p.rel_k_heads, p.rel_rows, p.head_dim, p.scale}))
    return error;
  return sum(w.work.of_bias, {p.grad_diag, p.diag_index, 1, p.diag_heads, p.diag_rows, 1, 1});
}

template <class T>
int with_width(const AttentionProblem& p, const RelativeWorkspace& w, cudaStream_t stream) {
  const int64_t width = max_of(p.head_dim, p.value_dim);
  if (width <= 64) return launch_relative<T, RelativeBackward<64>>(p, w, stream);
  if (width <= 128) return launch_relative<T, RelativeBackward<128>>(p, w, stream);
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace pyext

extern "C" int64_t pyext_cuda_attention_relative_both_backward_workspace(const pyext::AttentionProblem& p) {
  return pyext::RelativeWorkspace(p, nullptr).bytes;
}

extern "C" int pyext_cuda_attention_relative_both_backward(const pyext::AttentionProblem& p, void* stream) {
  using namespace pyext;
  const auto s = static_cast<cudaStream_t>(stream);
  if (!p.rel_q.data || !p.rel_k.data ||
      !fits_tiles(p, p.query, p.key, p.value, p.out, p.grad_out, p.rel_query, p.rel_q, p.rel_k, p.grad_rel_query))
    return cudaErrorInvalidValue;
  const RelativeWorkspace w(p, p.workspace);
  return with_half(p.dtype, [&](auto element) { return with_width<decltype(element)>(p, w, s); });
}
