// Attention backward for sm_90a (Hopper), deterministic: as for sm_80 (attention_sm80_backward.cu has the formulas),
// one kernel for dK and dV and another for dQ and the gradients of strips, with rows by TMA and products by wgmma.
//
// Two warpgroups consume, 64 rows of the block each; what a product needs as its left operand stays in registers: P^T
// and dS^T there, dS, Q and dO here. One warp produces: it finds who sees whom, and fills a ring of two stages. The
// producer's other three warps add up the gradients of strips.
// Source: Shah et al., "FlashAttention-3" (2024), section 3.2, with its loops apart.
#include "attention_backward.h"
#include "attention_hopper.h"

namespace pyext {
namespace {

constexpr int kBlockThreads = kThreads + 128;  // the consumers' and the producer's warpgroup
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
constexpr int kSummingWarps = 3, kSummingThreads = 32 * kSummingWarps;  // the last ones of the producer's warpgroup

struct Sources {
  ptx::TensorMap query, key, value, grad;
};

template <int width_>
struct Panels {
  static constexpr int width = width_, count = (width + kPanel - 1) / kPanel;
  static constexpr int block_bytes = kBlockRows * count * kPanelBytes, step_bytes = kStepRows * count * kPanelBytes;
};

// Tiles in shared memory: two of the block's rows, two rings of two stages, what else the kernel needs, and barriers.
template <class T, int width, class Other>
struct Shared {
  using P = Panels<width>;
  static constexpr int other_at = 2 * P::block_bytes + 2 * kStages * P::step_bytes;
  static constexpr int barriers_at = (other_at + int(sizeof(Other)) + 7) / 8 * 8, rings = 3;
  static constexpr int bytes = barriers_at + (2 + rings * 2 * kStages) * int(sizeof(uint64_t));
  char* data;

  PYEXT_DEVICE T* block(int i) const { return reinterpret_cast<T*>(data + i * P::block_bytes); }
  PYEXT_DEVICE T* step(int ring, unsigned n) const {
    return reinterpret_cast<T*>(data + 2 * P::block_bytes + (ring * kStages + int(n % kStages)) * P::step_bytes);
  }
  PYEXT_DEVICE Other& other() const { return *reinterpret_cast<Other*>(data + other_at); }
  PYEXT_DEVICE Ring<1> blocks() const { return {barriers(), barriers() + 1}; }
  PYEXT_DEVICE Ring<kStages> ring(int i) const {
    uint64_t* const first = barriers() + 2 + i * 2 * kStages;
    return {first, first + kStages};
  }
  // Of the sums of diagonals: all consumers' warps fill it.
  PYEXT_DEVICE Ring<kStages> sums_ring() const { return ring(2); }
  PYEXT_DEVICE void initialise() const {
    if (threadIdx.x == 0) {
      blocks().initialise(kWarps);
#pragma unroll
      for (int i = 0; i < 2; ++i) ring(i).initialise(kWarps);
      sums_ring().initialise(kSummingWarps, kWarps);
      ptx::fence_mbarrier_init();
    }
    __syncthreads();
  }

 private:
  PYEXT_DEVICE uint64_t* barriers() const { return reinterpret_cast<uint64_t*>(data + barriers_at); }
};

// The producer's warp runs `produce`, its neighbours `sum`, the consumers `consume`.
template <class Produce, class Sum, class Consume>
PYEXT_DEVICE void in_roles(const Produce& produce, const Sum& sum, const Consume& consume) {
  if (threadIdx.x >= kThreads) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x < kThreads + 32)
      produce();
    else
      sum();
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    consume();
  }
}

// A warpgroup's 64 rows of the block as the left operand of products: in registers, or where TMA has put them.
template <class T, int width, bool in_registers>
struct LeftOperand {
  const T* rows;

  PYEXT_DEVICE explicit LeftOperand(const T* block) : rows(block + threadIdx.x / 128 * 64 * kPanel) {}
  PYEXT_DEVICE void issue_transposed(float (&sum)[1][kN][4], const T* step) const {
    pyext::issue_transposed<T, width, kBlockRows>(sum, rows, step);
  }
};
template <class T, int width>
struct LeftOperand<T, width, true> {
  uint32_t rows[width / 16][4];

  PYEXT_DEVICE explicit LeftOperand(const T* block) { load_left<kBlockRows>(rows, block); }
  PYEXT_DEVICE void issue_transposed(float (&sum)[1][kN][4], const T* step) const {
    pyext::issue_transposed(sum, rows, step);
  }
};

// What as_left made of an accumulator, rounded as it is.
template <class T, int N>
PYEXT_DEVICE void from_left(float (&sum)[1][N][4], const uint32_t (&left)[1][N / 2][4]) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const uint32_t two = left[0][j / 2][j % 2 * 2 + e / 2];
      sum[0][j][e] = ptx::to_float(T{uint16_t(e % 2 ? two >> 16 : two)});
    }
  }
}

// --- dK and dV: the block's rows are keys and values, the steps' are queries and gradients ---

struct KeyStage {
  QueryStage of_queries;
  int more, all;  // whether there is a tile in this stage, and whether all its queries see all keys
};
struct KeyStages {
  KeyStage stage[kStages];
  int first_key, kv_head, batch;  // of the block: read again at the end, they cost no registers in between
};

// The steps of a block of keys: queries that see one of them, of one head, then of the next that shares the keys.
struct Steps {
  const Range* ranges;
  int first_key, query_blocks, heads_end;
  int head, block;

  // By a warp: goes on to the next one; false if there is none.
  PYEXT_DEVICE bool next() {
    for (; head < heads_end; ++head, block = -1) {
      while (block + 1 < query_blocks) {
        const int candidate = block + 1 + threadIdx.x % 32;
        const bool meets = candidate < query_blocks && ranges[candidate].meets(first_key, first_key + kBlockRows);
        const unsigned found = __ballot_sync(~0u, meets);
        block += found ? __ffs(int(found)) : 32;
        if (found) return true;
      }
    }
    return false;
  }
};

template <class T, int width, bool biased>
__global__ void __launch_bounds__(kBlockThreads, 1)
    attention_backward_keys_sm90(const __grid_constant__ AttentionProblem p, const __grid_constant__ Sources from,
                                 const float* strips, int64_t strip_length, const float* delta, const float* lse,
                                 const Range* ranges) {
  using P = Panels<width>;
  PYEXT_SHARED(char, data);
  const Shared<T, width, KeyStages> shared{data};
  shared.initialise();
  const Ring<kStages> ring = shared.ring(0);

  const int key_blocks = int(ceil_div(p.k_len, kBlockRows)), kv_heads = int(p.kv_heads);
  const int first_key = blockIdx.x % key_blocks * kBlockRows, pair = blockIdx.x / key_blocks;
  const int kv_head = pair % kv_heads, batch = pair / kv_heads, sharing = int(p.heads / p.kv_heads);

  const auto produce = [&] {
    const int lane = threadIdx.x % 32, query_blocks = int(ceil_div(p.q_len, kStepRows));
    if (lane == 0) {
      uint64_t* const barrier = shared.blocks().barrier(0);
      shared.other().first_key = first_key, shared.other().kv_head = kv_head, shared.other().batch = batch;
      ptx::mbarrier_expect(barrier, 2 * P::block_bytes);
      load_panels<P::count, kBlockRows, kStepRows>(shared.block(0), from.key, barrier, first_key, kv_head, batch);
      load_panels<P::count, kBlockRows, kStepRows>(shared.block(1), from.value, barrier, first_key, kv_head, batch);
    }
    Steps steps{ranges + int64_t(batch) * query_blocks,
                first_key,
                query_blocks,
                (kv_head + 1) * sharing,
                kv_head * sharing,
                -1};
    for (unsigned n = 0;; ++n) {
      const bool more = steps.next();
      const int first = steps.block * kStepRows;
      KeyStage& stage = shared.other().stage[n % kStages];
      ring.wait_empty(n);
      if (more) {
        if (biased) {
          StripAhead<32, QueryStage::strip_entries> strip;
          strip.read(strips + (p.diag_heads == 1 ? 0 : steps.head * strip_length), strip_length,
                     strip_start(p, int64_t(first) + kStepRows - 1, first_key));
          strip.store(stage.of_queries.strip);
        }
        const int64_t row = (int64_t(batch) * p.heads + steps.head) * p.q_len;
#pragma unroll
        for (int i = lane; i < kStepRows; i += 32) {
          const int64_t query = int64_t(first) + i;
          const bool exists = query < p.q_len;
          stage.of_queries.lse[i] = exists ? lse[row + query] : 0.0f;
          stage.of_queries.delta[i] = exists ? delta[row + query] : 0.0f;
          stage.of_queries.seen[i] = visible(p, batch, query);
        }
      }
      if (lane == 0) {
        stage.more = more;
        stage.all = more && steps.ranges[steps.block].covers(first_key, first_key + kBlockRows);
      }
      __syncwarp();
      if (lane == 0 && more) {
        ptx::mbarrier_expect(ring.barrier(n), 2 * P::step_bytes);
        load_panels<P::count, kStepRows, kStepRows>(shared.step(0, n), from.query, ring.barrier(n), first, steps.head,
                                                    batch);
        load_panels<P::count, kStepRows, kStepRows>(shared.step(1, n), from.grad, ring.barrier(n), first, steps.head,
                                                    batch);
      } else if (lane == 0) {
        ptx::mbarrier_arrive(ring.barrier(n));
      }
      if (!more) return;
    }
  };

  const auto consume = [&] {
    const int row = threadIdx.x / 32 * 16 + lane_row();
    using Left = LeftOperand<T, width, width <= 64>;  // more would not leave room for the sums
    const float scale = float(p.scale) * kLog2e;
    float grad_key[1][width / 8][4] = {}, grad_value[1][width / 8][4] = {};
    // At 128 features registers are short while weights are made: dP comes after them, and the other warpgroup's
    // products run beside them.
    constexpr bool early = width <= 96;
    float p_t[1][kN][4], ds_t[1][kN][4];
    uint32_t left[1][kN / 2][4];
    shared.blocks().wait_full(0);
    const Left keys(shared.block(0)), values(shared.block(1));
#pragma unroll 1
    for (unsigned n = 0;; ++n) {
      ring.wait_full(n);
      const KeyStage& stage = shared.other().stage[n % kStages];
      if (!stage.more) break;
      ptx::wgmma_pin(flat(p_t)), ptx::wgmma_pin(flat(ds_t));
      ptx::wgmma_fence();
      keys.issue_transposed(p_t, shared.step(0, n));
      if (early) values.issue_transposed(ds_t, shared.step(1, n));
      ptx::wgmma_wait<early>();
      ptx::wgmma_pin(flat(p_t));
      to_weights<biased>(p_t, scale, stage.of_queries, row, first_key, stage.all);
      as_left<T>(left, p_t);
      ptx::wgmma_pin(left[0]), ptx::wgmma_pin(flat(grad_value));
      ptx::wgmma_fence();
      issue_product(grad_value, left, shared.step(1, n));
      if (!early) values.issue_transposed(ds_t, shared.step(1, n));
      ptx::wgmma_wait<early>();
      ptx::wgmma_pin(flat(ds_t));
      if (!early) from_left<T>(p_t, left);
      to_score_gradients(ds_t, p_t, stage.of_queries);
      ptx::wgmma_pin(flat(ds_t));
      ptx::wgmma_wait<0>();  // registers are short: both products take their left operand from the same ones
      ptx::wgmma_pin(flat(grad_value));
      as_left<T>(left, ds_t);
      ptx::wgmma_pin(left[0]), ptx::wgmma_pin(flat(grad_key));
      ptx::wgmma_fence();
      issue_product(grad_key, left, shared.step(0, n));
      ptx::wgmma_wait<0>();
      ptx::wgmma_pin(flat(grad_key));
      __syncwarp();  // all lanes are done with the stage's vectors
      ring.release(n);
    }
    const float scaled[1][2] = {{float(p.scale), float(p.scale)}}, plain[1][2] = {{1, 1}};
    const auto store = [&](const Output& to, int64_t features, const auto& sum, const auto& factor) {
      const KeyStages& block = shared.other();
      T* const rows = static_cast<T*>(to.data) + block.batch * to.batch + block.kv_head * to.head;
      store_rows(rows, to.row, int64_t(block.first_key) + threadIdx.x / 32 * 16, p.k_len, features, sum, factor);
    };
    store(p.grad_key, p.head_dim, grad_key, scaled);
    store(p.grad_value, p.value_dim, grad_value, plain);
  };
  in_roles(produce, [] {}, consume);
}

// --- dQ, and the gradients of strips: the block's rows are queries and gradients, the steps' are keys and values ---

template <bool diagonals>
struct QueryOther {
  Range seen;  // by the queries of the block
  float strip[kStages][QueryTile::strip];
  float sums[kStages][diagonals ? Diagonals::floats : 1];
};

template <class T, int width, bool biased, bool diagonals>
__global__ void __launch_bounds__(kBlockThreads, 1)
    attention_backward_queries_sm90(const __grid_constant__ AttentionProblem p, const __grid_constant__ Sources from,
                                    const float* strips, int64_t strip_length, const float* delta, const float* lse,
                                    float* slots) {
  using P = Panels<width>;
  PYEXT_SHARED(char, data);
  const Shared<T, width, QueryOther<diagonals>> shared{data};
  shared.initialise();
  const Ring<1> items = shared.blocks();
  const Ring<kStages> key_ring = shared.ring(0), value_ring = shared.ring(1);

  const int heads = int(p.heads), blocks = int(ceil_div(p.q_len, kBlockRows));
  const int per_head = int(gridDim.x) / (int(p.batch) * heads), pair = int(blockIdx.x) / per_head;
  const int head = pair % heads, batch = pair / heads, kv_head = head / (heads / int(p.kv_heads));
  // The last queries first: under a causal mask they have most to do.
  const int last_block = blocks - 1 - int(blockIdx.x) % per_head;
  const auto tiles_of = [](const Range& seen) {
    const int begin = seen.begin / kStepRows;
    return Interval{begin, seen.end ? (seen.end - 1) / kStepRows + 1 : begin};
  };

  const auto produce = [&] {
    const bool leads = threadIdx.x % 32 == 0;
    unsigned count = 0, n = 0;
    for (int block = last_block; block >= 0; block -= per_head, ++n) {
      const int first = block * kBlockRows;
      const Range seen = find_visible<kBlockRows>(p, batch, first);
      if (leads) {
        items.wait_empty(n);
        shared.other().seen = seen;
        ptx::mbarrier_expect(items.barrier(n), 2 * P::block_bytes);
        load_panels<P::count, kBlockRows, kStepRows>(shared.block(0), from.query, items.barrier(n), first, head, batch);
        load_panels<P::count, kBlockRows, kStepRows>(shared.block(1), from.grad, items.barrier(n), first, head, batch);
      }
      const Interval tiles = tiles_of(seen);
      for (int tile = tiles.begin; tile < tiles.end; ++tile, ++count) {
        // Lanes that wait must keep step: one that comes late could find a later phase, of the same parity.
        if (biased || leads) key_ring.wait_empty(count);
        if (biased) {
          StripAhead<32, QueryTile::strip> strip;
          strip.read(strips + (p.diag_heads == 1 ? 0 : head * strip_length), strip_length,
                     strip_start(p, int64_t(first) + kBlockRows - 1, int64_t(tile) * kStepRows));
          strip.store(shared.other().strip[count % kStages]);
          __syncwarp();
        }
        if (!leads) continue;
        ptx::mbarrier_expect(key_ring.barrier(count), P::step_bytes);
        load_panels<P::count, kStepRows, kStepRows>(shared.step(0, count), from.key, key_ring.barrier(count),
                                                    tile * kStepRows, kv_head, batch);
        value_ring.wait_empty(count);
        ptx::mbarrier_expect(value_ring.barrier(count), P::step_bytes);
        load_panels<P::count, kStepRows, kStepRows>(shared.step(1, count), from.value, value_ring.barrier(count),
                                                    tile * kStepRows, kv_head, batch);
      }
    }
  };

  // An entry of the strip is always the same thread's: nobody waits for another's addition.
  const auto sum = [&] {
    if constexpr (diagonals) {
      const int thread = threadIdx.x - kThreads - 32;
      float* const slot = slots + blockIdx.x * strip_length;
      for (int64_t u = thread; u < strip_length; u += kSummingThreads) slot[u] = 0;
      unsigned count = 0;
      for (int block = last_block; block >= 0; block -= per_head) {
        const int first = block * kBlockRows;
        const Interval tiles = tiles_of(find_visible<kBlockRows>(p, batch, first));
        for (int tile = tiles.begin; tile <= tiles.end; ++tile, ++count) {  // and what the last one carries
          const int64_t start = Diagonals::start(p, first, int64_t(tile) * kStepRows);
          const Diagonals sums(shared.other().sums[count % kStages]);
          const int entry = int((thread - start) % kSummingThreads);
          shared.sums_ring().wait_full(count);
          for (int i = entry < 0 ? entry + kSummingThreads : entry; i < Diagonals::entries; i += kSummingThreads)
            if (start + i >= 0 && start + i < strip_length) slot[start + i] += sums.of(i);
          __syncwarp();
          shared.sums_ring().release(count);
        }
      }
    }
  };

  const auto consume = [&] {
    const int own = threadIdx.x / 32 * 16;
    unsigned count = 0, n = 0;
    // Sums are counted as tiles are, and one more for every block before.
    const auto hand_on = [&](unsigned at, const auto& write) {
      shared.sums_ring().wait_empty(at);
      write(Diagonals(shared.other().sums[at % kStages]));
      __syncwarp();
      if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(shared.sums_ring().barrier(at));
    };
    for (int block = last_block; block >= 0; block -= per_head, ++n) {
      const int first = block * kBlockRows;
      Interval keys[2];
      float row_lse[2], row_delta[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = int64_t(first) + own + lane_row() + 8 * half, at = int64_t(pair) * p.q_len + row;
        row_lse[half] = row < p.q_len ? lse[at] : 0.0f, row_delta[half] = row < p.q_len ? delta[at] : 0.0f;
        keys[half] = visible(p, batch, row);
      }
      float grad_query[1][width / 8][4] = {}, s[1][kN][4], ds[1][kN][4], carried[2][2] = {};
      uint32_t left[1][kN / 2][4];
      items.wait_full(n);
      const Range seen = shared.other().seen;
      const LeftOperand<T, width, true> queries(shared.block(0)), grads(shared.block(1));
      __syncwarp();
      items.release(n);
      const Interval tiles = tiles_of(seen);
#pragma unroll 1
      for (int tile = tiles.begin; tile < tiles.end; ++tile, ++count) {
        const int first_key = tile * kStepRows;
        key_ring.wait_full(count);
        ptx::wgmma_pin(flat(s)), ptx::wgmma_pin(flat(ds));
        ptx::wgmma_fence();
        queries.issue_transposed(s, shared.step(0, count));
        value_ring.wait_full(count);
        ptx::wgmma_fence();
        grads.issue_transposed(ds, shared.step(1, count));
        ptx::wgmma_wait<1>();
        ptx::wgmma_pin(flat(s));
        if constexpr (biased)
          add_strip<kBlockRows>(s, float(p.scale) * kLog2e, shared.other().strip[count % kStages]);
        else
          scale_rows(s, float(p.scale) * kLog2e);
#pragma unroll
        for (int j = 0; j < kN; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) s[0][j][e] = ptx::exp2_approx(s[0][j][e] - row_lse[e / 2]);
        }
        // The branch ends a block of instructions: without it, the compiler moves the wait in front of the
        // exponentials.
        if (!seen.covers(first_key, first_key + kStepRows)) {
          hide_unseen(s[0], 0, keys[0], first_key, 0);
          hide_unseen(s[0], 1, keys[1], first_key, 0);
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
        if constexpr (diagonals) hand_on(count + n, [&](const Diagonals& sums) { sums.sum_warp(ds, carried); });
        ptx::wgmma_wait<0>();
        ptx::wgmma_pin(flat(grad_query));
        __syncwarp();  // all lanes are done with the strip
        key_ring.release(count);
      }
      if constexpr (diagonals) hand_on(count + n, [&](const Diagonals& sums) { sums.finish_warp(carried); });
      const float scaled[1][2] = {{float(p.scale), float(p.scale)}};
      store_rows(static_cast<T*>(p.grad_query.data) + batch * p.grad_query.batch + head * p.grad_query.head,
                 p.grad_query.row, int64_t(first) + own, p.q_len, p.head_dim, grad_query, scaled);
    }
  };
  in_roles(produce, sum, consume);
}

// --- Launch ---

template <class T, int width, bool biased>
int launch_keys(const AttentionProblem& p, const Sources& from, const AttentionWorkspace& w, cudaStream_t stream) {
  const int64_t blocks = ceil_div(p.k_len, kBlockRows) * p.kv_heads * p.batch;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return ptx::launch(attention_backward_keys_sm90<T, width, biased>, dim3(unsigned(blocks)), dim3(kBlockThreads),
                     Shared<T, width, KeyStages>::bytes, stream, p, from, w.strips, w.strip_length, w.delta, w.lse,
                     reinterpret_cast<const Range*>(w.ranges));
}

template <class T, int width, bool biased, bool diagonals>
int launch_queries(const AttentionProblem& p, const Sources& from, const AttentionWorkspace& w, cudaStream_t stream) {
  const int64_t blocks = (diagonals ? w.slot_count : ceil_div(p.q_len, kBlockRows)) * p.heads * p.batch;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return ptx::launch(attention_backward_queries_sm90<T, width, biased, diagonals>, dim3(unsigned(blocks)),
                     dim3(kBlockThreads), Shared<T, width, QueryOther<diagonals>>::bytes, stream, p, from, w.strips,
                     w.strip_length, w.delta, w.lse, w.slots);
}

template <class T, int width>
int launch_backward(const AttentionProblem& p, const AttentionWorkspace& w, cudaStream_t stream) {
  Sources from;
  cudaError_t error = map_rows<T>(&from.query, p.query, p, p.heads, p.q_len, p.head_dim, kStepRows);
  if (!error) error = map_rows<T>(&from.key, p.key, p, p.kv_heads, p.k_len, p.head_dim, kStepRows);
  if (!error) error = map_rows<T>(&from.value, p.value, p, p.kv_heads, p.k_len, p.value_dim, kStepRows);
  if (!error) error = map_rows<T>(&from.grad, p.grad_out, p, p.heads, p.q_len, p.value_dim, kStepRows);
  if (error) return error;
  if (const int failed = prepare<T>(p, w, stream)) return failed;
  if (!p.diag) {
    if (const int failed = launch_keys<T, width, false>(p, from, w, stream)) return failed;
    return launch_queries<T, width, false, false>(p, from, w, stream);
  }
  if (const int failed = launch_keys<T, width, true>(p, from, w, stream)) return failed;
  if (!p.grad_diag) return launch_queries<T, width, true, false>(p, from, w, stream);
  if (const int failed = launch_queries<T, width, true, true>(p, from, w, stream)) return failed;
  return sum_strips(p, w, stream);
}

template <class T>
int with_width(const AttentionProblem& p, const AttentionWorkspace& w, cudaStream_t stream) {
  const int64_t width = max_of(p.head_dim, p.value_dim);
  if (width <= 64) return launch_backward<T, 64>(p, w, stream);
  if (width <= 96) return launch_backward<T, 96>(p, w, stream);
  return launch_backward<T, 128>(p, w, stream);
}

}  // namespace
}  // namespace pyext

extern "C" int64_t pyext_cuda_attention_backward_sm90_workspace(const pyext::AttentionProblem& p) {
  using namespace pyext;
  const bool takes = !p.rel_index && takes_on_hopper(p, 128) && p.q_len > 0 && p.batch * p.heads > 0 &&
                     fits_tiles(p, p.out, p.grad_out) && fits_map(p.grad_out, p.batch, p.heads, p.q_len);
  return takes ? workspace_of(p, nullptr).bytes : -1;
}

extern "C" int pyext_cuda_attention_backward_sm90(const pyext::AttentionProblem& p, void* stream) {
  using namespace pyext;
  const auto s = static_cast<cudaStream_t>(stream);
  if (pyext_cuda_attention_backward_sm90_workspace(p) < 0) return cudaErrorInvalidValue;
  const AttentionWorkspace w = workspace_of(p, p.workspace);
  return with_half(p.dtype, [&](auto element) { return with_width<decltype(element)>(p, w, s); });
}
