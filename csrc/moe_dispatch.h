// Dispatch and combine of a mixture of experts as the kernels receive them: pointers, sizes, strides. No torch headers
// here. What is computed is in pyext/_primitives.py (DispatchProblem, CombineProblem).
#pragma once
#include "strided.h"

namespace pyext {

// T tokens with K choices each, N rows of `width` features. source and position are contiguous, and where the CPU's
// kernels get them, every number in them was checked. Of views, `row` alone is used.
struct DispatchProblem {
  DType dtype = DType::f32;
  int64_t tokens = 0, choices = 0, rows = 0, width = 0;
  const int32_t* source = nullptr;    // (N,), -1 in unused rows
  const int32_t* position = nullptr;  // (T, K), -1 for choices without a row
  Input x;                            // (T, width)
  Output out;                         // (N, width)
};

struct CombineProblem {
  DType dtype = DType::f32;  // "accumulator type": f64 for f64, else f32
  int64_t tokens = 0, choices = 0, rows = 0, width = 0;
  const void* weights = nullptr;      // (T, K) contiguous, accumulator type; null: 1
  const int32_t* position = nullptr;  // (T, K), -1 for choices without a row
  Input ys;                           // (N, width); in a backward only for grad_weights

  Output out;  // forward only: (T, width)

  // Backward only.
  Input grad;                    // (T, width)
  Output grad_ys;                // (N, width), or null
  uint8_t* used = nullptr;       // (N,): whether a choice has the row; with grad_ys. The GPU finds it out
  void* grad_weights = nullptr;  // (T, K) contiguous, accumulator type, or null
};

}  // namespace pyext

// csrc/cuda/moe_dispatch.cu; stream is a cudaStream_t. They return a cudaError_t: 0 if the launch succeeded.
extern "C" int pyext_cuda_moe_dispatch_forward(const pyext::DispatchProblem&, void* stream);
extern "C" int pyext_cuda_moe_combine_forward(const pyext::CombineProblem&, void* stream);
extern "C" int pyext_cuda_moe_combine_backward(const pyext::CombineProblem&, void* stream);
