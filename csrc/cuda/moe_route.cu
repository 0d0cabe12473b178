// Routing of tokens to experts on the GPU (csrc/moe_route.h). A warp makes the choices of a token; choices claim slots
// and become rows by stable ranks (tally.h). Sums over tokens are taken in an order that depends on shapes only; what
// is added by atomics is whole numbers.
#include "moe_route_parts.h"

namespace pyext {
namespace {

// --- Choices ---

// Limits the choice to the best groups of experts, those whose two largest values have the largest sum.
PYEXT_DEVICE void limit_groups(const RouteProblem& p, float* values, float* groups, int lane) {
  const int experts = int(p.experts), count = int(p.expert_groups), width = experts / count;
  for (int group = lane; group < count; group += kLanes) {
    float best = -INFINITY, second = -INFINITY;
#pragma unroll 1
    for (int i = 0; i < width; ++i) {
      const float value = values[group * width + i];
      second = fmaxf(second, fminf(best, value)), best = fmaxf(best, value);
    }
    groups[group] = width == 1 ? best : best + second;
  }
  __syncwarp();
  uint64_t last = ~uint64_t(0);
#pragma unroll 1
  for (int i = 0; i < p.top_groups; ++i) last = next_best(groups, count, last, lane);
  for (int e = lane; e < experts; e += kLanes)
    if (place_of(groups[e / width], e / width) < last) values[e] = -INFINITY;
  __syncwarp();
}

// What a token's choices are made of.
struct Ranking {
  float* values;  // what they are ranked by
  Softmax softmax;
  int64_t token;
};

// The K best, their weights, and whom the balance loss counts.
template <class T>
PYEXT_DEVICE void choose_best(const RouteProblem& p, const Ranking& r, const T* logits, int* counts, int lane) {
  const bool logistic = p.policy == Policy::sigmoid, whole = is_normalised(p);
  const int experts = int(p.experts), columns = int(p.columns);
  int32_t* const choice = p.choice + r.token * columns;
  int32_t* const index = p.expert_index + r.token * columns;
  float* const weights = static_cast<float*>(p.weights) + r.token * columns;
  uint64_t last = ~uint64_t(0);
  float total = 0, largest = 0, own_gate = 0;
  int own = -1;
#pragma unroll 1
  for (int k = 0; k < columns; ++k) {
    last = next_best(r.values, experts, last, lane);
    const int e = index_of(last);
    const float logit = ptx::to_float(logits[e]);
    if (k == 0) largest = logit;
    const float gate = logistic ? sigmoid(logit) : whole ? expf(logit - largest) : r.softmax.score(logit);
    total += gate;
    if (lane == k % kLanes) own = e, own_gate = gate;
    const int mine = k - k % kLanes + lane;
    if ((k % kLanes == kLanes - 1 || k == columns - 1) && mine <= k) {
      choice[mine] = index[mine] = own, weights[mine] = own_gate;
      if (counts && (p.policy != Policy::gshard || mine == 0)) atomicAdd(counts + own, 1);
    }
  }
  if (!whole) return;
  if (logistic) total += kEpsilon;
#pragma unroll 1
  for (int k = lane; k < columns; k += kLanes) weights[k] /= total;
  // The second choice is kept with probability min(1, 2 g2).
  if (p.policy == Policy::gshard && lane == 1 && 2 * weights[1] <= p.uniform[r.token]) index[1] = -1, weights[1] = 0;
}

// Whether experts are ranked by score + bias within groups, as DeepSeek's; else by logits, which scores round.
PYEXT_DEVICE bool ranks_scores(const RouteProblem& p) { return p.expert_bias || p.top_groups < p.expert_groups; }

// Adds the shares of the sigmoids to `sums`, and makes `values` what experts are ranked by; returns the largest
// sigmoid.
PYEXT_DEVICE float rank_sigmoid(const RouteProblem& p, const BlockSpace& space, int lane) {
  const float* const bias = static_cast<const float*>(p.expert_bias);
  const bool ranked = ranks_scores(p);
  float *const values = space.values, *const sums = space.sums;
  const int experts = int(p.experts);
  float total = 0, largest = 0;
#pragma unroll 2
  for (int e = lane; e < experts; e += kLanes) {
    const float score = sigmoid(values[e]);
    total += score, largest = fmaxf(largest, score);
  }
  const float inverse = 1.0f / (warp_sum(total) + kEpsilon);
#pragma unroll 2
  for (int e = lane; e < experts; e += kLanes) {
    const float score = sigmoid(values[e]);
    sums[e] += score * inverse;
    if (ranked) values[e] = bias ? score + bias[e] : score;
  }
  __syncwarp();
  if (p.top_groups < p.expert_groups) limit_groups(p, values, space.groups, lane);
  return warp_max(largest);
}

// The balance loss counts the best experts without bias and groups.
template <class T>
PYEXT_DEVICE void count_best(const RouteProblem& p, const T* logits, float* values, int* counts, int lane) {
  const int experts = int(p.experts);
  __syncwarp();
  for (int e = lane; e < experts; e += kLanes) values[e] = ptx::to_float(logits[e]);
  __syncwarp();
  uint64_t last = ~uint64_t(0);
#pragma unroll 1
  for (int k = 0; k < p.columns; ++k) {
    last = next_best(values, experts, last, lane);
    if (lane == 0) atomicAdd(counts + index_of(last), 1);
  }
}

// The choices of a token, and what it adds to the sums over tokens; returns logsumexp(logits). Where experts choose,
// only the scores are written, once as weights and once as numbers that sort like them.
template <class T>
PYEXT_DEVICE float choose(const RouteProblem& p, const Workspace& w, int64_t group, int64_t s, const BlockSpace& space,
                          int lane) {
  const int experts = int(p.experts);
  const int64_t token = group * p.tokens + s;
  const T* const logits = static_cast<const T*>(p.logits.data) + group * p.logits.head + s * p.logits.row;
  float *const values = space.values, *const sums = space.sums;
  const Softmax softmax = read_row(logits, values, experts, lane);
  if (p.policy == Policy::expert_choice) {
#pragma unroll 2
    for (int e = lane; e < experts; e += kLanes) {
      const float score = softmax.score(values[e]);
      static_cast<float*>(p.weights)[token * experts + e] = score;
      w.keys[(group * experts + e) * p.tokens + s] = ordered(score);
    }
    return softmax.logarithm();
  }
  const bool logistic = p.policy == Policy::sigmoid;
  float largest;
  if (logistic) {
    largest = rank_sigmoid(p, space, lane);
  } else {
#pragma unroll 2
    for (int e = lane; e < experts; e += kLanes) sums[e] += softmax.score(values[e]);
    largest = softmax.score(softmax.largest);
    __syncwarp();
  }
  if (p.batch_priority && lane == 0) w.keys[token] = ~ordered(largest);
  const bool apart = logistic && ranks_scores(p);
  choose_best(p, Ranking{values, softmax, token}, logits, apart ? nullptr : space.counts, lane);
  if (apart) count_best(p, logits, values, space.counts, lane);
  return softmax.logarithm();
}

// Padding chooses nothing, comes last where experts choose, and anywhere in an order of priority.
PYEXT_DEVICE void choose_nothing(const RouteProblem& p, const Workspace& w, int64_t group, int64_t s, int lane) {
  const int64_t token = group * p.tokens + s;
  if (p.policy == Policy::expert_choice) {
    for (int64_t e = lane; e < p.experts; e += kLanes) w.keys[(group * p.experts + e) * p.tokens + s] = ordered(-1.0f);
    return;
  }
  for (int64_t i = token * p.columns + lane; i < (token + 1) * p.columns; i += kLanes)
    p.choice[i] = p.expert_index[i] = -1, static_cast<float*>(p.weights)[i] = 0;
  if (p.batch_priority && lane == 0) w.keys[token] = ~0u;
}

// A block takes kTokens tokens of a group, a warp at a time, and adds up what the losses need of them.
template <class T, bool wide>
__global__ void __launch_bounds__(kMostWarps* kLanes, 3) route_choose(const RouteProblem p, const Workspace w) {
  const int lane = int(threadIdx.x) % kLanes, warp = int(threadIdx.x) / kLanes, warps = int(blockDim.x) / kLanes;
  const BlockSpace space(p, w, block_memory<wide>(w), warp, warps);
  const int experts = int(p.experts);
  if (blockIdx.x == 0 && threadIdx.x == 0) *w.unchosen = 0;
  for (int64_t block = blockIdx.x; block < p.groups * w.blocks; block += gridDim.x) {
    const int64_t group = block / w.blocks, first = (block - group * w.blocks) * kTokens;
    const int64_t end = first + kTokens < p.tokens ? first + kTokens : p.tokens;
    for (int e = lane; e < experts; e += kLanes) space.sums[e] = 0;
    for (int e = int(threadIdx.x); e < experts; e += int(blockDim.x)) space.counts[e] = 0;
    __syncthreads();
    float z = 0, alive = 0;
    for (int64_t s = first + warp; s < end; s += warps) {
      if (is_masked(p, group * p.tokens + s)) {
        choose_nothing(p, w, group, s, lane);
      } else {
        const float logarithm = choose<T>(p, w, group, s, space, lane);
        z += logarithm * logarithm, ++alive;
      }
      __syncwarp();  // before the values are written again
    }
    if (lane == 0) space.scalars[2 * warp] = z, space.scalars[2 * warp + 1] = alive;
    __syncthreads();
    for (int e = int(threadIdx.x); e < experts; e += int(blockDim.x)) {
      float sum = 0;
      for (int other = 0; other < warps; ++other) sum += space.sums_of(other)[e];
      w.scores[block * experts + e] = sum, w.counts[block * experts + e] = space.counts[e];
    }
    if (threadIdx.x == 0) {
      float all_z = 0, all_alive = 0;
      for (int other = 0; other < warps; ++other)
        all_z += space.scalars[2 * other], all_alive += space.scalars[2 * other + 1];
      w.z[block] = all_z, w.alive[block] = int(all_alive);
    }
    __syncthreads();  // before the sums are written again
  }
}

// --- Experts that choose ---

// A block finds which tokens of its group an expert takes: those whose keys are above a threshold, and of those that
// equal it the first few. The threshold is found digit by digit.
__global__ void __launch_bounds__(kDigits) route_threshold(const RouteProblem p, const Workspace w) {
  PYEXT_SHARED(int, shared);
  int *const counts = shared, *const found = shared + kDigits, *const parts = found + 2;
  const int thread = int(threadIdx.x);
  for (int64_t column = blockIdx.x; column < p.groups * p.experts; column += gridDim.x) {
    const uint32_t* const keys = w.keys + column * p.tokens;
    uint32_t prefix = 0;
    int64_t wanted = p.capacity, equal = 0;
    for (int shift = 24; shift >= 0 && wanted > 0; shift -= 8) {
      counts[thread] = 0;
      __syncthreads();
      for (int64_t s = thread; s < p.tokens; s += kDigits)
        if ((keys[s] >> shift) >> 8 == prefix) atomicAdd(counts + (keys[s] >> shift) % kDigits, 1);
      __syncthreads();
      // The thread of the digit below which `wanted` keys are passed; digits are taken from the largest down.
      const int digit = kDigits - 1 - thread, count = counts[digit];
      int total;
      const int above = block_before(count, parts, total);
      if (above < wanted && wanted <= above + count) found[0] = digit, found[1] = above;
      __syncthreads();
      prefix = prefix << 8 | uint32_t(found[0]), wanted -= found[1], equal = counts[found[0]];
      __syncthreads();  // before they are written again
    }
    int64_t cut = wanted < equal ? -1 : p.tokens;  // the last of the equal ones that is taken, or all
    for (int64_t first = 0, before = 0; cut < 0 && wanted > 0; first += kDigits) {
      const int64_t s = first + thread;
      const int is_equal = s < p.tokens && keys[s] == prefix;
      int total;
      const int64_t rank = before + block_before(is_equal, parts, total);
      if (is_equal && rank == wanted - 1) found[0] = int(s);
      before += total;
      __syncthreads();
      if (before >= wanted) cut = found[0];
      __syncthreads();
    }
    if (thread == 0) w.thresholds[column] = p.capacity > 0 ? prefix : ~0u, w.cuts[column] = int(cut);
  }
}

// A warp writes which experts took a token, and the weights.
__global__ void __launch_bounds__(kMostWarps* kLanes) route_mark(const RouteProblem p, const Workspace w) {
  const int lane = int(threadIdx.x) % kLanes, warp = int(threadIdx.x) / kLanes;
  for (int64_t token = int64_t(blockIdx.x) * kMostWarps + warp; token < p.groups * p.tokens;
       token += int64_t(gridDim.x) * kMostWarps) {
    const int64_t group = token / p.tokens, s = token - group * p.tokens;
    float* const weights = static_cast<float*>(p.weights) + token * p.experts;
    const bool masked = is_masked(p, token);
    float total = 0;
    int taken = 0;
    for (int64_t e = lane; e < p.experts; e += kLanes) {
      const uint32_t threshold = w.thresholds[group * p.experts + e];
      const float score = masked ? 0 : weights[e];
      const uint32_t key = ordered(score);
      const bool takes = !masked && (key > threshold || (key == threshold && s <= w.cuts[group * p.experts + e]));
      p.choice[token * p.experts + e] = p.expert_index[token * p.experts + e] = takes ? int(e) : -1;
      weights[e] = takes ? score : 0;
      total += takes ? score : 0, taken += takes;
    }
    total = warp_sum(total), taken = warp_sum(taken);
    if (p.renormalize && total != 0)
      for (int64_t e = lane; e < p.experts; e += kLanes) weights[e] /= total;
    if (lane == 0 && !masked && taken == 0) atomicAdd(w.unchosen, 1);
  }
}

// --- Sequences to rank ---

// Tokens of a group by a digit of their keys.
struct ByDigit {
  const uint32_t* keys;
  const int* from;  // null: in their own order
  int* to;
  const int* places;
  int64_t tokens;
  int shift;

  PYEXT_DEVICE int token(int64_t segment, int64_t i) const { return from ? from[segment * tokens + i] : int(i); }
  PYEXT_DEVICE int bin(int64_t segment, int64_t i) const {
    return int((keys[segment * tokens + token(segment, i)] >> shift) % kDigits);
  }
  PYEXT_DEVICE void put(int64_t segment, int64_t i, int bin, int rank) const {
    to[segment * tokens + places[segment * (kDigits + 1) + bin] + rank] = token(segment, i);
  }
};

// Choices of a group in the order in which they claim slots: all first ones, all second ones, ... There are fewer than
// 2^31 of them, and 32 bits are divided faster than 64.
struct Claims {
  RouteProblem p;
  const int* order;  // of the tokens; null: their own

  PYEXT_DEVICE int64_t choice(int64_t segment, int64_t i) const {
    const uint32_t tokens = uint32_t(p.tokens), column = uint32_t(i) / tokens, place = uint32_t(i) - column * tokens;
    const int64_t token = segment * p.tokens + (order ? order[segment * p.tokens + place] : place);
    return token * p.columns + column;
  }
  PYEXT_DEVICE int bin(int64_t segment, int64_t i) const { return p.expert_index[choice(segment, i)]; }
  PYEXT_DEVICE void put(int64_t segment, int64_t i, int bin, int rank) const {
    if (bin < 0 || rank < p.capacity) return;
    const int64_t at = choice(segment, i);
    p.expert_index[at] = -1, static_cast<float*>(p.weights)[at] = 0;
  }
};

// All choices, token by token: they become rows.
struct Rows {
  RouteProblem p;

  PYEXT_DEVICE int bin(int64_t, int64_t i) const { return p.expert_index[i]; }
  PYEXT_DEVICE void put(int64_t, int64_t i, int bin, int rank) const {
    const int row = bin < 0 ? -1 : p.offsets[bin] + rank;
    p.position[i] = row;
    if (row >= 0) p.source[row] = int32_t(uint32_t(i) / uint32_t(p.columns));
    if (i < p.rows && i >= p.offsets[p.experts]) p.source[i] = -1;
  }
};

// --- Losses ---

// The balance loss of a group, expert by expert. threadIdx.x and blockIdx.x: experts of a group; threadIdx.y: parts of
// its blocks of tokens.
__global__ void __launch_bounds__(kLanes* kParts) route_group_losses(const RouteProblem p, const Workspace w) {
  PYEXT_SHARED(float, scores);
  int *const counts = reinterpret_cast<int*>(scores + kLanes * kParts), *const alive = counts + kLanes * kParts;
  const int64_t columns = (p.experts + kLanes - 1) / kLanes;
  const int slot = int(threadIdx.y * kLanes + threadIdx.x);
  for (int64_t block = blockIdx.x; block < p.groups * columns; block += gridDim.x) {
    const int64_t group = block / columns, e = (block - group * columns) * kLanes + threadIdx.x;
    float score = 0;
    int count = 0, tokens = 0;
    for (int64_t b = group * w.blocks + threadIdx.y; b < (group + 1) * w.blocks; b += kParts) {
      tokens += w.alive[b];
      if (e < p.experts) score += w.scores[b * p.experts + e], count += w.counts[b * p.experts + e];
    }
    scores[slot] = score, counts[slot] = count, alive[slot] = tokens;
    __syncthreads();
    if (threadIdx.y == 0 && e < p.experts) {
      double sum = 0;
      count = tokens = 0;
      for (int i = slot; i < kLanes * kParts; i += kLanes) sum += scores[i], count += counts[i], tokens += alive[i];
      const double total = tokens > 0 ? tokens : 1;
      p.load[group * p.experts + e] = count;
      w.terms[group * p.experts + e] = float(balance_factor(p) * (count / total) * (sum / total));
      if (e == 0) w.group_alive[group] = tokens;
    }
    __syncthreads();  // before they are written again
  }
}

// One block: tokens that are not masked, and groups that have any, in all.
PYEXT_DEVICE void add_alive(const RouteProblem& p, const Workspace& w, double* parts) {
  double tokens = 0, groups = 0;
  for (int64_t group = threadIdx.x; group < p.groups; group += blockDim.x)
    tokens += w.group_alive[group], groups += w.group_alive[group] > 0;
  tokens = block_sum(tokens, parts), groups = block_sum(groups, parts);
  if (threadIdx.x == 0) w.all_alive[0] = int(tokens), w.all_alive[1] = int(groups);
}

// One block: what is left to add up over groups, and what was dropped.
__global__ void __launch_bounds__(kLanes* kParts) route_finish(const RouteProblem p, const Workspace w) {
  PYEXT_SHARED(double, parts);
  add_alive(p, w, parts);
  double terms = 0, z = 0;
  for (int64_t i = threadIdx.x; i < p.groups * p.experts; i += blockDim.x) terms += w.terms[i];
  for (int64_t i = threadIdx.x; i < p.groups * w.blocks; i += blockDim.x) z += w.z[i];
  terms = block_sum(terms, parts), z = block_sum(z, parts);
  if (threadIdx.x > 0) return;
  const int tokens = w.all_alive[0], groups = w.all_alive[1];
  *static_cast<float*>(p.balance_loss) = float(terms / (groups > 0 ? groups : 1));
  *static_cast<float*>(p.z_loss) = float(z / (tokens > 0 ? tokens : 1));
  if (tokens == 0)
    *p.dropped = 0;
  else if (p.policy == Policy::expert_choice)
    *p.dropped = *w.unchosen;
  else
    *p.dropped = int32_t(tokens * p.columns - p.offsets[p.experts]);
}

// --- Backward ---

// A block per group counts its tokens that are not masked.
__global__ void __launch_bounds__(kLanes* kParts) route_count_alive(const RouteProblem p, const Workspace w) {
  PYEXT_SHARED(int, parts);
  for (int64_t group = blockIdx.x; group < p.groups; group += gridDim.x) {
    int alive = 0;
    for (int64_t s = threadIdx.x; s < p.tokens; s += blockDim.x) alive += !is_masked(p, group * p.tokens + s);
    alive = block_sum(alive, parts);
    if (threadIdx.x == 0) w.group_alive[group] = alive;
  }
}

__global__ void __launch_bounds__(kLanes* kParts) route_add_alive(const RouteProblem p, const Workspace w) {
  PYEXT_SHARED(double, parts);
  add_alive(p, w, parts);
}

// Adds the gradients of the weights to those of the chosen scores. A softmax over the chosen logits is the chosen
// scores divided by their sum, too. Returns what they add to sum_e score_e dscore_e.
PYEXT_DEVICE float add_weights(const RouteProblem& p, int64_t token, const Softmax& softmax, const float* values,
                               float* slopes, int lane) {
  const bool logistic = p.policy == Policy::sigmoid, whole = is_normalised(p);
  const int32_t *const chosen = p.chosen + token * p.columns, *const kept = p.kept + token * p.columns;
  const float* const grad = static_cast<const float*>(p.grad_weights) + token * p.columns;
  const uint32_t experts = uint32_t(p.experts);  // which -1 is beyond
  float total = 0, product = 0;
  for (int64_t k = lane; k < p.columns; k += kLanes) {
    if (uint32_t(chosen[k]) >= experts) continue;
    const float score = logistic ? sigmoid(values[chosen[k]]) : softmax.score(values[chosen[k]]);
    total += score;
    if (kept[k] >= 0) product += score * grad[k];
  }
  total = warp_sum(total), product = warp_sum(product);
  if (logistic) total += kEpsilon;
  const float divisor = whole && total != 0 ? total : 1, mean = whole && total != 0 ? product / total : 0;
  for (int64_t k = lane; k < p.columns; k += kLanes)
    if (uint32_t(chosen[k]) < experts) slopes[chosen[k]] += ((kept[k] >= 0 ? grad[k] : 0) - mean) / divisor;
  return whole ? 0 : product;
}

// The gradients of a token's scores from the balance loss; returns sum_e score_e dscore_e, for a softmax.
PYEXT_DEVICE float add_balance(const RouteProblem& p, float share, int64_t group, const Softmax& softmax,
                               const float* values, float* slopes, int lane) {
  const int32_t* const counted = p.counted + group * p.experts;
  const int experts = int(p.experts);
  float product = 0, total = 0;
  if (p.policy != Policy::sigmoid) {
    for (int e = lane; e < experts; e += kLanes) {
      slopes[e] = share * float(counted[e]);
      product += slopes[e] * softmax.score(values[e]);
    }
    return warp_sum(product);
  }
  // Scores are divided by their sum.
  for (int e = lane; e < experts; e += kLanes) {
    const float score = sigmoid(values[e]);
    total += score, product += share * float(counted[e]) * score;
  }
  total = warp_sum(total) + kEpsilon, product = warp_sum(product) / total;
  for (int e = lane; e < experts; e += kLanes) slopes[e] = (share * float(counted[e]) - product) / total;
  return 0;
}

template <class T, bool wide>
__global__ void __launch_bounds__(kMostWarps* kLanes, 4) route_backward(const RouteProblem p, const Workspace w) {
  const int lane = int(threadIdx.x) % kLanes, warp = int(threadIdx.x) / kLanes, warps = int(blockDim.x) / kLanes;
  const BlockSpace space(p, w, block_memory<wide>(w), warp, warps);
  const int experts = int(p.experts);
  float *const values = space.values, *const slopes = space.sums;
  const float balance = p.grad_balance ? *static_cast<const float*>(p.grad_balance) : 0;
  const float z = p.grad_z ? *static_cast<const float*>(p.grad_z) : 0;
  for (int64_t token = int64_t(blockIdx.x) * warps + warp; token < p.groups * p.tokens;
       token += int64_t(gridDim.x) * warps) {
    const int64_t group = token / p.tokens, s = token - group * p.tokens;
    T* const to = static_cast<T*>(p.grad_logits) + token * experts;
    if (is_masked(p, token)) {
      for (int e = lane; e < experts; e += kLanes) to[e] = ptx::from_float<T>(0.0f);
      continue;
    }
    const T* const logits = static_cast<const T*>(p.logits.data) + group * p.logits.head + s * p.logits.row;
    const Softmax softmax = read_row(logits, values, experts, lane);
    const float alive = float(w.group_alive[group]);
    const float share = balance * balance_factor(p) / (float(w.all_alive[1]) * alive * alive);
    float product = add_balance(p, share, group, softmax, values, slopes, lane);
    __syncwarp();
    if (p.grad_weights) product += add_weights(p, token, softmax, values, slopes, lane);
    __syncwarp();
    const float slope = 2 * z * softmax.logarithm() / float(w.all_alive[0]);
    for (int e = lane; e < experts; e += kLanes) {
      const float logit = values[e], score = softmax.score(logit);
      float grad = score * (slopes[e] - product + slope);
      if (p.policy == Policy::sigmoid) grad = slopes[e] * sigmoid(logit) * sigmoid(-logit) + score * slope;
      to[e] = ptx::from_float<T>(grad);
    }
    __syncwarp();  // before the values are written again
  }
}

// --- Launchers ---

int run_choose(const RouteProblem& p, const Workspace& w, cudaStream_t stream) {
  if (p.groups * p.tokens == 0) return cudaSuccess;
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    return w.run(route_choose<T, false>, route_choose<T, true>, p, p.groups * w.blocks, stream);
  });
}

// The experts' choices; then the tokens' that find a slot.
int run_experts_choice(const RouteProblem& p, const Workspace& w, cudaStream_t stream) {
  const int64_t tokens = p.groups * p.tokens;
  if (tokens == 0) return cudaSuccess;
  const size_t shared = (kDigits + 2 + kLanes) * sizeof(int);
  const dim3 grid(grid_x(p.groups * p.experts)), blocks(grid_x(ceil_div(tokens, kMostWarps)));
  const int error = ptx::launch(route_threshold, grid, dim3(kDigits), shared, stream, p, w);
  return error ? error : ptx::launch(route_mark, blocks, dim3(kMostWarps * kLanes), 0, stream, p, w);
}

// Sorts the tokens of each group by their keys, the lowest first; `order` points at the result.
int run_sort(const RouteProblem& p, const Workspace& w, const int*& order, cudaStream_t stream) {
  const Tally t = w.by_digit(p);
  for (int pass = 0; pass < 4; ++pass) {
    const ByDigit items{w.keys, order, w.order[pass % 2], w.places, p.tokens, 8 * pass};
    int error = run_count(items, t, w.places, stream);
    if (!error) error = run_walk<true>(items, t, stream);
    if (error) return error;
    order = items.to;
  }
  return cudaSuccess;
}

int run_claims(const RouteProblem& p, const Workspace& w, cudaStream_t stream) {
  Claims claims{p, nullptr};
  int error = p.batch_priority ? run_sort(p, w, claims.order, stream) : cudaSuccess;
  const Tally t = w.claims(p);
  if (!error) error = run_count(claims, t, nullptr, stream);
  return error ? error : run_walk<true>(claims, t, stream);
}

int run_rows(const RouteProblem& p, const Workspace& w, cudaStream_t stream) {
  const Tally t = w.all_rows(p);
  const int error = run_count(Rows{p}, t, p.offsets, stream);
  return error ? error : run_walk<true>(Rows{p}, t, stream);
}

int run_losses(const RouteProblem& p, const Workspace& w, cudaStream_t stream) {
  const dim3 block(kLanes, kParts), grid(grid_x(p.groups * ceil_div(p.experts, kLanes)));
  int error = cudaSuccess;
  if (p.groups > 0) error = ptx::launch(route_group_losses, grid, block, 3 * kLanes * kParts * 4, stream, p, w);
  if (error) return error;
  return ptx::launch(route_finish, dim3(1), dim3(kLanes * kParts), kLanes * sizeof(double), stream, p, w);
}

}  // namespace
}  // namespace pyext

int64_t pyext_cuda_moe_route_workspace(const pyext::RouteProblem& p) { return pyext::Workspace(p).bytes; }

int pyext_cuda_moe_route_forward(const pyext::RouteProblem& p, void* on) {
  using namespace pyext;
  const auto stream = static_cast<cudaStream_t>(on);
  const Workspace w(p);
  int error = run_choose(p, w, stream);
  if (!error && p.policy == Policy::expert_choice)
    error = run_experts_choice(p, w, stream);
  else if (!error && p.capacity >= 0)
    error = run_claims(p, w, stream);
  if (!error) error = run_rows(p, w, stream);
  return error ? error : run_losses(p, w, stream);
}

int pyext_cuda_moe_route_backward(const pyext::RouteProblem& p, void* on) {
  using namespace pyext;
  const auto stream = static_cast<cudaStream_t>(on);
  const Workspace w(p);
  if (p.groups * p.tokens == 0) return cudaSuccess;
  const dim3 block(kLanes * kParts);
  int error = ptx::launch(route_count_alive, dim3(grid_x(p.groups)), block, kLanes * sizeof(int), stream, p, w);
  if (!error) error = ptx::launch(route_add_alive, dim3(1), block, kLanes * sizeof(double), stream, p, w);
  if (error) return error;
  return with_element(p.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t units = ceil_div(p.groups * p.tokens, w.warps);
    return w.run(route_backward<T, false>, route_backward<T, true>, p, units, stream);
  });
}
