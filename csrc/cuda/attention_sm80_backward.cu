// Attention backward for sm_80 and later, deterministic: no atomics, and every sum in a fixed order. One kernel has a
// block of keys and goes over the queries that see them (dK, dV), another has a block of queries and goes over their
// keys (dQ, and the sums of dS along diagonals, which are the bias's gradient). Both compute S and dP again.
//
//   P = exp2(S - lse), dP = dO V^T, dS = P (dP - delta), delta = <dO, O> - dLSE
//   dV = P^T dO, dK = scale dS^T Q, dQ = scale dS K
// Source: Dao, "FlashAttention-2" (2023), algorithm 2, with its loops apart.
#include "attention_backward.h"

namespace pyext {
namespace {

// --- dK and dV ---

template <int width>
constexpr int key_shared_bytes() {
  return 2 * tile_elements<width>(2 * kBlockRows + 4 * kStepRows) + 2 * int(sizeof(QueryStage));
}

// What a step needs besides its tiles, of kStepRows queries: read early, stored late.
template <bool biased>
struct QueriesAhead {
  StripAhead<kThreads, QueryStage::strip_entries> strip;
  float lse = 0, delta = 0;

  PYEXT_DEVICE void store(QueryStage& stage, const AttentionProblem& p, int64_t batch, int64_t first) const {
    if (biased) strip.store(stage.strip);
    if (threadIdx.x >= kStepRows) return;
    stage.lse[threadIdx.x] = lse, stage.delta[threadIdx.x] = delta;
    stage.seen[threadIdx.x] = visible(p, batch, first + threadIdx.x);
  }
};

template <class T, int width, bool biased>
__global__ void __launch_bounds__(kThreads, 1)
    attention_backward_keys(const __grid_constant__ AttentionProblem p, const float* strips, int64_t strip_length,
                            const float* delta, const float* lse, const Range* ranges) {
  using Ahead = QueriesAhead<biased>;
  PYEXT_SHARED(T, shared);
  const SharedTile<T, width> keys{shared}, values{keys.at(kBlockRows, 0)};
  const auto queries = [&](int n) { return SharedTile<T, width>{keys.at(2 * kBlockRows + n % 2 * kStepRows, 0)}; };
  const auto grads = [&](int n) { return SharedTile<T, width>{keys.at(2 * kBlockRows + (2 + n % 2) * kStepRows, 0)}; };
  auto* const stages = reinterpret_cast<QueryStage*>(keys.at(2 * kBlockRows + 4 * kStepRows, 0));

  const int key_blocks = int(ceil_div(p.k_len, kBlockRows)), kv_heads = int(p.kv_heads);
  const int first_key = blockIdx.x % key_blocks * kBlockRows, pair = blockIdx.x / key_blocks;
  const int kv_head = pair % kv_heads, batch = pair / kv_heads;
  const int query_blocks = int(ceil_div(p.q_len, kStepRows)), sharing = int(p.heads / p.kv_heads);
  const int heads_end = (kv_head + 1) * sharing;
  const auto range = [&](int block) {  // at once: everybody waits for it
    const int4 r = reinterpret_cast<const int4*>(ranges)[int64_t(batch) * query_blocks + block];
    return Range{r.x, r.y, r.z, r.w};
  };

  // The queries that see a key of this block: steps of one head, then of the next that shares the keys.
  struct Step {
    int head, block;
  };
  const auto settled = [&](Step step) {
    for (; step.head < heads_end; ++step.head, step.block = 0)
      for (; step.block < query_blocks; ++step.block)
        if (range(step.block).meets(first_key, first_key + kBlockRows)) return step;
    return step;
  };
  Ahead ahead;
  const auto load = [&](const Step& step, int n) {
    if (step.head < heads_end) {
      const int64_t first = int64_t(step.block) * kStepRows, row = first + threadIdx.x;
      const T* query = static_cast<const T*>(p.query.data) + batch * p.query.batch + step.head * p.query.head;
      const T* grad = static_cast<const T*>(p.grad_out.data) + batch * p.grad_out.batch + step.head * p.grad_out.head;
      load_tile<kThreads, kStepRows>(queries(n), query, p.query.row, first, p.q_len, p.head_dim);
      load_tile<kThreads, kStepRows>(grads(n), grad, p.grad_out.row, first, p.q_len, p.value_dim);
      if (biased)
        ahead.strip.read(strips + (p.diag_heads == 1 ? 0 : step.head * strip_length), strip_length,
                         strip_start(p, first + kStepRows - 1, first_key));
      if (threadIdx.x < kStepRows) {
        const int64_t at = (batch * p.heads + step.head) * p.q_len + row;
        ahead.lse = row < p.q_len ? lse[at] : 0.0f, ahead.delta = row < p.q_len ? delta[at] : 0.0f;
      }
    }
    ptx::cp_async_commit();
  };

  const T* key = static_cast<const T*>(p.key.data) + batch * p.key.batch + kv_head * p.key.head;
  const T* value = static_cast<const T*>(p.value.data) + batch * p.value.batch + kv_head * p.value.head;
  load_tile<kThreads, kBlockRows>(keys, key, p.key.row, first_key, p.k_len, p.head_dim);
  load_tile<kThreads, kBlockRows>(values, value, p.value.row, first_key, p.k_len, p.value_dim);
  Step step = settled({heads_end - sharing, 0});
  load(step, 0);
  ahead.store(stages[0], p, batch, int64_t(step.block) * kStepRows);

  const int own = threadIdx.x / 32 * 16, row = own + lane_row();
  const float scale = float(p.scale) * kLog2e;
  float grad_key[1][width / 8][4] = {}, grad_value[1][width / 8][4] = {};
  for (int n = 0; step.head < heads_end; ++n) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this step's tiles are there, for all, and all are done with the last one's
    const bool all = range(step.block).covers(first_key, first_key + kBlockRows);
    step = settled({step.head, step.block + 1});
    load(step, n + 1);
    const QueryStage& stage = stages[n % 2];

    float p_t[1][kN][4] = {};  // transposed: rows are keys
    multiply_transposed<1, kN>(p_t, keys, own, queries(n));
    ahead.store(stages[(n + 1) % 2], p, batch, int64_t(step.block) * kStepRows);
    to_weights<biased>(p_t, scale, stage, row, first_key, all);
    uint32_t left[1][kN / 2][4];
    as_left<T>(left, p_t);
    multiply(grad_value, left, grads(n));
    float ds_t[1][kN][4] = {};
    multiply_transposed<1, kN>(ds_t, values, own, grads(n));
    to_score_gradients(ds_t, p_t, stage);
    as_left<T>(left, ds_t);
    multiply(grad_key, left, queries(n));
  }
  ptx::cp_async_wait<0>();

  const float scaled[1][2] = {{float(p.scale), float(p.scale)}}, plain[1][2] = {{1, 1}};
  store_rows(static_cast<T*>(p.grad_key.data) + batch * p.grad_key.batch + kv_head * p.grad_key.head, p.grad_key.row,
             first_key + own, p.k_len, p.head_dim, grad_key, scaled);
  store_rows(static_cast<T*>(p.grad_value.data) + batch * p.grad_value.batch + kv_head * p.grad_value.head,
             p.grad_value.row, first_key + own, p.k_len, p.value_dim, grad_value, plain);
}

// --- dQ, and the gradients of strips ---

template <int width>
constexpr int query_shared_bytes(bool diagonals) {
  return 2 * tile_elements<width>(2 * kBlockRows + 4 * kStepRows) + int(sizeof(Visible<kThreads, kBlockRows>)) +
         int(sizeof(float)) * (2 * QueryTile::strip + (diagonals ? Diagonals::floats : 0));
}

template <class T, int width, bool biased, bool diagonals>
__global__ void __launch_bounds__(kThreads, 1)
    attention_backward_queries(const __grid_constant__ AttentionProblem p, const float* strips, int64_t strip_length,
                               const float* delta, const float* lse, float* slots) {
  using Tile = QueryTile;
  PYEXT_SHARED(T, shared);
  const SharedTile<T, width> queries{shared}, grads{queries.at(kBlockRows, 0)};
  const auto stage = [&](int n) { return SharedTile<T, width>{queries.at(2 * kBlockRows + n * kStepRows, 0)}; };
  using Seen = Visible<kThreads, kBlockRows>;
  Seen& seen = *reinterpret_cast<Seen*>(queries.at(2 * kBlockRows + 4 * kStepRows, 0));
  float* const strip = reinterpret_cast<float*>(&seen + 1);
  const Diagonals sums(strip + 2 * Tile::strip);

  const int64_t blocks = ceil_div(p.q_len, kBlockRows), pairs = p.batch * p.heads, per_head = gridDim.x / pairs;
  const int64_t slot = blockIdx.x % per_head, head = blockIdx.x / per_head % p.heads;
  const int64_t batch = blockIdx.x / per_head / p.heads, kv_head = head / (p.heads / p.kv_heads);
  const T* query = static_cast<const T*>(p.query.data) + batch * p.query.batch + head * p.query.head;
  const T* grad = static_cast<const T*>(p.grad_out.data) + batch * p.grad_out.batch + head * p.grad_out.head;
  const T* key = static_cast<const T*>(p.key.data) + batch * p.key.batch + kv_head * p.key.head;
  const T* value = static_cast<const T*>(p.value.data) + batch * p.value.batch + kv_head * p.value.head;
  if (biased) strips += p.diag_heads == 1 ? 0 : head * strip_length;
  if (diagonals) {
    slots += blockIdx.x * strip_length;
    for (int64_t u = threadIdx.x; u < strip_length; u += kThreads) slots[u] = 0;
  }

  // The last queries first: under a causal mask they have most to do.
  for (int64_t block = blocks - 1 - slot; block >= 0; block -= per_head) {
    const int64_t first = block * kBlockRows;
    __syncthreads();  // all are done with what the block before left in shared memory
    const Range range = find_visible(p, batch, first, seen);
    const int begin = range.begin / kStepRows, end = range.end ? (range.end - 1) / kStepRows + 1 : begin;
    StripAhead<kThreads, Tile::strip> ahead;
    const auto load = [&](int tile) {
      if (tile < end) {
        const int64_t at = int64_t(tile) * kStepRows;
        load_tile<kThreads, kStepRows>(stage(tile % 2), key, p.key.row, at, p.k_len, p.head_dim);
        load_tile<kThreads, kStepRows>(stage(2 + tile % 2), value, p.value.row, at, p.k_len, p.value_dim);
        if (biased) ahead.read(strips, strip_length, strip_start(p, first + kBlockRows - 1, at));
      }
      ptx::cp_async_commit();
    };
    load_tile<kThreads, kBlockRows>(queries, query, p.query.row, first, p.q_len, p.head_dim);
    load_tile<kThreads, kBlockRows>(grads, grad, p.grad_out.row, first, p.q_len, p.value_dim);
    load(begin);
    if (biased) ahead.store(strip + begin % 2 * Tile::strip);

    const int own = threadIdx.x / 32 * 16;
    float row_lse[2], row_delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first + own + lane_row() + 8 * half, at = (batch * p.heads + head) * p.q_len + row;
      row_lse[half] = row < p.q_len ? lse[at] : 0.0f, row_delta[half] = row < p.q_len ? delta[at] : 0.0f;
    }
    float grad_query[1][width / 8][4] = {}, carried[2][2] = {};
    for (int tile = begin; tile < end; ++tile) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // this step's tiles are there, for all, and all are done with the last one's
      load(tile + 1);
      float s[1][kN][4] = {}, ds[1][kN][4] = {};
      multiply_transposed<1, kN>(s, queries, own, stage(tile % 2));
      if (biased) ahead.store(strip + (tile + 1) % 2 * Tile::strip);
      finish_scores<Tile, biased>(s, float(p.scale) * kLog2e, strip + tile % 2 * Tile::strip, seen.of, tile * kStepRows,
                                  range.covers(tile * kStepRows, (tile + 1) * kStepRows));
      multiply_transposed<1, kN>(ds, grads, own, stage(2 + tile % 2));
#pragma unroll
      for (int j = 0; j < kN; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          ds[0][j][e] = ptx::exp2_approx(s[0][j][e] - row_lse[e / 2]) * (ds[0][j][e] - row_delta[e / 2]);
      }
      if (diagonals) sums.sum_warp(ds, carried);
      uint32_t left[1][kN / 2][4];
      as_left<T>(left, ds);
      multiply(grad_query, left, stage(tile % 2));
      if (diagonals) {
        __syncthreads();
        sums.add_to(slots, strip_length, Diagonals::start(p, first, int64_t(tile) * kStepRows));
      }
    }
    if (diagonals) {
      __syncthreads();  // all have added the last tile's
      sums.finish_warp(carried);
      __syncthreads();
      sums.add_to(slots, strip_length, Diagonals::start(p, first, int64_t(end) * kStepRows));
    }
    ptx::cp_async_wait<0>();
    const float scaled[1][2] = {{float(p.scale), float(p.scale)}};
    store_rows(static_cast<T*>(p.grad_query.data) + batch * p.grad_query.batch + head * p.grad_query.head,
               p.grad_query.row, first + own, p.q_len, p.head_dim, grad_query, scaled);
  }
}

// --- Launchers ---

template <class T, int width, bool biased>
int launch_keys(const AttentionProblem& p, const AttentionWorkspace& w, cudaStream_t stream) {
  const int64_t blocks = ceil_div(p.k_len, kBlockRows) * p.kv_heads * p.batch;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return ptx::launch(attention_backward_keys<T, width, biased>, dim3(unsigned(blocks)), dim3(kThreads),
                     key_shared_bytes<width>(), stream, p, w.strips, w.strip_length, w.delta, w.lse,
                     reinterpret_cast<const Range*>(w.ranges));
}

template <class T, int width, bool biased, bool diagonals>
int launch_queries(const AttentionProblem& p, const AttentionWorkspace& w, cudaStream_t stream) {
  const int64_t blocks = (diagonals ? w.slot_count : ceil_div(p.q_len, kBlockRows)) * p.heads * p.batch;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return ptx::launch(attention_backward_queries<T, width, biased, diagonals>, dim3(unsigned(blocks)), dim3(kThreads),
                     query_shared_bytes<width>(diagonals), stream, p, w.strips, w.strip_length, w.delta, w.lse,
                     w.slots);
}

template <class T, int width>
int launch_backward(const AttentionProblem& p, const AttentionWorkspace& w, cudaStream_t stream) {
  if (const int error = prepare<T>(p, w, stream)) return error;
  if (!p.diag) {
    if (const int error = launch_keys<T, width, false>(p, w, stream)) return error;
    return launch_queries<T, width, false, false>(p, w, stream);
  }
  if (const int error = launch_keys<T, width, true>(p, w, stream)) return error;
  if (!p.grad_diag) return launch_queries<T, width, true, false>(p, w, stream);
  if (const int error = launch_queries<T, width, true, true>(p, w, stream)) return error;
  return sum_strips(p, w, stream);
}

template <class T>
int with_width(const AttentionProblem& p, const AttentionWorkspace& w, cudaStream_t stream) {
  const int64_t width = max_of(p.head_dim, p.value_dim);
  if (width <= 64) return launch_backward<T, 64>(p, w, stream);
  if (width <= 96) return launch_backward<T, 96>(p, w, stream);
  if (width <= 128) return launch_backward<T, 128>(p, w, stream);
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace pyext

extern "C" int64_t pyext_cuda_attention_backward_workspace(const pyext::AttentionProblem& p) {
  return pyext::workspace_of(p, nullptr).bytes;
}

extern "C" int pyext_cuda_attention_backward(const pyext::AttentionProblem& p, void* stream) {
  using namespace pyext;
  const auto s = static_cast<cudaStream_t>(stream);
  if (p.rel_index || !fits_tiles(p, p.query, p.key, p.value, p.out, p.grad_out)) return cudaErrorInvalidValue;
  const AttentionWorkspace w = workspace_of(p, p.workspace);
  return with_half(p.dtype, [&](auto element) { return with_width<decltype(element)>(p, w, s); });
}
