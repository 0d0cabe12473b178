// Attention backward with relative rows of queries for sm_80 and later, in eight products: see
// attention_backward_turns.h. Besides dQ, blocks of keys take turns at the gradients of rel_query and of segments, and
// at those of relative rows and of a diagonal bias by distance. A last kernel adds up the distances of a table's row.
//
//   S = scale (Q K^T + skewed(rel_query R^T)) + bias, and with dS' = dS skewed to distances
//   dQ = scale dS K, d rel_query = scale dS' R, dK = scale dS^T Q, dV = P^T dO, dR = scale dS'^T rel_query
//
// All blocks go from the first queries to the last ones: then the block of keys before has left a chunk of distances
// (attention_relative_window.h) by the time that it is past the step whose dQ this one adds to.
// Sources: Dao, "FlashAttention-2" (2023), algorithm 2; Dai et al., "Transformer-XL" (2019), appendix B; Shaw et al.,
// "Self-attention with relative position representations" (2018); Yang et al., "XLNet" (2019), section 2.5.
#include "attention_backward_turns.h"
#include "attention_relative_window.h"

namespace pyext {
namespace {

// Half of the warps have a step's dQ, the others its gradient of rel_query, and each of them some features.
template <class Tile>
struct HalfOfWarps {
  static constexpr int width = Tile::width, keys = Tile::keys, queries = Tile::queries, tile = queries * width;
  static constexpr int warps = Tile::warps / 2, threads = 32 * warps;
  static constexpr int QM = queries / 16, row_warps = 1, features = width / warps, QN = features / 8;
  static_assert(features % 16 == 0, "all of them");
  static PYEXT_DEVICE int thread() { return threadIdx.x % threads; }
  static PYEXT_DEVICE bool relative() { return threadIdx.x >= threads; }
};

struct RelativeTurnsWork : BackwardWork {
  WrittenRows rows{};
  // By distance, (batch, heads, chains, distances, width): of relative rows, and of a bias, without features. Distances
  // are those of whole blocks of keys and whole steps, the first one of them before that of the last query and key 0.
  int64_t distances, before;
  float *of_rows = nullptr, *of_bias = nullptr;
  // The same of a table that several of these share.
  float *rows_by_table = nullptr, *bias_by_table = nullptr;

  static AttentionProblem without_slots(AttentionProblem p) {
    p.grad_diag = nullptr;
    return p;
  }
  template <class Tile>
  RelativeTurnsWork(const AttentionProblem& p, void* base, Tile tile)
      : BackwardWork(without_slots(p), base, tile),
        distances(int64_t(steps) * Tile::queries + int64_t(key_blocks) * Tile::keys),
        before(int64_t(steps) * Tile::queries - p.q_len) {
    const int64_t slots = p.batch * p.heads * chains;
    if (p.grad_rel_q) {
      of.take(base, of_rows, slots * distances * Tile::width);
      of.take(base, rows_by_table, p.rel_q_batch * p.rel_q_heads * distances * Tile::width);
    }
    if (p.grad_diag) of.take(base, of_bias, slots * distances), of.take(base, bias_by_table, p.diag_heads * distances);
    char* written = nullptr;
    of.take(base, written, RelativeRows(p).bytes);
    rows.of_queries = written;
  }
};

// --- Keys by queries ---

template <class T, class Tile>
struct RelativeKeys {
  static constexpr int width = Tile::width, kKeys = Tile::keys, kQueries = Tile::queries, N = Tile::N;
  static constexpr bool kRegisters = Tile::kRegisters;
  using Rows = SharedTile<T, width>;
  using Half = HalfOfWarps<Tile>;

  const AttentionProblem& p;
  const RelativeTurnsWork& w;
  Pieces pieces;
  const Rows keys = tile(kKeys), values = tile(kKeys), stages = tile(2 * 3 * kQueries);
  const Band<T, Tile> band{tile(Tile::ring), p};
  const SharedTile<T, kQueries> ds_t{pieces.take<T>(2 * tile_elements<kQueries>(kKeys))};
  const Skewed<T, Tile> skewed{pieces.take<T>(2 * tile_elements<Tile::distances>(kQueries))};
  const StepBand<T, Tile> products{pieces.take<float>(4 * kKeys * Tile::band_pitch)};
  typename Tile::Info& info = *pieces.take<typename Tile::Info>(sizeof(typename Tile::Info));
  const std::conditional_t<kRegisters, const OwnKeys, const OwnKeys&> of{taken()};
  uint32_t left_keys[1][kRegisters ? width / 16 : 1][4];  // the warp's
  float grad_key[1][width / 8][4] = {}, grad_value[1][width / 8][4] = {};
  DistanceSums<T, Tile> by_distance;

  PYEXT_DEVICE RelativeKeys(const AttentionProblem& p, const RelativeTurnsWork& w, char* shared)
      : p(p), w(w), pieces{shared} {}
  PYEXT_DEVICE const OwnKeys& taken() {
    const auto [number, pair] = KeyBlock::take(p, w, info.ticket);
    const int kv_head = pair % int(p.kv_heads), sharing = int(p.heads / p.kv_heads);
    if (threadIdx.x == 0)
      info.of = {number, number * kKeys, pair, pair / int(p.kv_heads), kv_head, sharing, (kv_head + 1) * sharing};
    __syncthreads();
    return info.of;
  }
  PYEXT_DEVICE Rows tile(int rows) { return {pieces.take<T>(2 * tile_elements<width>(rows))}; }
  PYEXT_DEVICE Rows stage(int n, int which) const { return {stages.at((n % 2 * 3 + which) * kQueries, 0)}; }
  PYEXT_DEVICE Rows queries(int n) const { return stage(n, 0); }
  PYEXT_DEVICE Rows rel_queries(int n) const { return stage(n, 1); }
  PYEXT_DEVICE Rows grads(int n) const { return stage(n, 2); }
  static PYEXT_DEVICE int own() { return threadIdx.x / 32 * 16; }

  // --- Steps ---

  static PYEXT_DEVICE bool follows(const Step& step, const Step& next) {
    return next.head == step.head && next.block == step.block + 1;
  }
  PYEXT_DEVICE int index(const Step& step) const {
    return (step.head - of.heads_end + of.sharing) * w.steps + step.block;
  }
  // Entries of the ring rise where distances fall. `distance` is that of an entry.
  PYEXT_DEVICE int entry(const Step& step) const { return (w.steps - 1 - step.block) * kQueries; }
  PYEXT_DEVICE int64_t distance(int entry) const {
    return strip_start(p, int64_t(w.steps) * kQueries - 1, of.first_key) + entry;
  }
  // The step, or the next one whose queries see a key of this block.
  PYEXT_DEVICE Step settled(Step step) const {
    const Range* const ranges = w.ranges(of.batch);
    for (; step.head < of.heads_end; ++step.head, step.block = 0) {
      while (step.block < w.steps) {
        const int4 r = reinterpret_cast<const int4*>(ranges)[step.block];
        const Range seen{r.x, r.y, r.z, r.w};
        step.all = seen.covers(of.first_key, of.first_key + kKeys);
        step.first = of.number - w.chains < seen.begin / kKeys;
        if (seen.meets(of.first_key, of.first_key + kKeys)) return step;
        step.block = find_step<1>(ranges, step.block + 1, w.steps, of.first_key, of.first_key + kKeys);
      }
    }
    return step;
  }
  // follows: the step is that of the queries behind, and most of its distances are there.
  PYEXT_DEVICE void load(const Step& step, int n, bool follows) {
    const int64_t first = int64_t(step.block) * kQueries;
    copy_rows<Tile, kQueries>(queries(n), p.query, of.batch, step.head, first, p.q_len, p.head_dim);
    copy_rows<Tile, kQueries>(rel_queries(n), p.rel_query, of.batch, step.head, first, p.q_len, p.head_dim);
    copy_rows<Tile, kQueries>(grads(n), p.grad_out, of.batch, step.head, first, p.q_len, p.value_dim);
    const int at = entry(step);
    band.load(w.rows.rows_of_queries<T>(p, of.batch, step.head), at, distance(at),
              follows ? kQueries : Tile::distances);
    ptx::cp_async_commit();
  }
  PYEXT_DEVICE void read(RelativeQueriesAhead<Tile>& ahead, const Step& step) const {
    ahead.read(p, w.of, of.batch, step.head, int64_t(step.block) * kQueries, distance(entry(step)));
  }
  PYEXT_DEVICE void start() {
    copy_rows<Tile, kKeys>(keys, p.key, of.batch, of.kv_head, of.first_key, p.k_len, p.head_dim);
    copy_rows<Tile, kKeys>(values, p.value, of.batch, of.kv_head, of.first_key, p.k_len, p.value_dim);
    ptx::cp_async_commit();
    clear_corners<T, Tile>(skewed);
    if (threadIdx.x < Tile::distances) info.bias[threadIdx.x] = {0, int(threadIdx.x)};
    ptx::cp_async_wait<0>();
    __syncthreads();  // keys and values are there, for all
    if constexpr (kRegisters) read_left(left_keys, keys, own());
    if (threadIdx.x) return;
    info.past = w.past + int64_t(of.pair) * w.key_blocks + of.number;
    info.parts = w.part(of.number % w.chains, p.batch * p.heads, of.batch * p.heads, 0, Tile::part) - w.parts;
  }

  // --- Turns ---

  PYEXT_DEVICE bool has_before() const { return of.number >= w.chains; }
  PYEXT_DEVICE const int* before() const { return info.past - w.chains; }
  // More steps than so many must lie behind the block before. It leaves a chunk `lead` steps earlier than this one, and
  // the chunks behind that no later than this step. Of steps that this block tells to be past, the blocks before are
  // past all but `lead` for each: so whoever waits for one waits for all.
  PYEXT_DEVICE int needed(const Step& step, const Step& next) const {
    const int lead = w.chains * (kKeys / kQueries);
    return follows(step, next) ? index(step) - (step.first ? lead : 0) : max(index(step), index(next) - lead - 1);
  }

  // --- Products ---

  // P^T, and dP^T, which becomes dS^T.
  PYEXT_DEVICE void make_gradients(uint32_t (&left)[1][N / 2][4], const Step& step, int n) {
    const auto& stage = info.stages[n % 2];
    int row_ids[2];
    if (Tile::extras && p.segment)
      load_ids(row_ids, p.segment_k + of.batch * p.segment_k_batch, of.first_key + own() + lane_row(), p.k_len);
    products.multiply(rel_queries(n), band.from(entry(step)));
    float p_t[1][N][4] = {}, grads_t[1][N][4] = {};
    if constexpr (kRegisters)
      multiply_transposed(p_t, left_keys, queries(n));
    else
      multiply_both(p_t, queries(n), grads_t, grads(n));
    __syncthreads();  // all warps' products are there
    products.add_to(p_t);
    to_weights<Tile>(p_t, p, stage, row_ids, of.first_key, step.all);
    as_left<T>(left, p_t);
    multiply(grad_value, left, grads(n));
    if (kRegisters) multiply_transposed(grads_t, values, own(), grads(n));
    to_score_gradients(grads_t, p_t, stage);
    as_left<T>(left, grads_t);
    KeyRows<T, Tile>{ds_t}.store(left);
    skew<T, Tile>(skewed, left);
    if (Tile::extras && p.grad_segment) sum_segments(grads_t, row_ids, stage);
  }
  // Both at once: one waits for what it reads while the other multiplies.
  PYEXT_DEVICE void multiply_both(float (&s_t)[1][N][4], const Rows& queries, float (&grads_t)[1][N][4],
                                  const Rows& grads) const {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int k = 0; k < width; k += 16) {
      uint32_t left[2][1][1][4];
      const int row = own() + lane % 16, column = k + lane / 16 * 8;
      ptx::ldmatrix(left[0][0][0], keys.at(row, column)), ptx::ldmatrix(left[1][0][0], values.at(row, column));
      multiply_transposed(s_t, left[0], Rows{queries.at(0, k)});
      multiply_transposed(grads_t, left[1], Rows{grads.at(0, k)});
    }
  }
  // Of the warp's keys, by query: [0] those of another segment, [1] of the same one.
  PYEXT_DEVICE void sum_segments(const float (&grads_t)[1][N][4], const int (&row_ids)[2],
                                 const RelativeQueries<Tile>& stage) const {
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int query = 8 * j + lane_column() + e;
        float both[2] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const bool same = row_ids[half] == stage.segment_ids[query];
          const float x = grads_t[0][j][2 * half + e];
          both[0] += same ? 0 : x, both[1] += same ? x : 0;
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) {
#pragma unroll
          for (int lanes = 4; lanes < 32; lanes *= 2) both[k] += __shfl_xor_sync(~0u, both[k], lanes);
          if (lane_row() == 0) info.segments[threadIdx.x / 32][query][k] = both[k];
        }
      }
    }
  }

  // --- Sums that blocks take turns at ---

  // This block's parts of a step, and of the chunks that its window leaves before the next one.
  PYEXT_DEVICE void add_to_sums(const uint32_t (&left)[1][N / 2][4], const Step& step, int n, const Step& next) {
    int leaves = next.head != step.head ? Tile::chunks : min(next.block - step.block, Tile::chunks);
    const int lane = threadIdx.x % 32;
    float* const part = w.parts + info.parts + (int64_t(step.head) * w.steps + step.block) * Tile::part;
    // The chunk that the window leaves next.
    int64_t chunk = ((of.batch * p.heads + step.head) * w.chains + of.number % w.chains) * w.distances + of.first_key +
                    entry(step) + Tile::distances - kQueries;
    by_distance.begin(w.steps - 1 - step.block);
    QuerySum<Half> sum;
    float* const own_part = part + (Half::relative() ? Half::tile : 0);
    sum.begin(step.first, own_part);
    if (kRegisters && w.of_rows) by_distance.read(w.of_rows + chunk * width);
    multiply(grad_key, left, queries(n));
    if (Half::relative())
      add_product<Tile::distances>(
          sum.of,
          [&](uint32_t (&a)[4], int i, int k) { ptx::ldmatrix(a, skewed.at(i + lane % 16, k + lane / 16 * 8)); },
          [&](int k) { return Rows{band.from(entry(step) + k).at(0, sum.column())}; });
    else
      add_product<kKeys>(
          sum.of,
          [&](uint32_t (&a)[4], int i, int k) {
            ptx::ldmatrix_transposed(a, ds_t.at(k + lane / 16 * 8 + lane % 8, i + lane / 8 % 2 * 8));
          },
          [&](int k) { return Rows{keys.at(k, sum.column())}; });
    sum.store(own_part);
    if (Tile::extras && p.grad_segment && threadIdx.x < 2 * kQueries) {
      float& of_segment = part[2 * Half::tile + threadIdx.x];
      float own = step.first ? 0.0f : of_segment;
#pragma unroll
      for (int warp = 0; warp < Tile::warps; ++warp) own += info.segments[warp][threadIdx.x / 2][threadIdx.x % 2];
      of_segment = own;
    }
    const bool biased = Tile::extras && w.of_bias && threadIdx.x < Tile::distances;
    if (biased) info.bias[threadIdx.x].template add<Tile>(skewed);
    by_distance.add(skewed, rel_queries(n));
    if (!kRegisters && w.of_rows) by_distance.read(w.of_rows + chunk * width);
    for (;;) {
      if (w.of_rows) by_distance.store(w.of_rows + chunk * width);
      if (biased) info.bias[threadIdx.x].template store<Tile>(w.of_bias + chunk);
      by_distance.fall();
      if (--leaves == 0) break;
      chunk -= kQueries;
      if (w.of_rows) by_distance.read(w.of_rows + chunk * width);
    }
  }
  PYEXT_DEVICE void store() const {
    const float scaled[1][2] = {{float(p.scale), float(p.scale)}}, plain[1][2] = {{1, 1}};
    const int64_t first = of.first_key + own();
    store_rows(rows_of<T>(p.grad_key, of.batch, of.kv_head), p.grad_key.row, first, p.k_len, p.head_dim, grad_key,
               scaled);
    store_rows(rows_of<T>(p.grad_value, of.batch, of.kv_head), p.grad_value.row, first, p.k_len, p.value_dim,
               grad_value, plain);
  }
};

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::threads, 1)
    attention_relative_turns(const __grid_constant__ AttentionProblem p, const __grid_constant__ RelativeTurnsWork w) {
  PYEXT_SHARED(char, shared);
  RelativeKeys<T, Tile> block(p, w, shared);
  block.start();
  const bool tells = threadIdx.x == Tile::threads - 32;
  const Step none{block.of.heads_end, 0};
  Step next = block.settled({w.steps ? none.head - block.of.sharing : none.head, 0}), step = none;
  for (int n = 0;; ++n) {
    ptx::cp_async_wait<0>();
    __syncthreads();  // this step's tiles are there, for all, and all are done with the last one's
    const Step now = step;
    const bool idle = now.head == none.head, follows = block.follows(now, next);
    if (idle && next.head == none.head) break;
    if (tells && n > 0) ptx::store_release(block.info.past, block.index(idle ? next : now));
    // What comes next is copied now if its distances take the place of nothing that this step needs.
    const bool loads = idle || follows;
    if (loads) block.load(next, n + 1, follows);
    uint32_t left[1][Tile::N / 2][4];
    if (!idle) block.make_gradients(left, now, n);
    RelativeQueriesAhead<Tile> ahead;
    if (loads) block.read(ahead, next);
    if (!idle && threadIdx.x == 0 && block.has_before()) ptx::wait_above(block.before(), block.needed(now, next));
    __syncthreads();  // all warps' dS is there, and the sums are this block's to add to
    if (loads) ahead.store(p, int64_t(next.block) * Tile::queries, block.info.stages[(n + 1) % 2]);
    if (!idle) block.add_to_sums(left, now, n, next);
    step = loads ? next : none;
    if (loads) next = block.settled({next.head, next.block + 1});
  }
  if (tells) {
    if (block.has_before()) ptx::wait_above(block.before(), INT32_MAX - 1);
    ptx::store_release(block.info.past, INT32_MAX);
  }
  block.store();
}

// --- Gradients of queries of the sums ---

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::threads)
    attention_relative_finish(const __grid_constant__ AttentionProblem p, const __grid_constant__ RelativeTurnsWork w) {
  const int64_t step = blockIdx.x % w.steps, of_batch = blockIdx.x / w.steps;
  const int64_t head = of_batch % p.heads, batch = of_batch / p.heads, first = step * Tile::queries;
  const auto part = [&](int64_t chain) { return w.part(chain, p.batch * p.heads, of_batch, step, Tile::part); };
  using Half = HalfOfWarps<Tile>;
  const QuerySum<Half> sum = sum_chains<Half>(w, w.ranges(batch)[step],
                                              [&](int64_t n) { return part(n) + (Half::relative() ? Half::tile : 0); });
  const Output& to = Half::relative() ? p.grad_rel_query : p.grad_query;
  store_rows(rows_of<T>(to, batch, head) + sum.column(), to.row, first, p.q_len, p.head_dim - sum.column(), sum.of,
             RowFactors<Half::QM>(float(p.scale)).of);
  const int64_t query = first + threadIdx.x / 2;
  if (!Tile::extras || !p.grad_segment || threadIdx.x >= 2 * Tile::queries || query >= p.q_len) return;
  float both = 0;
  for_chains<Tile>(w, w.ranges(batch)[step], [&](int64_t n) { both += part(n)[2 * Half::tile + threadIdx.x]; });
  static_cast<float*>(p.grad_segment)[2 * (of_batch * p.q_len + query) + threadIdx.x % 2] = both;
}

// --- Launchers ---

// f(the tiles for the problem's features).
template <class F>
int with_tile(const AttentionProblem& p, F f) {
  const int64_t width = max_of(p.head_dim, p.value_dim);
  const bool extras = p.segment || p.diag;
  if (width <= 64) return extras ? f(RelativeTurns<64, 32, true>()) : f(RelativeTurns<64, 32, false>());
  if (width <= 128) return extras ? f(RelativeTurns<128, 16, true>()) : f(RelativeTurns<128, 16, false>());
  return cudaErrorInvalidValue;
}

// Sums by distance, of which each has `pitch` numbers -> those of a table with `batches` and `heads` of its own -> its
// gradient.
int sum_by_table(const AttentionProblem& p, const RelativeTurnsWork& w, const float* by_distance, float* by_table,
                 int pitch, const TableGradient& of, cudaStream_t stream) {
  if (!of.gradient) return cudaSuccess;
  if (const int error = sum_slots(by_distance, p.batch, p.heads, w.chains, w.distances * pitch, of.batches, of.heads,
                                  by_table, stream))
    return error;
  return sum_table(p, {by_table + w.before * pitch, of.batches, of.heads, 1, w.distances, pitch}, of, stream);
}

template <class T, class Tile>
int launch_relative(const AttentionProblem& p, Tile tile, cudaStream_t stream) {
  const RelativeTurnsWork w(p, p.workspace, tile);
  if (const int error = prepare<T, Tile::queries>(p, w.of, stream)) return error;
  if (const int error = write_rows<T, RowOrder::natural, RowOrder::natural>(p, w.rows, stream)) return error;
  const int64_t slots = p.batch * p.heads * w.chains * w.distances;
  if (const int error = clear(w, w.of_rows, w.of_rows ? slots * Tile::width : 0, stream)) return error;
  if (const int error = clear(w, w.of_bias, w.of_bias ? slots : 0, stream)) return error;
  const int64_t blocks = w.key_blocks * p.batch * p.kv_heads, tiles = p.batch * p.heads * w.steps;
  if (blocks > INT32_MAX || tiles > INT32_MAX) return cudaErrorInvalidValue;
  if (blocks > 0) {
    if (const int error = ptx::launch(attention_relative_turns<T, Tile>, dim3(unsigned(blocks)), dim3(Tile::threads),
                                      Tile::shared_bytes, stream, p, w))
      return error;
  }
  if (tiles > 0) {
    if (const int error = ptx::launch(attention_relative_finish<T, Tile>, dim3(unsigned(tiles)), dim3(Tile::threads), 0,
                                      stream, p, w))
      return error;
  }
  const TableGradient of_rows{p.grad_rel_q, p.rel_index, p.rel_q_batch, p.rel_q_heads, p.rel_rows, p.head_dim, p.scale};
  if (const int error = sum_by_table(p, w, w.of_rows, w.rows_by_table, Tile::width, of_rows, stream)) return error;
  const TableGradient of_bias{p.grad_diag, p.diag_index, 1, p.diag_heads, p.diag_rows, 1, 1};
  return sum_by_table(p, w, w.of_bias, w.bias_by_table, 1, of_bias, stream);
}

}  // namespace
}  // namespace pyext

extern "C" int64_t pyext_cuda_attention_relative_backward_workspace(const pyext::AttentionProblem& p) {
  int64_t bytes = 0;
  pyext::with_tile(p, [&](auto tile) {
    bytes = pyext::RelativeTurnsWork(p, nullptr, tile).of.bytes;
    return 0;
  });
  return bytes;
}

extern "C" int pyext_cuda_attention_relative_backward(const pyext::AttentionProblem& p, void* stream) {
  using namespace pyext;
  const auto s = static_cast<cudaStream_t>(stream);
  if (!p.rel_q.data || p.rel_k.data ||
      !fits_tiles(p, p.query, p.key, p.value, p.out, p.grad_out, p.rel_query, p.rel_q, p.grad_rel_query))
    return cudaErrorInvalidValue;
  return with_half(p.dtype, [&](auto element) {
    return with_tile(p, [&](auto tile) { return launch_relative<decltype(element)>(p, tile, s); });
  });
}
