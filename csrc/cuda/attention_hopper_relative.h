// Relative rows of queries on Hopper: rel_query_i . rel_q[rel_index[u]] with u = j - i + q_len - 1, as products of
// bands: 64 queries of a warpgroup by 64 (kBand) neighbouring distances j - i. A tile of 64 keys needs two bands, of
// which the tile before it, 64 keys further right, has had one. Rows are written out first; then TMA can load them.
// Sources: Dai et al., "Transformer-XL" (2019), appendix B, whose shift of a whole matrix this is, in shared memory.
#pragma once
#include "attention_hopper.h"
#include "attention_relative_rows.h"

namespace pyext {
namespace {

constexpr int kRelativeStages = 3;  // of bands: the warpgroups are a band apart

inline bool takes_relative_rows(const AttentionProblem& p) {
  return takes_on_hopper(p, 128) && p.rel_q.data && !p.rel_k.data && !p.diag && p.q_len > 0 && p.batch * p.heads > 0 &&
         has_aligned_rows(p.dtype, p.rel_query, p.rel_q) && fits_map(p.rel_query, p.batch, p.heads, p.q_len);
}

// --- Copies ---

// Starts the copy of the n-th band of a ring, when its place is free: rows of distances from `first` on.
template <int panels, int stages, class T>
PYEXT_DEVICE void load_band(const Ring<stages>& bands, unsigned n, T* to, const ptx::TensorMap& rows,
                            const AttentionProblem& p, int first, int head, int batch) {
  bands.wait_empty(n);
  ptx::mbarrier_expect(bands.barrier(n), kBand * panels * kPanelBytes);
  load_panels<panels, kBand, kBand>(to, rows, bands.barrier(n), first + RelativeRows(p).origin,
                                    p.rel_q_heads == 1 ? 0 : head, p.rel_q_batch == 1 ? 0 : batch);
}

// Relative rows as they are written out, and relative queries in boxes of `query_rows`.
template <class T>
cudaError_t map_relative(ptx::TensorMap* rel_rows, ptx::TensorMap* rel_query, const AttentionProblem& p, void* rows,
                         int query_rows) {
  const RelativeRows relative(p);
  Input expanded;
  expanded.data = rows, expanded.row = p.head_dim;
  expanded.head = relative.count * p.head_dim, expanded.batch = p.rel_q_heads * expanded.head;
  const cudaError_t error = map_rows<T>(rel_rows, expanded, p, p.rel_q_heads, relative.count, p.head_dim, kBand);
  return error ? error : map_rows<T>(rel_query, p.rel_query, p, p.heads, p.q_len, p.head_dim, query_rows);
}

// --- Products, skewed ---

// The distance of a lane's product of column block j, from that of its first one.
template <RowOrder order>
PYEXT_DEVICE constexpr int lane_distance(int j, int e) {
  static_assert(order == RowOrder::of_bands || order == RowOrder::of_gradients, "a lane has neighbouring distances");
  return j / 4 * 32 + distance_of_row<order>(j % 4 * 8 + e % 2);
}

// What to change in the columns of a row, multiples of eight: it differs among four neighbouring rows, and among four
// of which each is the next but one.
PYEXT_DEVICE int band_swizzle(int row) { return ((row & 3) ^ (row >> 2 & 1)) * 8; }

// Of two tiles of keys, by their columns: a band's product of query r and distance d belongs to column d + r of the
// tile after the one that it was made for, or, beyond 64, to column d + r - 64 of that tile itself. Even tiles have the
// first 64 of a row. What a warp stores at once, rows g and distances 8 t + n, lies in banks 9 g + 8 t: in all of them;
// and what half a warp reads at once, columns 2 t and 2 t + 1 of four rows, too.
// Swizzled, the columns of each of eight rows are, instead of rows being longer than they.
template <RowOrder order = RowOrder::of_bands, bool swizzled = false>
struct BandRing {
  static constexpr int pitch = 2 * kBand + (swizzled ? 0 : 8);
  static constexpr int shared_bytes(int consumers) { return consumers * kBand * pitch * int(sizeof(float)); }

  float* rows;              // the lane's first one
  int row, column, change;  // its first row of the warpgroup, its first column, and what is changed of its columns

  PYEXT_DEVICE explicit BandRing(float* shared, int thread = threadIdx.x)
      : rows(shared + (thread / 32 * 16 + thread % 32 / 4) * pitch),
        row(thread / 32 % 4 * 16 + thread % 32 / 4),
        column(thread % 4 * 2),
        change(swizzled ? band_swizzle(row) : 0) {}

  PYEXT_DEVICE void store(const float (&products)[kBand / 8][4], unsigned tile) const {
    const int flip = tile % 2 ? 0 : kBand, first = row + column * 4;
#pragma unroll
    for (int j = 0; j < kBand / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int below = e / 2 * 8, place = first + below + lane_distance<order>(j, e);
        rows[below * pitch + (place ^ flip ^ change)] = products[j][e];
      }
    }
  }

  PYEXT_DEVICE void add_to(float (&s)[kBand / 8][4], unsigned tile) const {
    const int first = tile % 2 * kBand + column;
#pragma unroll
    for (int j = 0; j < kBand / 8; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 two = *reinterpret_cast<const float2*>(rows + half * 8 * pitch + (first + 8 * j ^ change));
        s[j][2 * half] += two.x, s[j][2 * half + 1] += two.y;
      }
    }
  }
};

}  // namespace
}  // namespace pyext
