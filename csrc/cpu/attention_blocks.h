// Which keys a block of queries works on: panels of keys, and what each group of rows sees of each panel. Without a
// block table the panels are neighbours; with one, panels that no query of the block sees are left out.
#pragma once
#include "attention_parts.h"

namespace pyext {
namespace {

// The block table of one (sequence, head), see AttentionProblem.
struct BlockTable {
  static constexpr int32_t full = -1, empty = -2;  // instead of the number of a bitmap
  const int32_t *offsets = nullptr, *index = nullptr;
  const uint8_t* bits = nullptr;

  BlockTable(const AttentionProblem& p, const Span& s, int64_t head) {
    if (p.block_offsets) offsets = p.block_offsets + s.batch * p.block_batch + head * p.block_head;
    index = p.block_index, bits = p.block_bits;
  }
  explicit operator bool() const { return offsets; }

  // The block of queries `row` against the block of keys `column`.
  int32_t find(int64_t row, int64_t column) const {
    int32_t lo = offsets[row], hi = offsets[row + 1];
    while (lo < hi) {
      const int32_t middle = lo + (hi - lo) / 2;
      if (index[2 * middle] < column)
        lo = middle + 1;
      else
        hi = middle;
    }
    return lo < offsets[row + 1] && index[2 * lo] == column ? index[2 * lo + 1] : empty;
  }
  // The bits of query i and the n keys from j on, n <= 32 and all in the block whose bitmap is given.
  INLINE uint32_t word(int32_t bitmap, int64_t i, int64_t j, int n) const {
    if (bitmap < 0) return bitmap == full ? ~0u : 0;
    uint32_t word = 0;
    memcpy(&word, bits + (bitmap * kBlock + i % uint64_t(kBlock)) * (kBlock / 8) + j % uint64_t(kBlock) / 8,
           size_t(n) / 8);
    return word;
  }
};

INLINE uint32_t range_word(Range r, int64_t j) {
  const uint64_t hi = uint64_t(max_of<int64_t>(0, min_of<int64_t>(r.hi - j, 32))),
                 lo = uint64_t(max_of<int64_t>(0, min_of<int64_t>(r.lo - j, 32)));
  return uint32_t((1ull << hi) - 1) & ~uint32_t((1ull << lo) - 1);
}

template <int MB, int NB, int NR>
struct KeyChunk {
  static constexpr int slots = NB / NR, groups = MB / kRows;
  static_assert(NR <= 32 && kBlock % NR == 0 && MB <= kBlock,
                "a panel has one word of bits, a block two rows of blocks");
  enum State : uint8_t { hidden, partial, visible };

  int32_t panels, key[slots];  // first key of each panel
  int32_t bitmap[slots][2];    // of the rows of blocks that the queries lie in; only with a table
  State state[slots][groups];  // what each group of rows sees of each panel
  Range touched[groups];       // columns from a group's first panel that is not hidden to its last
  int32_t run_count[groups];   // and between them, runs of neighbouring panels that are not hidden
  Range run[groups][slots];
  uint32_t bits[slots][MB];  // of partial panels; only with a table

  void neighbours(int64_t k0, int64_t end) {
    panels = int32_t(min_of<int64_t>(ceil_div(end - k0, NR), slots));
    for (int n = 0; n < panels; ++n) key[n] = int32_t(k0) + n * NR;
  }

  // Returns whether the table lists any block of these keys for the queries [q0, q1).
  bool find_bitmaps(const BlockTable& table, int64_t q0, int64_t q1) {
    bool any = false;
    for (int n = 0; n < panels; ++n)
      for (int b = 0; b < 2; ++b) {
        const bool same_block = n > 0 && key[n] / kBlock == key[n - 1] / kBlock;
        const int64_t row = min_of(q0 / kBlock + b, (q1 - 1) / kBlock);
        bitmap[n][b] = same_block ? bitmap[n - 1][b] : table.find(row, key[n] / kBlock);
        any |= bitmap[n][b] != BlockTable::empty;
      }
    return any;
  }

  // Queries from q0 on. Returns whether any group sees any panel.
  bool classify(const BlockTable& table, const BlockRanges<MB>& ranges, int64_t q0) {
    const int64_t used_groups = ceil_div(ranges.count, kRows);
    bool any = false;
    for (int64_t g = 0; g < used_groups; ++g) touched[g] = {0, 0}, run_count[g] = 0;
    for (int n = 0; n < panels; ++n) {
      const int64_t j = key[n];
      for (int64_t g = 0; g < used_groups; ++g) {
        const Range some = ranges.any[g], every = ranges.every[g];
        State seen = j + NR <= some.lo || j >= some.hi ? hidden : j < every.lo || j + NR > every.hi ? partial : visible;
        if (table && seen != hidden) seen = group_state(table, ranges, q0, n, g, seen);
        state[n][g] = seen;
        if (seen == hidden) continue;
        if (touched[g].hi == 0) touched[g].lo = n * NR;
        touched[g].hi = (n + 1) * NR, any = true;
        if (!table) continue;
        Range* last = run[g] + run_count[g] - 1;
        if (run_count[g] && last->hi == n * NR && key[n - 1] + NR == j)
          last->hi += NR;
        else
          run[g][run_count[g]++] = {n * NR, (n + 1) * NR};
      }
    }
    for (int64_t g = 0; g < used_groups && !table; ++g)  // neighbours, and of these a stretch
      run[g][0] = touched[g], run_count[g] = touched[g].hi > 0;
    return any;
  }
  State group_state(const BlockTable& table, const BlockRanges<MB>& ranges, int64_t q0, int n, int64_t g, State seen) {
    const int64_t last_row = ranges.count - 1, split = kBlock - q0 % kBlock;
    auto bitmap_of = [&](int64_t row) { return bitmap[n][row >= split]; };
    const int32_t all_rows = bitmap_of(g * kRows);
    if (all_rows < 0 && all_rows == bitmap_of(min_of((g + 1) * kRows - 1, last_row))) {
      for (int64_t i = g * kRows; i < (g + 1) * kRows; ++i) bits[n][i] = all_rows == BlockTable::full ? ~0u : 0;
      return all_rows == BlockTable::full ? seen : hidden;
    }
    uint32_t some = 0, all = ~0u;
    for (int64_t i = g * kRows; i < (g + 1) * kRows; ++i) {
      const int64_t row = min_of(i, last_row);
      const uint32_t word = table.word(bitmap_of(row), q0 + row, key[n], NR);
      bits[n][i] = word, some |= word, all &= word;
    }
    const uint32_t full = uint32_t((1ull << NR) - 1);
    return !(some & full) ? hidden : (all & full) == full ? seen : partial;
  }

  // Which keys of panel n the rows of a group see, where they see a part of it.
  INLINE void words(const BlockTable& table, const BlockRanges<MB>& ranges, int n, int64_t g, uint32_t* to) const {
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = g * kRows + i;
      to[i] = range_word(ranges.row[row], key[n]) & (table ? bits[n][row] : ~0u);
    }
  }
  INLINE uint32_t table_word(const BlockTable& table, int n, int64_t row) const { return table ? bits[n][row] : ~0u; }

  // The groups from the first to the last one that sees something of the panels [from, to).
  Range groups_that_see(int64_t used_groups, int from, int to) const {
    auto blind = [&](int64_t g) {
      for (int n = from; n < to; ++n)
        if (state[n][g] != hidden) return false;
      return true;
    };
    int64_t first = 0, last = used_groups;
    while (first < last && blind(first)) ++first;
    while (first < last && blind(last - 1)) --last;
    return {int32_t(first), int32_t(last)};
  }
  // The keys from a group's first panel to its last.
  Range keys_of(int64_t g) const {
    if (touched[g].lo >= touched[g].hi) return {0, 0};
    return {key[touched[g].lo / NR], key[touched[g].hi / NR - 1] + NR};
  }
  // fn(columns, first key) for the runs of a group, in pieces of at most `longest` columns.
  template <class Function>
  INLINE void for_each_run(int64_t g, int longest, const Function& fn) const {
    for (int n = 0; n < run_count[g]; ++n)
      for (int c = run[g][n].lo; c < run[g][n].hi; c += longest)
        fn(Range{c, min_of(c + longest, run[g][n].hi)}, int64_t(key[c / NR]));
  }
};

// The panels that some of the queries [q0, q1) see by the table, of the keys in a range, in rising order.
struct LivePanel {
  int32_t key, bitmap[2];
};
template <int NR>
int64_t live_panels(const BlockTable& table, int64_t q0, int64_t q1, Range keys, LivePanel* to) {
  int64_t count = 0;
  const int64_t first = q0 / kBlock, last = (q1 - 1) / kBlock;
  int32_t at[2], end[2];
  for (int b = 0; b < 2; ++b) {
    const int64_t row = min_of(first + b, last);
    at[b] = first + b <= last ? table.offsets[row] : 0, end[b] = first + b <= last ? table.offsets[row + 1] : 0;
  }
  while (at[0] < end[0] || at[1] < end[1]) {
    int32_t column = INT32_MAX, bitmap[2] = {BlockTable::empty, BlockTable::empty};
    for (int b = 0; b < 2; ++b)
      if (at[b] < end[b]) column = min_of(column, table.index[2 * at[b]]);
    for (int b = 0; b < 2; ++b)
      if (at[b] < end[b] && table.index[2 * at[b]] == column) bitmap[b] = table.index[2 * at[b]++ + 1];
    for (int64_t j = column * kBlock; j < (column + 1) * kBlock; j += NR) {
      if (j + NR <= keys.lo || j >= keys.hi) continue;
      uint32_t some = 0;
      for (int b = 0; b < 2; ++b) {
        const int64_t from = max_of(q0, (first + b) * kBlock), to_row = min_of(q1, (first + b + 1) * kBlock);
        for (int64_t i = from; i < to_row && bitmap[b] != BlockTable::empty && !some; ++i)
          some |= table.word(bitmap[b], i, j, NR);
      }
      if (some) to[count++] = {int32_t(j), {bitmap[0], bitmap[1]}};
    }
  }
  return count;
}

}  // namespace
}  // namespace pyext
