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

template <class T, int width>
struct RelativeQueryOther {
  using P = Panels<width>;
  static constexpr int band_stages = 4;
  T rel_queries[P::block_bytes / sizeof(T)], bands[band_stages][P::step_bytes / sizeof(T)];
  T gradients[kThreads / 128][SkewedGradients<T>::elements];
  float products[BandRing<>::shared_bytes(kThreads / 128) / sizeof(float)];
  uint64_t barriers[2 * band_stages];
  QueryItem item;

  PYEXT_DEVICE Ring<band_stages> band_ring() { return {barriers, barriers + band_stages}; }
  PYEXT_DEVICE T* band(unsigned n) { return bands[n % band_stages]; }
};

template <class T, int width, bool tables>
__global__ void __launch_bounds__(kBlockThreads, 1)
    attention_backward_relative_queries_sm90(const __grid_constant__ AttentionProblem p,
                                             const __grid_constant__ Sources from, const float* delta, const float* lse,
                                             float* slots) {
  using P = Panels<width>;
  PYEXT_SHARED(char, data);
  const Shared<T, width, RelativeQueryOther<T, width>> shared{data};
  auto& other = shared.other();
  auto& item = other.item;
  const auto bands = other.band_ring();
  shared.initialise([&] { bands.initialise(kWarps); });
  const Ring<1> items = shared.blocks();
  const Ring<kStages> key_ring = shared.ring(0), value_ring = shared.ring(1);

  const auto produce = [&] {
    const int heads = int(p.heads), blocks = int(ceil_div(p.q_len, kBlockRows));
    const int per_head = int(gridDim.x) / (int(p.batch) * heads), pair = int(blockIdx.x) / per_head;
    const int head = pair % heads, batch = pair / heads, kv_head = head / (heads / int(p.kv_heads));
    unsigned count = 0, n = 0, band = 0;
    // The last queries first: under a causal mask they have most to do.
    for (int block = blocks - 1 - int(blockIdx.x) % per_head; block >= 0; block -= per_head, ++n) {
      const int first = block * kBlockRows;
      const Range seen = find_visible<kBlockRows>(p, batch, first);
      if (threadIdx.x % 32) continue;
      const auto load = [&](T* to, const ptx::TensorMap& map) {
        load_panels<P::count, kBlockRows, kStepRows>(to, map, items.barrier(n), first, head, batch);
      };
      const auto load_step = [&](const Ring<kStages>& ring, T* to, const ptx::TensorMap& map, int row) {
        ring.wait_empty(count);
        ptx::mbarrier_expect(ring.barrier(count), P::step_bytes);
        load_panels<P::count, kStepRows, kStepRows>(to, map, ring.barrier(count), row, kv_head, batch);
      };
      const auto next_band = [&](int distance) {
        load_band<P::count>(bands, band, other.band(band), from.rel_rows, p, distance, head, batch);
        ++band;
      };
      items.wait_empty(n);
      item.first = first, item.head = head, item.batch = batch, item.seen = seen;
      ptx::mbarrier_expect(items.barrier(n), 3 * P::block_bytes);
      load(shared.block(0), from.query), load(shared.block(1), from.grad), load(other.rel_queries, from.rel_query);
      const Interval tiles = item.tiles();
      for (int tile = tiles.begin; tile < tiles.end; ++tile, ++count) {
        const int key = tile * kStepRows, distance = key - first;  // of the upper band of the first warpgroup
        if (tile == tiles.begin) next_band(distance - 2 * kBand), next_band(distance - kBand);
        next_band(distance);
        load_step(key_ring, shared.step(0, count), from.key, key);
        load_step(value_ring, shared.step(1, count), from.value, key);
      }
    }
    if (threadIdx.x % 32) return;
    items.wait_empty(n);
    item.first = -1;
    ptx::mbarrier_arrive(items.barrier(n));
  };

  const auto consume = [&] {
    const int own = threadIdx.x / 32 * 16, group = threadIdx.x / 128;
    const BandRing<kBackwardOrder> products(other.products);
    const SkewedGradients<T> gradients{other.gradients[group]};
    const T* const rel_queries = other.rel_queries + group * 64 * kPanel;
    float* const slot = slots + blockIdx.x * RelativeRows(p).count * p.head_dim;
    unsigned count = 0, n = 0, lower = 0;  // of tiles, blocks, and the lower band
    float grad_query[1][width / 8][4], grad_rel_query[1][width / 8][4], s[1][kN][4], ds[1][kN][4];
    uint32_t left[1][kN / 2][4];

    // f(sum, its place) of the band's sums in memory, from row `first` on, that a lane has; two features at a time.
    const auto for_each_sum = [&](int first, const auto& f) {
      float* const at = slot + (first + own % 64 + lane_row()) * p.head_dim + lane_column();
#pragma unroll
      for (int j = 0; j < width / 8; ++j) {
        if (first < 0 || 8 * j >= p.head_dim) break;
#pragma unroll
        for (int half = 0; half < 2; ++half)
          f(s[0][j] + 2 * half, reinterpret_cast<float2*>(at + half * 8 * p.head_dim + 8 * j));
      }
    };
    // The n-th band of this warpgroup is over: dS' of the tiles before number `tile` times its rows and queries.
    const auto issue_band = [&](unsigned band, unsigned tile) {
      ptx::wgmma_pin(flat(grad_rel_query)), ptx::wgmma_pin(flat(s));
      ptx::wgmma_fence();
      issue_shared_product<T, false, kBand>(grad_rel_query, gradients.lower(tile), other.band(band));
      if constexpr (tables) issue_shared_product<T, true, kBlockRows>(s, gradients.lower(tile), rel_queries);
    };
    const auto read_sums = [&](int row) {
      if constexpr (tables) for_each_sum(row, [](float* sum, const float2* at) { sum[0] = at->x, sum[1] = at->y; });
    };
    const auto finish_band = [&](unsigned band, int row) {
      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(flat(grad_rel_query)), ptx::wgmma_pin(flat(s));
      if constexpr (tables) for_each_sum(row, [](const float* sum, float2* at) { *at = {sum[0], sum[1]}; });
      __syncwarp();
      bands.release(band);
    };
    const auto clear = [&](auto& sum) {
#pragma unroll
      for (int j = 0; j < int(sizeof(sum) / 16); ++j) sum[0][j][0] = sum[0][j][1] = sum[0][j][2] = sum[0][j][3] = 0;
    };
    // dS' of a tile that nobody sees: what the first tile's lower band, or the last one's upper band, lacks.
    const auto store_nothing = [&](unsigned tile) {
      const uint32_t nothing[kN / 2][4] = {};
      gradients.store(nothing, tile);
    };

    if constexpr (tables) {
      clear(s);
      for (int row = group * kBand; row < RelativeRows(p).count; row += kThreads / 128 * kBand)
        for_each_sum(row, [](const float* sum, float2* at) { *at = {sum[0], sum[1]}; });
    }
    for (;; ++n) {
      items.wait_full(n);
      const int first = item.first;
      if (first < 0) break;
      const Range seen = item.seen;
      const Interval tiles = item.tiles();
      float row_lse[2], row_delta[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int batch = item.batch, row = first + own + lane_row() + 8 * half;
        const int64_t at = (batch * p.heads + item.head) * p.q_len + row;
        row_lse[half] = row < p.q_len ? lse[at] : 0.0f, row_delta[half] = row < p.q_len ? delta[at] : 0.0f;
        if (threadIdx.x % 4 == 0) item.keys[own + lane_row() + 8 * half] = visible(p, batch, row);
      }
      __syncwarp();
      clear(grad_query), clear(grad_rel_query);
      const LeftOperand<T, width, true> queries(shared.block(0)), grads(shared.block(1));
      const LeftOperand<T, width, !tables> left_queries(other.rel_queries);  // registers are short
      // Products of the queries and a band, for tiles `tile` and the one before.
      const auto multiply_band = [&](unsigned band, unsigned tile) {
        bands.wait_full(band);
        ptx::wgmma_pin(flat(s));
        ptx::wgmma_fence();
        left_queries.issue_transposed(s, other.band(band));
        ptx::wgmma_wait<0>();
        ptx::wgmma_pin(flat(s));
        __syncwarp();  // all lanes have read what is overwritten
        products.store(s[0], tile + 1);
        __syncwarp();
      };
      const int row = RelativeRows(p).origin - first - (group + 1) * kBand;  // of the lower band of tile 0
      if (tiles.begin < tiles.end) {
        // The second warpgroup's queries are a band further down; the first one does not need the first band.
        if (group == 0) {
          bands.wait_full(lower);
          __syncwarp();
          bands.release(lower++);
        }
        multiply_band(lower, count - 1);
        ptx::bar_sync(3, kThreads);
        store_nothing(count - 1);
      }
#pragma unroll 1
      for (int tile = tiles.begin; tile < tiles.end; ++tile, ++count, ++lower) {
        const int first_key = tile * kStepRows;
        multiply_band(lower + 1, count);
        key_ring.wait_full(count);
        ptx::wgmma_pin(flat(s)), ptx::wgmma_pin(flat(ds));
        ptx::wgmma_fence();
        queries.issue_transposed(s, shared.step(0, count));
        value_ring.wait_full(count);
        ptx::wgmma_fence();
        grads.issue_transposed(ds, shared.step(1, count));
        ptx::wgmma_wait<1>();
        ptx::wgmma_pin(flat(s));
        products.add_to(s[0], count);
        scale_rows(s, float(p.scale) * kLog2e);
#pragma unroll
        for (int j = 0; j < kN; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) s[0][j][e] = ptx::exp2_approx(s[0][j][e] - row_lse[e / 2]);
        }
        // The branch ends a block of instructions: without it, the compiler moves the wait in front of the
        // exponentials.
        if (!seen.covers(first_key, first_key + kStepRows)) {
#pragma unroll
          for (int half = 0; half < 2; ++half)
            hide_unseen(s[0], half, item.keys[own + lane_row() + 8 * half], first_key, 0);
        }
        ptx::wgmma_pin(flat(s));
        ptx::wgmma_wait<0>();
        ptx::wgmma_pin(flat(ds));
        value_ring.release(count);
#pragma unroll
        for (int j = 0; j < kN; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) ds[0][j][e] = s[0][j][e] * (ds[0][j][e] - row_delta[e / 2]);
        }
        as_left<T>(left, ds);
        ptx::wgmma_pin(left[0]), ptx::wgmma_pin(flat(grad_query));
        ptx::wgmma_fence();
        issue_product(grad_query, left, shared.step(0, count));
        // All products with dS' are over; and the sums of a band that the first warpgroup has made are there.
        ptx::bar_sync(3, kThreads);
        read_sums(row + first_key);
        gradients.store(left[0], count);
        ptx::fence_proxy_async();
        ptx::bar_sync(1 + group, 128);  // all of the warpgroup have stored theirs
        issue_band(lower, count);
        finish_band(lower, row + first_key);
        ptx::wgmma_pin(flat(grad_query));
        key_ring.release(count);
      }
      if (tiles.begin < tiles.end) {
        ptx::bar_sync(3, kThreads);
        read_sums(row + tiles.end * kStepRows);
        store_nothing(count);
        ptx::fence_proxy_async();
        ptx::bar_sync(1 + group, 128);
        issue_band(lower, count);
        finish_band(lower++, row + tiles.end * kStepRows);
        if (group == 1) {
          bands.wait_full(lower);
          __syncwarp();
          bands.release(lower++);
        }
      }
      const float scaled[1][2] = {{float(p.scale), float(p.scale)}};
      const auto store = [&](const Output& to, const auto& sum) {
        store_rows(rows_of<T>(to, item.batch, item.head), to.row, int64_t(item.first) + own, p.q_len, p.head_dim, sum,
                   scaled);
      };
      store(p.grad_query, grad_query), store(p.grad_rel_query, grad_rel_query);
      __syncwarp();
      items.release(n);
    }
  };
  in_roles(produce, [] {}, consume);
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

// Blocks of threads that add up relative rows' gradients in slots of their own: enough to fill any GPU.
constexpr int64_t kSlots = 256;

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

template <class T, int width, bool tables>
int launch_queries(const AttentionProblem& p, const Sources& from, const HopperRelativeWorkspace& w,
                   cudaStream_t stream) {
  const int64_t blocks = w.per_head * p.heads * p.batch;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return ptx::launch(attention_backward_relative_queries_sm90<T, width, tables>, dim3(unsigned(blocks)),
                     dim3(kBlockThreads), Shared<T, width, RelativeQueryOther<T, width>>::bytes, stream, p, from,
                     w.base.delta, w.base.lse, w.slots);
}

int sum_slots(const AttentionProblem& p, const HopperRelativeWorkspace& w, cudaStream_t stream) {
  const int64_t entries = p.rel_q_batch * p.rel_q_heads * RelativeRows(p).count * p.head_dim;
  if (ceil_div(entries, 256) > INT32_MAX) return cudaErrorInvalidValue;
  const int error = ptx::launch(attention_relative_sum_slots, dim3(unsigned(ceil_div(entries, 256))), dim3(256), 0,
                                stream, p, w.slots, w.per_head, w.by_distance);
  if (error) return error;
  const RelativeGroups groups{p.rel_q_batch, p.rel_q_heads, 1};
  return sum_by_rows(w.by_distance, groups, p.rel_index, w.length, p.rel_q_batch, p.rel_q_heads, p.rel_rows, p.head_dim,
                     p.scale, p.grad_rel_q, stream);
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
  return sum_slots(p, w, stream);
}

}  // namespace
}  // namespace pyext

extern "C" int64_t pyext_cuda_attention_relative_backward_sm90_workspace(const pyext::AttentionProblem& p) {
  using namespace pyext;
  const bool takes = takes_relative_rows(p) && max_of(p.head_dim, p.value_dim) <= 64 &&
                     fits_tiles(p, p.out, p.grad_out, p.grad_rel_query) &&
                     fits_map(p.grad_out, p.batch, p.heads, p.q_len);
  return takes ? HopperRelativeWorkspace(p, nullptr).base.bytes : -1;
}

extern "C" int pyext_cuda_attention_relative_backward_sm90(const pyext::AttentionProblem& p, void* stream) {
  using namespace pyext;
  const auto s = static_cast<cudaStream_t>(stream);
  if (pyext_cuda_attention_relative_backward_sm90_workspace(p) < 0) return cudaErrorInvalidValue;
  const HopperRelativeWorkspace w(p, p.workspace);
  return with_half(p.dtype, [&](auto element) { return launch_backward<decltype(element), 64>(p, w, s); });
}
