// Relative rows: the score terms scale * rel_query_i . rel_q[index[u]] and scale * k_j . rel_k[index[u]], where u is
// the position of the distance j - i. A tile of queries and keys touches one contiguous band of positions, so its terms
// are a small product with the band's rows, read skewed: entry (i, j) of the tile lies at (i, u) or at (u, j) of a
// product. It is added to the tile's q k^T, so that one scale and one epilogue serve all terms.
#pragma once
#include "attention_blocks.h"

namespace pyext {
namespace {

// The index as runs of equal rows. One row per run is packed; from a position to the next the number of the run rises
// by at most one, so that a vector of positions reads at most a vector of neighbouring runs.
struct Runs {
  static constexpr int64_t pad = 128;  // tiles read past the ends; what they read there is masked
  int64_t length = 0, count = 0;
  int32_t *run = nullptr, *row = nullptr;  // run of each position, row of each run

  explicit Runs(const AttentionProblem& p) {
    if (!p.rel_index) return;
    length = max_of<int64_t>(p.q_len + p.k_len - 1, 0);
    for (int64_t u = 0; u < length; ++u) count += starts(p, u);
  }
  static bool starts(const AttentionProblem& p, int64_t u) { return u == 0 || p.rel_index[u] != p.rel_index[u - 1]; }
  void lay_out(Arena& arena) {
    if (!length) return;
    run = arena.take<int32_t>(length + 2 * pad), row = arena.take<int32_t>(count);
    if (run) run += pad;
  }
  void fill(const AttentionProblem& p) {
    if (!length) return;
    int32_t n = -1;
    for (int64_t u = 0; u < length; ++u) {
      if (starts(p, u)) row[++n] = p.rel_index[u];
      run[u] = n;
    }
    for (int64_t t = 0; t < pad; ++t) run[-1 - t] = 0, run[length + t] = n;
  }
  // Address of the run for (i, j) = (0, 0); the run for (i, j) stands at + j - i.
  const int32_t* origin(const AttentionProblem& p, const Span& s) const { return run + strip_position(p, s, 0, 0); }
};

INLINE bool same_rows(const Input& a, const Input& b) {
  return a.data == b.data && a.batch == b.batch && a.head == b.head && a.row == b.row;
}
// Source rows of rel_q or rel_k for one head, by run or by position.
INLINE Rows relative_rows(const AttentionProblem& p, const Input& t, int64_t batch, int64_t head, const int32_t* index,
                          int64_t count) {
  return {row_address(t, p.dtype, batch, head, 0), t.row * element_size(p.dtype), count, index};
}

// The packed rows of one query head.
template <class C>
struct RelativeRows {
  using T = typename C::T;
  static constexpr int NR = kPanel<T>;
  T *q = nullptr, *k = nullptr;  // rel_q in panels of NR runs, rel_k in groups of kRows runs

  static int64_t q_size(const AttentionProblem& p, const Runs& runs, int64_t depth) {
    return p.rel_q.data ? round_up(runs.count, NR) * depth + 16 : 0;
  }
  static int64_t k_size(const AttentionProblem& p, const Runs& runs, int64_t depth) {
    return p.rel_k.data ? round_up(runs.count, kRows) * depth + 16 : 0;
  }
  void pack(const AttentionProblem& p, const Runs& runs, int64_t batch, int64_t head, int64_t depth) const {
    auto panels = [&](const Input& t, int64_t width, T* to) {
      if (!t.data) return;
      Rows rows = relative_rows(p, t, batch, head, runs.row, runs.count);
      for (; rows.begin < runs.count; rows.begin += width)
        pack_columns<C>(p.dtype, rows, p.head_dim, width, to + rows.begin * depth);
    };
    panels(p.rel_q, NR, q), panels(p.rel_k, kRows, k);
  }
};

// The relative terms of a block of MB queries and up to NB keys, in units of q k^T.
template <class C, int MB, int NB>
struct RelativeBlock {
  using T = typename C::T;
  static constexpr int W = kWidth<T>, NR = kPanel<T>, groups = MB / kRows;
  // A group's band: NB + kRows - 1 positions that start anywhere in a panel; a vector may be read past its end.
  static constexpr int64_t band_row = (NB / NR + 2 + (kRows + NR - 2) / NR) * NR + W;
  // A panel of keys meets the runs of MB + NR - 1 positions, in whole groups of kRows.
  static constexpr int64_t table_rows = round_up(MB + NR - 1 + kRows, kRows) + kRows;
  // Two neighbouring blocks of queries share the runs of NR - 1 positions.
  static constexpr int32_t kept_most = (NR - 2) / kRows + 2;

  T *band = nullptr, *table = nullptr, *kept_tables = nullptr;
  int32_t* kept_groups = nullptr;            // [first, end) of each slot
  int32_t *base = nullptr, *done = nullptr;  // panels of runs that a group's band holds: [base, done)
  const int32_t* runs = nullptr;             // Runs::origin
  RelativeRows<C> rows;
  int64_t depth = 0, table_base = 0, slots = 0;

  void lay_out(const AttentionProblem& p, Arena& arena, int64_t key_panels) {
    *this = {};
    if (p.rel_q.data) {
      band = arena.take<T>(MB * band_row);
      base = arena.take<int32_t>(groups), done = arena.take<int32_t>(groups);
    }
    if (!p.rel_k.data) return;
    slots = key_panels;
    table = arena.take<T>(table_rows * NR);
    kept_tables = arena.take<T>(slots * kept_most * kRows * NR), kept_groups = arena.take<int32_t>(slots * 2);
  }
  // A new block of queries.
  void begin(const RelativeRows<C>& packed, const int32_t* origin, int64_t packed_depth) {
    rows = packed, runs = origin, depth = packed_depth;
    if (band) memset(done, 0, groups * sizeof(int32_t));
  }

  // Products of the groups' rel_query with the bands that the chunk's keys reach. What is there from the chunk before
  // is kept.
  void extend_bands(const T* q, int64_t q0, const KeyChunk<MB, NB, NR>& chunk, int64_t used_groups) {
    if (!band) return;
    int32_t from[groups], first = INT32_MAX, last = 0;
    for (int64_t g = 0; g < used_groups; ++g) {
      from[g] = INT32_MAX;
      const Range keys = chunk.keys_of(g);
      if (keys.lo >= keys.hi) continue;
      const int64_t i = q0 + g * kRows;
      const int32_t begin = runs[keys.lo - (i + kRows - 1)] / NR, end = runs[keys.hi - 1 - i] / NR + 1;
      const int32_t keep = done[g] - begin;
      if (keep > 0 && begin != base[g])
        for (int64_t r = 0; r < kRows; ++r) {
          T* row = band + (g * kRows + r) * band_row;
          memmove(row, row + (begin - base[g]) * NR, size_t(keep) * NR * sizeof(T));
        }
      base[g] = begin, from[g] = max_of(begin, done[g]), done[g] = max_of(end, done[g]);
      first = min_of(first, from[g]), last = max_of(last, end);
    }
    for (int32_t panel = first; panel < last; ++panel)
      for (int64_t g = 0; g < used_groups; ++g)
        if (panel >= from[g] && panel < done[g])
          product(q + g * kRows * depth, rows.q + panel * NR * depth,
                  band + g * kRows * band_row + (panel - base[g]) * NR, band_row);
  }

  // Products of the runs that the queries [q0, q1) have with the panel of keys at j. Those that the block of queries
  // before had, too, are kept: of panel `slot` the first groups of runs where queries rise, the last where they fall.
  void fill_table(const T* keys, int64_t q0, int64_t q1, int64_t j, int64_t slot, bool rising) {
    if (!table) return;
    constexpr int64_t group = kRows * NR;
    const int32_t first = runs[j - (q1 - 1)] / kRows, end = runs[j + NR - 1 - q0] / kRows + 1;
    int32_t &kept_first = kept_groups[2 * slot], &kept_end = kept_groups[2 * slot + 1];
    T* kept = kept_tables + slot * kept_most * group;
    table_base = first * kRows;
    for (int32_t t = first; t < end; ++t)
      if (t >= kept_first && t < kept_end)
        memcpy(table + (t - first) * group, kept + (t - kept_first) * group, group * sizeof(T));
      else
        product(rows.k + t * kRows * depth, keys, table + (t - first) * group, NR);
    kept_first = rising ? first : max_of(first, end - kept_most), kept_end = min_of(end, kept_first + kept_most);
    memcpy(kept, table + (kept_first - first) * group, size_t(kept_end - kept_first) * group * sizeof(T));
  }
  // What was kept belongs to one query head and one numbering of slots.
  void forget_tables() {
    if (table) memset(kept_groups, 0, size_t(slots) * 2 * sizeof(int32_t));
  }

  void product(const T* a, const T* b, T* to, int64_t to_row) const {
    Tile<C> tile;
    tile.zero();
    tile.template multiply<1, kRows>(depth, a, b);
    UNROLL for (int i = 0; i < kRows; ++i) UNROLL for (int j = 0; j < kVectors; ++j)
        vstore(to + i * to_row + j * W, tile.v[i][j]);
  }

  // Adds the relative terms of one tile. They come after its products: a sum that starts small loses fewer bits.
  struct Terms {
    const T *band, *table;  // of run 0, for the group's first query; for the panel's first key
    const int32_t* run;     // of the first query and key
    INLINE void operator()(Tile<C>& t) const {
      if (table) add_table(t);
      if (!band) return;
      const bool single_steps = run[NR - 1] - run[1 - kRows] == NR + kRows - 2;
      if (single_steps) {
        const T* first = band + run[0];
        UNROLL for (int i = 0; i < kRows; ++i) UNROLL for (int j = 0; j < kVectors; ++j) t.v[i][j] =
            vadd(t.v[i][j], vload(first + i * (band_row - 1) + j * W));
      } else {
        UNROLL for (int i = 0; i < kRows; ++i) UNROLL for (int j = 0; j < kVectors; ++j) t.v[i][j] =
            vadd(t.v[i][j], load_near(band + i * band_row, run + j * W - i));
      }
    }
    // t(i, l) += row run[l - i] of the table, column l: each lane from a row of its own. In step `bit` the lanes with
    // that bit move on by `bit` positions; after the last step lane l is l positions further than lane 0.
    INLINE void add_table(Tile<C>& t) const {
      UNROLL for (int j = 0; j < kVectors; ++j) {
        Vec<T> y[kRows - 1 + W];
        const int32_t* at = run + j * W - (kRows - 1);
        UNROLL for (int u = 0; u < kRows - 1 + W / 2; ++u) y[u] =
            select(lanes_with_bit<T>(W / 2), vload(table + int64_t(at[u + W / 2]) * NR + j * W),
                   vload(table + int64_t(at[u]) * NR + j * W));
        UNROLL for (int bit = W / 4; bit >= 1; bit /= 2) UNROLL for (int u = 0; u < kRows - 1 + bit; ++u) y[u] =
            select(lanes_with_bit<T>(bit), y[u + bit], y[u]);
        UNROLL for (int i = 0; i < kRows; ++i) t.v[i][j] = vadd(t.v[i][j], y[kRows - 1 - i]);
      }
    }
  };
  // The terms of a tile by themselves.
  static void store(const Terms& add_terms, T scale, T* to, int64_t to_row) {
    Tile<C> t;
    t.zero();
    add_terms(t);
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kVectors; ++j) vstore(to + i * to_row + j * W, vmul(vset(scale), t.v[i][j]));
  }
  // Of the queries from i on (group g of the block) and the keys from j on.
  INLINE Terms terms(int64_t g, int64_t i, int64_t j) const {
    return {band ? band + g * kRows * band_row - int64_t(base[g]) * NR : nullptr,
            table ? table - table_base * NR : nullptr, runs + j - i};
  }
};

}  // namespace
}  // namespace pyext
