// Attention forward with relative rows for sm_80 and later: as attention_sm80.cu, but that scores start with products
// of bands, and that queries are in registers, which leaves shared memory to what bands need.
// Sources: Dao, "FlashAttention-2" (2023), algorithm 1; Dai et al., "Transformer-XL" (2019), appendix B; He et al.,
// "DeBERTa" (2021), eq. 4; Yang et al., "XLNet" (2019), section 2.5.
#include "attention_relative.h"

namespace pyext {
namespace {

template <class T, class Tile, bool biased>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    attention_relative_forward(const __grid_constant__ AttentionProblem p, const float* strips, int64_t strip_length,
                               const __grid_constant__ WrittenRows written) {
  constexpr int width = Tile::width, M = Tile::M, N = Tile::N, threads = Tile::threads, columns = Tile::columns;
  PYEXT_SHARED(char, shared);
  const auto stage = [&](int at, int n) {
    return SharedTile<T, width>{reinterpret_cast<T*>(shared + at + n % 2 * Tile::tile_bytes)};
  };
  const auto keys = [&](int n) { return stage(Tile::keys_at, n); };
  const auto values = [&](int n) { return stage(Tile::values_at, n); };
  float* const strip = reinterpret_cast<float*>(shared + Tile::strip_at);
  auto& seen = *reinterpret_cast<Visible<threads, Tile::rows>*>(shared + Tile::seen_at);

  // The last queries first: under a causal mask they have most to do.
  const int blocks = int(ceil_div(p.q_len, Tile::rows)), heads = int(p.heads), pair = blockIdx.x / blocks;
  const int head = pair % heads, batch = pair / heads, kv_head = head / (heads / int(p.kv_heads));
  const int first = (blocks - 1 - blockIdx.x % blocks) * Tile::rows;
  if (biased) strips += p.diag_heads == 1 ? 0 : head * strip_length;

  const Range range = find_visible(p, batch, first, seen);
  const int begin = range.begin / columns, end = range.end ? (range.end - 1) / columns + 1 : begin;
  RelativeScores<T, Tile> relative(p, written, batch, head, first, shared);
  const auto load_key = [&](int tile) {
    const int64_t at = int64_t(tile) * columns;
    if (tile < end)
      copy_tile<threads, columns>(keys(tile), rows_of<T>(p.key, batch, kv_head) + at * p.key.row, p.key.row,
                                  p.k_len - at, p.head_dim);
  };
  const auto load_value = [&](int tile) {
    const int64_t at = int64_t(tile) * columns;
    if (tile < end)
      copy_tile<threads, columns>(values(tile), rows_of<T>(p.value, batch, kv_head) + at * p.value.row, p.value.row,
                                  p.k_len - at, p.value_dim);
    ptx::cp_async_commit();  // an empty group, too: groups count tiles
  };
  StripAhead<threads, Tile::strip> ahead;
  const auto read_strip = [&](int tile) {
    if (biased)
      ahead.read(strips, strip_length, strip_start(p, int64_t(first) + Tile::rows - 1, int64_t(tile) * columns));
  };

  const int row = threadIdx.x / 32 * 16 * M + lane_row();
  SegmentRows segments[M];
  OnlineSoftmax<M> softmax(1);
  float out[M][width / 8][4] = {}, factor[M][2];
  if (begin < end) {
    relative.load_queries(batch, head, first);
    for (int n = begin; n <= begin + Tile::units; ++n) relative.load(n);
    load_key(begin);
    ptx::cp_async_commit();
    read_strip(begin);
    if (biased) ahead.store(strip + begin % 2 * Tile::strip);
#pragma unroll
    for (int i = 0; i < M; ++i)
      if (p.segment) segments[i].read(p, pair, int64_t(first) + row + 16 * i);
    ptx::cp_async_wait<0>();
    __syncthreads();  // all that is there, for all
    relative.read_queries();
    load_value(begin);
    relative.multiply_band(begin - 1);
  }
  for (int tile = begin; tile < end; ++tile) {
    ptx::cp_async_wait<1>();
    __syncthreads();  // the tile's keys are there, for all, and all are done with the values before
    if (tile + 1 < end) load_key(tile + 1), relative.load(tile + Tile::units + 1);
    ptx::cp_async_commit();
    read_strip(tile + 1);
    float s[M][N][4];
    relative.to_scores(s, tile, keys(tile));
    if (biased) ahead.store(strip + (tile + 1) % 2 * Tile::strip);
    finish_scores<Tile, biased>(s, float(p.scale) * kLog2e, strip + tile % 2 * Tile::strip, seen.of, tile * columns,
                                range.covers(tile * columns, tile * columns + columns));
#pragma unroll
    for (int i = 0; i < M; ++i)
      if (p.segment) segments[i].add_to(s[i], p, batch, tile * columns);
    softmax.add(s, factor);
    scale_rows(out, factor);
    uint32_t weights[M][N / 2][4];
    as_left<T>(weights, s);
    ptx::cp_async_wait<1>();
    __syncthreads();  // the tile's values are there, and all are done with its keys
    load_value(tile + 1);
    multiply(out, weights, values(tile));
  }
  ptx::cp_async_wait<0>();

  softmax.finish(factor, p.lse + pair * p.q_len, first + row, p.q_len);
  T* result = rows_of<T>(p.out, batch, head);
  store_rows(result, p.out.row, int64_t(first) + row - lane_row(), p.q_len, p.value_dim, out, factor);
}

// --- Launchers ---

struct RelativeWorkspace {
  AttentionWorkspace base;
  RelativeRows rows;
  WrittenRows written;

  explicit RelativeWorkspace(const AttentionProblem& p)
      : base(p, p.workspace, false),
        rows(p),
        written{static_cast<char*>(p.workspace) + base.bytes,
                static_cast<char*>(p.workspace) + base.bytes + rows.bytes} {}
  int64_t bytes() const { return base.bytes + rows.bytes + rows.bytes_of_keys; }
};

template <class T, class Tile, bool biased>
int launch_forward(const AttentionProblem& p, const RelativeWorkspace& w, cudaStream_t stream) {
  const int64_t blocks = ceil_div(p.q_len, Tile::rows) * p.heads * p.batch;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return ptx::launch(attention_relative_forward<T, Tile, biased>, dim3(unsigned(blocks)), dim3(Tile::threads),
                     Tile::shared_bytes, stream, p, w.base.strips, w.base.strip_length, w.written);
}

template <class T, class Tile>
int with_bias(const AttentionProblem& p, const RelativeWorkspace& w, cudaStream_t stream) {
  return p.diag ? launch_forward<T, Tile, true>(p, w, stream) : launch_forward<T, Tile, false>(p, w, stream);
}

// Two blocks of 4 warps share a multiprocessor of an A100, or one of 8; with rows of keys and more than 64 features
// there is shared memory for fewer warps only.
template <class T>
int with_width(const AttentionProblem& p, const RelativeWorkspace& w, cudaStream_t stream) {
  const int64_t width = max_of(p.head_dim, p.value_dim);
  if (p.rel_k.data) {
    if (width <= 64) return with_bias<T, RelativeTile<64, 1, 8, 1, true>>(p, w, stream);
    if (width <= 96) return with_bias<T, RelativeTile<96, 1, 6, 1, true>>(p, w, stream);
    if (width <= 128) return with_bias<T, RelativeTile<128, 1, 4, 1, true>>(p, w, stream);
    return cudaErrorInvalidValue;
  }
  if (width <= 64) return with_bias<T, RelativeTile<64, 2, 4, 2, false>>(p, w, stream);
  if (width <= 96) return with_bias<T, RelativeTile<96, 1, 4, 2, false>>(p, w, stream);
  if (width <= 128) return with_bias<T, RelativeTile<128, 1, 4, 2, false>>(p, w, stream);
  return cudaErrorInvalidValue;
}

template <class T>
int launch(const AttentionProblem& p, cudaStream_t stream) {
  const RelativeWorkspace w(p);
  if (const int error = expand_strips(p, w.base, stream)) return error;
  if (const int error = write_rows<T, RowOrder::of_bands, RowOrder::of_octets>(p, w.written, stream)) return error;
  return with_width<T>(p, w, stream);
}

}  // namespace
}  // namespace pyext

extern "C" int64_t pyext_cuda_attention_relative_forward_workspace(const pyext::AttentionProblem& p) {
  return pyext::RelativeWorkspace(p).bytes();
}

extern "C" int pyext_cuda_attention_relative_forward(const pyext::AttentionProblem& p, void* stream) {
  using namespace pyext;
  const auto s = static_cast<cudaStream_t>(stream);
  if (!p.rel_q.data || !fits_tiles(p, p.query, p.key, p.value, p.rel_query, p.rel_q, p.rel_k))
    return cudaErrorInvalidValue;
  if (p.batch * p.heads * p.q_len == 0) return cudaSuccess;
  return with_half(p.dtype, [&](auto element) { return launch<decltype(element)>(p, s); });
}
