// The tiles of the backward: probabilities, computed again from q, k and the saved log-sum-exp, and dS = P (dP - delta)
// of kRows queries and one panel of keys, stored in each of the forms in which a GEMM or a sum reads them.
#pragma once
#include "attention_blocks.h"

namespace pyext {
namespace {

// P and dS of one block of queries and keys, and what its tiles work with.
template <class C>
struct BackwardTiles {
  using T = typename C::T;
  static constexpr int W = kWidth<T>, NR = kPanel<T>, pair = C::pair;
  static constexpr int MB = kRows == 8 ? 64 : 48;  // query rows of a tile
  static constexpr int NB =
      kRows == 8 ? 256 : 240;  // keys of a tile; a multiple of kRows, because dK and dV have keys as rows
  static constexpr int groups = MB / kRows, box = NR % kRows == 0 ? NR : NR * kRows / 2, row_margin = W;
  static constexpr int LD = NB + (kRows == 8 ? 16 : 8);  // row stride of a block: margins for diagonal products, and
                                                         // no two rows in the same cache sets
  static_assert(MB % kRows == 0 && NB % kRows == 0 && NB % box == 0 && box % kRows == 0 && box % NR == 0,
                "tiles must fit");

  using Ranges = BlockRanges<MB>;
  using Chunk = KeyChunk<MB, NB, NR>;

  // A row's log-sum-exp in score units, as a number of type T and what that rounding left over.
  struct Normaliser {
    T lse, rest;
  };
  // The packed rows and columns that a tile multiplies, and the numbers of its rows.
  struct Operands {
    const T *q, *k, *g, *v;
    const Normaliser* lse;
    const T* delta;
  };

  const AttentionProblem* problem = nullptr;
  int64_t depth = 0, value_depth = 0;
  bool separate_wide = false;  // is dS wanted in the accumulator type, where that is not what the GEMMs read?
  Chunk chunk;                 // what the block of queries at hand sees of the block of keys
  T *p, *ds, *ds_pairs, *ds_wide, *addends, *factor, *staged, *slope, *rel_s, *row_addends;

  // dS may have its place already, for the gradients of the relative rows.
  void lay_out(const AttentionProblem& of, Arena& arena, bool separate, T* ds_place) {
    problem = &of, depth = ceil_div(of.head_dim, pair), value_depth = ceil_div(of.value_dim, pair);
    separate_wide = separate;
    p = arena.take<T>(MB / pair * LD);
    ds = ds_place ? ds_place : arena.take<T>(MB * LD / pair + 2 * row_margin) + row_margin;
    ds_pairs = pair == 2 ? arena.take<T>(MB / 2 * LD) : ds;
    ds_wide = separate_wide ? arena.take<T>(MB * LD + 2 * row_margin) + row_margin : ds;
    addends = arena.take<T>(of.dense.data || of.mask.data || of.segment ? MB * LD : 0);
    factor = arena.take<T>(of.dropout_p > 0 ? MB * LD : 0);
    rel_s = arena.take<T>(of.rel_index ? kRows * NR : 0);
    staged = arena.take<T>(kRows * NR), slope = arena.take<T>(kRows * NR), row_addends = arena.take<T>(NR);
  }

  static INLINE void store_p(T* to, int i, const Vec<T>* upper, const Vec<T>* lower) {
#if defined(__AVX512BF16__)
    if constexpr (pair == 2)
      UNROLL for (int j = 0; j < kVectors; ++j) store_pairs(to + i / 2 * LD + j * W, upper[j], lower[j]);
#endif
    if constexpr (pair == 1) store_rows(to, i, upper, lower);
  }
  // Where rows g.. and columns c.. of the block's dS go, in each of the forms in which a GEMM or a sum reads it.
  struct Destination {
    T *p, *ds, *ds_pairs, *ds_wide;
  };
  Destination destination(int64_t row, int64_t c) const {
    return {p + row / pair * LD + c, ds + (row * LD + c) / pair, ds_pairs + row / pair * LD + c,
            ds_wide + row * LD + c};
  }
  INLINE void store_ds(const Destination& to, int i, const Vec<T>* upper, const Vec<T>* lower) const {
#if defined(__AVX512BF16__)
    if constexpr (pair == 2) {
      store_p(to.ds_pairs, i, upper, lower);
      store_row_pairs(to.ds + i * LD / 2, upper[0], upper[1]);
      store_row_pairs(to.ds + (i + 1) * LD / 2, lower[0], lower[1]);
      return;
    }
#endif
    store_rows(to.ds, i, upper, lower);
  }
  static INLINE void store_rows(T* to, int i, const Vec<T>* upper, const Vec<T>* lower) {
    UNROLL for (int j = 0; j < kVectors; ++j) vstore(to + i * LD + j * W, upper[j]),
        vstore(to + (i + 1) * LD + j * W, lower[j]);
  }
  static INLINE Vec<T> load_p(const T* p, int i, int j) {
#if defined(__AVX512BF16__)
    if constexpr (pair == 2) {
      __m512i both = _mm512_loadu_si512(p + i / 2 * LD + j * W);
      return _mm512_castsi512_ps(i % 2 ? _mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000)))
                                       : _mm512_slli_epi32(both, 16));
    }
#endif
    return vload(p + i * LD + j * W);
  }

  void zero_tile(const Destination& to) const {
    const Vec<T> zeros[kVectors] = {vset(T(0)), vset(T(0))};
    for (int i = 0; i < kRows; i += 2) {
      store_p(to.p, i, zeros, zeros), store_ds(to, i, zeros, zeros);
      if (separate_wide) store_rows(to.ds_wide, i, zeros, zeros);
    }
  }

  static INLINE Vec<T> normalised(Vec<T> score, const Normaliser& n) {
    score = vsub(score, vset(n.lse));
    return pair == 2 ? score : vsub(score, vset(n.rest));  // bf16 does not see the rest
  }

  // What a tile adds to its products: one number, the strip (bias points at the value for the first row and key), or a
  // table of addends with row stride LD that also hides keys.
  enum class Addend { constant, strip, table };

  template <Addend addend, bool masked, class Terms>
  INLINE void tile(const Operands& in, const T* bias, T constant, const uint32_t* visible, const Destination& to,
                   const Terms& add_terms) const {
    const Vec<T> scale = vset(score_scale<C>(*problem));
    Tile<C> t;
    t.zero();
    t.template multiply<1, kRows>(depth, in.q, in.k);
    add_terms(t);
    UNROLL for (int i = 0; i < kRows; ++i) {
      UNROLL for (int j = 0; j < kVectors; ++j) {
        Vec<T> x;
        if (pair == 2 && addend == Addend::constant)
          x = vfma(t.v[i][j], scale, vset(constant - in.lse[i].lse));
        else
          x = normalised(vfma(t.v[i][j], scale,
                              addend == Addend::constant ? vset(constant)
                              : addend == Addend::strip  ? vload(bias - i + j * W)
                                                         : vload(bias + i * LD + j * W)),
                         in.lse[i]);
        if (addend == Addend::table) x = vmin(x, vset(T(0)));  // see staged_tile
        x = C::exp(x);
        if (masked) x = select(lanes_of<T>(visible[i] >> (j * W)), x, vset(T(0)));
        t.v[i][j] = x;
      }
    }
    UNROLL for (int i = 0; i < kRows; i += 2) store_p(to.p, i, t.v[i], t.v[i + 1]);
    t.zero();
    t.template multiply<1, kRows>(value_depth, in.g, in.v);
    UNROLL for (int i = 0; i < kRows; ++i) {
      const Vec<T> d = vset(in.delta[i]);
      UNROLL for (int j = 0; j < kVectors; ++j) t.v[i][j] = vmul(load_p(to.p, i, j), vsub(t.v[i][j], d));
    }
    UNROLL for (int i = 0; i < kRows; i += 2) {
      if (separate_wide) store_rows(to.ds_wide, i, t.v[i], t.v[i + 1]);
      store_ds(to, i, t.v[i], t.v[i + 1]);
    }
  }

  // The same for softcap and dropout, with whatever else the score has.
  void staged_tile(const Operands& in, const ScoreTerms<C>& terms, const uint32_t* visible, int64_t row,
                   int64_t last_row, int64_t j0, const T* drop_factor, const Destination& to) const {
    Tile<C> t;
    t.zero();
    t.template multiply<1, kRows>(depth, in.q, in.k);
    const Vec<T> scale = vset(score_scale<C>(*problem)), none = vset(T(0));
    for (int i = 0; i < kRows; ++i) {
      T *s = staged + i * NR, *slopes = slope + i * NR;
      for (int j = 0; j < kVectors; ++j) vstore(s + j * W, vmul(t.v[i][j], scale));
      terms.finish_row(min_of(row + i, last_row), j0, NR, {0, INT32_MAX}, visible[i], s, slopes, row_addends,
                       problem->rel_index ? rel_s + i * NR : nullptr);
      // P <= 1 always; the bound keeps a row whose every score is finfo.min finite, whatever its lse was rounded to.
      for (int j = 0; j < kVectors; ++j) vstore(s + j * W, C::exp(vmin(normalised(vload(s + j * W), in.lse[i]), none)));
    }
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVectors; ++j) {
        t.v[i][j] = vload(staged + i * NR + j * W);
        if (drop_factor) t.v[i][j] = vmul(t.v[i][j], vload(drop_factor + i * LD + j * W));
      }
    for (int i = 0; i < kRows; i += 2) store_p(to.p, i, t.v[i], t.v[i + 1]);
    t.zero();
    t.template multiply<1, kRows>(value_depth, in.g, in.v);
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVectors; ++j) {
        Vec<T> dp = t.v[i][j];
        if (drop_factor) dp = vmul(dp, vload(drop_factor + i * LD + j * W));
        t.v[i][j] = vmul(vload(staged + i * NR + j * W), vsub(dp, vset(in.delta[i])));
      }
    // A bias is added after the softcap, so its gradient does not know the softcap's slope.
    if (separate_wide)
      for (int i = 0; i < kRows; i += 2) store_rows(to.ds_wide, i, t.v[i], t.v[i + 1]);
    if (problem->softcap > 0)
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kVectors; ++j) t.v[i][j] = vmul(t.v[i][j], vload(slope + i * NR + j * W));
    for (int i = 0; i < kRows; i += 2) store_ds(to, i, t.v[i], t.v[i + 1]);
  }
};

}  // namespace
}  // namespace pyext
