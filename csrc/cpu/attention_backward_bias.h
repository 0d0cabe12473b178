// Gradients of the biases that are added to a tile's scores, from dS in the accumulator type (row stride LD): diagonal,
// dense, segments; and of the sinks.
#pragma once
#include <sched.h>

#include "attention_backward_tile.h"

namespace pyext {
namespace {

// Tasks that add to the same sums do so in a fixed order: each waits until `turn` has been passed on often enough.
inline void wait_for(const int32_t* turn, int64_t value) {
  for (int spins = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) < int32_t(value); ++spins)
    spins < 1024 ? _mm_pause() : (void)sched_yield();
}
inline void pass_on(int32_t* turn) { __atomic_fetch_add(turn, 1, __ATOMIC_RELEASE); }

template <class C>
struct BiasGradients {
  using T = typename C::T;
  static constexpr int W = kWidth<T>, NB = BackwardTiles<C>::NB, LD = BackwardTiles<C>::LD;

  const AttentionProblem& p;
  const Strips<C>& strips;
  T *strip_sums = nullptr, *sink_sums = nullptr;  // per (sequence, head)

  void lay_out(Arena& arena) {
    const int64_t heads = span_count(p) * p.heads;
    if (p.grad_diag) strip_sums = arena.take<T>(heads * strips.length);
    if (p.grad_sinks) sink_sums = arena.take<T>(heads);
  }
  void clear() const {
    const int64_t heads = span_count(p) * p.heads;
    if (p.grad_diag) memset(strip_sums, 0, size_t(heads * strips.length) * sizeof(T));
    if (p.grad_sinks) memset(sink_sums, 0, size_t(heads) * sizeof(T));
  }

  // Sums dS along diagonals into a strip, whose position 0 is (last query row, k0). Row by row would load what
  // was just stored, one element off, and stall; along a diagonal a vector of sums stays in registers.
  void add_strip(const Span& s, int64_t q0, int64_t k0, int64_t count, Range columns, const T* ds, T* strip) const {
    strip += s.q_len - 1 - q0;  // position of diagonal 0 (column c = row i of the block)
    const int64_t first = columns.lo - (count - 1), last = columns.hi - 1;
    if (strips.constant(strip_position(p, s, q0, k0) + first, strip_position(p, s, q0, k0) + last)) {
      Vec<T> sum = vset(T(0));
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = columns.lo; c < columns.hi; c += W) sum = vadd(sum, vload(ds + i * LD + c));
      strip[first] += reduce_add(sum);
      return;
    }
    for (int64_t d = first; d <= last; d += W) {
      const int64_t begin = max_of<int64_t>(0, columns.lo - d - W + 1), end = min_of<int64_t>(count, columns.hi - d);
      const int64_t inner = min_of(end, max_of(begin, columns.lo - d)),
                    outer = max_of(inner, min_of<int64_t>(end, columns.hi - d - W + 1));
      Vec<T> sum[4] = {vset(T(0)), vset(T(0)), vset(T(0)), vset(T(0))};
      auto edge = [&](int64_t i) {
        Vec<T> v = vload(ds + i * LD + d + i);
        sum[0] = vadd(sum[0], select(lanes<T>(columns.lo - d - i, columns.hi - d - i), v, vset(T(0))));
      };
      for (int64_t i = begin; i < inner; ++i) edge(i);
      const T* diagonal = ds + d;
      int64_t i = inner;
      for (; i + 4 <= outer; i += 4)
        UNROLL for (int u = 0; u < 4; ++u) sum[u] = vadd(sum[u], vload(diagonal + (i + u) * (LD + 1)));
      for (; i < outer; ++i) sum[0] = vadd(sum[0], vload(diagonal + i * (LD + 1)));
      for (; i < end; ++i) edge(i);
      vstore(strip + d, vadd(vload(strip + d), vadd(vadd(sum[0], sum[1]), vadd(sum[2], sum[3]))));
    }
  }

  // The gradient of a group's segment scores, queries i and on: sums over keys of another and of the same segment. ds:
  // the group's rows.
  void add_segments(const Span& s, int64_t head, const ScoreTerms<C>& terms, int64_t i, int64_t k0, Range columns,
                    const T* ds) const {
    T* to = (T*)p.grad_segment + ((s.batch * p.heads + head) * p.q_len + i) * 2;
    for (int64_t r = 0; r < kRows && i + r < s.q_len; ++r) {
      Vec<T> other = vset(T(0)), same = other;
      for (int64_t c = columns.lo; c < columns.hi; c += W) {
        const Vec<T> at = vload(ds + r * LD + c);
        const Lanes in = terms.same_segment(i + r, k0 + c);
        same = vadd(same, select(in, at, vset(T(0)))), other = vadd(other, select(in, vset(T(0)), at));
      }
      to[2 * r] += reduce_add(other), to[2 * r + 1] += reduce_add(same);
    }
  }

  void add_dense(const Span& s, int64_t head, int64_t q0, int64_t k0, int64_t count, Range columns, const T* ds) const {
    const int64_t width = min_of<int64_t>(columns.hi, s.k_len - k0) - columns.lo;
    T* base = (T*)p.grad_dense.data + s.batch * p.grad_dense.batch + head * p.grad_dense.head + k0 + columns.lo;
    for (int64_t i = 0; i < count; ++i) {
      T* to = base + (q0 + i) * p.grad_dense.row;
      const T* from = ds + i * LD + columns.lo;
      for (int64_t c = 0; c < width; ++c) to[c] += from[c];
    }
  }

  // Adds a key block's strip to its (sequence, head)'s, after all earlier key blocks.
  void flush_strip(const Span& s, int64_t n, int64_t head, int64_t b, const T* strip, int32_t* turn) const {
    T* sums = strip_sums + (n * p.heads + head) * strips.length + strip_position(p, s, s.q_len - 1, b * NB);
    const int64_t used = s.q_len - 1 + min_of<int64_t>(NB, s.k_len - b * NB);
    if (turn) wait_for(turn, b);
    for (int64_t t = 0; t < used; ++t) sums[t] += strip[t];
    if (turn) pass_on(turn);
  }

  void sink_gradient(const Span& s, int64_t n, int64_t head, const typename BackwardTiles<C>::Normaliser* lse,
                     const T* delta) const {
    const double sink = double(((const T*)p.sinks)[head]);
    double sum = 0;
    for (int64_t i = 0; i < s.q_len; ++i)
      if (lse[i].lse != T(kInfinity))
        sum -= __builtin_exp(sink - (double(lse[i].lse) + double(lse[i].rest)) / C::units) * double(delta[i]);
    sink_sums[n * p.heads + head] = T(sum);
  }

  // Ordered sums over what several heads or sequences contributed to.
  void reduce() const {
    const int64_t spans = span_count(p);
    if (p.grad_sinks)
      for (int64_t h = 0; h < p.heads; ++h) {
        T sum = 0;
        for (int64_t n = 0; n < spans; ++n) sum += sink_sums[n * p.heads + h];
        ((T*)p.grad_sinks)[h] = sum;
      }
    if (!p.grad_diag) return;
    memset(p.grad_diag, 0, size_t(p.diag_heads * p.diag_rows) * sizeof(T));
    for (int64_t h = 0; h < p.heads; ++h)
      for (int64_t n = 0; n < spans; ++n) {
        const T* from = strip_sums + (n * p.heads + h) * strips.length;
        T* to = (T*)p.grad_diag + (p.diag_heads == 1 ? 0 : h) * p.diag_rows;
        for (int64_t t = 0; t < strips.length; ++t) to[p.diag_index ? p.diag_index[t] : t] += from[t];
      }
  }
};

}  // namespace
}  // namespace pyext
