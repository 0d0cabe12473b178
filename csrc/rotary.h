// Rotary position embedding as the kernels receive it: pointers, sizes, strides. No torch headers here.
//
//   pair k of a row is features (k, k + half), or (2k, 2k + 1) if interleaved, k < half; with c, s of the row's
//   position (out1, out2) = (x1 c - x2 s, x2 c + x1 s), and s changes its sign if inverse. Features from 2 half on are
//   copied.
#pragma once
#include "strided.h"

namespace pyext {

struct RotaryProblem {
  DType dtype = DType::f32;  // of x, out and grad; "accumulator type": f64 for f64, else f32
  int64_t batch = 0, heads = 0, length = 0, head_dim = 0, half = 0;
  bool interleaved = false, inverse = false;
  // (batch or 1,) length: the row of the tables for each token; null: token i takes row i. Batch stride 0 broadcasts.
  const int64_t* positions = nullptr;
  int64_t positions_batch = 0;
  int64_t table_rows = 0;
  Input x;

  // Forward only.
  Output out;
  Input cos, sin;  // (batch or 1, rows, half); `head` is not used
  DType table_dtype = DType::f32;

  // Backward only: gradients of the tables, (table_batch, table_rows, half) contiguous, accumulator type.
  Input grad;  // like x, of what became of x
  int64_t table_batch = 1;
  void *grad_cos = nullptr, *grad_sin = nullptr;
  // Backward on a GPU with positions: the positions in ascending order, and the place that each came from. Each row of
  // positions is a sequence of its own, but if batch > 1 rows share one table, they are sorted as one sequence.
  const int64_t *sorted = nullptr, *order = nullptr;
};

}  // namespace pyext

// csrc/cuda/rotary.cu; stream is a cudaStream_t. They return a cudaError_t: 0 if the launch succeeded.
extern "C" int pyext_cuda_rotary_forward(const pyext::RotaryProblem&, void* stream);
extern "C" int pyext_cuda_rotary_backward(const pyext::RotaryProblem&, void* stream);
