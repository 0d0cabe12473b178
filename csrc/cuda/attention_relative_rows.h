// Relative rows written out, one per distance u = j - i + q_len - 1 of keys and queries: then copies need no index, and
// what it says of neighbouring distances costs nothing. In bands they stand in the order in which their products are
// stored without conflicts in shared memory.
#pragma once
#include "attention_tiles.h"

namespace pyext {
namespace {

constexpr int kBand = 64;  // lengths are filled up to multiples of it, so that bands of 32 and 64 are whole

template <class T>
PYEXT_DEVICE const T* rows_of(const Input& t, int64_t batch, int64_t head) {
  return static_cast<const T*>(t.data) + batch * t.batch + head * t.head;
}
template <class T>
PYEXT_DEVICE T* rows_of(const Output& t, int64_t batch, int64_t head) {
  return static_cast<T*>(t.data) + batch * t.batch + head * t.head;
}

struct RelativeRows {
  int64_t count;  // rows of a head: distances from -origin on
  int origin;
  int64_t bytes, bytes_of_keys;  // of all heads that have rows of their own

  __host__ __device__ explicit RelativeRows(const AttentionProblem& p)
      : count(ceil_div(p.q_len, kBand) * kBand + ceil_div(p.k_len, kBand) * kBand),
        origin(int(ceil_div(p.q_len, kBand) * kBand)),
        bytes(2 * p.rel_q_batch * p.rel_q_heads * count * p.head_dim),
        bytes_of_keys(2 * p.rel_k_batch * p.rel_k_heads * count * p.head_dim) {}
};

// Rows as they are written out, of all heads that have rows of their own.
struct WrittenRows {
  const void *of_queries, *of_keys;

  // Of a head: that of distance -origin.
  template <class T>
  PYEXT_DEVICE const T* rows_of_queries(const AttentionProblem& p, int64_t batch, int64_t head) const {
    return of_head<T>(of_queries, p, p.rel_q_batch, p.rel_q_heads, batch, head);
  }
  template <class T>
  PYEXT_DEVICE const T* rows_of_keys(const AttentionProblem& p, int64_t batch, int64_t head) const {
    return of_head<T>(of_keys, p, p.rel_k_batch, p.rel_k_heads, batch, head);
  }

 private:
  template <class T>
  static PYEXT_DEVICE const T* of_head(const void* rows, const AttentionProblem& p, int64_t batches, int64_t heads,
                                       int64_t batch, int64_t head) {
    const int64_t table = (batches == 1 ? 0 : batch * heads) + (heads == 1 ? 0 : head);
    return static_cast<const T*>(rows) + table * RelativeRows(p).count * p.head_dim;
  }
};

// By distance; or of each 32, row 8 j + 2 t + e is that of distance 8 t + 2 j + e; or of 8 j + t + 4 e; or of
// 8 t + 4 (j % 2) + j / 2 + 2 e.
enum class RowOrder { natural, of_bands, of_octets, of_gradients };

template <RowOrder order>
PYEXT_DEVICE constexpr int distance_of_row(int n) {
  const int octet = n / 8, t = n % 8 / 2, e = n % 2;
  switch (order) {
    case RowOrder::natural:
      return n;
    case RowOrder::of_bands:
      return 8 * t + 2 * octet + e;
    case RowOrder::of_octets:
      return 8 * octet + t + 4 * e;
    case RowOrder::of_gradients:
      return 8 * t + octet % 2 * 4 + octet / 2 + 2 * e;
  }
  return 0;
}

// A thread copies 8 features.
template <class T, RowOrder order>
__global__ void __launch_bounds__(256)
    attention_relative_expand(const __grid_constant__ AttentionProblem p, const __grid_constant__ Input table,
                              int64_t heads, T* rows, int64_t vectors) {
  const int64_t at = blockIdx.x * int64_t(256) + threadIdx.x, chunks = p.head_dim / 8;
  if (at >= vectors) return;
  const RelativeRows all(p);
  const int64_t row = at / chunks % all.count, head = at / chunks / all.count;
  const int64_t u = row / 32 * 32 + distance_of_row<order>(int(row % 32)) - all.origin + p.q_len - 1;
  const int64_t from = 0 <= u && u < p.q_len + p.k_len - 1 ? p.rel_index[u] : -1;
  ptx::Vector<T> vector = {};
  if (0 <= from && from < p.rel_rows)
    vector = ptx::load_vector(rows_of<T>(table, head / heads, head % heads) + from * table.row + at % chunks * 8);
  ptx::store_vector(rows + at * 8, vector);
}

// bytes: of the rows of all heads, `heads` to an entry of the batch.
template <class T, RowOrder order>
int expand_rows(const AttentionProblem& p, const Input& table, int64_t heads, int64_t bytes, void* rows,
                cudaStream_t stream) {
  const int64_t vectors = bytes / 16, blocks = ceil_div(vectors, 256);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  return ptx::launch(attention_relative_expand<T, order>, dim3(unsigned(blocks)), dim3(256), 0, stream, p, table, heads,
                     static_cast<T*>(rows), vectors);
}

// Both tables' rows.
template <class T, RowOrder of_queries, RowOrder of_keys>
int write_rows(const AttentionProblem& p, const WrittenRows& to, cudaStream_t stream) {
  const RelativeRows rows(p);
  if (const int error =
          expand_rows<T, of_queries>(p, p.rel_q, p.rel_q_heads, rows.bytes, const_cast<void*>(to.of_queries), stream))
    return error;
  return expand_rows<T, of_keys>(p, p.rel_k, p.rel_k_heads, rows.bytes_of_keys, const_cast<void*>(to.of_keys), stream);
}

}  // namespace
}  // namespace pyext
