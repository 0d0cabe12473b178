// Micro-kernels and packing. An operand is packed once and then read with unit steps by the micro-kernel:
//   "columns": [panel][k][width], element (k, c) of the operand whose column c is a source row (a transposing pack);
//   "rows":    [panel][k][width], element (k, c) of the operand whose row k is a source row.
// A bf16 operand keeps two consecutive k in one 32-bit element (vdpbf16ps); everything else is converted to the
// accumulator type while packing. Rows, columns and features that do not exist are packed as zero.
#pragma once
#include <cstdlib>

#include "../parallel.h"
#include "simd.h"

namespace pyext {
namespace {

// How a kernel computes: T is the 32- or 64-bit packed element, pair the number of k it holds. Scores are kept in units
// of 1 / units nats, and exp turns a difference of scores into a ratio of probabilities: base 2 saves an operation
// where bf16 hides the rounding of the product with log2(e), nats keep fp32 as exact as the library's own softmax.
struct ComputeF32 {
  using T = float;
  static constexpr int pair = 1;
  static constexpr double units = 1;
  static INLINE F mac(F a, F b, F c) { return vfma(a, b, c); }
  static INLINE F exp(F x) { return vexp(x); }
};
struct ComputeF64 {
  using T = double;
  static constexpr int pair = 1;
  static constexpr double units = 1;
  static INLINE D mac(D a, D b, D c) { return vfma(a, b, c); }
  static INLINE D exp(D x) { return vexp(x); }
};
#if defined(__AVX512BF16__)
struct ComputeBF16 {
  using T = float;
  static constexpr int pair = 2;
  static constexpr double units = 1 / kLn2;
  static INLINE F mac(F a, F b, F c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
  static INLINE F exp(F x) { return vexp2_coarse(x); }
};
#endif

// Register block: rows x (vectors * width) accumulators, two panel vectors and one broadcast fit the register file.
#if defined(__AVX512F__)
constexpr int kRows = 8;
#else
constexpr int kRows = 6;
#endif
constexpr int kVectors = 2;

// exp of one difference of scores, to full precision: where partial results and sinks are merged, nothing averages it
// out.
template <class C>
INLINE typename C::T exp_one(typename C::T x) {
  typename C::T lane[Vector<typename C::T>::width];
  vstore(lane, vexp(vset(typename C::T(x / C::units))));
  return lane[0];
}

template <class T>
using Vec = typename Vector<T>::type;
template <class T>
constexpr int kWidth = Vector<T>::width;
template <class T>
constexpr int kPanel = kVectors * kWidth<T>;  // columns of a packed panel
// The dtype of accumulators.
template <class T>
constexpr DType kWide = sizeof(T) == 8 ? DType::f64 : DType::f32;

template <class C, int vectors = kVectors>
struct Tile {
  using T = typename C::T;
  Vec<T> v[kRows][vectors];

  INLINE void zero() {
    UNROLL for (int i = 0; i < kRows; ++i) UNROLL for (int j = 0; j < vectors; ++j) v[i][j] = vset(T(0));
  }
  // v += A B over k steps; A(i, k) = a[i * row_step + k * k_step], B(k, :) = b[k * kPanel]. A pair of bf16 may start at
  // any of them: then Element is uint16_t. Only the first `rows` rows of v change.
  template <int64_t row_step, int64_t k_step, int rows = kRows, class Element>
  INLINE void multiply(int64_t k, const Element* a, const T* b) {
    for (; k > 0; --k, a += k_step, b += kPanel<T>) {
      Vec<T> column[vectors];
      UNROLL for (int j = 0; j < vectors; ++j) column[j] = vload(b + j * kWidth<T>);
      UNROLL for (int i = 0; i < rows; ++i) {
        T both;
        memcpy(&both, a + i * row_step, sizeof(T));
        Vec<T> x = vset(both);
        UNROLL for (int j = 0; j < vectors; ++j) v[i][j] = C::mac(x, column[j], v[i][j]);
      }
    }
  }
};

// c[rows x count columns] = what products(tile) adds to a tile + factor * c, count <= kPanel: the last panel of an odd
// width runs with one vector if that is enough. The products start from zero: sums of sums lose fewer bits than one
// long sum.
template <class C, int vectors, class Products>
INLINE void accumulate_vectors(const Products& products, typename C::T* c, const typename C::T* factor) {
  using T = typename C::T;
  Tile<C, vectors> tile;
  tile.zero();
  products(tile);
  UNROLL for (int i = 0; i < kRows; ++i) UNROLL for (int j = 0; j < vectors; ++j) {
    T* at = c + i * kPanel<T> + j * kWidth<T>;
    vstore(at, factor ? vfma(vload(at), vset(factor[i]), tile.v[i][j]) : vadd(vload(at), tile.v[i][j]));
  }
}
template <class C, class Products>
INLINE void accumulate_products(const Products& products, typename C::T* c, int64_t count,
                                const typename C::T* factor = nullptr) {
  if (count > kWidth<typename C::T>)
    accumulate_vectors<C, kVectors>(products, c, factor);
  else
    accumulate_vectors<C, 1>(products, c, factor);
}
// The same of one product A B over k steps, see Tile::multiply.
template <class C, int64_t row_step, int64_t k_step, class Element>
INLINE void accumulate(int64_t k, const Element* a, const typename C::T* b, typename C::T* c, int64_t count) {
  accumulate_products<C>([&](auto& tile) INLINE_LAMBDA { tile.template multiply<row_step, k_step>(k, a, b); }, c,
                         count);
}

// ---- packing ----

// The source rows of a pack: row r of the pack is source row n = begin + r * step, or index[n], or none (zeros) where n
// is outside of [0, count) or the index is negative.
struct Rows {
  const char* base;
  int64_t row_bytes, count;
  const int32_t* index = nullptr;
  int64_t begin = 0, step = 1;
  // Null for a row that does not exist.
  INLINE const char* operator[](int64_t r) const {
    r = begin + r * step;
    if (r < 0 || r >= count) return nullptr;
    if (index) r = index[r];
    return r < 0 ? nullptr : base + r * row_bytes;
  }
  // From row r and byte b of every row on.
  INLINE Rows from(int64_t r, int64_t b) const { return {base + b, row_bytes, count, index, begin + r * step, step}; }
};

template <class T>
INLINE void load_row(DType dtype, const char* src, int64_t n, int64_t padded, T* dst) {
  constexpr int w = kWidth<T>;
  int64_t i = 0;
  for (; i + w <= n; i += w) vstore(dst + i, vload_as(dtype, src + i * element_size(dtype), T(0)));
  if (i < n) vstore(dst + i, vload_some<T>(dtype, src + i * element_size(dtype), n - i)), i += w;
  for (; i < padded; i += w) vstore(dst + i, vset(T(0)));
}
template <class T>
INLINE void store_row(DType dtype, char* dst, int64_t n, const T* src) {
  constexpr int w = kWidth<T>;
  int64_t i = 0;
  for (; i + w <= n; i += w) vstore_as(dtype, dst + i * element_size(dtype), vload(src + i));
  if (i < n) vstore_some<T>(dtype, dst + i * element_size(dtype), n - i, vload(src + i));
}

// Asks for rows that will be packed soon: rows are short, so the hardware's prefetcher does not get into its stride.
INLINE void prefetch_rows(const char* src, int64_t row_bytes, int64_t count, int64_t bytes) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t b = 0; b < bytes; b += 64) _mm_prefetch(src + r * row_bytes + b, _MM_HINT_T1);
}
// Rows that will be needed later, asked for one at a time between tiles of arithmetic: all at once they would wait for
// memory as if they were loaded.
struct RowsAhead {
  const char* next = nullptr;
  int64_t row_bytes = 0, bytes = 0, left = 0;
  INLINE void ask() {
    if (left <= 0) return;
    prefetch_rows(next, row_bytes, 1, bytes);
    next += row_bytes, --left;
  }
};

// Eight rows of eight 32-bit elements each.
INLINE void transpose8(__m256 (&r)[8]) {
  __m256 t[8];
  UNROLL for (int i = 0; i < 8; i += 2) t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]),
                                        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  UNROLL for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44), r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44), r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    __m256 low = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20), high = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    r[i] = low, r[i + 4] = high;
  }
}

// Eight packed elements of one source row, starting at packed element k (k * pair features), zero past the end.
template <class C>
INLINE __m256 load8(DType dtype, const char* row, int64_t k, int64_t features) {
  int64_t size = element_size(dtype), n = min_of<int64_t>(8 * C::pair, features - k * C::pair);
  const char* p = row + k * C::pair * size;
  alignas(32) char padded[32] = {};
  if (n < 8 * C::pair) memcpy(padded, p, size_t(max_of<int64_t>(n, 0) * size)), p = padded;
  if (C::pair == 2 || dtype == DType::f32) return _mm256_loadu_ps((const float*)p);
  __m128i half = _mm_loadu_si128((const __m128i*)p);
  if (dtype == DType::f16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

// dst[k * width + r] = src(r, k) for r < width; k runs to ceil(features / pair).
// May write up to 8 elements past the end of the panel.
template <class C, class Source = Rows>
void pack_columns(DType dtype, const Source& rows, int64_t features, int64_t width, typename C::T* dst) {
  int64_t depth = ceil_div(features, C::pair);
  if constexpr (sizeof(typename C::T) == 8) {
    for (int64_t r = 0; r < width; ++r) {
      const auto* row = (const double*)rows[r];
      for (int64_t k = 0; k < depth; ++k) dst[k * width + r] = row ? row[k] : 0.;
    }
  } else {
    // Ascending r and k: where width is no multiple of 8 the surplus lanes are overwritten by what comes next.
    for (int64_t k = 0; k < depth; k += 8) {
      int64_t steps = min_of<int64_t>(8, depth - k);
      const bool as_is = (C::pair == 2 || dtype == DType::f32) && features - k * C::pair >= 8 * C::pair;
      __m256 block[8];
      for (int64_t r = 0; r < width; r += 8) {
        UNROLL for (int i = 0; i < 8; ++i) {
          const char* row = rows[r + i];
          if (!row)
            block[i] = _mm256_setzero_ps();
          else
            block[i] = as_is ? _mm256_loadu_ps((const float*)row + k) : load8<C>(dtype, row, k, features);
        }
        transpose8(block);
        UNROLL for (int s = 0; s < 8; ++s) if (s < steps) _mm256_storeu_ps(dst + (k + s) * width + r, block[s]);
      }
    }
  }
}

#if defined(__AVX512BF16__)
// Two rows of bf16 as one row of (first, second) pairs.
INLINE F interleave(const uint16_t* first, const uint16_t* second) {
  __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)first));
  __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)second));
  return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
// The same of 32 elements each.
INLINE void interleave32(const uint16_t* first, const uint16_t* second, float* to) {
  const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
  _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(a, high, b));
}
// Rounds two rows to bf16 and stores them as pairs.
INLINE void store_pairs(float* p, F first, F second) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(second, first)));
}
// Rounds 32 consecutive values of one row to bf16: pairs along the row are what memory order gives.
INLINE void store_row_pairs(float* p, F low, F high) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}
#endif

// One row of a panel from kPanel elements of a row as they are, and of the row after it where elements are pairs.
template <class C>
INLINE void pack_row(const char* row, [[maybe_unused]] const char* next, typename C::T* to) {
  using T = typename C::T;
#if defined(__AVX512BF16__)
  if constexpr (C::pair == 2) return interleave32((const uint16_t*)row, (const uint16_t*)next, to);
#endif
  UNROLL for (int j = 0; j < kVectors; ++j) vstore(to + j * kWidth<T>, vload((const T*)row + j * kWidth<T>));
}

// dst[panel][k][kPanel] from rows [0, padded), k running to ceil(padded / pair); panels are `panel_stride` elements
// apart.
template <class C, class Source = Rows>
void pack_rows(DType dtype, const Source& rows, int64_t padded, int64_t features, int64_t panel_stride,
               typename C::T* dst) {
  using T = typename C::T;
  constexpr int w = kWidth<T>, panel = kPanel<T>;
  const int64_t depth = ceil_div(padded, C::pair), size = element_size(dtype);
  const int64_t whole = C::pair == 2 || dtype == kWide<T> ? features / panel * panel : 0;  // features taken as they are
  for (int64_t k = 0; k < depth; ++k) {
    const char *row = rows[k * C::pair], *next = C::pair == 2 ? rows[k * C::pair + 1] : nullptr;
    T* to = dst + k * panel;
    int64_t f = 0;
    if (row && (C::pair == 1 || next))
      for (; f < whole; f += panel, to += panel_stride) pack_row<C>(row + f * size, next + f * size, to);
    for (; f < features; f += w) {
      to = dst + f / panel * panel_stride + k * panel + f % panel;
      int64_t n = min_of<int64_t>(w, features - f);
#if defined(__AVX512BF16__)
      if constexpr (C::pair == 2) {
        alignas(64) uint16_t first[w] = {}, second[w] = {};
        const uint16_t *p = first, *q = second;
        if (n == w) {
          p = row ? (const uint16_t*)row + f : first;
          q = next ? (const uint16_t*)next + f : second;
        } else {
          if (row) memcpy(first, row + f * size, size_t(n) * 2);
          if (next) memcpy(second, next + f * size, size_t(n) * 2);
        }
        vstore(to, interleave(p, q));
        continue;
      }
#endif
      if (!row)
        vstore(to, vset(T(0)));
      else
        vstore(to, n == w ? vload_as(dtype, row + f * size, T(0)) : vload_some<T>(dtype, row + f * size, n));
    }
  }
}

// ---- memory ----

// Results from this size on go past the caches: a store to memory that is in no cache would first read it.
constexpr int64_t kStreamedBytes = int64_t{8} << 20;

// Grow-only and reused across calls: fresh pages cost more than the arithmetic they hold.
struct Buffer {
  char* data = nullptr;
  size_t size = 0;
  char* reserve(size_t bytes) {
    if (bytes > size) {
      free(data);
      size = size_t(round_up(int64_t(bytes), 4096));
      data = static_cast<char*>(aligned_alloc(4096, size));
      if (!data) __builtin_trap();
    }
    return data;
  }
  ~Buffer() { free(data); }
};

// Hands out aligned pieces of a buffer; run once with a null base to learn the size.
struct Arena {
  char* base;
  size_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* p = base ? (T*)(base + used) : nullptr;
    used += size_t(round_up(int64_t(sizeof(T)) * count + 64, 64));
    return p;
  }
};
template <class Layout>
void lay_out(Buffer& buffer, Layout& layout) {
  Arena measure{nullptr};
  layout(measure);
  Arena arena{buffer.reserve(measure.used)};
  layout(arena);
}

// Runs body(index) for index in [0, count) on the problem's threads; indices are taken in ascending order.
template <class Body>
void for_each_task(const Parallel& parallel, int64_t count, const Body& body) {
  struct Context {
    const Body* body;
    int64_t count, next;
  } context{&body, count, 0};
  auto drain = [](int64_t, void* p) {
    Context& c = *static_cast<Context*>(p);
    for (int64_t i; (i = __atomic_fetch_add(&c.next, 1, __ATOMIC_RELAXED)) < c.count;) (*c.body)(i);
  };
  int64_t workers = min_of<int64_t>(parallel.threads, count);
  if (workers <= 1)
    drain(0, &context);
  else
    parallel.run(workers, drain, &context);
}

}  // namespace
}  // namespace pyext
