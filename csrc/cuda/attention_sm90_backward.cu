// Attention backward for sm_90a (Hopper), deterministic: as for sm_80 (attention_sm80_backward.cu has the formulas),
// one kernel for dK and dV and another for dQ and the gradients of strips, with rows by TMA and products by wgmma.
//
// Two warpgroups consume, 64 rows of the block each; what a product needs as its left operand stays in registers: P^T
// and dS^T there, dS, Q and dO here. One warp produces: it finds who sees whom, and fills a ring of two stages. The
// producer's other three warps add up the gradients of strips.
// Source: Shah et al., "FlashAttention-3" (2024), section 3.2, with its loops apart.
#include "attention_hopper_keys.h"

namespace pyext {
namespace {

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
  if (const cudaError_t error = map_sources<T>(from, p)) return error;
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
