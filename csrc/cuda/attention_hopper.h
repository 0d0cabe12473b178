// What the attention kernels for sm_90a (Hopper) share: tiles in shared memory that TMA fills and wgmma reads, rings of
// them between a warp that produces and warpgroups that consume, and products.
//
// A tile's rows are cut into panels of 64 features, one after the other, whose rows of 128 bytes are swizzled.
// Consumers are the first threads of a block.
#pragma once
#include "attention_tiles.h"

namespace pyext {
namespace {

constexpr int kPanel = 64;  // features side by side in shared memory: 128 bytes, the span of the swizzle
constexpr int kPanelBytes = 128;
constexpr int kAtomBytes = 1024;  // eight rows of a panel
constexpr int kStages = 2;

// --- Rings ---

// Stages that the producer fills and the consumers read. Both count the tiles they have had.
template <int stages>
struct Ring {
  uint64_t *full, *empty;

  PYEXT_DEVICE void initialise(int consuming_warps, int producers = 1) const {
#pragma unroll
    for (int i = 0; i < stages; ++i) {
      ptx::mbarrier_init(full + i, producers);
      ptx::mbarrier_init(empty + i, consuming_warps);
    }
  }
  PYEXT_DEVICE uint64_t* barrier(unsigned tile) const { return full + tile % stages; }
  PYEXT_DEVICE void wait_full(unsigned tile) const { ptx::mbarrier_wait(full + tile % stages, tile / stages & 1); }
  // At first the stages are empty: the phase before the first one counts as complete.
  PYEXT_DEVICE void wait_empty(unsigned tile) const {
    ptx::mbarrier_wait(empty + tile % stages, (tile / stages & 1) ^ 1);
  }
  // By all lanes of a warp that are done with it.
  PYEXT_DEVICE void release(unsigned tile) const {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty + tile % stages);
  }
};

// --- Copies ---

// All panels of `rows` rows from `row` on, in boxes of `box` rows.
template <int panels, int rows, int box, class T>
PYEXT_DEVICE void load_panels(T* shared, const ptx::TensorMap& map, uint64_t* barrier, int row, int head, int batch) {
#pragma unroll
  for (int panel = 0; panel < panels; ++panel) {
#pragma unroll
    for (int first = 0; first < rows; first += box) {
      const int corner[4] = {panel * kPanel, row + first, head, batch};
      ptx::tma_load(shared + (panel * rows + first) * kPanel, &map, barrier, corner);
    }
  }
}

// What TMA can walk: sizes and strides as its maps want them. Zero strides, of broadcast tensors, it may not take.
inline bool fits_map(const Input& t, int64_t batch, int64_t heads, int64_t length) {
  const auto fits = [](int64_t stride, int64_t size) { return size == 1 || (0 < stride && stride < int64_t(1) << 39); };
  return fits(t.batch, batch) && fits(t.head, heads) && fits(t.row, length);
}

// Whether these kernels take a problem whose rows have at most `widest` features. The highest score must be that of the
// largest product, so its scale is positive.
inline bool takes_on_hopper(const AttentionProblem& p, int64_t widest) {
  return !p.segment && fits_tiles(p, p.query, p.key, p.value) && fits_map(p.query, p.batch, p.heads, p.q_len) &&
         fits_map(p.key, p.batch, p.kv_heads, p.k_len) && fits_map(p.value, p.batch, p.kv_heads, p.k_len) &&
         p.k_len > 0 && max_of(p.head_dim, p.value_dim) <= widest && float(p.scale) * kLog2e > 0;
}

// Rows in swizzled boxes of one panel's width.
template <class T>
cudaError_t map_rows(ptx::TensorMap* map, const Input& t, const AttentionProblem& p, int64_t heads, int64_t length,
                     int64_t features, int box_rows) {
  // A dimension of size 1 needs some stride.
  const auto bytes = [](int64_t stride, int64_t size) { return size == 1 ? int64_t(16) : 2 * stride; };
  const int64_t size[4] = {features, length, heads, p.batch};
  const int64_t strides[3] = {bytes(t.row, length), bytes(t.head, heads), bytes(t.batch, p.batch)};
  const int box[4] = {kPanel, box_rows, 1, 1};
  return ptx::encode_tensor_map<T>(map, t.data, size, strides, box, kPanelBytes);
}

// --- Products ---

// A warp's fragments of its 16 rows of a tile whose panels have `rows` rows.
template <int rows, class T, int K>
PYEXT_DEVICE void load_left(uint32_t (&fragments)[K][4], const T* panels) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
#pragma unroll
  for (int i = 0; i < K; ++i) {
    const int chunk = i * 2 + lane / 16;  // of 16 bytes
    ptx::ldmatrix(fragments[i], panels + (chunk / 8 * rows + row) * kPanel + (chunk % 8 ^ row % 8) * 8);
  }
}

template <int N>
PYEXT_DEVICE float (&flat(float (&sum)[1][N][4]))[4 * N] {
  return reinterpret_cast<float (&)[4 * N]>(sum);
}

// sum = a b^T over `width` features, issued: 64 rows of a, whose panels have a_rows rows, and 8 N rows of b, a tile.
template <class T, int width, int a_rows, int N>
PYEXT_DEVICE void issue_transposed(float (&sum)[1][N][4], const T* a, const T* b) {
  const uint64_t left = ptx::matrix_descriptor(a, kAtomBytes), right = ptx::matrix_descriptor(b, kAtomBytes);
#pragma unroll
  for (int i = 0; i < width / 16; ++i) {
    const int panel = i / 4, step = i % 4 * 2;  // in units of 16 bytes
    ptx::wgmma<T>(flat(sum), left + uint64_t(panel * a_rows * kPanelBytes / 16 + step),
                  right + uint64_t(panel * 8 * N * kPanelBytes / 16 + step), i > 0);
  }
  ptx::wgmma_commit();
}

// The same of 64 rows whose fragments are in registers.
template <class T, int N, int K>
PYEXT_DEVICE void issue_transposed(float (&sum)[1][N][4], const uint32_t (&a)[K][4], const T* b) {
  const uint64_t right = ptx::matrix_descriptor(b, kAtomBytes);
#pragma unroll
  for (int i = 0; i < K; ++i)
    ptx::wgmma<T>(flat(sum), a[i], right + uint64_t(i / 4 * 8 * N * kPanelBytes / 16 + i % 4 * 2), i > 0);
  ptx::wgmma_commit();
}

// sum += left b, issued; b is a tile of 16 K rows.
template <class T, int N, int K>
PYEXT_DEVICE void issue_product(float (&sum)[1][N][4], const uint32_t (&left)[1][K][4], const T* b) {
  const uint64_t right = ptx::matrix_descriptor(b, kAtomBytes, 16 * K * kPanelBytes);
#pragma unroll
  for (int i = 0; i < K; ++i)
    ptx::wgmma<T, true>(flat(sum), left[0][i], right + uint64_t(i * 16 * kPanelBytes / 16), true);
  ptx::wgmma_commit();
}

// --- Masks ---

// By a warp: what `rows` queries from `first` on see.
template <int rows>
PYEXT_DEVICE Range find_visible(const AttentionProblem& p, int64_t batch, int64_t first) {
  Range range = Range::of_nobody();
#pragma unroll 1
  for (int row = threadIdx.x % 32; row < rows; row += 32) range.join(Range::of(visible(p, batch, first + row)));
  range.join_warp();
  return range;
}

}  // namespace
}  // namespace pyext
