// dK and dV on Hopper: a block of threads has 128 keys and goes over the queries that see them.
#pragma once
#include "attention_hopper_relative_backward.h"

namespace pyext {
namespace {

// --- dK and dV: the block's rows are keys and values, the steps' are queries and gradients ---

template <class Queries>
struct KeyStages {
  struct alignas(8) Stage {
    Queries of_queries;
    int more, all;       // whether there is a tile in this stage, and whether all its queries see all keys
    unsigned last_band;  // of relative rows: see RelativeKeys
  } stage[kStages];
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

// With relative rows; strips have but the room that keeps what follows aligned.
template <class T, int width>
struct RelativeKeyStages : RelativeKeyMemory<T, width>, KeyStages<QueryStageOf<2 - kStepRows, kStepRows>> {};

template <class T, int width, bool biased, bool relative = false>
__global__ void __launch_bounds__(kBlockThreads, 1)
    attention_backward_keys_sm90(const __grid_constant__ AttentionProblem p, const __grid_constant__ Sources from,
                                 const float* strips, int64_t strip_length, const float* delta, const float* lse,
                                 const Range* ranges) {
  using P = Panels<width>;
  PYEXT_SHARED(char, data);
  using Other = std::conditional_t<relative, RelativeKeyStages<T, width>, KeyStages<QueryStage>>;
  const Shared<T, width, Other> shared{data};
  [[maybe_unused]] auto& other = shared.other();
  shared.initialise([&] {
    if constexpr (relative) other.initialise();
  });
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
    [[maybe_unused]] RelativeKeyProducer relative_rows;
    for (unsigned n = 0;; ++n) {
      const bool more = steps.next();
      const int first = steps.block * kStepRows;
      auto& stage = shared.other().stage[n % kStages];
      ring.wait_empty(n);
      if (more) {
        if (biased) {
          StripAhead<32, QueryStage::strip_entries> strip;
          strip.read(strips + (p.diag_heads == 1 ? 0 : steps.head * strip_length), strip_length,
                     strip_start(p, int64_t(first) + kStepRows - 1, first_key));
          strip.store(stage.of_queries.strip);
        }
        if constexpr (relative) relative_rows.next(first_key - first, steps.head);
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
        if constexpr (relative) stage.last_band = relative_rows.bands - 1;
        stage.all = more && steps.ranges[steps.block].covers(first_key, first_key + kBlockRows);
      }
      __syncwarp();
      if (lane == 0 && more) {
        ptx::mbarrier_expect(ring.barrier(n), 2 * P::step_bytes);
        load_panels<P::count, kStepRows, kStepRows>(shared.step(0, n), from.query, ring.barrier(n), first, steps.head,
                                                    batch);
        load_panels<P::count, kStepRows, kStepRows>(shared.step(1, n), from.grad, ring.barrier(n), first, steps.head,
                                                    batch);
        if constexpr (relative) relative_rows.load(other, n, p, from, first, batch);
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
    [[maybe_unused]] RelativeKeyConsumer relative_rows;
#pragma unroll 1
    for (unsigned n = 0;; ++n) {
      ring.wait_full(n);
      const auto& stage = shared.other().stage[n % kStages];
      if (!stage.more) break;
      if constexpr (relative) relative_rows.multiply(other, n, stage.last_band);
      ptx::wgmma_pin(flat(p_t)), ptx::wgmma_pin(flat(ds_t));
      ptx::wgmma_fence();
      keys.issue_transposed(p_t, shared.step(0, n));
      if (early) values.issue_transposed(ds_t, shared.step(1, n));
      ptx::wgmma_wait<early>();
      ptx::wgmma_pin(flat(p_t));
      if constexpr (relative) other.products().add_transposed_to(p_t[0]);
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
      const auto& block = shared.other();
      T* const rows = static_cast<T*>(to.data) + block.batch * to.batch + block.kv_head * to.head;
      store_rows(rows, to.row, int64_t(block.first_key) + threadIdx.x / 32 * 16, p.k_len, features, sum, factor);
    };
    store(p.grad_key, p.head_dim, grad_key, scaled);
    store(p.grad_value, p.value_dim, grad_value, plain);
  };
  in_roles(produce, [] {}, consume);
}

template <class T, int width, bool biased, bool relative = false>
int launch_keys(const AttentionProblem& p, const Sources& from, const AttentionWorkspace& w, cudaStream_t stream) {
  using Other = std::conditional_t<relative, RelativeKeyStages<T, width>, KeyStages<QueryStage>>;
  const int64_t blocks = ceil_div(p.k_len, kBlockRows) * p.kv_heads * p.batch;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return ptx::launch(attention_backward_keys_sm90<T, width, biased, relative>, dim3(unsigned(blocks)),
                     dim3(kBlockThreads), Shared<T, width, Other>::bytes, stream, p, from, w.strips, w.strip_length,
                     w.delta, w.lse, reinterpret_cast<const Range*>(w.ranges));
}

}  // namespace
}  // namespace pyext
