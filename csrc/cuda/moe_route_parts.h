// What the kernels of routing share (csrc/cuda/moe_route.cu): scores, the order of choices, memory.
#pragma once
#include "../moe_route.h"
#include "tally.h"

namespace pyext {
namespace {

constexpr int kTokens = 64;  // of a block, whose sums are written down
constexpr int kMostWarps = 8;
constexpr int kDigits = 256;        // keys are sorted and searched by digits of 8 bits
constexpr float kEpsilon = 1e-20f;  // as in DeepSeek's code: sigmoids may all be 0
// A block keeps a few rows of logits in shared memory. Where there are so many experts that one warp's do not fit, the
// rows lie in the workspace, and fewer blocks go round.
constexpr int64_t kSharedBytes = 96 << 10;
constexpr int kWideBlocks = 256;

// --- Scores ---

PYEXT_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

struct Softmax {
  float largest, sum, inverse;  // a quotient for each expert would cost more than all else

  PYEXT_DEVICE Softmax(float largest, float sum) : largest(largest), sum(sum), inverse(1.0f / sum) {}
  PYEXT_DEVICE float score(float logit) const { return expf(logit - largest) * inverse; }
  PYEXT_DEVICE float logarithm() const { return largest + logf(sum); }  // of the sum of all exp(logit)
};

// Reads a row of logits: lane l takes l, l + 32, ...
template <class T>
PYEXT_DEVICE Softmax read_row(const T* logits, float* values, int count, int lane) {
  float largest = -INFINITY, sum = 0;
  for (int i = lane; i < count; i += kLanes) values[i] = ptx::to_float(logits[i]), largest = fmaxf(largest, values[i]);
  largest = warp_max(largest);
  for (int i = lane; i < count; i += kLanes) sum += expf(values[i] - largest);
  return Softmax(largest, warp_sum(sum));
}

// Whether the weights of a token's choices sum to 1.
PYEXT_DEVICE bool is_normalised(const RouteProblem& p) {
  return p.renormalize || p.policy == Policy::topk_softmax || p.policy == Policy::gshard;
}
PYEXT_DEVICE bool is_masked(const RouteProblem& p, int64_t token) { return p.token_mask && !p.token_mask[token]; }

// The balance loss is this times the sum over experts of their share of the choices times their mean score.
PYEXT_DEVICE float balance_factor(const RouteProblem& p) {
  const float experts = float(p.experts);
  return p.policy == Policy::gshard ? 1 / experts : p.policy == Policy::sigmoid ? experts / float(p.columns) : experts;
}

// --- Order ---

// A number that grows with x; NaN comes after everything, as in torch.sort, and -0 equals 0.
PYEXT_DEVICE uint32_t ordered(float x) {
  if (x != x) return ~1u;
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// What is chosen first is the largest: of equal values the one of the lower index.
PYEXT_DEVICE uint64_t place_of(float value, int index) { return uint64_t(ordered(value)) << 32 | ~uint32_t(index); }
PYEXT_DEVICE int index_of(uint64_t place) { return int(~uint32_t(place)); }

// The place of the best value that comes after the place `last`.
PYEXT_DEVICE uint64_t next_best(const float* values, int count, uint64_t last, int lane) {
  uint64_t best = 0;
  for (int i = lane; i < count; i += kLanes) {
    const uint64_t place = place_of(values[i], i);
    if (place < last && place > best) best = place;
  }
  return warp_max(best);
}

// --- Memory ---

// The pieces of a buffer, each aligned to 16 bytes.
struct Pieces {
  uintptr_t begin;
  int64_t bytes = 0;

  template <class T>
  void take(T*& piece, int64_t count) {
    piece = reinterpret_cast<T*>(begin + uintptr_t(bytes));
    bytes += ceil_div(count * int64_t(sizeof(T)), 16) * 16;
  }
};

// What kernels leave for one another.
struct Workspace {
  int64_t blocks = 0, bytes = 0;  // blocks of tokens in a group; the size of all that follows
  // Of a block whose warps read rows of logits: how many, how much memory for each, and for all. If `wide`, it is here.
  int warps = kMostWarps, warp_floats = 0;
  int64_t block_floats = 0;
  bool wide = false;
  float* rows = nullptr;  // [kWideBlocks][block_floats]
  // What each block of tokens adds to the losses: [groups][blocks][experts], and without experts.
  float *scores = nullptr, *z = nullptr;
  int *counts = nullptr, *alive = nullptr;
  float* terms = nullptr;      // [groups][experts], of the balance loss
  int* group_alive = nullptr;  // [groups]: tokens that are not masked
  int* all_alive = nullptr;    // [2]: such tokens, and groups that have any
  int* unchosen = nullptr;     // [1]: tokens that no expert took
  uint32_t* keys = nullptr;    // [groups][experts][tokens] where experts choose, else [groups][tokens]
  uint32_t* thresholds = nullptr;
  int* cuts = nullptr;  // both [groups][experts]
  int *order[2] = {}, *places = nullptr;
  int *table = nullptr, *totals = nullptr;

  explicit Workspace(const RouteProblem& p) {
    const bool forward = p.balance_loss != nullptr, choosing = p.policy == Policy::expert_choice;
    warp_floats = int(2 * p.experts + (p.top_groups < p.expert_groups ? p.expert_groups : 0));
    auto floats = [&] { return warps * (int64_t(warp_floats) + 2) + p.experts; };
    while (warps > 1 && floats() * 4 > kSharedBytes) warps /= 2;
    wide = floats() * 4 > kSharedBytes;
    block_floats = floats(), blocks = ceil_div(p.tokens, kTokens);
    Pieces pieces{reinterpret_cast<uintptr_t>(p.workspace)};
    pieces.take(rows, wide ? kWideBlocks * block_floats : 0);
    pieces.take(group_alive, p.groups), pieces.take(all_alive, 2);
    if (forward) {
      pieces.take(scores, p.groups * blocks * p.experts), pieces.take(counts, p.groups * blocks * p.experts);
      pieces.take(z, p.groups * blocks), pieces.take(alive, p.groups * blocks);
      pieces.take(terms, p.groups * p.experts), pieces.take(unchosen, 1);
      pieces.take(keys, choosing ? p.groups * p.experts * p.tokens : p.batch_priority ? p.groups * p.tokens : 0);
      pieces.take(thresholds, choosing ? p.groups * p.experts : 0);
      pieces.take(cuts, choosing ? p.groups * p.experts : 0);
      for (int*& tokens : order) pieces.take(tokens, p.batch_priority ? p.groups * p.tokens : 0);
      pieces.take(places, p.batch_priority ? p.groups * (kDigits + 1) : 0);
      int64_t entries = 0, bins = 0;
      for (const Tally& t : {by_digit(p), claims(p), all_rows(p)})
        entries = max_of(entries, t.segments * t.tiles * t.bins), bins = max_of(bins, t.segments * t.bins);
      pieces.take(table, entries), pieces.take(totals, bins);
    }
    bytes = pieces.bytes;
  }

  // The sequences that are ranked, of those that are needed.
  Tally by_digit(const RouteProblem& p) const {
    return p.batch_priority ? with_table(Tally(p.groups, p.tokens, kDigits)) : Tally();
  }
  Tally claims(const RouteProblem& p) const {
    const bool claim = p.capacity >= 0 && p.policy != Policy::expert_choice;
    return claim ? with_table(Tally(p.groups, p.tokens * p.columns, int(p.experts))) : Tally();
  }
  Tally all_rows(const RouteProblem& p) const {
    return with_table(Tally(1, p.groups * p.tokens * p.columns, int(p.experts)));
  }

  // Starts blocks that read rows of logits.
  template <class Kernel>
  int run(Kernel in_shared, Kernel in_workspace, const RouteProblem& p, int64_t units, cudaStream_t stream) const {
    const dim3 grid(wide ? unsigned(min_of(units, kWideBlocks)) : grid_x(units)), block(unsigned(warps * kLanes));
    const size_t shared = wide ? 0 : size_t(block_floats) * sizeof(float);
    return ptx::launch(wide ? in_workspace : in_shared, grid, block, shared, stream, p, *this);
  }

 private:
  Tally with_table(Tally t) const {
    t.table = table, t.totals = totals;
    return t;
  }
};

// The memory of such a block: of each warp the values of a row, sums, groups of experts; counters; two numbers of each
// warp.
struct BlockSpace {
  float *begin, *values, *sums, *groups, *scalars;
  int* counts;
  int warp_floats, experts;

  PYEXT_DEVICE BlockSpace(const RouteProblem& p, const Workspace& w, float* begin, int warp, int warps)
      : begin(begin),
        values(begin + int64_t(warp) * w.warp_floats),
        sums(values + p.experts),
        groups(sums + p.experts),
        scalars(begin + int64_t(warps) * w.warp_floats),
        counts(reinterpret_cast<int*>(scalars + 2 * warps)),
        warp_floats(w.warp_floats),
        experts(int(p.experts)) {}
  PYEXT_DEVICE const float* sums_of(int warp) const { return begin + int64_t(warp) * warp_floats + experts; }
};

template <bool wide>
PYEXT_DEVICE float* block_memory(const Workspace& w) {
  if constexpr (wide) {
    return w.rows + int64_t(blockIdx.x) * w.block_floats;
  } else {
    PYEXT_SHARED(float, shared);
    return shared;
  }
}

}  // namespace
}  // namespace pyext
