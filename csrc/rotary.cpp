// The rotary op: schema, checks of invariants, torch tensors -> RotaryProblem -> the kernels of the active instruction
// set, or of the GPU. Friendly messages come from Python (pyext/ops/rotary.py); what is checked here protects memory.
#include <tuple>
#include <utility>

#include "rotary_tensors.h"

namespace pyext {
namespace {

// A fresh tensor like x, dense, with x's order of batch, heads and rows in memory: their strides, longest first.
Tensor empty_in_order_of(const Tensor& x) {
  int64_t order[] = {0, 1, 2};
  auto sort = [&](int a, int b) {
    if (x.stride(order[a]) < x.stride(order[b])) std::swap(order[a], order[b]);
  };
  sort(0, 1), sort(1, 2), sort(0, 1);
  Tensor out = empty(x, {x.size(order[0]), x.size(order[1]), x.size(order[2]), x.size(3)}, x.scalar_type());
  for (int64_t d = 0; d < 2; ++d) {  // bring dimension d to its place
    const int64_t at = order[d] == d ? d : order[d + 1] == d ? d + 1 : 2;
    if (at != d) out = torch::stable::transpose(out, d, at), std::swap(order[d], order[at]);
  }
  return out;
}

Tensor rotary_forward(const Tensor& x, const Tensor& cos, const Tensor& sin, const MaybeTensor& positions,
                      bool interleaved, bool inverse) {
  Tensor input = readable(x);
  RotaryTables tables{cos, sin, positions};
  RotaryProblem p = tables.problem(input, interleaved, inverse);
  Tensor out = empty_in_order_of(x);
  use_huge_pages(out);
  p.out = view<Output>(out);
  run_on_device(
      input, "x", [&] { kernels().rotary_forward(p, parallel()); },
      [&](auto stream) { return pyext_cuda_rotary_forward(p, stream); });
  return out;
}

// torch.sort(t, stable=True) along the last dimension: values and indices.
std::tuple<Tensor, Tensor> sort(const Tensor& t) {
  using torch::stable::detail::from, torch::stable::detail::to;
  StableIValue stack[] = {from(t), from(std::optional<bool>(true)), from(int64_t{-1}), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack, TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

std::tuple<Tensor, Tensor> rotary_backward(const Tensor& grad, const Tensor& x, const MaybeTensor& positions,
                                           int64_t table_batch, int64_t table_rows, int64_t half, bool interleaved,
                                           bool inverse) {
  Tensor input = readable(x), upstream = readable(grad);
  RotaryProblem p = rotary_problem(input, half, interleaved, inverse);
  STD_TORCH_CHECK(upstream.dim() == 4 && upstream.scalar_type() == input.scalar_type() && upstream.size(0) == p.batch &&
                      upstream.size(1) == p.heads && upstream.size(2) == p.length && upstream.size(3) == p.head_dim &&
                      same_device(upstream, input),
                  "grad must match x");
  STD_TORCH_CHECK((table_batch == 1 || table_batch == p.batch) && table_rows >= 0,
                  "the tables must have x's batch size, or 1");
  const MaybeTensor rows = contiguous(positions);
  add_positions(p, input, rows, table_rows);
  p.grad = view<Input>(upstream);
  p.table_batch = table_batch;
  Tensor grad_cos = empty(input, {table_batch, table_rows, half}, accumulator(input));
  Tensor grad_sin = empty(input, {table_batch, table_rows, half}, accumulator(input));
  p.grad_cos = grad_cos.mutable_data_ptr(), p.grad_sin = grad_sin.mutable_data_ptr();
  std::tuple<Tensor, Tensor> tokens;
  if (input.is_cuda() && rows) {
    tokens = sort(table_batch == 1 ? torch::stable::flatten(*rows, 0, 1) : *rows);
    p.sorted = static_cast<const int64_t*>(std::get<0>(tokens).const_data_ptr());
    p.order = static_cast<const int64_t*>(std::get<1>(tokens).const_data_ptr());
  }
  run_on_device(
      input, "x", [&] { kernels().rotary_backward(p, parallel()); },
      [&](auto stream) { return pyext_cuda_rotary_backward(p, stream); });
  return {grad_cos, grad_sin};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyext, m) {
  m.def(
      "rotary_forward(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse) -> Tensor");
  m.def(
      "rotary_backward(Tensor grad, Tensor x, Tensor? positions, SymInt table_batch, SymInt table_rows, SymInt half, "
      "bool interleaved, bool inverse) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyext, CPU, m) {
  m.impl("rotary_forward", TORCH_BOX(&rotary_forward));
  m.impl("rotary_backward", TORCH_BOX(&rotary_backward));
}

#if defined(PYEXT_CUDA)
STABLE_TORCH_LIBRARY_IMPL(pyext, CUDA, m) {
  m.impl("rotary_forward", TORCH_BOX(&rotary_forward));
  m.impl("rotary_backward", TORCH_BOX(&rotary_backward));
}
#endif

}  // namespace pyext
