// Experts with a few rows: packing their weights would take as long as multiplying. The weights are read once, as they
// are, and multiplied with rows in their own order of memory.
#pragma once
#include "moe_experts_parts.h"

namespace pyext {
namespace {

// The most rows of an expert for which packing its weights does not pay.
constexpr int64_t kFewRows = 64;

// Dot products of up to kFewRows rows, `width` packed elements apart and zero beyond the last of `features`, with rows
// of weights.
template <class C>
struct FewRows {
  using T = typename C::T;
  static constexpr int W = kWidth<T>;
  static constexpr int64_t block = 16;  // rows of weights at a time
  static constexpr int kTile = 4;       // rows of weights of a tile of sums
  // And rows: sums and operands fill the registers. Fewer end more often, which costs 30 % of a sum of 512 bf16.
  static constexpr int kHeight = kRows == 8 ? 6 : 4;
  using Products = T[kFewRows][block];
  DType dtype;
  const T* left;
  int64_t count, width, features;

  // A vector of packed elements of a row, `exist` features of which exist.
  static INLINE Vec<T> load_elements(DType dtype, const char* from, int64_t exist) {
    if constexpr (C::pair == 1) {
      return load_part<T>(dtype, from, exist);
    } else {
      if (exist >= W * C::pair) return vload((const T*)from);
      alignas(64) char padded[64] = {};
      memcpy(padded, from, size_t(max_of<int64_t>(exist, 0)) * 2);
      return vload((const T*)padded);
    }
  }
  // Rows of a matrix as `left` wants them.
  static void pack(DType dtype, const Rows& rows, int64_t count, int64_t features, int64_t width, T* to) {
    for (int64_t m = 0; m < count; ++m) {
      const char* row = rows[m];
      for (int64_t k = 0; k < width; k += W)
        vstore(
            to + m * width + k,
            row ? load_elements(dtype, row + k * C::pair * element_size(dtype), features - k * C::pair) : vset(T(0)));
    }
  }

  // to[m][r] = row m . row r of the weights, r < rows <= block. The weights are read from memory once: stretches of
  // some of their rows stay in L1 while all rows of `left` pass.
  void multiply(const char* weights, int64_t row_bytes, int64_t rows, Products& to) const {
    if (count == 1) return one(weights, row_bytes, rows, to);
    const bool as_is = C::pair == 2 || dtype == kWide<T>;
    const int64_t depth = ceil_div(features, C::pair), size = C::pair * element_size(dtype);
    const int64_t together = min_of(block, kKept / max_of<int64_t>(1, min_of(depth, kStretch)) / kTile * kTile);
    const int64_t groups = ceil_div(count, kHeight);  // of rows, as even as can be: short ones cost more a row
    const int64_t asks = groups * (together / kTile) * max_of<int64_t>(1, ceil_div(depth, kSegment));
    for (int64_t r = 0; r < rows; r += together) {
      const int64_t end = min_of(r + together, rows);
      Ahead next{weights + end * row_bytes, ceil_div(ceil_div(together * row_bytes, 64), asks)};
      for (int64_t k = 0; k == 0 || k < depth; k += kStretch) {
        const Part part{weights + k * size, row_bytes, k, min_of(kStretch, depth - k)};
        for (int64_t m = 0, height, left = groups; left > 0; m += height, --left) {
          height = ceil_div(count - m, left);
          as_is ? rows_of<true>(part, r, end, m, height, to, next) : rows_of<false>(part, r, end, m, height, to, next);
        }
      }
    }
  }

 private:
  static constexpr int64_t kStretch = 64 * W;  // packed elements of one sum: 4 KiB of a row
  static constexpr int64_t kKept = 256 * W;    // packed elements of the weights in L1: 16 KiB
  static constexpr int64_t kSegment = 8 * W;   // packed elements between two askings
  // Asks for what comes from memory next, a few lines at a time between arithmetic.
  struct Ahead {
    const char* next;
    int64_t lines;
    INLINE void ask() {
      for (int64_t i = 0; i < lines; ++i, next += 64) _mm_prefetch(next, _MM_HINT_T0);
    }
  };
  struct Part {
    const char* weights;
    int64_t row_bytes, k, steps;
  };
  // Sums of `height` rows from row m on with rows [r, end) of the weights.
  template <bool as_is, int most = kHeight>
  void rows_of(const Part& part, int64_t r, int64_t end, int64_t m, int64_t height, Products& to, Ahead& next) const {
    if constexpr (most > 1)
      if (height < most) return rows_of<as_is, most - 1>(part, r, end, m, height, to, next);
    tiles<most, as_is>(part, r, end, m, to, next);
  }
  template <int most, bool as_is>
  INLINE void tiles(const Part& part, int64_t r, int64_t end, int64_t m, Products& to, Ahead& next) const {
    const T* x = left + m * width + part.k;
    while (r < end) {
      const bool whole = end - r >= kTile;  // else one row at a time, four times
      tile<most, as_is>(part, part.weights + r * part.row_bytes, whole, x, &to[m][r], next);
      r += whole ? kTile : 1;
    }
  }
  template <int most, bool as_is>
  INLINE void tile(const Part& part, const char* w, bool whole, const T* x, T* to, Ahead& next) const {
    const int64_t row_bytes = whole ? part.row_bytes : 0;
    Vec<T> sum[most][kTile];
    UNROLL for (int i = 0; i < most; ++i) UNROLL for (int a = 0; a < kTile; ++a) sum[i][a] = vset(T(0));
    auto step = [&](const T* x, const char* w, const auto& load) INLINE_LAMBDA {
      Vec<T> rows[most];
      UNROLL for (int i = 0; i < most; ++i) rows[i] = vload(x + i * width);
      UNROLL for (int a = 0; a < kTile; ++a) {
        const Vec<T> v = load(w + a * row_bytes);
        UNROLL for (int i = 0; i < most; ++i) sum[i][a] = C::mac(v, rows[i], sum[i][a]);
      }
    };
    const int64_t bytes = C::pair * element_size(dtype), exist = features / C::pair - part.k;  // of packed elements
    int64_t k = 0;
    for (const int64_t end = min_of(part.steps, exist) / W * W; k < end;) {
      next.ask();
      for (const int64_t stop = min_of(k + kSegment, end); k < stop; k += W, x += W, w += W * bytes)
        step(x, w, [&](const char* from) INLINE_LAMBDA {
          if constexpr (as_is)
            return vload((const T*)from);
          else
            return vload_as(dtype, from, T(0));
        });
    }
    if (k < part.steps)
      step(x, w, [&](const char* from) { return load_elements(dtype, from, features - (part.k + k) * C::pair); });
    UNROLL for (int i = 0; i < most; ++i) {
      auto four = reduce_add4(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
      T* at = to + i * block;
      if (!whole) {
        *at = part.k ? *at + four[0] : four[0];
        continue;
      }
      if (part.k) {
        decltype(four) before;
        memcpy(&before, at, sizeof before);
        four += before;
      }
      memcpy(at, &four, sizeof four);
    }
  }

  // One row: the weights pass in their order of memory, and several sums hide the latency of an addition.
  void one(const char* weights, int64_t row_bytes, int64_t rows, Products& to) const {
    constexpr int chains = 4;
    constexpr int64_t ahead = 8192;  // bytes
    const int64_t size = element_size(dtype);
    for (int64_t r = 0; r < rows; ++r) {
      Vec<T> sum[chains];
      const char* row = weights + r * row_bytes;
      UNROLL for (int c = 0; c < chains; ++c) sum[c] = vset(T(0));
      auto step = [&](int64_t k, int c) INLINE_LAMBDA {
        const int64_t f = k * C::pair;
        _mm_prefetch(row + f * size + ahead, _MM_HINT_T0);
        sum[c] = C::mac(load_elements(dtype, row + f * size, features - f), vload(left + k), sum[c]);
      };
      int64_t k = 0;
      for (; (k + chains * W) * C::pair <= features; k += chains * W)
        UNROLL for (int c = 0; c < chains; ++c) step(k + c * W, c);
      for (; k * C::pair < features; k += W) step(k, 0);
      UNROLL for (int c = 1; c < chains; ++c) sum[0] = vadd(sum[0], sum[c]);
      to[0][r] = reduce_add(sum[0]);
    }
  }
};

}  // namespace
}  // namespace pyext
