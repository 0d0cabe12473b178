// Attention backward with relative rows of queries for sm_90a (Hopper), deterministic. As without them there is one
// kernel for dK and dV (attention_hopper_keys.h) and one for what belongs to queries, which also has the gradient of
// relative rows: every block of threads adds up its own, by distance, and then those of all blocks are added up.
//
//   S = scale (Q K^T + skewed(rel_query R^T)), and with dS' = dS skewed to distances
//   dQ = scale dS K, d rel_query = scale dS' R, dR = scale dS'^T rel_query
// Sources: Shah et al., "FlashAttention-3" (2024), section 3.2; Dai et al., "Transformer-XL" (2019), appendix B.
#include "attention_hopper_keys.h"
#include "attention_relative_sum.h"

namespace pyext {
namespace {

// --- dQ, d rel_query and dR: the block's rows are queries, relative queries and gradients ---

// A block of queries and what they see; none: first < 0. What is read again when it is needed costs no registers.
struct alignas(16) QueryItem {
  Range seen;
  Interval keys[kBlockRows];
  int first, head, batch;

  // Of keys.
  PYEXT_DEVICE Interval tiles() const {
    const int begin = seen.begin / kStepRows;
    return {begin, seen.end ? (seen.end - 1) / kStepRows + 1 : begin};
  }
};

// Which gradients a kernel has: registers and shared memory do not hold all of more than 64 features. There, queries
// and their gradients come through the place of relative queries, on their way to registers.
template <class T_, int width_, bool of_queries_, bool of_rel_queries_, bool of_rows_>
struct RelativeQueryTile {
  using T = T_;
  static constexpr int width = width_, panels = Panels<width>::count;
  static constexpr bool of_queries = of_queries_, of_rel_queries = of_rel_queries_, of_rows = of_rows_;
  static constexpr int blocks_of_rows = width <= 64 ? 3 : 1, stages = of_queries ? kStages : 1;
  static constexpr int band_stages = of_rel_queries ? 4 : 3;
  using Products = BandRing<kBackwardOrder, (width > 64 && of_rel_queries)>;  // elsewhere memory is not short

  struct Other {
    T bands[band_stages][kBand * panels * kPanel];
    T gradients[of_rel_queries ? kThreads / 128 : 1][of_rel_queries ? SkewedGradients<T>::elements : 8];
    float products[Products::shared_bytes(kThreads / 128) / sizeof(float)];
    uint64_t barriers[2 * band_stages];
    QueryItem item;

    PYEXT_DEVICE Ring<band_stages> band_ring() { return {barriers, barriers + band_stages}; }
    PYEXT_DEVICE T* band(unsigned n) { return bands[n % band_stages]; }
  };
  using Memory = Shared<T, width, Other, blocks_of_rows, stages>;
};

template <class Tile>
struct RelativeQueryProducer {
  using T = typename Tile::T;
  using P = Panels<Tile::width>;
  const AttentionProblem& p;
  const Sources& from;
  const typename Tile::Memory& shared;
  unsigned count = 0, n = 0, band = 0;  // of tiles, of what the block's memory has held, of bands
  int first = 0, head = 0, batch = 0;

  PYEXT_DEVICE void load_rows(int place, const ptx::TensorMap& map) const {
    load_panels<P::count, kBlockRows, kStepRows>(shared.block(place), map, shared.blocks().barrier(n), first, head,
                                                 batch);
  }
  PYEXT_DEVICE void load_item() {
    const Ring<1> items = shared.blocks();
    if constexpr (Tile::blocks_of_rows == 3) {
      ptx::mbarrier_expect(items.barrier(n), 3 * P::block_bytes);
      load_rows(0, from.query), load_rows(1, from.grad), load_rows(2, from.rel_query);
    } else {
      ptx::mbarrier_expect(items.barrier(n), P::block_bytes);
      load_rows(0, from.query);
      for (int i = 0; i < 2; ++i) {
        items.wait_empty(++n);
        ptx::mbarrier_expect(items.barrier(n), P::block_bytes);
        load_rows(0, i == 0 ? from.grad : from.rel_query);
      }
    }
    ++n;
  }
  PYEXT_DEVICE void load_step(int i, const ptx::TensorMap& map, int row, int kv_head) const {
    const auto ring = shared.ring(i);
    ring.wait_empty(count);
    ptx::mbarrier_expect(ring.barrier(count), P::step_bytes);
    load_panels<P::count, kStepRows, kStepRows>(shared.step(i, count), map, ring.barrier(count), row, kv_head, batch);
  }
  PYEXT_DEVICE void next_band(int distance) {
    auto& other = shared.other();
    load_band<P::count>(other.band_ring(), band, other.band(band), from.rel_rows, p, distance, head, batch);
    ++band;
  }

  PYEXT_DEVICE void run() {
    const int heads = int(p.heads), blocks = int(ceil_div(p.q_len, kBlockRows));
    const int per_head = int(gridDim.x) / (int(p.batch) * heads), pair = int(blockIdx.x) / per_head;
    head = pair % heads, batch = pair / heads;
    QueryItem& item = shared.other().item;
    // The last queries first: under a causal mask they have most to do.
    for (int block = blocks - 1 - int(blockIdx.x) % per_head; block >= 0; block -= per_head) {
      first = block * kBlockRows;
      const Range seen = find_visible<kBlockRows>(p, batch, first);
      if (threadIdx.x % 32) continue;
      shared.blocks().wait_empty(n);
      item.first = first, item.head = head, item.batch = batch, item.seen = seen;
      load_item();
      const Interval tiles = item.tiles();
      for (int tile = tiles.begin; tile < tiles.end; ++tile, ++count) {
        const int key = tile * kStepRows, distance = key - first;  // of the upper band of the first warpgroup
        if (tile == tiles.begin) next_band(distance - 2 * kBand), next_band(distance - kBand);
        next_band(distance);
        load_step(0, from.key, key, head / (heads / int(p.kv_heads)));
        load_step(1, from.value, key, head / (heads / int(p.kv_heads)));
      }
    }
    if (threadIdx.x % 32) return;
    shared.blocks().wait_empty(n);
    item.first = -1;
    ptx::mbarrier_arrive(shared.blocks().barrier(n));
  }
};

template <class Tile>
struct RelativeQueryConsumer {
  using T = typename Tile::T;
  static constexpr int width = Tile::width;
  template <bool in_registers>
  using Left = LeftOperand<T, width, in_registers>;
  using Rows = float[1][width / 8][4];
  using Scores = float[1][kN][4];

  const AttentionProblem& p;
  const typename Tile::Memory& shared;
  float* const slots;  // of sums by distance, (rows of a head in bands, features) for each block of threads
  const float *const lse, *const delta;
  typename Tile::Other& other = shared.other();
  QueryItem& item = other.item;
  const Ring<Tile::band_stages> bands = other.band_ring();
  const SkewedGradients<T> gradients{other.gradients[Tile::of_rel_queries ? threadIdx.x / 128 : 0]};
  const int own = threadIdx.x / 32 * 16, group = threadIdx.x / 128;
  unsigned count = 0, n = 0, lower = 0;  // of tiles, of what the block's memory has held, of the lower band
  float row_lse[2] = {}, row_delta[2] = {};

  template <int N>
  static PYEXT_DEVICE void clear(float (&sum)[1][N][4]) {
#pragma unroll
    for (int j = 0; j < N; ++j) sum[0][j][0] = sum[0][j][1] = sum[0][j][2] = sum[0][j][3] = 0;
  }
  // f(two neighbouring sums, their place) of those that a lane has of a panel of a band, from row `first` of the slot
  // on.
  template <class F>
  PYEXT_DEVICE void for_each_sum(Scores& sums, int first, int panel, const F& f) const {
    if (first < 0) return;  // before all distances
    const int columns = int(p.head_dim) - panel * kPanel;
    int block = blockIdx.x;
    if (width > 64) ptx::hide_value(block);  // registers are short
    float* const at = slots + (block * RelativeRows(p).count + first + own % 64 + lane_row()) * p.head_dim +
                      panel * kPanel + lane_column();
#pragma unroll
    for (int j = 0; j < kPanel / 8; ++j) {
      if (8 * j >= columns) break;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        f(sums[0][j] + 2 * half, reinterpret_cast<float2*>(at + half * 8 * p.head_dim + 8 * j));
    }
  }
  PYEXT_DEVICE void read_sums(Scores& sums, int first, int panel) const {
    for_each_sum(sums, first, panel, [](float* sum, const float2* at) { sum[0] = at->x, sum[1] = at->y; });
  }
  PYEXT_DEVICE void store_sums(Scores& sums, int first, int panel) const {
    for_each_sum(sums, first, panel, [](const float* sum, float2* at) { *at = {sum[0], sum[1]}; });
  }

  // The next of queries, gradients and relative queries, all three of which an item has.
  template <bool in_registers>
  PYEXT_DEVICE Left<in_registers> next_rows(int i) {
    if (Tile::blocks_of_rows == 1 && i > 0) {
      __syncwarp();
      shared.blocks().release(n);
      shared.blocks().wait_full(++n);
    }
    return Left<in_registers>(shared.block(i % Tile::blocks_of_rows));
  }

  // Made anew each time: registers are short.
  PYEXT_DEVICE auto products() const {
    int thread = threadIdx.x;
    ptx::hide_value(thread);
    return typename Tile::Products(other.products, thread);
  }

  PYEXT_DEVICE void read_vectors() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = item.first + own + lane_row() + 8 * half;
      const int64_t at = (item.batch * p.heads + item.head) * p.q_len + row;
      row_lse[half] = row < p.q_len ? lse[at] : 0.0f;
      row_delta[half] = row < p.q_len ? delta[at] : 0.0f;
      if (threadIdx.x % 4 == 0) item.keys[own + lane_row() + 8 * half] = visible(p, item.batch, row);
    }
    __syncwarp();
  }
  PYEXT_DEVICE void leave_band() {
    bands.wait_full(lower);
    __syncwarp();
    bands.release(lower++);
  }
  // Products of the queries and a band, for tiles `tile` and the next one.
  template <class Queries>
  PYEXT_DEVICE void multiply_band(const Queries& rel_queries, unsigned band, unsigned tile) {
    Scores sum;
    Queries left = rel_queries;
    if constexpr (width > 64) ptx::hide_value(left.rows);  // or descriptors would stay in registers
    bands.wait_full(band);
    ptx::wgmma_pin(flat(sum));
    ptx::wgmma_fence();
    left.issue_transposed(sum, other.band(band));
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(flat(sum));
    __syncwarp();  // all lanes have read what is overwritten
    products().store(sum[0], tile + 1);
    __syncwarp();
    if (!Tile::of_rel_queries) bands.release(lower++);  // nobody needs it again
  }

  // dS of a tile, as a left operand.
  template <class Queries, class Grads>
  PYEXT_DEVICE void make_gradients(uint32_t (&left)[1][kN / 2][4], const Queries& queries, const Grads& grads,
                                   const Range& seen, int first_key) const {
    const auto key_ring = shared.ring(0), value_ring = shared.ring(1);
    Scores s, ds;
    key_ring.wait_full(count);
    ptx::wgmma_pin(flat(s)), ptx::wgmma_pin(flat(ds));
    ptx::wgmma_fence();
    queries.issue_transposed(s, shared.step(0, count));
    value_ring.wait_full(count);
    ptx::wgmma_fence();
    grads.issue_transposed(ds, shared.step(1, count));
    ptx::wgmma_wait<1>();
    ptx::wgmma_pin(flat(s));
    products().add_to(s[0], count);
    scale_rows(s, float(p.scale) * kLog2e);
#pragma unroll
    for (int j = 0; j < kN; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[0][j][e] = ptx::exp2_approx(s[0][j][e] - row_lse[e / 2]);
    }
    // The branch ends a block of instructions: without it, the compiler moves the wait in front of the exponentials.
    const Range& range = width <= 64 ? seen : item.seen;  // as registers allow
    if (!range.covers(first_key, first_key + kStepRows)) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        hide_unseen(s[0], half, item.keys[own + lane_row() + 8 * half], first_key, 0);
    }
    ptx::wgmma_pin(flat(s));
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(flat(ds));
    if (!Tile::of_queries) key_ring.release(count);
    value_ring.release(count);
#pragma unroll
    for (int j = 0; j < kN; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) ds[0][j][e] = s[0][j][e] * (ds[0][j][e] - row_delta[e / 2]);
    }
    as_left<T>(left, ds);
  }

  // The lower band of a tile is over, whose dS is `left`: all dS' of it times its rows, and the relative queries. Its
  // sums begin at row `first`.
  PYEXT_DEVICE void finish_band(Rows& grad_rel_query, const uint32_t (&left)[1][kN / 2][4], int first) {
    [[maybe_unused]] Scores sums;
    // All products with dS' are over; and the sums of a band that the first warpgroup has made are there.
    ptx::bar_sync(3, kThreads);
    if constexpr (Tile::of_rows) read_sums(sums, first, 0);
    gradients.store(left[0], count);
    ptx::fence_proxy_async();
    ptx::bar_sync(1 + group, 128);  // all of the warpgroup have stored theirs
    ptx::wgmma_pin(flat(grad_rel_query)), ptx::wgmma_pin(flat(sums));
    ptx::wgmma_fence();
    issue_shared_product<T, false, kBand>(grad_rel_query, gradients.lower(count), other.band(lower));
    if constexpr (Tile::of_rows) {
#pragma unroll
      for (int panel = 0; panel < Tile::panels; ++panel) {
        if (panel > 0) {
          read_sums(sums, first, panel);
          ptx::wgmma_pin(flat(sums));
          ptx::wgmma_fence();
        }
        const T* const rel_queries = shared.block(Tile::blocks_of_rows - 1) + group * 64 * kPanel;
        issue_shared_product<T, true, kBlockRows>(sums, gradients.lower(count),
                                                  rel_queries + panel * kBlockRows * kPanel);
        ptx::wgmma_wait<0>();
        ptx::wgmma_pin(flat(sums));
        store_sums(sums, first, panel);
      }
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(flat(grad_rel_query));
    __syncwarp();
    bands.release(lower++);
  }

  // An item's tiles of keys.
  template <class Queries, class Grads, class RelQueries>
  PYEXT_DEVICE void attend(const Queries& queries, const Grads& grads, const RelQueries& rel_queries, Rows& grad_query,
                           Rows& grad_rel_query) {
    const Range seen = item.seen;
    const Interval tiles = item.tiles();
    const int row = RelativeRows(p).origin - item.first - (group + 1) * kBand;  // of the lower band of tile 0
    uint32_t left[1][kN / 2][4] = {};
    // The second warpgroup's queries are a band further down; the first one does not need the first band.
    if (group == 0) leave_band();
    multiply_band(rel_queries, lower, count - 1);
    if constexpr (Tile::of_rel_queries) {
      ptx::bar_sync(3, kThreads);
      gradients.store(left[0], count - 1);  // nothing, of a tile before the first one
    }
#pragma unroll 1
    for (int tile = tiles.begin; tile < tiles.end; ++tile, ++count) {
      multiply_band(rel_queries, Tile::of_rel_queries ? lower + 1 : lower, count);
      make_gradients(left, queries, grads, seen, tile * kStepRows);
      if constexpr (Tile::of_queries) {
        ptx::wgmma_pin(left[0]), ptx::wgmma_pin(flat(grad_query));
        ptx::wgmma_fence();
        issue_product(grad_query, left, shared.step(0, count));
      }
      if constexpr (Tile::of_rel_queries) finish_band(grad_rel_query, left, row + tile * kStepRows);
      if constexpr (Tile::of_queries) {
        ptx::wgmma_wait<0>();
        ptx::wgmma_pin(flat(grad_query));
        shared.ring(0).release(count);
      }
    }
    if constexpr (Tile::of_rel_queries) {
      const uint32_t nothing[1][kN / 2][4] = {};
      finish_band(grad_rel_query, nothing, row + tiles.end * kStepRows);
    }
    if (group == 1) leave_band();
  }

  PYEXT_DEVICE void run() {
    if constexpr (Tile::of_rows) {
      Scores nothing;
      clear(nothing);
      for (int row = group * kBand; row < RelativeRows(p).count; row += kThreads / 128 * kBand) {
#pragma unroll 1
        for (int panel = 0; panel < Tile::panels; ++panel) store_sums(nothing, row, panel);
      }
    }
    for (;; ++n) {
      shared.blocks().wait_full(n);
      if (item.first < 0) break;
      read_vectors();
      Rows grad_query, grad_rel_query;
      clear(grad_query), clear(grad_rel_query);
      const auto queries = next_rows<true>(0), grads = next_rows<true>(1);
      const auto rel_queries = next_rows<width <= 64>(2);
      if (item.seen.end) attend(queries, grads, rel_queries, grad_query, grad_rel_query);
      if constexpr (Tile::of_queries) store(p.grad_query, grad_query);
      if constexpr (Tile::of_rel_queries) store(p.grad_rel_query, grad_rel_query);
      __syncwarp();
      shared.blocks().release(n);
    }
  }
  PYEXT_DEVICE void store(const Output& to, const Rows& sum) const {
    const float scaled[1][2] = {{float(p.scale), float(p.scale)}};
    store_rows(rows_of<T>(to, item.batch, item.head), to.row, int64_t(item.first) + own, p.q_len, p.head_dim, sum,
               scaled);
  }
};

template <class Tile>
__global__ void __launch_bounds__(kBlockThreads, 1)
    attention_backward_relative_queries_sm90(const __grid_constant__ AttentionProblem p,
                                             const __grid_constant__ Sources from, const float* delta, const float* lse,
                                             float* slots) {
  PYEXT_SHARED(char, data);
  const typename Tile::Memory shared{data};
  shared.initialise([&] { shared.other().band_ring().initialise(kWarps); });
  in_roles([&] { RelativeQueryProducer<Tile>{p, from, shared}.run(); }, [] {},
           [&] { RelativeQueryConsumer<Tile>{p, shared, slots, lse, delta}.run(); });
}

// --- The sums of all blocks of threads ---

// by_distance[b, h, u] = the sum of the rows of distance u in the slots of all heads that share table (b, h), in order.
__global__ void __launch_bounds__(256)
    attention_relative_sum_slots(const __grid_constant__ AttentionProblem p, const float* slots, int64_t per_head,
                                 float* by_distance) {
  const RelativeRows rows(p);
  const int64_t features = p.head_dim, length = p.q_len + p.k_len - 1, at = blockIdx.x * int64_t(256) + threadIdx.x;
  const int64_t row = at / features % rows.count, table = at / features / rows.count;
  if (table >= p.rel_q_batch * p.rel_q_heads) return;
  const int64_t distance = row / 32 * 32 + distance_of_row<kBackwardOrder>(int(row % 32)) - rows.origin;
  const int64_t u = distance + p.q_len - 1;
  if (u < 0 || u >= length) return;
  const int64_t batches = p.batch / p.rel_q_batch, heads = p.heads / p.rel_q_heads;
  const int64_t first_batch = table / p.rel_q_heads, first_head = table % p.rel_q_heads;
  float sum = 0;
  for (int64_t b = first_batch; b < first_batch + batches; ++b) {
    const float* from =
        slots + (b * p.heads + first_head) * per_head * rows.count * features + at % (rows.count * features);
    for (int64_t n = 0; n < heads * per_head; ++n) sum += from[n * rows.count * features];
  }
  by_distance[(table * length + u) * features + at % features] = sum;
}

// --- Launch ---

// Blocks of threads that add up relative rows' gradients in slots of their own: enough to fill a Hopper. A slot is as
// large as the written rows in fp32, so there are no more.
constexpr int64_t kSlots = 132;

struct HopperRelativeWorkspace {
  AttentionWorkspace base;
  char* rows;  // written out
  // (batch, heads, per_head, rows of a head, features), and by distance of each table. Null: not wanted.
  float *slots = nullptr, *by_distance = nullptr;
  int64_t per_head, length;

  HopperRelativeWorkspace(const AttentionProblem& p, void* memory)
      : base(p, memory, true, ceil_div(p.q_len, kStepRows)),
        per_head(ceil_div(p.q_len, kBlockRows)),
        length(p.q_len + p.k_len - 1) {
    const RelativeRows all(p);
    base.take(memory, rows, all.bytes);
    if (!p.grad_rel_q) return;
    per_head = max_of(1, min_of(per_head, kSlots / (p.batch * p.heads)));
    base.take(memory, slots, p.batch * p.heads * per_head * all.count * p.head_dim);
    base.take(memory, by_distance, p.rel_q_batch * p.rel_q_heads * length * p.head_dim);
  }
};

template <class Tile>
int launch_queries(const AttentionProblem& p, const Sources& from, const HopperRelativeWorkspace& w,
                   cudaStream_t stream) {
  const int64_t blocks = w.per_head * p.heads * p.batch;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return ptx::launch(attention_backward_relative_queries_sm90<Tile>, dim3(unsigned(blocks)), dim3(kBlockThreads),
                     Tile::Memory::bytes, stream, p, from, w.base.delta, w.base.lse, w.slots);
}
template <class T, int width, bool of_rows>
int launch_queries(const AttentionProblem& p, const Sources& from, const HopperRelativeWorkspace& w,
                   cudaStream_t stream) {
  if constexpr (width <= 64) {
    return launch_queries<RelativeQueryTile<T, width, true, true, of_rows>>(p, from, w, stream);
  } else {
    if (const int error = launch_queries<RelativeQueryTile<T, width, true, false, false>>(p, from, w, stream))
      return error;
    return launch_queries<RelativeQueryTile<T, width, false, true, of_rows>>(p, from, w, stream);
  }
}

int sum_rows(const AttentionProblem& p, const HopperRelativeWorkspace& w, cudaStream_t stream) {
  const int64_t entries = p.rel_q_batch * p.rel_q_heads * RelativeRows(p).count * p.head_dim;
  if (ceil_div(entries, 256) > INT32_MAX) return cudaErrorInvalidValue;
  const int error = ptx::launch(attention_relative_sum_slots, dim3(unsigned(ceil_div(entries, 256))), dim3(256), 0,
                                stream, p, w.slots, w.per_head, w.by_distance);
  if (error) return error;
  return sum_table(p, {w.by_distance, p.rel_q_batch, p.rel_q_heads, 1, w.length, int(p.head_dim)},
                   {p.grad_rel_q, p.rel_index, p.rel_q_batch, p.rel_q_heads, p.rel_rows, p.head_dim, p.scale}, stream);
}

template <class T, int width>
int launch_backward(const AttentionProblem& p, const HopperRelativeWorkspace& w, cudaStream_t stream) {
  Sources from;
  cudaError_t error = map_sources<T>(from, p);
  if (!error) error = map_relative<T>(&from.rel_rows, &from.rel_query, p, w.rows, kStepRows);
  if (error) return error;
  if (const int failed = prepare<T>(p, w.base, stream)) return failed;
  const int64_t bytes = RelativeRows(p).bytes;
  if (const int failed = expand_rows<T, kBackwardOrder>(p, p.rel_q, p.rel_q_heads, bytes, w.rows, stream))
    return failed;
  if (const int failed = launch_keys<T, width, false, true>(p, from, w.base, stream)) return failed;
  if (!p.grad_rel_q) return launch_queries<T, width, false>(p, from, w, stream);
  if (const int failed = launch_queries<T, width, true>(p, from, w, stream)) return failed;
  return sum_rows(p, w, stream);
}

}  // namespace
}  // namespace pyext

extern "C" int64_t pyext_cuda_attention_relative_backward_sm90_workspace(const pyext::AttentionProblem& p) {
  using namespace pyext;
  const bool takes = takes_relative_rows(p) && fits_tiles(p, p.out, p.grad_out, p.grad_rel_query) &&
                     fits_map(p.grad_out, p.batch, p.heads, p.q_len);
  return takes ? HopperRelativeWorkspace(p, nullptr).base.bytes : -1;
}

extern "C" int pyext_cuda_attention_relative_backward_sm90(const pyext::AttentionProblem& p, void* stream) {
  using namespace pyext;
  const auto s = static_cast<cudaStream_t>(stream);
  if (pyext_cuda_attention_relative_backward_sm90_workspace(p) < 0) return cudaErrorInvalidValue;
  const HopperRelativeWorkspace w(p, p.workspace);
  return with_half(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (max_of(p.head_dim, p.value_dim) <= 64) return launch_backward<T, 64>(p, w, s);
    return launch_backward<T, 128>(p, w, s);
  });
}
