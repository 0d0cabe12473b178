// The attention op: schema, checks of invariants, torch tensors -> AttentionProblem -> the kernels of the active
// instruction set. Friendly messages come from Python (pyext/ops/attention.py); what is checked here protects memory.
#include "attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "parallel.h"

namespace pyext {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Double:
      return DType::f64;
    default:
      STD_TORCH_CHECK(false, "pyext::attention takes float32, bfloat16, float16 and float64 tensors");
  }
}

// What a kernel may read in place: unit feature stride. Anything else is copied.
Tensor readable(const Tensor& t) {
  return t.size(-1) <= 1 || t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}
MaybeTensor readable(const MaybeTensor& t) { return t ? MaybeTensor(readable(*t)) : t; }
MaybeTensor contiguous(const MaybeTensor& t) { return t ? MaybeTensor(torch::stable::contiguous(*t)) : t; }

template <class View>
View view(const Tensor& t) {
  View v;
  if constexpr (std::is_same_v<View, Output>)
    v.data = t.mutable_data_ptr();
  else
    v.data = t.const_data_ptr();
  // Broadcast dimensions of size 1 get stride 0, so that any index reads the one entry.
  v.batch = t.size(0) == 1 ? 0 : t.stride(0);
  v.head = t.size(1) == 1 ? 0 : t.stride(1);
  v.row = t.size(2) == 1 ? 0 : t.stride(2);
  return v;
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype, bool zero = false) {
  torch::headeronly::IntHeaderOnlyArrayRef shape(sizes.begin(), sizes.size());
  return zero ? torch::stable::new_zeros(like, shape, dtype) : torch::stable::new_empty(like, shape, dtype);
}
// (batch, heads, rows, features) in (batch, rows, heads, features) memory: what the next projection reads without a
// copy.
Tensor empty_rows(const Tensor& like, int64_t batch, int64_t heads, int64_t rows, int64_t features, bool zero) {
  return torch::stable::transpose(empty(like, {batch, rows, heads, features}, like.scalar_type(), zero), 1, 2);
}
ScalarType accumulator(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_broadcast(const Tensor& t, const AttentionProblem& p, const char* name) {
  auto fits = [](int64_t size, int64_t full) { return size == full || size == 1; };
  STD_TORCH_CHECK(t.dim() == 4 && fits(t.size(0), p.batch) && fits(t.size(1), p.heads) && fits(t.size(2), p.q_len) &&
                      t.size(3) == p.k_len,
                  name,
                  " must be broadcastable to (batch, heads, query length, key length) with a full last dimension");
}

// The optional arguments that forward and backward share, kept alive while the kernel reads them.
struct Arguments {
  Tensor query, key, value;
  MaybeTensor dense, diag, diag_index, mask, intervals, sinks, cu_seqlens_q, cu_seqlens_k, seed;
  int64_t left, right;
  double scale, softcap, dropout_p;

  AttentionProblem problem() {
    query = readable(query), key = readable(key), value = readable(value), dense = readable(dense),
    mask = readable(mask);
    diag = contiguous(diag), diag_index = contiguous(diag_index), intervals = contiguous(intervals),
    sinks = contiguous(sinks);
    cu_seqlens_q = contiguous(cu_seqlens_q), cu_seqlens_k = contiguous(cu_seqlens_k), seed = contiguous(seed);
    AttentionProblem p;
    p.dtype = dtype_of(query);
    STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
                    "query, key and value must have 4 dimensions");
    STD_TORCH_CHECK(key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type(),
                    "query, key and value must share a dtype");
    p.batch = query.size(0), p.heads = query.size(1), p.q_len = query.size(2), p.head_dim = query.size(3);
    p.kv_heads = key.size(1), p.k_len = key.size(2), p.value_dim = value.size(3);
    STD_TORCH_CHECK(key.size(0) == p.batch && value.size(0) == p.batch && value.size(1) == p.kv_heads &&
                        value.size(2) == p.k_len && key.size(3) == p.head_dim &&
                        (p.kv_heads == 0 ? p.heads == 0 : p.heads % p.kv_heads == 0),
                    "query, key and value must have matching shapes");
    STD_TORCH_CHECK(p.q_len < INT32_MAX && p.k_len < INT32_MAX, "sequences must be shorter than 2^31");
    p.query = view<Input>(query), p.key = view<Input>(key), p.value = view<Input>(value);
    p.left = left, p.right = right, p.scale = scale, p.softcap = softcap, p.dropout_p = dropout_p;
    add_bias(p);
    add_masks(p);
    if (dropout_p > 0) {
      STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                      "dropout needs an int64 seed");
      p.seed = uint64_t(*static_cast<const int64_t*>(seed->const_data_ptr()));
    }
    return p;
  }

  void add_bias(AttentionProblem& p) const {
    if (dense) {
      check_broadcast(*dense, p, "dense");
      p.dense = view<Input>(*dense), p.dense_dtype = dtype_of(*dense);
      STD_TORCH_CHECK(p.dense_dtype != DType::f64 || p.dtype == DType::f64,
                      "a float64 dense bias needs float64 queries");
    }
    if (diag) {
      const int64_t length = p.q_len + p.k_len == 0 ? 0 : p.q_len + p.k_len - 1;
      STD_TORCH_CHECK(diag->dim() == 2 && (diag->size(0) == p.heads || diag->size(0) == 1) &&
                          diag->scalar_type() == accumulator(query),
                      "diag must have shape (heads or 1, rows) and the accumulator dtype");
      p.diag = diag->const_data_ptr(), p.diag_heads = diag->size(0), p.diag_rows = diag->size(1);
      if (diag_index) {
        STD_TORCH_CHECK(diag_index->scalar_type() == ScalarType::Int && diag_index->numel() == length,
                        "diag_index must hold q_len + k_len - 1 int32");
        p.diag_index = static_cast<const int32_t*>(diag_index->const_data_ptr());
        for (int64_t t = 0; t < length; ++t)
          STD_TORCH_CHECK(p.diag_index[t] >= 0 && p.diag_index[t] < p.diag_rows,
                          "diag_index must lie in [0, rows of diag)");
      } else {
        STD_TORCH_CHECK(p.diag_rows == length, "diag must have q_len + k_len - 1 columns");
      }
    }
    if (sinks) {
      STD_TORCH_CHECK(sinks->numel() == p.heads && sinks->scalar_type() == accumulator(query),
                      "sinks must have shape (heads,) and the accumulator dtype");
      p.sinks = sinks->const_data_ptr();
    }
  }

  void add_masks(AttentionProblem& p) const {
    if (mask) {
      check_broadcast(*mask, p, "mask");
      STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask must be bool");
      p.mask = view<Input>(*mask);
    }
    if (intervals) {
      STD_TORCH_CHECK(intervals->dim() == 3 && (intervals->size(0) == p.batch || intervals->size(0) == 1) &&
                          intervals->size(1) == p.q_len && intervals->size(2) == 2 &&
                          intervals->scalar_type() == ScalarType::Int,
                      "intervals must be int32 (batch or 1, query length, 2)");
      p.intervals = static_cast<const int32_t*>(intervals->const_data_ptr());
      p.intervals_batch = intervals->size(0) == 1 ? 0 : 2 * p.q_len;
    }
    if (!cu_seqlens_q) return;
    STD_TORCH_CHECK(cu_seqlens_k && !mask && !dense && p.batch == 1,
                    "cu_seqlens need batch 1, both offsets, and no dense bias or mask");
    p.sequences = cu_seqlens_q->numel() - 1;
    p.cu_seqlens_q = offsets(*cu_seqlens_q, p.sequences, p.q_len);
    p.cu_seqlens_k = offsets(*cu_seqlens_k, p.sequences, p.k_len);
  }
  static const int32_t* offsets(const Tensor& t, int64_t sequences, int64_t total) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && sequences >= 0 && t.numel() == sequences + 1,
                    "cu_seqlens must be int32 of equal lengths");
    const auto* at = static_cast<const int32_t*>(t.const_data_ptr());
    STD_TORCH_CHECK(at[0] == 0 && at[sequences] == total, "cu_seqlens must run from 0 to the number of rows");
    for (int64_t n = 0; n < sequences; ++n) STD_TORCH_CHECK(at[n] <= at[n + 1], "cu_seqlens must not decrease");
    return at;
  }
};

// torch's thread pool. A call from inside another parallel region gets one thread and still works.
void run_parallel(int64_t count, void (*body)(int64_t, void*), void* context) {
  struct Call {
    void (*body)(int64_t, void*);
    void* context;
  } call{body, context};
  auto range = [](int64_t begin, int64_t end, void* p) {
    const Call& c = *static_cast<const Call*>(p);
    for (int64_t i = begin; i < end; ++i) c.body(i, c.context);
  };
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, 1, range, &call));
}
Parallel parallel() { return {int(torch::stable::get_num_threads()), run_parallel}; }

const KernelTable& kernels() {
  const KernelTable* table = active_kernels();
  STD_TORCH_CHECK(table, "this processor has none of the instruction sets that the kernels were built for");
  return *table;
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                             const MaybeTensor& dense, const MaybeTensor& diag,
                                             const MaybeTensor& diag_index, const MaybeTensor& mask,
                                             const MaybeTensor& intervals, const MaybeTensor& sinks,
                                             const MaybeTensor& cu_seqlens_q, const MaybeTensor& cu_seqlens_k,
                                             const MaybeTensor& seed, int64_t left, int64_t right, double scale,
                                             double softcap, double dropout_p) {
  Arguments a{query,        key,          value, dense, diag,  diag_index, mask,    intervals, sinks,
              cu_seqlens_q, cu_seqlens_k, seed,  left,  right, scale,      softcap, dropout_p};
  AttentionProblem p = a.problem();
  Tensor out = empty_rows(a.query, p.batch, p.heads, p.q_len, p.value_dim, false);
  Tensor lse = empty(a.query, {p.batch, p.heads, p.q_len}, ScalarType::Double);
  p.out = view<Output>(out), p.lse = static_cast<double*>(lse.mutable_data_ptr());
  kernels().attention_forward(p, parallel());
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const MaybeTensor& grad_lse, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& out, const Tensor& lse, const MaybeTensor& dense, const MaybeTensor& diag,
    const MaybeTensor& diag_index, const MaybeTensor& mask, const MaybeTensor& intervals, const MaybeTensor& sinks,
    const MaybeTensor& cu_seqlens_q, const MaybeTensor& cu_seqlens_k, const MaybeTensor& seed, int64_t left,
    int64_t right, double scale, double softcap, double dropout_p, bool need_dense, bool need_diag) {
  Arguments a{query,        key,          value, dense, diag,  diag_index, mask,    intervals, sinks,
              cu_seqlens_q, cu_seqlens_k, seed,  left,  right, scale,      softcap, dropout_p};
  AttentionProblem p = a.problem();
  const ScalarType acc = accumulator(a.query);
  Tensor grad = readable(grad_out), saved_out = readable(out), saved_lse = torch::stable::contiguous(lse);
  auto is_output = [&](const Tensor& t) {
    return t.dim() == 4 && t.size(0) == p.batch && t.size(1) == p.heads && t.size(2) == p.q_len &&
           t.size(3) == p.value_dim && t.scalar_type() == a.query.scalar_type();
  };
  auto is_lse = [&](const Tensor& t) {
    return t.numel() == p.batch * p.heads * p.q_len && t.scalar_type() == ScalarType::Double;
  };
  STD_TORCH_CHECK(is_output(grad) && is_output(saved_out) && is_lse(saved_lse),
                  "grad_out, out and lse must match the forward's results");
  p.grad_out = view<Input>(grad), p.out = view<Output>(saved_out),
  p.lse = static_cast<double*>(const_cast<void*>(saved_lse.const_data_ptr()));
  MaybeTensor lse_grad = contiguous(grad_lse);
  if (lse_grad) {
    STD_TORCH_CHECK(is_lse(*lse_grad), "grad_lse must match lse");
    p.grad_lse = static_cast<const double*>(lse_grad->const_data_ptr());
  }
  Tensor grad_query = empty_rows(a.query, p.batch, p.heads, p.q_len, p.head_dim, false);
  Tensor grad_key = empty_rows(a.query, p.batch, p.kv_heads, p.k_len, p.head_dim, false);
  Tensor grad_value = empty_rows(a.query, p.batch, p.kv_heads, p.k_len, p.value_dim, false);
  p.grad_query = view<Output>(grad_query), p.grad_key = view<Output>(grad_key), p.grad_value = view<Output>(grad_value);
  need_dense = need_dense && a.dense, need_diag = need_diag && a.diag;
  Tensor grad_dense =
      need_dense ? empty(a.query, {a.dense->size(0), a.dense->size(1), a.dense->size(2), a.dense->size(3)}, acc, true)
                 : empty(a.query, {0}, acc);
  Tensor grad_diag = need_diag ? empty(a.query, {p.diag_heads, p.diag_rows}, acc, true) : empty(a.query, {0}, acc);
  Tensor grad_sinks = a.sinks ? empty(a.query, {p.heads}, acc, true) : empty(a.query, {0}, acc);
  if (need_dense) p.grad_dense = view<Output>(grad_dense);
  if (need_diag) p.grad_diag = grad_diag.mutable_data_ptr();
  if (a.sinks) p.grad_sinks = grad_sinks.mutable_data_ptr();
  kernels().attention_backward(p, parallel());
  return {grad_query, grad_key, grad_value, grad_dense, grad_diag, grad_sinks};
}

#define PYEXT_ATTENTION_PROBLEM                                                                               \
  "Tensor? dense, Tensor? diag, Tensor? diag_index, Tensor? mask, Tensor? intervals, Tensor? sinks, Tensor? " \
  "cu_seqlens_q, "                                                                                            \
  "Tensor? cu_seqlens_k, Tensor? seed, SymInt left, SymInt right, float scale, float softcap, float dropout_p"

}  // namespace

STABLE_TORCH_LIBRARY(pyext, m) {
  m.def("attention_forward(Tensor query, Tensor key, Tensor value, " PYEXT_ATTENTION_PROBLEM ") -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
      "Tensor lse, " PYEXT_ATTENTION_PROBLEM
      ", bool need_dense, bool need_diag) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace pyext
