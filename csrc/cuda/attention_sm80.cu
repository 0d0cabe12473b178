// Attention forward for sm_80 and later: mma.sync, K and V in a ring of two stages filled by cp.async.
//
// A block computes `rows` queries of one head, a warp 16 M of them: S = Q K^T of a tile of keys, its weights, O += P V
// with P in registers. Scores are in units of log2, so that a weight is one ex2. Tiles that nobody sees are not
// visited, and only tiles that some query sees in part ask who sees what.
// Source: Dao, "FlashAttention-2" (2023), algorithm 1.
#include "attention_tiles.h"

namespace pyext {
namespace {

// blocks: that a multiprocessor is to hold, so that one's products run beside another's softmax.
template <int width_, int M_, int warps_, int columns_, int blocks_ = 1>
struct ForwardTile {
  static constexpr int width = width_, M = M_, warps = warps_, columns = columns_, blocks = blocks_,
                       threads = 32 * warps, rows = 16 * M * warps, N = columns / 8, strip = rows + columns;
  static constexpr bool keeps_queries = M == 1;  // in registers: 16 rows leave room for them
  struct Shared {  // behind the tiles; what registers would have to keep through the loop is here, too
    float strips[2][strip];
    Visible<threads, rows> seen;
    int batch, head, first;
  };
  static constexpr int shared_bytes = 2 * tile_elements<width>(rows + 4 * columns) + int(sizeof(Shared));
};

template <class T, class Tile, bool biased>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    attention_forward(const __grid_constant__ AttentionProblem p, const float* strips, int64_t strip_length) {
  constexpr int width = Tile::width, M = Tile::M, N = Tile::N, threads = Tile::threads, columns = Tile::columns;
  PYEXT_SHARED(T, shared);
  const SharedTile<T, width> q{shared};
  const auto stage = [&](int n) { return SharedTile<T, width>{q.at(Tile::rows + n * columns, 0)}; };
  auto& other = *reinterpret_cast<typename Tile::Shared*>(q.at(Tile::rows + 4 * columns, 0));

  // The last queries first: under a causal mask they have most to do.
  const int blocks = int(ceil_div(p.q_len, Tile::rows)), heads = int(p.heads), pair = blockIdx.x / blocks;
  const int head = pair % heads, batch = pair / heads, kv_head = head / (heads / int(p.kv_heads));
  const int first = (blocks - 1 - blockIdx.x % blocks) * Tile::rows;
  const T* query = static_cast<const T*>(p.query.data) + batch * p.query.batch + head * p.query.head;
  const T* key = static_cast<const T*>(p.key.data) + batch * p.key.batch + kv_head * p.key.head;
  const T* value = static_cast<const T*>(p.value.data) + batch * p.value.batch + kv_head * p.value.head;
  if (threadIdx.x == 0) other.batch = batch, other.head = head, other.first = first;
  if (biased) strips += p.diag_heads == 1 ? 0 : head * strip_length;

  const Range range = find_visible(p, batch, first, other.seen);
  const int begin = range.begin / columns, end = range.end ? (range.end - 1) / columns + 1 : begin;
  const auto load_key = [&](int tile) {
    if (tile < end)
      load_tile<threads, columns>(stage(tile % 2), key, p.key.row, int64_t(tile) * columns, p.k_len, p.head_dim);
    ptx::cp_async_commit();  // an empty group, too: groups count tiles
  };
  const auto load_value = [&](int tile) {
    if (tile < end)
      load_tile<threads, columns>(stage(2 + tile % 2), value, p.value.row, int64_t(tile) * columns, p.k_len,
                                  p.value_dim);
    ptx::cp_async_commit();
  };
  StripAhead<threads, Tile::strip> ahead;
  const auto read_strip = [&](int tile) {
    if (biased)
      ahead.read(strips, strip_length, strip_start(p, int64_t(first) + Tile::rows - 1, int64_t(tile) * columns));
  };
  load_tile<threads, Tile::rows>(q, query, p.query.row, first, p.q_len, p.head_dim);
  load_key(begin), load_value(begin), read_strip(begin);
  if (biased) ahead.store(other.strips[begin % 2]);

  const int own = threadIdx.x / 32 * 16 * M, row = own + lane_row();
  uint32_t left[M][Tile::keeps_queries ? width / 16 : 1][4];
  if (Tile::keeps_queries) {
    ptx::cp_async_wait<1>();
    __syncthreads();  // the queries are there, for all
    read_left(left, q, own);
  }
  OnlineSoftmax<M> softmax(1);
  float out[M][width / 8][4] = {}, factor[M][2];
  for (int tile = begin; tile < end; ++tile) {
    ptx::cp_async_wait<1>();
    __syncthreads();  // the tile's keys are there, for all, and all are done with the values before
    load_key(tile + 1), read_strip(tile + 1);
    float s[M][N][4] = {};
    if constexpr (Tile::keeps_queries)
      multiply_transposed(s, left, stage(tile % 2));
    else
      multiply_transposed<M, N>(s, q, own, stage(tile % 2));
    if (biased) ahead.store(other.strips[(tile + 1) % 2]);
    finish_scores<Tile, biased>(s, float(p.scale) * kLog2e, other.strips[tile % 2], other.seen.of, tile * columns,
                                range.covers(tile * columns, tile * columns + columns));
    softmax.add(s, factor);
    scale_rows(out, factor);
    uint32_t weights[M][N / 2][4];
    as_left<T>(weights, s);
    ptx::cp_async_wait<1>();
    __syncthreads();  // the tile's values are there, and all are done with its keys
    load_value(tile + 1);
    multiply(out, weights, stage(2 + tile % 2));
  }
  ptx::cp_async_wait<0>();

  const int64_t b = other.batch, h = other.head, query_block = other.first;
  softmax.finish(factor, p.lse + (b * p.heads + h) * p.q_len, query_block + row, p.q_len);
  store_rows(static_cast<T*>(p.out.data) + b * p.out.batch + h * p.out.head, p.out.row, query_block + own, p.q_len,
             p.value_dim, out, factor);
}

template <class T, class Tile, bool biased>
int launch_forward(const AttentionProblem& p, const AttentionWorkspace& w, cudaStream_t stream) {
  const int64_t blocks = ceil_div(p.q_len, Tile::rows) * p.heads * p.batch;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return ptx::launch(attention_forward<T, Tile, biased>, dim3(unsigned(blocks)), dim3(Tile::threads),
                     Tile::shared_bytes, stream, p, w.strips, w.strip_length);
}

template <class T, class Tile>
int with_bias(const AttentionProblem& p, const AttentionWorkspace& w, cudaStream_t stream) {
  return p.diag ? launch_forward<T, Tile, true>(p, w, stream) : launch_forward<T, Tile, false>(p, w, stream);
}

// A warp has 32 rows, so that what it loads of K and V serves two products; at 256 features its registers hold 16, and
// their queries.
// Tiles of 32 keys leave registers and shared memory to more blocks.
template <class T>
int with_width(const AttentionProblem& p, const AttentionWorkspace& w, cudaStream_t stream) {
  const int64_t width = max_of(p.head_dim, p.value_dim);
  if (width <= 64) return with_bias<T, ForwardTile<64, 2, 4, 32, 3>>(p, w, stream);
  if (width <= 96) return with_bias<T, ForwardTile<96, 2, 4, 64, 2>>(p, w, stream);
  if (width <= 128) return with_bias<T, ForwardTile<128, 2, 4, 32, 2>>(p, w, stream);
  if (width <= 256) return with_bias<T, ForwardTile<256, 1, 8, 32>>(p, w, stream);
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace pyext

extern "C" int64_t pyext_cuda_attention_forward_workspace(const pyext::AttentionProblem& p) {
  return pyext::AttentionWorkspace(p, nullptr, false).bytes;
}

extern "C" int pyext_cuda_attention_forward(const pyext::AttentionProblem& p, void* stream) {
  using namespace pyext;
  const auto s = static_cast<cudaStream_t>(stream);
  if (p.rel_index || !fits_tiles(p, p.query, p.key, p.value)) return cudaErrorInvalidValue;
  if (p.batch * p.heads * p.q_len == 0) return cudaSuccess;
  const AttentionWorkspace w(p, p.workspace, false);
  if (const int error = expand_strips(p, w, s)) return error;
  return with_half(p.dtype, [&](auto element) { return with_width<decltype(element)>(p, w, s); });
}
