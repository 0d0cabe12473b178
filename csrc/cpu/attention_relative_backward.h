// Gradients of the relative rows. Seen from the distance e = j - i, the skew is only a stride: the rows of dS, each
// shifted by one, are an operand with strides (LD + 1, 1), its diagonals one with strides (1, LD + 1), and so on. So
// the four products below are plain GEMMs on dS between margins of zeros:
//   d rel_query(i) += sum over e of dS(i, i + e) rel_q(e)      d rel_q(e) += sum over i of dS(i, i + e) rel_query(i)
//   d key(j)       += sum over e of dS(j - e, j) rel_k(e)      d rel_k(e) += sum over j of dS(j - e, j) key(j)
// A bf16 operand comes in pairs of consecutive k, and which entries of dS are consecutive differs from product to
// product: neighbours in a row, in a column, or on a diagonal. In a block whose distances share one row (clipped ones,
// DeBERTa's far ones) the products are sums over rows and columns of dS times that row.
#pragma once
#include <type_traits>

#include "attention_relative.h"

namespace pyext {
namespace {

template <class C, int MB, int NB, int LD, int box>
struct RelativeGradients {
  using T = typename C::T;
  static constexpr int W = kWidth<T>, NR = kPanel<T>, pair = C::pair;
  using Element = std::conditional_t<pair == 2, uint16_t, T>;
  static constexpr int margin = LD - NB;        // zero columns between the rows of dS
  static constexpr int row_margin = kRows + 2;  // zero rows above and below
  static constexpr int64_t distance_margin = 2 * kRows;
  static_assert(margin >= kRows + pair, "a group of rows, each shifted by one, stays within the margin");

  const AttentionProblem* p = nullptr;
  int64_t panels = 0;                          // of features
  int64_t rows = 0, sum_rows = 0;              // distances, with their margins: of a task's rows, of a head's sums
  Element* ds = nullptr;                       // dS, row stride LD, in the type that products along a row read
  T *vertical = nullptr, *diagonal = nullptr;  // dS for products along a column or a diagonal: at (i, j) the pair
                                               // (i, j), (i + 1, j) or (i, j), (i + 1, j + 1)
  T *rows_q = nullptr, *rows_k = nullptr;      // the rows of each distance: rising for rel_q, falling for rel_k

  // Of a block whose distances share one row: sums of dS, and the rows.
  bool single = false;
  T *row_sums = nullptr, *column_sums = nullptr, *row_q = nullptr, *row_k = nullptr;

  // The distances of a task: sequence, first key, and how many the tiles touch.
  Span span{};
  int64_t first_key = 0, touched = 0, head = 0;

  static constexpr int64_t matrix = (MB + 2 * row_margin) * LD + 2 * margin, origin = row_margin * LD + margin;

  // Distances, with their margins, of q_len queries and so many keys.
  static int64_t capacity(int64_t q_len, int64_t keys) { return round_up(q_len + keys + 2 * distance_margin, 2); }

  // For so many keys per task, of so many in all.
  void lay_out(const AttentionProblem& problem, Arena& arena, int64_t feature_panels, int64_t q_len, int64_t keys,
               int64_t all_keys) {
    *this = {};
    p = &problem, panels = feature_panels;
    if (!p->rel_index) return;
    rows = capacity(q_len, keys), sum_rows = capacity(q_len, all_keys);
    ds = arena.take<Element>(matrix) + origin;
    vertical = diagonal = (T*)ds;
    if (pair == 2) {
      diagonal = arena.take<T>(matrix) + origin;
      vertical = p->rel_k.data ? arena.take<T>(matrix) + origin : nullptr;
    }
    if (p->rel_q.data) rows_q = arena.take<T>(panels * rows / pair * NR);
    if (p->rel_k.data) rows_k = arena.take<T>(panels * rows / pair * NR);
    row_sums = arena.take<T>(MB), column_sums = arena.take<T>(NB);
    row_q = arena.take<T>(panels * NR), row_k = arena.take<T>(panels * NR);
  }

  // A new task: keys [first, last) of a sequence.
  void begin(const Span& s, int64_t first, int64_t last) {
    const int64_t keys = max_of<int64_t>(min_of(last, s.k_len) - first, 0);
    span = s, first_key = first;
    touched = round_up(keys, box) + s.q_len + 2 * distance_margin;
    memset(ds - origin, 0, size_t(matrix) * sizeof(Element));
    if (vertical && (void*)vertical != (void*)ds) memset(vertical - origin, 0, size_t(matrix) * sizeof(T));
    if ((void*)diagonal != (void*)ds) memset(diagonal - origin, 0, size_t(matrix) * sizeof(T));
  }
  // Where the distance of query i and key j stands in the buffers.
  INLINE int64_t place(int64_t i, int64_t j) const { return j - i + span.q_len - 1 - first_key + distance_margin; }
  // The same in a head's sums, where the first key is the sequence's.
  INLINE int64_t sum_place(int64_t i, int64_t j) const { return place(i, j) + first_key; }
  // The position in rel_index of what stands at place 0.
  INLINE int64_t first_position() const { return first_key - distance_margin + p->k_len - span.k_len; }

  void pack(int64_t query_head) {
    head = query_head;
    const int64_t length = p->q_len + p->k_len - 1, panel = rows / pair * NR;
    auto rows_of = [&](const Input& t) { return relative_rows(*p, t, span.batch, head, p->rel_index, length); };
    if (rows_q) {
      Rows from = rows_of(p->rel_q);
      from.begin = first_position();
      pack_rows<C>(p->dtype, from, min_of(round_up(touched, 2), rows), p->head_dim, panel, rows_q);
    }
    if (rows_k) {
      Rows from = rows_of(p->rel_k);
      from.begin = first_position() + rows - 1, from.step = -1;
      pack_rows<C>(p->dtype, from, rows, p->head_dim, panel, rows_k);
    }
  }

  // Makes the margins around the columns of a block zero and derives the other forms of dS. `wide` is dS in the
  // accumulator type where `ds` has not been written by the tiles; `runs` is Runs::origin.
  void prepare(int64_t q0, int64_t k0, Range columns, int64_t used_rows, const T* wide, const int32_t* runs) {
    if (wide)
      for (int64_t i = 0; i < used_rows; ++i)
        for (int64_t c = columns.lo; c < columns.hi; c += NR) copy_row(wide + i * LD + c, ds + i * LD + c);
    for (int64_t i = 0; i < used_rows; ++i) {
      memset(ds + i * LD + columns.lo - margin, 0, margin * sizeof(Element));
      memset(ds + i * LD + columns.hi, 0, margin * sizeof(Element));
    }
    if (used_rows < MB) memset(ds + used_rows * LD - margin, 0, size_t(row_margin) * LD * sizeof(Element));
    single = runs[k0 + columns.lo - (q0 + used_rows - 1)] == runs[k0 + columns.hi - 1 - q0];
    if (single) return sum(q0, k0, columns, used_rows);
#if defined(__AVX512BF16__)
    if constexpr (pair == 2) {
      // Rows further up and down are zero, unless a longer block was here before.
      const int64_t from = vertical ? -1 : 0, to = vertical && used_rows < MB ? used_rows + row_margin - 1 : used_rows;
      for (int64_t i = from; i < to; i += vertical ? 1 : 2)
        for (int64_t c = columns.lo - margin; c < columns.hi + margin; c += 2 * W) {
          const Element* at = ds + i * LD + c;
          interleave32(at, at + LD + 1, diagonal + i * LD + c);
          if (vertical) interleave32(at, at + LD, vertical + i * LD + c);
        }
    }
#endif
  }
  void sum(int64_t q0, int64_t k0, Range columns, int64_t used_rows) {
    memset(column_sums, 0, NB * sizeof(T));
    for (int64_t i = 0; i < used_rows; ++i) {
      Vec<T> total = vset(T(0));
      for (int64_t c = columns.lo; c < columns.hi; c += W) {
        const Vec<T> x = vload_as(element_type, (const char*)(ds + i * LD + c), T(0));
        total = vadd(total, x), vstore(column_sums + c, vadd(vload(column_sums + c), x));
      }
      row_sums[i] = reduce_add(total);
    }
    // Any real distance of the block names the row.
    const int64_t row = p->rel_index[strip_position(*p, span, q0, k0 + columns.lo)];
    auto load = [&](const Input& t, T* to) {
      if (t.data) load_row<T>(p->dtype, row_address(t, p->dtype, span.batch, head, row), p->head_dim, panels * NR, to);
    };
    load(p->rel_q, row_q), load(p->rel_k, row_k);
  }
  static constexpr DType element_type = sizeof(Element) == 8   ? DType::f64
                                        : sizeof(Element) == 4 ? DType::f32
                                                               : DType::bf16;

  // to(n, :) += factor[n] * row(:) for kRows rows of every panel, `to_panel` apart.
  void add_multiples(const T* factor, const T* row, T* to, int64_t to_panel) const {
    for (int64_t f = 0; f < panels; ++f)
      for (int n = 0; n < kRows; ++n)
        for (int j = 0; j < NR; j += W) {
          T* at = to + f * to_panel + n * NR + j;
          vstore(at, vfma(vset(factor[n]), vload(row + f * NR + j), vload(at)));
        }
  }
  // sums(distance) += sum over n of factor[n] * b(n, :), b packed by pack_rows.
  void add_combination(const T* factor, int64_t from, int64_t to, const T* b, int64_t b_panel, T* sums) const {
    for (int64_t f = 0; f < panels; ++f)
      for (int j = 0; j < NR; j += W) {
        T* at = sums + f * sum_rows * NR + j;
        Vec<T> total = vload(at);
        for (int64_t n = from; n < to; ++n)
          total = vfma(vset(factor[n]), unpacked(b + f * b_panel + n / pair * NR + j, n), total);
        vstore(at, total);
      }
  }
  static INLINE Vec<T> unpacked(const T* b, int64_t n) {
#if defined(__AVX512BF16__)
    if constexpr (pair == 2) {
      const __m512i both = _mm512_loadu_si512(b);
      return _mm512_castsi512_ps(n % 2 ? _mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000)))
                                       : _mm512_slli_epi32(both, 16));
    }
#endif
    return vload(b);
  }

  static INLINE void copy_row(const T* from, Element* to) {
#if defined(__AVX512BF16__)
    if constexpr (pair == 2) return store_row_pairs((float*)to, vload(from), vload(from + W));
#endif
    if constexpr (pair == 1) vstore(to, vload(from)), vstore(to + W, vload(from + W));
  }

  // d rel_query of one group of rows, into tiles of MB rows: `to` is the group's place in the first panel.
  void add_queries(int64_t row, int64_t i, int64_t k0, Range columns, T* to) const {
    if (single) return add_multiples(row_sums + row, row_q, to, MB * NR);
    const int64_t place0 = place(i, k0 + columns.lo) - (kRows - 1), shift = place0 % pair;
    const int64_t steps = ceil_div(columns.hi - columns.lo + kRows - 1 + shift, pair);
    const Element* a = ds + row * LD + columns.lo - (kRows - 1) - shift;
    for (int64_t f = 0; f < panels; ++f)
      accumulate<C, LD + 1, pair>(steps, a, rows_q + (f * rows + place0 - shift) / pair * NR, to + f * MB * NR,
                                  p->head_dim - f * NR);
  }
  // d rel_q, as sums by distance in rising order, from a block of `count` queries from q0 on; b is their packed
  // rel_query, panels b_panel apart.
  void add_rows_q(int64_t q0, int64_t count, int64_t k0, Range columns, const T* b, int64_t b_panel, T* sums) const {
    if (single) return add_combination(row_sums, 0, count, b, b_panel, sums + sum_place(q0, k0 + columns.lo) * NR);
    for (int64_t d = columns.lo - (count - 1); d < columns.hi; d += kRows) {
      const int64_t first = max_of<int64_t>(0, columns.lo - d - (kRows - 1)) / pair * pair,
                    last = min_of<int64_t>(count, columns.hi - d);
      if (first >= last) continue;
      for (int64_t f = 0; f < panels; ++f)
        accumulate<C, 1, pair*(LD + 1)>(ceil_div(last - first, pair), diagonal + first * (LD + 1) + d,
                                        b + f * b_panel + first / pair * NR,
                                        sums + (f * sum_rows + sum_place(q0, k0) + d) * NR, p->head_dim - f * NR);
    }
  }
  // d key of one group of keys (column c on) from the rows [first, last) of the block of queries at q0.
  void add_keys(int64_t q0, int64_t first, int64_t last, int64_t k0, int64_t c, T* to, int64_t to_panel) const {
    if (single) return add_multiples(column_sums + c, row_k, to, to_panel);
    int64_t i = first - (kRows - 1), falling = rows - 1 - place(q0 + i, k0 + c);
    const int64_t shift = falling % pair, steps = ceil_div(last - first + kRows - 1 + shift, pair);
    i -= shift, falling -= shift;
    for (int64_t f = 0; f < panels; ++f)
      accumulate<C, LD + 1, pair * LD>(steps, vertical + i * LD + c, rows_k + (f * rows + falling) / pair * NR,
                                       to + f * to_panel, p->head_dim - f * NR);
  }
  // d rel_k from a block of `count` queries from q0 on; b is the block's packed keys, panels b_panel apart.
  void add_rows_k(int64_t q0, int64_t count, int64_t k0, Range columns, const T* b, int64_t b_panel, T* sums) const {
    if (single)
      return add_combination(column_sums, columns.lo, columns.hi, b, b_panel,
                             sums + sum_place(q0, k0 + columns.lo) * NR);
    for (int64_t d = columns.lo - (count - 1); d < columns.hi; d += kRows) {
      const int64_t first = max_of<int64_t>(columns.lo, d) / pair * pair,
                    last = min_of<int64_t>(columns.hi, d + kRows - 1 + count);
      if (first >= last) continue;
      for (int64_t f = 0; f < panels; ++f)
        accumulate<C, -LD, pair*(LD + 1)>(ceil_div(last - first, pair), diagonal + (first - d) * LD + first,
                                          b + f * b_panel + first / pair * NR,
                                          sums + (f * sum_rows + sum_place(q0, k0) + d) * NR, p->head_dim - f * NR);
    }
  }

  // Adds the sums of one head of a sequence to the gradient of its rows.
  static void reduce(const AttentionProblem& p, const Span& s, const T* sums, int64_t sum_rows, T* gradient) {
    if (s.q_len == 0 || s.k_len == 0) return;
    const int32_t* index = p.rel_index + p.k_len - s.k_len;
    const int64_t length = s.q_len + s.k_len - 1;
    for (int64_t e = 0, end; e < length; e = end) {  // neighbours that share a row are added up first
      for (end = e + 1; end < length && index[end] == index[e];) ++end;
      for (int64_t f = 0; f < p.head_dim; f += W) {
        const T* from = sums + (f / NR * sum_rows + distance_margin) * NR + f % NR;
        Vec<T> total = vload(from + e * NR);
        for (int64_t i = e + 1; i < end; ++i) total = vadd(total, vload(from + i * NR));
        T *to = gradient + index[e] * p.head_dim + f, lane[W];
        total = vmul(total, vset(T(p.scale)));
        if (f + W <= p.head_dim) {
          vstore(to, vadd(vload(to), total));
          continue;
        }
        vstore(lane, total);
        for (int64_t d = 0; d < p.head_dim - f; ++d) to[d] += lane[d];
      }
    }
  }
};

}  // namespace
}  // namespace pyext
