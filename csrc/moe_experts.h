// Layers of experts as the CPU kernels receive them: pointers, sizes, strides. No torch headers here.
//
//   row n of expert e, offsets[e] <= n < offsets[e + 1], is x[source[n]], or x[n] without `source`;
//   pre = row w_gate[e]^T + b_gate[e], gated units have as much again of w_up;
//   h = act(pre_gate) * pre_up, or act(pre), or pre;  y[n] = h, or h w_down[e]^T + b_down[e];
//   out[n] = y[n], or, with `position`, out[t] = sum_k weights[t, k] y[position[t, k]].
//
// A gated layer (csrc/gated_linear.cpp) is one expert that has all rows.
#pragma once
#include "glu.h"
#include "strided.h"

namespace pyext {

enum class Unit : int { gated, activated, plain };

struct ExpertsProblem {
  DType dtype = DType::f32;  // of all tensors but weights, in whose place fp32 stands for bf16 and fp16
  Unit unit = Unit::gated;
  Activation activation = Activation::geglu;
  bool down = false;                                                 // whether there is w_down
  int64_t experts = 0, rows = 0, in = 0, hidden = 0, down_rows = 0;  // E, N, H, I, J
  int64_t tokens = 0, choices = 0;                                   // T, K, with `position` only

  // The op has checked that offsets rise from 0 to N or less, that source is in [-1, T), and that position and source
  // name one another: source[position[t, k]] is t, no row is named twice, and -1 stands for none in both.
  const int64_t* offsets = nullptr;                      // (E + 1,)
  const int32_t *source = nullptr, *position = nullptr;  // (N,), (T, K)
  const void* weights = nullptr;                         // (T, K)

  // Strides of experts are those of `batch`. pre is (N, 2I), those of the gate first, or (N, I).
  Input x, w_gate, w_up, w_down;  // (N or T, H), (E, I, H) twice, (E, J, I)
  Input b_gate, b_up, b_down;     // one row per expert: (E, I) twice, (E, J); data may be null

  // Forward only. Rows of no expert become zero; pre_out.data may be null.
  Output out, pre_out;  // (N or T, J), or (N, I) without w_down

  // Backward only: null where a gradient is not wanted.
  Input grad, pre;                                     // grad like out
  Output grad_x, grad_w_gate, grad_w_up, grad_w_down;  // laid out like what they belong to, rows contiguous
  Output grad_b_gate, grad_b_up, grad_b_down;
  void* grad_weights = nullptr;  // (T, K)
};

}  // namespace pyext
