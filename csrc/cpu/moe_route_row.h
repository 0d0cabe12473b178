// What routing computes of one token at a time, forward and backward.
#pragma once
#include "../moe_route.h"
#include "activations.h"
#include "gemm.h"
#include "top_k.h"

namespace pyext {
namespace {

// Keeps a sum of sigmoids that are all 0 from being divided by, as in DeepSeek's code.
constexpr double kScoreEpsilon = 1e-20;

// The logits of one token, and what follows from them. All rows go on to a whole vector: with logits of -inf, of which
// everything else is 0.
template <class T>
struct RouteRow {
  using V = Vec<T>;
  static constexpr int W = kWidth<T>;

  const RouteProblem& p;
  const bool by_score = p.policy == Policy::sigmoid;
  T *logits, *power, *score = nullptr, *slope = nullptr, *ranked = nullptr, *pairs = nullptr;
  T top, total, score_total;  // largest logit, sum of powers e^(logit - top), sum of scores s = 1 / (1 + e^-logit)
  TopK<T> best, best_groups;

  void lay_out_in(Arena& arena) {
    const int64_t size = round_up(p.experts, W);
    logits = arena.take<T>(size), power = arena.take<T>(size);
    if (!by_score) return;
    // A group of experts is read by whole vectors, past the last expert too.
    score = arena.take<T>(size), slope = arena.take<T>(size), ranked = arena.take<T>(size + W);
    pairs = arena.take<T>(round_up(p.expert_groups, W));
  }
  void lay_out_choice_in(Arena& arena) {
    best.lay_out_in(arena, p.experts, p.columns);
    if (by_score) best_groups.lay_out_in(arena, p.expert_groups, p.top_groups);
  }

  // Runs body(element) for each vector of a row.
  template <class Body>
  INLINE void each(const Body& body) const {
    for (int64_t at = 0, size = p.experts; at < size; at += W) body(at);
  }

  INLINE void load(DType dtype, const char* from) {
    const int64_t size = p.experts, bytes = element_size(dtype);
    T *const logits = this->logits, *const power = this->power;  // members would be read again after each store
    const V none = vset(-T(INFINITY));
    V largest = none;
    int64_t at = 0;
    auto keep = [&](V x) INLINE_LAMBDA { largest = vmax(largest, x), vstore(logits + at, x); };
    for (; at + W <= size; at += W) keep(vload_as(dtype, from + at * bytes, T(0)));
    if (at < size) keep(select(lanes<T>(0, size - at), vload_some<T>(dtype, from + at * bytes, size - at), none));
    top = reduce_max(largest);
    V sum = vset(T(0));
    const V shift = vset(top);
    each([&](int64_t i) INLINE_LAMBDA {
      const V x = vexp(vsub(vload(logits + i), shift));
      sum = vadd(sum, x), vstore(power + i, x);
    });
    total = reduce_add(sum);
    if (by_score) load_scores();
  }
  void load_scores() {
    V sum = vset(T(0));
    each([&](int64_t i) INLINE_LAMBDA {
      V rest;
      const V x = ::pyext::sigmoid(vload(logits + i), rest);
      sum = vadd(sum, x), vstore(score + i, x), vstore(slope + i, vmul(x, rest));
    });
    score_total = reduce_add(sum);
  }
  T logsumexp() const { return top + std::log(total); }
  T largest_score() const {  // of softmax or sigmoid
    if (!by_score) return T(1) / total;
    V largest = vset(T(0));
    each([&](int64_t i) { largest = vmax(largest, vload(score + i)); });
    return reduce_max(largest);
  }
  // What the shares of the balance loss are proportional to, and to be multiplied with.
  const T* shares() const { return by_score ? score : power; }
  T share() const { return T(1) / (by_score ? score_total + T(kScoreEpsilon) : total); }

  // What the gate of a choice is proportional to.
  INLINE T gate(int64_t expert) const { return by_score ? score[expert] : power[expert]; }

  // The experts with the largest logits, in the order of those: in two steps, as in TopK. Logits keep the order of the
  // probabilities and of the scores, and differ where those are rounded to the same. NaN comes first.
  INLINE void compare_logits() {
    if (!(total == total)) each([&](int64_t i) { vstore(logits + i, nan_first(vload(logits + i))); });
    best.collect(logits, p.experts);
  }
  INLINE const int32_t* choose_by_logits() { return best.ranked(); }
  // Those with the largest score + bias in the best groups.
  const int32_t* choose_by_scores() {
    const T* bias = (const T*)p.expert_bias;
    const int64_t size = p.experts;
    each([&](int64_t i) {
      V x = vload(score + i);
      if (bias) x = vadd(x, size - i >= W ? vload(bias + i) : vload_some<T>(kAcc, (const char*)(bias + i), size - i));
      vstore(ranked + i, select(lanes<T>(0, size - i), nan_first(x), vset(-T(INFINITY))));
    });
    if (p.top_groups < p.expert_groups) leave_best_groups();
    return best.find(ranked, size);
  }
  static INLINE V nan_first(V x) { return select(less_equal(x, x), x, vset(T(INFINITY))); }

 private:
  static constexpr DType kAcc = sizeof(T) == 8 ? DType::f64 : DType::f32;

  // The sum of the two largest, or the only one.
  T sum_of_best_two(const T* list, int64_t size) const {
    const V none = vset(-T(INFINITY));
    V first = none, second = none;
    for (int64_t at = 0; at < size; at += W) {
      const V x = select(lanes<T>(0, size - at), vload(list + at), none);
      second = vmax(second, vmin(first, x)), first = vmax(first, x);
    }
    if (size == 1) return reduce_max(first);
    T lane[W];
    vstore(lane, first);
    int l = 0;
    for (int i = 1; i < W; ++i)
      if (lane[i] > lane[l]) l = i;
    return lane[l] + reduce_max(select(lanes<T>(l, l + 1), second, first));
  }
  void leave_best_groups() {
    const int64_t width = p.experts / p.expert_groups;
    for (int64_t at = p.expert_groups / W * W; at < round_up(p.expert_groups, W); ++at) pairs[at] = -T(INFINITY);
    for (int64_t g = 0; g < p.expert_groups; ++g) pairs[g] = sum_of_best_two(ranked + g * width, width);
    const int32_t* found = best_groups.find(pairs, p.expert_groups);
    T* kept = pairs;
    for (int64_t g = 0; g < p.expert_groups; ++g) kept[g] = 0;
    for (int64_t i = 0; i < p.top_groups; ++i) kept[found[i]] = 1;
    for (int64_t e = 0; e < p.experts; ++e)
      if (kept[e / width] == 0) ranked[e] = -T(INFINITY);
  }
};

}  // namespace
}  // namespace pyext
