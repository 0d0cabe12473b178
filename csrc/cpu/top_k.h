// The largest numbers of a list, in order: of equal ones the first comes first.
#pragma once
#include "gemm.h"

namespace pyext {
namespace {

#if defined(__AVX512F__)
// Writes the lanes in the set, and their numbers counted from `first`, side by side; returns how many there are. May
// write, and spoil, as much memory as a whole vector takes.
INLINE int64_t store_chosen(float* values, int32_t* numbers, Lanes chosen, F v, int32_t first) {
  vstore(values, _mm512_maskz_compress_ps(chosen, v));
  _mm512_storeu_si512(numbers, _mm512_maskz_compress_epi32(chosen, uadd(uiota(), uset(uint32_t(first)))));
  return __builtin_popcount(chosen);
}
INLINE int64_t store_chosen(double* values, int32_t* numbers, Lanes chosen, D v, int32_t first) {
  const __m256i lane = _mm512_castsi512_si256(uadd(uiota(), uset(uint32_t(first))));
  vstore(values, _mm512_maskz_compress_pd(__mmask8(chosen), v));
  _mm256_storeu_si256((__m256i*)numbers, _mm256_maskz_compress_epi32(__mmask8(chosen), lane));
  return __builtin_popcount(chosen & 0xFF);
}
#else
template <class T, class V>
INLINE int64_t store_chosen(T* values, int32_t* numbers, Lanes chosen, V v, int32_t first) {
  T lane[Vector<T>::width];
  vstore(lane, v);
  unsigned bits = sizeof(T) == 4 ? unsigned(_mm256_movemask_ps(_mm256_castsi256_ps(chosen)))
                                 : unsigned(_mm256_movemask_pd(_mm256_castsi256_pd(chosen)));
  int64_t count = 0;
  for (; bits; bits &= bits - 1, ++count) {
    const int l = __builtin_ctz(bits);
    values[count] = lane[l], numbers[count] = first + l;
  }
  return count;
}
#endif

// Finds the `count` largest of up to `most` numbers, none of them NaN.
//
// With as many lanes as numbers wanted, the count-th largest of the lanes' own largest numbers is a bound that few
// others reach (11 of 128 for 8 in 16 lanes). What reaches it is ranked by comparing each with all; where too much
// does, or there is no such bound, the best so far are ranked now and then and give a better one.
template <class T>
struct TopK {
  using V = Vec<T>;
  static constexpr int W = kWidth<T>;

  int64_t count, limit;      // more candidates than the limit are ranked at once
  T *values, *sorted;        // candidates, and the same in order
  int32_t *numbers, *found;  // their places in the list

  void lay_out_in(Arena& arena, int64_t most, int64_t wanted) {
    count = wanted, limit = min_of(most, wanted + 4 * W);
    const int64_t room = round_up(limit, W) + 2 * W;
    values = arena.take<T>(room), sorted = arena.take<T>(room);
    numbers = arena.take<int32_t>(room), found = arena.take<int32_t>(room);
  }

  // Leaves the places of the largest of list[0 .. size), count <= size, in `found`. -inf follows the list up to a whole
  // vector.
  INLINE void find(const T* list, int64_t size) {
    T least = -T(INFINITY);
    bool beyond = false;  // candidates must be larger than `least`, not just as large
    if (count <= W && size > 2 * W) {
      V largest = vload(list);
      for (int64_t at = W; at < size; at += W) largest = vmax(largest, vload(list + at));
      vstore(values, largest);
      sort(W);
      least = sorted[count - 1];
    }
    int64_t n = 0;
    auto take = [&](int64_t at, Lanes inside) INLINE_LAMBDA {
      const V x = vload(list + at), bound = vset(least);
      const Lanes good = (beyond ? less(bound, x) : less_equal(bound, x)) & inside;
      n += store_chosen(values + n, numbers + n, good, x, int32_t(at));
      if (n <= limit) return;
      sort(n);
      n = count, least = sorted[count - 1], beyond = true;
      memcpy(values, sorted, size_t(n) * sizeof(T)), memcpy(numbers, found, size_t(n) * sizeof(int32_t));
    };
    int64_t at = 0;
    for (; at + W <= size; at += W) take(at, lanes<T>(0, W));
    if (at < size) take(at, lanes<T>(0, size - at));
    sort(n);
  }

 private:
  // The first n candidates in order, each put where as many are before it.
  INLINE void sort(int64_t n) {
    vstore(values + n, vset(-T(INFINITY)));
    const V one = vset(T(1));
    for (int64_t block = 0; block < n; block += W) {
      const V x = vload(values + block);
      V rank = vset(T(0));
      auto add = [&](Lanes before) INLINE_LAMBDA { rank = select(before, vadd(rank, one), rank); };
      for (int64_t i = 0; i < block; ++i) add(less_equal(x, vset(values[i])));
      UNROLL for (int l = 0; l < W; ++l) {
        const V y = vset(values[block + l]);
        add(less(x, y) | (less_equal(x, y) & lanes<T>(l + 1, W)));
      }
      for (int64_t i = block + W; i < n; ++i) add(less(x, vset(values[i])));
      T ranks[W];
      vstore(ranks, rank);
      for (int64_t l = 0; l < min_of<int64_t>(W, n - block); ++l) {
        const int64_t to = int64_t(ranks[l]);
        sorted[to] = values[block + l], found[to] = numbers[block + l];
      }
    }
  }
};

}  // namespace
}  // namespace pyext
