// What comes after the choices of routing: slots of a limited capacity, the choices of experts, and the rows.
#pragma once
#include "../moe_route.h"
#include "gemm.h"

namespace pyext {
namespace {

// Numbers that are not negative, as integers of the same order.
template <class T>
using BitsOf = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
template <class T>
INLINE BitsOf<T> bits_of(T x) {
  BitsOf<T> bits;
  memcpy(&bits, &x, sizeof(T));
  return bits;
}

// order = 0 .. count - 1 by falling score, equal ones in order: a radix sort. `other` is room for as many.
template <class T>
void sort_falling(const T* score, int64_t count, int32_t* order, int32_t* other) {
  for (int64_t i = 0; i < count; ++i) order[i] = int32_t(i);
  for (int shift = 0; shift < 8 * int(sizeof(T)); shift += 8) {
    int64_t start[257] = {};
    auto digit = [&](int64_t i) { return 255 - (bits_of(score[i]) >> shift & 255); };
    for (int64_t i = 0; i < count; ++i) ++start[digit(i) + 1];
    for (int d = 0; d < 256; ++d) start[d + 1] += start[d];
    for (int64_t i = 0; i < count; ++i) other[start[digit(order[i])]++] = order[i];
    int32_t* sorted = other;
    other = order, order = sorted;  // an even number of times
  }
}

// Lets the choices of a group's tokens claim slots: all first choices before any second, tokens in order, or by falling
// score. Those that find none become -1, with weight 0. Room: experts numbers, and with score 2 * tokens.
template <class T>
void claim_slots(const RouteProblem& p, int64_t group, const T* score, int32_t* room) {
  int32_t *slots = room, *order = room + p.experts;
  memset(slots, 0, size_t(p.experts) * sizeof(int32_t));
  const int64_t first = group * p.tokens;
  if (score) sort_falling(score + first, p.tokens, order, order + p.tokens);
  for (int64_t k = 0; k < p.columns; ++k) {
    for (int64_t i = 0; i < p.tokens; ++i) {
      const int64_t at = (first + (score ? order[i] : i)) * p.columns + k;
      int32_t& expert = p.expert_index[at];
      if (expert < 0) continue;
      if (slots[expert] < p.capacity)
        ++slots[expert];
      else
        expert = -1, ((T*)p.weights)[at] = 0;
    }
  }
}

// The worst score that an expert takes, and up to which token it takes those with exactly this one.
template <class T>
struct Bar {
  BitsOf<T> least;
  int64_t last;

  bool takes(T score, int64_t token) const {
    const BitsOf<T> bits = bits_of(score);
    return bits > least || (bits == least && token <= last);
  }
};

// Finds the bars of `count` experts for a group of tokens, of which `alive` are not masked, by a radix select: from the
// highest digit on, each pass finds one digit of the capacity-th largest score. scores: (tokens, experts) of the group.
template <class T>
struct BarFinder {
  static constexpr int kTogether = 16;  // experts: a cache line of scores

  const RouteProblem& p;
  const T* scores;
  const uint8_t* mask;  // or null
  int64_t alive;

  void find(int64_t expert, int64_t count, Bar<T>* bars) const {
    if (alive <= p.capacity || p.capacity == 0) {  // all, or none
      for (int64_t c = 0; c < count; ++c) bars[c] = p.capacity ? Bar<T>{0, p.tokens} : Bar<T>{BitsOf<T>(-1), -1};
      return;
    }
    BitsOf<T> prefix[kTogether] = {};
    int64_t left[kTogether];  // how many are to be taken of those that begin with the prefix
    for (int64_t c = 0; c < count; ++c) left[c] = p.capacity;
    for (int shift = 8 * int(sizeof(T)) - 8; shift >= 0; shift -= 8) {
      int32_t histogram[kTogether][256] = {};
      each(expert, count, [&](int64_t c, BitsOf<T> bits, int64_t) INLINE_LAMBDA {
        if (((bits ^ prefix[c]) >> shift >> 8) == 0) ++histogram[c][bits >> shift & 255];
      });
      for (int64_t c = 0; c < count; ++c) {
        int digit = 255;
        for (; histogram[c][digit] < left[c]; --digit) left[c] -= histogram[c][digit];
        prefix[c] |= BitsOf<T>(digit) << shift;
      }
    }
    for (int64_t c = 0; c < count; ++c) bars[c] = {prefix[c], -1};
    each(expert, count, [&](int64_t c, BitsOf<T> bits, int64_t token) INLINE_LAMBDA {
      if (bits == prefix[c] && left[c]-- > 0) bars[c].last = token;
    });
  }

 private:
  template <class Body>
  void each(int64_t expert, int64_t count, const Body& body) const {
    for (int64_t s = 0; s < p.tokens; ++s) {
      if (mask && !mask[s]) continue;
      for (int64_t c = 0; c < count; ++c) body(c, bits_of(scores[s * p.experts + expert + c]), s);
    }
  }
};

// offsets, source and position from expert_index: rows by expert, then by token. histogram: room for kMapBlocks *
// experts numbers. Returns the number of used rows.
constexpr int64_t kMapBlocks = 64, kMapTokens = 512;  // at most so many blocks, of at least so many tokens

inline int64_t make_maps(const RouteProblem& p, const Parallel& parallel, int32_t* histogram) {
  const int64_t tokens = p.groups * p.tokens, block = max_of(kMapTokens, ceil_div(tokens, kMapBlocks));
  const int64_t blocks = ceil_div(tokens, block);
  auto each = [&](int64_t b, auto body) {  // body(place in expert_index, token, expert)
    for (int64_t t = b * block; t < min_of((b + 1) * block, tokens); ++t)
      for (int64_t at = t * p.columns; at < (t + 1) * p.columns; ++at) body(at, t, p.expert_index[at]);
  };
  for_each_task(parallel, blocks, [&](int64_t b) {
    int32_t* count = histogram + b * p.experts;
    memset(count, 0, size_t(p.experts) * sizeof(int32_t));
    each(b, [&](int64_t, int64_t, int32_t expert) {
      if (expert >= 0) ++count[expert];
    });
  });
  int32_t used = 0;
  for (int64_t e = 0; e < p.experts; ++e) {
    p.offsets[e] = used;
    for (int64_t b = 0; b < blocks; ++b) {
      int32_t& start = histogram[b * p.experts + e];
      const int32_t count = start;
      start = used, used += count;
    }
  }
  p.offsets[p.experts] = used;
  for_each_task(parallel, blocks, [&](int64_t b) {
    int32_t* next = histogram + b * p.experts;
    each(b, [&](int64_t at, int64_t token, int32_t expert) {
      const int32_t row = expert < 0 ? -1 : next[expert]++;
      p.position[at] = row;
      if (row >= 0) p.source[row] = int32_t(token);
    });
  });
  for (int64_t row = used; row < p.rows; ++row) p.source[row] = -1;
  return used;
}

}  // namespace
}  // namespace pyext
