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
  int64_t count = 0;
  for (uint32_t bits = bits_of_lanes<T>(chosen); bits; bits &= bits - 1, ++count) {
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
  int64_t candidates;        // how many there are
  T *values, *sorted;        // candidates, and the same in order
  int32_t *numbers, *found;  // their places in the list

  void lay_out_in(Arena& arena, int64_t most, int64_t wanted) {
    count = wanted, limit = min_of(most, wanted + 4 * W);
    const int64_t room = round_up(limit, W) + 2 * W;
    values = arena.take<T>(room), sorted = arena.take<T>(room);
    numbers = arena.take<int32_t>(room), found = arena.take<int32_t>(room);
  }

  // The places of the largest of list[0 .. size), count <= size. -inf follows the list up to a whole vector.
  INLINE const int32_t* find(const T* list, int64_t size) {
    collect(list, size);
    return ranked();
  }
  // The same in two steps: other work between them hides how long it takes until what `collect` stored can be loaded.
  INLINE const int32_t* ranked() {
    sort(candidates);
    return found;
  }
  INLINE void collect(const T* list, int64_t size) {
    T least = count <= W && size > 2 * W ? bound(list, size) : -T(INFINITY);
    int64_t n = 0;
    T* const to = values;  // members would be read again after each store
    int32_t* const place = numbers;
    auto take = [&](int64_t at, Lanes inside) INLINE_LAMBDA {
      const V x = vload(list + at);
      n += store_chosen(to + n, place + n, less_equal(vset(least), x) & inside, x, int32_t(at));
      if (n > limit) least = leave_best(n), n = count;
    };
    int64_t at = 0;
    for (; at + W <= size; at += W) take(at, lanes<T>(0, W));
    if (at < size) take(at, lanes<T>(0, size - at));
    candidates = n;
  }

 private:
  // The count-th largest of the lanes' largest numbers.
  INLINE T bound(const T* list, int64_t size) const {
    V largest = vload(list);
    for (int64_t at = W; at < size; at += W) largest = vmax(largest, vload(list + at));
    T lane[W];
    vstore(lane, largest);
    V reached = vset(T(0));  // by how many lanes
    const V one = vset(T(1));
    UNROLL for (int l = 0; l < W; ++l) reached =
        select(less_equal(largest, vset(lane[l])), vadd(reached, one), reached);
    return reduce_max(select(less_equal(vset(T(count)), reached), largest, vset(-T(INFINITY))));
  }
  // The first n candidates in order, each put where as many are before it: earlier ones that are as large, and later
  // ones that are larger.
  INLINE void sort(int64_t n) {
    vstore(values + n, vset(-T(INFINITY)));
    auto put = [&](int64_t i, int64_t rank) INLINE_LAMBDA { sorted[rank] = values[i], found[rank] = numbers[i]; };
    auto before = [](V x, V y, uint32_t earlier) INLINE_LAMBDA {
      const uint32_t as_large = bits_of_lanes<T>(less_equal(y, x)), larger = bits_of_lanes<T>(less(y, x));
      return int64_t(__builtin_popcount((as_large & earlier) | larger));
    };
    if (n <= W) {
      const V x = vload(values);
      for (int64_t i = 0; i < n; ++i) put(i, before(x, vset(values[i]), (1u << i) - 1));
      return;
    }
    for (int64_t i = 0; i < n; ++i) {
      int64_t rank = 0;
      for (int64_t block = 0; block < n; block += W) {
        const int64_t earlier = max_of<int64_t>(0, min_of<int64_t>(i - block, W));
        rank += before(vload(values + block), vset(values[i]), (1u << earlier) - 1);
      }
      put(i, rank);
    }
  }
  // Keeps the best of n candidates, and returns what others must reach: more than the last of these, as it came first.
  __attribute__((noinline)) T leave_best(int64_t n) {
    sort(n);
    memcpy(values, sorted, size_t(count) * sizeof(T)), memcpy(numbers, found, size_t(count) * sizeof(int32_t));
    return std::nextafter(sorted[count - 1], T(INFINITY));
  }
};

}  // namespace
}  // namespace pyext
