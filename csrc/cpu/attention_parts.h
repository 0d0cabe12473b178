// What the forward, backward and decode kernels share: which keys a row sees, the terms added to a score, dropout.
// Scores are kept in the units of the compute type (gemm.h).
#pragma once
#include "../attention.h"
#include "gemm.h"

namespace pyext {
namespace {

constexpr float kInfinity = __builtin_inff();

// One sequence: a batch entry, or a range of rows of a packed (varlen) problem.
struct Span {
  int64_t batch, q_begin, q_len, k_begin, k_len;
};
INLINE int64_t span_count(const AttentionProblem& p) { return p.cu_seqlens_q ? p.sequences : p.batch; }
INLINE Span span_of(const AttentionProblem& p, int64_t n) {
  if (!p.cu_seqlens_q) return {n, 0, p.q_len, 0, p.k_len};
  int64_t q = p.cu_seqlens_q[n], k = p.cu_seqlens_k[n];
  return {0, q, p.cu_seqlens_q[n + 1] - q, k, p.cu_seqlens_k[n + 1] - k};
}
struct Longest {
  int64_t q, k;
};
inline Longest longest_span(const AttentionProblem& p) {
  if (!p.cu_seqlens_q) return {p.q_len, p.k_len};
  Longest longest{0, 0};
  for (int64_t n = 0; n < p.sequences; ++n) {
    Span s = span_of(p, n);
    longest = {max_of(longest.q, s.q_len), max_of(longest.k, s.k_len)};
  }
  return longest;
}

// Rows [first, first + count) of one head, `features` wide.
template <class View>
INLINE RowsAhead rows_ahead(const AttentionProblem& p, const View& t, int64_t features, int64_t batch, int64_t head,
                            int64_t first, int64_t count) {
  const int64_t bytes = element_size(p.dtype);
  return {row_address(t, p.dtype, batch, head, first), t.row * bytes, features * bytes, count};
}
INLINE int64_t lse_index(const AttentionProblem& p, const Span& s, int64_t head) {
  return (s.batch * p.heads + head) * p.q_len + s.q_begin;
}

// ---- which keys a row sees ----

struct Range {
  int32_t lo, hi;  // [lo, hi); empty is (0, 0)
};
INLINE Range intersect(Range a, Range b) {
  Range r{max_of(a.lo, b.lo), min_of(a.hi, b.hi)};
  return r.lo < r.hi ? r : Range{0, 0};
}

// The part of a byte mask that one (batch, head) needs. A mask that is the same for every row (key padding) shrinks the
// range of keys; when that range has no hole, the mask has nothing left to say.
struct HeadMask {
  const uint8_t* data;  // null: no test needed inside `keys`
  int64_t row;
  Range keys;
};
INLINE HeadMask byte_mask(const AttentionProblem& p, const Span& s, int64_t head) {
  if (!p.mask.data) return {nullptr, 0, {0, int32_t(s.k_len)}};
  return {(const uint8_t*)p.mask.data + s.batch * p.mask.batch + head * p.mask.head, p.mask.row, {0, int32_t(s.k_len)}};
}
inline HeadMask head_mask(const AttentionProblem& p, const Span& s, int64_t head) {
  HeadMask m = byte_mask(p, s, head);
  if (!m.data || (m.row != 0 && s.q_len != 1)) return m;
  int64_t lo = 0, hi = s.k_len;
  while (lo < hi && !m.data[lo]) ++lo;
  while (lo < hi && !m.data[hi - 1]) --hi;
  const bool hole = lo < hi && memchr(m.data + lo, 0, size_t(hi - lo));
  return {hole ? m.data : nullptr, m.row, {int32_t(lo), int32_t(hi)}};
}

INLINE Range row_range(const AttentionProblem& p, const Span& s, Range keys, int64_t i) {
  int64_t here = i + s.k_len - s.q_len;
  int64_t lo = max_of<int64_t>(keys.lo, here - p.left), hi = min_of<int64_t>(keys.hi, here + p.right + 1);
  if (p.intervals) {
    const int32_t* interval = p.intervals + s.batch * p.intervals_batch + (s.q_begin + i) * 2;
    lo = max_of<int64_t>(lo, interval[0]), hi = min_of<int64_t>(hi, interval[1]);
  }
  return lo < hi ? Range{int32_t(lo), int32_t(hi)} : Range{0, 0};
}

// The ranges of a block of query rows, and per group of kRows rows: what any row sees, what every row sees.
template <int rows>
struct BlockRanges {
  static constexpr int groups = rows / kRows;
  Range row[rows], any[groups], every[groups], all_rows;
  int64_t count;

  void compute(const AttentionProblem& p, const Span& s, Range keys, int64_t q0, int64_t rows_used) {
    count = rows_used;
    all_rows = {INT32_MAX, 0};
    for (int g = 0; g * kRows < count; ++g) {
      any[g] = {INT32_MAX, 0}, every[g] = {0, INT32_MAX};
      for (int i = g * kRows; i < (g + 1) * kRows; ++i) {
        // Rows that only fill the group repeat the last real one, so that they never force the masked path.
        Range r = row[i] = i < count ? row_range(p, s, keys, q0 + i) : row[count - 1];
        if (r.lo < r.hi) any[g] = {min_of(any[g].lo, r.lo), max_of(any[g].hi, r.hi)};
        every[g] = {max_of(every[g].lo, r.lo), min_of(every[g].hi, r.hi)};
      }
      if (any[g].lo < any[g].hi) all_rows = {min_of(all_rows.lo, any[g].lo), max_of(all_rows.hi, any[g].hi)};
    }
    if (all_rows.lo >= all_rows.hi) all_rows = {0, 0};
  }
};

// ---- the strip: the diagonal bias of one head, expanded over distances ----

// Where a distance stands in a strip, and in the index of the relative rows.
INLINE int64_t strip_position(const AttentionProblem& p, const Span& s, int64_t i, int64_t j) {
  return j - i - (s.k_len - s.q_len) + p.k_len - 1;
}

template <class C>
struct Strips {
  using T = typename C::T;
  static constexpr int64_t pad = 128;  // tiles read past the ends; what they read there is masked
  T* values = nullptr;                 // (heads or 1, pad + length + pad)
  int32_t* run_end = nullptr;          // last position up to which the index repeats; only with diag_index
  int64_t length = 0, stride = 0;

  void lay_out(const AttentionProblem& p, Arena& arena) {
    if (!p.diag) return;
    length = max_of<int64_t>(p.q_len + p.k_len - 1, 0), stride = length + 2 * pad;
    values = arena.take<T>(p.diag_heads * stride);
    if (p.diag_index) run_end = arena.take<int32_t>(length);
  }
  void fill(const AttentionProblem& p, const Parallel& parallel) {
    if (!p.diag) return;
    for_each_task(parallel, p.diag_heads, [&](int64_t h) {
      const T* from = (const T*)p.diag + h * p.diag_rows;
      T* to = values + h * stride;
      for (int64_t t = 0; t < pad; ++t) to[t] = to[pad + length + t] = 0;
      for (int64_t t = 0; t < length; ++t) to[pad + t] = from[p.diag_index ? p.diag_index[t] : t] * T(C::units);
    });
    if (!run_end) return;
    for (int64_t t = length - 1; t >= 0; --t)
      run_end[t] = t + 1 < length && p.diag_index[t] == p.diag_index[t + 1] ? run_end[t + 1] : int32_t(t);
  }
  // Address of the value for (i, j) = (0, 0); the value for (i, j) stands at + j - i.
  const T* origin(const AttentionProblem& p, const Span& s, int64_t head) const {
    if (!values) return nullptr;
    return values + (p.diag_heads == 1 ? 0 : head) * stride + pad + strip_position(p, s, 0, 0);
  }
  // Do all positions in [first, last] share one table row?
  INLINE bool constant(int64_t first, int64_t last) const {
    if (!run_end) return false;
    first = min_of(max_of<int64_t>(first, 0), length - 1), last = min_of(max_of<int64_t>(last, 0), length - 1);
    return run_end[first] >= last;
  }
};

// ---- the score terms that a GEMM's epilogue does not compute itself: dense bias, segments, byte mask, softcap ----

template <class C>
struct ScoreTerms {
  using T = typename C::T;
  static constexpr int W = kWidth<T>;
  DType dense_dtype;
  const char* dense = nullptr;  // row 0 of this (batch, head)
  int64_t dense_row_bytes = 0;
  int64_t dense_ahead = 0;  // bytes from what is read to what the next block will read in its place: short pieces of
                            // far-apart rows are nothing that the hardware sees coming
  const uint8_t* mask = nullptr;
  int64_t mask_row = 0;
  const T* segment = nullptr;  // two values per row of this (batch, head): keys of another segment, of the same one
  const int32_t *segment_q = nullptr, *segment_k = nullptr;
  const T* strip = nullptr;  // see Strips::origin
  T cap = 0;                 // softcap in score units; 0 = off
  int64_t k_len = 0;

  bool tabulated() const { return dense || mask || segment; }  // needs a table of addends

  // to[c] = what is added to the score of key j0 + c, c < n (n a multiple of the width); -inf hides a key: one outside
  // of `visible`, one of the first 32 whose bit is not set, one that the byte mask hides.
  void addend_row(int64_t i, int64_t j0, int64_t n, Range visible, uint32_t bits, T* to) const {
    switch (dense ? dense_dtype : DType::f32) {
      case DType::f32:
        return addend_row_of<DType::f32>(i, j0, n, visible, bits, to);
      case DType::bf16:
        return addend_row_of<DType::bf16>(i, j0, n, visible, bits, to);
      case DType::f16:
        return addend_row_of<DType::f16>(i, j0, n, visible, bits, to);
      case DType::f64:
        return addend_row_of<DType::f64>(i, j0, n, visible, bits, to);
    }
  }
  template <DType dtype>
  void addend_row_of(int64_t i, int64_t j0, int64_t n, Range visible, uint32_t bits, T* to) const {
    const Vec<T> hidden = vset(T(-kInfinity));
    const char* bias = dense ? dense + i * dense_row_bytes + j0 * element_size(dtype) : nullptr;
    const uint8_t* bytes = mask ? mask + i * mask_row + j0 : nullptr;
    for (int64_t c = 0; c < n; c += W) {
      const int64_t j = j0 + c, left = k_len - j;
      Vec<T> x = vset(T(0));
      if (bias && left > 0) {
        const char* at = bias + c * element_size(dtype);
        _mm_prefetch(at + dense_ahead, _MM_HINT_T1);
        x = in_units(left >= W ? vload_as(dtype, at, T(0)) : vload_some<T>(dtype, at, left));
      }
      if (strip) x = vadd(x, vload(strip + j - i));
      if (segment && left > 0)
        x = vadd(x, in_units(select(same_segment(i, j), vset(segment[2 * i + 1]), vset(segment[2 * i]))));
      if (bytes && left > 0) {
        uint8_t some[W] = {};
        if (left < W) memcpy(some, bytes + c, size_t(left));
        x = select(nonzero_bytes(left < W ? some : bytes + c, T(0)), x, hidden);
      }
      if (visible.lo > j || visible.hi < j + W) x = select(lanes<T>(visible.lo - j, visible.hi - j), x, hidden);
      if (~bits && c < 32) x = select(lanes_of<T>(bits >> c), x, hidden);
      vstore(to + c, x);
    }
  }
  // Which of the keys from j on are in the segment of query i.
  INLINE Lanes same_segment(int64_t i, int64_t j) const {
    int32_t some[W] = {};
    const int32_t* ids = segment_k + j;
    if (k_len - j < W) memcpy(some, ids, size_t(max_of<int64_t>(k_len - j, 0)) * sizeof(int32_t)), ids = some;
    return equal(ids, segment_q[i], T(0));
  }
  // A finite "minus infinity" (finfo.min, as many trainers use) stays finite in other units, too.
  static INLINE Vec<T> in_units(Vec<T> bias) {
    if (C::units == 1) return bias;
    const T lowest = sizeof(T) == 4 ? T(-3.402823466e+38) : T(-1.7976931348623157e308);
    Vec<T> scaled = vmax(vmul(bias, vset(T(C::units))), vset(lowest));
    return select(less(vset(T(-kInfinity)), bias), scaled, bias);
  }

  // s[c] = capped(s[c]) + relative[c] + addend(c): scaled products -> finished scores. With a softcap the products are
  // in units of the cap, and slope[c], if wanted, receives the derivative of tanh. Returns the maximum in each lane.
  Vec<T> finish_row(int64_t i, int64_t j0, int64_t n, Range visible, uint32_t bits, T* s, T* slope, T* addends,
                    const T* relative = nullptr) const {
    addend_row(i, j0, n, visible, bits, addends);
    Vec<T> top = vset(T(-kInfinity));
    for (int64_t c = 0; c < n; c += W) {
      Vec<T> x = vload(s + c);
      if (cap != T(0)) {
        Vec<T> y = vtanh(x);
        if (slope) vstore(slope + c, vsub(vset(T(1)), vmul(y, y)));
        x = vmul(y, vset(cap));
      }
      if (relative) x = vadd(x, vload(relative + c));
      x = vadd(x, vload(addends + c));
      top = vmax(x, top);
      vstore(s + c, x);
    }
    return top;
  }
};

template <class C>
ScoreTerms<C> score_terms(const AttentionProblem& p, const Span& s, int64_t head, const HeadMask& mask,
                          const typename C::T* strip) {
  ScoreTerms<C> terms;
  terms.dense_dtype = p.dense_dtype;
  if (p.dense.data) {
    terms.dense = row_address(p.dense, p.dense_dtype, s.batch, head, 0);
    terms.dense_row_bytes = p.dense.row * element_size(p.dense_dtype);
  }
  if (p.segment) {
    terms.segment = (const typename C::T*)p.segment + (s.batch * p.heads + head) * p.q_len * 2;
    terms.segment_q = p.segment_q + s.batch * p.segment_q_batch,
    terms.segment_k = p.segment_k + s.batch * p.segment_k_batch;
  }
  terms.mask = mask.data, terms.mask_row = mask.row;
  terms.strip = strip;
  terms.cap = typename C::T(p.softcap * C::units);
  terms.k_len = s.k_len;
  return terms;
}
// Multiplies raw q.k: score units, or units of the cap.
template <class C>
INLINE typename C::T score_scale(const AttentionProblem& p) {
  return typename C::T(p.softcap > 0 ? p.scale / p.softcap : p.scale * C::units);
}
// The natural logarithm of the normaliser, from a maximum in score units and a sum relative to it. Double, because the
// backward divides by the normaliser again, and fp32 has a rounding error of 5e-7 near a logarithm of 8.
template <class C>
INLINE double log_normaliser(typename C::T max, typename C::T sum) {
  return sum > 0 || sum != sum ? double(max) / C::units + __builtin_log(double(sum)) : -double(kInfinity);
}

// What a block of the byte mask holds, so that hidden blocks are skipped.
inline bool mask_has_any(const uint8_t* mask, int64_t row_stride, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  for (int64_t i = i0; i < i1; ++i) {
    const uint8_t* row = mask + i * row_stride;
    uint8_t any = 0;
    for (int64_t j = j0; j < j1; ++j) any |= row[j];
    if (any) return true;
  }
  return false;
}

// ---- dropout: Philox 4x32-10 (Salmon et al. 2011) ----
// Counter (key / 4, query, head, batch), key (seed); word key % 4 decides. Kept entries are scaled by 1 / (1 - p).

template <class T>
void dropout_row(const AttentionProblem& p, int64_t batch, int64_t head, int64_t i, int64_t j0, int64_t n, T* factor) {
  constexpr int w = kWidth<float>;
  const uint64_t threshold = uint64_t(p.dropout_p * 4294967296.0);
  const T kept = p.dropout_p < 1 ? T(1 / (1 - p.dropout_p)) : T(0);
  for (int64_t c = 0; c < n; c += 4 * w) {
    U x0 = uadd(uiota(), uset(uint32_t((j0 + c) >> 2))), x1 = uset(uint32_t(i)), x2 = uset(uint32_t(head)),
      x3 = uset(uint32_t(batch));
    uint32_t key0 = uint32_t(p.seed), key1 = uint32_t(p.seed >> 32);
    for (int round = 0; round < 10; ++round) {
      U hi0, lo0, hi1, lo1;
      umul_wide(x0, 0xD2511F53u, hi0, lo0);
      umul_wide(x2, 0xCD9E8D57u, hi1, lo1);
      x0 = uxor(uxor(hi1, x1), uset(key0)), x1 = lo1;
      x2 = uxor(uxor(hi0, x3), uset(key1)), x3 = lo0;
      key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    uint32_t words[4][w];
    ustore(words[0], x0), ustore(words[1], x1), ustore(words[2], x2), ustore(words[3], x3);
    for (int64_t l = 0; l < 4 * w && c + l < n; ++l) factor[c + l] = words[l & 3][l >> 2] >= threshold ? kept : T(0);
  }
}

}  // namespace
}  // namespace pyext
