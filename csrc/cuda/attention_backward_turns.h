// A backward in one kernel: a block has a tile of keys and goes over the queries that see them. dK and dV stay in its
// registers; its part of dQ it adds to an fp32 sum in global memory, after the blocks of the keys before its own. So
// every sum is in a fixed order, without atomics.
//
// Who waits for whom: blocks take their work from a counter, and wait for none but blocks that took theirs before. All
// those are running or done, so that whoever is in front never waits, however blocks are scheduled. Work is handed out
// by keys, the first ones first, of several heads in turn.
#pragma once
#include "attention_backward.h"

namespace pyext {
namespace {

// Sums of dQ, each by blocks of its own that wait for each other, if there are too few heads to fill a GPU; heads whose
// blocks take turns. Both: so many that few blocks at a time work at the same sum.
constexpr int64_t kChains = 16;

struct BackwardWork {
  AttentionWorkspace of;
  int key_blocks, steps, chains, together;
  float scale;  // of scores in units of log2
  // Of every block of keys, (batch, kv_heads, key_blocks): the steps it is past, see `Step`; and work taken so far.
  int *past = nullptr, *taken = nullptr;
  float* parts = nullptr;  // of dQ, (chains, batch, heads, steps): of each a tile as threads hold it

  template <class Tile>
  BackwardWork(const AttentionProblem& p, void* base, Tile)
      : of(p, base, true, ceil_div(p.q_len, Tile::queries), ceil_div(p.k_len, Tile::keys)),
        key_blocks(int(ceil_div(p.k_len, Tile::keys))),
        steps(int(ceil_div(p.q_len, Tile::queries))),
        scale(float(p.scale) * kLog2e) {
    const int64_t heads = p.batch * p.heads, pairs = p.batch * p.kv_heads;
    chains = int(max_of(1, min_of(key_blocks, kChains / max_of(1, heads))));
    together = int(max_of(kChains, of.slot_count ? ceil_div(kStrips * pairs, of.slot_count * max_of(1, heads)) : 0));
    of.take(base, past, pairs * key_blocks), of.take(base, taken, 1);
    of.take(base, parts, chains * heads * steps * Tile::part);
  }
  __host__ __device__ const Range* ranges(int64_t batch) const {
    return reinterpret_cast<const Range*>(of.ranges) + batch * steps;
  }
  __host__ __device__ float* part(int64_t chain, int64_t heads, int64_t head, int64_t step, int64_t size) const {
    return parts + ((chain * heads + head) * steps + step) * size;
  }
};

// Zeros that blocks begin with.
__global__ void __launch_bounds__(256)
    attention_backward_clear(int* counters, int64_t count, float* slots, int64_t slot_entries) {
  const int64_t at = blockIdx.x * int64_t(256) + threadIdx.x;
  if (at < count) counters[at] = 0;
  if (at < slot_entries) slots[at] = 0;
}

inline int clear(const BackwardWork& w, float* slots, int64_t slot_entries, cudaStream_t stream) {
  const int64_t counters = w.taken - w.past + 1, blocks = ceil_div(max_of(counters, slot_entries), 256);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return ptx::launch(attention_backward_clear, dim3(unsigned(blocks)), dim3(256), 0, stream, w.past, counters, slots,
                     slot_entries);
}

// Queries of one head, then of the next that shares the keys; of each in an order that suits the kernel.
struct Step {
  int head, block;  // head: of all, or of those that share the keys, as the kernel counts
  bool all, first;  // whether these queries see all of the block's keys, and no key of a block of its chain before it
};

// A block's work: a tile of keys, of an entry of the batch and one of its kv_heads.
struct KeyBlock {
  int number, pair;

  // By the next ticket, which `ticket` in shared memory passes on to all threads.
  static PYEXT_DEVICE KeyBlock take(const AttentionProblem& p, const BackwardWork& w, int& ticket) {
    if (threadIdx.x == 0) ticket = atomicAdd(w.taken, 1);
    __syncthreads();
    const int64_t of_group = int64_t(w.together) * w.key_blocks, within = ticket % of_group;
    const int first_pair = int(ticket / of_group) * w.together;
    const int pairs = min(w.together, int(p.batch * p.kv_heads) - first_pair);
    return {int(within / pairs), first_pair + int(within % pairs)};
  }
};

// The next step from `block` on, or before it with direction -1, whose queries see one of the keys [begin, end); where
// none does, one that does not exist. Warps look at 32 at once: a causal mask leaves many behind.
template <int direction>
PYEXT_DEVICE int find_step(const Range* ranges, int block, int steps, int begin, int end) {
  for (;; block += 32 * direction) {
    const int own = block + direction * int(threadIdx.x % 32);
    const unsigned found = __ballot_sync(~0u, unsigned(own) < unsigned(steps) && ranges[own].meets(begin, end));
    if (found) return block + direction * (__ffs(int(found)) - 1);
    if (unsigned(block + 31 * direction) >= unsigned(steps)) return direction > 0 ? steps : -1;
  }
}

// The sum of dQ so far, as this thread holds it of a step's tile; it goes there again with the block's part in it.
template <class Tile>
struct QuerySum {
  float of[Tile::QM][Tile::QN][4];

  static PYEXT_DEVICE float4* at(float* part, int i, int j) {
    return reinterpret_cast<float4*>(part) + (i * Tile::QN + j) * Tile::threads + Tile::thread();
  }
  PYEXT_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < Tile::QM; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::QN; ++j) of[i][j][0] = of[i][j][1] = of[i][j][2] = of[i][j][3] = 0;
    }
  }
  PYEXT_DEVICE void begin(bool first, float* part) {
    if (first)
      clear();
    else
      load(part);
  }
  PYEXT_DEVICE void load(float* part) {
#pragma unroll
    for (int i = 0; i < Tile::QM; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::QN; ++j) {
        const float4 x = *at(part, i, j);
        of[i][j][0] = x.x, of[i][j][1] = x.y, of[i][j][2] = x.z, of[i][j][3] = x.w;
      }
    }
  }
  PYEXT_DEVICE void store(float* part) const {
#pragma unroll
    for (int i = 0; i < Tile::QM; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::QN; ++j) *at(part, i, j) = {of[i][j][0], of[i][j][1], of[i][j][2], of[i][j][3]};
    }
  }

  static PYEXT_DEVICE int row() { return Tile::thread() / 32 % Tile::row_warps * 16 * Tile::QM; }
  static PYEXT_DEVICE int column() { return Tile::thread() / 32 / Tile::row_warps * Tile::features; }

  // Adds dS K. ds_t has rows of keys.
  template <class T>
  PYEXT_DEVICE void add(const SharedTile<T, Tile::queries>& ds_t, const SharedTile<T, Tile::width>& keys) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < Tile::keys; k += 32) {
      uint32_t left[2][Tile::QM][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < Tile::QM; ++i)
          ptx::ldmatrix_transposed(
              left[half][i], ds_t.at(k + 16 * half + lane / 16 * 8 + lane % 8, row() + 16 * i + lane / 8 % 2 * 8));
      }
#pragma unroll
      for (int j = 0; j < Tile::QN; ++j) {
        uint32_t right[4];
        ptx::ldmatrix_transposed(right, keys.at(k + lane, column() + 8 * j));
#pragma unroll
        for (int i = 0; i < Tile::QM; ++i) {
          ptx::mma<T>(of[i][j], left[0][i], {right[0], right[1]});
          ptx::mma<T>(of[i][j], left[1][i], {right[2], right[3]});
        }
      }
    }
  }
};

// f(chain) for each whose blocks have a sum of a step, whose queries see `seen`.
template <class Tile, class F>
PYEXT_DEVICE void for_chains(const BackwardWork& w, const Range& seen, const F& f) {
  const int begin = seen.begin / Tile::keys, end = int(ceil_div(seen.end, Tile::keys));
  for (int chain = 0; chain < w.chains; ++chain) {
    if (begin + (chain - begin % w.chains + w.chains) % w.chains >= end) continue;  // nobody wrote it
    f(chain);
  }
}
// part(chain): where it is.
template <class Tile, class Part>
PYEXT_DEVICE QuerySum<Tile> sum_chains(const BackwardWork& w, const Range& seen, const Part& part) {
  QuerySum<Tile> sum, own;
  sum.clear();
  for_chains<Tile>(w, seen, [&](int chain) {
    own.load(part(chain));
#pragma unroll
    for (int i = 0; i < Tile::QM; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::QN; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum.of[i][j][e] += own.of[i][j][e];
      }
    }
  });
  return sum;
}

// P^T and dS^T, of which a warp computes those of its keys and a part of the queries. As left operands of products it
// needs them of its keys and all queries: of those that share its keys it gets theirs through shared memory.
template <class T, class Tile>
struct KeyRows {
  SharedTile<T, Tile::queries> tile;

  static PYEXT_DEVICE int warp() { return threadIdx.x / 32 % Tile::warps; }
  static PYEXT_DEVICE int first_key() { return warp() / Tile::query_warps * 16 * Tile::M; }
  static PYEXT_DEVICE int first_query() { return warp() % Tile::query_warps * 8 * Tile::N; }
  static PYEXT_DEVICE int first_feature() { return warp() % Tile::query_warps * 8 * Tile::J; }

  PYEXT_DEVICE void store(const uint32_t (&part)[Tile::M][Tile::N / 2][4]) const {
#pragma unroll
    for (int i = 0; i < Tile::M; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::N / 2; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int key = first_key() + 16 * i + lane_row() + e % 2 * 8;
          const int query = first_query() + 16 * j + lane_column() + e / 2 * 8;
          *reinterpret_cast<uint32_t*>(tile.at(key, query)) = part[i][j][e];
        }
      }
    }
  }
  // Of those who share this warp's keys.
  PYEXT_DEVICE void sync() const {
    if (Tile::query_warps > 1) ptx::bar_sync(1 + warp() / Tile::query_warps, 32 * Tile::query_warps);
  }
  // Adds the product of these rows, of which `part` is this warp's, and this warp's features of `rows`, the queries'.
  PYEXT_DEVICE void add_product(float (&sum)[Tile::M][Tile::J][4], const uint32_t (&part)[Tile::M][Tile::N / 2][4],
                                const SharedTile<T, Tile::width>& rows) const {
    if constexpr (Tile::query_warps == 1) {
      multiply(sum, part, rows);
    } else {
#pragma unroll
      for (int k = 0; k < Tile::queries; k += 16) {
        uint32_t left[Tile::M][1][4];
        read_left(left, SharedTile<T, Tile::queries>{tile.at(0, k)}, first_key());
        multiply(sum, left, SharedTile<T, Tile::width>{rows.at(k, first_feature())});
      }
    }
  }
};

// The same factor for all rows of a lane.
template <int M>
struct RowFactors {
  float of[M][2];
  PYEXT_DEVICE explicit RowFactors(float factor) {
#pragma unroll
    for (int i = 0; i < M; ++i) of[i][0] = of[i][1] = factor;
  }
};

}  // namespace
}  // namespace pyext
