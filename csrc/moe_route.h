// Routing of tokens to experts as the kernels receive it: pointers, sizes, strides. No torch headers here. What is
// computed is in pyext/_primitives.py (RouteProblem) and pyext/reference/moe_route.py.
#pragma once
#include "strided.h"

namespace pyext {

// In the order of POLICIES in pyext/_primitives.py.
enum class Policy : int { softmax_topk, topk_softmax, switch_top1, gshard, sigmoid, expert_choice };
constexpr int kPolicies = 6;

// T = groups * tokens tokens in all; K columns of choices: top_k, but `experts` for expert_choice. All but the logits
// are contiguous. "Accumulator type": f64 for f64 logits, else f32.
struct RouteProblem {
  DType dtype = DType::f32;  // of the logits
  Policy policy = Policy::softmax_topk;
  int64_t groups = 0, tokens = 0, experts = 0, columns = 1;
  int64_t rows = 0;       // N: rows that the choices can need
  int64_t capacity = -1;  // slots of each expert in each group, or -1 for no limit
  bool renormalize = false, batch_priority = false;
  int64_t expert_groups = 1, top_groups = 1;

  Input logits;                         // (groups, tokens, experts): `head` steps groups, `row` tokens
  const uint8_t* token_mask = nullptr;  // T, or null: all are tokens
  const void* expert_bias = nullptr;    // (experts,) of the accumulator type, or null; for sigmoid
  const float* uniform = nullptr;       // T; for gshard

  // Forward only.
  int32_t *expert_index = nullptr, *position = nullptr, *choice = nullptr;  // (T, K)
  void* weights = nullptr;                                                  // (T, K), accumulator type
  int32_t *offsets = nullptr, *source = nullptr;                            // (experts + 1,), (N,)
  void *balance_loss = nullptr, *z_loss = nullptr;                          // accumulator type
  int32_t* dropped = nullptr;
  int32_t* load = nullptr;  // (groups, experts)

  // Backward only: the gradients of weights and losses, each or null, and what the forward found.
  const void *grad_weights = nullptr, *grad_balance = nullptr, *grad_z = nullptr;  // accumulator type
  const int32_t *kept = nullptr, *chosen = nullptr, *counted = nullptr;            // expert_index, choice, load
  void* grad_logits = nullptr;  // (groups, tokens, experts) contiguous, of the dtype of the logits

  void* workspace = nullptr;  // on a GPU: as many bytes as pyext_cuda_moe_route_workspace says
};

}  // namespace pyext

// csrc/cuda/moe_route.cu; stream is a cudaStream_t. They return a cudaError_t: 0 if the launch succeeded.
extern "C" int64_t pyext_cuda_moe_route_workspace(const pyext::RouteProblem&);
extern "C" int pyext_cuda_moe_route_forward(const pyext::RouteProblem&, void* stream);
extern "C" int pyext_cuda_moe_route_backward(const pyext::RouteProblem&, void* stream);
