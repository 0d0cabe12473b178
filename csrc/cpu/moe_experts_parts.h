// What forward and backward of layers of experts (csrc/moe_experts.h) share: their rows in pieces, operands in panels,
// and the products of these.
//
// A left operand is kept as "chunks": [chunk][row][kPanel elements], so that a tile of rows steps through it by
// constants; its source rows stay rows. A right operand is packed a few steps at a time, right before all rows of a
// piece use it: no expert's weights are ever there twice, and where rows are few the reading of the weights is all
// there is to wait for. Gate and up share panels: one vector of columns of the gate, then the same columns of up, so
// that both pre-activations of a hidden feature meet in one tile.
//
// An element of a product is the same sum, in the same order, whatever rows are computed beside it (but the products of
// moe_experts_few.h have an order of their own).
#pragma once
#include "../moe_experts.h"
#include "activations.h"
#include "gemm.h"

namespace pyext {
namespace {

// Steps of one sum, in packed elements: so much of a panel stays in L1, and longer sums are sums of such sums, which
// lose fewer bits. 256 gain nothing, 96 lose 2 %.
constexpr int64_t kDepth = 128;
// Panels that are packed at a time where source rows are steps: their addresses are found once, and they are read in
// longer pieces. 5 % of training 64 experts with 32 rows each (bf16, Zen 5); with 16 the panels leave L1.
constexpr int64_t kTogether = 4;
// Rows that share a packed piece of weights: packing costs as much as the products of a dozen rows.
constexpr int64_t kPieceRows = kRows * 64;

// ---- rows ----

// Some rows of one expert, [first, first + rows), of which `before` rows of the expert come earlier; `place` is where
// they lie in an operand made of several pieces, each of which is padded to whole tiles.
struct Piece {
  int64_t expert, first, rows, before, place;
  bool last;  // of its expert
  INLINE int64_t padded() const { return round_up(rows, kRows); }
};

// Walks over the rows of all experts. Pieces begin at multiples of their size within the expert, whatever the others
// have: where its sums over rows are cut must not depend on them.
struct Pieces {
  const ExpertsProblem& p;
  int64_t expert = 0, done = 0;
  // Up to `capacity` padded rows in pieces of at most `size`; returns how many. At most capacity / kRows.
  int64_t take(int64_t size, int64_t capacity, Piece* to) {
    int64_t count = 0, used = 0;
    for (; expert < p.experts; ++expert, done = 0)
      for (int64_t begin = p.offsets[expert], end = p.offsets[expert + 1]; begin + done < end;) {
        const int64_t rows = min_of(size, end - begin - done);
        if (used + round_up(rows, kRows) > capacity) return count;
        to[count++] = {expert, begin + done, rows, done, used, begin + done + rows == end};
        used += round_up(rows, kRows), done += rows;
      }
    return count;
  }
  // Pieces of pieces.
  static int64_t split(const Piece* from, int64_t count, Piece* to) {
    int64_t n = 0;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t at = 0; at < from[i].rows; at += kPieceRows) {
        const Piece& whole = from[i];
        to[n++] = {whole.expert,      whole.first + at, min_of(kPieceRows, whole.rows - at),
                   whole.before + at, whole.place + at, whole.last};
      }
    return n;
  }
};

// Runs body(piece, first panel, last panel): the panels of each piece, shared out where pieces alone are too few for
// the threads.
template <class Body>
void for_each_piece(const Parallel& parallel, const Piece* pieces, int64_t count, int64_t panels, const Body& body) {
  if (!count || !panels) return;
  const int64_t shares = parallel.threads <= 1 ? 1 : min_of(panels, ceil_div(parallel.threads * 4, count));
  for_each_task(parallel, count * shares, [&](int64_t t) {
    const int64_t share = t % shares;
    body(pieces[t / shares], share * panels / shares, (share + 1) * panels / shares);
  });
}

// The rows [first, first + count) of what the tokens come with, x or the gradient of out.
INLINE Rows token_rows(const ExpertsProblem& p, const Input& tensor, const Piece& piece) {
  const int64_t end = piece.first + piece.rows;
  return {(const char*)tensor.data, tensor.row * element_size(p.dtype), end, p.source, piece.first};
}
INLINE Rows expert_rows(const ExpertsProblem& p, const Input& weights, int64_t expert, int64_t count) {
  const int64_t size = element_size(p.dtype);
  return {(const char*)weights.data + expert * weights.batch * size, weights.row * size, count};
}
INLINE const char* expert_bias(const ExpertsProblem& p, const Input& bias, int64_t expert) {
  return bias.data ? (const char*)bias.data + expert * bias.batch * element_size(p.dtype) : nullptr;
}

// Rows of w_gate and w_up by turns, `width` of each; of w_gate alone where units are not gated.
template <int width>
struct UnitRows {
  Rows gate, up;
  bool gated;
  int64_t begin = 0;
  INLINE const char* operator[](int64_t r) const {
    r += begin;
    if (!gated) return gate[r];
    const int64_t at = r / (2 * width) * width + r % width;
    return r & width ? up[at] : gate[at];
  }
  // From row r and byte b of every row on.
  INLINE UnitRows from(int64_t r, int64_t b) const { return {gate.from(0, b), up.from(0, b), gated, begin + r}; }
};
template <class T>
INLINE UnitRows<kWidth<T>> unit_rows(const ExpertsProblem& p, int64_t expert) {
  const bool gated = p.unit == Unit::gated;
  return {expert_rows(p, p.w_gate, expert, p.hidden), expert_rows(p, p.w_up, expert, p.hidden), gated};
}

// ---- operands ----

// Steps between two askings for what comes next: a core waits for few lines at a time.
constexpr int64_t kAsked = 8;

// Source rows that will be packed soon, asked for a few lines at a time.
template <class Source>
struct Ahead {
  Source rows;
  int64_t row, end, bytes, lines;  // lines of each asking
  const char *next = nullptr, *stop = nullptr;
  INLINE void ask() {
    for (int64_t i = 0; i < lines; ++i, next += 64) {
      while (next >= stop) {
        if (row >= end) return;
        next = rows[row++];
        if (next)
          stop = next + bytes, next = (const char*)(uintptr_t(next) & ~uintptr_t(63));
        else
          next = stop = nullptr;
      }
      _mm_prefetch(next, _MM_HINT_T0);
    }
  }
};

// Steps from k on of `count` panels from n on, and the part of them that is to be asked for: the panels' turns share
// it.
struct Turn {
  int64_t n, count, k, part, parts;
};
// The turn's part of `count` rows.
template <class Source>
INLINE Ahead<Source> look_ahead(const Source& rows, const Turn& turn, int64_t count, int64_t bytes, int64_t asks) {
  const int64_t begin = count * turn.part / turn.parts, end = count * (turn.part + 1) / turn.parts;
  return {rows, begin, end, bytes, ceil_div((end - begin) * ceil_div(bytes + 63, 64), asks)};
}

// A right operand whose columns are source rows, packed into `packed` when it is needed. at(n, count, k, steps) gives
// steps [k, k + steps) of `count` panels from n on, at most `together`, kDepth steps apart.
template <class C, class Source>
struct ColumnsOf {
  using T = typename C::T;
  DType dtype;
  Source rows;
  int64_t features;
  T* packed;
  static constexpr int64_t together = 1;
  INLINE const T* at(int64_t n, int64_t, int64_t k, int64_t steps) const {
    const int64_t first = k * C::pair, count = min_of(steps * C::pair, features - first);
    const Source from = rows.from(n * kPanel<T>, first * element_size(dtype));
    const char* found[kPanel<T>];  // once, not for every few steps
    for (int r = 0; r < kPanel<T>; ++r) found[r] = from[r];
    pack_columns<C, const char* const*>(dtype, found, count, kPanel<T>, packed);
    return packed;
  }
  static int64_t group(int64_t) { return 1; }
  INLINE Ahead<Source> ahead(const Turn& next, int64_t asks) const {
    const int64_t first = next.k * C::pair, size = element_size(dtype);
    const int64_t bytes = max_of<int64_t>(0, min_of(kDepth * C::pair, features - first)) * size;
    return look_ahead(rows.from(next.n * kPanel<T>, first * size), next, next.count * kPanel<T>, bytes, asks);
  }
};

// The same where source rows are steps.
template <class C, class Source>
struct RowsOf {
  using T = typename C::T;
  DType dtype;
  Source rows;
  int64_t features;
  T* packed;
  static constexpr int64_t together = kTogether;
  INLINE const T* at(int64_t n, int64_t count, int64_t k, int64_t steps) const {
    const Source from = rows.from(k * C::pair, n * kPanel<T> * element_size(dtype));
    const int64_t columns = min_of<int64_t>(count * kPanel<T>, features - n * kPanel<T>);
    pack_rows<C>(dtype, from, steps * C::pair, columns, kDepth * kPanel<T>, packed);
    return packed;
  }
  // So many that all of them need of some rows is read in its order of memory, and that their sums stay in L2.
  static int64_t group(int64_t rows) { return max_of<int64_t>(1, (1 << 16) / (round_up(rows, kRows) * kPanel<T>)); }
  INLINE Ahead<Source> ahead(const Turn& next, int64_t asks) const {
    const int64_t first = next.n * kPanel<T>, size = element_size(dtype);
    const int64_t bytes = max_of<int64_t>(0, min_of<int64_t>(next.count * kPanel<T>, features - first)) * size;
    return look_ahead(rows.from(next.k * C::pair, first * size), next, bytes ? kDepth * C::pair : 0, bytes, asks);
  }
};

// Panels of kPanel columns, `stride` elements apart.
template <class T>
struct Panels {
  T* base;
  int64_t stride;
  INLINE T* operator[](int64_t n) const { return base + n * stride; }
  static constexpr int64_t together = 1;
  INLINE const T* at(int64_t n, int64_t, int64_t k, int64_t) const { return base + n * stride + k * kPanel<T>; }
  static int64_t group(int64_t) { return 1; }
  INLINE Ahead<Rows> ahead(const Turn& next, int64_t asks) const {
    const int64_t bytes = kDepth * kPanel<T> * int64_t(sizeof(T));
    return look_ahead(Rows{(const char*)at(next.n, 1, next.k, 0), 0, 1}, next, 1, bytes, asks);
  }
};

template <class T>
struct Chunks {
  T* base;
  int64_t stride;  // elements from chunk to chunk
  INLINE T* at(int64_t row, int64_t k) const { return base + k / kPanel<T> * stride + row * kPanel<T> + k % kPanel<T>; }
  // tile = rows [row, row + kRows), of which `rows` matter, elements [k, k + steps) times as much of a panel; k is a
  // multiple of kPanel.
  template <class C, class Next>
  INLINE void multiply(Tile<C>& tile, int64_t row, int64_t rows, int64_t k, int64_t steps, const T* panel,
                       Next& next) const {
    if (rows > 4) return multiply_rows<C, kRows>(tile, row, k, steps, panel, next);
    if (rows > 2) return multiply_rows<C, 4>(tile, row, k, steps, panel, next);
    if (rows == 2) return multiply_rows<C, 2>(tile, row, k, steps, panel, next);
    multiply_rows<C, 1>(tile, row, k, steps, panel, next);
  }
  template <class C, int count, class Next>
  INLINE void multiply_rows(Tile<C>& tile, int64_t row, int64_t k, int64_t steps, const T* panel, Next& next) const {
    const T* from = at(row, k);
    Tile<C> sums;  // a copy that nothing points at, so that it stays in registers
    sums.zero();
    for (; steps > 0; steps -= kPanel<T>, from += stride, panel += kPanel<T> * kPanel<T>) {
      for (int64_t q = 0; q < min_of<int64_t>(steps, kPanel<T>); q += kAsked) {
        next.ask();
        sums.template multiply<kPanel<T>, 1, count>(min_of(steps - q, kAsked), from + q, panel + q * kPanel<T>);
      }
    }
    tile = sums;
  }
};
// The transpose of one panel: its columns are the rows.
template <class T>
struct Transposed {
  const T* base;
  template <class C, class Next>
  INLINE void multiply(Tile<C>& tile, int64_t row, int64_t, int64_t k, int64_t steps, const T* panel,
                       Next& next) const {
    const T* from = base + k * kPanel<T> + row;
    Tile<C> sums;
    sums.zero();
    for (; steps > 0; steps -= kAsked, from += kAsked * kPanel<T>, panel += kAsked * kPanel<T>) {
      next.ask();
      sums.template multiply<1, kPanel<T>>(min_of(steps, kAsked), from, panel);
    }
    tile = sums;
  }
};

// Elements of the sums of multiply_panels.
template <class Right>
INLINE int64_t panel_sums(int64_t rows, int64_t panels) {
  using T = typename Right::T;
  return min_of(Right::group(rows), panels) * round_up(rows, kRows) * kPanel<T>;
}
// Runs finish(n, row, tile) for the tiles of rows [0, rows) of left * panels [n, end) of right.
template <class C, class Left, class Right, class Finish>
INLINE void multiply_panels(const Left& left, int64_t rows, int64_t depth, const Right& right, int64_t n, int64_t end,
                            typename C::T* sums, const Finish& finish) {
  using T = typename C::T;
  const int64_t asks = ceil_div(rows, kRows) * (kDepth / kAsked), group = min_of(Right::group(rows), end - n);
  for (int64_t count; n < end; n += count) {
    count = min_of(group, end - n);
    int64_t k = 0;
    do {
      const int64_t steps = min_of(kDepth, depth - k);
      const bool last = k + steps >= depth;
      const T* panel = nullptr;
      for (int64_t i = 0; i < count; ++i, panel += kDepth * kPanel<T>) {
        if (i % Right::together == 0) panel = right.at(n + i, min_of(Right::together, count - i), k, steps);
        auto next = right.ahead(last ? Turn{n + count, group, 0, i, count} : Turn{n, count, k + steps, i, count}, asks);
        for (int64_t row = 0; row < rows; row += kRows) {
          Tile<C> tile;
          left.template multiply<C>(tile, row, rows - row, k, steps, panel, next);
          T* sum = sums + (i * round_up(rows, kRows) + row) * kPanel<T>;
          UNROLL for (int r = 0; r < kRows; ++r) UNROLL for (int j = 0; j < kVectors; ++j) {
            T* at = sum + r * kPanel<T> + j * kWidth<T>;
            if (k) tile.v[r][j] = vadd(tile.v[r][j], vload(at));
            if (!last) vstore(at, tile.v[r][j]);
          }
          if (last) finish(n + i, row, tile);
        }
      }
      k += steps;
    } while (k < depth);
  }
}

// ---- elements ----

template <class T>
INLINE Vec<T> load_part(DType dtype, const char* p, int64_t count) {
  return count >= kWidth<T> ? vload_as(dtype, p, T(0)) : vload_some<T>(dtype, p, max_of<int64_t>(count, 0));
}
template <class T>
INLINE void store_part(DType dtype, char* p, int64_t count, Vec<T> v) {
  if (count >= kWidth<T>)
    vstore_as(dtype, p, v);
  else if (count > 0)
    vstore_some<T>(dtype, p, count, v);
}
// A vector of a bias from element n on, or zero where there is none.
template <class T>
INLINE Vec<T> load_bias(DType dtype, const char* bias, int64_t n, int64_t size) {
  return bias ? load_part<T>(dtype, bias + n * element_size(dtype), size - n) : vset(T(0));
}
// The first `rows` rows and `columns` columns of a tile, rounded to rows of `to`.
template <class C>
INLINE void store_tile(DType dtype, const Tile<C>& tile, int64_t rows, int64_t columns, char* to, int64_t row_bytes) {
  using T = typename C::T;
  UNROLL for (int i = 0; i < kRows; ++i) if (i < rows) UNROLL for (int j = 0; j < kVectors; ++j) store_part<T>(
      dtype, to + i * row_bytes + j * kWidth<T> * element_size(dtype), columns - j * kWidth<T>, tile.v[i][j]);
}

// One row of a tile past the caches; false where that is not what is stored, or where it is not aligned.
template <class C>
INLINE bool stream_panel(DType dtype, char* to, const Vec<typename C::T> (&v)[kVectors]) {
  using T = typename C::T;
  if (uintptr_t(to) % 64 || (C::pair == 1 && dtype != kWide<T>)) return false;
#if defined(__AVX512BF16__)
  if constexpr (C::pair == 2) {
    vstream((float*)to, (F)_mm512_cvtne2ps_pbh(v[1], v[0]));
    return true;
  }
#endif
  UNROLL for (int j = 0; j < kVectors; ++j) vstream((T*)to + j * kWidth<T>, v[j]);
  return true;
}

// One vector of numbers as packed elements.
template <class C>
INLINE void store_elements(typename C::T* to, Vec<typename C::T> v) {
  if constexpr (C::pair == 2)
    store_bf16((uint16_t*)to, v);
  else
    vstore(to, v);
}

// Rows of a matrix as chunks; `padded` rows, those that do not exist are zero.
template <class C>
void pack_chunks(DType dtype, const Rows& rows, int64_t padded, int64_t features, const Chunks<typename C::T>& to) {
  using T = typename C::T;
  if constexpr (C::pair == 1) {
    pack_rows<C>(dtype, rows, padded, features, to.stride, to.base);
  } else {  // pairs lie side by side already
    constexpr int64_t step = kWidth<T> * C::pair;
    for (int64_t r = 0; r < padded; ++r) {
      const char* row = rows[r];
      for (int64_t f = 0; f < features; f += step) {
        const int64_t bytes = min_of(step, features - f) * 2;
        alignas(64) char padding[64] = {};
        const char* from = padding;
        if (row && bytes == 64)
          from = row + f * 2;
        else if (row)
          memcpy(padding, row + f * 2, size_t(bytes));
        vstore(to.at(r, f / C::pair), vload((const T*)from));
      }
    }
  }
}

// ---- results per token ----

// to[t] = sum_k weights[t, k] rows[position[t, k]], in the order of k, rounded once; weights null: 1. Each product is
// rounded to T before it is added: rows that other processes weighted add up to the same bits (ExpertParallel).
template <class T>
void sum_rows(const ExpertsProblem& p, const Parallel& parallel, const T* rows, int64_t width, const T* weights,
              const Output& to) {
  constexpr int64_t together = 16;
  for_each_task(parallel, ceil_div(p.tokens, together), [&](int64_t task) {
    for (int64_t t = task * together; t < min_of((task + 1) * together, p.tokens); ++t) {
      char* out = row_address(to, p.dtype, 0, 0, t);
      for (int64_t c = 0; c < width; c += kWidth<T>) {
        Vec<T> sum = vset(T(0));
        for (int64_t k = t * p.choices; k < (t + 1) * p.choices; ++k) {
          if (p.position[k] < 0) continue;
          const Vec<T> row = load_part<T>(kWide<T>, (const char*)(rows + p.position[k] * width + c), width - c);
          Vec<T> product = weights ? vmul(vset(weights[k]), row) : row;
          asm("" : "+x"(product));  // or the compiler would fuse the two
          sum = vadd(product, sum);
        }
        store_part<T>(p.dtype, out + c * element_size(p.dtype), width - c, sum);
      }
    }
  });
}

// Zeros in the rows of no expert.
INLINE void clear_unused(const ExpertsProblem& p, const Output& rows, int64_t width) {
  if (!rows.data) return;
  for (int64_t n = p.offsets[p.experts]; n < p.rows; ++n)
    memset(row_address(rows, p.dtype, 0, 0, n), 0, size_t(width * element_size(p.dtype)));
}

}  // namespace
}  // namespace pyext
