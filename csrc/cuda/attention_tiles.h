// What the attention kernels share: tiles in shared memory and their products by mma.sync, which keys a query sees,
// strips of biases, and the softmax.
//
// With g = lane / 4 and t = lane % 4 a lane holds, of an accumulator of M x N blocks of 16 x 8, sum[a][b][e]:
// row 16 a + g + 8 (e / 2), column 8 b + 2 t + e % 2.
#pragma once
#include "attention_strips.h"

namespace pyext {
namespace {

constexpr double kLn2 = 0.6931471805599453;

PYEXT_DEVICE int lane_row() { return threadIdx.x % 32 / 4; }
PYEXT_DEVICE int lane_column() { return threadIdx.x % 4 * 2; }

// --- Tiles: rows of `width` 16-bit elements, 16 bytes apart, so that the chunks that ldmatrix reads at once, one of
// each of eight rows, lie in different banks. ---

template <class T, int width>
struct SharedTile {
  using Element = T;
  T* data;
  PYEXT_DEVICE T* at(int row, int column) const { return data + row * (width + 8) + column; }
};
template <int width>
__host__ __device__ constexpr int tile_elements(int rows) {
  return rows * (width + 8);
}

// Starts the copy of `rows` rows from `from` on; zeros for those that are not in [begin, end), and beyond `columns`.
// Threads side by side have 16 bytes each, as many of them as a power of two lets a row have. at_once: rows of a thread
// whose addresses may be in registers.
template <int threads, int rows, int at_once = rows, class T, int width>
PYEXT_DEVICE void copy_tile(const SharedTile<T, width>& tile, const T* from, int64_t row_stride, int64_t end,
                            int64_t columns, int64_t begin = 0) {
  constexpr int chunks = width / 8, across = chunks & -chunks, step = threads / across;
  static_assert(threads % across == 0, "a thread has chunks of the same columns in all its rows");
  const int row = threadIdx.x / across, column = threadIdx.x % across * 8;
  const int first = int(begin) - row, last = int(end) - row;
  const T* at = from + (row * row_stride + column);
#pragma unroll at_once
  for (int n = 0; n < rows; n += step, at += step * row_stride) {
    if (rows % step && row + n >= rows) break;
#pragma unroll
    for (int c = 0; c < width; c += 8 * across)
      ptx::cp_async(tile.at(row + n, column + c), at + c, first <= n && n < last && column + c < int(columns));
  }
}

// The same from row `first` of a matrix on, which has `count` rows; with `before`, `first` may be negative.
template <int threads, int rows, bool before = false, int at_once = rows, class T, int width>
PYEXT_DEVICE void load_tile(const SharedTile<T, width>& tile, const T* matrix, int64_t row_stride, int64_t first,
                            int64_t count, int64_t columns) {
  copy_tile<threads, rows, at_once>(tile, matrix + first * row_stride, row_stride, count - first, columns,
                                    before ? -first : 0);
}

// --- Products ---

// sum += a b^T for 16 M rows of a from `a_row` on and the first 8 N rows of b, a tile or what else has rows.
template <int M, int N, int at_once = 2, class T, int width, class Rows>
PYEXT_DEVICE void multiply_transposed(float (&sum)[M][N][4], const SharedTile<T, width>& a, int a_row, const Rows& b) {
  const int lane = threadIdx.x % 32;
#pragma unroll at_once  // all of them, and the fragments of later steps would cost the registers of the sums
  for (int k = 0; k < width; k += 16) {
    uint32_t left[M][4];
#pragma unroll
    for (int i = 0; i < M; ++i) ptx::ldmatrix(left[i], a.at(a_row + 16 * i + lane % 16, k + lane / 16 * 8));
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      uint32_t right[4];
      ptx::ldmatrix(right, b.at(8 * j + lane % 8 + lane / 16 * 8, k + lane / 8 % 2 * 8));
#pragma unroll
      for (int i = 0; i < M; ++i) {
        ptx::mma<T>(sum[i][j], left[i], {right[0], right[1]});
        ptx::mma<T>(sum[i][j + 1], left[i], {right[2], right[3]});
      }
    }
  }
}

// The left operand of a product in registers: 16 M rows of a from `a_row` on.
template <int M, int K, class Rows>
PYEXT_DEVICE void read_left(uint32_t (&left)[M][K][4], const Rows& a, int a_row) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < M; ++i) {
#pragma unroll
    for (int k = 0; k < K; ++k) ptx::ldmatrix(left[i][k], a.at(a_row + 16 * i + lane % 16, 16 * k + lane / 16 * 8));
  }
}

// The same product with the left operand in registers.
template <int M, int N, int K, class Rows>
PYEXT_DEVICE void multiply_transposed(float (&sum)[M][N][4], const uint32_t (&left)[M][K][4], const Rows& b) {
  using T = typename Rows::Element;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      uint32_t right[4];
      ptx::ldmatrix(right, b.at(8 * j + lane % 8 + lane / 16 * 8, 16 * k + lane / 8 % 2 * 8));
#pragma unroll
      for (int i = 0; i < M; ++i) {
        ptx::mma<T>(sum[i][j], left[i][k], {right[0], right[1]});
        ptx::mma<T>(sum[i][j + 1], left[i][k], {right[2], right[3]});
      }
    }
  }
}

// An accumulator rounded to T, as the left operand of a product with 8 N rows.
template <class T, int M, int N>
PYEXT_DEVICE void as_left(uint32_t (&left)[M][N / 2][4], const float (&sum)[M][N][4]) {
#pragma unroll
  for (int i = 0; i < M; ++i) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      left[i][j / 2][j % 2 * 2] = ptx::pack<T>(sum[i][j][0], sum[i][j][1]);
      left[i][j / 2][j % 2 * 2 + 1] = ptx::pack<T>(sum[i][j][2], sum[i][j][3]);
    }
  }
}

// sum += left b for the first 16 K rows of b.
template <int M, int K, int J, class Rows>
PYEXT_DEVICE void multiply(float (&sum)[M][J][4], const uint32_t (&left)[M][K][4], const Rows& b) {
  using T = typename Rows::Element;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int j = 0; j < J; j += 2) {
      uint32_t right[4];
      ptx::ldmatrix_transposed(right, b.at(16 * k + lane % 16, 8 * j + lane / 16 * 8));
#pragma unroll
      for (int i = 0; i < M; ++i) {
        ptx::mma<T>(sum[i][j], left[i][k], {right[0], right[1]});
        ptx::mma<T>(sum[i][j + 1], left[i][k], {right[2], right[3]});
      }
    }
  }
}

template <int M, int N>
PYEXT_DEVICE void scale_rows(float (&sum)[M][N][4], float factor) {
#pragma unroll
  for (int i = 0; i < M; ++i) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[i][j][e] *= factor;
    }
  }
}
template <int M, int N>
PYEXT_DEVICE void scale_rows(float (&sum)[M][N][4], const float (&factor)[M][2]) {
#pragma unroll
  for (int i = 0; i < M; ++i) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[i][j][e] *= factor[i][e / 2];
    }
  }
}

// Stores factor * sum: rows [first, count) of the 16 M that a warp holds, columns below `columns`, two at a time.
template <class T, int M, int N>
PYEXT_DEVICE void store_rows(T* matrix, int64_t row_stride, int64_t first, int64_t count, int64_t columns,
                             const float (&sum)[M][N][4], const float (&factor)[M][2]) {
#pragma unroll
  for (int i = 0; i < M; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first + 16 * i + 8 * half + lane_row();
      if (row >= count) continue;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const int column = 8 * j + lane_column();
        if (column >= columns) continue;
        const float scale = factor[i][half];
        *reinterpret_cast<uint32_t*>(matrix + row * row_stride + column) =
            ptx::pack<T>(scale * sum[i][j][2 * half], scale * sum[i][j][2 * half + 1]);
      }
    }
  }
}

// --- Who sees whom: every mask here is one interval of keys per query. ---

// Keys [begin, end); empty: begin >= end.
struct Interval {
  int begin, end;
  PYEXT_DEVICE bool holds(int key) const { return begin <= key && key < end; }
};

// What the problem says of this query alone.
PYEXT_DEVICE Interval given(const AttentionProblem& p, int64_t batch, int64_t query) {
  if (!p.intervals || query >= p.q_len) return {0, INT32_MAX};
  const int32_t* at = p.intervals + batch * p.intervals_batch + 2 * query;
  return {at[0], at[1]};
}
PYEXT_DEVICE Interval visible(const AttentionProblem& p, int64_t query, const Interval& own) {
  if (query >= p.q_len) return {0, 0};
  const int64_t aligned = query + p.k_len - p.q_len;  // the key at distance 0
  const int64_t begin = max(max(aligned - p.left, int64_t(0)), int64_t(own.begin));
  const int64_t end = min(min(aligned + p.right + 1, p.k_len), int64_t(own.end));
  return begin < end ? Interval{int(begin), int(end)} : Interval{0, 0};
}
PYEXT_DEVICE Interval visible(const AttentionProblem& p, int64_t batch, int64_t query) {
  return visible(p, query, given(p, batch, query));
}

// The keys that some query of a tile sees, and those that all of them see.
struct Range {
  int begin, end, all_begin, all_end;

  static PYEXT_DEVICE Range of(const Interval& v) {
    const bool sees = v.begin < v.end;
    return {sees ? v.begin : INT32_MAX, sees ? v.end : 0, sees ? v.begin : INT32_MAX, sees ? v.end : 0};
  }
  static PYEXT_DEVICE Range of_nobody() { return {INT32_MAX, 0, 0, INT32_MAX}; }
  PYEXT_DEVICE void join(const Range& r) {
    begin = min(begin, r.begin), end = max(end, r.end);
    all_begin = max(all_begin, r.all_begin), all_end = min(all_end, r.all_end);
  }
  // Joins those of all lanes.
  PYEXT_DEVICE void join_warp() {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      join({__shfl_xor_sync(~0u, begin, step), __shfl_xor_sync(~0u, end, step), __shfl_xor_sync(~0u, all_begin, step),
            __shfl_xor_sync(~0u, all_end, step)});
    }
  }
  PYEXT_DEVICE bool meets(int from, int to) const { return begin < to && from < end; }
  PYEXT_DEVICE bool covers(int from, int to) const { return all_begin <= from && to <= all_end; }
};

// What the `rows` queries of a block of threads see, in shared memory.
template <int threads, int rows>
struct Visible {
  Interval of[rows];
  Range of_warp[threads / 32];
};

// Of the queries from `first` on, for all threads: their range. A barrier must stand between this and its next use.
template <int threads, int rows>
PYEXT_DEVICE Range find_visible(const AttentionProblem& p, int64_t batch, int64_t first, Visible<threads, rows>& seen) {
  static_assert(rows <= threads, "one query per thread");
  Range range = Range::of_nobody();
  if (threadIdx.x < rows) {
    const Interval interval = visible(p, batch, first + threadIdx.x);
    seen.of[threadIdx.x] = interval, range = Range::of(interval);
  }
  range.join_warp();
  if (threadIdx.x % 32 == 0) seen.of_warp[threadIdx.x / 32] = range;
  __syncthreads();
  range = seen.of_warp[0];
#pragma unroll
  for (int warp = 1; warp < threads / 32; ++warp) range.join(seen.of_warp[warp]);
  return range;
}

// --- Strips: one bias per distance, in units of log2, as a tile of `rows` queries and `columns` keys needs it. ---

// Where the strip of a tile starts: the entry of its last query and its first key, which may lie before the strip where
// that query does not exist.
PYEXT_DEVICE int64_t strip_start(const AttentionProblem& p, int64_t last_query, int64_t first_key) {
  return first_key - last_query + p.q_len - 1;
}

// The entries of a tile on their way, by all threads of a block or by a warp: read early, stored late, so that nobody
// waits for global memory.
template <int threads, int entries>
struct StripAhead {
  static constexpr int count = (entries + threads - 1) / threads;
  float values[count];

  static PYEXT_DEVICE int thread() { return threads == kLanes ? threadIdx.x % kLanes : threadIdx.x; }
  PYEXT_DEVICE void read(const float* strip, int64_t length, int64_t start) {
#pragma unroll
    for (int n = 0; n < count; ++n) {
      const int64_t at = start + n * threads + thread();
      values[n] = 0 <= at && at < length ? strip[at] : 0.0f;
    }
  }
  PYEXT_DEVICE void store(float* shared) const {
#pragma unroll
    for (int n = 0; n < count; ++n) {
      const int i = n * threads + thread();
      if (i < entries) shared[i] = values[n];
    }
  }
};

// s = scale s + bias. `strip` starts with the tile's last query.
template <int rows, int M, int N>
PYEXT_DEVICE void add_strip(float (&s)[M][N][4], float scale, const float* strip) {
  const int row = threadIdx.x / 32 * 16 * M + lane_row();
  // Eight rows further down and eight columns further right is the same distance: the same load.
#pragma unroll
  for (int i = 0; i < M; ++i) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int distance = 8 * j + lane_column() + e % 2 - (row + 16 * i + e / 2 * 8);
        s[i][j][e] = fmaf(s[i][j][e], scale, strip[distance + rows - 1]);
      }
    }
  }
}

// `hidden` where the query of a lane's first (half = 0) or second row of a block does not see a key.
template <int N>
PYEXT_DEVICE void hide_unseen(float (&s)[N][4], int half, Interval keys, int first_key, float hidden = -INFINITY) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e)
      if (!keys.holds(first_key + 8 * j + lane_column() + e)) s[j][2 * half + e] = hidden;
  }
}

// Scores in units of log2, -inf where a query does not see a key. `seen` is what each query sees.
template <class Tile, bool biased>
PYEXT_DEVICE void finish_scores(float (&s)[Tile::M][Tile::N][4], float scale, const float* strip, const Interval* seen,
                                int first_key, bool all) {
  if constexpr (biased)
    add_strip<Tile::rows>(s, scale, strip);
  else
    scale_rows(s, scale);
  if (all) return;
  const int row = threadIdx.x / 32 * 16 * Tile::M + lane_row();
#pragma unroll
  for (int i = 0; i < Tile::M; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) hide_unseen(s[i], half, seen[row + 16 * i + 8 * half], first_key);
  }
}

// --- Segments ---

// Of two rows of a lane, the first one at `row`; 0 for rows that do not exist.
PYEXT_DEVICE void load_ids(int (&to)[2], const int32_t* ids, int64_t row, int64_t count) {
#pragma unroll
  for (int half = 0; half < 2; ++half) to[half] = row + 8 * half < count ? ids[row + 8 * half] : 0;
}

// In units of log2. pair: of batch entry and head; same: whether the key is of the query's segment.
PYEXT_DEVICE float segment_score(const AttentionProblem& p, int64_t pair, int64_t query, int same) {
  return static_cast<const float*>(p.segment)[2 * (pair * p.q_len + query) + same] * kLog2e;
}

// What a lane's two queries add to their scores by segments.
struct SegmentRows {
  int ids[2];
  float scores[2][2];  // of a key of another segment, and of the same one; in units of log2

  PYEXT_DEVICE void read(const AttentionProblem& p, int64_t pair, int64_t row) {
    load_ids(ids, p.segment_q + pair / p.heads * p.segment_q_batch, row, p.q_len);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int same = 0; same < 2; ++same)
        scores[half][same] = row + 8 * half < p.q_len ? segment_score(p, pair, row + 8 * half, same) : 0.0f;
    }
  }

  // Bit 4 j + e of the result: s[j][e] is of a query and a key of the same segment. Keys that do not exist pass for the
  // nearest one.
  template <int N>
  PYEXT_DEVICE uint32_t add_to(float (&s)[N][4], const AttentionProblem& p, int64_t batch, int first_key) const {
    const int32_t* of_keys = p.segment_k + batch * p.segment_k_batch;
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int id = of_keys[max(0, min(first_key + 8 * j + lane_column() + e, int(p.k_len) - 1))];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const bool same = ids[half] == id;
          s[j][2 * half + e] += same ? scores[half][1] : scores[half][0];
          bits |= uint32_t(same) << (4 * j + 2 * half + e);
        }
      }
    }
    return bits;
  }
};

// --- Softmax ---

// Of 16 M rows so far: exact sums of what one lane holds, relative to the row's highest score. Scores times `scale`,
// which is positive, are in units of log2.
template <int M>
struct OnlineSoftmax {
  const float scale;
  float highest[M][2], total[M][2];

  PYEXT_DEVICE explicit OnlineSoftmax(float scale) : scale(scale) {
#pragma unroll
    for (int i = 0; i < M; ++i) highest[i][0] = highest[i][1] = -INFINITY, total[i][0] = total[i][1] = 0;
  }

  // Scores become weights; `factor` is what earlier weights must be multiplied by.
  template <int N>
  PYEXT_DEVICE void add(float (&s)[M][N][4], float (&factor)[M][2]) {
#pragma unroll
    for (int i = 0; i < M; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float high = highest[i][half];
#pragma unroll
        for (int j = 0; j < N; ++j) high = fmaxf(high, fmaxf(s[i][j][2 * half], s[i][j][2 * half + 1]));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
        const float base = high == -INFINITY ? 0.0f : scale * high;  // a row that has seen nothing yet
        factor[i][half] = ptx::exp2_approx(fmaf(highest[i][half], scale, -base));
        float sum = 0;
#pragma unroll
        for (int j = 0; j < N; ++j) {
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e)
            s[i][j][e] = ptx::exp2_approx(fmaf(s[i][j][e], scale, -base)), sum += s[i][j][e];
        }
        total[i][half] = total[i][half] * factor[i][half] + sum, highest[i][half] = high;
      }
    }
  }

  // Sums over the four lanes of a row. `factor` becomes what the weighted sums must be multiplied by; the LSE of the
  // rows [first, count), of which `first` is the lane's first one, goes to `lse`.
  PYEXT_DEVICE void finish(float (&factor)[M][2], double* lse, int64_t first, int64_t count) {
#pragma unroll
    for (int i = 0; i < M; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& sum = total[i][half];
        sum += __shfl_xor_sync(~0u, sum, 1), sum += __shfl_xor_sync(~0u, sum, 2);
        factor[i][half] = sum > 0 ? 1 / sum : 0;
        const int64_t row = first + 16 * i + 8 * half;
        if (threadIdx.x % 4 == 0 && row < count)
          lse[row] = sum > 0 ? kLn2 * double(scale * highest[i][half] + log2f(sum)) : -double(INFINITY);
      }
    }
  }
};

// Whether rows can be copied 16 bytes at a time, and the problem has nothing but what these kernels know.
template <class... Tensors>
bool fits_tiles(const AttentionProblem& p, const Tensors&... tensors) {
  return p.head_dim % 8 == 0 && p.value_dim % 8 == 0 && has_aligned_rows(p.dtype, tensors...) && !p.dense.data &&
         (!p.segment || p.rel_q.data) && !p.mask.data && !p.block_offsets && !p.sinks && !p.cu_seqlens_q &&
         p.softcap == 0 && p.dropout_p == 0;
}

}  // namespace
}  // namespace pyext
