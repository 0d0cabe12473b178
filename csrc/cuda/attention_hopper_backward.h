// What Hopper's backward kernels share: who does what in a block of threads, its shared memory, and left operands.
#pragma once
#include "attention_backward.h"
#include "attention_hopper.h"

namespace pyext {
namespace {

constexpr int kBlockThreads = kThreads + 128;  // the consumers' and the producer's warpgroup
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
constexpr int kSummingWarps = 3, kSummingThreads = 32 * kSummingWarps;  // the last ones of the producer's warpgroup

struct Sources {
  ptx::TensorMap query, key, value, grad, rel_query, rel_rows;  // the last two of problems with relative rows only
};

template <int width_>
struct Panels {
  static constexpr int width = width_, count = (width + kPanel - 1) / kPanel;
  static constexpr int block_bytes = kBlockRows * count * kPanelBytes, step_bytes = kStepRows * count * kPanelBytes;
};

// Tiles in shared memory: of the block's rows, two rings of steps, what else the kernel needs, and barriers.
template <class T, int width, class Other, int blocks_of_rows = 2, int stages = kStages>
struct Shared {
  using P = Panels<width>;
  static constexpr int steps_at = blocks_of_rows * P::block_bytes, other_at = steps_at + 2 * stages * P::step_bytes;
  static constexpr int barriers_at = (other_at + int(sizeof(Other)) + 7) / 8 * 8, rings = 3;
  static constexpr int bytes = barriers_at + (2 + rings * 2 * stages) * int(sizeof(uint64_t));
  char* data;

  PYEXT_DEVICE T* block(int i) const { return reinterpret_cast<T*>(data + i * P::block_bytes); }
  PYEXT_DEVICE T* step(int ring, unsigned n) const {
    return reinterpret_cast<T*>(data + steps_at + (ring * stages + int(n % stages)) * P::step_bytes);
  }
  PYEXT_DEVICE Other& other() const { return *reinterpret_cast<Other*>(data + other_at); }
  PYEXT_DEVICE Ring<1> blocks() const { return {barriers(), barriers() + 1}; }
  PYEXT_DEVICE Ring<stages> ring(int i) const {
    uint64_t* const first = barriers() + 2 + i * 2 * stages;
    return {first, first + stages};
  }
  // Of the sums of diagonals: all consumers' warps fill it.
  PYEXT_DEVICE Ring<stages> sums_ring() const { return ring(2); }
  // more: of barriers that `Other` has.
  template <class More>
  PYEXT_DEVICE void initialise(const More& more) const {
    if (threadIdx.x == 0) {
      more();
      blocks().initialise(kWarps);
#pragma unroll
      for (int i = 0; i < 2; ++i) ring(i).initialise(kWarps);
      sums_ring().initialise(kSummingWarps, kWarps);
      ptx::fence_mbarrier_init();
    }
    __syncthreads();
  }
  PYEXT_DEVICE void initialise() const {
    initialise([] {});
  }

 private:
  PYEXT_DEVICE uint64_t* barriers() const { return reinterpret_cast<uint64_t*>(data + barriers_at); }
};

// Maps of all rows, in boxes of a step's.
template <class T>
cudaError_t map_sources(Sources& from, const AttentionProblem& p) {
  cudaError_t error = map_rows<T>(&from.query, p.query, p, p.heads, p.q_len, p.head_dim, kStepRows);
  if (!error) error = map_rows<T>(&from.key, p.key, p, p.kv_heads, p.k_len, p.head_dim, kStepRows);
  if (!error) error = map_rows<T>(&from.value, p.value, p, p.kv_heads, p.k_len, p.value_dim, kStepRows);
  if (!error) error = map_rows<T>(&from.grad, p.grad_out, p, p.heads, p.q_len, p.value_dim, kStepRows);
  return error;
}

// The producer's warp runs `produce`, its neighbours `sum`, the consumers `consume`.
template <class Produce, class Sum, class Consume>
PYEXT_DEVICE void in_roles(const Produce& produce, const Sum& sum, const Consume& consume) {
  if (threadIdx.x >= kThreads) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x < kThreads + 32)
      produce();
    else
      sum();
  } else {
    ptx::setmaxnreg_inc<kConsumerRegisters>();
    consume();
  }
}

// A warpgroup's 64 rows of the block as the left operand of products: in registers, or where TMA has put them. Panels
// have `panel_rows`.
template <class T, int width, bool in_registers, int panel_rows = kBlockRows>
struct LeftOperand {
  const T* rows;

  PYEXT_DEVICE explicit LeftOperand(const T* block) : rows(block + threadIdx.x / 128 * 64 * kPanel) {}
  PYEXT_DEVICE void issue_transposed(float (&sum)[1][kN][4], const T* step) const {
    pyext::issue_transposed<T, width, panel_rows>(sum, rows, step);
  }
};
template <class T, int width, int panel_rows>
struct LeftOperand<T, width, true, panel_rows> {
  uint32_t rows[width / 16][4];

  PYEXT_DEVICE explicit LeftOperand(const T* block) { load_left<panel_rows>(rows, block); }
  PYEXT_DEVICE void issue_transposed(float (&sum)[1][kN][4], const T* step) const {
    pyext::issue_transposed(sum, rows, step);
  }
};

// What as_left made of an accumulator, rounded as it is.
template <class T, int N>
PYEXT_DEVICE void from_left(float (&sum)[1][N][4], const uint32_t (&left)[1][N / 2][4]) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const uint32_t two = left[0][j / 2][j % 2 * 2 + e / 2];
      sum[0][j][e] = ptx::to_float(T{uint16_t(e % 2 ? two >> 16 : two)});
    }
  }
}

}  // namespace
}  // namespace pyext
