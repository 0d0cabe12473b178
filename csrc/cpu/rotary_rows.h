// Rotates rows (csrc/rotary.h): for the op itself, and for attention, which rotates keys and queries on their way in.
#pragma once
#include "../rotary.h"
#include "gemm.h"

namespace pyext {
namespace {

template <DType dtype>
using RotaryAcc = std::conditional_t<dtype == DType::f64, double, float>;

INLINE int64_t table_row(const RotaryProblem& p, int64_t batch, int64_t token) {
  return p.positions ? p.positions[batch * p.positions_batch + token] : token;
}

// Some tokens of a batch entry with their rows of the tables in the accumulator type: read where they are if they are
// so, else converted once for all heads.
template <DType dtype, bool interleaved>
struct RotateRows {
  using T = RotaryAcc<dtype>;
  using Vec = typename Vector<T>::type;
  static constexpr int W = Vector<T>::width;
  static constexpr int64_t most = 64, bytes = element_size(dtype);

  const RotaryProblem& p;
  const int64_t span;  // features at which pairs begin to be rotated, vector by vector
  const T *cos[most], *sin[most];

  RotateRows(const RotaryProblem& problem, int64_t batch, int64_t begin, int64_t count)
      : p(problem), span(interleaved ? 2 * p.half : p.half) {
    // Whole vectors are read: a shorter row of a table ends too early for that.
    const bool fit = !p.inverse && p.table_dtype == (sizeof(T) == 8 ? DType::f64 : DType::f32) && span >= W;
    static thread_local Buffer buffer;
    const int64_t stride = round_up(p.half, W);
    T* to = fit ? nullptr : (T*)buffer.reserve(size_t(2 * most * stride + W) * sizeof(T));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = table_row(p, batch, begin + i);
      const char *c = row_address(p.cos, p.table_dtype, batch, 0, row),
                 *s = row_address(p.sin, p.table_dtype, batch, 0, row);
      cos[i] = fit ? (const T*)c : convert(c, T(1), to + i * stride);
      sin[i] = fit ? (const T*)s : convert(s, T(p.inverse ? -1 : 1), to + (most + i) * stride);
    }
  }

  // A row of a table times a sign.
  const T* convert(const char* from, T sign, T* to) const {
    for (int64_t k = 0; k < p.half; k += W) {
      const int64_t count = min_of<int64_t>(W, p.half - k);
      const char* at = from + k * element_size(p.table_dtype);
      if (p.table_dtype == DType::f64) {  // also beside narrower rows, which no vector load knows
        for (int64_t i = 0; i < count; ++i) to[k + i] = sign * T(((const double*)at)[i]);
      } else {
        const Vec v = count == W ? vload_as(p.table_dtype, at, T(0)) : vload_some<T>(p.table_dtype, at, count);
        vstore(to + k, vmul(v, vset(sign)));
      }
    }
    return to;
  }

  // Rotates a row of token `begin + i`.
  // Vectors that reach past the rotated features write what is written again afterwards: by the next vector, by the
  // second half, or by the copy of the rest. So a row needs partial vectors only if it is shorter than that.
  INLINE void rotate(int64_t i, const char* x, char* out) const {
    const int64_t rotated = 2 * p.half;
    if (span >= W) {
      for (int64_t k = 0; k + W <= span; k += W) rotate_at(i, x, out, k, W);
      if (span % W) rotate_at(i, x, out, span - W, W);
    } else if (rotated - span + W <= p.head_dim) {
      rotate_at(i, x, out, 0, W);
    } else if (span > 0) {
      rotate_at(i, x, out, 0, span);
    }
    if (rotated < p.head_dim)
      memcpy(out + rotated * bytes, x + rotated * bytes, size_t((p.head_dim - rotated) * bytes));
  }
  INLINE void rotate_at(int64_t i, const char* x, char* out, int64_t k, int64_t count) const {
    const Vec first = load(x, k, count);
    if constexpr (interleaved) {
      const Vec c = vload_twice(cos[i] + k / 2), s = vload_twice(sin[i] + k / 2);
      store(out, k, count, vfmaddsub(first, c, vmul(vswap(first), s)));
    } else {
      const Vec c = vload(cos[i] + k), s = vload(sin[i] + k), second = load(x, p.half + k, count);
      store(out, k, count, vfms(first, c, vmul(second, s)));
      store(out, p.half + k, count, vfma(second, c, vmul(first, s)));
    }
  }
  INLINE Vec load(const char* x, int64_t k, int64_t count) const {
    return count == W ? vload_as(dtype, x + k * bytes, T(0)) : vload_some<T>(dtype, x + k * bytes, count);
  }
  INLINE void store(char* out, int64_t k, int64_t count, Vec v) const {
    count == W ? vstore_as(dtype, out + k * bytes, v) : vstore_some<T>(dtype, out + k * bytes, count, v);
  }
};

// Rows [first, first + count) of a head, rotated; they stay until the next call.
template <DType dtype>
Rows rotated(const RotaryProblem& p, int64_t batch, int64_t head, int64_t first, int64_t count) {
  static thread_local Buffer buffer;
  constexpr int64_t bytes = element_size(dtype);
  char* out = buffer.reserve(size_t(count * p.head_dim * bytes));
  auto rotate = [&](const auto& rows) {
    for (int64_t i = 0; i < count; ++i) {
      const char* x = row_address(p.x, dtype, batch, head, first + i);
      rows.rotate(i, x, out + i * p.head_dim * bytes);
    }
  };
  p.interleaved ? rotate(RotateRows<dtype, true>(p, batch, first, count))
                : rotate(RotateRows<dtype, false>(p, batch, first, count));
  return {out, p.head_dim * bytes, count};
}
inline Rows rotated(const RotaryProblem& p, int64_t batch, int64_t head, int64_t first, int64_t count) {
  switch (p.dtype) {
    case DType::f32:
      return rotated<DType::f32>(p, batch, head, first, count);
    case DType::bf16:
      return rotated<DType::bf16>(p, batch, head, first, count);
    case DType::f16:
      return rotated<DType::f16>(p, batch, head, first, count);
    case DType::f64:
      return rotated<DType::f64>(p, batch, head, first, count);
  }
  return {};
}

}  // namespace
}  // namespace pyext
