// The flat attention problem that every CPU kernel receives: pointers, sizes, strides. No torch headers here.
//
//   S(i, j) = softcap(scale * q_i . k_j) + dense(b, h, i, j) + diag(h, diag_index[u]) + scale * rel_query_i .
//             rel_q[rel_index[u]] + scale * k_j . rel_k[rel_index[u]] + segment(b, h, i, segment_q_i == segment_k_j),
//   u = distance + k_len - 1, distance = j - (i + k_len - q_len); key j is visible when -left <= distance <= right and
//   lo_i <= j < hi_i and mask(i, j) and the bit (i, j) of the block table is set;
//   P = dropout(softmax(S, with sinks as one more logit)), out = P v, lse = log(sum(exp(S)))
#pragma once
#include "rotary.h"

namespace pyext {

// Queries and keys of a block of the block table.
constexpr int64_t kBlock = 128;

struct AttentionProblem {
  DType dtype = DType::f32;  // of query, key, value, out and their gradients; "accumulator type": f64 for f64, else f32
  int64_t batch = 0, heads = 0, kv_heads = 0, q_len = 0, k_len = 0, head_dim = 0, value_dim = 0;
  Input query, key, value;
  const RotaryProblem *rotate_query = nullptr, *rotate_key = nullptr;  // forward without relative rows only: what to
                                                                       // rotate them by first; null: nothing
  Output out;
  double* lse = nullptr;  // (batch, heads, q_len) contiguous, natural logarithm

  Input dense;  // unit last stride, broadcast dimensions have stride 0
  DType dense_dtype = DType::f32;
  const void* diag = nullptr;  // (heads or 1, diag_rows) contiguous, accumulator type
  int64_t diag_heads = 0, diag_rows = 0;
  const int32_t* diag_index = nullptr;  // (q_len + k_len - 1,), or null for the identity
  Input rel_query;                      // like query
  Input rel_q, rel_k;                   // (batch or 1, heads or 1, rel_rows, head_dim), dtype
  int64_t rel_rows = 0, rel_q_batch = 0, rel_q_heads = 0, rel_k_batch = 0, rel_k_heads = 0;
  const int32_t* rel_index = nullptr;                // (q_len + k_len - 1,)
  const void* segment = nullptr;                     // (batch, heads, q_len, 2) contiguous, accumulator type
  const int32_t* segment_q = nullptr;                // (batch or 1, q_len)
  const int32_t* segment_k = nullptr;                // (batch or 1, k_len)
  int64_t segment_q_batch = 0, segment_k_batch = 0;  // strides in elements, 0 broadcasts
  Input mask;                                        // bytes, non-zero = attend
  const int32_t* intervals = nullptr;                // (batch or 1, q_len, 2): [lo, hi)
  int64_t intervals_batch = 0;                       // batch stride in elements, 0 broadcasts
  const int32_t* block_offsets = nullptr;            // (batch or 1, heads or 1, rows of blocks + 1), into block_index
  const int32_t* block_index = nullptr;              // (entries, 2): block of keys, bitmap or -1 for a full block
  const uint8_t* block_bits = nullptr;               // (bitmaps, kBlock, kBlock / 8): bit c % 8 of byte c / 8 is key c
  int64_t block_batch = 0, block_head = 0;           // strides in elements, 0 broadcasts
  const void* sinks = nullptr;                       // (heads,), accumulator type
  const int32_t* cu_seqlens_q = nullptr;  // (sequences + 1,): sequences packed along the rows; then batch is 1
  const int32_t* cu_seqlens_k = nullptr;
  int64_t sequences = 0;
  int64_t left = 0, right = 0;
  double scale = 1, softcap = 0, dropout_p = 0;
  uint64_t seed = 0;

  // Backward only.
  Input grad_out;
  const double* grad_lse = nullptr;  // like lse, may be null
  Output grad_query, grad_key, grad_value, grad_rel_query;
  Output grad_dense;             // accumulator type, zeroed, summed over dimensions of stride 0; null: not wanted
  void* grad_diag = nullptr;     // like diag; null: not wanted
  void* grad_rel_q = nullptr;    // like rel_q, contiguous, accumulator type, zeroed; null: not wanted
  void* grad_rel_k = nullptr;    // like rel_k
  void* grad_segment = nullptr;  // like segment, zeroed; null: not wanted
  void* grad_sinks = nullptr;    // like sinks; null: not wanted

  // On a GPU: scratch memory, see below.
  void* workspace = nullptr;
};

}  // namespace pyext

// csrc/cuda/attention_sm80*.cu, for the problems that pyext/_dispatch.py lets them have: bf16 and fp16, head dimensions
// that are multiples of 8 up to 128 (forward without relative rows 256), windows, intervals, diagonal biases, relative
// rows of queries, or of queries and keys, and beside them segments. stream is a cudaStream_t. They return a
// cudaError_t: 0 if the launch succeeded. The problem's workspace has as many bytes as they ask for.
extern "C" int pyext_cuda_attention_forward(const pyext::AttentionProblem&, void* stream);
extern "C" int64_t pyext_cuda_attention_forward_workspace(const pyext::AttentionProblem&);
extern "C" int pyext_cuda_attention_backward(const pyext::AttentionProblem&, void* stream);
extern "C" int64_t pyext_cuda_attention_backward_workspace(const pyext::AttentionProblem&);
// Those of problems with relative rows, which the two above do not take.
extern "C" int pyext_cuda_attention_relative_forward(const pyext::AttentionProblem&, void* stream);
extern "C" int64_t pyext_cuda_attention_relative_forward_workspace(const pyext::AttentionProblem&);
extern "C" int pyext_cuda_attention_relative_backward(const pyext::AttentionProblem&, void* stream);
extern "C" int64_t pyext_cuda_attention_relative_backward_workspace(const pyext::AttentionProblem&);
extern "C" int pyext_cuda_attention_relative_both_backward(const pyext::AttentionProblem&, void* stream);
extern "C" int64_t pyext_cuda_attention_relative_both_backward_workspace(const pyext::AttentionProblem&);
// csrc/cuda/attention_sm90*.cu, on devices of compute capability 9.0; a workspace of -1 bytes: not this problem.
extern "C" int pyext_cuda_attention_forward_sm90(const pyext::AttentionProblem&, void* stream);
extern "C" int64_t pyext_cuda_attention_forward_sm90_workspace(const pyext::AttentionProblem&);
extern "C" int pyext_cuda_attention_backward_sm90(const pyext::AttentionProblem&, void* stream);
extern "C" int64_t pyext_cuda_attention_backward_sm90_workspace(const pyext::AttentionProblem&);
extern "C" int pyext_cuda_attention_relative_backward_sm90(const pyext::AttentionProblem&, void* stream);
extern "C" int64_t pyext_cuda_attention_relative_backward_sm90_workspace(const pyext::AttentionProblem&);
