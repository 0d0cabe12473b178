// Gated feed-forward layers as the CPU kernels receive them: pointers, sizes, strides. No torch headers here.
//
//   pre = x [w_gate; w_up]^T + [b_gate, b_up],  h = act(pre_gate) * pre_up,  out = h, or h w_down^T + b_down.
#pragma once
#include "glu.h"
#include "strided.h"

namespace pyext {

struct GatedLinearProblem {
  DType dtype = DType::f32;  // of all tensors
  Activation activation = Activation::geglu;
  bool down = false;                                    // whether there is w_down
  int64_t rows = 0, in = 0, hidden = 0, down_rows = 0;  // M, K, N, J

  // Matrices; only `row` is used of their strides. pre is (M, 2N), those of the gate first; null if it is not to be
  // saved. Weights as nn.Linear keeps them: (N, K), (N, K), (J, N).
  Input x, w_gate, w_up, w_down;
  const void *b_gate = nullptr, *b_up = nullptr, *b_down = nullptr;  // (N,), (N,), (J,), each may be null

  // Forward only.
  Output out, pre_out;

  // Backward only: gradients are contiguous; null: not wanted.
  Input grad, pre;
  void *grad_x = nullptr, *grad_w_gate = nullptr, *grad_w_up = nullptr, *grad_w_down = nullptr;
  void *grad_b_gate = nullptr, *grad_b_up = nullptr, *grad_b_down = nullptr;
};

}  // namespace pyext
