// What forward and backward of the gated layers (csrc/gated_linear.h) share: operands in panels, and their products.
//
// A left operand is kept as "chunks": [chunk][row][kPanel elements], so that a tile of rows steps through it by
// constants; its source rows stay rows. Gate and up share panels: one vector of columns of the gate, then the same
// columns of up, so that both pre-activations of a hidden feature meet in one tile.
#pragma once
#include "../gated_linear.h"
#include "activations.h"
#include "gemm.h"

namespace pyext {
namespace {

// Steps of one sum, in packed elements: so much of a panel stays in L1, and longer sums are sums of such sums.
constexpr int64_t kDepth = 256;
// Rows of a task: their pre-activations stay in L2 together with a panel of weights.
constexpr int64_t kBlockTiles = 8;

// The rows of the gate, then those of up, that make the columns of panel n.
struct PairedRows {
  Rows gate, up;
  int64_t width;
  INLINE const char* operator[](int64_t r) const { return r < width ? gate[r] : up[r - width]; }
};

// The part of a panel, or of the next one, that comes after what is being multiplied: asked for a few lines at a time.
struct Ahead {
  const char* next;
  int64_t lines;  // per chunk of steps
  INLINE void ask() {
    for (int64_t i = 0; i < lines; ++i, next += 64) _mm_prefetch(next, _MM_HINT_T1);
  }
};

template <class T>
struct Chunks {
  T* base;
  int64_t stride;  // elements from chunk to chunk
  INLINE T* at(int64_t row, int64_t k) const { return base + k / kPanel<T> * stride + row * kPanel<T> + k % kPanel<T>; }
  // tile += rows [row, row + kRows), elements [k, k + steps) times a panel that starts at k; k is a multiple of kPanel.
  template <class C>
  INLINE void multiply(Tile<C>& tile, int64_t row, int64_t k, int64_t steps, const T* panel, Ahead& ahead) const {
    const T* from = at(row, k);
    for (; steps > 0; steps -= kPanel<T>, from += stride, panel += kPanel<T> * kPanel<T>) {
      ahead.ask();
      tile.template multiply<kPanel<T>, 1>(min_of<int64_t>(steps, kPanel<T>), from, panel);
    }
  }
};
// The transpose of one chunk: its columns are the rows.
template <class T>
struct Transposed {
  const T* base;
  template <class C>
  INLINE void multiply(Tile<C>& tile, int64_t row, int64_t k, int64_t steps, const T* panel, Ahead& ahead) const {
    constexpr int64_t chunk = kPanel<T> * kPanel<T>;
    const T* from = base + k * kPanel<T> + row;
    for (; steps > 0; steps -= kPanel<T>, from += chunk, panel += chunk) {
      ahead.ask();
      tile.template multiply<1, kPanel<T>>(min_of<int64_t>(steps, kPanel<T>), from, panel);
    }
  }
};

// A right operand: panels of kPanel columns, `stride` elements apart.
template <class T>
struct Panels {
  T* base;
  int64_t stride;
  INLINE T* operator[](int64_t n) const { return base + n * stride; }
};

// Runs finish(row, tile) for the tiles of rows [0, rows) of left * panels[n]; sums holds rows * kPanel elements.
template <class C, class Left, class Finish>
INLINE void multiply_panel(const Left& left, int64_t rows, int64_t depth, const Panels<typename C::T>& panels,
                           int64_t n, typename C::T* sums, const Finish& finish) {
  using T = typename C::T;
  const T* panel = panels[n];
  const int64_t lines =
      ceil_div(kPanel<T> * kPanel<T> * int64_t(sizeof(T)) / 64, max_of<int64_t>(1, ceil_div(rows, kRows)));
  int64_t k = 0;
  do {
    const int64_t steps = min_of(kDepth, depth - k);
    const bool last = k + steps >= depth;
    Ahead ahead{(const char*)(last ? panels[n + 1] : panel + (k + steps) * kPanel<T>), lines};
    for (int64_t row = 0; row < rows; row += kRows) {
      Tile<C> tile;
      tile.zero();
      left.template multiply<C>(tile, row, k, steps, panel + k * kPanel<T>, ahead);
      T* sum = sums + row * kPanel<T>;
      UNROLL for (int i = 0; i < kRows; ++i) UNROLL for (int j = 0; j < kVectors; ++j) {
        T* at = sum + i * kPanel<T> + j * kWidth<T>;
        if (k) tile.v[i][j] = vadd(tile.v[i][j], vload(at));
        if (!last) vstore(at, tile.v[i][j]);
      }
      if (last) finish(row, tile);
    }
    k += steps;
  } while (k < depth);
}

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
INLINE Vec<T> load_bias(DType dtype, const void* bias, int64_t n, int64_t size) {
  return bias ? load_part<T>(dtype, (const char*)bias + n * element_size(dtype), size - n) : vset(T(0));
}
// The first `rows` rows and `columns` columns of a tile, rounded to rows of `to`.
template <class C>
INLINE void store_tile(DType dtype, const Tile<C>& tile, int64_t rows, int64_t columns, char* to, int64_t row_bytes) {
  using T = typename C::T;
  UNROLL for (int i = 0; i < kRows; ++i) if (i < rows) UNROLL for (int j = 0; j < kVectors; ++j) store_part<T>(
      dtype, to + i * row_bytes + j * kWidth<T> * element_size(dtype), columns - j * kWidth<T>, tile.v[i][j]);
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

INLINE Rows rows_of(const Input& matrix, DType dtype, int64_t count, int64_t begin = 0) {
  return {(const char*)matrix.data, matrix.row * element_size(dtype), count, nullptr, begin};
}

// How many rows a task takes: whole tiles, fewer where threads would have nothing to do.
INLINE int64_t rows_of_block(const Parallel& parallel, int64_t rows) {
  const int64_t tiles = ceil_div(rows, kRows);
  return kRows * max_of<int64_t>(1, min_of(kBlockTiles, ceil_div(tiles, max_of(parallel.threads, 1))));
}

}  // namespace
}  // namespace pyext
