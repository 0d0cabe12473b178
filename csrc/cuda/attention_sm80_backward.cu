// Attention backward for sm_80 and later, in five products: see attention_backward_turns.h. All blocks go from the last
// queries to the first ones. Blocks of neighbouring keys are then one step apart, and under a causal mask those with
// most to do begin.
//
//   P = exp2(S - lse), dP = dO V^T, dS = P (dP - delta), delta = <dO, O> - dLSE
//   dV = P^T dO, dK = scale dS^T Q, dQ = scale dS K
// Source: Dao, "FlashAttention-2" (2023), algorithm 2.
#include "attention_backward_turns.h"

namespace pyext {
namespace {

// A tile of keys by a step of queries. Of both, S and its like have rows of keys: 16 m of them for each warp, and the
// queries, and the features of dK and dV, are divided among query_warps. dQ has rows of queries, and a warp has
// 16 query_m of them and a part of the features. unroll: steps of 16 features whose fragments are in registers at once.
template <int width_, int m, int key_warps, int query_warps_, int queries_, int query_m, int blocks_, int unroll_>
struct BackwardTile {
  static constexpr int width = width_, M = m, query_warps = query_warps_, warps = key_warps * query_warps,
                       threads = 32 * warps, blocks = blocks_, unroll = unroll_;
  static constexpr int keys = 16 * M * key_warps, queries = queries_;
  static constexpr int N = queries / 8 / query_warps, J = width / 8 / query_warps;
  static constexpr int QM = query_m, row_warps = queries / (16 * QM), features = width / (warps / row_warps);
  static constexpr int QN = features / 8, part = queries * width;
  static_assert(warps % row_warps == 0 && QN * 8 * (warps / row_warps) == width && keys % 32 == 0, "all of dQ");
  static_assert(queries <= threads, "a thread per query");
  static PYEXT_DEVICE int thread() { return threadIdx.x; }

  using Stage = QueryStageOf<keys, queries>;
  using Sums = DiagonalSums<warps, M, N, false, query_warps>;
  struct Shared {  // behind the tiles; what registers would have to keep for a whole step is here, too
    Stage stages[2];
    int* past;
    int64_t parts, slots;  // where they begin; not addresses, which would not be known to be global ones
    int ticket, batch, kv_head, first_key, first_head, told;
    int lowest, highest;  // of the steps whose queries see one of the keys
  };
  static constexpr int shared_bytes(bool diagonals) {
    return 2 * (tile_elements<width>(2 * keys + 4 * queries) + tile_elements<queries>(keys)) + int(sizeof(Shared)) +
           (diagonals ? int(sizeof(float)) * Sums::floats : 0);
  }
};

// From Hopper on the compiler needs more registers for itself: it is given less at once, and sums are read late.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kFewRegisters = true;
#else
constexpr bool kFewRegisters = false;
#endif

// --- Keys by queries ---

// What a step needs besides its tiles: read early, stored late.
template <class Tile, bool biased>
struct QueriesAhead {
  StripAhead<Tile::threads, Tile::Stage::strip_entries> strip;
  float lse = 0, delta = 0;
  Interval seen{};

  PYEXT_DEVICE void read(const AttentionProblem& p, const AttentionWorkspace& w, int64_t batch, int64_t head,
                         int64_t first, int64_t first_key) {
    if (biased)
      strip.read(w.strips + (p.diag_heads == 1 ? 0 : head * w.strip_length), w.strip_length,
                 strip_start(p, first + Tile::queries - 1, first_key));
    if (threadIdx.x >= Tile::queries) return;
    const int64_t row = first + threadIdx.x, at = (batch * p.heads + head) * p.q_len + row;
    lse = row < p.q_len ? w.lse[at] : 0.0f, delta = row < p.q_len ? w.delta[at] : 0.0f;
    seen = given(p, batch, row);
  }
  PYEXT_DEVICE void store(typename Tile::Stage& stage, const AttentionProblem& p, int64_t first) const {
    if (biased) strip.store(stage.strip);
    if (threadIdx.x >= Tile::queries) return;
    stage.lse[threadIdx.x] = lse, stage.delta[threadIdx.x] = delta;
    stage.seen[threadIdx.x] = visible(p, first + threadIdx.x, seen);
  }
};

// Where dP - delta begins.
template <int M, int N, class Stage>
PYEXT_DEVICE void start_with_delta(float (&ds_t)[M][N][4], const Stage& stage, int first_query) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float delta = stage.delta[first_query + 8 * j + lane_column() + e];
#pragma unroll
      for (int i = 0; i < M; ++i) ds_t[i][j][e] = ds_t[i][j][e + 2] = -delta;
    }
  }
}
template <int M, int N>
PYEXT_DEVICE void multiply_elements(float (&a)[M][N][4], const float (&b)[M][N][4]) {
#pragma unroll
  for (int i = 0; i < M; ++i) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) a[i][j][e] *= b[i][j][e];
    }
  }
}

// Adds dP^T = V dO^T of a warp's keys and queries; with few registers of one half of the queries after the other.
template <class Tile, class T>
PYEXT_DEVICE void add_grad_weights(float (&sum)[Tile::M][Tile::N][4], const SharedTile<T, Tile::width>& values, int own,
                                   const SharedTile<T, Tile::width>& grads, int first_query) {
  constexpr int M = Tile::M, parts = kFewRegisters ? 2 : 1, N = Tile::N / parts;
  if constexpr (parts == 1) {
    multiply_transposed<M, N, Tile::unroll>(sum, values, own, SharedTile<T, Tile::width>{grads.at(first_query, 0)});
  } else {
#pragma unroll
    for (int half = 0; half < parts; ++half) {
      float part[M][N][4] = {};
      multiply_transposed<M, N, Tile::unroll>(part, values, own,
                                              SharedTile<T, Tile::width>{grads.at(first_query + half * 8 * N, 0)});
#pragma unroll
      for (int i = 0; i < M; ++i) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[i][half * N + j][e] += part[i][j][e];
        }
      }
    }
  }
}

// The sums of a tile along diagonals, on their way to a strip in global memory that nobody else adds to meanwhile.
template <class Tile>
struct DiagonalsAhead {
  static constexpr int count = (Tile::Sums::entries + Tile::threads - 1) / Tile::threads;
  float before[count];

  // f(n, entry of the tile, entry of the strip) for each of this thread's. Rows of the tile are keys: to the right
  // distances fall.
  template <class F>
  static PYEXT_DEVICE void for_each(const AttentionProblem& p, int first_query, int first_key, F f) {
    const auto last = uint32_t(strip_start(p, first_query, first_key) + Tile::keys);
#pragma unroll
    for (int n = 0; n < count; ++n) {
      const uint32_t i = n * Tile::threads + threadIdx.x, at = last - i;  // past 0 it is larger than any length
      if (i < Tile::Sums::entries && at < uint32_t(p.q_len + p.k_len - 1)) f(n, int(i), at);
    }
  }
  PYEXT_DEVICE void read(const float* strip, const AttentionProblem& p, int first_query, int first_key) {
    for_each(p, first_query, first_key, [&](int n, int, uint32_t at) { before[n] = strip[at]; });
  }
  PYEXT_DEVICE void add(float* strip, const typename Tile::Sums& sums, const AttentionProblem& p, int first_query,
                        int first_key) const {
    for_each(p, first_query, first_key, [&](int n, int i, uint32_t at) { strip[at] = before[n] + sums.of(i); });
  }
};

template <class T, class Tile, bool biased, bool diagonals>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    attention_backward(const __grid_constant__ AttentionProblem p, const __grid_constant__ BackwardWork w) {
  constexpr int width = Tile::width, M = Tile::M, N = Tile::N, kKeys = Tile::keys, kQueries = Tile::queries;
  PYEXT_SHARED(T, shared);
  const SharedTile<T, width> keys{shared}, values{keys.at(kKeys, 0)};
  const auto queries = [&](int n) { return SharedTile<T, width>{keys.at(2 * kKeys + n % 2 * kQueries, 0)}; };
  const auto grads = [&](int n) { return SharedTile<T, width>{keys.at(2 * kKeys + (2 + n % 2) * kQueries, 0)}; };
  const KeyRows<T, Tile> rows{{keys.at(2 * kKeys + 4 * kQueries, 0)}};
  auto& other = *reinterpret_cast<typename Tile::Shared*>(rows.tile.at(kKeys, 0));
  const typename Tile::Sums sums(reinterpret_cast<float*>(&other + 1));

  const auto [key_block, pair] = KeyBlock::take(p, w, other.ticket);
  const int first_key = key_block * kKeys, kv_head = pair % int(p.kv_heads), batch = pair / int(p.kv_heads);
  const int sharing = int(p.heads / p.kv_heads);
  if (threadIdx.x == 0) {
    const int64_t head = batch * p.heads + kv_head * sharing;
    other.batch = batch, other.kv_head = kv_head, other.first_key = first_key, other.first_head = kv_head * sharing,
    other.past = w.past + int64_t(pair) * w.key_blocks + key_block;
    other.parts = w.part(key_block % w.chains, p.batch * p.heads, head, 0, Tile::part) - w.parts;
    if (diagonals) other.slots = (head * w.of.slot_count + key_block % w.of.slot_count) * w.of.strip_length;
  }
  if (threadIdx.x < 32) {
    const int lowest = find_step<1>(w.ranges(batch), 0, w.steps, first_key, first_key + kKeys);
    const int highest = find_step<-1>(w.ranges(batch), w.steps - 1, w.steps, first_key, first_key + kKeys);
    if (threadIdx.x == 0) other.lowest = lowest, other.highest = highest;
  }
  __syncthreads();
  const auto range = [&](int block) {  // at once: everybody waits for it
    const int4 r = reinterpret_cast<const int4*>(w.ranges(other.batch))[block];
    return Range{r.x, r.y, r.z, r.w};
  };
  const auto after = [&](Step step) {
    if (--step.block < other.lowest) ++step.head, step.block = other.highest;
    return step;
  };
  // The step, whose queries see `seen`, or the next one whose queries see a key of this block.
  const auto settled = [&](Step step, Range seen) {
    while (step.head < sharing && !seen.meets(first_key, first_key + kKeys))
      step = after(step), seen = range(step.block);
    step.all = seen.covers(first_key, first_key + kKeys),
    step.first = first_key / kKeys - w.chains < seen.begin / kKeys;
    return step;
  };
  QueriesAhead<Tile, biased> ahead;
  const auto load = [&](const Step& step, int n) {
    if (step.head < sharing) {
      const int64_t batch = other.batch, head = other.first_head + step.head;  // which registers need not keep
      const int64_t first = int64_t(step.block) * kQueries;
      constexpr int at_once = kFewRegisters ? 1 : kQueries;
      const T* query = static_cast<const T*>(p.query.data) + batch * p.query.batch + head * p.query.head;
      const T* grad = static_cast<const T*>(p.grad_out.data) + batch * p.grad_out.batch + head * p.grad_out.head;
      load_tile<Tile::threads, kQueries, false, at_once>(queries(n), query, p.query.row, first, p.q_len, p.head_dim);
      load_tile<Tile::threads, kQueries, false, at_once>(grads(n), grad, p.grad_out.row, first, p.q_len, p.value_dim);
      ahead.read(p, w.of, batch, head, first, first_key);
    }
    ptx::cp_async_commit();
  };

  const T* key = static_cast<const T*>(p.key.data) + batch * p.key.batch + kv_head * p.key.head;
  const T* value = static_cast<const T*>(p.value.data) + batch * p.value.batch + kv_head * p.value.head;
  load_tile<Tile::threads, kKeys>(keys, key, p.key.row, first_key, p.k_len, p.head_dim);
  load_tile<Tile::threads, kKeys>(values, value, p.value.row, first_key, p.k_len, p.value_dim);
  Step next{other.highest < 0 ? sharing : 0, other.highest};
  if (next.head < sharing) next = settled(next, range(next.block));
  load(next, 0);
  ahead.store(other.stages[0], p, int64_t(next.block) * kQueries);
  const int own = rows.first_key(), row = own + lane_row(), column = rows.first_query();
  const bool waits = threadIdx.x % 32 == 0 && threadIdx.x < (diagonals ? 64 : 32);
  const bool tells = threadIdx.x == Tile::threads - 32;
  const auto passed = [&](const Step& step) { return (step.head + 1) * w.steps - step.block; };
  float grad_key[M][Tile::J][4] = {}, grad_value[M][Tile::J][4] = {};
  for (int n = 0;; ++n) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this step's tiles are there, for all, and all are done with the last one's
    if (next.head == sharing) break;
    if (tells && n > 0) ptx::store_release(other.past, other.told);
    const Step step = next;
    next = after(step);
    const Range seen = range(next.block);  // on its way
    const auto& stage = other.stages[n % 2];

    float p_t[M][N][4] = {};  // transposed: rows are keys
    multiply_transposed<M, N, Tile::unroll>(p_t, keys, own, SharedTile<T, width>{queries(n).at(column, 0)});
    to_weights<biased>(p_t, w.scale, stage, row, first_key, step.all, column);
    uint32_t left[M][N / 2][4];
    as_left<T>(left, p_t);
    if (Tile::query_warps > 1) rows.store(left);
    next = settled(next, seen);
    load(next, n + 1);
    rows.sync();  // P of these keys is there
    rows.add_product(grad_value, left, grads(n));
    ahead.store(other.stages[(n + 1) % 2], p, int64_t(next.block) * kQueries);
    float ds_t[M][N][4];
    start_with_delta(ds_t, stage, column);
    add_grad_weights<Tile>(ds_t, values, own, grads(n), column);
    multiply_elements(ds_t, p_t);
    as_left<T>(left, ds_t);
    rows.sync();  // all are done with P
    rows.store(left);
    float nothing[2 * M][2];
    if (diagonals) sums.sum_warp(ds_t, nothing);
    const int told = passed(step);
    if (tells) other.told = told;
    if (waits) {  // one warp for the sum of dQ, the next one for the slot
      const bool of_slot = threadIdx.x > 0;
      const int before = of_slot ? int(w.of.slot_count) : w.chains;
      if (of_slot ? first_key / kKeys >= before : !step.first)
        ptx::wait_above(other.past - before, (of_slot ? passed({step.head, 0}) : told) - 1);
    }
    __syncthreads();  // all warps' dS is there, and the sums are this block's to add to

    float* const part = w.parts + other.parts + (int64_t(step.head) * w.steps + step.block) * Tile::part;
    float* const slot = w.of.slots + other.slots + step.head * w.of.slot_count * w.of.strip_length;
    QuerySum<Tile> grad_query;
    DiagonalsAhead<Tile> strip;
    if (!kFewRegisters) grad_query.begin(step.first, part);
    if (diagonals && !kFewRegisters) strip.read(slot, p, step.block * kQueries, first_key);
    rows.add_product(grad_key, left, queries(n));
    if (diagonals && kFewRegisters) strip.read(slot, p, step.block * kQueries, first_key);
    if (diagonals) strip.add(slot, sums, p, step.block * kQueries, first_key);
    if (kFewRegisters) grad_query.begin(step.first, part);
    grad_query.add(rows.tile, keys);
    grad_query.store(part);
  }
  if (tells) {
    if (diagonals && first_key / kKeys >= w.of.slot_count) ptx::wait_above(other.past - w.of.slot_count, INT32_MAX - 1);
    ptx::store_release(other.past, INT32_MAX);
  }

  const int64_t b = other.batch, h = other.kv_head, first = other.first_key + own;
  const int feature = rows.first_feature();
  T* const to_key = static_cast<T*>(p.grad_key.data) + b * p.grad_key.batch + h * p.grad_key.head;
  T* const to_value = static_cast<T*>(p.grad_value.data) + b * p.grad_value.batch + h * p.grad_value.head;
  store_rows(to_key + feature, p.grad_key.row, first, p.k_len, p.head_dim - feature, grad_key,
             RowFactors<M>(float(p.scale)).of);
  store_rows(to_value + feature, p.grad_value.row, first, p.k_len, p.value_dim - feature, grad_value,
             RowFactors<M>(1).of);
}

// --- dQ of the sums ---

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::threads)
    attention_backward_finish(const __grid_constant__ AttentionProblem p, const __grid_constant__ BackwardWork w) {
  const int64_t step = blockIdx.x % w.steps, of_batch = blockIdx.x / w.steps;
  const int64_t head = of_batch % p.heads, batch = of_batch / p.heads;
  const QuerySum<Tile> sum = sum_chains<Tile>(w, w.ranges(batch)[step], [&](int chain) {
    return w.part(chain, p.batch * p.heads, of_batch, step, Tile::part);
  });
  T* const to = static_cast<T*>(p.grad_query.data) + batch * p.grad_query.batch + head * p.grad_query.head;
  store_rows(to + sum.column(), p.grad_query.row, step * Tile::queries + sum.row(), p.q_len, p.head_dim - sum.column(),
             sum.of, RowFactors<Tile::QM>(float(p.scale)).of);
}

// --- Launchers ---

// f(the tiles for the problem's features).
template <class F>
int with_tile(const AttentionProblem& p, F f) {
  const int64_t width = max_of(p.head_dim, p.value_dim);
  if (width <= 64) return f(BackwardTile<64, 2, 4, 1, 32, 1, 2, 2>());
  if (width <= 96) return f(BackwardTile<96, 2, 4, 2, 64, 2, 1, 2>());
  if (width <= 128) return f(BackwardTile<128, 2, 4, 2, 64, 2, 1, 1>());
  return cudaErrorInvalidValue;
}

template <class T, class Tile, bool biased, bool diagonals>
int launch_tiles(const AttentionProblem& p, const BackwardWork& w, cudaStream_t stream) {
  const int64_t pairs = p.batch * p.kv_heads, blocks = w.key_blocks * pairs, tiles = p.batch * p.heads * w.steps;
  if (blocks > INT32_MAX || tiles > INT32_MAX) return cudaErrorInvalidValue;
  const int64_t slots = p.batch * p.heads * w.of.slot_count * w.of.strip_length;
  if (const int error = clear(w, w.of.slots, slots, stream)) return error;
  if (blocks > 0) {
    if (const int error = ptx::launch(attention_backward<T, Tile, biased, diagonals>, dim3(unsigned(blocks)),
                                      dim3(Tile::threads), Tile::shared_bytes(diagonals), stream, p, w))
      return error;
  }
  if (tiles == 0) return cudaSuccess;
  return ptx::launch(attention_backward_finish<T, Tile>, dim3(unsigned(tiles)), dim3(Tile::threads), 0, stream, p, w);
}

template <class T, class Tile>
int launch_backward(const AttentionProblem& p, Tile tile, cudaStream_t stream) {
  const BackwardWork w(p, p.workspace, tile);
  if (const int error = prepare<T, Tile::queries>(p, w.of, stream)) return error;
  if (!p.diag) return launch_tiles<T, Tile, false, false>(p, w, stream);
  if (!p.grad_diag) return launch_tiles<T, Tile, true, false>(p, w, stream);
  if (const int error = launch_tiles<T, Tile, true, true>(p, w, stream)) return error;
  return sum_strips(p, w.of, stream);
}

}  // namespace
}  // namespace pyext

extern "C" int64_t pyext_cuda_attention_backward_workspace(const pyext::AttentionProblem& p) {
  int64_t bytes = 0;
  pyext::with_tile(p, [&](auto tile) {
    bytes = pyext::BackwardWork(p, nullptr, tile).of.bytes;
    return 0;
  });
  return bytes;
}

extern "C" int pyext_cuda_attention_backward(const pyext::AttentionProblem& p, void* stream) {
  using namespace pyext;
  const auto s = static_cast<cudaStream_t>(stream);
  if (p.rel_index || !fits_tiles(p, p.query, p.key, p.value, p.out, p.grad_out)) return cudaErrorInvalidValue;
  return with_half(p.dtype, [&](auto element) {
    return with_tile(p, [&](auto tile) { return launch_backward<decltype(element)>(p, tile, s); });
  });
}
