// Experts with a few rows: their products are bound by reading the weights, which are read once, as they are, and
// multiplied with rows in their own order of memory.
#pragma once
#include "moe_experts_parts.h"

namespace pyext {
namespace {

// The most rows of an expert for which packing its weights does not pay.
constexpr int64_t kFewRows = 8;

// Dot products of up to kFewRows rows, `width` packed elements apart and zero beyond the last of `features`, with rows
// of weights.
template <class C>
struct FewRows {
  using T = typename C::T;
  static constexpr int W = kWidth<T>;
  static constexpr int64_t block = 64;       // rows of weights at a time
  static constexpr int64_t prefetch = 8192;  // bytes ahead
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

  // to[m][r] = row m . row r of the weights, r < rows.
  void multiply(const char* weights, int64_t row_bytes, int64_t rows, Products& to) const {
    if (count == 1) return dot<1, 1>(weights, row_bytes, rows, to);
    if (count == 2) return dot<2, 4>(weights, row_bytes, rows, to);
    if (count <= 4) return dot<4, 4>(weights, row_bytes, rows, to);
    dot<8, 2>(weights, row_bytes, rows, to);
  }

 private:
  template <int m>
  static constexpr int chains = m == 1 ? 4 : 1;  // sums of one product, which hide the latency of an addition
  // `together` rows of weights pass side by side, so that each load of the left rows serves all of them; a single left
  // row needs no such help, and reads memory in order.
  template <int most, int together>
  void dot(const char* weights, int64_t row_bytes, int64_t rows, Products& to) const {
    const int64_t size = element_size(dtype);
    for (int64_t r = 0; r < rows; r += together) {
      Vec<T> sum[together][most][chains<most>];
      const char* row[together];
      const T* at[most];
      UNROLL for (int m = 0; m < most; ++m) at[m] = left + min_of<int64_t>(m, count - 1) * width;
      UNROLL for (int a = 0; a < together; ++a) {
        row[a] = weights + min_of(r + a, rows - 1) * row_bytes;
        UNROLL for (int m = 0; m < most; ++m) UNROLL for (int c = 0; c < chains<most>; ++c) sum[a][m][c] = vset(T(0));
      }
      auto step = [&](int64_t k, int c) INLINE_LAMBDA {
        const int64_t f = k * C::pair;
        UNROLL for (int a = 0; a < together; ++a) {
          _mm_prefetch(row[a] + f * size + prefetch, _MM_HINT_T0);
          const Vec<T> w = load_elements(dtype, row[a] + f * size, features - f);
          UNROLL for (int m = 0; m < most; ++m) sum[a][m][c] = C::mac(w, vload(at[m] + k), sum[a][m][c]);
        }
      };
      int64_t k = 0;
      for (; (k + chains<most> * W) * C::pair <= features; k += chains<most> * W)
        UNROLL for (int c = 0; c < chains<most>; ++c) step(k + c * W, c);
      for (; k * C::pair < features; k += W) step(k, 0);
      UNROLL for (int a = 0; a < together; ++a) if (r + a < rows) UNROLL for (int m = 0; m < most; ++m) {
        UNROLL for (int c = 1; c < chains<most>; ++c) sum[a][m][0] = vadd(sum[a][m][0], sum[a][m][c]);
        to[m][r + a] = reduce_add(sum[a][m][0]);
      }
    }
  }
};

}  // namespace
}  // namespace pyext
