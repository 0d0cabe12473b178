// Attention forward for sm_90a (Hopper): K and V come by TMA, products are wgmma, and warps have roles.
//
// A block stays on its multiprocessor and takes items of work, `rows` queries of one head each, the longest first. One
// warp produces: it takes the item, finds which keys it needs, and keeps rings of tiles of K, of V and of strips of
// biases filled. Consumers are warpgroups of 64 queries each. For a tile of keys they issue S = Q K^T and, behind it,
// O += P V of the tile before; while the latter runs they make weights of S. Warpgroups issue in turn, so that one's
// softmax runs beside another's products.
//
// Tiles go from the last to the first: under a causal mask, those that must ask who sees what come first.
// Source: Shah et al., "FlashAttention-3" (2024), algorithm 2.
#include "attention_hopper_relative.h"

namespace pyext {
namespace {

constexpr int kMargin = 256;  // of strips: more than a tile's rows or columns and the three that alignment may add
// Keys and values of heads at work at the same time should stay in the L2 cache.
constexpr int64_t kCacheBytes = 32 << 20;

// --- Order of work ---

// Items are blocks of queries of (batch, head) pairs. Groups of pairs, whose keys and values fit into the cache, come
// one after the other; in a group the last queries of all pairs come first: under a causal mask they have most to do.
struct Order {
  int blocks, pairs, group;

  Order(const AttentionProblem& p, int rows)
      : blocks(int(ceil_div(p.q_len, rows))), pairs(int(p.batch * p.heads)), group(pairs) {
    const int64_t bytes = 2 * p.k_len * (p.head_dim + p.value_dim), sharing = p.heads / p.kv_heads;
    group = int(max_of(1, min_of(pairs, kCacheBytes / bytes * sharing)));
  }
  __host__ __device__ int items() const { return blocks * pairs; }

  struct Item {
    int pair, first;
  };
  PYEXT_DEVICE Item at(int item, int rows) const {
    const int begin = item / (group * blocks) * group, size = min(group, pairs - begin), place = item - begin * blocks;
    return {begin + place % size, (blocks - 1 - place / size) * rows};
  }
};

// --- Shared memory ---

// What the producer tells the consumers of an item: which it is, and what its queries see. No more items: pair < 0.
template <int columns>
struct Work {
  int pair, first;
  Range seen;

  // Tiles of keys.
  PYEXT_DEVICE int begin() const { return seen.begin / columns; }
  PYEXT_DEVICE int end() const { return seen.end ? (seen.end - 1) / columns + 1 : begin(); }
};

// Rows of queries and keys, panels one after the other. columns: keys in a tile; relative: whether it has relative rows
// of queries.
template <int width_, int consumers_, int columns_, bool queries_in_registers_, bool relative_ = false>
struct HopperTile {
  static constexpr int width = width_, consumers = consumers_, columns = columns_;
  static constexpr bool queries_in_registers = queries_in_registers_, relative = relative_;
  static constexpr int rows = 64 * consumers, threads = 128 * (consumers + 1);
  static constexpr int panels = (width + kPanel - 1) / kPanel, strip = rows + columns + 4;
  static constexpr int producer_registers = consumers == 2 ? 40 : 32, consumer_registers = consumers == 2 ? 232 : 160;
  static constexpr int query_bytes = rows * panels * kPanelBytes, key_bytes = columns * panels * kPanelBytes;
  static constexpr int strip_at = query_bytes + 2 * kStages * key_bytes;
  static constexpr int rows_at = (strip_at + kStages * strip * int(sizeof(float)) + 1023) / 1024 * 1024;
  static constexpr int ring_at = rows_at + kRelativeStages * kBand * panels * kPanelBytes;
  static constexpr int work_at =
      relative ? ring_at + BandRing<>::shared_bytes(consumers) : strip_at + kStages * strip * int(sizeof(float));
  static constexpr int barriers = 2 + 3 * 2 * kStages + (relative ? 2 * kRelativeStages : 0);
  static constexpr int shared_bytes = work_at + 32 + barriers * int(sizeof(uint64_t));
  static_assert(!relative || (queries_in_registers && columns == kBand),
                "a band of relative rows for each tile of keys");
  static_assert(rows <= kMargin && columns + 4 <= kMargin, "strips are read within their margins");
};

template <class T, class Tile>
struct Shared {
  char* data;

  PYEXT_DEVICE T* queries() const { return reinterpret_cast<T*>(data); }
  PYEXT_DEVICE T* keys(unsigned tile) const { return stage(tile % kStages); }
  PYEXT_DEVICE T* values(unsigned tile) const { return stage(kStages + tile % kStages); }
  PYEXT_DEVICE float* strip(unsigned tile) const {
    return reinterpret_cast<float*>(data + Tile::strip_at) + tile % kStages * Tile::strip;
  }
  PYEXT_DEVICE auto* work() const { return reinterpret_cast<Work<Tile::columns>*>(data + Tile::work_at); }
  PYEXT_DEVICE Ring<1> items() const { return {barriers(), barriers() + 1}; }
  PYEXT_DEVICE Ring<kStages> key_ring() const { return ring(0); }
  PYEXT_DEVICE Ring<kStages> value_ring() const { return ring(1); }
  PYEXT_DEVICE Ring<kStages> strip_ring() const { return ring(2); }

  // Relative rows, kBand of them to a stage.
  PYEXT_DEVICE T* band(unsigned n) const {
    return reinterpret_cast<T*>(data + Tile::rows_at) + n % kRelativeStages * kBand * Tile::panels * kPanel;
  }
  PYEXT_DEVICE BandRing<> products() const { return BandRing<>(reinterpret_cast<float*>(data + Tile::ring_at)); }
  PYEXT_DEVICE Ring<kRelativeStages> band_ring() const {
    uint64_t* const first = barriers() + 2 + 3 * 2 * kStages;
    return {first, first + kRelativeStages};
  }

  PYEXT_DEVICE void initialise() const {
    if (threadIdx.x == 0) {
      constexpr int warps = 4 * Tile::consumers;
      items().initialise(warps);
#pragma unroll
      for (int i = 0; i < 3; ++i) ring(i).initialise(warps);
      if constexpr (Tile::relative) band_ring().initialise(warps);
      ptx::fence_mbarrier_init();
    }
    __syncthreads();
  }

 private:
  PYEXT_DEVICE T* stage(int i) const { return reinterpret_cast<T*>(data + Tile::query_bytes + i * Tile::key_bytes); }
  PYEXT_DEVICE uint64_t* barriers() const { return reinterpret_cast<uint64_t*>(data + Tile::work_at + 32); }
  PYEXT_DEVICE Ring<kStages> ring(int i) const {
    uint64_t* const first = barriers() + 2 + i * 2 * kStages;
    return {first, first + kStages};
  }
};

// --- The producer ---

struct Sources {
  ptx::TensorMap query, key, value, rel_query, rel_rows;  // the last two of tiles with relative rows only
};

template <class T, class Tile, bool biased>
PYEXT_DEVICE void produce(const AttentionProblem& p, const Sources& from, const Order& order, const float* strips,
                          int64_t pitch, int* next_item, const Shared<T, Tile>& shared) {
  constexpr int columns = Tile::columns;
  const bool leads = threadIdx.x % 32 == 0;
  unsigned count = 0, bands = 0;  // of tiles and bands, whatever the item
  int item = blockIdx.x;
  for (unsigned n = 0;; ++n) {  // of what the queries' memory has held
    const bool last = item >= order.items();
    Work<columns> work{-1, 0, Range::of_nobody()};
    if (!last) {
      const Order::Item at = order.at(item, Tile::rows);
      work = {at.pair, at.first, find_visible<Tile::rows>(p, at.pair / int(p.heads), at.first)};
    }
    if (leads) {
      shared.items().wait_empty(n);
      *shared.work() = work;
      if (last) ptx::mbarrier_arrive(shared.items().barrier(n));
    }
    if (last) return;
    if (leads) {
      const int heads = int(p.heads), head = work.pair % heads, batch = work.pair / heads;
      const int kv_head = head / (heads / int(p.kv_heads)), tiles = work.end() - work.begin();
      ptx::mbarrier_expect(shared.items().barrier(n), Tile::query_bytes);
      load_panels<Tile::panels, Tile::rows, Tile::rows>(shared.queries(), from.query, shared.items().barrier(n),
                                                        work.first, head, batch);
      [[maybe_unused]] const float* strip = nullptr;  // of tile 0
      if constexpr (biased) {
        const int64_t start = strip_start(p, int64_t(work.first) + Tile::rows - 1, 0) + kMargin;
        strip = strips + (p.diag_heads == 1 ? 0 : head * pitch) + start / 4 * 4;
      }
      // The band whose first product is that of the last tile's first key with the block's first query.
      [[maybe_unused]] const int last_band = work.end() - 1 - work.first / kBand;
      [[maybe_unused]] const auto load_band = [&](int i) {
        pyext::load_band<Tile::panels>(shared.band_ring(), bands, shared.band(bands), from.rel_rows, p,
                                       (last_band - i) * kBand, head, batch);
        ++bands;
      };
      if (Tile::relative && tiles > 0) load_band(0), load_band(1);
      // Values come a tile after their keys, as they are needed.
#pragma unroll 1
      for (int i = 0; i <= tiles; ++i) {
        if (i < tiles) {
          if constexpr (Tile::relative) load_band(i + 2);
          const int key = (work.end() - 1 - i) * columns;
          const Ring<kStages> keys = shared.key_ring();
          keys.wait_empty(count + i);
          ptx::mbarrier_expect(keys.barrier(count + i), Tile::key_bytes);
          load_panels<Tile::panels, columns, columns>(shared.keys(count + i), from.key, keys.barrier(count + i), key,
                                                      kv_head, batch);
          if constexpr (biased) {
            const Ring<kStages> ring = shared.strip_ring();
            ring.wait_empty(count + i);
            ptx::mbarrier_expect(ring.barrier(count + i), Tile::strip * int(sizeof(float)));
            ptx::bulk_load(shared.strip(count + i), strip + key, Tile::strip * int(sizeof(float)),
                           ring.barrier(count + i));
          }
        }
        if (Tile::relative && i == 0 && tiles > 0) {  // in the place of the queries, which are in registers by now
          shared.items().wait_empty(++n);
          ptx::mbarrier_expect(shared.items().barrier(n), Tile::query_bytes);
          load_panels<Tile::panels, Tile::rows, Tile::rows>(shared.queries(), from.rel_query, shared.items().barrier(n),
                                                            work.first, head, batch);
        }
        if (i > 0) {
          const int key = (work.end() - i) * columns;
          const Ring<kStages> values = shared.value_ring();
          values.wait_empty(count + i - 1);
          ptx::mbarrier_expect(values.barrier(count + i - 1), Tile::key_bytes);
          load_panels<Tile::panels, columns, columns>(shared.values(count + i - 1), from.value,
                                                      values.barrier(count + i - 1), key, kv_head, batch);
        }
      }
      count += unsigned(tiles);
      item = next_item ? int(gridDim.x) + atomicAdd(next_item, 1) : order.items();
    }
    item = __shfl_sync(~0u, item, 0), n = __shfl_sync(~0u, n, 0);
  }
}

// --- Consumers ---

template <class T, class Tile, bool biased>
struct Consumer {
  static constexpr int width = Tile::width, columns = Tile::columns, N = columns / 8;
  const AttentionProblem& p;
  const Shared<T, Tile>& shared;
  const int group = threadIdx.x / 128;
  uint32_t queries[Tile::queries_in_registers ? width / 16 : 1][4], rel_queries[Tile::relative ? width / 16 : 1][4];
  float s[1][N][4], out[1][width / 8][4], factor[1][2];
  uint32_t weights[1][N / 2][4];

  PYEXT_DEVICE void issue_scores(unsigned tile) {
    if constexpr (Tile::queries_in_registers)
      issue_transposed(s, queries, shared.keys(tile));
    else
      issue_transposed<T, width, Tile::rows>(s, shared.queries() + group * 64 * kPanel, shared.keys(tile));
  }

  // A band that the other warpgroup alone needs.
  PYEXT_DEVICE void leave_band(unsigned n) {
    shared.band_ring().wait_full(n);
    __syncwarp();  // a lane that comes late could find a later phase
    shared.band_ring().release(n);
  }

  // Products of the warpgroup's queries and the n-th band go to the ring of products. The band is what tile `count` has
  // of distances that the tile before it had not.
  PYEXT_DEVICE void multiply_band(unsigned n, unsigned count) {
    const Ring<kRelativeStages> ring = shared.band_ring();
    ring.wait_full(n);
    ptx::wgmma_pin(flat(s));
    ptx::wgmma_fence();
    issue_transposed(s, rel_queries, shared.band(n));
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(flat(s));
    ring.release(n);
    __syncwarp();  // all lanes have read what is overwritten
    shared.products().store(s[0], count);
    __syncwarp();
  }

  // The scores are there: makes weights of them. `keys`: what the queries of the lane's two rows see.
  PYEXT_DEVICE void finish_scores(OnlineSoftmax<1>& softmax, unsigned count, int tile, const Work<columns>& work,
                                  const Interval (&keys)[2]) {
    if constexpr (biased) {
      const int64_t start = strip_start(p, int64_t(work.first) + Tile::rows - 1, 0) + kMargin;
      shared.strip_ring().wait_full(count);
      add_strip<Tile::rows>(s, float(p.scale) * kLog2e, shared.strip(count) + start % 4);
      __syncwarp();
      shared.strip_ring().release(count);
    }
    if constexpr (Tile::relative) shared.products().add_to(s[0], count);
    if (!work.seen.covers(tile * columns, tile * columns + columns)) {
      hide_unseen(s[0], 0, keys[0], tile * columns);
      hide_unseen(s[0], 1, keys[1], tile * columns);
    }
    softmax.add(s, factor);
  }

  // Tiles `end - 1` to `begin`, of which the first is the count-th of this block, and `band` the first one of its
  // bands.
  PYEXT_DEVICE void attend(OnlineSoftmax<1>& softmax, unsigned count, [[maybe_unused]] unsigned band,
                           const Work<columns>& work) {
    const int row = work.first + threadIdx.x / 32 * 16 + lane_row(), batch = work.pair / int(p.heads);
    const Interval keys[2] = {visible(p, batch, row), visible(p, batch, int64_t(row) + 8)};
    const Ring<kStages> key_ring = shared.key_ring(), value_ring = shared.value_ring();
    int tile = work.end() - 1;
    if constexpr (Tile::relative) {
      // The second warpgroup's queries are a band further down; the first one does not need the last band.
      if (group == 1) leave_band(band++);
      multiply_band(band, count - 1);
      multiply_band(++band, count);
    }
    key_ring.wait_full(count);
    ptx::wgmma_fence();
    issue_scores(count);
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(flat(s));
    key_ring.release(count);
    finish_scores(softmax, count, tile, work, keys);
    as_left<T>(weights, s);
    value_ring.wait_full(count);
#pragma unroll 1
    for (--tile; tile >= work.begin(); --tile) {
      ++count;
      if constexpr (Tile::relative) multiply_band(++band, count);
      key_ring.wait_full(count);
      ptx::bar_sync(1 + group, 256);  // this warpgroup's turn
      ptx::wgmma_pin(flat(s)), ptx::wgmma_pin(flat(out));
      ptx::wgmma_fence();
      issue_scores(count);
      issue_product(out, weights, shared.values(count - 1));
      ptx::bar_arrive(1 + (group + 1) % Tile::consumers, 256);
      ptx::wgmma_wait<1>();
      ptx::wgmma_pin(flat(s));
      key_ring.release(count);
      finish_scores(softmax, count, tile, work, keys);
      ptx::wgmma_pin(flat(s));
      // This wait is also the end of a block of instructions: without it, the compiler moves the next one, that for the
      // products, in front of the softmax.
      value_ring.wait_full(count);
      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(flat(out));
      value_ring.release(count - 1);
      as_left<T>(weights, s);
      scale_rows(out, factor);
    }
    ptx::wgmma_pin(flat(out));
    ptx::wgmma_fence();
    issue_product(out, weights, shared.values(count));
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(flat(out));
    value_ring.release(count);
    if (Tile::relative && group == 0) leave_band(band + 1);
  }

  PYEXT_DEVICE void run() {
    const Ring<1> items = shared.items();
    unsigned count = 0, band = 0;
    if (group == Tile::consumers - 1) ptx::bar_arrive(1, 256);  // the first warpgroup's turn
    for (unsigned n = 0;; ++n) {
      items.wait_full(n);
      const Work<columns> work = *shared.work();
      if (work.pair < 0) break;
      if constexpr (Tile::queries_in_registers) {
        load_left<Tile::rows>(queries, shared.queries());
        __syncwarp();
        items.release(n);
      }
      const unsigned tiles = unsigned(work.end() - work.begin());
      if (Tile::relative && tiles > 0) {
        items.wait_full(++n);
        load_left<Tile::rows>(rel_queries, shared.queries());
        __syncwarp();
        items.release(n);
      }
      OnlineSoftmax<1> softmax(biased ? 1 : float(p.scale) * kLog2e);
#pragma unroll
      for (int j = 0; j < width / 8; ++j) out[0][j][0] = out[0][j][1] = out[0][j][2] = out[0][j][3] = 0;
      if (tiles > 0) attend(softmax, count, band, work), band += tiles + 2;
      count += tiles;
      if constexpr (!Tile::queries_in_registers) {
        __syncwarp();
        items.release(n);
      }
      const int row = work.first + threadIdx.x / 32 * 16, head = work.pair % int(p.heads);
      softmax.finish(factor, p.lse + work.pair * p.q_len, row + lane_row(), p.q_len);
      T* const result = static_cast<T*>(p.out.data) + work.pair / int(p.heads) * p.out.batch + head * p.out.head;
      store_rows(result, p.out.row, row, p.q_len, p.value_dim, out, factor);
    }
  }
};

template <class T, class Tile, bool biased>
__global__ void __launch_bounds__(Tile::threads, 1)
    attention_forward_sm90(const __grid_constant__ AttentionProblem p, const __grid_constant__ Sources from,
                           const __grid_constant__ Order order, const float* strips, int64_t pitch, int* next_item) {
  PYEXT_SHARED(char, data);
  const Shared<T, Tile> shared{data};
  shared.initialise();
  if (threadIdx.x >= 128 * Tile::consumers) {
    ptx::setmaxnreg_dec<Tile::producer_registers>();
    if (threadIdx.x < 128 * Tile::consumers + 32)
      produce<T, Tile, biased>(p, from, order, strips, pitch, next_item, shared);
  } else {
    ptx::setmaxnreg_inc<Tile::consumer_registers>();
    Consumer<T, Tile, biased>{p, shared}.run();
  }
}

__global__ void attention_first_item(int* next_item) { *next_item = 0; }

// --- Launch ---

template <class T, class Tile, bool biased>
int launch_forward(const AttentionProblem& p, const AttentionWorkspace& w, cudaStream_t stream) {
  if (ceil_div(p.q_len, Tile::rows) * p.heads * p.batch > INT32_MAX / 2) return cudaErrorInvalidValue;
  Sources from;
  cudaError_t error = map_rows<T>(&from.query, p.query, p, p.heads, p.q_len, p.head_dim, Tile::rows);
  if (!error) error = map_rows<T>(&from.key, p.key, p, p.kv_heads, p.k_len, p.head_dim, Tile::columns);
  if (!error) error = map_rows<T>(&from.value, p.value, p, p.kv_heads, p.k_len, p.value_dim, Tile::columns);
  if (!error && Tile::relative)
    error = map_relative<T>(&from.rel_rows, &from.rel_query, p, static_cast<char*>(p.workspace) + w.bytes, Tile::rows);
  const Order order(p, Tile::rows);
  const int blocks = int(min_of(order.items(), ptx::multiprocessors()));
  const bool goes_on = blocks < order.items();
  if (!error && goes_on) error = ptx::launch(attention_first_item, dim3(1), dim3(1), 0, stream, w.next_item);
  if (error) return error;
  return ptx::launch(attention_forward_sm90<T, Tile, biased>, dim3(unsigned(blocks)), dim3(Tile::threads),
                     Tile::shared_bytes, stream, p, from, order, w.strips, w.strip_pitch,
                     goes_on ? w.next_item : nullptr);
}

template <class T, class Tile>
int with_bias(const AttentionProblem& p, const AttentionWorkspace& w, cudaStream_t stream) {
  return p.diag ? launch_forward<T, Tile, true>(p, w, stream) : launch_forward<T, Tile, false>(p, w, stream);
}

// Queries in registers spare shared memory the traffic, where the sums leave room for them. At 64 features exponentials
// take as long as products: with three warpgroups, each has the time of two others' products for its own. Where every
// query sees all keys, larger tiles pay; under a mask, more of a larger tile is in vain.
template <class T>
int with_width(const AttentionProblem& p, const AttentionWorkspace& w, cudaStream_t stream) {
  const int64_t width = max_of(p.head_dim, p.value_dim);
  if (p.rel_q.data) {
    void* const rows = static_cast<char*>(p.workspace) + w.bytes;
    if (const int error =
            expand_rows<T, RowOrder::of_bands>(p, p.rel_q, p.rel_q_heads, RelativeRows(p).bytes, rows, stream))
      return error;
    if (width <= 64) return launch_forward<T, HopperTile<64, 2, kBand, true, true>, false>(p, w, stream);
    return launch_forward<T, HopperTile<128, 2, kBand, true, true>, false>(p, w, stream);
  }
  const bool all_visible = !p.intervals && p.left >= p.k_len - 1 && p.right >= p.q_len - 1;
  if (width <= 64) return with_bias<T, HopperTile<64, 3, 128, false>>(p, w, stream);
  if (width <= 96) return with_bias<T, HopperTile<96, 2, 128, true>>(p, w, stream);
  if (width <= 128 && all_visible) return with_bias<T, HopperTile<128, 2, 176, false>>(p, w, stream);
  if (width <= 128) return with_bias<T, HopperTile<128, 2, 128, true>>(p, w, stream);
  return with_bias<T, HopperTile<256, 2, 80, false>>(p, w, stream);
}

}  // namespace
}  // namespace pyext

extern "C" int64_t pyext_cuda_attention_forward_sm90_workspace(const pyext::AttentionProblem& p) {
  using namespace pyext;
  if (p.rel_index ? !takes_relative_rows(p) : !takes_on_hopper(p, 256)) return -1;
  return AttentionWorkspace(p, nullptr, false, 0, 0, kMargin).bytes + (p.rel_index ? RelativeRows(p).bytes : 0);
}

extern "C" int pyext_cuda_attention_forward_sm90(const pyext::AttentionProblem& p, void* stream) {
  using namespace pyext;
  const auto s = static_cast<cudaStream_t>(stream);
  if (pyext_cuda_attention_forward_sm90_workspace(p) < 0) return cudaErrorInvalidValue;
  if (p.batch * p.heads * p.q_len == 0) return cudaSuccess;
  const AttentionWorkspace w(p, p.workspace, false, 0, 0, kMargin);
  if (const int error = expand_strips(p, w, s)) return error;
  return with_half(p.dtype, [&](auto element) { return with_width<decltype(element)>(p, w, s); });
}
