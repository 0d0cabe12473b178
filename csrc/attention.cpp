// The attention op: schema, checks of invariants, torch tensors -> AttentionProblem -> the kernels of the active
// instruction set, or of the GPU. Friendly messages come from Python (pyext/ops/attention.py); what is checked here
// protects memory. What tables of numbers hold is checked here on the CPU, and by the kernels on a GPU.
#include "attention.h"

#include <tuple>

#include "rotary_tensors.h"

namespace pyext {
namespace {

// (batch, heads, rows, features) in (batch, rows, heads, features) memory: what the next projection reads without a
// copy.
Tensor empty_rows(const Tensor& like, int64_t batch, int64_t heads, int64_t rows, int64_t features, bool zero) {
  return torch::stable::transpose(empty(like, {batch, rows, heads, features}, like.scalar_type(), zero), 1, 2);
}
void check_broadcast(const Tensor& t, const AttentionProblem& p, const char* name) {
  auto fits = [](int64_t size, int64_t full) { return size == full || size == 1; };
  STD_TORCH_CHECK(t.dim() == 4 && fits(t.size(0), p.batch) && fits(t.size(1), p.heads) && fits(t.size(2), p.q_len) &&
                      t.size(3) == p.k_len,
                  name,
                  " must be broadcastable to (batch, heads, query length, key length) with a full last dimension");
}

// What the kernels of the tensor's device can read in place: those of a GPU copy 16 bytes at a time.
Tensor readable_rows(const Tensor& t) {
  if (!t.is_cuda()) return readable(t);
  bool whole = t.stride(3) == 1 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t d = 0; d < 3; ++d) whole = whole && t.stride(d) * int64_t(t.element_size()) % 16 == 0;
  return whole ? t : torch::stable::contiguous(t);
}
MaybeTensor readable_rows(const MaybeTensor& t) { return t && t->dim() == 4 ? MaybeTensor(readable_rows(*t)) : t; }

// The optional arguments that forward and backward share, kept alive while the kernel reads them.
struct Arguments {
  Tensor query, key, value;
  MaybeTensor dense, diag, diag_index, rel_query, rel_q, rel_k, rel_index, segment, segment_q, segment_k, mask,
      intervals, block_offsets, block_index, block_bits, sinks, cu_seqlens_q, cu_seqlens_k, seed;
  int64_t left, right;
  double scale, softcap, dropout_p;

  AttentionProblem problem() {
    STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
                    "query, key and value must have 4 dimensions");
    query = readable_rows(query), key = readable_rows(key), value = readable_rows(value);
    dense = readable(dense), mask = readable(mask);
    rel_query = readable_rows(rel_query), rel_q = readable_rows(rel_q), rel_k = readable_rows(rel_k);
    for (MaybeTensor* t : {&diag, &diag_index, &rel_index, &segment, &segment_q, &segment_k, &intervals, &block_offsets,
                           &block_index, &block_bits, &sinks, &cu_seqlens_q, &cu_seqlens_k, &seed})
      *t = contiguous(*t);
    if (query.is_cuda()) check_device();
    AttentionProblem p;
    p.dtype = dtype_of(query);
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
    add_relative(p);
    add_segments(p);
    add_masks(p);
    add_blocks(p);
    add_sequences(p);
    if (dropout_p > 0) {
      STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1,
                      "dropout needs an int64 seed");
      p.seed = uint64_t(*static_cast<const int64_t*>(seed->const_data_ptr()));
    }
    return p;
  }

  // Of what the kernels on a GPU read. They refuse what they do not know.
  void check_device() const {
    STD_TORCH_CHECK(same_device(query, key) && same_device(query, value), "query, key and value must share a device");
    for (const MaybeTensor* t :
         {&diag, &diag_index, &intervals, &rel_query, &rel_q, &rel_k, &rel_index, &segment, &segment_q, &segment_k})
      STD_TORCH_CHECK(!*t || same_device(query, **t), "biases and masks must be on the device of query");
    for (const MaybeTensor* t : {&dense, &mask, &block_offsets, &sinks, &cu_seqlens_q, &seed})
      STD_TORCH_CHECK(!*t,
                      "the CUDA kernels know windows, intervals, diagonal biases, relative rows and segments only");
  }

  static int64_t strip_length(const AttentionProblem& p) { return p.q_len + p.k_len == 0 ? 0 : p.q_len + p.k_len - 1; }
  // One row number per distance.
  static const int32_t* index_of_distances(const Tensor& t, int64_t length, int64_t rows, const char* name) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.numel() == length, name,
                    " must hold q_len + k_len - 1 int32");
    const auto* index = static_cast<const int32_t*>(t.const_data_ptr());
    for (int64_t u = 0; t.is_cpu() && u < length; ++u)
      STD_TORCH_CHECK(index[u] >= 0 && index[u] < rows, name, " must lie in [0, rows)");
    return index;
  }

  void add_bias(AttentionProblem& p) const {
    if (dense) {
      check_broadcast(*dense, p, "dense");
      p.dense = view<Input>(*dense), p.dense_dtype = dtype_of(*dense);
      STD_TORCH_CHECK(p.dense_dtype != DType::f64 || p.dtype == DType::f64,
                      "a float64 dense bias needs float64 queries");
    }
    if (diag) {
      const int64_t length = strip_length(p);
      STD_TORCH_CHECK(diag->dim() == 2 && (diag->size(0) == p.heads || diag->size(0) == 1) &&
                          diag->scalar_type() == accumulator(query),
                      "diag must have shape (heads or 1, rows) and the accumulator dtype");
      p.diag = diag->const_data_ptr(), p.diag_heads = diag->size(0), p.diag_rows = diag->size(1);
      if (diag_index)
        p.diag_index = index_of_distances(*diag_index, length, p.diag_rows, "diag_index");
      else
        STD_TORCH_CHECK(p.diag_rows == length, "diag must have q_len + k_len - 1 columns");
    }
    if (sinks) {
      STD_TORCH_CHECK(sinks->numel() == p.heads && sinks->scalar_type() == accumulator(query),
                      "sinks must have shape (heads,) and the accumulator dtype");
      p.sinks = sinks->const_data_ptr();
    }
  }

  void add_relative(AttentionProblem& p) const {
    if (!rel_q && !rel_k) return;
    STD_TORCH_CHECK(rel_index && rel_query.has_value() == rel_q.has_value(),
                    "relative rows need rel_index, and rel_q needs rel_query");
    p.rel_rows = (rel_q ? *rel_q : *rel_k).size(2);
    p.rel_index = index_of_distances(*rel_index, strip_length(p), p.rel_rows, "rel_index");
    auto rows = [&](const Tensor& t, Input& to, int64_t& batch, int64_t& heads) {
      STD_TORCH_CHECK(t.dim() == 4 && (t.size(0) == p.batch || t.size(0) == 1) &&
                          (t.size(1) == p.heads || t.size(1) == 1) && t.size(2) == p.rel_rows &&
                          t.size(3) == p.head_dim && t.scalar_type() == query.scalar_type(),
                      "relative rows must have shape (batch or 1, heads or 1, rows, head_dim) and the query's dtype");
      to = view<Input>(t), batch = t.size(0), heads = t.size(1);
    };
    if (rel_k) rows(*rel_k, p.rel_k, p.rel_k_batch, p.rel_k_heads);
    if (!rel_q) return;
    rows(*rel_q, p.rel_q, p.rel_q_batch, p.rel_q_heads);
    STD_TORCH_CHECK(rel_query->dim() == 4 && rel_query->size(0) == p.batch && rel_query->size(1) == p.heads &&
                        rel_query->size(2) == p.q_len && rel_query->size(3) == p.head_dim &&
                        rel_query->scalar_type() == query.scalar_type(),
                    "rel_query must have the query's shape and dtype");
    p.rel_query = view<Input>(*rel_query);
  }

  void add_segments(AttentionProblem& p) const {
    if (!segment) return;
    STD_TORCH_CHECK(segment->dim() == 4 && segment->size(0) == p.batch && segment->size(1) == p.heads &&
                        segment->size(2) == p.q_len && segment->size(3) == 2 &&
                        segment->scalar_type() == accumulator(query) && !cu_seqlens_q,
                    "segment must have shape (batch, heads, query length, 2) and the accumulator dtype");
    auto ids = [&](const MaybeTensor& t, int64_t length, int64_t& batch_stride) {
      STD_TORCH_CHECK(t && t->dim() == 2 && (t->size(0) == p.batch || t->size(0) == 1) && t->size(1) == length &&
                          t->scalar_type() == ScalarType::Int,
                      "segment ids must be int32 (batch or 1, length)");
      batch_stride = t->size(0) == 1 ? 0 : length;
      return static_cast<const int32_t*>(t->const_data_ptr());
    };
    p.segment = segment->const_data_ptr();
    p.segment_q = ids(segment_q, p.q_len, p.segment_q_batch);
    p.segment_k = ids(segment_k, p.k_len, p.segment_k_batch);
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
  }

  void add_blocks(AttentionProblem& p) const {
    if (!block_offsets) return;
    const int64_t rows = (p.q_len + kBlock - 1) / kBlock, columns = (p.k_len + kBlock - 1) / kBlock;
    STD_TORCH_CHECK(block_index && block_bits && block_offsets->dim() == 3 &&
                        (block_offsets->size(0) == p.batch || block_offsets->size(0) == 1) &&
                        (block_offsets->size(1) == p.heads || block_offsets->size(1) == 1) &&
                        block_offsets->size(2) == rows + 1 && block_offsets->scalar_type() == ScalarType::Int,
                    "block_offsets must be int32 (batch or 1, heads or 1, rows of blocks + 1)");
    STD_TORCH_CHECK(block_index->dim() == 2 && block_index->size(1) == 2 &&
                        block_index->scalar_type() == ScalarType::Int && block_bits->dim() == 3 &&
                        block_bits->size(1) == kBlock && block_bits->size(2) == kBlock / 8 &&
                        block_bits->scalar_type() == ScalarType::Byte && !cu_seqlens_q,
                    "block_index must be int32 (entries, 2), block_bits uint8 (bitmaps, 128, 16)");
    p.block_offsets = static_cast<const int32_t*>(block_offsets->const_data_ptr());
    p.block_index = static_cast<const int32_t*>(block_index->const_data_ptr());
    p.block_bits = static_cast<const uint8_t*>(block_bits->const_data_ptr());
    p.block_head = block_offsets->size(1) == 1 ? 0 : rows + 1;
    p.block_batch = block_offsets->size(0) == 1 ? 0 : block_offsets->size(1) * (rows + 1);
    for (int64_t t = 0; t < block_offsets->numel(); ++t) {
      const int32_t at = p.block_offsets[t];
      STD_TORCH_CHECK(at >= 0 && at <= block_index->size(0) && (t % (rows + 1) == 0 || at >= p.block_offsets[t - 1]),
                      "block_offsets must not decrease and lie within block_index");
    }
    for (int64_t n = 0; n < block_index->size(0); ++n)
      STD_TORCH_CHECK(p.block_index[2 * n] >= 0 && p.block_index[2 * n] < columns && p.block_index[2 * n + 1] >= -1 &&
                          p.block_index[2 * n + 1] < block_bits->size(0),
                      "block_index must hold numbers of blocks of keys and of bitmaps");
  }

  void add_sequences(AttentionProblem& p) const {
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

// A direction's kernels: for GPUs of compute capability 9.0, which do not take every problem, and for all.
struct Launchers {
  int64_t (*hopper_workspace)(const AttentionProblem&), (*workspace)(const AttentionProblem&);
  int (*hopper)(const AttentionProblem&, void*), (*launch)(const AttentionProblem&, void*);
};
// Runs the best of them that takes the problem, with as much scratch memory as it asks for.
[[maybe_unused]] int launch_best(const Tensor& query, AttentionProblem& p, void* stream, const Launchers& of) {
  const int64_t bytes = compute_capability(query) == 90 ? of.hopper_workspace(p) : -1;
  const bool hopper = bytes >= 0;
  const Tensor memory = workspace(query, hopper ? bytes : of.workspace(p));
  p.workspace = memory.mutable_data_ptr();
  return (hopper ? of.hopper : of.launch)(p, stream);
}

// What rotates query and key.
struct Rotation {
  const Tensor &cos_q, &sin_q;
  const MaybeTensor& positions_q;
  const Tensor &cos_k, &sin_k;
  const MaybeTensor& positions_k;
  const bool interleaved;
};

// `rotation`: the members of a Rotation, or nothing.
template <class... Rotary>
std::tuple<Tensor, Tensor> attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& dense, const MaybeTensor& diag,
    const MaybeTensor& diag_index, const MaybeTensor& rel_query, const MaybeTensor& rel_q, const MaybeTensor& rel_k,
    const MaybeTensor& rel_index, const MaybeTensor& segment, const MaybeTensor& segment_q,
    const MaybeTensor& segment_k, const MaybeTensor& mask, const MaybeTensor& intervals,
    const MaybeTensor& block_offsets, const MaybeTensor& block_index, const MaybeTensor& block_bits,
    const MaybeTensor& sinks, const MaybeTensor& cu_seqlens_q, const MaybeTensor& cu_seqlens_k, const MaybeTensor& seed,
    int64_t left, int64_t right, double scale, double softcap, double dropout_p, Rotary... rotation) {
  Arguments a{query,     key,           value,       dense,      diag,      diag_index,   rel_query,
              rel_q,     rel_k,         rel_index,   segment,    segment_q, segment_k,    mask,
              intervals, block_offsets, block_index, block_bits, sinks,     cu_seqlens_q, cu_seqlens_k,
              seed,      left,          right,       scale,      softcap,   dropout_p};
  AttentionProblem p = a.problem();
  Tensor out = empty_rows(a.query, p.batch, p.heads, p.q_len, p.value_dim, false);
  Tensor lse = empty(a.query, {p.batch, p.heads, p.q_len}, ScalarType::Double);
  p.out = view<Output>(out), p.lse = static_cast<double*>(lse.mutable_data_ptr());
  if constexpr (sizeof...(rotation) > 0) {
    STD_TORCH_CHECK(!p.rel_index, "relative rows would have to say which query and key they mean");
    const Rotation r{rotation...};
    RotaryTables of_query{r.cos_q, r.sin_q, r.positions_q}, of_key{r.cos_k, r.sin_k, r.positions_k};
    const RotaryProblem query_by = of_query.problem(a.query, r.interleaved, false),
                        key_by = of_key.problem(a.key, r.interleaved, false);
    p.rotate_query = &query_by, p.rotate_key = &key_by;
    kernels().attention_forward(p, parallel());
  } else {
    run_on_device(
        a.query, "query", [&] { kernels().attention_forward(p, parallel()); },
        [&](auto stream) {
          const bool relative = p.rel_index != nullptr;
          return launch_best(
              a.query, p, stream,
              {pyext_cuda_attention_forward_sm90_workspace,
               relative ? pyext_cuda_attention_relative_forward_workspace : pyext_cuda_attention_forward_workspace,
               pyext_cuda_attention_forward_sm90,
               relative ? pyext_cuda_attention_relative_forward : pyext_cuda_attention_forward});
        });
  }
  return {out, lse};
}

constexpr auto rotated_forward = &attention_forward<const Tensor&, const Tensor&, const MaybeTensor&, const Tensor&,
                                                    const Tensor&, const MaybeTensor&, bool>;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const MaybeTensor& grad_lse, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& out, const Tensor& lse, const MaybeTensor& dense, const MaybeTensor& diag,
    const MaybeTensor& diag_index, const MaybeTensor& rel_query, const MaybeTensor& rel_q, const MaybeTensor& rel_k,
    const MaybeTensor& rel_index, const MaybeTensor& segment, const MaybeTensor& segment_q,
    const MaybeTensor& segment_k, const MaybeTensor& mask, const MaybeTensor& intervals,
    const MaybeTensor& block_offsets, const MaybeTensor& block_index, const MaybeTensor& block_bits,
    const MaybeTensor& sinks, const MaybeTensor& cu_seqlens_q, const MaybeTensor& cu_seqlens_k, const MaybeTensor& seed,
    int64_t left, int64_t right, double scale, double softcap, double dropout_p, bool need_dense, bool need_diag,
    bool need_rel_q, bool need_rel_k, bool need_segment) {
  Arguments a{query,     key,           value,       dense,      diag,      diag_index,   rel_query,
              rel_q,     rel_k,         rel_index,   segment,    segment_q, segment_k,    mask,
              intervals, block_offsets, block_index, block_bits, sinks,     cu_seqlens_q, cu_seqlens_k,
              seed,      left,          right,       scale,      softcap,   dropout_p};
  AttentionProblem p = a.problem();
  const ScalarType acc = accumulator(a.query);
  STD_TORCH_CHECK(grad_out.dim() == 4 && out.dim() == 4, "grad_out and out must have 4 dimensions");
  Tensor grad = readable_rows(grad_out), saved_out = readable_rows(out), saved_lse = torch::stable::contiguous(lse);
  auto is_output = [&](const Tensor& t) {
    return same_device(t, a.query) && t.size(0) == p.batch && t.size(1) == p.heads && t.size(2) == p.q_len &&
           t.size(3) == p.value_dim && t.scalar_type() == a.query.scalar_type();
  };
  auto is_lse = [&](const Tensor& t) {
    return same_device(t, a.query) && t.numel() == p.batch * p.heads * p.q_len && t.scalar_type() == ScalarType::Double;
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
  Tensor grad_rel_query = a.rel_query ? empty_rows(a.query, p.batch, p.heads, p.q_len, p.head_dim, !p.rel_q.data)
                                      : empty(a.query, {0}, acc);
  if (a.rel_query) p.grad_rel_query = view<Output>(grad_rel_query);
  // Gradients in the accumulator type, empty where they are not wanted.
  auto gradient = [&](const MaybeTensor& of, bool needed) {
    if (!of || !needed) return empty(a.query, {0}, acc);
    Tensor zeros = torch::stable::new_empty(a.query, of->sizes(), acc);
    use_huge_pages(zeros);
    return torch::stable::zero_(zeros);
  };
  Tensor grad_dense = gradient(a.dense, need_dense), grad_diag = gradient(a.diag, need_diag),
         grad_rel_q = gradient(a.rel_q, need_rel_q), grad_rel_k = gradient(a.rel_k, need_rel_k),
         grad_segment = gradient(a.segment, need_segment), grad_sinks = gradient(a.sinks, true);
  if (a.dense && need_dense) p.grad_dense = view<Output>(grad_dense);
  if (a.diag && need_diag) p.grad_diag = grad_diag.mutable_data_ptr();
  if (a.rel_q && need_rel_q) p.grad_rel_q = grad_rel_q.mutable_data_ptr();
  if (a.rel_k && need_rel_k) p.grad_rel_k = grad_rel_k.mutable_data_ptr();
  if (a.segment && need_segment) p.grad_segment = grad_segment.mutable_data_ptr();
  if (a.sinks) p.grad_sinks = grad_sinks.mutable_data_ptr();
  run_on_device(
      a.query, "query", [&] { kernels().attention_backward(p, parallel()); },
      [&](auto stream) {
        const bool relative = p.rel_index != nullptr;
        return launch_best(a.query, p, stream,
                           {relative ? pyext_cuda_attention_relative_backward_sm90_workspace
                                     : pyext_cuda_attention_backward_sm90_workspace,
                            !relative      ? pyext_cuda_attention_backward_workspace
                            : p.rel_k.data ? pyext_cuda_attention_relative_both_backward_workspace
                                           : pyext_cuda_attention_relative_backward_workspace,
                            relative ? pyext_cuda_attention_relative_backward_sm90 : pyext_cuda_attention_backward_sm90,
                            !relative      ? pyext_cuda_attention_backward
                            : p.rel_k.data ? pyext_cuda_attention_relative_both_backward
                                           : pyext_cuda_attention_relative_backward});
      });
  return {grad_query,     grad_key,   grad_value, grad_dense,   grad_diag,
          grad_rel_query, grad_rel_q, grad_rel_k, grad_segment, grad_sinks};
}

// The fields of pyext._primitives.AttentionProblem after query, key and value, in their order.
#define PYEXT_ATTENTION_PROBLEM                                                                        \
  "Tensor? dense, Tensor? diag, Tensor? diag_index, Tensor? rel_query, Tensor? rel_q, Tensor? rel_k, " \
  "Tensor? rel_index, Tensor? segment, Tensor? segment_q, Tensor? segment_k, Tensor? mask, "           \
  "Tensor? intervals, Tensor? block_offsets, Tensor? block_index, Tensor? block_bits, Tensor? sinks, " \
  "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seed, SymInt left, SymInt right, float scale, " \
  "float softcap, float dropout_p"

}  // namespace

STABLE_TORCH_LIBRARY(pyext, m) {
  m.def("attention_forward(Tensor query, Tensor key, Tensor value, " PYEXT_ATTENTION_PROBLEM ") -> (Tensor, Tensor)");
  m.def("attention_rotated_forward(Tensor query, Tensor key, Tensor value, " PYEXT_ATTENTION_PROBLEM
        ", Tensor cos_q, Tensor sin_q, Tensor? positions_q, Tensor cos_k, Tensor sin_k, Tensor? positions_k, "
        "bool interleaved) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
      "Tensor lse, " PYEXT_ATTENTION_PROBLEM
      ", bool need_dense, bool need_diag, bool need_rel_q, bool need_rel_k, bool need_segment) -> (Tensor, Tensor, "
      "Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward<>));
  m.impl("attention_rotated_forward", TORCH_BOX(rotated_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

#if defined(PYEXT_CUDA)
STABLE_TORCH_LIBRARY_IMPL(pyext, CUDA, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward<>));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}
#endif

}  // namespace pyext
