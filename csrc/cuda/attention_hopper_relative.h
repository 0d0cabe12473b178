// Relative rows of queries on Hopper: rel_query_i . rel_q[rel_index[u]] with u = j - i + q_len - 1, as products of
// bands: 64 queries of a warpgroup by 64 neighbouring distances j - i. A tile of 64 keys needs two bands, of which the
// tile before it, 64 keys further right, has had one.
//
// Rows are written out first, one per distance, zeros where there is none, in bands that begin at multiples of 64; then
// TMA can load them, whatever the index says. In a band they stand in an order that spreads a warp's stores over the
// banks of shared memory, see BandRing.
// Sources: Dai et al., "Transformer-XL" (2019), appendix B, whose shift of a whole matrix this is, in shared memory.
#pragma once
#include "attention_hopper.h"

namespace pyext {
namespace {

constexpr int kBand = 64;           // distances; a warpgroup's queries
constexpr int kRelativeStages = 3;  // of bands: the warpgroups are a band apart

// --- Rows, one per distance ---

struct RelativeRows {
  int64_t count;  // rows of a head: distances from -origin on
  int origin;
  int64_t bytes;

  __host__ __device__ explicit RelativeRows(const AttentionProblem& p)
      : count(ceil_div(p.q_len, kBand) * kBand + ceil_div(p.k_len, kBand) * kBand),
        origin(int(ceil_div(p.q_len, kBand) * kBand)),
        bytes(2 * p.rel_q_batch * p.rel_q_heads * count * p.head_dim) {}
};

// A thread copies 8 features. Row 8 j + 2 t + e of a band is that of its distance 32 (j / 4) + 8 t + 2 (j % 4) + e.
template <class T>
__global__ void __launch_bounds__(256)
    attention_relative_expand(const __grid_constant__ AttentionProblem p, T* rows, int64_t vectors) {
  const int64_t at = blockIdx.x * int64_t(256) + threadIdx.x, chunks = p.head_dim / 8;
  if (at >= vectors) return;
  const RelativeRows all(p);
  const int64_t row = at / chunks % all.count, head = at / chunks / all.count;
  const int n = int(row % kBand), distance = n / 32 * 32 + n % 8 / 2 * 8 + n / 8 % 4 * 2 + n % 2;
  const int64_t u = row / kBand * kBand + distance - all.origin + p.q_len - 1;
  const int64_t from = 0 <= u && u < p.q_len + p.k_len - 1 ? p.rel_index[u] : -1;
  ptx::Vector<T> vector = {};
  if (0 <= from && from < p.rel_rows) {
    const T* const table = static_cast<const T*>(p.rel_q.data) + head / p.rel_q_heads * p.rel_q.batch +
                           head % p.rel_q_heads * p.rel_q.head;
    vector = ptx::load_vector(table + from * p.rel_q.row + at % chunks * 8);
  }
  ptx::store_vector(rows + at * 8, vector);
}

template <class T>
int expand_rows(const AttentionProblem& p, void* rows, cudaStream_t stream) {
  const int64_t vectors = RelativeRows(p).bytes / 16, blocks = ceil_div(vectors, 256);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return ptx::launch(attention_relative_expand<T>, dim3(unsigned(blocks)), dim3(256), 0, stream, p,
                     static_cast<T*>(rows), vectors);
}

inline bool takes_relative_rows(const AttentionProblem& p) {
  return takes_on_hopper(p, 128) && p.rel_q.data && !p.rel_k.data && !p.diag && p.q_len > 0 && p.batch * p.heads > 0 &&
         has_aligned_rows(p.dtype, p.rel_query, p.rel_q) && fits_map(p.rel_query, p.batch, p.heads, p.q_len);
}

// --- Products, skewed ---

// Of two tiles of keys, by their columns: a band's product of query r and distance d belongs to column d + r of the
// tile after the one that it was made for, or, beyond 64, to column d + r - 64 of that tile itself. Even tiles have the
// first 64 of a row. What a warp stores at once, rows g and distances 8 t + n, lies in banks 9 g + 8 t: in all of them;
// and what half a warp reads at once, columns 2 t and 2 t + 1 of four rows, too.
struct BandRing {
  static constexpr int pitch = 2 * kBand + 8;
  static constexpr int shared_bytes(int consumers) { return consumers * kBand * pitch * int(sizeof(float)); }

  float* rows;  // the lane's first one
  int row;      // of the warpgroup

  PYEXT_DEVICE explicit BandRing(float* shared)
      : rows(shared + (threadIdx.x / 32 * 16 + lane_row()) * pitch), row(threadIdx.x / 32 % 4 * 16 + lane_row()) {}

  PYEXT_DEVICE void store(const float (&products)[kBand / 8][4], unsigned tile) const {
    const int flip = tile % 2 ? 0 : kBand, first = row + lane_column() * 4;
#pragma unroll
    for (int j = 0; j < kBand / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int below = e / 2 * 8, place = first + below + j / 4 * 32 + j % 4 * 2 + e % 2;
        rows[below * pitch + (place ^ flip)] = products[j][e];
      }
    }
  }

  PYEXT_DEVICE void add_to(float (&s)[kBand / 8][4], unsigned tile) const {
    const float* const columns = rows + tile % 2 * kBand + lane_column();
#pragma unroll
    for (int j = 0; j < kBand / 8; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 two = *reinterpret_cast<const float2*>(columns + half * 8 * pitch + 8 * j);
        s[j][2 * half] += two.x, s[j][2 * half + 1] += two.y;
      }
    }
  }
};

}  // namespace
}  // namespace pyext
